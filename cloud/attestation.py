"""Takes what ECUs sign of their own counts, and notes what does not fit (docs/reading.md).

Works inside one transaction; what is decided is decided in cloud/readings.py.
Raises nothing: a reading refuses no usage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from cloud import findings, token
from cloud.errors import ReadingError
from cloud.readings import (
    MAX_READING_BYTES,
    Attested,
    Reading,
    ReadingRow,
    parse,
    with_reading,
    with_record,
)
from cloud.store import Transaction, UsageRow
from openfod.usage.v1 import usage_pb2

SILENT_DAYS = 7
"""Days of contact without a reading, although a token is in force."""
MS_PER_DAY = 86_400_000

FOREIGN = "reading-foreign"
"""A reading that the feature's ECU cannot have signed."""
NO_KEY = "reading-no-key"
"""A reading of an ECU without a registered key."""
SILENT = "reading-silent"
"""No reading for SILENT_DAYS of contact."""


def follow(
    tx: Transaction, vin: str, rows: Iterable[UsageRow], features: Mapping[str, Attested], now_ms: int
) -> None:
    """Compares readings with records that were just stored, in the order of the journal.

    The records of one merge stand for a time together, so the newest of their
    readings is judged behind all of them. A journal that goes on from another
    one, by an operator's word, has lost what lay between: nothing can be said of that.

    Args:
        rows: new records of one journal.
        features: as `attested` says.
        now_ms: Unix milliseconds.
    """
    if not features:
        return
    book = _Book(tx, vin, features, now_ms)
    merge = None
    for usage in rows:
        record = usage_pb2.UsageRecord.FromString(usage.content)
        if record.seq == 1 and any(record.prev_hash):
            book.forgive()
        of_merge = (record.merged.first_seq, record.merged.last_seq) if record.HasField("merged") else None
        if merge is not None and of_merge != merge:
            book.judge_held()
        merge = of_merge
        book.add(record)
        if merge is None:
            book.judge_held()
    book.judge_held()
    book.store()


class _Book:
    """The rows of one vehicle while records come in."""

    def __init__(self, tx: Transaction, vin: str, features: Mapping[str, Attested], now_ms: int) -> None:
        self._tx, self._vin, self._features, self._now_ms = tx, vin, features, now_ms
        self._rows = {row.feature_id: row for row in tx.readings(vin)}
        self._changed: set[str] = set()
        self._held: dict[str, list[bytes]] = {}

    def forgive(self) -> None:
        """Begins all comparisons anew."""
        for row in list(self._rows.values()):
            self._put(replace(row, is_unbounded=True))

    def add(self, record: usage_pb2.UsageRecord) -> None:
        """Adds a record; the reading that it carries is held."""
        feature = self._features.get(record.feature_id)
        if feature is None:
            return
        if record.meter_id == feature.meter_id and record.unit == usage_pb2.UNIT_MILLISECOND:
            self._put(with_record(self._row(record.feature_id), record))
        if record.ecu_reading:
            self._held.setdefault(record.feature_id, []).append(record.ecu_reading)

    def judge_held(self) -> None:
        """Judges the newest reading of each feature that is held, and all that are none."""
        for feature_id, contents in self._held.items():
            newest = max(contents, key=_number)
            for content in (c for c in contents if c is newest or not _number(c)):
                row = self._row(feature_id)
                feature = self._features[feature_id]
                self._put(_take(self._tx, self._vin, row, feature, content, self._now_ms))
        self._held.clear()

    def store(self) -> None:
        """Writes what has changed."""
        for feature_id in sorted(self._changed):
            self._tx.put_reading(self._vin, self._rows[feature_id])

    def _row(self, feature_id: str) -> ReadingRow:
        return self._rows.get(feature_id) or ReadingRow(feature_id)

    def _put(self, row: ReadingRow) -> None:
        self._rows[row.feature_id] = row
        self._changed.add(row.feature_id)


def _number(content: bytes) -> int:
    """The number of a reading; 0 if it is none."""
    try:
        return parse(content).reading
    except ReadingError:
        return 0


def note_contact(tx: Transaction, vin: str, features: Mapping[str, Attested], now_ms: int) -> None:
    """Counts the days on which a vehicle is in contact and gives no reading of a feature in force.

    A reading under an older token than the newest does not count: it may have
    been kept for the purpose.
    """
    day = now_ms // MS_PER_DAY
    known = {row.feature_id: row for row in tx.readings(vin)} if features else {}
    for signed in tx.tokens(vin) if features else ():
        feature = features.get(signed.feature_id)
        if feature is None or not token.allows(signed.content):
            continue
        ecu = next(ecu for ecu in tx.ecus(vin) if ecu.identifier == signed.ecu_identifier)
        row = known.get(signed.feature_id) or ReadingRow(signed.feature_id)
        if not ecu.reading_key or row.contact_day == day:
            continue
        row = replace(row, contact_day=day, silent_days=row.silent_days + 1)
        tx.put_reading(vin, row)
        if row.silent_days == SILENT_DAYS + 1:  # told once in each silence
            text = f"{signed.feature_id}: no reading under token {signed.counter} since reading {row.reading}"
            findings.add(tx, vin, SILENT, f"{text}, for {SILENT_DAYS} days of contact", now_ms)


def _take(
    tx: Transaction, vin: str, row: ReadingRow, feature: Attested, content: bytes, now_ms: int
) -> ReadingRow:
    """Judges one reading as it came; returns the row to keep."""
    try:
        reading = parse(content)
        _check_origin(tx, vin, row, feature, reading)
        key = tx.reading_key(reading.uid)
        if key is not None:
            reading.check_signature(key)
    except ReadingError as error:
        findings.add(
            tx, vin, FOREIGN, f"{row.feature_id}: {error}", now_ms, reading=content[:MAX_READING_BYTES].hex()
        )
        return row
    if key is None:
        text = f"{row.feature_id}: ECU {reading.uid.hex()} has no key here: its readings prove nothing"
        findings.add(tx, vin, NO_KEY, text, now_ms)
        return replace(row, ecu_uid=reading.uid, content=content, stored_ms=now_ms, is_verified=False)
    after, finding = with_reading(row, reading, now_ms)
    if finding is not None:
        kind, text = finding
        findings.add(tx, vin, kind, f"{row.feature_id}: {text}", now_ms, reading=content.hex())
    newest = next((t.counter for t in tx.tokens(vin) if t.feature_id == row.feature_id), 0)
    if after is not row and reading.token_counter >= newest:
        after = replace(after, silent_days=0)
    return after


def _check_origin(tx: Transaction, vin: str, row: ReadingRow, feature: Attested, reading: Reading) -> None:
    """The ECU must be the one of the feature, or the one before it, while its last readings come."""
    uids = {ecu.identifier: ecu.uid for ecu in tx.ecus(vin)}
    present = uids.get(feature.ecu_identifier, b"")
    came_late = reading.uid in tx.former_ecus(vin, feature.ecu_identifier) and row.ecu_uid in {
        b"",
        reading.uid,
    }
    if reading.uid != present and not came_late:
        raise ReadingError(
            f"of ECU {reading.uid.hex()}; {feature.ecu_identifier} of this vehicle is {present.hex()}"
        )
    if reading.feature != feature.feature_number:
        raise ReadingError(f"of feature {reading.feature} in the ECU, expected {feature.feature_number}")
