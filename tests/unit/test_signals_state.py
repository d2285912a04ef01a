"""Frames become changes with times; what is old, broken or repeated is not known."""

from __future__ import annotations

import struct

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
from agent.signals.mapping import MappingEntry, MessageSettings
from agent.signals.state import Collector, MessageHealth, SignalState

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
