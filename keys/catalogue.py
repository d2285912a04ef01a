"""Signs the catalogue: what each feature is, release by release, for ever.

A release that was signed once is never changed or withdrawn from the list: an
edit is a new release, so that no existing right can break. The repository
that is written holds the offline half (root, targets and the target files);
the cloud signs snapshot and timestamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from keys import files
from keys.ceremony import HOLDERS
from keys.errors import CatalogueError, KeyMaterialError
from keys.lint import Release, lint

TARGETS_LIFETIME = timedelta(days=365)
"""Validity of the catalogue's targets metadata."""
RENEW_BELOW = timedelta(days=180)
"""Remaining validity below which an unchanged catalogue is signed again."""


@dataclass(frozen=True)
class Signed:
    """What `sign_catalogue` did.

    Args:
        version: of the newest targets metadata.
        added: paths that were not signed before.
        written: False if nothing had changed and the old signature stands.
    """

    version: int
    releases: int
    added: tuple[str, ...]
    written: bool


def sign_catalogue(keys: Path, source: Path, repository: Path, now: datetime) -> Signed:
    """Judges the source and signs its releases into the repository.

    Args:
        keys: folder that `ceremony.init` made.
        now: UTC.

    Raises:
        CatalogueError: the source is refused; the repository is unchanged.
        KeyMaterialError: keys or root are missing or do not fit.
    """
    releases = lint(source)
    root_bytes = files.read(keys / "public" / "catalogue-root.json")
    root = _load_root(keys / "public" / "catalogue-root.json", root_bytes)
    root_path = repository / "metadata" / "1.root.json"
    if root_path.exists() and files.read(root_path) != root_bytes:
        raise KeyMaterialError(f"{root_path} is not the root of {keys}; this catalogue belongs to other keys")
    signers = [_signer(keys, i, root.signed) for i in range(1, HOLDERS + 1)]

    previous = _previous(repository, root)
    targets = {release.path: _target(release) for release in releases}
    added = _added(source, previous, targets)
    if previous is not None and not added and previous.expires - now > RENEW_BELOW:
        return Signed(previous.version, len(releases), (), written=False)

    version = 1 if previous is None else previous.version + 1
    expires = (now + TARGETS_LIFETIME).replace(microsecond=0)
    metadata = Metadata(Targets(version=version, expires=expires, targets=targets))
    for signer in signers:
        metadata.sign(signer, append=True)
    root.verify_delegate(Targets.type, metadata)

    files.write(root_path, root_bytes)
    for release in releases:
        files.write(repository / "targets" / release.path, release.content)
    # Last, so that metadata never names a file that is not there yet.
    files.write(
        repository / "metadata" / f"{version}.targets.json", metadata.to_bytes(JSONSerializer(compact=True))
    )
    return Signed(version, len(releases), added, written=True)


def _target(release: Release) -> TargetFile:
    target = TargetFile.from_data(release.path, release.content, ["sha256"])
    target.unrecognized_fields["custom"] = {
        "hardware_ids": [release.file.ecu.hardware_id],
        "release_counter": release.file.feature.release,
    }
    return target


def _load_root(path: Path, content: bytes) -> Metadata[Root]:
    try:
        root = Metadata[Root].from_bytes(content)
        root.verify_delegate(Root.type, root)
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise KeyMaterialError(f"{path}: not a root that its own keys signed: {error}") from error
    return root


def _signer(keys: Path, number: int, root: Root) -> CryptoSigner:
    path = keys / "catalogue" / f"targets-{number}.key"
    signer = CryptoSigner(files.load_ed25519(path))
    allowed = root.roles[Targets.type].keyids
    if signer.public_key.keyid not in allowed:
        raise KeyMaterialError(
            f"{path}: key {signer.public_key.keyid[:16]} is none of the targets keys in the root: "
            + ", ".join(keyid[:16] for keyid in allowed)
        )
    return signer


def _previous(repository: Path, root: Metadata[Root]) -> Targets | None:
    """Reads the newest targets metadata, which must be signed under the same root."""
    names = (repository / "metadata").glob("*.targets.json")
    versions = [int(p.name.partition(".")[0]) for p in names if p.name.partition(".")[0].isdecimal()]
    if not versions:
        return None
    path = repository / "metadata" / f"{max(versions)}.targets.json"
    try:
        metadata = Metadata[Targets].from_bytes(files.read(path))
        root.verify_delegate(Targets.type, metadata)
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise KeyMaterialError(f"{path}: not signed by this root's targets keys: {error}") from error
    if metadata.signed.version != max(versions):
        raise KeyMaterialError(f"{path}: holds version {metadata.signed.version}, not that of its name")
    return metadata.signed


def _added(source: Path, previous: Targets | None, targets: dict[str, TargetFile]) -> tuple[str, ...]:
    """Returns the new paths; a path that was signed before must have the same bytes now."""
    before = {} if previous is None else previous.targets
    problems = []
    for path, target in before.items():
        if path not in targets:
            problems.append(f"{source / path}: was signed and is missing; rights may depend on it")
        elif targets[path].hashes != target.hashes:
            problems.append(
                f"{source / path}: was signed with sha256 {target.hashes['sha256'][:16]}, found "
                f"{targets[path].hashes['sha256'][:16]}; an edit is a new release"
            )
    if problems:
        raise CatalogueError(problems)
    return tuple(path for path in targets if path not in before)
