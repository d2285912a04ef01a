"""Verifies feature tokens as an ECU does, with nothing but its own keys, VIN and uid.

Implements docs/token.md: COSE_Sign1 (RFC 9052 section 4.2) with Ed25519
(RFC 8032) in deterministic CBOR (RFC 8949 section 4.2.1). Does no I/O and
reads no clock. Every refusal is a TokenError that carries the NRC of
ISO 14229-1:2020 annex A; verifying raises and never returns a bool.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cbor2
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_TOKEN_BYTES = 256
"""Largest token or announcement, bytes (docs/token.md, "Form")."""
MAX_DEPTH = 4
"""Deepest nesting of arrays and maps; a token needs two in each of its parts."""
MAX_TERMS = 8
"""Most limits in one token."""
MAX_PARAMETER_BYTES = 32
UINT32_MAX = 0xFFFF_FFFF
MAX_FEATURE = 0xFFFF
VIN_LENGTH = 17
UID_BYTES = 16
KID_BYTES = 8
KEY_BYTES = 32
SIGNATURE_BYTES = 64

_TAG_18 = b"\xd2"  # RFC 9052 section 2: COSE_Sign1
_EDDSA = -8  # RFC 9053 section 2.2
_HEADER_ALG = 1
_HEADER_KID = 4
_SIGN1_ENTRIES = 4
_RANGE_ENTRIES = 2
_CLAIM_TERMS = 6
_CLAIM_PARAMETERS = 7
# RFC 8949 section 3: what the high and low bits of an item's first byte may be here.
_LAST_MAJOR = 5
_LAST_LOW = 27
_FIRST_ARGUMENT = 24


class TokenError(Exception):
    """A token or announcement that is refused; the ECU's state is unchanged.

    `nrc` is the negative response code with which the ECU answers.
    """

    nrc = 0x31


class LengthError(TokenError):
    """Empty, or longer than 256 bytes: incorrectMessageLengthOrInvalidFormat."""

    nrc = 0x13


class MalformedError(TokenError):
    """Not of the form of docs/token.md: requestOutOfRange."""


class UnknownTermError(TokenError):
    """A limit that this ECU does not implement: requestOutOfRange."""

    def __init__(self, term: int) -> None:
        super().__init__(f"term {term} is not implemented here; an unknown limit is not 'no limit'")
        self.term = term


class SignatureError(TokenError):
    """Forged, under a key that is not trusted now, or made for another VIN or uid: securityAccessDenied."""

    nrc = 0x33


class CounterError(TokenError):
    """Not newer than what was accepted: requestSequenceError."""

    nrc = 0x24


class Term(enum.IntEnum):
    """Limits of docs/token.md, "Terms"."""

    NOT_AFTER = 1
    DAYS = 2
    DISTANCE = 3
    ODOMETER_RANGE = 4
    IGNITION_CYCLES = 5
    OPERATING_TIME = 6
    EXECUTIONS = 7
    SPEED_LIMIT = 8


IMPLEMENTED_TERMS = frozenset({Term.IGNITION_CYCLES, Term.OPERATING_TIME, Term.EXECUTIONS, Term.SPEED_LIMIT})
"""Limits that the simulated ECU measures. It has neither an authenticated clock
nor an authenticated odometer, so it refuses terms 1 to 4."""


class Link(enum.IntEnum):
    """What a token is bound to; also a mask: 1 is the VIN, 2 the uid."""

    VIN = 1
    UID = 2
    BOTH = 3


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says.

    Args:
        feature: number of the feature in this ECU, 1 to 65,535.
        counter: 1 to 4,294,967,295.
        allowed: claim "state".
        terms: value of each limit; empty means unlimited.
        parameters: 0 to 32 bytes, meaning given by the catalogue.
    """

    feature: int
    counter: int
    allowed: bool
    link: Link
    terms: Mapping[int, int | tuple[int, int]]
    parameters: bytes


@dataclass(frozen=True, slots=True)
class Token:
    """A well-formed token that is not verified yet."""

    content: bytes
    kid: bytes
    protected: bytes
    payload: bytes
    signature: bytes
    claims: Claims

    @property
    def sha256(self) -> str:
        """Hash of the bytes as received, hex."""
        return hashlib.sha256(self.content).hexdigest()

    def check_signature(self, key: bytes, *, vin: str, uid: bytes) -> None:
        """Checks that `key` signed this token for this VIN and uid.

        Args:
            key: Ed25519 public key, 32 bytes.
            vin: the ECU's own VIN, 17 characters.
            uid: the ECU's own uid, 16 bytes.

        Raises:
            SignatureError: forged, or made for another VIN or uid.
        """
        link = self.claims.link
        external: list[object] = [
            "openfod-token-v1",
            vin if link & Link.VIN else None,
            uid if link & Link.UID else None,
        ]
        _check_signature(self.protected, self.payload, self.signature, key, external)


