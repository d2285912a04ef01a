"""The journal: records in batches, 90 days offline, a merge; beside plain SQLite with the same settings."""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from agent.adapters.store import Store
from agent.events import StoreUsage
from agent.metering.record import Head, Record, Use, append
from agent.model import MeterKind

ROUNDS, BATCH = 15, 500
DAYS, FEATURES, MINUTES_A_DAY = 90, 10, 120
START_MS = 1_800_000_000_000


def _use(number: int) -> Use:
    minute = number // FEATURES
    return Use(
        feature_id=f"feature-{number % FEATURES}",
        meter_id="active-time",
        kind=MeterKind.DURATION,
        entitlement_id=f"ent-{number % FEATURES:016x}",
        account="acc-0123456789abcdef",
        trace_id=f"{number:032x}",
        dimensions=(("motion", "driving" if minute % 5 else "parked"),),
        value=59_000,
        gap=200,
        gap_reason="EDGE",
        start_ms=START_MS + minute * 60_000,
        end_ms=START_MS + minute * 60_000 + 60_000,
        signed_clock=True,
    )


def _records(head: Head, first: int, count: int) -> tuple[Head, tuple[Record, ...]]:
    made = []
    for number in range(first, first + count):
        head, record = append(head, "veh-0123456789abcdef", _use(number))
        made.append(record)
    return head, tuple(made)


def _timed(job: Callable[[], object]) -> float:
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun


def _store(folder: Path, name: str, **options: int) -> Store:
    return Store(folder / name, boot_id="b", journal_id="0" * 16, **options)


def _batches(folder: Path) -> None:
    store = _store(folder, "agent.db")
    plain = sqlite3.connect(folder / "plain.db", isolation_level=None)
    plain.execute("PRAGMA journal_mode=WAL")
    plain.execute("PRAGMA synchronous=FULL")
    plain.execute("PRAGMA secure_delete=ON")
    plain.execute("CREATE TABLE record (seq INTEGER PRIMARY KEY, hash BLOB, content BLOB)")
    head, ours, made, theirs = Head("0" * 16), list[float](), list[float](), list[float]()

    def insert(records: tuple[Record, ...]) -> None:
        plain.execute("BEGIN IMMEDIATE")
        plain.executemany(
            "INSERT INTO record VALUES (?, ?, ?)", [(r.seq, r.hash, r.content) for r in records]
        )
        plain.execute("COMMIT")

    for number in range(ROUNDS):
        begun = time.perf_counter()
        head, records = _records(head, number * BATCH, BATCH)
        made.append(time.perf_counter() - begun)
        ours.append(_timed(lambda r=records: store.store_usage(StoreUsage(1, r, (), {}, 0))))  # type: ignore[misc]
        theirs.append(_timed(lambda r=records: insert(r)))  # type: ignore[misc]
    store.close()
    plain.close()
    both = [a + b for a, b in zip(ours, made, strict=True)]
    for name, found in (("journal, stored", ours), ("made and stored", both), ("plain SQLite", theirs)):
        print(f"{name}: {BATCH / statistics.median(found):,.0f} records/s in batches of {BATCH}")
    print(f"ratio of medians {statistics.median(ours) / statistics.median(theirs):.2f}")


def _offline(folder: Path) -> None:
    count = DAYS * FEATURES * MINUTES_A_DAY
    store = _store(folder, "offline.db", limit_bytes=2**40)
    head = Head("0" * 16)
    for first in range(0, count, 5_000):
        head, records = _records(head, first, min(5_000, count - first))
        store.store_usage(StoreUsage(1, records, (), {}, 0))
    print(
        f"{DAYS} days offline, {FEATURES} features, {MINUTES_A_DAY} windows a day each: {count:,} records,"
        f" {store.used_bytes / 2**20:.1f} MiB, {store.used_bytes / count:.0f} bytes each"
    )
    store.close()
    print(f"opened and checked in {_timed(lambda: _store(folder, 'offline.db').close()):.2f} s")
    store = _store(folder, "offline.db")
    begun, first, batches = time.perf_counter(), 1, 0
    while first <= count:
        store.mark_sent(first, BATCH)
        sent = store.marked(first, BATCH)
        first, batches = first + len(sent), batches + 1
        store.store_receipt(first - 1, bytes(150), bytes(64))
    spent_s = time.perf_counter() - begun
    print(f"the store's part of its upload: {batches} batches in {spent_s:.1f} s, receipts included")
    begun = time.perf_counter()
    store.limit_bytes = 1
    while store.make_room(START_MS).name == "PRUNED":
        pass
    print(f"all of it removed after its receipt, sums kept: {time.perf_counter() - begun:.1f} s")
    store.close()


def _merge(folder: Path) -> None:
    count = DAYS * FEATURES * MINUTES_A_DAY
    store = _store(folder, "merge.db", limit_bytes=2**40)
    head = Head("0" * 16)
    for first in range(0, count, 5_000):
        head, records = _records(head, first, min(5_000, count - first))
        store.store_usage(StoreUsage(1, records, (), {}, 0))
    spent_s = _timed(store.merge_unsent)
    print(f"{count:,} windows merged into {store.head().seq - count} in {spent_s:.1f} s")
    store.close()


def main() -> None:
    """Prints the figures."""
    with tempfile.TemporaryDirectory(prefix="openfod-") as made:
        for part in (_batches, _offline, _merge):
            part(Path(made))
