"""Reads ECU feature tokens, and verifies them where the token key is known.

The form is that of docs/token.md, version 1: a tagged COSE_Sign1 (RFC 9052,
section 4.2) in the deterministic encoding of CBOR (RFC 8949, section 4.2.1).
Of the envelope only kid, payload and signature can differ, so that the rest is
compared. The reader knows only the CBOR that a payload may hold; everything
else is malformed, so no option of a general decoder can be hit.

The ECU is the judge of a token. The agent reads it to see that it fits the
right that it stands for, and carries it unchanged.
Does no I/O and reads no clock. Raises only TrustError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent.errors import LimitError, MalformedError, SignatureError
from agent.wire import shown

MAX_TOKEN_BYTES = 256
MAX_DEPTH = 4
MAX_PARAMETER_BYTES = 32
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
KID_BYTES = 8
UID_BYTES = 16

LINK_VIN = 1
LINK_UID = 2
LINK_BOTH = 3

_U16 = 2**16 - 1
_U32 = 2**32 - 1
# Tag 18, array of four, protected header {1: -8 (EdDSA), 4: kid of 8 bytes}; the unprotected one is empty.
_BEFORE_KID = bytes.fromhex("d2844da201270448")
_PROTECTED_BEGIN = 3
_KID_BEGIN = len(_BEFORE_KID)
_KID_END = _KID_BEGIN + KID_BYTES
_AFTER_KID = b"\xa0"
_PAYLOAD_BEGIN = _KID_END + len(_AFTER_KID)
_SCALAR_TERMS = {1: (0, _U32), 2: (0, _U32), 3: (0, _U32), 8: (0, _U32)}
_COUNTED_TERMS = {5: (1, _U32), 6: (1, _U32), 7: (1, _U32)}
_TERM_RANGES = _SCALAR_TERMS | _COUNTED_TERMS
_TERM_ODOMETER = 4
_CLAIMS = frozenset({1, 2, 3, 4, 5, 6, 7})

# CBOR major types, RFC 8949 section 3.1
_UINT, _NINT, _BYTES, _TEXT, _ARRAY, _MAP = range(6)


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """What a token says; numbers of claims and terms as in docs/token.md.

    Args:
        kid: first 8 bytes of SHA-256 over the token key's public half.
        feature: number of the feature in its ECU, 1 to 65,535.
        counter: 1 to 2^32 - 1.
        allows: claim state: True switches on, False burns older tokens.
        link: 1 VIN, 2 ECU uid, 3 both.
        terms: limits by number; the odometer range (4) is a pair.
        parameters: 1 to 32 bytes, or None.
    """

    kid: bytes
    feature: int
    counter: int
    allows: bool
    link: int
    terms: Mapping[int, int | tuple[int, int]] = field(default_factory=dict)
    parameters: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Envelope:
    protected: bytes
    payload: bytes
    signature: bytes


def parse_token(content: bytes) -> TokenClaims:
    """Read a token without checking its signature.

    Args:
        content: 1 to 256 bytes.

    Raises:
        LimitError: more than 256 bytes.
        MalformedError: not of the form, or a claim out of its range.
    """
    return _read(content)[1]


def verify_token(content: bytes, public_key: bytes, vin: str, uid: bytes) -> TokenClaims:
    """Verify a token as its ECU does, the counter rules excepted.

    Args:
        content: 1 to 256 bytes.
        public_key: token key, Ed25519, 32 bytes.
        vin: VIN of this vehicle, 17 characters.
        uid: unique identifier of the ECU, 16 bytes.

    Raises:
        LimitError, MalformedError: as `parse_token`; or the key or the uid
            does not have its length.
        SignatureError: another key, or made for another VIN or uid.
    """
    if len(public_key) != PUBLIC_KEY_BYTES or len(uid) != UID_BYTES:
        raise MalformedError(
            f"token key and uid: expected {PUBLIC_KEY_BYTES} and {UID_BYTES} bytes,"
            f" found {len(public_key)} and {len(uid)}"
        )
    envelope, claims = _read(content)
    key, expected_kid = _key(public_key)
    if claims.kid != expected_kid:
        raise SignatureError(f"token: expected key {expected_kid.hex()}, found {claims.kid.hex()}")
    link_vin = _text(vin) if claims.link != LINK_UID else b"\xf6"  # null
    link_uid = _bytes(uid) if claims.link != LINK_VIN else b"\xf6"
    external = _EXTERNAL + link_vin + link_uid
    # Sig_structure, RFC 9052 section 4.4
    signed = _SIGNATURE1 + _bytes(envelope.protected) + _bytes(external) + _bytes(envelope.payload)
    try:
        key.verify(envelope.signature, signed)
    except InvalidSignature as error:
        raise SignatureError(
            f"token: signature of key {expected_kid.hex()} does not hold: forged, or made for"
            f" another vehicle than {vin} or another ECU than {uid.hex()}"
        ) from error
    return claims


@lru_cache(maxsize=8)
def _key(public_key: bytes) -> tuple[Ed25519PublicKey, bytes]:
    """A token key and its id: the same few keys verify every token."""
    kid = hashlib.sha256(public_key).digest()[:KID_BYTES]
    return Ed25519PublicKey.from_public_bytes(public_key), kid


def parse_announcement(content: bytes) -> int:
    """Read the epoch of a token key's announcement; its signature is the ECU's to judge.

    Args:
        content: 1 to 256 bytes (docs/token.md, "Keys").

    Returns:
        Epoch of the announced key, from 1.

    Raises:
        LimitError: more than 256 bytes.
        MalformedError: not of the form.
    """
    payload = _Reader(_open(content)[0].payload).whole()
    match payload:
        case {1: int() as epoch, 2: bytes() as key, **other} if not other and len(key) == PUBLIC_KEY_BYTES:
            return _number(epoch, "key's epoch", 1, _U32)
        case _:
            raise MalformedError(f"token key: expected {{1: epoch, 2: key}}, found {shown(payload)}")


def _read(content: bytes) -> tuple[_Envelope, TokenClaims]:
    envelope, kid = _open(content)
    return envelope, _claims(kid, _Reader(envelope.payload).whole())


def _open(content: bytes) -> tuple[_Envelope, bytes]:
    """Return the parts of a COSE_Sign1 and the id of its key."""
    if len(content) > MAX_TOKEN_BYTES:
        raise LimitError("token, bytes", limit=MAX_TOKEN_BYTES, found=len(content))
    if content[:_KID_BEGIN] != _BEFORE_KID or content[_KID_END:_PAYLOAD_BEGIN] != _AFTER_KID:
        raise MalformedError(
            "token: expected a tagged COSE_Sign1 with protected header {1: -8, 4: kid}"
            f" and an empty unprotected one, found {shown(content[:_PAYLOAD_BEGIN])}"
        )
    reader = _Reader(content, _PAYLOAD_BEGIN)
    payload, signature = reader.item(depth=1), reader.whole()
    if not isinstance(payload, bytes):
        raise MalformedError(f"token payload: expected a byte string, found {shown(payload)}")
    if not isinstance(signature, bytes) or len(signature) != SIGNATURE_BYTES:
        raise MalformedError(f"token signature: expected {SIGNATURE_BYTES} bytes, found {shown(signature)}")
    kid = content[_KID_BEGIN:_KID_END]
    return _Envelope(content[_PROTECTED_BEGIN:_KID_END], payload, signature), kid


def _claims(kid: bytes, found: object) -> TokenClaims:
    if not isinstance(found, dict):
        raise MalformedError(f"token claims: expected a map, found {shown(found)}")
    if unknown := found.keys() - _CLAIMS:
        raise MalformedError(f"token claims: expected numbers 1 to 7, found {shown(unknown)}")
    _number(found.get(1), "claim 1 (version)", 1, 1)
    feature = _number(found.get(2), "claim 2 (feature)", 1, _U16)
    counter = _number(found.get(3), "claim 3 (counter)", 1, _U32)
    state = _number(found.get(4), "claim 4 (state)", 0, 1)
    link = _number(found.get(5, LINK_BOTH), "claim 5 (link)", LINK_VIN, LINK_BOTH)
    if state == 0 and 6 in found:  # noqa: PLR2004
        raise MalformedError(f"token claim 6 (terms): expected none when state is 0, found {shown(found[6])}")
    terms = _terms(found[6]) if 6 in found else {}  # noqa: PLR2004
    parameters = _parameters(found[7]) if 7 in found else None  # noqa: PLR2004
    return TokenClaims(kid, feature, counter, state == 1, link, terms, parameters)


def _parameters(found: object) -> bytes:
    if not isinstance(found, bytes) or not 1 <= len(found) <= MAX_PARAMETER_BYTES:
        raise MalformedError(
            f"token claim 7 (parameters): expected 1 to {MAX_PARAMETER_BYTES} bytes, found {shown(found)}"
        )
    return found


def _terms(found: object) -> dict[int, int | tuple[int, int]]:
    if not isinstance(found, dict) or not found:
        raise MalformedError(f"token claim 6 (terms): expected 1 to 8 entries, found {shown(found)}")
    terms: dict[int, int | tuple[int, int]] = {}
    for key, value in found.items():
        if key == _TERM_ODOMETER:
            match value:
                case [int() as from_m, int() as to_m] if 0 <= from_m < to_m <= _U32:
                    terms[key] = (from_m, to_m)
                case _:
                    raise MalformedError(f"token term 4: expected a range in metres, found {shown(value)}")
        elif key in _TERM_RANGES:
            terms[key] = _number(value, f"term {key}", *_TERM_RANGES[key])
        else:  # an unknown limit is not "no limit"
            raise MalformedError(f"token terms: expected numbers 1 to 8, found {shown(key)}")
    return terms


def _number(found: object, what: str, lowest: int, highest: int) -> int:
    if not isinstance(found, int) or not lowest <= found <= highest:
        raise MalformedError(f"token {what}: expected {lowest} to {highest}, found {shown(found)}")
    return found


def _head(major: int, length: int) -> bytes:
    """Encode the head of an item of less than 65,536 bytes, in its shortest form."""
    if length < 24:  # noqa: PLR2004 (RFC 8949 section 3)
        return bytes([major << 5 | length])
    if length < 2**8:
        return bytes([major << 5 | 24, length])
    return bytes([major << 5 | 25]) + length.to_bytes(2, "big")


def _bytes(value: bytes) -> bytes:
    return _head(_BYTES, len(value)) + value


def _text(value: str) -> bytes:
    encoded = value.encode("utf-8")
    return _head(_TEXT, len(encoded)) + encoded


_SIGNATURE1 = b"\x84" + _text("Signature1")
_EXTERNAL = b"\x83" + _text("openfod-token-v1")


class _Reader:
    """Reads deterministic CBOR: integers, byte and text strings, arrays and maps."""

    def __init__(self, content: bytes, at: int = 0) -> None:
        self._content = content
        self._at = at

    def whole(self) -> object:
        """Read the one item that the rest of the content consists of."""
        value = self.item(0)
        if self._at != len(self._content):
            raise MalformedError(f"token: {len(self._content) - self._at} bytes after the end")
        return value

    def item(self, depth: int) -> object:
        """Read the next item; `depth` arrays and maps stand around it."""
        if depth > MAX_DEPTH:
            raise LimitError("token, depth of nesting", limit=MAX_DEPTH, found=depth)
        if self._at >= len(self._content):
            raise MalformedError("token: expected another item, found the end")
        initial = self._content[self._at]
        self._at += 1
        major, argument = initial >> 5, initial & 0x1F
        if argument >= 24:  # noqa: PLR2004 (RFC 8949 section 3)
            argument = self._argument(argument)
        if major == _UINT:
            return argument
        if major == _BYTES:
            return self._take(argument)
        if major == _MAP:
            return self._map(argument, depth)
        if major == _ARRAY:
            return [self.item(depth + 1) for _ in range(argument)]
        if major == _TEXT:
            return self._decoded(self._take(argument))
        if major == _NINT:
            return -1 - argument
        raise MalformedError("token: expected no tag, no simple value and no float")

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) != count:
            raise MalformedError(f"token: expected {count} more bytes, found {len(taken)}")
        self._at += count
        return taken

    def _argument(self, short: int) -> int:
        """Read the argument of an item's head; only its shortest form (RFC 8949 section 4.2.1)."""
        if short > 27:  # noqa: PLR2004
            raise MalformedError("token: reserved or indefinite length")
        size = 1 << (short - 24)
        value = int.from_bytes(self._take(size), "big")
        if value < (24 if size == 1 else 1 << (4 * size)):
            raise MalformedError(f"token: {value} is not in its shortest form")
        return value

    def _decoded(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedError("token: text is not UTF-8") from error

    def _map(self, count: int, depth: int) -> dict[int | str | bytes, object]:
        found: dict[int | str | bytes, object] = {}
        previous = b""
        for _ in range(count):
            begin = self._at
            key = self.item(depth + 1)
            encoded = self._content[begin : self._at]
            if not isinstance(key, int | str | bytes) or encoded <= previous:
                raise MalformedError("token: keys of a map are not in order, each once")
            found[key], previous = self.item(depth + 1), encoded
        return found
