"""Attacks on what changes hands: claims, blocked vehicles, swapped ECUs, sales, and roles.

Each is refused, nothing has changed (every table but the audit log is
compared), and the audit log tells of it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from support.cloud_world import (
    ACCOUNT,
    DAY_MS,
    NEW_ACCOUNT,
    OTHER_VIN,
    VIN,
    Device,
    World,
    chain,
    code_of,
    play,
    signed_batch,
    uid,
)

from cloud.enrolment import MAX_WRONG_CLAIMS
from cloud.identity import WORKSHOP_CALLS
from cloud.transfer import MAX_WRONG_TRIES
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.operator.v1 import operator_service_pb2_grpc
from openfod.vehicle.v1 import vehicle_service_pb2, vehicle_service_pb2_grpc

CALLS = pb.DESCRIPTOR.services_by_name["OperatorService"].methods
OTHER_UID = bytes(range(16))


async def refused(
    world: World, name: str, call: Callable[[], Awaitable[Any]], code: grpc.StatusCode, words: str
) -> pb.AuditEntry:
    """Asserts that a call is refused, changes nothing and is audited; returns the entry."""
    before, audited = await world.state(), len(await world.audit())
    found, told = await code_of(call())
    assert (found, told) == (code, told)
    assert words in told
    assert await world.state() == before
    entries = (await world.audit())[audited:]
    assert [entry.action for entry in entries][-1:] == ["refused"], entries
    entry = entries[-1]
    assert entry.actor.startswith("operator:")
    assert json.loads(entry.detail)["call"] == name
    return entry


# --- claims ------------------------------------------------------------------------


def test_a_guessed_claim_is_refused_counted_and_never_keeps_the_owner_out(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        added = await world.add_vehicle()
        before = await world.state()
        for number in range(12):
            code, words = await code_of(world.enroll(VIN, f"{number:032d}"))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert words == "the claim is unknown, used, expired or of another VIN"
        assert await world.state() == before
        noted = [
            (e.actor, json.loads(e.detail)["refused"], e.alarm)
            for e in await world.audit(vin=VIN)
            if e.action == "enrol-refused"
        ]
        assert noted == [("vehicle", 1, False), ("vehicle", 10, True)]
        await world.enroll(VIN, added.claim_token)

    play(tmp_path, story)


def test_endless_guesses_make_the_database_write_nothing_more(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.cloud.store.run(lambda tx: tx.set_wrong_claims(VIN, MAX_WRONG_CLAIMS - 1))
        for _ in range(3):
            assert (await code_of(world.enroll(VIN, "guess")))[0] is grpc.StatusCode.UNAUTHENTICATED
        vehicle = await world.cloud.store.run(lambda tx: tx.lock_vehicle(VIN))
        assert vehicle is not None
        assert vehicle.wrong_claims == MAX_WRONG_CLAIMS
        entries = [e for e in await world.audit(vin=VIN) if e.action == "enrol-refused"]
        assert [json.loads(e.detail)["refused"] for e in entries] == [MAX_WRONG_CLAIMS]

    play(tmp_path, story)


def test_guessing_for_a_vehicle_that_is_not_registered_leaves_no_trace_to_fill_a_disk(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        before = await world.state()
        assert (await code_of(world.enroll(VIN, "guess")))[0] is grpc.StatusCode.UNAUTHENTICATED
        assert await world.state() == before
        assert await world.audit() == []

    play(tmp_path, story)


@pytest.mark.parametrize("how", ["used", "late", "replaced", "of another VIN", "none"])
def test_an_enrolled_vehicle_does_not_enrol_again_without_the_newest_claim(tmp_path: Path, how: str) -> None:
    async def story(world: World) -> None:
        first = await world.add_vehicle()
        device = await world.enroll(VIN, first.claim_token)
        other = await world.add_vehicle(OTHER_VIN)
        claim = {"used": first.claim_token, "of another VIN": other.claim_token, "none": ""}.get(how, "")
        if how in {"late", "replaced"}:
            made = await world.claim()
            claim = made.claim_token
            if how == "late":
                world.now_ms[0] = made.claim_expires_ms
            else:
                await world.claim()
        before = await world.state()
        code, words = await code_of(world.enroll(VIN, claim))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert words == "the claim is unknown, used, expired or of another VIN"
        assert await world.state() == before
        assert (await world.audit(vin=VIN))[-1].action == "enrol-refused"
        await world.connect(device).hello()  # the certificate goes on

    play(tmp_path, story)


def test_a_claim_for_an_unknown_vehicle_is_not_made(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await refused(world, "CreateClaim", world.claim, grpc.StatusCode.NOT_FOUND, "is not registered")

    play(tmp_path, story)


def test_the_certificate_before_a_second_enrolment_is_cut_off_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        """The device key was stolen: what the thief has open ends, and opens no more."""
        stolen = await world.device()
        stream = world.connect(stolen)
        await stream.hello()
        claim = await world.claim()
        owner = await world.enroll(VIN, claim.claim_token)
        assert await stream.ended() is grpc.StatusCode.PERMISSION_DENIED
        before = await world.state()
        again = world.connect(stolen)
        assert await again.ended() is grpc.StatusCode.PERMISSION_DENIED
        assert await world.state() == before
        await world.connect(owner).hello()
        entries = await world.audit(vin=VIN)
        assert [e.action for e in entries] == ["create-vehicle", "enrol", "create-claim", "enrol"]
        assert json.loads(entries[2].detail)["reason"] == "key lost"
        ended = json.loads(entries[3].detail)["ended_fingerprints"]
        assert ended == [stolen.certificate.fingerprint(hashes.SHA256()).hex()]

    play(tmp_path, story)


# --- blocked vehicles ----------------------------------------------------------------


def test_a_blocked_vehicle_is_cut_off_at_once_and_stays_out(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        stream = world.connect(device)
        await stream.hello()
        blocked = await world.block()
        assert await stream.ended() is grpc.StatusCode.PERMISSION_DENIED
        assert (blocked.vehicle.blocked_ms, blocked.vehicle.connected) == (world.now_ms[0], False)
        before = await world.state()
        call = world.connect(device).call
        code, words = await code_of(asyncio.wait_for(call.read(), 10))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert words == f"vehicle {VIN} is blocked; a new claim lets it in again"
        assert await world.state() == before
        rights = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        assert [(r.entitlement.entitlement_id, r.revoked_ms) for r in rights.entitlements] == [
            (granted.entitlement.entitlement_id, 0)
        ]
        entry = (await world.audit(vin=VIN))[-1]
        assert (entry.actor, entry.action) == ("operator:operator", "block-vehicle")

        again = await world.enroll(VIN, (await world.claim()).claim_token)
        await world.connect(again).hello()
        vehicle = (await world.operator.ListVehicles(pb.ListVehiclesRequest())).vehicles[0]
        assert vehicle.blocked_ms == 0

    play(tmp_path, story)


def test_a_claim_from_before_the_block_does_not_end_it(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.device()
        request = pb.CreateClaimRequest(vin=VIN, reason="x", request_id=str(uuid.uuid4()))
        claim = await world.operator.CreateClaim(request)
        await world.block()
        before = await world.state()
        assert (await code_of(world.enroll(VIN, claim.claim_token)))[0] is grpc.StatusCode.UNAUTHENTICATED
        repeated = await world.operator.CreateClaim(request)  # a replayed request makes none either
        assert repeated.claim_token == ""
        assert await world.state() == before

    play(tmp_path, story)


def test_usage_that_a_blocked_vehicle_still_sends_is_not_taken(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        await world.block()
        before = await world.state()
        usage = signed_batch(device.key, device.source, chain(device.source, 1))
        with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)):
            await stream.upload(usage)
        assert await world.state() == before

    play(tmp_path, story)


# --- swapped ECUs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("old uid not on record", grpc.StatusCode.FAILED_PRECONDITION, "another uid on record"),
        ("new uid in another vehicle", grpc.StatusCode.ALREADY_EXISTS, f"built into vehicle {OTHER_VIN}"),
        ("no such vehicle", grpc.StatusCode.NOT_FOUND, "is not registered"),
        ("vehicle without the ECU", grpc.StatusCode.NOT_FOUND, "has no ECU seat-module"),
    ],
)
def test_an_ecu_is_not_swapped_without_proof(
    tmp_path: Path, what: str, code: grpc.StatusCode, words: str
) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.add_vehicle(OTHER_VIN)
        await world.add_vehicle("WFDSEAT10N0000003", with_ecu=False)
        await world.grant()
        call = {
            "old uid not on record": lambda: world.rebind(OTHER_UID, old_uid=bytes(16)),
            "new uid in another vehicle": lambda: world.rebind(uid(OTHER_VIN)),
            "no such vehicle": lambda: world.rebind(OTHER_UID, vin="WFDSEAT10N0000004"),
            "vehicle without the ECU": lambda: world.rebind(OTHER_UID, vin="WFDSEAT10N0000003"),
        }[what]
        entry = await refused(world, "RebindEcu", call, code, words)
        assert words in json.loads(entry.detail)["reason"]

    play(tmp_path, story)


def test_rights_are_not_multiplied_by_swaps_beyond_the_quota(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        """Each swap starts the ECU's own limits anew, so there are few of them."""
        await world.add_vehicle()
        await world.grant()
        uids = [uid(VIN), *(bytes([n]) * 16 for n in (1, 2, 3))]
        for index in (0, 1):
            await world.rebind(uids[index + 1], uids[index])
            world.now_ms[0] += DAY_MS
        await refused(
            world,
            "RebindEcu",
            lambda: world.rebind(uids[3], uids[2]),
            grpc.StatusCode.FAILED_PRECONDITION,
            "2 ECUs of vehicle WFDSEAT10N0000001 were swapped within 365 days, the limit is 2; "
            "possible again from 2027-03-31 12:00:00Z",
        )
        world.now_ms[0] += 363 * DAY_MS - 1
        code, _ = await code_of(world.rebind(uids[3], uids[2]))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        world.now_ms[0] += 1
        await world.rebind(uids[3], uids[2])

    play(tmp_path, story)


