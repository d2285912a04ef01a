"""Takes usage: verifies a batch, checks its chain, stores each record once and for ever.

`verify` is pure. `take` works inside one transaction, so that a receipt is
stored with the records that it names, or neither is. Record bytes are kept as
received and never serialised again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf.message import DecodeError

from cloud.catalogue import Catalogue
from cloud.errors import (
    BeginError,
    ChainError,
    EndedJournalError,
    ForeignUsageError,
    ForkError,
    MalformedUsageError,
    MergeError,
    NotFoundError,
    NotPossibleError,
    TooManyJournalsError,
    UsageSignatureError,
)
from cloud.store import JournalRestartRow, ReceiptRow, Transaction, UsageRow
from openfod.usage.v1 import usage_pb2

MAX_BATCH_RECORDS = 1_000
"""Most records in one batch."""
MAX_RECORD_BYTES = 2_048
"""Largest record."""
MAX_BATCH_BYTES = MAX_BATCH_RECORDS * (MAX_RECORD_BYTES + 64)
"""Largest serialised batch."""
MAX_VALUE = 10**12
"""Most units in one window: 31 years in milliseconds, and sums stay exact."""
MAX_SEQ = 2**53
"""Highest position in a journal."""
MAX_DIMENSIONS = 4
"""Most dimensions of one record."""
MAX_TEXT = 100
"""Longest identifier in a record, characters."""
MAX_JOURNALS = 64
"""Most journals of one vehicle; a new one begins when an agent's database was lost."""
MAX_MERGE_RECORDS = 10_000
"""Most records that one merge leaves behind: one for each meter, right and set of dimensions."""
NOBODYS_EPOCH = 0
"""Owner epoch of use that no right of the vehicle explains."""
MAX_SHOWN = 64
"""Longest piece of a found value that an error repeats, characters."""

BATCH_CONTEXT = b"openfod.usage.batch.v1\x00"
"""What a batch's signature covers before the batch."""
RECEIPT_CONTEXT = b"openfod.usage.receipt.v1\x00"
"""What a receipt's signature covers before the receipt."""
RESTART_CONTEXT = b"openfod.usage.restart.v1\x00"
"""What a restart's signature covers before the restart."""
SEALED_CONTEXT = b"openfod.usage.sealed.v1\x00"
"""What a sealed record is bound to, before the journal's identifier."""
SEALED_EXTRA_BYTES = 48
"""By how much sealing lengthens a record: an encapsulated X25519 key and a tag."""

_JOURNAL = re.compile(r"[0-9a-f]{16}")
_GENESIS = bytes(32)
# An agent that was down may have missed nothing, or an amount that it does not know.
_REASONS_WITHOUT_GAP = (usage_pb2.GAP_REASON_UNSPECIFIED, usage_pb2.GAP_REASON_AGENT_DOWN)
_UNITS = {
    "duration": usage_pb2.UNIT_MILLISECOND,
    "distance": usage_pb2.UNIT_METRE,
    "energy": usage_pb2.UNIT_MILLIWATT_HOUR,
    "count": usage_pb2.UNIT_ONE,
}

Units = Mapping[tuple[str, str], frozenset[int]]
"""By feature and meter: the units in which it counts."""


class Merged(NamedTuple):
    """The range of windows that were removed on the vehicle, as all records of one merge name it."""

    first_seq: int
    last_seq: int
    before_hash: bytes


class Link(NamedTuple):
    """What a record says of its place.

    Args:
        after_seq, after_hash: the record before it, across a hole that a merge left.
        merged: the windows that it stands for, if it does.
        windows: how many of them.
    """

    after_seq: int
    after_hash: bytes
    merged: Merged | None
    windows: int

    def goes_on(self, seq: int) -> bool:
        """True for a record of a merge that is not the first behind the hole."""
        return self.merged is not None and self.merged.last_seq != seq - 1


