"""Signs the tokens by which one ECU allows one feature (docs/token.md).

Pure: the same claims and key give the same bytes (Ed25519, RFC 8032, and
deterministic CBOR, RFC 8949 section 4.2.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

VERSION = 1
"""Version of the claims table."""
MAX_TOKEN_BYTES = 256
"""Longest token that an ECU takes."""
MAX_COUNTER = 0xFFFF_FFFF
"""Highest counter."""
ALLOWED, DENIED = 1, 0
"""Claim "state"."""
LINK_VIN, LINK_UID, LINK_BOTH = 1, 2, 3
"""Claim "link"; its absence means both."""
TERM_NOT_AFTER_S, TERM_DAYS, TERM_DISTANCE_M, TERM_ODOMETER_RANGE_M = 1, 2, 3, 4
"""Terms that are as good as the ECU's clock and odometer; advisory where it has none of its own."""
TERM_IGNITION_CYCLES, TERM_OPERATING_S, TERM_EXECUTIONS = 5, 6, 7
"""Terms that the ECU counts by itself."""
TERM_SPEED_LIMIT_KMH = 8
MAX_LIMIT = 0xFFFF_FFFF
"""Highest value of any term."""
MAX_PARAMETER_BYTES = 32
MAX_FEATURE = 0xFFFF
VIN_LENGTH, UID_BYTES = 17, 16

Limit = int | tuple[int, int]
"""Value of a term; the odometer range is a pair: from (inclusive) and to (exclusive)."""

_COUNTED = frozenset({TERM_IGNITION_CYCLES, TERM_OPERATING_S, TERM_EXECUTIONS})
_MEASURED = frozenset({TERM_NOT_AFTER_S, TERM_DAYS, TERM_DISTANCE_M, TERM_ODOMETER_RANGE_M})
_COSE_SIGN1 = 18  # RFC 9052, section 4.2
_ALG, _KID, _EDDSA = 1, 4, -8  # RFC 9052 section 3.1, RFC 9053 section 2.2


def sign(
    key: Ed25519PrivateKey,
    *,
    vin: str,
    uid: bytes,
    feature_number: int,
    counter: int,
    state: int,
    terms: Mapping[int, Limit],
    link: int = LINK_BOTH,
    parameters: bytes = b"",
) -> bytes:
    """Signs one token.

    Args:
        vin: 17 characters.
        uid: 16 bytes that the ECU reports as its own.
        feature_number: 1 to MAX_FEATURE, from the catalogue.
        counter: 1 to MAX_COUNTER, higher than any before for this ECU and feature.
        state: ALLOWED or DENIED.
        terms: term number -> limit; empty means unlimited. Terms 1 to 4 need one of 5 to 7
            beside them: a right that is not perpetual has a limit that the ECU counts itself.
        link: what it is bound to; LINK_VIN only for an ECU whose VIN is written once.
        parameters: 0 to MAX_PARAMETER_BYTES, meaning given by the catalogue.

    Returns:
        the tagged COSE_Sign1, at most MAX_TOKEN_BYTES.

    Raises:
        ValueError: the claims are outside the contract; a programming error.
    """
    _check_range("feature", feature_number, 1, MAX_FEATURE)
    _check_range("counter", counter, 1, MAX_COUNTER)
    _check_range("state", state, DENIED, ALLOWED)
    _check_range("link", link, LINK_VIN, LINK_BOTH)
    _check_range("length of the VIN", len(vin), VIN_LENGTH, VIN_LENGTH)
    _check_range("length of the uid", len(uid), UID_BYTES, UID_BYTES)
    _check_range("length of the parameters", len(parameters), 0, MAX_PARAMETER_BYTES)
    if state == DENIED and terms:
        raise ValueError("a token with state 0 has no terms")
    claims: dict[int, object] = {1: VERSION, 2: feature_number, 3: counter, 4: state}
    if link != LINK_BOTH:
        claims[5] = link
    if terms:
        claims[6] = _checked(terms)
    if parameters:
        claims[7] = parameters
    token = sign_claims(
        key, claims, vin=None if link == LINK_UID else vin, uid=None if link == LINK_VIN else uid
    )
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"token: {len(token)} bytes are more than the limit of {MAX_TOKEN_BYTES}")
    return token


def _checked(terms: Mapping[int, Limit]) -> dict[int, object]:
    """Returns the terms as they are encoded."""
    for term, limit in terms.items():
        if (term == TERM_ODOMETER_RANGE_M) != isinstance(limit, tuple):
            raise ValueError(f"term {term}: only term {TERM_ODOMETER_RANGE_M} is a range, found {limit}")
        if isinstance(limit, tuple):
            from_m, to_m = limit
            _check_range("odometer, from", from_m, 0, MAX_LIMIT - 1)
            _check_range("odometer, to", to_m, from_m + 1, MAX_LIMIT)
        else:
            _check_range("number of a term", term, TERM_NOT_AFTER_S, TERM_SPEED_LIMIT_KMH)
            _check_range(f"term {term}", limit, int(term in _COUNTED), MAX_LIMIT)
    if not _MEASURED.isdisjoint(terms) and _COUNTED.isdisjoint(terms):
        raise ValueError(
            f"terms {sorted(terms)}: dates and distances need one of {sorted(_COUNTED)} beside them"
        )
    return {term: list(limit) if isinstance(limit, tuple) else limit for term, limit in terms.items()}


def _check_range(what: str, found: int, lowest: int, highest: int) -> None:
    if not lowest <= found <= highest:
        raise ValueError(f"{what}: expected {lowest} to {highest}, found {found}")


def sign_claims(
    key: Ed25519PrivateKey, claims: Mapping[int, object], *, vin: str | None, uid: bytes | None
) -> bytes:
    """Signs any claims map; `vin` and `uid` are None where the link leaves them out."""
    protected = _encode({_ALG: _EDDSA, _KID: key_id(key)})
    payload = _encode(dict(claims))
    external = _encode(["openfod-token-v1", vin, uid])
    signature = key.sign(_encode(["Signature1", protected, external, payload]))
    return _encode(cbor2.CBORTag(_COSE_SIGN1, [protected, {}, payload, signature]))


def feature_number(content: bytes) -> int:
    """The feature of a token that this cloud signed."""
    payload: bytes = cbor2.loads(content).value[2]
    return int(cbor2.loads(payload)[2])


def allows(content: bytes) -> bool:
    """Whether a token that this cloud signed allows its feature."""
    payload: bytes = cbor2.loads(content).value[2]
    return bool(cbor2.loads(payload)[4] == ALLOWED)


def signer_id(content: bytes) -> bytes:
    """Id of the key that signed a token of this cloud."""
    found: bytes = cbor2.loads(cbor2.loads(content).value[0])[_KID]
    return found


def key_id(key: Ed25519PrivateKey) -> bytes:
    """First 8 bytes of SHA-256 over the public key."""
    return hashlib.sha256(key.public_key().public_bytes_raw()).digest()[:8]


def _encode(value: object) -> bytes:
    return cbor2.dumps(value, canonical=True)
