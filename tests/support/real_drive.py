"""The agent's pure parts in virtual time: frames go in, usage records come out.

Collector and engine work as in the agent's loop: frames of 20 ms come as one
batch, the engine is woken when it asks for it, and what it wants on disk is on
disk at once. A crash is a new `Drive` on the same `Journal`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from support.signals_data import REPOSITORY, raw_frame

from agent import events as ev
from agent.engine import Engine
from agent.metering.meter import OpenWindow
from agent.metering.record import GENESIS_HASH, Head
from agent.model import Entitlement, FeatureSpec, Frame, PlanKind, Rights, TrustBytes, Verdict, Versions
from agent.signals.state import Collector
from agent.signals.table import Table
from agent.trust.catalogue import parse_feature
from agent.trust.clock import TrustedClock
from openfod.usage.v1 import usage_pb2

LOGBOOK = REPOSITORY / "deploy" / "demo" / "catalogue" / "features" / "drivers-logbook" / "1.toml"
BUS = "body"
NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
WINDOW_NS = 20 * NS_PER_MS
"""Frames of this time come as one batch."""
CHECKPOINT_NS = 2 * NS_PER_S
USAGE_WINDOW_NS = 60 * NS_PER_S
START_MS = 1_790_000_000_000
"""Trusted time at the beginning of all drives."""
DRIVING, PARKED, UNDIVIDED = "driving", "parked", ""


def logbook() -> FeatureSpec:
    """The logbook as the demo's catalogue describes it."""
    return parse_feature(LOGBOOK.read_bytes())


def right(spec: FeatureSpec) -> Entitlement:
    """A right to it, paid by use, without an end."""
    return Entitlement(
        entitlement_id="ent-real",
        feature_id=spec.feature_id,
        min_release=spec.release,
        account="acc-real",
        plan_kind=PlanKind.PAY_PER_USE,
        plan_id="logbook-per-km",
        plan_version=1,
        not_before_s=0,
        not_after_s=0,
        odometer_from_m=0,
        odometer_to_m=0,
        ignition_cycles=0,
        operating_s=0,
        offline_grace_s=0,
        quotas=(),
        parameters=(),
        stays_with_vehicle=False,
        display={},
        trace_id="0" * 32,
    )


@dataclass
class Journal:
    """What is on disk."""

    records: list[usage_pb2.UsageRecord] = field(default_factory=list)
    head: Head = field(default=Head("0123456789abcdef", 0, GENESIS_HASH))
    windows: tuple[OpenWindow, ...] = ()
    used: dict[tuple[str, str], int] = field(default_factory=dict)
    mark_ms: int = START_MS

    def store(self, command: ev.StoreUsage) -> None:
        """Appends records and replaces the open windows."""
        for record in command.records:
            self.records.append(usage_pb2.UsageRecord.FromString(record.content))
            self.head = Head(self.head.journal_id, record.seq, record.hash)
        self.windows, self.used = command.windows, dict(command.used)
        self.mark_ms = max(self.mark_ms, command.mark_ms)

    def value(self, meter: str, motion: str | None = None) -> int:
        """Sum that is billed, of one motion or of all."""
        return sum(r.value for r in self._of(meter, motion))

    def gap(self, meter: str) -> int:
        """Sum that is declared beyond it."""
        return sum(r.gap for r in self._of(meter, None))

    def unbounded(self, meter: str) -> list[int]:
        """The records that declare no bound, by seq."""
        return [r.seq for r in self._of(meter, None) if r.gap_unbounded]

    def _of(self, meter: str, motion: str | None) -> list[usage_pb2.UsageRecord]:
        return [r for r in self.records if r.meter_id == meter and motion in (None, _motion(r))]


def _motion(record: usage_pb2.UsageRecord) -> str:
    return next((d.value for d in record.dimensions if d.name == "motion"), UNDIVIDED)


