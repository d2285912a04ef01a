"""The cloud's comparison over a whole journal, without a cloud around it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from cloud.readings import Reading, ReadingRow, with_reading, with_record
from openfod.usage.v1 import usage_pb2

FEATURE, METER = "seat-heating", "active-time"


def of_engine_world(content: bytes) -> Reading:
    """What the simple ECU of `support.engine_world` says."""
    said = json.loads(content)
    return Reading(content, bytes(16), 1, said["reading"], said["token"], said["on_ms"], None)


def judge(
    records: Iterable[bytes], read: Callable[[bytes], Reading] = of_engine_world
) -> tuple[list[Reading], list[tuple[str, str]]]:
    """All readings of a journal, and all that does not fit."""
    row, readings, found = ReadingRow(FEATURE), [], []
    for content in records:
        record = usage_pb2.UsageRecord.FromString(content)
        if (record.feature_id, record.meter_id) == (FEATURE, METER):
            row = with_record(row, record)
        if record.ecu_reading:
            readings.append(read(record.ecu_reading))
            row, finding = with_reading(row, readings[-1], record.window_end_ms)
            found += [finding] if finding else []
    return readings, found
