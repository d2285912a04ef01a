"""Full verification of plain Uptane 2.1.0, section 5.4.4.2, for one ECU: for published vectors.

The same steps over `agent.trust.repository` that a vehicle's update passes,
without what this project adds (`agent.trust.verifier`): no binding to a
vehicle, no nonce, no floors, no rules for feature files. Does no I/O and reads
no clock: bytes and a time come in, a verdict with its reason comes out.

Custom fields are named as in this project's metadata: the director's targets
carry `ecu_identifier`, `hardware_id` and `release_counter`, the image
repository's `hardware_ids` and `release_counter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tuf.api.metadata import Root, Snapshot, TargetFile, Targets, Timestamp

from agent.errors import DisagreementError, MalformedError, RollbackError, TrustError
from agent.model import RepositoryBytes
from agent.trust import binding, repository
from agent.wire import (
    MAX_ROOT_BYTES,
    MAX_ROOTS,
    MAX_SNAPSHOT_BYTES,
    MAX_TARGETS_BYTES,
    MAX_TIMESTAMP_BYTES,
    bounded,
    shown,
)

_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class FullVerdict:
    """What full verification found.

    Args:
        targets: by path, what both repositories agree on for this ECU; empty
            if the director lists nothing for it, or on an error.
        error: why nothing may be installed; None if all checks hold.
    """

    targets: Mapping[str, TargetFile] = field(default_factory=dict)
    error: TrustError | None = None

    @property
    def reason(self) -> str:
        """The error's kind and words; empty if all checks hold."""
        return f"{type(self.error).__name__}: {self.error}" if self.error else ""


def full_verification(
    director: RepositoryBytes,
    image: RepositoryBytes,
    *,
    ecu_identifier: str,
    hardware_id: str,
    now_ms: int,
    delegated: Mapping[str, bytes] | None = None,
    trusted_director: RepositoryBytes | None = None,
    trusted_image: RepositoryBytes | None = None,
    release_counter: int = 0,
) -> FullVerdict:
    """Judge what two repositories say for one ECU (Uptane 2.1.0 section 5.4.4.2).

    Args:
        director: metadata of the director; its first root is trusted as it is,
            the others follow it.
        image: the same of the image repository.
        ecu_identifier: of this ECU.
        hardware_id: of this ECU.
        now_ms: attested time, Unix milliseconds.
        delegated: delegated targets of the image repository, by role.
        trusted_director, trusted_image: timestamp and snapshot that were
            trusted before, to hold the new ones against; their roots tell
            under which keys.
        release_counter: of the image that this ECU runs; not undercut.

    Returns:
        The verdict; never raises for bad metadata.
    """
    try:
        reference = _UNIX_EPOCH + timedelta(milliseconds=now_ms)
    except OverflowError:
        return FullVerdict(error=MalformedError(f"time: expected Unix milliseconds, found {now_ms}"))
    try:
        # Steps 1 to 6: the director, whose root, timestamp, snapshot and targets follow one another.
        _, ours = _verified("director", director, trusted_director, reference)
        if ours.delegations is not None:  # 5.4.4.6, step 6
            raise MalformedError("director targets: expected no delegations")
        wanted = _for_ecu(ours, ecu_identifier)
        if not wanted:
            return FullVerdict()
        # Steps 7 to 10: the same of the image repository, and its delegations.
        snapshot, top = _verified("image", image, trusted_image, reference)

        def load(role: str, delegator: Targets) -> Targets:
            content = (delegated or {}).get(role, b"")
            _form(f"image {role}", content, MAX_TARGETS_BYTES)
            return repository.next_targets(
                "image", delegator, snapshot, content, role=role, reference=reference
            )

        for path, info in wanted.items():
            _check_match(path, info, repository.find_target(path, top, load), hardware_id, release_counter)
    except TrustError as error:
        return FullVerdict(error=error)
    return FullVerdict(wanted)


