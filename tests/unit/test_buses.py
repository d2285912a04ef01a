"""Readers decode signals themselves: what the loop is told at once, and what may gather."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import can
import pytest
from support.signals_bus import wait_until

from agent.adapters.can_bus import BusState
from agent.buses import MAX_EARLY_FRAMES, Buses, Dropped, Frames, SignalsReady, StateChanged
from agent.config import AgentConfig, BusConfig, StateConfig, VehicleConfig
from agent.signals.state import Collector

DBC = """VERSION ""

BU_: A

BO_ 256 M: 2 A
 SG_ SPEED : 0|8@1+ (1,0) [0|255] "km/h" A
 SG_ GEAR : 8|8@1+ (1,0) [0|255] "" A
"""
MAPPING = """
[[signals]]
vss = "Vehicle.Speed"
message = "M"
signal = "SPEED"
unit = "km/h"
max_age_ms = 1000

[[signals]]
vss = "Vehicle.Gear"
message = "M"
signal = "GEAR"
unit = ""
max_age_ms = 1000
"""
FAR_NS = 2**62
"""A time that does not come: nothing is told because it is due."""
URGENT = frozenset({"Vehicle.Gear"})


class Vehicle:
    """A virtual bus, its buses in the agent, and what they said."""

    def __init__(self, folder: Path) -> None:
        (folder / "m.dbc").write_text(DBC)
        (folder / "m.toml").write_text(MAPPING)
        self.channel = uuid4().hex
        bus = BusConfig(
            name="b",
            interface="virtual",
            channel=self.channel,
            database=folder / "m.dbc",
            signals=folder / "m.toml",
        )
        config: Any = SimpleNamespace(
            buses=(bus,),
            state=StateConfig(directory=folder),
            vehicle=VehicleConfig(vin="1FTFW1ET5DFC10312"),
        )
        self.buses = Buses(cast("AgentConfig", config))
        self.collector = Collector(self.buses.tables)
        self.sender = can.Bus(interface="virtual", channel=self.channel)
        self.buses.open()
        state = self.buses.queue.get(timeout=5)
        assert isinstance(state, StateChanged)
        assert state.state is BusState.UP

    def send(self, speed: int, gear: int, can_id: int = 0x100) -> None:
        """Puts one frame on the bus, and waits until the agent has it."""
        counts = self.buses.by_name["b"].counts
        before = counts.frames
        self.sender.send(can.Message(arbitration_id=can_id, data=[speed, gear], is_extended_id=False))
        wait_until(lambda: counts.frames > before)

    def told(self) -> list[type]:
        """What stands in the queue, by kind."""
        return [type(self.buses.queue.get()) for _ in range(self.buses.queue.qsize())]


@pytest.fixture
def vehicle(tmp_path: Path) -> Iterator[Vehicle]:
    made = Vehicle(tmp_path)
    try:
        yield made
    finally:
        made.buses.close()
        made.sender.shutdown()


def test_what_came_before_there_was_a_reader_is_read(vehicle: Vehicle) -> None:
    vehicle.send(50, 1)
    vehicle.send(60, 1)
    assert vehicle.told() == []
    vehicle.buses.attach(vehicle.collector)
    assert vehicle.told() == [SignalsReady]
    changes = vehicle.buses.drain(FAR_NS).changes
    assert [(c.name, c.value) for c in changes if c.name == "Vehicle.Speed"] == [
        ("Vehicle.Speed", 50),
        ("Vehicle.Speed", 60),
    ]


def test_a_flood_before_there_is_a_reader_is_bounded_and_declared(vehicle: Vehicle) -> None:
    vehicle.send(50, 1)
    for _ in range(MAX_EARLY_FRAMES):
        vehicle.sender.send(can.Message(arbitration_id=0x100, data=[60, 1], is_extended_id=False))
    counts = vehicle.buses.by_name["b"].counts
    wait_until(lambda: counts.frames > MAX_EARLY_FRAMES)
    vehicle.buses.attach(vehicle.collector)
    batch = vehicle.buses.drain(FAR_NS)
    assert batch.broken["Vehicle.Speed"] == -1, "nothing is known of the time before"
    assert [change.value for change in batch.changes if change.name == "Vehicle.Speed"] == [60]


def test_a_change_that_decides_something_is_told_at_once_and_all_others_gather(vehicle: Vehicle) -> None:
    vehicle.buses.attach(vehicle.collector)
    vehicle.send(50, 1)
    assert vehicle.told() == [SignalsReady], "the first frame is due"
    vehicle.buses.drain(FAR_NS)
    vehicle.buses.look_for(URGENT)
    vehicle.send(51, 1)
    vehicle.send(52, 1)
    assert vehicle.told() == []
    vehicle.send(53, 2)
    vehicle.send(54, 3)
    assert vehicle.told() == [SignalsReady], "once, until it is fetched"
    changes = vehicle.buses.drain(FAR_NS).changes
    assert [c.value for c in changes if c.name == "Vehicle.Speed"] == [51, 52, 53, 54]
    vehicle.send(55, 4)
    assert vehicle.told() == [SignalsReady]


def test_what_has_gathered_is_told_when_it_is_due(vehicle: Vehicle) -> None:
    vehicle.buses.attach(vehicle.collector)
    vehicle.send(50, 1)
    vehicle.told()
    vehicle.buses.drain(0)
    vehicle.send(50, 1)
    assert vehicle.told() == [SignalsReady]


def test_a_change_just_before_it_became_urgent_is_told_with_the_next_frame(vehicle: Vehicle) -> None:
    vehicle.buses.attach(vehicle.collector)
    vehicle.send(50, 1)
    vehicle.told()
    vehicle.buses.drain(FAR_NS)
    vehicle.send(50, 2)
    assert vehicle.told() == []
    vehicle.buses.look_for(URGENT)
    vehicle.send(50, 2)
    assert vehicle.told() == [SignalsReady]


def test_frames_of_ecus_are_told_at_once(vehicle: Vehicle) -> None:
    vehicle.buses.attach(vehicle.collector)
    vehicle.send(50, 1)
    vehicle.told()
    vehicle.buses.drain(FAR_NS)
    vehicle.buses.receive({"b": frozenset({0x7E8})})
    vehicle.send(1, 2, can_id=0x7E8)
    answer = vehicle.buses.queue.get(timeout=5)
    assert isinstance(answer, Frames)
    assert [frame.data for frame in answer.frames] == [bytes([1, 2])]
    assert vehicle.told() == []


def test_after_a_loss_the_signals_are_told_of_soon(vehicle: Vehicle) -> None:
    vehicle.buses.attach(vehicle.collector)
    vehicle.send(50, 1)
    vehicle.told()
    before = vehicle.buses.drain(FAR_NS).seen_ns["Vehicle.Speed"]
    bus = vehicle.buses.by_name["b"]
    bus._on_dropped("b", before, before + 1, 3)
    assert vehicle.told() == [Dropped]
    vehicle.send(50, 1)
    assert vehicle.told() == [SignalsReady]
    batch = vehicle.buses.drain(FAR_NS)
    assert batch.broken["Vehicle.Speed"] == before
    assert not batch.changes
