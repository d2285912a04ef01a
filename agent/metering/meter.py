"""Meters: how long, or how far, a feature was really used.

Pure. All results are integers, and every result is a pair (value, gap): the
truth lies in [value, value + gap]. Value counts only what frames confirm:
time between two frames that both show the condition met, distance between two
odometer readings less the step in which the edge fell. Whatever lies between
the frames around an edge, in a silence longer than a signal's maximum age, or
behind an implausible odometer, goes into the gap.

Limit: a state that comes and goes between two frames of a signal, less than its
maximum age apart, is not seen; the age is chosen below the shortest state.

Changes are settled in the order of their frames, and only up to the frontier:
the moment up to which every input was heard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.features.conditions import Condition
from agent.model import (
    MeterKind,
    MeterSpec,
    SignalBatch,
    SignalChange,
    SignalInfo,
    SignalValue,
    odometer_metres,
)

Dimensions = tuple[tuple[str, str], ...]
"""Dimension names and values, sorted by name."""

SPEED_MARGIN = 1.2
"""An odometer that runs more than 20 % ahead of the speed signal is implausible."""
FASTEST_KMH = 500.0
"""No road vehicle is faster: what bounds a way while the speed signal says nothing."""
DAY_NS = 24 * 3600 * 1_000_000_000
_NS_PER_MS = 1_000_000
_NS_PER_H = 3_600_000_000_000


@dataclass(slots=True)
class Total:
    """Use within one window: nanoseconds (duration) or metres (distance).

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
class _Segment:
    """A run of one status of a distance meter, by odometer, from `start_ns` on."""

    first_m: int
    start_ns: int
    billed_m: int = 0


class _TopSpeed:
    """The fastest that the speed signal said since the last odometer reading."""

    def __init__(self, max_age_ns: int) -> None:
        self._max_age_ns = max_age_ns
        self._now_kmh: float | None = None
        self._top_kmh: float | None = None
        self._seen_ns: int | None = None
        self._silent_until_ns: int | None = None
        """End of the latest hole since that reading; None: there was none."""

    def hear(self, seen_ns: int | None, *, is_broken: bool = False) -> None:
        """Takes when the signal was heard; a hole longer than its maximum age bounds nothing.

        Args:
            is_broken: frames were lost since it was heard before.
        """
        if seen_ns is None:
            return
        if is_broken or self._seen_ns is None or seen_ns - self._seen_ns > self._max_age_ns:
            self._silent_until_ns = seen_ns
        self._seen_ns = seen_ns

    def take(self, value: SignalValue | None) -> None:
        """Takes a value in km/h."""
        if isinstance(value, int | float):
            self._now_kmh = float(value)
            self._top_kmh = max(self._top_kmh or 0.0, self._now_kmh)

    def restart(self, at_ns: int) -> None:
        """The odometer was read: from here on only what comes counts."""
        self._top_kmh = self._now_kmh
        if self._silent_until_ns is not None and self._silent_until_ns <= at_ns:
            self._silent_until_ns = None

    def metres(self, elapsed_ns: int, until_ns: int) -> float:
        """The farthest way in that time."""
        silent = self._seen_ns is None or until_ns - self._seen_ns > self._max_age_ns
        unknown = self._top_kmh is None or silent or self._silent_until_ns is not None
        top_kmh = FASTEST_KMH if unknown else (self._top_kmh or 0.0) * SPEED_MARGIN
        return top_kmh * 1000 * max(0, elapsed_ns) / _NS_PER_H


