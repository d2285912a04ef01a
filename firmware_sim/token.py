"""Verifies feature tokens as an ECU does, with nothing but its own keys, VIN and uid.

Implements docs/token.md: COSE_Sign1 (RFC 9052 section 4.2) with Ed25519
(RFC 8032) in deterministic CBOR (RFC 8949 section 4.2.1). As every byte of the
envelope but kid, payload and signature is fixed by that encoding, it is compared
and not decoded; nothing is encoded again to check a signature. Does no I/O and
reads no clock. Every refusal is a TokenError that carries the NRC of
ISO 14229-1:2020 annex A; verifying raises and never returns a bool.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

MAX_TOKEN_BYTES = 256
"""Largest token or announcement, bytes (docs/token.md, "Form")."""
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

# The envelope in its only deterministic encoding: tag 18 (RFC 9052 section 2), an array of 4,
# the protected header {1: -8 (EdDSA, RFC 9053 section 2.2), 4: kid}, the empty unprotected header.
_ENVELOPE_HEAD = bytes.fromhex("d2844da201270448")
_PROTECTED = slice(2, len(_ENVELOPE_HEAD) + KID_BYTES)
_KID = slice(len(_ENVELOPE_HEAD), _PROTECTED.stop)
_UNPROTECTED = slice(_PROTECTED.stop, _PROTECTED.stop + 1)
_EMPTY_MAP = b"\xa0"
_SIGNATURE_HEAD = b"\x58\x40"  # byte string of 64
_NULL = b"\xf6"
_SIGNATURE_CONTEXT = b"\x84\x6aSignature1"  # RFC 9052 section 4.4
_TOKEN_CONTEXT = b"\x83\x70openfod-token-v1"
_KEY_CONTEXT = b"\x81\x74openfod-token-key-v1"
_VIN_HEAD = b"\x71"  # text of 17
_UID_HEAD = b"\x50"  # byte string of 16

# RFC 8949 section 3: major types, and arguments that need bytes of their own.
_UINT, _BYTES, _ARRAY, _MAP = 0, 2, 4, 5
_ONE_BYTE, _EIGHT_BYTES = 24, 27

_CLAIM_TERMS = 6
_REQUIRED_CLAIMS = frozenset({1, 2, 3, 4})
_LAST_CLAIM = 7
_RANGE_ENTRIES = 2


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


class UnboundedTermError(TokenError):
    """A limit that only the bus measures, with none beside it that the ECU counts: requestOutOfRange."""

    def __init__(self, term: int) -> None:
        super().__init__(
            f"term {term} is advisory here, and none of terms 5 to 7 bounds what a lying bus could give"
        )
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


ALL_TERMS = frozenset(Term)
"""An ECU that implements the whole table."""
COUNTED_TERMS = frozenset({Term.IGNITION_CYCLES, Term.OPERATING_TIME, Term.EXECUTIONS})
"""Limits that an ECU counts by itself; nothing on the bus moves them."""


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
class _Envelope:
    """The parts of a COSE_Sign1; `protected` and `payload` with their heads, as the signature covers them."""

    kid: bytes
    protected: bytes
    payload: bytes
    signature: bytes

    def check_signature(self, key: bytes, external: bytes) -> None:
        """Checks an Ed25519 signature over the Sig_structure (RFC 9052 section 4.4)."""
        # The external data has 22 to 53 bytes: one or two bytes of head.
        length = len(external)
        head = bytes([0x40 | length]) if length < _ONE_BYTE else bytes([0x58, length])
        signed = _SIGNATURE_CONTEXT + self.protected + head + external + self.payload
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(self.signature, signed)
        except InvalidSignature as error:
            raise SignatureError("the signature does not verify for this VIN and uid") from error


@dataclass(frozen=True, slots=True)
class Token:
    """A well-formed token that is not verified yet."""

    content: bytes
    envelope: _Envelope
    claims: Claims

    @property
    def kid(self) -> bytes:
        """Which key is said to have signed it."""
        return self.envelope.kid

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
        external = _TOKEN_CONTEXT + (_VIN_HEAD + vin.encode("ascii") if link & Link.VIN else _NULL)
        external += _UID_HEAD + uid if link & Link.UID else _NULL
        self.envelope.check_signature(key, external)


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


def parse(
    content: bytes, *, implemented: frozenset[Term] = ALL_TERMS, advisory: frozenset[Term] = frozenset()
) -> Token:
    """Reads a token without trusting it.

    Args:
        content: the COSE_Sign1 bytes.
        implemented: limits that this ECU measures.
        advisory: those of them for which it has only the word of the bus.

    Raises:
        LengthError: empty or longer than 256 bytes.
        MalformedError: any departure from docs/token.md.
        UnknownTermError: a limit outside `implemented`.
        UnboundedTermError: an advisory limit without one that the ECU counts.
    """
    envelope, payload = _open(content)
    claims = _claims(payload, implemented)
    carried = claims.terms.keys()
    if COUNTED_TERMS.isdisjoint(carried) and (unbounded := advisory & carried):
        raise UnboundedTermError(min(unbounded))
    return Token(content, envelope, claims)


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
    envelope, payload = _open(content)
    payload.count(_MAP, "announcement", 2, 2)
    payload.uint("first key of the announcement", 1, 1)
    epoch = payload.uint("epoch", 1, UINT32_MAX)
    payload.uint("second key of the announcement", 2, 2)
    key = payload.byte_string("key", KEY_BYTES, KEY_BYTES)
    payload.check_end()
    if envelope.kid != key_id(root):
        raise SignatureError(f"announced under kid {envelope.kid.hex()}, the root is {key_id(root).hex()}")
    envelope.check_signature(root, _KEY_CONTEXT)
    return Announcement(epoch, key)


def _open(content: bytes) -> tuple[_Envelope, _Reader]:
    """Returns the parts of a COSE_Sign1 and a reader of its payload."""
    if not 1 <= len(content) <= MAX_TOKEN_BYTES:
        raise LengthError(f"{len(content)} bytes; expected 1 to {MAX_TOKEN_BYTES}")
    if not content.startswith(_ENVELOPE_HEAD):
        raise MalformedError(
            "not a tagged COSE_Sign1 whose protected header is {1: -8, 4: kid of 8 bytes}:"
            f" expected {_ENVELOPE_HEAD.hex()} first, found {content[: len(_ENVELOPE_HEAD)].hex()}"
        )
    if content[_UNPROTECTED] != _EMPTY_MAP:
        raise MalformedError("the unprotected header must be empty")
    reader = _Reader(content, _UNPROTECTED.stop)
    payload = reader.byte_string("payload", 1, MAX_TOKEN_BYTES)
    tail = content[reader.at :]
    if len(tail) != len(_SIGNATURE_HEAD) + SIGNATURE_BYTES or not tail.startswith(_SIGNATURE_HEAD):
        raise MalformedError(f"expected a signature of {SIGNATURE_BYTES} bytes at the end")
    signed_payload = content[_UNPROTECTED.stop : reader.at]
    envelope = _Envelope(content[_KID], content[_PROTECTED], signed_payload, tail[len(_SIGNATURE_HEAD) :])
    return envelope, _Reader(payload)


def _claims(payload: _Reader, implemented: frozenset[Term]) -> Claims:
    numbers = {5: int(Link.BOTH)}
    terms: dict[int, int | tuple[int, int]] = {}
    parameters = b""
    claim = 0
    for _ in range(payload.count(_MAP, "claims", 1, _LAST_CLAIM)):
        claim = payload.uint("next claim", claim + 1, _LAST_CLAIM)
        if claim in _CLAIM_RANGES:
            what, lowest, highest = _CLAIM_RANGES[claim]
            numbers[claim] = payload.uint(what, lowest, highest)
        elif claim == _CLAIM_TERMS:
            terms = _terms(payload, implemented)
        else:
            parameters = payload.byte_string("parameters", 1, MAX_PARAMETER_BYTES)
    payload.check_end()
    if missing := _REQUIRED_CLAIMS - numbers.keys():
        raise MalformedError(f"claims missing: {sorted(missing)}")
    allowed = numbers[4] == 1
    if terms and not allowed:
        raise MalformedError("a token with state 0 must not carry terms")
    return Claims(numbers[2], numbers[3], allowed, Link(numbers[5]), MappingProxyType(terms), parameters)


_CLAIM_RANGES = {
    1: ("version", 1, 1),
    2: ("feature", 1, MAX_FEATURE),
    3: ("counter", 1, UINT32_MAX),
    4: ("state", 0, 1),
    5: ("link", 1, 3),
}
"""Claims that are whole numbers: name, lowest, highest."""


def _terms(payload: _Reader, implemented: frozenset[Term]) -> dict[int, int | tuple[int, int]]:
    terms: dict[int, int | tuple[int, int]] = {}
    term = -1
    for _ in range(payload.count(_MAP, "terms", 1, MAX_TERMS)):
        term = payload.uint("next term", term + 1, UINT32_MAX)
        if term not in implemented:
            raise UnknownTermError(term)
        if term == Term.ODOMETER_RANGE:
            payload.count(_ARRAY, "odometer range", _RANGE_ENTRIES, _RANGE_ENTRIES)
            from_m = payload.uint("from", 0, UINT32_MAX - 1)
            terms[term] = (from_m, payload.uint("to", from_m + 1, UINT32_MAX))
        else:
            terms[term] = payload.uint(f"term {term}", int(term in COUNTED_TERMS), UINT32_MAX)
    return terms


class _Reader:
    """Reads the few kinds of CBOR items that a token has, each in its shortest form only."""

    __slots__ = ("_content", "at")

    def __init__(self, content: bytes, at: int = 0) -> None:
        self._content = content
        self.at = at

    def uint(self, what: str, lowest: int, highest: int) -> int:
        """Reads a whole number of a range."""
        return self.count(_UINT, what, lowest, highest)

    def byte_string(self, what: str, shortest: int, longest: int) -> bytes:
        """Reads a byte string of a length."""
        length = self.count(_BYTES, what, shortest, longest)
        begin, self.at = self.at, self.at + length
        found = self._content[begin : self.at]
        if len(found) != length:
            raise MalformedError(f"{what}: expected {length} bytes, found {len(found)}")
        return found

    def count(self, major: int, what: str, lowest: int, highest: int) -> int:
        """Reads the head of an item and returns its argument, which has to be in a range."""
        content = self._content
        if self.at >= len(content):
            raise MalformedError(f"{what}: the bytes end before it")
        initial = content[self.at]
        self.at += 1
        argument = initial & 0x1F
        if argument >= _ONE_BYTE:
            argument = self._long_argument(argument, what)
        if initial >> 5 != major or not lowest <= argument <= highest:
            raise MalformedError(
                f"{what}: expected CBOR type {major} of {lowest} to {highest},"
                f" found type {initial >> 5} of {argument}"
            )
        return argument

    def check_end(self) -> None:
        """Nothing may follow."""
        if self.at != len(self._content):
            raise MalformedError(f"{len(self._content) - self.at} bytes after the end")

    def _long_argument(self, code: int, what: str) -> int:
        """Reads an argument of 1, 2, 4 or 8 bytes (RFC 8949 section 4.2.1: none that fits in less)."""
        if code > _EIGHT_BYTES:
            raise MalformedError(f"{what}: indefinite length")
        size = 1 << (code - _ONE_BYTE)
        raw = self._content[self.at : self.at + size]
        argument = int.from_bytes(raw)
        self.at += size
        if len(raw) != size or argument < (_ONE_BYTE if size == 1 else 1 << (4 * size)):
            raise MalformedError(f"{what}: cut, or longer than its shortest form")
        return argument
