"""What operators may ask for, and what they are told."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.cloud_world import (
    ACCOUNT,
    DAY_MS,
    ECU,
    HARDWARE,
    JOURNAL,
    OTHER_VIN,
    VIN,
    World,
    chain,
    code_of,
    play,
    signed_batch,
    uid,
)

from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2


def test_the_same_request_id_grants_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        request_id = str(uuid.uuid4())
        first = await world.grant(request_id=request_id)
        world.now_ms[0] += 1
        assert await world.grant(request_id=request_id) == first
        listed = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        assert len(listed.entitlements) == 1
        code, words = await code_of(world.grant("logbook-per-km", request_id=request_id))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert request_id in words

    play(tmp_path, story)


def test_the_same_request_id_revokes_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        granted = await world.grant()
        request = pb.RevokeEntitlementRequest(
            vin=VIN,
            entitlement_id=granted.entitlement.entitlement_id,
            reason="sold",
            request_id=str(uuid.uuid4()),
        )
        first = await world.operator.RevokeEntitlement(request)
        assert await world.operator.RevokeEntitlement(request) == first
        request.request_id = str(uuid.uuid4())
        code, words = await code_of(world.operator.RevokeEntitlement(request))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "has ended before: sold" in words

    play(tmp_path, story)


def test_a_lost_answer_to_a_registration_can_be_asked_for_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        request = pb.CreateVehicleRequest(vin=VIN, request_id=str(uuid.uuid4()))
        first = await world.operator.CreateVehicle(request)
        again = await world.operator.CreateVehicle(request)
        assert again.vehicle == first.vehicle
        assert again.claim_token != first.claim_token
        code, _ = await code_of(world.enroll(VIN, first.claim_token))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        await world.enroll(VIN, again.claim_token)
        after = await world.operator.CreateVehicle(request)
        assert (after.vehicle.source, after.claim_token) == (first.vehicle.source, "")

    play(tmp_path, story)


def test_a_feature_without_its_ecu_is_refused_and_both_are_named(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle(with_ecu=False)
        code, words = await code_of(world.grant())
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert words == (
            f"feature seat-heating needs ECU seat-module (openfod-seat-1); vehicle {VIN} has no ECU"
        )
        listed = await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN))
        assert (len(listed.entitlements), listed.version) == (0, 1)

    play(tmp_path, story)


def test_a_feature_is_granted_once_at_a_time(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        granted = await world.grant()
        code, words = await code_of(world.grant("seat-heating-for-ever"))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert granted.entitlement.entitlement_id in words
        await world.revoke(granted.entitlement.entitlement_id)
        again = await world.grant("seat-heating-for-ever")
        assert not again.entitlement.HasField("validity")

    play(tmp_path, story)


def test_an_ecu_is_built_into_one_vehicle_only(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        ecu = pb.Ecu(ecu_identifier=ECU, hardware_id=HARDWARE, ecu_uid=uid(VIN))
        request = pb.CreateVehicleRequest(vin=OTHER_VIN, ecus=[ecu], request_id=str(uuid.uuid4()))
        code, words = await code_of(world.operator.CreateVehicle(request))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert VIN in words

    play(tmp_path, story)


ID = "00000000-0000-4000-8000-000000000001"
SEAT = pb.Ecu(ecu_identifier=ECU, hardware_id=HARDWARE, ecu_uid=bytes(16))
SHORT_UID = pb.Ecu(ecu_identifier=ECU, hardware_id=HARDWARE, ecu_uid=b"1")
ANOTHER_HEAD = pb.Ecu(ecu_identifier="head-unit", hardware_id=HARDWARE, ecu_uid=bytes(16))
BAD: dict[str, tuple[str, Any, str]] = {
    "VIN": ("CreateVehicle", pb.CreateVehicleRequest(vin="IOQ", request_id=ID), "vin: "),
    "request id": ("CreateVehicle", pb.CreateVehicleRequest(vin=VIN, request_id="1"), "request_id: "),
    "uid": (
        "CreateVehicle",
        pb.CreateVehicleRequest(vin=VIN, request_id=ID, ecus=[SHORT_UID]),
        "ecus[0].ecu_uid: ",
    ),
    "head unit": (
        "CreateVehicle",
        pb.CreateVehicleRequest(vin=VIN, request_id=ID, ecus=[ANOTHER_HEAD]),
        "ecus[0].ecu_identifier: ",
    ),
    "ECU twice": (
        "CreateVehicle",
        pb.CreateVehicleRequest(vin=VIN, request_id=ID, ecus=[SEAT, SEAT]),
        "ecus: ",
    ),
    "too many ECUs": (
        "CreateVehicle",
        pb.CreateVehicleRequest(vin=VIN, request_id=ID, ecus=[SEAT] * 65),
        "ecus: ",
    ),
    "account": (
        "GrantEntitlement",
        pb.GrantEntitlementRequest(vin=VIN, plan_id="logbook-per-km", account="Jane Doe", request_id=ID),
        "account: ",
    ),
    "trace id": (
        "GrantEntitlement",
        pb.GrantEntitlementRequest(
            vin=VIN, plan_id="logbook-per-km", account=ACCOUNT, request_id=ID, trace_id="x"
        ),
        "trace_id: ",
    ),
    "reason": (
        "RevokeEntitlement",
        pb.RevokeEntitlementRequest(vin=VIN, entitlement_id="ent-" + "0" * 16, request_id=ID),
        "reason: ",
    ),
    "entitlement": (
        "RevokeEntitlement",
        pb.RevokeEntitlementRequest(vin=VIN, entitlement_id="x", reason="x", request_id=ID),
        "entitlement_id: ",
    ),
    "page token": ("ListUsage", pb.ListUsageRequest(vin=VIN, page_token="x"), "page_token: "),
    "page size": ("ListUsage", pb.ListUsageRequest(vin=VIN, page_size=1_001), "page_size: "),
}


def test_a_malformed_field_is_named(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for what, (method, request, field) in BAD.items():
            code, words = await code_of(getattr(world.operator, method)(request))
            assert (what, code) == (what, grpc.StatusCode.INVALID_ARGUMENT)
            assert words.startswith(field), (what, words)
            assert "expected" in words
        assert not (await world.operator.ListVehicles(pb.ListVehiclesRequest())).vehicles

    play(tmp_path, story)


def test_unknown_vehicles_plans_and_rights_are_not_found(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for call in (
            world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=VIN)),
            world.operator.ListUsage(pb.ListUsageRequest(vin=VIN)),
            world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN)),
            world.operator.WatchFeatures(pb.WatchFeaturesRequest(vin=VIN)).read(),
            world.grant(),
        ):
            assert (await code_of(call))[0] is grpc.StatusCode.NOT_FOUND
        await world.add_vehicle()
        code, words = await code_of(world.grant("no-such-plan"))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "seat-heating-monthly" in words
        assert (await code_of(world.revoke("ent-" + "0" * 16)))[0] is grpc.StatusCode.NOT_FOUND

    play(tmp_path, story)


def test_usage_is_listed_by_pages_and_billed(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant()
        stream = world.connect(device)
        await stream.hello()
        right = granted.entitlement.entitlement_id
        records = chain(
            device.source,
            5,
            value=50_000,
            gap=500,
            gap_reason=usage_pb2.GAP_REASON_EDGE,
            entitlement_id=right,
        )
        await stream.upload(signed_batch(device.key, device.source, records))

        page = await world.operator.ListUsage(pb.ListUsageRequest(vin=VIN, page_size=3))
        rest = await world.operator.ListUsage(pb.ListUsageRequest(vin=VIN, page_token=page.next_page_token))
        assert page.next_page_token == f"{JOURNAL}/3"
        assert [r.SerializeToString() for r in (*page.records, *rest.records)] == records
        assert not rest.next_page_token

        world.now_ms[0] += 31 * DAY_MS  # the second period has started
        request = pb.PreviewInvoiceRequest(vin=VIN)
        invoice = (await world.operator.PreviewInvoice(request)).invoices[0]
        assert [(line.quantity, line.amount_minor, line.declared_gap) for line in invoice.lines] == [
            (2, 998, 0),
            (250_000, 13, 2_500),  # 4 min 10 s at 3 cent a minute is 12.5 cent
        ]
        assert (invoice.account, invoice.currency, invoice.total_minor) == (ACCOUNT, "EUR", 1_011)
        assert (await world.operator.PreviewInvoice(request)).invoices[0] == invoice

    play(tmp_path, story)


def _database(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.glob("cloud.db*"))


def test_writing_calls_are_in_the_audit_log_and_secrets_are_nowhere(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        added = await world.add_vehicle()
        await world.enroll(VIN, added.claim_token)
        granted = await world.grant()
        await world.revoke(granted.entitlement.entitlement_id)
        entries = await world.cloud.store.run(lambda tx: tx.audit_entries(VIN))
        assert [(actor, action) for actor, action, _ in entries] == [
            ("operator:operator", "create-vehicle"),
            ("vehicle", "enrol"),
            ("operator:operator", "grant"),
            ("operator:operator", "revoke"),
        ]
        assert entries[2][2]["trace_id"] == granted.entitlement.trace_id
        await world.cloud.stop(0)
        everything = _database(tmp_path)
        assert hashlib.sha256(added.claim_token.encode()).digest() in everything
        assert added.claim_token.encode() not in everything

    play(tmp_path, story)


def test_a_trace_id_given_by_the_caller_is_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        granted = await world.grant(trace_id="ab" * 16)
        assert granted.entitlement.trace_id == "ab" * 16

    play(tmp_path, story)


def test_unrated_usage_makes_no_line(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 1)))
        assert not (await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))).invoices

    play(tmp_path, story)


def test_the_unit_of_a_line_is_that_of_its_records(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        granted = await world.grant("logbook-per-km")
        stream = world.connect(device)
        await stream.hello()
        records = chain(
            device.source,
            1,
            feature_id="drivers-logbook",
            meter_id="distance",
            unit=usage_pb2.UNIT_METRE,
            value=12_300,
            entitlement_id=granted.entitlement.entitlement_id,
        )
        await stream.upload(signed_batch(device.key, device.source, records))
        invoice = (await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))).invoices[0]
        assert [(line.unit, line.amount_minor) for line in invoice.lines] == [(usage_pb2.UNIT_METRE, 25)]

    play(tmp_path, story)


@pytest.mark.parametrize("plan", ["seat-heating-monthly", "seat-heating-for-ever", "logbook-per-km"])
def test_the_right_carries_the_terms_of_its_plan(tmp_path: Path, plan: str) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant(plan)).entitlement
        assert (right.plan_id, right.plan_version, right.min_release, right.account) == (plan, 1, 1, ACCOUNT)
        limited = plan == "seat-heating-monthly"
        assert right.validity.ignition_cycles == (200 if limited else 0)
        assert bool(right.validity.not_after_s) is limited
        assert right.display_terms.currency == "EUR"

    play(tmp_path, story)
