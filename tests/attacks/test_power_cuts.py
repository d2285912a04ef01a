"""A power cut at any write of trusted state leaves the old or the new one, and a vehicle that boots.

Each statement and each system call of a write is followed by a copy of what
is on disk: that is what a cut there would leave. The last pages of SQLite's
log are also torn at every 512 bytes, as a disk in the middle of a write does.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.agent_world import AgentWorld, bundle
from support.edge_cloud import authority, issue
from support.trust_repo import LOGBOOK, SEAT
from tuf.api.metadata import Timestamp

from agent import boot
from agent.adapters import identity
from agent.adapters.store import Store
from agent.config import AgentConfig, load
from agent.events import StoreTrust
from agent.importing import verify
from agent.model import Verdict
from agent.trust.verifier import verify_update

SECTOR = 512


class Camera:
    """Copies a folder after each step."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder, self._copies = folder, copies
        self.cuts: list[Path] = []

    def take(self) -> None:
        target = self._copies / f"{len(self.cuts):04}"
        shutil.copytree(self._folder, target, ignore=shutil.ignore_patterns("*-shm", "*.lock", "*.sock"))
        self.cuts.append(target)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.take()
            result = function(*arguments, **options)
            self.take()
            return result

        return watched


class Watched:
    """A connection whose every statement is watched."""

    def __init__(self, inner: sqlite3.Connection, camera: Camera) -> None:
        self._inner = inner
        self.execute = camera.around(inner.execute)
        self._one = camera.around(inner.execute)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def executemany(self, statement: str, rows: Any) -> None:
        for row in rows:
            self._one(statement, row)


