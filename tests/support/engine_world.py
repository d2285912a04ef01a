"""A whole life in virtual time: vehicle, ECU, disk, network and cloud around the real engine.

The vehicle alone knows the truth. The disk keeps what was synced before a
crash and loses the rest. The verifier is a fake that knows versions and
nonces; everything else that the engine meets behaves as the real thing does.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from agent import events as ev
from agent.engine import Engine
from agent.errors import EcuSilentError, NegativeResponseError, VehicleError
from agent.features.guard import Guard
from agent.metering.merge import Kept, merge
from agent.metering.meter import OpenWindow
from agent.metering.record import GENESIS_HASH, Head, Record
from agent.model import (
    Entitlement,
    FeatureSpec,
    PlanKind,
    Quota,
    RepositoryBytes,
    Rights,
    SignalBatch,
    SignalChange,
    SignalInfo,
    SignalValue,
    Token,
    TrustBytes,
    Verdict,
    Versions,
)
from agent.trust.catalogue import parse_feature
from agent.trust.clock import TrustedClock
from agent.trust.grant_log import LogEntry, verify_chain
from openfod.usage.v1 import usage_pb2

MS = 1_000_000
EPOCH_MS = 1_800_000_000_000
CHECKPOINT_MS = 2_000
STEP_M = 10
FEATURE = "seat-heating"
SPEED, ODO = "Vehicle.Speed", "Vehicle.TraveledDistance"
HEAT = "Vehicle.Cabin.Seat.Row1.DriverSide.Heating"
IGNITION = "Vehicle.LowVoltageSystemState"
INFOS = {
    SPEED: SignalInfo(SPEED, "km/h", 0.01, 500 * MS),
    ODO: SignalInfo(ODO, "km", STEP_M / 1000, 1000 * MS),
    HEAT: SignalInfo(HEAT, "percent", 1, 1000 * MS),
    IGNITION: SignalInfo(IGNITION, "", 0, 1000 * MS),
}
CATALOGUE = Path(__file__).resolve().parents[2] / "deploy/demo/catalogue/features"


def catalogue_feature(feature_id: str = FEATURE) -> FeatureSpec:
    """The real catalogue entry of the demonstration."""
    return parse_feature((CATALOGUE / feature_id / "1.toml").read_bytes())


def entitlement(number: int, **changes: object) -> Entitlement:
    """A monthly right that is in force."""
    base = Entitlement(
        entitlement_id=f"ent-{number:016x}",
        feature_id=FEATURE,
        min_release=1,
        account="acc-anna",
        plan_kind=PlanKind.SUBSCRIPTION,
        plan_id="seat-heating-monthly",
        plan_version=1,
        not_before_s=0,
        not_after_s=0,
        odometer_from_m=0,
        odometer_to_m=0,
        ignition_cycles=200,
        operating_s=0,
        offline_grace_s=0,
        quotas=(),
        parameters=(),
        stays_with_vehicle=False,
        display={},
        trace_id=f"{number:032x}",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def token(counter: int, *, allows: bool) -> Token:
    """A token whose content says what it is; only its hash matters here."""
    content = json.dumps({"counter": counter, "allows": allows}).encode()
    return Token("seat-module", FEATURE, 1, counter, allows, content, hashlib.sha256(content).hexdigest())


@dataclass
class Disk:
    """What survives a crash."""

    verdict: Verdict | None = None
    mark_ms: int = 0
    contact_ms: int = 0
    records: dict[int, Record] = field(default_factory=dict)
    windows: tuple[OpenWindow, ...] = ()
    used: dict[tuple[str, str], int] = field(default_factory=dict)
    acked_seq: int = 0
    sent_through: int = 0
    log: list[bytes] = field(default_factory=list)

    @property
    def head(self) -> Head:
        """Where the journal ends."""
        if not self.records:
            return Head("00000000deadbeef", 0, GENESIS_HASH)
        last = self.records[max(self.records)]
        return Head("00000000deadbeef", last.seq, last.hash)


@dataclass
class SeatEcu:
    """The seat module: its own counter, its own state."""

    counter: int = 0
    on: bool = False
    silent: bool = False
    readings: int = 0


class Cloud:
    """Rights by version, and the usage that it took, once and for ever."""

    def __init__(self) -> None:
        self.version = self.owner_epoch = 1
        self.rights = {1: Rights(version=1)}
        self.counter = 0
        self.taken: dict[int, bytes] = {}
        self.head = GENESIS_HASH
        self.refusals: list[str] = []
        self.nonce: bytes | None = None

    def grant(self, right: Entitlement) -> None:
        """Grants with a token of its own."""
        self.counter += 1
        self._publish({right.feature_id: right}, token(self.counter, allows=True))

    def revoke(self) -> None:
        """Ends the right; the token burns the older ones."""
        self.counter += 1
        self._publish({}, token(self.counter, allows=False))

    def sell(self, right: Entitlement | None) -> None:
        """The vehicle has a new owner, with a right of their own or without any."""
        self.owner_epoch += 1
        if right is None:
            self.revoke()
        else:
            self.grant(right)

    def _publish(self, rights: dict[str, Entitlement], feature_token: Token) -> None:
        self.version += 1
        spec, tokens = catalogue_feature(), {catalogue_feature().feature_id: feature_token}
        self.rights[self.version] = Rights(
            self.version, rights, {spec.feature_id: spec}, tokens, owner_epoch=self.owner_epoch
        )

    def take(self, records: list[bytes]) -> int | None:
        """Stores a batch; returns the highest stored seq, or None if it is refused."""
        for content in records:
            record = usage_pb2.UsageRecord.FromString(content)
            known = self.taken.get(record.seq)
            if known is not None:
                if known != content:
                    self.refusals.append(f"record {record.seq} was sent with other bytes")
                    return None
                continue
            last = max(self.taken, default=0)
            follows = record.seq == last + 1 and record.prev_hash == self.head
            merged = record.merged
            across = merged.first_seq == last + 1 and merged.before_hash == self.head
            if not follows and not (across and record.seq == merged.last_seq + 1):
                self.refusals.append(f"record {record.seq} does not follow {last}")
                return None
            self.taken[record.seq] = content
            self.head = hashlib.sha256(content).digest()
        return max(self.taken, default=0)


@dataclass
class Truth:
    """What only the vehicle knows, in ms and m."""

    heated_ms: float = 0.0
    heated_m: float = 0.0


class World:
    """Runs lives; `run_ms` moves the time, the other methods are what happens in them."""

    def __init__(self, seed: int = 0) -> None:
        self.random = Random(seed)
        self.now_ms = 1000
        self.disk, self.ecu, self.cloud, self.truth = Disk(), SeatEcu(), Cloud(), Truth()
        self.speed_kmh, self.ignition, self.requested = 0.0, "ON", True
        self.position_m = 12_345_678.0
        self.log: list[tuple[int, str, str, dict[str, object]]] = []
        self.violations: list[str] = []
        self.ecu_jobs: list[tuple[int, str]] = []
        self.online = True
        self.lost_frames: set[str] = set()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._life = 0
        self.engine: Engine | None = None
        self.guard = Guard(listen_only=False)
        self._seen: dict[str, int] = {}
        self._values: dict[str, SignalValue] = {}
        self._stream = 0
        self.dead_since_ms: int | None = None
        self.duplicate_messages = False
        self.unwritten: list[ev.StoreTrust | ev.StoreUsage | ev.MarkSent | ev.MergeUnsent] | None = None
        """What waits for a disk that cannot be written; None while it can."""

    # --- running ------------------------------------------------------------

    def at(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Runs `action` later; only if the same life of the agent goes on where it must."""
        heapq.heappush(self._queue, (self.now_ms + delay_ms, next(self._order), action))

    def run_ms(self, duration_ms: int) -> None:
        """Lives on, in windows of 20 ms."""
        end_ms = self.now_ms + duration_ms
        while self.now_ms < end_ms:
            self._move(20)
            while self._queue and self._queue[0][0] <= self.now_ms:
                heapq.heappop(self._queue)[2]()
            if self.engine is not None:
                self._frames()

    def _move(self, step_ms: int) -> None:
        self.now_ms += step_ms
        moved_m = self.speed_kmh / 3600 * step_ms
        self.position_m += moved_m
        if self.heating:
            self.truth.heated_ms += step_ms
            self.truth.heated_m += moved_m

    @property
    def heating(self) -> bool:
        """Whether the heater's output is on."""
        return self.ecu.on and self.requested and self.ignition == "ON"

    def _frames(self) -> None:
        current: dict[str, SignalValue] = {SPEED: self.speed_kmh}
        if self.now_ms % 100 == 0:
            current[ODO] = int(self.position_m) // STEP_M * STEP_M / 1000
            current[HEAT] = 66.0 if self.heating else 0.0
            current[IGNITION] = self.ignition
        changes = []
        for name, value in current.items():
            if name in self.lost_frames:
                continue
            if self._values.get(name) != value:
                changes.append(SignalChange(name, value, self.now_ms * MS, self._seen.get(name)))
            self._values[name], self._seen[name] = value, self.now_ms * MS
        self.tell(ev.SignalsArrived(SignalBatch(tuple(changes), dict(self._seen))))

    # --- the agent's life -----------------------------------------------------

    def boot(self, *, same_boot: bool = True) -> None:
        """Starts the agent from the disk."""
        self._life += 1
        self.dead_since_ms = None
        self._seen.clear()
        self._values.clear()
        self.engine = Engine(
            source="veh-0123456789abcdef",
            clock=TrustedClock(mark_ms=self.disk.mark_ms, build_ms=EPOCH_MS, monotonic_ns=self.now_ms * MS),
            infos=INFOS,
            checkpoint_ns=CHECKPOINT_MS * MS,
            window_ns=10_000 * MS,
        )
        disk = self.disk
        self.tell(
            ev.Booted(
                verdict=disk.verdict,
                head=disk.head,
                acked_seq=disk.acked_seq,
                windows=disk.windows,
                same_boot=same_boot,
                used=disk.used,
                last_contact_ms=disk.contact_ms,
                log_head=verify_chain(disk.log),
                owner_epoch=disk.verdict.rights.owner_epoch if disk.verdict else 0,
            )
        )
        if self.online:
            self._later(self.random.randint(5, 500), self._connect)

    def kill(self) -> None:
        """kill -9: what is not on disk is gone, and so are all answers."""
        self._life += 1
        self.engine = None
        self.dead_since_ms = self.now_ms

    def cut_network(self) -> None:
        """No message gets through any more."""
        self.online = False
        self._stream += 1
        if self.engine is not None:
            self.tell(ev.LinkDown("cut"))

    def join_network(self) -> None:
        """Messages get through again."""
        self.online = True
        if self.engine is not None:
            self._later(self.random.randint(5, 500), self._connect)

    def _connect(self) -> None:
        if self.online:
            self._stream += 1
            self.cloud.nonce = None
            self.tell(ev.LinkUp())

    def _later(self, delay_ms: int, action: Callable[[], None]) -> None:
        """Like `at`, but only within this life of the agent."""
        life = self._life

        def guarded() -> None:
            if life == self._life:
                action()

        self.at(delay_ms, guarded)

    def _over_network(self, action: Callable[[], None]) -> None:
        stream = self._stream

        def guarded() -> None:
            if stream == self._stream and self.online:
                action()

        self._later(self.random.randint(5, 60), guarded)
        if self.duplicate_messages and self.random.random() < 0.2:
            self._later(self.random.randint(60, 200), guarded)

    def tell(self, event: ev.Event) -> None:
        """Gives the engine an event and carries out its commands."""
        assert self.engine is not None
        for command in self.engine.step(event, self.now_ms * MS):
            self._do(command)
        self._check_promises()

    # --- commands ---------------------------------------------------------------

    def _do(self, command: ev.Command) -> None:
        match command:
            case ev.Say(level, message, fields):
                self.log.append((self.now_ms, level, message, dict(fields)))
            case ev.Allow(rights, live):
                self.guard.allow(rights, live)
            case ev.MakeNonce():
                self._later(0, lambda: self.tell(ev.NonceMade(self.random.randbytes(16))))
            case ev.StoreTrust() | ev.StoreUsage() | ev.MarkSent() | ev.MergeUnsent():
                self._later(self.random.randint(1, 30), lambda: self._persist(command))
            case ev.Verify():
                self._later(self.random.randint(1, 10), lambda: self._verify(command))
            case ev.SendHello(nonce, director, _, _):
                self._over_network(lambda: self._hello(nonce, director.targets))
            case ev.OfferNonce(nonce):
                self._over_network(lambda: self._offered(nonce))
            case ev.SendUsage(first, count):
                numbers = sorted(n for n in self.disk.records if n >= first)[:count]
                records = [self.disk.records[n].content for n in numbers]
                self._over_network(lambda: self._usage(records))
            case ev.RunEcu():
                self._run_ecu(command)
            case _:
                pass

    def let_journal_die(self) -> None:
        """From now on nothing can be written."""
        self.unwritten = []
        self.tell(ev.JournalDead("disk I/O error"))

    def let_journal_live(self) -> None:
        """What waited is written, in its order."""
        waiting, self.unwritten = self.unwritten or [], None
        for command in waiting:
            self._persist(command)
        self.tell(ev.JournalAlive())

    def _merge(self, number: int) -> None:
        behind = max(self.disk.sent_through, self.disk.acked_seq)
        unsent = [record for seq, record in sorted(self.disk.records.items()) if seq > behind]
        if unsent:
            kept = Kept(behind, self.disk.records[behind].hash if behind else GENESIS_HASH)
            _, merged = merge(self.disk.head, kept, (record.content for record in unsent))
            for record in unsent:
                del self.disk.records[record.seq]
            self.disk.records |= {record.seq: record for record in merged}
        self.tell(ev.JournalMoved(number, self.disk.head))

    def _persist(self, command: ev.StoreTrust | ev.StoreUsage | ev.MarkSent | ev.MergeUnsent) -> None:
        if self.unwritten is not None:
            self.unwritten.append(command)
            return
        if isinstance(command, ev.MergeUnsent):
            self._merge(command.number)
            return
        match command:
            case ev.StoreTrust(_, verdict, mark_ms):
                self.disk.verdict = verdict
                if command.new_owner:
                    self.disk.log.clear()
                if command.live:
                    self.disk.contact_ms = mark_ms
                self.disk.mark_ms = max(self.disk.mark_ms, mark_ms)
            case ev.StoreUsage(_, records, windows, used, mark_ms):
                for record in records:
                    if record.seq in self.disk.records:
                        self.violations.append(f"record {record.seq} was written twice")
                    self.disk.records[record.seq] = record
                self.disk.windows, self.disk.used = windows, dict(used)
                self.disk.mark_ms = max(self.disk.mark_ms, mark_ms)
            case ev.MarkSent(_, first, count):
                numbers = sorted(n for n in self.disk.records if n >= first)[:count]
                self.disk.sent_through = max([self.disk.sent_through, *numbers])
        if not isinstance(command, ev.MarkSent):
            self._append_log(command.entries)
        self.tell(ev.Persisted(command.number))

    def _append_log(self, entries: tuple[LogEntry, ...]) -> None:
        self.disk.log += [entry.content for entry in entries]
        head = verify_chain(self.disk.log)
        if entries and head != entries[-1].head:
            self.violations.append(f"the log ends at {head}, expected {entries[-1].head}")

    # --- network ---------------------------------------------------------------

    def push(self) -> None:
        """The cloud has something new: it goes out with the unused nonce, if there is one."""
        if self.cloud.nonce is not None and self.engine is not None:
            self._send_update(self.cloud.nonce)

    def _hello(self, nonce: bytes, targets: int) -> None:
        self._send_update(nonce)
        through = max(self.cloud.taken, default=0)
        if through:
            self._over_network(lambda: self._receipt(through))

    def _offered(self, nonce: bytes) -> None:
        behind = self.disk.verdict is None or self.disk.verdict.rights.version < self.cloud.version
        if behind:
            self._send_update(nonce)
        else:
            self.cloud.nonce = nonce

    def _send_update(self, nonce: bytes) -> None:
        self.cloud.nonce = None
        content = json.dumps({"version": self.cloud.version, "nonce": nonce.hex(), "ms": self.utc_ms})
        update = TrustBytes(director=RepositoryBytes(timestamp=content.encode()))
        self._over_network(lambda: self.tell(ev.UpdateArrived(update)))

    @property
    def utc_ms(self) -> int:
        """The true time, which the cloud knows."""
        return EPOCH_MS + self.now_ms

    def _verify(self, command: ev.Verify) -> None:
        said = json.loads(command.update.director.timestamp)
        nonce = bytes.fromhex(said["nonce"])
        if nonce not in command.nonces:
            self.tell(ev.UpdateRefused("ReplayError", "no such nonce is waiting"))
            return
        rights = self.cloud.rights[said["version"]]
        versions = Versions(1, said["ms"], rights.version, rights.version)
        verdict = Verdict(TrustBytes(), versions, Versions(), rights, said["ms"])
        self.tell(ev.UpdateVerified(verdict, nonce, self.now_ms * MS))

    def _usage(self, records: list[bytes]) -> None:
        through = self.cloud.take(records)
        if through is not None:
            self._over_network(lambda: self._receipt(through))

    def _receipt(self, through: int) -> None:
        record = self.disk.records.get(through)
        if record is None:
            self.violations.append(f"the cloud signed for record {through}, which the vehicle lost")
            return
        self.disk.acked_seq = max(self.disk.acked_seq, through)
        self.tell(ev.ReceiptStored(through))

    # --- ECU ------------------------------------------------------------------------

    def _run_ecu(self, job: ev.RunEcu) -> None:
        self.ecu_jobs.append((self.now_ms, job.purpose))
        self._check_job(job)

        latency_ms = 1000 if self.ecu.silent else self.random.randint(5, 400)
        outcome: list[VehicleError | None] = [None]

        def act() -> None:
            if self.ecu.silent:
                outcome[0] = EcuSilentError("seat-module did not answer within 1000 ms")
                return
            for request in job.requests:
                outcome[0] = self._request(request)
                if outcome[0] is not None:
                    return

        def done() -> None:
            error = outcome[0]
            answer = self._reading() if job.purpose == "reading" else self._read_back()
            self.tell(ev.EcuDone(job.feature_id, b"" if error else answer, error))

        # The ECU acts whether or not the agent lives to hear of it.
        self.at(latency_ms // 2, act)
        self._later(latency_ms, done)

    def _request(self, request: bytes) -> VehicleError | None:
        if request.startswith(bytes.fromhex("31010F0D")):
            said = json.loads(request[4:])
            if said["counter"] < self.ecu.counter:
                return NegativeResponseError("seat-module", service=0x31, nrc=0x24, name="sequence")
            if self.speed_kmh > 5 and said["allows"] != self.ecu.on:
                return NegativeResponseError("seat-module", service=0x31, nrc=0x88, name="speed")
            self.ecu.counter, self.ecu.on = said["counter"], said["allows"]
        elif request.startswith(bytes.fromhex("31010F0E")):
            self.ecu.on = False
        return None

    def _read_back(self) -> bytes:
        return (
            bytes.fromhex("620F21")
            + bytes([int(self.ecu.on), 0])
            + self.ecu.counter.to_bytes(4, "big")
            + b"\xff" * 8
        )

    def _reading(self) -> bytes:
        """What the ECU counted; nothing here looks at a signature."""
        self.ecu.readings += 1
        said = {"reading": self.ecu.readings, "token": self.ecu.counter, "on_ms": int(self.truth.heated_ms)}
        return bytes.fromhex("620F41") + json.dumps(said).encode()

    # --- promises -------------------------------------------------------------------

    def _check_job(self, job: ev.RunEcu) -> None:
        """Promises 1 and 3, at the moment when something is asked of an ECU."""
        for request in job.requests:
            try:
                self.guard.approve(job.ecu, request)
                self.guard.close(job.ecu)
            except VehicleError as error:
                self.violations.append(f"the guard refused the engine's own request: {error}")
            if request.startswith(bytes.fromhex("31010F0D")):
                rights = self.disk.verdict.rights if self.disk.verdict else Rights(0)
                stored = rights.tokens.get(job.feature_id)
                if stored is None or stored.content != request[4:]:
                    self.violations.append("a token left the agent that was not on disk")
                elif stored.allows and job.feature_id not in rights.entitlements:
                    self.violations.append("a feature was switched on without a right on disk")
        if job.purpose == "release" and self.speed_kmh > 1 and self.ignition == "ON":
            self.violations.append(f"a feature was taken away at {self.speed_kmh} km/h")

    def _check_promises(self) -> None:
        if self.engine is None:
            return
        for view in self.engine.features():
            if not view.reason:
                self.violations.append(f"{view.feature_id} is {view.state} without a reason")

    def state(self) -> str:
        """State of the feature, or "DOWN"."""
        if self.engine is None:
            return "DOWN"
        return {v.feature_id: v.state for v in self.engine.features()}.get(FEATURE, "NONE")

    def billed(self, meter_id: str) -> tuple[int, int]:
        """(value, gap) of all records on disk, in ms or m."""
        value = gap = 0
        for record in self.disk.records.values():
            message = usage_pb2.UsageRecord.FromString(record.content)
            if message.meter_id == meter_id:
                value += message.value
                gap += 10**12 if message.gap_unbounded else message.gap
        return value, gap


def with_quota(number: int, limit_ms: int) -> Entitlement:
    """A right with a hard quota of active time."""
    return entitlement(number, quotas=(Quota("active-time", limit_ms, hard=True),))
