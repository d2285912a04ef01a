"""Reads ECU feature tokens, and verifies them where the token key is known.

The form is that of docs/token.md, version 1: a tagged COSE_Sign1 (RFC 9052,
section 4.2) in the deterministic encoding of CBOR (RFC 8949, section 4.2.1).
The reader knows only the CBOR that a token may hold; everything else is
malformed, so no option of a general decoder can be hit.

The ECU is the judge of a token. The agent reads it to see that it fits the
right that it stands for, and carries it unchanged.
Does no I/O and reads no clock. Raises only TrustError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

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
_U64 = 2**64 - 1
_TAG_SIGN1 = 18
_SCALAR_TERMS = {1: (0, _U64), 2: (0, _U64), 3: (0, _U64), 8: (0, _U64)}
_COUNTED_TERMS = {5: (1, _U32), 6: (1, _U32), 7: (1, _U32)}
_TERM_RANGES = _SCALAR_TERMS | _COUNTED_TERMS
_TERM_ODOMETER = 4

# CBOR major types, RFC 8949 section 3.1
_UINT, _NINT, _BYTES, _TEXT, _ARRAY, _MAP, _TAG = range(7)


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
class _Sign1:
    """What stands under tag 18."""

    value: object


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
    expected_kid = hashlib.sha256(public_key).digest()[:KID_BYTES]
    if claims.kid != expected_kid:
        raise SignatureError(f"token: expected key {expected_kid.hex()}, found {claims.kid.hex()}")
    link_vin = _text(vin) if claims.link != LINK_UID else b"\xf6"  # null
    link_uid = _bytes(uid) if claims.link != LINK_VIN else b"\xf6"
    external = b"\x83" + _text("openfod-token-v1") + link_vin + link_uid
    # Sig_structure, RFC 9052 section 4.4
    signed = b"\x84" + _text("Signature1") + _bytes(envelope.protected) + _bytes(external)
    signed += _bytes(envelope.payload)
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(envelope.signature, signed)
    except InvalidSignature as error:
        raise SignatureError(
            f"token: signature of key {expected_kid.hex()} does not hold: forged, or made for"
            f" another vehicle than {vin} or another ECU than {uid.hex()}"
        ) from error
    return claims


def _read(content: bytes) -> tuple[_Envelope, TokenClaims]:
    if len(content) > MAX_TOKEN_BYTES:
        raise LimitError("token, bytes", limit=MAX_TOKEN_BYTES, found=len(content))
    tagged = _Reader(content).whole()
    match tagged:
        case _Sign1([bytes() as protected, dict() as unprotected, bytes() as payload, bytes() as signature]):
            pass
        case _:
            raise MalformedError("token: expected a tagged COSE_Sign1 of four parts")
    _require(not unprotected, "unprotected header", "an empty map", unprotected)
    _require(len(signature) == SIGNATURE_BYTES, "signature", f"{SIGNATURE_BYTES} bytes", len(signature))
    header = _Reader(protected).whole()
    match header:
        case {1: -8, 4: bytes() as kid, **other} if not other and len(kid) == KID_BYTES:
            pass
        case _:
            raise MalformedError(f"token: expected protected header {{1: -8, 4: kid}}, found {shown(header)}")
    return _Envelope(protected, payload, signature), _claims(kid, _Reader(payload).whole())


def _claims(kid: bytes, found: object) -> TokenClaims:
    if not isinstance(found, dict):
        raise MalformedError(f"token claims: expected a map, found {shown(found)}")
    unknown = found.keys() - {1, 2, 3, 4, 5, 6, 7}
    _require(not unknown, "claims", "numbers 1 to 7", unknown)
    _number(found.get(1), "claim 1 (version)", 1, 1)
    feature = _number(found.get(2), "claim 2 (feature)", 1, _U16)
    counter = _number(found.get(3), "claim 3 (counter)", 1, _U32)
    state = _number(found.get(4), "claim 4 (state)", 0, 1)
    link = _number(found.get(5, LINK_BOTH), "claim 5 (link)", LINK_VIN, LINK_BOTH)
    _require(state == 1 or 6 not in found, "claim 6 (terms)", "none when state is 0", found.get(6))  # noqa: PLR2004
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
                case [int() as from_m, int() as to_m] if 0 <= from_m < to_m:
                    terms[key] = (from_m, to_m)
                case _:
                    raise MalformedError(f"token term 4: expected a range in metres, found {shown(value)}")
        elif key in _TERM_RANGES:
            terms[key] = _number(value, f"term {key}", *_TERM_RANGES[key])
        else:  # an unknown limit is not "no limit"
            raise MalformedError(f"token terms: expected numbers 1 to 8, found {shown(key)}")
    return terms


def _require(condition: bool, what: str, expected: str, found: object) -> None:
    if not condition:
        raise MalformedError(f"token {what}: expected {expected}, found {shown(found)}")


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


class _Reader:
    """Reads deterministic CBOR: integers, byte and text strings, arrays, maps and tag 18."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def whole(self) -> object:
        """Read the one item that the content consists of."""
        value = self._item(0)
        if self._at != len(self._content):
            raise MalformedError(f"token: {len(self._content) - self._at} bytes after the end")
        return value

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) != count:
            raise MalformedError(f"token: expected {count} more bytes, found {len(taken)}")
        self._at += count
        return taken

    def _argument(self, short: int) -> int:
        """Read the argument of an item's head; only its shortest form (RFC 8949 section 4.2.1)."""
        if short < 24:  # noqa: PLR2004
            return short
        if short > 27:  # noqa: PLR2004
            raise MalformedError("token: reserved or indefinite length")
        size = 1 << (short - 24)
        value = int.from_bytes(self._take(size), "big")
        if value < (24 if size == 1 else 1 << (4 * size)):
            raise MalformedError(f"token: {value} is not in its shortest form")
        return value

    def _item(self, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise LimitError("token, depth of nesting", limit=MAX_DEPTH, found=depth)
        initial = self._take(1)[0]
        major = initial >> 5
        if major > _TAG:
            raise MalformedError("token: expected no simple value and no float")
        argument = self._argument(initial & 0x1F)
        if major == _UINT:
            return argument
        if major == _NINT:
            return -1 - argument
        if major == _BYTES:
            return self._take(argument)
        if major == _TEXT:
            return self._decoded(self._take(argument))
        if major == _ARRAY:
            return [self._item(depth + 1) for _ in range(argument)]
        if major == _MAP:
            return self._map(argument, depth)
        if argument != _TAG_SIGN1 or depth > 0:
            raise MalformedError(f"token: expected tag {_TAG_SIGN1} around everything, found {argument}")
        return _Sign1(self._item(depth + 1))

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
            key = self._item(depth + 1)
            encoded = self._content[begin : self._at]
            if not isinstance(key, int | str | bytes) or encoded <= previous:
                raise MalformedError("token: keys of a map are not in order, each once")
            found[key], previous = self._item(depth + 1), encoded
        return found
