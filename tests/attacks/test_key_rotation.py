"""Stolen keys: below the threshold they give nothing, and a rotation by threshold takes their power away.

The roots and keys are those that `fod-keys` makes; the old client is the agent's own verifier, and the ECU
is the simulated one.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from securesystemslib.signer import CryptoSigner
from support import cloud_world
from support.sim_world import ANNOUNCE, IDENTITY, INSTALL, MemoryStore, ask
from support.trust_repo import DAY_MS, NOW_MS, SEAT, Cloud, Vehicle, make_token
from tuf.api.metadata import Metadata, Root

from agent.errors import ExpiredError, RollbackError, SignatureError
from agent.model import RepositoryBytes, TrustBytes
from cloud import config, keyring
from cloud.errors import StartError
from firmware_sim.ecu import SeatModule, State
from keys import ceremony, files, roots, rotation
from openfod.vehicle.v1 import vehicle_service_pb2 as vehicle_pb2

NOW = datetime.fromtimestamp(NOW_MS / 1000, UTC)
YEAR_2099_MS = int(datetime(2099, 1, 1, tzinfo=UTC).timestamp()) * 1000


class Installation:
    """A key folder that `fod-keys` made, and a cloud that signs with its online keys.

    `steal` copies keys as they are now, to sign with them later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cloud = Cloud()
        self.load()
        self.cloud.publish_catalogue()
        self.cloud.publish()

    def load(self) -> None:
        """What a restart of the cloud reads."""
        for name, repository in self.repositories.items():
            chain = roots.load_chain(self.folder, name)
            repository.roots = list(chain.contents.values())
            for role in repository.keys:
                repository.keys[role] = self.steal(name, role)

    def rotate(self, name: str, *roles: str, only: Sequence[str] = ()) -> None:
        """Replaces keys by a new root, and starts the cloud again."""
        now = datetime.fromtimestamp(self.cloud.director.now_ms / 1000, UTC)
        rotation.rotate_roles(self.folder, name, roles, now, only=only)
        self.load()

    def steal(self, name: str, role: str) -> list[CryptoSigner]:
        """The keys of a role, as they are now."""
        named = roots.named_keys(roots.load_chain(self.folder, name).newest.signed)
        return [
            ceremony.signer(files.load_ed25519(self.folder / name / f"{key}.key"))
            for key, (owner, _) in named.items()
            if owner == role
        ]

    @property
    def repositories(self) -> dict[str, Any]:
        """Both, by name."""
        return {"director": self.cloud.director, "catalogue": self.cloud.catalogue}

    def vehicle(self) -> Vehicle:
        """A vehicle with a right, whose image holds the first roots alone."""
        first = {n: files.read(self.folder / roots.first_path(n)) for n in rotation.REPOSITORIES}
        vehicle = Vehicle(self.cloud)
        vehicle.stored = TrustBytes(
            director=RepositoryBytes(roots=(first["director"],)),
            catalogue=RepositoryBytes(roots=(first["catalogue"],)),
        )
        self.cloud.grant()
        vehicle.take(self.cloud.answer(vehicle.nonce))
        return vehicle

    def resign(self) -> None:
        """Everything anew under the present keys, as a cloud does after a rotation."""
        self.cloud.publish_catalogue()
        self.cloud.publish()


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stolen") / "keys"
    ceremony.init(folder, NOW - timedelta(days=1), replace=False)
    return folder


@pytest.fixture
def made(fresh: Path, tmp_path: Path) -> Installation:
    return Installation(Path(shutil.copytree(fresh, tmp_path / "keys")))


def _forged_root(made: Installation, name: str, signers: Sequence[CryptoSigner], version: int = 2) -> bytes:
    """A root of the thief: every role under keys of his own, signed by whatever he has."""
    own = CryptoSigner.generate_ed25519()
    root = Metadata[Root].from_bytes(files.read(made.folder / roots.first_path(name))).signed
    root.version = version
    root.keys = {own.public_key.keyid: own.public_key}
    for role in root.roles.values():
        role.keyids, role.threshold = [own.public_key.keyid], 1
    metadata = Metadata(root)
    for signer in (own, *signers):
        metadata.sign(signer, append=True)
    thief = made.repositories[name]
    thief.roots.append(roots.to_bytes(metadata))
    for role_name in thief.keys:
        thief.keys[role_name] = [own]
    return bytes(thief.roots[-1])


