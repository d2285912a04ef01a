"""The whole agent as a function: an event and the time go in, commands come out.

Pure: no I/O, no clock, no randomness. Times are monotonic nanoseconds of the
event; Unix time comes from the trusted clock that signed answers feed.

Two rules can be read here. Persist before acting: rights are used only after
Persisted() of the StoreTrust that carries them, and records are sent only
after they and the mark "sent" are on disk. Nothing fails open: what is
unknown (a stale signal, an ECU that was not read) switches nothing on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

from agent import events as ev
from agent.errors import IllegalTransitionError, NegativeResponseError, VehicleError
from agent.features.conditions import Condition
from agent.features.guard import (
    activation_request,
    announcement_request,
    read_back_request,
    reading_request,
    session_request,
)
from agent.features.lifecycle import METERED, Action, Event, State, transition
from agent.metering.ledger import Ledger
from agent.metering.meter import OpenWindow
from agent.metering.reading import reading_of
from agent.model import (
    ActuatorKind,
    Entitlement,
    FeatureSpec,
    Quota,
    Rights,
    SignalInfo,
    SignalValue,
    Token,
    TrustBytes,
    TrustedTime,
    Verdict,
    Versions,
    WhenDead,
    odometer_metres,
)
from agent.signals.state import SignalState
from agent.trust.clock import TrustedClock
from agent.trust.grant_log import LogEntry, LogHead, entry, follow
from agent.trust.terms import QuotaState, judge, judge_quota, period_of

IGNITION = "Vehicle.LowVoltageSystemState"
"""VSS name of the signal whose value "OFF" ends a hold."""
BATCH_RECORDS = 500
"""Records in one upload."""
NONCE_AGE_NS = 60 * 1_000_000_000
"""Age at which an unused nonce is replaced: it bounds the time's uncertainty."""
NONCE_BURST, NONCE_BURST_NS = 60, 60 * 1_000_000_000
"""At most so many nonces in that time, whatever the cloud answers."""
UPLOAD_TIMEOUT_NS = 30 * 1_000_000_000
"""How long an upload waits for its receipt before it is sent again."""
BACKOFF_NS = tuple(s * 1_000_000_000 for s in (1, 2, 5, 15, 60))
"""Pause before each further try of an ECU; the last one repeats."""
MARK_NS = 60 * 1_000_000_000
"""How much time a power cut may take back, where nothing else is written."""
GATHER_NS = 500_000_000
"""Longest time for which signals gather that decide nothing at once: each look at them costs."""
MIN_OFF_READ_BACK_S = 10
"""Shortest period at which a feature that should be off is read back."""
READING_RETRY_NS = 1_000_000_000
"""Pause before an ECU that is busy is looked at again, to be asked for its own count."""
EVIDENCE_BYTES = 64
"""Of the ECU's answer, kept as evidence."""
EVIDENCE_PAUSE_NS = 3600 * 1_000_000_000
"""At most one entry in the owner's log in that time for what one feature's ECU says."""
_ASLEEP = frozenset({None, "OFF", "LOCK"})
"""Values of the ignition at which no ECU is woken to be read."""
_AT_PERIOD = "@"
"""Between a meter and a period's start, where the amount at that start is kept; no meter's id has it."""
_NS_PER_MS = 1_000_000
_MAX_STEPS = 16
_READ_BACK_POSITIVE = 0x62


class _EcuView(NamedTuple):
    """What an ECU last said of a feature."""

    on: bool
    counter: int | None


@dataclass(slots=True)
class _Feature:
    """One feature at run time."""

    spec: FeatureSpec
    activate_when: Condition
    release_when: Condition
    state: State = State.LOCKED
    reason: str = "no right"
    since_ms: int = 0
    held_since_ns: int = 0
    entitlement: Entitlement | None = None
    token: Token | None = None
    ecu: _EcuView | None = None
    busy: bool = False
    error: VehicleError | None = None
    failures: int = 0
    retry_ns: int = 0
    read_back_ns: int = 0
    arrived_ns: int = 0
    asked_ns: int = 0
    may_be_on: bool = False
    was_off: bool = False
    known_counter: int = 0
    evidence: ev.Evidence | None = None
    evidence_due_ns: int = 0
    missed: bool = False
    activation_ms: int = 0
    nrc: int = 0
    warned: dict[tuple[str, str], tuple[int, int, bool]] = field(default_factory=dict)
    reading_ns: int = 0
    reading_asked: bool = False
    reading_wanted: bool = False


@dataclass(slots=True)
class _Upload:
    """Where the upload stands."""

    stored_seq: int = 0
    acked_seq: int = 0
    sent_ns: int = 0
    in_flight: bool = False