@dataclass(frozen=True)
class Batch:
    """A verified batch: at least one record, chained in itself; holes are those of merges.

    Args:
        links, entitlement_ids: of each row.
    """

    journal_id: str
    rows: Sequence[UsageRow]
    links: Sequence[Link]
    entitlement_ids: Sequence[str]
    trace_ids: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """What was stored: the receipt as serialised, and how many records were new.

    Args:
        begun_anew: it began a journal though the vehicle had used another, and no restart explains that.
    """

    receipt: bytes
    through_seq: int
    new_records: int
    begun_anew: bool = False


def units(catalogue: Catalogue) -> Units:
    """The units of all meters that any release of the catalogue describes."""
    found: dict[tuple[str, str], frozenset[int]] = {}
    for feature_id, releases in catalogue.releases.items():
        for release in releases:
            for meter_id, kind in release.meters.items():
                known = found.get((feature_id, meter_id), frozenset())
                found[feature_id, meter_id] = known | {_UNITS[kind]}
    return found


def archive_key(receipt: Ed25519PrivateKey) -> X25519PrivateKey:
    """The key that opens what vehicles seal of former owners; derived from the one that announces it."""
    derived = HKDF(hashes.SHA256(), 32, salt=None, info=b"openfod.usage.archive.v1\x00")
    return X25519PrivateKey.from_private_bytes(derived.derive(receipt.private_bytes_raw()))


