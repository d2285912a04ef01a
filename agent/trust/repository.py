"""Follows one TUF repository, file by file: TUF 1.0.34, sections 5.3 to 5.7.

Serves the vehicle (`agent.trust.verifier`, where all holds or nothing is
taken) and a plain TUF client (`tests/tools/tuf_client.py`). Knows no vehicle,
no nonce and no floors. Does no I/O and reads no clock: bytes and a reference
time come in; what comes out is parsed metadata that was verified against its
delegator. Raises only TrustError. Nothing is remembered here, so that on any
error the caller still holds what it trusted before.

python-tuf's public `tuf.api.metadata` reads the files and verifies single
signatures; the order of checks is this module's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar, cast

from securesystemslib.signer import Key
from tuf.api import exceptions
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from agent.errors import (
    DisagreementError,
    ExpiredError,
    MalformedError,
    RollbackError,
    SignatureError,
    TrustError,
)
from agent.wire import shown

MAX_VISITED_ROLES = 32
"""Most delegated roles that one search for a target looks into (TUF 5.6.7.1)."""

_T = TypeVar("_T", Root, Timestamp, Snapshot, Targets)


# --- roots (TUF 5.3) ---------------------------------------------------------


def load_root(name: str, content: bytes) -> Root:
    """Read a root that is trusted already: it must be signed by its own keys (TUF 5.2).

    Args:
        name: the repository, as errors name it.
        content: as it was provisioned or stored.

    Raises:
        MalformedError: it is no root.
        SignatureError: below its own threshold.
    """
    metadata = _parse(f"{name} root", content, Root)
    _verify(f"{name} root", metadata, metadata.signed, Root.type)
    return metadata.signed


def next_root(name: str, trusted: Root, content: bytes) -> Root:
    """Verify the root that follows the trusted one (TUF 5.3.4 and 5.3.5).

    Its expiry is not judged: only that of the last root counts (`check_root_expiry`).

    Raises:
        MalformedError: it is no root.
        SignatureError: below the threshold of the old or of its own keys.
        RollbackError: it is older than the trusted one.
        DisagreementError: a root between the two is missing.
    """
    what = f"{name} root"
    metadata = _parse(what, content, Root)
    _verify(what, metadata, trusted, Root.type)
    version = metadata.signed.version
    if version != trusted.version + 1:
        _refuse_older(what, trusted.version, version)
        raise _mismatch(what, trusted.version + 1, version)
    _verify(what, metadata, metadata.signed, Root.type)
    return metadata.signed


def check_root_expiry(name: str, root: Root, reference: datetime) -> None:
    """Refuse to go on under a last root that has expired (TUF 5.3.10).

    Raises:
        ExpiredError: at the reference time it has.
    """
    _check_expiry(f"{name} root", root, reference)


def online_keys(root: Root) -> str:
    """Name the keys that sign timestamps and snapshots under a root.

    If they differ between two roots, what the older keys signed is forgotten:
    the recovery from a fast-forward attack (TUF 5.3.11; Uptane 2.1.0 section
    5.4.4.3, step 4).
    """
    keys = sorted(
        f"{role}:{_public(root.keys[keyid])}"
        for role in (Timestamp.type, Snapshot.type)
        for keyid in root.roles[role].keyids
        if keyid in root.keys
    )
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


# --- timestamp, snapshot and targets (TUF 5.4 to 5.6) ------------------------


def earlier(name: str, root: Root, content: bytes, role: type[_T]) -> _T | None:
    """Read a timestamp or snapshot that was trusted before, to hold newer ones against.

    It may have expired, and its length and hashes are not asked for again.

    Returns:
        None if there is none, or if it is not signed by the keys of this root
        any more: what revoked keys signed holds nothing back (TUF 5.3.11).
    """
    if not content:
        return None
    try:
        return verified(name, root, content, role)
    except TrustError:
        return None


def verified(name: str, root: Root, content: bytes, role: type[_T]) -> _T:
    """Read a top-level file and verify its signatures, nothing else.

    Raises:
        MalformedError: it is of another role or form.
        SignatureError: below the threshold.
    """
    what = f"{name} {role.type}"
    metadata = _parse(what, content, role)
    _verify(what, metadata, root, role.type)
    return metadata.signed


def next_timestamp(
    name: str, root: Root, content: bytes, *, trusted: Timestamp | None, reference: datetime
) -> Timestamp:
    """Verify a timestamp (TUF 5.4).

    Args:
        name: the repository, as errors name it.
        root: the last root, itself not expired.
        content: as received.
        trusted: the timestamp that is trusted so far.
        reference: time at which expiry is judged.

    Returns:
        The new timestamp, or `trusted` itself if the version is the same.

    Raises:
        MalformedError: it is no timestamp.
        SignatureError: below the threshold.
        RollbackError: it, or the snapshot that it names, is older than trusted.
        ExpiredError: the one that is returned would have expired.
    """
    what = f"{name} timestamp"
    received = verified(name, root, content, Timestamp)
    if trusted is not None:
        _refuse_older(what, trusted.version, received.version)
        if received.version == trusted.version:  # TUF 5.4.3.1: nothing is new
            received = trusted
        _refuse_older(f"{name} snapshot", trusted.snapshot_meta.version, received.snapshot_meta.version)
    _check_expiry(what, received, reference)
    return received


def next_snapshot(
    name: str,
    root: Root,
    timestamp: Timestamp,
    content: bytes,
    *,
    trusted: Snapshot | None,
    reference: datetime,
) -> Snapshot:
    """Verify the snapshot that a timestamp names (TUF 5.5).

    Args:
        name: the repository, as errors name it.
        root: the last root.
        timestamp: verified.
        content: as received.
        trusted: the snapshot that is trusted so far.
        reference: time at which expiry is judged.

    Raises:
        MalformedError: another length, hash or form than named, or a targets
            file that was listed before is missing.
        SignatureError: below the threshold.
        RollbackError: it, or a targets file that it lists, is older than trusted.
        DisagreementError: it is newer than the timestamp says.
        ExpiredError: at the reference time it has expired.
    """
    what = f"{name} snapshot"
    _check_content(what, timestamp.snapshot_meta, content)
    received = verified(name, root, content, Snapshot)
    _check_version(what, timestamp.snapshot_meta.version, received.version)
    for file, meta in trusted.meta.items() if trusted is not None else ():
        if file not in received.meta:
            raise MalformedError(f"{what}: New snapshot is missing info for {shown(file)}")
        _refuse_older(f"{name} {file.removesuffix('.json')}", meta.version, received.meta[file].version)
    _check_expiry(what, received, reference)
    return received


def named_targets(name: str, snapshot: Snapshot, role: str) -> MetaFile:
    """Return what a snapshot says of a targets file.

    Raises:
        MalformedError: nothing.
    """
    found = snapshot.meta.get(f"{role}.json")
    if found is None:
        raise MalformedError(f"{name} snapshot: missing info for {shown(role + '.json')}")
    return found


def next_targets(
    name: str,
    delegator: Root | Targets,
    snapshot: Snapshot,
    content: bytes,
    *,
    role: str = Targets.type,
    reference: datetime,
) -> Targets:
    """Verify top-level or delegated targets (TUF 5.6.1 to 5.6.6).

    Args:
        name: the repository, as errors name it.
        delegator: who delegates to the role: the root, or other verified targets.
        snapshot: verified.
        content: as received.
        role: name of the role.
        reference: time at which expiry is judged.

    Raises:
        MalformedError: another length, hash or form than the snapshot names.
        SignatureError: below the threshold.
        RollbackError: it is older than the snapshot says.
        DisagreementError: it is newer than the snapshot says.
        ExpiredError: at the reference time it has expired.
    """
    what = f"{name} {shown(role) if role != Targets.type else role}"
    meta = named_targets(name, snapshot, role)
    _check_content(what, meta, content)
    metadata = _parse(what, content, Targets)
    _verify(what, metadata, delegator, role)
    _check_version(what, meta.version, metadata.signed.version)
    _check_expiry(what, metadata.signed, reference)
    return metadata.signed


# --- targets files (TUF 5.6.7 and 5.7) ---------------------------------------


def find_target(path: str, top: Targets, load: Callable[[str, Targets], Targets]) -> TargetFile | None:
    """Search for a target in preorder, through the delegations that match its path.

    Args:
        path: of the target.
        top: verified top-level targets.
        load: returns the verified targets of a role, given its name and delegator.

    Returns:
        What the first role that lists it says of it; None if none of the first
        MAX_VISITED_ROLES delegated roles does.

    Raises:
        TrustError: from `load`.
    """
    waiting: list[tuple[str, Targets | None]] = [(Targets.type, None)]  # the next one last
    visited: set[str] = set()
    while waiting and len(visited) <= MAX_VISITED_ROLES:
        role, delegator = waiting.pop()
        if role in visited:
            continue
        visited.add(role)
        targets = top if delegator is None else load(role, delegator)
        if path in targets.targets:
            return targets.targets[path]
        children = []
        for child, terminating in _delegated(targets, path):
            children.append((child, targets))
            if terminating:
                waiting.clear()
                break
        waiting.extend(reversed(children))
    return None


def check_target(what: str, info: TargetFile, content: bytes) -> None:
    """Refuse a target file of other length or hashes than its role signed (TUF 5.7).

    Raises:
        MalformedError: they do not match.
    """
    with _tuf_errors(what):
        info.verify_length_and_hashes(content)


def _delegated(targets: Targets, path: str) -> Iterator[tuple[str, bool]]:
    if targets.delegations is not None:
        yield from targets.delegations.get_roles_for_target(path)


# --- checks ------------------------------------------------------------------


def _parse(what: str, content: bytes, role: type[_T]) -> Metadata[_T]:
    with _tuf_errors(what):
        metadata: Metadata[Any] = Metadata.from_bytes(content)
    if metadata.signed.type != role.type:
        raise MalformedError(f"{what}: Expected {role.type!r}, got {shown(metadata.signed.type)}")
    return cast("Metadata[_T]", metadata)


def _verify(what: str, metadata: Metadata[Any], delegator: Root | Targets, role: str) -> None:
    """Count unique keys: one key under two key ids is one signature (TUF 4.2, 5.3.4)."""
    with _tuf_errors(what):
        result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    found = len({_public(key) for key in result.signed.values()})
    if found < result.threshold:
        raise SignatureError(
            f"{what}: {role} was signed by {found}/{result.threshold} keys; nothing of it is used"
        )


def _public(key: Key) -> str:
    """Return a key's public half in one spelling."""
    found = key.keyval.get("public")
    return "".join(found.lower().split()) if isinstance(found, str) else repr(found)


