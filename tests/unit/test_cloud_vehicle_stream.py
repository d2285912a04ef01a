"""What a vehicle's stream carries, over real TLS sockets."""

from __future__ import annotations

import asyncio
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import cbor2
import grpc
from support.cloud_world import (
    DAY_MS,
    DEMO,
    JOURNAL,
    START_MS,
    VIN,
    World,
    chain,
    demo_keys,
    open_world,
    play,
    signed_batch,
    verify_with_tuf,
    write_config,
)

from keys import catalogue
from openfod.operator.v1 import operator_service_pb2
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

FEATURE = "features/seat-heating/1.toml"
TOKEN = "tokens/seat-module/seat-heating.cose"


def claims(token: bytes) -> dict[int, object]:
    found: dict[int, object] = cbor2.loads(cbor2.loads(token).value[2])
    return found


def versions(update: pb.TrustUpdate) -> dict[str, pb.RepositoryVersions]:
    """What a vehicle trusts after an update."""
    found = {}
    for name, part in (("director", update.director), ("catalogue", update.catalogue)):
        numbers = {"root": 1}
        for role in ("timestamp", "snapshot", "targets"):
            numbers[role] = json.loads(getattr(part, role))["signed"]["version"]
        found[name] = pb.RepositoryVersions(**numbers)
    return found


