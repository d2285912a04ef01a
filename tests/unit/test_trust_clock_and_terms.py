"""Trusted time never goes back by itself, and rights live by their own terms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.model import Entitlement, PlanKind, TrustedTime
from agent.trust.clock import UNKNOWN_UNCERTAINTY_MS, TrustedClock
from agent.trust.terms import judge

BUILD_MS = 1_700_000_000_000
SIGNED_MS = 1_800_000_000_000
S = 1_000_000_000  # nanoseconds


def booted(mark_ms: int = 0) -> TrustedClock:
    return TrustedClock(mark_ms=mark_ms, build_ms=BUILD_MS, monotonic_ns=10 * S)


# --- clock -------------------------------------------------------------------


def test_without_a_mark_the_time_of_the_build_is_the_least() -> None:
    assert booted().now(12 * S) == TrustedTime(BUILD_MS + 2_000, UNKNOWN_UNCERTAINTY_MS, "build")


def test_a_mark_is_carried_on_by_the_monotonic_clock() -> None:
    now = booted(SIGNED_MS).now(70 * S)
    assert now == TrustedTime(SIGNED_MS + 60_000, UNKNOWN_UNCERTAINTY_MS, "mark")


def test_a_signed_time_is_known_to_the_age_of_its_nonce() -> None:
    clock = booted().observe_signed(SIGNED_MS, nonce_sent_ns=20 * S, received_ns=21 * S)
    assert clock.now(21 * S) == TrustedTime(SIGNED_MS, 1_001, "signed")


def test_uncertainty_grows_with_the_drift() -> None:
    clock = booted().observe_signed(SIGNED_MS, 20 * S, 20 * S)
    assert clock.now(20 * S + 10_000 * S) == TrustedTime(SIGNED_MS + 10_000_000, 1 + 1_000, "signed")


def test_a_second_signed_time_within_the_first_estimate_does_not_turn_back() -> None:
    clock = booted().observe_signed(SIGNED_MS, 20 * S, 20 * S)
    later = clock.observe_signed(SIGNED_MS + 59_000, nonce_sent_ns=20 * S, received_ns=80 * S)
    assert later.now(80 * S) == TrustedTime(SIGNED_MS + 60_000, 59_001, "signed")


def test_an_older_signed_time_does_not_turn_the_clock_back_and_it_waits() -> None:
    clock = booted(SIGNED_MS + 10_000).observe_signed(SIGNED_MS, 10 * S, 10 * S)
    assert clock.now(10 * S) == TrustedTime(SIGNED_MS + 10_000, 0, "mark")
    assert clock.now(15 * S).unix_ms == SIGNED_MS + 10_000
    assert clock.now(30 * S) == TrustedTime(SIGNED_MS + 20_000, 3, "signed")


def test_a_new_epoch_takes_a_stolen_future_back() -> None:
    clock = booted(SIGNED_MS * 2).observe_signed(SIGNED_MS, 10 * S, 10 * S, new_epoch=True)
    assert clock.now(10 * S) == TrustedTime(SIGNED_MS, 1, "signed")
    assert clock.mark_ms == SIGNED_MS


def test_a_new_epoch_does_not_undercut_the_build() -> None:
    clock = booted().observe_signed(1_000, 10 * S, 10 * S, new_epoch=True)
    assert clock.now(10 * S).unix_ms == BUILD_MS


def test_the_clock_before_an_observation_is_unchanged_by_it() -> None:
    clock = booted()
    clock.observe_signed(SIGNED_MS, 10 * S, 10 * S)
    assert clock.now(10 * S).unix_ms == BUILD_MS


def test_time_of_a_file_raises_the_bound_and_says_that_it_is_one() -> None:
    clock = booted(SIGNED_MS).raise_to(SIGNED_MS + 50_000, 20 * S)
    assert clock.now(30 * S) == TrustedTime(SIGNED_MS + 60_000, UNKNOWN_UNCERTAINTY_MS, "file")


def test_time_of_a_file_that_is_behind_changes_nothing() -> None:
    clock = booted().observe_signed(SIGNED_MS, 20 * S, 20 * S)
    assert clock.raise_to(SIGNED_MS + 10_000, 30 * S) is clock


def test_time_of_a_file_ahead_of_a_signed_one_leaves_its_uncertainty_unknown_until_the_next() -> None:
    clock = booted().observe_signed(SIGNED_MS, 20 * S, 20 * S).raise_to(SIGNED_MS + 90_000, 30 * S)
    assert clock.now(31 * S) == TrustedTime(SIGNED_MS + 91_000, UNKNOWN_UNCERTAINTY_MS, "file")
    later = clock.observe_signed(SIGNED_MS + 100_000, 31 * S, 32 * S)
    assert later.now(32 * S) == TrustedTime(SIGNED_MS + 100_000, 1_001, "signed")


# --- terms -------------------------------------------------------------------

END_S = SIGNED_MS // 1000 + 86_400
END_MS = END_S * 1000
GRACE_MS = 3_600_000

SUBSCRIPTION = Entitlement(
    entitlement_id="ent-0000000000000001",
    feature_id="seat-heating",
    min_release=1,
    account="acc-demo",
    plan_kind=PlanKind.SUBSCRIPTION,
    plan_id="p",
    plan_version=1,
    not_before_s=SIGNED_MS // 1000,
    not_after_s=END_S,
    odometer_from_m=0,
    odometer_to_m=0,
    ignition_cycles=0,
    operating_s=0,
    offline_grace_s=3_600,
    quotas=(),
    parameters=(),
    stays_with_vehicle=False,
    display={},
    trace_id="0" * 32,
)


def at(unix_ms: int) -> TrustedTime:
    return TrustedTime(unix_ms, 0, "signed")


@pytest.mark.parametrize(
    ("now_ms", "last_contact_ms", "live", "ends_ms"),
    [
        (SIGNED_MS - 1, SIGNED_MS - 1, False, SIGNED_MS),
        (SIGNED_MS, SIGNED_MS, True, END_MS),
        (END_MS - 1, SIGNED_MS, True, END_MS),
        (END_MS, SIGNED_MS, True, END_MS + GRACE_MS),
        (END_MS + GRACE_MS - 1, END_MS - 1, True, END_MS + GRACE_MS),
        (END_MS + GRACE_MS, SIGNED_MS, False, None),
        (END_MS, END_MS, False, None),  # the cloud was reached, and did not renew
    ],
)
def test_a_subscription_lives_to_its_end_and_offline_to_the_end_of_its_grace(
    now_ms: int, last_contact_ms: int, live: bool, ends_ms: int | None
) -> None:
    right = judge(SUBSCRIPTION, now=at(now_ms), last_contact_ms=last_contact_ms, odometer_m=None)
    assert (right.live, right.ends_ms) == (live, ends_ms)
    assert right.reason


def test_a_right_without_an_end_goes_on() -> None:
    right = judge(
        replace(SUBSCRIPTION, not_after_s=0), now=at(END_MS * 2), last_contact_ms=0, odometer_m=None
    )
    assert (right.live, right.ends_ms) == (True, None)


@pytest.mark.parametrize("now_ms", [0, SIGNED_MS, END_MS * 100])
def test_a_perpetual_right_lives_whatever_the_clock_says(now_ms: int) -> None:
    bought = replace(SUBSCRIPTION, plan_kind=PlanKind.PERPETUAL, not_after_s=0, offline_grace_s=0)
    assert judge(bought, now=at(now_ms), last_contact_ms=0, odometer_m=None).live


@pytest.mark.parametrize(
    ("odometer_m", "live", "undecided"),
    [
        (None, False, True),
        (9_999, False, False),
        (10_000, True, False),
        (19_999, True, False),
        (20_000, False, False),
    ],
)
def test_an_odometer_range_holds_and_an_unknown_odometer_activates_nothing(
    odometer_m: int | None, live: bool, undecided: bool
) -> None:
    ranged = replace(SUBSCRIPTION, odometer_from_m=10_000, odometer_to_m=20_000)
    right = judge(ranged, now=at(SIGNED_MS), last_contact_ms=SIGNED_MS, odometer_m=odometer_m)
    assert (right.live, right.undecided) == (live, undecided)


def test_an_odometer_without_an_upper_limit_goes_on() -> None:
    ranged = replace(SUBSCRIPTION, odometer_from_m=10_000)
    assert judge(ranged, now=at(SIGNED_MS), last_contact_ms=SIGNED_MS, odometer_m=10**9).live