# --- below the threshold ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["director", "catalogue"])
@pytest.mark.parametrize(
    "stolen", ["one root key", "every online key", "one root key and its retired ancestors"]
)
def test_root_keys_below_the_threshold_make_no_root(made: Installation, name: str, stolen: str) -> None:
    loot = []
    if "ancestors" in stolen:
        loot = made.steal(name, "root")[:1]
        made.rotate(name, "root", only=["root-1"])
        made.resign()
    vehicle = made.vehicle()
    if stolen == "every online key":
        loot = [key for repository in made.repositories.values() for key in repository.keys["timestamp"]]
        loot += made.steal("director", "targets") + made.steal("director", "snapshot")
    else:
        loot += made.steal(name, "root")[:1]
    _forged_root(made, name, loot, version=len(made.repositories[name].roots) + 1)
    made.resign()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match=f"{name} root")


def test_one_holder_of_catalogue_targets_describes_nothing(made: Installation) -> None:
    vehicle = made.vehicle()
    made.cloud.describe(SEAT, 2, made.cloud.catalogue_files[f"features/{SEAT}/1.toml"] + b"# evil\n")
    made.cloud.catalogue.signers["targets"] = made.steal("catalogue", "targets")[:1] * 2
    made.cloud.publish_catalogue()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match="catalogue targets")


def test_online_keys_of_the_catalogue_describe_nothing(made: Installation) -> None:
    vehicle = made.vehicle()
    made.cloud.describe(SEAT, 2, made.cloud.catalogue_files[f"features/{SEAT}/1.toml"] + b"# evil\n")
    made.cloud.catalogue.signers["targets"] = [
        *made.steal("catalogue", "timestamp"),
        *made.steal("catalogue", "snapshot"),
        *made.steal("director", "targets"),
    ]
    made.cloud.publish_catalogue()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match="catalogue targets")


# --- the chain -----------------------------------------------------------------------------------


def test_an_old_client_follows_ten_roots_to_the_newest(made: Installation) -> None:
    vehicle = made.vehicle()
    for number in range(10):
        role = ("root", "timestamp", "snapshot", "targets", "root")[number % 5]
        made.rotate("director", role)
        made.rotate("catalogue", role)
    made.resign()
    verdict = vehicle.take(made.cloud.answer(vehicle.nonce))
    assert (verdict.director.root, verdict.catalogue.root) == (11, 11)
    assert vehicle.boot().rights.entitlements.keys() == verdict.rights.entitlements.keys()
    late = made.vehicle()  # straight from an image that holds the first roots
    assert late.boot().director.root == 11


def test_a_chain_with_one_root_left_out_is_refused(made: Installation) -> None:
    vehicle = made.vehicle()
    for _ in range(3):
        made.rotate("director", "root")
    made.resign()
    del made.cloud.director.roots[2]
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match="director root")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("director", "timestamp"),
        ("director", "snapshot"),
        ("director", "targets"),
        ("catalogue", "timestamp"),
        ("catalogue", "snapshot"),
        ("catalogue", "targets"),
    ],
)
def test_signatures_of_a_removed_key_are_refused(made: Installation, name: str, role: str) -> None:
    vehicle = made.vehicle()
    stolen = made.steal(name, role)
    made.rotate(name, role)
    made.resign()
    vehicle.take(made.cloud.answer(vehicle.nonce))
    made.repositories[name].signers[role] = stolen
    made.resign()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match=f"{name} {role}")


def test_all_old_root_keys_together_make_no_root_any_more(made: Installation) -> None:
    vehicle = made.vehicle()
    stolen = made.steal("director", "root")
    made.rotate("director", "root")
    made.resign()
    vehicle.take(made.cloud.answer(vehicle.nonce))
    _forged_root(made, "director", stolen, version=3)
    made.resign()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match="director root")


def test_a_thief_cannot_fork_the_chain_for_a_vehicle_that_has_followed(made: Installation) -> None:
    vehicle = made.vehicle()
    stolen = made.steal("director", "root")
    made.rotate("director", "root")
    made.resign()
    vehicle.take(made.cloud.answer(vehicle.nonce))
    made.cloud.director.roots.pop()
    _forged_root(made, "director", stolen, version=2)  # genuine signatures, another version 2
    made.resign()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError, match="director root")


# --- a new epoch ------------------------------------------------------------------------------------


def test_new_timestamp_and_snapshot_keys_undo_a_fast_forward(made: Installation) -> None:
    vehicle = made.vehicle()
    made.cloud.director.timestamp_version = 2_000_000_000
    made.cloud.publish(version=2_000_000_000)
    vehicle.take(made.cloud.answer(vehicle.nonce))
    made.cloud.director.timestamp_version = 10
    made.cloud.publish(version=11)
    vehicle.refuses(made.cloud.answer(vehicle.nonce), RollbackError)
    made.rotate("director", "timestamp", "snapshot")
    made.cloud.publish(version=12)
    verdict = vehicle.take(made.cloud.answer(vehicle.nonce))
    assert (verdict.director.targets, verdict.director.root) == (12, 2)
    made.cloud.publish(version=11)
    vehicle.refuses(made.cloud.answer(vehicle.nonce), RollbackError)