def _check_content(what: str, meta: MetaFile, content: bytes) -> None:
    with _tuf_errors(what):
        meta.verify_length_and_hashes(content)


def _check_version(what: str, named: int, received: int) -> None:
    if received != named:
        _refuse_older(what, named, received)
        raise _mismatch(what, named, received)


def _mismatch(what: str, expected: int, received: int) -> DisagreementError:
    return DisagreementError(
        f"{what}: expected version {expected}, got {received}: files of different sets; nothing is used"
    )


def _refuse_older(what: str, trusted: int, received: int) -> None:
    if received < trusted:
        raise RollbackError(what, trusted=trusted, received=received)


def _check_expiry(what: str, signed: Signed, reference: datetime) -> None:
    if signed.is_expired(reference):
        raise ExpiredError(
            f"{what}: {signed.type}.json is expired at the trusted time"
            f" ({signed.expires:%Y-%m-%d %H:%M} UTC); nothing of it is used"
        )


@contextmanager
def _tuf_errors(what: str) -> Iterator[None]:
    """Turn what python-tuf raises for bad content into MalformedError."""
    try:
        yield
    except exceptions.RepositoryError as error:
        cause = f": {shown(str(error.__cause__))}" if error.__cause__ else ""
        raise MalformedError(f"{what}: {error or type(error).__name__}{cause}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise MalformedError(f"{what}: {type(error).__name__}: {shown(str(error))}") from error
