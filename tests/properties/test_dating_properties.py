"""Weak clocks dated by the signed times around them: in order, within bounds, and nothing else changed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cloud.dating import Window, dated

TIMES = st.integers(0, 10**13)


@st.composite
def journals(draw: st.DrawFn) -> list[Window]:
    """Any windows at all, stored in their order."""
    count = draw(st.integers(0, 12))
    stored = sorted(draw(st.lists(TIMES, min_size=count, max_size=count)))
    windows = []
    for at_ms in stored:
        start, end = sorted(draw(st.tuples(TIMES, TIMES)))
        windows.append(Window(start, end, draw(st.booleans()), at_ms))
    return windows


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[Window], list[tuple[int, int]]]:
    """Windows as they truly were, one closed after another, and what a vehicle says of them.

    Now and then its clock is set back to anything at all, and runs on from there.
    """
    now, off = draw(st.integers(10**12, 2 * 10**12)), 0
    said, truth = [], []
    for _ in range(draw(st.integers(1, 15))):
        length = draw(st.integers(0, 10**7))
        now += length + draw(st.integers(0, 10**7))
        if draw(st.booleans()):
            off = draw(st.sampled_from([0, draw(st.integers(-(10**12) + 10**8, 10**12))]))
        truth.append((now - length, now))
        said.append((now - length + off, now + off, off == 0))
    stored = now + draw(st.integers(0, 10**8))
    return [Window(*window, stored) for window in said], truth


@given(journals())
def test_signed_windows_are_unchanged_and_weak_ones_within_bounds_in_order(windows: list[Window]) -> None:
    found = dated(windows)
    assert len(found) == len(windows)
    last = 0
    for window, date in zip(windows, found, strict=True):
        if window.signed:
            assert (date.start_ms, date.end_ms) == (window.start_ms, window.end_ms)
            assert date.earliest_end_ms == date.latest_end_ms == window.end_ms
            continue
        assert 0 <= date.earliest_end_ms <= date.end_ms <= date.latest_end_ms <= window.stored_ms
        assert 0 <= date.start_ms <= date.end_ms
        assert date.end_ms - date.start_ms <= window.end_ms - window.start_ms
        assert date.end_ms >= last
        last = date.end_ms
    assert dated(windows) == found


@given(journals())
def test_a_claim_within_its_bounds_stays(windows: list[Window]) -> None:
    """A weak clock that contradicts no signed one and no weak one before it is believed."""
    last = 0
    for window, date in zip(windows, dated(windows), strict=True):
        if not window.signed:
            if max(date.earliest_end_ms, last) <= window.end_ms <= date.latest_end_ms:
                assert (date.start_ms, date.end_ms) == (window.start_ms, window.end_ms)
            last = date.end_ms


@given(lives())
def test_the_true_end_lies_within_the_bounds(life: tuple[list[Window], list[tuple[int, int]]]) -> None:
    windows, truth = life
    for date, (_, true_end) in zip(dated(windows), truth, strict=True):
        assert date.earliest_end_ms <= true_end <= date.latest_end_ms
