"""The trusted clock and the terms of a right, each at the very moment where the answer changes."""

from __future__ import annotations

import pytest
from support.trust_repo import VIN, make_right

from agent.model import Entitlement, TrustedTime
from agent.trust.clock import UNKNOWN_UNCERTAINTY_MS, TrustedClock
from agent.trust.terms import judge
from agent.wire import entitlements_from_bytes
from openfod.entitlement.v1 import entitlement_pb2

BUILD_MS = 1_700_000_000_000
SIGNED_MS = 1_800_000_000_000
S = 1_000_000_000  # nanoseconds
YEARS_S = 100_000_000
DRIFT_MS = YEARS_S * 1000 // 10_000  # 100 ppm


def clock(mark_ms: int = 0) -> TrustedClock:
    return TrustedClock(mark_ms=mark_ms, build_ms=BUILD_MS, monotonic_ns=10 * S)


def test_an_unknown_uncertainty_is_a_number_that_every_reader_holds_exactly() -> None:
    assert UNKNOWN_UNCERTAINTY_MS == 9_007_199_254_740_991


def test_a_mark_that_is_no_later_than_the_build_is_not_the_source() -> None:
    assert clock(BUILD_MS).now(10 * S).source == "build"
    assert clock(BUILD_MS + 1).now(10 * S).source == "mark"


def test_a_monotonic_time_from_before_adds_and_takes_nothing() -> None:
    assert clock(SIGNED_MS).now(9 * S).unix_ms == SIGNED_MS
    assert clock().observe_signed(SIGNED_MS, 20 * S, 20 * S).now(19 * S).unix_ms == SIGNED_MS


def test_the_drift_of_years_is_a_hundred_millionths_of_them() -> None:
    found = clock().observe_signed(SIGNED_MS, 0, 0).now(YEARS_S * S)
    assert found == TrustedTime(SIGNED_MS + YEARS_S * 1000, DRIFT_MS + 1, "signed")


@pytest.mark.parametrize("behind_ms", [1, DRIFT_MS, DRIFT_MS + 1])
def test_a_signed_time_behind_by_no_more_than_the_drift_confirms_the_running_time(behind_ms: int) -> None:
    first = clock().observe_signed(SIGNED_MS, 0, 0)
    running_ms = SIGNED_MS + YEARS_S * 1000
    second = first.observe_signed(running_ms - behind_ms, YEARS_S * S, YEARS_S * S)
    assert second.now(YEARS_S * S) == TrustedTime(running_ms, 0, "signed")


def test_a_signed_time_behind_by_more_makes_the_clock_wait_at_its_mark() -> None:
    first = clock().observe_signed(SIGNED_MS, 0, 0)
    running_ms = SIGNED_MS + YEARS_S * 1000
    second = first.observe_signed(running_ms - DRIFT_MS - 2, YEARS_S * S, YEARS_S * S)
    assert second.now(YEARS_S * S) == TrustedTime(running_ms, 0, "mark")
    assert second.mark_ms == running_ms


def test_a_file_raises_the_time_by_a_millisecond_and_never_lowers_it() -> None:
    held = clock(SIGNED_MS)
    assert held.raise_to(SIGNED_MS, 10 * S) is held
    assert held.raise_to(SIGNED_MS - 1, 10 * S) is held
    raised = held.raise_to(SIGNED_MS + 1, 10 * S)
    assert raised.now(12 * S) == TrustedTime(SIGNED_MS + 2_001, UNKNOWN_UNCERTAINTY_MS, "file")


def test_the_time_of_a_file_runs_on_from_when_it_was_read() -> None:
    live = clock().observe_signed(SIGNED_MS, 20 * S, 20 * S)
    raised = live.raise_to(SIGNED_MS + 60_000, 30 * S)
    assert raised.now(31 * S) == TrustedTime(SIGNED_MS + 61_000, UNKNOWN_UNCERTAINTY_MS, "file")
    assert raised.observe_signed(SIGNED_MS, 40 * S, 40 * S).now(40 * S).source == "mark"


# --- terms -----------------------------------------------------------------------


def right(**validity: int) -> Entitlement:
    message = entitlement_pb2.VehicleEntitlements(
        vin=VIN, version=1, entitlements=[make_right(validity=entitlement_pb2.Validity(**validity))]
    )
    return entitlements_from_bytes(message.SerializeToString(), VIN)[2][0]


@pytest.mark.parametrize(
    ("odometer_m", "live"), [(None, None), (0, True), (19_999, True), (20_000, False), (20_001, False)]
)
def test_a_range_from_nothing_on_ends_where_it_says(odometer_m: int | None, live: bool | None) -> None:
    found = judged(right(odometer_to_m=20_000), odometer_m)
    assert found is live


@pytest.mark.parametrize(
    ("odometer_m", "live"), [(None, None), (9_999, False), (10_000, True), (10**9, True)]
)
def test_a_range_without_an_end_begins_where_it_says(odometer_m: int | None, live: bool | None) -> None:
    assert judged(right(odometer_from_m=10_000), odometer_m) is live


def test_a_right_without_a_range_does_not_ask_for_the_odometer() -> None:
    assert judged(right(), None) is True


def judged(entitlement: Entitlement, odometer_m: int | None) -> bool | None:
    """Whether a right is live; None if only the odometer is missing."""
    now = TrustedTime(SIGNED_MS, 0, "signed")
    found = judge(entitlement, now=now, last_contact_ms=SIGNED_MS, odometer_m=odometer_m)
    assert not (found.live and found.undecided)
    return None if found.undecided else found.live