class Drive:
    """One life of the agent, from its start with stored rights on."""

    def __init__(self, table: Table, journal: Journal, now_ns: int) -> None:
        spec = logbook()
        self._rights = Rights(1, {spec.feature_id: right(spec)}, {spec.feature_id: spec})
        self.journal = journal
        self._collector = Collector({BUS: table})
        self._window_ends_ns: int | None = None
        self._nonces = 0
        self._engine = Engine(
            source="veh-real",
            clock=TrustedClock(mark_ms=journal.mark_ms, build_ms=0, monotonic_ns=now_ns),
            infos=self._collector.infos,
            checkpoint_ns=CHECKPOINT_NS,
            window_ns=USAGE_WINDOW_NS,
        )
        self._step(
            ev.Booted(
                verdict=self._verdict(self._rights),
                head=journal.head,
                acked_seq=0,
                windows=journal.windows,
                same_boot=True,
                used=journal.used,
                last_contact_ms=journal.mark_ms,
            ),
            now_ns,
        )

    @property
    def state(self) -> str:
        """State of the feature."""
        (view,) = self._engine.features()
        return view.state

    def feed(self, frames: Iterable[Frame]) -> None:
        """Takes frames in the order of their times, and lets time pass between them."""
        for frame in frames:
            self.wait_until(frame.monotonic_ns)
            if self._window_ends_ns is None:
                self._window_ends_ns = frame.monotonic_ns + WINDOW_NS
            self._collector.feed(BUS, [raw_frame(frame)])

    def wait_until(self, now_ns: int) -> None:
        """Lets time pass; a frame at `now_ns` itself is still to come."""
        while True:
            wake_ns = self._engine.wake_ns()
            if self._window_ends_ns is not None and self._window_ends_ns <= min(now_ns, wake_ns):
                at_ns, self._window_ends_ns = self._window_ends_ns, None
                self._step(ev.SignalsArrived(self._collector.drain()), at_ns)
            elif wake_ns <= now_ns:
                self._step(ev.Ticked(), wake_ns)
            else:
                return

    def revoke(self, now_ns: int) -> None:
        """The cloud takes the right away; what was used is closed."""
        self.wait_until(now_ns)
        if self._window_ends_ns is not None:
            self._window_ends_ns = None
            self._step(ev.SignalsArrived(self._collector.drain()), now_ns)
        self._step(ev.LinkUp(), now_ns)
        verdict = self._verdict(replace(self._rights, version=2, entitlements={}))
        self._step(ev.UpdateVerified(verdict, self._nonce(), now_ns), now_ns)

    def stop(self, now_ns: int) -> None:
        """The agent is told to end."""
        self.wait_until(now_ns)
        self._step(ev.Stopping(), now_ns)

    def _verdict(self, rights: Rights) -> Verdict:
        return Verdict(TrustBytes(), Versions(), Versions(), rights, self.journal.mark_ms)

    def _nonce(self) -> bytes:
        return self._nonces.to_bytes(16, "big")

    def _step(self, event: ev.Event, now_ns: int) -> None:
        for command in self._engine.step(event, now_ns):
            match command:
                case ev.StoreUsage():
                    self.journal.store(command)
                    self._step(ev.Persisted(command.number), now_ns)
                case ev.StoreTrust(number) | ev.MarkSent(number):
                    self._step(ev.Persisted(number), now_ns)
                case ev.MakeNonce():
                    self._nonces += 1
                    self._step(ev.NonceMade(self._nonce()), now_ns)
                case ev.Say(level, message, fields):
                    assert level == "info", (message, fields)
                case _:
                    pass


def drive_with_crashes(
    table: Table, frames: Sequence[Frame], crashes_ns: Iterable[int], dead_ns: int, end_ns: int
) -> Journal:
    """Drives until `end_ns`, when the right ends; after each crash the agent is dead for a while.

    Returns:
        the journal that all lives of the agent wrote.
    """
    journal, started_ns = Journal(), 0
    drive = Drive(table, journal, started_ns)
    for crash_ns in sorted(crashes_ns):
        died_ns = max(crash_ns, started_ns)
        drive.feed(frame for frame in frames if started_ns <= frame.monotonic_ns < died_ns)
        drive.wait_until(died_ns)
        started_ns = died_ns + dead_ns
        drive = Drive(table, journal, started_ns)
    drive.feed(frame for frame in frames if frame.monotonic_ns >= started_ns)
    drive.revoke(end_ns)
    return journal
