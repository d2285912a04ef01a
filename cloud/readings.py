"""Judges what ECUs sign of their own counts against what vehicles say that they metered.

Format and rules: docs/reading.md. Pure: no I/O and no clock. A reading bills
nothing and refuses nothing: what does not fit becomes a finding for a person
(cloud/attestation.py), and the usage that brought it is taken all the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloud.catalogue import Catalogue
from cloud.errors import ReadingError
from openfod.usage.v1 import usage_pb2

MAX_READING_BYTES = 512
"""Longest reading."""
MAX_COUNT = 2**53
"""Highest cumulative count, ms or times."""
UID_BYTES = 16
"""Length of an ECU's uid."""
TOLERANCE_MS = 5_000
"""What the ECU may have counted beyond all declared bounds, once and not in each span."""
CLOCK_PER_MILLE = 1
"""How far two clocks may drift apart, of the time that the ECU counted."""
EXECUTION_MS = 200
"""For each time the output went on: between the output and the frames that tell of it."""
BLOCK_MS = 10 * 3_600_000
"""ECU time over which declared gaps are compared with what was metered."""
METERED_PERCENT = 80
"""Least part of a block that has to be metered, not only declared."""

EXCESS = "reading-excess"
"""The ECU counted more than the vehicle metered and declared: use that was never metered."""
DECLARED = "reading-declared"
"""The ECU counted what the vehicle declared as a gap instead of metering it."""
BACK = "reading-back"
"""A reading that was there before, or counts that went back."""

_UINT, _BYTES = 0, 2
_ONE_BYTE, _EIGHT_BYTES = 24, 27
_UINT32_MAX = 0xFFFF_FFFF
_MAX_FEATURE = 0xFFFF