class Meter:
    """One meter of one feature while the feature is on."""

    def __init__(
        self, spec: MeterSpec, infos: Mapping[str, SignalInfo], confirmation: SignalInfo | None = None
    ) -> None:
        """Compiles the meter's conditions.

        Args:
            spec: from the signed catalogue.
            infos: units, steps and maximum ages of the signals.
            confirmation: what, besides the signals, must be heard for use to
                count: the ECU's own word that the feature is on.

        Raises:
            ConditionError: an expression does not compile.
        """
        self.spec = spec
        self._infos = {**infos, confirmation.name: confirmation} if confirmation else infos
        self._condition = Condition.compile(spec.condition) if spec.condition else None
        self._dimensions = tuple(
            (d.name, tuple((value, Condition.compile(c)) for value, c in d.values)) for d in spec.dimensions
        )
        inputs = list(spec.condition.inputs) if spec.condition else []
        for dimension in spec.dimensions:
            for _, condition in dimension.values:
                inputs += condition.inputs
        if spec.kind is MeterKind.DISTANCE and spec.odometer:
            inputs.append(spec.odometer)
        if confirmation is not None:
            inputs.append(confirmation.name)
        self.inputs = tuple(dict.fromkeys(inputs))
        self._known = frozenset(self.inputs) | ({spec.speed} if spec.speed else frozenset())
        ages = [self._infos[name].max_age_ns for name in self._known if name in self._infos]
        self.shortest_age_ns = min(ages, default=DAY_NS)
        """Shortest age at which one of its signals counts as silent."""
        self.totals: dict[Dimensions, Total] = {}
        self.mark_ns = 0
        """Everything before this moment is settled."""
        self.odometer_m: int | None = None
        """Latest odometer reading that was settled."""
        self._values: dict[str, SignalValue | None] = {}
        self._seen: dict[str, int] = {}
        self._queue: list[SignalChange] = []
        self._status: Dimensions | None = None
        self._unknown = True
        self._segment: _Segment | None = None
        self._odometer_at_ns = 0
        speed = infos.get(spec.speed or "")
        self._top_speed = _TopSpeed(speed.max_age_ns if speed else 0)
        self._run_m = 0
        self._run_at_ns = 0
        self._allowed_m = 0.0
        self._counted_m = 0

    # --- life ------------------------------------------------------------

    def open(
        self,
        now_ns: int,
        values: Mapping[str, SignalValue | None],
        seen: Mapping[str, int],
        *,
        unsure_ns: int = 0,
    ) -> None:
        """Begins to meter.

        Args:
            now_ns: moment from which the feature is known to be on.
            values: known values of the signals at that moment.
            seen: when each signal was last heard, monotonic.
            unsure_ns: how long before now it may have been on already, such
                as from the request to the read-back that confirmed it.
        """
        self.mark_ns = now_ns
        self._values = {n: values.get(n) for n in self._known}
        self._seen = {n: seen[n] for n in self.inputs if n in seen}
        self._top_speed.hear(seen.get(self.spec.speed or ""))
        self._top_speed.take(self._values.get(self.spec.speed or ""))
        self._top_speed.restart(now_ns)
        self.odometer_m = odometer_metres(self._values.get(self.spec.odometer or ""))
        self._odometer_at_ns = now_ns
        self._unknown = self._lacks_value()
        self._status = None if self._unknown else self._judge()
        if self.spec.kind is MeterKind.DURATION:
            self._total(self._key()).add_gap(unsure_ns, "EDGE")
        elif self._unknown:
            self._declare_edges("SIGNAL")
        else:
            self._open_segment()

    def observe(self, batch: SignalBatch, now_ns: int) -> None:
        """Takes what the bus brought, in the order of its frames."""
        for change in batch.changes:
            if change.name in self._known:
                self._queue.append(change)
        self._queue.sort(key=lambda c: c.at_ns)
        self._hear(batch)
        speed = self.spec.speed or ""
        self._top_speed.hear(batch.seen_ns.get(speed), is_broken=speed in batch.broken)
        frontier_ns = self._frontier(now_ns)
        if self._is_silent(now_ns):
            if not self._unknown:
                self._replay(frontier_ns)
            self._skip(now_ns, heard=False)
        elif self._unknown:
            self._skip(frontier_ns, heard=True)
        else:
            self._replay(frontier_ns)

    def close(self, now_ns: int) -> None:
        """Ends metering: what was not confirmed until now is declared."""
        self._bound_unread(now_ns)
        self._skip(now_ns, heard=False, reason="EDGE")
        self._queue.clear()

    def totals_now(self) -> dict[Dimensions, Total]:
        """Totals in ms or m since the last `take`, without ending the window."""
        if self.spec.kind is MeterKind.DISTANCE:
            return {k: t for k, t in self.totals.items() if t.value or t.gap}
        rounded = {
            k: Total(t.value // _NS_PER_MS, -(-t.gap // _NS_PER_MS), t.reason, t.largest)
            for k, t in self.totals.items()
        }
        return {k: t for k, t in rounded.items() if t.value or t.gap}

    def take(self) -> dict[Dimensions, Total]:
        """Returns the totals in ms or m since the last call, and starts anew.

        Fractions of a millisecond stay for the next window, so that a sum
        over windows loses nothing.
        """
        taken = self.totals_now()
        rest = {k: Total(t.value % _NS_PER_MS) for k, t in self.totals.items()}
        self.totals = {} if self.spec.kind is MeterKind.DISTANCE else rest
        return taken

    # --- settling --------------------------------------------------------

    def _frontier(self, now_ns: int) -> int:
        """Up to when every input was heard."""
        if not self.inputs:
            return now_ns
        # An odometer that has fallen silent holds nothing up: its next reading closes the hole.
        odometer = self._odometer_name()
        inputs = [n for n in self.inputs if n != odometer or not self._is_old(n, now_ns)]
        if any(n not in self._seen for n in inputs):
            return self.mark_ns
        return min((self._seen[n] for n in inputs), default=now_ns)

    def _hear(self, batch: SignalBatch) -> None:
        """Takes when each input was heard.

        A hole becomes a gap: nothing heard for longer than its maximum age, or
        frames lost in between, which may have said something else.
        """
        holes: list[tuple[str, int]] = []
        begins: list[int | None] = []
        for name in self.inputs:
            seen = batch.seen_ns.get(name)
            if seen is None:
                continue
            before = self._seen.get(name)
            is_long = before is None or seen - before > self._infos[name].max_age_ns
            # Two readings of an odometer tell the distance between them, however far apart.
            if (is_long or name in batch.broken) and name != self._odometer_name():
                if not is_long and before is not None:
                    before = self._seen[name] = max(before, batch.broken[name])
                holes.append((name, seen))
                begins.append(before)
            else:
                self._seen[name] = seen
        if not holes:
            return
        known = [before for before in begins if before is not None]
        if len(known) == len(begins) and not self._unknown:
            self._replay(min(*known, self._frontier(min(known))))
        self._seen.update(holes)
        self._skip(max(seen for _, seen in holes), heard=True)

    def _is_silent(self, now_ns: int) -> bool:
        """Whether an input is too old to say what is going on now."""
        return any(self._is_old(n, now_ns) for n in self.inputs if n != self._odometer_name())

    def _is_old(self, name: str, now_ns: int) -> bool:
        return name not in self._seen or now_ns - self._seen[name] > self._infos[name].max_age_ns

    def _lacks_value(self) -> bool:
        return any(self._values[n] is None for n in self.inputs if n != self._odometer_name())

    def _odometer_name(self) -> str | None:
        return self.spec.odometer if self.spec.kind is MeterKind.DISTANCE else None

    def _skip(self, until_ns: int, *, heard: bool, reason: str = "SIGNAL") -> None:
        """Declares everything up to a moment: nothing in it is known.

        Args:
            heard: the inputs are known again from that moment on.
            reason: GapReason name.
        """
        if until_ns > self.mark_ns:
            key = self._key()
            if not self._unknown and reason != "EDGE":
                self._declare_edges(reason)
            first_m, first_ns = self.odometer_m, self._odometer_at_ns
            self._absorb(until_ns)
            if self.spec.kind is MeterKind.DURATION:
                self._total(key).add_gap(until_ns - self.mark_ns, reason)
            elif self.odometer_m is not None and self._odometer_at_ns > first_ns:
                moved_m = self._possible_m(self._odometer_at_ns - first_ns, self._odometer_at_ns)
                if first_m is not None and 0 <= self.odometer_m - first_m < moved_m:
                    moved_m = self.odometer_m - first_m
                self._total(key).add_gap(moved_m, reason)
            self.mark_ns = until_ns
        else:
            self._absorb(until_ns)
        self._unknown = not heard or self._lacks_value()
        self._status = None if self._unknown else self._judge()
        self._segment = None
        if self.spec.kind is MeterKind.DISTANCE:
            self._open_segment()

    def _absorb(self, until_ns: int) -> None:
        """Takes the values of changes without counting."""
        for change in self._queue:
            if change.at_ns > until_ns:
                break
            self._values[change.name] = change.value
            self._note_speed(change)
            if change.name == self._odometer_name():
                self.odometer_m, self._odometer_at_ns = odometer_metres(change.value), change.at_ns
        self._queue = [c for c in self._queue if c.at_ns > until_ns]

    def _replay(self, until_ns: int) -> None:
        """Applies the changes up to a moment in their order, and counts up to it."""
        taken = 0
        for change in self._queue:
            if change.at_ns > until_ns:
                break
            taken += 1
            self._apply(change)
        del self._queue[:taken]
        self._settle(until_ns)
        self._bill_run()

    def _apply(self, change: SignalChange) -> None:
        """Settles up to a change, then takes its value."""
        self._values[change.name] = change.value
        if change.name == self._odometer_name():
            self._odometer(odometer_metres(change.value), change)
            return
        self._note_speed(change)
        status = self._judge()
        if status == self._status:
            self._bill_run()
            return
        confirmed_ns = min(max(self.mark_ns, change.previous_seen_ns or 0), change.at_ns)
        if self._run_at_ns <= confirmed_ns:
            self._bill_run()
        elif self._segment is not None and self._status is not None:
            # The reading came after the last frame that confirmed the status.
            self._total(self._status).add_gap(self._run_m - self._segment.billed_m, "EDGE")
        self._settle(confirmed_ns)
        unsure_ns = max(0, change.at_ns - self.mark_ns)
        if self.spec.kind is MeterKind.DURATION:
            for key in (self._status, status):
                if key is not None:
                    self._total(key).add_gap(unsure_ns, "EDGE")
        self.mark_ns = max(self.mark_ns, change.at_ns)
        if self._status is not None:
            self._bound_unread(change.at_ns)
            self._declare_straddling(change.at_ns)
        self._status = status
        if self.spec.kind is MeterKind.DISTANCE:
            self._open_segment()

    def _settle(self, until_ns: int) -> None:
        """Counts the confirmed time up to a moment."""
        if until_ns <= self.mark_ns:
            return
        if self._status is not None and self.spec.kind is MeterKind.DURATION:
            self._total(self._status).value += until_ns - self.mark_ns
        self.mark_ns = until_ns

    # --- odometer ----------------------------------------------------------

    def step_m(self) -> int:
        """Step of the odometer, metres, rounded up; 1 if it is unknown."""
        info = self._infos.get(self.spec.odometer or "")
        return max(1, math.ceil(round(info.resolution * 1000, 6))) if info else 1

    def _open_segment(self) -> None:
        """Begins a run at the present reading; its two edges are declared at once."""
        self._segment, self._run_m = None, 0
        if self._status is None or self.odometer_m is None:
            return
        self._segment = _Segment(self.odometer_m, self.mark_ns)
        self._declare_edges("EDGE")

    def _declare_edges(self, reason: str) -> None:
        """Declares a step at each edge of a run, and one for the age of the readings around them."""
        if self.spec.kind is MeterKind.DISTANCE:
            self._total(self._key()).add_gap(3 * self.step_m(), reason)

    def _odometer(self, reading_m: int | None, change: SignalChange) -> None:
        """Takes a reading; what it adds is billed once the status is known to have held."""
        at_ns = change.at_ns
        before_m, before_ns = self.odometer_m, self._odometer_at_ns
        self.odometer_m, self._odometer_at_ns = reading_m, at_ns
        possible_m = self._possible_m(at_ns - before_ns, at_ns)
        self._top_speed.restart(at_ns)
        self._allowed_m += possible_m - 2 * self.step_m()
        if reading_m is None:
            self._segment = None
            return
        if before_m is None:
            self._total(self._key()).add_gap(possible_m, "SIGNAL")
            self._open_segment()
            return
        if self._status is None or self._segment is None:
            return
        moved_m = reading_m - before_m
        if not 0 <= moved_m <= possible_m:
            # Reset, replaced, rolled over, or jumped: not billed, and bounded by the speed.
            self._total(self._status).add_gap(possible_m, "SIGNAL")
            self._open_segment()
            return
        if (change.previous_seen_ns or 0) < self._segment.start_ns:
            # No frame between the start of the run and this reading: a part of it was before.
            self._total(self._status).add_gap(moved_m, "EDGE")
            self._segment.first_m = reading_m
            return
        # The true position is known to a step: without the step of the first edge
        # the run is never more than what was driven.
        self._run_m, self._run_at_ns = reading_m - self._segment.first_m - self.step_m(), at_ns

    def _bill_run(self) -> None:
        """Counts the run up to the latest reading."""
        segment = self._segment
        if segment is None or self._status is None or self._run_m <= segment.billed_m:
            return
        more_m = self._run_m - segment.billed_m
        segment.billed_m = self._run_m
        # The speed bounds the sum as well: an odometer that goes to and fro bills no parked car.
        left_m = max(0, math.ceil(self._allowed_m) - self._counted_m)
        counted_m = min(more_m, left_m)
        self._counted_m += counted_m
        self._total(self._status).value += counted_m
        self._total(self._status).add_gap(more_m - counted_m, "SIGNAL")

    def _declare_straddling(self, end_ns: int) -> None:
        """Declares the reading that follows the end of a run, if no frame stood between them."""
        for change in self._queue:
            if change.name == self._odometer_name() and change.at_ns >= end_ns:
                reading_m = odometer_metres(change.value)
                if reading_m is not None and self.odometer_m is not None:
                    self._total(self._key()).add_gap(reading_m - self.odometer_m, "EDGE")
                return

    def _bound_unread(self, now_ns: int) -> None:
        """Declares the way since the odometer fell silent, as far as the speed allows."""
        odometer = self._odometer_name()
        if odometer is None:
            return
        if not self._is_old(odometer, now_ns):
            return
        for change in self._queue:
            self._note_speed(change)
        heard_ns = self._seen.get(odometer)
        possible_m = self._possible_m(now_ns - max(self._odometer_at_ns, heard_ns or 0), now_ns)
        self._total(self._key()).add_gap(possible_m, "SIGNAL")

    def _possible_m(self, elapsed_ns: int, until_ns: int) -> int:
        """Farthest that the speed signal allows, metres."""
        return math.ceil(self._top_speed.metres(elapsed_ns, until_ns)) + 2 * self.step_m()

    # --- judging -------------------------------------------------------------

    def _judge(self) -> Dimensions | None:
        """Dimensions under which use counts now; None if it does not."""
        if self._condition is not None and self._condition.evaluate(self._values) is not True:
            return None
        key = []
        for name, choices in self._dimensions:
            value = next((v for v, c in choices if c.evaluate(self._values) is True), "unknown")
            key.append((name, value))
        return tuple(sorted(key))

    def _key(self) -> Dimensions:
        """Under what a gap is declared: the present dimensions, or "unknown"."""
        if self._status is not None:
            return self._status
        return tuple(sorted((name, "unknown") for name, _ in self._dimensions))

    def _total(self, key: Dimensions) -> Total:
        return self.totals.setdefault(key, Total())

    def _note_speed(self, change: SignalChange) -> None:
        if change.name == self.spec.speed:
            self._top_speed.take(change.value)


@dataclass(frozen=True, slots=True)
class OpenWindow:
    """What the journal keeps of a window that is still open, for a crash.

    Args:
        mark_ns: monotonic moment up to which it is settled.
        mark_ms: the same in trusted Unix milliseconds.
        odometer: VSS name of the odometer of a distance meter.
        odometer_m: its latest settled reading.
        totals: (dimensions, value, gap, reason) in ms or m.
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
