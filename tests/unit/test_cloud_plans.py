"""How rights of each kind of plan begin, go on, change and end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.cloud_world import (
    ACCOUNT,
    DAY_MS,
    DEMO,
    NEW_ACCOUNT,
    OTHER_VIN,
    START_MS,
    VIN,
    World,
    chain,
    code_of,
    open_world,
    signed_batch,
    verify_with_tuf,
    write_config,
)

from cloud import plans
from common import config
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2

Story = Callable[[World], Awaitable[None]]

SUBSCRIPTION = """
[[plans]]
id = "log-monthly"
version = 1
feature = "drivers-logbook"
kind = "subscription"
title = "Logbook, monthly"
currency = "EUR"
price_minor = 500
entry_minor = 900
period = "P1M"
renews = true
offline_grace_s = 86400
payment_grace_s = 864000
resale = "stays-with-vehicle"
use_prices = [{ meter = "distance", price_minor = 2, per_units = 1000, included_units = 100000 }]
quotas = [{ meter = "time", limit = 3600000, hard = true, warn_percent = [50, 80, 100] }]
"""
PREPAID = """
[[plans]]
id = "log-prepaid"
version = 1
feature = "drivers-logbook"
kind = "prepaid"
title = "Logbook, 100 km ahead"
currency = "EUR"
price_minor = 150
resale = "goes-with-account"
quotas = [{ meter = "distance", limit = 100000, hard = true, warn_percent = [80] }]
"""
TRIAL = """
[[plans]]
id = "log-trial"
version = 1
feature = "drivers-logbook"
kind = "trial"
title = "Logbook, a month to try"
currency = "EUR"
price_minor = 0
period = "P1M"
resale = "stays-with-vehicle"
"""


def _ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1000


def _config(folder: Path, price_list: str) -> Path:
    (folder / "plans.toml").write_text(price_list)
    return write_config(folder, **{str(DEMO / "plans.toml"): "plans.toml"})


def _run(path: Path, story: Story, now_ms: int = START_MS) -> None:
    async def run() -> None:
        async with open_world(path, now_ms) as world:
            await asyncio.wait_for(story(world), 30)

    asyncio.run(run())


def _play(folder: Path, price_list: str, story: Story) -> None:
    _run(_config(folder, price_list), story)


async def _payment(world: World, right: str, state: str, **fields: str) -> pb.ReportPaymentResponse:
    request = pb.ReportPaymentRequest(
        vin=VIN,
        entitlement_id=right,
        state=pb.PAYMENT_STATE_PAID if state == "paid" else pb.PAYMENT_STATE_FAILED,
        **{"request_id": str(uuid.uuid4()), **fields},
    )
    answer: pb.ReportPaymentResponse = await world.operator.ReportPayment(request)
    return answer


async def _top_up(world: World, right: str, packs: int = 1, request_id: str = "") -> pb.EntitlementRecord:
    request = pb.TopUpEntitlementRequest(
        vin=VIN, entitlement_id=right, packs=packs, request_id=request_id or str(uuid.uuid4())
    )
    answer: pb.TopUpEntitlementResponse = await world.operator.TopUpEntitlement(request)
    return answer.entitlement


async def _change_plan(world: World, right: str, plan: str) -> pb.ChangePlanResponse:
    request = pb.ChangePlanRequest(vin=VIN, entitlement_id=right, plan_id=plan, request_id=str(uuid.uuid4()))
    answer: pb.ChangePlanResponse = await world.operator.ChangePlan(request)
    return answer


async def _renew(world: World) -> int:
    answer = await world.operator.RunRenewals(pb.RunRenewalsRequest())
    return int(answer.vehicles)


async def _listed(world: World, vin: str = VIN) -> list[pb.EntitlementRecord]:
    return list((await world.operator.ListEntitlements(pb.ListEntitlementsRequest(vin=vin))).entitlements)


async def _fees(world: World) -> list[tuple[str, int, int]]:
    answer = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(account=ACCOUNT))
    return [
        (line.description.partition(": ")[2], line.quantity, line.amount_minor)
        for invoice in answer.invoices
        for line in invoice.lines
        if not line.meter_id
    ]


async def _use(world: World, device: Any, right: str, value: int, first: int = 1, **fields: Any) -> None:
    stream = world.connect(device)
    await stream.hello()
    records = chain(
        device.source,
        1,
        first=first,
        entitlement_id=right,
        feature_id="drivers-logbook",
        **{"meter_id": "distance", "unit": usage_pb2.UNIT_METRE, "value": value, **fields},
    )
    answer = await stream.upload(signed_batch(device.key, device.source, records))
    assert answer.WhichOneof("payload") == "receipt", answer


# --- subscriptions ------------------------------------------------------------


def test_a_subscription_renews_by_itself_without_the_vehicle(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-monthly")).entitlement
        end_ms = right.validity.not_after_s * 1000
        assert end_ms == _ms("2026-04-30T12:00:00Z")  # the 31st of a month of 30 days
        assert await _renew(world) == 0
        world.now_ms[0] = end_ms - 3 * DAY_MS - 1
        assert await _renew(world) == 0
        world.now_ms[0] += 1
        assert await _renew(world) == 1
        assert await _renew(world) == 0
        (record,) = await _listed(world)
        assert record.entitlement.validity.not_after_s * 1000 == _ms("2026-05-31T12:00:00Z")
        starts = [s * 1000 for s in record.entitlement.quotas[0].period_starts_s]
        assert starts == [START_MS, end_ms]
        assert list(record.entitlement.quotas[0].warn_percent) == [50, 80, 100]

    _play(tmp_path, SUBSCRIPTION, story)


def test_renewals_catch_up_after_a_downtime_and_a_restart(tmp_path: Path) -> None:
    path = _config(tmp_path, SUBSCRIPTION + TRIAL)

    async def before(world: World) -> None:
        await world.add_vehicle()
        await world.add_vehicle(OTHER_VIN)
        await world.grant("log-monthly")
        await world.grant("log-trial", vin=OTHER_VIN, account=NEW_ACCOUNT)

    async def after(world: World) -> None:
        await world.cloud.renewals.run_due()  # as at the start of the server, which may have done it already
        (record,) = await _listed(world)
        assert record.entitlement.validity.not_after_s * 1000 == _ms("2026-07-31T12:00:00Z")
        (other,) = await _listed(world, OTHER_VIN)
        assert other.revoke_reason == "its period is over"
        assert await _fees(world) == [("entry", 1, 900), ("4 started periods of P1M", 4, 2000)]
        assert await _renew(world) == 0

    _run(path, before)
    _run(path, after, _ms("2026-07-10T12:00:00Z"))


def test_a_failed_payment_leads_through_its_grace_to_the_end(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        right = (await world.grant("log-monthly")).entitlement
        world.now_ms[0] = right.validity.not_after_s * 1000 - 2 * DAY_MS
        await _renew(world)
        answer = await _payment(world, right.entitlement_id, "failed")
        record = answer.entitlement
        # The period that is not paid has not begun: its grace begins with it.
        ends_ms = right.validity.not_after_s * 1000 + 10 * DAY_MS
        assert record.entitlement.validity.not_after_s * 1000 == ends_ms
        assert record.entitlement.offline_grace_s == 0
        assert list(record.entitlement.quotas[0].period_starts_s) == [START_MS // 1000]
        again = await _payment(world, right.entitlement_id, "failed")
        assert (again.version, again.entitlement) == (answer.version, record)
        seen = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0])
        assert seen.rights.entitlements[0].display_terms.payment_failed
        world.now_ms[0] = ends_ms - 1
        assert await _renew(world) == 0
        world.now_ms[0] = ends_ms
        assert await _renew(world) == 1
        (ended,) = await _listed(world)
        assert ended.revoke_reason == "a payment failed, and its grace is over"
        assert await _fees(world) == [("entry", 1, 900), ("1 started period of P1M", 1, 500)]
        code, words = await code_of(_payment(world, right.entitlement_id, "paid"))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "has ended before" in words

    _play(tmp_path, SUBSCRIPTION, story)


def test_a_payment_in_time_undoes_a_failed_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-monthly")).entitlement
        end_ms = right.validity.not_after_s * 1000
        world.now_ms[0] = end_ms - DAY_MS
        await _renew(world)
        await _payment(world, right.entitlement_id, "failed")
        world.now_ms[0] = end_ms + 5 * DAY_MS
        assert await _fees(world) == [("entry", 1, 900), ("1 started period of P1M", 1, 500)]
        paid = (await _payment(world, right.entitlement_id, "paid")).entitlement
        assert paid.entitlement.validity.not_after_s * 1000 == _ms("2026-05-31T12:00:00Z")
        assert paid.entitlement.offline_grace_s == 86400
        assert not paid.entitlement.display_terms.payment_failed
        assert list(paid.entitlement.quotas[0].period_starts_s) == [end_ms // 1000]
        assert await _fees(world) == [("entry", 1, 900), ("2 started periods of P1M", 2, 1000)]
        world.now_ms[0] = _ms("2026-05-29T12:00:00Z")
        assert await _renew(world) == 1  # it renews again

    _play(tmp_path, SUBSCRIPTION, story)


def test_without_a_grace_a_failed_payment_ends_the_right_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-monthly")).entitlement.entitlement_id
        answer = await _payment(world, right, "failed")
        assert answer.entitlement.revoke_reason == "a payment failed, and its grace is over"

    _play(tmp_path, SUBSCRIPTION.replace("payment_grace_s = 864000", ""), story)


def test_who_comes_back_keeps_the_history_and_pays_no_second_entry(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        for expected in ([900], [900], [900]):
            right = (await world.grant("log-monthly")).entitlement
            await world.revoke(right.entitlement_id)
            entries = [amount for what, _, amount in await _fees(world) if what == "entry"]
            assert entries == expected
            world.now_ms[0] += DAY_MS
        assert len(await _listed(world)) == 3
        other = (await world.grant("log-monthly", account=NEW_ACCOUNT)).entitlement
        assert other.display_terms.entry_minor == 900

    _play(tmp_path, SUBSCRIPTION, story)


def test_what_does_not_renew_has_no_payments(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-trial")).entitlement.entitlement_id
        before = await world.state()
        code, words = await code_of(_payment(world, right, "failed"))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "does not renew" in words
        assert await world.state() == before

    _play(tmp_path, TRIAL, story)


# --- trials -------------------------------------------------------------------


def test_a_trial_is_had_once_for_ever_whatever_became_of_right_and_car(tmp_path: Path) -> None:
    async def refused(world: World, vin: str) -> bool:
        code, words = await code_of(world.grant("log-trial", vin=vin))
        return code is grpc.StatusCode.FAILED_PRECONDITION and "has had its trial" in words

    async def story(world: World) -> None:
        await world.device()
        await world.add_vehicle(OTHER_VIN)
        right = (await world.grant("log-trial")).entitlement.entitlement_id
        assert await refused(world, OTHER_VIN)
        await world.revoke(right)
        assert await refused(world, VIN)
        await world.sell()
        assert await refused(world, OTHER_VIN)
        assert await refused(world, VIN)
        await world.grant("log-trial", account=NEW_ACCOUNT)

    _play(tmp_path, TRIAL, story)


# --- prepaid ------------------------------------------------------------------


def test_prepaid_units_are_bought_counted_and_shown(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        right = (await world.grant("log-prepaid")).entitlement
        assert (right.quotas[0].limit, right.quotas[0].hard) == (100_000, True)
        assert not right.quotas[0].period_starts_s
        await _use(world, device, right.entitlement_id, 90_000)
        request_id = str(uuid.uuid4())
        record = await _top_up(world, right.entitlement_id, 2, request_id)
        assert await _top_up(world, right.entitlement_id, 2, request_id) == record  # not bought twice
        assert record.entitlement.quotas[0].limit == 300_000
        (use,) = (await _listed(world))[0].quota_uses
        assert (use.used, use.limit, use.hard) == (90_000, 300_000, True)
        seen = verify_with_tuf(await world.connect(device).hello(), world.now_ms[0])
        assert seen.rights.entitlements[0].quotas[0].limit == 300_000
        answer = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))
        (invoice,) = answer.invoices
        assert [(line.kind, line.quantity, line.amount_minor) for line in invoice.lines] == [
            (pb.LINE_KIND_PERIOD, 1, 150),
            (pb.LINE_KIND_PURCHASE, 1, 150),
            (pb.LINE_KIND_PURCHASE, 1, 150),
            (pb.LINE_KIND_USE, 90_000, 0),
        ]
        assert invoice.lines[-1].description.endswith("distance, prepaid")
        assert invoice.total_minor == 450

    _play(tmp_path, PREPAID, story)


@pytest.mark.parametrize("packs", [0, 1001])
def test_an_absurd_purchase_is_refused(tmp_path: Path, packs: int) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-prepaid")).entitlement.entitlement_id
        before = await world.state()
        assert (await code_of(_top_up(world, right, packs)))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert await world.state() == before

    _play(tmp_path, PREPAID, story)


def test_only_a_live_prepaid_right_can_be_topped_up(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-monthly")).entitlement.entitlement_id
        code, words = await code_of(_top_up(world, right))
        assert (code, "is not prepaid" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        await world.revoke(right)
        right = (await world.grant("log-prepaid")).entitlement.entitlement_id
        await world.revoke(right)
        code, words = await code_of(_top_up(world, right))
        assert (code, "has ended before" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)

    _play(tmp_path, SUBSCRIPTION + PREPAID, story)


def test_a_purchase_costs_what_the_plan_cost_when_it_was_made(tmp_path: Path) -> None:
    path = _config(tmp_path, PREPAID)
    rights: list[str] = []

    async def first(world: World) -> None:
        await world.add_vehicle()
        rights.append((await world.grant("log-prepaid")).entitlement.entitlement_id)
        await _top_up(world, rights[0])

    async def second(world: World) -> None:
        await _top_up(world, rights[0])  # a new price list changes no right
        world.now_ms[0] += 1000
        await _change_plan(world, rights[0], "log-prepaid")
        world.now_ms[0] += 1000
        record = await _top_up(world, rights[0])
        assert record.entitlement.quotas[0].limit == 300_000 + 50_000
        assert [amount for _, _, amount in await _fees(world)] == [150, 150, 150, 90]
        listed = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(vin=VIN))
        assert [line.plan_version for line in listed.invoices[0].lines] == [1, 1, 1, 2]

    _run(path, first)
    newer = PREPAID.replace("version = 1", "version = 2").replace("150", "90").replace("100000", "50000")
    (tmp_path / "plans.toml").write_text(newer)
    _run(path, second, START_MS + DAY_MS)


# --- other terms ----------------------------------------------------------------


def test_a_new_price_counts_from_the_next_period_and_both_stand_on_the_invoice(tmp_path: Path) -> None:
    path = _config(tmp_path, SUBSCRIPTION)
    rights: list[str] = []

    async def first(world: World) -> None:
        await world.add_vehicle()
        rights.append((await world.grant("log-monthly")).entitlement.entitlement_id)

    async def second(world: World) -> None:
        next_ms = _ms("2026-04-30T12:00:00Z")
        answer = await _change_plan(world, rights[0], "log-monthly")
        assert (answer.from_ms, answer.plan_version) == (next_ms, 2)
        assert answer.entitlement.entitlement.plan_version == 1
        code, words = await code_of(_change_plan(world, rights[0], "log-monthly"))
        assert (code, "already" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        world.now_ms[0] = next_ms - DAY_MS
        assert await _renew(world) == 1
        assert (await _listed(world))[0].entitlement.display_terms.price_minor == 500
        world.now_ms[0] = next_ms
        assert await _renew(world) == 1
        (record,) = await _listed(world)
        assert record.entitlement.plan_version == 2
        assert record.entitlement.display_terms.price_minor == 600
        assert record.entitlement.quotas[0].limit == 7_200_000
        assert record.entitlement.quotas[0].period_starts_s[0] == next_ms // 1000
        world.now_ms[0] = next_ms + 1
        assert await _fees(world) == [
            ("entry", 1, 900),
            ("1 started period of P1M", 1, 500),
            ("1 started period of P1M", 1, 600),
        ]

    _run(path, first)
    newer = SUBSCRIPTION.replace("version = 1", "version = 2").replace(
        "price_minor = 500", "price_minor = 600"
    )
    (tmp_path / "plans.toml").write_text(newer.replace("limit = 3600000", "limit = 7200000"))
    _run(path, second, START_MS + DAY_MS)


def test_other_terms_must_be_of_the_same_sort(tmp_path: Path) -> None:
    weekly = SUBSCRIPTION.replace("log-monthly", "log-weekly").replace("P1M", "P7D")

    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-monthly")).entitlement.entitlement_id
        before = await world.state()
        for plan, what in (("log-weekly", "period"), ("log-trial", "kind")):
            code, words = await code_of(_change_plan(world, right, plan))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"has another {what}" in words
        assert (await code_of(_change_plan(world, right, "no-plan")))[0] is grpc.StatusCode.NOT_FOUND
        assert await world.state() == before

    _play(tmp_path, SUBSCRIPTION + weekly + TRIAL, story)


def test_changed_terms_go_on_after_a_sale(tmp_path: Path) -> None:
    path = _config(tmp_path, SUBSCRIPTION)

    async def first(world: World) -> None:
        await world.device()
        await world.grant("log-monthly")

    async def second(world: World) -> None:
        (record,) = await _listed(world)
        await _change_plan(world, record.entitlement.entitlement_id, "log-monthly")
        await world.sell()
        world.now_ms[0] = _ms("2026-04-30T12:00:01Z")
        await _renew(world)
        (record,) = await _listed(world)
        assert (record.entitlement.account, record.entitlement.plan_version) == (NEW_ACCOUNT, 2)
        answer = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(account=NEW_ACCOUNT))
        (line,) = answer.invoices[0].lines  # no entry, and not the seller's period
        assert (line.quantity, line.amount_minor, line.plan_version) == (1, 600, 2)

    _run(path, first)
    newer = SUBSCRIPTION.replace("version = 1", "version = 2").replace(
        "price_minor = 500", "price_minor = 600"
    )
    (tmp_path / "plans.toml").write_text(newer)
    _run(path, second, START_MS + DAY_MS)


# --- who may, and what is kept ----------------------------------------------------


def test_a_workshop_may_do_none_of_this_and_what_is_done_is_audited(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.add_vehicle()
        right = (await world.grant("log-monthly")).entitlement.entitlement_id
        before = await world.state()
        shop = world.as_operator("garage", "workshop")
        text = str(uuid.uuid4())
        for call in (
            shop.ReportPayment(
                pb.ReportPaymentRequest(
                    vin=VIN, entitlement_id=right, state=pb.PAYMENT_STATE_FAILED, request_id=text
                )
            ),
            shop.TopUpEntitlement(pb.TopUpEntitlementRequest(vin=VIN, entitlement_id=right, packs=1)),
            shop.ChangePlan(pb.ChangePlanRequest(vin=VIN, entitlement_id=right, plan_id="log-monthly")),
            shop.RunRenewals(pb.RunRenewalsRequest()),
            shop.CloseInvoice(pb.CloseInvoiceRequest(account=ACCOUNT, period_end_ms=1)),
            shop.CreateCorrection(pb.CreateCorrectionRequest(invoice_number=1, amount_minor=1, reason="r")),
            shop.ListInvoices(pb.ListInvoicesRequest()),
        ):
            assert (await code_of(call))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert await world.state() == before
        await _payment(world, right, "failed", request_id=text)
        await _payment(world, right, "failed", request_id=text)
        actions = [entry.action for entry in await world.audit(vin=VIN) if entry.action != "refused"]
        assert actions[-2:] == ["grant", "payment-failed"]
        code, _ = await code_of(_payment(world, right, "paid", request_id=text))
        assert code is grpc.StatusCode.ALREADY_EXISTS

    _play(tmp_path, SUBSCRIPTION, story)


def test_plans_of_before_keep_the_hash_of_their_terms(tmp_path: Path) -> None:
    """A price list that says nothing of the later keys means what it meant."""
    (tmp_path / "plans.toml").write_text(
        SUBSCRIPTION.replace("entry_minor = 900", "")
        .replace("payment_grace_s = 864000", "")
        .replace(", included_units = 100000", "")
        .partition("quotas = ")[0]
    )
    (plan,) = config.read(tmp_path / "plans.toml", plans._PlanFile).plans
    assert plan.terms_sha256.hex() == "06c1ef877a89f648bc531a6716fd0ffe58dc1030e1a2fa63655f67ef0e0070ec"
    assert datetime.fromtimestamp(START_MS / 1000, UTC).day == 31