def verify(
    signed: usage_pb2.SignedUsageBatch,
    key: ec.EllipticCurvePublicKey,
    source: str,
    units: Units,
    archive: Sequence[X25519PrivateKey],
) -> Batch:
    """Verifies a batch as received.

    Args:
        key: the device key of the stream that brought it.
        source: pseudonym of the vehicle of that stream.
        units: of the meters that the catalogue knows. Use of another meter is
            kept as it came; no price can name it.
        archive: each opens records of former owners (`archive_key`), the present key first.

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
        raise ForeignUsageError(
            f"batch: source is {batch.source[:MAX_SHOWN]!r}, this stream's vehicle is {source!r}"
        )
    if not _JOURNAL.fullmatch(batch.journal_id):
        raise MalformedUsageError(
            f"batch: journal_id: expected 16 hex digits, found {batch.journal_id[:MAX_SHOWN]!r}"
        )
    if not 1 <= len(batch.records) <= MAX_BATCH_RECORDS:
        raise MalformedUsageError(
            f"batch: expected 1 to {MAX_BATCH_RECORDS} records, found {len(batch.records)}"
        )
    contents = _opened(batch, archive)
    records = [_record(content, source, batch.journal_id, units) for content in contents]
    rows = [
        UsageRow(batch.journal_id, record.seq, content, hashlib.sha256(content).digest())
        for content, record in zip(contents, records, strict=True)
    ]
    links = [_link(record) for record in records]
    for before, row, before_link, link in zip(rows, rows[1:], links, links[1:], strict=False):
        if link.after_seq != before.seq:
            raise ChainError(f"batch: seq {row.seq} follows {before.seq}; there must be no hole")
        if link.after_hash != before.hash:
            raise ChainError(f"batch: record {row.seq} does not name the hash of the record before it")
        if link.goes_on(row.seq) and link.merged != before_link.merged:
            raise MergeError(
                f"batch: record {row.seq} stands for windows that the one before it does not name"
            )
    traces = tuple(sorted({record.trace_id for record in records if record.trace_id}))
    return Batch(batch.journal_id, rows, links, [record.entitlement_id for record in records], traces)


def _link(record: usage_pb2.UsageRecord) -> Link:
    if not record.HasField("merged"):
        return Link(record.seq - 1, record.prev_hash, None, 0)
    found = record.merged
    merged = Merged(found.first_seq, found.last_seq, found.before_hash)
    if merged.last_seq != record.seq - 1:
        return Link(record.seq - 1, record.prev_hash, merged, found.records)
    return Link(merged.first_seq - 1, merged.before_hash, merged, found.records)


def _opened(batch: usage_pb2.UsageBatch, archive: Sequence[X25519PrivateKey]) -> list[bytes]:
    """The records as the journal was written; those of former owners are opened."""
    contents = list(batch.records)
    if not batch.sealed:
        return contents
    if list(batch.sealed) != sorted(set(batch.sealed)) or batch.sealed[-1] >= len(contents):
        raise MalformedUsageError("batch: sealed: expected positions of its records, ascending, each once")
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    info = SEALED_CONTEXT + batch.journal_id.encode()
    for position in batch.sealed:
        size, limit = len(contents[position]), MAX_RECORD_BYTES + SEALED_EXTRA_BYTES
        if size > limit:
            raise MalformedUsageError(f"batch: sealed record: {size} bytes, expected at most {limit}")
        for key in archive:
            with contextlib.suppress(InvalidTag, ValueError):
                contents[position] = suite.decrypt(contents[position], key, info=info)
                break
        else:
            raise MalformedUsageError(
                f"batch: sealed record at position {position}: sealed to none of this cloud's {len(archive)}"
                " archive keys (receipt.old_keys) for this journal, or changed since"
            )
    return contents


def claimed_journal(signed: usage_pb2.SignedUsageBatch) -> str:
    """The journal that a refused batch says it is of, for the refusal only; empty if it says none."""
    if len(signed.batch) > MAX_BATCH_BYTES:
        return ""
    try:
        journal_id = usage_pb2.UsageBatch.FromString(signed.batch).journal_id
    except DecodeError:
        return ""
    return journal_id if _JOURNAL.fullmatch(journal_id) else ""


def _record(content: bytes, source: str, journal_id: str, units: Units) -> usage_pb2.UsageRecord:
    if len(content) > MAX_RECORD_BYTES:
        raise MalformedUsageError(
            f"record: {len(content)} bytes are more than the limit of {MAX_RECORD_BYTES}"
        )
    try:
        record = usage_pb2.UsageRecord.FromString(content)
    except DecodeError as error:
        raise MalformedUsageError("record: not a UsageRecord") from error
    if record.source != source:
        raise ForeignUsageError(
            f"record: source is {record.source[:MAX_SHOWN]!r}, this stream's vehicle is {source!r}"
        )
    if not 1 <= record.seq <= MAX_SEQ:
        raise MalformedUsageError(f"record: seq: expected 1 to {MAX_SEQ}, found {record.seq}")
    where = f"record {record.seq}"
    if record.id != f"{journal_id}/{record.seq}":
        raise MalformedUsageError(
            f"{where}: id: expected {journal_id}/{record.seq}, found {record.id[:MAX_SHOWN]!r}"
        )
    problem = next(_record_problems(record, units), None)
    if problem is not None:
        raise MalformedUsageError(f"{where}: {problem}")
    return record


def _record_problems(record: usage_pb2.UsageRecord, units: Units) -> Iterator[str]:
    """What is not as the contract says, beside the record's place in the journal."""
    if record.unit not in usage_pb2.Unit.values()[1:]:
        yield f"unit: {record.unit} is none of the contract"
    expected = units.get((record.feature_id, record.meter_id))
    if expected is not None and record.unit not in expected:
        names = " or ".join(usage_pb2.Unit.Name(unit) for unit in sorted(expected))  # type: ignore[arg-type]
        yield f"unit: expected {names}, in which the meter counts, found {record.unit}"
    if record.clock_trust not in usage_pb2.ClockTrust.values()[1:]:
        yield f"clock_trust: {record.clock_trust} is none of the contract"
    if record.gap_reason not in usage_pb2.GapReason.values():
        yield f"gap_reason: {record.gap_reason} is none of the contract"
    elif record.gap and not record.gap_reason:
        yield f"gap_reason: missing; gap is {record.gap}"
    elif record.gap_reason not in _REASONS_WITHOUT_GAP and not (record.gap or record.gap_unbounded):
        yield f"gap_reason: {usage_pb2.GapReason.Name(record.gap_reason)} without a gap"
    for name in ("value", "gap"):
        if getattr(record, name) > MAX_VALUE:
            yield f"{name}: {getattr(record, name)} is more than {MAX_VALUE}"
    if len(record.prev_hash) != len(_GENESIS):
        yield f"prev_hash: expected {len(_GENESIS)} bytes, found {len(record.prev_hash)}"
    if record.HasField("merged"):
        yield from _merge_problems(record)
    if record.window_start_ms < 0:
        yield f"window_start_ms: expected at least 0, found {record.window_start_ms}"
    if record.window_end_ms < record.window_start_ms:
        yield "the window ends before it starts"
    if len(record.dimensions) > MAX_DIMENSIONS:
        yield f"more than {MAX_DIMENSIONS} dimensions"
    if len({d.name for d in record.dimensions}) < len(record.dimensions):
        yield "dimensions: a name occurs more than once"
    texts = [record.subject, record.feature_id, record.meter_id, record.entitlement_id, record.trace_id]
    texts += [text for d in record.dimensions for text in (d.name, d.value)]
    if any(len(text) > MAX_TEXT for text in texts):
        yield f"a text is longer than {MAX_TEXT} characters"


