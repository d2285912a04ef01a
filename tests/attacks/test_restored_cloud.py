"""A cloud whose database was put back: the fleet goes on, nothing rolls back, nothing is billed twice."""

from __future__ import annotations

import asyncio
import json
import shutil
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from support.cloud_world import (
    ECU,
    START_MS,
    VIN,
    Device,
    Stream,
    World,
    chain,
    demo_keys,
    open_world,
    play,
    signed_batch,
    write_config,
)

from agent.errors import RollbackError
from agent.model import RepositoryBytes, TrustBytes, Verdict
from agent.trust import verifier
from agent.trust.verifier import Floors
from agent.wire import trust_update_from_proto
from cloud.rights import CATALOGUE_JUMP, MAX_JUMP
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

SEAT = "seat-heating-for-ever"
LOGBOOK = "logbook-per-km"
LATER_MS = START_MS + 7 * 86_400_000


def provisioned() -> TrustBytes:
    """The roots that vehicles are built with."""
    roots = [
        (demo_keys() / f"keys/public/{name}-root.json").read_bytes() for name in ("director", "catalogue")
    ]
    director, catalogue = (RepositoryBytes(roots=(root,)) for root in roots)
    return TrustBytes(director, catalogue)


@dataclass
class Vehicle:
    """The vehicle's side: the agent's own verification, its trusted state and its floors."""

    device: Device
    stored: TrustBytes = field(default_factory=provisioned)
    floors: Floors = Floors()
    verdict: Verdict | None = None

    def hello(self, stream: Stream, journal_id: str = "") -> pb.Hello:
        """What it says about itself when it connects."""
        director, catalogue = (
            pb.RepositoryVersions(root=1, timestamp=v.timestamp, snapshot=v.snapshot, targets=v.targets)
            for v in (self.floors.director, self.floors.catalogue)
        )
        counters = [
            pb.TokenCounter(ecu_identifier=ecu, feature_id=feature, counter=counter)
            for (ecu, feature), counter in self.floors.token_counters.items()
        ]
        return pb.Hello(
            nonce=stream.next_nonce(),
            director=director,
            catalogue=catalogue,
            journal_id=journal_id,
            token_counters=counters,
            owner_epoch=self.floors.owner_epoch,
        )

    def take(self, stream: Stream, update: pb.TrustUpdate, now_ms: int) -> Verdict:
        """Verifies an update as the agent does; raises what the agent would."""
        verdict = verifier.verify_update(
            self.stored,
            trust_update_from_proto(update),
            vin=self.device.vin,
            nonce=stream.nonce,
            now_ms=now_ms,
            floors=self.floors,
        )
        self.keep(verdict)
        return verdict

    def keep(self, verdict: Verdict) -> None:
        """Makes a verdict the trusted state."""
        self.floors = verifier.floors_after(verdict, self.floors)
        self.stored, self.verdict = verdict.state, verdict

    async def contact(self, world: World) -> Verdict:
        """Connects, takes what the cloud sends, and hangs up."""
        stream = world.connect(self.device)
        await stream.send(hello=self.hello(stream))
        verdict = self.take(stream, await stream.update(), world.now_ms[0])
        stream.call.cancel()
        return verdict


async def is_silent(world: World, vehicle: Vehicle) -> Stream:
    """Connects; asserts that the cloud signs nothing for it. A status makes sure that the hello was read."""
    stream = world.connect(vehicle.device)
    await stream.send(hello=vehicle.hello(stream))
    answer = await stream.upload(signed_batch(vehicle.device.key, vehicle.device.source, [b""]))
    assert answer.WhichOneof("payload") == "usage_refusal", answer  # the first answer of all
    return stream


async def confirm(world: World, backup_ms: int = START_MS) -> operator_pb2.ConfirmRestoreResponse:
    request = operator_pb2.ConfirmRestoreRequest(
        backup_ms=backup_ms, reason="disk died", request_id=str(uuid.uuid4())
    )
    answer: operator_pb2.ConfirmRestoreResponse = await world.operator.ConfirmRestore(request)
    return answer


