"""Whatever the vehicle does and whichever frames are lost: value ≤ truth ≤ value + gap."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from support.signals_data import entry, simulated_database, table_of

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
from agent.signals.checks import Scheme, j1850_crc
from agent.signals.mapping import MessageSettings
from agent.signals.state import Collector
from agent.signals.table import Table

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
    values: dict[str, SignalValue] = {}
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


# --- with real frames through the collector ----------------------------------------

MESSAGES = {HEAT: (704, 8), SPEED: (160, 8), ODO: (288, 8)}
"""Identifier and length; the periods are those above."""
BUS = "body"


@dataclass(frozen=True)
class Phase:
    """A stretch of a drive, in tenths of a second, so that every message has a frame at its beginning.

    Args:
        lost: what becomes of frames in it: "" nothing; "dropped": the kernel
            says that it lost frames; "unseen": those of one message are missing
            and only the counter shows it; "damaged": those of one message fail
            their checksum; "short": they are cut.
        which: the message of the last three.
    """

    tenths: int
    kmh: int
    heat: bool
    lost: str
    which: str


# As short as a tenth of a second only where the frames of it are lost: what comes and goes
# between two frames that follow one another is the meter's stated limit.
SOUND = st.builds(
    Phase,
    st.integers(12, 30),
    st.sampled_from([0, 10, 29, 31, 60, 130]),
    st.booleans(),
    st.just(""),
    st.just(HEAT),
)
FASTER = st.sampled_from([0, 60, 250])


def lossy(tenths: int, lost: list[str], which: list[str]) -> st.SearchStrategy[Phase]:
    kinds = st.sampled_from(lost), st.sampled_from(which)
    return st.builds(Phase, st.integers(1, tenths), FASTER, st.booleans(), *kinds)


LOSSY = st.one_of(
    lossy(30, ["dropped"], [HEAT]),
    lossy(9, ["damaged", "short"], [HEAT, SPEED, ODO]),
    # Fifteen frames in a row come back to the same counter: nothing could show that they are missing.
    lossy(9, ["unseen"], [HEAT, ODO]),
    lossy(2, ["unseen"], [SPEED]),
)
DRIVES = st.lists(st.tuples(SOUND, LOSSY, SOUND), min_size=1, max_size=3).map(
    lambda parts: tuple(phase for part in parts for phase in part)
)


@functools.cache
def simulated_table() -> Table:
    entries = (
        entry(HEAT, "SEAT_HEAT", "HeatLevel", unit="percent"),
        entry(SPEED, "PT_SPEED", "VehicleSpeed", unit="km/h", max_age_ms=500),
        entry(ODO, "PT_ODOMETER", "Odometer", unit="km", scale=0.001),
    )
    checks = tuple(
        MessageSettings(name, check=Scheme.OPENFOD_J1850) for name in ("SEAT_HEAT", "PT_SPEED", "PT_ODOMETER")
    )
    return table_of(simulated_database(), *entries, messages=checks)


def payload_of(signal: str, raw: int, counter: int) -> bytes:
    can_id, length = MESSAGES[signal]
    body = bytes([counter]) + raw.to_bytes(4, "little") + bytes(length - 6)
    return bytes([j1850_crc(can_id.to_bytes(2, "little") + body)]) + body


def driven(
    phases: tuple[Phase, ...], name: str, offset_m: int, gather_ms: int = 20
) -> tuple[float, int, int]:
    """Drives in steps of a millisecond; returns (truth, value, gap) in ms or m.

    Args:
        gather_ms: how long signals gather, unless frames were lost a moment ago.
    """
    spec = SPECS[name]
    table = simulated_table()
    meter, collector = Meter(spec, table.infos), Collector({BUS: table})
    meter.open(0, {}, {})
    counters = dict.fromkeys(MESSAGES, -1)
    position_m, truth, now_ms, is_dropping = 1000.0 + offset_m, 0.0, 0, False
    for phase in phases:
        for _ in range(100 * phase.tenths):
            raws = {
                HEAT: int(phase.heat),
                SPEED: 100 * phase.kmh,
                ODO: int(position_m) // STEP_M,
            }
            for signal, period in PERIODS_MS.items():
                if now_ms % period:
                    continue
                counters[signal] = (counters[signal] + 1) % 15
                payload = payload_of(signal, raws[signal], counters[signal])
                if phase.lost == "dropped":
                    is_dropping = True
                    continue
                if phase.lost == "unseen" and phase.which == signal:
                    continue
                if phase.lost == "damaged" and phase.which == signal:
                    payload = bytes([payload[0] ^ 0x10]) + payload[1:]
                if phase.lost == "short" and phase.which == signal:
                    payload = payload[:-1]
                if is_dropping:
                    collector.lost(BUS)
                    is_dropping = False
                collector.feed(BUS, [(MESSAGES[signal][0], payload, now_ms * MS)])
            urgent = now_ms % 20 == 0 and collector.is_urgent(frozenset(), now_ms * MS)
            if now_ms % gather_ms == 0 or urgent:
                meter.observe(collector.drain(), now_ms * MS)
            moved_m = phase.kmh / 3600
            if phase.heat or spec.condition is None:
                truth += moved_m if spec.kind is MeterKind.DISTANCE else 1.0
            position_m += moved_m
            now_ms += 1
    meter.observe(collector.drain(), now_ms * MS)
    meter.close(now_ms * MS)
    totals = meter.totals_now().values()
    return truth, sum(t.value for t in totals), sum(t.gap for t in totals)


@settings(max_examples=150, deadline=None)
@given(DRIVES, st.sampled_from(sorted(SPECS)), st.integers(0, STEP_M - 1), st.sampled_from([20, 250]))
def test_the_truth_lies_there_too_where_frames_are_lost_or_damaged(
    phases: tuple[Phase, ...], name: str, offset_m: int, gather_ms: int
) -> None:
    truth, value, gap = driven(phases, name, offset_m, gather_ms)
    assert value <= truth + 1e-6, f"{name}: billed {value}, truth {truth}"
    assert truth <= value + gap + 1e-6, f"{name}: truth {truth}, declared up to {value + gap}"


def test_a_loss_costs_no_more_than_the_time_around_it() -> None:
    heated = Phase(30, 60, True, "", HEAT)
    for lost, gather_ms in itertools.product(("dropped", "unseen", "damaged", "short"), (20, 250)):
        drive = (heated, Phase(8, 60, False, lost, HEAT), heated)
        truth, value, gap = driven(drive, "heated time", 0, gather_ms)
        assert truth == 6000
        assert 5600 <= value <= 6000, (lost, gather_ms)
        assert 900 <= gap <= 1300, (lost, gather_ms)


def test_what_gathers_is_metered_as_what_does_not() -> None:
    drive = (Phase(30, 60, True, "", HEAT), Phase(13, 0, False, "", HEAT), Phase(30, 130, True, "", HEAT))
    for name in SPECS:
        assert driven(drive, name, 0, 250) == driven(drive, name, 0, 20), name


def test_a_loss_is_not_said_where_nothing_was_lost() -> None:
    truth, value, gap = driven((Phase(30, 60, True, "", HEAT),) * 3, "heated time", 0)
    assert truth == 9000
    assert value >= 8800
    assert gap <= 200


# --- energy and events ---------------------------------------------------------------

POWER, COUNTER, EVENTS = "Vehicle.Power", "Vehicle.EnergyCounter", "Vehicle.EventCounter"
COUNTED_INFOS = {
    HEAT: INFOS[HEAT],
    POWER: SignalInfo(POWER, "kW", 0.5, 500 * MS),
    COUNTER: SignalInfo(COUNTER, "Wh", 10, 1000 * MS),
    EVENTS: SignalInfo(EVENTS, "", 1, 1000 * MS),
}
COUNTED_PERIODS_MS = {HEAT: 100, POWER: 20, COUNTER: 100, EVENTS: 200}
COUNTED_SPECS = {
    "power added up": MeterSpec("p", MeterKind.ENERGY, HEATING, power=POWER),
    "counter": MeterSpec("c", MeterKind.ENERGY, HEATING, counter=COUNTER),
    "counter and power": MeterSpec("b", MeterKind.ENERGY, HEATING, counter=COUNTER, power=POWER),
    "counted events": MeterSpec("e", MeterKind.COUNT, HEATING, counter=EVENTS, wraps_at=16),
    "bounded events": MeterSpec(
        "f", MeterKind.COUNT, None, counter=EVENTS, wraps_at=16, at_most_per_h=10_000
    ),
    "edges": MeterSpec("h", MeterKind.COUNT, HEATING, debounce_ms=200),
}
SPANS = st.lists(
    st.tuples(
        st.integers(12, 40),
        st.sampled_from([0, 7, 50, 3000]),
        st.booleans(),
        st.frozensets(st.sampled_from(sorted(COUNTED_PERIODS_MS)), max_size=1),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)
"""Each: tenths of a second, kilowatts, heat, signals that are silent, and whether the counter is replaced."""


def counted(
    spans: list[tuple[int, int, bool, frozenset[str], bool]], name: str, gather_ms: int
) -> tuple[float, int, int]:
    """Lives it in steps of 10 ms; returns (truth, value, gap) in mWh or events."""
    spec = COUNTED_SPECS[name]
    meter = Meter(spec, COUNTED_INFOS)
    last: dict[str, SignalValue] = {}
    seen: dict[str, int] = {}
    fresh: dict[str, int] = {}
    changes: list[SignalChange] = []
    meter.open(0, {}, {})
    energy_wh, offset_wh, events, truth, now_ms, was_hot = 0.0, 40.0, 3, 0.0, 0, True
    was_silent = False
    for tenths, kilowatts, heat, silent, is_replaced in spans:
        is_silent = COUNTER in silent
        # Another counter that shows as much as the one before when it was last heard is not told from it.
        if is_replaced and not (is_silent or was_silent):
            offset_wh = -energy_wh
        was_silent = is_silent
        for _ in range(10 * tenths):
            happens = now_ms % 700 == 350
            events += happens
            now: dict[str, SignalValue] = {
                HEAT: int(heat),
                POWER: kilowatts // 0.5 * 0.5,
                COUNTER: (energy_wh + offset_wh) // 10 * 10,
                EVENTS: events % 16,
            }
            for signal, period in COUNTED_PERIODS_MS.items():
                if now_ms % period == 0 and signal not in silent:
                    if last.get(signal) != now[signal]:
                        changes.append(SignalChange(signal, now[signal], now_ms * MS, seen.get(signal)))
                    last[signal] = now[signal]
                    seen[signal] = fresh[signal] = now_ms * MS
            if now_ms % gather_ms == 0:
                meter.observe(SignalBatch(tuple(changes), dict(fresh)), now_ms * MS)
                changes.clear()
                fresh.clear()
            if spec.kind is MeterKind.ENERGY:
                truth += kilowatts / 0.36 if heat else 0
            elif spec.counter:
                truth += happens and (heat or spec.condition is None)
            else:
                truth += heat and not was_hot
            was_hot = heat
            energy_wh += kilowatts / 360
            now_ms += 10
    meter.observe(SignalBatch(tuple(changes), dict(fresh)), now_ms * MS)
    meter.close(now_ms * MS)
    totals = meter.totals_now().values()
    return truth, sum(t.value for t in totals), sum(t.gap for t in totals)


@settings(max_examples=150, deadline=None)
@given(SPANS, st.sampled_from(sorted(COUNTED_SPECS)), st.sampled_from([20, 250]))
def test_the_truth_lies_there_for_energy_and_events(
    spans: list[tuple[int, int, bool, frozenset[str], bool]], name: str, gather_ms: int
) -> None:
    truth, value, gap = counted(spans, name, gather_ms)
    assert value <= truth + 1e-6, f"{name}: billed {value}, truth {truth}"
    assert truth <= value + gap + 1e-6, f"{name}: truth {truth}, declared up to {value + gap}"


def test_what_is_heard_well_is_billed_closely() -> None:
    spans = [(40, 50, True, frozenset[str](), False), (30, 7, False, frozenset[str](), False)] * 3
    expected = {
        "power added up": 0.05,
        # Runs of 55 Wh against steps of 10 Wh: what the power says between them is worth much.
        "counter": 0.3,
        "counter and power": 0.15,
        "counted events": 0.2,
        "bounded events": 0.2,
        "edges": 0.6,
    }
    for name, share in expected.items():
        truth, value, gap = counted(spans, name, 250)
        assert value >= (1 - share) * truth - 1, (name, truth, value, gap)
