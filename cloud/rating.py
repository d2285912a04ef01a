"""Rates rights and their use into invoice lines.

Pure: integers only, and the same rights, records and instant give the same
lines. Prices are those that the right was granted at. Each line is rounded
once, half up, to minor units. What was declared as a gap is shown and never
billed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from cloud.errors import NotPossibleError
from cloud.plans import Period
from openfod.entitlement.v1 import entitlement_pb2
from openfod.usage.v1 import usage_pb2

MAX_AMOUNT = 2**63 - 1
"""Highest amount or quantity of one line, and highest total."""
MAX_TRACE_IDS = 100
"""Most trace-ids that one line lists."""

_Dimensions = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Right:
    """A right to be rated.

    Args:
        title: name of the feature.
        granted_ms: since when its account has it.
        ended_ms: when it ended, 0 while it lives.
        anchor_ms: when its first period began; periods before `granted_ms` were
            paid by an earlier owner of the vehicle.
    """

    entitlement: entitlement_pb2.Entitlement
    title: str
    granted_ms: int
    ended_ms: int
    anchor_ms: int


@dataclass(frozen=True)
class Line:
    """One line; fields as in InvoiceLine of operator_service.proto."""

    entitlement: entitlement_pb2.Entitlement
    description: str
    meter_id: str
    dimensions: _Dimensions
    quantity: int
    unit: int
    price_minor: int
    per_units: int
    amount_minor: int
    declared_gap: int
    gap_unbounded: bool
    trace_ids: tuple[str, ...]


def amount(quantity: int, price_minor: int, per_units: int) -> int:
    """Quantity * price_minor / per_units, rounded half up; all whole numbers from 0, per_units from 1."""
    return (2 * quantity * price_minor + per_units) // (2 * per_units)


def started_periods(period: str, anchor_ms: int, until_ms: int, *, renews: bool) -> int:
    """How many periods of a right had started at an instant: each is paid at its start.

    Args:
        period: ISO 8601, or empty for a single payment.
        anchor_ms: start of the first.
        until_ms: the instant, or when the right ended, whichever was first.
    """
    length = Period.parse(period)
    if length is None or not renews:
        return 1
    count = 1
    while length.start_ms(anchor_ms, count) < until_ms:
        count += 1
    return count


def rate(rights: Iterable[Right], records: Iterable[usage_pb2.UsageRecord], now_ms: int) -> list[Line]:
    """Makes the lines of all rights: the fixed price first, then its use by meter and dimensions.

    Use that no price names, or that is of another feature than its right,
    makes a line of amount 0. Records of rights that are not among `rights`
    make no line.

    Raises:
        NotPossibleError: an amount is beyond MAX_AMOUNT.
    """
    used: dict[str, list[usage_pb2.UsageRecord]] = defaultdict(list)
    for record in records:
        used[record.entitlement_id].append(record)
    lines: list[Line] = []
    for right in rights:
        terms = right.entitlement.display_terms
        if terms.price_minor or terms.period:
            lines.extend(_period_line(right, now_ms))
        lines.extend(_use_lines(right, used[right.entitlement.entitlement_id]))
    for line in lines:
        if max(line.amount_minor, line.quantity, line.declared_gap) > MAX_AMOUNT:
            raise NotPossibleError(f"{line.description}: an amount is beyond {MAX_AMOUNT}; it needs a person")
    return lines


def total(lines: Iterable[Line]) -> int:
    """Sum of the lines' amounts, minor units.

    Raises:
        NotPossibleError: it is beyond MAX_AMOUNT.
    """
    amount_minor = sum(line.amount_minor for line in lines)
    if amount_minor > MAX_AMOUNT:
        raise NotPossibleError(f"the total of an invoice is beyond {MAX_AMOUNT}; it needs a person")
    return amount_minor


def _period_line(right: Right, now_ms: int) -> Iterable[Line]:
    """What the account owes for periods, or for the right; nothing if an earlier owner paid it all."""
    terms = right.entitlement.display_terms
    until_ms = min(now_ms, right.ended_ms) if right.ended_ms else now_ms
    count = started_periods(terms.period, right.anchor_ms, until_ms, renews=terms.renews)
    if right.granted_ms > right.anchor_ms:
        count -= started_periods(terms.period, right.anchor_ms, right.granted_ms, renews=terms.renews)
    if count <= 0:
        return
    what = (
        f"{count} started period{'s' if count > 1 else ''} of {terms.period}"
        if terms.period
        else "single price"
    )
    yield Line(
        entitlement=right.entitlement,
        description=f"{right.title}: {what}",
        meter_id="",
        dimensions=(),
        quantity=count,
        unit=usage_pb2.UNIT_UNSPECIFIED,
        price_minor=terms.price_minor,
        per_units=1,
        amount_minor=amount(count, terms.price_minor, 1),
        declared_gap=0,
        gap_unbounded=False,
        trace_ids=(right.entitlement.trace_id,),
    )


def _use_lines(right: Right, records: Iterable[usage_pb2.UsageRecord]) -> Iterable[Line]:
    prices = {price.meter_id: price for price in right.entitlement.display_terms.use_prices}
    order = {meter_id: index for index, meter_id in enumerate(prices)}
    groups: dict[tuple[int, str, int, _Dimensions], list[usage_pb2.UsageRecord]] = defaultdict(list)
    for record in records:
        dimensions = tuple(sorted((d.name, d.value) for d in record.dimensions))
        is_priced = record.feature_id == right.entitlement.feature_id and record.meter_id in prices
        place = order[record.meter_id] if is_priced else len(order)
        groups[place, record.meter_id, record.unit, dimensions].append(record)
    for (place, meter_id, unit, dimensions), group in sorted(groups.items()):
        price = prices[meter_id] if place < len(order) else None
        quantity, gap = sum(r.value for r in group), sum(r.gap for r in group)
        unbounded = any(r.gap_unbounded for r in group)
        if price is None and not (quantity or gap or unbounded):
            continue
        labels = ", ".join(f"{name} {value}" for name, value in dimensions)
        yield Line(
            entitlement=right.entitlement,
            description=f"{right.title}: {meter_id}"
            + (f" ({labels})" if labels else "")
            + ("" if price else ", no price agreed"),
            meter_id=meter_id,
            dimensions=dimensions,
            quantity=quantity,
            unit=unit,
            price_minor=price.price_minor if price else 0,
            per_units=price.per_units if price else 1,
            amount_minor=amount(quantity, price.price_minor, price.per_units) if price else 0,
            declared_gap=gap,
            gap_unbounded=unbounded,
            trace_ids=tuple(sorted({r.trace_id for r in group if r.trace_id}))[:MAX_TRACE_IDS],
        )
