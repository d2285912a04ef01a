"""Meters: how long, how far, how much or how often a feature was really used.

Pure. All results are integers, and every result is a pair (value, gap): the
truth lies in [value, value + gap]. Value counts only what frames confirm. Whatever
lies between the frames around an edge, in a silence longer than a signal's maximum
age, or behind an implausible reading, goes into the gap.

A meter knows two things: under which dimensions use counts now (the status, from
the conditions), and where the quantity stands (`agent.metering.quantity`). A run
is a stretch of one status. It is certain between the first frame that shows it and
the last one that does, and possible from the frame before to the one after.

Limit: a state that comes and goes between two frames of a signal, less than its
maximum age apart, is not seen; the age is chosen below the shortest state.

Changes are settled in the order of their frames, and only up to the frontier:
the moment up to which every signal was heard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from agent.errors import ConditionError
from agent.features.conditions import Condition
from agent.metering.quantity import (
    FASTEST_M_PER_H,
    MARGIN,
    MOST_EVENTS_PER_H,
    STRONGEST_MILLIWATT,
    Course,
    Cumulative,
    Edges,
    Elapsed,
    Integral,
    Position,
    Quantity,
    least,
    most,
)
from agent.model import ConditionSpec, MeterKind, MeterSpec, SignalBatch, SignalInfo, SignalValue

Dimensions = tuple[tuple[str, str], ...]
"""Dimension names and values, sorted by name."""

DAY_NS = 24 * 3600 * 1_000_000_000
_NS_PER_MS = 1_000_000


@dataclass(slots=True)
class Total:
    """Use within one window, in the unit of the meter or in fine units.

    Args:
        value: confirmed.
        gap: possible beyond it.
        reason: GapReason name of the largest contribution to the gap.
        unbounded: no bound of the gap is known.
    """

    value: int = 0
    gap: int = 0
    reason: str = ""
    largest: int = 0
    unbounded: bool = False

    def add_gap(self, amount: int, reason: str) -> None:
        """Declares more; the reason of the largest part is kept."""
        if amount <= 0:
            return
        self.gap += amount
        if amount > self.largest:
            self.largest, self.reason = amount, reason


@dataclass(slots=True)
class _Run:
    """A stretch of one status.

    Args:
        key: under what use counts, or is declared; None: it does not count.
        is_known: the status is known; else everything in it is declared.
        earliest, begin: where it began, at the earliest and for certain.
        billed, declared: fine units of it in the totals so far.
        wide: `Position.wide` up to which it is declared.
    """

    key: Dimensions | None
    is_known: bool
    earliest: Position
    begin: Position
    wide: int
    billed: int = 0
    declared: int = 0


class Meter:
    """One meter of one feature while the feature is on."""

    def __init__(
        self,
        spec: MeterSpec,
        infos: Mapping[str, SignalInfo],
        confirmation: SignalInfo | None = None,
        compiled: Callable[[ConditionSpec], Condition] = Condition.compile,
    ) -> None:
        """Compiles the meter's conditions.

        Args:
            spec: from the signed catalogue.
            infos: units, steps and maximum ages of the signals.
            confirmation: what, besides the signals, must be heard for use to
                count: the ECU's own word that the feature is on.
            compiled: gives the condition of an expression; meters may share them.

        Raises:
            ConditionError: an expression does not compile.
        """
        self.spec = spec
        infos = {**infos, confirmation.name: confirmation} if confirmation else infos
        counts_edges = spec.kind is MeterKind.COUNT and spec.counter is None
        status = spec.condition if not counts_edges else None
        self._condition = compiled(status) if status else None
        self._dimensions = tuple(
            (d.name, tuple((value, compiled(c)) for value, c in d.values)) for d in spec.dimensions
        )
        names = list(status.inputs) if status else []
        for dimension in spec.dimensions:
            for _, condition in dimension.values:
                names += condition.inputs
        if confirmation is not None:
            names.append(confirmation.name)
        self._course = Course(dict.fromkeys(names), infos)
        self._quantity = quantity_of(spec, infos)
        self.inputs = tuple(dict.fromkeys([*names, *self._quantity.names]))
        """VSS names of all signals that it reads."""
        ages = [infos[name].max_age_ns for name in self.inputs if name in infos]
        self.shortest_age_ns = min(ages, default=DAY_NS)
        """Shortest age at which one of its signals counts as silent."""
        self.mark_ns = 0
        """Everything before this moment is settled."""
        self.totals: dict[Dimensions, Total] = {}
        """In fine units."""
        start = Position(0, 0)
        self._run = _Run(None, is_known=False, earliest=start, begin=start, wide=0)
        self._edge_ns, self._edge_begin = 0, start
        """The last frame that changed the status, and the position at the frame before it."""

    @property
    def reading(self) -> int | None:
        """Latest settled reading of the odometer or counter, in the meter's unit; None if there is none."""
        return self._quantity.reading if isinstance(self._quantity, Cumulative) else None

    # --- life ------------------------------------------------------------

    def open(
        self,
        now_ns: int,
        last: Mapping[str, SignalValue],
        seen_ns: Mapping[str, int],
        *,
        unsure_ns: int = 0,
    ) -> None:
        """Begins to meter.

        Args:
            now_ns: moment from which the feature is known to be on.
            last: latest value of each signal, however old.
            seen_ns: when each signal was last heard, monotonic.
            unsure_ns: how long before now it may have been on already, such
                as from the request to the read-back that confirmed it.
        """
        self.mark_ns = now_ns
        self._course.open(now_ns, last, seen_ns)
        self._quantity.open(now_ns - unsure_ns, last, seen_ns)
        earliest, begin = self._quantity.at(now_ns - unsure_ns), self._quantity.at(now_ns)
        self._edge_ns, self._edge_begin = now_ns, earliest
        self._begin(earliest, begin)
        if unsure_ns and self._run.key is None:
            # What the status was before this moment, nobody saw.
            self._total(self._unknown_key()).add_gap(most(earliest, begin), "EDGE")

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """Takes what the bus brought, in the order of its frames."""
        course, quantity = self._course, self._quantity
        course.observe(batch, now_ns)
        quantity.observe(batch, now_ns)
        until_ns = min(course.frontier(now_ns), quantity.frontier(now_ns))
        if until_ns <= self.mark_ns and not (course.queue and course.queue[0][2] <= self.mark_ns):
            return
        until_ns = max(until_ns, self.mark_ns)
        for name, value, at_ns, before_ns in course.pop(until_ns):
            course.values[name] = value
            self._judge(max(at_ns, self.mark_ns), before_ns)
        self._settle(self._run, quantity.at(until_ns))
        self.mark_ns = until_ns

    def close(self, now_ns: int) -> None:
        """Ends metering: what was not confirmed until now is declared."""
        certain = self._quantity.at(self.mark_ns)
        self.mark_ns = max(now_ns, self.mark_ns)
        if self._run.key is None:
            # It may have begun to count since the last frame.
            self._course.values = dict.fromkeys(self._course.values)
            self._begin(certain, certain)
        here = self._quantity.at(self.mark_ns)
        self._end(certain, here)
        self._run = _Run(None, is_known=True, earliest=here, begin=here, wide=here.wide)
        for total in self.totals.values():
            # There is no window that a fraction of a unit could wait for.
            rest = total.value % self._quantity.per_unit
            total.value -= rest
            total.add_gap(rest, "EDGE")

    def totals_now(self) -> dict[Dimensions, Total]:
        """Totals in the meter's unit since the last `take`, without ending the window."""
        per_unit = self._quantity.per_unit
        totals = {}
        for key, fine in self.totals.items():
            value, gap = fine.value // per_unit, -(-fine.gap // per_unit)
            if value or gap:
                totals[key] = Total(value, gap, fine.reason, fine.largest)
        return totals

    def take(self) -> dict[Dimensions, Total]:
        """Returns the totals in the meter's unit since the last call, and starts anew.

        Fractions of a unit stay for the next window, so that a sum over
        windows loses nothing.
        """
        taken = self.totals_now()
        rest = {key: fine.value % self._quantity.per_unit for key, fine in self.totals.items()}
        self.totals = {key: Total(value) for key, value in rest.items() if value}
        return taken

    # --- runs ------------------------------------------------------------

    def _judge(self, at_ns: int, before_ns: int) -> None:
        """Ends a run and begins the next, if a frame changed the status."""
        key, is_known = self._status()
        run = self._run
        if is_known == run.is_known and (key == run.key or not is_known):
            return
        certain_ns = min(max(before_ns, self.mark_ns), at_ns)
        certain = self._quantity.at(certain_ns)
        shown = self._quantity.at(at_ns)
        # Two signals that change close together may have done so in either order.
        earliest = self._edge_begin if before_ns < self._edge_ns else certain
        self._end(certain, shown)
        self._edge_ns, self._edge_begin = at_ns, earliest
        self.mark_ns = at_ns
        self._begin(earliest, shown)

    def _status(self) -> tuple[Dimensions | None, bool]:
        """Under which dimensions use counts now, None if it does not; and whether that is known."""
        values = self._course.values
        if None in values.values():
            return None, False
        if self._condition is not None and self._condition.evaluate(values) is not True:
            return None, True
        if not self._dimensions:
            return (), True
        key = []
        for name, choices in self._dimensions:
            value = next((v for v, c in choices if c.evaluate(values) is True), "unknown")
            key.append((name, value))
        return tuple(sorted(key)), True

    def _begin(self, earliest: Position, begin: Position) -> None:
        key, is_known = self._status()
        if not is_known:
            before = self._run.key
            key = (
                tuple(sorted((name, "unknown") for name, _ in self._dimensions)) if before is None else before
            )
        self._run = run = _Run(key, is_known, earliest, begin, begin.wide)
        if key is None:
            return
        reason = "EDGE" if is_known else "SIGNAL"
        self._declare(run, most(earliest, begin), reason)

    def _settle(self, run: _Run, here: Position) -> None:
        """Counts a run up to a position that is certain to be within it."""
        if run.key is None:
            return
        if run.is_known:
            value = least(run.begin, here)
            if value > run.billed:
                self._total(run.key).value += value - run.billed
                run.billed = value
            if here.wide > run.wide:
                self._declare(run, here.wide - run.wide, self._quantity.reason)
                run.wide = here.wide
        else:
            self._declare(run, most(run.earliest, here) - run.declared, "SIGNAL")

    def _end(self, certain: Position, shown: Position) -> None:
        """Ends the run: certain up to one position, possible up to another."""
        run = self._run
        self._settle(run, certain)
        if run.key is not None:
            open_ = most(run.earliest, shown) - run.billed - run.declared
            self._declare(run, open_, "EDGE" if run.is_known else "SIGNAL")

    def _declare(self, run: _Run, amount: int, reason: str) -> None:
        if amount > 0 and run.key is not None:
            self._total(run.key).add_gap(amount, reason)
            run.declared += amount

    def _unknown_key(self) -> Dimensions:
        """Under what is declared of which the dimensions are not known."""
        return tuple(sorted((name, "unknown") for name, _ in self._dimensions))

    def _total(self, key: Dimensions) -> Total:
        return self.totals.setdefault(key, Total())


