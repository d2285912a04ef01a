"""Takes usage: verifies a batch, checks its chain, stores each record once and for ever.

`verify` is pure. `take` works inside one transaction, so that a receipt is
stored with the records that it names, or neither is. Record bytes are kept as
received and never serialised again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from cloud.errors import ChainError, ForeignUsageError, MalformedUsageError, UsageSignatureError
from cloud.store import ReceiptRow, Transaction, UsageRow
from openfod.usage.v1 import usage_pb2

MAX_BATCH_RECORDS = 1_000
"""Most records in one batch."""
MAX_RECORD_BYTES = 2_048
"""Largest record."""
MAX_BATCH_BYTES = MAX_BATCH_RECORDS * (MAX_RECORD_BYTES + 16)
"""Largest serialised batch."""
MAX_VALUE = 10**12
"""Most units in one window: 31 years in milliseconds, and sums stay exact."""
MAX_SEQ = 2**53
"""Highest position in a journal."""
MAX_DIMENSIONS = 4
"""Most dimensions of one record."""
MAX_TEXT = 100
"""Longest identifier in a record, characters."""

BATCH_CONTEXT = b"openfod.usage.batch.v1\x00"
"""What a batch's signature covers before the batch."""
RECEIPT_CONTEXT = b"openfod.usage.receipt.v1\x00"
"""What a receipt's signature covers before the receipt."""

_JOURNAL = re.compile(r"[0-9a-f]{16}")
_GENESIS = bytes(32)


@dataclass(frozen=True)
class Batch:
    """A verified batch: at least one record, contiguous and chained in itself."""

    journal_id: str
    rows: Sequence[UsageRow]
    prev_hash: bytes
    trace_ids: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """What was stored: the receipt as serialised, and how many records were new."""

    receipt: bytes
    through_seq: int
    new_records: int


