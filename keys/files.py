"""Reads and writes the ceremony's files: private ones 0600, folders 0700, durable.

Every write goes to a new file beside the old one, is synced, and takes the
old one's name in one step, so that a crash leaves either the old or the new.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from keys.errors import KeyMaterialError

PRIVATE_MODE = 0o600
"""Mode of every file that the ceremony writes: the folder is not to be shared as it is."""
FOLDER_MODE = 0o700
"""Mode of every folder that the ceremony makes."""


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, that only the owner can enter."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(mode=FOLDER_MODE)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: bytes) -> None:
    """Writes a whole file durably, mode 0600, making its folder if needed."""
    make_folder(path.parent)
    fresh = path.with_name(path.name + ".new")
    # What lies there may have another mode, a reader, or be a link: never write into it.
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def read(path: Path) -> bytes:
    """Reads a whole file.

    Raises:
        KeyMaterialError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise KeyMaterialError(f"{path}: cannot be read: {error.strerror}") from error


def private_pem(key: Ed25519PrivateKey | EllipticCurvePrivateKey) -> bytes:
    """Encodes a private key as PEM PKCS #8 (RFC 5958), unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Encodes a public key as PEM SubjectPublicKeyInfo (RFC 8410)."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_ed25519(path: Path) -> Ed25519PrivateKey:
    """Reads an Ed25519 private key.

    Raises:
        KeyMaterialError: the file is missing or holds anything else.
    """
    try:
        key = serialization.load_pem_private_key(read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyMaterialError(f"{path}: not an unencrypted PEM private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyMaterialError(f"{path}: expected an Ed25519 key, found {type(key).__name__}")
    return key
