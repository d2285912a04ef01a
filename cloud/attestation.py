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

    Args:
        rows: new records of one journal.
        features: as `attested` says.
        now_ms: Unix milliseconds.
    """
    if not features:
        return
    known = {row.feature_id: row for row in tx.readings(vin)}
    changed: dict[str, ReadingRow] = {}
    for usage in rows:
        record = usage_pb2.UsageRecord.FromString(usage.content)
        feature = features.get(record.feature_id)
        if feature is None:
            continue
        row = known.get(record.feature_id) or ReadingRow(record.feature_id)
        if record.meter_id == feature.meter_id and record.unit == usage_pb2.UNIT_MILLISECOND:
            row = with_record(row, record)
        if record.ecu_reading:
            row = _take(tx, vin, row, feature, record.ecu_reading, now_ms)
        known[record.feature_id] = changed[record.feature_id] = row
    for row in changed.values():
        tx.put_reading(vin, row)


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
