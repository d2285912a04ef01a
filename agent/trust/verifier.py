"""Decides which signed metadata, and with it which rights, this vehicle trusts.

Two TUF repositories must agree (Uptane 2.1.0): the catalogue says what a
feature is, the director which features this vehicle has. Does no I/O and reads
no clock: bytes and times come in, a `Verdict` or a TrustError comes out. All
values are immutable, so that on any error the trusted state is unchanged.

Order of checks: full verification, Uptane 2.1.0 section 5.4.4.2, with the
client workflow of TUF 1.0.34 section 5 for each repository
(`agent.trust.repository`).

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
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Timestamp

from agent.errors import DisagreementError, MalformedError, ReplayError, RollbackError
from agent.model import (
    ActuatorKind,
    Entitlement,
    FeatureSpec,
    PlanKind,
    RepositoryBytes,
    Rights,
    Token,
    TokenKeyAnnouncement,
    TrustBytes,
    Verdict,
    Versions,
)
from agent.trust import binding, repository
from agent.trust.anchors import parse_tls_anchors
from agent.trust.catalogue import parse_feature
from agent.trust.token import parse_announcement, parse_token
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
TLS_PATH = "tls.json"

_FEATURE_PATH = re.compile(r"features/([a-z][a-z0-9-]{1,47})/([1-9][0-9]{0,9})\.toml")
_TOKEN_PATH = re.compile(r"tokens/([A-Za-z0-9][A-Za-z0-9_.-]{0,63})/([a-z][a-z0-9-]{1,47})\.cose")
_TOKEN_KEY_PATH = re.compile(r"token-keys/([1-9][0-9]{0,9})\.cose")
_BY_USE = frozenset({PlanKind.PREPAID, PlanKind.PAY_PER_USE})
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

parse_known_feature = lru_cache(maxsize=64)(parse_feature)
"""As `parse_feature`; the same bytes, which most updates bring again, are read once."""


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
            versions, the time, the counters and the owner epoch begin anew, so that a stolen key that ran
            ahead is undone (Uptane 2.1.0 section 5.4.4.3, step 4).
        owner_epoch: counts the vehicle's owners; 0 before the first rights.
    """

    director: Versions = Versions()
    catalogue: Versions = Versions()
    time_ms: int = 0
    token_counters: Mapping[tuple[str, str], int] = field(default_factory=dict)
    releases: Mapping[str, int] = field(default_factory=dict)
    director_epoch: str = ""
    catalogue_epoch: str = ""
    owner_epoch: int = 0