@dataclass(frozen=True, slots=True)
class Announcement:
    """A token key that the token root has announced.

    Args:
        epoch: 1 to 4,294,967,295; the highest one signs new tokens.
        key: Ed25519 public key, 32 bytes.
    """

    epoch: int
    key: bytes


class Freshness(enum.Enum):
    """How an accepted token relates to the one stored."""

    NEW = "new"
    REPEATED = "repeated"


def key_id(key: bytes) -> bytes:
    """Returns the kid of an Ed25519 public key: 8 bytes of its SHA-256."""
    return hashlib.sha256(key).digest()[:KID_BYTES]


def parse(content: bytes, *, implemented: frozenset[Term] = IMPLEMENTED_TERMS) -> Token:
    """Reads a token without trusting it.

    Args:
        content: the COSE_Sign1 bytes.
        implemented: limits that this ECU measures.

    Raises:
        LengthError: empty or longer than 256 bytes.
        MalformedError: any departure from docs/token.md.
        UnknownTermError: a limit outside `implemented`.
    """
    protected, kid, payload, signature = _sign1(content)
    claims = _claims(_decode(payload, "payload"), implemented)
    return Token(content, kid, protected, payload, signature, claims)


def check_counter(token: Token, *, counter: int, sha256: str) -> Freshness:
    """Applies the counter rules of docs/token.md.

    Args:
        token: one whose signature was checked.
        counter, sha256: of the stored token of this feature; 0 and "" if there is none.

    Raises:
        CounterError: older, or the same counter with other bytes.
    """
    if token.claims.counter > counter:
        return Freshness.NEW
    if token.claims.counter == counter and token.sha256 == sha256:
        return Freshness.REPEATED
    raise CounterError(
        f"token counter {token.claims.counter} does not follow {counter}; keeping the stored token"
    )


def verify_announcement(content: bytes, *, root: bytes) -> Announcement:
    """Reads the announcement of a token key and checks that the token root signed it.

    Args:
        content: the COSE_Sign1 bytes.
        root: public key of the token root, 32 bytes.

    Raises:
        LengthError, MalformedError: as in `parse`.
        SignatureError: not signed by the root.
    """
    protected, kid, payload, signature = _sign1(content)
    body = _decode(payload, "payload")
    if not isinstance(body, dict) or set(body) != {1, 2}:
        raise MalformedError("the announcement is not a map of epoch (1) and key (2)")
    epoch = _uint(body[1], "epoch", 1, UINT32_MAX)
    key = _bytes(body[2], "key", KEY_BYTES, KEY_BYTES)
    if kid != key_id(root):
        raise SignatureError(f"announced under kid {kid.hex()}, the root is {key_id(root).hex()}")
    _check_signature(protected, payload, signature, root, ["openfod-token-key-v1"])
    return Announcement(epoch, key)


