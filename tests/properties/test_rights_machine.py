"""Any order of time, renewals, payments, price changes, purchases and closings bills each thing once."""

from __future__ import annotations

import tempfile
from pathlib import Path

import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.cloud_world import ACCOUNT, DAY_MS, START_MS, VIN, demo_keys, write_config

from cloud import catalogue, config, invoice, keyring
from cloud.errors import NotPossibleError
from cloud.plans import Period, Plan, PlanKind, Quota, Resale, UsePrice
from cloud.rating import Span
from cloud.rights import RENEW_AHEAD_MS, Rights
from cloud.store import EntitlementRow, Store
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2 as pb

GRACE_S = 10 * 86_400
_FOLDER = Path(tempfile.mkdtemp(prefix="openfod-rights-"))
_SETTINGS = config.read(write_config(_FOLDER))
_KEYS = keyring.load(_SETTINGS)
_CATALOGUE = catalogue.load(demo_keys() / "catalogue", _KEYS.catalogue.root)


def _plan(kind: PlanKind, version: int, price_minor: int, **fields: object) -> Plan:
    values: dict[str, object] = {
        "id": f"log-{kind.value}",
        "version": version,
        "feature": "drivers-logbook",
        "kind": kind,
        "title": "t",
        "currency": "EUR",
        "price_minor": price_minor,
        "resale": Resale.GOES_WITH_ACCOUNT,
        **fields,
    }
    plan = Plan(**values)  # type: ignore[arg-type]
    assert not list(plan.problems())
    return plan


def _subscription(version: int) -> Plan:
    return _plan(
        PlanKind.SUBSCRIPTION,
        version,
        100 + version,
        period="P1M",
        renews=True,
        entry_minor=7,
        offline_grace_s=3600,
        payment_grace_s=GRACE_S,
        use_prices=(UsePrice("distance", 1, 1000),),
        quotas=(Quota("time", 1000 + version, hard=True),),
    )


