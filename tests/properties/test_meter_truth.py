"""Whatever the vehicle does and whichever frames are lost: value ≤ truth ≤ value + gap."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.metering.meter import Meter
from agent.model import (
    ConditionSpec,
    DimensionSpec,
    MeterKind,
    MeterSpec,
    SignalBatch,
    SignalChange,
    SignalInfo,
    SignalValue,
)

MS = 1_000_000
HEAT, SPEED, ODO = "Vehicle.Heating", "Vehicle.Speed", "Vehicle.TraveledDistance"
PERIODS_MS = {HEAT: 100, SPEED: 20, ODO: 100}
STEP_M = 10
INFOS = {
    HEAT: SignalInfo(HEAT, "percent", 1, 1000 * MS),
    SPEED: SignalInfo(SPEED, "km/h", 0.01, 500 * MS),
    ODO: SignalInfo(ODO, "km", STEP_M / 1000, 1000 * MS),
}
HEATING = ConditionSpec(f"{HEAT} > 0", (HEAT,))
MOVING = ConditionSpec(f"{SPEED} >= 30.0", (SPEED,))
SLOW = ConditionSpec(f"{SPEED} < 30.0", (SPEED,))
PACE = DimensionSpec("pace", (("fast", MOVING), ("slow", SLOW)))
SPECS = {
    "heated time": MeterSpec("a", MeterKind.DURATION, HEATING),
    "time by pace": MeterSpec("b", MeterKind.DURATION, None, dimensions=(PACE,)),
    "heated time by pace": MeterSpec("c", MeterKind.DURATION, HEATING, dimensions=(PACE,)),
    "distance": MeterSpec("d", MeterKind.DISTANCE, None, odometer=ODO, speed=SPEED),
    "heated distance": MeterSpec("e", MeterKind.DISTANCE, HEATING, odometer=ODO, speed=SPEED),
}


@dataclass(frozen=True)
class Life:
    """Piecewise constant speed and heat, and the frames that get lost.

    Each phase: (milliseconds, km/h, heat on, drop the frames of these signals).
    """

    phases: tuple[tuple[int, int, bool, frozenset[str]], ...]
    opened_ms: int
    offset_m: int


phases = st.tuples(
    # Shorter than a signal's maximum age, a state could come and go unseen: the stated limit.
    st.integers(1200, 4000),
    st.sampled_from([0, 10, 29, 31, 60, 130]),
    st.booleans(),
    st.frozensets(st.sampled_from([HEAT, SPEED, ODO]), max_size=2).filter(lambda s: len(s) < 3),
)
lives = st.builds(
    Life,
    st.lists(phases, min_size=1, max_size=6).map(tuple),
    st.integers(0, 500),
    st.integers(0, STEP_M - 1),
)


def truth_and_meter(life: Life, name: str) -> tuple[float, int, int]:
    """Lives the life in steps of a millisecond; returns (truth, value, gap) in ms or m."""
    spec = SPECS[name]
    meter = Meter(spec, INFOS)
    values: dict[str, SignalValue | None] = {}
    seen: dict[str, int] = {}
    changes: list[SignalChange] = []
    position_m, truth, now_ms, opened = 1000.0 + life.offset_m, 0.0, 0, False
    for length_ms, speed, heat, dropped in life.phases:
        for _ in range(length_ms):
            if now_ms == life.opened_ms:
                meter.open(now_ms * MS, dict(values), dict(seen))
                opened = True
            current: dict[str, SignalValue] = {
                HEAT: int(heat),
                SPEED: float(speed),
                ODO: (int(position_m) // STEP_M * STEP_M) / 1000,
            }
            for signal, period in PERIODS_MS.items():
                if now_ms % period == 0 and signal not in dropped:
                    if values.get(signal) != current[signal]:
                        changes.append(SignalChange(signal, current[signal], now_ms * MS, seen.get(signal)))
                    values[signal], seen[signal] = current[signal], now_ms * MS
            if now_ms % 20 == 0:
                if opened:
                    meter.observe(SignalBatch(tuple(changes), dict(seen)), now_ms * MS)
                changes.clear()
            moved_m = speed / 3600
            if opened:
                counts = heat or spec.condition is None
                if counts:
                    truth += moved_m if spec.kind is MeterKind.DISTANCE else 1.0
            position_m += moved_m
            now_ms += 1
    if not opened:
        return 0.0, 0, 0
    meter.close(now_ms * MS)
    totals = meter.totals_now().values()
    return truth, sum(t.value for t in totals), sum(t.gap for t in totals)


@settings(max_examples=150, deadline=None)
@given(lives, st.sampled_from(sorted(SPECS)))
def test_the_truth_lies_between_value_and_value_plus_gap(life: Life, name: str) -> None:
    truth, value, gap = truth_and_meter(life, name)
    assert value <= truth + 1e-6, f"{name}: billed {value}, truth {truth}"
    assert truth <= value + gap + 1e-6, f"{name}: truth {truth}, declared up to {value + gap}"


def test_with_every_frame_the_shortfall_is_only_edges() -> None:
    life = Life(
        ((2000, 60, True, frozenset()), (3000, 60, False, frozenset()), (2000, 0, True, frozenset())), 0, 3
    )
    truth, value, gap = truth_and_meter(life, "heated time")
    assert truth == 4000
    assert value >= truth - 300
    assert gap <= 400
