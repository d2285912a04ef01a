"""Reads the offline-signed catalogue, and keeps it fresh with the online keys.

What is read here was signed by the catalogue's offline keys; anything that
is not listed, or differs from its signed hash, stops the start. `sign_fresh`
is pure: the same versions, time and keys give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import tomli
from tuf.api.exceptions import LengthOrHashMismatchError, RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from cloud.errors import StartError
from cloud.keyring import OnlineKeys, is_signed_by
from cloud.model import HEAD_UNIT, Release

FRESH_LIFETIME = timedelta(days=7)
"""Validity of the catalogue's snapshot and timestamp."""
FRESH_RENEW_BELOW = timedelta(days=4)
"""Remaining validity below which they are signed again."""
MAX_TARGETS_BYTES = 524_288
"""Largest targets.json that a vehicle takes."""
MAX_FEATURE_BYTES = 65_536
"""Largest feature file that a vehicle takes."""


@dataclass(frozen=True)
class Catalogue:
    """The signed catalogue.

    Args:
        targets: targets.json as signed.
        releases: feature id -> its releases, oldest first.
    """

    targets_version: int
    targets: bytes
    releases: Mapping[str, tuple[Release, ...]]


@dataclass(frozen=True)
class Fresh:
    """Snapshot and timestamp of the catalogue, as signed."""

    targets_version: int
    snapshot_version: int
    snapshot: bytes
    timestamp_version: int
    timestamp: bytes
    expires_ms: int


def load(repository: Path, root: Metadata[Root]) -> Catalogue:
    """Reads the newest targets metadata and every file that it lists.

    Raises:
        StartError: there is none, a signature or hash does not verify, or a
            file has not the form of a feature.
    """
    versions = [
        int(name)
        for p in (repository / "metadata").glob("*.targets.json")
        if (name := p.name.split(".")[0]).isdecimal()
    ]
    if not versions:
        raise StartError(f"{repository}: holds no signed catalogue; make it with: fod-keys sign-catalogue")
    path = repository / "metadata" / f"{max(versions)}.targets.json"
    content = _read(path, MAX_TARGETS_BYTES)
    try:
        metadata = Metadata[Targets].from_bytes(content)
        root.verify_delegate(Targets.type, metadata)
    except (RepositoryError, DeserializationError, ValueError) as error:
        raise StartError(f"{path}: not signed by the catalogue root's targets keys: {error}") from error
    releases: dict[str, list[Release]] = {}
    for target_path, target in metadata.signed.targets.items():
        file = repository / "targets" / target_path
        feature = _read(file, MAX_FEATURE_BYTES)
        try:
            target.verify_length_and_hashes(feature)
        except LengthOrHashMismatchError as error:
            raise StartError(f"{file}: not the file that was signed: {error}") from error
        release = _release(target_path, feature)
        releases.setdefault(release.feature_id, []).append(release)
    return Catalogue(
        targets_version=metadata.signed.version,
        targets=content,
        releases={f: tuple(sorted(group, key=lambda r: r.release)) for f, group in releases.items()},
    )


def sign_fresh(catalogue: Catalogue, keys: OnlineKeys, previous: Fresh | None, now_ms: int) -> Fresh:
    """Signs the next snapshot and timestamp of the catalogue.

    Args:
        previous: what was signed last; versions grow from it.
        now_ms: Unix milliseconds.
    """
    now = datetime.fromtimestamp(now_ms // 1000, UTC)
    expires = now + FRESH_LIFETIME
    version = 1 if previous is None else previous.snapshot_version + 1
    listed = MetaFile.from_data(catalogue.targets_version, catalogue.targets, ["sha256"])
    snapshot = Metadata(Snapshot(version=version, expires=expires, meta={"targets.json": listed}))
    snapshot.sign(keys.snapshot)
    snapshot_bytes = snapshot.to_bytes(JSONSerializer(compact=True))
    timestamp_version = 1 if previous is None else previous.timestamp_version + 1
    timestamp = Metadata(
        Timestamp(
            version=timestamp_version,
            expires=expires,
            snapshot_meta=MetaFile.from_data(version, snapshot_bytes, ["sha256"]),
        )
    )
    timestamp.sign(keys.timestamp)
    return Fresh(
        targets_version=catalogue.targets_version,
        snapshot_version=version,
        snapshot=snapshot_bytes,
        timestamp_version=timestamp_version,
        timestamp=timestamp.to_bytes(JSONSerializer(compact=True)),
        expires_ms=int(expires.timestamp()) * 1000,
    )


def needs_fresh(catalogue: Catalogue, keys: OnlineKeys, previous: Fresh | None, now_ms: int) -> bool:
    """True if snapshot and timestamp are missing, about to expire, of older targets or of retired keys."""
    if previous is None or previous.targets_version != catalogue.targets_version:
        return True
    if not (
        is_signed_by(previous.snapshot, keys.snapshot) and is_signed_by(previous.timestamp, keys.timestamp)
    ):
        return True
    return previous.expires_ms - now_ms < FRESH_RENEW_BELOW // timedelta(milliseconds=1)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, found {value!r}")
    return value


def _release(path: str, content: bytes) -> Release:
    try:
        document = tomli.loads(content.decode())
        feature, ecu, actuator = document["feature"], document["ecu"], document["actuator"]
        meters = document.get("meters", [])
        detect_only = feature["enforcement"] == "detect-only"
        release = Release(
            path=path,
            content=content,
            feature_id=str(feature["id"]),
            release=_whole(feature["release"]),
            title=str(feature["title"]),
            ecu_identifier=str(ecu["identifier"]),
            hardware_id=str(ecu["hardware_id"]),
            feature_number=_whole(actuator["feature_number"]) if actuator["kind"] == "token" else 0,
            withdrawn=feature["withdrawn"] is True,
            meters={str(m["id"]): str(m["kind"]) for m in meters},
            detect_only=detect_only,
            by_use=detect_only or feature.get("by_use") is True,
            reading_meter=str(document.get("reading", {}).get("meter", "")),
            dimensions={
                str(m["id"]): {
                    str(d["name"]): tuple(str(v["value"]) for v in d["values"])
                    for d in m.get("dimensions", [])
                }
                for m in meters
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartError(f"{path}: not a feature file: {error!r}") from error
    if path != f"features/{release.feature_id}/{release.release}.toml":
        raise StartError(f"{path}: holds feature {release.feature_id} release {release.release}")
    if release.feature_number == 0 and release.ecu_identifier != HEAD_UNIT:
        raise StartError(
            f"{path}: has no token, so its ECU must be {HEAD_UNIT}, not {release.ecu_identifier}"
        )
    if release.by_use and not (release.detect_only or release.reading_meter):
        raise StartError(
            f'{path}: by_use: the ECU signs no count of any meter ([reading]); say enforcement "detect-only"'
        )
    return release


def _read(path: Path, limit: int) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > limit:
        raise StartError(f"{path}: {len(content)} bytes are more than the limit of {limit}")
    return content
