"""Events of the feed: what CloudEvents 1.0.2 demands, and what a vehicle cannot make them say."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cloud_world import ACCOUNT, JOURNAL, START_MS, VIN, record

from cloud.export import event
from openfod.usage.v1 import usage_pb2

SOURCE = "veh-0123456789abcdef"


def made(account: str | None = ACCOUNT, **fields: Any) -> dict[str, Any]:
    content = record(SOURCE, 7, bytes(range(32)), **fields)
    parsed: dict[str, Any] = json.loads(
        event.encode(event.event(usage_pb2.UsageRecord.FromString(content), account))
    )
    return parsed


def test_an_event_is_exactly_this() -> None:
    found = made(
        dimensions=[usage_pb2.Dimension(name="motion", value="driving")],
        gap=20,
        gap_reason=usage_pb2.GAP_REASON_AGENT_DOWN,
        merged=usage_pb2.MergedWindows(first_seq=2, last_seq=6, records=5, before_hash=bytes(32)),
    )
    assert found == {
        "specversion": "1.0",
        "id": f"{JOURNAL}/7",
        "source": SOURCE,
        "type": "org.openfod.usage.v1",
        "subject": ACCOUNT,
        "datacontenttype": "application/json",
        "time": "2026-03-31T12:01:00.000Z",
        "data": {
            "feature": "seat-heating",
            "meter": "active-time",
            "value": 60_000,
            "unit": "millisecond",
            "dimensions": {"motion": "driving"},
            "entitlement_id": "ent-0123456789abcdef",
            "window_start": "2026-03-31T12:00:00.000Z",
            "window_end": "2026-03-31T12:01:00.000Z",
            "seq": 7,
            "prev_hash": bytes(range(32)).hex(),
            "clock_trust": "signed",
            "gap": 20,
            "gap_reason": "agent_down",
            "gap_unbounded": False,
            "trace_id": "0" * 31 + "1",
            "merged": {"first_seq": 2, "last_seq": 6, "records": 5},
        },
    }


def test_the_account_is_that_of_the_right_whatever_the_vehicle_says() -> None:
    assert made(account="acc-payer", subject="acc-victim")["subject"] == "acc-payer"


def test_use_that_no_right_explains_is_billed_to_nobody() -> None:
    found = made(account=None, subject="acc-victim")
    assert found["type"] == "org.openfod.usage.unexplained.v1"
    assert found["subject"] == SOURCE
    assert "acc-victim" not in json.dumps(found)


@pytest.mark.parametrize("window_end_ms", [253_402_300_800_000, 2**63 - 1])
def test_a_clock_beyond_the_year_9999_has_no_time_and_stops_nothing(window_end_ms: int) -> None:
    found = made(window_end_ms=window_end_ms)
    assert "time" not in found
    assert found["data"]["window_end"] is None
    assert made(window_end_ms=253_402_300_799_999)["time"] == "9999-12-31T23:59:59.999Z"


@given(
    value=st.integers(0, 10**12),
    gap=st.integers(0, 10**12),
    end=st.integers(START_MS, 2**63 - 1),
    text=st.text(max_size=100),
    dimension=st.text(max_size=100),
    account=st.one_of(st.none(), st.from_regex(r"acc-[a-z0-9]{1,20}", fullmatch=True)),
)
def test_every_record_that_is_taken_makes_an_event_of_the_standard(
    value: int, gap: int, end: int, text: str, dimension: str, account: str | None
) -> None:
    fields: dict[str, Any] = {
        "value": value,
        "gap": gap,
        "gap_reason": usage_pb2.GAP_REASON_EDGE if gap else 0,
        "window_end_ms": end,
        "feature_id": text,
        "dimensions": [usage_pb2.Dimension(name=dimension, value=text)],
    }
    content = usage_pb2.UsageRecord.FromString(record(SOURCE, 2**53, bytes(32), **fields))
    encoded = event.encode(event.event(content, account))
    assert encoded == event.encode(event.event(content, account))
    assert b"\n" not in encoded
    found = json.loads(encoded)
    # CloudEvents 1.0.2, section 3.1: required attributes are strings that are not empty.
    for name in ("id", "source", "specversion", "type", "subject"):
        assert isinstance(found[name], str)
        assert found[name]
    assert found["specversion"] == "1.0"
    assert len(found["id"]) <= 100
    assert all(re.fullmatch(r"[a-z0-9]{1,20}", name) for name in found)  # section 3: attribute names
    if "time" in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])
    data = found["data"]
    assert (data["value"], data["gap"], data["seq"]) == (value, gap, 2**53)
    assert float(data["seq"]) == data["seq"]
    assert VIN not in json.dumps(found)
