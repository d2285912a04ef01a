"""Frames become changes with times; what is old, broken or repeated is not known."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from support.signals_data import (
    data_file,
    entry,
    feed,
    load,
    map_all,
    simulated_database,
    small_database,
    table_of,
)

from agent.adapters.replay import replay_log
from agent.errors import DatabaseError
from agent.model import Frame, SignalChange
from agent.signals.checks import Scheme, j1850_crc
from agent.signals.database import parse
from agent.signals.mapping import MappingEntry, MessageSettings
from agent.signals.state import Collector, MessageHealth, SignalState
from agent.signals.table import CAN_EFF_FLAG, parameter_group

MS = 1_000_000


def small_collector(*entries: MappingEntry) -> Collector:
    return Collector({"b": table_of(small_database(), *entries)})


SPEED = entry("Vehicle.Speed", "SPEEDS", "SPEED", max_age_ms=500)
STATE = entry("Vehicle.State", "SPEEDS", "STATE", text=True)


def speeds(raw: int, at_ms: int, *, state: int = 0, rest: bytes = b"\0\0\0") -> Frame:
    data = struct.pack("<HHB", raw, 0, state) + rest
    return Frame(bus="b", can_id=256, data=data, monotonic_ns=at_ms * MS)


def test_the_first_value_has_no_time_before_it() -> None:
    collector = small_collector(SPEED)
    feed(collector, speeds(100, 10))
    batch = collector.drain()
    assert batch.changes == (SignalChange("Vehicle.Speed", 1.0, 10 * MS, None),)
    assert batch.seen_ns == {"Vehicle.Speed": 10 * MS}


def test_a_change_lies_between_the_frame_before_and_its_own() -> None:
    collector = small_collector(SPEED)
    for at_ms, raw in ((10, 100), (30, 100), (50, 200), (70, 300)):
        feed(collector, speeds(raw, at_ms))
    changes = collector.drain().changes
    assert [(c.value, c.at_ns, c.previous_seen_ns) for c in changes[1:]] == [
        (2.0, 50 * MS, 30 * MS),
        (3.0, 70 * MS, 50 * MS),
    ]


def test_other_bits_change_nothing_but_keep_the_value_alive() -> None:
    collector = small_collector(SPEED)
    feed(collector, speeds(100, 10))
    collector.drain()
    feed(collector, speeds(100, 20, rest=b"\x01\x02\x03"))
    batch = collector.drain()
    assert batch.changes == ()
    assert batch.seen_ns == {"Vehicle.Speed": 20 * MS}


def test_a_batch_does_not_change_after_it_was_drained() -> None:
    collector = small_collector(SPEED)
    feed(collector, speeds(100, 10))
    batch = collector.drain()
    feed(collector, speeds(200, 20))
    assert batch.seen_ns == {"Vehicle.Speed": 10 * MS}
    assert len(batch.changes) == 1


def test_a_short_frame_is_counted_and_brings_nothing() -> None:
    collector = small_collector(SPEED)
    feed(collector, Frame(bus="b", can_id=256, data=b"\x01\x02", monotonic_ns=1))
    assert collector.drain().seen_ns == {}
    assert collector.health["b", "SPEEDS"] == MessageHealth(too_short=1)


def test_frames_of_other_buses_and_formats_are_not_taken() -> None:
    collector = small_collector(SPEED)
    data = bytes(8)
    feed(collector, Frame(bus="other", can_id=256, data=data))
    feed(collector, Frame(bus="b", can_id=256, data=data, is_extended=True))
    feed(collector, Frame(bus="b", can_id=257, data=data))
    assert collector.drain().seen_ns == {}


def test_a_number_without_text_is_no_value() -> None:
    collector = small_collector(STATE)
    feed(collector, speeds(0, 10, state=1))
    feed(collector, speeds(0, 20, state=7))
    batch = collector.drain()
    assert [c.value for c in batch.changes] == ["ON"]
    assert batch.seen_ns == {"Vehicle.State": 10 * MS}


def test_a_value_that_is_not_finite_is_no_value() -> None:
    database = load(data_file("cantools/floating_point.dbc"))
    entries = map_all(database)
    collector = Collector({"b": table_of(database, *entries)})
    message = next(m for m in database.messages.values() if m.length == 8 and len(m.signals) == 1)
    for value in (float("nan"), float("inf")):
        data = struct.pack("<d", value)
        feed(collector, Frame("b", message.frame_id, data, is_extended=message.is_extended_frame))
    assert collector.drain().changes == ()


def test_two_buses_may_not_bring_the_same_signal() -> None:
    table = table_of(small_database(), SPEED)
    with pytest.raises(DatabaseError, match=r"bus c: Vehicle\.Speed come from another bus already"):
        Collector({"b": table, "c": table})


# --- checks ------------------------------------------------------------------


def gear(value: int, counter: int, at_ms: int = 0, *, crc_error: int = 0) -> Frame:
    body = bytes([counter, value, 0])
    crc = j1850_crc(b"\xa4\0" + body) ^ crc_error
    return Frame(bus="b", can_id=164, data=bytes([crc]) + body, monotonic_ns=at_ms * MS)


def checked_collector() -> Collector:
    gear = entry("Vehicle.Gear", "PT_GEAR", "Gear", text=True)
    settings = (MessageSettings("PT_GEAR", check=Scheme.OPENFOD_J1850),)
    return Collector({"b": table_of(simulated_database(), gear, messages=settings)})


def test_a_frame_with_a_wrong_checksum_is_never_used() -> None:
    collector = checked_collector()
    feed(collector, gear(3, 0, 10))
    for bit in range(8):
        feed(collector, gear(1, 1, 20, crc_error=1 << bit))
    batch = collector.drain()
    assert [c.value for c in batch.changes] == ["D"]
    assert batch.seen_ns == {"Vehicle.Gear": 10 * MS}
    assert collector.health["b", "PT_GEAR"] == MessageHealth(used=1, check_failed=8)


def test_a_jump_of_the_counter_is_counted_and_the_value_used() -> None:
    collector = checked_collector()
    for counter, value in ((13, 0), (14, 0), (0, 0), (4, 3)):
        feed(collector, gear(value, counter))
    assert [c.value for c in collector.drain().changes] == ["P", "D"]
    assert collector.health["b", "PT_GEAR"] == MessageHealth(used=4, lost=3)


def test_a_repeated_counter_keeps_no_value_alive() -> None:
    collector = checked_collector()
    feed(collector, gear(3, 5, 10))
    feed(collector, gear(3, 5, 20))
    assert collector.drain().seen_ns == {"Vehicle.Gear": 10 * MS}
    assert collector.health["b", "PT_GEAR"] == MessageHealth(used=1, repeated=1)


def test_a_counter_beyond_its_range_fails_the_check() -> None:
    collector = checked_collector()
    feed(collector, gear(3, 15))
    assert collector.health["b", "PT_GEAR"] == MessageHealth(check_failed=1)


def test_a_real_drive_passes_its_checks() -> None:
    database = load(data_file("honda_civic_touring_2016_can_generated.dbc"))
    speed = entry("Vehicle.Speed", "ENGINE_DATA", "XMISSION_SPEED", unit="km/h")
    settings = (MessageSettings("ENGINE_DATA", check=Scheme.HONDA),)
    collector = Collector({"b": table_of(database, speed, messages=settings)})
    for frame in replay_log(data_file("civic_typeR_turnonanddrive.log"), "b"):
        feed(collector, frame)
    batch = collector.drain()
    health = collector.health["b", "ENGINE_DATA"]
    assert (health.check_failed, health.too_short) == (0, 0)
    assert health.used > 1600
    assert max(float(c.value) for c in batch.changes) == pytest.approx(8.9, abs=0.1)


# --- losses ------------------------------------------------------------------


def test_a_loss_is_said_with_the_next_frame_and_once() -> None:
    collector = small_collector(SPEED)
    feed(collector, speeds(100, 10))
    collector.drain()
    collector.lost("b")
    assert collector.drain().broken == {}
    feed(collector, speeds(100, 30))
    batch = collector.drain()
    assert batch.changes == ()
    assert batch.seen_ns == {"Vehicle.Speed": 30 * MS}
    assert batch.broken.keys() == {"Vehicle.Speed"}
    feed(collector, speeds(100, 50))
    assert collector.drain().broken == {}


def test_a_loss_after_the_last_frame_of_a_window_belongs_to_the_next() -> None:
    collector = small_collector(SPEED)
    feed(collector, speeds(100, 10))
    collector.lost("b")
    feed(collector, speeds(100, 20))
    collector.lost("b")
    assert collector.drain().broken.keys() == {"Vehicle.Speed"}
    feed(collector, speeds(100, 30))
    assert collector.drain().broken.keys() == {"Vehicle.Speed"}


def test_a_loss_of_another_bus_breaks_nothing() -> None:
    collector = small_collector(SPEED)
    feed(collector, speeds(100, 10))
    collector.lost("other")
    feed(collector, speeds(100, 20))
    assert collector.drain().broken == {}


def test_frames_that_cannot_be_used_break_the_course() -> None:
    for spoilt in (gear(3, 6, 20, crc_error=1), gear(3, 15, 20), Frame("b", 164, b"\1", 20 * MS)):
        collector = checked_collector()
        feed(collector, gear(3, 5, 10), spoilt, gear(3, 7, 30))
        assert collector.drain().broken.keys() == {"Vehicle.Gear"}


def test_a_jump_of_the_counter_breaks_the_course_and_a_repeated_one_does_not() -> None:
    collector = checked_collector()
    feed(collector, gear(3, 5, 10), gear(3, 8, 20))
    assert collector.drain().broken.keys() == {"Vehicle.Gear"}
    feed(collector, gear(3, 8, 30), gear(3, 9, 40))
    assert collector.drain().broken == {}


def test_after_a_loss_any_counter_begins_anew() -> None:
    collector = checked_collector()
    feed(collector, gear(3, 5, 10))
    collector.lost("b")
    feed(collector, gear(3, 5, 20))
    assert collector.health["b", "PT_GEAR"] == MessageHealth(used=2)


def test_a_text_that_is_not_listed_breaks_the_course_of_its_signal_alone() -> None:
    collector = small_collector(STATE, SPEED)
    feed(collector, speeds(100, 10, state=1), speeds(100, 20, state=7), speeds(100, 30, state=1))
    batch = collector.drain()
    assert batch.broken.keys() == {"Vehicle.State"}
    assert batch.seen_ns == {"Vehicle.State": 30 * MS, "Vehicle.Speed": 30 * MS}
    assert [c.value for c in batch.changes if c.name == "Vehicle.State"] == ["ON"]


# --- intervals ---------------------------------------------------------------


def test_between_two_values_lies_the_interval_and_what_is_skipped_breaks_the_course() -> None:
    collector = small_collector(entry("Vehicle.Speed", "SPEEDS", "SPEED", interval_ms=100))
    feed(collector, *(speeds(raw, at_ms) for raw, at_ms in ((1, 0), (2, 40), (2, 90), (2, 120), (2, 140))))
    batch = collector.drain()
    assert [(c.value, c.at_ns, c.previous_seen_ns) for c in batch.changes] == [
        (0.01, 0, None),
        (0.02, 120 * MS, 0),
    ]
    assert batch.seen_ns == {"Vehicle.Speed": 140 * MS}
    assert batch.broken.keys() == {"Vehicle.Speed"}


def test_a_value_that_came_and_went_within_the_interval_is_not_counted_through() -> None:
    collector = small_collector(entry("Vehicle.Speed", "SPEEDS", "SPEED", interval_ms=100))
    feed(collector, speeds(1, 0), speeds(2, 20), speeds(1, 40))
    batch = collector.drain()
    assert [c.value for c in batch.changes] == [0.01]
    assert batch.seen_ns == {"Vehicle.Speed": 40 * MS}
    assert batch.broken.keys() == {"Vehicle.Speed"}


# --- SAE J1939 ---------------------------------------------------------------

EEC1 = """VERSION "1"