class RightsMachine(RuleBasedStateMachine):
    """One vehicle and one account, on a database in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(sa.make_url("sqlite://"))
        self.now_ms, self.number = START_MS + 1, 0
        self.failed_ms, self.identifier = 0, ""
        self.versions = [(0, 1)]
        self.closed: list[pb.Invoice] = []
        self.closed_to_ms = START_MS
        self.price_list = 1
        self.rights = self._rights(1)

    def _rights(self, version: int) -> Rights:
        plan = _subscription(version)
        rights = Rights(_KEYS, _CATALOGUE, {plan.id: plan}, self._random)
        self.store.run_here(rights.check)
        return rights

    def _random(self, size: int) -> bytes:
        self.number += 1
        return self.number.to_bytes(size, "big")

    def teardown(self) -> None:
        self.store.close()

    @property
    def row(self) -> EntitlementRow:
        return self.store.run_here(lambda tx: tx.entitlements(VIN))[-1]

    @property
    def right(self) -> entitlement_pb2.Entitlement:
        return entitlement_pb2.Entitlement.FromString(self.row.content)

    @property
    def lives(self) -> bool:
        return not self.row.revoked_ms

    def _started(self, index: int) -> int:
        period = Period.parse("P1M")
        assert period is not None
        return period.start_ms(START_MS + 1, index)

    def _index(self, line: pb.InvoiceLine) -> int:
        return next(n for n in range(600) if self._started(n) == line.period_start_ms)

    # --- rules ------------------------------------------------------------

    @initialize()
    def grant(self) -> None:
        self.store.run_here(lambda tx: self.rights.register(tx, VIN, [], self.now_ms))
        granted = self.store.run_here(
            lambda tx: self.rights.grant(tx, VIN, "log-subscription", ACCOUNT, "", self.now_ms)
        )
        self.identifier = granted.right.entitlement_id

    @rule(days=st.sampled_from([0, 1, 2, 5, 11, 28, 31, 70]), ms=st.sampled_from([0, 1, 43_200_000]))
    def time_passes(self, days: int, ms: int) -> None:
        self.now_ms += days * DAY_MS + ms

    @rule()
    def renew(self) -> None:
        """The job: afterwards nothing is due."""
        for vin in self.store.run_here(lambda tx: tx.due_vehicles(self.now_ms)):
            self.store.run_here(lambda tx, vin=vin: self.rights.refresh(tx, vin, self.now_ms))  # type: ignore[misc]
        assert self.store.run_here(lambda tx: tx.due_vehicles(self.now_ms)) == []
        if self.lives:
            assert self.right.validity.not_after_s * 1000 > self.now_ms
            starts = self.right.quotas[0].period_starts_s
            assert starts[0] * 1000 <= self.now_ms + 999
            assert list(starts) == sorted(set(starts))
            assert starts[-1] < self.right.validity.not_after_s
            assert self.right.plan_version == self._version_at(self.now_ms)

    @rule()
    def payment_fails(self) -> None:
        was_alive = self._alive_now()
        if not was_alive:
            return
        self.store.run_here(
            lambda tx: self.rights.payment(tx, VIN, self.identifier, paid=False, now_ms=self.now_ms)
        )
        self.failed_ms = self.failed_ms or self.now_ms

    @rule()
    def payment_is_made(self) -> None:
        if not self._alive_now():
            return
        self.store.run_here(
            lambda tx: self.rights.payment(tx, VIN, self.identifier, paid=True, now_ms=self.now_ms)
        )
        self.failed_ms = 0
        assert self.right.validity.not_after_s * 1000 > self.now_ms

    def _alive_now(self) -> bool:
        """Whether the right goes on, once what is due has been done."""
        self.renew()
        return self.lives

    @rule()
    def prices_change(self) -> None:
        """The price list alone changes no right."""
        before = self.row
        self.price_list += 1
        self.rights = self._rights(self.price_list)
        assert self.row == before

    @rule()
    def plan_is_changed(self) -> None:
        if not self._alive_now():
            return
        try:
            from_ms, plan = self.store.run_here(
                lambda tx: self.rights.change_plan(tx, VIN, self.identifier, "log-subscription", self.now_ms)
            )
        except NotPossibleError:
            assert self.versions[-1][1] == self.price_list
            return
        assert from_ms > self.now_ms
        assert from_ms in {self._started(index) for index in range(600)}
        self.versions = [(at, v) for at, v in self.versions if at != from_ms] + [(from_ms, plan.version)]

    @rule()
    def close(self) -> None:
        if self.now_ms <= self.closed_to_ms:
            return
        span = Span(self.closed_to_ms, self.now_ms)
        rows = self.store.run_here(lambda tx: invoice.close(tx, _CATALOGUE, ACCOUNT, span, self.now_ms))
        again = self.store.run_here(lambda tx: invoice.close(tx, _CATALOGUE, ACCOUNT, span, self.now_ms))
        assert not rows or again == rows
        made = [pb.Invoice.FromString(row.content) for row in rows]
        for line in (line for found in made for line in found.lines if line.kind == pb.LINE_KIND_PERIOD):
            last = self._index(line) + line.quantity - 1
            begun_ms = self._started(last)
            # What begins while a payment is missing is not owed; the first period begins with the grant.
            assert last == 0 or begun_ms < (self.failed_ms or begun_ms + 1)
        self.closed += made
        if rows:
            self.closed_to_ms = self.now_ms

    # --- what always holds --------------------------------------------------

    def _version_at(self, moment_ms: int) -> int:
        return [version for at, version in self.versions if at <= moment_ms][-1]

    @invariant()
    def closed_invoices_stand_and_can_be_rated_again(self) -> None:
        rows = self.store.run_here(lambda tx: tx.invoices(ACCOUNT))
        assert [pb.Invoice.FromString(row.content) for row in rows] == self.closed
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        for row in rows:
            assert (
                self.store.run_here(lambda tx, r=row: invoice.rated_again(tx, _CATALOGUE, r))  # type: ignore[misc]
                == row.content
            )

    @invariant()
    def each_period_is_billed_once_at_the_price_of_its_start(self) -> None:
        seen: list[int] = []
        entries = 0
        for line in (line for made in self.closed for line in made.lines):
            entries += line.kind == pb.LINE_KIND_ENTRY
            if line.kind != pb.LINE_KIND_PERIOD:
                continue
            index = self._index(line)
            for number in range(index, index + line.quantity):
                assert line.plan_version == self._version_at(self._started(number))
                assert line.amount_minor == line.quantity * (100 + line.plan_version)
                seen.append(number)
        assert sorted(seen) == list(range(len(seen)))
        assert entries == (1 if self.closed else 0)

    @precondition(lambda self: self.closed)
    @invariant()
    def all_periods_that_are_owed_are_billed(self) -> None:
        ends = [self.closed_to_ms, *([self.row.revoked_ms] if self.row.revoked_ms else [])]
        owed = sum(self._started(n) < min(ends) for n in range(600))
        billed = sum(
            line.quantity for made in self.closed for line in made.lines if line.kind == pb.LINE_KIND_PERIOD
        )
        if not self.failed_ms:
            assert billed >= owed or not self.lives
        assert billed <= sum(self._started(n) < self.closed_to_ms for n in range(600))

    @invariant()
    def an_unpaid_right_ends_with_its_grace_and_a_paid_one_never(self) -> None:
        if not self.lives:
            assert self.failed_ms
            assert self.row.revoke_reason == "a payment failed, and its grace is over"
            assert self.row.revoked_ms >= self.failed_ms + GRACE_S * 1000
        elif self.failed_ms:
            longest = max(self.failed_ms + RENEW_AHEAD_MS, self.failed_ms) + GRACE_S * 1000
            assert self.right.validity.not_after_s * 1000 <= longest + 1000
            assert self.right.display_terms.payment_failed


TestRights = RightsMachine.TestCase
TestRights.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
