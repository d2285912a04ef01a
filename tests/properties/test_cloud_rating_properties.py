"""Rating is exact: whole numbers, one rounding, half up, the same every time."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from cloud.plans import Period
from cloud.rating import Right, amount, rate, started_periods
from openfod.entitlement.v1 import entitlement_pb2
from openfod.usage.v1 import usage_pb2

quantities = st.integers(0, 10**12)
prices = st.integers(0, 10**9)
pers = st.integers(1, 10**9)
instants = st.integers(0, 4_102_444_800_000)  # 1970 to 2100
DAY_MS = 86_400_000


@given(quantities, prices, pers)
def test_amount_is_the_exact_one_rounded_half_up(quantity: int, price: int, per: int) -> None:
    exact = Fraction(quantity * price, per)
    found = amount(quantity, price, per)
    assert found - Fraction(1, 2) <= exact < found + Fraction(1, 2)


@given(st.integers(0, 10**9))
def test_a_half_is_rounded_up(whole: int) -> None:
    assert amount(2 * whole + 1, 1, 2) == whole + 1


def _record(value: int, gap: int, meter: str = "m") -> usage_pb2.UsageRecord:
    return usage_pb2.UsageRecord(
        entitlement_id="e", meter_id=meter, value=value, gap=gap, unit=usage_pb2.UNIT_METRE
    )


def _right(price: int, per: int) -> Right:
    terms = entitlement_pb2.DisplayTerms(
        currency="EUR",
        use_prices=[entitlement_pb2.UsePrice(meter_id="m", price_minor=price, per_units=per)],
    )
    right = entitlement_pb2.Entitlement(entitlement_id="e", display_terms=terms)
    return Right(right, "Feature", 0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1), prices, pers)
def test_a_line_is_rounded_once_and_gaps_are_shown_not_billed(
    windows: list[tuple[int, int]], price: int, per: int
) -> None:
    records = [_record(value, gap) for value, gap in windows]
    (line,) = rate([_right(price, per)], records, 1)
    assert line.quantity == sum(value for value, _ in windows)
    assert line.declared_gap == sum(gap for _, gap in windows)
    assert line.amount_minor == amount(line.quantity, price, per)
    assert rate([_right(price, per)], reversed(records), 1) == [line]


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_use_without_a_price_is_shown_and_costs_nothing(values: list[int]) -> None:
    records = [_record(value, 0, meter="unpriced") for value in values]
    shown = [(line.quantity, line.amount_minor) for line in rate([_right(1, 1)], records, 1)]
    assert shown == ([(sum(values), 0)] if any(values) else [])


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_use_of_foreign_rights_makes_no_line(values: list[int]) -> None:
    records = [_record(value, 0) for value in values]
    for record in records:
        record.entitlement_id = "another"
    assert rate([_right(1, 1)], records, 1) == []


@given(st.integers(1, 10**12))
def test_use_of_another_feature_than_the_rights_costs_nothing(value: int) -> None:
    record = _record(value, 0)
    record.feature_id = "another"
    (line,) = rate([_right(1, 1)], [record], 1)
    assert (line.quantity, line.amount_minor) == (value, 0)
    assert line.description.endswith("no price agreed")


@given(instants, st.integers(0, 60), st.sampled_from(["P1M", "P1Y", "P7D", "P1M3D"]))
def test_periods_follow_one_another(anchor: int, index: int, text: str) -> None:
    period = Period.parse(text)
    assert period is not None
    start, end = period.start_ms(anchor, index), period.start_ms(anchor, index + 1)
    assert start < end
    assert period.start_ms(anchor, 0) == anchor
    assert started_periods(text, anchor, start + 1, renews=True) == index + 1
    assert started_periods(text, anchor, end, renews=True) == index + 1
    assert started_periods(text, anchor, end + 1, renews=True) == index + 2


@given(instants, instants)
def test_what_does_not_renew_is_paid_once(granted: int, until: int) -> None:
    assert started_periods("P1M", granted, until, renews=False) == 1
    assert started_periods("", granted, until, renews=True) == 1
