"""A cloud in memory that signs on demand, and a vehicle that verifies: for stories.

Every detail that an attacker could choose can be chosen: `edits` change what
is about to be signed, `signers` who signs it. Keys are made at run time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Key, Metadata, MetaFile, Role, Root, Snapshot, TargetFile, Targets, Timestamp

from agent.errors import TrustError
from agent.model import RepositoryBytes, TrustBytes, Verdict
from agent.trust.verifier import Floors, floors_after, verify_bundle, verify_stored, verify_update
from openfod.entitlement.v1 import entitlement_pb2

VIN = "WFDSEAT10N0000001"
OTHER_VIN = "WFDSEAT10N0000002"
UID = bytes.fromhex("0f0d5ea7000000000000000000000001")
NOW_MS = 1_800_000_000_000
DAY_MS = 86_400_000
SEAT = "seat-heating"
LOGBOOK = "drivers-logbook"
SEAT_ECU = ("seat-module", "openfod-seat-1")
HEAD_UNIT = ("head-unit", "openfod-agent")

CATALOGUE_SOURCE = Path(__file__).parents[2] / "deploy/demo/catalogue/features"

Edit = Callable[[Any], None]


def feature_file(feature_id: str, release: int = 1) -> bytes:
    """Return a feature's file of the demo catalogue, as another release if asked."""
    text = (CATALOGUE_SOURCE / feature_id / "1.toml").read_text()
    return (
        text.replace("release = 1 ", f"release = {release} ")
        .replace("release = 1\n", f"release = {release}\n")
        .encode()
    )


def nonce(number: int) -> bytes:
    """Return the vehicle's nonce of this number."""
    return number.to_bytes(16, "big")


def make_token(
    key: Ed25519PrivateKey,
    *,
    feature: int = 1,
    counter: int = 1,
    state: int = 1,
    terms: Mapping[int, object] | None = None,
    vin: str = VIN,
    uid: bytes = UID,
) -> bytes:
    """Sign a token as docs/token.md says."""
    kid = hashlib.sha256(key.public_key().public_bytes_raw()).digest()[:8]
    claims: dict[int, object] = {1: 1, 2: feature, 3: counter, 4: state}
    if terms:
        claims[6] = dict(terms)
    protected = cbor2.dumps({1: -8, 4: kid}, canonical=True)
    payload = cbor2.dumps(claims, canonical=True)
    external = cbor2.dumps(["openfod-token-v1", vin, uid])
    signature = key.sign(cbor2.dumps(["Signature1", protected, external, payload]))
    return cbor2.dumps(cbor2.CBORTag(18, [protected, {}, payload, signature]))


def make_announcement(key: Ed25519PrivateKey, epoch: int, announced: bytes = bytes(32)) -> bytes:
    """Announce a token key under the token root, as docs/token.md says."""
    kid = hashlib.sha256(key.public_key().public_bytes_raw()).digest()[:8]
    protected = cbor2.dumps({1: -8, 4: kid}, canonical=True)
    payload = cbor2.dumps({1: epoch, 2: announced}, canonical=True)
    external = cbor2.dumps(["openfod-token-key-v1"])
    signature = key.sign(cbor2.dumps(["Signature1", protected, external, payload]))
    return cbor2.dumps(cbor2.CBORTag(18, [protected, {}, payload, signature]))


def make_right(feature_id: str = SEAT, number: int = 1, **fields: Any) -> entitlement_pb2.Entitlement:
    """Make a right that is in its ranges, with any field replaced."""
    values: dict[str, Any] = {
        "entitlement_id": f"ent-{number:016x}",
        "feature_id": feature_id,
        "min_release": 1,
        "account": "acc-demo",
        "plan_kind": entitlement_pb2.PLAN_KIND_SUBSCRIPTION,
        "plan_id": "seat-heating-monthly",
        "plan_version": 1,
        "offline_grace_s": 1_209_600,
        "resale": entitlement_pb2.RESALE_GOES_WITH_ACCOUNT,
        "display_terms": entitlement_pb2.DisplayTerms(price_minor=499, currency="EUR", period="P1M"),
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
    }
    return entitlement_pb2.Entitlement(**(values | fields))


