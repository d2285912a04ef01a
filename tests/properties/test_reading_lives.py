"""What an honest vehicle meters is never less than what its ECU counts, whatever happens to it.

The other way round: what a vehicle keeps back is found as soon as the ECU has spoken again.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from support import engine_world
from support.engine_world import HEAT, IGNITION, ODO, SPEED, World, entitlement
from support.readings import METER, judge

from agent.trust.catalogue import parse_feature
from cloud.readings import DECLARED, EXCESS, TOLERANCE_MS
from openfod.usage.v1 import usage_pb2


def drive(world: World, random: Random) -> None:
    world.speed_kmh = random.choice([0.0, 0.0, 60.0])


def press(world: World, _random: Random) -> None:
    world.requested = not world.requested


def kill(world: World, random: Random) -> None:
    if world.engine is not None:
        world.kill()
        world.at(random.randint(100, 5000), lambda: world.boot() if world.engine is None else None)


def cut_ecu_power(world: World, _random: Random) -> None:
    world.ecu.on = False


def silence_ecu(world: World, _random: Random) -> None:
    world.ecu.silent = not world.ecu.silent


def lose_frames(world: World, random: Random) -> None:
    world.lost_frames = set() if world.lost_frames else {random.choice([HEAT, SPEED])}


def renew(world: World, random: Random) -> None:
    world.cloud.grant(entitlement(random.randrange(2, 10**6)))
    world.push()


def revoke(world: World, _random: Random) -> None:
    if world.cloud.rights[world.cloud.version].entitlements:
        world.cloud.revoke()
        world.push()


ACTIONS: tuple[Callable[[World, Random], None], ...] = (
    drive,
    drive,
    press,
    press,
    kill,
    cut_ecu_power,
    silence_ecu,
    lose_frames,
    renew,
    revoke,
)


def live(seed: int, actions: tuple[Callable[[World, Random], None], ...]) -> World:
    """A life in which something happens every few seconds."""
    random, world = Random(seed), World(seed=seed)
    world.boot()
    world.run_ms(1000)
    renew(world, random)
    for _ in range(25):
        world.run_ms(random.randrange(1, 60) * 200)
        random.choice(actions)(world, random)
    world.speed_kmh, world.lost_frames, world.ecu.silent = 0.0, set(), False
    if world.engine is None:
        world.boot()
    renew(world, random)
    world.run_ms(70_000)
    return world


def contents(world: World) -> list[bytes]:
    return [world.disk.records[seq].content for seq in sorted(world.disk.records)]


@pytest.fixture(autouse=True)
def _every_twenty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings every 20 s instead of 10 minutes, as another catalogue may say."""
    text = (engine_world.CATALOGUE / "seat-heating/1.toml").read_text()
    assert "interval_s = 600" in text
    spec = parse_feature(text.replace("interval_s = 600", "interval_s = 20").encode())
    monkeypatch.setattr(engine_world, "catalogue_feature", lambda *_: spec)


@pytest.mark.parametrize("seed", range(1, 25))
def test_no_honest_life_leads_to_a_finding(seed: int) -> None:
    world = live(seed, ACTIONS)
    readings, found = judge(contents(world))
    assert found == [], f"seed {seed}"
    assert len(readings) >= 2, f"seed {seed}"
    assert world.violations == []