def quantity_of(spec: MeterSpec, infos: Mapping[str, SignalInfo]) -> Quantity:
    """What a meter of the catalogue counts.

    Raises:
        ConditionError: a condition does not compile, or the meter names nothing to count.
    """
    ceiling = spec.at_most_per_h
    match spec.kind:
        case MeterKind.DURATION:
            return Elapsed()
        case MeterKind.DISTANCE if spec.odometer:
            fastest = ceiling or FASTEST_M_PER_H
            speed = Integral(spec.speed, infos, unit="km/h", fastest_per_h=fastest, margin=MARGIN)
            return Cumulative(spec.odometer, infos, speed, kind=spec.kind)
        case MeterKind.ENERGY if spec.counter:
            strongest = ceiling or STRONGEST_MILLIWATT
            power = Integral(spec.power, infos, unit="W", fastest_per_h=strongest, margin=MARGIN)
            return Cumulative(spec.counter, infos, power, kind=spec.kind, wraps_at=spec.wraps_at)
        case MeterKind.ENERGY if spec.power:
            return Integral(spec.power, infos, unit="W", fastest_per_h=ceiling or STRONGEST_MILLIWATT)
        case MeterKind.COUNT if spec.counter:
            rate = Integral(None, infos, unit="", fastest_per_h=ceiling or MOST_EVENTS_PER_H)
            return Cumulative(spec.counter, infos, rate, kind=spec.kind, wraps_at=spec.wraps_at)
        case MeterKind.COUNT if spec.condition:
            condition = Condition.compile(spec.condition)
            return Edges(condition, infos, debounce_ns=spec.debounce_ms * _NS_PER_MS)
    raise ConditionError(f"meter {spec.meter_id}: nothing to count is named")


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """What the journal keeps of a window that is still open, for a crash.

    Args:
        mark_ns: monotonic moment up to which it is settled.
        mark_ms: the same in trusted Unix milliseconds.
        odometer: VSS name of the odometer or counter, if there is one.
        odometer_m: its latest settled reading, in the meter's unit.
        totals: (dimensions, value, gap, reason) in the meter's unit.
    """

    feature_id: str
    meter_id: str
    entitlement_id: str
    account: str
    trace_id: str
    kind: MeterKind
    start_ms: int
    mark_ns: int
    mark_ms: int
    odometer: str | None
    odometer_m: int | None
    totals: tuple[tuple[Dimensions, int, int, str], ...] = field(default=())