def _merge_problems(record: usage_pb2.UsageRecord) -> Iterator[str]:
    merged = record.merged
    if not 1 <= merged.first_seq <= merged.last_seq < record.seq:
        yield f"merged: expected a range before {record.seq}, found {merged.first_seq} to {merged.last_seq}"
    elif not 1 <= merged.records <= merged.last_seq - merged.first_seq + 1:
        yield f"merged: {merged.records} windows in the range from {merged.first_seq} to {merged.last_seq}"
    if record.seq - merged.last_seq > MAX_MERGE_RECORDS:
        yield f"merged: more than {MAX_MERGE_RECORDS} records of one merge"
    if len(merged.before_hash) != len(_GENESIS):
        yield f"merged: before_hash: expected {len(_GENESIS)} bytes, found {len(merged.before_hash)}"


def take(tx: Transaction, vin: str, source: str, batch: Batch, key: Ed25519PrivateKey, now_ms: int) -> Taken:
    """Stores what is new of a verified batch, and its receipt.

    A record that is stored already must have the same bytes; it is not stored
    again.

    Args:
        vin, source: the vehicle and its pseudonym.
        key: receipt key.
        now_ms: Unix milliseconds.

    Raises:
        ChainError: the batch does not continue the stored journal; ForkError if it is another one,
            BeginError if it is a new one that may not begin like this, MergeError if it stands for
            windows that do not fit.
        EndedJournalError: an operator's word has ended the journal before it.
        TooManyJournalsError: it begins a journal, and the vehicle has MAX_JOURNALS.
    """
    vehicle = tx.lock_vehicle(vin)  # two streams of one vehicle must not read the same head
    stored = tx.receipt(source, batch.journal_id)
    head = stored.through_seq if stored else 0
    new_from = next((i for i, row in enumerate(batch.rows) if row.seq > head), len(batch.rows))
    ended = stored is not None and any(r.journal_id == batch.journal_id for r in tx.journal_restarts(source))
    try:
        _check_known(tx, source, batch, new_from, head)
        if new_from < len(batch.rows):
            _check_next(tx, source, batch, new_from, stored)
    except ForkError as error:
        if ended:  # two histories are what the restart is about
            raise EndedJournalError(batch.journal_id, head) from error
        raise
    fresh = batch.rows[new_from:]
    if stored and not fresh:
        return Taken(_with_archive_key(tx, source, batch.journal_id, stored, key), head, 0)
    if ended:
        raise EndedJournalError(batch.journal_id, head)
    begun_anew = stored is None and _begin(tx, source, batch)
    first_owner = vehicle is None or vehicle.owner_epoch == 1
    epochs = [1] * len(fresh) if first_owner else _owner_epochs(tx, vin, batch.entitlement_ids[new_from:])
    tx.add_usage(source, fresh, epochs, now_ms)
    last = fresh[-1]
    receipt = usage_pb2.UsageReceipt(
        source=source,
        journal_id=batch.journal_id,
        through_seq=last.seq,
        head_hash=last.hash,
        stored_ms=now_ms,
        archive_key=archive_key(key).public_key().public_bytes_raw(),
    )
    content = _signed(receipt, key)
    tx.put_receipt(source, batch.journal_id, ReceiptRow(last.seq, last.hash, content))
    return Taken(content, last.seq, len(fresh), begun_anew)