def _verified(
    name: str, files: RepositoryBytes, trusted: RepositoryBytes | None, reference: datetime
) -> tuple[Snapshot, Targets]:
    """Verify root, timestamp, snapshot and targets of one repository (5.4.4.3 to 5.4.4.6)."""
    if not files.roots:
        raise MalformedError(f"{name} root: missing")
    bounded(f"{name} root files", limit=MAX_ROOTS, found=len(files.roots))
    for content in files.roots:
        _form(f"{name} root", content, MAX_ROOT_BYTES)
    root = repository.load_root(name, files.roots[0])
    for content in files.roots[1:]:
        root = repository.next_root(name, root, content)
    repository.check_root_expiry(name, root, reference)
    timestamp_before, snapshot_before = _before(name, root, trusted)
    _form(f"{name} timestamp", files.timestamp, MAX_TIMESTAMP_BYTES)
    timestamp = repository.next_timestamp(
        name, root, files.timestamp, trusted=timestamp_before, reference=reference
    )
    _form(f"{name} snapshot", files.snapshot, MAX_SNAPSHOT_BYTES)
    snapshot = repository.next_snapshot(
        name, root, timestamp, files.snapshot, trusted=snapshot_before, reference=reference
    )
    _form(f"{name} targets", files.targets, MAX_TARGETS_BYTES)
    return snapshot, repository.next_targets(name, root, snapshot, files.targets, reference=reference)


def _before(
    name: str, root: Root, trusted: RepositoryBytes | None
) -> tuple[Timestamp | None, Snapshot | None]:
    if trusted is None:
        return None, None
    if trusted.roots:
        last = repository.load_root(name, trusted.roots[-1])
        if repository.online_keys(last) != repository.online_keys(root):  # 5.4.4.3, step 4
            return None, None
    return (
        repository.earlier(name, root, trusted.timestamp, Timestamp),
        repository.earlier(name, root, trusted.snapshot, Snapshot),
    )


def _for_ecu(targets: Targets, ecu_identifier: str) -> dict[str, TargetFile]:
    """Return the director's targets for an ECU; each ECU stands once (5.4.4.6, step 7)."""
    paths: dict[str, str] = {}
    for path, info in targets.targets.items():
        found = _custom("director", path, info).get("ecu_identifier")
        if not isinstance(found, str) or found in paths:
            raise DisagreementError(
                f"director targets: expected each ECU identifier once, found {shown(found)} for {shown(path)}"
            )
        paths[found] = path
    path_of_this = paths.get(ecu_identifier)
    return {} if path_of_this is None else {path_of_this: targets.targets[path_of_this]}


def _check_match(
    path: str, ours: TargetFile, theirs: TargetFile | None, hardware_id: str, release_counter: int
) -> None:
    """Compare what both repositories say of a target (5.4.4.2, step 10)."""
    at = shown(path)
    if theirs is None:
        raise DisagreementError(f"{at}: the director lists it, the image repository does not")
    if (ours.length, ours.hashes) != (theirs.length, theirs.hashes):
        raise DisagreementError(
            f"{at}: the director says length {ours.length} and {shown(ours.hashes)},"
            f" the image repository {theirs.length} and {shown(theirs.hashes)}"
        )
    our_custom, their_custom = _custom("director", path, ours), _custom("image", path, theirs)
    found, listed = our_custom.get("hardware_id"), their_custom.get("hardware_ids")
    if found != hardware_id or not isinstance(listed, list) or hardware_id not in listed:
        raise DisagreementError(
            f"{at}: this ECU is {hardware_id}, the director says hardware_id {shown(found)},"
            f" the image repository lists {shown(listed)}"
        )
    counters = our_custom.get("release_counter"), their_custom.get("release_counter")
    if not binding.is_integer(counters[0]) or counters[0] != counters[1]:
        raise DisagreementError(
            f"{at}: the director says release_counter {shown(counters[0])},"
            f" the image repository {shown(counters[1])}"
        )
    if counters[0] < release_counter:
        raise RollbackError(f"{at} release counter", trusted=release_counter, received=counters[0])


def _custom(name: str, path: str, info: TargetFile) -> Mapping[str, object]:
    custom = info.custom
    if not isinstance(custom, dict):
        raise MalformedError(f"{name} target {shown(path)}: expected custom metadata, found {shown(custom)}")
    return custom


def _form(what: str, content: bytes, limit: int) -> None:
    binding.read_metadata(content, what, limit=limit)
