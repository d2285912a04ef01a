"""Attacks and accidents around the engine: each says what happens, and what must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import engine_world
from support.engine_world import FEATURE, HEAT, MS, ODO, World, catalogue_feature, entitlement, with_quota

from agent import events as ev
from agent.adapters.bus import RawFrame
from agent.adapters.uds import UdsClient
from agent.metering.ledger import MAX_AMOUNT
from agent.model import Entitlement, Quota, Rights, SignalBatch, SignalChange, TrustBytes
from openfod.usage.v1 import usage_pb2


@pytest.fixture
def world() -> World:
    """A parked vehicle, ignition on, agent up and connected, no right."""
    world = World()
    world.boot()
    world.run_ms(2000)
    return world


def grant(world: World, right: Entitlement) -> None:
    world.cloud.grant(right)
    world.push()
    world.run_ms(1500)


def records(world: World) -> list[usage_pb2.UsageRecord]:
    return [usage_pb2.UsageRecord.FromString(r.content) for _, r in sorted(world.disk.records.items())]


def without_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    """The feature's duration counts whenever it is on: nothing on the bus shows its output."""
    spec = catalogue_feature()
    meters = tuple(replace(m, condition=None) for m in spec.meters if m.meter_id == "active-time")
    changed = replace(spec, meters=meters)
    monkeypatch.setattr(engine_world, "catalogue_feature", lambda: changed)


# --- nothing changes under a moving car ------------------------------------------


def test_an_activation_that_waited_for_the_disk_is_not_sent_into_motion(world: World) -> None:
    persist = world._persist

    def slowly(command: ev.StoreTrust | ev.StoreUsage | ev.MarkSent | ev.MergeUnsent) -> None:
        if isinstance(command, ev.StoreUsage):
            world._later(5000, lambda: persist(command))
        else:
            persist(command)

    world._persist = slowly  # type: ignore[method-assign]
    grant(world, entitlement(1))
    assert world.state() == "ACTIVATING"
    world.speed_kmh = 80.0
    world.run_ms(12_000)
    assert world.state() == "PENDING"
    assert {purpose for _, purpose in world.ecu_jobs} == {"read back"}
    assert not world.ecu.on


def test_a_release_that_waited_for_another_tester_is_not_sent_into_motion(world: World) -> None:
    grant(world, entitlement(1))
    sent: list[float] = []
    client = UdsClient(
        world.guard,
        lambda _frame: sent.append(world.speed_kmh),
        lambda: world.now_ms * MS,
        lambda done: world._later(0, lambda: world.tell(done)),
    )
    world._run_ecu = client.run  # type: ignore[method-assign]
    tester = RawFrame(0x7DF, bytes.fromhex("023E800000000000"), 0)

    def live(seconds: int, *, speaks: bool) -> None:
        for _ in range(2 * seconds):
            if speaks:
                client.on_frame("body", tester)
            world.run_ms(500)
            client.poll()

    live(1, speaks=True)
    world.cloud.revoke()
    world.push()
    live(3, speaks=True)
    world.speed_kmh = 100.0
    live(20, speaks=True)
    live(10, speaks=False)
    assert [speed for speed in sent if speed > 1] == []
    assert world.state() == "HELD"


def test_reads_of_an_obd_dongle_starve_no_release(world: World) -> None:
    client = UdsClient(world.guard, lambda _frame: None, lambda: world.now_ms * MS, lambda _done: None)
    client.on_frame("body", RawFrame(0x7DF, bytes.fromhex("02010C0000000000"), 0))
    assert client._foreign_until_ns == 0
    client.on_frame("body", RawFrame(0x7DF, bytes.fromhex("021003AAAAAAAAAA"), 0))
    assert client._foreign_until_ns > 0


# --- a right that ended does not go on ----------------------------------------------


def test_a_restart_in_hold_does_not_keep_a_used_up_quota_on(world: World) -> None:
    grant(world, with_quota(1, 5000))
    world.speed_kmh = 50.0
    world.run_ms(10_000)
    assert world.state() == "HELD"
    world.kill()
    world.run_ms(500)
    world.boot(same_boot=False)
    world.run_ms(3000)
    world.speed_kmh = 0.0
    world.run_ms(20_000)
    assert (world.state(), world.ecu.on) == ("SUSPENDED", False)