class Repository:
    """One TUF repository.

    Attributes:
        edits: by role: changes the signed part before it is signed.
        signers: by role: who signs, instead of the role's keys.
    """

    def __init__(self, now_ms: int, *, targets_keys: int, extra: Mapping[str, object]) -> None:
        self.now_ms = now_ms
        self.keys = {
            Root.type: [CryptoSigner.generate_ed25519() for _ in range(3)],
            Timestamp.type: [CryptoSigner.generate_ed25519()],
            Snapshot.type: [CryptoSigner.generate_ed25519()],
            Targets.type: [CryptoSigner.generate_ed25519() for _ in range(targets_keys)],
        }
        self.extra = dict(extra)
        self.edits: dict[str, Edit] = {}
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.targets: dict[str, TargetFile] = {}
        self.roots: list[bytes] = []
        self._last_root_keys: list[CryptoSigner] = []
        self.version = 0
        self.timestamp_version = 0
        self.targets_bytes = b""
        self.snapshot_bytes = b""
        self.add_root()

    def add_root(self) -> None:
        """Sign the next root with a threshold of the old and of the new root keys."""
        keys: dict[str, Key] = {
            key.public_key.keyid: key.public_key for role in self.keys.values() for key in role
        }
        roles = {
            name: Role([key.public_key.keyid for key in role], 2 if len(role) > 1 else 1)
            for name, role in self.keys.items()
        }
        version = len(self.roots) + 1
        root = Root(version=version, expires=self._in_days(5 * 365), keys=keys, roles=roles)
        signers = list(self.keys[Root.type])
        signers += [key for key in self._last_root_keys if key not in signers]
        self.roots.append(self._sign(root, signers))
        self._last_root_keys = list(self.keys[Root.type])

    def rotate(self, role: str) -> None:
        """Replace all keys of a role through a new root."""
        self.keys[role] = [CryptoSigner.generate_ed25519() for _ in self.keys[role]]
        self.add_root()

    def publish(self, version: int | None = None) -> None:
        """Sign targets and snapshot of the next version."""
        self.version = self.version + 1 if version is None else version
        targets = Targets(
            version=self.version,
            expires=self._in_days(30),
            targets=dict(self.targets),
            unrecognized_fields=dict(self.extra),
        )
        self.targets_bytes = self._sign(targets)
        self.snapshot()

    def snapshot(self) -> None:
        """Sign a snapshot that names the present targets."""
        snapshot = Snapshot(
            version=self.version,
            expires=self._in_days(30),
            meta={"targets.json": MetaFile(self.version)},
            unrecognized_fields=dict(self.extra),
        )
        self.snapshot_bytes = self._sign(snapshot)

    def stamp(self, **extra: object) -> bytes:
        """Sign the next timestamp."""
        self.timestamp_version += 1
        timestamp = Timestamp(
            version=self.timestamp_version,
            expires=self._in_days(1),
            snapshot_meta=MetaFile.from_data(self.version, self.snapshot_bytes, ["sha256"]),
            unrecognized_fields={**self.extra, **extra},
        )
        return self._sign(timestamp)

    def _in_days(self, days: int) -> datetime:
        return datetime.fromtimestamp(self.now_ms // 1000, UTC) + timedelta(days=days)

    def _sign(self, signed: Any, signers: Iterable[CryptoSigner] | None = None) -> bytes:
        self.edits.get(signed.type, lambda _: None)(signed)
        metadata = Metadata(signed)
        chosen = self.signers.get(signed.type) or signers or self.keys[signed.type]
        for signer in chosen:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()


class Cloud:
    """Both repositories of one vehicle, and the token key.

    `tamper` holds files that are listed as they should be, but sent otherwise.
    """

    def __init__(self, vin: str = VIN, now_ms: int = NOW_MS) -> None:
        self.vin = vin
        self.director = Repository(now_ms, targets_keys=1, extra={"vin": vin})
        self.catalogue = Repository(now_ms, targets_keys=3, extra={})
        self.token_key = Ed25519PrivateKey.generate()
        self.rights: dict[str, entitlement_pb2.Entitlement] = {}
        self.releases: dict[str, int] = {}
        self.tokens: dict[str, bytes] = {}
        self.counters: dict[str, int] = {}
        self.catalogue_files: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.tamper: dict[str, bytes] = {}
        self.owner_epoch = 0
        self.notices: dict[str, bytes] = {}  # token keys and TLS anchors, by path
        for feature_id in (SEAT, LOGBOOK):
            self.describe(feature_id, 1)
        self.publish_catalogue()
        self.publish()

    def at(self, now_ms: int) -> Cloud:
        """Let time pass."""
        self.director.now_ms = self.catalogue.now_ms = now_ms
        return self

    def describe(self, feature_id: str, release: int, content: bytes | None = None) -> None:
        """Add a release of a feature to the catalogue."""
        path = f"features/{feature_id}/{release}.toml"
        content = feature_file(feature_id, release) if content is None else content
        hardware_id = (SEAT_ECU if feature_id != LOGBOOK else HEAD_UNIT)[1]
        self.catalogue_files[path] = content
        self.catalogue.targets[path] = _target(
            path, content, {"hardware_ids": [hardware_id], "release_counter": release}
        )

    def publish_catalogue(self) -> None:
        """Sign the catalogue anew."""
        self.catalogue.publish()
        self.catalogue_timestamp = self.catalogue.stamp()

    def grant(self, feature_id: str = SEAT, release: int = 1, **fields: Any) -> None:
        """Grant a right and publish it."""
        self.rights[feature_id] = make_right(feature_id, len(self.rights) + 1, **fields)
        self.releases[feature_id] = release
        if feature_id != LOGBOOK:
            self._sign_token(feature_id, state=1)
        self.publish()

    def revoke(self, feature_id: str = SEAT) -> None:
        """End a right: its token is replaced, its feature stays listed."""
        del self.rights[feature_id]
        self._sign_token(feature_id, state=0)
        self.publish()

    def publish(self, version: int | None = None, *, said_version: int | None = None) -> None:
        """Sign the director's next set."""
        version = self.director.version + 1 if version is None else version
        rights = entitlement_pb2.VehicleEntitlements(
            vin=self.vin,
            version=said_version or version,
            entitlements=self.rights.values(),
            owner_epoch=self.owner_epoch,
        )
        self.files = {"entitlements.pb": rights.SerializeToString(deterministic=True)}
        listed = {"entitlements.pb": _target("entitlements.pb", self.files["entitlements.pb"], None)}
        for feature_id, release in self.releases.items():
            path = f"features/{feature_id}/{release}.toml"
            ecu = SEAT_ECU if feature_id != LOGBOOK else HEAD_UNIT
            listed[path] = _target(path, self.catalogue_files[path], _custom(ecu, release))
        for path, content in self.notices.items():
            self.files[path] = content
            listed[path] = _target(path, content, None)
        for feature_id, token in self.tokens.items():
            path = f"tokens/{SEAT_ECU[0]}/{feature_id}.cose"
            self.files[path] = token
            listed[path] = _target(path, token, _custom(SEAT_ECU, self.counters.get(feature_id, 1)))
        self.director.targets = listed
        self.director.publish(version)

    def answer(
        self,
        for_nonce: bytes | None,
        *,
        only_time: bool = False,
        time_ms: int | None = None,
        offline: bool = False,
    ) -> TrustBytes:
        """Answer a vehicle's nonce, with everything or with a fresh time alone."""
        extra: dict[str, object] = {"time_ms": self.director.now_ms if time_ms is None else time_ms}
        if for_nonce is not None:
            extra["nonce"] = for_nonce.hex()
        if offline:
            extra["offline"] = True
        timestamp = self.director.stamp(**extra)
        if only_time:
            return TrustBytes(director=RepositoryBytes(timestamp=timestamp))
        used = [f"features/{feature_id}/{release}.toml" for feature_id, release in self.releases.items()]
        return TrustBytes(
            director=_bytes(self.director, timestamp),
            catalogue=_bytes(self.catalogue, self.catalogue_timestamp),
            director_targets={path: self.tamper.get(path, content) for path, content in self.files.items()},
            catalogue_targets={path: self.tamper.get(path, self.catalogue_files[path]) for path in used},
        )

    def provisioned(self) -> TrustBytes:
        """Return what a vehicle image holds."""
        return TrustBytes(
            director=RepositoryBytes(roots=(self.director.roots[0],)),
            catalogue=RepositoryBytes(roots=(self.catalogue.roots[0],)),
        )

    def _sign_token(self, feature_id: str, state: int) -> None:
        counter = self.counters.get(feature_id, 0) + 1
        self.counters[feature_id] = counter
        terms = {5: 200} if state else None
        self.tokens[feature_id] = make_token(
            self.token_key, counter=counter, state=state, terms=terms, vin=self.vin
        )


class Vehicle:
    """What a vehicle trusts, and what it refuses."""

    def __init__(self, cloud: Cloud, vin: str = VIN, now_ms: int = 0) -> None:
        self.stored = cloud.provisioned()
        self.floors = Floors()
        self.vin = vin
        self.now_ms = now_ms
        self.refreshed_ms = 0
        self.nonces = 1

    @property
    def nonce(self) -> bytes:
        """The nonce that waits for its answer."""
        return nonce(self.nonces)

    def take(self, update: TrustBytes) -> Verdict:
        """Verify an update, store it, and wait with the next nonce."""
        verdict = verify_update(
            self.stored, update, vin=self.vin, nonce=self.nonce, now_ms=self.now_ms, floors=self.floors
        )
        self.nonces += 1
        return self._store(verdict)

    def take_bundle(self, bundle: TrustBytes) -> Verdict:
        """Verify rights that came as a file, and store them; the nonce goes on waiting."""
        return self._store(
            verify_bundle(self.stored, bundle, vin=self.vin, now_ms=self.now_ms, floors=self.floors)
        )

    def _store(self, verdict: Verdict) -> Verdict:
        self.floors = floors_after(verdict, self.floors)
        self.refreshed_ms = max(self.now_ms, self.floors.time_ms)
        self.stored = verdict.state
        return verdict

    def boot(self) -> Verdict:
        """Verify what is stored, as at boot."""
        return verify_stored(self.stored, vin=self.vin, as_of_ms=self.refreshed_ms, floors=self.floors)

    def refuses(
        self, update: TrustBytes, error: type[TrustError], match: str | None = None, *, as_file: bool = False
    ) -> str:
        """Assert that an update is refused and that what was trusted is trusted on, unchanged."""
        before = self.boot()
        state, floors = self.stored, self.floors
        copied = replace(
            state,
            director_targets=dict(state.director_targets),
            catalogue_targets=dict(state.catalogue_targets),
        )
        with pytest.raises(error, match=match) as caught:
            (self.take_bundle if as_file else self.take)(update)
        assert type(caught.value) is error
        assert self.stored is state
        assert state == copied
        assert self.floors is floors
        assert self.boot() == before
        return str(caught.value)


def supplied(cloud: Cloud, now_ms: int = 0) -> Vehicle:
    """Return a vehicle that holds the right to heat its seat."""
    vehicle = Vehicle(cloud, now_ms=now_ms)
    cloud.grant()
    vehicle.take(cloud.answer(vehicle.nonce))
    return vehicle


def resigned(content: bytes, *signers: CryptoSigner, edit: Edit = lambda _: None) -> bytes:
    """Sign metadata anew, with other keys or other content."""
    metadata: Metadata[Any] = Metadata.from_bytes(content)
    edit(metadata.signed)
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def _bytes(repository: Repository, timestamp: bytes) -> RepositoryBytes:
    return RepositoryBytes(
        tuple(repository.roots[1:]), timestamp, repository.snapshot_bytes, repository.targets_bytes
    )


def _custom(ecu: tuple[str, str], counter: int) -> dict[str, object]:
    return {"ecu_identifier": ecu[0], "hardware_id": ecu[1], "release_counter": counter}


def _target(path: str, content: bytes, custom: Mapping[str, object] | None) -> TargetFile:
    target = TargetFile.from_data(path, content, ["sha256"])
    if custom is not None:
        target.unrecognized_fields["custom"] = dict(custom)
    return target