def _check_known(tx: Transaction, source: str, batch: Batch, new_from: int, head: int) -> None:
    """What is stored already must be the same; a position that a merge removed is taken by that merge."""
    before = batch.links[0]
    received = [(row.seq, row.hash, True) for row in batch.rows[:new_from]]
    if 1 <= before.after_seq <= head:
        received.insert(0, (before.after_seq, before.after_hash, False))
    if not received:
        return
    known = tx.usage_hashes(source, batch.journal_id, [seq for seq, _, _ in received])
    for seq, digest, exact in received:
        found = known.get(seq)
        if found is None:
            merge = tx.usage_at(source, batch.journal_id, seq)
            found = merge.hash if merge else _GENESIS
        if found != digest:
            raise ForkError(batch.journal_id, seq, stored=found, received=digest, exact=exact)


def _check_next(tx: Transaction, source: str, batch: Batch, new_from: int, stored: ReceiptRow | None) -> None:
    """The first record that is not stored must stand right behind the head."""
    row, link = batch.rows[new_from], batch.links[new_from]
    head = stored.through_seq if stored else 0
    if link.after_seq > head:
        raise ChainError(
            f"batch begins at seq {link.after_seq + 1}; the journal ends at {head}, so {head + 1} is next"
        )
    if link.after_seq < head:  # a merge of windows of which this cloud holds some
        overlapped = tx.usage_at(source, batch.journal_id, link.after_seq + 1)
        raise ForkError(
            batch.journal_id,
            link.after_seq + 1,
            stored=overlapped.hash if overlapped else _GENESIS,
            received=row.hash,
        )
    first, merged, earlier = batch.rows[0], batch.links[0].merged, 0
    if merged is not None and batch.links[0].goes_on(first.seq):
        group = tx.usage_contents(source, batch.journal_id, merged.last_seq + 1, first.seq - 1)
        links = [_link(usage_pb2.UsageRecord.FromString(content)) for content in group]
        if not links or any(found.merged != merged for found in links):
            raise MergeError(
                f"batch: record {first.seq} stands for windows that the stored ones before it do not name"
            )
        earlier = sum(found.windows for found in links)
    _check_counts(batch, earlier)


def _check_counts(batch: Batch, earlier: int) -> None:
    """No merge stands for more windows than its range has positions.

    Args:
        earlier: windows for which stored records of the first merge stand.
    """
    merged: Merged | None = batch.links[0].merged
    windows = earlier
    for row, link in zip(batch.rows, batch.links, strict=True):
        if link.merged is None:
            continue
        if link.merged != merged:
            merged, windows = link.merged, 0
        windows += link.windows
        if windows > link.merged.last_seq - link.merged.first_seq + 1:
            raise MergeError(f"batch: by record {row.seq}, a merge stands for more windows than it removed")


def _begin(tx: Transaction, source: str, batch: Batch) -> bool:
    """Judges the first record of a new journal; True if the vehicle has used another, unended one.

    Such a journal is taken all the same: it can only add to what is billed, and to
    refuse it would reward who wipes a disk to be rid of what was not sent yet.
    """
    used = tx.journals(source)
    if used >= MAX_JOURNALS:
        raise TooManyJournalsError(
            f"the vehicle has begun {MAX_JOURNALS} journals, the limit; nothing is stored"
        )
    named, row = batch.links[0].after_hash, batch.rows[0]
    if named == _GENESIS:
        return used > 0
    restart = next((r for r in tx.journal_restarts(source) if r.head_hash == named), None)
    if restart is None:
        follows = tx.journal_with_head(source, named)
        where = (
            f"the end of journal {follows}, which no operator has ended"
            if follows
            else "what is unknown here"
        )
        raise BeginError(
            batch.journal_id,
            f"begins with a record that names {where}; expected 32 zero bytes, or "
            "head_hash of a restart that an operator confirmed: fod-cloud vehicle restart-journal",
            follows=follows,
        )
    if restart.successor:
        first = tx.usage_at(source, restart.successor, 1)
        raise ForkError(
            batch.journal_id,
            1,
            stored=first.hash if first else _GENESIS,
            received=row.hash,
            stored_in=restart.successor,
        )
    tx.put_journal_restart(source, dataclasses.replace(restart, successor=batch.journal_id))
    return False