def test_a_feature_that_vanishes_from_the_set_is_still_released(world: World) -> None:
    grant(world, entitlement(1))
    world.cloud.version += 1
    world.cloud.rights[world.cloud.version] = Rights(world.cloud.version)
    world.push()
    world.run_ms(20_000)
    assert (world.state(), world.ecu.on) == ("LOCKED", False)
    assert world.violations == []


# --- money --------------------------------------------------------------------------


def test_a_right_that_replaces_another_is_billed_from_then_on(world: World) -> None:
    grant(world, entitlement(1, account="acc-old"))
    world.run_ms(3000)
    before = len(world.disk.records)
    grant(world, entitlement(2, account="acc-new"))
    world.run_ms(30_000)
    later = {r.subject: r.value for r in records(world)[before + 2 :] if r.meter_id == "active-time"}
    assert set(later) == {"acc-new"}


def test_the_quota_of_a_right_that_replaces_another_holds(world: World) -> None:
    grant(world, entitlement(1))
    grant(world, entitlement(2, quotas=(Quota("active-time", 5000, hard=True),)))
    world.run_ms(30_000)
    assert world.state() == "SUSPENDED"


@pytest.mark.parametrize("silent", [False, True])
def test_an_ecu_that_went_off_is_not_billed_without_its_word(
    world: World, monkeypatch: pytest.MonkeyPatch, *, silent: bool
) -> None:
    without_condition(monkeypatch)
    grant(world, entitlement(1))
    world.run_ms(5000)
    world.speed_kmh = 50.0
    world.run_ms(1000)
    world.ecu.on, world.ecu.silent = False, silent
    world.run_ms(120_000)
    value, gap = world.billed("active-time")
    assert value <= world.truth.heated_ms <= value + gap


def test_on_in_hold_because_the_right_ended_while_the_ecu_was_asked_is_metered(world: World) -> None:
    run = world._run_ecu

    def slowly(job: ev.RunEcu) -> None:
        if job.purpose != "activate":
            run(job)
            return

        def act() -> None:
            for request in job.requests:
                world._request(request)

        world.at(50, act)
        world._later(3000, lambda: world.tell(ev.EcuDone(job.feature_id, world._read_back(), None)))

    world._run_ecu = slowly  # type: ignore[method-assign]
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(1000)
    world.cloud.revoke()
    world.push()
    world.run_ms(200)
    world.speed_kmh = 50.0
    world._run_ecu = run  # type: ignore[method-assign]
    world.run_ms(30_000)
    assert world.state() == "HELD"
    world.speed_kmh = 0.0
    world.run_ms(15_000)
    value, gap = world.billed("active-time")
    assert value > 25_000
    assert value <= world.truth.heated_ms <= value + gap


def test_a_flapping_odometer_bills_no_parked_car(world: World) -> None:
    grant(world, entitlement(1))
    world.lost_frames = {ODO}
    kilometres = [12_345.67, 12_345.69, 12_345.66, 12_345.68]
    for number in range(400):
        world.run_ms(100)
        before, world._seen[ODO] = world._seen.get(ODO), world.now_ms * MS
        change = SignalChange(ODO, kilometres[number % 4], world.now_ms * MS, before)
        world.tell(ev.SignalsArrived(SignalBatch((change,), dict(world._seen))))
    world.run_ms(12_000)
    assert world.billed("heated-distance")[0] == 0


def test_no_record_is_made_that_the_cloud_would_never_take(world: World) -> None:
    grant(world, entitlement(1))
    world.lost_frames = {HEAT, ODO}
    world.run_ms(2000)
    for number in range(100):
        world.run_ms(20)
        before, world._seen[ODO] = world._seen.get(ODO), world.now_ms * MS
        value = 1e308 if number % 2 else 0.0
        change = SignalChange(ODO, value, world.now_ms * MS, before)
        world.tell(ev.SignalsArrived(SignalBatch((change,), dict(world._seen))))
    world.run_ms(12_000)
    assert all(max(r.value, r.gap) <= MAX_AMOUNT for r in records(world))
    assert sum(r.gap for r in records(world) if r.meter_id == "heated-distance") < 100_000


