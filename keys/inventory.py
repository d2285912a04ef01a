"""Lists what a key folder holds, without showing any secret."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Metadata, Root
from tuf.api.serialization import DeserializationError

from keys import files
from keys.errors import KeyMaterialError


@dataclass(frozen=True)
class Entry:
    """One file.

    Args:
        kind: "Ed25519 key", "P-256 key", "certificate" or "root".
        identifier: TUF keyid of an Ed25519 key, SHA-256 fingerprint of a P-256
            public key or certificate, or the keyids of a root's roles.
        expires: ISO 8601 date, "never", or "" for a key.
    """

    file: str
    kind: str
    identifier: str
    expires: str


def take(folder: Path) -> tuple[Entry, ...]:
    """Reads the keys, certificates and roots below `folder`, by path.

    Raises:
        KeyMaterialError: there is none, or one cannot be read.
    """
    entries = tuple(_entries(folder))
    if not entries:
        raise KeyMaterialError(f"{folder}: holds no keys; make them with: fod-keys init {folder}")
    return entries


def as_json(entries: tuple[Entry, ...]) -> list[dict[str, str]]:
    """The entries as JSON values."""
    return [asdict(entry) for entry in entries]


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".key":
            yield _key(name, path)
        elif path.suffix == ".crt":
            yield _certificate(name, path)
        elif path.name.endswith("root.json"):
            yield from _root(name, path)


def _key(name: str, path: Path) -> Entry:
    try:
        key = serialization.load_pem_private_key(files.read(path), None)
    except (ValueError, TypeError) as error:
        raise KeyMaterialError(f"{path}: not an unencrypted PEM private key") from error
    if isinstance(key, Ed25519PrivateKey):
        return Entry(name, "Ed25519 key", SSlibKey.from_crypto(key.public_key()).keyid, "")
    if isinstance(key, EllipticCurvePrivateKey):
        encoded = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return Entry(name, "P-256 key", hashlib.sha256(encoded).hexdigest(), "")
    raise KeyMaterialError(f"{path}: expected an Ed25519 or P-256 key, found {type(key).__name__}")


def _certificate(name: str, path: Path) -> Entry:
    try:
        certificate = x509.load_pem_x509_certificate(files.read(path))
    except ValueError as error:
        raise KeyMaterialError(f"{path}: not a PEM certificate") from error
    encoded = certificate.public_bytes(serialization.Encoding.DER)
    year = certificate.not_valid_after_utc.year
    expires = "never" if year == 9999 else certificate.not_valid_after_utc.date().isoformat()  # noqa: PLR2004
    return Entry(name, "certificate", hashlib.sha256(encoded).hexdigest(), expires)


def _root(name: str, path: Path) -> Iterator[Entry]:
    try:
        root = Metadata[Root].from_bytes(files.read(path)).signed
    except DeserializationError as error:
        raise KeyMaterialError(f"{path}: not TUF root metadata") from error
    for role_name, role in root.roles.items():
        held = f"root v{root.version} {role_name} {role.threshold} of {len(role.keyids)}"
        for keyid in role.keyids:
            yield Entry(name, held, keyid, root.expires.date().isoformat())
