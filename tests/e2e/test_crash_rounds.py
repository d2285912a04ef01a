"""kill -9 at random moments of a drive, with real processes: no unit twice, none lost undeclared.

A few rounds in every run; FOD_CRASH_ROUNDS=50 (make test-crash) for the long form.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from random import Random

import pytest

from deploy.demo.stage import SEAT_ECU, SEAT_HARDWARE, SEAT_UID, VIN, Program, Stage

ROUNDS = int(os.environ.get("FOD_CRASH_ROUNDS", "3"))
SEED = int(os.environ.get("FOD_SEED", "1"))
CHECKPOINT_MS = 2_000
STEP_M = 10
FASTEST_M_PER_S = 25.4
"""The fastest second of UDDS: 56.7 mph."""
EDGE_MS = 300
"""Frames around the two edges of a round: one period of 100 ms each, and the read-back."""


def begun_unix_ms(agent: Program) -> int:
    """When this life of the agent began to meter, by its log."""
    line = next(line for line in agent.log() if "metering has begun" in line)
    return int(datetime.fromisoformat(line.split(" ", 1)[0]).timestamp() * 1000)


@pytest.mark.e2e
@pytest.mark.timeout(120 + 15 * ROUNDS)
def test_billed_never_exceeds_truth_and_every_shortfall_is_declared(tmp_path: Path) -> None:
    random = Random(SEED)
    with Stage(tmp_path / "crash", transport="socketcand") as stage:
        stage.done("fod-keys", "init", stage.keys)
        stage.done(
            "fod-keys", "sign-catalogue", stage.keys, "deploy/demo/catalogue", stage.folder / "catalogue"
        )
        stage.start_cloud()
        stage.start_vehicle()
        operator = ("--config", stage.cloud_config)
        ecu = f"{SEAT_ECU}:{SEAT_HARDWARE}:{SEAT_UID}"
        vehicle = stage.done("fod-cloud", "vehicle", "add", VIN, "--ecu", ecu, "--json", *operator).data
        stage.write_agent_config()
        claim = vehicle["claim_token"]
        stage.done("fod-agent", "enroll", "--config", stage.agent_config(), "--claim", claim)
        stage.start_agent()
        grant = stage.done(
            "fod-cloud",
            "grant",
            VIN,
            "seat-heating-monthly",
            "--account",
            "acc-anna",
            "--wait",
            "--json",
            *operator,
        ).data
        stage.tell("seat 2")
        stage.tell("drive 20 1369")
        dead_ms, dead_m = 0, 0.0
        for _ in range(ROUNDS):
            moment = random.uniform(0.3, 4.0)
            _pause(stage, moment)
            before_m = stage.truth()["heated_distance_m"]
            stage.kill_agent()
            killed_ms = _now_ms()
            _pause(stage, random.uniform(0.0, 0.5))
            stage.start_agent()
            stage.until_state("ACTIVE")
            agent = stage.agent
            stage.until("it meters", lambda a=agent: any("metering has begun" in line for line in a.log()))
            dead_ms += begun_unix_ms(stage.agent) - killed_ms
            dead_m += stage.truth()["heated_distance_m"] - before_m
            assert all("purpose=activate" not in line for line in stage.agent.log()), "a write in motion"
        _pause(stage, 1.0)
        stage.tell("stop")
        right = grant["grant"]["entitlement"]["entitlement_id"]
        stage.done("fod-cloud", "revoke", VIN, right, "--reason", "end of the test", *operator)
        stage.until_state("LOCKED")
        status = stage.until_status(
            "all usage has its receipt",
            lambda s: s["journal"]["records"] == s["journal"]["receipts_to"] == s["journal"]["stored"],
        )
        truth = stage.truth()
        usage = stage.done("fod-cloud", "usage", VIN, "--json", *operator).data
    records = usage
    assert len(records) == status["journal"]["records"]
    assert len({r["id"] for r in records}) == len(records)
    for meter, real in (
        ("active-time", truth["heater_on_ms"]),
        ("heated-distance", truth["heated_distance_m"]),
    ):
        value = sum(int(r.get("value", 0)) for r in records if r["meter_id"] == meter)
        gap = sum(int(r.get("gap", 0)) for r in records if r["meter_id"] == meter)
        print(
            f"{meter}: billed {value}, truth {real:.1f}, declared {gap}, rounds {ROUNDS}, dead {dead_ms} ms"
        )
        assert value <= real
        assert real <= value + gap
        lives = ROUNDS + 1
        if meter == "active-time":
            assert real - value - dead_ms <= lives * (CHECKPOINT_MS + EDGE_MS)
        else:
            checkpoint_m = FASTEST_M_PER_S * (CHECKPOINT_MS + EDGE_MS) / 1000
            assert real - value - dead_m <= lives * (2 * STEP_M + checkpoint_m)


def _now_ms() -> int:
    return int(datetime.now().astimezone().timestamp() * 1000)


def _pause(stage: Stage, seconds: float) -> None:
    """Lets the drive go on for some real time; the moment of the kill is the subject here."""
    end_ms = _now_ms() + int(seconds * 1000)
    stage.until("the moment of the kill", lambda: _now_ms() >= end_ms)
