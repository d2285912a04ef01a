"""Everything that was reported about this vehicle under its present owner: sums to read, and a file to keep.

Pure. An export holds the records as they were sent, the cloud's signed receipts,
and the sums of records that had to make room. It is checked without the vehicle:
records by their chain, receipts by the receipt key and by the hash of the record
that they name. Limit: who may write the file may leave out its latest records and
name an earlier end; the head that `fod-agent status` shows tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.message import DecodeError

from agent.errors import JournalError, StatementError, TrustError
from agent.metering.merge import parsed
from openfod.usage.v1 import usage_pb2

MAX_EXPORT_BYTES = 1024 * 1024 * 1024
"""Longest export that is read."""
FORM = 1
"""Form of the file that this code writes and reads."""

Dimensions = tuple[tuple[str, str], ...]
Verify = Callable[[bytes, bytes], usage_pb2.UsageReceipt]
"""Takes a receipt and its signature; raises TrustError if the receipt key did not sign it."""


@dataclass(slots=True)
class Amount:
    """What one right, meter and set of dimensions add up to, in the unit.

    Args:
        reported, reported_gap: what the cloud has signed for.
        waiting, waiting_gap: what it has not.
        receipts: by journal, the position up to which this is reported.
    """

    reported: int
    reported_gap: int
    waiting: int
    waiting_gap: int
    unbounded: bool
    windows: int
    first_ms: int
    last_ms: int
    receipts: dict[str, int]


class Key(NamedTuple):
    """What is told apart in a statement."""

    entitlement: str
    feature: str
    meter: str
    account: str
    unit: int
    dimensions: Dimensions


class Pruned(NamedTuple):
    """Records that had to make room after their receipt, as a sum."""

    journal: str
    key: Key
    value: int
    gap: int
    unbounded: bool
    records: int
    start_ms: int
    end_ms: int
    through_seq: int


class Checked(NamedTuple):
    """What an export was found to hold.

    Args:
        covered: records that a receipt in it covers.
        summed: records that are in it as sums alone.
        head: hash of the last record, hex; empty if there is none.
    """

    records: int
    covered: int
    receipts: int
    summed: int
    head: str


def amounts(
    records: Iterable[tuple[str, bytes]], pruned: Iterable[Pruned], acked: Mapping[str, int]
) -> dict[Key, Amount]:
    """Adds up what was used.

    Args:
        records: (journal, content).
        acked: by journal, the position up to which the cloud has signed.

    Raises:
        JournalError: a record cannot be read.
    """
    found: dict[Key, Amount] = {}
    for part in pruned:
        _add(found, part, is_reported=True)
    for journal, content in records:
        record = parsed(content)
        part = Pruned(
            journal,
            Key(
                record.entitlement_id,
                record.feature_id,
                record.meter_id,
                record.subject,
                record.unit,
                tuple((d.name, d.value) for d in record.dimensions),
            ),
            record.value,
            record.gap,
            record.gap_unbounded,
            record.merged.records if record.HasField("merged") else 1,
            record.window_start_ms,
            record.window_end_ms,
            record.seq,
        )
        _add(found, part, is_reported=record.seq <= acked.get(journal, 0))
    return dict(sorted(found.items()))


def _add(found: dict[Key, Amount], part: Pruned, *, is_reported: bool) -> None:
    amount = found.setdefault(part.key, Amount(0, 0, 0, 0, False, 0, part.start_ms, part.end_ms, {}))
    if is_reported:
        amount.reported += part.value
        amount.reported_gap += part.gap
        amount.receipts[part.journal] = max(amount.receipts.get(part.journal, 0), part.through_seq)
    else:
        amount.waiting += part.value
        amount.waiting_gap += part.gap
    amount.unbounded |= part.unbounded
    amount.windows += part.records
    amount.first_ms = min(amount.first_ms, part.start_ms)
    amount.last_ms = max(amount.last_ms, part.end_ms)


def export(
    source: str,
    records: Iterable[tuple[str, bytes]],
    receipts: Iterable[tuple[str, bytes, bytes]],
    pruned: Iterable[Pruned],
    restarts: Iterable[tuple[bytes, bytes]],
) -> Iterator[bytes]:
    """The lines of an export, each with its end of line.

    Args:
        receipts: (journal, content, signature).
        restarts: (content, signature).
    """
    digest, count, head = hashlib.sha256(), 0, ""

    def line(content: object) -> bytes:
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    def contents() -> Iterator[object]:
        nonlocal head
        yield {"form": FORM, "source": source}
        for content, signature in restarts:
            yield {"restart": content.hex(), "signature": signature.hex()}
        for part in pruned:
            yield {"sum": {**part._asdict(), "key": part.key._asdict()}}
        for journal, content in records:
            head = hashlib.sha256(content).hexdigest()
            yield {"journal": journal, "record": content.hex()}
        for journal, content, signature in receipts:
            yield {"journal": journal, "receipt": content.hex(), "signature": signature.hex()}

    for content in contents():
        made = line(content)
        digest.update(made)
        count += 1
        yield made
    yield line({"end": {"lines": count, "sha256": digest.hexdigest(), "head": head}})


def verify_export(lines: Iterable[bytes], verify: Verify, *, expected_head: str | None = None) -> Checked:
    """Checks an export from its first line to its last.

    Args:
        expected_head: of the journal, as `fod-agent status` names it, if at hand.

    Raises:
        StatementError: edited, reordered, cut, or no export at all.
    """
    digest, count = hashlib.sha256(), 0
    source, end = "", None
    hashes: dict[tuple[str, int], bytes] = {}
    receipts: dict[str, int] = {}
    summed, head = 0, ""
    for raw in lines:
        line = raw.removesuffix(b"\n")
        content = _parsed(line, count + 1)
        if end is not None:
            raise StatementError(f"line {count + 1}: something follows the end line")
        if "end" in content:
            end = content["end"]
            continue
        digest.update(line + b"\n")
        count += 1
        try:
            if count == 1:
                if content.get("form") != FORM:
                    raise StatementError(f"expected form {FORM}, found {content.get('form')!r}")
                source = str(content["source"])
            elif "record" in content:
                head = _check_record(content, source, hashes)
            elif "receipt" in content:
                journal, through = _check_receipt(content, source, hashes, verify)
                receipts[journal] = max(receipts.get(journal, 0), through)
            elif "sum" in content:
                part = content["sum"]
                if not isinstance(part, dict):
                    raise StatementError("a sum is not a JSON object")
                summed += int(part["records"])
            elif "restart" not in content:
                raise StatementError(f"unknown content {sorted(content)}")
        except (StatementError, JournalError, TrustError, KeyError, ValueError, TypeError) as error:
            raise StatementError(f"line {count}: {error}; the export was edited, reordered or cut") from error
    expected = {"lines": count, "sha256": digest.hexdigest(), "head": head}
    if end != expected:
        raise StatementError(f"expected an end line {expected}, found {end!r}: the export was edited or cut")
    if expected_head is not None and expected_head.lower() != head:
        raise StatementError(
            f"expected head {expected_head}, found {head}: the export was edited or cut, or the journal has"
            " grown since"
        )
    covered = sum(seq <= receipts.get(journal, 0) for journal, seq in hashes)
    return Checked(len(hashes), covered, len(receipts), summed, head)


def _check_record(content: Mapping[str, object], source: str, hashes: dict[tuple[str, int], bytes]) -> str:
    journal, raw = str(content["journal"]), bytes.fromhex(str(content["record"]))
    record = parsed(raw)
    if (record.source, record.id) != (source, f"{journal}/{record.seq}"):
        raise StatementError(f"record {record.id} of {record.source} is not one of {source}/{journal}")
    behind = next(reversed(hashes), None)
    if behind is not None and behind[0] == journal and behind[1] >= record.seq:
        raise StatementError(f"record {record.seq} follows {behind[1]}")
    before = hashes.get((journal, record.seq - 1))
    if before is not None and before != record.prev_hash:
        raise StatementError(f"record {record.seq} does not name the hash of the one before it")
    merged = record.merged
    kept = hashes.get((journal, merged.first_seq - 1))
    if record.HasField("merged") and kept is not None and kept != merged.before_hash:
        raise StatementError(f"record {record.seq} does not name the hash of the one before its merge")
    digest = hashlib.sha256(raw).digest()
    hashes[journal, record.seq] = digest
    return digest.hex()


def _check_receipt(
    content: Mapping[str, object], source: str, hashes: Mapping[tuple[str, int], bytes], verify: Verify
) -> tuple[str, int]:
    raw, signature = bytes.fromhex(str(content["receipt"])), bytes.fromhex(str(content["signature"]))
    receipt = verify(raw, signature)
    if (receipt.source, receipt.journal_id) != (source, content["journal"]):
        raise StatementError(f"a receipt is for {receipt.source}/{receipt.journal_id}")
    held = hashes.get((receipt.journal_id, receipt.through_seq))
    if held is not None and held != receipt.head_hash:
        raise StatementError(f"the receipt for record {receipt.through_seq} is for another record")
    return receipt.journal_id, receipt.through_seq


def agreed(restarts: Iterable[bytes]) -> dict[str, int]:
    """By journal that a restart has ended: the position up to which the cloud holds the same records."""
    said = [usage_pb2.JournalRestart.FromString(content) for content in restarts]
    return {restart.journal_id: restart.fork_seq - 1 for restart in said}


def receipt_time_ms(content: bytes) -> int:
    """When the cloud stored what a receipt is for, Unix milliseconds; 0 if it cannot be read."""
    try:
        return usage_pb2.UsageReceipt.FromString(content).stored_ms
    except DecodeError:
        return 0


def _parsed(line: bytes, number: int) -> Mapping[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StatementError(f"line {number} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise StatementError(f"line {number} is not a JSON object")
    return found


def unit_name(unit: int) -> str:
    """The short name of a unit of the contract."""
    names: Sequence[str] = ("?", "ms", "m", "mWh", "")
    return names[unit] if 0 <= unit < len(names) else "?"
