"""The usage feed with real processes: killed at any moment, and a year billed through it to the unit.

Some weeks in every run; FOD_FEED_DAYS=365 (make test-feed) for the year.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.cloud_world import (
    ACCOUNT,
    DAY_MS,
    JOURNAL,
    START_MS,
    VIN,
    Device,
    Stream,
    World,
    chain,
    open_world,
    write_config,
)
from support.receiver import Answer, receiving

from agent.metering.record import BATCH_DOMAIN, Head, Record, Use, append, batch
from agent.model import MeterKind
from cloud.store import EntitlementRow, Store, UsageRow
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.usage.v1 import usage_pb2

DAYS = int(os.environ.get("FOD_FEED_DAYS", "14"))
SEED = int(os.environ.get("FOD_SEED", "1"))
REPEATS = 10
KILLS = 4
RECORDS_AT_ONCE = 20
SOURCE = "veh-0123456789abcdef"
HOUR_MS = 3_600_000

pytestmark = pytest.mark.e2e


def export(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "cloud", "export", "--config", str(config), *arguments]


def exported(config: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        export(config, *arguments, "--once", "--json"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- killed ----------------------------------------------------------------------


def _fill(folder: Path, count: int) -> Path:
    config = write_config(folder)
    store = Store(sa.make_url(f"sqlite:///{folder / 'cloud.db'}"))
    contents = chain(SOURCE, count)
    rows = [UsageRow(JOURNAL, seq, content, bytes(32)) for seq, content in enumerate(contents, start=1)]

    def work(tx: Any) -> None:
        tx.add_vehicle(VIN, SOURCE, [], START_MS)
        right = "ent-0123456789abcdef"
        tx.add_entitlement(
            EntitlementRow(right, VIN, "seat-heating", ACCOUNT, 1, b"", START_MS, 0, "", 1, START_MS)
        )
        tx.add_usage(SOURCE, rows, [1] * count, START_MS)

    store.run_here(work)
    store.close()
    return config


def _kill_and_finish(command: Sequence[str], random: Random, progress: Callable[[], int]) -> None:
    """Kills a command KILLS times while it is at work, at random moments, and then lets it end."""
    for _ in range(KILLS):
        begun = progress()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            deadline = time.monotonic() + 30
            while progress() == begun and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.005)
            time.sleep(random.uniform(0, 0.1))
            assert process.poll() is None, process.communicate()[1].decode()  # it was at work
            process.kill()
    subprocess.run([*command, "--batch", "500"], capture_output=True, timeout=60, check=True)


@pytest.mark.timeout(180)
def test_a_consumer_that_is_killed_all_the_time_loses_nothing_and_writes_nothing_twice(
    tmp_path: Path,
) -> None:
    count = 2_000
    config = _fill(tmp_path, count)
    random = Random(SEED)
    path = tmp_path / "usage.jsonl"

    def length() -> int:
        return path.stat().st_size if path.exists() else 0

    _kill_and_finish(export(config, "--to", f"file:{path}", "--once", "--batch", "1"), random, length)
    lines = path.read_bytes().splitlines()
    assert [json.loads(line)["data"]["seq"] for line in lines] == list(range(1, count + 1))
    with receiving() as receiver:
        command = export(config, "--to", receiver.url, "--name", "biller", "--once", "--batch", "1")
        _kill_and_finish(command, random, lambda: len(receiver.requests))
    assert receiver.changed == []
    assert receiver.repeats <= KILLS  # one event at once
    assert [event["data"]["seq"] for event in receiver.taken.values()] == list(range(1, count + 1))
    assert list(receiver.taken.values()) == [json.loads(line) for line in lines]
    done = subprocess.run(
        [sys.executable, "-m", "cloud", "export", "--config", str(config), "--list", "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = {row["name"]: (row["position"], row["behind"]) for row in json.loads(done.stdout)["consumers"]}
    assert found == {"biller": (count, 0), "default": (count, 0)}


# --- a year ------------------------------------------------------------------------

Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""Right, meter, dimensions."""


@dataclass(frozen=True)
class Meter:
    """One meter of the simulated year."""

    feature_id: str
    meter_id: str
    kind: MeterKind
    right: str
    dimensions: tuple[tuple[tuple[str, str], ...], ...]


def _uses(random: Random, meters: Sequence[Meter], days: int) -> Iterator[Use]:
    """What the vehicle's meters close in its days: drives at some hours, windows of different lengths."""
    for day in range(days):
        for hour in sorted(random.sample(range(24), random.randint(2, 5))):
            start_ms = START_MS + day * DAY_MS + hour * HOUR_MS
            for meter in meters:
                for dimensions in meter.dimensions:
                    if random.random() < 0.2:
                        continue
                    length_ms = random.randint(1, HOUR_MS)
                    value = length_ms if meter.kind is MeterKind.DURATION else random.randint(0, 90_000)
                    gap = random.choice((0, 0, random.randint(1, 5_000)))
                    yield Use(
                        meter.feature_id,
                        meter.meter_id,
                        meter.kind,
                        meter.right,
                        ACCOUNT,
                        f"{day * 24 + hour + 1:032x}",
                        dimensions,
                        value,
                        gap,
                        "EDGE" if gap else "",
                        start_ms,
                        start_ms + length_ms,
                        signed_clock=True,
                    )


