"""Usage records: built once, chained by hash, never serialised again.

Pure. A record is the serialised openfod.usage.v1.UsageRecord; its hash is
SHA-256 over exactly these bytes, and the next record carries it. The fields are
those of CloudEvents 1.0 (id, source, subject) and of the design's usage data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from agent.errors import JournalError
from agent.metering.meter import Dimensions
from agent.model import MeterKind
from openfod.usage.v1 import usage_pb2

GENESIS_HASH = bytes(32)
"""prev_hash of the first record of a journal."""
MAX_RECORD_BYTES = 2_048
"""Longest record that the contract allows."""
BATCH_DOMAIN = b"openfod.usage.batch.v1\x00"
"""What stands before a batch under its signature."""
RECEIPT_DOMAIN = b"openfod.usage.receipt.v1\x00"
"""What stands before a receipt under its signature."""
RESTART_DOMAIN = b"openfod.usage.restart.v1\x00"
"""What stands before a journal's restart under its signature."""

UNITS = {
    MeterKind.DURATION: usage_pb2.UNIT_MILLISECOND,
    MeterKind.DISTANCE: usage_pb2.UNIT_METRE,
    MeterKind.ENERGY: usage_pb2.UNIT_MILLIWATT_HOUR,
    MeterKind.COUNT: usage_pb2.UNIT_ONE,
}
"""The unit in which each kind of meter counts."""

GAP_REASONS = {
    "": usage_pb2.GAP_REASON_UNSPECIFIED,
    "EDGE": usage_pb2.GAP_REASON_EDGE,
    "AGENT_DOWN": usage_pb2.GAP_REASON_AGENT_DOWN,
    "SIGNAL": usage_pb2.GAP_REASON_SIGNAL,
    "BUS": usage_pb2.GAP_REASON_BUS,
    "JOURNAL": usage_pb2.GAP_REASON_JOURNAL,
    "COUNTER": usage_pb2.GAP_REASON_COUNTER,
}


class Head(NamedTuple):
    """Where a journal ends.

    Args:
        journal_id: 16 hex digits.
        seq: position of the last record, 0 if there is none.
        hash: SHA-256 of the last record, GENESIS_HASH if there is none.
    """

    journal_id: str
    seq: int = 0
    hash: bytes = GENESIS_HASH


class Use(NamedTuple):
    """One closed window of one meter, before it becomes a record.

    Args:
        value, gap: in ms or m, by the meter's kind; the truth lies in
            [value, value + gap].
        reading: what the ECU signs of its own count; empty if it has nothing new to say.
        gap_reason: a key of GAP_REASONS.
        start_ms, end_ms: window, trusted Unix milliseconds.
    """

    feature_id: str
    meter_id: str
    kind: MeterKind
    entitlement_id: str
    account: str
    trace_id: str
    dimensions: Dimensions
    value: int
    gap: int
    gap_reason: str
    start_ms: int
    end_ms: int
    signed_clock: bool
    gap_unbounded: bool = False
    reading: bytes = b""


class Record(NamedTuple):
    """A record as it stands in the journal.

    Args:
        entitlement_id: the right that it is of, as its content says.
    """

    seq: int
    content: bytes
    hash: bytes
    entitlement_id: str = ""


def append(head: Head, source: str, use: Use) -> tuple[Head, Record]:
    """Makes the next record of a journal.

    Args:
        source: the vehicle's pseudonym.

    Raises:
        JournalError: the record would be longer than the contract allows.
    """
    seq = head.seq + 1
    message = usage_pb2.UsageRecord(
        id=f"{head.journal_id}/{seq}",
        source=source,
        subject=use.account,
        feature_id=use.feature_id,
        meter_id=use.meter_id,
        value=use.value,
        unit=UNITS[use.kind],
        dimensions=[usage_pb2.Dimension(name=n, value=v) for n, v in use.dimensions],
        entitlement_id=use.entitlement_id,
        window_start_ms=use.start_ms,
        window_end_ms=use.end_ms,
        seq=seq,
        prev_hash=head.hash,
        clock_trust=(usage_pb2.CLOCK_TRUST_SIGNED if use.signed_clock else usage_pb2.CLOCK_TRUST_WEAK),
        gap=use.gap,
        gap_reason=GAP_REASONS[use.gap_reason],
        gap_unbounded=use.gap_unbounded,
        trace_id=use.trace_id,
        ecu_reading=use.reading,
    )
    content = message.SerializeToString(deterministic=True)
    if len(content) > MAX_RECORD_BYTES:
        raise JournalError(f"record {seq} has {len(content)} bytes, expected at most {MAX_RECORD_BYTES}")
    digest = hashlib.sha256(content).digest()
    return Head(head.journal_id, seq, digest), Record(seq, content, digest, use.entitlement_id)


def batch(source: str, journal_id: str, records: tuple[bytes, ...], sealed: Iterable[int] = ()) -> bytes:
    """Serialises a batch; the device signs BATCH_DOMAIN + these bytes.

    Args:
        sealed: positions in `records` of those that only the cloud can read.
    """
    message = usage_pb2.UsageBatch(
        source=source, journal_id=journal_id, records=list(records), sealed=sorted(sealed)
    )
    return message.SerializeToString(deterministic=True)
