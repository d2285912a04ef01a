"""The engine around a journal that is full, or that cannot be written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import engine_world
from support.engine_world import FEATURE, World, catalogue_feature, entitlement

from agent import events as ev
from agent.model import WhenDead
from openfod.usage.v1 import usage_pb2


@pytest.fixture
def world() -> World:
    world = World()
    world.boot()
    world.run_ms(2000)
    return world


def choose(monkeypatch: pytest.MonkeyPatch, choice: WhenDead) -> None:
    changed = replace(catalogue_feature(), when_dead=choice)
    monkeypatch.setattr(engine_world, "catalogue_feature", lambda: changed)


def grant(world: World) -> None:
    world.cloud.grant(entitlement(world.cloud.version))
    world.push()
    world.run_ms(1500)


def come_to_rest(world: World) -> None:
    world.speed_kmh = 0.0
    if not world.online:
        world.join_network()
    world.run_ms(2_000)
    world.cloud.revoke()
    world.push()
    world.run_ms(15_000)


def assert_true_bill(world: World) -> None:
    for meter, truth in (("active-time", world.truth.heated_ms), ("heated-distance", world.truth.heated_m)):
        value, gap = world.billed(meter)
        assert value <= truth + 1e-6, f"{meter}: billed {value}, truth {truth}"
        assert truth <= value + gap, f"{meter}: truth {truth}, declared up to {value + gap}"
    assert world.violations == []
    assert world.cloud.refusals == []
    assert len(world.cloud.taken) == len(world.disk.records)


# --- full --------------------------------------------------------------------------


def test_what_was_never_sent_is_merged_and_the_chain_goes_on(world: World) -> None:
    grant(world)
    world.cut_network()
    world.run_ms(60_000)
    many = len(world.disk.records)
    world.tell(ev.JournalFull())
    world.run_ms(1_000)
    assert len(world.disk.records) < many
    world.run_ms(30_000)
    come_to_rest(world)
    assert any(
        usage_pb2.UsageRecord.FromString(r.content).HasField("merged") for r in world.disk.records.values()
    )
    assert_true_bill(world)


def test_merges_at_any_moment_lose_nothing(world: World) -> None:
    grant(world)
    for number in range(12):
        world.run_ms(3_700)
        if number % 4 == 1:
            world.cut_network()
        if number % 4 == 3:
            world.join_network()
        world.tell(ev.JournalFull())
        world.run_ms(number * 3)
    come_to_rest(world)
    assert_true_bill(world)


@pytest.mark.parametrize("wait_ms", [0, 20, 40, 100])
def test_a_crash_around_a_merge_loses_nothing(world: World, wait_ms: int) -> None:
    grant(world)
    world.cut_network()
    world.run_ms(31_000)
    world.tell(ev.JournalFull())
    world.run_ms(wait_ms)
    world.kill()
    world.run_ms(2_000)
    world.boot()
    world.run_ms(5_000)
    come_to_rest(world)
    assert_true_bill(world)


def test_no_record_is_made_until_the_end_of_the_journal_is_known(world: World) -> None:
    grant(world)
    world.run_ms(5_000)
    assert world.engine is not None
    world.unwritten = []  # the disk is slow: nothing is answered
    world.tell(ev.JournalFull())
    world.run_ms(25_000)
    commands = world.unwritten
    merges = [i for i, c in enumerate(commands) if isinstance(c, ev.MergeUnsent)]
    assert len(merges) == 1
    assert commands[merges[0] + 1 :] == []
    world.unwritten = None
    for command in commands:
        world._persist(command)
    world.run_ms(1_000)
    come_to_rest(world)
    assert_true_bill(world)


# --- dead --------------------------------------------------------------------------


def test_a_feature_that_holds_is_never_taken_away_in_motion(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, WhenDead.HOLD)
    grant(world)
    world.speed_kmh = 80.0
    world.run_ms(10_000)
    world.let_journal_die()
    world.run_ms(60_000)
    assert (world.state(), world.ecu.on) == ("HELD", True)
    world.speed_kmh = 0.0
    world.run_ms(5_000)
    assert (world.state(), world.ecu.on) == ("SUSPENDED", False)
    assert world.engine is not None
    (view,) = world.engine.features()
    assert "use cannot be written down: disk I/O error" in view.reason
    world.let_journal_live()
    world.run_ms(10_000)
    assert world.state() == "ACTIVE"
    come_to_rest(world)
    assert_true_bill(world)
    # It was held and used: that is metered as any hold is, and nothing of it was lost.
    assert world.billed("active-time")[0] > 70_000


def test_a_feature_that_goes_on_is_free_and_its_time_is_declared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, WhenDead.GO_ON_FREE)
    grant(world)
    world.run_ms(10_000)
    before_ms = world.truth.heated_ms
    world.let_journal_die()
    world.run_ms(60_000)
    assert (world.state(), world.ecu.on) == ("ACTIVE", True)
    assert len(world.unwritten or []) < 5, "what waits in memory does not grow with time"
    world.let_journal_live()
    after_ms = world.truth.heated_ms
    world.run_ms(5_000)
    come_to_rest(world)
    assert_true_bill(world)
    value, _ = world.billed("active-time")
    assert value <= world.truth.heated_ms - (after_ms - before_ms) + 200
    declared = [
        m.gap
        for r in world.disk.records.values()
        if (m := usage_pb2.UsageRecord.FromString(r.content)).gap_reason == usage_pb2.GAP_REASON_JOURNAL
        and m.meter_id == "active-time"
    ]
    assert 59_000 <= sum(declared) <= 62_000


def test_a_feature_that_goes_on_may_be_switched_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, WhenDead.GO_ON_FREE)
    world.speed_kmh = 30.0
    world.run_ms(500)
    grant(world)
    assert world.state() == "PENDING"
    world.let_journal_die()
    world.speed_kmh = 0.0
    world.run_ms(5_000)
    assert (world.state(), world.ecu.on) == ("ACTIVE", True)
    world.let_journal_live()
    come_to_rest(world)
    assert_true_bill(world)
    assert world.billed("active-time")[0] <= 2_500


def test_a_feature_that_holds_is_not_switched_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, WhenDead.HOLD)
    world.speed_kmh = 30.0
    world.run_ms(500)
    grant(world)
    world.let_journal_die()
    world.speed_kmh = 0.0
    world.run_ms(10_000)
    assert (world.state(), world.ecu.on) == ("SUSPENDED", False)
    assert {purpose for _, purpose in world.ecu_jobs} == {"read back"}


def test_a_crash_while_the_journal_is_dead_is_declared(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, WhenDead.GO_ON_FREE)
    grant(world)
    world.run_ms(10_000)
    world.let_journal_die()
    world.run_ms(20_000)
    world.kill()
    world.unwritten = None
    world.run_ms(1_000)
    world.boot()
    world.run_ms(5_000)
    come_to_rest(world)
    assert_true_bill(world)


def test_nothing_is_sent_or_acknowledged_that_is_not_on_disk(world: World) -> None:
    grant(world)
    world.run_ms(3_000)
    taken = dict(world.cloud.taken)
    world.let_journal_die()
    world.run_ms(30_000)
    assert world.cloud.taken.keys() <= set(world.disk.records)
    assert len(world.cloud.taken) <= len(taken) + 2
    assert world.engine is not None
    status = world.engine.status(world.now_ms * 1_000_000)["journal"]
    assert isinstance(status, dict)
    assert status["dead"] == "disk I/O error"
    assert FEATURE in {view.feature_id for view in world.engine.features()}