# --- sales ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["guessed", "late", "reused", "replaced", "of another vehicle", "none open"])
def test_a_vehicle_is_not_sold_without_the_owners_code(tmp_path: Path, how: str) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.add_vehicle(OTHER_VIN)
        await world.grant("seat-heating-for-ever")
        code = base64.b32encode(bytes(20)).decode().lower()
        if how != "none open":
            begun = await world.begin_transfer()
            if how in {"late", "reused", "replaced"}:
                code = begun.transfer_code
        if how == "late":
            world.now_ms[0] = begun.expires_ms
        elif how == "reused":
            await world.complete_transfer(code)
        elif how == "replaced":
            await world.begin_transfer()
        elif how == "of another vehicle":
            code = (await world.begin_transfer(OTHER_VIN)).transfer_code
        entry = await refused(
            world,
            "CompleteTransfer",
            lambda: world.complete_transfer(code),
            grpc.StatusCode.UNAUTHENTICATED,
            "the code is unknown, used, late or of another vehicle",
        )
        assert entry.vin == VIN
        assert code not in entry.detail

    play(tmp_path, story)


def test_a_code_ends_after_ten_wrong_tries_with_an_alarm(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        begun = await world.begin_transfer()
        for _ in range(MAX_WRONG_TRIES):
            code, _ = await code_of(world.complete_transfer("guess"))
            assert code is grpc.StatusCode.UNAUTHENTICATED
        alarms = await world.audit(vin=VIN, alarms_only=True)
        assert [(e.actor, e.action, e.alarm) for e in alarms] == [("cloud", "transfer-code-ended", True)]
        await refused(
            world,
            "CompleteTransfer",
            lambda: world.complete_transfer(begun.transfer_code),
            grpc.StatusCode.UNAUTHENTICATED,
            "ask the present owner for a new one",
        )
        await world.sell()

    play(tmp_path, story)


def test_nine_wrong_tries_leave_the_code_usable(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        begun = await world.begin_transfer()
        for _ in range(MAX_WRONG_TRIES - 1):
            await code_of(world.complete_transfer("guess"))
        assert (await world.complete_transfer(begun.transfer_code)).owner_epoch == 2

    play(tmp_path, story)


def test_the_old_owners_unused_claim_does_not_outlive_the_sale(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        claim = await world.claim()
        await world.sell()
        before = await world.state()
        code, _ = await code_of(world.enroll(VIN, claim.claim_token))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert await world.state() == before
        await world.connect(device).hello()

    play(tmp_path, story)


def test_the_new_owner_sees_nothing_of_the_old_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        old = [await world.grant("seat-heating-for-ever"), await world.grant("logbook-per-km")]
        ids = [granted.entitlement.entitlement_id for granted in old]
        stream = world.connect(device)
        await stream.hello()
        records = chain(device.source, 3, entitlement_id=ids[0])
        await stream.upload(signed_batch(device.key, device.source, records[:2]))
        status = vehicle_service_pb2.FeatureStatus(
            feature_id="seat-heating", entitlement_id=ids[0], trace_id=old[0].entitlement.trace_id
        )
        report = vehicle_service_pb2.FeatureStatusReport(features=[status])
        await stream.send(feature_status=report)
        await stream.offer()
        sold = await world.sell()
        update = await stream.update()
        # What comes late: use of the old owner, and a report from before the vehicle knew.
        await stream.send(feature_status=report)
        late = signed_batch(device.key, device.source, records[2:])
        assert (await stream.upload(late)).WhichOneof("payload") == "receipt"

        secrets = [
            *(ACCOUNT.encode(), device.key_pem),
            *(text.encode() for g in old for text in (g.entitlement.entitlement_id, g.entitlement.trace_id)),
        ]
        answers = [
            await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN)),
            await world.operator.ListUsage(pb.ListUsageRequest(vin=VIN)),
            await world.operator.WatchFeatures(pb.WatchFeaturesRequest(vin=VIN)).read(),
            await world.operator.ListVehicles(pb.ListVehiclesRequest()),
            update,
        ]
        for answer in answers:
            content = answer.SerializeToString()
            assert not [secret for secret in secrets if secret in content], answer
        assert [r.entitlement.account for r in answers[0].entitlements] == [NEW_ACCOUNT]
        assert answers[0].entitlements[0].entitlement == sold.kept[0].entitlement
        assert not answers[1].records
        assert not answers[2].features

    play(tmp_path, story)


def test_the_old_owner_pays_for_the_old_owners_use_only(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        old = await world.grant("logbook-per-km")
        stream = world.connect(device)
        await stream.hello()
        await world.sell()
        new = await world.grant("logbook-per-km", account=NEW_ACCOUNT)
        values: dict[str, Any] = {"feature_id": "drivers-logbook", "meter_id": "distance", "unit": 2}
        records = chain(
            device.source, 1, value=5_000, entitlement_id=old.entitlement.entitlement_id, **values
        )
        last = hashlib.sha256(records[-1]).digest()
        records += chain(
            device.source,
            1,
            first=2,
            prev_hash=last,
            value=7_000,
            entitlement_id=new.entitlement.entitlement_id,
            **values,
        )
        await stream.upload(signed_batch(device.key, device.source, records))
        preview = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))
        assert {i.account: i.total_minor for i in preview.invoices} == {ACCOUNT: 10, NEW_ACCOUNT: 14}
        usage = await world.operator.ListUsage(pb.ListUsageRequest(vin=VIN))
        assert [r.value for r in usage.records] == [7_000]

    play(tmp_path, story)


