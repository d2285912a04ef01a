"""kill -9 at random moments of a drive, with real processes: no unit twice, none lost undeclared.

A few rounds in every run; FOD_CRASH_ROUNDS=50 (make test-crash) for the long form.
"""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.story_stage import enrolled

from deploy.demo.stage import VIN, Stage

ROUNDS = int(os.environ.get("FOD_CRASH_ROUNDS", "3"))
SEED = int(os.environ.get("FOD_SEED", "1"))
CHECKPOINT_MS = 2_000
EDGE_MS = 300
"""Frames around the two edges of a round: one period of 100 ms each, and the read-back."""
STEP_M = 10
FASTEST_M_PER_S = 25.4
"""The fastest second of UDDS: 56.7 mph."""


def metering_began_ms(stage: Stage) -> int | None:
    """When this life of the agent began to meter, by its log; None if it did not yet."""
    for line in stage.agent.log():
        record = json.loads(line)
        if record["message"] == "metering has begun":
            return int(datetime.fromisoformat(record["time"]).timestamp() * 1000)
    return None


def drive_on(stage: Stage, seconds: float) -> None:
    """Lets the drive go on for some real time; the moment of the kill is the subject here."""
    end = time.monotonic() + seconds
    stage.until("the moment of the kill", lambda: time.monotonic() >= end)


@pytest.mark.e2e
@pytest.mark.timeout(120 + 15 * ROUNDS)
def test_billed_never_exceeds_truth_and_every_shortfall_is_declared(tmp_path: Path) -> None:
    random = Random(SEED)
    with enrolled(tmp_path / "crash") as stage:
        operator = ("--config", stage.cloud_config)
        grant = (
            "fod-cloud",
            "grant",
            VIN,
            "seat-heating-monthly",
            "--account",
            "acc-anna",
            "--wait",
            "--json",
        )
        right = stage.done(*grant, *operator).data["grant"]["entitlement"]["entitlement_id"]
        stage.tell("seat 2")
        stage.tell("drive 160 1369")
        dead_ms, dead_m = 0, 0.0
        for _ in range(ROUNDS):
            drive_on(stage, random.uniform(0.3, 4.0))
            before_m = stage.truth()["heated_distance_m"]
            stage.kill_agent()
            killed_ms = time.time_ns() // 1_000_000
            drive_on(stage, random.uniform(0.0, 0.5))
            stage.start_agent()
            stage.until_state("ACTIVE")
            dead_ms += stage.until("it meters", lambda: metering_began_ms(stage)) - killed_ms
            dead_m += stage.truth()["heated_distance_m"] - before_m
            purposes = {json.loads(line).get("purpose") for line in stage.agent.log()}
            assert purposes <= {None, "read back", "reading"}, "adopted without a write in motion"
        drive_on(stage, 1.0)
        stage.tell("stop")
        stage.done("fod-cloud", "revoke", VIN, right, "--reason", "end of the test", *operator)
        stage.until_state("LOCKED")
        journal = stage.until_status(
            "all usage has its receipt",
            lambda s: s["journal"]["records"] == s["journal"]["receipts_to"] == s["journal"]["stored"],
        )["journal"]
        truth = stage.truth()
        records: list[dict[str, Any]] = stage.done("fod-cloud", "usage", VIN, "--json", *operator).data
    assert len({r["id"] for r in records}) == len(records) == journal["records"]
    lives = ROUNDS + 1
    checkpoint_m = FASTEST_M_PER_S * (CHECKPOINT_MS + EDGE_MS) / 1000
    for meter, real, dead, allowed in (
        ("active-time", truth["heater_on_ms"], dead_ms, CHECKPOINT_MS + EDGE_MS),
        ("heated-distance", truth["heated_distance_m"], dead_m, 2 * STEP_M + checkpoint_m),
    ):
        value = sum(int(r.get("value", 0)) for r in records if r["meter_id"] == meter)
        gap = sum(int(r.get("gap", 0)) for r in records if r["meter_id"] == meter)
        print(f"{meter}: billed {value}, truth {real:.1f}, declared {gap}; {ROUNDS} rounds, dead {dead:.0f}")
        assert value <= real
        assert real <= value + gap
        assert real - value - dead <= lives * allowed
