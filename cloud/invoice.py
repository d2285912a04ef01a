"""Makes previews of invoices, and closes them: from then on their lines are fixed for ever.

A closed invoice is stored bytes with a number and a SHA-256. Each record and
each fixed price is marked with the invoice that bills it, under a key of the
database, so that none is ever billed twice. What arrives later is a line of
the next invoice and names the period that it belongs to; a mistake is
corrected by a line of the next one. The same stored state gives the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cloud.catalogue import Catalogue
from cloud.errors import NotFoundError, NotPossibleError
from cloud.rating import (
    Calendar,
    Fee,
    Line,
    Purchase,
    Right,
    Scope,
    Span,
    Terms,
    Used,
    counted,
    due,
    rate,
    total,
)
from cloud.store import CorrectionRow, EntitlementRow, InvoiceRow, OpenUsageRow, Transaction
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2


@dataclass(frozen=True)
class Account:
    """What an account has to pay for, as far as no closed invoice has it.

    Args:
        records: not billed, with the time at which each counts as used.
        billed: fixed prices that closed invoices have.
        before: units that closed invoices have billed.
        calendar: which of its invoices use belongs to.
    """

    account: str
    rights: Sequence[Right]
    records: Sequence[tuple[OpenUsageRow, Used]]
    billed: frozenset[Fee] = frozenset()
    before: Mapping[Scope, int] = field(default_factory=dict)
    calendar: Calendar = Calendar()
    corrections: Sequence[CorrectionRow] = ()


def of_vehicle(tx: Transaction, catalogue: Catalogue, vin: str, source: str) -> list[Account]:
    """What is open of one vehicle, for each account that ever had a right to it; without corrections."""
    rows = tx.entitlements(vin)
    accounts = sorted({row.account for row in rows})
    return [
        _account(tx, catalogue, account, [row for row in rows if row.account == account], [source], None, ())
        for account in accounts
    ]


def of_account(tx: Transaction, catalogue: Catalogue, account: str, start_ms: int | None = None) -> Account:
    """What is open of one account over all its vehicles.

    Args:
        start_ms: start of the period that is to be rated; None: the end of the one closed last.

    Raises:
        NotFoundError: the account never had a right.
    """
    rows = tx.account_entitlements(account)
    if not rows:
        raise NotFoundError(f"account {account} never had a right")
    vehicles = [tx.lock_vehicle(vin) for vin in sorted({row.vin for row in rows})]
    sources = [vehicle.source for vehicle in vehicles if vehicle is not None]
    return _account(tx, catalogue, account, rows, sources, start_ms, tx.corrections(account))


def preview(accounts: Iterable[Account], now_ms: int) -> pb.PreviewInvoiceResponse:
    """Rates what is open into one invoice per account and currency. A preview closes nothing.

    Raises:
        NotPossibleError: an amount or a total is beyond what the contract can carry.
    """
    made = []
    for open_ in accounts:
        for currency in _currencies(open_):
            content, _ = _rated(open_, currency, now_ms + 1, rated_ms=now_ms)
            if content.lines:
                made.append(content)
    return pb.PreviewInvoiceResponse(invoices=made)


def close(tx: Transaction, catalogue: Catalogue, account: str, period: Span, now_ms: int) -> list[InvoiceRow]:
    """Closes the invoices of an account for a period, one for each currency; once more, gives those.

    They hold the fixed prices that are due before the period's end and all use
    that began before it, as far as no earlier invoice has them.

    Raises:
        NotFoundError: the account never had a right.
        NotPossibleError: the period has not ended, or begins before the end of one that was closed.
    """
    if period.end_ms > now_ms:
        raise NotPossibleError("the period has not ended; what is not over cannot be closed")
    open_ = of_account(tx, catalogue, account, period.start_ms)
    closed = tx.invoices(account)
    same = [row for row in closed if Span(row.period_start_ms, row.period_end_ms) == period]
    if same:
        return same
    last = max(closed, key=lambda row: row.period_end_ms, default=None)
    if last is not None and period.start_ms < last.period_end_ms:
        raise NotPossibleError(
            f"invoice {last.number} of {account} is closed up to {last.period_end_ms} (Unix ms), and this "
            f"period begins at {period.start_ms}; what came late is a line of the next one"
        )
    rows = []
    for currency in _currencies(open_):
        content, bills = _rated(open_, currency, period.end_ms, rated_ms=period.end_ms)
        if not content.lines:
            continue
        content.number = tx.next_invoice_number()
        content.period_start_ms, content.period_end_ms = period
        written = content.SerializeToString(deterministic=True)
        row = InvoiceRow(
            number=content.number,
            account=account,
            currency=currency,
            period_start_ms=period.start_ms,
            period_end_ms=period.end_ms,
            content=written,
            sha256=hashlib.sha256(written).digest(),
            closed_ms=now_ms,
        )
        tx.add_invoice(row, bills.records, bills.fees, [c.id for c in bills.corrections])
        rows.append(row)
    return rows


def rated_again(tx: Transaction, catalogue: Catalogue, row: InvoiceRow) -> bytes:
    """Rates what a closed invoice bills once more: the bytes that were stored, or something is wrong."""
    rows = tx.account_entitlements(row.account)
    earlier = [found for found in tx.invoices(row.account) if found.number < row.number]
    rights = _rights(tx, catalogue, rows)
    fees = frozenset(
        Fee(right, pb.LineKind.ValueType(kind), number)
        for right, kind, number, invoice in tx.billed_fees([r.entitlement_id for r in rows])
        if invoice == row.number
    )
    records = tx.billed_usage(row.number)
    open_ = Account(
        account=row.account,
        rights=rights,
        records=[(record, used(record)) for record in records],
        before=_counted(earlier),
        calendar=Calendar(_spans(earlier), row.period_start_ms),
        corrections=tx.corrections(row.account, billed_in=row.number),
    )
    content, _ = _rated(open_, row.currency, row.period_end_ms, rated_ms=row.period_end_ms, fees=fees)
    content.number = row.number
    content.period_start_ms, content.period_end_ms = row.period_start_ms, row.period_end_ms
    return content.SerializeToString(deterministic=True)


# --- gathering ------------------------------------------------------------------


def _account(
    tx: Transaction,
    catalogue: Catalogue,
    account: str,
    rows: Sequence[EntitlementRow],
    sources: Collection[str],
    start_ms: int | None,
    corrections: Sequence[CorrectionRow],
) -> Account:
    ids = {row.entitlement_id for row in rows}
    closed = tx.invoices(account)
    if start_ms is None:
        start_ms = max((row.period_end_ms for row in closed), default=0)
    records = [(record, used(record)) for record in tx.open_usage(sources)]
    return Account(
        account=account,
        rights=_rights(tx, catalogue, rows),
        records=[pair for pair in records if pair[1].record.entitlement_id in ids],
        billed=frozenset(
            Fee(right, pb.LineKind.ValueType(kind), number) for right, kind, number, _ in tx.billed_fees(ids)
        ),
        before=_counted(closed),
        calendar=Calendar(_spans(closed), start_ms),
        corrections=corrections,
    )


def _rights(tx: Transaction, catalogue: Catalogue, rows: Sequence[EntitlementRow]) -> list[Right]:
    ids = [row.entitlement_id for row in rows]
    terms, purchases = tx.terms(ids), tx.purchases(ids)
    rights = []
    for row in rows:
        releases = catalogue.releases.get(row.feature_id)
        versions = tuple(
            Terms(found.from_ms, entitlement_pb2.Entitlement.FromString(found.content))
            for found in terms.get(row.entitlement_id, ())
        )
        granted = Terms(0, entitlement_pb2.Entitlement.FromString(row.content))
        bought = purchases.get(row.entitlement_id, ())
        rights.append(
            Right(
                title=releases[-1].title if releases else row.feature_id,
                granted_ms=row.granted_ms,
                ended_ms=row.revoked_ms,
                anchor_ms=row.anchor_ms,
                terms=versions or (granted,),
                purchases=tuple(Purchase(p.number, p.at_ms, p.units, p.price_minor) for p in bought),
                unpaid_ms=row.payment_failed_ms,
            )
        )
    return rights


def used(row: OpenUsageRow) -> Used:
    """A record and when its use began: never after it was stored, whatever the vehicle's clock said."""
    record = usage_pb2.UsageRecord.FromString(row.content)
    return Used(record, min(record.window_start_ms, row.stored_ms))


