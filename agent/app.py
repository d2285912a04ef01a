"""The composition root: one loop around the engine, and the threads that serve it.

The loop never waits for a disk, a signature or the network. A reader thread
for each bus, a writer thread for SQLite, a worker for verification and
signing, and the link's thread post to one queue. Readers decode signals
themselves; the loop fetches what they said before each decision. Only here is a fault caught
broadly: it leads to the safe state (nothing more is sent) and a non-zero exit.
"""

from __future__ import annotations

import queue
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from cryptography.exceptions import InvalidSignature
from google.protobuf.message import DecodeError

from agent import __version__, boot, importing
from agent import events as ev
from agent.adapters.archive import KEY_BYTES, seal
from agent.adapters.clock import SystemClock, SystemRandom
from agent.adapters.identity import Identity
from agent.adapters.identity import read as read_identity
from agent.adapters.identity import settle as settle_identity
from agent.adapters.journal import Restart
from agent.adapters.receipts import receipt_key, verified_receipt
from agent.adapters.store import MAX_NUMBER, KeptRecord, Room, Store
from agent.buses import Buses, Dropped, Frames, SignalsReady, StateChanged
from agent.config import AgentConfig
from agent.engine import Engine
from agent.errors import (
    AgentError,
    ConditionError,
    JournalError,
    MalformedError,
    ReplayError,
    RestartError,
    TrustError,
)
from agent.features.guard import Guard
from agent.features.lifecycle import State
from agent.metering.ledger import check_conditions
from agent.metering.record import BATCH_DOMAIN, GENESIS_HASH, RESTART_DOMAIN, batch
from agent.model import Rights, Verdict, Versions
from agent.signals.state import Collector
from agent.trust.clock import UNKNOWN_UNCERTAINTY_MS, TrustedClock
from agent.trust.expiry import Ending, endings
from agent.trust.verifier import Floors, floors_after, verify_update
from common import log
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

if TYPE_CHECKING:  # what a start loads only after its first frame
    from agent.adapters.link import Link
    from agent.adapters.local_api import LocalApi
    from agent.adapters.uds import UdsClient

UDS_POLL_S = 0.002
"""Pause between looks at a running ECU job."""
FIRST_FRAME_NS = 500_000_000
"""How long the rest of the agent (cloud, ECUs, local interface) waits for a first frame to be decoded."""
STORE_RETRY_S = 2.0
"""Pause before a write that failed is tried again; the order of writes is kept."""
DEAD_AFTER_TRIES = 3
"""After so many tries of one write the journal counts as dead, until a write holds again."""
WATCH_NS = 10 * 1_000_000_000
"""How often it is looked whether the cloud's certificates still hold."""
WARN_NS = 24 * 3600 * 1_000_000_000
"""How often the log repeats what will end soon."""
MEND = (
    "free space in the file system of state.directory, or mount it writable; what was metered waits in"
    " memory and is written at once when that is done"
)
"""What to do about a journal that cannot be written."""
MAX_COUNTERS = 256
"""Token counters in a Hello (vehicle_service.proto)."""

_log = log.get(__name__)


class _Ask(NamedTuple):
    answer: Future[dict[str, object]]


class _Import(NamedTuple):
    """A file of rights that the local interface was handed."""

    content: bytes
    answer: Future[dict[str, object]]


class _Bundle(NamedTuple):
    """The same, verified."""

    event: ev.BundleVerified
    answer: Future[dict[str, object]]


class _Imported(NamedTuple):
    """The same, on disk."""

    number: int
    verdict: Verdict
    answer: Future[dict[str, object]]


