"""The logbook of a real car: its own log and database, billed by the kilometre.

What is billed is held against the log as `support.real_civic` reads it, with
code of its own. The odometer shows whole steps, so that 30 m between its first
and its last reading are more than 20 m and less than 40 m on the road; the speed
says what came after its last step.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
from support.real_civic import (
    BUS,
    ENGINE_DATA,
    MALFORMED_LINES,
    SIGNALS,
    STEP_M,
    Figures,
    civic_table,
    dbc_file,
    figures,
    log_file,
)
from support.real_drive import (
    DRIVING,
    NS_PER_MS,
    NS_PER_S,
    PARKED,
    WINDOW_NS,
    Drive,
    Journal,
    drive_with_crashes,
)
from support.real_process import ACCOUNT, SILENT_BUS, VIN, Running, running

from agent.adapters.replay import replay_log

pytestmark = pytest.mark.timeout(180)

REPLAY_SPEED = 16
REPLAY_BUS = """
interface = "replay"
channel = "{log}"
speed = {speed}
database = "{dbc}"
signals = "{signals}"
"""


def bounds(truth: Figures) -> tuple[float, float]:
    """What was driven at least and at most, metres.

    The first reading may be a whole step old; what came after the last step is as
    much as the speed says, and no further step.
    """
    tail_m = min(STEP_M, truth.tail_m)
    return truth.odometer_m - STEP_M + tail_m, truth.odometer_m + tail_m


def assert_distance(value_m: int, gap_m: int, truth: Figures) -> None:
    least_m, most_m = bounds(truth)
    assert value_m <= least_m
    assert value_m + gap_m >= most_m
    assert value_m >= truth.odometer_m - 2 * STEP_M, "a step at each edge is all that may be lost"


FRAME_NS = 10 * NS_PER_MS
"""Period of ENGINE_DATA."""

# --- in virtual time -----------------------------------------------------------


@pytest.fixture(scope="module")
def truth() -> Figures:
    return figures(log_file())


@pytest.fixture(scope="module")
def journal(truth: Figures) -> Journal:
    """The journal of the whole log, with a right from its first frame to its last."""
    journal = Journal()
    drive = Drive(civic_table(), journal, 0)
    assert drive.state == "ACTIVE"
    drive.feed(replay_log(log_file(), BUS))
    drive.revoke(truth.length_ns)
    assert drive.state == "LOCKED"
    assert journal.windows == ()
    return journal


def test_the_log_is_what_its_description_says(truth: Figures) -> None:
    assert truth.odometer_m == 30
    assert truth.length_ns // 1_000_000_000 == 65


def test_distance_is_billed_by_the_odometer_less_its_edges(journal: Journal, truth: Figures) -> None:
    assert journal.unbounded("distance") == []
    assert_distance(journal.value("distance"), journal.gap("distance"), truth)
    assert journal.gap("distance") <= 6 * STEP_M


def test_time_is_billed_where_frames_confirm_it(journal: Journal, truth: Figures) -> None:
    # What is heard between two batches is one: up to a batch and a frame may be lost at each hole.
    at_holes_ms = truth.edges // 2 * (WINDOW_NS + FRAME_NS) // NS_PER_MS
    for motion in (DRIVING, PARKED):
        certain_ms = truth.certain_ns[motion] / NS_PER_MS
        value_ms = journal.value("time", motion)
        assert value_ms <= certain_ms
        assert value_ms >= certain_ms - at_holes_ms


def test_the_holes_of_the_log_are_declared_and_nothing_else(journal: Journal, truth: Figures) -> None:
    value_ms, gap_ms = journal.value("time"), journal.gap("time")
    assert journal.unbounded("time") == []
    assert value_ms == journal.value("time", DRIVING) + journal.value("time", PARKED)
    assert value_ms <= truth.length_ns / NS_PER_MS <= value_ms + gap_ms
    for motion in (DRIVING, PARKED):
        # Where the car did in the holes what it did before them.
        held_ms = truth.held_ns[motion] / NS_PER_MS
        assert journal.value("time", motion) <= held_ms <= journal.value("time", motion) + gap_ms
    assert gap_ms <= (truth.unsure_ns + truth.edges * WINDOW_NS) / NS_PER_MS


def test_an_agent_that_is_told_to_end_leaves_nothing_undeclared(truth: Figures) -> None:
    journal = Journal()
    drive = Drive(civic_table(), journal, 0)
    drive.feed(replay_log(log_file(), BUS))
    drive.stop(truth.length_ns)
    Drive(civic_table(), journal, truth.length_ns).revoke(truth.length_ns)
    value_ms, gap_ms = journal.value("time"), journal.gap("time")
    assert value_ms <= truth.length_ns / NS_PER_MS <= value_ms + gap_ms
    assert_distance(journal.value("distance"), journal.gap("distance"), truth)


@pytest.mark.parametrize("seed", range(5))
def test_crashes_in_drive_and_holes_leave_nothing_undeclared(truth: Figures, seed: int) -> None:
    random = Random(seed)
    frames = [frame for frame in replay_log(log_file(), BUS) if frame.can_id == ENGINE_DATA]
    crashes_ns = [random.randrange(60 * NS_PER_S) for _ in range(3)]
    journal = drive_with_crashes(civic_table(), frames, crashes_ns, NS_PER_S, truth.length_ns)
    assert [record.seq for record in journal.records] == list(range(1, len(journal.records) + 1))
    value_ms, gap_ms = journal.value("time"), journal.gap("time")
    assert value_ms <= truth.length_ns / NS_PER_MS <= value_ms + gap_ms
    value_m, gap_m = journal.value("distance"), journal.gap("distance")
    least_m, most_m = bounds(truth)
    assert value_m <= least_m
    assert journal.unbounded("distance") or value_m + gap_m >= most_m


# --- as real processes -----------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A cloud and an enrolled vehicle."""
    log_file(), dbc_file()
    with running(tmp_path_factory.mktemp("car")) as world:
        claim = world.cloud("vehicle", "add", VIN)["claim_token"]
        world.configure(SILENT_BUS)
        world.command("enroll", "--claim", claim)
        yield world


