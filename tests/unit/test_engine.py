"""The engine's stories, in virtual time, on the real catalogue entry."""

from __future__ import annotations

import itertools

import pytest
from support.engine_world import EPOCH_MS, INFOS, World, entitlement, with_quota

from agent import events as ev
from agent.engine import Engine
from agent.errors import IllegalTransitionError
from agent.features.lifecycle import TABLE, Event, State, transition
from agent.metering.record import Head
from agent.model import TrustBytes, Verdict, Versions
from agent.trust.clock import TrustedClock


@pytest.fixture
def world() -> World:
    """A parked vehicle, ignition on, agent up and connected, no right."""
    world = World()
    world.boot()
    world.run_ms(2000)
    return world


def granted(world: World) -> None:
    world.cloud.grant(entitlement(world.cloud.version))
    world.push()
    world.run_ms(1500)


def finish(world: World) -> None:
    """Revokes at standstill and lets everything reach the cloud."""
    world.speed_kmh = 0.0
    world.cloud.revoke()
    world.push()
    world.run_ms(12_000)


def assert_true_bill(world: World) -> None:
    for meter, truth in (("active-time", world.truth.heated_ms), ("heated-distance", world.truth.heated_m)):
        value, gap = world.billed(meter)
        assert value <= truth + 1e-6, f"{meter}: billed {value}, truth {truth}"
        assert truth <= value + gap, f"{meter}: truth {truth}, declared up to {value + gap}"
    assert world.violations == []
    assert world.cloud.refusals == []


def test_a_grant_is_persisted_activated_read_back_and_metered(world: World) -> None:
    granted(world)
    assert world.state() == "ACTIVE"
    assert [purpose for _, purpose in world.ecu_jobs] == ["read back", "activate", "reading"]
    world.run_ms(20_000)
    finish(world)
    assert world.state() == "LOCKED"
    assert world.billed("active-time")[0] > 19_000
    assert len(world.cloud.taken) == world.disk.acked_seq > 0
    assert_true_bill(world)


def test_nothing_is_asked_of_the_ecu_before_the_right_is_on_disk(world: World) -> None:
    world.cloud.grant(entitlement(1))
    world.push()
    for _ in range(200):
        world.run_ms(20)
        if world.ecu_jobs:
            break
    assert world.ecu_jobs
    assert world.disk.verdict is not None
    assert "seat-heating" in world.disk.verdict.rights.entitlements


def test_without_a_standstill_it_waits_and_says_for_what(world: World) -> None:
    world.speed_kmh = 30.0
    world.run_ms(200)
    granted(world)
    assert world.state() == "PENDING"
    assert world.engine is not None
    assert "Vehicle.Speed < 1.0" in world.engine.features()[0].reason
    world.speed_kmh = 0.0
    world.run_ms(1000)
    assert world.state() == "ACTIVE"


def test_a_stale_speed_switches_nothing_on(world: World) -> None:
    world.lost_frames = {"Vehicle.Speed"}
    world.run_ms(1000)
    granted(world)
    assert world.state() == "PENDING"
    assert "activate" not in [purpose for _, purpose in world.ecu_jobs]


def test_a_right_revoked_while_driving_is_held_and_released_at_standstill(world: World) -> None:
    granted(world)
    world.speed_kmh = 50.0
    world.run_ms(3000)
    world.cloud.revoke()
    world.push()
    world.run_ms(10_000)
    assert world.state() == "HELD"
    assert world.ecu.on
    world.speed_kmh = 0.0
    world.run_ms(1000)
    assert world.state() == "LOCKED"
    # Off, and the old token is burnt.
    assert (world.ecu.on, world.ecu.counter) == (False, world.cloud.counter)
    assert_true_bill(world)