@dataclass(frozen=True, slots=True)
class _Roots:
    """A repository's chain of roots, verified; `last` is the newest one."""

    name: str
    chain: tuple[bytes, ...]
    last: Root
    stored_epoch: str
    epoch: str


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository, verified."""

    content: RepositoryBytes
    versions: Versions
    expires_ms: Mapping[str, int]  # by repository and role
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
    binding.check_live(timestamp, nonce)
    return _verify_received(stored, update, timestamp, vin=vin, now_ms=now_ms, floors=floors)


def verify_bundle(
    stored: TrustBytes, bundle: TrustBytes, *, vin: str, now_ms: int, floors: Floors
) -> Verdict:
    """Verify rights that come as a file, for a workshop without network.

    The checks of `verify_update`; freshness rests on versions and expiry
    instead of a nonce. A file that is taken already may be taken again.

    Args:
        stored: trusted state; holds at least the provisioned roots.
        bundle: as read from the file.
        vin: VIN of this vehicle.
        now_ms: trusted time, Unix milliseconds; may be far behind.
        floors: what is not undercut.

    Returns:
        The complete new state. It must be durable before it is used.

    Raises:
        TrustError: as `verify_update`; ReplayError if the timestamp was not
            signed as offline, carries a nonce, or is of a trusted version
            with other bytes.
    """
    bounded_trust_bytes(bundle)
    timestamp = binding.read_metadata(
        bundle.director.timestamp, "director timestamp", limit=MAX_TIMESTAMP_BYTES
    )
    binding.check_vehicle(timestamp, vin)
    binding.check_offline(timestamp)
    return _verify_received(stored, bundle, timestamp, vin=vin, now_ms=now_ms, floors=floors)


def _verify_received(
    stored: TrustBytes,
    update: TrustBytes,
    timestamp: binding.Metadata,
    *,
    vin: str,
    now_ms: int,
    floors: Floors,
) -> Verdict:
    # 2. Director root (Uptane 5.4.4.3; TUF 5.3).
    roots = _verify_roots("director", stored.director, update.director)
    # 3. The signed time, once its signature holds (Uptane 5.4.4.2, step 1: attested time).
    repository.verified("director", roots.last, timestamp.content, Timestamp)
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
        token_counters=counters if renewed else {**floors.token_counters, **counters},
        releases={**floors.releases, **releases},
        director_epoch=director_epoch,
        catalogue_epoch=catalogue_epoch,
        owner_epoch=rights.owner_epoch if renewed else max(floors.owner_epoch, rights.owner_epoch),
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
    counter_floors = floors.token_counters if same_epoch else {}
    features = _features(catalogue_files, director.targets, floors.releases if same_epoch else {})
    rights = Rights(
        version=director.versions.targets,
        features=features,
        tokens=_tokens(director_files, director.targets, features, counter_floors),
        token_key=_token_key(director_files),
        tls_anchors=parse_tls_anchors(director_files[TLS_PATH]) if TLS_PATH in director_files else (),
    )
    rights = _with_entitlements(rights, director_files, vin)
    if same_epoch:  # else a stolen director could have run ahead, and nothing could ever follow
        _check_not_older("owner epoch", floors.owner_epoch, rights.owner_epoch)
    return Verdict(
        state=TrustBytes(director.content, catalogue.content, director_files, catalogue_files),
        director=director.versions,
        catalogue=catalogue.versions,
        rights=rights,
        signed_ms=signed_ms,
        expires_ms={**director.expires_ms, **catalogue.expires_ms},
    )


# --- one repository ----------------------------------------------------------


def _verify_roots(name: str, stored: RepositoryBytes, update: RepositoryBytes) -> _Roots:
    """Follow the roots from the first stored one (Uptane 5.4.4.3, steps 1 and 2; TUF 5.3)."""
    if not stored.roots:
        raise MalformedError(f"{name} root: none is provisioned")
    _read(f"{name} root", stored.roots[0], MAX_ROOT_BYTES, None)
    first = repository.load_root(name, stored.roots[0])
    _check_unique_keys(name, first)
    stored_last = _follow(name, first, stored.roots[1:])
    new = tuple(content for content in update.roots if content not in stored.roots)
    last = _follow(name, stored_last, new)
    chain = (*stored.roots, *new)[-MAX_ROOTS:]
    return _Roots(name, chain, last, repository.online_keys(stored_last), repository.online_keys(last))


def _follow(name: str, trusted: Root, roots: tuple[bytes, ...]) -> Root:
    for content in roots:
        _read(f"{name} root", content, MAX_ROOT_BYTES, None)
        trusted = repository.next_root(name, trusted, content)
        _check_unique_keys(name, trusted)
    return trusted


def _check_unique_keys(name: str, root: Root) -> None:
    """Refuse one key under two ids: thresholds count unique keys (Uptane 5.4.4.3, step 2.3)."""
    found: set[str] = set()
    for keyid, key in root.keys.items():
        public = key.keyval.get("public")
        if not isinstance(public, str):
            raise MalformedError(f"{name} root version {root.version}: key {shown(keyid)} has no public half")
        found.add("".join(public.lower().split()))
    if len(found) != len(root.keys):
        raise MalformedError(f"{name} root version {root.version}: one key stands under two key ids")


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
    name, root = roots.name, roots.last
    # Rotated timestamp or snapshot keys: what they signed is forgotten (Uptane 5.4.4.3, step 4).
    old = stored if roots.epoch == roots.stored_epoch else RepositoryBytes()
    reference = _UNIX_EPOCH + timedelta(milliseconds=reference_ms)
    repository.check_root_expiry(name, root, reference)

    content = update.timestamp or stored.timestamp
    received = _read(f"{name} timestamp", content, MAX_TIMESTAMP_BYTES, vin)
    trusted_timestamp = (
        repository.earlier(name, root, old.timestamp, Timestamp) if old.timestamp != content else None
    )
    timestamp = repository.next_timestamp(name, root, content, trusted=trusted_timestamp, reference=reference)
    _refuse_reuse(received, old.timestamp)

    content = update.snapshot or stored.snapshot
    received = _read(f"{name} snapshot", content, MAX_SNAPSHOT_BYTES, vin)
    trusted_snapshot = (
        repository.earlier(name, root, old.snapshot, Snapshot) if old.snapshot != content else None
    )
    snapshot = repository.next_snapshot(
        name, root, timestamp, content, trusted=trusted_snapshot, reference=reference
    )
    _refuse_reuse(received, old.snapshot)

    content = update.targets or stored.targets
    received = _read(f"{name} targets", content, MAX_TARGETS_BYTES, vin)
    targets = repository.next_targets(name, root, snapshot, content, reference=reference)
    _refuse_reuse(received, old.targets)
    if vin is not None and targets.delegations is not None:  # Uptane 5.4.4.6, step 6
        raise MalformedError(f"{name} targets: expected no delegations in a director's targets")

    return _Repository(
        content=RepositoryBytes(
            roots.chain,
            update.timestamp or stored.timestamp,
            update.snapshot or stored.snapshot,
            update.targets or stored.targets,
        ),
        versions=Versions(
            root=root.version,
            timestamp=timestamp.version,
            snapshot=snapshot.version,
            targets=targets.version,
        ),
        expires_ms={
            f"{name} {signed.type}": (signed.expires - _UNIX_EPOCH) // timedelta(milliseconds=1)
            for signed in (root, timestamp, snapshot, targets)
        },
        targets=targets.targets,
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
            raise ReplayError(
                f"{received.what} version {received.version} is trusted with other bytes already;"
                " keeping those"
            )


# --- floors and epochs -------------------------------------------------------


def _epochs(verdict: Verdict) -> tuple[str, str]:
    """Return the epochs of director and catalogue."""
    director, catalogue = (
        repository.online_keys(Metadata[Root].from_bytes(part.roots[-1]).signed)
        for part in (verdict.state.director, verdict.state.catalogue)
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
        repository.check_target(f"{name} target {shown(path)}", info, content)
        contents[path] = content
    return contents


def _features(
    contents: Mapping[str, bytes], director: Mapping[str, TargetFile], floors: Mapping[str, int]
) -> dict[str, FeatureSpec]:
    features: dict[str, FeatureSpec] = {}
    for path, content in contents.items():
        spec = parse_known_feature(content)
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
        if path in {ENTITLEMENTS_PATH, TLS_PATH} or _TOKEN_KEY_PATH.fullmatch(path):
            continue
        match = _TOKEN_PATH.fullmatch(path)
        if match is None:
            raise MalformedError(
                f"director target {shown(path)}: expected entitlements, a feature, a token,"
                " a token key or TLS anchors"
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


def _token_key(contents: Mapping[str, bytes]) -> TokenKeyAnnouncement | None:
    matches = [match for path in contents if (match := _TOKEN_KEY_PATH.fullmatch(path))]
    if len(matches) > 1:
        raise DisagreementError(f"director targets: expected one token key at most, found {len(matches)}")
    for match in matches:
        content, epoch = contents[match[0]], int(match[1])
        found = parse_announcement(content)
        if found != epoch:
            raise DisagreementError(f"{match[0]}: the path says epoch {epoch}, the file itself {found}")
        return TokenKeyAnnouncement(epoch, content, hashlib.sha256(content).hexdigest())
    return None


def _with_entitlements(rights: Rights, contents: Mapping[str, bytes], vin: str) -> Rights:
    if ENTITLEMENTS_PATH not in contents:
        raise MalformedError(f"director targets: {ENTITLEMENTS_PATH} is not listed")
    version, owner_epoch, entitlements = entitlements_from_bytes(contents[ENTITLEMENTS_PATH], vin)
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
    return replace(rights, entitlements=by_feature, owner_epoch=owner_epoch)


def _check_enforceable(right: Entitlement, spec: FeatureSpec) -> None:
    """Refuse terms that nobody would enforce: a limit without a measure is no limit."""
    meters = {meter.meter_id for meter in spec.meters}
    for quota in right.quotas:
        if quota.meter_id not in meters:
            raise DisagreementError(
                f"right {right.entitlement_id}: quota of meter {quota.meter_id!r}, feature"
                f" {spec.feature_id} has {', '.join(sorted(meters)) or 'none'}"
            )
    if right.plan_kind in _BY_USE and not spec.by_use:
        raise DisagreementError(
            f"right {right.entitlement_id}: sold by use ({right.plan_kind.name}), but the catalogue does not"
            f" say by_use of {spec.feature_id}: its ECU signs no count"
        )
    if spec.kind is ActuatorKind.NONE and (right.ignition_cycles or right.operating_s):
        raise DisagreementError(
            f"right {right.entitlement_id}: limits that an ECU measures, but {spec.feature_id} has no ECU"
        )