def use(world: World) -> World:
    """A granted vehicle whose heater is used from now on."""
    world.boot()
    world.run_ms(1000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(30_000)
    assert judge(contents(world))[0]
    return world


def test_the_first_reading_comes_when_metering_begins_and_the_last_when_it_ends() -> None:
    world = use(World())
    world.cloud.revoke()
    world.push()
    world.run_ms(60_000)
    assert world.state() == "LOCKED"
    readings, found = judge(contents(world))
    assert found == []
    assert readings[0].on_ms <= 1000
    assert readings[-1].on_ms == world.truth.heated_ms
    count = world.ecu.readings
    world.run_ms(300_000)
    assert world.ecu.readings == count  # once after it went off, and not again


def test_a_reading_after_switching_off_rides_in_a_record_of_no_use() -> None:
    world = use(World())
    world.cloud.revoke()
    world.push()
    world.run_ms(60_000)
    last = usage_pb2.UsageRecord.FromString(contents(world)[-1])
    assert (last.meter_id, last.value, last.gap, bool(last.ecu_reading)) == (METER, 0, 0, True)


def test_an_ecu_that_refuses_to_be_read_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "_reading", lambda _: bytes.fromhex("620F21") + b"something else")
    world = World()
    world.boot()
    world.run_ms(1000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(200_000)
    assert world.state() == "ACTIVE"
    assert judge(contents(world))[0] == []
    value, gap = world.billed(METER)
    assert value <= world.truth.heated_ms <= value + gap + 12_000
    assert 3 <= sum(purpose == "reading" for _, purpose in world.ecu_jobs) <= 5


@pytest.mark.parametrize("content", [b"", b"\x00" * 513])
def test_an_answer_of_no_or_too_many_bytes_is_not_carried(
    content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(World, "_reading", lambda _: bytes.fromhex("620F41") + content)
    world = World()
    world.boot()
    world.run_ms(1000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(60_000)
    assert judge(contents(world))[0] == []
    assert any("gave no reading" in message for _, _, message, _ in world.log)


@pytest.mark.parametrize("lost", [{HEAT}, {SPEED}, {HEAT, SPEED}, {HEAT, SPEED, ODO, IGNITION}])
def test_frames_that_are_missing_for_long_are_declared_before_the_ecu_speaks(lost: set[str]) -> None:
    world = use(World())
    world.lost_frames = lost
    world.run_ms(120_000)
    assert judge(contents(world))[1] == []
    world.lost_frames = set()
    world.run_ms(60_000)
    readings, found = judge(contents(world))
    assert found == []
    assert len(readings) >= 4  # none while nothing tells of the ignition


@pytest.mark.parametrize("kept_back", ["every record of the meter", "half of each value"])
def test_a_vehicle_that_stops_metering_is_found_by_the_next_reading(kept_back: str) -> None:
    world = use(World())
    honest = contents(world)
    world.run_ms(60_000)
    kept = []
    for content in contents(world)[len(honest) :]:
        record = usage_pb2.UsageRecord.FromString(content)
        if record.meter_id == METER:
            record.value = record.value // 2 if kept_back.startswith("half") else 0
            record.gap = 0
        kept.append(record.SerializeToString())
    before = len(judge(honest)[0])
    for end in range(len(kept) + 1):
        readings, found = judge([*honest, *kept[:end]])
        if found:
            break
    # The window in which it began may have been metered in part; the reading after it tells.
    assert [kind for kind, _ in found] == [EXCESS]
    assert len(readings) - before <= 2


def test_small_amounts_kept_back_again_and_again_add_up() -> None:
    world = use(World())
    honest = contents(world)
    world.run_ms(600_000)
    kept, kept_ms = [], 0
    for content in contents(world)[len(honest) :]:
        record = usage_pb2.UsageRecord.FromString(content)
        if record.meter_id == METER and record.value > 500:
            record.value -= 500
            kept_ms += 500
        kept.append(record.SerializeToString())
    assert kept_ms > 3 * TOLERANCE_MS
    assert EXCESS in [kind for kind, _ in judge([*honest, *kept])[1]]


def test_use_that_is_declared_instead_of_metered_is_told_after_ten_hours() -> None:
    world = use(World())
    records = []
    for hour in range(30):
        record = usage_pb2.UsageRecord.FromString(contents(world)[0])
        assert record.feature_id == "seat-heating"
        record.meter_id, record.value, record.gap = METER, 1_000_000, 2_600_000
        record.window_end_ms += hour * 3_600_000
        record.ecu_reading = f'{{"reading": {hour + 1}, "token": 1, "on_ms": {hour * 3_600_000}}}'.encode()
        records.append(record.SerializeToString())
    found = judge(records)[1]
    assert [kind for kind, _ in found] == [DECLARED, DECLARED]
    assert "of the last 36000000 ms" in found[0][1]
