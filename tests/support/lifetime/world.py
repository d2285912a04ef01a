"""One vehicle, its agent and its cloud, moved from event to event: parked days cost nothing.

What the agent's loop does around the engine is done here in virtual time: a
writer that commits in order, a worker that verifies, a link. A crash may come
at every `_point`: between two commands, before a write, between write and sync,
between a commit and the word of it, on both sides.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable
from random import Random

from support.engine_world import EPOCH_MS, FEATURE, MS, SPEED
from support.lifetime.car import BEAT_MS, INFOS, Car
from support.lifetime.disk import Disk, State
from support.lifetime.office import SOURCE, Backup, MemoryTables, Office, Refusal, Tables, signed_batch

from agent import events as ev
from agent.engine import Engine
from agent.errors import VehicleError
from agent.features.guard import Guard
from agent.model import (
    RepositoryBytes,
    Rights,
    SignalBatch,
    SignalChange,
    SignalValue,
    TrustBytes,
    Verdict,
    Versions,
)
from agent.trust.clock import TrustedClock
from agent.trust.grant_log import verify_chain
from openfod.usage.v1 import usage_pb2

CHECKPOINT_MS = 30_000
WINDOW_MS = 120_000
RETRY_MS = 5_000
"""Pause after a write that failed."""
UNKNOWN = 10**12
STEP_SLACK_M = 40


class CrashError(Exception):
    """The agent ends here and now."""


class World:
    """See the module's docstring."""

    engine_class: type[Engine] = Engine
    disk_class: type[Disk] = Disk
    tables_class: type[MemoryTables] = MemoryTables
    office_class: type[Office] = Office

    def __init__(self, seed: int, tables: Tables | None = None) -> None:
        self.random = Random(seed)
        self.now_ms = 0
        self.car = Car()
        self.disk = self.disk_class(self._journal_id())
        self.office = self.office_class(tables if tables is not None else self.tables_class())
        self.engine: Engine | None = None
        self.guard = Guard(listen_only=False)
        self.violations: list[str] = []
        self.log: list[str] = []
        self.happened: Counter[str] = Counter()
        self.is_online = True
        self.is_repeating = False
        self.lost_frames: set[str] = set()
        self.is_crisp = True
        self.crash_in: int | None = None
        """Points until the next crash."""
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._life = self._stream = self._boot = self._tick = 0
        self._boot_at_ms = 0
        self._trusted_version = 0
        self._values: dict[str, SignalValue] = {}
        self._seen: dict[str, int] = {}
        self._jobs: deque[Callable[[], None]] = deque()
        self._is_writing = False
        self._is_bus_awake = self._has_power = self._is_open = False
        self._beat = 0
        self._begin_books()

    def _journal_id(self) -> str:
        return f"{self.random.getrandbits(64):016x}"

    # --- time ------------------------------------------------------------------

    @property
    def utc_ms(self) -> int:
        """The true time."""
        return EPOCH_MS + self.now_ms

    @property
    def _now_ns(self) -> int:
        return (self.now_ms - self._boot_at_ms + 5_000) * MS

    def at(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Runs `action` later, whatever becomes of the agent."""
        heapq.heappush(self._queue, (self.now_ms + delay_ms, next(self._order), action))

    def run_ms(self, duration_ms: int) -> None:
        """Lives on, from event to event."""
        end_ms = self.now_ms + duration_ms
        queue = self._queue
        while queue and queue[0][0] <= end_ms:
            due_ms, _, action = heapq.heappop(queue)
            self._move_to(due_ms)
            self._guarded(action)
        self._move_to(end_ms)

    def _move_to(self, due_ms: int) -> None:
        if due_ms > self.now_ms:
            self.car.move(due_ms - self.now_ms)
            self.now_ms = due_ms

    def _guarded(self, action: Callable[[], None]) -> None:
        """Does something of the agent; a crash in the middle of it ends the agent."""
        try:
            action()
        except CrashError:
            if self.random.random() < 0.5:
                self.kill()
            else:
                self.cut_power()
            self.at(self.random.randint(300, 20_000), self.start_again)

    def _point(self) -> None:
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in <= 0:
                self.crash_in = None
                raise CrashError

    def _later(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Like `at`, but only within this life of the agent."""
        life = self._life
        self.at(delay_ms, lambda: action() if life == self._life else None)

    # --- the agent's life --------------------------------------------------------

    def power_on(self) -> None:
        """The head unit gets power: a new boot, whose clock knows nothing of the time that passed."""
        self._boot += 1
        self._has_power = True
        self._boot_at_ms = self.now_ms - self.random.randint(0, 10_000)
        self._guarded(self._start)

    def start_again(self) -> None:
        """The agent starts anew after a crash, within the same boot or after a power cut."""
        if self.engine is not None or not self._is_bus_awake:
            return
        if self._has_power:
            self._guarded(self._start)
        else:
            self.power_on()

    def _start(self) -> None:
        self._life += 1
        self._jobs.clear()
        self._is_writing = False
        self._seen.clear()
        self._values.clear()
        disk, state = self.disk, self.disk.state
        self.engine = self.engine_class(
            source=SOURCE,
            clock=TrustedClock(
                mark_ms=state.mark_ms, build_ms=EPOCH_MS - 86_400_000, monotonic_ns=self._now_ns
            ),
            infos=INFOS,
            checkpoint_ns=CHECKPOINT_MS * MS,
            window_ns=WINDOW_MS * MS,
        )
        verdict = self._stored_verdict(state)
        self._note_start()
        self._tell(
            ev.Booted(
                verdict=verdict,
                head=disk.head,
                acked_seq=state.acked_seq,
                windows=state.windows,
                same_boot=state.boot == self._boot,
                used=dict(state.used),
                last_contact_ms=state.contact_ms,
                log_head=verify_chain(list(state.log)),
                owner_epoch=state.owner_epoch,
                former=frozenset(
                    w.entitlement_id
                    for w in state.windows
                    if state.own is not None and w.entitlement_id not in state.own
                ),
            )
        )
        self._later(self.random.randint(20, 900), self._connect)

    def kill(self) -> None:
        """kill -9: the system keeps what was written."""
        self.happened["kill"] += 1
        self._end()

    def cut_power(self) -> None:
        """The battery is off: what was not synced is lost or torn."""
        self.happened["power cut"] += 1
        self._end()
        self.disk.cut_power(self.random)
        self._has_power = False

    def _end(self) -> None:
        self._life += 1
        self._stream += 1
        self._is_open = False
        self.engine = None
        self.guard = Guard(listen_only=False)

    def stop(self) -> None:
        """The head unit shuts down as it should, if it can: the agent writes what it has and ends."""
        engine = self.engine
        if engine is not None:
            self._guarded(lambda: self._tell(ev.Stopping()))
            for _ in range(200):
                if self.engine is None or not (self._jobs or self._is_writing) or self.disk.is_full:
                    break
                self.run_ms(50)
        if self.engine is not None and not self.disk.is_full and not self._jobs:
            self._end()
            self._note_stop()
        elif self.engine is not None:
            self.cut_power()
        self.disk.flush()
        self._is_bus_awake = self._has_power = False
        self._beat += 1

    def _tell(self, event: ev.Event) -> None:
        """Gives the engine an event and carries out its commands."""
        engine = self.engine
        assert engine is not None
        commands = engine.step(event, self._now_ns)
        for command in commands:
            self._point()
            self._do(command)
        if commands:
            self._check_views(engine)
        self._tick += 1
        tick = self._tick
        wake_ms = max(1, (engine.wake_ns() - self._now_ns) // MS + 1)
        self._later(wake_ms, lambda: self._tell(ev.Ticked()) if tick == self._tick else None)

    def _do(self, command: ev.Command) -> None:
        match command:
            case ev.Say(level, message, fields):
                self.log.append(f"{self.now_ms} {level} {message} {fields.get('reason', '')}")
            case ev.Allow(rights, live):
                self.guard.allow(rights, live)
            case ev.MakeNonce():
                self._later(0, lambda: self._tell(ev.NonceMade(self.random.randbytes(16))))
            case ev.StoreUsage():
                self._note_records(command)
                made = self._settled(command)
                self._write(lambda: self._store_usage(command, made))
            case ev.StoreTrust():
                self._write(lambda: self._store_trust(command))
            case ev.MarkSent(number, _, _):
                self._write(lambda: self._store_mark(number))
            case ev.Verify():
                self._later(self.random.randint(1, 10), lambda: self._verify(command))
            case ev.SendHello(nonce, director, _, journal_id):
                self._to_cloud(lambda: self._hello(nonce, director.targets, journal_id))
            case ev.OfferNonce(nonce):
                self._to_cloud(lambda: self._offered(nonce))
            case ev.SendUsage(first, count):
                self._send_usage(first, first + count - 1)
            case ev.RunEcu():
                self._run_ecu(command)
            case _:
                pass

    # --- the bus -----------------------------------------------------------------

    def wake_bus(self) -> None:
        """Frames come at every beat from now on."""
        self._is_bus_awake = True
        self._beat += 1
        beat = self._beat

        def next_beat() -> None:
            if beat == self._beat:
                self.at(BEAT_MS, next_beat)
                self.send_frames()

        next_beat()

    def send_frames(self) -> None:
        """One frame of each signal, but for those that are lost."""
        if self.engine is None or not self._is_bus_awake:
            return
        at_ns, changes = self._now_ns, []
        for name, value in self.car.frames().items():
            if name in self.lost_frames:
                continue
            if self._values.get(name) != value:
                changes.append(SignalChange(name, value, at_ns, self._seen.get(name)))
            self._values[name], self._seen[name] = value, at_ns
        batch = SignalBatch(tuple(changes), dict(self._seen))
        self._guarded(lambda: self._tell(ev.SignalsArrived(batch)))

    def change(self, action: Callable[[], None]) -> None:
        """Something changes in the car, between two frames that are close to it, or at it."""
        self.send_frames()
        if not self.is_crisp:
            self.run_ms(self.random.randint(0, 100))
        action()
        if not self.is_crisp:
            self.run_ms(self.random.randint(0, 100))
        self.send_frames()

    # --- the disk ------------------------------------------------------------------

    def _write(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        if not self._is_writing:
            self._is_writing = True
            self._later(self.random.randint(1, 30), self._write_next)

    def _write_next(self) -> None:
        if self.disk.is_full:
            self._later(RETRY_MS, self._write_next)
            return
        job = self._jobs.popleft()
        self._is_writing = bool(self._jobs)
        if self._is_writing:
            self._later(self.random.randint(1, 30), self._write_next)
        self._point()
        job()

    def _committed(self, answer: ev.Event) -> None:
        self._point()
        self.disk.sync()
        self._point()
        self._tell(answer)

    def _store_usage(self, command: ev.StoreUsage, made: tuple[int, float]) -> None:
        wrong = self.disk.write_usage(command, self._boot)
        if wrong:
            self.violations.append(wrong)
        if command.entries and verify_chain(list(self.disk.state.log)) != command.entries[-1].head:
            self.violations.append("the owner's log does not end where the engine says")
        self._point()
        self.disk.sync()
        self._note_commit(command, made)
        self._point()
        self._tell(ev.Persisted(command.number))

    def _store_trust(self, command: ev.StoreTrust) -> None:
        self.disk.write_trust(command)
        self._committed(ev.Persisted(command.number))

    def _store_mark(self, number: int) -> None:
        self.disk.write_nothing()
        self._committed(ev.Persisted(number))

    # --- the network -----------------------------------------------------------------

    def cut_network(self) -> None:
        """No message gets through any more."""
        self.happened["partition"] += 1
        self.is_online = self._is_open = False
        self._stream += 1
        if self.engine is not None:
            self._guarded(lambda: self._tell(ev.LinkDown("cut")))

    def join_network(self) -> None:
        """Messages get through again."""
        self.is_online = True
        if self.engine is not None:
            self._later(self.random.randint(5, 500), self._connect)

    def _connect(self) -> None:
        if self.is_online:
            self._stream += 1
            self._is_open = True
            self.office.nonce = None
            self._tell(ev.LinkUp())

    def _delayed(
        self, action: Callable[[], None], schedule: Callable[[int, Callable[[], None]], None]
    ) -> None:
        """Any two messages may change places; in some stretches of a life they come twice."""
        schedule(self.random.randint(5, 60), action)
        if self.is_repeating and self.random.random() < 0.3:
            schedule(self.random.randint(60, 40_000), action)

    def _to_cloud(self, action: Callable[[], None]) -> None:
        """What is on its way arrives even if the agent dies meanwhile; late, it may be of an old stream."""
        if self.is_online:
            self._delayed(action, self.at)

    def _to_vehicle(self, action: Callable[[], None]) -> None:
        if not self._is_open:
            return
        stream = self._stream
        self._delayed(lambda: action() if stream == self._stream and self.is_online else None, self._later)

    def push(self) -> None:
        """The cloud has something new: it goes out with the unused nonce, if there is one."""
        if self.office.nonce is not None and self._is_open:
            self._send_update(self.office.nonce)

    def _hello(self, nonce: bytes, version: int, journal_id: str) -> None:
        if version > self.office.rights.version:
            # A cloud from a backup: its operator has confirmed that it goes on above what vehicles report.
            self.office.publish_again(version, self.car.ecu.counter)
        self._send_update(nonce)
        receipt = self.office.latest_receipt(journal_id)
        if receipt is not None:
            self._to_vehicle(lambda: self._receipt(receipt))

    def _offered(self, nonce: bytes) -> None:
        verdict = self.disk.state.verdict
        if verdict is None or verdict.rights.version < self.office.rights.version:
            self._send_update(nonce)
        else:
            self.office.nonce = nonce

    def _send_update(self, nonce: bytes) -> None:
        self.office.nonce = None
        said = {"version": self.office.rights.version, "nonce": nonce.hex(), "ms": self.utc_ms}
        update = TrustBytes(director=RepositoryBytes(timestamp=json.dumps(said).encode()))
        self._to_vehicle(lambda: self._tell(ev.UpdateArrived(update)))

    def _stored_verdict(self, state: State) -> Verdict | None:
        """What was stored, as a start judges it."""
        self._trusted_version = state.verdict.rights.version if state.verdict else 0
        return state.verdict

    def _verify(self, command: ev.Verify) -> None:
        """A verifier that knows nonces and versions, and takes the signature for granted."""
        said = json.loads(command.update.director.timestamp)
        nonce = bytes.fromhex(said["nonce"])
        rights = self.office.rights.published.get(said["version"])
        if nonce not in command.nonces:
            self._tell(ev.UpdateRefused("ReplayError", "no such nonce is waiting"))
        elif rights is None or rights.version < self._trusted_version:
            self._tell(ev.UpdateRefused("RollbackError", f"older than version {self._trusted_version}"))
        else:
            self._trusted_version = rights.version
            versions = Versions(1, said["ms"], rights.version, rights.version)
            verdict = Verdict(TrustBytes(), versions, Versions(), rights, said["ms"])
            self._tell(ev.UpdateVerified(verdict, nonce, self._now_ns))

    def _send_usage(self, first: int, through: int) -> None:
        state = self.disk.state
        records = tuple(record.content for record in self.disk.records[first - 1 : through])
        if not records:
            return
        signed = signed_batch(state.journal_id, records)
        self._to_cloud(lambda: self._usage_arrived(signed))

    def _usage_arrived(self, signed: usage_pb2.SignedUsageBatch) -> None:
        answer = self.office.take(signed, self.utc_ms)
        if isinstance(answer, Refusal):
            refused = ev.UsageRefused(answer.kind, answer.reason, answer.stored_through)
            self._to_vehicle(lambda: self._tell(refused))
        else:
            self._to_vehicle(lambda: self._receipt(answer))

    def _receipt(self, content: bytes) -> None:
        signed = usage_pb2.SignedUsageReceipt.FromString(content)
        receipt = usage_pb2.UsageReceipt.FromString(signed.receipt)
        self._write(lambda: self._keep_receipt(receipt))

    def _keep_receipt(self, receipt: usage_pb2.UsageReceipt) -> None:
        """As the agent does: a receipt counts if its hash is that of the vehicle's own record."""
        state, through = self.disk.state, receipt.through_seq
        if receipt.journal_id != state.journal_id:
            return
        known = self.disk.records[through - 1].hash if through <= state.count else None
        if known != receipt.head_hash:
            self.happened["foreign receipt"] += 1
            if not self.is_copy:
                self.violations.append(f"the cloud signed for record {through}, which the vehicle lost")
            return
        self.disk.write_receipt(through)
        self._committed(ev.ReceiptStored(through))

    # --- the ECU -----------------------------------------------------------------------

    def _run_ecu(self, job: ev.RunEcu) -> None:
        self._check_job(job)
        latency_ms = 1000 if self.car.ecu.is_silent else self.random.randint(5, 400)
        outcome: list[VehicleError | None] = [None]

        def act() -> None:
            if job.switches:
                self.send_frames()
            ecu = self.car.ecu
            before, was = self.car.is_heating, ecu.counter
            outcome[0] = ecu.run(job.requests, self.car.speed_kmh)
            if ecu.counter < was:
                self.violations.append("the ECU took an older token")
            if before != self.car.is_heating:
                self.at(0 if self.is_crisp else self.random.randint(0, 100), self.send_frames)

        def done() -> None:
            error = outcome[0]
            self._tell(ev.EcuDone(job.feature_id, b"" if error else self.car.ecu.read_back(), error))

        # The ECU acts whether or not the agent lives to hear of it.
        self.at(latency_ms // 2, act)
        self._later(latency_ms, done)

    # --- promises, as they happen --------------------------------------------------------

    def _check_job(self, job: ev.RunEcu) -> None:
        """Promises 1 and 3, at the moment when something is asked of an ECU."""
        verdict = self.disk.durable.verdict
        rights = verdict.rights if verdict else Rights(0)
        for request in job.requests:
            try:
                self.guard.approve(job.ecu, request)
                self.guard.close(job.ecu)
            except VehicleError as error:
                self.violations.append(f"the guard refused the engine's own request: {error}")
            if request.startswith(bytes.fromhex("31010F0D")):
                stored = rights.tokens.get(job.feature_id)
                if stored is None or stored.content != request[4:]:
                    self.violations.append("a token left the agent that was not on disk")
                elif stored.allows and job.feature_id not in rights.entitlements:
                    self.violations.append("a feature was switched on without a right on disk")
        if job.purpose == "activate" and job.feature_id not in rights.entitlements:
            self.violations.append("a feature was activated without a right on disk")
        # What moved off a moment ago, and no frame has told yet, nobody can know.
        is_known = self._values.get(SPEED, 999.0) != 0.0 and not self.lost_frames
        if job.purpose == "release" and self.car.speed_kmh > 1 and self.car.is_on and is_known:
            self.violations.append(f"a feature was taken away at {self.car.speed_kmh} km/h")

    def _check_views(self, engine: Engine) -> None:
        """Promise 5, and that trusted time is never ahead of the true one."""
        for view in engine.features():
            if not view.reason:
                self.violations.append(f"{view.feature_id} is {view.state} without a reason")
        ahead_ms = engine.trusted_time(self._now_ns).unix_ms - self.utc_ms
        if ahead_ms > 0:
            self.violations.append(f"trusted time is {ahead_ms} ms ahead of the true time")

    def state(self) -> str:
        """State of the feature, or "DOWN"."""
        if self.engine is None:
            return "DOWN"
        return {v.feature_id: v.state for v in self.engine.features()}.get(FEATURE, "NONE")

    # --- the books: what was recorded, against the truth -----------------------------------

    def _begin_books(self) -> None:
        self.is_copy = False
        """The disk is an old copy: it and the cloud may tell two stories until an operator looks."""
        self._credit: dict[int, tuple[str, int, int]] = {}
        """By position: meter, value, and the gap as far as anything can have happened in it."""
        self._from_seq = 0
        self._truth = (0, 0.0)
        self._down_from: tuple[int, float] | None = None
        self._last_write = (0, 0.0)
        self._pending: frozenset[tuple[str, int]] = frozenset()
        self._excused_to: int | None = None
        self._has_given_up = False
        """What a sale left open was declared without a bound; that covers it until its ECU is off."""
        self.segments = 0

    def _note_start(self) -> None:
        self._pending = frozenset((w.meter_id, w.mark_ms) for w in self.disk.state.windows)
        if not self._pending:
            self._down_from = None
        elif self._down_from is None:
            self._down_from = self._last_write

    def _note_records(self, command: ev.StoreUsage) -> None:
        """Notes what the records say, and of a dead agent's gap no more than the time it was dead."""
        for record in command.records:
            message = usage_pb2.UsageRecord.FromString(record.content)
            gap = UNKNOWN if message.gap_unbounded else message.gap
            own = self.disk.state.own
            is_former = own is not None and message.entitlement_id not in own
            is_down = message.gap_reason == usage_pb2.GAP_REASON_AGENT_DOWN
            # Of a former owner's window nobody waits for the end: what follows it is in its missing bound.
            if is_down and self._down_from is not None and not is_former:
                dead_ms = self.now_ms - self._down_from[0]
                dead_m = round(self.car.position_m - self._down_from[1]) + STEP_SLACK_M
                is_time = message.unit == usage_pb2.UNIT_MILLISECOND
                gap = min(gap, dead_ms if is_time else dead_m)
            self._has_given_up |= is_former and message.gap_unbounded
            self._credit[record.seq] = (message.meter_id, message.value, gap)

    def _note_commit(self, command: ev.StoreUsage, made: tuple[int, float]) -> None:
        """What waited is declared once the commit that says so holds."""
        if self._pending.isdisjoint((w.meter_id, w.mark_ms) for w in command.windows):
            self._down_from, self._pending = None, frozenset()
        self._last_write = made

    def _settled(self, command: ev.StoreUsage) -> tuple[int, float]:
        """Up to when, and where, a commit of usage has settled everything: there a crash's gap begins."""
        now, here = self.now_ms, self.car.position_m
        marks = [w.mark_ns // MS + self._boot_at_ms - 5_000 for w in command.windows]
        metres = [w.odometer_m for w in command.windows if w.odometer_m is not None]
        return min([now, *marks]), min([here, *metres])

    def _note_stop(self) -> None:
        """The agent has ended as it should: what it has recorded is compared with the truth."""
        self._last_write = (self.now_ms, self.car.position_m)
        unresolved = self._down_from is not None
        self.compare(is_final=not unresolved)

    def compare(self, *, is_final: bool) -> None:
        """Promise 2 since the last comparison: billed ≤ truth, and truth ≤ billed + declared."""
        state = self.disk.state
        if self._excused_to is not None:
            known = state.verdict.rights.version if state.verdict else 0
            if not self.is_copy and known >= self._excused_to:
                self._excused_to = None
            self._skip_books()
            return
        is_final = is_final and not (self._has_given_up and self.car.ecu.on)
        count = state.count
        sums: dict[str, list[int]] = {"active-time": [0, 0], "heated-distance": [0, 0]}
        for seq in range(self._from_seq + 1, count + 1):
            meter, value, gap = self._credit[seq]
            sums[meter][0] += value
            sums[meter][1] += gap
        truths = (self.car.heated_ms - self._truth[0], self.car.heated_m - self._truth[1])
        for (meter, (value, gap)), truth in zip(sums.items(), truths, strict=True):
            if value > truth + 1e-6:
                self.violations.append(f"{meter}: billed {value}, truth {truth:.1f}, by {self.now_ms}")
            if is_final and truth > value + gap + 1e-6:
                self.violations.append(
                    f"{meter}: truth {truth:.1f}, declared only up to {value + gap}, by {self.now_ms}"
                )
        if is_final:
            self.segments += 1
            self._has_given_up = False
            self._from_seq, self._truth = count, (self.car.heated_ms, self.car.heated_m)

    # --- what befalls a disk or a cloud -------------------------------------------------------

    def new_journal(self) -> None:
        """A workshop begins a new journal, after a finding that two stories are told."""
        self.disk.begin_journal(self._journal_id())
        self._skip_books()
        self.is_copy = False

    def note_copy(self) -> None:
        """An old copy of the disk is in the vehicle: it knows nothing of what came after it.

        What is used until it has its rights and a journal again, a finding of
        the cloud explains, and no record.
        """
        self.is_copy = True
        self._excused_to = self.office.rights.version
        self._skip_books()

    def _skip_books(self) -> None:
        self._from_seq, self._truth = self.disk.state.count, (self.car.heated_ms, self.car.heated_m)
        self._down_from = None
        self._last_write = (self.now_ms, self.car.position_m)

    def restore_cloud(self, backup: Backup) -> None:
        """The cloud comes back from a backup: streams end."""
        self.office.put_back(backup)
        if self.is_online:
            self.cut_network()
            self.join_network()
