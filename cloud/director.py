"""Makes one vehicle's director metadata from the state of its rights.

Pure: no I/O, no clock, no randomness; the same state, time and keys give the
same bytes. The form is TUF 1.0.34 (Uptane 2.1.0's director repository), with
the VIN signed in every file and the vehicle's nonce and the cloud's time in
the timestamp, so that no answer fits another vehicle or another moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from securesystemslib.signer import Signer
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from openfod.entitlement.v1 import entitlement_pb2

ENTITLEMENTS_PATH = "entitlements.pb"
"""Target path of the vehicle's rights."""
TLS_PATH = "tls.json"
"""Target path of the certificates by which vehicles know the cloud's servers."""
SET_LIFETIME = timedelta(days=30)
"""Validity of targets and snapshot."""
SET_RENEW_BELOW = timedelta(days=15)
"""Remaining validity below which they are signed again."""
TIMESTAMP_LIFETIME = timedelta(days=1)
"""Validity of a timestamp that answers a nonce."""
OFFLINE_LIFETIME = timedelta(days=7)
"""Validity of a timestamp that is made for a file."""
NONCE_BYTES = 16
"""Length of a vehicle's nonce."""


@dataclass(frozen=True)
class Item:
    """One target for this vehicle.

    Args:
        path: target path.
        content: the bytes whose hash and length are signed.
        ecu_identifier, hardware_id, release_counter: Uptane's custom fields
            (2.1.0, section 5.2.3.1); an empty identifier leaves them out.
    """

    path: str
    content: bytes
    ecu_identifier: str = ""
    hardware_id: str = ""
    release_counter: int = 0


@dataclass(frozen=True)
class SignedSet:
    """Targets and snapshot of one version, as signed."""

    targets: bytes
    snapshot: bytes
    expires_ms: int


def token_path(ecu_identifier: str, feature_id: str) -> str:
    """Target path of an ECU's token for a feature."""
    return f"tokens/{ecu_identifier}/{feature_id}.cose"


def token_key_path(epoch: int) -> str:
    """Target path of the announcement of the key that signed the newest tokens."""
    return f"token-keys/{epoch}.cose"


def entitlements(
    vin: str, version: int, owner_epoch: int, rights: Iterable[entitlement_pb2.Entitlement]
) -> Item:
    """Serialises a vehicle's rights."""
    content = entitlement_pb2.VehicleEntitlements(
        vin=vin, version=version, owner_epoch=owner_epoch, entitlements=rights
    )
    return Item(ENTITLEMENTS_PATH, content.SerializeToString(deterministic=True))


def sign_set(
    vin: str, version: int, items: Iterable[Item], *, targets_key: Signer, snapshot_key: Signer, now_ms: int
) -> SignedSet:
    """Signs targets and snapshot, both of `version`.

    Args:
        vin: the vehicle that the files are for.
        version: one higher than the last that was signed for it.
        now_ms: Unix milliseconds.
    """
    expires = _moment(now_ms) + SET_LIFETIME
    targets = Metadata(
        Targets(
            version=version,
            expires=expires,
            targets={item.path: _target(item) for item in items},
            unrecognized_fields={"vin": vin},
        )
    )
    targets.sign(targets_key)
    targets_bytes = targets.to_bytes(JSONSerializer(compact=True))
    snapshot = Metadata(
        Snapshot(
            version=version,
            expires=expires,
            meta={"targets.json": MetaFile.from_data(version, targets_bytes, ["sha256"])},
            unrecognized_fields={"vin": vin},
        )
    )
    snapshot.sign(snapshot_key)
    return SignedSet(
        targets_bytes, snapshot.to_bytes(JSONSerializer(compact=True)), int(expires.timestamp()) * 1000
    )


def sign_timestamp(
    vin: str,
    version: int,
    *,
    set_version: int,
    snapshot: bytes,
    nonce: bytes | None,
    timestamp_key: Signer,
    now_ms: int,
) -> bytes:
    """Signs the timestamp that answers a vehicle's nonce with the cloud's time.

    Args:
        version: one higher than the last that was signed for this vehicle.
        set_version: version of `snapshot`.
        nonce: 16 bytes that the vehicle sent and nothing has answered yet;
            None for a file that is made without a vehicle: it is signed as
            offline, so that it never counts as a live answer.
        now_ms: Unix milliseconds; signed as the time.
    """
    extra: dict[str, object] = {"vin": vin, "time_ms": now_ms}
    if nonce is None:
        extra["offline"] = True
    else:
        extra["nonce"] = nonce.hex()
    timestamp = Metadata(
        Timestamp(
            version=version,
            expires=_moment(now_ms) + (OFFLINE_LIFETIME if nonce is None else TIMESTAMP_LIFETIME),
            snapshot_meta=MetaFile.from_data(set_version, snapshot, ["sha256"]),
            unrecognized_fields=extra,
        )
    )
    timestamp.sign(timestamp_key)
    return timestamp.to_bytes(JSONSerializer(compact=True))


def _target(item: Item) -> TargetFile:
    target = TargetFile.from_data(item.path, item.content, ["sha256"])
    if item.ecu_identifier:
        target.unrecognized_fields["custom"] = {
            "ecu_identifier": item.ecu_identifier,
            "hardware_id": item.hardware_id,
            "release_counter": item.release_counter,
        }
    return target


def _moment(now_ms: int) -> datetime:
    return datetime.fromtimestamp(now_ms // 1000, UTC)
