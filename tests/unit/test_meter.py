"""Meters: what is confirmed counts, what is not is declared, and nothing else."""

from __future__ import annotations

from agent.metering.meter import Dimensions, Meter, Total
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
INFOS = {
    HEAT: SignalInfo(HEAT, "percent", 1, 1000 * MS),
    SPEED: SignalInfo(SPEED, "km/h", 0.01, 500 * MS),
    ODO: SignalInfo(ODO, "km", 0.01, 1000 * MS),
}
HEATING = ConditionSpec(f"{HEAT} > 0", (HEAT,))
TIME = MeterSpec("active-time", MeterKind.DURATION, HEATING)
WAY = MeterSpec("distance", MeterKind.DISTANCE, None, odometer=ODO, speed=SPEED)
WARM_WAY = MeterSpec("warm", MeterKind.DISTANCE, HEATING, odometer=ODO, speed=SPEED)
MOTION = MeterSpec(
    "time",
    MeterKind.DURATION,
    None,
    dimensions=(
        DimensionSpec(
            "motion",
            (
                ("driving", ConditionSpec(f"{SPEED} >= 1.0", (SPEED,))),
                ("parked", ConditionSpec(f"{SPEED} < 1.0", (SPEED,))),
            ),
        ),
    ),
)


class Bench:
    """Feeds a meter with frames at given milliseconds, as a collector would."""

    def __init__(self, spec: MeterSpec, **start: SignalValue) -> None:
        self.meter = Meter(spec, INFOS)
        self.values: dict[str, SignalValue] = {}
        self.seen: dict[str, int] = {}
        names = {"heat": HEAT, "speed": SPEED, "odo": ODO}
        for key, value in start.items():
            self.values[names[key]] = value
            self.seen[names[key]] = 0

    def open(self, at_ms: int, unsure_ms: int = 0) -> None:
        self.meter.open(at_ms * MS, self.values, self.seen, unsure_ns=unsure_ms * MS)

    def frames(self, *frames: tuple[int, str, SignalValue]) -> None:
        changes = []
        for at_ms, name, value in frames:
            if self.values.get(name) != value:
                changes.append(SignalChange(name, value, at_ms * MS, self.seen.get(name)))
            self.values[name], self.seen[name] = value, at_ms * MS
        self.meter.observe(SignalBatch(tuple(changes), dict(self.seen)), max(self.seen.values()))

    def total(self, key: Dimensions = ()) -> Total:
        return self.meter.totals_now().get(key, Total())


def test_time_counts_between_frames_that_confirm_it_and_the_edges_are_declared() -> None:
    bench = Bench(TIME, heat=0)
    bench.open(0)
    bench.frames((100, HEAT, 0), (200, HEAT, 1), (300, HEAT, 1), (400, HEAT, 1), (500, HEAT, 0))
    total = bench.total()
    assert (total.value, total.gap, total.reason) == (200, 200, "EDGE")


def test_a_silence_longer_than_the_maximum_age_is_declared_and_not_counted() -> None:
    bench = Bench(TIME, heat=1)
    bench.open(0)
    bench.frames((500, HEAT, 1))
    bench.frames((3000, HEAT, 1))
    bench.frames((3500, HEAT, 1))
    total = bench.total()
    assert (total.value, total.gap, total.reason) == (1000, 2500, "SIGNAL")


def test_closing_declares_what_no_frame_confirmed() -> None:
    bench = Bench(TIME, heat=1)
    bench.open(0)
    bench.frames((400, HEAT, 1))
    bench.meter.close(450 * MS)
    total = bench.total()
    assert (total.value, total.gap) == (400, 50)


def test_the_time_from_request_to_read_back_is_declared() -> None:
    bench = Bench(TIME, heat=0)
    bench.open(1000, unsure_ms=35)
    assert bench.total().gap == 35


def test_windows_add_up_to_the_whole_to_the_millisecond() -> None:
    bench = Bench(TIME, heat=1)
    bench.open(0)
    taken = 0
    for n in range(1, 101):
        bench.seen[HEAT] = n * 333_333
        bench.meter.observe(SignalBatch((), dict(bench.seen)), n * 333_333)
        taken += bench.meter.take().get((), Total()).value
    assert taken == 33


def test_distance_is_the_odometer_difference_less_the_first_step() -> None:
    bench = Bench(WAY, odo=100.00, speed=50.0)
    bench.open(0)
    for n in range(1, 11):
        bench.frames((n * 700, SPEED, 50.0), (n * 700, ODO, round(100 + n * 0.01, 2)))
    bench.meter.close(7000 * MS)
    total = bench.total()
    assert total.value == 90
    # Up to a step less at its beginning, and as much more at its end.
    assert total.gap == 20


def test_what_was_driven_before_the_start_is_not_billed_however_old_the_reading() -> None:
    bench = Bench(WAY, odo=100.00, speed=180.0)
    bench.seen[SPEED] = 900 * MS
    bench.open(900)  # 50 m/s: 45 m since the odometer was heard
    for n in range(10, 21):
        bench.frames((n * 100, SPEED, 180.0), (n * 100, ODO, round(100 + n // 2 * 0.01, 2)))
    bench.meter.close(2000 * MS)
    total, driven_m = bench.total(), 55
    assert total.value <= driven_m <= total.value + total.gap
    assert total.value >= driven_m - 20


def test_an_odometer_that_outruns_the_speed_is_not_billed() -> None:
    bench = Bench(WAY, odo=100.00, speed=36.0)
    bench.open(0)
    bench.frames((1000, SPEED, 36.0), (1000, ODO, 100.01))
    bench.frames((2000, SPEED, 36.0), (2000, ODO, 900.00))
    bench.frames((3000, SPEED, 36.0), (3000, ODO, 900.01))
    total = bench.total()
    assert total.value == 0
    assert total.reason == "SIGNAL" or total.gap < 200


def test_an_odometer_that_goes_back_is_declared_and_metering_goes_on() -> None:
    bench = Bench(WAY, odo=2.54, speed=72.0)
    bench.open(0)
    bench.frames((500, SPEED, 72.0), (500, ODO, 2.55))
    bench.frames((1000, SPEED, 72.0), (1000, ODO, 0.01))
    for n in range(2, 12):
        bench.frames((500 + n * 500, SPEED, 72.0), (500 + n * 500, ODO, round(0.01 * n, 2)))
    total = bench.total()
    assert 80 <= total.value <= 110
    assert total.value <= 130 <= total.value + total.gap


def test_a_step_after_the_last_confirming_frame_is_not_billed() -> None:
    bench = Bench(WARM_WAY, odo=1.00, heat=1, speed=30.0)
    bench.open(0)
    bench.frames((500, HEAT, 1), (500, ODO, 1.01), (500, SPEED, 30.0))
    # The heater went off between 600 and 900; the odometer moved on at 700.
    bench.frames((600, HEAT, 1), (700, ODO, 1.02), (900, HEAT, 0), (900, SPEED, 30.0), (900, ODO, 1.03))
    total = bench.total()
    assert total.value == 0
    assert total.gap >= 30


def test_duration_by_dimension_declares_the_change_in_both() -> None:
    bench = Bench(MOTION, speed=0.0)
    bench.open(0)
    for at_ms in range(100, 1100, 100):
        bench.frames((at_ms, SPEED, 0.0))
    for at_ms in range(1100, 2100, 100):
        bench.frames((at_ms, SPEED, 20.0))
    parked, driving = bench.total((("motion", "parked"),)), bench.total((("motion", "driving"),))
    assert (parked.value, driving.value) == (1000, 900)
    assert (parked.gap, driving.gap) == (100, 100)
