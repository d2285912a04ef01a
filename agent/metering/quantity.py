"""What a meter counts, as a position that moves: time, distance, energy or events.

Pure. Nobody knows a position exactly: an odometer shows whole steps, frames come now
and then, and some are lost. So a position is a pair of bounds, in fine units
(nanoseconds for time, thousandths of the unit for everything else), and the
difference of two positions is bounded as well (`least`, `most`). All are integers.

Signals that fall silent, or whose frames were lost, have no value for that stretch of
time (`Course`); what may have been used in it widens the bounds for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

from agent.features.conditions import Condition
from agent.model import MeterKind, SignalBatch, SignalInfo, SignalValue
from agent.signals import units

FINE: Final = 1_000
"""Fine units in a metre, a milliwatt-hour or an event."""
FINE_TIME: Final = 1_000_000
"""Nanoseconds in a millisecond."""
MARGIN: Final = (12, 10)
"""A cross-check (speed, power) may be wrong by a fifth, to either side."""
FASTEST_M_PER_H: Final = 500_000
"""No road vehicle is faster: what bounds a way while the speed signal says nothing."""
STRONGEST_MILLIWATT: Final = 4_000_000_000
"""No vehicle takes more than 4 MW (Megawatt Charging System, 3.75 MW): what bounds unknown energy."""
READINGS: Final[Mapping[MeterKind, tuple[str, int]]] = MappingProxyType(
    {
        MeterKind.DURATION: ("", 1),
        MeterKind.DISTANCE: ("km", 1_000),
        MeterKind.ENERGY: ("kWh", 1_000_000),
        MeterKind.COUNT: ("", 1),
    }
)
"""By kind: the unit of an odometer or counter (VSS), and how many units of the meter one of it is."""
MAX_READING: Final = 2**53
"""Highest reading of a counter, in its unit; beyond it, floats are no whole numbers any more."""
BRAKING_MM_PER_S2: Final = 15_000
"""No road vehicle brakes harder: what bounds a way before the first frame of the speed that is known."""
MOST_EVENTS_PER_H: Final = 36_000
"""Events come no more often than ten times a second, unless the catalogue says so (`at_most_per_h`)."""
_NS_PER_H: Final = 3_600_000_000_000


class Position(NamedTuple):
    """Bounds of a cumulative amount at a moment, in fine units.

    Args:
        lo, hi: the amount is between them, but for what `wide` says.
        wide: by how much the bounds of all later positions were moved apart up to here,
            because something was not seen: never goes back.
    """

    lo: int
    hi: int
    wide: int = 0


def least(begin: Position, end: Position) -> int:
    """What was used between two positions at least; below 0, nothing is certain."""
    return end.lo - begin.hi - (end.wide - begin.wide)


def most(begin: Position, end: Position) -> int:
    """What was used between two positions at most."""
    return end.hi - begin.lo


class Quantity(Protocol):
    """Something that a meter counts. Times never go back."""

    names: tuple[str, ...]
    """VSS names of the signals that say it."""
    per_unit: int
    """Fine units in one unit of the meter."""
    reason: str
    """GapReason name of what last moved the bounds apart."""

    def open(self, now_ns: int, last: Mapping[str, SignalValue], seen_ns: Mapping[str, int]) -> None:
        """Begins at a moment.

        Args:
            last: latest value of each signal, however old.
            seen_ns: when that was last seen, monotonic.
        """
        ...

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """Takes what the bus brought."""
        ...

    def frontier(self, now_ns: int) -> int:
        """Up to when everything that was said is known."""
        ...

    def at(self, time_ns: int) -> Position:
        """The position at a moment that is not before that of the last call."""
        ...


class Course:
    """What some signals said over time; None where a signal was silent or its frames were lost."""

    def __init__(self, names: Iterable[str], infos: Mapping[str, SignalInfo]) -> None:
        """Starts without values; a signal that no bus brings never has one."""
        self._ages = {name: infos[name].max_age_ns if name in infos else 0 for name in names}
        self.seen_ns: dict[str, int] = {}
        self.values: dict[str, SignalValue | None] = dict.fromkeys(self._ages)
        """Values at the moment up to which changes were popped."""
        self.queue: list[tuple[str, SignalValue | None, int, int]] = []
        """Changes to come: name, value, time, and the time up to which the value before held."""
        self._last: dict[str, SignalValue] = {}
        self._silent: set[str] = set()

    def open(self, now_ns: int, last: Mapping[str, SignalValue], seen_ns: Mapping[str, int]) -> None:
        """As `Quantity.open`."""
        for name, max_age_ns in self._ages.items():
            if name in last and name in seen_ns:
                self._last[name], self.seen_ns[name] = last[name], seen_ns[name]
                if now_ns - seen_ns[name] > max_age_ns:
                    self._silent.add(name)
                else:
                    self.values[name] = last[name]

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """Takes what the bus brought; holes become values of None."""
        changes: list[tuple[str, SignalValue | None, int, int]] = []
        for name in self._ages:
            for _, value, at_ns, before_ns in batch.by_name.get(name, ()):
                changes.append((name, value, at_ns, at_ns if before_ns is None else before_ns))
        for name, max_age_ns in self._ages.items():
            heard_ns, seen_ns = self.seen_ns.get(name), batch.seen_ns.get(name)
            if seen_ns is not None and seen_ns != heard_ns:
                begin_ns = self._hole(name, heard_ns, seen_ns, batch)
                if begin_ns is not None:
                    changes = self._with_hole(changes, name, begin_ns, seen_ns)
                self.seen_ns[name] = heard_ns = seen_ns
            if heard_ns is not None and now_ns - heard_ns > max_age_ns and name not in self._silent:
                self._silent.add(name)
                changes.append((name, None, heard_ns, heard_ns))
        if changes:
            self._last.update((name, value) for name, value, _, _ in changes if value is not None)
            self.queue += changes
            self.queue.sort(key=_time_of)

    def _hole(self, name: str, before_ns: int | None, seen_ns: int, batch: SignalBatch) -> int | None:
        """Where a hole began that ends now; -1: it is open already; None: there is none."""
        if name in self._silent:
            self._silent.discard(name)
            return -1
        if name in batch.broken:
            return max(batch.broken[name], -1 if before_ns is None else before_ns)
        if before_ns is not None and seen_ns - before_ns > self._ages[name]:
            return before_ns
        return None

    def _with_hole(
        self, changes: list[tuple[str, SignalValue | None, int, int]], name: str, begin_ns: int, end_ns: int
    ) -> list[tuple[str, SignalValue | None, int, int]]:
        """Leaves out what a signal said within a hole, except what it says at its end."""
        own = [change for change in changes if change[0] == name]
        kept = [change for change in changes if change[0] != name or change[2] <= begin_ns]
        if begin_ns >= 0:
            kept.append((name, None, begin_ns, begin_ns))
        last = own[-1][1] if own else self._last.get(name)
        return [*kept, (name, last, end_ns, end_ns)]

    def frontier(self, now_ns: int) -> int:
        """Up to when every signal was heard; those that are silent hold nothing up."""
        heard = [seen for name, seen in self.seen_ns.items() if name not in self._silent]
        return min(now_ns, *heard) if heard else now_ns

    def pop(self, until_ns: int) -> list[tuple[str, SignalValue | None, int, int]]:
        """The changes up to a moment, in their order; `values` is brought up by whoever applies them."""
        queue = self.queue
        if not queue or queue[0][2] > until_ns:
            return []
        count = next((i for i, change in enumerate(queue) if change[2] > until_ns), len(queue))
        popped = queue[:count]
        del queue[:count]
        return popped


def _time_of(change: tuple[str, SignalValue | None, int, int]) -> int:
    return change[2]


class Elapsed:
    """Time itself, ns; known exactly."""

    names: tuple[str, ...] = ()
    per_unit = FINE_TIME
    reason = "SIGNAL"

    def open(self, now_ns: int, last: Mapping[str, SignalValue], seen_ns: Mapping[str, int]) -> None:
        """Nothing is needed."""

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """Nothing is heard."""

    def frontier(self, now_ns: int) -> int:
        """Everything is known."""
        return now_ns

    def at(self, time_ns: int) -> Position:
        """The moment itself."""
        return Position(time_ns, time_ns)


class Integral:
    """A rate added up over time: distance from km/h, energy from W. The rate is not below 0."""

    per_unit = FINE
    reason = "SIGNAL"

    def __init__(
        self,
        name: str | None,
        infos: Mapping[str, SignalInfo],
        *,
        unit: str,
        fastest_per_h: int,
        margin: tuple[int, int] = (1, 1),
    ) -> None:
        """Adds up one signal.

        Args:
            name: VSS name; None: there is none, and only `fastest_per_h` is known.
            unit: in which `fastest_per_h` is a thousand in an hour: km/h, or W (whose
                thousand is a mW, so that hours make mWh).
            fastest_per_h: units (m or mWh) in an hour that are never exceeded.
            margin: the truth is within value * margin and value / margin, and one step.
        """
        self.names: tuple[str, ...] = (name,) if name else ()
        self._course = Course(self.names, infos)
        info = infos.get(name or "")
        # Without a unit, or with one that is not known, it is taken to be VSS's own.
        self._factor = units.factor(info.unit if info else "", unit) or 1.0
        self._step = info.resolution if info and margin == (1, 1) else 0.0
        self._unit = unit
        self._fastest = fastest_per_h * FINE
        self._margin = margin
        self._rates: tuple[int, int] | None = None
        """Fine units in an hour, at least and at most; None: unknown."""
        self._time_ns = 0
        self._low = self._high = 0
        """Fine units times ns/h."""

    def open(self, now_ns: int, last: Mapping[str, SignalValue], seen_ns: Mapping[str, int]) -> None:
        """As `Quantity.open`."""
        self._time_ns = now_ns
        self._course.open(now_ns, last, seen_ns)
        for name in self.names:
            self._rates = self._rates_of(self._course.values[name])

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """As `Quantity.observe`."""
        self._course.observe(batch, now_ns)

    def frontier(self, now_ns: int) -> int:
        """As `Quantity.frontier`."""
        return self._course.frontier(now_ns)

    def most_before(self, elapsed_ns: int) -> int:
        """The most in so long a time before the start, fine units; a vehicle may have braked meanwhile."""
        rate = self._fastest if self._rates is None else min(self._fastest, self._rates[1])
        braked = BRAKING_MM_PER_S2 * elapsed_ns**2 // (2 * 10**18) if self._unit == "km/h" else 0
        return -(-rate * elapsed_ns // _NS_PER_H) + braked

    def at(self, time_ns: int) -> Position:
        """As `Quantity.at`."""
        self._advance(time_ns)
        low, high = self._low // _NS_PER_H, -(-self._high // _NS_PER_H)
        return Position(high, high, high - low)

    def _advance(self, time_ns: int) -> None:
        for _, value, at_ns, before_ns in self._course.pop(time_ns):
            self._add(before_ns, self._rates)
            rates = self._rates_of(value)
            self._add(at_ns, _either(self._rates, rates))
            self._rates = rates
        if self._course.queue:
            # The next frame shows another rate: from the frame before it on, it may be that one.
            _, value, _, before_ns = self._course.queue[0]
            if before_ns < time_ns:
                self._add(before_ns, self._rates)
                self._add(time_ns, _either(self._rates, self._rates_of(value)))
        self._add(time_ns, self._rates)

    def _add(self, until_ns: int, rates: tuple[int, int] | None) -> None:
        elapsed_ns = until_ns - self._time_ns
        if elapsed_ns > 0:
            low, high = rates or (0, self._fastest)
            self._low += low * elapsed_ns
            self._high += high * elapsed_ns
            self._time_ns = until_ns

    def _rates_of(self, value: SignalValue | None) -> tuple[int, int] | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        up, down = self._margin
        low = math.floor((value - self._step) * self._factor * 1000 * FINE * down / up)
        high = math.ceil((value + self._step) * self._factor * 1000 * FINE * up / down)
        return max(0, min(low, self._fastest)), max(0, min(high, self._fastest))


def _either(first: tuple[int, int] | None, second: tuple[int, int] | None) -> tuple[int, int] | None:
    """The bounds of a rate that is one of two, or between them."""
    if first is None or second is None:
        return None
    return min(first[0], second[0]), max(first[1], second[1])


class Cumulative:
    """A reading that grows: an odometer, an energy meter, a count that an ECU keeps.

    Between two steps of the reading its rate (speed, power) says where the position is;
    the rate bounds every step as well. A reading that goes back, or runs ahead of what the
    rate allows, belongs to another counter, or to one that was set: what was used between
    the two is bounded by the rate, and counting goes on from the new reading.
    """

    per_unit = FINE

    def __init__(
        self,
        name: str,
        infos: Mapping[str, SignalInfo],
        rate: Integral,
        *,
        kind: MeterKind,
        wraps_at: int = 0,
    ) -> None:
        """Follows one signal.

        Args:
            name: VSS name.
            rate: how fast it can grow.
            kind: of the meter.
            wraps_at: reading at which the counter begins at 0 again; 0: it does not.
        """
        self.names: tuple[str, ...] = (name, *rate.names)
        self.reason = "SIGNAL"
        self._name, self._rate = name, rate
        info = infos.get(name)
        self._max_age_ns = info.max_age_ns if info else 0
        unit, per_reading = READINGS[kind]
        factor = units.factor(info.unit if info else "", unit) or 1.0
        self._fine = factor * per_reading * FINE
        step = round((info.resolution if info else 0.0) * self._fine)
        # A count of whole events is exact; of anything else the part below a step is not shown.
        self._step = max(step, FINE) if unit else max(0, step - FINE)
        self._wrap = round(wraps_at * self._fine)
        self._queue: list[tuple[int | None, int, int]] = []
        """Readings to come, in fine units, with their times and those of the frames before."""
        self._seen_ns = -1
        self._last: int | None = None
        """Latest reading, of those to come as well."""
        self._before: int | None = None
        """The one that was known at the start."""
        self._opened_ns = self._early = 0
        """The start, and what may have been used between the last reading and it."""
        self._reading: int | None = None
        self._slack = 0
        """What may have been used beyond `_base` while there is no reading, besides the rate."""
        self._base = self._wide = 0
        """Position of reading 0, or the position while there is no reading; and `Position.wide`."""
        self._since = self._heard = self._first = Position(0, 0)
        """The rate's positions: of the last reading taken; up to where it was heard; at the start."""
        self._floor = 0
        """Position at the start."""
        self._stepped: tuple[Position, Position] | None = None
        """The rate's positions at the frame that showed the last step, and at the frame before it."""
        self._time_ns = 0

    @property
    def reading(self) -> int | None:
        """Latest reading up to the present moment, or before the start; whole units of the meter."""
        reading = self._before if self._reading is None else self._reading
        return None if reading is None else reading // FINE

    def open(self, now_ns: int, last: Mapping[str, SignalValue], seen_ns: Mapping[str, int]) -> None:
        """As `Quantity.open`."""
        self._time_ns = self._opened_ns = now_ns
        self._rate.open(now_ns, last, seen_ns)
        self._since = self._heard = self._first = self._rate_at(now_ns)
        if self._name in last and self._name in seen_ns:
            self._seen_ns = seen_ns[self._name]
            self._last = self._before = self._parsed(last[self._name])
            age_ns = now_ns - self._seen_ns
            if age_ns <= 0:
                self._reading = self._last
            elif age_ns <= self._max_age_ns:
                # What was used since it was heard is declared; what is counted begins with the next reading.
                self._early = self._step + self._rate.most_before(age_ns)
        self._floor = self._reading or 0

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """As `Quantity.observe`."""
        self._rate.observe(batch, now_ns)
        for _, value, at_ns, before_ns in batch.by_name.get(self._name, ()):
            self._last = self._parsed(value)
            self._queue.append((self._last, at_ns, -1 if before_ns is None else before_ns))
        seen_ns = batch.seen_ns.get(self._name, self._seen_ns)
        if seen_ns > self._seen_ns:
            self._seen_ns = seen_ns
            if self._reading is None and not self._queue:
                self._queue.append((self._last, seen_ns, seen_ns))  # it says again what it said before

    def frontier(self, now_ns: int) -> int:
        """As `Quantity.frontier`; a reading that has fallen silent holds nothing up: its next one tells."""
        ends_ns = self._rate.frontier(now_ns)
        is_silent = now_ns - self._seen_ns > self._max_age_ns
        return ends_ns if is_silent else min(ends_ns, self._seen_ns)

    def at(self, time_ns: int) -> Position:
        """As `Quantity.at`."""
        while self._queue and self._queue[0][1] <= time_ns:
            reading, at_ns, before_ns = self._queue.pop(0)
            self._hear(before_ns)
            self._take(reading, self._rate_at(at_ns))
        heard_ns = self._queue[0][2] if self._queue else self._seen_ns
        self._hear(min(time_ns, heard_ns))
        here = self._rate_at(time_ns)
        if self._reading is None:
            early = self._early if time_ns <= self._opened_ns else 0
            high = self._base + self._slack + most(self._since, here)
            return Position(self._base - early, high, self._wide)
        position = self._base + self._reading
        low, high = position, position + self._step
        if heard_ns < time_ns:
            high += self._unheard(here)
        if self._stepped is not None:
            shown, before = self._stepped
            low = min(position + self._step, position + max(0, least(shown, here)))
            high = min(high, position + most(before, here))
        # An odometer that goes to and fro, or runs while the vehicle stands, counts no more than the rate.
        low = min(low, self._floor + self._step + self._wide + most(self._first, here))
        return Position(min(low, high), high, self._wide)

    def _unheard(self, here: Position) -> int:
        """What may have been used since the reading was last heard."""
        shown = None
        if self._queue and self._reading is not None:
            reading = self._queue[0][0]
            # The next frame is known: no more was used by now than by then.
            if reading is not None:
                moved = reading - self._reading
                shown = moved if moved >= 0 else moved + self._wrap if self._wrap else None
        grown = most(self._heard, here)
        return grown if shown is None else min(grown, shown)

    def _hear(self, time_ns: int) -> None:
        """Notes where the rate was when the reading was still heard."""
        if time_ns >= self._time_ns:
            self._heard = self._rate_at(time_ns)

    def _take(self, reading: int | None, here: Position) -> None:
        """Takes the next reading."""
        before = self._reading
        if reading is None:
            if before is not None:
                self._base, self._slack = self._base + before, self._step
                self._since = self._heard
                self._reading = self._stepped = None
            return
        if before is None:
            self._begin_at(reading, self._slack + most(self._since, here))
        else:
            moved, possible = reading - before, most(self._since, here) + 2 * self._step
            if (
                self._wrap
                and moved < 0
                and moved + self._wrap <= (possible if self._rate else self._wrap // 2)
            ):
                self._base, moved = self._base + self._wrap, moved + self._wrap
            if not 0 <= moved <= possible:
                self._base += before
                self.reason = "COUNTER"
                self._begin_at(reading, self._step + most(self._heard, here))
            elif moved > 0:
                self._stepped = (here, self._heard)
        self._reading, self._since = reading, here

    def _begin_at(self, reading: int, used: int) -> None:
        """Goes on from a reading that says nothing of what was used before it, at most `used`."""
        self._base += used - reading
        self._wide += used + self._step
        self._stepped = None

    def _rate_at(self, time_ns: int) -> Position:
        self._time_ns = max(self._time_ns, time_ns)
        return self._rate.at(self._time_ns)

    def _parsed(self, value: SignalValue) -> int | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_READING:
            return None
        return round(value * self._fine)


class Edges:
    """How often a condition came true, and stayed true for a while."""

    per_unit = FINE
    reason = "SIGNAL"

    def __init__(self, condition: Condition, infos: Mapping[str, SignalInfo], *, debounce_ns: int) -> None:
        """Counts one condition.

        Args:
            debounce_ns: for so long it must stay true to count; it bounds how often it may have
                come true while nobody saw it, as MOST_EVENTS_PER_H does.
        """
        self.names: tuple[str, ...] = condition.spec.inputs
        self._condition, self._debounce_ns = condition, debounce_ns
        self._course = Course(self.names, infos)
        self._holds: bool | None = None
        self._since_ns = 0
        """When it became unknown, if it is."""
        self._risen: tuple[int, int] | None = None
        """The frame that showed it true, and the frame before, while it is not counted yet."""
        self._count = self._wide = 0
        self._time_ns = 0

    def open(self, now_ns: int, last: Mapping[str, SignalValue], seen_ns: Mapping[str, int]) -> None:
        """As `Quantity.open`."""
        self._time_ns = self._since_ns = now_ns
        self._course.open(now_ns, last, seen_ns)
        self._holds = self._condition.evaluate(self._course.values)

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """As `Quantity.observe`."""
        self._course.observe(batch, now_ns)

    def frontier(self, now_ns: int) -> int:
        """As `Quantity.frontier`."""
        return self._course.frontier(now_ns)

    def at(self, time_ns: int) -> Position:
        """As `Quantity.at`."""
        for name, value, at_ns, before_ns in self._course.pop(time_ns):
            self._course.values[name] = value
            self._settle(at_ns - 1)
            self._judge(at_ns, before_ns)
        self._settle(time_ns)
        high = self._count
        if self._risen is not None and self._risen[1] < time_ns:
            high += 1
        if self._holds is None:
            high += self._unseen(time_ns)
        elif any(before_ns < time_ns for _, _, _, before_ns in self._course.queue[:1]):
            high += 1  # the next frame may show that it had come true by now
        return Position(self._count * FINE, high * FINE, self._wide * FINE)

    def _judge(self, at_ns: int, before_ns: int) -> None:
        before, self._holds = self._holds, self._condition.evaluate(self._course.values)
        if self._holds is before:
            return
        if before is None:
            unseen = self._unseen(at_ns)
            self._count += unseen
            self._wide += unseen
        elif self._holds is None:
            self._since_ns = at_ns
        self._risen = (at_ns, before_ns) if self._holds and before is False else None

    def _settle(self, time_ns: int) -> None:
        """Counts what has stayed true for long enough by a moment."""
        if self._risen is not None and time_ns >= self._risen[0] + self._debounce_ns:
            self._count += 1
            self._risen = None

    def _unseen(self, time_ns: int) -> int:
        """How often it may have come true since it is unknown; what was not counted yet is among it."""
        spacing_ns = max(self._debounce_ns, _NS_PER_H // MOST_EVENTS_PER_H)
        return max(0, time_ns - self._since_ns) // spacing_ns + 1