BU_: A

BO_ 2364540158 EEC1: 8 A
 SG_ EngineSpeed : 24|16@1+ (0.125,0) [0|8031.875] "rpm" A
 SG_ Mode : 0|4@1+ (1,0) [0|15] "" A
 SG_ Switch : 4|2@1+ (1,0) [0|3] "" A
"""
"""Electronic engine controller 1, PGN 61444, from source address 0xFE at priority 3."""


def j1939_collector(*, any_source: bool = True) -> Collector:
    database = parse(EEC1, Path("j1939.dbc"))
    entries = [entry(f"A.{name}", "EEC1", name) for name in ("EngineSpeed", "Mode", "Switch")]
    return Collector(
        {"b": table_of(database, *entries, messages=(MessageSettings("EEC1", any_source=any_source),))}
    )


def eec1(can_id: int, data: str) -> dict[str, object]:
    collector = j1939_collector()
    collector.feed("b", [(can_id, bytes.fromhex(data), 1)])
    return {change.name: change.value for change in collector.drain().changes}


def test_a_parameter_group_is_read_from_any_source_and_priority() -> None:
    payload = "21ffff6813ffffff"
    for can_id in (0x8CF004FE, 0x8CF00400, 0x98F00403):
        assert eec1(can_id, payload) == {"A.EngineSpeed": 621.0, "A.Mode": 1, "A.Switch": 2}


def test_other_groups_errors_and_short_identifiers_are_not_taken() -> None:
    for can_id in (0x8CF005FE, 0x8DF004FE, 0x0CF004FE, 0xACF004FE, 0xCCF004FE, 0x4FE):
        assert eec1(can_id, "21ffff6813ffffff") == {}


def test_not_available_and_error_are_no_values() -> None:
    assert eec1(0x8CF00400, "ffffffffffffffff") == {}
    assert eec1(0x8CF00400, "2fffff00feffffff") == {"A.Switch": 2}
    assert eec1(0x8CF00400, "0effffffFDffffff") == {"A.EngineSpeed": 8127.875, "A.Mode": 14, "A.Switch": 0}


def test_addressed_groups_ignore_their_destination() -> None:
    assert parameter_group(CAN_EFF_FLAG | 0x18EF1234) == parameter_group(CAN_EFF_FLAG | 0x0CEFFF00) == 0xEF00
    assert parameter_group(CAN_EFF_FLAG | 0x19F00412) == 0x1F004


def test_without_any_source_the_identifier_counts_as_it_is() -> None:
    collector = j1939_collector(any_source=False)
    collector.feed("b", [(0x8CF00400, bytes(8), 1)])
    assert collector.drain().seen_ns == {}
    collector.feed("b", [(0x8CF004FE, b"\xff" * 8, 1)])
    assert {c.name: c.value for c in collector.drain().changes}["A.EngineSpeed"] == 0xFFFF * 0.125


def test_a_bus_with_parameter_groups_receives_everything() -> None:
    database = parse(EEC1, Path("j1939.dbc"))
    speed = entry("A.EngineSpeed", "EEC1", "EngineSpeed")
    table = table_of(database, speed, messages=(MessageSettings("EEC1", any_source=True),))
    assert table.can_ids is None
    assert table_of(database, speed).can_ids == frozenset({0x8CF004FE})


# --- current values ----------------------------------------------------------


def test_a_value_is_known_until_its_longest_age() -> None:
    collector = small_collector(SPEED)
    state = SignalState(collector.infos)
    assert state.value("Vehicle.Speed", 0) is None
    assert state.age_ns("Vehicle.Speed", 0) is None
    feed(collector, speeds(100, 10))
    state.apply(collector.drain())
    assert state.value("Vehicle.Speed", 509 * MS) == 1.0
    assert state.value("Vehicle.Speed", 510 * MS) is None
    assert state.age_ns("Vehicle.Speed", 510 * MS) == 500 * MS


def test_a_value_that_is_seen_again_is_known_again() -> None:
    collector = small_collector(SPEED)
    state = SignalState(collector.infos)
    feed(collector, speeds(100, 10))
    state.apply(collector.drain())
    feed(collector, speeds(100, 600))
    state.apply(collector.drain())
    assert state.value("Vehicle.Speed", 900 * MS) == 1.0


def test_a_name_that_nobody_subscribed_is_unknown() -> None:
    assert SignalState({}).value("Vehicle.Speed", 0) is None


def test_a_snapshot_shows_ages_of_known_and_unknown_values() -> None:
    collector = small_collector(SPEED, STATE)
    state = SignalState(collector.infos)
    feed(collector, speeds(100, 10, state=7))
    state.apply(collector.drain())
    readings = state.snapshot(700 * MS)
    assert (readings["Vehicle.Speed"].value, readings["Vehicle.Speed"].age_ms) == (None, 690)
    assert (readings["Vehicle.State"].value, readings["Vehicle.State"].age_ms) == (None, None)
