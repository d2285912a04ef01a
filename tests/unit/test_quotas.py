"""Quotas on the vehicle: stages of warning, overage, the end of a hard one, periods and top-ups, offline."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.engine_world import World, entitlement

from agent.model import Entitlement, Quota, TrustedTime
from agent.trust.terms import judge_quota, period_of

METER = "active-time"


def _time(unix_ms: int) -> TrustedTime:
    return TrustedTime(unix_ms, 0, "signed")


def _right(number: int, limit_ms: int, *, hard: bool, starts_s: tuple[int, ...] = ()) -> Entitlement:
    quota = Quota(METER, limit_ms, hard, (50, 80, 100), starts_s)
    return entitlement(number, quotas=(quota,))


def _warnings(world: World) -> list[str]:
    return [said for _, level, said, fields in world.log if level == "warning" and "limit" in fields]


def _quota(world: World) -> dict[str, object]:
    assert world.engine is not None
    quotas = world.engine.status(world.now_ms * 1_000_000)["quotas"]
    assert isinstance(quotas, list)
    found: dict[str, object] = quotas[0]
    return found


def _is_on(world: World) -> bool:
    return world.ecu.on


def _reason(world: World) -> str:
    assert world.engine is not None
    (view,) = world.engine.features()
    return view.reason


@pytest.fixture
def world() -> World:
    made = World(3)
    made.boot()
    made.run_ms(1000)
    return made


# --- the judgement, pure ---------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "hard", "stage", "beyond", "words"),
    [
        (0, True, 0, False, ""),
        (499, True, 0, False, ""),
        (500, True, 50, False, "50 % of the quota of m is used"),
        (799, True, 50, False, "50 % of the quota of m is used"),
        (800, True, 80, False, "80 % of the quota of m is used"),
        (999, True, 80, False, "80 % of the quota of m is used"),
        (1000, True, 100, True, "quota of m is used up: limit 1000"),
        (1000, False, 100, True, "overage: m is beyond its quota of 1000, and more is billed"),
        (10**15, False, 100, True, "overage: m is beyond its quota of 1000, and more is billed"),
    ],
)
def test_stages_of_a_quota(used: int, hard: bool, stage: int, beyond: bool, words: str) -> None:
    found = judge_quota(Quota("m", 1000, hard, (50, 80, 100)), used)
    assert (found.stage, found.beyond, found.words) == (stage, beyond, words)


def test_a_quota_counts_the_latest_period_that_has_begun() -> None:
    quota = Quota("m", 1, True, (), (100, 200, 300))
    assert period_of(Quota("m", 1, True), _time(5)) is None
    assert [period_of(quota, _time(s * 1000 + d)) for s, d in ((1, 0), (199, 999), (200, 0), (999, 0))] == [
        100,
        100,
        200,
        300,
    ]


# --- in the engine ----------------------------------------------------------------


def test_each_stage_is_said_once_and_a_soft_quota_goes_on_as_overage(world: World) -> None:
    world.cloud.grant(_right(1, 5_000, hard=False))
    world.push()
    world.run_ms(20_000)
    assert world.state() == "ACTIVE"
    assert _warnings(world) == [
        "50 % of the quota of active-time is used",
        "80 % of the quota of active-time is used",
        "overage: active-time is beyond its quota of 5000, and more is billed",
    ]
    assert "overage" in _reason(world)
    found = _quota(world)
    assert (found["limit"], found["hard"]) == (5_000, False)
    assert isinstance(found["used"], int)
    assert 15_000 < found["used"] <= world.truth.heated_ms


def test_a_used_up_hard_quota_takes_nothing_away_in_motion(world: World) -> None:
    world.cloud.grant(_right(1, 5_000, hard=True))
    world.push()
    world.run_ms(2_000)
    world.speed_kmh = 50.0
    world.run_ms(10_000)
    assert world.state() == "HELD"
    assert _is_on(world)
    assert "used up" in _reason(world)
    world.speed_kmh = 0.0
    world.run_ms(5_000)
    assert world.state() == "SUSPENDED"
    assert not _is_on(world)
    # What was used while it was held is metered all the same.
    value, _ = world.billed(METER)
    assert value > 10_000


def test_prepaid_units_count_down_without_any_network_and_over_restarts(world: World) -> None:
    world.cloud.grant(_right(1, 20_000, hard=True))
    world.push()
    world.run_ms(3_000)
    world.cut_network()
    for _ in range(3):
        world.run_ms(4_000)
        world.kill()
        world.run_ms(500)
        world.boot()
    world.run_ms(20_000)
    assert world.state() == "SUSPENDED"
    value, _ = world.billed(METER)
    assert 20_000 <= value <= 21_000


def test_a_top_up_lifts_the_limit_of_the_same_right(world: World) -> None:
    right = _right(1, 5_000, hard=True)
    world.cloud.grant(right)
    world.push()
    world.run_ms(9_000)
    assert world.state() == "SUSPENDED"
    world.cloud.grant(replace(right, quotas=(Quota(METER, 12_000, True, (50, 80, 100)),)))
    world.push()
    world.run_ms(3_000)
    assert world.state() == "ACTIVE"
    world.run_ms(12_000)
    assert world.state() == "SUSPENDED"
    value, _ = world.billed(METER)
    assert 12_000 <= value <= 13_500  # not 5,000 and 12,000 more


def test_each_period_counts_anew_also_offline_and_over_a_restart(world: World) -> None:
    now_s = world.utc_ms // 1000
    world.cloud.grant(_right(1, 5_000, hard=True, starts_s=(now_s - 60, now_s + 30)))
    world.push()
    world.run_ms(9_000)
    assert world.state() == "SUSPENDED"
    world.cut_network()
    world.run_ms(25_000)
    assert world.state() == "ACTIVE"
    world.run_ms(2_000)
    world.kill()
    world.run_ms(200)
    world.boot()
    world.run_ms(9_000)
    assert world.state() == "SUSPENDED"
    value, _ = world.billed(METER)
    assert 9_500 <= value <= 11_500  # one quota in each period
    assert {key for _, key in world.disk.used} >= {METER}
    assert world.engine is not None
    shown = world.engine.status(world.now_ms * 1_000_000)["usage"]
    assert all("@" not in str(entry["meter"]) for entry in shown)  # type: ignore[attr-defined]


def test_a_missing_payment_is_said_and_ends_without_the_offline_grace(world: World) -> None:
    end_s = world.utc_ms // 1000 + 10
    world.cloud.grant(entitlement(1, not_after_s=end_s, display={"payment_failed": True}))
    world.push()
    world.run_ms(3_000)
    assert world.state() == "ACTIVE"
    assert "a payment failed" in _reason(world)
    world.run_ms(12_000)
    assert world.state() == "LOCKED"
    assert "a payment failed, and its grace has ended" in _reason(world)
