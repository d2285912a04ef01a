"""An owner with root runs an agent that meters nothing: the ECU's own count says so, with real programs."""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import pytest
from support.story_stage import enrolled

from cloud.readings import Reading, parse
from deploy.demo.stage import VIN, Program, Stage

ROOTED = """
import sys
from agent.metering import meter
meter.Meter.take = lambda self: {}  # whatever was used: nothing to bill, nothing to declare
from agent.__main__ import main
sys.exit(main(["run", "--config", sys.argv[1]]))
"""
USED_S = 7


def records(stage: Stage) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = stage.done(
        "fod-cloud", "usage", VIN, "--json", "--config", stage.cloud_config
    ).data
    return found


def readings(stage: Stage) -> list[Reading]:
    """What the seat module signed, as it lies in the cloud."""
    contents = [base64.b64decode(r["ecu_reading"]) for r in records(stage) if r.get("ecu_reading")]
    found = [parse(content) for content in contents]
    for reading in found:
        reading.check_signature(bytes.fromhex(stage.seat_key))
    return found


def findings(stage: Stage) -> list[str]:
    listed = stage.done("fod-cloud", "vehicle", "list", "--json", "--config", stage.cloud_config).data
    return list(listed["vehicles"][0].get("findings", []))


def heat(stage: Stage, seconds: float) -> None:
    """Heats the seat for a while; only time can be used up."""
    stage.tell("seat 2")
    end_ms = stage.truth()["heater_on_ms"] + 1000 * seconds
    stage.until("it was used", lambda: stage.truth()["heater_on_ms"] >= end_ms or None)


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_an_agent_that_meters_nothing_is_found_by_the_ecus_next_reading(tmp_path: Path) -> None:
    with enrolled(tmp_path / "rooted") as stage:
        operator = ("--config", stage.cloud_config)
        words = ("grant", VIN, "seat-heating-monthly", "--account", "acc-4711", "--json", *operator)
        right = stage.done("fod-cloud", *words).data["grant"]["entitlement"]["entitlement_id"]
        stage.until_state("ACTIVE")
        stage.until("the first reading is in the cloud", lambda: readings(stage))
        assert findings(stage) == []

        stage.end_agent()
        command = [sys.executable, "-c", ROOTED, str(stage.agent_config())]
        stage._programs["agent"] = Program("agent", command, stage.folder / "logs")
        stage.until("the agent answers", stage._answer)
        stage.until_state("ACTIVE")
        heat(stage, USED_S)
        stage.done("fod-cloud", "revoke", VIN, right, "--reason", "end of the test", *operator)
        stage.until_state("LOCKED")

        (finding,) = stage.until("the ECU's count is compared", lambda: findings(stage))
        assert "seat-heating: the ECU counted" in finding
        last = readings(stage)[-1]
        assert last.on_ms <= stage.truth()["heater_on_ms"] + 100
        metered = sum(int(r.get("value", 0)) for r in records(stage) if r["meter_id"] == "active-time")
        assert metered < last.on_ms - 1000 * USED_S / 2