def test_a_signed_2099_is_refused_because_the_root_ends_before(made: Installation) -> None:
    vehicle = made.vehicle()
    made.cloud.at(YEAR_2099_MS)  # the thief has every online key, and no holder's
    made.resign()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), ExpiredError, match="root")


def test_stolen_online_keys_that_signed_the_far_future_are_undone(made: Installation) -> None:
    vehicle = made.vehicle()
    stolen = {role: made.steal("director", role) for role in ("timestamp", "snapshot")}
    honest_ms = made.cloud.director.now_ms
    forged_ms = honest_ms + 29 * DAY_MS  # as far as the catalogue's offline signature reaches
    made.cloud.at(forged_ms)
    made.cloud.catalogue_timestamp = made.cloud.catalogue.stamp()
    made.cloud.publish()
    vehicle.take(made.cloud.answer(vehicle.nonce))
    assert vehicle.floors.time_ms == forged_ms

    made.cloud.at(honest_ms + DAY_MS)
    made.resign()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), ExpiredError)  # what the theft has cost
    made.rotate("director", "timestamp", "snapshot")
    made.rotate("catalogue", "timestamp", "snapshot")
    made.resign()
    verdict = vehicle.take(made.cloud.answer(vehicle.nonce))
    assert vehicle.floors.time_ms == verdict.signed_ms == honest_ms + DAY_MS

    made.cloud.director.signers.update(stolen)
    made.cloud.at(forged_ms)
    made.cloud.publish()
    vehicle.refuses(made.cloud.answer(vehicle.nonce), SignatureError)


# --- the token root's next epoch -----------------------------------------------------------------------


def _seat(folder: Path) -> tuple[SeatModule, MemoryStore]:
    root = load_pem_public_key((folder / "public/token-root.pub").read_bytes())
    store = MemoryStore()
    seat = SeatModule(
        IDENTITY,
        features=frozenset({1}),
        token_root=root.public_bytes_raw(),  # type: ignore[union-attr]
        store=store,
        now_ns=0,
    )
    assert ask(seat, ANNOUNCE + (folder / "public/token-key-1.cose").read_bytes())[0] == 0x71
    return seat, store


def test_a_token_under_the_old_key_is_refused_as_new_and_stays_valid_if_accepted(made: Installation) -> None:
    seat, store = _seat(made.folder)
    stolen = files.load_ed25519(made.folder / "token/key-1.key")
    accepted = make_token(stolen, counter=1, vin=IDENTITY.vin, uid=IDENTITY.uid)
    assert ask(seat, INSTALL + accepted)[0] == 0x71

    rotation.rotate_token(made.folder)
    announcement = (made.folder / "public/token-key-2.cose").read_bytes()
    assert ask(seat, ANNOUNCE + announcement) == bytes.fromhex("71010F0C00000002")
    assert seat.status(1)[0] is State.ON, "what was accepted stays valid"

    before = store.state
    forged = make_token(stolen, counter=2, vin=IDENTITY.vin, uid=IDENTITY.uid)
    assert ask(seat, INSTALL + forged) == bytes.fromhex("7F3133")
    old = (made.folder / "public/token-key-1.cose").read_bytes()
    assert ask(seat, ANNOUNCE + old)[0] == 0x71, "an epoch that is known is no news"
    assert ask(seat, INSTALL + forged) == bytes.fromhex("7F3133")
    assert store.state is before
    assert seat.status(1)[0] is State.ON

    key = files.load_ed25519(made.folder / "token/key-2.key")
    assert ask(seat, INSTALL + make_token(key, counter=2, vin=IDENTITY.vin, uid=IDENTITY.uid))[0] == 0x71


def test_a_token_key_that_the_root_did_not_announce_is_refused(made: Installation) -> None:
    seat, store = _seat(made.folder)
    thief = Ed25519PrivateKey.generate()
    stolen = files.load_ed25519(made.folder / "token/key-1.key")
    before = store.state
    for signer in (thief, stolen):
        announcement = ceremony.announce_token_key(signer, thief.public_key(), 2)
        assert ask(seat, ANNOUNCE + announcement) == bytes.fromhex("7F3133")
    assert store.state is before


# --- the cloud on a rotated folder ----------------------------------------------------------------------


@pytest.fixture
def rotated(tmp_path: Path) -> Path:
    """A cloud's folder before a rotation; `_config` reads it again after one."""
    shutil.copytree(cloud_world.demo_keys(), tmp_path / "made")
    return tmp_path / "made"


