"""The truth adds up, whatever the vehicle is told and however time is cut."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from support.sim_world import EXTENDED, INSTALL, MS, UDDS, MemoryStore, S, seat_module, token, vehicle

from firmware_sim import control
from firmware_sim.vehicle import ControlError

COMMANDS = st.sampled_from(
    [
        "ignition on",
        "ignition off",
        "seat 0",
        "seat 2",
        "drive 20 25",
        "drive 100 104",
        "stop",
        "ecu seat-module reset",
    ]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4000), COMMANDS), max_size=12))
def test_parts_never_exceed_the_whole(script: list[tuple[int, str]]) -> None:
    car = vehicle(seat_module(MemoryStore()))
    car.request("seat-module", EXTENDED, 0)
    car.request("seat-module", INSTALL + token(1, terms={5: 3, 6: 4}), 0)
    now_ns, frames = 0, 0
    for wait_ms, line in script:
        now_ns += wait_ms * MS
        frames += len(car.step(now_ns))
        try:
            control.carry_out(control.parse(line), car, now_ns)
        except ControlError:
            continue
    lines = car.take_truths()
    for before, after in itertools.pairwise(lines):
        assert after.at_ns >= before.at_ns
        assert after.odometer_um >= before.odometer_um
        assert after.heater_on_ns >= before.heater_on_ns
        assert 0 <= after.heated_um - before.heated_um <= after.driven_um - before.driven_um
    truth = car.truth
    assert truth.heater_on_ns <= truth.feature_on_ns.get(1, 0) <= now_ns
    assert truth.heated_um <= truth.feature_on_um.get(1, 0) <= truth.driven_um


@given(st.lists(st.integers(0, 1369 * S), min_size=2, max_size=20))
def test_distances_of_parts_sum_to_the_whole(cuts: list[int]) -> None:
    cuts = sorted(cuts)
    parts = [UDDS.distance_um(b) - UDDS.distance_um(a) for a, b in itertools.pairwise(cuts)]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == UDDS.distance_um(cuts[-1]) - UDDS.distance_um(cuts[0])