def test_a_stock_tuf_client_accepts_what_a_vehicle_is_sent(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        update = await world.connect(device).hello()
        seen = verify_with_tuf(update, START_MS)
        assert seen.rights.vin == VIN
        assert seen.rights.version == granted.version == seen.director.targets.version
        assert seen.director.snapshot.version == granted.version
        assert list(seen.rights.entitlements) == [granted.entitlement]
        assert set(seen.tokens) == {TOKEN}
        assert seen.director.targets.targets[FEATURE].custom == {
            "ecu_identifier": "seat-module",
            "hardware_id": "openfod-seat-1",
            "release_counter": 1,
        }
        assert claims(seen.tokens[TOKEN]) == {1: 1, 2: 1, 3: 1, 4: 1, 6: {5: 200}}

    play(tmp_path, story)


def test_vin_nonce_and_time_are_signed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        update = await stream.hello()
        timestamp = json.loads(update.director.timestamp)["signed"]
        assert timestamp["nonce"] == stream.nonce.hex()
        assert timestamp["time_ms"] == START_MS
        for role in (update.director.timestamp, update.director.snapshot, update.director.targets):
            assert json.loads(role)["signed"]["vin"] == VIN

    play(tmp_path, story)


def test_parts_that_are_not_newer_stay_empty(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        await world.grant()
        first = await world.connect(device).hello()
        has = versions(first)
        update = await world.connect(device).hello(director=has["director"], catalogue=has["catalogue"])
        assert update.director.timestamp
        assert not update.director.snapshot
        assert not update.director.targets
        assert not update.catalogue.ByteSize()
        assert not update.director_targets
        assert not update.catalogue_targets
        assert json.loads(update.director.timestamp)["signed"]["version"] == 2

    play(tmp_path, story)


def test_a_grant_is_pushed_with_the_unused_nonce(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        await stream.hello()
        await stream.offer()
        granted = await world.grant()
        seen = verify_with_tuf_after_first(await stream.update())
        assert seen["version"] == granted.version
        assert seen["nonce"] == stream.nonce.hex()

    play(tmp_path, story)


def verify_with_tuf_after_first(update: pb.TrustUpdate) -> dict[str, object]:
    return {
        "version": json.loads(update.director.targets)["signed"]["version"],
        "nonce": json.loads(update.director.timestamp)["signed"]["nonce"],
    }


def test_a_grant_waits_for_a_nonce_if_none_is_unused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        await stream.hello()
        granted = await world.grant()
        await stream.offer()
        seen = verify_with_tuf_after_first(await stream.update())
        assert seen == {"version": granted.version, "nonce": stream.nonce.hex()}

    play(tmp_path, story)


def test_an_offer_that_is_not_needed_is_answered_only_when_the_signed_time_is_old(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        world.now_ms[0] += 55_000
        await stream.offer()
        # Answered in order: had the offer been answered, its update would come first.
        barrier = await stream.upload(signed_batch(device.key, device.source, chain(device.source, 1)))
        assert barrier.WhichOneof("payload") == "receipt"
        world.now_ms[0] += 1
        await stream.offer()
        update = await stream.update()
        signed = json.loads(update.director.timestamp)["signed"]
        assert (signed["nonce"], signed["time_ms"]) == (stream.nonce.hex(), START_MS + 55_001)

    play(tmp_path, story)


def test_a_revoked_right_vanishes_and_its_token_is_burnt(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        revoked = await world.revoke(granted.entitlement.entitlement_id)
        seen = verify_with_tuf(await world.connect(device).hello(), START_MS)
        assert seen.rights.version == revoked.version == granted.version + 1
        assert not seen.rights.entitlements
        assert set(seen.features) == {FEATURE}
        assert claims(seen.tokens[TOKEN]) == {1: 1, 2: 1, 3: 2, 4: 0}
        again = await world.grant("seat-heating-for-ever")
        seen = verify_with_tuf(await world.connect(device).hello(), START_MS)
        assert [r.entitlement_id for r in seen.rights.entitlements] == [again.entitlement.entitlement_id]
        assert claims(seen.tokens[TOKEN]) == {1: 1, 2: 1, 3: 3, 4: 1}

    play(tmp_path, story)


def test_a_feature_of_the_head_unit_needs_no_ecu_and_gets_no_token(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device(with_ecu=False)
        await world.grant("logbook-per-km")
        seen = verify_with_tuf(await world.connect(device).hello(), START_MS)
        assert seen.tokens == {}
        assert seen.director.targets.targets["features/drivers-logbook/1.toml"].custom == {
            "ecu_identifier": "head-unit",
            "hardware_id": "openfod-agent",
            "release_counter": 1,
        }

    play(tmp_path, story)


def test_a_newer_stream_ends_the_older_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        older = world.connect(device)
        await older.hello()
        newer = world.connect(device)
        await newer.hello()
        assert await older.ended() is grpc.StatusCode.ABORTED
        await newer.offer()
        await world.grant()
        assert (await newer.update()).director.targets

    play(tmp_path, story)


def test_usage_is_answered_with_a_receipt_and_the_next_hello_too(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        answer = await stream.upload(signed_batch(device.key, device.source, chain(device.source, 3)))
        receipt = usage_pb2.UsageReceipt.FromString(answer.receipt.receipt)
        assert (receipt.source, receipt.journal_id, receipt.through_seq) == (device.source, JOURNAL, 3)
        again = world.connect(device)
        await again.hello()
        assert (await again.receive()).receipt == answer.receipt

    play(tmp_path, story)


def test_metadata_is_renewed_before_it_ends_and_so_are_the_ecu_leases(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        first = verify_with_tuf(await world.connect(device).hello(), START_MS)
        world.now_ms[0] += 15 * DAY_MS
        seen = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0])
        assert seen.rights.version == granted.version
        world.now_ms[0] += 2_000
        seen = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0])
        assert seen.rights.version == granted.version + 1
        assert claims(seen.tokens[TOKEN])[3] == 2
        assert seen.catalogue.timestamp.version == first.catalogue.timestamp.version + 1

    play(tmp_path, story)


def test_a_subscription_goes_on_period_by_period(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        first_end = granted.entitlement.validity.not_after_s
        assert first_end * 1000 == START_MS + 30 * DAY_MS  # 31 March to 30 April
        world.now_ms[0] = first_end * 1000 - 1
        seen = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0])
        assert seen.rights.entitlements[0].validity.not_after_s == first_end + 31 * 86_400  # to 31 May

    play(tmp_path, story)


def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    async def run() -> None:
        path = write_config(tmp_path)
        async with open_world(path) as world:
            device = await world.device()
            granted = await world.grant()
            stream = world.connect(device)
            before = await stream.hello()
            await stream.upload(signed_batch(device.key, device.source, chain(device.source, 2)))
        async with open_world(path, START_MS + 1000) as world:
            stream = world.connect(device)
            update = await stream.hello()
            receipt = usage_pb2.UsageReceipt.FromString((await stream.receive()).receipt.receipt)
            assert receipt.through_seq == 2
            assert update.director.targets == before.director.targets
            assert update.director_targets == before.director_targets
            assert json.loads(update.director.timestamp)["signed"]["version"] == 2
            revoked = await world.revoke(granted.entitlement.entitlement_id)
            assert revoked.version == granted.version + 1

    asyncio.run(run())


def test_status_reaches_the_operator(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        watch = world.operator.WatchFeatures(operator_service_pb2.WatchFeaturesRequest(vin=VIN))
        assert not (await watch.read()).features
        stream = world.connect(device)
        await stream.hello()
        status = pb.FeatureStatus(
            feature_id="seat-heating",
            entitlement_id=granted.entitlement.entitlement_id,
            state=pb.FEATURE_STATE_ACTIVE,
            activation_ms=42,
        )
        await stream.send(feature_status=pb.FeatureStatusReport(features=[status]))
        assert list((await watch.read()).features) == [status]
        result = pb.UpdateResult(error_type="RollbackError", error="older")
        await stream.send(update_result=result)
        assert (await watch.read()).last_update == result
        request = operator_service_pb2.ListEntitlementsRequest(vin=VIN)
        listed = await world.operator.ListEntitlements(request)
        assert listed.entitlements[0].feature_status == status
        vehicles = (await world.operator.ListVehicles(operator_service_pb2.ListVehiclesRequest())).vehicles
        assert [(v.vin, v.connected, v.last_update) for v in vehicles] == [(VIN, True, result)]
        stream.call.cancel()
        while vehicles[0].connected:  # until the cloud has noticed; the story has a deadline
            listed = await world.operator.ListVehicles(operator_service_pb2.ListVehiclesRequest())
            vehicles = listed.vehicles

    play(tmp_path, story)


def test_an_answer_that_crossed_a_nonce_is_sent_once_more_and_only_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        first = await stream.hello()
        crossed = pb.UpdateResult(error_type="ReplayError", error="no such nonce is waiting")
        await stream.send(update_result=crossed)
        await stream.offer()
        again = await stream.update()
        signed = [json.loads(u.director.timestamp)["signed"]["version"] for u in (first, again)]
        assert signed[1] > signed[0]
        # A vehicle that refuses everything does not make the cloud sign in a circle.
        await stream.send(update_result=crossed)
        await stream.offer()
        await world.grant()
        pushed = await stream.update()
        assert pushed.director.targets, "the next answer is the grant, not another repetition"

    play(tmp_path, story)


def test_an_edited_catalogue_does_not_disturb_a_set_that_was_signed_before(tmp_path: Path) -> None:
    source, repository = tmp_path / "source", tmp_path / "catalogue"
    shutil.copytree(DEMO / "catalogue", source)
    now = datetime.fromtimestamp(START_MS / 1000, UTC)
    made = demo_keys()
    catalogue.sign_catalogue(made / "keys", source, repository, now)
    path = write_config(tmp_path, **{str(made / "catalogue"): str(repository)})
    devices = []

    async def before() -> None:
        async with open_world(path) as world:
            devices.append(await world.device())
            await world.grant()

    async def after() -> None:
        async with open_world(path) as world:
            update = await world.connect(devices[0]).hello()
            assert [t.path for t in update.catalogue_targets] == [FEATURE]
            assert "features/seat-heating/2.toml" in json.loads(update.catalogue.targets)["signed"]["targets"]
            verify_with_tuf(update, START_MS)

    asyncio.run(before())
    second = (source / FEATURE).read_text().replace("release = 1 ", "release = 2 ")
    (source / "features/seat-heating/2.toml").write_text(second)
    catalogue.sign_catalogue(made / "keys", source, repository, now)
    asyncio.run(after())
