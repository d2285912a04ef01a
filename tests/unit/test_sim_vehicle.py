"""The simulated vehicle drives the cycle, sends what the DBC says, and knows the truth."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest
from crccheck.crc import Crc8SaeJ1850  # type: ignore[import-untyped]
from support.sim_world import (
    DATABASE,
    EXTENDED,
    INSTALL,
    MS,
    UDDS,
    MemoryStore,
    S,
    seat_module,
    token,
    vehicle,
)

from firmware_sim import control
from firmware_sim.ecu import Identity, Powertrain
from firmware_sim.frame import Frame
from firmware_sim.vehicle import ControlError, CycleError, Truth, Vehicle, crc8_j1850, read_cycle


def do(car: Vehicle, line: str, now_ns: int) -> dict[str, object]:
    return control.carry_out(control.parse(line), car, now_ns)


def decoded(frame: Frame) -> dict[str, object]:
    values = DATABASE.decode_message(frame.can_id, frame.data, decode_choices=False)
    assert isinstance(values, dict)
    return dict(values)


def name_of(frame: Frame) -> str:
    return DATABASE.get_message_by_frame_id(frame.can_id).name


def latest(frames: list[Frame], name: str) -> dict[str, object]:
    return decoded(next(f for f in reversed(frames) if name_of(f) == name))


def install(car: Vehicle, now_ns: int, content: bytes) -> None:
    car.request("seat-module", EXTENDED, now_ns)
    answer = car.request("seat-module", INSTALL + content, now_ns)
    assert answer is not None
    assert answer[0] == 0x71


def test_udds_is_11_99_km_long() -> None:
    assert UDDS.duration_s == 1369
    metres = UDDS.distance_um(1369 * S) / 1e6
    assert metres == pytest.approx(11_990, rel=1e-3)


def test_distance_is_the_integral_of_the_speed() -> None:
    step_ns = 10 * MS
    times = range(20 * S, 60 * S, step_ns)
    area_m = sum(UDDS.speed_kmh(t + step_ns // 2) / 3.6 * 0.01 for t in times)
    assert (UDDS.distance_um(60 * S) - UDDS.distance_um(20 * S)) / 1e6 == pytest.approx(area_m, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "line 1"),
        ("time,speed\n0,0\n", "line 1"),
        ("time_s,speed_mph\n0,0.0\n2,0.0\n", "line 3"),
        ("time_s,speed_mph\n0,x\n", "line 2"),
        ("time_s,speed_mph\n0,nan\n1,1.0\n", "line 2"),
        ("time_s,speed_mph\n0,-1\n", "line 2"),
        ("time_s,speed_mph\n0,0.05\n", "line 2"),
        ("time_s,speed_mph\n0,0.0\n", "two points"),
    ],
)
def test_a_broken_cycle_names_its_line(text: str, line: str) -> None:
    with pytest.raises(CycleError, match=line):
        read_cycle(text)


def test_the_checksum_is_that_of_an_independent_implementation() -> None:
    for content in (b"", b"123456789", bytes(range(256))):
        assert crc8_j1850(content) == Crc8SaeJ1850.calc(content)


def test_frames_have_valid_checksums_counters_and_periods() -> None:
    car = vehicle(seat_module(MemoryStore()))
    car.step(0)
    do(car, "ignition on", 0)
    do(car, "drive 20 60", 0)
    frames = car.step(3 * S)
    counters: dict[str, list[int]] = defaultdict(list)
    times: dict[str, list[int]] = defaultdict(list)
    for frame in frames:
        name = name_of(frame)
        assert frame.data[0] == Crc8SaeJ1850.calc(frame.can_id.to_bytes(2, "little") + frame.data[1:])
        assert len(frame.data) == DATABASE.get_message_by_name(name).length
        counters[name].append(int(str(decoded(frame)[f"{name}_COUNTER"])))
        times[name].append(frame.at_ns)
    assert set(counters) == {m.name for m in DATABASE.messages}
    for name, seen in counters.items():
        period_ns = (DATABASE.get_message_by_name(name).cycle_time or 0) * MS
        assert all(after == (before + 1) % 15 for before, after in itertools.pairwise(seen))
        gaps = {after - before for before, after in zip(times[name], times[name][1:], strict=False)}
        assert gaps == {period_ns}
    assert [f.at_ns for f in frames] == sorted(f.at_ns for f in frames)


def test_frames_say_what_the_vehicle_does() -> None:
    car = vehicle(seat_module(MemoryStore()), odometer_m=12345)
    do(car, "ignition on", 0)
    install(car, 0, token(1))
    do(car, "seat 2", 0)
    do(car, "drive 20 30", 0)
    frames = car.step(10 * S - 1)
    moving = [float(str(decoded(f)["VehicleSpeed"])) for f in frames if name_of(f) == "PT_SPEED"]
    assert max(moving) == pytest.approx(UDDS.speed_kmh(30 * S - 20 * MS), abs=0.5)
    odometers = [decoded(f)["Odometer"] for f in frames if name_of(f) == "PT_ODOMETER"]
    driven_m = UDDS.distance_um(30 * S) // 1_000_000 - UDDS.distance_um(20 * S) // 1_000_000
    assert odometers[0] == 12340
    assert odometers[-1] in {(12345 + driven_m) // 10 * 10, (12345 + driven_m - 2) // 10 * 10}
    assert latest(frames, "PT_GEAR")["Gear"] == 3
    power = latest(frames, "BODY_POWER")
    assert (power["IgnitionState"], power["BatteryVoltage"]) == (2, pytest.approx(12.6))
    heat = latest(frames, "SEAT_HEAT")
    assert (heat["HeatLevel"], heat["HeatRequested"], heat["FeatureState"], heat["HeatPower"]) == (
        2,
        2,
        1,
        60,
    )


def test_with_the_ignition_off_the_powertrain_falls_asleep() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    car.step(S)
    do(car, "ignition off", S)
    awake = {name_of(f) for f in car.step(10 * S)}
    car.step(12 * S)
    assert awake == {m.name for m in DATABASE.messages}
    assert {name_of(f) for f in car.step(13 * S)} == {"BODY_POWER", "SEAT_HEAT"}


def test_without_a_right_the_driver_gets_no_heat() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    do(car, "seat 3", 0)
    refused = [h for h in car.take_happenings() if h.name == "heater-refused"]
    assert refused[0].facts == {"ecu": "seat-module", "level": 3, "state": "OFF", "reason": "NO_TOKEN"}
    assert latest(car.step(S), "SEAT_HEAT")["HeatLevel"] == 0
    assert car.truth.heater_on_ns == 0


# --- the truth ---


def journey(step_ns: int) -> tuple[Truth, list[Truth]]:
    """A drive with the heater on for a part of it, stepped by `step_ns`."""
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    install(car, 0, token(1))
    do(car, "drive 20 60", 0)
    lines: list[Truth] = []
    for now_ns in range(step_ns, 50 * S + 1, step_ns):
        car.step(now_ns)
        if now_ns == 10 * S:
            do(car, "seat 1", now_ns)
        if now_ns == 30 * S:
            do(car, "seat 0", now_ns)
        lines += car.take_truths()
    return car.truth, lines


def test_the_truth_is_exact_and_does_not_depend_on_the_steps() -> None:
    truth, lines = journey(S)
    assert truth.heater_on_ns == 20 * S
    assert truth.heated_um == UDDS.distance_um(50 * S) - UDDS.distance_um(30 * S)
    assert truth.driven_um == UDDS.distance_um(60 * S) - UDDS.distance_um(20 * S)
    assert truth.driven_um == truth.odometer_um - 1000 * 1_000_000
    assert truth.feature_on_ns == {1: 50 * S}
    assert truth.feature_on_um == {1: truth.driven_um}
    fine, fine_lines = journey(100 * MS)
    assert fine == truth
    assert fine_lines == lines


def test_truth_is_written_each_second_of_use_and_at_each_change() -> None:
    _, lines = journey(S)
    per_second = Counter(line.at_ns // S for line in lines)
    assert all(per_second[second] >= 1 for second in range(40))
    assert {line.heat_level for line in lines if line.at_ns == 10 * S} == {0, 1}
    assert all(after.odometer_um >= before.odometer_um for before, after in itertools.pairwise(lines))
    assert len([line for line in lines if line.at_ns > 40 * S]) == 0


def test_a_drive_ends_at_its_moment_however_late_the_step() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    do(car, "drive 100 110", 0)
    do(car, "seat 1", 50 * S)
    assert car.truth.driven_um == UDDS.distance_um(110 * S) - UDDS.distance_um(100 * S)
    assert car.speed_kmh == 0
    ended = next(h for h in car.take_happenings() if h.name == "drive-ended")
    assert ended.at_ns == 10 * S


def test_ignition_off_ends_drive_and_heat() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    install(car, 0, token(1))
    do(car, "seat 1", 0)
    do(car, "drive 100 200", 0)
    car.step(5 * S)
    do(car, "ignition off", 5 * S)
    car.step(20 * S)
    assert car.truth.heater_on_ns == 5 * S
    assert car.truth.driven_um == UDDS.distance_um(105 * S) - UDDS.distance_um(100 * S)


# --- faults and commands ---


def faulty(line: str, name: str) -> list[Frame]:
    """Frames of a message from 0 to 3 s, with a fault from 1 s for 1 s."""
    car = vehicle(seat_module(MemoryStore()))
    frames = car.step(S - 1)
    do(car, line, S)
    frames += car.step(3 * S)
    return [f for f in frames if name_of(f) == name]


def test_dropped_frames_leave_a_gap_in_time_and_counter() -> None:
    frames = faulty("fault drop SEAT_HEAT 1", "SEAT_HEAT")
    gap_ns = max(b.at_ns - a.at_ns for a, b in itertools.pairwise(frames))
    assert 1000 * MS <= gap_ns <= 1100 * MS


def test_a_wrong_checksum_lasts_as_long_as_the_fault() -> None:
    frames = faulty("fault crc SEAT_HEAT 1", "SEAT_HEAT")
    wrong = [
        f.at_ns for f in frames if f.data[0] != Crc8SaeJ1850.calc(f.can_id.to_bytes(2, "little") + f.data[1:])
    ]
    assert len(wrong) == 10
    assert min(wrong) >= S
    assert max(wrong) < 2 * S


def test_a_frozen_counter_has_a_right_checksum() -> None:
    frames = faulty("fault freeze SEAT_HEAT 1", "SEAT_HEAT")
    frozen = [f for f in frames if S <= f.at_ns < 2 * S]
    assert len({f.data[1] for f in frozen}) == 1
    assert all(f.data[0] == Crc8SaeJ1850.calc(f.can_id.to_bytes(2, "little") + f.data[1:]) for f in frozen)


def test_a_silent_ecu_answers_again_after_the_fault() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "fault silent seat-module 2", 0)
    assert car.request("seat-module", bytes.fromhex("3E00"), S) is None
    assert car.request("seat-module", bytes.fromhex("3E00"), 2 * S) == bytes.fromhex("7E00")


def test_a_reset_ecu_is_silent_and_comes_back_with_its_right() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    install(car, 0, token(1))
    do(car, "seat 1", 0)
    car.step(S)
    do(car, "ecu seat-module reset", S)
    frames = [f for f in car.step(2 * S) if name_of(f) == "SEAT_HEAT"]
    assert min(f.at_ns for f in frames) >= 1200 * MS
    assert latest(frames, "SEAT_HEAT")["HeatLevel"] == 1
    lost_ns = 2 * S - car.truth.heater_on_ns
    assert 200 * MS <= lost_ns <= 230 * MS


def test_a_reset_powertrain_sends_nothing_while_it_boots() -> None:
    identity = Identity("powertrain", "hw", "WFDSEAT10N0000001", bytes(16), 0x7E0, 0x7E8)
    powertrain = Powertrain(identity, odometer_m=lambda: 0, now_ns=0)
    car = vehicle(seat_module(MemoryStore()), others=(powertrain,))
    do(car, "ignition on", 0)
    car.step(S)
    do(car, "ecu powertrain reset", S)
    assert {name_of(f) for f in car.step(1200 * MS - 1)} == {"BODY_POWER", "SEAT_HEAT"}
    assert "PT_SPEED" in {name_of(f) for f in car.step(1300 * MS)}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "drive",
        "drive 1",
        "drive -1 5",
        "drive 1 x",
        "drive 0 9999999",
        "ignition maybe",
        "seat",
        "seat \u0663",
        "ecu seat-module explode",
        "fault",
        "fault drop SEAT_HEAT",
        "fault burn SEAT_HEAT 1",
        "fault drop SEAT_HEAT 86401",
        "truth " + "x" * 300,
    ],
)
def test_what_is_no_command_is_refused(line: str) -> None:
    with pytest.raises(ControlError, match="not a command"):
        control.parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "drive 5 5",
        "drive 0 1370",
        "seat 4",
        "ecu nobody reset",
        "fault drop NOTHING 1",
        "fault silent SEAT_HEAT 1",
    ],
)
def test_a_command_that_does_not_fit_changes_nothing(line: str) -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    before = car.truth
    with pytest.raises(ControlError):
        do(car, line, 0)
    assert car.truth == before


def test_nothing_drives_with_the_ignition_off() -> None:
    with pytest.raises(ControlError, match="ignition"):
        do(vehicle(seat_module(MemoryStore())), "drive 0 10", 0)


def test_truth_answers_with_the_moment_asked_for() -> None:
    car = vehicle(seat_module(MemoryStore()))
    do(car, "ignition on", 0)
    do(car, "drive 20 30", 0)
    answer = do(car, "truth", 7 * S)
    assert answer["event"] == "truth"
    expected_um = UDDS.distance_um(27 * S) - UDDS.distance_um(20 * S)
    assert answer["total_distance_m"] == expected_um / 1e6
