"""What changes hands and how: second enrolments, swapped ECUs, sales, and the audit log that tells of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import cbor2
import grpc
import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from support.cloud_world import (
    ACCOUNT,
    DAY_MS,
    DEMO,
    ECU,
    NEW_ACCOUNT,
    START_MS,
    VIN,
    World,
    chain,
    code_of,
    open_world,
    play,
    signed_batch,
    uid,
    verify_with_tuf,
    write_config,
)

from cloud import schema
from cloud.store import Store
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2

NEW_UID = bytes(range(16))
SEAT_TOKEN = f"tokens/{ECU}/seat-heating.cose"


def claims_of(world: World, content: bytes, ecu_uid: bytes) -> dict[int, Any]:
    """The claims of a token that this cloud signed for this vehicle and this ECU uid."""
    protected, _, payload, signature = cbor2.loads(content).value
    key = load_pem_private_key((world.keys / "token/key-1.key").read_bytes(), None)
    assert isinstance(key, Ed25519PrivateKey)
    external = cbor2.dumps(["openfod-token-v1", VIN, ecu_uid], canonical=True)
    signed = cbor2.dumps(["Signature1", protected, external, payload], canonical=True)
    key.public_key().verify(signature, signed)
    claims: dict[int, Any] = cbor2.loads(payload)
    return claims


COUNTER, STATE, TERMS = 3, 4, 6


def test_a_swapped_ecu_gets_every_live_right_and_the_old_one_is_burned(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        stream = world.connect(device)
        first = verify_with_tuf(await stream.hello(), world.now_ms[0])
        assert claims_of(world, first.tokens[SEAT_TOKEN], uid(VIN))[COUNTER] == 1
        await stream.offer()

        rebound = await world.rebind(NEW_UID)
        assert rebound.version == granted.version + 1
        assert [e.ecu_uid for e in rebound.vehicle.ecus] == [NEW_UID]
        (burning,) = rebound.burning_tokens
        burned = claims_of(world, burning, uid(VIN))
        assert (burned[COUNTER], burned[STATE]) == (2, 0)
        assert TERMS not in burned

        update = await stream.update()
        token = next(t.content for t in update.director_targets if t.path == SEAT_TOKEN)
        bound = claims_of(world, token, NEW_UID)
        # Above all that the vehicle knows of this ECU and feature, or its floor would refuse the token.
        assert (bound[COUNTER], bound[STATE], bound[TERMS]) == (3, 1, {5: 200})
        entry = json.loads((await world.audit(vin=VIN))[-1].detail)
        assert entry["burning_tokens"] == [burning.hex()]
        assert (entry["old_uid"], entry["new_uid"]) == (uid(VIN).hex(), NEW_UID.hex())

        await world.revoke(granted.entitlement.entitlement_id)
        tokens = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        assert claims_of(world, tokens[0].content, NEW_UID)[STATE] == 0

    play(tmp_path, story)


def test_an_ended_right_stays_ended_on_the_new_ecu(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        granted = await world.grant()
        await world.revoke(granted.entitlement.entitlement_id)
        await world.rebind(NEW_UID)
        (row,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        assert claims_of(world, row.content, NEW_UID)[STATE] == 0

    play(tmp_path, story)


def test_an_ecu_that_comes_back_goes_on_above_its_own_counter(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.grant()
        await world.rebind(NEW_UID)
        await world.rebind(uid(VIN), NEW_UID)
        (row,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        claims = claims_of(world, row.content, uid(VIN))
        assert (claims[COUNTER], claims[STATE]) == (5, 1)  # 1 granted, 2 burned, 3 new, 4 burned

    play(tmp_path, story)


def test_an_ecu_without_tokens_is_swapped_too(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        rebound = await world.rebind(NEW_UID)
        assert (list(rebound.burning_tokens), rebound.version) == ([], 2)
        granted = await world.grant()
        (row,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        assert claims_of(world, row.content, NEW_UID)[COUNTER] == 1
        assert granted.version == 3

    play(tmp_path, story)


def test_what_stays_with_the_vehicle_is_the_new_accounts_and_the_rest_ends(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stays = await world.grant("seat-heating-for-ever")
        goes = await world.grant("logbook-per-km")
        stream = world.connect(device)
        before = verify_with_tuf(await stream.hello(), world.now_ms[0])
        assert before.rights.owner_epoch == 1
        await stream.offer()
        world.now_ms[0] += DAY_MS
        sold = await world.sell()
        assert (sold.owner_epoch, sold.version) == (2, goes.version + 1)
        (kept,), (ended,) = sold.kept, sold.ended
        assert ended.entitlement == goes.entitlement
        assert (ended.revoked_ms, ended.revoke_reason) == (world.now_ms[0], "the vehicle was sold")
        new, old = kept.entitlement, stays.entitlement
        assert new.account == NEW_ACCOUNT
        assert new.entitlement_id != old.entitlement_id
        assert new.trace_id != old.trace_id
        for name in ("entitlement_id", "account", "trace_id"):
            setattr(new, name, getattr(old, name))
        assert new == old  # nothing else

        update = await stream.update()
        targets = {t.path: t.content for t in update.director_targets}
        assert targets[SEAT_TOKEN] == before.tokens[SEAT_TOKEN]
        vehicle = (await world.operator.ListVehicles(pb.ListVehiclesRequest())).vehicles[0]
        assert vehicle.owner_epoch == 2
        signed = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0]).rights
        assert (signed.owner_epoch, [r.account for r in signed.entitlements]) == (2, [NEW_ACCOUNT])

    play(tmp_path, story)


def test_the_token_of_a_right_that_goes_with_the_account_is_burned(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.grant()
        await world.sell()
        (row,) = await world.cloud.store.run(lambda tx: tx.tokens(VIN))
        claims = claims_of(world, row.content, uid(VIN))
        assert (claims[COUNTER], claims[STATE]) == (2, 0)
        assert (await world.sell()).owner_epoch == 3

    play(tmp_path, story)


def _run(folder: Path, plans: str, story: Callable[[World], Awaitable[None]]) -> None:
    (folder / "plans.toml").write_text(plans)
    path = write_config(folder, **{str(DEMO / "plans.toml"): "plans.toml"})

    async def run() -> None:
        async with open_world(path) as world:
            await asyncio.wait_for(story(world), 30)

    asyncio.run(run())


async def _totals(world: World) -> dict[str, int]:
    preview = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))
    return {found.account: found.total_minor for found in preview.invoices}


def test_what_was_bought_outright_is_paid_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.grant("seat-heating-for-ever")
        world.now_ms[0] += DAY_MS
        await world.sell()
        world.now_ms[0] += 400 * DAY_MS
        assert await _totals(world) == {ACCOUNT: 24_900}

    play(tmp_path, story)


def test_each_owner_pays_the_periods_that_began_in_their_time(tmp_path: Path) -> None:
    plans = (
        (DEMO / "plans.toml")
        .read_text()
        .replace('resale = "goes-with-account" ', 'resale = "stays-with-vehicle" ')
    )

    async def story(world: World) -> None:
        await world.add_vehicle()
        granted = await world.grant()
        world.now_ms[0] += 45 * DAY_MS
        sold = await world.sell()
        assert sold.kept[0].entitlement.plan_id == granted.entitlement.plan_id
        assert await _totals(world) == {ACCOUNT: 2 * 499}
        world.now_ms[0] += 14 * DAY_MS  # two months after the grant less a day or so
        assert await _totals(world) == {ACCOUNT: 2 * 499}
        world.now_ms[0] += 3 * DAY_MS
        assert await _totals(world) == {ACCOUNT: 2 * 499, NEW_ACCOUNT: 499}
        await world.sell()
        world.now_ms[0] += 62 * DAY_MS
        assert await _totals(world) == {ACCOUNT: 2 * 499, NEW_ACCOUNT: 3 * 499}

    _run(tmp_path, plans, story)


def test_the_first_owners_subscription_renews_on_its_own_day_after_the_sale(tmp_path: Path) -> None:
    plans = (
        (DEMO / "plans.toml")
        .read_text()
        .replace('resale = "goes-with-account" ', 'resale = "stays-with-vehicle" ')
    )

    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        world.now_ms[0] += 5 * DAY_MS
        kept = (await world.sell()).kept[0].entitlement
        assert kept.validity == granted.entitlement.validity
        world.now_ms[0] = kept.validity.not_after_s * 1000
        await world.connect(device).hello()  # what is due is renewed before it is signed
        rows = await world.cloud.store.run(lambda tx: tx.entitlements(VIN))
        assert (rows[-1].anchor_ms, rows[-1].granted_ms) == (START_MS, START_MS + 5 * DAY_MS)
        listed = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        end_s = listed.entitlements[0].entitlement.validity.not_after_s
        assert end_s == START_MS // 1000 + 61 * 86_400  # 31 March + 2 months is 31 May

    _run(tmp_path, plans, story)


def _database(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("cloud.db*"))


def test_use_of_no_known_right_belongs_to_no_owner_after_a_sale(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        await world.sell()
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 2)))
        usage = await world.operator.ListUsage(pb.ListUsageRequest(vin=VIN))
        assert not usage.records
        stored = await world.cloud.store.run(lambda tx: tx.usage(device.source))
        assert [row.seq for row in stored] == [1, 2]

    play(tmp_path, story)


def test_what_was_reported_before_a_sale_is_forgotten(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        await stream.hello()
        status = vehicle_service_pb2.FeatureStatus(feature_id="seat-heating", reason="switched off at home")
        await stream.send(feature_status=vehicle_service_pb2.FeatureStatusReport(features=[status]))
        watch = world.operator.WatchFeatures(pb.WatchFeaturesRequest(vin=VIN))
        while not (await watch.read()).features:
            pass
        await world.sell()
        while (await asyncio.wait_for(watch.read(), 10)).features:
            pass
        assert await world.cloud.store.run(lambda tx: tx.status(VIN)) == {}

    play(tmp_path, story)


def test_a_certificate_that_another_process_ended_gets_no_further_update(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        await stream.hello()
        await world.cloud.store.run(lambda tx: tx.end_devices(VIN, world.now_ms[0]))
        await world.grant()
        await stream.offer()
        assert await stream.ended() is grpc.StatusCode.PERMISSION_DENIED

    play(tmp_path, story)


@pytest.mark.parametrize("method", ["BlockVehicle", "RebindEcu", "CompleteTransfer"])
def test_the_same_request_id_does_it_once(tmp_path: Path, method: str) -> None:
    async def story(world: World) -> None:
        await world.device()
        await world.grant()
        code = (await world.begin_transfer()).transfer_code
        ids: dict[str, Any] = {"vin": VIN, "request_id": str(uuid.uuid4()).upper()}
        request: Any = {
            "BlockVehicle": pb.BlockVehicleRequest(reason="stolen", **ids),
            "RebindEcu": pb.RebindEcuRequest(
                ecu_identifier=ECU, old_uid=uid(VIN), new_uid=NEW_UID, reason="wet", **ids
            ),
            "CompleteTransfer": pb.CompleteTransferRequest(transfer_code=code, account=NEW_ACCOUNT, **ids),
        }[method]
        call = getattr(world.operator, method)
        first = await call(request)
        world.now_ms[0] += 1
        before = await world.state()
        request.request_id = request.request_id.lower()
        assert await call(request) == first
        assert await world.state() == before
        request.vin = "WFDSEAT10N0000009"
        code_found, words = await code_of(call(request))
        assert code_found is grpc.StatusCode.ALREADY_EXISTS
        assert "was used for another request" in words
        assert await world.state() == before

    play(tmp_path, story)


def test_a_repeated_block_does_not_end_a_vehicle_that_was_let_in_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.device()
        request = pb.BlockVehicleRequest(vin=VIN, reason="stolen", request_id=str(uuid.uuid4()))
        await world.operator.BlockVehicle(request)
        device = await world.enroll(VIN, (await world.claim()).claim_token)
        stream = world.connect(device)
        await stream.hello()
        await world.operator.BlockVehicle(request)
        await stream.offer()
        await world.grant("logbook-per-km")
        await stream.update()

    play(tmp_path, story)


def test_a_lost_answer_with_a_secret_can_be_asked_for_again_while_it_is_open(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.device()
        claim = pb.CreateClaimRequest(vin=VIN, reason="lost", request_id=str(uuid.uuid4()))
        first = await world.operator.CreateClaim(claim)
        second = await world.operator.CreateClaim(claim)
        assert (await code_of(world.enroll(VIN, first.claim_token)))[0] is grpc.StatusCode.UNAUTHENTICATED
        stored = await world.cloud.store.run(lambda tx: tx.claim(VIN))
        assert stored is not None
        assert stored.token_hash == hashlib.sha256(second.claim_token.encode()).digest()
        await world.enroll(VIN, second.claim_token)
        assert (await world.operator.CreateClaim(claim)).claim_token == ""

        begin = pb.BeginTransferRequest(vin=VIN, request_id=str(uuid.uuid4()))
        one = await world.operator.BeginTransfer(begin)
        two = await world.operator.BeginTransfer(begin)
        code, _ = await code_of(world.complete_transfer(one.transfer_code))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        await world.complete_transfer(two.transfer_code)
        assert (await world.operator.BeginTransfer(begin)).transfer_code == ""
        await world.cloud.stop(0)
        everything = _database(tmp_path)
        for secret in (first.claim_token, second.claim_token, one.transfer_code, two.transfer_code):
            assert secret.encode() not in everything

    play(tmp_path, story)


ID = "00000000-0000-4000-8000-000000000001"
_SWAP = pb.RebindEcuRequest(
    vin=VIN, ecu_identifier=ECU, old_uid=bytes(16), new_uid=NEW_UID, reason="x", request_id=ID
)


def _swap(**fields: Any) -> pb.RebindEcuRequest:
    request = pb.RebindEcuRequest()
    request.CopyFrom(_SWAP)
    for name, value in fields.items():
        setattr(request, name, value)
    return request


BAD: dict[str, tuple[str, Any]] = {
    "vin: ": ("CreateClaim", pb.CreateClaimRequest(vin="IOQ", reason="x", request_id=ID)),
    "reason: ": ("BlockVehicle", pb.BlockVehicleRequest(vin=VIN, request_id=ID)),
    "request_id: ": ("BeginTransfer", pb.BeginTransferRequest(vin=VIN, request_id="1")),
    "ecu_identifier: ": ("RebindEcu", _swap(ecu_identifier="")),
    "old_uid: ": ("RebindEcu", _swap(old_uid=b"1")),
    "new_uid: ": ("RebindEcu", _swap(new_uid=b"1")),
    "new_uid: expected another uid": ("RebindEcu", _swap(new_uid=bytes(16))),
    "account: ": (
        "CompleteTransfer",
        pb.CompleteTransferRequest(vin=VIN, transfer_code="x", account="Jane", request_id=ID),
    ),
    "transfer_code: ": (
        "CompleteTransfer",
        pb.CompleteTransferRequest(vin=VIN, transfer_code="x" * 129, account=ACCOUNT, request_id=ID),
    ),
    "page_token: ": ("ListAudit", pb.ListAuditRequest(page_token="x")),
    "page_size: ": ("ListAudit", pb.ListAuditRequest(page_size=1_001)),
}


def test_a_malformed_field_is_named_and_changes_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        before, audited = await world.state(), await world.audit()
        for field, (method, request) in BAD.items():
            code, words = await code_of(getattr(world.operator, method)(request))
            assert (field, code) == (field, grpc.StatusCode.INVALID_ARGUMENT)
            assert words.startswith(field), words
        assert await world.state() == before
        assert await world.audit() == audited

    play(tmp_path, story)


def test_the_audit_log_is_listed_by_pages_vehicle_and_alarm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.cloud.store.run(lambda tx: tx.audit("cloud", "tried", VIN, 7, alarm=True, fact=1))
        await world.cloud.store.run(lambda tx: tx.audit("cloud", "restored", "", 8))
        page = await world.operator.ListAudit(pb.ListAuditRequest(page_size=2))
        rest = await world.operator.ListAudit(
            pb.ListAuditRequest(page_size=2, page_token=page.next_page_token)
        )
        assert [e.action for e in (*page.entries, *rest.entries)] == ["create-vehicle", "tried", "restored"]
        assert not rest.next_page_token
        (alarm,) = await world.audit(alarms_only=True)
        assert (alarm.at_ms, alarm.actor, alarm.vin, alarm.detail, alarm.alarm) == (
            7,
            "cloud",
            VIN,
            '{"fact": 1}',
            True,
        )
        assert [e.action for e in await world.audit(vin=VIN)] == ["create-vehicle", "tried"]

    play(tmp_path, story)


def test_an_older_database_belongs_to_its_first_owner(tmp_path: Path) -> None:
    """Migration 0003: rights keep the start of their periods, and operators are named as such."""
    path = tmp_path / "cloud.db"
    engine = sa.create_engine(f"sqlite:///{path}")
    settings = Config()
    settings.set_main_option("script_location", "cloud:migrations")
    with engine.begin() as connection:
        settings.attributes["connection"] = connection
        command.upgrade(settings, "0002")
    engine.dispose()
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO vehicles VALUES (?, 'veh-1', 1, 2, x'')", (VIN,))
        database.execute(
            "INSERT INTO entitlements VALUES ('ent-1', ?, 'f', 'acc-1', 1, x'', 41, 0, '')", (VIN,)
        )
        database.execute("INSERT INTO usage_records VALUES ('veh-1', 'j', 1, x'', x'', 3)")
        for actor in ("alice", "vehicle"):
            database.execute("INSERT INTO audit_log VALUES (NULL, 1, ?, 'a', ?, '{}')", (actor, VIN))
    database.close()
    store = Store(sa.make_url(f"sqlite:///{path}"))
    vehicle = store.run_here(lambda tx: tx.lock_vehicle(VIN))
    (right,) = store.run_here(lambda tx: tx.entitlements(VIN))
    usage = store.run_here(lambda tx: tx.usage("veh-1", owner_epoch=1))
    entries = store.run_here(lambda tx: tx.audit_page("", alarms_only=False, after=0, limit=9))
    store.close()
    assert vehicle is not None
    assert (vehicle.blocked_ms, vehicle.owner_epoch, vehicle.wrong_claims) == (0, 1, 0)
    assert (right.owner_epoch, right.anchor_ms) == (1, 41)
    assert len(usage) == 1
    assert [(entry.actor, entry.alarm) for entry in entries] == [
        ("operator:alice", False),
        ("vehicle", False),
    ]
    assert {"transfers", "ecu_swaps"} <= set(schema.metadata.tables)
