"""Loads the cloud's online keys, and says at once where one does not fit its root."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from cloud.config import CloudConfig, Tls, Token, moment_ms
from cloud.director import TLS_PATH, Item, token_key_path
from cloud.errors import StartError

MAX_KEY_FILE_BYTES = 65_536
"""Largest key, certificate or root file that is read."""
MAX_TLS_BYTES = 16_384
"""Largest tls.json that a vehicle takes."""
MAX_ROOTS = 32
"""Most root files of one repository: what a vehicle takes in one update."""


@dataclass(frozen=True)
class OnlineKeys:
    """A repository's roots and the two keys that sign its freshness.

    Args:
        roots: version -> root as signed, oldest first, without a hole.
        root: the newest.
    """

    roots: Mapping[int, bytes]
    root: Metadata[Root]
    timestamp: CryptoSigner
    snapshot: CryptoSigner

    def roots_after(self, version: int) -> list[bytes]:
        """The roots that lead on from a version, in order (TUF 1.0.34, section 5.3)."""
        return [content for number, content in self.roots.items() if number > version]

    def is_behind(self, root_version: int) -> bool:
        """True if a vehicle that trusts this root has to follow a newer one first."""
        return root_version < self.root.signed.version

    def begins_anew(self, root_version: int) -> bool:
        """True if a vehicle that trusts this root forgets its versions on the way to the newest.

        It does so where the keys of timestamp or snapshot were replaced
        (TUF 1.0.34, section 5.3.11), not for every new root.
        """
        content = self.roots.get(root_version)
        if content is None:
            return False
        before = Metadata[Root].from_bytes(content).signed
        return any(
            set(before.roles[role].keyids) != set(self.root.signed.roles[role].keyids)
            for role in (Timestamp.type, Snapshot.type)
        )


def is_signed_by(content: bytes, key: CryptoSigner) -> bool:
    """True if stored metadata of our own names this key among its signatures."""
    return any(entry["keyid"] == key.public_key.keyid for entry in json.loads(content)["signatures"])


@dataclass(frozen=True)
class Keyring:
    """All online keys of one cloud.

    Args:
        receipt_keys: the one that signs, then older ones that still open what was sealed to them.
        shared: director targets that every vehicle gets: the token key's announcement, TLS anchors.
    """

    director: OnlineKeys
    director_targets: CryptoSigner
    catalogue: OnlineKeys
    token: Ed25519PrivateKey
    shared: tuple[Item, ...]
    receipt_keys: tuple[Ed25519PrivateKey, ...]
    enrolment_ca: x509.Certificate
    enrolment_key: EllipticCurvePrivateKey


def load(settings: CloudConfig) -> Keyring:
    """Reads all keys.

    Raises:
        StartError: a file is unreadable, or a key is not the one that its root
            or certificate names.
    """
    director, catalogue = settings.director, settings.catalogue
    director_roots, director_root = load_roots(director.root)
    catalogue_roots, catalogue_root = load_roots(catalogue.root)
    authority = _certificate(settings.enrolment.ca_certificate)
    return Keyring(
        director=OnlineKeys(
            director_roots,
            director_root,
            _signer(director.timestamp_key, director_root.signed, Timestamp.type),
            _signer(director.snapshot_key, director_root.signed, Snapshot.type),
        ),
        director_targets=_signer(director.targets_key, director_root.signed, Targets.type),
        catalogue=OnlineKeys(
            catalogue_roots,
            catalogue_root,
            _signer(catalogue.timestamp_key, catalogue_root.signed, Timestamp.type),
            _signer(catalogue.snapshot_key, catalogue_root.signed, Snapshot.type),
        ),
        token=(token_key := _ed25519(settings.token.key)),
        shared=(*_announcement(settings.token, token_key), *_tls(settings.tls)),
        receipt_keys=tuple(map(_ed25519, (settings.receipt.key, *settings.receipt.old_keys))),
        enrolment_ca=authority,
        enrolment_key=_authority_key(settings.enrolment.ca_key, authority),
    )


def _announcement(settings: Token, key: Ed25519PrivateKey) -> Iterator[Item]:
    """The announcement, if it is of this key and epoch; its signature is for the ECUs to judge."""
    if settings.announcement is None:
        return
    content = _read(settings.announcement)
    expected = {1: settings.epoch, 2: key.public_key().public_bytes_raw()}
    try:
        found = cbor2.loads(cbor2.loads(content).value[2])
    except (cbor2.CBORDecodeError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise StartError(f"{settings.announcement}: not the announcement of a token key") from error
    if found != expected:
        raise StartError(
            f"{settings.announcement}: announces another key or epoch than {settings.key}, "
            f"epoch {settings.epoch}"
        )
    yield Item(token_key_path(settings.epoch), content)


def _tls(settings: Tls) -> Iterator[Item]:
    """The certificates by which vehicles know the cloud's servers, each with its validity."""
    if not settings.anchors:
        return
    servers = [
        {
            "certificate": base64.b64encode(
                _certificate(anchor.certificate).public_bytes(serialization.Encoding.DER)
            ).decode(),
            "not_before_ms": moment_ms(anchor.not_before),
            "not_after_ms": moment_ms(anchor.not_after),
        }
        for anchor in settings.anchors
    ]
    content = json.dumps({"servers": servers}, sort_keys=True).encode()
    if len(content) > MAX_TLS_BYTES:
        raise StartError(f"tls.anchors: {len(content)} bytes are more than the limit of {MAX_TLS_BYTES}")
    yield Item(TLS_PATH, content)