async def findings(world: World) -> list[str]:
    answer = await world.operator.ListVehicles(operator_pb2.ListVehiclesRequest())
    return list(answer.vehicles[0].findings)


def put_back(backup: Path, database: Path) -> None:
    for leftover in database.parent.glob("cloud.db*"):
        leftover.unlink()
    shutil.copy(backup, database)


def play_restored(
    folder: Path,
    before: Callable[[World], Awaitable[Vehicle]],
    lost: Callable[[World, Vehicle], Awaitable[None]],
    after: Callable[[World, Vehicle], Awaitable[None]],
) -> None:
    """A backup is made after `before`; what `lost` does is gone from the database in `after`."""

    async def run() -> None:
        path, database, backup = write_config(folder), folder / "cloud.db", folder / "backup.db"
        async with open_world(path) as world:
            vehicle = await before(world)
        shutil.copy(database, backup)
        async with open_world(path, START_MS + 86_400_000) as world:
            await asyncio.wait_for(lost(world, vehicle), 30)
        put_back(backup, database)
        async with open_world(path, LATER_MS) as world:
            await asyncio.wait_for(after(world, vehicle), 30)

    asyncio.run(run())


async def registered(world: World) -> Vehicle:
    vehicle = Vehicle(await world.device())
    await world.grant(SEAT)
    await vehicle.contact(world)
    return vehicle


async def revoked_and_granted(world: World, vehicle: Vehicle) -> None:
    """The seat heating ends and comes again, and the logbook is new: versions and counters grow."""
    assert vehicle.verdict is not None
    await world.revoke(vehicle.verdict.rights.entitlements["seat-heating"].entitlement_id)
    await vehicle.contact(world)
    await world.grant(SEAT)
    await world.grant(LOGBOOK)
    await vehicle.contact(world)
    await vehicle.contact(world)


def test_a_restored_cloud_signs_nothing_older_until_it_is_confirmed_then_goes_on(tmp_path: Path) -> None:
    async def after(world: World, vehicle: Vehicle) -> None:
        trusted = vehicle.floors
        stream = await is_silent(world, vehicle)
        (finding,) = await findings(world)
        assert "newer versions than this database" in finding
        assert "confirm-restore" in finding
        (alarm,) = await world.audit(vin=VIN, alarms_only=True)
        assert alarm.action == "cloud-behind"
        versions = json.loads(alarm.detail)["versions"]
        assert versions["targets"] == {"here": 2, "vehicle": 5}
        assert versions[f"token counter of {ECU}/seat-heating"] == {"here": 1, "vehicle": 3}

        await world.grant(LOGBOOK)  # again, from the shop's ledger: in the database, not on the vehicle
        answer = await world.operator.ListEntitlements(operator_pb2.ListEntitlementsRequest(vin=VIN))
        assert len(answer.entitlements) == 2
        assert await findings(world) == [finding]

        confirmed = await confirm(world)
        assert confirmed.until_ms == LATER_MS + 30 * 86_400_000
        verdict = vehicle.take(stream, await stream.update(), world.now_ms[0])
        assert set(verdict.rights.entitlements) == {"seat-heating", "drivers-logbook"}
        assert verdict.rights.version > trusted.director.targets
        assert verdict.rights.tokens["seat-heating"].counter > trusted.token_counters[ECU, "seat-heating"]
        assert vehicle.floors.catalogue.snapshot >= CATALOGUE_JUMP
        assert await findings(world) == []
        stream.call.cancel()
        await world.revoke(verdict.rights.entitlements["seat-heating"].entitlement_id)
        assert set((await vehicle.contact(world)).rights.entitlements) == {"drivers-logbook"}

    play_restored(tmp_path, registered, revoked_and_granted, after)


