"""One trace id leads from the grant to the frame, another from the frame to the invoice line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.story_stage import enrolled

from deploy.demo.stage import VIN, Program


def records(program: Program, message: str) -> list[dict[str, Any]]:
    """Log records with a message."""
    found = [json.loads(line) for line in program.log() if line.startswith("{")]
    return [r for r in found if r["message"] == message]


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_both_traces_can_be_followed_from_end_to_end(tmp_path: Path) -> None:
    with enrolled(tmp_path / "trace", log_level="debug") as stage:
        operator = ("--json", "--config", stage.cloud_config)
        words = ("fod-cloud", "grant", VIN, "seat-heating-monthly", "--account", "acc-anna", "--wait")
        right = stage.done(*words, *operator).data["grant"]["entitlement"]
        granted = right["trace_id"]
        # From the grant: the cloud's log, the signed right, the request, each frame of the token.
        assert any(granted in line for line in stage.cloud.log())
        assert stage.seat_heating()["trace_id"] == granted
        asked = [r for r in records(stage.agent, "request to ECU") if r["purpose"] == "activate"]
        assert {r["trace_id"] for r in asked} == {granted}
        frames = [r for r in records(stage.agent, "frame sent") if r["trace_id"] == granted]
        assert any(r["data"].startswith("10") and "31010f0d" in r["data"] for r in frames), (
            "the token's first frame"
        )
        assert len(frames) > 14

        # From the frame: what the bus brought, the session, the window, the record, the invoice line.
        stage.tell("seat 2")
        begun = [r for r in records(stage.agent, "metering has begun") if r["meter"] == "active-time"]
        metered = begun[0]["trace_id"]
        assert begun[0]["grant_trace_id"] == granted
        assert begun[0]["frames_ns"]["Vehicle.Cabin.Seat.Row1.DriverSide.Heating"] > 0

        def billed_line() -> dict[str, Any] | None:
            invoices = stage.done("fod-cloud", "invoice", VIN, *operator).data
            lines = [line for invoice in invoices["invoices"] for line in invoice["lines"]]
            return next(
                (x for x in lines if metered in x.get("trace_ids", ()) and int(x["quantity"]) > 0), None
            )

        line = stage.until("the invoice names the session", billed_line)
        assert line["meter_id"] == "active-time"
        assert any(r["trace_id"] == metered for r in records(stage.agent, "usage window is closed"))
        assert any(metered in text for text in stage.cloud.log())
