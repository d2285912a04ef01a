"""Rates rights and their use into invoice lines.

Pure: integers only, and the same rights, use and closed lines give the same
lines, in whatever order the use comes. Prices are those that a right had when
the use began: the version of its grant, until an operator changed its plan.
Each line is rounded once, half up, to minor units. What was declared as a gap
is shown and never billed.

What is on a closed invoice is billed. So what is due of the fixed prices are
those without a closed one, and tiers go on counting where the closed lines of
the same period end.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from cloud.errors import NotPossibleError
from cloud.plans import Period
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2

MAX_AMOUNT = 2**63 - 1
"""Highest amount or quantity of one line, and highest total; the lowest is its negative."""
MAX_TRACE_IDS = 100
"""Most trace-ids that one line lists."""

_Dimensions = tuple[tuple[str, str], ...]
_PREPAID = entitlement_pb2.PLAN_KIND_PREPAID


class Span(NamedTuple):
    """A stretch of time, Unix milliseconds; the end is exclusive, 0: it has none."""

    start_ms: int
    end_ms: int

    def __contains__(self, moment_ms: object) -> bool:
        return isinstance(moment_ms, int) and self.start_ms <= moment_ms < (self.end_ms or moment_ms + 1)


class Terms(NamedTuple):
    """A right as it was signed, and since when its terms count, Unix milliseconds."""

    from_ms: int
    entitlement: entitlement_pb2.Entitlement


class Purchase(NamedTuple):
    """Units bought for a prepaid right beside the first ones.

    Args:
        number: from 1, of this right.
    """

    number: int
    at_ms: int
    units: int
    price_minor: int


class Used(NamedTuple):
    """A record, and when its use began, Unix milliseconds, as the cloud dates it."""

    record: usage_pb2.UsageRecord
    at_ms: int


class Fee(NamedTuple):
    """A fixed price that is owed once; the key by which it is never billed twice.

    Args:
        number: of the period, from 0, or of the purchase, from 1.
    """

    entitlement_id: str
    kind: pb.LineKind.ValueType
    number: int


@dataclass(frozen=True)
class Right:
    """A right to be rated.

    Args:
        title: name of the feature.
        granted_ms: since when its account has it.
        ended_ms: when it ended, 0 while it lives.
        anchor_ms: when its first period began; periods before `granted_ms` were
            paid by an earlier owner of the vehicle.
        terms: every version of its terms that ever counted, oldest first.
        purchases: units bought later, oldest first.
        unpaid_ms: since when a payment is missing, 0: none. Periods that begin
            after that are not owed until it is made.
    """

    title: str
    granted_ms: int
    ended_ms: int
    anchor_ms: int
    terms: tuple[Terms, ...]
    purchases: tuple[Purchase, ...] = ()
    unpaid_ms: int = 0

    @property
    def entitlement_id(self) -> str:
        """Its id."""
        return self.terms[0].entitlement.entitlement_id

    @property
    def account(self) -> str:
        """Who pays."""
        return self.terms[0].entitlement.account

    @property
    def currency(self) -> str:
        """In what."""
        return self.terms[0].entitlement.display_terms.currency

    def terms_at(self, moment_ms: int) -> Terms:
        """The terms that count at an instant; before the first, those."""
        return next((t for t in reversed(self.terms) if t.from_ms <= moment_ms), self.terms[0])


@dataclass(frozen=True)
class Line:
    """One line; fields as in InvoiceLine of operator_service.proto.

    Args:
        late: the period that use belongs to that came after its invoice was closed.
        fees: the fixed prices that it bills.
    """

    entitlement: entitlement_pb2.Entitlement
    description: str
    kind: pb.LineKind.ValueType
    quantity: int
    price_minor: int
    amount_minor: int
    meter_id: str = ""
    dimensions: _Dimensions = ()
    unit: usage_pb2.Unit.ValueType = usage_pb2.UNIT_UNSPECIFIED
    per_units: int = 1
    declared_gap: int = 0
    gap_unbounded: bool = False
    trace_ids: tuple[str, ...] = ()
    period: Span = Span(0, 0)
    late: Span | None = None
    fees: tuple[Fee, ...] = ()


class Scope(NamedTuple):
    """What the tiers of one price count together: one meter, some use of it, one period."""

    entitlement_id: str
    meter_id: str
    dimensions: _Dimensions
    start_ms: int


class Calendar(NamedTuple):
    """Which invoice the use of a time belongs to.

    Args:
        closed: periods of closed invoices, in order; use of their time is late.
        start_ms: start of the period that is rated now; use before it that is
            in no closed period belongs to none.
    """

    closed: tuple[Span, ...] = ()
    start_ms: int = 0

    def late(self, moment_ms: int) -> Span | None:
        """The period that use belongs to if it is late; its end is the present start if it has none."""
        if moment_ms >= self.start_ms:
            return None
        found = next((span for span in self.closed if moment_ms in span), None)
        return found or Span(0, self.start_ms)


def amount(quantity: int, price_minor: int, per_units: int) -> int:
    """Quantity * price_minor / per_units, rounded half up; all whole numbers from 0, per_units from 1."""
    return (2 * quantity * price_minor + per_units) // (2 * per_units)


def period_at(right: Right, moment_ms: int) -> tuple[int, Span]:
    """Index and span of the period of a right in which an instant lies; the first, if it is before."""
    length = Period.parse(right.terms[0].entitlement.display_terms.period)
    if length is None:
        return 0, Span(right.anchor_ms, 0)
    index = length.index_at(right.anchor_ms, moment_ms)
    return index, Span(length.start_ms(right.anchor_ms, index), length.start_ms(right.anchor_ms, index + 1))


def due(right: Right, until_ms: int) -> list[Fee]:
    """The fixed prices of a right that its account owes at an instant, billed or not.

    Each is due when what it pays for begins: a period, the right itself, a purchase.
    """
    identifier, display = right.entitlement_id, right.terms[0].entitlement.display_terms
    inherited = right.granted_ms > right.anchor_ms
    fees = []
    if right.granted_ms >= until_ms:
        return []
    if display.entry_minor and not inherited:
        fees.append(Fee(identifier, pb.LINE_KIND_ENTRY, 0))
    ends = [moment for moment in (until_ms, right.ended_ms, right.unpaid_ms) if moment]
    renews = display.renews and display.period
    last = period_at(right, max(right.anchor_ms, min(ends) - 1))[0] if renews else 0
    first = 0
    if inherited:  # the period that runs at a sale is the seller's
        first = period_at(right, right.granted_ms - 1)[0] + 1
    if display.price_minor or display.period:
        fees += [Fee(identifier, pb.LINE_KIND_PERIOD, index) for index in range(first, last + 1)]
    fees += [
        Fee(identifier, pb.LINE_KIND_PURCHASE, purchase.number)
        for purchase in right.purchases
        if purchase.at_ms < until_ms
    ]
    return fees


def rate(
    rights: Iterable[Right],
    fees: AbstractSet[Fee],
    used: Iterable[Used],
    before: Mapping[Scope, int],
    calendar: Calendar = Calendar(),  # noqa: B008 (a tuple)
) -> list[Line]:
    """Makes the lines of all rights: fixed prices first, then use by meter, dimensions and tier.

    Use that no price names, or that is of another feature than its right,
    makes a line of amount 0. Use of rights that are not among `rights` makes no line.

    Args:
        fees: fixed prices to be billed now; see `due`.
        used: use to be billed now.
        before: units of each scope that closed invoices have billed; see `counted`.

    Raises:
        NotPossibleError: an amount is beyond MAX_AMOUNT.
    """
    by_right: dict[str, list[Used]] = defaultdict(list)
    for item in used:
        by_right[item.record.entitlement_id].append(item)
    lines: list[Line] = []
    for right in rights:
        lines.extend(_fee_lines(right, fees))
        lines.extend(_use_lines(right, by_right[right.entitlement_id], before, calendar))
    for line in lines:
        if max(line.amount_minor, line.quantity, line.declared_gap) > MAX_AMOUNT:
            raise NotPossibleError(f"{line.description}: an amount is beyond {MAX_AMOUNT}; it needs a person")
    return lines


def counted(lines: Iterable[pb.InvoiceLine]) -> Counter[Scope]:
    """Units that the lines of closed invoices have billed, by what tiers count together."""
    units: Counter[Scope] = Counter()
    for line in lines:
        if line.meter_id:
            dimensions = tuple((d.name, d.value) for d in line.dimensions)
            scope = Scope(line.entitlement_id, line.meter_id, dimensions, line.period_start_ms)
            units[scope] += line.quantity
    return units


def quota_uses(right: entitlement_pb2.Entitlement, used: Iterable[Used], now_ms: int) -> list[pb.QuotaUse]:
    """How far the quotas of a right are used up: those with periods, in the one that has begun last."""
    mine = [item for item in used if item.record.entitlement_id == right.entitlement_id]
    found = []
    for quota in right.quotas:
        begun = [start * 1000 for start in quota.period_starts_s if start * 1000 <= now_ms]
        since_ms = max(begun, default=0)
        units = sum(
            item.record.value
            for item in mine
            if item.record.meter_id == quota.meter_id and item.at_ms >= since_ms
        )
        found.append(pb.QuotaUse(meter_id=quota.meter_id, limit=quota.limit, used=units, hard=quota.hard))
    return found


def total(amounts: Iterable[int]) -> int:
    """Sum of the amounts of an invoice's lines, minor units.

    Raises:
        NotPossibleError: it is beyond MAX_AMOUNT.
    """
    amount_minor = sum(amounts)
    if abs(amount_minor) > MAX_AMOUNT:
        raise NotPossibleError(f"the total of an invoice is beyond {MAX_AMOUNT}; it needs a person")
    return amount_minor


# --- fixed prices -------------------------------------------------------------


def _fee_lines(right: Right, fees: AbstractSet[Fee]) -> Iterator[Line]:
    mine = sorted(fee for fee in fees if fee.entitlement_id == right.entitlement_id)
    first = right.terms[0].entitlement
    for fee in mine:
        if fee.kind == pb.LINE_KIND_ENTRY:
            yield _fixed(right, first, fee.kind, "entry", first.display_terms.entry_minor, (fee,))
    periods = [fee for fee in mine if fee.kind == pb.LINE_KIND_PERIOD]
    for _, run in itertools.groupby(
        enumerate(periods), lambda item: (item[1].number - item[0], _terms_of(right, item[1].number).from_ms)
    ):
        yield _period_line(right, tuple(fee for _, fee in run))
    bought = {purchase.number: purchase for purchase in right.purchases}
    for fee in mine:
        if fee.kind == pb.LINE_KIND_PURCHASE:
            purchase = bought[fee.number]
            terms = right.terms_at(purchase.at_ms).entitlement
            what = f"{purchase.units} units bought on {_day(purchase.at_ms)}"
            yield _fixed(right, terms, fee.kind, what, purchase.price_minor, (fee,))


def _terms_of(right: Right, index: int) -> Terms:
    """The terms of a period: those of its start."""
    length = Period.parse(right.terms[0].entitlement.display_terms.period)
    return right.terms_at(length.start_ms(right.anchor_ms, index)) if length else right.terms[0]


def _period_line(right: Right, fees: tuple[Fee, ...]) -> Line:
    terms = _terms_of(right, fees[0].number).entitlement
    display, count = terms.display_terms, len(fees)
    length = Period.parse(display.period)
    what = "single price"
    span = Span(right.anchor_ms, 0)
    if length is not None:
        what = f"{count} started period{'s' if count > 1 else ''} of {display.period}"
        ends = length.start_ms(right.anchor_ms, fees[-1].number + 1)
        span = Span(length.start_ms(right.anchor_ms, fees[0].number), ends)
    return _fixed(right, terms, pb.LINE_KIND_PERIOD, what, display.price_minor, fees, span)


def _fixed(
    right: Right,
    terms: entitlement_pb2.Entitlement,
    kind: pb.LineKind.ValueType,
    what: str,
    price_minor: int,
    fees: tuple[Fee, ...],
    span: Span = Span(0, 0),  # noqa: B008 (a tuple)
) -> Line:
    return Line(
        entitlement=terms,
        description=f"{right.title}: {what}",
        kind=kind,
        quantity=len(fees),
        price_minor=price_minor,
        amount_minor=len(fees) * price_minor,
        trace_ids=(terms.trace_id,),
        period=span,
        fees=fees,
    )


# --- use ------------------------------------------------------------------------


class _Price(NamedTuple):
    """A price of use, and what is counted together under it.

    Args:
        place: among the right's prices; behind them all where none names the use.
        use: None where none does.
        by_period: it has tiers, included units or a quota, which each period counts anew.
    """

    place: int
    use: entitlement_pb2.UsePrice | None
    bands: tuple[_Band, ...]
    by_period: bool


class _Band(NamedTuple):
    """The price of units from a number of them on.

    Args:
        note: what to say of it on the line.
    """

    above: int
    price_minor: int
    per_units: int
    note: str
    kind: pb.LineKind.ValueType


class _Group(NamedTuple):
    """What is added up before it is rounded, in the order of an invoice."""

    terms_ms: int
    place: int
    meter_id: str
    unit: usage_pb2.Unit.ValueType
    dimensions: _Dimensions
    period: Span
    late: Span | None


def _use_lines(
    right: Right, used: Iterable[Used], before: Mapping[Scope, int], calendar: Calendar
) -> Iterator[Line]:
    groups: dict[_Group, list[usage_pb2.UsageRecord]] = defaultdict(list)
    prices: dict[tuple[int, int], _Price] = {}
    for record, at_ms in used:
        terms = right.terms_at(at_ms)
        price = _price(terms.entitlement, record)
        prices[terms.from_ms, price.place] = price
        dimensions = tuple(sorted((d.name, d.value) for d in record.dimensions))
        span = Span(max(right.anchor_ms, terms.from_ms), 0) if price.use else Span(0, 0)
        if price.use and price.by_period:
            dimensions = ((price.use.dimension, price.use.value),) if price.use.dimension else ()
            period = period_at(right, at_ms)[1]
            span = Span(max(period.start_ms, span.start_ms), period.end_ms)
        late = calendar.late(at_ms)
        group = _Group(terms.from_ms, price.place, record.meter_id, record.unit, dimensions, span, late)
        groups[group].append(record)
    counts: Counter[Scope] = Counter()
    for group in sorted(groups, key=_order):
        price = prices[group.terms_ms, group.place]
        scope = Scope(right.entitlement_id, group.meter_id, group.dimensions, group.period.start_ms)
        begin = (before.get(scope, 0) if price.by_period else 0) + counts[scope]
        records = groups[group]
        counts[scope] += sum(record.value for record in records)
        yield from _band_lines(right, group, price, records, begin)


def _order(group: _Group) -> tuple[object, ...]:
    """What is late comes first: it was used before."""
    late = group.late or Span(MAX_AMOUNT, 0)
    return (*group[:5], group.period, late)


def _price(entitlement: entitlement_pb2.Entitlement, record: usage_pb2.UsageRecord) -> _Price:
    """The price of a record: that of its value of a dimension before that of all the rest."""
    uses = entitlement.display_terms.use_prices
    values = {(d.name, d.value) for d in record.dimensions}
    fits: dict[bool, int] = {}
    for place, use in enumerate(uses):
        if use.meter_id == record.meter_id and (not use.dimension or (use.dimension, use.value) in values):
            fits.setdefault(bool(use.dimension), place)
    own = record.feature_id == entitlement.feature_id
    if own and fits:
        place = fits.get(True, fits.get(False, 0))
        use = uses[place]
        soft = next((q.limit for q in entitlement.quotas if q.meter_id == use.meter_id and not q.hard), None)
        return _Price(place, use, _bands(use, soft), bool(soft or use.included_units or use.tiers))
    prepaid = own and any(q.meter_id == record.meter_id for q in entitlement.quotas)
    note = "prepaid" if prepaid and entitlement.plan_kind == _PREPAID else "no price agreed"
    return _Price(len(uses), None, (_Band(0, 0, 1, note, pb.LINE_KIND_USE),), by_period=False)


def _bands(use: entitlement_pb2.UsePrice, soft: int | None) -> tuple[_Band, ...]:
    """The prices of a use from 0 on; a soft quota begins a line of its own."""
    steps = [(use.included_units, use.price_minor, use.per_units)]
    steps += [(tier.above_units, tier.price_minor, tier.per_units) for tier in use.tiers]
    if use.included_units:
        steps.insert(0, (0, 0, use.per_units))
    if soft is not None and soft not in [above for above, _, _ in steps]:
        price = [step for step in steps if step[0] < soft][-1]
        steps = sorted([*steps, (soft, *price[1:])])
    bands = []
    for above, price_minor, per_units in steps:
        note = "included" if above < use.included_units else f"above {above} units" if above else ""
        kind = pb.LINE_KIND_USE
        if soft is not None and above >= soft:
            kind = pb.LINE_KIND_OVERAGE
            note = f"beyond the quota of {soft} units" + (f", above {above} units" if above > soft else "")
        bands.append(_Band(above, price_minor, per_units, note, kind))
    return tuple(bands)


def _band_lines(
    right: Right, group: _Group, price: _Price, records: Sequence[usage_pb2.UsageRecord], begin: int
) -> Iterator[Line]:
    """The lines of one group, whose units are counted from `begin` on; gaps stand on the last of them."""
    quantity, gap = sum(r.value for r in records), sum(r.gap for r in records)
    unbounded = any(r.gap_unbounded for r in records)
    if price.use is None and not (quantity or gap or unbounded):
        return
    end = begin + quantity
    uppers: list[int | None] = [*(band.above for band in price.bands[1:]), None]
    parts = []
    for band, upper in zip(price.bands, uppers, strict=True):
        low = max(begin, band.above)
        high = end if upper is None else min(end, upper)
        if high > low:
            parts.append((band, high - low))
    if not parts:  # nothing but a gap
        parts = [([b for b in price.bands if b.above <= begin][-1], 0)]
    terms = right.terms_at(group.terms_ms).entitlement
    traces = tuple(sorted({r.trace_id for r in records if r.trace_id}))[:MAX_TRACE_IDS]
    labels = ", ".join(f"{name} {value}" for name, value in group.dimensions)
    for index, (band, units) in enumerate(parts):
        is_last = index == len(parts) - 1
        notes = [band.note, f"late, of {_days(group.late)}" if group.late else ""]
        yield Line(
            entitlement=terms,
            description=", ".join(
                [
                    f"{right.title}: {group.meter_id}" + (f" ({labels})" if labels else ""),
                    *filter(None, notes),
                ]
            ),
            kind=band.kind,
            meter_id=group.meter_id,
            dimensions=group.dimensions,
            quantity=units,
            unit=group.unit,
            price_minor=band.price_minor,
            per_units=band.per_units,
            amount_minor=amount(units, band.price_minor, band.per_units),
            declared_gap=gap if is_last else 0,
            gap_unbounded=unbounded and is_last,
            trace_ids=traces,
            period=group.period,
            late=group.late,
        )


def _day(moment_ms: int) -> str:
    return datetime.fromtimestamp(moment_ms // 1000, UTC).strftime("%Y-%m-%d")


def _days(span: Span) -> str:
    """A period in words; one without a start is all the time before its end."""
    if not span.start_ms:
        return f"before {_day(span.end_ms)}"
    return f"{_day(span.start_ms)} to {_day(span.end_ms)}"
