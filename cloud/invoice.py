"""Makes invoice previews from what the database holds. A preview closes nothing."""

from __future__ import annotations

from collections import defaultdict

from cloud.catalogue import Catalogue
from cloud.rating import Line, Right, rate, total
from cloud.store import EntitlementRow, UsageRow
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2
from openfod.usage.v1 import usage_pb2


def preview(
    catalogue: Catalogue, rows: list[EntitlementRow], usage: list[UsageRow], now_ms: int
) -> operator_service_pb2.PreviewInvoiceResponse:
    """Rates a vehicle's rights and records into one invoice per account and currency.

    Raises:
        NotPossibleError: an amount or a total is beyond what the contract can carry.
    """
    rights = [_right(catalogue, row) for row in rows]
    records = [usage_pb2.UsageRecord.FromString(row.content) for row in usage]
    by_account: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in rate(rights, records, now_ms):
        by_account[line.entitlement.account, line.entitlement.display_terms.currency].append(line)
    return operator_service_pb2.PreviewInvoiceResponse(
        invoices=[
            operator_service_pb2.Invoice(
                account=account,
                currency=currency,
                lines=[_line(line) for line in lines],
                total_minor=total(lines),
                rated_ms=now_ms,
            )
            for (account, currency), lines in sorted(by_account.items())
        ]
    )


def _right(catalogue: Catalogue, row: EntitlementRow) -> Right:
    releases = catalogue.releases.get(row.feature_id)
    title = releases[-1].title if releases else row.feature_id
    right = entitlement_pb2.Entitlement.FromString(row.content)
    return Right(right, title, row.granted_ms, row.revoked_ms, row.anchor_ms)


def _line(line: Line) -> operator_service_pb2.InvoiceLine:
    note = "; more was not metered, without a known bound" if line.gap_unbounded else ""
    return operator_service_pb2.InvoiceLine(
        description=line.description + note,
        entitlement_id=line.entitlement.entitlement_id,
        feature_id=line.entitlement.feature_id,
        meter_id=line.meter_id,
        dimensions=[usage_pb2.Dimension(name=name, value=value) for name, value in line.dimensions],
        quantity=line.quantity,
        unit=usage_pb2.Unit.ValueType(line.unit),
        price_minor=line.price_minor,
        per_units=line.per_units,
        amount_minor=line.amount_minor,
        declared_gap=line.declared_gap,
        trace_ids=line.trace_ids,
        plan_version=line.entitlement.plan_version,
    )
