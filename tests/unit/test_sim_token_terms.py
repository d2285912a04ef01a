"""Dates and distances of tokens: by the ECU's own measure they end a right, by the bus they only rest it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.sim_world import (
    INSTALL,
    NO_LIMIT,
    RELEASE,
    MemoryStore,
    S,
    ask,
    read_back,
    seat_module,
    token,
    vehicle,
)

from firmware_sim.ecu import EcuState, Reason, Right, SeatModule, Store, StoreError
from firmware_sim.measures import ODOMETER, UNIX_TIME, BusSignal
from firmware_sim.store import FileStore
from firmware_sim.token import Term

T0 = 1_800_000_000
DAY = 86_400
ON = (1, 0)


class Own:
    """A clock and an odometer that the ECU believes."""

    def __init__(self, time_s: int | None = T0, odometer_m: int | None = 1_000_000) -> None:
        self.time_s = time_s
        self.odometer_m = odometer_m

    def seat(self, store: Store | None = None) -> SeatModule:
        store = MemoryStore() if store is None else store
        return seat_module(store, clock=lambda: self.time_s, odometer=lambda: self.odometer_m)


def wake(seat: SeatModule, now_ns: int = 0) -> tuple[int, int]:
    """Ignition off and on; state and reason after it."""
    seat.terminal_15(on=False, now_ns=now_ns)
    seat.terminal_15(on=True, now_ns=now_ns)
    return read_back(seat, now_ns)[:2]


def say(seat: SeatModule, now_ns: int, *, time_s: int | None = None, odometer_m: int | None = None) -> None:
    """The bus says a value twice, as it does in every second of a drive."""
    for _ in range(2):
        if time_s is not None:
            seat.hear_time(time_s, now_ns)
        if odometer_m is not None:
            seat.hear_odometer(odometer_m, now_ns)


# --- the ECU's own measures ---


def advance_time(own: Own, by: int) -> None:
    own.time_s = T0 + by


def advance_distance(own: Own, by: int) -> None:
    own.odometer_m = 1_000_000 + by


@pytest.mark.parametrize(
    ("terms", "advance", "last", "reason"),
    [
        ({1: T0 + 100}, advance_time, 100, 7),
        ({2: 3}, advance_time, 3 * DAY - 1, 8),
        ({3: 5000}, advance_distance, 4999, 9),
        ({4: [1_000_000, 1_000_500]}, advance_distance, 499, 10),
    ],
    ids=["not after", "days", "distance", "odometer range"],
)
def test_an_own_measure_ends_the_right_for_good_at_the_wake_up_after_its_last_moment(
    terms: dict[int, int | list[int]], advance: Callable[[Own, int], None], last: int, reason: int
) -> None:
    own = Own()
    seat = own.seat()
    ask(seat, INSTALL + token(1, terms=terms))
    assert wake(seat) == ON
    advance(own, last)
    assert wake(seat) == ON
    advance(own, last + 1)
    assert read_back(seat)[:2] == ON  # never while it is awake
    assert wake(seat) == (2, reason)
    advance(own, 0)
    assert wake(seat) == (2, reason)
    ask(seat, INSTALL + token(1, terms=terms))
    assert wake(seat) == (2, reason)
    ask(seat, INSTALL + token(2, terms={5: 9}))
    assert wake(seat) == ON


def test_an_odometer_range_waits_for_its_beginning() -> None:
    own = Own(odometer_m=9_999)
    seat = own.seat()
    ask(seat, INSTALL + token(1, terms={4: [10_000, 20_000]}))
    assert wake(seat) == (0, 10)
    own.odometer_m = 10_000
    assert wake(seat) == ON


def test_an_own_clock_that_is_not_set_holds_the_right_back_if_nothing_else_bounds_it() -> None:
    own = Own(time_s=None)
    bounded, unbounded = own.seat(), own.seat()
    ask(bounded, INSTALL + token(1, terms={2: 1, 5: 2}))
    ask(unbounded, INSTALL + token(1, terms={2: 1}))
    assert (wake(bounded), wake(unbounded)) == (ON, (0, 11))
    own.time_s = T0  # the days begin when the date is known
    assert (wake(bounded), wake(unbounded)) == (ON, ON)
    own.time_s = T0 + DAY
    assert (wake(bounded)[0], wake(unbounded)) == (2, (2, 8))


def test_all_terms_have_to_hold() -> None:
    own = Own()
    seat = own.seat()
    ask(
        seat, INSTALL + token(1, terms={1: T0 + 10 * DAY, 2: 20, 3: 10**6, 4: [0, 10**9], 5: 2, 6: 100, 7: 9})
    )
    assert [wake(seat) for _ in range(3)] == [ON, ON, (2, 4)]


@pytest.mark.parametrize("term", list(Term))
def test_a_profile_without_a_term_refuses_the_token(term: Term) -> None:
    own = Own()
    store = MemoryStore()
    seat = seat_module(
        store, terms=frozenset(Term) - {term}, clock=lambda: own.time_s, odometer=lambda: own.odometer_m
    )
    before = store.state
    value: int | list[int] = [0, 9] if term is Term.ODOMETER_RANGE else 9
    assert ask(seat, INSTALL + token(1, terms={term: value})) == bytes.fromhex("7F3131")
    assert store.state is before


def test_dates_and_distances_survive_the_loss_of_power(tmp_path: Path) -> None:
    own = Own()
    path = tmp_path / "seat.json"
    seat = own.seat(FileStore(path))
    ask(seat, INSTALL + token(1, terms={2: 3, 3: 5000, 4: [0, 10**9]}))
    assert own.seat(FileStore(path)).state == seat.state
    advance_distance(own, 5000)
    again = own.seat(FileStore(path))
    assert wake(again) == (2, 9)
    advance_distance(own, 0)
    assert wake(own.seat(FileStore(path))) == (2, 9)


def test_everything_that_a_right_is_judged_by_is_in_the_file(tmp_path: Path) -> None:
    right = Right(
        counter=3,
        sha256="ab",
        allowed=True,
        terms={4: (5, 6), 5: 9},
        accepted_s=T0,
        accepted_m=7,
        ended=Reason.DISTANCE_USED,
        is_final=True,
        waits=Reason.OUT_OF_ODOMETER_RANGE,
    )
    state = EcuState(token_keys={2: bytes(32)}, rights={1: right}, heard_s=T0 + 1, heard_m=8)
    store = FileStore(tmp_path / "seat.json")
    store.save(state)
    assert store.load() == state


def test_a_state_file_of_another_format_is_refused_and_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "seat.json"
    FileStore(path).save(EcuState())
    path.write_text(path.read_text().replace('"format": 3', '"format": 1'))
    with pytest.raises(StoreError, match="format 1, expected 3"):
        FileStore(path).load()


# --- the bus's word ---


@pytest.mark.parametrize("terms", [{1: T0}, {2: 1}, {3: 1}, {4: [0, 1]}, {1: T0, 8: 100}])
def test_an_advisory_limit_alone_is_refused(terms: dict[int, int | list[int]]) -> None:
    store = MemoryStore()
    seat = seat_module(store)
    before = store.state
    assert ask(seat, INSTALL + token(1, terms=terms)) == bytes.fromhex("7F3131")
    assert store.state is before


@pytest.mark.parametrize(
    ("terms", "inside", "outside", "reason"),
    [
        ({1: T0 + 100}, {"time_s": T0 + 100}, {"time_s": T0 + 101}, 7),
        ({2: 3}, {"time_s": T0 + 3 * DAY - 1}, {"time_s": T0 + 3 * DAY}, 8),
        ({3: 5000}, {"odometer_m": 4999}, {"odometer_m": 5000}, 9),
        ({4: [0, 700]}, {"odometer_m": 699}, {"odometer_m": 700}, 10),
    ],
    ids=["not after", "days", "distance", "odometer range"],
)
def test_an_advisory_limit_rests_the_right_and_is_judged_again_at_each_wake_up(
    terms: dict[int, int | list[int]], inside: dict[str, int], outside: dict[str, int], reason: int
) -> None:
    seat = seat_module(MemoryStore())
    say(seat, 0, time_s=T0, odometer_m=0)
    ask(seat, INSTALL + token(1, terms={**terms, 5: 4}))
    say(seat, 0, **inside)
    assert wake(seat) == ON
    say(seat, 0, **outside)
    assert read_back(seat)[:2] == ON  # never while it is awake
    assert wake(seat) == (2, reason)
    say(seat, 0, **inside)
    assert wake(seat) == ON
    # Each wake-up was counted, the resting one too.
    assert read_back(seat)[3] == 1
    assert [wake(seat), wake(seat)] == [ON, (2, 4)]


def test_a_resting_right_that_is_released_does_not_come_back_by_itself() -> None:
    seat = seat_module(MemoryStore())
    say(seat, 0, time_s=T0 + 1)
    ask(seat, INSTALL + token(1, terms={1: T0, 5: 9}))
    assert wake(seat) == (2, 7)
    assert ask(seat, RELEASE) == bytes.fromhex("71010F0E000102")
    say(seat, 0, time_s=T0)
    assert wake(seat) == (0, 2)


def test_a_bus_that_says_nothing_leaves_the_right_to_the_counted_limit() -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1, terms={1: T0, 2: 1, 3: 1, 4: [5, 6], 5: 2}))
    assert [wake(seat) for _ in range(3)] == [ON, ON, (2, 4)]


def test_what_the_bus_said_in_the_last_drive_judges_the_next_wake_up_after_a_loss_of_power() -> None:
    store = MemoryStore()
    seat = seat_module(store)
    ask(seat, INSTALL + token(1, terms={1: T0, 5: 9}))
    assert wake(seat) == ON
    say(seat, 0, time_s=T0 + 1, odometer_m=5)
    seat.terminal_15(on=False, now_ns=0)
    assert (store.state.heard_s, store.state.heard_m) == (T0 + 1, 5)
    assert wake(seat_module(store)) == (2, 7)


def test_values_that_nothing_is_judged_by_are_not_written() -> None:
    store = MemoryStore()
    seat = seat_module(store)
    ask(seat, INSTALL + token(1))
    wake(seat)
    say(seat, 0, time_s=T0, odometer_m=5)
    wake(seat)
    assert (store.state.heard_s, store.state.heard_m) == (None, None)


def test_an_end_by_an_own_measure_is_final_although_the_bus_ends_it_too() -> None:
    own = Own()
    seat = seat_module(MemoryStore(), odometer=lambda: own.odometer_m)
    say(seat, 0, time_s=T0 + 1)
    ask(seat, INSTALL + token(1, terms={1: T0, 3: 10, 5: 9}))
    assert wake(seat) == (2, 7)
    advance_distance(own, 10)
    assert wake(seat) == (2, 9)
    say(seat, 0, time_s=T0)
    advance_distance(own, 0)
    assert wake(seat) == (2, 9)


def test_the_vehicles_own_odometer_frames_are_heard() -> None:
    seat = seat_module(MemoryStore())
    car = vehicle(seat, odometer_m=500_000)
    car.ignition(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={3: 1000, 5: 9}))
    car.drive(0, 300, 0)
    car.step(300 * S)
    car.ignition(on=False, now_ns=300 * S)
    assert seat.state.heard_m is not None
    assert 500_000 + 3_000 < car.odometer_m - 20 <= seat.state.heard_m <= car.odometer_m
    car.ignition(on=True, now_ns=301 * S)
    # The first wake-up that knew the odometer is where the distance begins.
    assert read_back(seat, 301 * S)[:2] == ON
    car.drive(0, 300, 301 * S)
    car.step(601 * S)
    car.ignition(on=False, now_ns=601 * S)
    car.ignition(on=True, now_ns=602 * S)
    assert read_back(seat, 602 * S) == (2, 9, 1, 7, NO_LIMIT)


@pytest.mark.parametrize(
    ("heard", "plausible"),
    [
        ([(0, T0)], None),
        ([(0, T0), (1, T0 + 1)], T0 + 1),
        ([(0, T0), (1, T0 + 4)], None),
        ([(0, T0), (1, T0 - 3)], None),
        ([(0, T0), (5, T0)], None),
        ([(0, T0), (11, T0 + 11)], None),
        ([(0, T0), (1, 2**31), (2, T0 + 2), (3, T0 + 3)], T0 + 3),
        ([(0, 5), (1, 6)], None),
        ([(0, 2**32), (1, 2**32 + 1)], None),
    ],
)
def test_a_date_is_plausible_if_it_fits_the_one_before(
    heard: list[tuple[int, int]], plausible: int | None
) -> None:
    signal = BusSignal(UNIX_TIME)
    for second, value in heard:
        signal.hear(value, second * S)
    assert signal.plausible == plausible


@pytest.mark.parametrize(
    ("heard", "plausible"),
    [
        ([(0, 100), (1, 100)], 100),
        ([(0, 100), (1, 210)], 210),
        ([(0, 100), (1, 211)], None),
        ([(0, 100), (1, 90)], None),
        ([(0, 100), (1, 100), (2, 0), (3, 100)], 100),
        ([(0, 100), (1, 2**32)], None),
    ],
)
def test_an_odometer_is_plausible_if_it_fits_the_one_before(
    heard: list[tuple[int, int]], plausible: int | None
) -> None:
    signal = BusSignal(ODOMETER)
    for second, value in heard:
        signal.hear(value, second * S)
    assert signal.plausible == plausible