def _batches(device: Device, records: Sequence[Record]) -> list[usage_pb2.SignedUsageBatch]:
    found = []
    for begin in range(0, len(records), RECORDS_AT_ONCE):
        part = records[begin : begin + RECORDS_AT_ONCE]
        content = batch(device.source, JOURNAL, tuple(record.content for record in part))
        signature = device.key.sign(BATCH_DOMAIN + content, ec.ECDSA(hashes.SHA256()))
        found.append(usage_pb2.SignedUsageBatch(batch=content, signature=signature))
    return found


async def _upload(
    stream: Stream, batches: Sequence[usage_pb2.SignedUsageBatch], random: Random
) -> tuple[int, int]:
    """Sends each batch ten times, shuffled; what is refused because it came too early is sent again.

    Returns:
        how often a receipt came, and how often a refusal.
    """
    late = [random.random() * 6 for _ in batches]
    waiting = [
        (number + late[number] + random.random() * 6, copy, number)
        for number in range(len(batches))
        for copy in range(REPEATS)
    ]
    heapq.heapify(waiting)
    receipts = refusals = 0
    while waiting:
        place, copy, number = heapq.heappop(waiting)
        answer = await stream.upload(batches[number])
        if answer.WhichOneof("payload") == "receipt":
            receipts += 1
        else:
            assert answer.WhichOneof("payload") == "usage_refusal", answer
            refusals += 1
            heapq.heappush(waiting, (place + 5, copy, number))
    return receipts, refusals


async def _year(world: World, config: Path, random: Random) -> None:
    device = await world.device()
    rights = {}
    for plan in ("seat-heating-monthly", "logbook-per-km"):
        granted = await world.grant(plan)
        rights[plan] = granted.entitlement.entitlement_id
    seat, logbook = rights["seat-heating-monthly"], rights["logbook-per-km"]
    motions = ((("motion", "driving"),), (("motion", "parked"),))
    meters = (
        Meter("seat-heating", "active-time", MeterKind.DURATION, seat, ((),)),
        Meter("seat-heating", "heated-distance", MeterKind.DISTANCE, seat, ((),)),
        Meter("drivers-logbook", "distance", MeterKind.DISTANCE, logbook, ((),)),
        Meter("drivers-logbook", "time", MeterKind.DURATION, logbook, motions),
    )
    truth: Counter[Key] = Counter()
    head, records = Head(JOURNAL), []
    for use in _uses(random, meters, DAYS):
        head, record = append(head, device.source, use)
        records.append(record)
        truth[use.entitlement_id, use.meter_id, use.dimensions] += use.value
    assert len(truth) == 5
    batches = _batches(device, records)
    stream = world.connect(device)
    await stream.hello()
    receipts, refusals = await _upload(stream, batches, random)
    assert receipts == REPEATS * len(batches)
    assert refusals > 0  # they were shuffled

    def answer(number: int, _events: object) -> Answer:
        # Every third batch is taken and not confirmed, every seventh is not taken.
        if number % 7 == 0:
            return Answer(503, takes=False, headers={"Retry-After": "0"})
        return Answer(hangs_up=True) if number % 3 == 0 else Answer()

    with receiving(answer) as receiver:
        done = await asyncio.to_thread(
            exported, config, "--to", receiver.url, "--batch", str(max(50, len(records) // 20))
        )
    assert done["position"] == len(records)
    assert receiver.repeats > 0
    assert receiver.changed == []
    billed = {(right, meter, dims): units for (_, right, meter, dims), units in receiver.sums().items()}
    assert {subject for subject, *_ in receiver.sums()} == {ACCOUNT}
    assert billed == dict(truth)

    world.now_ms[0] = START_MS + (DAYS + 1) * DAY_MS
    preview = await world.operator.PreviewInvoice(operator_pb2.PreviewInvoiceRequest(vin=VIN))
    invoiced: Counter[Key] = Counter()
    for invoice in preview.invoices:
        for line in invoice.lines:
            if line.meter_id:
                dimensions = tuple((d.name, d.value) for d in line.dimensions)
                invoiced[line.entitlement_id, line.meter_id, dimensions] += line.quantity
    assert dict(invoiced) == dict(truth)
    assert VIN not in json.dumps(list(receiver.taken.values()))
    print(
        f"{DAYS} days, {len(records)} records, {receipts} receipts and {refusals} refusals for "
        f"{len(batches)} batches, {len(receiver.requests)} requests, {receiver.repeats} events again: exact"
    )


@pytest.mark.timeout(120 + 4 * DAYS)
def test_a_year_is_billed_through_the_feed_to_the_exact_unit(tmp_path: Path) -> None:
    config = write_config(tmp_path)

    async def run() -> None:
        async with open_world(config) as world:
            await _year(world, config, Random(SEED))

    asyncio.run(run())