# --- a cloud that is not ours ---------------------------------------------------------


def test_an_unsigned_refusal_skips_no_record(world: World) -> None:
    grant(world, entitlement(1))
    take, world._usage = world._usage, lambda records: None  # type: ignore[method-assign]
    world.run_ms(30_000)
    world.tell(ev.UsageRefused("ChainError", "a lie", world.disk.head.seq))
    world._usage = take  # type: ignore[method-assign]
    world.cut_network()
    world.run_ms(100)
    world.join_network()
    world.run_ms(5_000)
    assert len(world.cloud.taken) == world.disk.head.seq
    assert world.cloud.refusals == []


def test_a_cloud_that_lost_records_gets_them_again(world: World) -> None:
    grant(world, entitlement(1))
    world.run_ms(30_000)
    held = len(world.cloud.taken)
    world.cloud.taken.clear()
    world.cloud.head = bytes(32)
    world.tell(ev.UsageRefused("ChainError", "restored from a backup", 0))
    world.run_ms(5_000)
    assert len(world.cloud.taken) >= held
    assert world.cloud.refusals == []


def test_a_flood_of_updates_is_verified_one_at_a_time(world: World) -> None:
    assert world.engine is not None
    verifications = 0
    for _ in range(500):
        world._send_update(world.random.randbytes(16))
    do = world._do

    def count(command: ev.Command) -> None:
        nonlocal verifications
        verifications += isinstance(command, ev.Verify)
        do(command)

    world._do = count  # type: ignore[method-assign]
    world.run_ms(70)
    assert verifications <= 20


def test_updates_that_the_link_cannot_read_start_no_second_verification(world: World) -> None:
    assert world.engine is not None
    outstanding = 0
    for _ in range(100):
        for event in (
            ev.UpdateArrived(TrustBytes()),
            ev.UpdateRefused("LimitError", "too large", verified=False),
        ):
            commands = world.engine.step(event, world.now_ms * MS)
            outstanding += sum(isinstance(command, ev.Verify) for command in commands)
    assert outstanding <= 1


def test_answering_every_nonce_costs_a_bounded_number_of_writes(world: World) -> None:
    written = 0
    persist = world._persist

    def count(command: ev.StoreTrust | ev.StoreUsage | ev.MarkSent | ev.MergeUnsent) -> None:
        nonlocal written
        written += isinstance(command, ev.StoreTrust)
        persist(command)

    world._persist = count  # type: ignore[method-assign]
    world._offered = world._send_update  # type: ignore[method-assign]
    world.cut_network()
    world.join_network()
    world.run_ms(120_000)
    assert written <= 121


def test_a_window_that_waits_for_a_silent_ecu_costs_no_write_every_two_seconds(world: World) -> None:
    grant(world, entitlement(1))
    world.run_ms(3000)
    world.kill()
    world.ecu.silent, world.ignition = True, "OFF"
    world.run_ms(1000)
    written = 0
    persist = world._persist

    def count(command: ev.StoreTrust | ev.StoreUsage | ev.MarkSent | ev.MergeUnsent) -> None:
        nonlocal written
        written += isinstance(command, ev.StoreUsage)
        persist(command)

    world._persist = count  # type: ignore[method-assign]
    world.boot()
    world.run_ms(300_000)
    assert written < 10


def test_the_age_of_a_nonce_is_never_understated(world: World) -> None:
    assert world.engine is not None
    world._send_update = lambda nonce: None  # type: ignore[method-assign]
    world.run_ms(65_000)
    oldest = min(sent_ns for _, sent_ns in world.engine._nonces)
    assert world.now_ms * MS - oldest > 60_000 * MS


def test_errors_of_a_vehicle_carry_words(world: World) -> None:
    world.ecu.counter = 99
    grant(world, entitlement(1))
    assert world.engine is not None
    view = next(v for v in world.engine.features() if v.feature_id == FEATURE)
    assert "NRC 0x24" in view.reason