def test_a_hold_ends_at_ignition_off_whatever_the_speed_signal_says(world: World) -> None:
    granted(world)
    world.speed_kmh = 50.0
    world.run_ms(1000)
    world.cloud.revoke()
    world.push()
    world.run_ms(1000)
    world.speed_kmh = 0.0
    world.lost_frames = {"Vehicle.Speed"}
    world.run_ms(2000)
    assert world.state() == "HELD"
    world.ignition = "OFF"
    world.run_ms(1000)
    assert world.state() == "LOCKED"


def test_a_new_grant_while_held_goes_on_without_a_break(world: World) -> None:
    granted(world)
    world.speed_kmh = 50.0
    world.run_ms(1000)
    world.cloud.revoke()
    world.push()
    world.run_ms(2000)
    world.cloud.grant(entitlement(9))
    world.push()
    world.run_ms(2000)
    assert world.state() == "ACTIVE"
    assert world.ecu.on
    finish(world)
    assert_true_bill(world)


def test_after_kill_the_ecu_is_adopted_without_a_write_and_the_dead_time_is_declared(world: World) -> None:
    granted(world)
    world.speed_kmh = 60.0
    world.run_ms(15_000)
    world.cut_network()
    world.kill()
    world.run_ms(5_000)
    world.ecu_jobs.clear()
    world.boot()
    world.run_ms(10_000)
    assert world.state() == "ACTIVE"
    assert {purpose for _, purpose in world.ecu_jobs} == {"read back", "reading"}
    world.join_network()
    world.run_ms(2_000)
    finish(world)
    value, gap = world.billed("active-time")
    assert world.truth.heated_ms - value <= 5_000 + 2_000 + 1_000
    assert 5_000 <= gap <= 9_000
    assert_true_bill(world)


def test_a_kill_between_every_two_writes_loses_no_record_and_doubles_none() -> None:
    for moment_ms in range(40, 4000, 360):
        world = World(seed=moment_ms)
        world.boot()
        world.run_ms(1000)
        world.cloud.grant(entitlement(1))
        world.push()
        world.run_ms(12_000 + moment_ms)
        world.kill()
        world.run_ms(700)
        world.boot()
        world.run_ms(15_000)
        finish(world)
        assert_true_bill(world)


def test_an_ecu_that_refuses_is_tried_again_with_growing_pauses(world: World) -> None:
    world.ecu.counter = 99
    granted(world)
    world.run_ms(30_000)
    assert world.state() in {"FAULT", "PENDING", "ACTIVATING"}
    tries = [at for at, purpose in world.ecu_jobs if purpose == "activate"]
    pauses = [b - a for a, b in itertools.pairwise(tries)]
    assert 3 <= len(tries) <= 6
    assert pauses == sorted(pauses)
    assert world.engine is not None
    assert world.engine.features()[0].nrc == 0x24


def test_a_silent_ecu_is_a_fault_with_a_reason_and_recovers(world: World) -> None:
    world.ecu.silent = True
    granted(world)
    world.run_ms(5000)
    assert world.state() in {"FAULT", "PENDING"}
    world.ecu.silent = False
    world.run_ms(30_000)
    assert world.state() == "ACTIVE"


def test_an_ecu_that_was_reset_is_switched_on_again_at_standstill(world: World) -> None:
    granted(world)
    world.speed_kmh = 40.0
    world.run_ms(1000)
    world.ecu.on = False
    world.run_ms(12_000)
    assert world.state() == "PENDING"
    world.speed_kmh = 0.0
    world.run_ms(2000)
    assert world.state() == "ACTIVE"
    finish(world)
    assert_true_bill(world)


def test_a_hard_quota_suspends_and_the_cloud_can_lift_it(world: World) -> None:
    world.cloud.grant(with_quota(5, 5_000))
    world.push()
    world.run_ms(9_000)
    assert world.state() == "SUSPENDED"
    value, _ = world.billed("active-time")
    assert 4_800 <= value <= 5_600
    world.cloud.grant(entitlement(6))
    world.push()
    world.run_ms(2_000)
    assert world.state() == "ACTIVE"


