"""Seals what the vehicle keeps of a former owner, so that only the cloud can read it.

The records must be kept for 90 days, because a cloud that was restored from a
backup asks for them again; the new owner, even with root on the head unit, must
not read them (docs/adr/0008-former-owners-records-are-sealed.md). Hybrid Public
Key Encryption, RFC 9180, base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
ChaCha20Poly1305.
"""

from __future__ import annotations

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from agent.errors import TrustError

SEALED_DOMAIN = b"openfod.usage.sealed.v1\x00"
"""What stands before the journal's identifier in the info that a sealed record is bound to."""
KEY_BYTES = 32
"""An X25519 public key (RFC 7748)."""


def seal(content: bytes, key: bytes, journal_id: str) -> bytes:
    """Seals one record: 32 bytes of encapsulated key, ciphertext, 16 bytes of tag.

    Args:
        key: the cloud's archive key, KEY_BYTES.
        journal_id: in whose chain the record stands; it opens in no other.

    Raises:
        TrustError: it is no key that anything can be sealed to.
    """
    # Needed at a sale alone: a start must not wait for it.
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    info = SEALED_DOMAIN + journal_id.encode()
    try:
        return suite.encrypt(content, X25519PublicKey.from_public_bytes(key), info=info)
    except (ValueError, UnsupportedAlgorithm) as error:  # a point of low order, or no such curve here
        raise TrustError(f"the cloud's archive key {key.hex()} is not usable: {error}") from error
