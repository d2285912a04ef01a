"""The vehicle's own key: born here, never sent; and the certificate made for it.

A vehicle that enrols again makes its new key in a folder beside the old one.
Once the cloud has answered, one rename puts the new identity in force: key,
certificate and pseudonym change together, whenever the power is cut.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.adapters.files import sync_folder, write_durably
from agent.errors import AgentError, TrustError

KEY_FILE, CERTIFICATE_FILE, IDENTITY_FILE = "device.key", "device.crt", "identity.json"
STAGED, IN_FORCE = "enrolment.new", "enrolment.done"
"""Folders of an identity that the cloud has not answered yet, and of one that counts before the old."""


_AGAIN = "enrol again with a new claim: fod-agent enroll --again --claim TOKEN"


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
    from cryptography import x509  # a start, which reads no certificate, does without it
    from cryptography.x509.oid import NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, vin)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def save(directory: Path, certificate_der: bytes, source: str) -> None:
    """Keeps the certificate and the pseudonym.

    Raises:
        TrustError: the certificate is malformed or is for another key.
    """
    from cryptography import x509

    if not source:
        raise TrustError("the cloud's answer names no pseudonym for usage records; nothing is kept")
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        is_ours = certificate.public_key() == make_key(directory).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise TrustError(f"the cloud's answer is not a certificate: {error}; nothing is kept") from error
    if not is_ours:
        raise TrustError("the certificate is for another key than this vehicle's; it is not kept")
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    write_durably(directory / IDENTITY_FILE, json.dumps({"source": source}).encode())
    write_durably(directory / CERTIFICATE_FILE, pem)


def load(directory: Path) -> Identity | None:
    """Reads the identity, and checks that key and certificate belong together; None before enrolment.

    Raises:
        TrustError: a file is damaged, or they do not belong together.
    """
    found = read(directory)
    if found is not None:
        check(directory, found)
    return found


def read(directory: Path) -> Identity | None:
    """Reads the identity without looking into its certificate, which TLS needs and a start does not.

    Raises:
        TrustError: the key or the pseudonym cannot be read.
    """
    certificate_path = _place(directory, CERTIFICATE_FILE)
    if not certificate_path.exists():
        return None
    source_path = _place(directory, IDENTITY_FILE)
    try:
        source = _read_source(source_path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrustError(f"{source_path} is damaged ({error}); {_AGAIN}") from error
    key = _read_key(_place(directory, KEY_FILE))
    try:
        certificate_pem = certificate_path.read_bytes()
    except OSError as error:
        raise TrustError(f"{certificate_path} is damaged ({error}); {_AGAIN}") from error
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Identity(key, key_pem, certificate_pem, source)


def check(directory: Path, identity: Identity) -> None:
    """Refuses a certificate that is damaged or is for another key than the device's.

    Raises:
        TrustError: says which file, and what to do.
    """
    from cryptography import x509

    path = _place(directory, CERTIFICATE_FILE)
    try:
        certificate_key = x509.load_pem_x509_certificate(identity.certificate_pem).public_key()
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise TrustError(f"{path} is damaged ({error}); {_AGAIN}") from error
    if certificate_key != identity.key.public_key():
        raise TrustError(f"{path} is for another key than {_place(directory, KEY_FILE)}; {_AGAIN}")


def stage(directory: Path) -> ec.EllipticCurvePrivateKey:
    """Returns a new device key, made at the first call, while the old one stays in force.

    Raises:
        AgentError: this vehicle has not enrolled yet.
        TrustError: the file of the new key holds something else.
    """
    settle(directory)
    if not (directory / CERTIFICATE_FILE).exists():
        raise AgentError("this vehicle is not enrolled yet; leave --again out")
    return make_key(directory / STAGED)


def swap(directory: Path, certificate_der: bytes, source: str) -> None:
    """Puts the new key in force, with its certificate; the old one is gone afterwards.

    Raises:
        TrustError: the certificate is malformed or for another key, or the
            cloud names another pseudonym; the old identity stays in force.
    """
    try:
        old = _read_source(directory / IDENTITY_FILE)
    except (OSError, ValueError, KeyError, TypeError):
        old = source  # damaged, which may be why it enrols again: nothing to compare with
    if source != old:
        raise TrustError(
            f"the cloud names this vehicle {source or 'nothing'}, its usage is reported as {old};"
            " nothing is changed"
        )
    save(directory / STAGED, certificate_der, source)
    (directory / STAGED).rename(directory / IN_FORCE)
    sync_folder(directory)
    settle(directory)


def settle(directory: Path) -> None:
    """Moves an identity that is in force to its place, should a power cut have kept it from there."""
    folder = directory / IN_FORCE
    if not folder.is_dir():
        return
    for name in (KEY_FILE, IDENTITY_FILE, CERTIFICATE_FILE):
        if (folder / name).exists():
            (folder / name).rename(directory / name)
    sync_folder(directory)
    folder.rmdir()
    sync_folder(directory)


def _place(directory: Path, name: str) -> Path:
    """Where a file of the identity in force lies."""
    newer = directory / IN_FORCE / name
    return newer if newer.exists() else directory / name


def _read_source(path: Path) -> str:
    source = json.loads(path.read_bytes())["source"]
    if not isinstance(source, str) or not source:
        raise TypeError("source is not a text")
    return source


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{path} is not a readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise TrustError(f"{path} holds a key of another kind, expected P-256")
    return key
