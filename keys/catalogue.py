"""Signs the catalogue: what each feature is, release by release, for ever.

A release that was signed once is never changed or withdrawn from the list: an
edit is a new release, so that no existing right can break. The repository
that is written holds the offline half (root, targets and the target files);
the cloud signs snapshot and timestamp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from keys import files, roots, signers, staging
from keys.errors import CatalogueError, KeyMaterialError, ThresholdError
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
        ThresholdError: fewer of the targets keys are here than the root asks for.
    """
    releases = lint(source)
    staging.finish(keys)
    chain = _own_chain(keys, repository)
    root = chain.newest
    previous, is_current = _previous(repository, chain)
    targets = {release.path: _target(release) for release in releases}
    added = _added(source, previous, targets)
    if previous is not None and is_current and not added and previous.expires - now > RENEW_BELOW:
        return Signed(previous.version, len(releases), (), written=False)

    version = 1 if previous is None else previous.version + 1
    metadata = Metadata(Targets(version=version, expires=_expiry(now), targets=targets))
    _sign_with_folder(keys, root, metadata)
    _check_threshold(root, metadata)

    for number, content in chain.contents.items():
        files.write(repository / "metadata" / f"{number}.root.json", content)
    for release in releases:
        files.write(repository / "targets" / release.path, release.content)
    # Last, so that metadata never names a file that is not there yet.
    _write_targets(repository, metadata)
    return Signed(version, len(releases), added, written=True)


def sign_for_both(
    keys: Path,
    repository: Path,
    root: Metadata[Root],
    following: Metadata[Root],
    new: Iterable[CryptoSigner],
    now: datetime,
) -> int:
    """Signs the present catalogue anew so that it stands under two roots, before the second one is published.

    Args:
        root, following: the newest root, and the one that is to follow it.
        new: the targets keys that only the second one names.
        now: UTC.

    Returns:
        the new version.

    Raises:
        KeyMaterialError: there is no catalogue, or it is not signed under `root`.
        ThresholdError: too few keys of either root are here; the repository is unchanged.
    """
    previous, is_current = _previous(repository, _own_chain(keys, repository))
    if previous is None or not is_current:
        raise KeyMaterialError(f"{repository}: holds no catalogue that the present targets keys signed")
    metadata = Metadata(Targets(version=previous.version + 1, expires=_expiry(now), targets=previous.targets))
    _sign_with_folder(keys, root, metadata)
    for signer in new:
        metadata.sign(signer, append=True)
    for either in (root, following):
        _check_threshold(either, metadata)
    _write_targets(repository, metadata)
    return metadata.signed.version


def _own_chain(keys: Path, repository: Path) -> roots.Chain:
    chain = roots.load_chain(keys, "catalogue")
    roots.check_self_signed(keys / roots.first_path("catalogue"), chain.newest)
    path = repository / "metadata" / "1.root.json"
    if path.exists() and files.read(path) != chain.contents[1]:
        raise KeyMaterialError(f"{path} is not the root of {keys}; this catalogue belongs to other keys")
    return chain


def _expiry(now: datetime) -> datetime:
    return (now + TARGETS_LIFETIME).replace(microsecond=0)


def _write_targets(repository: Path, metadata: Metadata[Targets]) -> None:
    path = repository / "metadata" / f"{metadata.signed.version}.targets.json"
    files.write(path, metadata.to_bytes(JSONSerializer(compact=True)))


def _target(release: Release) -> TargetFile:
    target = TargetFile.from_data(release.path, release.content, ["sha256"])
    target.unrecognized_fields["custom"] = {
        "hardware_ids": [release.file.ecu.hardware_id],
        "release_counter": release.file.feature.release,
    }
    return target


def _sign_with_folder(keys: Path, root: Metadata[Root], metadata: Metadata[Targets]) -> None:
    """Signs with each holder's key that is here; a key of no holder is refused, not skipped."""
    for name, (role, key) in roots.named_keys(root.signed).items():
        path = keys / "catalogue" / f"{name}.key"
        if role == Targets.type and path.exists():
            payload = metadata.signed_bytes
            metadata.signatures[key.keyid] = signers.sign(signers.uri_of(str(path)), [key], payload)


def _check_threshold(root: Metadata[Root], metadata: Metadata[Targets]) -> None:
    found = root.signed.get_verification_result(Targets.type, metadata.signed_bytes, metadata.signatures)
    if not found.verified:
        raise ThresholdError(
            f"catalogue targets: expected {found.threshold} signatures under root {root.signed.version}, "
            f"found {len(found.signed)}; nothing was written"
        )


def _previous(repository: Path, chain: roots.Chain) -> tuple[Targets | None, bool]:
    """Reads the newest targets metadata, signed under some root of the chain; True if under the newest."""
    names = (repository / "metadata").glob("*.targets.json")
    versions = [int(p.name.partition(".")[0]) for p in names if p.name.partition(".")[0].isdecimal()]
    if not versions:
        return None, False
    path = repository / "metadata" / f"{max(versions)}.targets.json"
    try:
        metadata = Metadata[Targets].from_bytes(files.read(path))
        signed_under = max(
            (number for number, root in chain.contents.items() if _is_signed(root, metadata)), default=0
        )
        if not signed_under:
            chain.newest.verify_delegate(Targets.type, metadata)
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise KeyMaterialError(f"{path}: not signed by this root's targets keys: {error}") from error
    if metadata.signed.version != max(versions):
        raise KeyMaterialError(f"{path}: holds version {metadata.signed.version}, not that of its name")
    return metadata.signed, signed_under == chain.newest.signed.version


def _is_signed(root: bytes, metadata: Metadata[Targets]) -> bool:
    signed = Metadata[Root].from_bytes(root).signed
    return signed.get_verification_result(Targets.type, metadata.signed_bytes, metadata.signatures).verified


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
