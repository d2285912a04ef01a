"""Closed invoices: fixed for ever, numbered, and each unit on exactly one of them."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from support.cloud_world import (
    ACCOUNT,
    DEMO,
    NEW_ACCOUNT,
    OTHER_VIN,
    VIN,
    Device,
    Stream,
    World,
    code_of,
    open_world,
    record,
    signed_batch,
    write_config,
)

from cloud import schema
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2

PLANS = """
[[plans]]
id = "log-by-use"
version = 1
feature = "drivers-logbook"
kind = "subscription"
title = "Logbook"
currency = "EUR"
price_minor = 500
period = "P1M"
renews = true
resale = "goes-with-account"
use_prices = [
  { meter = "distance", price_minor = 10, per_units = 1000, included_units = 5000, tiers = [
    { above_units = 20000, price_minor = 3, per_units = 1000 } ] },
  { meter = "time", dimension = "motion", value = "driving", price_minor = 7, per_units = 60000 },
  { meter = "time", price_minor = 1, per_units = 60000 },
]
"""


def _ms(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp()) * 1000


MARCH = (_ms("2026-03-01T00:00:00Z"), _ms("2026-04-01T00:00:00Z"))
APRIL = (MARCH[1], _ms("2026-05-01T00:00:00Z"))
MAY = (APRIL[1], _ms("2026-06-01T00:00:00Z"))
GRANT_MS = _ms("2026-03-01T06:00:00Z")


class Car:
    """A vehicle that uploads what it used."""

    def __init__(self, world: World, device: Device, right: str) -> None:
        self._world, self._device, self.right = world, device, right
        self._seq, self._hash = 0, bytes(32)
        self._stream: Stream | None = None
        self.records: list[usage_pb2.UsageRecord] = []

    async def use(self, value: int, at: str, meter: str = "distance", **fields: Any) -> None:
        """Uploads one record of use that began at a time."""
        self._seq += 1
        at_ms = _ms(at)
        unit = usage_pb2.UNIT_METRE if meter == "distance" else usage_pb2.UNIT_MILLISECOND
        content = record(
            self._device.source,
            self._seq,
            self._hash,
            feature_id="drivers-logbook",
            meter_id=meter,
            unit=unit,
            value=value,
            entitlement_id=self.right,
            window_start_ms=at_ms,
            window_end_ms=at_ms + 1000,
            **fields,
        )
        self._hash = hashlib.sha256(content).digest()
        self.records.append(usage_pb2.UsageRecord.FromString(content))
        if self._stream is None:  # one for all: a new one begins with the newest receipt of before
            self._stream = self._world.connect(self._device)
            await self._stream.hello()
        answer = await self._stream.upload(signed_batch(self._device.key, self._device.source, [content]))
        assert answer.WhichOneof("payload") == "receipt", answer


async def _car(world: World, vin: str = VIN) -> Car:
    device = await world.device(vin)
    granted = await world.grant("log-by-use", vin=vin)
    return Car(world, device, granted.entitlement.entitlement_id)


async def _close(
    world: World, period: tuple[int, int], account: str = ACCOUNT, request_id: str = ""
) -> list[pb.ClosedInvoice]:
    request = pb.CloseInvoiceRequest(
        account=account,
        period_start_ms=period[0],
        period_end_ms=period[1],
        request_id=request_id or str(uuid.uuid4()),
    )
    return list((await world.operator.CloseInvoice(request)).invoices)


async def _all(world: World, **fields: Any) -> list[pb.ClosedInvoice]:
    return list((await world.operator.ListInvoices(pb.ListInvoicesRequest(**fields))).invoices)


def _read(closed: pb.ClosedInvoice) -> pb.Invoice:
    assert hashlib.sha256(closed.content).digest() == closed.sha256
    return pb.Invoice.FromString(closed.content)


def _lines(closed: pb.ClosedInvoice) -> list[tuple[str, int, int]]:
    return [
        (line.description.partition(": ")[2], line.quantity, line.amount_minor)
        for line in _read(closed).lines
    ]


def _play(folder: Path, story: Any, now_ms: int = GRANT_MS) -> None:
    (folder / "plans.toml").write_text(PLANS)
    path = write_config(folder, **{str(DEMO / "plans.toml"): "plans.toml"})

    async def run() -> None:
        async with open_world(path, now_ms) as world:
            await asyncio.wait_for(story(world), 30)

    asyncio.run(run())


def test_a_closed_invoice_is_numbered_and_never_changes(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1] + 5
        await car.use(12_345, "2026-03-10T08:00:00Z", gap=40, gap_reason=1)
        motion = [usage_pb2.Dimension(name="motion", value="driving")]
        await car.use(90_000, "2026-03-10T08:00:00Z", "time", dimensions=motion)
        await car.use(30_000, "2026-03-10T09:00:00Z", "time")
        (closed,) = await _close(world, MARCH)
        assert _read(closed).number == 1
        assert _lines(closed) == [
            ("1 started period of P1M", 1, 500),
            ("distance, included", 5000, 0),
            ("distance, above 5000 units", 7345, 73),
            ("time (motion driving)", 90_000, 11),
            ("time", 30_000, 1),
        ]
        assert _read(closed).total_minor == 585
        assert [line.declared_gap for line in _read(closed).lines] == [0, 0, 40, 0, 0]
        preview = await world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(account=ACCOUNT))
        assert not preview.invoices  # the right's second period begins at six o'clock
        # The right ends, more use comes, another hour passes: the same bytes.
        await car.use(1, "2026-03-30T08:00:00Z")
        await world.revoke(car.right)
        world.now_ms[0] += 3_600_000
        assert await _close(world, MARCH) == [closed]
        assert await _all(world) == [closed]
        (again,) = await _all(world, rate_again=True)
        assert again.rated_again

    _play(tmp_path, story)


def test_use_that_arrives_late_is_a_line_of_the_next_invoice_and_names_its_period(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1] + 5
        await car.use(18_000, "2026-03-10T08:00:00Z")
        (march,) = await _close(world, MARCH)
        world.now_ms[0] = APRIL[1] + 5
        await car.use(4_000, "2026-03-20T08:00:00Z")
        await car.use(6_000, "2026-04-20T08:00:00Z")
        (april,) = await _close(world, APRIL)
        assert _read(april).number == 2
        assert _lines(april) == [
            ("1 started period of P1M", 1, 500),
            # 18,000 of March's units were billed: 2,000 more of the first tier, the rest in the second.
            ("distance, above 5000 units, late, of 2026-03-01 to 2026-04-01", 2000, 20),
            ("distance, above 20000 units, late, of 2026-03-01 to 2026-04-01", 2000, 6),
            ("distance, included", 5000, 0),
            ("distance, above 5000 units", 1000, 10),
        ]
        late = _read(april).lines[1]
        assert (late.late_start_ms, late.late_end_ms) == MARCH
        world.now_ms[0] = MAY[1] + 5
        await car.use(1_000, "2026-03-21T08:00:00Z")
        (may,) = await _close(world, MAY)
        assert _lines(may)[1] == (
            "distance, above 20000 units, late, of 2026-03-01 to 2026-04-01",
            1000,
            3,
        )
        assert await _all(world) == [march, april, may]
        assert all(found.rated_again for found in await _all(world, rate_again=True))
        billed = sum(
            line.quantity for found in (march, april, may) for line in _read(found).lines if line.meter_id
        )
        assert billed == sum(found.value for found in car.records)

    _play(tmp_path, story)


def test_use_before_a_hole_between_two_periods_is_not_lost(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1]
        await _close(world, MARCH)
        world.now_ms[0] = MAY[1]
        await car.use(6_000, "2026-04-20T08:00:00Z")
        (may,) = await _close(world, MAY)
        assert ("distance, above 5000 units, late, of before 2026-05-01", 1000, 10) in _lines(may)
        assert ("2 started periods of P1M", 2, 1000) in _lines(may)

    _play(tmp_path, story)


def test_use_dated_into_the_future_is_billed_when_it_was_stored(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1] - 1000
        await car.use(6_000, "2099-04-20T08:00:00Z", clock_trust=usage_pb2.CLOCK_TRUST_WEAK)
        world.now_ms[0] = MARCH[1]
        (march,) = await _close(world, MARCH)
        assert ("distance, above 5000 units", 1000, 10) in _lines(march)

    _play(tmp_path, story)


def test_a_correction_is_a_line_of_the_next_invoice_and_edits_none(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1]
        (march,) = await _close(world, MARCH)
        request = pb.CreateCorrectionRequest(
            invoice_number=1,
            amount_minor=-650,
            reason="car was in the workshop",
            request_id=str(uuid.uuid4()),
        )
        first = await world.operator.CreateCorrection(request)
        assert await world.operator.CreateCorrection(request) == first  # not credited twice
        assert (first.account, first.currency) == (ACCOUNT, "EUR")
        await world.revoke(car.right)
        world.now_ms[0] = APRIL[1]
        (april,) = await _close(world, APRIL)
        (line,) = _read(april).lines
        assert line.description == "credit for invoice 1: car was in the workshop"
        assert (line.kind, line.amount_minor, line.corrected_invoice) == (pb.LINE_KIND_CORRECTION, -650, 1)
        assert _read(april).total_minor == -650
        assert await _all(world) == [march, april]
        assert all(found.rated_again for found in await _all(world, rate_again=True))
        world.now_ms[0] = MAY[1]
        assert await _close(world, MAY) == []
        entries = [e.action for e in await world.audit() if e.action in {"close-invoice", "correct-invoice"}]
        assert entries == ["close-invoice", "correct-invoice", "close-invoice", "close-invoice"]

    _play(tmp_path, story)


@pytest.mark.parametrize(
    ("number", "minor", "reason"), [(9, -1, "r"), (1, 0, "r"), (1, 1, ""), (1, 10**13, "r")]
)
def test_a_correction_of_nothing_is_refused(tmp_path: Path, number: int, minor: int, reason: str) -> None:
    async def story(world: World) -> None:
        await _car(world)
        world.now_ms[0] = MARCH[1]
        await _close(world, MARCH)
        before = await world.state()
        request = pb.CreateCorrectionRequest(
            invoice_number=number, amount_minor=minor, reason=reason, request_id=str(uuid.uuid4())
        )
        code, _ = await code_of(world.operator.CreateCorrection(request))
        assert code in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}
        assert await world.state() == before

    _play(tmp_path, story)


def test_periods_that_are_not_over_overlap_or_run_backwards_are_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _car(world)
        world.now_ms[0] = MARCH[1] - 1
        code, words = await code_of(_close(world, MARCH))
        assert (code, "has not ended" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        world.now_ms[0] = APRIL[1]
        await _close(world, APRIL)
        before = await world.state()
        for period in (MARCH, (APRIL[0], APRIL[1] - 1), (APRIL[1] - 1, APRIL[1])):
            code, words = await code_of(_close(world, period))
            assert (code, "is closed up to" in words) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        assert (await code_of(_close(world, MARCH[::-1])))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert (await code_of(_close(world, APRIL, "acc-none")))[0] is grpc.StatusCode.NOT_FOUND
        assert (await code_of(_close(world, APRIL, "4711")))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert await world.state() == before

    _play(tmp_path, story)


def test_an_invoice_covers_all_vehicles_of_an_account_and_none_of_another(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car, other = await _car(world), await _car(world, OTHER_VIN)
        world.now_ms[0] = _ms("2026-03-15T00:00:00Z")
        await world.sell(OTHER_VIN)
        granted = await world.grant("log-by-use", vin=OTHER_VIN, account=NEW_ACCOUNT)
        world.now_ms[0] = MARCH[1]
        await car.use(6_000, "2026-03-10T08:00:00Z")
        await other.use(7_000, "2026-03-10T08:00:00Z")  # the seller's, though it comes after the sale
        (mine,) = await _close(world, MARCH)
        assert [line.quantity for line in _read(mine).lines] == [1, 5000, 1000, 1, 5000, 2000]
        (theirs,) = await _close(world, MARCH, NEW_ACCOUNT)
        (line,) = _read(theirs).lines
        assert line.entitlement_id == granted.entitlement.entitlement_id
        assert [_read(c).number for c in await _all(world)] == [1, 2]
        assert await _all(world, account=NEW_ACCOUNT) == [theirs]

    _play(tmp_path, story)


def test_closing_is_done_once_and_pages_go_on(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await _car(world)
        world.now_ms[0] = MAY[1]
        request_id = str(uuid.uuid4())
        first = await _close(world, MARCH, request_id=request_id)
        assert await _close(world, MARCH, request_id=request_id) == first
        code, _ = await code_of(_close(world, APRIL, request_id=request_id))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        second = await _close(world, APRIL)
        page = await world.operator.ListInvoices(pb.ListInvoicesRequest(page_size=1))
        assert (list(page.invoices), page.next_page_token) == (first, "1")
        page = await world.operator.ListInvoices(pb.ListInvoicesRequest(page_size=1, page_token="1"))
        assert (list(page.invoices), page.next_page_token) == (second, "")

    _play(tmp_path, story)


def test_a_stored_invoice_or_record_that_was_edited_is_found_by_rating_it_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1]
        await car.use(6_000, "2026-03-10T08:00:00Z")
        await _close(world, MARCH)
        forged = usage_pb2.UsageRecord()
        forged.CopyFrom(car.records[0])
        forged.value = 5_000
        content = forged.SerializeToString(deterministic=True)
        await world.cloud.store.run(
            lambda tx: tx._connection.execute(sa.update(schema.usage_records).values(content=content))
        )
        (found,) = await _all(world, rate_again=True)
        assert not found.rated_again

    _play(tmp_path, story)


def test_no_record_can_be_marked_as_billed_twice(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        car = await _car(world)
        world.now_ms[0] = MARCH[1]
        await car.use(6_000, "2026-03-10T08:00:00Z")
        await _close(world, MARCH)
        row = await world.cloud.store.run(lambda tx: tx.invoice(1))
        assert row is not None
        second = replace(row, number=2)
        (used,) = await world.cloud.store.run(lambda tx: tx.billed_usage(1))
        before = await world.state()
        with pytest.raises(sa.exc.IntegrityError):
            await world.cloud.store.run(lambda tx: tx.add_invoice(second, [used], [], []))
        assert await world.state() == before

    _play(tmp_path, story)


def test_a_preview_is_of_a_vehicle_or_of_an_account(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        for fields in ({}, {"vin": VIN, "account": ACCOUNT}, {"account": "x"}):
            code, _ = await code_of(world.operator.PreviewInvoice(pb.PreviewInvoiceRequest(**fields)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT

    _play(tmp_path, story)
