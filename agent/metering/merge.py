"""Merges windows that were never sent, when the journal is full: resolution is lost, sums never are.

Pure. Works on records as they stand in the journal. A merge takes every record
behind the last one that may have left the vehicle, up to the head, and appends
one record for each (feature, meter, right, account, unit, dimensions, clock
trust). The removed range and the hash in front of it stand in each of them
(`MergedWindows`), so that the chain can be followed across the hole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from google.protobuf.message import DecodeError

from agent.errors import JournalError
from agent.metering.ledger import MAX_AMOUNT
from agent.metering.record import MAX_RECORD_BYTES, Head, Record
from openfod.usage.v1 import usage_pb2


class Kept(NamedTuple):
    """The record behind which everything is merged: the last one that may have been sent.

    Args:
        seq: its position, 0 if there is none.
        hash: what a record at seq + 1 names as the hash before it.
    """

    seq: int
    hash: bytes


@dataclass(slots=True)
class _Sum:
    """What the records of one key add up to.

    Args:
        latest: the last of them: whatever is no sum is taken from it.
        gaps: by GapReason.
    """

    latest: usage_pb2.UsageRecord
    value: int = 0
    records: int = 0
    start_ms: int = 2**63 - 1
    end_ms: int = 0
    unbounded: bool = False
    ecu_reading: bytes = b""
    gaps: dict[int, int] = field(default_factory=dict)
    open_reason: int = 0

    def add(self, record: usage_pb2.UsageRecord) -> None:
        self.latest = record
        self.value += record.value
        self.records += record.merged.records if record.HasField("merged") else 1
        self.start_ms = min(self.start_ms, record.window_start_ms)
        self.end_ms = max(self.end_ms, record.window_end_ms)
        self.ecu_reading = record.ecu_reading or self.ecu_reading  # it is cumulative: the last one counts
        if record.gap_reason:
            self.gaps[record.gap_reason] = self.gaps.get(record.gap_reason, 0) + record.gap
        if record.gap_unbounded:
            self.unbounded, self.open_reason = True, self.open_reason or record.gap_reason

    @property
    def reason(self) -> int:
        """The reason of the largest part of the gap; without a known part, that of the unbounded one."""
        if not any(self.gaps.values()) and self.open_reason:
            return self.open_reason
        # Of equal parts the first in the contract's order: the same records give the same bytes.
        return max(sorted(self.gaps), key=lambda reason: self.gaps[reason], default=0)

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """(value, gap, records) of each record that it takes: none holds more than MAX_AMOUNT of either."""
        value, gap, records = self.value, sum(self.gaps.values()), self.records
        count = max(1, -(-value // MAX_AMOUNT), -(-gap // MAX_AMOUNT))
        for further in reversed(range(count)):
            part = min(value, MAX_AMOUNT), min(gap, MAX_AMOUNT)
            value, gap = value - part[0], gap - part[1]
            yield *part, records - further if further == count - 1 else 1


def merge(head: Head, kept: Kept, contents: Iterable[bytes]) -> tuple[Head, tuple[Record, ...]]:
    """Sums up the records behind `kept`.

    Args:
        head: end of the journal: the last record that is summed up.
        contents: all records behind `kept`, in their order.

    Returns:
        The new end of the journal, and the records that take the others' place.

    Raises:
        JournalError: one of them cannot be read.
    """
    sums: dict[tuple[object, ...], _Sum] = {}
    for content in contents:
        record = parsed(content)
        key = _key(record)
        found = sums.get(key)
        if found is None:
            sums[key] = found = _Sum(record)
        found.add(record)
    merged, last_seq = [], head.seq
    for total in sums.values():
        for value, gap, records in total.parts():
            message = usage_pb2.UsageRecord()
            message.CopyFrom(total.latest)
            message.value, message.gap = value, gap
            message.window_start_ms, message.window_end_ms = total.start_ms, total.end_ms
            message.gap_unbounded = total.unbounded
            message.gap_reason = total.reason  # type: ignore[assignment]
            if not gap and not total.unbounded and message.gap_reason != usage_pb2.GAP_REASON_AGENT_DOWN:
                message.gap_reason = usage_pb2.GAP_REASON_UNSPECIFIED
            message.ecu_reading = total.ecu_reading
            message.merged.first_seq, message.merged.last_seq = kept.seq + 1, last_seq
            message.merged.before_hash, message.merged.records = kept.hash, records
            head, made = _append(head, message)
            merged.append(made)
    return head, tuple(merged)


def rechain(head: Head, contents: Iterable[bytes]) -> tuple[Head, tuple[Record, ...]]:
    """Makes records anew behind another head: what they say stays, their place in the chain is new.

    What a record says of a merge is left out: the positions were the old journal's.

    Args:
        head: of the journal that they are moved into.

    Raises:
        JournalError: one of them cannot be read.
    """
    made = []
    for content in contents:
        message = parsed(content)
        message.ClearField("merged")
        head, record = _append(head, message)
        made.append(record)
    return head, tuple(made)


def stands_for(content: bytes, seq: int) -> bool:
    """Whether a record stands for the one at another position, which a merge removed.

    Raises:
        JournalError: it cannot be read.
    """
    merged = parsed(content).merged
    return merged.first_seq <= seq <= merged.last_seq


def _append(head: Head, message: usage_pb2.UsageRecord) -> tuple[Head, Record]:
    """Puts a message at the end of a journal."""
    seq = head.seq + 1
    message.id, message.seq, message.prev_hash = f"{head.journal_id}/{seq}", seq, head.hash
    content = message.SerializeToString(deterministic=True)
    if len(content) > MAX_RECORD_BYTES:
        raise JournalError(f"record {seq} has {len(content)} bytes, expected at most {MAX_RECORD_BYTES}")
    digest = hashlib.sha256(content).digest()
    return Head(head.journal_id, seq, digest), Record(seq, content, digest, message.entitlement_id)


def parsed(content: bytes) -> usage_pb2.UsageRecord:
    """A record of the journal.

    Raises:
        JournalError: it is none.
    """
    try:
        return usage_pb2.UsageRecord.FromString(content)
    except DecodeError as error:
        raise JournalError(f"a record of {len(content)} bytes cannot be read: {error}") from error


def _key(record: usage_pb2.UsageRecord) -> tuple[object, ...]:
    return (
        record.source,
        record.feature_id,
        record.meter_id,
        record.entitlement_id,
        record.subject,
        record.unit,
        tuple((d.name, d.value) for d in record.dimensions),
        record.clock_trust,
    )
