"""Decides which signed metadata, and with it which rights, this vehicle trusts.

Two TUF repositories must agree (Uptane 2.1.0): the catalogue says what a
feature is, the director which features this vehicle has. Does no I/O and reads
no clock: bytes and times come in, a `Verdict` or a TrustError comes out. All
values are immutable, so that on any error the trusted state is unchanged.

Order of checks: full verification, Uptane 2.1.0 section 5.4.4.2, with the
client workflow of TUF 1.0.34 section 5 for each repository. python-tuf's
`TrustedMetadataSet` carries that workflow; it is internal to python-tuf,
so its version is pinned, and tests/unit/test_trust_tuf_canary.py holds what is
used of it.

Beyond plain TUF: the director's metadata is bound to the vehicle and to a
nonce (`agent.trust.binding`); equal versions with other bytes are refused;
floors that live outside the stored metadata refuse older versions even if
that store is lost or set back.

Of Uptane 2.1.0 section 5.4.4.6, step 7 (each ECU identifier once) is kept for
each feature of an ECU, because a target is one feature and not a whole image;
step 8 (listed ECUs are present) is left to the ECU's answer on the bus.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from agent.errors import (
    DisagreementError,
    ExpiredError,
    MalformedError,
    ReplayError,
    RollbackError,
    SignatureError,
)
from agent.model import (
    ActuatorKind,
    Entitlement,
    FeatureSpec,
    RepositoryBytes,
    Rights,
    Token,
    TrustBytes,
    Verdict,
    Versions,
)
from agent.trust import binding
from agent.trust.catalogue import parse_feature
from agent.trust.token import parse_token
from agent.wire import (
    MAX_CATALOGUE_TARGETS,
    MAX_DIRECTOR_TARGETS,
    MAX_ROOT_BYTES,
    MAX_ROOTS,
    MAX_SNAPSHOT_BYTES,
    MAX_TARGETS_BYTES,
    MAX_TIMESTAMP_BYTES,
    bounded,
    bounded_trust_bytes,
    entitlements_from_bytes,
    shown,
)

ENTITLEMENTS_PATH = "entitlements.pb"

_FEATURE_PATH = re.compile(r"features/([a-z][a-z0-9-]{1,47})/([1-9][0-9]{0,9})\.toml")
_TOKEN_PATH = re.compile(r"tokens/([A-Za-z0-9][A-Za-z0-9_.-]{0,63})/([a-z][a-z0-9-]{1,47})\.cose")
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Floors:
    """The newest that this vehicle has ever trusted; kept outside the metadata store.

    Args:
        director, catalogue: versions that are not undercut.
        time_ms: latest signed time, Unix milliseconds.
        token_counters: by ECU identifier and feature id.
        releases: release counter of each feature, by feature id.
        director_epoch, catalogue_epoch: which timestamp and snapshot keys the
            floors belong to. When a threshold of root keys replaces those, the
            versions and the time begin anew, so that a stolen key that ran
            ahead is undone (Uptane 2.1.0 section 5.4.4.3, step 4).
    """

    director: Versions = Versions()
    catalogue: Versions = Versions()
    time_ms: int = 0
    token_counters: Mapping[tuple[str, str], int] = field(default_factory=dict)
    releases: Mapping[str, int] = field(default_factory=dict)
    director_epoch: str = ""
    catalogue_epoch: str = ""


@dataclass(frozen=True, slots=True)
class _Roots:
    """A repository's chain of roots, verified; `trusted` goes on from the last one."""

    name: str
    chain: tuple[bytes, ...]
    trusted: TrustedMetadataSet
    stored_epoch: str
    epoch: str


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository, verified."""

    content: RepositoryBytes
    versions: Versions
    targets: Mapping[str, TargetFile]


def verify_update(
    stored: TrustBytes, update: TrustBytes, *, vin: str, nonce: bytes, now_ms: int, floors: Floors
) -> Verdict:
    """Verify an update against what is trusted already.

    Args:
        stored: trusted state; holds at least the provisioned roots.
        update: as received; an empty part has not changed.
        vin: VIN of this vehicle.
        nonce: the nonce that is waiting for its answer, 16 bytes.
        now_ms: trusted time, Unix milliseconds; may be far behind. A signed
            time that is ahead of it counts for expiry once its signature holds.
        floors: what is not undercut.

    Returns:
        The complete new state. It must be durable before it is used.

    Raises:
        LimitError: something is too large, too many or too deep.
        MalformedError: something has not its form, or is missing.
        VehicleMismatchError: genuine, but of another vehicle.
        ReplayError: the nonce is not answered, or a version is used twice.
        SignatureError: below the threshold of valid signatures.
        RollbackError: older than what is trusted.
        ExpiredError: past its expiry.
        DisagreementError: director and catalogue, or their parts, do not fit.
    """
    bounded_trust_bytes(update)
    # 1. The answer is for this vehicle and for the nonce that is waiting.
    timestamp = binding.read_metadata(
        update.director.timestamp, "director timestamp", limit=MAX_TIMESTAMP_BYTES
    )
    binding.check_vehicle(timestamp, vin)
    binding.check_nonce(timestamp, nonce)
    # 2. Director root (Uptane 5.4.4.3; TUF 5.3).
    roots = _verify_roots("director", stored.director, update.director)
    # 3. The signed time, once its signature holds (Uptane 5.4.4.2, step 1: attested time).
    _verify_signature(roots, timestamp)
    signed_ms = binding.signed_time_ms(timestamp)
    if _is_other_epoch(roots.epoch, floors.director_epoch):
        reference_ms = signed_ms
    else:
        reference_ms = max(now_ms, floors.time_ms, signed_ms)
    return _verify(
        stored, update, roots, vin=vin, reference_ms=reference_ms, signed_ms=signed_ms, floors=floors
    )


def verify_stored(stored: TrustBytes, *, vin: str, as_of_ms: int, floors: Floors) -> Verdict:
    """Verify the stored state again, as it was at its last good refresh.

    Expired metadata on disk does not brick a vehicle: the rights' own terms
    decide how long they live (`agent.trust.terms`).

    Args:
        stored: as `verify_update` returned it.
        vin: VIN of this vehicle.
        as_of_ms: trusted time of the last good refresh, Unix milliseconds.
        floors: what is not undercut.

    Raises:
        TrustError: as `verify_update`, ReplayError excepted.
    """
    bounded_trust_bytes(stored)
    unchanged = TrustBytes()
    roots = _verify_roots("director", stored.director, unchanged.director)
    return _verify(stored, unchanged, roots, vin=vin, reference_ms=as_of_ms, signed_ms=0, floors=floors)


def check_anchors(anchors: TrustBytes) -> None:
    """Verify that the provisioned roots are roots, each signed by its own keys.

    Raises:
        TrustError: one is not; names it.
    """
    unchanged = RepositoryBytes()
    _verify_roots("director", anchors.director, unchanged)
    _verify_roots("catalogue", anchors.catalogue, unchanged)


def floors_after(verdict: Verdict, floors: Floors) -> Floors:
    """Return the floors once a verdict is taken; to be stored with its state."""
    director_epoch, catalogue_epoch = _epochs(verdict)
    renewed = _is_other_epoch(director_epoch, floors.director_epoch)
    rights = verdict.rights
    counters = {(t.ecu_identifier, t.feature_id): t.counter for t in rights.tokens.values()}
    releases = {f.feature_id: f.release for f in rights.features.values()}
    return Floors(
        director=verdict.director,
        catalogue=verdict.catalogue,
        time_ms=verdict.signed_ms if renewed else max(floors.time_ms, verdict.signed_ms),
        token_counters={**floors.token_counters, **counters},
        releases={**floors.releases, **releases},
        director_epoch=director_epoch,
        catalogue_epoch=catalogue_epoch,
    )


def starts_new_epoch(verdict: Verdict, floors: Floors) -> bool:
    """Tell whether root keys replaced the keys that signed all earlier times.

    Args:
        verdict: of an update.
        floors: from before that update.
    """
    return _is_other_epoch(_epochs(verdict)[0], floors.director_epoch)


def _verify(
    stored: TrustBytes,
    update: TrustBytes,
    director_roots: _Roots,
    *,
    vin: str,
    reference_ms: int,
    signed_ms: int,
    floors: Floors,
) -> Verdict:
    # 4. to 6. Director timestamp, snapshot and targets.
    director = _verify_repository(director_roots, stored.director, update.director, reference_ms, vin)
    _check_floors(director_roots, director.versions, floors.director, floors.director_epoch)
    # 7. to 10. The same for the catalogue, which belongs to no vehicle.
    catalogue_roots = _verify_roots("catalogue", stored.catalogue, update.catalogue)
    catalogue = _verify_repository(catalogue_roots, stored.catalogue, update.catalogue, reference_ms, None)
    _check_floors(catalogue_roots, catalogue.versions, floors.catalogue, floors.catalogue_epoch)
    # 11. Both agree on every feature (Uptane 5.4.4.2, matching of the two Targets).
    listed = _agreed_features(director, catalogue)
    # 12. Every target file is there, and is the one that was signed (TUF 5.7).
    own = {path: info for path, info in director.targets.items() if path not in listed}
    director_files = _contents("director", own, stored.director_targets, update.director_targets)
    catalogue_files = _contents("catalogue", listed, stored.catalogue_targets, update.catalogue_targets)
    # 13. What they say fits together.
    same_epoch = not _is_other_epoch(director_roots.epoch, floors.director_epoch)
    features = _features(catalogue_files, director.targets, floors.releases if same_epoch else {})
    rights = Rights(
        version=director.versions.targets,
        entitlements={},
        features=features,
        tokens=_tokens(director_files, director.targets, features, floors.token_counters),
    )
    rights = _with_entitlements(rights, director_files, vin)
    return Verdict(
        state=TrustBytes(director.content, catalogue.content, director_files, catalogue_files),
        director=director.versions,
        catalogue=catalogue.versions,
        rights=rights,
        signed_ms=signed_ms,
    )


# --- one repository ----------------------------------------------------------


def _verify_roots(name: str, stored: RepositoryBytes, update: RepositoryBytes) -> _Roots:
    """Follow the roots from the first stored one (Uptane 5.4.4.3, steps 1 and 2; TUF 5.3)."""
    what = f"{name} root"
    if not stored.roots:
        raise MalformedError(f"{what}: none is provisioned")
    binding.read_metadata(stored.roots[0], what, limit=MAX_ROOT_BYTES)
    with _tuf_errors(what):
        # Reads the machine's clock into `reference_time`, which is replaced before its first use.
        trusted = TrustedMetadataSet(stored.roots[0], EnvelopeType.METADATA)
    _check_unique_keys(what, trusted.root)
    _follow(what, trusted, stored.roots[1:])
    stored_epoch = _epoch(trusted.root)
    new = tuple(content for content in update.roots if content not in stored.roots)
    _follow(what, trusted, new)
    chain = (*stored.roots, *new)[-MAX_ROOTS:]
    return _Roots(name, chain, trusted, stored_epoch, _epoch(trusted.root))


def _follow(what: str, trusted: TrustedMetadataSet, roots: tuple[bytes, ...]) -> None:
    for content in roots:
        binding.read_metadata(content, what, limit=MAX_ROOT_BYTES)
        with _tuf_errors(what, content, {"root": trusted.root.version}):
            trusted.update_root(content)
        _check_unique_keys(what, trusted.root)


def _check_unique_keys(what: str, root: Root) -> None:
    """Refuse one key under two ids: thresholds count unique keys (Uptane 5.4.4.3, step 2.3)."""
    found: set[str] = set()
    for keyid, key in root.keys.items():
        public = key.keyval.get("public")
        if not isinstance(public, str):
            raise MalformedError(f"{what} version {root.version}: key {shown(keyid)} has no public half")
        found.add("".join(public.lower().split()))
    if len(found) != len(root.keys):
        raise MalformedError(f"{what} version {root.version}: one key stands under two key ids")


def _verify_signature(roots: _Roots, timestamp: binding.Metadata) -> None:
    with _tuf_errors(timestamp.what):
        parsed = Metadata[Timestamp].from_bytes(timestamp.content)
        roots.trusted.root.verify_delegate(Timestamp.type, parsed.signed_bytes, parsed.signatures)


def _verify_repository(
    roots: _Roots, stored: RepositoryBytes, update: RepositoryBytes, reference_ms: int, vin: str | None
) -> _Repository:
    """Verify timestamp, snapshot and targets (Uptane 5.4.4.4 to 5.4.4.6; TUF 5.4 to 5.6).

    Args:
        roots: verified roots of this repository.
        stored: what is trusted of it.
        update: what was received; an empty part has not changed.
        reference_ms: time at which expiry is judged, Unix milliseconds.
        vin: vehicle that the metadata must name; None for the catalogue.
    """
    name, trusted = roots.name, roots.trusted
    # Rotated timestamp or snapshot keys: what they signed is forgotten (Uptane 5.4.4.3, step 4).
    old = stored if roots.epoch == roots.stored_epoch else RepositoryBytes()
    trusted.reference_time = _UNIX_EPOCH + timedelta(milliseconds=reference_ms)

    timestamp = update.timestamp or stored.timestamp
    _read(f"{name} timestamp", timestamp, MAX_TIMESTAMP_BYTES, vin)
    trusted_versions: dict[str, int] = {}
    if old.timestamp and old.timestamp != timestamp:  # TUF 5.4.3: what the new one is held against
        with _tuf_errors(f"{name} timestamp"), suppress(exceptions.ExpiredMetadataError):
            trusted.update_timestamp(old.timestamp)
        trusted_versions = _named_versions(trusted.get(Timestamp.type))
    with _tuf_errors(f"{name} timestamp", timestamp, trusted_versions):
        trusted.update_timestamp(timestamp)

    snapshot = update.snapshot or stored.snapshot
    received = _read(f"{name} snapshot", snapshot, MAX_SNAPSHOT_BYTES, vin)
    trusted_versions = {"snapshot": trusted.timestamp.snapshot_meta.version}
    if old.snapshot and old.snapshot != snapshot:  # TUF 5.5.5
        with (
            _tuf_errors(f"{name} snapshot"),
            suppress(exceptions.ExpiredMetadataError, exceptions.BadVersionNumberError),
        ):
            trusted.update_snapshot(old.snapshot, trusted=True)
        trusted_versions = _named_versions(trusted.get(Snapshot.type)) | trusted_versions
    with _tuf_errors(f"{name} snapshot", snapshot, trusted_versions):
        trusted.update_snapshot(snapshot)
    _refuse_reuse(received, old.snapshot)

    targets = update.targets or stored.targets
    received = _read(f"{name} targets", targets, MAX_TARGETS_BYTES, vin)
    with _tuf_errors(f"{name} targets", targets, _named_versions(trusted.snapshot)):
        trusted.update_targets(targets)
    _refuse_reuse(received, old.targets)
    if vin is not None and trusted.targets.delegations is not None:  # Uptane 5.4.4.6, step 6
        raise MalformedError(f"{name} targets: expected no delegations in a director's targets")

    return _Repository(
        content=RepositoryBytes(roots.chain, timestamp, snapshot, targets),
        versions=Versions(
            root=trusted.root.version,
            timestamp=trusted.timestamp.version,
            snapshot=trusted.snapshot.version,
            targets=trusted.targets.version,
        ),
        targets=trusted.targets.targets,
    )


def _read(what: str, content: bytes, limit: int, vin: str | None) -> binding.Metadata:
    metadata = binding.read_metadata(content, what, limit=limit)
    if vin is not None:
        binding.check_vehicle(metadata, vin)
    return metadata


def _refuse_reuse(received: binding.Metadata, old: bytes) -> None:
    """Refuse a version that was trusted with other bytes: versions must grow."""
    if old and old != received.content:
        trusted = binding.read_metadata(old, received.what, limit=MAX_TARGETS_BYTES)
        if trusted.version == received.version:
            raise _reused(received.what, received.version)


def _reused(what: str, version: int) -> ReplayError:
    return ReplayError(f"{what} version {version} is trusted with other bytes already; keeping those")


def _named_versions(signed: Signed | None) -> dict[str, int]:
    """Return the versions that a file states, its own and those of the files that it lists."""
    if signed is None:
        return {}
    versions = {signed.type: signed.version}
    if isinstance(signed, Timestamp):
        versions[Snapshot.type] = signed.snapshot_meta.version
    elif isinstance(signed, Snapshot):
        versions |= {file.removesuffix(".json"): meta.version for file, meta in signed.meta.items()}
    return versions


@contextmanager
def _tuf_errors(
    what: str, content: bytes = b"", trusted_versions: Mapping[str, int] | None = None
) -> Iterator[None]:
    """Turn what python-tuf raises into this agent's errors, with both sides in them.

    Args:
        what: repository and role.
        content: the metadata file in hand.
        trusted_versions: versions that it must not undercut, by role.
    """
    try:
        yield
    except exceptions.UnsignedMetadataError as error:
        raise SignatureError(f"{what}: {error}; nothing of it is used") from error
    except exceptions.ExpiredMetadataError as error:
        raise ExpiredError(f"{what}: {error} at the trusted time; nothing of it is used") from error
    except exceptions.BadVersionNumberError as error:
        repository = what.split(" ", maxsplit=1)[0]
        received = _named_versions(Metadata[Any].from_bytes(content).signed)
        for role, version in received.items():
            if version < (trusted_versions or {}).get(role, 0):
                raise RollbackError(
                    f"{repository} {role}", trusted=(trusted_versions or {})[role], received=version
                ) from error
        if isinstance(error, exceptions.EqualVersionNumberError):
            raise _reused(what, next(iter(received.values()))) from error
        raise DisagreementError(f"{what}: {error}: files of different sets; nothing is used") from error
    except exceptions.RepositoryError as error:
        cause = f": {shown(str(error.__cause__))}" if error.__cause__ else ""
        raise MalformedError(f"{what}: {error or type(error).__name__}{cause}") from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise MalformedError(f"{what}: {type(error).__name__}: {shown(str(error))}") from error


# --- floors and epochs -------------------------------------------------------


def _epoch(root: Root) -> str:
    """Name the keys that sign timestamps and snapshots under a root."""
    keys = sorted(
        f"{name}:{root.keys[keyid].keyval['public']}"
        for name in (Timestamp.type, Snapshot.type)
        for keyid in root.roles[name].keyids
        if keyid in root.keys
    )
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def _epochs(verdict: Verdict) -> tuple[str, str]:
    """Return the epochs of director and catalogue."""
    director, catalogue = (
        _epoch(Metadata[Root].from_bytes(repository.roots[-1]).signed)
        for repository in (verdict.state.director, verdict.state.catalogue)
    )
    return director, catalogue


def _is_other_epoch(epoch: str, floor_epoch: str) -> bool:
    return floor_epoch not in {"", epoch}


def _check_floors(roots: _Roots, versions: Versions, floor: Versions, floor_epoch: str) -> None:
    pairs = [("root", floor.root, versions.root)]
    if not _is_other_epoch(roots.epoch, floor_epoch):
        pairs += [
            ("timestamp", floor.timestamp, versions.timestamp),
            ("snapshot", floor.snapshot, versions.snapshot),
            ("targets", floor.targets, versions.targets),
        ]
    for role, trusted, received in pairs:
        _check_not_older(f"{roots.name} {role}", trusted, received)


def _check_not_older(what: str, trusted: int, received: int) -> None:
    if received < trusted:
        raise RollbackError(what, trusted=trusted, received=received)


# --- targets -----------------------------------------------------------------


def _agreed_features(director: _Repository, catalogue: _Repository) -> dict[str, TargetFile]:
    """Return the director's feature files, each of which the catalogue lists as the same.

    Length, hash, hardware identifier and release counter (Uptane 5.4.4.2).
    """
    agreed: dict[str, TargetFile] = {}
    ids: set[str] = set()
    for path, ours in director.targets.items():
        match = _FEATURE_PATH.fullmatch(path)
        if match is None:
            continue
        if match[1] in ids:
            raise DisagreementError(f"director targets: more than one release of feature {match[1]}")
        ids.add(match[1])
        theirs = catalogue.targets.get(path)
        if theirs is None:
            raise DisagreementError(f"{path}: the director lists it, the catalogue does not")
        _check_same(path, "length", ours.length, theirs.length)
        _check_same(path, "sha256", _sha256(path, ours), _sha256(path, theirs))
        release = int(match[2])
        our_custom, their_custom = _custom(path, ours), _custom(path, theirs)
        _check_same(path, "release_counter", our_custom.get("release_counter"), release)
        _check_same(path, "release_counter", release, their_custom.get("release_counter"))
        hardware_ids, hardware_id = their_custom.get("hardware_ids"), our_custom.get("hardware_id")
        if not isinstance(hardware_ids, list) or hardware_id not in hardware_ids:
            raise DisagreementError(
                f"{path}: the director says hardware_id {shown(hardware_id)},"
                f" the catalogue lists {shown(hardware_ids)}"
            )
        agreed[path] = theirs
    bounded("feature files in use", limit=MAX_CATALOGUE_TARGETS, found=len(agreed))
    return agreed


def _check_same(path: str, what: str, director: object, catalogue: object) -> None:
    if type(director) is not type(catalogue) or director != catalogue:
        raise DisagreementError(
            f"{path}: the director says {what} {shown(director)}, the catalogue {shown(catalogue)}"
        )


def _sha256(path: str, info: TargetFile) -> str:
    found = info.hashes.get("sha256")
    if found is None:
        raise MalformedError(f"{shown(path)}: expected a sha256 among its hashes")
    return found


def _custom(path: str, info: TargetFile) -> Mapping[str, object]:
    custom = info.custom
    if not isinstance(custom, dict):
        raise MalformedError(f"{shown(path)}: expected custom metadata, found {shown(custom)}")
    return custom


def _contents(
    name: str, listed: Mapping[str, TargetFile], stored: Mapping[str, bytes], update: Mapping[str, bytes]
) -> dict[str, bytes]:
    """Return the content of each listed target, received or stored; what is not listed is dropped."""
    bounded(f"{name} targets listed", limit=MAX_DIRECTOR_TARGETS, found=len(listed))
    for path in update:
        if path not in listed:
            raise DisagreementError(f"{name} target {shown(path)}: received, but not listed for this vehicle")
    contents: dict[str, bytes] = {}
    for path, info in listed.items():
        content = update.get(path, stored.get(path))
        if content is None:
            raise MalformedError(f"{name} target {shown(path)}: listed, but neither received nor stored")
        _sha256(path, info)
        with _tuf_errors(f"{name} target {shown(path)}"):
            info.verify_length_and_hashes(content)
        contents[path] = content
    return contents


def _features(
    contents: Mapping[str, bytes], director: Mapping[str, TargetFile], floors: Mapping[str, int]
) -> dict[str, FeatureSpec]:
    features: dict[str, FeatureSpec] = {}
    for path, content in contents.items():
        spec = parse_feature(content)
        if spec.target_path != path:
            raise DisagreementError(f"{path}: the file itself says {spec.target_path}")
        # The release counter does not go back (Uptane 5.4.4.2).
        _check_not_older(f"feature {spec.feature_id} release", floors.get(spec.feature_id, 0), spec.release)
        if spec.ecu is not None:
            custom = _custom(path, director[path])
            _check_same(path, "ecu_identifier", custom.get("ecu_identifier"), spec.ecu.identifier)
            _check_same(path, "hardware_id", custom.get("hardware_id"), spec.ecu.hardware_id)
        features[spec.feature_id] = spec
    return features


def _tokens(
    contents: Mapping[str, bytes],
    director: Mapping[str, TargetFile],
    features: Mapping[str, FeatureSpec],
    floors: Mapping[tuple[str, str], int],
) -> dict[str, Token]:
    tokens: dict[str, Token] = {}
    for path, content in contents.items():
        if path == ENTITLEMENTS_PATH:
            continue
        match = _TOKEN_PATH.fullmatch(path)
        if match is None:
            raise MalformedError(
                f"director target {shown(path)}: expected entitlements, a feature or a token"
            )
        ecu_identifier, feature_id = match[1], match[2]
        spec = features.get(feature_id)
        if spec is None or spec.kind is not ActuatorKind.TOKEN or spec.ecu is None:
            raise DisagreementError(f"{path}: the director lists no feature {feature_id} that takes a token")
        custom = _custom(path, director[path])
        _check_same(path, "ecu_identifier", ecu_identifier, spec.ecu.identifier)
        _check_same(path, "ecu_identifier", custom.get("ecu_identifier"), spec.ecu.identifier)
        _check_same(path, "hardware_id", custom.get("hardware_id"), spec.ecu.hardware_id)
        claims = parse_token(content)
        _check_same(path, "feature number (in its token)", claims.feature, spec.feature_number)
        _check_same(path, "release_counter", custom.get("release_counter"), claims.counter)
        floor = floors.get((ecu_identifier, feature_id), 0)
        _check_not_older(f"token counter of {path}:", floor, claims.counter)
        tokens[feature_id] = Token(
            ecu_identifier=ecu_identifier,
            feature_id=feature_id,
            feature_number=claims.feature,
            counter=claims.counter,
            allows=claims.allows,
            content=content,
            sha256=hashlib.sha256(content).hexdigest(),
        )
    return tokens


def _with_entitlements(rights: Rights, contents: Mapping[str, bytes], vin: str) -> Rights:
    if ENTITLEMENTS_PATH not in contents:
        raise MalformedError(f"director targets: {ENTITLEMENTS_PATH} is not listed")
    version, entitlements = entitlements_from_bytes(contents[ENTITLEMENTS_PATH], vin)
    if version != rights.version:
        raise DisagreementError(
            f"{ENTITLEMENTS_PATH} is of version {version}, the director's targets of {rights.version}"
        )
    for right in entitlements:
        spec = rights.features.get(right.feature_id)
        release = spec.release if spec else 0
        if release < right.min_release:
            raise DisagreementError(
                f"right {right.entitlement_id}: expected feature {right.feature_id} of release"
                f" {right.min_release} or later, the director lists {release or 'none'}"
            )
        if spec is not None:
            _check_enforceable(right, spec)
    by_feature = {right.feature_id: right for right in entitlements}
    return Rights(rights.version, by_feature, rights.features, rights.tokens)


def _check_enforceable(right: Entitlement, spec: FeatureSpec) -> None:
    """Refuse terms that nobody would enforce: a limit without a measure is no limit."""
    meters = {meter.meter_id for meter in spec.meters}
    for quota in right.quotas:
        if quota.meter_id not in meters:
            raise DisagreementError(
                f"right {right.entitlement_id}: quota of meter {quota.meter_id!r}, feature"
                f" {spec.feature_id} has {', '.join(sorted(meters)) or 'none'}"
            )
    if spec.kind is ActuatorKind.NONE and (right.ignition_cycles or right.operating_s):
        raise DisagreementError(
            f"right {right.entitlement_id}: limits that an ECU measures, but {spec.feature_id} has no ECU"
        )
