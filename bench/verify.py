"""Verification of rights for ten features: pushed, durable with fsync, and again at boot.

Every round takes a whole update (both repositories and all target files) with a
new director's set and new tokens, verified against the set before it, then
stored with the agent's own store and second copy of the floors. Beside it, in
the same run: python-tuf's own client workflow over the same metadata (old and
new; no vehicle, no nonce, no floors, no targets' content). Wall time, and CPU time
where other work on the machine would blur it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import BadVersionNumberError
from tuf.api.metadata import (
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

# python-tuf's own checks stand in no public module; only this comparison uses them.
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from agent.adapters.floors_file import FloorsFile
from agent.adapters.store import Store
from agent.boot import Keeper
from agent.events import StoreTrust
from agent.model import RepositoryBytes, TrustBytes, Verdict
from agent.trust.verifier import Floors, parse_known_feature, verify_stored, verify_update
from bench.sign import FEATURE_FILE, FEATURES, NOW_MS, UID, VERSION, VIN, _feature, _right
from cloud import director, token

ROUNDS = 100
Sample = tuple[float, float]
"""Wall time and CPU time, milliseconds."""

_T = TypeVar("_T")
_EXPIRES = datetime.fromtimestamp(NOW_MS // 1000, UTC) + timedelta(days=365)
_ECU, _HARDWARE = "seat-module", "openfod-seat-1"
_ROLES = (Root.type, Timestamp.type, Snapshot.type, Targets.type)


def main() -> None:
    """Prints medians in milliseconds, with the shares of verification and of the disk."""
    cloud = _Cloud()
    updates = [cloud.update(number) for number in range(ROUNDS + 1)]
    with tempfile.TemporaryDirectory(prefix="openfod-") as folder:
        database = Path(folder) / "agent.db"
        store = Store(database, boot_id="bench", journal_id="0" * 16)
        verified, stored, state = _pushed(store, Path(folder), cloud.provisioned(), updates)
        store.close()
        booted = _booted(database)
    both = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(verified, stored, strict=True)]
    peer = [_timed(partial(_peer, cloud.provisioned(), *pair))[0] for pair in pairwise(updates)]
    _print(f"pushed set for {FEATURES} features, verified and durable", both)
    _print("of it, verification", verified)
    _print("of it, database and second copy of the floors, with fsync", stored)
    _print("python-tuf's workflow over the same metadata", peer)
    _print(f"boot with {FEATURES} features, verification of what the database holds, after imports", booted)
    _print("the same with one feature", _booted_with_one())
    ratio = statistics.median(cpu for _, cpu in verified) / statistics.median(cpu for _, cpu in peer)
    print(f"ratio of medians of CPU time, ours to python-tuf's part {ratio:.2f}")
    parts = (state.director.timestamp, state.director.snapshot, state.director.targets)
    tokens = [content for path, content in state.director_targets.items() if path.startswith("tokens/")]
    print(f"size of the director's metadata with its tokens: {sum(map(len, (*parts, *tokens))):,} bytes")


def _timed(work: Callable[[], _T]) -> tuple[Sample, _T]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return ((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3), found


def _pushed(
    store: Store, folder: Path, state: TrustBytes, updates: list[TrustBytes]
) -> tuple[list[Sample], list[Sample], TrustBytes]:
    """Takes one update after the other; the first one fills the store and does not count."""
    keeper = Keeper(store, FloorsFile(folder, VIN), store.load())
    verified, stored = [], []
    for number, update in enumerate(updates):
        verify = partial(verify_update, vin=VIN, nonce=_nonce(number), now_ms=NOW_MS, floors=keeper.floors)
        verifying, verdict = _timed(partial(verify, state, update))
        keeping, _ = _timed(partial(keeper.keep, StoreTrust(number, verdict, NOW_MS, verdict.signed_ms)))
        _check(verdict, keeper)
        state = verdict.state
        if number:
            verified.append(verifying)
            stored.append(keeping)
    return verified, stored, state


def _check(verdict: Verdict, keeper: Keeper) -> None:
    if len(verdict.rights.entitlements) != FEATURES or len(verdict.rights.tokens) != FEATURES:
        raise RuntimeError(f"expected rights and tokens for {FEATURES} features")
    if keeper.problem:
        raise RuntimeError(keeper.problem)


def _booted(database: Path) -> list[Sample]:
    found = []
    for _ in range(ROUNDS):
        store = Store(database, boot_id="bench", journal_id=None)
        stored = store.load()
        store.close()
        found.append(_boot(stored.trust, stored.as_of_ms, stored.floors))
    return found


def _booted_with_one() -> list[Sample]:
    cloud = _Cloud(features=1)
    floors = Floors()
    state = verify_update(
        cloud.provisioned(), cloud.update(0), vin=VIN, nonce=_nonce(0), now_ms=NOW_MS, floors=floors
    ).state
    return [_boot(state, NOW_MS, floors) for _ in range(ROUNDS)]


def _boot(trust: TrustBytes, as_of_ms: int, floors: Floors) -> Sample:
    parse_known_feature.cache_clear()  # a boot knows no file yet
    return _timed(partial(verify_stored, trust, vin=VIN, as_of_ms=as_of_ms, floors=floors))[0]


def _peer(roots: TrustBytes, old: TrustBytes, new: TrustBytes) -> None:
    _peer_repository(roots.director.roots[0], old.director, new.director)
    _peer_repository(roots.catalogue.roots[0], old.catalogue, new.catalogue)


def _peer_repository(root: bytes, old: RepositoryBytes, new: RepositoryBytes) -> None:
    trusted = TrustedMetadataSet(root, EnvelopeType.METADATA)
    trusted.reference_time = datetime.fromtimestamp(NOW_MS // 1000, UTC)
    trusted.update_timestamp(old.timestamp)
    if new.timestamp != old.timestamp:
        trusted.update_timestamp(new.timestamp)
        with suppress(BadVersionNumberError):  # it is kept to hold the new one against
            trusted.update_snapshot(old.snapshot, trusted=True)
    trusted.update_snapshot(new.snapshot)
    trusted.update_targets(new.targets)


class _Cloud:
    """Both repositories of one vehicle: the director signs a new set for each update."""

    def __init__(self, features: int = FEATURES) -> None:
        self._features = range(1, features + 1)
        self._director = _Keys(targets=1)
        self._catalogue = _Keys(targets=3)
        self._token_key = Ed25519PrivateKey.generate()
        self._files = {f"features/{_feature(n)}/1.toml": _file(n) for n in self._features}
        targets = Targets(1, None, _EXPIRES, {path: _listed(path, it) for path, it in self._files.items()})
        snapshot = self._catalogue.sign(Snapshot(1, None, _EXPIRES, {"targets.json": MetaFile(1)}))
        timestamp = Timestamp(1, None, _EXPIRES, MetaFile.from_data(1, snapshot, ["sha256"]))
        self._image = RepositoryBytes(
            (), self._catalogue.sign(timestamp), snapshot, self._catalogue.sign(targets)
        )

    def provisioned(self) -> TrustBytes:
        """What a vehicle's image holds."""
        return TrustBytes(
            RepositoryBytes((self._director.root(),)), RepositoryBytes((self._catalogue.root(),))
        )

    def update(self, number: int) -> TrustBytes:
        """Everything that a vehicle gets, anew."""
        version = VERSION + number
        items = [director.entitlements(VIN, version, 1, [_right(n) for n in self._features])]
        for path, content in self._files.items():
            items.append(director.Item(path, content, _ECU, _HARDWARE, 1))
        for n in self._features:
            content = token.sign(
                self._token_key,
                vin=VIN,
                uid=UID,
                feature_number=n,
                counter=version,
                state=token.ALLOWED,
                terms={token.TERM_IGNITION_CYCLES: 300, token.TERM_OPERATING_S: 1_080_000},
            )
            items.append(
                director.Item(director.token_path(_ECU, _feature(n)), content, _ECU, _HARDWARE, version)
            )
        keys = self._director.keys
        made = director.sign_set(
            VIN,
            version,
            items,
            targets_key=keys[Targets.type][0],
            snapshot_key=keys[Snapshot.type][0],
            now_ms=NOW_MS,
        )
        timestamp = director.sign_timestamp(
            VIN,
            version,
            set_version=version,
            snapshot=made.snapshot,
            nonce=_nonce(number),
            timestamp_key=keys[Timestamp.type][0],
            now_ms=NOW_MS,
        )
        return TrustBytes(
            RepositoryBytes((), timestamp, made.snapshot, made.targets),
            self._image,
            {item.path: item.content for item in items if item.path not in self._files},
            self._files,
        )


