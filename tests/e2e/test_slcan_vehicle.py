"""The whole loop over a serial adapter: the agent on slcan, the ECU behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.story_stage import enrolled

from deploy.demo.stage import VIN

WATCH = ("fod-agent", "watch", "--once", "--filter", "seat")


@pytest.mark.e2e
@pytest.mark.timeout(120)
def test_a_right_switches_the_seat_on_over_slcan_and_no_frame_is_lost(tmp_path: Path) -> None:
    with enrolled(tmp_path / "slcan", slcan=True) as stage:
        grant = ("fod-cloud", "grant", VIN, "seat-heating-monthly", "--account", "acc-anna", "--wait")
        stage.done(*grant, "--config", stage.cloud_config)
        stage.tell("seat 2")
        status = stage.until_status(
            "the heater's frames are heard",
            lambda s: (s["signals"]["Vehicle.Cabin.Seat.Row1.DriverSide.Heating"]["value"] or 0) > 0,
        )
        assert status["features"][0]["state"] == "ACTIVE"
        assert status["bus_counts"]["body"]["malformed"] == 0
        assert {m["check_failed"] + m["lost"] for m in status["messages"].values()} == {0}
        watched = json.loads(stage.done(*WATCH, "--json", "--config", stage.agent_config()).text)
        assert watched["source"].startswith("agent at ")
        assert "Vehicle.Cabin.Seat.Row1.DriverSide.Heating" in watched["signals"]
        assert all("seat" in name.lower() for name in (*watched["signals"], *watched["messages"]))
        assert {signal["state"] for signal in watched["signals"].values()} == {"fresh"}
        assert watched["buses"]["body"]["state"] == "up"
        assert watched["buses"]["body"]["frames_per_s"] > 0
        assert "Seat.Row1.DriverSide.Heating" in stage.done(*WATCH, "--config", stage.agent_config()).text
