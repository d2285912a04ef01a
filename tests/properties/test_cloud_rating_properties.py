"""Rating is exact: whole numbers, one rounding, half up, the same every time, and each unit billed once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from cloud import invoice
from cloud.plans import Period
from cloud.rating import Calendar, Line, Right, Scope, Span, Terms, Used, amount, counted, due, rate
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.usage.v1 import usage_pb2

quantities = st.integers(0, 10**12)
prices = st.integers(0, 10**9)
pers = st.integers(1, 10**9)
instants = st.integers(0, 4_102_444_800_000)  # 1970 to 2100
DAY_MS = 86_400_000
ANCHOR_MS = 1_772_323_200_000
"""1 March 2026, UTC."""


@given(quantities, prices, pers)
def test_amount_is_the_exact_one_rounded_half_up(quantity: int, price: int, per: int) -> None:
    exact = Fraction(quantity * price, per)
    found = amount(quantity, price, per)
    assert found - Fraction(1, 2) <= exact < found + Fraction(1, 2)


@given(st.integers(0, 10**9))
def test_a_half_is_rounded_up(whole: int) -> None:
    assert amount(2 * whole + 1, 1, 2) == whole + 1


def _record(value: int, gap: int = 0, meter: str = "m", motion: str = "") -> usage_pb2.UsageRecord:
    dimensions = [usage_pb2.Dimension(name="motion", value=motion)] if motion else []
    return usage_pb2.UsageRecord(
        entitlement_id="e",
        meter_id=meter,
        value=value,
        gap=gap,
        unit=usage_pb2.UNIT_METRE,
        dimensions=dimensions,
    )


def _use(price: int, per: int, motion: str = "", **fields: object) -> entitlement_pb2.UsePrice:
    use = entitlement_pb2.UsePrice(meter_id="m", price_minor=price, per_units=per, **fields)  # type: ignore[arg-type]
    if motion:
        use.dimension, use.value = "motion", motion
    return use


def _right(
    *uses: entitlement_pb2.UsePrice, period: str = "", soft: int = 0, entry: int = 0, price: int = 0
) -> Right:
    terms = entitlement_pb2.DisplayTerms(
        currency="EUR",
        use_prices=uses,
        period=period,
        renews=bool(period),
        entry_minor=entry,
        price_minor=price,
    )
    right = entitlement_pb2.Entitlement(entitlement_id="e", display_terms=terms)
    if soft:
        right.quotas.add(meter_id="m", limit=soft)
    return Right("Feature", ANCHOR_MS, 0, ANCHOR_MS, (Terms(0, right),))


def _rate(right: Right, records: list[usage_pb2.UsageRecord], at_ms: int = ANCHOR_MS) -> list[Line]:
    return rate([right], frozenset(), [Used(record, at_ms) for record in records], {})


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1), prices, pers)
def test_a_line_is_rounded_once_and_gaps_are_shown_not_billed(
    windows: list[tuple[int, int]], price: int, per: int
) -> None:
    records = [_record(value, gap) for value, gap in windows]
    (line,) = _rate(_right(_use(price, per)), records)
    assert line.quantity == sum(value for value, _ in windows)
    assert line.declared_gap == sum(gap for _, gap in windows)
    assert line.amount_minor == amount(line.quantity, price, per)
    assert _rate(_right(_use(price, per)), records[::-1]) == [line]


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_use_without_a_price_is_shown_and_costs_nothing(values: list[int]) -> None:
    records = [_record(value, meter="unpriced") for value in values]
    shown = [(line.quantity, line.amount_minor) for line in _rate(_right(_use(1, 1)), records)]
    assert shown == ([(sum(values), 0)] if any(values) else [])


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_use_of_foreign_rights_makes_no_line(values: list[int]) -> None:
    records = [_record(value) for value in values]
    for record in records:
        record.entitlement_id = "another"
    assert _rate(_right(_use(1, 1)), records) == []


@given(st.integers(1, 10**12))
def test_use_of_another_feature_than_the_rights_costs_nothing(value: int) -> None:
    record = _record(value)
    record.feature_id = "another"
    (line,) = _rate(_right(_use(1, 1)), [record])
    assert (line.quantity, line.amount_minor) == (value, 0)
    assert line.description.endswith("no price agreed")


def _started(period: str, anchor_ms: int, until_ms: int, *, renews: bool) -> int:
    right = _right(period=period)
    right.terms[0].entitlement.display_terms.renews = renews
    right.terms[0].entitlement.display_terms.price_minor = 1
    right = replace(right, granted_ms=anchor_ms, anchor_ms=anchor_ms)
    return sum(fee.kind == pb.LINE_KIND_PERIOD for fee in due(right, until_ms))


@given(instants, st.integers(0, 60), st.sampled_from(["P1M", "P1Y", "P7D", "P1M3D"]))
def test_periods_follow_one_another(anchor: int, index: int, text: str) -> None:
    period = Period.parse(text)
    assert period is not None
    start, end = period.start_ms(anchor, index), period.start_ms(anchor, index + 1)
    assert start < end
    assert period.start_ms(anchor, 0) == anchor
    assert _started(text, anchor, start + 1, renews=True) == index + 1
    assert _started(text, anchor, end, renews=True) == index + 1
    assert _started(text, anchor, end + 1, renews=True) == index + 2


@given(instants, instants)
def test_what_does_not_renew_is_paid_once(granted: int, until: int) -> None:
    expected = int(granted < until)
    assert _started("P1M", granted, until, renews=False) == expected
    assert _started("", granted, until, renews=True) == expected


# --- tiers, dimensions, quotas ----------------------------------------------------

MOTIONS = ("driving", "parked", "")


@st.composite
def uses(draw: st.DrawFn, motion: str) -> entitlement_pb2.UsePrice:
    """A price with included units and tiers."""
    included = draw(st.integers(0, 40))
    steps = sorted(draw(st.sets(st.integers(included + 1, 200), max_size=3)))
    tiers = [
        entitlement_pb2.PriceTier(
            above_units=above, price_minor=draw(st.integers(0, 99)), per_units=draw(st.integers(1, 70))
        )
        for above in steps
    ]
    price, per = draw(st.integers(0, 99)), draw(st.integers(1, 70))
    return _use(price, per, motion, included_units=included, tiers=tiers)


@st.composite
def rights(draw: st.DrawFn) -> Right:
    """A right with a price for driving and one for the rest, or one for all and a soft quota."""
    period = draw(st.sampled_from(["", "P7D", "P1M"]))
    entry, price = draw(st.integers(0, 99)), draw(st.integers(0, 999))
    if draw(st.booleans()):
        return _right(draw(uses("driving")), draw(uses("")), period=period, entry=entry, price=price)
    soft = draw(st.integers(1, 250))
    return _right(draw(uses("")), period=period, soft=soft, entry=entry, price=price)


windows = st.lists(
    st.tuples(st.integers(0, 100), st.integers(0, 9), st.sampled_from(MOTIONS), st.integers(0, 60 * DAY_MS)),
    max_size=12,
)


def _items(found: list[tuple[int, int, str, int]]) -> list[Used]:
    return [Used(_record(value, gap, motion=m), ANCHOR_MS + after) for value, gap, m, after in found]


def _exact(right: Right, items: list[Used]) -> dict[tuple[Scope, int, int], int]:
    """Units by scope and price, counted one by one."""
    terms = right.terms[0].entitlement
    period = Period.parse(terms.display_terms.period)
    sums: Counter[tuple[str, int]] = Counter()
    units: Counter[tuple[Scope, int, int]] = Counter()
    for record, at_ms in items:
        motion = record.dimensions[0].value if record.dimensions else ""
        use = next((u for u in terms.display_terms.use_prices if u.value == motion), None)
        use = use or next(u for u in terms.display_terms.use_prices if not u.value)
        start = right.anchor_ms
        if period is not None:
            index = 0
            while period.start_ms(right.anchor_ms, index + 1) <= at_ms:
                index += 1
            start = period.start_ms(right.anchor_ms, index)
        dimensions: tuple[tuple[str, str], ...] = (("motion", use.value),) if use.value else ()
        if not (use.included_units or use.tiers or terms.quotas):
            start = right.anchor_ms
            dimensions = tuple((d.name, d.value) for d in record.dimensions)
        for _ in range(record.value):
            number = sums[use.value, start] = sums[use.value, start] + 1
            price, per = use.price_minor, use.per_units
            if number <= use.included_units:
                price = 0
            for tier in use.tiers:
                if number > tier.above_units:
                    price, per = tier.price_minor, tier.per_units
            units[Scope("e", "m", dimensions, start), price, per] += 1
    return units


def _found(lines: list[Line]) -> dict[tuple[Scope, int, int], int]:
    units: Counter[tuple[Scope, int, int]] = Counter()
    for line in lines:
        if line.quantity and line.meter_id:
            scope = Scope("e", "m", line.dimensions, line.period.start_ms)
            units[scope, line.price_minor, line.per_units] += line.quantity
    return units


@given(rights(), windows)
def test_units_fall_into_their_tiers_and_each_line_is_exact_and_rounded_once(
    right: Right, found: list[tuple[int, int, str, int]]
) -> None:
    items = _items(found)
    lines = rate([right], frozenset(), items, {})
    assert _found(lines) == _exact(right, items)
    for line in lines:
        exact = Fraction(line.quantity * line.price_minor, line.per_units)
        assert line.amount_minor - Fraction(1, 2) <= exact < line.amount_minor + Fraction(1, 2)
    assert sum(line.declared_gap for line in lines) == sum(gap for _, gap, _, _ in found)


@given(rights(), windows, st.randoms(use_true_random=False))
def test_the_order_of_records_and_where_windows_are_cut_change_nothing(
    right: Right, found: list[tuple[int, int, str, int]], random: object
) -> None:
    lines = rate([right], frozenset(), _items(found), {})
    shuffled = list(found)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert rate([right], frozenset(), _items(shuffled), {}) == lines
    cut = [(value // 3, gap, motion, at) for value, gap, motion, at in found]
    cut += [(value - value // 3, 0, motion, at) for value, _, motion, at in found]
    assert rate([right], frozenset(), _items(cut), {}) == lines


@given(rights(), windows, st.lists(st.integers(1, 70), min_size=1, max_size=4, unique=True), st.data())
def test_whenever_invoices_close_each_record_and_fee_is_billed_exactly_once(
    right: Right, found: list[tuple[int, int, str, int]], days: list[int], data: st.DataObject
) -> None:
    """Records arrive late, some after the invoice of their time was closed; tiers go on over invoices."""
    items = _items(found)
    ends = [ANCHOR_MS + day * DAY_MS for day in sorted(days)] + [ANCHOR_MS + 71 * DAY_MS]
    arrivals = [data.draw(st.integers(0, len(ends) - 1)) for _ in items]
    billed: set[int] = set()
    fees: set[object] = set()
    closed: list[pb.Invoice] = []
    spans: list[Span] = []
    for number, end_ms in enumerate(ends):
        start_ms = spans[-1].end_ms if spans else ANCHOR_MS
        due_now = frozenset(due(right, end_ms)) - fees
        here = [
            i for i, n in enumerate(arrivals) if n <= number and i not in billed and items[i].at_ms < end_ms
        ]
        before = counted(line for made in closed for line in made.lines)
        calendar = Calendar(tuple(spans), start_ms)
        lines = rate([right], due_now, [items[i] for i in here], before, calendar)
        for line in lines:
            late = [span for span in spans if line.late == span]
            assert bool(late) is bool(line.late)  # it names the closed period that it belongs to
            assert "late, of " in line.description or not line.late
            assert not fees & set(line.fees)
            fees |= set(line.fees)
        billed |= set(here)
        closed.append(pb.Invoice(lines=[invoice._line(line) for line in lines]))
        spans.append(Span(start_ms, end_ms))
    assert billed == set(range(len(items)))
    assert fees == set(due(right, ends[-1]))
    units: Counter[tuple[Scope, int, int]] = Counter()
    for made in closed:
        for billed_line in made.lines:
            if billed_line.quantity and billed_line.meter_id:
                dimensions = tuple((d.name, d.value) for d in billed_line.dimensions)
                scope = Scope("e", "m", dimensions, billed_line.period_start_ms)
                units[scope, billed_line.price_minor, billed_line.per_units] += billed_line.quantity
    assert units == _exact(right, items)
