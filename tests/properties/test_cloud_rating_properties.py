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


def _right(*uses: entitlement_pb2.UsePrice, period: str = "", soft: int = 0, **fields: int) -> Right:
    terms = entitlement_pb2.DisplayTerms(
        currency="EUR", use_prices=uses, period=period, renews=bool(period), **fields
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