class _Fault(NamedTuple):
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The libraries for cloud, ECUs and local interface are imported."""


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Item = (
    ev.Event
    | Frames
    | Dropped
    | SignalsReady
    | StateChanged
    | _Ask
    | _Import
    | _Bundle
    | _Imported
    | _Fault
    | _Loaded
    | _Stop
)


class App:
    """A running agent."""

    def __init__(
        self, config: AgentConfig, clock: SystemClock | None = None, buses: Buses | None = None
    ) -> None:
        """Opens the store and verifies what it holds; touches no bus and no network.

        Args:
            clock: the machine's clocks, if not those of this machine.
            buses: those of the configuration, if they are open already.

        Raises:
            AgentError: something is missing or damaged; says what.
        """
        self._config = config
        self._clock = clock or SystemClock()
        self._random = SystemRandom()
        self._buses = buses or Buses(config, self._clock)
        self._queue: queue.SimpleQueue[_Item] = self._buses.queue
        imported_ms = self._clock.process_age_ms()
        started_ns = self._clock.monotonic_ns()
        settle_identity(config.state.directory)
        identity = read_identity(config.state.directory)
        if identity is None:
            raise AgentError("this vehicle is not enrolled; run: fod-agent enroll --claim TOKEN")
        self._identity: Identity = identity
        self._receipt_key = receipt_key(config.trust.receipt_key)
        self._receipt_signer = self._receipt_key.public_bytes_raw().hex()
        self._store = Store(
            config.state.directory / boot.STORE_FILE,
            boot_id=self._clock.boot_id(),
            journal_id=self._random.token(8).hex(),
            limit_bytes=config.metering.journal_mb * 1024 * 1024,
        )
        opened_ns = self._clock.monotonic_ns()
        start = boot.read(config, self._store)
        verified_ns = self._clock.monotonic_ns()
        stored, verdict = start.stored, start.verdict
        for problem in start.problems:
            _log.error(problem)
        self._problems = start.problems
        # Two copies, one for each thread: what is verified runs ahead of what is on disk.
        self._trusted, self._verified_floors = start.trusted, stored.floors
        self._keeper = boot.Keeper(self._store, boot.floors_file(config), stored)
        self._expires_ms: Mapping[str, int] = verdict.expires_ms if verdict else {}
        self._rights = Rights(version=0)
        self._imports: deque[Future[dict[str, object]]] = deque()
        self._watch_ns = self._warn_ns = 0
        self._down_reason = ""
        self._guard = Guard(listen_only=config.vehicle.listen_only)
        self._collector = Collector(self._buses.tables)
        self._buses.attach(self._collector)
        now_ns = self._clock.monotonic_ns()
        self._engine = Engine(
            source=identity.source,
            clock=TrustedClock(mark_ms=stored.mark_ms, build_ms=boot.BUILD_MS, monotonic_ns=now_ns),
            infos=self._collector.infos,
            checkpoint_ns=int(config.metering.checkpoint_s * 1e9),
            window_ns=int(config.metering.window_s * 1e9),
            buses=tuple(bus.name for bus in config.buses),
        )
        self._booted = ev.Booted(
            verdict=verdict,
            head=stored.head,
            acked_seq=stored.acked_seq,
            windows=stored.windows,
            same_boot=stored.same_boot,
            used=stored.used,
            last_contact_ms=stored.contact_ms,
            token_counters=stored.floors.token_counters,
            log_head=stored.log_head,
            owner_epoch=stored.owner_epoch,
            former=stored.former,
        )
        self._uds: UdsClient | None = None
        self._held: list[ev.RunEcu] = []
        self._api: LocalApi | None = None
        self._is_loading = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._stopping = threading.Event()
        self._link: Link | None = None
        self._started_ns = now_ns
        _log.info(
            "agent is ready",
            imported_ms=imported_ms,
            opened_ms=(opened_ns - started_ns) // 1_000_000,
            verified_ms=(verified_ns - opened_ns) // 1_000_000,
            planned_ms=(now_ns - verified_ns) // 1_000_000,
        )

    # --- the loop ----------------------------------------------------------------

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._queue.put(_Stop()))
        code = 0
        try:
            self._submit(self._writer, self._seal_former)
            self._run_engine(self._booted)
            self._buses.open()
            self._loop()
        except AgentError as error:
            code = 1
            self._guard.pause("the agent has failed")
            _log.error("the agent ends and sends nothing more", reason=str(error))
        except Exception as error:  # noqa: BLE001 (the composition root: reach the safe state)
            code = 1
            self._guard.pause("the agent has failed")
            trace = "".join(traceback.format_exception(error))
            _log.error("the agent failed and sends nothing more", error=repr(error), trace=trace)
        finally:
            self._shut_down()
        return code

    def _load(self) -> None:
        """Imports the rest, off the loop: a start must not wait for it."""
        from agent.adapters import link, local_api, uds  # noqa: F401 (their names are used in `_bring_up`)

        self._queue.put(_Loaded())

    def _bring_up(self) -> None:
        """Begins to talk: to ECUs, to the cloud, and to who asks on the local socket.

        Raises:
            AgentError: the certificate is damaged, the local socket cannot be made, or the
                cloud's CA cannot be read.
        """
        from agent.adapters.identity import check as check_identity
        from agent.adapters.link import Link, read_ca
        from agent.adapters.local_api import LocalApi
        from agent.adapters.uds import UdsClient

        check_identity(self._config.state.directory, self._identity)
        self._uds = UdsClient(self._guard, self._buses.send, self._clock.monotonic_ns, self._post)
        self._listen_for(self._rights)
        self._api = LocalApi(self._config.api_socket, self._ask, self._take)
        cloud = self._config.cloud
        self._link = Link(
            cloud.endpoint,
            partial(self._server_roots, read_ca(cloud.root_ca)),
            cloud.server_name,
            self._identity,
            self._random,
            self._post,
            self._receipt_arrived,
            self._restart_arrived,
        )
        self._link.start()
        held, self._held = self._held, []
        for command in held:
            self._uds.run(command)

    def _loop(self) -> None:
        while True:
            wait_s = max(0.0, (self._engine.wake_ns() - self._clock.monotonic_ns()) / 1e9)
            if self._uds is not None and self._uds.is_active:
                wait_s = min(wait_s, UDS_POLL_S)
            elif not self._is_loading:
                wait_s = min(wait_s, FIRST_FRAME_NS / 1e9)
            try:
                item: _Item | None = self._queue.get(timeout=wait_s)
            except queue.Empty:
                item = None
            if self._uds is not None:
                self._uds.poll()
            self._watch()
            self._take_item(item)
            if isinstance(item, _Stop):
                return

    def _take_item(self, item: _Item | None) -> None:
        match item:
            case None:
                if self._clock.monotonic_ns() >= self._engine.wake_ns():
                    self._step(ev.Ticked())
            case Frames(bus, frames):
                for frame in frames:
                    if self._uds is not None:
                        self._uds.on_frame(bus, frame)
            case SignalsReady():
                if not self._is_loading:
                    _log.info("first frame is decoded", after_ms=self._clock.process_age_ms())
                    self._load_soon()
                self._take_signals()
            case StateChanged(bus, state, reason):
                self._step(ev.BusChanged(bus, state.value, reason))
            case Dropped(bus, from_ns, to_ns, count):
                within_ms = (to_ns - from_ns) // 1_000_000
                _log.warning("frames were lost", bus=bus, count=count, within_ms=within_ms)
            case _Ask(answer):
                self._take_signals()
                answer.set_result(self._status())
            case _Import(content, answer):
                self._submit(self._worker, partial(self._verify_bundle, content, answer))
            case _Bundle(event, answer):
                self._imports.append(answer)
                self._step(event)
            case _Imported(number, verdict, answer):
                summary = importing.changes(self._rights, verdict)
                self._step(ev.Persisted(number))
                answer.set_result(summary)
            case _Fault(error):
                raise error
            case _Loaded():
                self._bring_up()
            case _Stop():
                self._step(ev.Stopping())
            case _:
                self._step(item)

    def _load_soon(self) -> None:
        self._is_loading = True
        self._submit(self._worker, self._load)

    def _watch(self) -> None:
        """Looks now and then whether the cloud's certificates hold, and warns of what will end."""
        now_ns = self._clock.monotonic_ns()
        if not self._is_loading and now_ns - self._started_ns >= FIRST_FRAME_NS:
            self._load_soon()
        if now_ns < self._watch_ns:
            return
        self._watch_ns = now_ns + WATCH_NS
        if self._link is not None:
            self._link.recheck()
        if now_ns >= self._warn_ns:
            self._warn_ns = now_ns + WARN_NS
            for ending in self._endings():
                _log.warning(ending.words)

    def _endings(self) -> tuple[Ending, ...]:
        now_ms = self._engine.trusted_time(self._clock.monotonic_ns()).unix_ms
        return endings(self._expires_ms, self._rights, now_ms)

    def _server_roots(self, ca: bytes) -> tuple[bytes, ...]:
        """Called in the link's thread as well; rights and clock are immutable values."""
        from agent.adapters.link import server_roots

        now_ms = self._engine.trusted_time(self._clock.monotonic_ns()).unix_ms
        return server_roots(self._rights.tls_anchors, ca, now_ms)

    def _step(self, event: ev.Event) -> None:
        if isinstance(event, ev.LinkUp | ev.LinkDown):
            self._down_reason = event.reason if isinstance(event, ev.LinkDown) else ""
        self._take_signals()  # nothing is decided on signals that are older than they need be
        self._run_engine(event)

    def _take_signals(self) -> None:
        due_ns = self._clock.monotonic_ns() + self._engine.patience_ns
        self._run_engine(ev.SignalsArrived(self._buses.drain(due_ns)))

    def _run_engine(self, event: ev.Event) -> None:
        for command in self._engine.step(event, self._clock.monotonic_ns()):
            self._do(command)
        self._buses.look_for(self._engine.urgent)

    def _post(self, event: ev.Event) -> None:
        self._queue.put(event)

    def _do(self, command: ev.Command) -> None:
        match command:
            case ev.Say(level, message, fields):
                getattr(_log, level)(message, **fields)
            case ev.RunEcu():
                if self._uds is None:
                    self._held.append(command)
                else:
                    self._uds.run(command)
            case ev.Allow(rights, live):
                self._rights = rights
                self._guard.allow(rights, live)
                self._listen_for(rights)
            case ev.StoreUsage():
                self._write(partial(self._store_usage, command), ev.Persisted(command.number))
            case ev.MarkSent(number, first_seq, records):
                self._write(partial(self._store.mark_sent, first_seq, records), ev.Persisted(number))
            case ev.MergeUnsent(number):
                self._write(partial(self._merge, number))
            case ev.RestartJournal(number, restart):
                assert isinstance(restart, Restart)
                self._write(partial(self._begin_journal, number, restart))
            case ev.StoreTrust(number, verdict):
                done: _Item = ev.Persisted(number)
                if command.new_owner:
                    _log.info("the vehicle has a new owner; records of the one before are sealed")
                if not command.live:
                    done = _Imported(number, verdict, self._imports.popleft())
                self._write(partial(self._store_trust, command), done)
            case ev.SendUsage(first_seq, records):
                self._submit(self._writer, partial(self._read_usage, first_seq, records))
            case ev.Verify():
                received_ns = self._clock.monotonic_ns()
                self._submit(self._worker, partial(self._verify, command, received_ns))
            case ev.MakeNonce():
                self._post(ev.NonceMade(self._random.token(16)))
            case _:
                self._tell_cloud(command)

    def _listen_for(self, rights: Rights) -> None:
        """Receives the answers of every ECU in use, and other testers' requests, at once."""
        if self._uds is None:  # nothing is asked yet, so nothing answers
            return
        from agent.adapters.uds import FUNCTIONAL_IDS, raw_id

        ecu_ids: dict[str, frozenset[int]] = {}
        for feature in rights.features.values():
            if (ecu := feature.ecu) is not None and ecu.request_id:
                ids = {raw_id(ecu.request_id), raw_id(ecu.response_id)}
                ecu_ids[ecu.bus] = ecu_ids.get(ecu.bus, FUNCTIONAL_IDS) | ids
        self._buses.receive(ecu_ids)

    # --- store and worker ------------------------------------------------------------

    def _submit(self, pool: ThreadPoolExecutor, job: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 (handed to the loop, which ends the agent)
                self._queue.put(_Fault(error))

        pool.submit(guarded)

    def _write(self, job: Callable[[], _Item | None], done: _Item | None = None) -> None:
        """Writes on the store's thread, in order; a failed write is tried again until it holds.

        Args:
            job: returns what is said to the loop then, if it is not `done`.
        """

        def persist() -> None:
            tries = 0
            while True:
                try:
                    item = job()
                except JournalError as error:
                    tries += 1
                    _log.error(
                        "the store cannot be written; trying again, nothing is lost", reason=str(error)
                    )
                    if tries == DEAD_AFTER_TRIES:
                        self._post(ev.JournalDead(str(error)))
                    if self._stopping.wait(STORE_RETRY_S):
                        return
                else:
                    if (said := item or done) is not None:
                        self._queue.put(said)
                    if tries >= DEAD_AFTER_TRIES:
                        self._post(ev.JournalAlive())
                    return

        self._submit(self._writer, persist)

    def _store_usage(self, command: ev.StoreUsage) -> None:
        self._store.store_usage(command)
        if self._store.is_over:
            self._submit(self._writer, partial(self._make_room, command.mark_ms))

    def _make_room(self, now_ms: int) -> None:
        """Makes the journal smaller, in pieces; what else the disk has to do goes between them."""
        try:
            room = self._store.make_room(now_ms)
        except JournalError as error:
            _log.error("the journal is at its limit and cannot be made smaller now", reason=str(error))
            return
        if room is Room.PRUNED:
            self._submit(self._writer, partial(self._make_room, now_ms))
        elif room is Room.MERGE:
            self._post(ev.JournalFull())

    def _merge(self, number: int) -> ev.JournalMoved:
        try:
            head, count = self._store.merge_unsent()
        except JournalError as error:
            _log.error("windows that were never sent cannot be merged; nothing is changed", reason=str(error))
            return ev.JournalMoved(number, self._store.head())
        if count:
            _log.warning(
                "the journal was full: windows that were never sent are merged, their sums are kept",
                records=count,
                bytes=self._store.used_bytes,
            )
        return ev.JournalMoved(number, head)

    def _store_trust(self, command: ev.StoreTrust) -> None:
        self._keeper.keep(command)
        if command.new_owner:
            self._submit(self._writer, self._seal_former)
        self._expires_ms = command.verdict.expires_ms
        self._problems = ()

    def _verify(self, command: ev.Verify, received_ns: int) -> None:
        refusal: AgentError = ReplayError("no nonce is waiting, so nothing can answer one")
        for nonce in command.nonces:
            try:
                verdict = verify_update(
                    self._trusted,
                    command.update,
                    vin=self._config.vehicle.vin,
                    nonce=nonce,
                    now_ms=self._keeper.judged_at_ms(command.now_ms),
                    floors=self._verified_floors,
                )
                for feature in verdict.rights.features.values():
                    check_conditions(feature)
            except ReplayError as error:
                refusal = error
            except (TrustError, ConditionError) as error:
                refusal = error
                break
            else:
                # Against what is on disk: a verdict that was dropped on its way has begun no epoch.
                new_epoch = self._keeper.starts_new_epoch(verdict)
                self._build_on(verdict)
                self._post(ev.UpdateVerified(verdict, nonce, received_ns, new_epoch))
                return
        self._post(ev.UpdateRefused(refusal.kind, str(refusal)))

    def _build_on(self, verdict: Verdict) -> None:
        """The next update builds on this one, even before it is on disk."""
        self._trusted = verdict.state
        self._verified_floors = floors_after(verdict, self._verified_floors)

    def _verify_bundle(self, content: bytes, answer: Future[dict[str, object]]) -> None:
        read_ns = self._clock.monotonic_ns()
        try:
            verdict = importing.verify(
                content,
                self._trusted,
                vin=self._config.vehicle.vin,
                now_ms=self._keeper.judged_at_ms(self._engine.trusted_time(read_ns).unix_ms),
                floors=self._verified_floors,
            )
        except (TrustError, ConditionError) as error:
            _log.error("file of rights refused; nothing was changed", error=error.kind, reason=str(error))
            answer.set_exception(error)
        else:
            self._build_on(verdict)
            self._queue.put(_Bundle(ev.BundleVerified(verdict, read_ns), answer))

    def _read_usage(self, first_seq: int, count: int) -> None:
        try:
            records = self._store.marked(first_seq, count)
        except JournalError as error:
            # The engine sends again when no receipt comes.
            _log.error("usage cannot be read for sending; trying again later", reason=str(error))
            return
        if not records:
            return
        journal_id = self._store.journal_id()
        self._submit(self._worker, partial(self._send_usage, journal_id, records))

    def _seal_former(self) -> None:
        """Seals former owners' records in pieces; what else the disk has to do goes between them."""
        try:
            more = self._store.seal_former(seal, self._receipt_signer)
        except (JournalError, TrustError) as error:
            _log.error(
                "records of the former owner are not sealed yet; trying again later", reason=str(error)
            )
            return
        if more:
            self._submit(self._writer, self._seal_former)

    def _send_usage(self, journal_id: str, records: tuple[KeptRecord, ...]) -> None:
        sealed = [position for position, record in enumerate(records) if record.is_sealed]
        content = batch(self._identity.source, journal_id, tuple(r.content for r in records), sealed)
        signed = usage_pb2.SignedUsageBatch(
            batch=content, signature=self._identity.sign(BATCH_DOMAIN + content)
        )
        if self._link is not None:
            self._link.send(pb.ConnectRequest(usage=signed))

    def _receipt_arrived(self, signed: usage_pb2.SignedUsageReceipt) -> None:
        self._submit(self._worker, partial(self._check_receipt, signed))

    def _check_receipt(self, signed: usage_pb2.SignedUsageReceipt) -> None:
        try:
            receipt = self._verified_receipt(signed)
        except TrustError as error:
            _log.error("receipt refused; the records are kept", error=error.kind, reason=str(error))
            return

        def keep() -> None:
            try:
                self._keep_receipt(receipt, signed)
            except JournalError as error:
                _log.error("receipt cannot be kept; the cloud will repeat it", reason=str(error))

        self._submit(self._writer, keep)

    def _keep_receipt(self, receipt: usage_pb2.UsageReceipt, signed: usage_pb2.SignedUsageReceipt) -> None:
        held = self._store.record_hash(receipt.through_seq)
        if held != receipt.head_hash:
            _log.error(
                "receipt refused: the cloud holds another record at its end; the records are kept",
                through_seq=receipt.through_seq,
            )
            return
        self._store.store_receipt(
            receipt.through_seq,
            signed.receipt,
            signed.signature,
            receipt.archive_key,
            self._receipt_signer,
        )
        self._seal_former()
        self._post(ev.ReceiptStored(receipt.through_seq))
        _log.info("signed receipt for usage", through_seq=receipt.through_seq)

    def _verified_receipt(self, signed: usage_pb2.SignedUsageReceipt) -> usage_pb2.UsageReceipt:
        receipt = verified_receipt(self._receipt_key, signed.receipt, signed.signature)
        expected = (self._identity.source, self._store.journal_id())
        if (receipt.source, receipt.journal_id) != expected:
            raise TrustError(
                f"it is for {receipt.source}/{receipt.journal_id}, expected {'/'.join(expected)}"
            )
        if len(receipt.archive_key) not in {0, KEY_BYTES}:
            found = len(receipt.archive_key)
            raise MalformedError(f"its archive key has {found} bytes, expected {KEY_BYTES}")
        return receipt

    def _restart_arrived(self, signed: usage_pb2.SignedJournalRestart) -> None:
        self._submit(self._worker, partial(self._check_restart, signed))

    def _check_restart(self, signed: usage_pb2.SignedJournalRestart) -> None:
        try:
            restart = self._verified_restart(signed)
        except TrustError as error:
            _log.error(
                "restart of the journal refused; nothing is changed", error=error.kind, reason=str(error)
            )
            return

        def judge() -> None:
            try:
                if self._store.check_restart(restart):
                    self._post(ev.RestartSigned(restart))
            except JournalError as error:
                _log.error("restart of the journal refused; nothing is changed", reason=str(error))

        self._submit(self._writer, judge)

    def _begin_journal(self, number: int, restart: Restart) -> ev.JournalMoved:
        """Carries a restart out; it is judged again, because records were made since it was."""
        new_id = self._random.token(8).hex()
        try:
            head = self._store.restart_journal(restart, new_id)
        except RestartError as error:
            _log.error("restart of the journal refused; nothing is changed", reason=str(error))
            return ev.JournalMoved(number, self._store.head())
        _log.warning(
            "the journal goes on in a new one, as an operator has confirmed",
            old=restart.journal_id,
            new=new_id,
            records=head.seq,
        )
        return ev.JournalMoved(number, head, restarted=True)

    def _verified_restart(self, signed: usage_pb2.SignedJournalRestart) -> Restart:
        try:
            self._receipt_key.verify(signed.signature, RESTART_DOMAIN + signed.restart)
        except InvalidSignature as error:
            raise TrustError("its signature is not the receipt key's") from error
        try:
            restart = usage_pb2.JournalRestart.FromString(signed.restart)
        except DecodeError as error:
            raise MalformedError(f"it is not a JournalRestart: {error}") from error
        if restart.source != self._identity.source:
            raise TrustError(f"it is for {restart.source}, expected {self._identity.source}")
        if len(restart.head_hash) != len(GENESIS_HASH) or not 0 < restart.fork_seq <= MAX_NUMBER:
            raise MalformedError(
                f"it names fork_seq {restart.fork_seq} and a head of {len(restart.head_hash)} bytes"
            )
        return Restart(
            restart.journal_id,
            restart.fork_seq,
            restart.head_seq,
            restart.head_hash,
            signed.restart,
            signed.signature,
        )

    # --- cloud -------------------------------------------------------------------------

    def _tell_cloud(self, command: ev.Command) -> None:
        if self._link is None:
            return
        match command:
            case ev.SendHello(nonce, director, catalogue, journal_id):
                hello = pb.Hello(
                    nonce=nonce,
                    director=_versions(director),
                    catalogue=_versions(catalogue),
                    journal_id=journal_id,
                    agent_version=__version__,
                    token_counters=_counters(self._keeper.floors),
                    owner_epoch=self._rights.owner_epoch,
                )
                self._link.send(pb.ConnectRequest(hello=hello))
            case ev.OfferNonce(nonce):
                self._link.send(pb.ConnectRequest(nonce_offer=pb.NonceOffer(nonce=nonce)))
            case ev.SendResult(director, catalogue, error_type, error):
                result = pb.UpdateResult(
                    director=_versions(director),
                    catalogue=_versions(catalogue),
                    error_type=error_type,
                    error=error[:1024],
                )
                self._link.send(pb.ConnectRequest(update_result=result))
            case ev.SendStatus(features):
                report = pb.FeatureStatusReport(
                    features=[
                        pb.FeatureStatus(
                            feature_id=f.feature_id,
                            entitlement_id=f.entitlement_id,
                            state=pb.FeatureState.ValueType(State[f.state].value),
                            reason=f.reason[:256],
                            nrc=f.nrc,
                            since_ms=f.since_ms,
                            activation_ms=f.activation_ms,
                            trace_id=f.trace_id,
                            evidence=_evidence(f.evidence),
                        )
                        for f in features
                    ]
                )
                self._link.send(pb.ConnectRequest(feature_status=report))

    # --- status and end -------------------------------------------------------------------

    def _status(self) -> dict[str, object]:
        now_ns = self._clock.monotonic_ns()
        status = self._engine.status(now_ns)
        now = self._engine.trusted_time(now_ns)
        doubt_ms = now.uncertainty_ms if now.uncertainty_ms < UNKNOWN_UNCERTAINTY_MS else None
        status["time"] = {"unix_ms": now.unix_ms, "uncertainty_ms": doubt_ms, "source": now.source}
        journal = status["journal"]
        assert isinstance(journal, dict)
        journal |= {"bytes": self._store.used_bytes, "limit_bytes": self._store.limit_bytes}
        status["vin"] = self._config.vehicle.vin
        status["source"] = self._identity.source
        status["link_reason"] = self._down_reason
        unsealed = self._store.unsealed
        waiting = f"{unsealed} records of a former owner wait for the cloud's receipt, to be sealed"
        dead = f"use cannot be written down: {journal['dead']}; {MEND}" if journal["dead"] else ""
        problems = [self._keeper.problem, dead, waiting if unsealed else ""]
        status["problems"] = [*self._problems, *filter(None, problems)]
        status["warnings"] = [asdict(ending) for ending in self._endings()]
        status |= self._buses.status()
        status["messages"] = {
            f"{bus}/{message}": {
                "used": health.used,
                "too_short": health.too_short,
                "check_failed": health.check_failed,
                "repeated": health.repeated,
                "lost": health.lost,
            }
            for (bus, message), health in self._collector.health.items()
        }
        return status

    def _ask(self) -> dict[str, object]:
        from agent.adapters.local_api import ANSWER_S

        answer: Future[dict[str, object]] = Future()
        self._queue.put(_Ask(answer))
        return answer.result(timeout=ANSWER_S)

    def _take(self, content: bytes) -> dict[str, object]:
        """Takes a file of rights; called in a thread of the local interface."""
        from agent.adapters.local_api import IMPORT_S

        answer: Future[dict[str, object]] = Future()
        self._queue.put(_Import(content, answer))
        return answer.result(timeout=IMPORT_S)

    def _shut_down(self) -> None:
        if self._api is not None:
            self._api.close()
        if self._link is not None:
            self._link.stop()
        self._buses.close()
        # What is queued is still written; a disk that refuses may hold the end up only so long.
        patience = threading.Timer(STORE_RETRY_S, self._stopping.set)
        patience.start()
        self._worker.shutdown()
        self._writer.shutdown()
        patience.cancel()
        self._store.close()
        _log.info("agent has ended")


def _versions(versions: Versions) -> pb.RepositoryVersions:
    return pb.RepositoryVersions(
        root=versions.root,
        timestamp=versions.timestamp,
        snapshot=versions.snapshot,
        targets=versions.targets,
    )


def _evidence(evidence: ev.Evidence | None) -> pb.Evidence | None:
    if evidence is None:
        return None
    return pb.Evidence(
        finding=evidence.finding[:256],
        read_back=evidence.read_back,
        counter=evidence.counter,
        at_ms=evidence.at_ms,
    )


def _counters(floors: Floors) -> list[pb.TokenCounter]:
    return [
        pb.TokenCounter(ecu_identifier=ecu, feature_id=feature, counter=counter)
        for (ecu, feature), counter in sorted(floors.token_counters.items())[:MAX_COUNTERS]
    ]