# --- roles ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted({m.name for m in CALLS} - WORKSHOP_CALLS))
def test_a_workshop_cannot_grant_or_do_anything_else_beyond_its_role(tmp_path: Path, method: str) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        kind = next(m for m in CALLS if m.name == method).input_type
        request: Any = getattr(pb, kind.name)()
        if "vin" in kind.fields_by_name:
            request.vin = VIN
        stub = world.as_operator("garage-7", "workshop")

        def call() -> Any:
            made = getattr(stub, method)(request)
            return made.read() if method == "WatchFeatures" else made

        entry = await refused(
            world,
            method,
            call,
            grpc.StatusCode.PERMISSION_DENIED,
            f"a workshop may not call {method}; it needs role operator",
        )
        assert (entry.actor, entry.alarm) == ("operator:garage-7", True)

    play(tmp_path, story)


def test_a_workshop_reads_the_audit_log_of_one_vehicle_only(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.add_vehicle(OTHER_VIN)
        garage = world.as_operator("garage-7", "workshop")
        await refused(
            world,
            "ListAudit",
            lambda: garage.ListAudit(pb.ListAuditRequest()),
            grpc.StatusCode.PERMISSION_DENIED,
            "name its VIN",
        )
        answer = await garage.ListAudit(pb.ListAuditRequest(vin=VIN))
        assert {entry.vin for entry in answer.entries} == {VIN}

    play(tmp_path, story)


def test_a_workshop_swaps_an_ecu_and_reads(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        await world.grant()
        garage = world.as_operator("garage-7", "workshop")
        await world.rebind(OTHER_UID, stub=garage)
        assert len((await garage.ListVehicles(pb.ListVehiclesRequest())).vehicles) == 1
        rights = await garage.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        assert len(rights.entitlements) == 1
        entry = (await world.audit(vin=VIN))[-1]
        assert (entry.actor, entry.action) == ("operator:garage-7", "rebind-ecu")

    play(tmp_path, story)


def _certificate(world: World, names: list[str]) -> tuple[bytes, bytes]:
    """A certificate of the enrolment CA with any names."""
    key = ec.generate_private_key(ec.SECP256R1())
    ca = x509.load_pem_x509_certificate((world.keys / "enrolment/ca.crt").read_bytes())
    ca_key = load_pem_private_key((world.keys / "enrolment/ca.key").read_bytes(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    certificate = (
        x509.CertificateBuilder(ca.subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(ca.not_valid_before_utc)
        .not_valid_after(ca.not_valid_after_utc)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name) for name in names]),
            critical=False,
        )
        .sign(ca_key, hashes.SHA256())
    )
    return Device("", key, certificate, "").key_pem, certificate.public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["urn:openfod:role:operator"], "this call is for an operator"),
        (["urn:openfod:operator:a", "urn:openfod:operator:b"], "this call is for an operator"),
        (
            ["urn:openfod:operator:a", "urn:openfod:role:workshop", "urn:openfod:role:operator"],
            "names more than one role",
        ),
        (["urn:openfod:operator:a", f"urn:openfod:vehicle:{VIN}"], "names more than one role"),
        (["urn:openfod:operator:a", "urn:openfod:role:"], "role '' is none of operator, workshop"),
        (["urn:openfod:operator:a", "urn:openfod:role:Operator"], "role 'Operator' is none of"),
        (["urn:openfod:operator:a", "urn:openfod:role:" + "x" * 500], f"role '{'x' * 64}' is none of"),
    ],
)
def test_a_certificate_with_another_or_no_clear_role_may_do_nothing(
    tmp_path: Path, names: list[str], words: str
) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        before = await world.state()
        channel = world.channel(*_certificate(world, names))
        stub: Any = operator_service_pb2_grpc.OperatorServiceStub(channel)
        code, told = await code_of(stub.ListVehicles(pb.ListVehiclesRequest()))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert words in told
        assert await world.state() == before

    play(tmp_path, story)


def test_a_device_certificate_that_also_names_an_operator_opens_no_stream(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        names = [f"urn:openfod:vehicle:{VIN}", "urn:openfod:operator:operator"]
        key, certificate = _certificate(world, names)
        stub: Any = vehicle_service_pb2_grpc.VehicleServiceStub(world.channel(key, certificate))
        code, words = await code_of(asyncio.wait_for(stub.Connect().read(), 10))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "names others too" in words

    play(tmp_path, story)


def test_a_refusal_with_hostile_text_is_not_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        """Malformed fields may hold anything, so the audit log does not take them."""
        request = pb.BlockVehicleRequest(vin="\x1b[2J" * 100, reason="x", request_id=str(uuid.uuid4()))
        assert (await code_of(world.operator.BlockVehicle(request)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        garage = world.as_operator("garage-7", "workshop")
        assert (await code_of(garage.BlockVehicle(request)))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert [(entry.action, entry.vin) for entry in await world.audit()] == [("refused", "")]

    play(tmp_path, story)
