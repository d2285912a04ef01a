"""The vehicle's own key: born here, never sent; and the certificate made for it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.errors import TrustError

KEY_FILE, CERTIFICATE_FILE, IDENTITY_FILE = "device.key", "device.crt", "identity.json"


@dataclass(frozen=True)
class Identity:
    """An enrolled vehicle.

    Args:
        key_pem, certificate_pem: as TLS wants them.
        source: pseudonym in usage records.
    """

    key: ec.EllipticCurvePrivateKey
    key_pem: bytes
    certificate_pem: bytes
    source: str

    def sign(self, message: bytes) -> bytes:
        """ECDSA P-256 with SHA-256, DER."""
        return self.key.sign(message, ec.ECDSA(hashes.SHA256()))


def make_key(directory: Path) -> ec.EllipticCurvePrivateKey:
    """Returns the device key, made at the first call (P-256, mode 0600).

    Raises:
        TrustError: the file holds something else.
    """
    path = directory / KEY_FILE
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        write_durably(path, pem)
    return _read_key(path)


def make_csr(key: ec.EllipticCurvePrivateKey, vin: str) -> bytes:
    """PKCS #10 request (RFC 2986) in DER, signed by the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, vin)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def save(directory: Path, certificate_der: bytes, source: str) -> None:
    """Keeps the certificate and the pseudonym.

    Raises:
        TrustError: the certificate is malformed or is for another key.
    """
    if not source:
        raise TrustError("the cloud's answer names no pseudonym for usage records; nothing is kept")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        is_ours = certificate.public_key() == make_key(directory).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(f"the cloud's answer is not a certificate: {error}; nothing is kept") from error
    if not is_ours:
        raise TrustError("the certificate is for another key than this vehicle's; it is not kept")
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_durably(directory / IDENTITY_FILE, json.dumps({"source": source}).encode())
    write_durably(directory / CERTIFICATE_FILE, pem)


def load(directory: Path) -> Identity | None:
    """Reads the identity; None before enrolment.

    Raises:
        TrustError: a file is damaged, or they do not belong together.
    """
    certificate_path = directory / CERTIFICATE_FILE
    if not certificate_path.exists():
        return None
    again = f"remove {certificate_path} and enrol again with a new claim"
    try:
        source = json.loads((directory / IDENTITY_FILE).read_bytes())["source"]
        if not isinstance(source, str) or not source:
            raise TypeError("source is not a text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrustError(f"{directory / IDENTITY_FILE} is damaged ({error}); {again}") from error
    path = directory / KEY_FILE
    key = _read_key(path)
    try:
        certificate_pem = certificate_path.read_bytes()
        certificate_key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{certificate_path} is damaged ({error}); {again}") from error
    if certificate_key != key.public_key():
        raise TrustError(f"{certificate_path} is for another key than {path}; {again}")
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(key, key_pem, certificate_pem, source)


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{path} is not a readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"{path} holds a key of another kind, expected P-256")
    return key


def write_durably(path: Path, content: bytes) -> None:
    """Replaces a file by way of a new one, and syncs both the file and its folder; mode 0600."""
    fresh = path.with_name(path.name + ".new")
    # Always a file of our own: what lies there may have another mode, or be a link.
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    fresh.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
