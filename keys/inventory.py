"""Lists what a key folder holds, what is missing and what ends soon, without showing any secret."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import cbor2
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Root

from keys import ceremony, files, roots, rotation, staging
from keys.errors import KeyMaterialError

WARN_BELOW_DAYS = 180
"""Remaining validity of a root, in days, below which `fod-keys show` warns."""
_NOT_IN_USE = {staging.RETIRED: "retired ", staging.PREPARED: "prepared "}
_EXPECTED = (
    "receipt/receipt.key",
    "tls/ca.key",
    "tls/ca.crt",
    "tls/server.key",
    "tls/server.crt",
    "enrolment/ca.key",
    "enrolment/ca.crt",
    "token/root.key",
    "public/tls-ca.crt",
    "public/enrolment-ca.crt",
    "public/receipt.pub",
    "public/token-root.pub",
)


@dataclass(frozen=True)
class Entry:
    """One key or certificate.

    Args:
        kind: "Ed25519 key", "P-256 key" or "certificate", with an operator's role; before it
            "retired" or "prepared" for what is not in use.
        identifier: TUF keyid of an Ed25519 key, SHA-256 fingerprint of a P-256 public key or certificate.
        expires: ISO 8601 date, "never", or "" for a key.
    """

    file: str
    kind: str
    identifier: str
    expires: str


@dataclass(frozen=True)
class RootEntry:
    """One root of a chain.

    Args:
        thresholds: such as "root 2 of 3".
        keys: name of a key -> keyid.
        expires: ISO 8601 date.
        days_left: whole days until then; negative if it is past.
    """

    repository: str
    version: int
    thresholds: tuple[str, ...]
    keys: dict[str, str]
    expires: str
    days_left: int


@dataclass(frozen=True)
class Epoch:
    """One token key.

    Args:
        kid: as tokens name it (docs/token.md), hex; "" if it was not announced.
        private_key: its file, or "" if it is not here.
    """

    epoch: int
    kid: str
    is_announced: bool
    private_key: str


@dataclass(frozen=True)
class Inventory:
    """A key folder."""

    files: tuple[Entry, ...]
    roots: tuple[RootEntry, ...]
    epochs: tuple[Epoch, ...]
    warnings: tuple[str, ...]
    missing: tuple[str, ...]


def take(folder: Path, now: datetime) -> Inventory:
    """Reads the keys, certificates and roots below `folder`, by path; writes nothing.

    Args:
        now: UTC.

    Raises:
        KeyMaterialError: there is none, or one cannot be read.
    """
    entries = tuple(_entries(folder))
    if not entries:
        raise KeyMaterialError(f"{folder}: holds no keys; make them with: fod-keys init {folder}")
    chains = {
        name: roots.load_chain(folder, name)
        for name in rotation.REPOSITORIES
        if (folder / roots.first_path(name)).exists()
    }
    listed = tuple(r for name, chain in chains.items() for r in _chain(folder, name, chain, now))
    held = {entry.identifier for entry in entries if not entry.kind.startswith(tuple(_NOT_IN_USE.values()))}
    return Inventory(
        files=entries,
        roots=listed,
        epochs=tuple(_epochs(folder)),
        warnings=tuple(_warnings(folder, chains, now)),
        missing=tuple(_missing(folder, chains, held)),
    )


def _entries(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        prefix = _NOT_IN_USE.get(name.partition("/")[0], "")
        if path.suffix == ".key":
            yield _key(name, path, prefix)
        elif path.suffix == ".crt":
            yield _certificate(name, path, prefix)


def _key(name: str, path: Path, prefix: str) -> Entry:
    try:
        key = serialization.load_pem_private_key(files.read(path), None)
    except (ValueError, TypeError) as error:
        raise KeyMaterialError(f"{path}: not an unencrypted PEM private key") from error
    if isinstance(key, Ed25519PrivateKey):
        return Entry(name, f"{prefix}Ed25519 key", SSlibKey.from_crypto(key.public_key()).keyid, "")
    if isinstance(key, EllipticCurvePrivateKey):
        encoded = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return Entry(name, f"{prefix}P-256 key", hashlib.sha256(encoded).hexdigest(), "")
    raise KeyMaterialError(f"{path}: expected an Ed25519 or P-256 key, found {type(key).__name__}")


def _certificate(name: str, path: Path, prefix: str) -> Entry:
    try:
        certificate = x509.load_pem_x509_certificate(files.read(path))
    except (ValueError, x509.InvalidVersion) as error:
        raise KeyMaterialError(f"{path}: not a PEM certificate") from error
    encoded = certificate.public_bytes(serialization.Encoding.DER)
    year = certificate.not_valid_after_utc.year
    expires = "never" if year == 9999 else certificate.not_valid_after_utc.date().isoformat()  # noqa: PLR2004
    return Entry(
        name, f"{prefix}certificate{_role(certificate)}", hashlib.sha256(encoded).hexdigest(), expires
    )


def _role(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if not any(uri.startswith("urn:openfod:operator:") for uri in uris):
        return ""
    role = next((u.rpartition(":")[2] for u in uris if u.startswith("urn:openfod:role:")), "operator")
    return f" (role {role})"


def _chain(folder: Path, name: str, chain: roots.Chain, now: datetime) -> Iterator[RootEntry]:
    for version, content in chain.contents.items():
        root = roots.parse(folder / roots.chain_path(name, version), content).signed
        yield RootEntry(
            repository=name,
            version=version,
            thresholds=tuple(f"{role} {r.threshold} of {len(r.keyids)}" for role, r in root.roles.items()),
            keys={key: public.keyid for key, (_, public) in roots.named_keys(root).items()},
            expires=root.expires.date().isoformat(),
            days_left=(root.expires - now).days,
        )


def _epochs(folder: Path) -> Iterator[Epoch]:
    for epoch in range(1, rotation.newest_epoch(folder) + 1):
        path = folder / "public" / f"token-key-{epoch}.cose"
        private = folder / "token" / f"key-{epoch}.key"
        yield Epoch(
            epoch,
            _announced_kid(folder, path, epoch) if path.exists() else "",
            path.exists(),
            private.relative_to(folder).as_posix() if private.exists() else "",
        )


def _announced_kid(folder: Path, path: Path, epoch: int) -> str:
    """Reads an announcement that the token root signed."""
    try:
        root = serialization.load_pem_public_key(files.read(folder / "public" / "token-root.pub"))
        assert isinstance(root, Ed25519PublicKey)
        protected, _, payload, signature = cbor2.loads(files.read(path)).value
        claims = cbor2.loads(payload)
        root.verify(signature, ceremony.announcement_to_sign(protected, payload))
        if claims[1] != epoch:
            raise KeyMaterialError(f"{path}: announces epoch {claims[1]}, not that of its name")
        return hashlib.sha256(claims[2]).digest()[:8].hex()
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, InvalidSignature) as error:
        raise KeyMaterialError(f"{path}: not an announcement of public/token-root.pub: {error!r}") from error


def _warnings(folder: Path, chains: dict[str, roots.Chain], now: datetime) -> Iterator[str]:
    for name, chain in chains.items():
        root: Root = chain.newest.signed
        days = (root.expires - now).days
        if days < WARN_BELOW_DAYS:
            ends = "ended" if days < 0 else f"ends in {days} days"
            yield (
                f"{name} root {root.version} {ends} ({root.expires:%Y-%m-%d}); renew it with: "
                f"fod-keys renew {folder} {name}"
            )
        left = roots.MAX_ROOTS - root.version
        if left <= roots.MAX_ROOTS // 4:
            yield f"{name}: {left} more roots before vehicles must ship with a newer first one"
    for tree in staging.waiting(folder / staging.AGREED):
        yield f"{tree} is not all in place yet; the next fod-keys command that writes finishes it"
    for tree in staging.waiting(folder / staging.PREPARED):
        yield f"{tree} waits; publish it with: fod-keys publish {folder} {tree.name}"
    for path in rotation.superseded(folder):
        yield f"{path} is named by nothing any more; the next fod-keys command that writes retires it"


def _missing(folder: Path, chains: dict[str, roots.Chain], held: set[str]) -> Iterator[str]:
    for name in rotation.REPOSITORIES:
        if name not in chains:
            yield roots.first_path(name)
            continue
        for key, (_, public) in roots.named_keys(chains[name].newest.signed).items():
            if public.keyid not in held:
                yield f"{name}/{key}.key (key {public.keyid[:16]} is held elsewhere or lost)"
    yield from (path for path in _EXPECTED if not (folder / path).exists())
    newest = rotation.newest_epoch(folder)
    if newest == 0:
        yield "public/token-key-1.cose"
    elif not (folder / "token" / f"key-{newest}.key").exists():
        yield f"token/key-{newest}.key"
