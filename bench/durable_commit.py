"""One durable commit of the journal beside plain SQLite with the same settings, in one run."""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from agent.adapters.store import Store
from agent.events import StoreUsage
from agent.metering.record import Record

COMMITS = 300


def main() -> None:
    """Prints the median and the 99th percentile of a commit with one record of 300 bytes."""
    with tempfile.TemporaryDirectory(prefix="openfod-") as folder:
        store = Store(Path(folder) / "agent.db", boot_id="b", journal_id="0" * 16)
        plain = sqlite3.connect(Path(folder) / "plain.db", isolation_level=None)
        plain.execute("PRAGMA journal_mode=WAL")
        plain.execute("PRAGMA synchronous=FULL")
        plain.execute("CREATE TABLE record (seq INTEGER PRIMARY KEY, content BLOB)")
        content = bytes(300)
        ours, theirs = [], []
        for seq in range(1, COMMITS + 1):
            begun = time.perf_counter()
            store.store_usage(StoreUsage(seq, (Record(seq, content, bytes(32)),), (), {}, 0))
            ours.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            plain.execute("INSERT INTO record VALUES (?, ?)", (seq, content))
            theirs.append(time.perf_counter() - begun)
        store.close()
        plain.close()
    for name, found in (("journal", ours), ("plain SQLite", theirs)):
        ranked = sorted(found)
        print(
            f"{name}: p50 {ranked[COMMITS // 2] * 1e3:.2f} ms, p99 {ranked[COMMITS * 99 // 100] * 1e3:.2f} ms"
        )
    print(f"ratio of medians {statistics.median(ours) / statistics.median(theirs):.2f}")