def replay_bus() -> str:
    return REPLAY_BUS.format(log=log_file(), speed=REPLAY_SPEED, dbc=dbc_file(), signals=SIGNALS)


def all_receipts_are_here(status: dict[str, Any]) -> bool:
    journal = status["journal"]
    return bool(journal["records"] == journal["stored"] == journal["receipts_to"])


def feature_is(state: str, status: dict[str, Any]) -> bool:
    return [f["state"] for f in status["features"]] == [state]


@pytest.mark.e2e
def test_the_malformed_database_is_used_and_what_was_skipped_is_named(world: Running) -> None:
    world.configure(replay_bus())
    report = world.command("check")
    bus = report["buses"][BUS]
    lines = dbc_file().read_text(encoding="utf-8").splitlines()
    assert [(s["line"], s["statement"]) for s in bus["skipped"]] == [
        (number, lines[number - 1]) for number in MALFORMED_LINES
    ]
    assert all("Invalid syntax" in s["reason"] for s in bus["skipped"])
    assert bus["signals"] == ["Vehicle.Speed", "Vehicle.TraveledDistance"]
    assert report["problems"] == []


def total(records: list[dict[str, Any]], meter: str, motion: str | None = None) -> tuple[int, int]:
    """What is billed and what is declared beyond it."""
    chosen = [
        r
        for r in records
        if r["meter_id"] == meter
        and (motion is None or {"name": "motion", "value": motion} in r["dimensions"])
    ]
    assert chosen
    assert not any(r["gap_unbounded"] for r in chosen)
    return sum(int(r["value"]) for r in chosen), sum(int(r["gap"]) for r in chosen)


@pytest.mark.e2e
def test_the_cloud_bills_what_the_log_says(world: Running, truth: Figures) -> None:
    world.configure(SILENT_BUS)
    with world.agent():
        world.wait_for("the link is up", lambda status: status["link"] == "up")
        granted = world.cloud("grant", VIN, "logbook-per-km", "--account", ACCOUNT, "--wait")
        right = granted["grant"]["entitlement"]["entitlement_id"]
    world.configure(replay_bus())
    with world.agent():
        status = world.wait_for("the log has ended", lambda status: status["buses"].get(BUS) == "ended")
        assert feature_is("ACTIVE", status)
        assert status["messages"][f"{BUS}/ENGINE_DATA"]["check_failed"] == 0
        world.cloud("revoke", VIN, right, "--reason", "end of the drive")
        world.wait_for(
            "the right has ended, and the cloud has signed for everything",
            lambda status: feature_is("LOCKED", status) and all_receipts_are_here(status),
        )
    records = world.cloud("usage", VIN)
    # Before the drive the agent ran on a silent bus: one record of each meter says so.
    assert [(int(r["seq"]), int(r["value"])) for r in records[:2]] == [(1, 0), (2, 0)]
    value_m, gap_m = total(records[2:], "distance")
    assert_distance(value_m, gap_m, figures(log_file(), REPLAY_SPEED))
    assert billed(world, "distance") == value_m

    sped_up = figures(log_file(), REPLAY_SPEED)
    for motion in (DRIVING, PARKED):
        assert total(records[2:], "time", motion)[0] <= sped_up.certain_ns[motion] / NS_PER_MS
    value_ms, gap_ms = total(records[2:], "time")
    assert value_ms <= sped_up.length_ns / NS_PER_MS <= value_ms + gap_ms
    assert value_ms > 0
    assert billed(world, "time") == value_ms


def billed(world: Running, meter: str) -> int:
    """Quantity on the invoice."""
    (invoice,) = world.cloud("invoice", VIN)["invoices"]
    assert invoice["account"] == ACCOUNT
    return sum(int(line["quantity"]) for line in invoice["lines"] if line["meter_id"] == meter)
