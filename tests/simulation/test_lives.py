"""Seeded lives of engine, vehicle, ECU, disk, network and cloud, in virtual time.

Whatever happens in a life, the promises hold: no feature without a right on
disk, nothing taken away in motion, no record twice or lost once the cloud has
signed for it, and billed ≤ truth ≤ billed + declared. A failing seed is named
and replays exactly: FOD_CLOSE_SEED=N makes only that one. These are minutes in steps of 20 ms, as
the bus has them; months, from event to event, are in test_months.py, and FOD_SEEDS=N has one life here
for a hundred there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from random import Random

import pytest
from support.engine_world import World, entitlement

FIRST_SEED = int(os.environ.get("FOD_CLOSE_SEED", "1"))
SEEDS = 1 if "FOD_CLOSE_SEED" in os.environ else max(12, int(os.environ.get("FOD_SEEDS", "0")) // 100)
HAPPENINGS = 40


def grant(world: World, random: Random) -> None:
    world.cloud.grant(entitlement(random.randrange(1, 10**6)))
    world.push()


def revoke(world: World, _random: Random) -> None:
    if world.cloud.rights[world.cloud.version].entitlements:
        world.cloud.revoke()
        world.push()


def drive(world: World, random: Random) -> None:
    if world.ignition == "ON":
        world.speed_kmh = random.choice([20.0, 60.0, 130.0])


def stop(world: World, _random: Random) -> None:
    world.speed_kmh = 0.0


def turn_key(world: World, _random: Random) -> None:
    world.speed_kmh = 0.0
    world.ignition = "OFF" if world.ignition == "ON" else "ON"


def press_button(world: World, _random: Random) -> None:
    world.requested = not world.requested


def kill(world: World, random: Random) -> None:
    if world.engine is not None:
        world.kill()
        world.at(random.randint(100, 5000), lambda: world.boot() if world.engine is None else None)


def cut(world: World, _random: Random) -> None:
    if world.online:
        world.cut_network()
    else:
        world.join_network()


def reset_ecu(world: World, _random: Random) -> None:
    world.ecu.on = False


def silence_ecu(world: World, _random: Random) -> None:
    world.ecu.silent = not world.ecu.silent


def lose_frames(world: World, random: Random) -> None:
    names = ["Vehicle.Speed", "Vehicle.TraveledDistance", "Vehicle.Cabin.Seat.Row1.DriverSide.Heating"]
    world.lost_frames = set() if world.lost_frames else {random.choice(names)}


def duplicate(world: World, _random: Random) -> None:
    world.duplicate_messages = not world.duplicate_messages


ACTIONS: tuple[tuple[int, Callable[[World, Random], None]], ...] = (
    (4, grant),
    (3, revoke),
    (6, drive),
    (6, stop),
    (1, turn_key),
    (2, press_button),
    (4, kill),
    (4, cut),
    (1, reset_ecu),
    (1, silence_ecu),
    (2, lose_frames),
    (1, duplicate),
)


def live(seed: int) -> World:
    """Lives one life, heals everything, and lets it come to rest."""
    random = Random(seed)
    world = World(seed)
    world.boot()
    weights, actions = zip(*ACTIONS, strict=True)
    for _ in range(HAPPENINGS):
        # A state lasts longer than the oldest value that counts as known: the meters' stated limit.
        world.run_ms(random.randint(1_200, 15_000))
        random.choices(actions, weights)[0](world, random)
    world.lost_frames, world.ecu.silent, world.duplicate_messages = set(), False, False
    world.speed_kmh, world.ignition = 0.0, "ON"
    world.run_ms(6_000)
    if world.engine is None:
        world.boot()
    if not world.online:
        world.join_network()
    revoke(world, random)
    world.run_ms(90_000)
    return world


def check(world: World) -> list[str]:
    """What does not hold."""
    wrong = list(world.violations) + world.cloud.refusals
    if world.ecu.on:
        wrong.append("the feature is on without a right, at rest and with everything healed")
    if world.state() not in {"LOCKED", "NONE"}:
        wrong.append(f"the feature ends in {world.state()}")
    if len(world.cloud.taken) != len(world.disk.records):
        wrong.append(f"the cloud holds {len(world.cloud.taken)} of {len(world.disk.records)} records")
    for meter, truth in (("active-time", world.truth.heated_ms), ("heated-distance", world.truth.heated_m)):
        value, gap = world.billed(meter)
        if not value <= truth + 1e-6:
            wrong.append(f"{meter}: billed {value}, truth {truth:.1f}")
        if not truth <= value + gap:
            wrong.append(f"{meter}: truth {truth:.1f}, declared only up to {value + gap}")
    return wrong


@pytest.mark.timeout(0)
def test_the_promises_hold_in_every_life() -> None:
    begun = time.monotonic()
    for seed in range(FIRST_SEED, FIRST_SEED + SEEDS):
        wrong = check(live(seed))
        assert not wrong, f"seed {seed} (replay: FOD_CLOSE_SEED={seed} make simulate SEEDS=1): " + "; ".join(
            wrong[:5]
        )
    print(f"{SEEDS} lives in {time.monotonic() - begun:.1f} s")


def test_a_seed_replays_exactly() -> None:
    first, second = live(7), live(7)
    assert first.log == second.log
    assert first.disk.records == second.disk.records
