"""Makes a CloudEvents 1.0 event of a stored usage record.

Pure: the same record and account give the same bytes, so a replay is equal to
the first time. Never holds the VIN: the source is the vehicle's pseudonym.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from openfod.usage.v1 import usage_pb2

USAGE_TYPE = "org.openfod.usage.v1"
"""Use under a right of the vehicle; the subject is the account that has to pay for it."""
UNEXPLAINED_TYPE = "org.openfod.usage.unexplained.v1"
"""Use that names no right of the vehicle. No account owes it; the subject is the vehicle's pseudonym."""

Event = Mapping[str, object]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_MS = (datetime(9999, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC) - _EPOCH) // timedelta(milliseconds=1)


def event(record: usage_pb2.UsageRecord, account: str | None) -> Event:
    """The event of one record, with the attributes of CloudEvents 1.0.2, section 3.1.

    Args:
        record: as ingest took it: its values are at most 10^12 and its seq at
            most 2^53, so that every number is exact in any JSON reader.
        account: that has the right, by the cloud's own books. What the record
            says of it is not believed: a vehicle cannot bill somebody else.
            None if the record names no right of this vehicle.
    """
    made: dict[str, object] = {
        "specversion": "1.0",
        "id": record.id,
        "source": record.source,
        "type": UNEXPLAINED_TYPE if account is None else USAGE_TYPE,
        "subject": record.source if account is None else account,
        "datacontenttype": "application/json",
    }
    ended = _rfc3339(record.window_end_ms)
    if ended is not None:
        made["time"] = ended
    made["data"] = _data(record)
    return made


def encode(made: Event) -> bytes:
    """The event in CloudEvents' JSON format, one line without its end."""
    return json.dumps(made, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def batch(events: Iterable[bytes]) -> bytes:
    """Encoded events in the JSON batch format, application/cloudevents-batch+json."""
    return b"[" + b",".join(events) + b"]"


def _data(record: usage_pb2.UsageRecord) -> dict[str, object]:
    data: dict[str, object] = {
        "feature": record.feature_id,
        "meter": record.meter_id,
        "value": record.value,
        "unit": usage_pb2.Unit.Name(record.unit).removeprefix("UNIT_").lower(),
        "dimensions": {d.name: d.value for d in record.dimensions},
        "entitlement_id": record.entitlement_id,
        "window_start": _rfc3339(record.window_start_ms),
        "window_end": _rfc3339(record.window_end_ms),
        "seq": record.seq,
        "prev_hash": record.prev_hash.hex(),
        "clock_trust": usage_pb2.ClockTrust.Name(record.clock_trust).removeprefix("CLOCK_TRUST_").lower(),
        "gap": record.gap,
        "gap_reason": usage_pb2.GapReason.Name(record.gap_reason).removeprefix("GAP_REASON_").lower()
        if record.gap_reason
        else None,
        "gap_unbounded": record.gap_unbounded,
        "trace_id": record.trace_id or None,
    }
    if record.HasField("merged"):
        merged = record.merged
        data["merged"] = {
            "first_seq": merged.first_seq,
            "last_seq": merged.last_seq,
            "records": merged.records,
        }
    return data


def _rfc3339(unix_ms: int) -> str | None:
    """RFC 3339 in UTC with milliseconds; None for what it cannot say: a clock beyond the year 9999."""
    if not 0 <= unix_ms <= _LAST_MS:
        return None
    moment = _EPOCH + timedelta(milliseconds=unix_ms)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