def _spans(rows: Iterable[InvoiceRow]) -> tuple[Span, ...]:
    return tuple(sorted({Span(row.period_start_ms, row.period_end_ms) for row in rows}))


def _counted(rows: Iterable[InvoiceRow]) -> Mapping[Scope, int]:
    return counted(line for row in rows for line in pb.Invoice.FromString(row.content).lines)


def _currencies(open_: Account) -> list[str]:
    return sorted({right.currency for right in open_.rights} | {c.currency for c in open_.corrections})


# --- making ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Bills:
    """What an invoice bills."""

    records: Sequence[OpenUsageRow]
    fees: Sequence[tuple[str, int, int]]
    corrections: Sequence[CorrectionRow]


def _rated(
    open_: Account, currency: str, until_ms: int, *, rated_ms: int, fees: frozenset[Fee] | None = None
) -> tuple[pb.Invoice, _Bills]:
    """The invoice of one currency, without a number, and what it bills.

    Args:
        until_ms: what begins at or after it is not billed.
        fees: fixed prices to bill; None: those that are due and not billed.
    """
    rights = [right for right in open_.rights if right.currency == currency]
    ids = {right.entitlement_id for right in rights}
    if fees is None:
        fees = frozenset(fee for right in rights for fee in due(right, until_ms)) - open_.billed
    records = [
        (row, item)
        for row, item in open_.records
        if item.at_ms < until_ms and item.record.entitlement_id in ids
    ]
    corrections = [c for c in open_.corrections if c.currency == currency]
    lines = rate(rights, fees, (item for _, item in records), open_.before, open_.calendar)
    billed_fees = [(fee.entitlement_id, int(fee.kind), fee.number) for line in lines for fee in line.fees]
    made = [_line(line) for line in lines] + [_correction(c) for c in corrections]
    content = pb.Invoice(
        account=open_.account,
        currency=currency,
        lines=made,
        total_minor=total(line.amount_minor for line in made),
        rated_ms=rated_ms,
    )
    return content, _Bills([row for row, _ in records], billed_fees, corrections)