class Engine:
    """Decides everything; see the module's docstring."""

    def __init__(
        self,
        *,
        source: str,
        clock: TrustedClock,
        infos: Mapping[str, SignalInfo],
        checkpoint_ns: int,
        window_ns: int,
        buses: tuple[str, ...] = (),
    ) -> None:
        """Starts empty; the first event must be Booted.

        Args:
            source: the vehicle's pseudonym in usage records.
            clock: trusted clock as of the start.
            infos: signals that the buses can give.
            checkpoint_ns: longest time for which use is only in memory.
            window_ns: length of a usage window.
            buses: names of the buses; none of them is up yet.
        """
        self._infos = infos
        self._ledger = Ledger(source, infos, self._say)
        self._clock = clock
        self._checkpoint_ns = checkpoint_ns
        self._window_ns = window_ns
        self._signals = SignalState(infos)
        self._out: list[ev.Command] = []
        self._number = 0
        self._waiting: dict[int, ev.Command] = {}
        self._features: dict[str, _Feature] = {}
        self._rights = Rights(version=0)
        self._live: frozenset[str] = frozenset()
        self._director = Versions()
        self._catalogue = Versions()
        self._upload = _Upload()
        self._stored_windows: tuple[OpenWindow, ...] = ()
        self._log_head = LogHead()
        self._log_entries: list[LogEntry] = []
        self._logged = Rights(version=0)
        self._owner_epoch = 0
        self._own_ids: frozenset[str] | None = None  # None: there was no sale in this life
        self._token_counters: Mapping[tuple[str, str], int] = {}
        self._after: dict[int, list[ev.RunEcu]] = {}
        self._next_update: TrustBytes | None = None
        self._judged: tuple[tuple[bytes, int], ...] | None = None
        self._nonce_wanted = self._nonce_asked = False
        self._nonces_made_ns: deque[int] = deque(maxlen=NONCE_BURST)
        self._moving = self._postponed = 0
        """Commands that wait: for the journal's new end, and for the journal to be written again."""
        self._dead = ""
        """Why the journal cannot be written; empty if it can."""
        self._checkpoint_due_ns = 0
        self._window_due_ns = 0
        self._mark_due_ns = 0
        self._readings_due_ns = 0
        self._link = False
        self._greeted = False
        self._nonces: list[tuple[bytes, int]] = []
        self._contact_ms = 0
        self._reported: tuple[ev.FeatureView, ...] | None = None
        self._buses = dict.fromkeys(buses, "opening")
        self._last_refusal = ""
        self._now_ns = 0
        self._known_time: tuple[int, TrustedClock, TrustedTime] | None = None

    # --- the function ------------------------------------------------------

    def step(self, event: ev.Event, now_ns: int) -> list[ev.Command]:
        """Takes one event and returns what to do, in order."""
        self._now_ns = now_ns
        self._out = []
        self._take(event, now_ns)
        self._evaluate_all(now_ns)
        if now_ns >= self._readings_due_ns:
            self._ask_readings(now_ns)
        if self._ledger.resolve(self._is_seen, self._signals, now_ns=now_ns, now=self._time(now_ns)):
            self._checkpoint_due_ns = now_ns
        self._keep_time(now_ns, force=isinstance(event, ev.Stopping))
        self._send(now_ns)
        return self._out

    @property
    def urgent(self) -> frozenset[str]:
        """VSS names of the signals whose change may decide something at once; all others may gather."""
        names: set[str] = set()
        for feature in self._features.values():
            if feature.state is State.HELD:
                names |= {*feature.spec.release_when.inputs, IGNITION}
            elif feature.state is State.PENDING:
                names.update(feature.spec.activate_when.inputs)
        return frozenset(names)

    @property
    def patience_ns(self) -> int:
        """How long signals that are not urgent may gather.

        Half the shortest age of what is metered: what is heard in time then
        looks so, however seldom it is fetched.
        """
        return min(GATHER_NS, self._ledger.shortest_age_ns // 2)

    def wake_ns(self) -> int:
        """When Ticked is wanted at the latest, monotonic."""
        checkpoint_ns = self._checkpoint_due_ns
        due = [checkpoint_ns if checkpoint_ns > self._now_ns else self._now_ns + self._checkpoint_ns]
        for feature in self._features.values():
            due += [t for t in (feature.retry_ns, feature.read_back_ns) if t > self._now_ns]
        if self._readings_due_ns > self._now_ns:
            due.append(self._readings_due_ns)
        return min(due)

    def _take(self, event: ev.Event, now_ns: int) -> None:
        match event:
            case ev.Booted():
                self._boot(event, now_ns)
            case ev.SignalsArrived(batch):
                self._signals.apply(batch)
                if self._ledger.observe(batch, now_ns):
                    self._checkpoint_due_ns = now_ns
            case ev.BusChanged(bus, state, reason):
                came_up = state == "up" and self._buses.get(bus) != "up"
                self._buses[bus] = state
                if came_up:
                    self._retry_on(bus)
                self._say("warning" if state == "lost" else "info", f"bus {bus} is {state}", reason=reason)
            case ev.NonceMade(nonce):
                self._nonce_made(nonce, now_ns)
            case ev.LinkUp():
                self._link, self._greeted = True, False
                self._nonces.clear()
                self._upload.in_flight = False
                self._reported = None
                self._next_update = None
                self._nonce_asked = False
                self._want_nonce()
                self._say("info", "cloud is connected")
            case ev.LinkDown(reason):
                self._link = self._greeted = False
                self._upload.in_flight = False
                self._nonces.clear()
                self._say("warning", "cloud is out of reach; going on with the stored rights", reason=reason)
            case ev.UpdateArrived(update):
                # One at a time, and of those that wait only the latest: a flood costs no memory.
                self._next_update = update
            case ev.UpdateVerified():
                self._verified(event, now_ns)
            case ev.BundleVerified(verdict, received_ns):
                self._clock = self._clock.raise_to(verdict.signed_ms, received_ns)
                self._store_trust(verdict, now_ns, live=False)
            case ev.UpdateRefused(kind, reason, verified):
                if verified:  # else another one may still be with the worker
                    self._judged = None
                self._refused(kind, reason)
            case ev.Persisted(number):
                self._persisted(number, now_ns)
            case ev.EcuDone():
                self._ecu_done(event, now_ns)
            case ev.ReceiptStored(through_seq):
                if through_seq > self._upload.acked_seq:
                    self._upload.acked_seq = through_seq
                    self._upload.in_flight = False
            case ev.JournalFull():
                self._move_journal(ev.MergeUnsent, now_ns)
            case ev.RestartSigned(restart):
                self._move_journal(lambda number: ev.RestartJournal(number, restart), now_ns)
            case ev.JournalMoved():
                self._journal_moved(event, now_ns)
            case ev.JournalDead(reason):
                self._journal_died(reason, now_ns)
            case ev.JournalAlive():
                self._journal_lives(now_ns)
            case ev.UsageRefused(kind, reason, through):
                self._say("error", "cloud refused usage; the records are kept", error=kind, reason=reason)
                # Nobody signed this: it may have records sent again, which is harmless, but skip none.
                if through < self._upload.acked_seq:
                    self._upload.acked_seq = max(0, through)
                    self._upload.in_flight = False
            case ev.Ticked():
                pass
            case ev.Stopping():
                self._ledger.close_windows(self._time(now_ns))

    # --- start and trust -----------------------------------------------------

    def _boot(self, event: ev.Booted, now_ns: int) -> None:
        self._upload.stored_seq, self._upload.acked_seq = event.head.seq, event.acked_seq
        self._contact_ms = event.last_contact_ms
        self._token_counters = event.token_counters
        self._log_head = event.log_head
        self._owner_epoch = event.owner_epoch
        self._window_due_ns = now_ns + self._window_ns
        self._ledger.restore(
            event.head, event.used, event.windows, same_boot=event.same_boot, now=self._time(now_ns)
        )
        self._ledger.give_up_waiting(self._time(now_ns), of=event.former)
        self._checkpoint(now_ns)
        if event.verdict is not None:
            self._logged = event.verdict.rights
            self._director, self._catalogue = event.verdict.director, event.verdict.catalogue
            self._apply_rights(event.verdict.rights, now_ns)
            self._say(
                "info",
                "stored rights are verified",
                version=event.verdict.rights.version,
                features=sorted(event.verdict.rights.entitlements),
            )

    def _nonce_made(self, nonce: bytes, now_ns: int) -> None:
        if not self._link:
            return
        self._nonce_asked = self._nonce_wanted = False
        self._nonces = [*self._nonces[-1:], (nonce, now_ns)]
        if self._greeted:
            self._out.append(ev.OfferNonce(nonce))
        else:
            self._greeted = True
            self._out.append(
                ev.SendHello(nonce, self._director, self._catalogue, self._ledger.head.journal_id)
            )

    def _want_nonce(self) -> None:
        """Asks for a nonce soon: each invites an answer that has to be verified and stored."""
        self._nonce_wanted = True

    def _verified(self, event: ev.UpdateVerified, now_ns: int) -> None:
        # Taken even if the link has ended meanwhile: the worker builds the next answer on this one.
        judged, self._judged = self._judged or (), None
        sent_ns = next((t for n, t in (*judged, *self._nonces) if n == event.nonce), None)
        if sent_ns is None:
            self._refused("ReplayError", "a verified answer to a nonce that is not known here; asking again")
            return
        self._nonces = [(n, t) for n, t in self._nonces if t > sent_ns]
        self._clock = self._clock.observe_signed(
            event.verdict.signed_ms, sent_ns, event.received_ns, new_epoch=event.new_epoch
        )
        self._contact_ms = self._time(now_ns).unix_ms
        self._store_trust(event.verdict, now_ns, live=True)
        if not self._nonces:
            self._want_nonce()

    def _store_trust(self, verdict: Verdict, now_ns: int, *, live: bool) -> None:
        now = self._time(now_ns)
        entries, new_owner = follow(
            self._log_head, verdict, now, before=self._logged, owner_epoch=self._owner_epoch
        )
        if new_owner:
            self._log_entries.clear()  # they are of the former owner, whose log ends here
            self._ledger.give_up_waiting(now)
        self._log(entries)
        self._logged, self._owner_epoch = verdict.rights, verdict.rights.owner_epoch
        command = ev.StoreTrust(
            self._next_number(), verdict, now.unix_ms, verdict.signed_ms, live, self._take_log(), new_owner
        )
        self._waiting[command.number] = command
        self._out.append(command)

    def _log(self, entries: tuple[LogEntry, ...]) -> None:
        """Adds to the owner's log; written with the next command that goes to disk."""
        if entries:
            self._log_entries += entries
            self._log_head = entries[-1].head

    def _take_log(self) -> tuple[LogEntry, ...]:
        entries = tuple(self._log_entries)
        self._log_entries.clear()
        return entries

    def _refused(self, kind: str, reason: str) -> None:
        self._last_refusal = f"{kind}: {reason}"
        self._say("error", "update refused; the trusted state is unchanged", error=kind, reason=reason)
        if self._link:
            self._out.append(ev.SendResult(self._director, self._catalogue, kind, reason))
            self._want_nonce()

    def _persisted(self, number: int, now_ns: int) -> None:
        for after in self._after.pop(number, ()):
            self._send_activation(after, now_ns)
        match self._waiting.pop(number, None):
            case ev.StoreTrust(_, verdict, new_owner=new_owner):
                self._note_owner(verdict.rights, new_owner=new_owner)
                changed = verdict.rights.version != self._rights.version
                self._director, self._catalogue = verdict.director, verdict.catalogue
                self._last_refusal = ""
                if changed or verdict.rights != self._rights:
                    self._say(
                        "info",
                        "new rights are verified and stored",
                        version=verdict.rights.version,
                        features=sorted(verdict.rights.entitlements),
                    )
                    self._apply_rights(verdict.rights, now_ns)
                if self._link:
                    self._out.append(ev.SendResult(self._director, self._catalogue, "", ""))
            case ev.StoreUsage(_, records):
                if records:
                    self._upload.stored_seq = max(self._upload.stored_seq, records[-1].seq)
            case ev.MarkSent():
                if self._link:
                    self._out.append(ev.SendUsage(self._upload.acked_seq + 1, BATCH_RECORDS))
            case _:
                pass

    def _note_owner(self, rights: Rights, *, new_owner: bool) -> None:
        """Forgets, and shows no more, what was used under rights of a former owner."""
        ids = frozenset(right.entitlement_id for right in rights.entitlements.values())
        if self._own_ids is None and not new_owner:
            return
        self._own_ids = ids if new_owner or self._own_ids is None else self._own_ids | ids
        self._ledger.keep_only(self._own_ids)

    def _shown(self, feature: _Feature) -> Entitlement | None:
        """The right that a feature is or was under, if it is the present owner's."""
        right = feature.entitlement
        hidden = right and self._own_ids is not None and right.entitlement_id not in self._own_ids
        return None if hidden else right

    def _apply_rights(self, rights: Rights, now_ns: int) -> None:
        self._rights = rights
        for feature_id, spec in rights.features.items():
            known = self._features.get(feature_id)
            if known is None:
                self._features[feature_id] = known = self._new_feature(spec, now_ns)
            elif known.spec.sha256 != spec.sha256:
                known.activate_when, known.release_when = _compile(spec)
                known.spec = spec
                if self._ledger.is_metering(feature_id):
                    # Other meters may count from here on: what the old ones counted is closed.
                    self._ledger.stop(feature_id, now_ns=now_ns, now=self._time(now_ns))
                    if known.entitlement is not None:
                        self._start_meters(known, now_ns)
            entitlement = rights.entitlements.get(feature_id)
            if entitlement is not None and (
                known.entitlement is None or known.entitlement.entitlement_id != entitlement.entitlement_id
            ):
                known.arrived_ns, known.activation_ms = now_ns, 0
            if entitlement is not None:
                known.entitlement = entitlement
            if self._ledger.is_metering(feature_id) and known.entitlement is not None:
                # What is used from here on is used under the new right.
                self._start_meters(known, now_ns)
            token = rights.tokens.get(feature_id)
            if token is not None and (known.token is None or known.token.sha256 != token.sha256):
                known.failures, known.retry_ns = 0, 0
            known.token = token
            known.known_counter = max(known.known_counter, token.counter if token else 0)
        for feature_id, known in self._features.items():
            if feature_id not in rights.features:
                known.token = None
        self._allow(now_ns, force=True)

    def _new_feature(self, spec: FeatureSpec, now_ns: int) -> _Feature:
        activate_when, release_when = _compile(spec)
        feature = _Feature(spec, activate_when, release_when)
        if missing := sorted(spec.inputs - self._infos.keys()):
            self._say(
                "warning",
                "no bus brings signals that this feature needs; what depends on them stays unknown",
                feature=spec.feature_id,
                signals=missing,
            )
        feature.since_ms = self._time(now_ns).unix_ms
        if spec.ecu is not None:
            feature.known_counter = self._token_counters.get((spec.ecu.identifier, spec.feature_id), 0)
        if spec.kind is ActuatorKind.NONE:
            feature.ecu = _EcuView(on=False, counter=None)
        return feature

    def _allow(self, now_ns: int, *, force: bool = False) -> None:
        """Tells the guard which features are live, if that has changed."""
        live = frozenset(f for f, feature in self._features.items() if self._right(feature, now_ns)[0])
        if force or live != self._live:
            if self._live - live:
                self._mark_due_ns = now_ns  # what time has ended, no restart brings back
            self._live = live
            # What is known of features that the set no longer names still says how to release them.
            specs = {feature_id: feature.spec for feature_id, feature in self._features.items()}
            self._out.append(ev.Allow(replace(self._rights, features=specs), live))

    # --- features --------------------------------------------------------------

    def _right(self, feature: _Feature, now_ns: int) -> tuple[bool, bool, str]:
        """Whether a right is live, whether it only rests, and why."""
        entitlement = self._rights.entitlements.get(feature.spec.feature_id)
        if entitlement is None:
            return False, False, "no right"
        has_range = entitlement.odometer_from_m or entitlement.odometer_to_m
        right = judge(
            entitlement,
            now=self._time(now_ns),
            last_contact_ms=self._contact_ms,
            odometer_m=self._odometer(now_ns) if has_range else None,
        )
        # An unknown odometer switches nothing on, and takes nothing away.
        kept = right.undecided and feature.state in METERED
        if not (right.live or kept):
            return False, False, right.reason
        if self._dead and feature.spec.when_dead is WhenDead.HOLD:
            return False, True, f"use cannot be written down: {self._dead}"
        if not entitlement.quotas:
            return True, False, right.reason
        states = self._quota_states(entitlement, now_ns)
        self._warn(feature, entitlement, states)
        words = "; ".join(state.words for state in states if state.words)
        if any(state.hard and state.beyond for state in states):
            return False, True, words
        return True, False, f"{right.reason}; {words}" if words else right.reason

    def _quota_states(self, entitlement: Entitlement, now_ns: int) -> list[QuotaState]:
        return [judge_quota(q, self._used_of(entitlement, q, now_ns)) for q in entitlement.quotas]

    def _used_of(self, entitlement: Entitlement, quota: Quota, now_ns: int) -> int:
        """What was used under a right, of the running period if its quota has periods.

        What had been used when a period was first seen to run is kept beside
        the amounts themselves, under the meter and the period's start.
        """
        used = self._ledger.used_now(entitlement.entitlement_id, quota.meter_id)
        period_s = period_of(quota, self._time(now_ns))
        if period_s is None:
            return used
        key = (entitlement.entitlement_id, f"{quota.meter_id}{_AT_PERIOD}{period_s}")
        return max(0, used - self._ledger.used.setdefault(key, used))

    def _warn(self, feature: _Feature, entitlement: Entitlement, states: list[QuotaState]) -> None:
        """Says each stage of a quota once, and that overage has begun."""
        for state in states:
            key = (entitlement.entitlement_id, state.meter_id)
            level = (state.limit, state.stage, state.beyond)
            if feature.warned.get(key) == level:
                continue
            feature.warned[key] = level
            if state.words:
                self._say(
                    "warning",
                    state.words,
                    feature=feature.spec.feature_id,
                    entitlement=entitlement.entitlement_id,
                    used=state.used,
                    limit=state.limit,
                    hard=state.hard,
                )

    def _odometer(self, now_ns: int) -> int | None:
        return odometer_metres(self._signals.value("Vehicle.TraveledDistance", now_ns))

    def _evaluate_all(self, now_ns: int) -> None:
        self._allow(now_ns)
        for feature in self._features.values():
            for _ in range(_MAX_STEPS):
                event, why = self._derive(feature, now_ns)
                if event is None:
                    if why:
                        feature.reason = why
                    break
                self._transition(feature, event, why, now_ns)

    def _derive(self, feature: _Feature, now_ns: int) -> tuple[Event | None, str]:
        """What has happened to a feature, from all that is known; the rules of the table's events."""
        live, rests, why = self._right(feature, now_ns)
        lost = Event.SUSPENDED if rests else Event.ENDED
        state = feature.state
        if state is State.SUSPENDED or state is State.LOCKED:
            if live:
                return Event.ENTITLED, why
            found = self._derive_locked(feature, why, now_ns)
            if found[0] is not None or feature.ecu is None:
                return found
            if rests is (state is State.SUSPENDED):
                return None, why
            return lost, why
        if state is State.HELD:
            return (Event.ENTITLED, why) if live else self._derive_held(feature, why, now_ns)
        if state is State.DEACTIVATING:
            return self._derive_deactivating(feature)
        if not live:
            return lost, why
        if state is State.FAULT:
            return (Event.RETRY, "trying again") if now_ns >= feature.retry_ns else (None, "")
        if state is State.ACTIVE:
            return self._derive_active(feature, why, now_ns)
        if feature.busy:
            return None, ""
        if feature.error is not None:
            return Event.DENIED, str(feature.error)
        if state is State.ACTIVATING and feature.missed:
            return Event.MISSED, "it was no longer time to switch it on"
        if state is State.ACTIVATING:
            on = feature.ecu is not None and feature.ecu.on
            return (Event.CONFIRMED, why) if on else (Event.DENIED, "the ECU reports it off all the same")
        return self._derive_pending(feature, why, now_ns)

    def _derive_locked(self, feature: _Feature, why: str, now_ns: int) -> tuple[Event | None, str]:
        if feature.ecu is None:
            self._read_back(feature, now_ns)
        elif feature.ecu.on:
            return Event.STILL_ON, "the ECU reports it on without a right"
        elif _burn_due(feature):
            return Event.STILL_ON, "the ECU still holds a token that has been withdrawn"
        elif now_ns >= feature.read_back_ns and not self._is_asleep(now_ns):
            self._read_back(feature, now_ns)
        return None, why

    def _is_asleep(self, now_ns: int) -> bool:
        """Whether a request would wake the vehicle; false if no bus tells of the ignition."""
        return IGNITION in self._infos and self._signals.value(IGNITION, now_ns) in _ASLEEP

    def _derive_pending(self, feature: _Feature, why: str, now_ns: int) -> tuple[Event | None, str]:
        if feature.ecu is None:
            self._read_back(feature, now_ns)
            return None, "reading what the ECU does"
        if feature.ecu.on:
            return Event.ADOPTED, why
        if feature.spec.kind is ActuatorKind.TOKEN and feature.token is None:
            return None, "waiting for the ECU's token"
        if self._holds(feature.activate_when, now_ns) is True:
            return Event.READY, why
        return None, f"waiting for: {feature.spec.activate_when.expression}"

    def _derive_active(self, feature: _Feature, why: str, now_ns: int) -> tuple[Event | None, str]:
        if feature.busy:
            return None, why
        if feature.error is not None:
            return Event.DENIED, f"{why}; not confirmed now: {feature.error}"
        if feature.ecu is not None and not feature.ecu.on:
            return Event.OFF_SEEN, "the ECU reports it off"
        if now_ns < feature.retry_ns:
            return None, ""
        if _renewal_due(feature) and self._holds(feature.activate_when, now_ns) is True:
            return Event.RENEW, why
        if feature.spec.kind is not ActuatorKind.NONE and now_ns >= feature.read_back_ns:
            self._read_back(feature, now_ns)
        return None, why

    def _derive_held(self, feature: _Feature, why: str, now_ns: int) -> tuple[Event | None, str]:
        if now_ns < feature.retry_ns or feature.busy:
            return None, ""
        if self._holds(feature.release_when, now_ns) is True:
            return Event.RELEASABLE, f"releasing: {why}"
        if self._signals.value(IGNITION, now_ns) == "OFF":
            return Event.RELEASABLE, f"releasing at ignition off: {why}"
        if now_ns - feature.held_since_ns >= feature.spec.hold_max_s * 1_000_000_000:
            return Event.RELEASABLE, f"releasing after the longest hold: {why}"
        return None, f"held until: {feature.spec.release_when.expression} ({why})"

    def _derive_deactivating(self, feature: _Feature) -> tuple[Event | None, str]:
        if feature.busy:
            return None, ""
        if feature.error is not None:
            return Event.DENIED, str(feature.error)
        if feature.ecu is not None and not feature.ecu.on:
            return Event.RELEASED, "released"
        return Event.DENIED, "the ECU reports it on all the same"

    def _holds(self, condition: Condition, now_ns: int) -> bool | None:
        values: dict[str, SignalValue | None] = {
            name: self._signals.value(name, now_ns) for name in condition.spec.inputs
        }
        return condition.evaluate(values)

    def _transition(self, feature: _Feature, event: Event, why: str, now_ns: int) -> None:
        try:
            state, actions = transition(feature.spec.feature_id, feature.state, event)
        except IllegalTransitionError as error:
            self._say("error", str(error), feature=feature.spec.feature_id)
            return
        before, feature.state = feature.state, state
        feature.reason = why or feature.reason
        feature.error = None
        feature.missed = False
        if state is not before:
            feature.since_ms = self._time(now_ns).unix_ms
            if state is State.HELD:
                feature.held_since_ns = now_ns
            self._say(
                "info",
                f"{feature.spec.feature_id}: {before.name} → {state.name}",
                feature=feature.spec.feature_id,
                event=event.name,
                reason=feature.reason,
                trace_id=feature.entitlement.trace_id if feature.entitlement else "",
            )
        for action in actions:
            self._act(feature, action, event, now_ns)

    def _act(self, feature: _Feature, action: Action, event: Event, now_ns: int) -> None:
        match action:
            case Action.READ_BACK:
                if feature.spec.kind is not ActuatorKind.NONE:
                    feature.ecu = None
            case Action.ACTIVATE:
                self._activate(feature, now_ns)
            case Action.RELEASE:
                self._release(feature)
            case Action.START_METERS:
                if event is Event.CONFIRMED and feature.arrived_ns:
                    feature.activation_ms = max(1, (now_ns - feature.arrived_ns) // _NS_PER_MS)
                feature.failures = feature.nrc = 0
                self._start_meters(feature, now_ns)
            case Action.STOP_METERS:
                self._stop_meters(feature, now_ns)
            case Action.BACK_OFF:
                pause = BACKOFF_NS[min(feature.failures, len(BACKOFF_NS) - 1)]
                feature.failures += 1
                feature.retry_ns = now_ns + pause

    # --- ECU ---------------------------------------------------------------------

    def _run(
        self, feature: _Feature, purpose: str, requests: tuple[bytes, ...], *, has_token: bool = False
    ) -> ev.RunEcu:
        assert feature.spec.ecu is not None
        feature.busy, feature.error = True, None
        trace = feature.entitlement.trace_id if feature.entitlement else ""
        key = self._rights.token_key if has_token else None
        announcement = announcement_request(key) if key else b""
        return ev.RunEcu(feature.spec.feature_id, purpose, feature.spec.ecu, requests, trace, announcement)

    def _read_back(self, feature: _Feature, now_ns: int) -> None:
        if feature.busy or now_ns < feature.retry_ns or feature.spec.read_back is None:
            return
        if feature.spec.ecu is not None and self._buses.get(feature.spec.ecu.bus, "up") != "up":
            return
        self._out.append(self._run(feature, "read back", (read_back_request(feature.spec),)))

    def _retry_on(self, bus: str) -> None:
        """A bus is there again: what failed for the lack of it need not wait."""
        for feature in self._features.values():
            if feature.spec.ecu is not None and feature.spec.ecu.bus == bus:
                feature.retry_ns = 0

    def _activate(self, feature: _Feature, now_ns: int) -> None:
        """Asks the ECU, once it is on disk that the feature may be on from now."""
        feature.asked_ns = now_ns
        if feature.spec.kind is ActuatorKind.NONE:
            feature.ecu = _EcuView(on=True, counter=None)
            return
        assert feature.token is not None
        assert feature.entitlement is not None
        command = self._run(
            feature,
            "activate",
            (
                session_request(feature.spec.session),
                activation_request(feature.spec, feature.token),
                read_back_request(feature.spec),
            ),
            has_token=True,
        )
        if self._ledger.is_metering(feature.spec.feature_id):
            self._out.append(command)
            return
        self._ledger.arm(
            feature.spec, feature.entitlement, self._signals, now_ns=now_ns, now=self._time(now_ns)
        )
        if self._dead and feature.spec.when_dead is WhenDead.GO_ON_FREE:
            self._send_activation(command, now_ns)
            return
        self._after.setdefault(self._checkpoint(now_ns), []).append(command)

    def _send_activation(self, command: ev.RunEcu, now_ns: int) -> None:
        """Sends what waited for the disk, if it is still time for it."""
        feature = self._features[command.feature_id]
        ready = self._holds(feature.activate_when, now_ns) is True and self._right(feature, now_ns)[0]
        token = feature.token
        same = token is not None and activation_request(feature.spec, token) in command.requests
        if feature.state is State.ACTIVATING and ready and same:
            feature.may_be_on, feature.was_off = True, False
            self._out.append(command)
            return
        feature.busy, feature.missed = False, True
        self._ledger.disarm(command.feature_id)

    def _release(self, feature: _Feature) -> None:
        if feature.spec.kind is ActuatorKind.NONE:
            feature.ecu = _EcuView(on=False, counter=None)
            return
        token = feature.token
        counter = feature.ecu.counter if feature.ecu else None
        # An ECU that holds this counter or a higher one would refuse the token, or take it as old news.
        burn = token is not None and not token.allows and (counter is None or counter < token.counter)
        request = activation_request(feature.spec, token) if token and burn else feature.spec.release_request
        requests = (session_request(feature.spec.session), request, read_back_request(feature.spec))
        self._out.append(self._run(feature, "release", requests, has_token=burn))

    def _ecu_done(self, event: ev.EcuDone, now_ns: int) -> None:
        feature = self._features.get(event.feature_id)
        if feature is None:
            return
        if feature.reading_asked:
            # Jobs of one ECU end in the order in which they began, and this one began alone.
            self._take_reading(feature, event, now_ns)
            return
        feature.busy = False
        now = self._time(now_ns)
        should_be_off = feature.state in {State.LOCKED, State.SUSPENDED}
        interval_s = max(feature.spec.read_back_interval_s, MIN_OFF_READ_BACK_S * should_be_off)
        feature.read_back_ns = now_ns + interval_s * 1_000_000_000
        if event.error is not None:
            feature.error = event.error
            feature.nrc = event.error.nrc if isinstance(event.error, NegativeResponseError) else 0
            feature.may_be_on &= not feature.nrc
            self._say("warning", str(event.error), feature=event.feature_id, error=event.error.kind)
            if should_be_off:
                # Nothing is at stake: ask again later.
                feature.error = None
                self._act(feature, Action.BACK_OFF, Event.DENIED, now_ns)
            return
        view = _parse_read_back(feature.spec, event.answer)
        if view is None:
            feature.error = VehicleError(
                f"read-back {event.answer[:16].hex(' ')} is not as the catalogue says"
            )
            return
        self._judge_evidence(feature, view, event.answer, now_ns)
        feature.ecu, feature.was_off = view, not view.on
        if view.on:
            self._ledger.confirm(event.feature_id, now_ns)
            if feature.state in METERED and self._ledger.is_armed(event.feature_id):
                # Its right ended while the ECU was asked: it is held, and metered while it is.
                self._start_meters(feature, now_ns)
            return
        if feature.may_be_on:
            self._ledger.seen_off(event.feature_id, now_ns=now_ns, now=now)
            self._checkpoint_due_ns = now_ns
        self._ledger.disarm(event.feature_id)
        feature.may_be_on = False
        if feature.state not in METERED:
            self._stop_meters(feature, now_ns)

    # --- the ECU's own count ---------------------------------------------------------

    def _ask_readings(self, now_ns: int) -> None:
        """Asks ECUs for what they sign of their own count: at its interval while on, and once after that."""
        due_ns = now_ns + BACKOFF_NS[-1]
        for feature in self._features.values():
            spec = feature.spec
            is_due = self._ledger.is_metering(spec.feature_id) or feature.reading_wanted
            if spec.reading is None or spec.ecu is None or not is_due or feature.reading_asked:
                continue
            if now_ns < feature.reading_ns:
                due_ns = min(due_ns, feature.reading_ns)
                continue
            is_free = not feature.busy and not self._ledger.has_reading(spec.feature_id)
            is_up = self._buses.get(spec.ecu.bus, "up") == "up"
            if self._is_asleep(now_ns):
                continue
            if not (is_free and is_up and now_ns >= feature.retry_ns):
                due_ns = min(due_ns, now_ns + READING_RETRY_NS)
                continue
            feature.reading_asked = True
            trace = feature.entitlement.trace_id if feature.entitlement else ""
            self._out.append(ev.RunEcu(spec.feature_id, "reading", spec.ecu, (reading_request(spec),), trace))
        self._readings_due_ns = due_ns

    def _take_reading(self, feature: _Feature, event: ev.EcuDone, now_ns: int) -> None:
        """Lets the next record of the feature carry what the ECU signed, untouched."""
        spec, feature.reading_asked = feature.spec, False
        reading = reading_of(spec, event.answer) if event.error is None else None
        if reading is None or spec.reading is None or feature.entitlement is None:
            feature.reading_ns = now_ns + BACKOFF_NS[-1]
            feature.reading_wanted &= not isinstance(event.error, NegativeResponseError)
            why = str(event.error or f"answer {event.answer[:16].hex(' ')} is not as the catalogue says")
            self._say("warning", "the ECU gave no reading", feature=spec.feature_id, reason=why)
            return
        feature.reading_ns = now_ns + spec.reading.interval_s * 1_000_000_000
        feature.reading_wanted = False
        self._readings_due_ns = min(self._readings_due_ns, feature.reading_ns)
        self._ledger.attach(spec, feature.entitlement, reading, now_ns=now_ns, now=self._time(now_ns))
        if self._ledger.unsaved:
            self._checkpoint_due_ns = now_ns

    def _judge_evidence(self, feature: _Feature, view: _EcuView, answer: bytes, now_ns: int) -> None:
        """Notes what no right explains for as long as the ECU says it; each finding is logged once."""
        finding = self._finding(feature, view, now_ns)
        known = feature.evidence
        if not finding:
            feature.evidence = None
        elif known is None or known.finding != finding:
            now_ms, counter = self._time(now_ns).unix_ms, view.counter or 0
            feature.evidence = ev.Evidence(finding, answer[:EVIDENCE_BYTES], counter, now_ms)
            self._say(
                "error",
                "an ECU says what no right explains",
                feature=feature.spec.feature_id,
                finding=finding,
                read_back=answer[:EVIDENCE_BYTES].hex(),
            )
            if now_ns >= feature.evidence_due_ns:
                feature.evidence_due_ns = now_ns + EVIDENCE_PAUSE_NS
                facts = {
                    "feature": feature.spec.feature_id,
                    "finding": finding,
                    "read_back": answer[:EVIDENCE_BYTES].hex(),
                }
                self._log((entry(self._log_head, "evidence", self._time(now_ns), facts),))
                self._checkpoint_due_ns = now_ns

    def _finding(self, feature: _Feature, view: _EcuView, now_ns: int) -> str:
        """What does not fit, or an empty string.

        On without a right is explained where the right ended unseen: until the
        ECU was once seen off, it may be on from before.
        """
        if feature.known_counter and view.counter is not None and view.counter > feature.known_counter:
            return (
                f"the ECU names token counter {view.counter}, the highest one known is"
                f" {feature.known_counter}"
            )
        if not view.on:
            return ""
        if feature.evidence is not None:
            return feature.evidence.finding
        if feature.state not in {State.LOCKED, State.SUSPENDED} or self._right(feature, now_ns)[0]:
            return ""
        had_right = feature.spec.feature_id in self._rights.entitlements
        token = feature.token
        is_left_over = had_right or (
            token is not None and not token.allows and (view.counter is None or view.counter < token.counter)
        )
        if is_left_over and not feature.was_off:
            return ""
        return "the ECU reports it on without a live right"

    # --- metering ------------------------------------------------------------------

    def _start_meters(self, feature: _Feature, now_ns: int) -> None:
        assert feature.entitlement is not None
        self._ledger.start(
            feature.spec,
            feature.entitlement,
            self._signals,
            unsure_ns=now_ns - feature.asked_ns if feature.asked_ns else 0,
            now_ns=now_ns,
            now=self._time(now_ns),
        )
        feature.asked_ns, feature.may_be_on = 0, False
        self._checkpoint_due_ns = self._readings_due_ns = now_ns

    def _stop_meters(self, feature: _Feature, now_ns: int) -> None:
        if self._ledger.is_metering(feature.spec.feature_id):
            self._ledger.stop(feature.spec.feature_id, now_ns=now_ns, now=self._time(now_ns))
            self._checkpoint_due_ns = now_ns
            feature.reading_wanted = feature.spec.reading is not None
            feature.reading_ns = self._readings_due_ns = now_ns

    def _is_seen(self, feature_id: str) -> bool:
        """Whether it is known if a feature is on or off."""
        feature = self._features.get(feature_id)
        if feature is None:
            return False
        off = feature.ecu is not None and not feature.ecu.on and not feature.busy
        return off or self._ledger.is_metering(feature_id)

    def _keep_time(self, now_ns: int, *, force: bool) -> None:
        """Closes windows and makes use durable when it is due."""
        if now_ns >= self._window_due_ns and not self._dead:
            self._window_due_ns = now_ns + self._window_ns
            self._ledger.close_windows(self._time(now_ns))
        if force or now_ns >= self._checkpoint_due_ns:
            self._checkpoint_due_ns = now_ns + self._checkpoint_ns
            windows = self._ledger.open_windows(now_ns=now_ns, now=self._time(now_ns))
            if (
                force
                or now_ns >= self._mark_due_ns
                or self._ledger.unsaved
                or self._log_entries
                or windows != self._stored_windows
            ):
                self._checkpoint(now_ns, force=force)

    def _checkpoint(self, now_ns: int, *, force: bool = False) -> int:
        """Makes all use durable, and the time; returns the command's number.

        While the journal's end is not known, or nothing can be written, one
        command waits for all: use goes on adding up in memory.
        """
        self._checkpoint_due_ns = now_ns + self._checkpoint_ns
        if self._moving or (self._dead and not force):
            self._postponed = self._postponed or self._next_number()
            return self._postponed
        number, self._postponed = self._postponed or self._next_number(), 0
        self._mark_due_ns = now_ns + MARK_NS
        now = self._time(now_ns)
        windows = self._ledger.open_windows(now_ns=now_ns, now=now)
        self._stored_windows = windows
        command = ev.StoreUsage(
            number,
            self._ledger.take_records(),
            windows,
            dict(self._ledger.used),
            now.unix_ms,
            self._take_log(),
        )
        self._waiting[command.number] = command
        self._out.append(command)
        return command.number

    # --- the journal's state -----------------------------------------------------------

    def _move_journal(self, command: Callable[[int], ev.Command], now_ns: int) -> None:
        """Has the end of the journal changed, behind everything that is booked so far."""
        if self._moving or self._dead:
            return  # who asks does so again
        self._checkpoint(now_ns)
        self._moving = self._next_number()
        self._out.append(command(self._moving))

    def _journal_moved(self, event: ev.JournalMoved, now_ns: int) -> None:
        if event.number != self._moving:
            return
        self._moving = 0
        self._ledger.head = event.head
        if event.restarted:
            self._upload = _Upload()
        self._upload.stored_seq = event.head.seq
        if self._postponed:
            self._checkpoint(now_ns)

    def _journal_died(self, reason: str, now_ns: int) -> None:
        """From here on features that go on are free of charge; what was used before waits in memory."""
        self._dead = reason
        self._ledger.close_windows(self._time(now_ns))
        self._ledger.free = frozenset(
            feature_id
            for feature_id, feature in self._features.items()
            if feature.spec.when_dead is WhenDead.GO_ON_FREE
        )
        self._say("error", "use cannot be written down; features do what the catalogue says", reason=reason)
        for number, commands in self._after.items():
            self._after[number] = [c for c in commands if c.feature_id not in self._ledger.free]
            for command in commands:
                if command.feature_id in self._ledger.free:
                    self._send_activation(command, now_ns)

    def _journal_lives(self, now_ns: int) -> None:
        """Declares what was used free of charge, and goes on as before."""
        self._dead = ""
        self._ledger.close_windows(self._time(now_ns))
        self._ledger.free = frozenset()
        self._say("info", "use is written down again; nothing that was metered is lost")
        self._checkpoint(now_ns)

    # --- cloud -----------------------------------------------------------------------

    def _send(self, now_ns: int) -> None:
        if not self._link:
            return
        if self._next_update is not None and self._judged is None:
            update, self._next_update, self._judged = self._next_update, None, tuple(self._nonces)
            nonces = tuple(nonce for nonce, _ in reversed(self._nonces))
            self._out.append(ev.Verify(update, nonces, self._time(now_ns).unix_ms))
        made_ns = self._nonces_made_ns
        spent = len(made_ns) == NONCE_BURST and now_ns - made_ns[0] < NONCE_BURST_NS
        if self._nonce_wanted and not self._nonce_asked and not spent:
            self._nonce_wanted, self._nonce_asked = False, True
            made_ns.append(now_ns)
            self._out.append(ev.MakeNonce())
        if not self._greeted:
            return
        if self._nonces and now_ns - self._nonces[-1][1] >= NONCE_AGE_NS:
            self._want_nonce()
        views = self.features()
        if views != self._reported:
            self._reported = views
            self._out.append(ev.SendStatus(views))
        upload = self._upload
        if upload.in_flight and now_ns - upload.sent_ns >= UPLOAD_TIMEOUT_NS:
            upload.in_flight = False
        may_send = not (upload.in_flight or self._moving or self._dead)
        if may_send and upload.stored_seq > upload.acked_seq:
            upload.in_flight, upload.sent_ns = True, now_ns
            command = ev.MarkSent(self._next_number(), upload.acked_seq + 1, BATCH_RECORDS)
            self._waiting[command.number] = command
            self._out.append(command)

    # --- views -------------------------------------------------------------------------

    def features(self) -> tuple[ev.FeatureView, ...]:
        """What each feature does, by id."""
        return tuple(
            ev.FeatureView(
                feature_id=feature_id,
                title=feature.spec.title,
                entitlement_id=right.entitlement_id if (right := self._shown(feature)) else "",
                state=feature.state.name,
                reason=f"{feature.evidence.finding}; {feature.reason}"
                if feature.evidence
                else feature.reason,
                nrc=feature.nrc,
                since_ms=feature.since_ms,
                activation_ms=feature.activation_ms,
                trace_id=right.trace_id if right else "",
                evidence=feature.evidence,
            )
            for feature_id, feature in sorted(self._features.items())
        )

    def status(self, now_ns: int) -> dict[str, object]:
        """Everything that `fod-agent status` shows, as plain values."""
        now = self._time(now_ns)
        return {
            "link": "up" if self._link else "down",
            "time": {"unix_ms": now.unix_ms, "uncertainty_ms": now.uncertainty_ms, "source": now.source},
            "last_contact_ms": self._contact_ms,
            "rights_version": self._rights.version,
            "last_refusal": self._last_refusal,
            "features": [
                {
                    "feature": view.feature_id,
                    "title": view.title,
                    "state": view.state,
                    "reason": view.reason,
                    "entitlement": view.entitlement_id,
                    "nrc": view.nrc,
                    "since_ms": view.since_ms,
                    "activation_ms": view.activation_ms,
                    "trace_id": view.trace_id,
                    "evidence": _evidence_as_plain(view.evidence),
                }
                for view in self.features()
            ],
            "usage": [
                {"entitlement": entitlement, "meter": meter, "closed": value}
                for (entitlement, meter), value in sorted(self._ledger.used.items())
                if _AT_PERIOD not in meter
            ],
            "quotas": [
                {
                    "feature": feature_id,
                    "entitlement": entitlement.entitlement_id,
                    "meter": state.meter_id,
                    "used": state.used,
                    "limit": state.limit,
                    "hard": state.hard,
                    "warning": state.words,
                }
                for feature_id, entitlement in sorted(self._rights.entitlements.items())
                for state in self._quota_states(entitlement, now_ns)
            ],
            "journal": {
                "id": self._ledger.head.journal_id,
                "records": self._ledger.head.seq,
                "stored": self._upload.stored_seq,
                "receipts_to": self._upload.acked_seq,
                "head": self._ledger.head.hash.hex(),
                "dead": self._dead,
            },
            "log": {"entries": self._log_head.seq, "head": self._log_head.hash.hex()},
            "buses": dict(self._buses),
            "signals": {
                name: {"value": reading.value, "unit": reading.unit, "age_ms": reading.age_ms}
                for name, reading in self._signals.snapshot(now_ns).items()
            },
        }

    # --- small -------------------------------------------------------------------------

    def trusted_time(self, now_ns: int) -> TrustedTime:
        """The trusted time; any thread may ask."""
        return self._time(now_ns)

    def _time(self, now_ns: int) -> TrustedTime:
        known = self._known_time
        if known is None or known[0] != now_ns or known[1] is not self._clock:
            # Any thread may ask; a step asks for each feature.
            known = self._known_time = (now_ns, self._clock, self._clock.now(now_ns))
        return known[2]

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _say(self, level: str, message: str, **fields: object) -> None:
        self._out.append(ev.Say(level, message, fields))


def _evidence_as_plain(evidence: ev.Evidence | None) -> dict[str, object] | None:
    return asdict(evidence) | {"read_back": evidence.read_back.hex()} if evidence else None


def _compile(spec: FeatureSpec) -> tuple[Condition, Condition]:
    return Condition.compile(spec.activate_when), Condition.compile(spec.release_when)


def _burn_due(feature: _Feature) -> bool:
    """A token with state 0 is there, and the ECU still holds an older one."""
    token, ecu = feature.token, feature.ecu
    if token is None or token.allows or ecu is None or not ecu.counter:
        return False
    return ecu.counter < token.counter


def _renewal_due(feature: _Feature) -> bool:
    token, ecu = feature.token, feature.ecu
    if token is None or not token.allows or ecu is None or ecu.counter is None:
        return False
    return ecu.counter < token.counter


def _parse_read_back(spec: FeatureSpec, answer: bytes) -> _EcuView | None:
    """Reads a ReadDataByIdentifier answer; None if it is not what the catalogue says."""
    read_back = spec.read_back
    if read_back is None:
        return None
    head = bytes([_READ_BACK_POSITIVE]) + read_back.did.to_bytes(2, "big")
    data = answer[len(head) :]
    if answer[: len(head)] != head or len(data) < len(read_back.mask):
        return None
    masked = bytes(d & m for d, m in zip(data, read_back.mask, strict=False))
    counter = None
    if read_back.counter_offset is not None:
        piece = data[read_back.counter_offset : read_back.counter_offset + 4]
        if len(piece) < 4:  # noqa: PLR2004 (a 4-byte counter, docs/token.md)
            return None
        counter = int.from_bytes(piece, "big")
    return _EcuView(on=masked == read_back.active, counter=counter)
