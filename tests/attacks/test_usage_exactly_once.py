"""Every record is stored once and every unit counted once: in any order, twice, at once, killed, put back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.cloud_world import JOURNAL, START_MS, VIN, Device, World, record, signed_batch, write_config
from support.real_process import serving

from cloud import ingest
from cloud.errors import ChainError, StartError
from cloud.store import Store
from openfod.usage.v1 import usage_pb2

SOURCE = "veh-0123456789abcdef"
RECORDS = 240
BATCH = 20
ROUNDS = 4
READY_S = 60


class Vehicle:
    """A vehicle's journal, and the truth about it."""

    def __init__(
        self, source: str, count: int, seed: int, key: ec.EllipticCurvePrivateKey | None = None
    ) -> None:
        dice = random.Random(seed)
        self.source, self.key = source, key or ec.generate_private_key(ec.SECP256R1())
        self.records: list[bytes] = []
        previous = bytes(32)
        self.truth = 0
        for seq in range(1, count + 1):
            value = dice.randrange(10**6)
            self.truth += value
            # Late by any age: some windows are years old when they come.
            end_ms = START_MS - dice.choice([0, 86_400_000, 10 * 365 * 86_400_000])
            times = {"window_start_ms": end_ms - 1_000, "window_end_ms": end_ms}
            self.records.append(record(source, seq, previous, value=value, **times))
            previous = hashlib.sha256(self.records[-1]).digest()

    def batch(self, first: int, count: int) -> usage_pb2.SignedUsageBatch:
        """The records from position `first` on, signed."""
        return signed_batch(self.key, self.source, self.records[first - 1 : first - 1 + count])

    def upload(self, store: Store, receipt_key: Ed25519PrivateKey, first: int, count: int = BATCH) -> int:
        """What the cloud does with a batch; returns the receipt's position."""
        keys = [ingest.archive_key(receipt_key)]
        batch = ingest.verify(self.batch(first, count), self.key.public_key(), self.source, {}, keys)
        return store.run_here(
            lambda tx: ingest.take(tx, VIN, self.source, batch, receipt_key, START_MS)
        ).through_seq


def assert_exact(store: Store, vehicle: Vehicle) -> None:
    rows = store.run_here(lambda tx: tx.usage(vehicle.source))
    assert [row.content for row in rows] == vehicle.records
    assert sum(usage_pb2.UsageRecord.FromString(row.content).value for row in rows) == vehicle.truth


def registered(store: Store) -> None:
    store.run_here(lambda tx: tx.add_vehicle(VIN, SOURCE, [], START_MS))


@pytest.mark.parametrize("seed", range(5))
def test_batches_in_any_order_and_again_add_up(tmp_path: Path, seed: int) -> None:
    dice, key = random.Random(seed), Ed25519PrivateKey.generate()
    vehicle = Vehicle(SOURCE, RECORDS, seed)
    store = Store(sa.make_url(f"sqlite:///{tmp_path}/cloud.db"))
    registered(store)
    head = refused = 0
    while head < RECORDS:
        first = dice.randrange(1, RECORDS + 1)
        count = dice.randrange(1, 60)
        before = head
        try:
            head = vehicle.upload(store, key, first, count)
        except ChainError:
            refused += 1
            assert first > before + 1  # only what would leave a hole
            continue
        assert head == max(before, min(first + count - 1, RECORDS))
        if first <= before:
            assert vehicle.upload(store, key, first, count) == head
    assert refused
    assert_exact(store, vehicle)
    store.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_backup_that_is_put_back_takes_acknowledged_records_again(tmp_path: Path, seed: int) -> None:
    dice, key = random.Random(seed), Ed25519PrivateKey.generate()
    vehicle = Vehicle(SOURCE, RECORDS, seed)
    url = sa.make_url(f"sqlite:///{tmp_path}/cloud.db")
    store = Store(url)
    registered(store)
    for _ in range(3):
        head = 0
        store.close()
        store = Store(url)
        stored = store.run_here(lambda tx: tx.receipt(SOURCE, JOURNAL))
        head = stored.through_seq if stored else 0
        until = min(RECORDS, head + dice.randrange(80))
        while head < until:
            head = vehicle.upload(store, key, head + 1)
        store.close()
        shutil.copy(tmp_path / "cloud.db", tmp_path / "backup.db")
        store = Store(url)
        while head < RECORDS:
            head = vehicle.upload(store, key, head + 1)
        store.close()
        for name in ("cloud.db-wal", "cloud.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        shutil.copy(tmp_path / "backup.db", tmp_path / "cloud.db")
        store = Store(url)
    head = 1
    while head < RECORDS:
        head = vehicle.upload(store, key, head)
    assert_exact(store, vehicle)
    store.close()


def race(url: sa.URL, vehicle: Vehicle, key: Ed25519PrivateKey) -> None:
    """Two connections send the whole journal at the same time, in batches that overlap."""
    stores = [Store(url), Store(url)]
    registered(stores[0])
    barrier = threading.Barrier(len(stores))
    failures: list[BaseException] = []

    def send(number: int, store: Store) -> None:
        dice, head = random.Random(number), 0
        barrier.wait()
        try:
            while head < RECORDS:
                # From a place that both have reached, so that each often meets the other's records.
                head = vehicle.upload(
                    store, key, max(1, head - dice.randrange(BATCH)), dice.randrange(BATCH, 40)
                )
        except BaseException as error:  # noqa: BLE001 (a thread's failure must fail the test)
            failures.append(error)

    threads = [threading.Thread(target=send, args=pair) for pair in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert_exact(stores[0], vehicle)
    for store in stores:
        store.close()


def test_two_connections_at_once_store_each_record_once_in_sqlite(tmp_path: Path) -> None:
    url = sa.make_url(f"sqlite:///{tmp_path}/cloud.db")
    race(url, Vehicle(SOURCE, RECORDS, 1), Ed25519PrivateKey.generate())


@contextmanager
def postgresql(folder: Path) -> Iterator[sa.URL]:
    """A server of its own on a Unix socket; skips with the reason if there is none."""
    pytest.importorskip("psycopg", reason="no driver for PostgreSQL: pip install 'psycopg[binary]'")
    found = shutil.which("postgres")
    binaries = Path(os.path.realpath(found)).parent if found else Path()
    if not (binaries / "initdb").is_file():
        pytest.skip("no PostgreSQL server is installed")
    # The server refuses to run as root.
    user: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
    data = folder / "data"
    data.mkdir(mode=0o700)
    if user:
        shutil.chown(data, "nobody", "nogroup")
        shutil.chown(folder, "nobody", "nogroup")
        if subprocess.run(["ls", folder], check=False, capture_output=True, **user).returncode:
            pytest.skip(f"no other user than root may enter {folder}, and PostgreSQL does not run as root")
    made = subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "fod", "--auth=trust", "--no-sync"],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        **user,
    )
    assert made.returncode == 0, made.stderr
    arguments: list[str | Path] = [binaries / "postgres", "-D", data, "-k", folder, "-h", ""]
    with subprocess.Popen(arguments, cwd=folder, stderr=subprocess.DEVNULL, **user) as server:
        try:
            url = sa.URL.create("postgresql+psycopg", "fod", database="postgres", query={"host": str(folder)})
            for _ in range(200):
                try:
                    Store(url).close()
                    break
                except StartError:
                    if server.poll() is not None:
                        raise
                    threading.Event().wait(0.1)
            yield url
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