def verify(signed: usage_pb2.SignedUsageBatch, key: ec.EllipticCurvePublicKey, source: str) -> Batch:
    """Verifies a batch as received.

    Args:
        key: the device key of the stream that brought it.
        source: pseudonym of the vehicle of that stream.

    Raises:
        UsageSignatureError: another key signed it, or none.
        ForeignUsageError: it is another vehicle's.
        MalformedUsageError: it has not the form of the contract.
        ChainError: its records are no chain.
    """
    if len(signed.batch) > MAX_BATCH_BYTES:
        raise MalformedUsageError(
            f"batch: {len(signed.batch)} bytes are more than the limit of {MAX_BATCH_BYTES}"
        )
    try:
        key.verify(signed.signature, BATCH_CONTEXT + signed.batch, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise UsageSignatureError("batch: not signed by the device key of this stream; not read") from error
    try:
        batch = usage_pb2.UsageBatch.FromString(signed.batch)
    except DecodeError as error:
        raise MalformedUsageError("batch: not a UsageBatch") from error
    if batch.source != source:
        raise ForeignUsageError(f"batch: source is {batch.source!r}, this stream's vehicle is {source!r}")
    if not _JOURNAL.fullmatch(batch.journal_id):
        raise MalformedUsageError(f"batch: journal_id: expected 16 hex digits, found {batch.journal_id!r}")
    if not 1 <= len(batch.records) <= MAX_BATCH_RECORDS:
        raise MalformedUsageError(
            f"batch: expected 1 to {MAX_BATCH_RECORDS} records, found {len(batch.records)}"
        )
    rows: list[UsageRow] = []
    records = [_record(content, source, batch.journal_id) for content in batch.records]
    for content, record in zip(batch.records, records, strict=True):
        if rows and record.seq != rows[-1].seq + 1:
            raise ChainError(f"batch: seq {record.seq} follows {rows[-1].seq}; there must be no hole")
        if rows and record.prev_hash != rows[-1].hash:
            raise ChainError(f"batch: record {record.seq} does not name the hash of the record before it")
        rows.append(UsageRow(batch.journal_id, record.seq, content, hashlib.sha256(content).digest()))
    if records[0].seq == 1 and records[0].prev_hash != _GENESIS:
        raise ChainError("batch: record 1 must name 32 zero bytes as the hash before it")
    traces = tuple(sorted({record.trace_id for record in records if record.trace_id}))
    return Batch(batch.journal_id, rows, records[0].prev_hash, traces)


def claimed_journal(signed: usage_pb2.SignedUsageBatch) -> str:
    """The journal that a refused batch says it is of, for the refusal only; empty if it says none."""
    if len(signed.batch) > MAX_BATCH_BYTES:
        return ""
    try:
        journal_id = usage_pb2.UsageBatch.FromString(signed.batch).journal_id
    except DecodeError:
        return ""
    return journal_id if _JOURNAL.fullmatch(journal_id) else ""


def _record(content: bytes, source: str, journal_id: str) -> usage_pb2.UsageRecord:
    if len(content) > MAX_RECORD_BYTES:
        raise MalformedUsageError(
            f"record: {len(content)} bytes are more than the limit of {MAX_RECORD_BYTES}"
        )
    try:
        record = usage_pb2.UsageRecord.FromString(content)
    except DecodeError as error:
        raise MalformedUsageError("record: not a UsageRecord") from error
    if record.source != source:
        raise ForeignUsageError(f"record: source is {record.source!r}, this stream's vehicle is {source!r}")
    if not 1 <= record.seq <= MAX_SEQ:
        raise MalformedUsageError(f"record: seq: expected 1 to {MAX_SEQ}, found {record.seq}")
    where = f"record {record.seq}"
    if record.id != f"{journal_id}/{record.seq}":
        raise MalformedUsageError(f"{where}: id: expected {journal_id}/{record.seq}, found {record.id!r}")
    if record.unit not in usage_pb2.Unit.values()[1:]:
        raise MalformedUsageError(f"{where}: unit: {record.unit} is none of the contract")
    for name in ("value", "gap"):
        if getattr(record, name) > MAX_VALUE:
            raise MalformedUsageError(f"{where}: {name}: {getattr(record, name)} is more than {MAX_VALUE}")
    if record.window_end_ms < record.window_start_ms:
        raise MalformedUsageError(f"{where}: the window ends before it starts")
    if len(record.dimensions) > MAX_DIMENSIONS:
        raise MalformedUsageError(f"{where}: more than {MAX_DIMENSIONS} dimensions")
    texts = [record.subject, record.feature_id, record.meter_id, record.entitlement_id, record.trace_id]
    texts += [text for d in record.dimensions for text in (d.name, d.value)]
    if any(len(text) > MAX_TEXT for text in texts):
        raise MalformedUsageError(f"{where}: a text is longer than {MAX_TEXT} characters")
    return record


def take(tx: Transaction, source: str, batch: Batch, key: Ed25519PrivateKey, now_ms: int) -> Taken:
    """Stores what is new of a verified batch, and its receipt.

    A record that is stored already must have the same bytes; it is not stored
    again.

    Args:
        key: receipt key.
        now_ms: Unix milliseconds.

    Raises:
        ChainError: the batch does not continue the stored journal.
    """
    stored = tx.receipt(source, batch.journal_id)
    head = stored.through_seq if stored else 0
    first, last = batch.rows[0].seq, batch.rows[-1].seq
    if first > head + 1:
        raise ChainError(f"batch begins at seq {first}; the journal ends at {head}, so {head + 1} is next")
    known = tx.usage_hashes(source, batch.journal_id, max(first - 1, 1), min(last, head))
    if first > 1 and known[first - 1] != batch.prev_hash:
        raise ChainError(f"record {first} names another hash than that of stored record {first - 1}")
    for row in batch.rows:
        if row.seq <= head and known[row.seq] != row.hash:
            raise ChainError(f"record {row.seq} is stored with other bytes; the stored ones stay")
    fresh = [row for row in batch.rows if row.seq > head]
    if stored and not fresh:
        return Taken(stored.content, head, 0)
    tx.add_usage(source, fresh, now_ms)
    receipt = usage_pb2.UsageReceipt(
        source=source,
        journal_id=batch.journal_id,
        through_seq=last,
        head_hash=batch.rows[-1].hash,
        stored_ms=now_ms,
    ).SerializeToString(deterministic=True)
    signed = usage_pb2.SignedUsageReceipt(receipt=receipt, signature=key.sign(RECEIPT_CONTEXT + receipt))
    content = signed.SerializeToString(deterministic=True)
    tx.put_receipt(source, batch.journal_id, ReceiptRow(last, batch.rows[-1].hash, content))
    return Taken(content, last, len(fresh))
