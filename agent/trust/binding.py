"""Reads signed metadata before its signature is checked: form, vehicle, nonce.

Works on the bytes as received, before python-tuf sees them, because plain TUF
knows neither vehicles nor nonces: it takes vehicle A's genuine metadata on
vehicle B, and B is then stuck on A's version numbers.

Nothing that is read here is trusted yet. A mismatch refuses the metadata, a
match proves nothing until the signature over the same bytes has been verified.
Does no I/O and reads no clock. Raises only TrustError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

from agent.errors import LimitError, MalformedError, ReplayError, VehicleMismatchError
from agent.wire import MAX_UNIX_S, VIN, bounded, shown

MAX_JSON_DEPTH = 32
MAX_VERSION = 2**53  # integers that every JSON reader holds exactly
NONCE_BYTES = 16

# Each match of a string may end without its quote: else text full of escaped
# quotes would be scanned once for each of them.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKET = re.compile(rb"[^\[\]{}]+")
_OPENING = b"[{"


@dataclass(frozen=True, slots=True)
class Metadata:
    """One metadata file with what it says of itself, not yet verified.

    Args:
        what: repository and role, as errors name it, such as "director timestamp".
        content: the bytes as received.
        signed: the part under the signatures.
        version: 1 to 2^53.
    """

    what: str
    content: bytes
    signed: Mapping[str, object]
    version: int


def read_metadata(content: bytes, what: str, *, limit: int) -> Metadata:
    """Read the form of a metadata file.

    Args:
        content: canonical or other JSON, UTF-8.
        what: repository and role, for errors.
        limit: most bytes that are allowed.

    Raises:
        LimitError: too many bytes, or nested too deeply.
        MalformedError: not JSON, a key that stands twice, a number that is
            not an integer, no `signed` object, or no version.
    """
    bounded(f"{what}, bytes", limit=limit, found=len(content))
    if not content:
        raise MalformedError(f"{what}: missing")
    document = read_json(content, what)
    signed = document.get("signed") if isinstance(document, dict) else None
    if not isinstance(signed, dict):
        raise MalformedError(f"{what}: expected an object with an object named signed")
    version = signed.get("version")
    if not is_integer(version) or not 1 <= version <= MAX_VERSION:
        raise MalformedError(f"{what}.version: expected 1 to {MAX_VERSION}, found {shown(version)}")
    return Metadata(what, content, signed, version)


def read_json(content: bytes, what: str) -> object:
    """Read JSON that every reader understands alike.

    Raises:
        LimitError: nested too deeply.
        MalformedError: not JSON, a key that stands twice, or a number that is
            not an integer.
    """
    _check_depth(content, what)

    def refuse_number(text: str) -> NoReturn:
        raise MalformedError(f"{what}: expected integers only, found {shown(text)}")

    def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):  # two readers could each see another value
            raise MalformedError(f"{what}: a key stands twice in one JSON object")
        return found

    try:
        document: object = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_float=refuse_number,
            parse_constant=refuse_number,
        )
    except ValueError as error:  # bad UTF-8, bad JSON, or a number of thousands of digits
        raise MalformedError(f"{what}: not JSON: {error}") from error
    return document


def check_vehicle(metadata: Metadata, vin: str) -> None:
    """Refuse metadata that was not made for this vehicle.

    Raises:
        MalformedError: it names no vehicle.
        VehicleMismatchError: it names another one.
    """
    found = metadata.signed.get("vin")
    if found == vin:
        return
    if not isinstance(found, str) or not VIN.fullmatch(found):
        raise MalformedError(f"{metadata.what}.vin: expected {vin}, found {shown(found)}")
    raise VehicleMismatchError(metadata.what, expected=vin, found=found)


def check_nonce(timestamp: Metadata, nonce: bytes) -> None:
    """Refuse a timestamp that does not answer the nonce that is waiting.

    Args:
        timestamp: of the director.
        nonce: 16 bytes, sent by this vehicle and not yet answered.

    Raises:
        ReplayError: another nonce, or none.
    """
    found = timestamp.signed.get("nonce")
    if len(nonce) != NONCE_BYTES or found != nonce.hex():
        raise ReplayError(
            f"{timestamp.what}.nonce: expected {nonce.hex()}, found {shown(found)}:"
            " a captured or replayed answer; nothing of it is used"
        )


def check_live(timestamp: Metadata, nonce: bytes) -> None:
    """Refuse a timestamp of the stream that was signed for a file, or for another nonce.

    Args:
        timestamp: of the director.
        nonce: 16 bytes, sent by this vehicle and not yet answered.

    Raises:
        ReplayError: another nonce, none, or signed as offline.
    """
    check_nonce(timestamp, nonce)
    if "offline" in timestamp.signed:
        raise ReplayError(f"{timestamp.what}: expected a live answer, found one signed as offline; not used")


def check_offline(timestamp: Metadata) -> None:
    """Refuse a timestamp of a file that was not signed for a file.

    A captured answer to a nonce would else be fresh once more.

    Raises:
        ReplayError: not signed as offline, or with a nonce.
    """
    offline = timestamp.signed.get("offline")
    if offline is not True or "nonce" in timestamp.signed:
        raise ReplayError(
            f"{timestamp.what}: expected offline true and no nonce, found offline {shown(offline)}"
            f" and nonce {shown(timestamp.signed.get('nonce'))}: not made as a file; nothing of it is used"
        )


def signed_time_ms(timestamp: Metadata) -> int:
    """Read the time of the director, Unix milliseconds; to be used once its signature holds.

    Raises:
        MalformedError: absent, or not within 1970 to 9999.
    """
    found = timestamp.signed.get("time_ms")
    if not is_integer(found) or not 0 < found <= MAX_UNIX_S * 1000:
        raise MalformedError(f"{timestamp.what}.time_ms: expected Unix milliseconds, found {shown(found)}")
    return found


def is_integer(value: object) -> TypeGuard[int]:
    """Tell whether a JSON value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_depth(content: bytes, what: str) -> None:
    depth = 0
    for bracket in _NO_BRACKET.sub(b"", _STRING.sub(b"", content)):
        depth += 1 if bracket in _OPENING else -1
        if depth > MAX_JSON_DEPTH:
            raise LimitError(f"{what}, depth of nesting", limit=MAX_JSON_DEPTH, found=depth)
