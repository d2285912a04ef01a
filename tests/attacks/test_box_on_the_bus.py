"""A box on the bus switches a feature on: it is seen, told, taken away when it may be, and never billed."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.edge_vehicle import INSTALL, SESSION, EdgeVehicle
from support.engine_world import World, entitlement, with_quota
from support.trust_repo import Cloud, make_token

from agent import events as ev

FINDING = "an ECU says what no right explains"
UNBIDDEN = "the ECU reports it on without a live right"


@pytest.fixture
def world() -> World:
    """A parked vehicle whose right was granted, used and revoked."""
    world = World()
    world.boot()
    world.run_ms(2000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(5000)
    assert world.state() == "ACTIVE"
    world.cloud.revoke()
    world.push()
    world.run_ms(12_000)
    assert (world.state(), world.ecu.on) == ("LOCKED", False)
    return world


def view(world: World) -> ev.FeatureView:
    assert world.engine is not None
    return world.engine.features()[0]


def findings(world: World) -> list[dict[str, object]]:
    return [fields for _, level, message, fields in world.log if (level, message) == ("error", FINDING)]


def test_a_feature_switched_on_by_a_box_is_found_told_once_and_released(world: World) -> None:
    before = world.billed("active-time")
    switched_ms = world.utc_ms
    world.ecu.on = True
    world.speed_kmh = 50.0
    world.run_ms(12_000)
    assert (world.state(), world.ecu.on) == ("HELD", True)
    evidence = view(world).evidence
    assert evidence is not None
    assert (evidence.finding, evidence.counter) == (UNBIDDEN, world.cloud.counter)
    assert evidence.read_back.startswith(bytes.fromhex("620F2101"))
    assert switched_ms - 1000 <= evidence.at_ms <= world.utc_ms
    assert view(world).reason.startswith(f"{UNBIDDEN}; held until: Vehicle.Speed < 1.0")
    world.run_ms(60_000)
    assert world.ecu.on
    world.speed_kmh = 0.0
    world.run_ms(2000)
    assert (world.state(), world.ecu.on, view(world).evidence) == ("LOCKED", False, None)
    world.run_ms(20_000)
    assert len(findings(world)) == 1
    assert world.billed("active-time") == before
    assert world.violations == []


def test_a_box_that_tries_again_and_again_is_found_each_time(world: World) -> None:
    for count in range(1, 4):
        world.ecu.on = True
        world.run_ms(14_000)
        assert (world.state(), world.ecu.on) == ("LOCKED", False)
        assert len(findings(world)) == count
    assert world.violations == []


def test_a_box_with_a_newer_token_is_found_by_its_counter_and_released_all_the_same(world: World) -> None:
    known = world.cloud.counter
    world.ecu.on, world.ecu.counter = True, known + 5
    world.run_ms(14_000)
    evidence = view(world).evidence
    assert evidence is not None
    assert evidence.finding == f"the ECU names token counter {known + 5}, the highest one known is {known}"
    assert evidence.counter == known + 5
    assert (world.state(), world.ecu.on) == ("LOCKED", False)
    assert len(findings(world)) == 1
    # A restart forgets nothing that the disk knows, and the newest token ends it.
    world.cloud.counter = known + 5
    world.cloud.grant(entitlement(2))
    world.push()
    world.run_ms(3000)
    assert (world.state(), view(world).evidence) == ("ACTIVE", None)
    assert world.violations == []


def test_a_suspended_feature_that_a_box_switches_on_is_found_and_not_billed() -> None:
    world = World()
    world.boot()
    world.run_ms(2000)
    world.cloud.grant(with_quota(1, 3000))
    world.push()
    world.run_ms(15_000)
    assert (world.state(), world.ecu.on) == ("SUSPENDED", False)
    before = world.billed("active-time")
    world.ecu.on = True
    world.run_ms(14_000)
    assert len(findings(world)) == 1
    assert not world.ecu.on
    world.run_ms(12_000)
    assert view(world).evidence is None
    assert world.billed("active-time") == before
    assert world.violations == []


def test_what_the_agent_itself_left_on_before_a_restart_is_no_evidence() -> None:
    world = World()
    world.boot()
    world.run_ms(2000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(2000)
    world.speed_kmh = 50.0
    world.run_ms(1000)
    world.cloud.revoke()
    world.push()
    world.run_ms(3000)
    assert world.state() == "HELD"
    world.kill()
    world.run_ms(500)
    world.boot()
    world.run_ms(12_000)
    assert (world.state(), view(world).evidence) == ("HELD", None)
    world.speed_kmh = 0.0
    world.run_ms(3000)
    assert world.state() == "LOCKED"
    assert findings(world) == []


def test_a_feature_on_after_a_restart_though_its_token_was_burnt_is_evidence(world: World) -> None:
    world.kill()
    world.ecu.on = True
    world.run_ms(500)
    world.speed_kmh = 50.0
    world.boot()
    world.run_ms(2000)
    evidence = view(world).evidence
    assert evidence is not None
    assert (world.state(), evidence.finding) == ("HELD", UNBIDDEN)


def test_a_vehicle_at_rest_is_not_kept_awake_to_look_for_boxes(world: World) -> None:
    world.ignition = "OFF"
    world.run_ms(12_000)
    world.ecu_jobs.clear()
    world.run_ms(60_000)
    assert world.ecu_jobs == []
    world.ignition, world.ecu.on = "ON", True
    world.run_ms(3000)
    assert len(findings(world)) == 1


def test_a_feature_that_should_be_off_is_read_at_most_every_ten_seconds(world: World) -> None:
    world.ecu_jobs.clear()
    world.run_ms(100_000)
    assert 8 <= len(world.ecu_jobs) <= 10
    assert {purpose for _, purpose in world.ecu_jobs} == {"read back"}


def test_a_token_of_a_stolen_token_key_is_found_in_the_real_ecu_and_released() -> None:
    cloud = Cloud()
    vehicle = EdgeVehicle(cloud)
    cloud.grant()
    vehicle.receive(cloud.answer)
    cloud.revoke()
    vehicle.receive(cloud.answer)
    assert (vehicle.view().state, vehicle.is_on) == ("LOCKED", False)
    now_ns = vehicle.now_ms * 1_000_000
    stolen: Ed25519PrivateKey = cloud.token_key
    vehicle.seat.handle(SESSION, now_ns)
    answer = vehicle.seat.handle(INSTALL + make_token(stolen, counter=7), now_ns)
    assert answer is not None
    assert answer[0] == 0x71
    assert vehicle.is_on
    vehicle.run_ms(12_000)
    evidence = vehicle.view().evidence
    assert evidence is not None
    assert "token counter 7, the highest one known is 2" in evidence.finding
    assert not vehicle.is_on