def test_a_feature_found_on_without_a_right_is_taken_away(world: World) -> None:
    granted(world)
    world.run_ms(3_000)
    world.kill()
    world.cloud.revoke()
    world.run_ms(1000)
    world.boot()
    world.run_ms(5000)
    assert world.state() == "LOCKED"
    assert not world.ecu.on


def test_an_unlisted_pair_raises_and_every_state_is_left_and_reached() -> None:
    listed = 0
    for state in State:
        for event in Event:
            if (state, event) in TABLE:
                listed += 1
                continue
            with pytest.raises(IllegalTransitionError, match=event.name):
                transition("seat-heating", state, event)
    assert listed == len(TABLE)
    assert {s for s, _ in TABLE} == set(State) == {target for target, _ in TABLE.values()}


def test_a_signal_that_no_bus_brings_is_named(world: World) -> None:
    world.engine = None
    infos = dict(INFOS)
    del infos["Vehicle.Speed"]
    engine = Engine(
        source="veh-0123456789abcdef",
        clock=TrustedClock(mark_ms=0, build_ms=1, monotonic_ns=0),
        infos=infos,
        checkpoint_ns=10**9,
        window_ns=10**10,
    )
    world.cloud.grant(entitlement(1))
    verdict = Verdict(TrustBytes(), Versions(), Versions(), world.cloud.rights[2], 1)
    said = engine.step(
        ev.Booted(verdict, Head("0" * 16), 0, (), same_boot=True, used={}, last_contact_ms=0), 1
    )
    warnings = [c.fields["signals"] for c in said if isinstance(c, ev.Say) and c.level == "warning"]
    assert warnings == [["Vehicle.Speed"]]


def test_a_genuine_answer_counts_even_if_the_link_is_cut_while_it_is_verified(world: World) -> None:
    """The worker builds on it: a new epoch of keys that the engine dropped would be undone no more."""
    world.cloud.grant(entitlement(1))
    stolen_ms = 4_100_000_000_000  # a stolen key signed 2099
    engine = Engine(
        source="veh-0123456789abcdef",
        clock=TrustedClock(mark_ms=stolen_ms, build_ms=1, monotonic_ns=0),
        infos=INFOS,
        checkpoint_ns=10**9,
        window_ns=10**10,
    )
    engine.step(ev.Booted(None, Head("0" * 16), 0, (), same_boot=True, used={}, last_contact_ms=0), 1)
    engine.step(ev.LinkUp(), 2)
    engine.step(ev.NonceMade(bytes(16)), 3)
    assert any(isinstance(c, ev.Verify) for c in engine.step(ev.UpdateArrived(TrustBytes()), 4))
    engine.step(ev.LinkDown("cut"), 5)
    verdict = Verdict(TrustBytes(), Versions(1, 1, 1, 1), Versions(), world.cloud.rights[2], EPOCH_MS)
    told = engine.step(ev.UpdateVerified(verdict, bytes(16), 6, new_epoch=True), 7)
    assert [c.verdict for c in told if isinstance(c, ev.StoreTrust)] == [verdict]
    assert engine.trusted_time(7).unix_ms == EPOCH_MS
    # It is taken once: the nonce is spent.
    told = engine.step(ev.UpdateVerified(verdict, bytes(16), 8), 9)
    assert not any(isinstance(c, ev.StoreTrust) for c in told)


class _SlowUsage(World):
    """Use takes most of a second to reach the disk, rights do not."""

    def _do(self, command: ev.Command) -> None:
        if isinstance(command, ev.StoreUsage):
            self._later(900, lambda: self._persist(command))
        else:
            super()._do(command)


def test_a_token_replaced_while_its_request_waits_for_the_disk_is_not_sent() -> None:
    world = _SlowUsage()
    world.boot()
    world.run_ms(2000)
    world.cloud.grant(entitlement(1))
    world.push()
    while world.state() != "ACTIVATING":
        world.run_ms(20)
    world.cloud.grant(entitlement(2))
    world.push()
    world.run_ms(5000)
    assert world.violations == []
    assert world.state() == "ACTIVE"
    assert world.ecu.counter == 2