def restart(
    tx: Transaction, source: str, journal_id: str, fork_seq: int, key: Ed25519PrivateKey, now_ms: int
) -> usage_pb2.JournalRestart:
    """Ends a journal at its head by an operator's word; only a new one that names the head goes on.

    Args:
        source: the vehicle's pseudonym.
        fork_seq: first position at which cloud and vehicle hold different records.
        key: receipt key.
        now_ms: Unix milliseconds.

    Raises:
        NotFoundError: nothing was taken of this journal.
        NotPossibleError: it has ended already.
    """
    stored = tx.receipt(source, journal_id)
    if stored is None:
        raise NotFoundError(f"nothing was taken of journal {journal_id}; nothing was changed")
    if any(row.journal_id == journal_id for row in tx.journal_restarts(source)):
        raise NotPossibleError(f"journal {journal_id} has ended already; nothing was changed")
    made = usage_pb2.JournalRestart(
        source=source,
        journal_id=journal_id,
        fork_seq=fork_seq,
        head_seq=stored.through_seq,
        head_hash=stored.head_hash,
        confirmed_ms=now_ms,
    )
    content = made.SerializeToString(deterministic=True)
    signed = usage_pb2.SignedJournalRestart(restart=content, signature=key.sign(RESTART_CONTEXT + content))
    tx.put_journal_restart(
        source,
        JournalRestartRow(
            journal_id, stored.through_seq, stored.head_hash, signed.SerializeToString(deterministic=True), ""
        ),
    )
    return made


def open_restarts(tx: Transaction, source: str) -> list[usage_pb2.SignedJournalRestart]:
    """The restarts of a vehicle's journals behind which no new one was seen yet."""
    rows = tx.journal_restarts(source)
    return [usage_pb2.SignedJournalRestart.FromString(row.content) for row in rows if not row.successor]


def latest_receipt(tx: Transaction, source: str, journal_id: str, key: Ed25519PrivateKey) -> bytes | None:
    """The newest receipt of a journal as serialised, with the archive key; None if nothing was taken of it.

    Args:
        source: the vehicle's pseudonym.
        key: receipt key.
    """
    stored = tx.receipt(source, journal_id)
    return None if stored is None else _with_archive_key(tx, source, journal_id, stored, key)


def _with_archive_key(
    tx: Transaction, source: str, journal_id: str, stored: ReceiptRow, key: Ed25519PrivateKey
) -> bytes:
    """The stored receipt; signed anew if it is of another key, or of a time before archive keys."""
    receipt = usage_pb2.UsageReceipt.FromString(
        usage_pb2.SignedUsageReceipt.FromString(stored.content).receipt
    )
    public = archive_key(key).public_key().public_bytes_raw()
    if receipt.archive_key == public:
        return stored.content
    receipt.archive_key = public
    content = _signed(receipt, key)
    tx.put_receipt(source, journal_id, ReceiptRow(stored.through_seq, stored.head_hash, content))
    return content


def _signed(receipt: usage_pb2.UsageReceipt, key: Ed25519PrivateKey) -> bytes:
    content = receipt.SerializeToString(deterministic=True)
    signed = usage_pb2.SignedUsageReceipt(receipt=content, signature=key.sign(RECEIPT_CONTEXT + content))
    return signed.SerializeToString(deterministic=True)


def _owner_epochs(tx: Transaction, vin: str, entitlement_ids: Iterable[str]) -> list[int]:
    """The owner that each record belongs to by its right, however late it comes.

    A record of a right that this cloud does not know belongs to none.
    """
    epochs = {right.entitlement_id: right.owner_epoch for right in tx.entitlements(vin)}
    return [epochs.get(entitlement_id, NOBODYS_EPOCH) for entitlement_id in entitlement_ids]