def _sign1(content: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Returns protected header, kid, payload and signature of a COSE_Sign1."""
    if not 1 <= len(content) <= MAX_TOKEN_BYTES:
        raise LengthError(f"{len(content)} bytes; expected 1 to {MAX_TOKEN_BYTES}")
    if content[:1] != _TAG_18:
        raise MalformedError("CBOR tag 18 (COSE_Sign1) is missing")
    message = _decode(content[1:], "message")
    if not isinstance(message, list) or len(message) != _SIGN1_ENTRIES:
        raise MalformedError("a COSE_Sign1 is an array of 4 entries")
    protected = _bytes(message[0], "protected header", 1, MAX_TOKEN_BYTES)
    if message[1] != {}:
        raise MalformedError("the unprotected header must be empty")
    payload = _bytes(message[2], "payload", 1, MAX_TOKEN_BYTES)
    signature = _bytes(message[3], "signature", SIGNATURE_BYTES, SIGNATURE_BYTES)
    header = _decode(protected, "protected header")
    if not isinstance(header, dict) or set(header) != {_HEADER_ALG, _HEADER_KID}:
        raise MalformedError("the protected header holds alg (1) and kid (4), nothing else")
    if type(header[_HEADER_ALG]) is not int or header[_HEADER_ALG] != _EDDSA:
        raise MalformedError(f"algorithm {header[_HEADER_ALG]!r}; expected {_EDDSA} (EdDSA)")
    kid = _bytes(header[_HEADER_KID], "kid", KID_BYTES, KID_BYTES)
    return protected, kid, payload, signature


def _claims(body: object, implemented: frozenset[Term]) -> Claims:
    if not isinstance(body, dict):
        raise MalformedError("the claims are not a map")
    # `_decode` lets through integers, strings, arrays and maps only, so that
    # True does not pass for claim 1 here.
    unknown = set(body) - {1, 2, 3, 4, 5, 6, 7}
    missing = {1, 2, 3, 4} - set(body)
    if unknown or missing:
        raise MalformedError(f"claims unknown: {sorted(map(repr, unknown))}, missing: {sorted(missing)}")
    _uint(body[1], "version", 1, 1)
    feature = _uint(body[2], "feature", 1, MAX_FEATURE)
    counter = _uint(body[3], "counter", 1, UINT32_MAX)
    allowed = _uint(body[4], "state", 0, 1) == 1
    link = Link(_uint(body.get(5, Link.BOTH.value), "link", 1, 3))
    parameters = (
        _bytes(body[_CLAIM_PARAMETERS], "parameters", 1, MAX_PARAMETER_BYTES)
        if _CLAIM_PARAMETERS in body
        else b""
    )
    terms: Mapping[int, int | tuple[int, int]] = {}
    if _CLAIM_TERMS in body:
        if not allowed:
            raise MalformedError("a token with state 0 must not carry terms")
        terms = _terms(body[_CLAIM_TERMS], implemented)
    return Claims(feature, counter, allowed, link, MappingProxyType(dict(terms)), parameters)


def _terms(found: object, implemented: frozenset[Term]) -> Mapping[int, int | tuple[int, int]]:
    if not isinstance(found, dict) or not 1 <= len(found) <= MAX_TERMS:
        raise MalformedError(f"terms are a map of 1 to {MAX_TERMS} entries")
    terms: dict[int, int | tuple[int, int]] = {}
    for key, value in found.items():
        number = _uint(key, "term", 0, UINT32_MAX)
        if number not in implemented:
            raise UnknownTermError(number)
        if number == Term.ODOMETER_RANGE:
            if not isinstance(value, list) or len(value) != _RANGE_ENTRIES:
                raise MalformedError("term 4 is an array of two distances")
            terms[number] = (_uint(value[0], "from", 0, UINT32_MAX), _uint(value[1], "to", 0, UINT32_MAX))
        elif number in {Term.IGNITION_CYCLES, Term.OPERATING_TIME, Term.EXECUTIONS}:
            terms[number] = _uint(value, f"term {number}", 1, UINT32_MAX)
        else:
            terms[number] = _uint(value, f"term {number}", 0, UINT32_MAX)
    return terms


def _uint(value: object, what: str, lowest: int, highest: int) -> int:
    if type(value) is not int or not lowest <= value <= highest:
        raise MalformedError(f"{what}: expected a whole number from {lowest} to {highest}, found {value!r}")
    return value


def _bytes(value: object, what: str, shortest: int, longest: int) -> bytes:
    if not isinstance(value, bytes) or not shortest <= len(value) <= longest:
        raise MalformedError(f"{what}: expected a byte string of {shortest} to {longest} bytes")
    return value


def _decode(content: bytes, what: str) -> object:
    """Decodes one CBOR item and refuses every encoding of it but the deterministic one."""
    _scan(content, what)
    try:
        item: object = cbor2.loads(content)
        canonical = cbor2.dumps(item, canonical=True)
    except (cbor2.CBORDecodeError, cbor2.CBOREncodeError) as error:
        raise MalformedError(f"{what}: not CBOR: {error}") from error
    if canonical != content:
        # Long integers, duplicate keys and keys out of order all end here.
        raise MalformedError(f"{what}: not in deterministic encoding (RFC 8949 section 4.2.1)")
    return item


def _scan(content: bytes, what: str) -> None:
    """Walks over the items before anything is decoded.

    Lets through definite-length integers, strings, arrays and maps that end
    where the bytes end and are not nested deeper than MAX_DEPTH, so that the
    decoder meets neither tags nor floats nor endless recursion.
    """
    position = 0
    open_items = [1]
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        if position >= len(content):
            raise MalformedError(f"{what}: ends inside an item")
        major, low = content[position] >> 5, content[position] & 0x1F
        position += 1
        if major > _LAST_MAJOR or low > _LAST_LOW:
            raise MalformedError(f"{what}: tag, float, simple value or indefinite length")
        if low < _FIRST_ARGUMENT:
            argument = low
        else:
            width = 1 << (low - _FIRST_ARGUMENT)
            argument = int.from_bytes(content[position : position + width], "big")
            position += width
        if major in {2, 3}:
            position += argument
        elif major in {4, 5}:
            if len(open_items) > MAX_DEPTH:
                raise MalformedError(f"{what}: nested deeper than {MAX_DEPTH}")
            open_items.append(argument * (major - 3))
    if position != len(content):
        raise MalformedError(f"{what}: ends after {position} bytes, found {len(content)}")


def _check_signature(
    protected: bytes, payload: bytes, signature: bytes, key: bytes, external: list[object]
) -> None:
    """Checks an Ed25519 signature over the Sig_structure (RFC 9052 section 4.4)."""
    external_aad = cbor2.dumps(external, canonical=True)
    signed = cbor2.dumps(["Signature1", protected, external_aad, payload], canonical=True)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
    except InvalidSignature as error:
        raise SignatureError("the signature does not verify for this VIN and uid") from error