def load_roots(path: Path) -> tuple[dict[int, bytes], Metadata[Root]]:
    """Reads one root file, or a folder of N.root.json, each signed by the keys of the one before it.

    Returns:
        the roots by version, oldest first, and the newest.

    Raises:
        StartError: there is none, too many, a hole, or one that the chain does not sign.
    """
    files = sorted(path.glob("*.root.json")) if path.is_dir() else [path]
    if not 1 <= len(files) <= MAX_ROOTS:
        raise StartError(f"{path}: expected 1 to {MAX_ROOTS} files N.root.json, found {len(files)}")
    loaded = sorted(((load_root(file), file) for file in files), key=lambda pair: pair[0].signed.version)
    for (older, _), (newer, file) in itertools.pairwise(loaded):
        if newer.signed.version != older.signed.version + 1:
            raise StartError(
                f"{file}: expected version {older.signed.version + 1}, found {newer.signed.version}; "
                "there must be no hole"
            )
        try:
            older.verify_delegate(Root.type, newer)
        except RepositoryError as error:
            raise StartError(f"{file}: not signed by the keys of the root before it: {error}") from error
    return {root.signed.version: _read(file) for root, file in loaded}, loaded[-1][0]


def load_root(path: Path) -> Metadata[Root]:
    """Reads a root that its own keys signed (TUF 1.0.34, section 5.3).

    Raises:
        StartError: it is anything else.
    """
    try:
        root = Metadata[Root].from_bytes(_read(path))
        root.verify_delegate(Root.type, root)
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise StartError(f"{path}: not a root that its own keys signed: {error}") from error
    return root


def _signer(path: Path, root: Root, role: str) -> CryptoSigner:
    signer = CryptoSigner(_ed25519(path))
    expected = root.roles[role].keyids
    if signer.public_key.keyid not in expected:
        raise StartError(
            f"{path}: key {signer.public_key.keyid[:16]} is not the {role} key of the root, which names "
            + ", ".join(keyid[:16] for keyid in expected)
        )
    return signer


def _ed25519(path: Path) -> Ed25519PrivateKey:
    key = _private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise StartError(f"{path}: expected an Ed25519 key, found {type(key).__name__}")
    return key


def _authority_key(path: Path, authority: x509.Certificate) -> EllipticCurvePrivateKey:
    key = _private_key(path)
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP256R1):
        raise StartError(f"{path}: expected a P-256 key, found {type(key).__name__}")
    if key.public_key() != authority.public_key():
        raise StartError(
            f"{path}: not the key of the enrolment CA certificate {authority.subject.rfc4514_string()}"
        )
    return key


def _private_key(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(_read(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StartError(f"{path}: not an unencrypted PEM private key") from error


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except (ValueError, x509.InvalidVersion) as error:
        raise StartError(f"{path}: not a PEM certificate") from error


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_KEY_FILE_BYTES:
        raise StartError(f"{path}: {len(content)} bytes are more than the limit of {MAX_KEY_FILE_BYTES}")
    return content
