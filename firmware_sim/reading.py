"""Signs what an ECU has counted of a feature's use (docs/reading.md).

COSE_Sign1 (RFC 9052 section 4.2) with Ed25519 (RFC 8032) in deterministic CBOR
(RFC 8949 section 4.2.1). A reading has few kinds of items, so they are encoded
here and no library is needed. Pure: the same count and key give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from firmware_sim.token import MAX_FEATURE, UID_BYTES, UINT32_MAX, key_id

MAX_READING_BYTES = 512
"""Longest reading, bytes."""
MAX_COUNT = 2**53
"""Highest cumulative count, ms or times: 285,000 years, and exact in every language."""
VERSION = 1
"""Version of the claims table."""

_UINT, _BYTES, _MAP = 0, 2, 5
_ENVELOPE = b"\xd2\x84"  # tag 18, an array of 4
_PROTECTED_HEAD = bytes.fromhex("a201270448")  # {1: -8 (EdDSA), 4: kid of 8 bytes}
_EMPTY_MAP = b"\xa0"
_SIGNATURE_CONTEXT = b"\x84\x6aSignature1"  # RFC 9052 section 4.4
_EXTERNAL = b"\x81\x72openfod-reading-v1"
_ONE_BYTE = 24


@dataclass(frozen=True, slots=True)
class Counted:
    """What an ECU says of one feature.

    Args:
        feature: its number in this ECU, 1 to 65,535.
        reading: how many readings this ECU has signed, this one included; 1 to 4,294,967,295.
        token_counter: of the token in force; 0 if there is none.
        on_ms: time with the output on since production, 0 to MAX_COUNT.
        executions: how often it went on since production; None if that is not counted.
    """

    feature: int
    reading: int
    token_counter: int
    on_ms: int
    executions: int | None = None


def sign(key: Ed25519PrivateKey, uid: bytes, counted: Counted) -> bytes:
    """Signs one reading.

    Args:
        key: the ECU's own.
        uid: the ECU's own uid, 16 bytes.

    Raises:
        ValueError: a number is outside its range; a programming error.
    """
    ranges = (
        ("length of the uid", len(uid), UID_BYTES, UID_BYTES),
        ("feature", counted.feature, 1, MAX_FEATURE),
        ("reading", counted.reading, 1, UINT32_MAX),
        ("token counter", counted.token_counter, 0, UINT32_MAX),
        ("on time", counted.on_ms, 0, MAX_COUNT),
        ("executions", counted.executions or 0, 0, MAX_COUNT),
    )
    for what, found, lowest, highest in ranges:
        if not lowest <= found <= highest:
            raise ValueError(f"{what}: expected {lowest} to {highest}, found {found}")
    numbers = {3: counted.feature, 4: counted.reading, 5: counted.token_counter, 6: counted.on_ms}
    if counted.executions is not None:
        numbers[7] = counted.executions
    claims = [_head(_UINT, 1) + _head(_UINT, VERSION), _head(_UINT, 2) + _byte_string(uid)]
    claims += [_head(_UINT, claim) + _head(_UINT, value) for claim, value in numbers.items()]
    payload = _byte_string(_head(_MAP, len(claims)) + b"".join(claims))
    protected = _byte_string(_PROTECTED_HEAD + key_id(key.public_key().public_bytes_raw()))
    signature = key.sign(_SIGNATURE_CONTEXT + protected + _byte_string(_EXTERNAL) + payload)
    return _ENVELOPE + protected + _EMPTY_MAP + payload + _byte_string(signature)


def _head(major: int, argument: int) -> bytes:
    """The head of an item in its shortest form (RFC 8949 section 4.2.1)."""
    if argument < _ONE_BYTE:
        return bytes([major << 5 | argument])
    size = next(n for n in (1, 2, 4, 8) if argument < 1 << 8 * n)
    return bytes([major << 5 | _ONE_BYTE + size.bit_length() - 1]) + argument.to_bytes(size)


def _byte_string(content: bytes) -> bytes:
    return _head(_BYTES, len(content)) + content
