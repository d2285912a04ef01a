"""The comparison of an ECU's count with what was metered, at its edges: to the millisecond."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.readings import (
    BACK,
    BLOCK_MS,
    DECLARED,
    EXCESS,
    EXECUTION_MS,
    TOLERANCE_MS,
    Reading,
    ReadingRow,
    with_reading,
    with_record,
)
from openfod.usage.v1 import usage_pb2

UID, OTHER = bytes(16), b"\x01" * 16


def test_the_figures_are_those_of_the_contract() -> None:
    assert (TOLERANCE_MS, EXECUTION_MS, BLOCK_MS) == (5_000, 200, 36_000_000)
    assert (EXCESS, DECLARED, BACK) == ("reading-excess", "reading-declared", "reading-back")


class Book:
    """A row, and what was found."""

    def __init__(self) -> None:
        self.row = ReadingRow("seat-heating")
        self.found: list[str] = []
        self._window = 0

    def meter(self, value: int, gap: int = 0, *, unbounded: bool = False, same_window: bool = False) -> None:
        """One record; of a window of its own, or of the one before."""
        self._window += not same_window
        record = usage_pb2.UsageRecord(
            value=value, gap=gap, gap_unbounded=unbounded, window_end_ms=self._window
        )
        self.row = with_record(self.row, record)

    def read(
        self, reading: int, on_ms: int, executions: int | None = 0, token: int = 1, uid: bytes = UID
    ) -> str:
        """A reading; the kind of what does not fit."""
        said = Reading(b"signed", uid, 1, reading, token, on_ms, executions)
        self.row, finding = with_reading(self.row, said, 7)
        self.found += [finding[0]] if finding else []
        return finding[0] if finding else ""


@pytest.fixture
def book() -> Book:
    """A book with a first reading at 0 in an empty window."""
    book = Book()
    book.meter(0)
    assert book.read(1, 0) == ""
    return book


def test_the_first_reading_compares_nothing() -> None:
    book = Book()
    assert book.read(4_000_000, 10**9) == ""
    assert (book.row.is_verified, book.row.on_ms, book.row.stored_ms) == (True, 10**9, 7)
    assert (book.row.content, book.row.token_counter) == (b"signed", 1)


def test_a_reading_that_could_not_be_verified_is_no_ground_for_a_comparison() -> None:
    book = Book()
    book.row = replace(book.row, ecu_uid=UID, content=b"unverified", reading=900, on_ms=0)
    book.meter(0)
    assert book.read(1, 10**9) == ""
    assert (book.row.reading, book.row.is_verified) == (1, True)


def test_an_ecu_that_starts_anew_begins_a_block_of_its_own(book: Book) -> None:
    book.meter(0, BLOCK_MS)
    assert book.read(2, BLOCK_MS - 1) == ""
    assert book.read(1, 5, uid=OTHER) == ""
    assert (book.row.block_on_ms, book.row.block_value_ms) == (0, 0)
    book.meter(BLOCK_MS // 2)
    assert book.read(2, 6, uid=OTHER) == ""
    assert (book.row.block_on_ms, book.row.block_value_ms) == (1, BLOCK_MS // 2)
    assert book.read(3, 4, uid=OTHER) == BACK
    assert (book.row.block_on_ms, book.row.block_value_ms) == (0, 0)


@pytest.mark.parametrize("metered", [(100_000, 0), (0, 100_000), (60_000, 40_000)])
def test_the_tolerance_is_kept_to_the_millisecond(book: Book, metered: tuple[int, int]) -> None:
    allowed = 100_000 + TOLERANCE_MS + 105  # a thousandth of it for the clocks
    book.meter(*metered)
    within = replace(book.row)
    assert book.read(2, allowed) == ""
    book.row = within
    assert book.read(2, allowed + 1) == EXCESS


def test_each_execution_has_its_edge(book: Book) -> None:
    book.meter(0)
    within = book.row
    assert book.read(2, TOLERANCE_MS + 10 * EXECUTION_MS + 7, executions=10) == ""
    book.row = within
    assert book.read(2, TOLERANCE_MS + 10 * EXECUTION_MS + 8, executions=10) == EXCESS


def test_only_the_executions_since_the_last_reading_have_one(book: Book) -> None:
    book.meter(0)
    assert book.read(2, 0, executions=100) == ""
    assert book.read(3, TOLERANCE_MS + EXECUTION_MS + 7, executions=101) == EXCESS


def test_the_clocks_may_drift_by_a_thousandth(book: Book) -> None:
    book.meter(0)
    hour_ms = 3_600_000
    book.meter(hour_ms)
    within = book.row
    assert book.read(2, hour_ms + TOLERANCE_MS + 3608) == ""
    book.row = within
    assert book.read(2, hour_ms + TOLERANCE_MS + 3609) == EXCESS


def test_an_ecu_that_counts_no_executions_has_none(book: Book) -> None:
    book.meter(0)
    assert book.read(2, TOLERANCE_MS + 10, executions=None) == EXCESS


def test_the_tolerance_is_given_once_and_not_in_each_span(book: Book) -> None:
    kinds = []
    for n in range(1, 12):
        book.meter(0)
        kinds.append(book.read(n + 1, n * 500))
    assert kinds == [""] * 10 + [EXCESS]


def test_what_was_metered_too_much_in_one_span_hides_nothing_in_the_next(book: Book) -> None:
    book.meter(10**7)
    book.meter(0)
    assert book.read(2, 0) == ""
    book.meter(0)
    assert book.read(3, TOLERANCE_MS + 100) == EXCESS


def test_the_window_that_carries_a_reading_counts_on_both_sides_once() -> None:
    book = Book()
    book.meter(1)
    book.meter(40_000, 20_000)
    book.meter(7_000, 3_000, same_window=True)  # another dimension of that window
    assert book.read(1, 0) == ""
    book.meter(0)
    assert book.read(2, 70_000) == ""  # all of it may have been behind the reading
    book.meter(0)
    assert book.read(3, 70_000 + TOLERANCE_MS + 76) == EXCESS  # but not again


def test_a_finding_begins_the_comparison_anew(book: Book) -> None:
    book.meter(0)
    assert book.read(2, 10**6) == EXCESS
    book.meter(1000)
    assert book.read(3, 10**6 + 1000) == ""
    assert book.read(4, 10**6 + 1000 + TOLERANCE_MS - 1000) == ""


def test_a_gap_without_a_bound_says_nothing_of_its_span_alone(book: Book) -> None:
    book.meter(0, unbounded=True)
    book.meter(0)
    assert book.read(2, 10**7) == ""
    book.meter(0)
    assert book.read(3, 10**7 + TOLERANCE_MS + 100) == EXCESS


@pytest.mark.parametrize("reading", [1, 3])
def test_a_number_that_was_there_moves_nothing(book: Book, reading: int) -> None:
    book.meter(5)
    assert book.read(3, 5) == ""
    before = book.row
    assert book.read(reading, 10**9) == BACK
    assert book.row is before


def test_counts_that_fall_are_told_and_become_the_new_ground(book: Book) -> None:
    book.meter(10**6)
    assert book.read(2, 10**6, executions=9, token=5) == ""
    assert book.read(3, 10**6 - 1, executions=9, token=5) == BACK
    assert book.row.on_ms == 10**6 - 1
    assert book.read(4, 10**6, executions=8, token=5) == BACK
    assert book.read(5, 10**6, executions=8, token=4) == BACK
    assert book.read(6, 10**6, executions=8, token=4) == ""


def test_another_ecu_starts_anew(book: Book) -> None:
    book.meter(0)
    assert book.read(1, 10**9, uid=OTHER) == ""
    assert book.row.ecu_uid == OTHER
    book.meter(0)
    assert book.read(2, 10**9 + TOLERANCE_MS + 100, uid=OTHER) == EXCESS


@pytest.mark.parametrize(("percent", "kind"), [(79, DECLARED), (80, ""), (100, "")])
def test_a_block_has_to_be_metered_and_not_only_declared(book: Book, percent: int, kind: str) -> None:
    kinds = []
    for n in range(1, 21):
        book.meter(BLOCK_MS // 10 * percent // 100, BLOCK_MS // 10)
        kinds.append(book.read(n + 1, n * BLOCK_MS // 10))
    assert kinds == ([""] * 9 + [kind]) * 2


SPANS = st.lists(
    st.tuples(st.integers(0, 60_000), st.integers(0, 60_000), st.integers(0, 5_000), st.booleans()),
    min_size=1,
    max_size=60,
)


@given(SPANS)
def test_no_honest_account_leads_to_an_excess(spans: list[tuple[int, int, int, bool]]) -> None:
    """Of each window a part is used before its reading, and the rest behind it."""
    book, used_ms, number = Book(), 0, 0
    for before, behind, slack, is_read in spans:
        at_reading = used_ms + before
        used_ms += before + behind
        book.meter(before + behind, slack)
        if is_read:
            number += 1
            book.read(number, at_reading)
    assert EXCESS not in book.found


@given(SPANS, st.integers(TOLERANCE_MS + 1, 10**6))
def test_what_is_kept_back_beyond_the_windows_at_both_ends_is_always_found(
    spans: list[tuple[int, int, int, bool]], stolen: int
) -> None:
    book, used_ms = Book(), 0
    book.meter(0)
    book.read(1, 0)
    allowed = 0
    for before, behind, slack, _ in spans:
        used_ms += before + behind
        allowed += before + behind + slack
        book.meter(before + behind, slack)
    book.meter(0)
    on_ms = allowed + stolen
    assert (book.read(2, on_ms) == EXCESS) == (stolen - on_ms // 1000 > TOLERANCE_MS)