def test_what_a_restored_cloud_would_have_sent_is_a_rollback_to_the_vehicle(tmp_path: Path) -> None:
    """Why it is silent: the same answer, made without the check, is refused."""

    async def after(world: World, vehicle: Vehicle) -> None:
        trusted = vehicle.floors
        liar = replace(vehicle, floors=Floors())
        stream = world.connect(vehicle.device)
        await stream.send(hello=liar.hello(stream))  # says that it trusts nothing yet
        update = await stream.update()
        with pytest.raises(RollbackError):
            vehicle.take(stream, update, world.now_ms[0])
        assert vehicle.floors == trusted

    play_restored(tmp_path, registered, revoked_and_granted, after)


def test_grants_that_reach_the_reported_version_are_not_published_under_it(tmp_path: Path) -> None:
    """The same version with other content would be refused for ever."""

    async def after(world: World, vehicle: Vehicle) -> None:
        for _ in range(3):
            granted = await world.grant(LOGBOOK)
            await world.revoke(granted.entitlement.entitlement_id)
        stream = await is_silent(world, vehicle)
        await confirm(world)
        verdict = vehicle.take(stream, await stream.update(), world.now_ms[0])
        assert verdict.rights.version > 8
        assert set(verdict.rights.entitlements) == {"seat-heating"}

    play_restored(tmp_path, registered, revoked_and_granted, after)


def test_no_file_is_made_that_the_vehicle_would_refuse(tmp_path: Path) -> None:
    async def after(world: World, vehicle: Vehicle) -> None:
        await is_silent(world, vehicle)
        state = await world.state()
        with pytest.raises(Exception, match="confirm-restore"):
            await world.operator.ExportBundle(operator_pb2.ExportBundleRequest(vin=VIN))
        assert await world.state() == state

    play_restored(tmp_path, registered, revoked_and_granted, after)


def test_a_vehicle_cannot_lead_the_versions_away_even_within_the_window(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        vehicle = await registered(world)
        await confirm(world)
        far = vehicle.floors.director
        vehicle.floors = replace(vehicle.floors, director=replace(far, targets=far.targets + MAX_JUMP + 1))
        state = await world.state()
        await is_silent(world, vehicle)
        assert "no restore explains that" in (await findings(world))[0]
        changed = await world.state()
        assert {name for name in state if changed[name] != state[name]} == {"findings"}

    play(tmp_path, story)


def test_usage_that_comes_again_is_stored_once(tmp_path: Path) -> None:
    records: list[bytes] = []

    async def before(world: World) -> Vehicle:
        vehicle = await registered(world)
        records.extend(chain(vehicle.device.source, 6))
        await send(world, vehicle, records[:3], 3)
        return vehicle

    async def send(world: World, vehicle: Vehicle, part: list[bytes], through: int) -> None:
        stream = world.connect(vehicle.device)
        await stream.send(hello=replace(vehicle, floors=Floors()).hello(stream))
        await stream.update()
        answer = await stream.upload(signed_batch(vehicle.device.key, vehicle.device.source, part))
        assert answer.WhichOneof("payload") == "receipt", answer
        assert await stored(world) == records[:through]
        stream.call.cancel()

    async def stored(world: World) -> list[bytes]:
        answer = await world.operator.ListUsage(operator_pb2.ListUsageRequest(vin=VIN))
        return [record.SerializeToString(deterministic=True) for record in answer.records]

    async def lost(world: World, vehicle: Vehicle) -> None:
        await send(world, vehicle, records[3:], 6)

    async def after(world: World, vehicle: Vehicle) -> None:
        assert await stored(world) == records[:3]
        await send(world, vehicle, records[3:], 6)
        invoice = await world.operator.PreviewInvoice(operator_pb2.PreviewInvoiceRequest(vin=VIN))
        await send(world, vehicle, records, 6)
        again = await world.operator.PreviewInvoice(operator_pb2.PreviewInvoiceRequest(vin=VIN))
        assert list(again.invoices) == list(invoice.invoices)

    play_restored(tmp_path, before, lost, after)