def _config(base: Path, **changes: str) -> Path:
    demo = cloud_world.demo_keys()
    path = cloud_world.write_config(base)
    text = path.read_text().replace(str(demo), str(base))
    for name in rotation.REPOSITORIES:
        text = text.replace(f"public/{name}-root.json", f"public/{name}")
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def _rotate_all(base: Path) -> None:
    now = datetime.fromtimestamp(cloud_world.START_MS / 1000, UTC)
    folder = base / "keys"
    rotation.rotate_roles(folder, "director", ["timestamp", "snapshot", "targets"], now)
    rotation.rotate_roles(folder, "director", ["root"], now)
    rotation.rotate_roles(folder, "catalogue", ["timestamp", "snapshot"], now)
    rotation.rotate_roles(folder, "catalogue", ["targets"], now, repository=base / "catalogue")
    rotation.rotate_token(folder)


def _next_token_key() -> dict[str, str]:
    return {
        "token/key-1.key": "token/key-2.key",
        "public/token-key-1.cose": "public/token-key-2.cose",
        "epoch = 1": "epoch = 2",
    }


def test_a_cloud_starts_on_the_rotated_folder_and_refuses_the_old_keys(rotated: Path) -> None:
    first = keyring.load(config.read(_config(rotated)))
    assert first.director.root.signed.version == 1
    _rotate_all(rotated)
    keys = keyring.load(config.read(_config(rotated, **_next_token_key())))
    assert (keys.director.root.signed.version, keys.catalogue.root.signed.version) == (3, 3)
    chain = [json.loads(content)["signed"]["version"] for content in keys.director.roots_after(1)]
    assert chain == [2, 3]
    shutil.copy(rotated / "keys/retired/director/timestamp.1.key", rotated / "keys/director/timestamp.key")
    with pytest.raises(StartError, match="is not the timestamp key of the root"):
        keyring.load(config.read(_config(rotated, **_next_token_key())))


def _update(path: Path, story: Callable[[cloud_world.World], Any]) -> Any:
    async def run() -> Any:
        async with cloud_world.open_world(path) as world:
            return await asyncio.wait_for(story(world), 30)

    return asyncio.run(run())


def test_updates_of_a_rotated_cloud_carry_the_roots_that_a_vehicle_lacks(
    rotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _rotate_all(rotated)
    monkeypatch.setattr(cloud_world.World, "keys", rotated / "keys")

    async def story(world: cloud_world.World) -> Any:
        device = await world.device()
        await world.grant()
        stream = world.connect(device)
        return await stream.hello(
            director=vehicle_pb2.RepositoryVersions(root=1),
            catalogue=vehicle_pb2.RepositoryVersions(root=2),
        )

    update = _update(_config(rotated, **_next_token_key()), story)
    versions = [
        [json.loads(content)["signed"]["version"] for content in repository.roots]
        for repository in (update.director, update.catalogue)
    ]
    assert versions == [[2, 3], [3]]


def test_a_vehicle_of_an_old_database_gets_what_the_new_keys_signed(
    rotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_world.World, "keys", rotated / "keys")
    devices = []

    async def before(world: cloud_world.World) -> Any:
        devices.append(await world.device())
        await world.grant()
        return await world.connect(devices[0]).hello()

    first = _update(_config(rotated), before)
    _rotate_all(rotated)

    async def after(world: cloud_world.World) -> Any:
        versions = vehicle_pb2.RepositoryVersions
        has = [
            versions(
                root=1,
                timestamp=json.loads(repository.timestamp)["signed"]["version"],
                snapshot=json.loads(repository.snapshot)["signed"]["version"],
                targets=json.loads(repository.targets)["signed"]["version"],
            )
            for repository in (first.director, first.catalogue)
        ]
        return await world.connect(devices[0]).hello(director=has[0], catalogue=has[1])

    update = _update(_config(rotated, **_next_token_key()), after)
    root = Metadata[Root].from_bytes(update.director.roots[-1])
    for role in ("timestamp", "snapshot", "targets"):
        content = getattr(update.director, role)
        assert content, f"the vehicle holds no director {role} under the new keys, and gets none"
        root.verify_delegate(role, Metadata.from_bytes(content))
    catalogue_root = Metadata[Root].from_bytes(update.catalogue.roots[-1])
    for role in ("timestamp", "snapshot"):
        content = getattr(update.catalogue, role)
        assert content, f"the vehicle holds no catalogue {role} under the new keys, and gets none"
        catalogue_root.verify_delegate(role, Metadata.from_bytes(content))
