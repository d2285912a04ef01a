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
TERM_IGNITION_CYCLES, TERM_OPERATING_S = 5, 6
"""Terms that the ECU measures by itself."""

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
    terms: Mapping[int, int],
) -> bytes:
    """Signs one token, linked to VIN and ECU uid.

    Args:
        vin: 17 characters.
        uid: 16 bytes that the ECU reports as its own.
        feature_number: 1 to 65,535, from the catalogue.
        counter: 1 to MAX_COUNTER, higher than any before for this ECU and feature.
        state: ALLOWED or DENIED.
        terms: term number -> limit; empty means unlimited.

    Returns:
        the tagged COSE_Sign1, at most MAX_TOKEN_BYTES.

    Raises:
        ValueError: the claims are outside the contract; a programming error.
    """
    if state == DENIED and terms:
        raise ValueError("a token with state 0 has no terms")
    if not 1 <= counter <= MAX_COUNTER:
        raise ValueError(f"counter: expected 1 to {MAX_COUNTER}, found {counter}")
    claims: dict[int, object] = {1: VERSION, 2: feature_number, 3: counter, 4: state}
    if terms:
        claims[6] = dict(terms)
    token = sign_claims(key, claims, vin=vin, uid=uid)
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"token: {len(token)} bytes are more than the limit of {MAX_TOKEN_BYTES}")
    return token


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


def key_id(key: Ed25519PrivateKey) -> bytes:
    """First 8 bytes of SHA-256 over the public key."""
    return hashlib.sha256(key.public_key().public_bytes_raw()).digest()[:8]


def _encode(value: object) -> bytes:
    return cbor2.dumps(value, canonical=True)