class _Keys:
    """The keys of one repository: three of the root, of which two must sign."""

    def __init__(self, *, targets: int) -> None:
        counts = {Root.type: 3, Timestamp.type: 1, Snapshot.type: 1, Targets.type: targets}
        self.keys = {
            role: [CryptoSigner.generate_ed25519() for _ in range(count)] for role, count in counts.items()
        }

    def root(self) -> bytes:
        """The first root."""
        keys: dict[str, Key] = {k.public_key.keyid: k.public_key for role in self.keys.values() for k in role}
        roles = {
            name: Role([key.public_key.keyid for key in role], min(2, len(role)))
            for name, role in self.keys.items()
        }
        return self.sign(Root(1, None, _EXPIRES, keys, roles))

    def sign(self, signed: Root | Timestamp | Snapshot | Targets) -> bytes:
        """Sign with all keys of the role."""
        metadata: Metadata[Any] = Metadata(signed)
        for key in self.keys[signed.type]:
            metadata.sign(key, append=True)
        return metadata.to_bytes(JSONSerializer(compact=True))


def _file(number: int) -> bytes:
    text = FEATURE_FILE.read_text()
    text = text.replace('id = "seat-heating"', f'id = "{_feature(number)}"', 1)
    return text.replace("feature_number = 1\n", f"feature_number = {number}\n", 1).encode()


def _listed(path: str, content: bytes) -> TargetFile:
    target = TargetFile.from_data(path, content, ["sha256"])
    target.unrecognized_fields["custom"] = {"hardware_ids": [_HARDWARE], "release_counter": 1}
    return target


def _nonce(number: int) -> bytes:
    return number.to_bytes(16, "big")


def _print(what: str, found: list[Sample]) -> None:
    wall, cpu = ([sample[i] for sample in found] for i in (0, 1))
    print(
        f"{what}: median {statistics.median(wall):.2f} ms (CPU {statistics.median(cpu):.2f} ms),"
        f" worst of {ROUNDS} {max(wall):.2f} ms"
    )