@contextmanager
def watched_calls(camera: Camera, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Watches each system call by which a file is replaced."""
    with patch.context() as calls:
        for name in ("fsync", "open"):
            calls.setattr(os, name, camera.around(getattr(os, name)))
        for name in ("rename", "unlink", "rmdir", "mkdir"):
            calls.setattr(Path, name, camera.around(getattr(Path, name)))
        yield


@dataclass
class Disk:
    """Database and floors of a vehicle in one folder, so that one copy holds both."""

    world: AgentWorld
    folder: Path

    def store(self, folder: Path | None = None) -> Store:
        return Store((folder or self.folder) / "state/agent.db", boot_id="b", journal_id="00112233445566aa")

    def start(self, folder: Path) -> boot.Start:
        """Boots from a copy."""
        store = self.store(folder)
        try:
            return boot.read(self.config(folder), store)
        finally:
            store.close()

    def config(self, folder: Path) -> AgentConfig:
        text = self.world.path.read_text()
        for name in ("ca.crt", "director.json", "catalogue.json", "receipt.pub"):
            text = text.replace(f'"{name}"', f'"{self.world.folder / name}"')
        path = folder / "agent.toml"
        path.write_text(text)
        return load(path)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    outer = tmp_path / "vehicle"
    outer.mkdir()
    world = AgentWorld(outer)
    folder = tmp_path / "disk"
    folder.mkdir()
    return Disk(world, folder)


def live_update(disk: Disk, start: boot.Start) -> Verdict:
    nonce = bytes(16)
    return verify_update(
        start.trusted,
        disk.world.cloud.answer(nonce),
        vin=disk.world.config.vehicle.vin,
        nonce=nonce,
        now_ms=0,
        floors=start.stored.floors,
    )


def file_of_rights(disk: Disk, start: boot.Start) -> Verdict:
    return verify(
        bundle(disk.world.cloud),
        start.trusted,
        vin=disk.world.config.vehicle.vin,
        now_ms=0,
        floors=start.stored.floors,
    )


def with_new_keys(disk: Disk, start: boot.Start) -> Verdict:
    cloud = disk.world.cloud
    cloud.director.rotate(Timestamp.type)
    cloud.catalogue.rotate(Timestamp.type)
    cloud.publish_catalogue()
    cloud.publish()
    return live_update(disk, start)


def keep(disk: Disk, make: Callable[[Disk, boot.Start], Verdict], camera: Camera | None = None) -> None:
    """Stores an update, watched if there is a camera."""
    config = disk.config(disk.folder)
    store = disk.store()
    try:
        start = boot.read(config, store)
        verdict = make(disk, start)
        keeper = boot.Keeper(store, boot.floors_file(config), start.stored)
        command = StoreTrust(1, verdict, verdict.signed_ms, verdict.signed_ms, make is not file_of_rights)
        if camera is not None:
            assert store._db is not None
            inner, store._db = store._db, Watched(store._db, camera)  # type: ignore[assignment]
            with watched_calls(camera, pytest.MonkeyPatch()):
                keeper.keep(command)
            store._db = inner
        else:
            keeper.keep(command)
    finally:
        store.close()


def rights(start: boot.Start) -> tuple[int, frozenset[str]]:
    if start.verdict is None:
        return 0, frozenset()
    return start.verdict.rights.version, frozenset(start.verdict.rights.entitlements)


def checked(disk: Disk, cut: Path) -> tuple[int, frozenset[str]]:
    """What a vehicle boots with from a cut: no complaint, and no floor above what is there."""
    start = disk.start(cut)
    assert start.problems == ()
    if start.verdict is not None:
        versions = start.verdict.director, start.verdict.catalogue
        assert (start.stored.floors.director, start.stored.floors.catalogue) == versions
    return rights(start)


@pytest.mark.parametrize("make", [live_update, file_of_rights, with_new_keys])
@pytest.mark.parametrize("first", [True, False], ids=["first rights", "later rights"])
def test_cut_at_any_step_of_an_update_leaves_the_old_or_the_new_rights(
    disk: Disk, tmp_path: Path, make: Callable[[Disk, boot.Start], Verdict], *, first: bool
) -> None:
    disk.world.cloud.grant()
    old: tuple[int, frozenset[str]] = (0, frozenset())
    if first:
        disk.store().close()
    else:
        keep(disk, live_update)
        old = (disk.world.cloud.director.version, frozenset({SEAT}))
        disk.world.cloud.revoke()
        disk.world.cloud.grant(LOGBOOK)
    camera = Camera(disk.folder, tmp_path / "cuts")
    keep(disk, make, camera)
    new = (disk.world.cloud.director.version, frozenset(disk.world.cloud.rights))
    assert new != old
    seen = [checked(disk, cut) for cut in camera.cuts]
    assert (seen[0], seen[-1]) == (old, new)
    assert set(seen) == {old, new}
    assert seen == sorted(seen), "once it is new, it stays new"
    assert len(seen) > 40


def test_log_that_is_torn_anywhere_leaves_the_old_or_the_new_rights(disk: Disk, tmp_path: Path) -> None:
    disk.world.cloud.grant()
    keep(disk, live_update)
    old = (disk.world.cloud.director.version, frozenset({SEAT}))
    before = tmp_path / "before"
    shutil.copytree(disk.folder, before)
    disk.world.cloud.revoke()
    camera = Camera(disk.folder, tmp_path / "cuts")
    keep(disk, live_update, camera)
    new = (disk.world.cloud.director.version, frozenset[str]())
    # The floors' file is written after the database has been synced: while the log tears, it is the old one.
    whole = next(
        cut
        for cut in camera.cuts
        if checked(disk, Path(shutil.copytree(cut, tmp_path / f"try-{cut.name}"))) == new
    )
    log = (whole / "state/agent.db-wal").read_bytes()
    dice = random.Random(5)
    cuts = {*range(0, len(log) + 1, SECTOR), *(dice.randrange(len(log)) for _ in range(40)), len(log)}
    seen = []
    for size in sorted(cuts):
        torn = tmp_path / f"torn-{size}"
        shutil.copytree(before, torn)
        shutil.copy(whole / "state/agent.db", torn / "state/agent.db")
        # Zeroes, garbage or nothing: a sector that was not written holds anything.
        rest = (b"", bytes(SECTOR), dice.randbytes(SECTOR))[size // SECTOR % 3]
        (torn / "state/agent.db-wal").write_bytes(log[:size] + rest)
        seen.append(checked(disk, torn))
    assert set(seen) == {old, new}
    assert (seen[0], seen[-1]) == (old, new)
    assert len(seen) > 30


def test_cut_while_a_vehicle_enrols_again_leaves_the_old_or_the_new_identity(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    old_key = identity.make_key(folder)
    identity.save(folder, issue("vehicle", authority(), old_key).der, "veh-1")
    camera = Camera(folder, tmp_path / "cuts")
    with watched_calls(camera, pytest.MonkeyPatch()):
        new_key = identity.stage(folder)
        identity.swap(folder, issue("vehicle", authority(), new_key).der, "veh-1")
    camera.take()
    seen = []
    for cut in camera.cuts:
        for settle in (False, True):
            if settle:
                identity.settle(cut)
            known = identity.load(cut)
            assert known is not None
            assert known.source == "veh-1"
            # Key and certificate belong together, or `load` would have refused them.
            seen.append(_number(known.key) == _number(new_key))
            assert seen[-1] or _number(known.key) == _number(old_key)
    assert seen == sorted(seen), "once it is new, it stays new"
    assert (seen[0], seen[-1]) == (False, True)
    assert len(camera.cuts) > 20
    assert {file.name for file in folder.iterdir()} == {"device.key", "device.crt", "identity.json"}


def _number(key: ec.EllipticCurvePrivateKey) -> int:
    return key.private_numbers().private_value
