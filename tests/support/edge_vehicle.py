"""The agent's whole way from a signed update to the ECU, in one thread and in virtual time.

Verifier, engine, guard, UDS client, ISO-TP and the simulated seat module are the real ones; only disk and
network are missing: what is stored is stored at once, and updates are handed in by the test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import isotp
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.edge_ecu import FakeEcu, as_heard
from support.engine_world import HEAT, IGNITION, INFOS, MS, ODO, SPEED, catalogue_feature
from support.sim_world import IDENTITY, MemoryStore
from support.trust_repo import NOW_MS, UID, VIN, Cloud, make_announcement
from vectors.make_reading_vectors import ECU_KEY

from agent import events as ev
from agent.adapters.uds import UdsClient
from agent.engine import Engine
from agent.errors import TrustError
from agent.features.guard import Guard
from agent.metering.record import GENESIS_HASH, Head
from agent.model import Frame, SignalBatch, SignalChange, SignalValue, TrustBytes
from agent.trust.clock import TrustedClock
from agent.trust.verifier import Floors, floors_after, verify_update
from firmware_sim.ecu import SeatModule, State

ANNOUNCE, INSTALL = bytes.fromhex("31010F0C"), bytes.fromhex("31010F0D")
SESSION, READ, RELEASE = bytes.fromhex("1003"), bytes.fromhex("220F21"), bytes.fromhex("31010F0E0001")
STEP_MS = 20


class EdgeVehicle:
    """One vehicle with its agent; `receive` gives it an update, `run_ms` moves the time.

    Attributes:
        requests: UDS requests that reached the seat module, in order.
        frames: every frame that the agent put on a bus.
        refusals: updates that the verifier refused.
        records: usage that the agent made durable, in order.
        heated_ms: how long the heater was really on.
    """

    def __init__(self, cloud: Cloud) -> None:
        self.token_root = Ed25519PrivateKey.generate()
        self.seat = SeatModule(
            replace(IDENTITY, vin=VIN, uid=UID),
            features=frozenset({1}),
            token_root=self.token_root.public_key().public_bytes_raw(),
            store=MemoryStore(),
            now_ns=0,
            reading_key=ECU_KEY.private,
        )
        self.seat.terminal_15(on=True, now_ns=0)
        self.learn(1, cloud.token_key)
        self.now_ms, self.speed_kmh = 1000, 0.0
        self.frames: list[Frame] = []
        self.refusals: list[TrustError] = []
        self.records: list[bytes] = []
        self.heated_ms = 0
        self.log: list[tuple[str, str]] = []
        self.trusted, self.floors = cloud.provisioned(), Floors()
        self._nonces = 0
        self._nonce = b""
        self._seen: dict[str, int] = {}
        self._events: deque[ev.Event] = deque()
        self._spec = catalogue_feature().ecu
        assert self._spec is not None
        self._ecu = FakeEcu(self._spec, self._answer)
        self.guard = Guard(listen_only=False)
        self._client = UdsClient(self.guard, self._send, lambda: self.now_ms * MS, self._events.append)
        self.engine = Engine(
            source="veh-0123456789abcdef",
            clock=TrustedClock(mark_ms=NOW_MS, build_ms=NOW_MS, monotonic_ns=self.now_ms * MS),
            infos=INFOS,
            checkpoint_ns=2000 * MS,
            window_ns=10_000 * MS,
        )
        head = Head("00000000deadbeef", 0, GENESIS_HASH)
        self.tell(ev.Booted(None, head, 0, (), same_boot=True, used={}, last_contact_ms=0))
        self.tell(ev.LinkUp())

    # --- what tests do ---------------------------------------------------------

    @property
    def requests(self) -> list[bytes]:
        """What the seat module was asked."""
        return self._ecu.requests

    @property
    def is_on(self) -> bool:
        """Whether the seat module allows its heater."""
        return self.seat.status(1)[0] is State.ON

    def learn(self, epoch: int, key: Ed25519PrivateKey) -> None:
        """The seat module accepts a genuine announcement, as in a workshop."""
        self.seat.learn_key(self.announcement(epoch, key))

    def announcement(self, epoch: int, key: Ed25519PrivateKey) -> bytes:
        """The token root announces a token key."""
        return make_announcement(self.token_root, epoch, key.public_key().public_bytes_raw())

    def receive(self, answer: Callable[[bytes], TrustBytes]) -> None:
        """Takes an answer to the nonce that waits, and gives the agent time to act on it."""
        self.tell(ev.UpdateArrived(answer(self._nonce)))
        self.run_ms(2000)

    def run_ms(self, duration_ms: int) -> None:
        """Lives on, in steps of 20 ms."""
        for _ in range(duration_ms // STEP_MS):
            self.heated_ms += STEP_MS if self.seat.heat_level else 0
            self.now_ms += STEP_MS
            self.seat.sense(speed_kmh=self.speed_kmh, now_ns=self.now_ms * MS)
            self._cross_frames()
            self.tell(ev.SignalsArrived(self._signals()))

    def press(self, level: int) -> None:
        """The driver asks for a heat level, 0 to 3."""
        self.seat.press(level, self.now_ms * MS)

    def cut_ecu_power(self) -> None:
        """The seat module restarts from its durable memory; the ignition stays on."""
        self.seat.reset(self.now_ms * MS)

    def view(self) -> ev.FeatureView:
        """What the agent says of the seat heating."""
        return next(v for v in self.engine.features() if v.feature_id == "seat-heating")

    def tell(self, event: ev.Event) -> None:
        """Gives the engine an event and all that follows from it at once."""
        self._events.append(event)
        while self._events:
            for command in self.engine.step(self._events.popleft(), self.now_ms * MS):
                self._do(command)

    # --- the world -------------------------------------------------------------

    def _do(self, command: ev.Command) -> None:
        match command:
            case ev.Say(level, message, _):
                self.log.append((level, message))
            case ev.Allow(rights, live):
                self.guard.allow(rights, live)
            case ev.RunEcu():
                self._client.run(command)
            case ev.MakeNonce():
                self._nonces += 1
                self._nonce = self._nonces.to_bytes(16, "big")
                self._events.append(ev.NonceMade(self._nonce))
            case ev.StoreUsage(number, records):
                self.records += [record.content for record in records]
                self._events.append(ev.Persisted(number))
            case ev.StoreTrust(number) | ev.MarkSent(number):
                self._events.append(ev.Persisted(number))
            case ev.Verify(update, nonces, now_ms):
                self._verify(update, nonces, now_ms)
            case _:
                pass

    def _verify(self, update: TrustBytes, nonces: tuple[bytes, ...], now_ms: int) -> None:
        try:
            verdict = verify_update(
                self.trusted, update, vin=VIN, nonce=nonces[0], now_ms=now_ms, floors=self.floors
            )
        except TrustError as error:
            self.refusals.append(error)
            self._events.append(ev.UpdateRefused(error.kind, str(error)))
            return
        self.trusted, self.floors = verdict.state, floors_after(verdict, self.floors)
        self._events.append(ev.UpdateVerified(verdict, nonces[0], self.now_ms * MS))

    def _signals(self) -> SignalBatch:
        values: dict[str, SignalValue] = {SPEED: self.speed_kmh, ODO: 12.34, IGNITION: "ON"}
        values[HEAT] = 33.0 * self.seat.heat_level
        now_ns = self.now_ms * MS
        changes = tuple(SignalChange(n, v, now_ns, self._seen.get(n)) for n, v in values.items())
        self._seen = dict.fromkeys(values, now_ns)
        return SignalBatch(changes, dict(self._seen))

    def _answer(self, request: bytes) -> list[bytes]:
        answer = self.seat.handle(request, self.now_ms * MS)
        return [] if answer is None else [answer]

    def _send(self, frame: Frame) -> None:
        self.frames.append(frame)
        assert self._spec is not None
        if (frame.bus, frame.can_id) == (self._spec.bus, self._spec.request_id):
            self._ecu.incoming.append(isotp.CanMessage(frame.can_id, data=frame.data))

    def _cross_frames(self) -> None:
        self._client.poll()
        for _ in range(200):
            self._ecu.step()
            if not self._ecu.outgoing and not self._ecu.incoming:
                break
            while self._ecu.outgoing:
                self._client.on_frame(*as_heard(self._ecu.outgoing.popleft()))
            self._client.poll()