# The envelope in its only deterministic encoding (docs/reading.md, "Form"): tag 18, an array of 4,
# the protected header {1: -8, 4: kid}, the empty unprotected header, the payload, the signature.
_HEAD = bytes.fromhex("d2844da201270448")
_KID = slice(8, 16)
_PROTECTED = slice(2, 16)
_EMPTY_MAP = b"\xa0"
_PAYLOAD_AT = 17
_SIGNATURE_HEAD = b"\x58\x40"
_SIGNATURE_BYTES = 64
_SIGNED_BEFORE = b"\x84\x6aSignature1"  # RFC 9052 section 4.4
_EXTERNAL = b"\x54\x81\x72openfod-reading-v1"
_CLAIMS_HEADS = {b"\xa6": (3, 4, 5, 6), b"\xa7": (3, 4, 5, 6, 7)}
"""By the head of the claims map: the claims that follow version and uid."""
_RANGES = {
    3: (1, _MAX_FEATURE),
    4: (1, _UINT32_MAX),
    5: (0, _UINT32_MAX),
    6: (0, MAX_COUNT),
    7: (0, MAX_COUNT),
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A well-formed reading; who signed it is not known before `check_signature`.

    Args:
        uid: of the ECU, 16 bytes.
        feature: its number in that ECU, 1 to 65,535.
        reading: counts the readings of the ECU, from 1.
        token_counter: of the token in force; 0 if there is none.
        on_ms: time with the feature's output on, since production.
        executions: how often it went on; None if the ECU does not count that.
    """

    content: bytes
    uid: bytes
    feature: int
    reading: int
    token_counter: int
    on_ms: int
    executions: int | None

    def check_signature(self, key: bytes) -> None:
        """Checks that `key` (Ed25519 public, 32 bytes) signed it (RFC 9052 section 4.4).

        Raises:
            ReadingError: it did not.
        """
        kid = hashlib.sha256(key).digest()[:8]
        if self.content[_KID] != kid:
            raise ReadingError(f"signed under kid {self.content[_KID].hex()}, registered is {kid.hex()}")
        payload = self.content[_PAYLOAD_AT : -len(_SIGNATURE_HEAD) - _SIGNATURE_BYTES]
        signed = _SIGNED_BEFORE + self.content[_PROTECTED] + _EXTERNAL + payload
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(self.content[-_SIGNATURE_BYTES:], signed)
        except InvalidSignature as error:
            raise ReadingError("the signature does not verify under the ECU's registered key") from error


@dataclass(frozen=True, slots=True)
class ReadingRow:
    """The latest reading of one feature, and what was metered since.

    Args:
        ecu_uid, content, stored_ms: of the latest reading; empty and 0 before the first.
        is_verified: its signature was checked; only then it is compared with the next one.
        reading, token_counter, on_ms, executions: as it says.
        excess_ms: what the ECU counted beyond what was metered and declared, at that reading;
            below 0 by what the window that carried it may hold of later use.
        value_ms, gap_ms, is_unbounded: sums of the records behind that reading.
        window_end_ms, window_ms: end of the newest window, and value and gap of its records.
        block_on_ms, block_value_ms: counted by the ECU and metered in the present block.
        contact_day, silent_days: newest day of contact since 1970, and days without a reading.
    """

    feature_id: str
    ecu_uid: bytes = b""
    content: bytes = b""
    stored_ms: int = 0
    is_verified: bool = False
    reading: int = 0
    token_counter: int = 0
    on_ms: int = 0
    executions: int = 0
    excess_ms: int = 0
    value_ms: int = 0
    gap_ms: int = 0
    is_unbounded: bool = False
    window_end_ms: int = 0
    window_ms: int = 0
    block_on_ms: int = 0
    block_value_ms: int = 0
    contact_day: int = 0
    silent_days: int = 0


@dataclass(frozen=True, slots=True)
class Attested:
    """A feature whose ECU signs what it counts, as the newest release that says so describes it.

    Args:
        meter_id: duration meter that measures what the ECU counts.
        feature_number: its number in the ECU.
    """

    meter_id: str
    ecu_identifier: str
    feature_number: int


def attested(catalogue: Catalogue) -> Mapping[str, Attested]:
    """The features of a catalogue whose ECUs sign readings, by id."""
    return {
        feature_id: Attested(release.reading_meter, release.ecu_identifier, release.feature_number)
        for feature_id, releases in catalogue.releases.items()
        for release in releases
        if release.reading_meter
    }


# --- the format ------------------------------------------------------------------


def parse(content: bytes) -> Reading:
    """Reads a reading without trusting it.

    Raises:
        ReadingError: any departure from docs/reading.md.
    """
    if not len(_HEAD) < len(content) <= MAX_READING_BYTES:
        raise ReadingError(f"{len(content)} bytes, expected at most {MAX_READING_BYTES}")
    if not content.startswith(_HEAD) or content[16:17] != _EMPTY_MAP:
        raise ReadingError(f"expected a COSE_Sign1 that begins {_HEAD.hex()}, found {content[:8].hex()}")
    payload = _Items(content, _PAYLOAD_AT)
    size = payload.argument("payload", _BYTES, 1, MAX_READING_BYTES)
    claims, end = content[payload.at : payload.at + size], payload.at + size
    tail = content[end:]
    if len(tail) != len(_SIGNATURE_HEAD) + _SIGNATURE_BYTES or not tail.startswith(_SIGNATURE_HEAD):
        raise ReadingError(f"expected a signature of {_SIGNATURE_BYTES} bytes at the end")
    numbers = _CLAIMS_HEADS.get(claims[:1])
    if numbers is None or claims[1:5] != bytes.fromhex("01010250"):
        raise ReadingError(
            "claims: expected a map of 6 or 7 that begins with version 1 and a uid of 16 bytes"
        )
    items = _Items(claims, 5 + UID_BYTES)
    found: dict[int, int] = {}
    for claim in numbers:
        items.argument(f"key of claim {claim}", _UINT, claim, claim)
        found[claim] = items.argument(f"claim {claim}", _UINT, *_RANGES[claim])
    if items.at != len(claims):
        raise ReadingError(f"{len(claims) - items.at} bytes after the claims")
    uid = claims[5 : 5 + UID_BYTES]
    return Reading(content, uid, found[3], found[4], found[5], found[6], found.get(7))


class _Items:
    """Reads heads of CBOR items, each in its shortest form only (RFC 8949 section 4.2.1)."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self.at = content, at

    def argument(self, what: str, major: int, lowest: int, highest: int) -> int:
        """The argument of the next head, which has to be of a type and in a range."""
        initial = self._content[self.at] if self.at < len(self._content) else 0xFF
        self.at += 1
        argument = initial & 0x1F
        if _ONE_BYTE <= argument <= _EIGHT_BYTES:
            size = 1 << (argument - _ONE_BYTE)
            raw = self._content[self.at : self.at + size]
            self.at += size
            argument = int.from_bytes(raw)
            if len(raw) != size or argument < (_ONE_BYTE if size == 1 else 1 << (4 * size)):
                raise ReadingError(f"{what}: cut, or longer than its shortest form")
        if initial >> 5 != major or initial & 0x1F > _EIGHT_BYTES or not lowest <= argument <= highest:
            raise ReadingError(f"{what}: expected CBOR type {major} of {lowest} to {highest}")
        return argument


# --- the comparison ---------------------------------------------------------------


def with_record(row: ReadingRow, record: usage_pb2.UsageRecord) -> ReadingRow:
    """Adds a record of the meter that measures what the ECU counts, in the order of the journal."""
    amount = record.value + record.gap
    same_window = record.window_end_ms == row.window_end_ms
    return replace(
        row,
        value_ms=row.value_ms + record.value,
        gap_ms=row.gap_ms + record.gap,
        is_unbounded=row.is_unbounded or record.gap_unbounded,
        window_end_ms=record.window_end_ms,
        window_ms=amount + (row.window_ms if same_window else 0),
    )


def with_reading(row: ReadingRow, reading: Reading, now_ms: int) -> tuple[ReadingRow, tuple[str, str] | None]:
    """Takes a reading whose signature was checked, behind the record that carries it.

    What the ECU counted up to reading k is compared with all that was metered
    and declared up to the record that carries it, from every earlier reading
    on (a cumulative sum test, Page 1954): slack from one span hides nothing in
    the next, and small excesses add up. The windows that carry a reading begin
    before it was made, so theirs is the only amount that counts on both sides.

    Returns:
        the row to keep, and what does not fit, as (kind, text), or None.
    """
    begun = replace(
        row,
        ecu_uid=reading.uid,
        content=reading.content,
        stored_ms=now_ms,
        is_verified=True,
        reading=reading.reading,
        token_counter=reading.token_counter,
        on_ms=reading.on_ms,
        executions=reading.executions or 0,
        excess_ms=-row.window_ms,
        value_ms=0,
        gap_ms=0,
        is_unbounded=False,
    )
    if not row.is_verified or row.ecu_uid != reading.uid:
        return replace(begun, block_on_ms=0, block_value_ms=0), None
    if reading.reading <= row.reading:
        text = f"reading {reading.reading} of the ECU came again or late: {row.reading} was there before"
        return row, (BACK, text)
    counts = ("on_ms", "token_counter", "executions")
    before = {name: getattr(row, name) for name in counts}
    if fell := [name for name in counts if getattr(begun, name) < before[name]]:
        words = ", ".join(f"{name} {before[name]}, now {getattr(begun, name)}" for name in fell)
        text = f"counts of the ECU went back between readings {row.reading} and {reading.reading}: {words}"
        return replace(begun, block_on_ms=0, block_value_ms=0), (BACK, text)
    grown_ms = reading.on_ms - row.on_ms
    allowed_ms = row.value_ms + row.gap_ms + grown_ms * CLOCK_PER_MILLE // 1000
    allowed_ms += EXECUTION_MS * (begun.executions - row.executions)
    excess_ms = row.excess_ms + grown_ms - allowed_ms
    begun = replace(
        begun, block_on_ms=row.block_on_ms + grown_ms, block_value_ms=row.block_value_ms + row.value_ms
    )
    if not row.is_unbounded and excess_ms > TOLERANCE_MS:
        return begun, (
            EXCESS,
            (
                f"the ECU counted {grown_ms} ms between readings {row.reading} and {reading.reading};"
                f" {row.value_ms} ms were metered and {row.gap_ms} ms declared as gaps,"
                f" {excess_ms} ms too few since it last fitted"
            ),
        )
    if not row.is_unbounded:
        begun = replace(begun, excess_ms=max(excess_ms, begun.excess_ms))
    if begun.block_on_ms < BLOCK_MS:
        return begun, None
    on_ms, metered_ms = begun.block_on_ms, begun.block_value_ms
    begun = replace(begun, block_on_ms=0, block_value_ms=0)
    if metered_ms * 100 >= on_ms * METERED_PERCENT:
        return begun, None
    return begun, (
        DECLARED,
        (
            f"of the last {on_ms} ms that the ECU counted, up to reading {reading.reading}, only"
            f" {metered_ms} ms were metered; the rest was declared as gaps"
        ),
    )