def _line(line: Line) -> pb.InvoiceLine:
    note = "; more was not metered, without a known bound" if line.gap_unbounded else ""
    return pb.InvoiceLine(
        description=line.description + note,
        entitlement_id=line.entitlement.entitlement_id,
        feature_id=line.entitlement.feature_id,
        meter_id=line.meter_id,
        dimensions=[usage_pb2.Dimension(name=name, value=value) for name, value in line.dimensions],
        quantity=line.quantity,
        unit=line.unit,
        price_minor=line.price_minor,
        per_units=line.per_units,
        amount_minor=line.amount_minor,
        declared_gap=line.declared_gap,
        trace_ids=line.trace_ids,
        plan_version=line.entitlement.plan_version,
        plan_id=line.entitlement.plan_id,
        kind=line.kind,
        period_start_ms=line.period.start_ms,
        period_end_ms=line.period.end_ms,
        late_start_ms=line.late.start_ms if line.late else 0,
        late_end_ms=line.late.end_ms if line.late else 0,
    )


def _correction(row: CorrectionRow) -> pb.InvoiceLine:
    what = "credit" if row.amount_minor < 0 else "debit"
    return pb.InvoiceLine(
        description=f"{what} for invoice {row.invoice_number}: {row.reason}",
        kind=pb.LINE_KIND_CORRECTION,
        quantity=1,
        price_minor=abs(row.amount_minor),
        per_units=1,
        amount_minor=row.amount_minor,
        reason=row.reason,
        corrected_invoice=row.invoice_number,
    )
