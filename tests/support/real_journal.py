"""A store with real records in it: many windows, receipts, merges."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from agent.adapters.store import Room, Store
from agent.events import StoreUsage
from agent.metering.record import Head, Record, Use, append
from agent.model import MeterKind
from openfod.usage.v1 import usage_pb2

BOOT, JOURNAL, SOURCE = "boot-1", "00112233445566aa", "veh-0123456789abcdef"
START_MS = 1_800_000_000_000
DAY_MS = 24 * 3600 * 1000
LIMIT_BYTES = 400_000


def use(number: int, *, features: int = 10, **changes: object) -> Use:
    """The window of one minute of one feature, a little different each time."""
    base = Use(
        feature_id=f"feature-{number % features}",
        meter_id="active-time",
        kind=MeterKind.DURATION,
        entitlement_id=f"ent-{number % features:016x}",
        account="acc-4711",
        trace_id=f"{number:032x}",
        dimensions=(("motion", "driving" if number % 3 else "parked"),),
        value=59_000 + number % 1000,
        gap=number % 7,
        gap_reason="EDGE" if number % 7 else "",
        start_ms=START_MS + number // features * 60_000,
        end_ms=START_MS + number // features * 60_000 + 60_000,
        signed_clock=True,
    )
    return base._replace(**changes)  # type: ignore[arg-type]


class RealJournal:
    """A store and where its journal ends; keeps every window that was ever booked, to compare with."""

    def __init__(self, path: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.path, self._limit_bytes = path, limit_bytes
        self._numbers = itertools.count(1)
        self.booked: list[usage_pb2.UsageRecord] = []
        self.open()

    def open(self) -> None:
        """Opens the store anew."""
        self.store = Store(self.path, boot_id=BOOT, journal_id=JOURNAL, limit_bytes=self._limit_bytes)
        self.head: Head = self.store.load().head

    def add(self, count: int, make: Callable[[int], Use] = use) -> None:
        """Books windows, in commits of at most 1,000."""
        while count:
            piece = min(count, 1_000)
            records = []
            head = self.head
            for _ in range(piece):
                head, record = append(head, SOURCE, make(next(self._numbers)))
                records.append(record)
            self.store.store_usage(StoreUsage(1, tuple(records), (), {}, START_MS))
            self.head = head
            self.booked += read(records)
            count -= piece

    def acknowledge(self, through_seq: int) -> None:
        """The cloud has signed for everything up to here."""
        self.store.mark_sent(1, through_seq)
        self.store.store_receipt(through_seq, f"receipt {through_seq}".encode(), b"signature")

    def make_room(self, now_ms: int = START_MS) -> Room:
        """Makes room until there is no more to be had without a merge."""
        while (room := self.store.make_room(now_ms)) is Room.PRUNED:
            pass
        return room

    def kept(self) -> list[usage_pb2.UsageRecord]:
        """The records that the store holds."""
        return [usage_pb2.UsageRecord.FromString(r.content) for r in self.store.records(0, 2**62)]


def read(records: Iterable[Record]) -> list[usage_pb2.UsageRecord]:
    """The messages of records."""
    return [usage_pb2.UsageRecord.FromString(record.content) for record in records]


def totals(records: Iterable[usage_pb2.UsageRecord]) -> dict[tuple[object, ...], tuple[int, int]]:
    """Value and gap by right and dimensions."""
    found: dict[tuple[object, ...], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for r in records:
        key = (r.entitlement_id, r.meter_id, tuple((d.name, d.value) for d in r.dimensions))
        value, gap = found[key]
        found[key] = value + r.value, gap + r.gap
    return dict(found)


def follow_chain(records: Iterable[usage_pb2.UsageRecord]) -> None:
    """Follows a chain from its first record, across what merges removed."""
    seq, digest = 0, bytes(32)
    removed: tuple[int, int] | None = None
    for record in records:
        if record.HasField("merged") and record.seq != seq + 1:
            assert (record.merged.first_seq, record.merged.before_hash) == (seq + 1, digest)
            assert record.seq == record.merged.last_seq + 1
            removed = (record.merged.first_seq, record.merged.last_seq)
        else:
            assert (record.seq, record.prev_hash) == (seq + 1, digest), removed
        seq = record.seq
        digest = hashlib.sha256(record.SerializeToString(deterministic=True)).digest()
