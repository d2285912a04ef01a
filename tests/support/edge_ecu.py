"""One ECU of a small catalogue, and the other end of its ISO-TP, for tests of the bus's edge."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import isotp

from agent.adapters.bus import CAN_EFF_FLAG, RawFrame
from agent.adapters.uds import UdsClient, raw_id
from agent.errors import VehicleError
from agent.events import EcuDone, RunEcu
from agent.features.guard import Guard
from agent.model import (
    ActuatorKind,
    ConditionSpec,
    EcuSpec,
    FeatureSpec,
    Frame,
    ReadBackSpec,
    Rights,
    Token,
)

SEAT = EcuSpec("seat-module", "openfod-seat-1", "body", 0x7A0, 0x7A8)
LAMP = EcuSpec("lamp-module", "openfod-lamp-1", "body", 0x7B0, 0x7B8)
WIDE = EcuSpec("wide-module", "openfod-wide-1", "power", 0x18DA10F1, 0x18DAF110)
ACTIVATE = bytes.fromhex("31 01 02 01")
RELEASE = bytes.fromhex("31 02 02 01")
READ = bytes.fromhex("22 F0 01")
SESSION = bytes.fromhex("10 03")
S_NS = 1_000_000_000
ALWAYS = ConditionSpec("true", ())


def feature(feature_id: str = "seat-heating", ecu: EcuSpec = SEAT) -> FeatureSpec:
    """A feature that a token switches."""
    return FeatureSpec(
        feature_id=feature_id,
        release=1,
        title=feature_id,
        enforcement="ecu-token",
        withdrawn=False,
        kind=ActuatorKind.TOKEN,
        ecu=ecu,
        feature_number=1,
        session=3,
        activate=ACTIVATE,
        release_request=RELEASE,
        read_back=ReadBackSpec(0xF001, b"\x01", b"\x01", None),
        activate_when=ALWAYS,
        release_when=ALWAYS,
        hold_max_s=60,
        read_back_interval_s=10,
        meters=(),
    )


def token(
    feature_id: str = "seat-heating", *, counter: int = 1, allows: bool = True, size: int = 150
) -> Token:
    """Bytes that stand for a token; the guard compares their hash alone."""
    seed = f"{feature_id} {counter} {allows}".encode()
    content = (hashlib.sha512(seed).digest() * 4)[:size]
    digest = hashlib.sha256(content).hexdigest()
    return Token("seat-module", feature_id, 1, counter, allows, content, digest)


def rights(*features: FeatureSpec, tokens: tuple[Token, ...] = ()) -> Rights:
    """Rights as a verifier would make them."""
    return Rights(
        1,
        features={f.feature_id: f for f in features},
        tokens={t.feature_id: t for t in tokens},
    )


def open_guard(*features: FeatureSpec, live: tuple[str, ...] = ("seat-heating",)) -> Guard:
    """A guard that lets the seat module's features be switched."""
    guard = Guard(listen_only=False)
    features = features or (feature(),)
    guard.allow(rights(*features, tokens=tuple(token(f.feature_id) for f in features)), live)
    return guard


def pieces(payload: bytes, ecu: EcuSpec = SEAT) -> list[Frame]:
    """The frames of a request, by a codec of its own (ISO 15765-2:2016, 9.6)."""
    if len(payload) <= 7:
        cut = [bytes([len(payload)]) + payload]
    else:
        cut = [(0x1000 | len(payload)).to_bytes(2, "big") + payload[:6]]
        cut += [
            bytes([0x20 | (1 + i) % 16]) + payload[at : at + 7]
            for i, at in enumerate(range(6, len(payload), 7))
        ]
    return [Frame(ecu.bus, ecu.request_id, data, is_extended=ecu.request_id > 0x7FF) for data in cut]


def as_heard(frame: Frame) -> tuple[str, RawFrame]:
    """A frame as a bus brings it: what `UdsClient.on_frame` takes."""
    flags = CAN_EFF_FLAG if frame.is_extended else 0
    return frame.bus, RawFrame(frame.can_id | flags, frame.data, frame.monotonic_ns)


class FakeEcu:
    """The ECU's end: real ISO-TP logic, answers from a function."""

    def __init__(self, spec: EcuSpec, answer: Callable[[bytes], list[bytes]], **params: object) -> None:
        self.spec, self.answer = spec, answer
        self.requests: list[bytes] = []
        self.incoming: deque[isotp.CanMessage] = deque()
        self.outgoing: deque[Frame] = deque()
        address = isotp.Address(
            isotp.AddressingMode.Normal_11bits, txid=spec.response_id, rxid=spec.request_id
        )
        self.layer = isotp.TransportLayerLogic(self._receive, self._transmit, address, params=params)

    def _receive(self, _timeout_s: float) -> isotp.CanMessage | None:
        return self.incoming.popleft() if self.incoming else None

    def _transmit(self, message: isotp.CanMessage) -> None:
        self.outgoing.append(Frame(self.spec.bus, message.arbitration_id, bytes(message.data)))

    def step(self) -> None:
        """Takes what arrived, and answers."""
        self.layer.process()
        while (request := self.layer.recv()) is not None:
            self.requests.append(bytes(request))
            for answer in self.answer(bytes(request)):
                self.layer.send(answer)
        self.layer.process()


class Bench:
    """A client and ECUs on one bus in memory; time stands still until it is moved."""

    def __init__(self, *ecus: FakeEcu, guard: Guard | None = None) -> None:
        self.now_ns = S_NS
        self.sent: list[Frame] = []
        self.outcomes: list[EcuDone] = []
        self.ecus = list(ecus)
        self.broken = ""
        self.guard = guard or open_guard()
        self.client = UdsClient(self.guard, self._send, lambda: self.now_ns, self.outcomes.append)

    def _send(self, frame: Frame) -> None:
        if self.broken:
            raise VehicleError(self.broken)
        self.sent.append(frame)
        for ecu in self.ecus:
            ecu.incoming.append(isotp.CanMessage(frame.can_id, data=frame.data))

    def run(self, *requests: bytes, ecu: EcuSpec = SEAT, rounds: int = 200) -> EcuDone:
        """Runs a job to its end."""
        before = len(self.outcomes)
        self.start(*requests, ecu=ecu)
        self.settle(rounds)
        assert len(self.outcomes) == before + 1, self.outcomes[before:]
        return self.outcomes[-1]

    def start(self, *requests: bytes, ecu: EcuSpec = SEAT) -> None:
        """Begins a job."""
        self.client.run(RunEcu("seat-heating", "test", ecu, requests, "trace"))

    def settle(self, rounds: int = 200) -> None:
        """Lets frames cross until nothing moves."""
        for _ in range(rounds):
            moved = False
            for ecu in self.ecus:
                ecu.step()
                while ecu.outgoing:
                    self.client.on_frame(*as_heard(ecu.outgoing.popleft()))
                    moved = True
            self.client.poll()
            if not moved and not any(ecu.incoming for ecu in self.ecus):
                return

    def pass_s(self, seconds: float) -> None:
        """Moves the time on."""
        self.now_ns += int(seconds * S_NS)
        self.client.poll()

    def hear(self, data: bytes, can_id: int = SEAT.response_id, *, bus: str = "body") -> None:
        """Puts a frame of somebody else on the bus."""
        self.client.on_frame(bus, RawFrame(raw_id(can_id), data, self.now_ns))


def twin(ecu: EcuSpec, **changes: object) -> EcuSpec:
    """An ECU that differs a little."""
    return replace(ecu, **changes)  # type: ignore[arg-type]
