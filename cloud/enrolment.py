"""Turns a one-time claim and a device's own request into its certificate.

The device key is made on the vehicle and never leaves it: what arrives is a
PKCS #10 request (RFC 2986) that proves its possession. A claim works once,
for one VIN, for a short time; only its SHA-256 is stored.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud.errors import ClaimError, InvalidRequestError
from cloud.store import Transaction

MAX_CSR_BYTES = 4_096
"""Largest certificate request."""
MAX_CLAIM_CHARACTERS = 128
"""Longest claim token."""
CLAIM_BYTES = 20
"""Entropy of a claim token: 160 bits, 32 characters of Base32."""
MAX_WRONG_CLAIMS = 1_000
"""Refused enrolments that are counted for one claim; behind it a guesser makes the database write nothing."""
ALARM_WRONG_CLAIMS = 10
"""Refused enrolments from which a person should look at it."""
VEHICLE_URN = "urn:openfod:vehicle:"
"""SAN URI of a device certificate, before the VIN."""
OPERATOR_URN = "urn:openfod:operator:"
"""SAN URI of an operator's certificate, before the name."""

_NOT_BEFORE = datetime(1970, 1, 1, tzinfo=UTC)
_NOT_AFTER = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280 4.1.2.5: TLS must not need the clock


@dataclass(frozen=True)
class Claim:
    """A new claim; the token is shown once and never stored."""

    token: str
    expires_ms: int


@dataclass(frozen=True)
class Issued:
    """A new device certificate in DER, and the vehicle's pseudonym."""

    certificate_der: bytes
    source: str


def make_claim(tx: Transaction, vin: str, ttl_s: int, random: Callable[[int], bytes], now_ms: int) -> Claim:
    """Makes the vehicle's only claim; one made before ends."""
    token = one_time_token(random)
    expires_ms = now_ms + ttl_s * 1000
    tx.put_claim(vin, token_hash(token), expires_ms)
    return Claim(token, expires_ms)


def one_time_token(random: Callable[[int], bytes]) -> str:
    """A token that nobody guesses: CLAIM_BYTES of randomness in lower-case Base32 (RFC 4648, section 6)."""
    return base64.b32encode(random(CLAIM_BYTES)).decode().rstrip("=").lower()


def token_hash(token: str) -> bytes:
    """What is stored of a one-time token."""
    return hashlib.sha256(token.encode()).digest()


def enrol(
    tx: Transaction,
    vin: str,
    claim_token: str,
    key: EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: EllipticCurvePrivateKey,
    now_ms: int,
) -> Issued:
    """Issues the device certificate of a pre-authorised VIN and uses up its claim.

    Args:
        key: from a request that it signed itself (`device_key`).

    Raises:
        InvalidRequestError: the claim token is too long.
        ClaimError: the claim is unknown, used, expired or of another VIN.
    """
    if len(claim_token) > MAX_CLAIM_CHARACTERS:
        raise InvalidRequestError(
            "claim_token", expected=f"at most {MAX_CLAIM_CHARACTERS} characters", found=len(claim_token)
        )
    vehicle = tx.lock_vehicle(vin)
    claim = tx.claim(vin)
    offered = token_hash(claim_token)
    if vehicle is None or claim is None or not hmac.compare_digest(claim.token_hash, offered):
        raise ClaimError(f"no such claim for vehicle {vin}")
    if claim.used_ms:
        raise ClaimError(f"the claim of vehicle {vin} was used before")
    if now_ms >= claim.expires_ms:
        raise ClaimError(f"the claim of vehicle {vin} ended {(now_ms - claim.expires_ms) // 1000} s ago")
    certificate = issue(vin, key, ca, ca_key)
    der = certificate.public_bytes(Encoding.DER)
    ended = tx.enrol(vin, hashlib.sha256(der).digest(), der, now_ms)
    tx.audit(
        "vehicle",
        "enrol",
        vin,
        now_ms,
        fingerprint=hashlib.sha256(der).hexdigest(),
        ended_fingerprints=[fingerprint.hex() for fingerprint in ended],
    )
    return Issued(der, vehicle.source)


def note_refusal(tx: Transaction, vin: str, reason: str, now_ms: int) -> None:
    """Counts a refused enrolment of a registered vehicle; the 1st, 10th, 100th and 1,000th are audited.

    No number of guesses ends a claim: with 160 bits they do no harm, and
    ending it would let any stranger keep a vehicle from enrolling.
    """
    vehicle = tx.lock_vehicle(vin)
    if vehicle is None or vehicle.wrong_claims >= MAX_WRONG_CLAIMS:
        return
    count = vehicle.wrong_claims + 1
    tx.set_wrong_claims(vin, count)
    if count in {10**power for power in range(4)}:
        alarm = count >= ALARM_WRONG_CLAIMS
        tx.audit("vehicle", "enrol-refused", vin, now_ms, alarm=alarm, reason=reason, refused=count)


def device_key(csr_der: bytes) -> EllipticCurvePublicKey:
    """Reads the public key of a request that it signed itself; nothing else of it counts.

    Raises:
        InvalidRequestError: size, form, curve or signature are wrong.
    """
    if len(csr_der) > MAX_CSR_BYTES:
        raise InvalidRequestError("csr_der", expected=f"at most {MAX_CSR_BYTES} bytes", found=len(csr_der))
    try:
        request = x509.load_der_x509_csr(csr_der)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise InvalidRequestError(
            "csr_der", expected="a PKCS #10 request in DER", found=str(error)
        ) from error
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise InvalidRequestError("csr_der", expected="a P-256 key", found=type(key).__name__)
    if not valid:
        raise InvalidRequestError(
            "csr_der", expected="a request signed by its own key", found="another signature"
        )
    return key


def issue(
    vin: str, key: EllipticCurvePublicKey, ca: x509.Certificate, ca_key: EllipticCurvePrivateKey
) -> x509.Certificate:
    """Issues a TLS client certificate that names the VIN in a SAN URI."""
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, vin)]))
        .issuer_name(ca.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNATURES_ONLY, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(VEHICLE_URN + vin)]), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )


_SIGNATURES_ONLY = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
