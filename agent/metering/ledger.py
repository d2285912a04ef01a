"""The books of all meters: sessions at work, windows that close, records in a chain.

Pure. A session is one meter at work under one right. A window is a stretch of a
session; closed, it becomes a record. Windows that are open are handed out at
every checkpoint, so that after a crash what was confirmed becomes a record at
once, and the time since then stays open as a declared gap until the feature is
seen again. A feature is armed before its ECU is asked to switch it on: should
the agent die before the answer, that time is declared as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from agent.features.conditions import Condition
from agent.metering.meter import DAY_NS, Dimensions, Meter, OpenWindow, Total
from agent.metering.quantity import MAX_READING, READINGS
from agent.metering.record import GENESIS_HASH, Head, Record, Use, append
from agent.model import (
    ActuatorKind,
    ConditionSpec,
    Entitlement,
    FeatureSpec,
    MeterKind,
    MeterSpec,
    SignalBatch,
    SignalInfo,
    TrustedTime,
)
from agent.signals import units
from agent.signals.state import SignalState

MAX_AMOUNT = 1_000_000_000_000
"""Most that one record may say of its value or gap, ms or m (the cloud refuses more)."""
CONFIRMATIONS_MISSED = 3
"""After so many read-backs that did not come, nothing says any more that a feature is on."""
OTHER_BOOT_NS = 0
"""Stands for the mark of a window whose boot has ended: no clock of this boot measures from it."""
_NS_PER_MS = 1_000_000

Say = Callable[..., None]
"""Takes (level, message, **fields): how the ledger says what it books."""


@dataclass(slots=True)
class _Session:
    """One meter at work under one right; `start_ms` is when its window began."""

    meter: Meter
    entitlement: Entitlement
    trace_id: str
    start_ms: int
    confirmed_by: str = ""


class Ledger:
    """All usage of this vehicle, from sessions to records."""

    def __init__(self, source: str, infos: Mapping[str, SignalInfo], say: Say) -> None:
        """Starts with an empty journal; `restore` takes over the stored one.

        Args:
            source: the vehicle's pseudonym in records.
            infos: signals that the buses can give.
        """
        self._source = source
        self._infos = infos
        self._say = say
        self.head = Head("", 0, GENESIS_HASH)
        self.used: dict[tuple[str, str], int] = {}
        """Amounts closed under each (entitlement, meter), ms or m."""
        self._own_ids: frozenset[str] | None = None
        self.unsaved: list[Use] = []
        """Closed windows that are no records yet (`take_records`)."""
        self.free: frozenset[str] = frozenset()
        """Features whose use is declared and not billed for now, because it cannot be written down."""
        self._sessions: dict[str, list[_Session]] = {}
        self._conditions: dict[ConditionSpec, Condition] = {}
        self._armed: dict[str, list[OpenWindow]] = {}
        self._confirmed_ns: dict[str, int] = {}
        self._recovered: list[OpenWindow] = []
        self._readings: dict[str, tuple[str, bytes]] = {}
        self._same_boot = False

    # --- start ---------------------------------------------------------------

    def restore(
        self,
        head: Head,
        used: Mapping[tuple[str, str], int],
        windows: tuple[OpenWindow, ...],
        *,
        same_boot: bool,
        now: TrustedTime,
    ) -> None:
        """Takes over a stored journal; what was confirmed in open windows becomes records."""
        self.head, self.used, self._same_boot = head, dict(used), same_boot
        for window in windows:
            for dimensions, value, gap, reason in window.totals:
                total = Total(value, gap, reason)
                end_ms = max(window.start_ms, window.mark_ms)
                self._book(window, dimensions, total, end_ms, signed=now.source == "signed")
            # A later start within this boot must not compare the monotonic time of an earlier one.
            mark_ns = window.mark_ns if same_boot else OTHER_BOOT_NS
            self._recovered.append(replace(window, start_ms=window.mark_ms, mark_ns=mark_ns, totals=()))

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to make durable."""
        return not (self._sessions or self._armed or self._recovered or self.unsaved)

    # --- sessions --------------------------------------------------------------

    @property
    def shortest_age_ns(self) -> int:
        """Shortest of the ages at which a signal that is metered counts as silent; a day if none is."""
        meters = [session.meter for sessions in self._sessions.values() for session in sessions]
        return min((meter.shortest_age_ns for meter in meters), default=DAY_NS)

    def _compiled(self, spec: ConditionSpec) -> Condition:
        """The condition of an expression: meters of many features ask the same of the same values."""
        known = self._conditions.get(spec)
        if known is None:
            known = self._conditions[spec] = Condition.compile(spec)
        return known

    def is_metering(self, feature_id: str) -> bool:
        """Whether sessions of a feature are at work."""
        return feature_id in self._sessions

    def arm(
        self,
        spec: FeatureSpec,
        entitlement: Entitlement,
        signals: SignalState,
        *,
        now_ns: int,
        now: TrustedTime,
    ) -> None:
        """Notes that a feature may be on from now, though nobody has seen it yet."""
        self._armed[spec.feature_id] = [
            _window(
                spec.feature_id,
                meter,
                entitlement,
                self._reading(signals, meter.kind, meter.cumulative, now_ns),
                now_ns=now_ns,
                now=now,
            )
            for meter in spec.meters
        ]

    def disarm(self, feature_id: str) -> None:
        """It is known that the ECU did not switch it on, or sessions have begun."""
        self._armed.pop(feature_id, None)

    def is_armed(self, feature_id: str) -> bool:
        """Whether a feature may be on that nobody has seen."""
        return feature_id in self._armed

    def seen_off(self, feature_id: str, *, now_ns: int, now: TrustedTime) -> None:
        """A feature that may have been on was seen off: the time between is declared."""
        for window in self._armed.pop(feature_id, ()):
            total = Total(reason="EDGE")
            if window.kind is MeterKind.DURATION:
                total.gap = -(-(now_ns - window.mark_ns) // _NS_PER_MS)
            else:
                total.gap = self._step(window)
            end_ms = max(window.start_ms, now.unix_ms)
            self._book(window, (), total, end_ms, signed=now.source == "signed")

    def confirm(self, feature_id: str, now_ns: int) -> None:
        """The ECU itself said that a feature is on."""
        self._confirmed_ns[feature_id] = now_ns

    def start(
        self,
        spec: FeatureSpec,
        entitlement: Entitlement,
        signals: SignalState,
        *,
        unsure_ns: int,
        now_ns: int,
        now: TrustedTime,
    ) -> None:
        """Begins to meter a feature that is seen on; goes on if it is metered already.

        Args:
            unsure_ns: how long before now it may have been on.
        """
        running = self._sessions.get(spec.feature_id)
        if running and running[0].entitlement.entitlement_id == entitlement.entitlement_id:
            return
        self.stop(spec.feature_id, now_ns=now_ns, now=now)
        self.disarm(spec.feature_id)
        sessions = []
        for meter_spec in spec.meters:
            confirmation = _confirmation(spec, meter_spec)
            meter = Meter(meter_spec, self._infos, confirmation, self._compiled)
            last, seen = signals.last, signals.seen_ns
            if confirmation is not None:
                last, seen = {**last, confirmation.name: True}, {**seen, confirmation.name: now_ns}
            meter.open(now_ns, last, seen, unsure_ns=unsure_ns)
            session = _Session(
                meter,
                entitlement,
                self._trace_id(entitlement, meter_spec, now_ns),
                now.unix_ms,
                confirmation.name if confirmation else "",
            )
            sessions.append(session)
            self._say(
                "info",
                "metering has begun",
                feature=spec.feature_id,
                meter=meter_spec.meter_id,
                entitlement=entitlement.entitlement_id,
                trace_id=session.trace_id,
                grant_trace_id=entitlement.trace_id,
                frames_ns={name: signals.seen_ns[name] for name in meter.inputs if name in signals.seen_ns},
            )
        self._sessions[spec.feature_id] = sessions

    def observe(self, batch: SignalBatch, now_ns: int) -> bool:
        """Gives every session what the bus brought.

        Returns:
            True if a meter got its first odometer reading: only with one on
            disk can a crash be bounded.
        """
        first = False
        for feature_id, sessions in self._sessions.items():
            confirmed_ns = self._confirmed_ns.get(feature_id)
            for session in sessions:
                unread = session.meter.reading is None
                heard = batch
                if session.confirmed_by and confirmed_ns is not None:
                    heard = replace(batch, seen_ns={**batch.seen_ns, session.confirmed_by: confirmed_ns})
                session.meter.observe(heard, now_ns)
                first |= unread and session.meter.reading is not None
        return first

    def stop(self, feature_id: str, *, now_ns: int, now: TrustedTime) -> None:
        """Ends the sessions of a feature and closes their windows."""
        for session in self._sessions.get(feature_id, ()):
            session.meter.close(now_ns)
        self._close(feature_id, now)
        self._sessions.pop(feature_id, None)

    def has_reading(self, feature_id: str) -> bool:
        """Whether a reading of a feature still waits for a record."""
        return feature_id in self._readings

    def attach(
        self, spec: FeatureSpec, entitlement: Entitlement, reading: bytes, *, now_ns: int, now: TrustedTime
    ) -> None:
        """Takes what an ECU signed of its own count: the record of its meter that closes next carries it.

        While nothing is metered a record of its own carries it, of no use at all.
        """
        assert spec.reading is not None
        self._readings[spec.feature_id] = (spec.reading.meter_id, reading)
        if not self.is_metering(spec.feature_id):
            meter = next(m for m in spec.meters if m.meter_id == spec.reading.meter_id)
            window = _window(spec.feature_id, meter, entitlement, None, now_ns=now_ns, now=now)
            self._book_all(window, {}, now.unix_ms, signed=now.source == "signed")

    def close_windows(self, now: TrustedTime) -> None:
        """Turns what the sessions counted so far into records; they go on."""
        for feature_id in self._sessions:
            self._close(feature_id, now)

    def used_now(self, entitlement_id: str, meter_id: str) -> int:
        """Amount used under a right, open windows included, ms or m."""
        used = self.used.get((entitlement_id, meter_id), 0)
        for feature_id, sessions in self._sessions.items():
            for session in sessions:
                same = session.entitlement.entitlement_id == entitlement_id
                if same and session.meter.spec.meter_id == meter_id and feature_id not in self.free:
                    used += sum(t.value for t in session.meter.totals_now().values())
        return used

    def keep_only(self, entitlement_ids: frozenset[str]) -> None:
        """Forgets what was used under all other rights, which are a former owner's, and adds up no more."""
        self._own_ids = entitlement_ids
        for key in [key for key in self.used if key[0] not in entitlement_ids]:
            del self.used[key]

    # --- crashes -----------------------------------------------------------------

    def open_windows(self, *, now_ns: int, now: TrustedTime) -> tuple[OpenWindow, ...]:
        """What a crash from now on must not lose."""
        windows = list(self._recovered)
        for armed in self._armed.values():
            windows += armed
        for feature_id, sessions in self._sessions.items():
            for session in sessions:
                meter = session.meter
                totals = {key: self._as_billed(feature_id, t) for key, t in meter.totals_now().items()}
                unsettled_ms = max(0, now_ns - meter.mark_ns) // _NS_PER_MS
                window = self._window_of(feature_id, session)
                windows.append(
                    replace(
                        window,
                        mark_ms=now.unix_ms - unsettled_ms,
                        totals=tuple((key, t.value, t.gap, t.reason) for key, t in totals.items()),
                    )
                )
        return tuple(windows)

    def resolve(
        self, is_seen: Callable[[str], bool], signals: SignalState, *, now_ns: int, now: TrustedTime
    ) -> bool:
        """Declares time in which the agent did not run, once its end is known.

        The end is the moment at which the feature is metered again or its ECU
        reports it off; a distance also needs the odometer.

        Args:
            is_seen: whether a feature is known to be on or off now.

        Returns:
            True if something was declared.
        """
        waiting: list[OpenWindow] = []
        for window in self._recovered:
            reading = self._reading(signals, window.kind, window.odometer, now_ns)
            unread = reading is None and window.odometer_m is not None
            if unread or not is_seen(window.feature_id):
                waiting.append(window)
            else:
                self._declare_down(window, reading, now_ns=now_ns, now=now)
        declared = len(waiting) < len(self._recovered)
        self._recovered = waiting
        return declared

    def give_up_waiting(self, now: TrustedTime, *, of: frozenset[str] | None = None) -> None:
        """Declares, without a bound, what waits for its end to be known: the owner has changed.

        Args:
            of: ids of the rights whose windows are given up; None: all.
        """
        kept = []
        for window in self._recovered:
            if of is not None and window.entitlement_id not in of:
                kept.append(window)
                continue
            total = Total(reason="AGENT_DOWN", unbounded=True)
            end_ms = max(window.start_ms, now.unix_ms)
            self._book(window, (), total, end_ms, signed=now.source == "signed")
        self._recovered = kept

    def _declare_down(
        self, window: OpenWindow, reading: int | None, *, now_ns: int, now: TrustedTime
    ) -> None:
        total = Total(reason="AGENT_DOWN")
        if window.kind is not MeterKind.DURATION:
            before = window.odometer_m
            if reading is None or before is None or reading < before:
                total.unbounded = True
            else:
                total.gap = reading - before + self._step(window)
        elif self._same_boot and window.mark_ns != OTHER_BOOT_NS:
            total.gap = -(-(now_ns - window.mark_ns) // _NS_PER_MS)
        else:
            # Only Unix time bridges a restart of the machine, and only a signed one bounds it.
            total.gap = max(0, now.unix_ms - window.mark_ms)
            total.unbounded = now.source != "signed"
            if not total.unbounded:
                total.gap += now.uncertainty_ms
        end_ms = max(window.mark_ms, now.unix_ms)
        self._book(window, (), total, end_ms, signed=now.source == "signed")

    def _step(self, window: OpenWindow) -> int:
        """Step of a window's odometer or counter, in the meter's unit; 1 if it is not known."""
        scale = self._scale(window.kind, window.odometer)
        info = self._infos.get(window.odometer or "")
        return max(1, math.ceil(round(info.resolution * scale, 6))) if info else 1

    def _scale(self, kind: MeterKind, counter: str | None) -> float:
        """Units of a meter in one unit of its odometer or counter."""
        unit, per_reading = READINGS[kind]
        info = self._infos.get(counter or "")
        return (units.factor(info.unit if info else "", unit) or 1.0) * per_reading

    def _reading(self, signals: SignalState, kind: MeterKind, counter: str | None, now_ns: int) -> int | None:
        """What an odometer or counter says now, in the meter's unit; None if it is unknown."""
        value = signals.value(counter, now_ns) if counter else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_READING:
            return None
        return round(value * self._scale(kind, counter))

    # --- records -------------------------------------------------------------------

    def _close(self, feature_id: str, now: TrustedTime) -> None:
        for session in self._sessions.get(feature_id, ()):
            end_ms = max(session.start_ms, now.unix_ms)
            window = self._window_of(feature_id, session)
            self._book_all(window, session.meter.take(), end_ms, signed=now.source == "signed")
            session.start_ms = end_ms

    def _book_all(
        self, window: OpenWindow, totals: Mapping[Dimensions, Total], end_ms: int, *, signed: bool
    ) -> None:
        """Makes the records of one closed window; the last one carries the reading that waits for it."""
        reading = b""
        if self._readings.get(window.feature_id, ("",))[0] == window.meter_id:
            reading = self._readings.pop(window.feature_id)[1]
            totals = totals or {(): Total()}
        for left, (dimensions, total) in enumerate(totals.items(), 1 - len(totals)):
            billed = self._as_billed(window.feature_id, total)
            self._book(window, dimensions, billed, end_ms, signed=signed, reading=b"" if left else reading)

    def _as_billed(self, feature_id: str, total: Total) -> Total:
        """What is billed of an amount: nothing while the feature goes on free of charge."""
        if feature_id not in self.free:
            return total
        gap = total.gap + total.value
        return Total(0, gap, "JOURNAL" if gap or total.unbounded else "", unbounded=total.unbounded)

    @staticmethod
    def _window_of(feature_id: str, session: _Session) -> OpenWindow:
        """The open window of a session, without its totals."""
        meter = session.meter
        return OpenWindow(
            feature_id=feature_id,
            meter_id=meter.spec.meter_id,
            entitlement_id=session.entitlement.entitlement_id,
            account=session.entitlement.account,
            trace_id=session.trace_id,
            kind=meter.spec.kind,
            start_ms=session.start_ms,
            mark_ns=meter.mark_ns,
            mark_ms=session.start_ms,
            odometer=meter.spec.cumulative,
            odometer_m=meter.reading,
        )

    def _book(
        self,
        window: OpenWindow,
        dimensions: tuple[tuple[str, str], ...],
        total: Total,
        end_ms: int,
        *,
        signed: bool,
        reading: bytes = b"",
    ) -> None:
        """Closes a window; what is beyond any bill is declared as unbounded."""
        unbounded = total.unbounded or max(total.gap, total.value) > MAX_AMOUNT
        use = Use(
            feature_id=window.feature_id,
            meter_id=window.meter_id,
            kind=window.kind,
            entitlement_id=window.entitlement_id,
            account=window.account,
            trace_id=window.trace_id,
            dimensions=dimensions,
            value=min(total.value, MAX_AMOUNT),
            gap=min(total.gap, MAX_AMOUNT),
            gap_reason=total.reason or ("SIGNAL" if unbounded else ""),
            start_ms=window.start_ms,
            end_ms=end_ms,
            signed_clock=signed,
            gap_unbounded=unbounded,
            reading=reading,
        )
        self.unsaved.append(use)
        key = (use.entitlement_id, use.meter_id)
        if self._own_ids is None or use.entitlement_id in self._own_ids:
            self.used[key] = self.used.get(key, 0) + use.value

    def take_records(self) -> tuple[Record, ...]:
        """Makes records of the closed windows, the next ones of the chain, to be stored at once."""
        records = []
        for use in self.unsaved:
            self.head, record = append(self.head, self._source, use)
            records.append(record)
            self._say(
                "info",
                "usage window is closed",
                feature=use.feature_id,
                meter=use.meter_id,
                value=use.value,
                gap=use.gap,
                gap_reason=use.gap_reason,
                seq=record.seq,
                trace_id=use.trace_id,
            )
        self.unsaved.clear()
        return tuple(records)

    def _trace_id(self, entitlement: Entitlement, meter: MeterSpec, now_ns: int) -> str:
        """32 hex digits, the same in a replay of the same life."""
        text = (
            f"{entitlement.entitlement_id}/{self.head.journal_id}/{self.head.seq}/{meter.meter_id}/{now_ns}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _confirmation(spec: FeatureSpec, meter: MeterSpec) -> SignalInfo | None:
    """The read-back as an input of a meter that reads nothing of the feature itself.

    A condition reads the output of the ECU. Without one, only the ECU's word
    says that the feature is on, and counts no longer than it is heard.
    """
    if spec.kind is ActuatorKind.NONE or meter.condition is not None:
        return None
    max_age_ns = CONFIRMATIONS_MISSED * spec.read_back_interval_s * 1_000_000_000
    return SignalInfo(f"read-back of {spec.feature_id}", "", 0, max_age_ns)


def check_conditions(spec: FeatureSpec) -> None:
    """Compiles every condition of a feature and its meters once.

    Raises:
        ConditionError: one does not compile.
    """
    for condition in (spec.activate_when, spec.release_when):
        Condition.compile(condition)
    for meter in spec.meters:
        Meter(meter, {})


def _window(
    feature_id: str,
    meter: MeterSpec,
    entitlement: Entitlement,
    reading: int | None,
    *,
    now_ns: int,
    now: TrustedTime,
) -> OpenWindow:
    """A window that begins now, without any use."""
    return OpenWindow(
        feature_id=feature_id,
        meter_id=meter.meter_id,
        entitlement_id=entitlement.entitlement_id,
        account=entitlement.account,
        trace_id=entitlement.trace_id,
        kind=meter.kind,
        start_ms=now.unix_ms,
        mark_ns=now_ns,
        mark_ms=now.unix_ms,
        odometer=meter.cumulative,
        odometer_m=reading,
    )