def test_two_connections_at_once_store_each_record_once_in_postgresql() -> None:
    # A Unix socket's path is short, and the server's user must be able to enter the folder.
    with tempfile.TemporaryDirectory(prefix="fod-pg-") as name, postgresql(Path(name)) as url:
        race(url, Vehicle(SOURCE, RECORDS, 2), Ed25519PrivateKey.generate())


# --- a real server that is killed ------------------------------------------------------


async def _send(
    world: World, device: Device, vehicle: Vehicle, receipts: list[bytes], on_receipt: Callable[[], None]
) -> None:
    """Sends what may not be stored yet, without waiting for one answer before the next batch."""
    stream = world.connect(device)
    await stream.hello()
    known = usage_pb2.UsageReceipt.FromString(receipts[-1]).through_seq if receipts else 0

    async def send() -> None:
        first = max(1, known - BATCH)
        while first <= len(vehicle.records):
            await stream.send(usage=vehicle.batch(first, BATCH))
            first += BATCH - 1  # each overlaps the one before

    sending = asyncio.ensure_future(send())
    try:
        while known < len(vehicle.records):
            answer = await stream.receive()
            if answer.WhichOneof("payload") == "receipt":
                receipts.append(answer.receipt.receipt)
                known = usage_pb2.UsageReceipt.FromString(receipts[-1]).through_seq
                on_receipt()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


def test_a_server_killed_in_the_middle_of_batches_keeps_what_it_signed_for(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    config, log = write_config(tmp_path), tmp_path / "cloud.log"
    receipts: list[bytes] = []
    made: list[tuple[Device, Vehicle]] = []

    async def life(process: subprocess.Popen[str], ready: dict[str, Any], *, is_killed: bool) -> None:
        cloud: Any = SimpleNamespace(port=ready["port"], enrolment_port=ready["enrolment_port"])
        world = World(cloud, [START_MS])
        left, delay_s = dice.randrange(6), dice.uniform(0, 0.01)

        def on_receipt() -> None:
            nonlocal left
            left -= 1
            if is_killed and left == 0:
                asyncio.get_running_loop().call_later(delay_s, process.kill)

        try:
            if not made:
                device = await world.device()
                made.append((device, Vehicle(device.source, 2_000, seed, device.key)))
            if is_killed and left == 0:
                asyncio.get_running_loop().call_later(delay_s, process.kill)
            await asyncio.wait_for(_send(world, *made[0], receipts, on_receipt), READY_S)
        except (grpc.aio.AioRpcError, AssertionError) as error:
            if process.poll() != -signal.SIGKILL and not is_killed:
                raise AssertionError(f"seed {seed}: {log.read_text(encoding='utf-8')}") from error
        finally:
            for channel in world.channels:
                await channel.close()

    reached = []
    for number in range(ROUNDS + 1):
        with serving(config, log) as (process, ready):
            asyncio.run(life(process, ready, is_killed=number < ROUNDS))
        reached.append(usage_pb2.UsageReceipt.FromString(receipts[-1]).through_seq if receipts else 0)
    _, vehicle = made[0]
    assert reached[0] < len(vehicle.records), f"seed {seed}: the first round was not killed in its middle"
    with closing(sqlite3.connect(tmp_path / "cloud.db")) as database:
        rows = database.execute("SELECT seq, content, hash FROM usage_records ORDER BY seq").fetchall()
    assert [content for _, content, _ in rows] == vehicle.records, f"seed {seed}"
    hashes = {seq: digest for seq, _, digest in rows}
    for content in receipts:  # no receipt was ever signed for what a crash took away
        receipt = usage_pb2.UsageReceipt.FromString(content)
        assert hashes[receipt.through_seq] == receipt.head_hash, f"seed {seed}"
