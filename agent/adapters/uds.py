"""Talks to ECUs: UDS (ISO 14229-1:2020) on ISO-TP (ISO 15765-2:2016), one job at a time each.

The libraries' own logic and codecs are driven by the agent's loop, so that
every request and every frame passes the guard. A job is a list of requests;
the first one that fails ends it. While another tester is heard on the bus,
jobs wait: two testers on one ECU spoil each other's sessions.

An answer counts only if it echoes what its request named (sub-function, DID or
routine) and comes after the request's last frame: a late or foreign answer must
not pass for ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import isotp
from udsoncan.ResponseCode import ResponseCode

from agent.adapters.bus import CAN_EFF_FLAG, CAN_EFF_MASK, RawFrame
from agent.errors import (
    EcuBusyError,
    EcuSilentError,
    NegativeResponseError,
    UnexpectedResponseError,
    VehicleError,
)
from agent.events import EcuDone, RunEcu
from agent.features.guard import MAX_STANDARD_ID, Guard
from agent.model import EcuSpec, Frame
from common import log

P2_NS = 1_000_000_000
"""Longest wait for an answer after the last frame sent: P2, with room for a gateway (ISO 14229-2, 7.2)."""
P2_STAR_NS = 5_000_000_000
"""Longest wait after "response pending" (0x78)."""
MAX_PENDING = 10
"""How often an ECU may say "response pending" to one request."""
ANSWER_NS = 10_000_000_000
"""Longest time for one answer's frames: 73 at most, 127 ms apart at most (ISO 15765-2:2016, 9.6.5.4)."""
MAX_ANSWER_BYTES = 515
"""Longest answer that is taken: a reading of 512 bytes behind SID and DID."""
FOREIGN_TESTER_NS = 3_000_000_000
"""How long jobs wait after another tester was heard."""
PATIENCE_NS = 30_000_000_000
"""How long a read waits for another tester before it is given back, to be tried again later."""
SWITCH_PATIENCE_NS = 1_000_000_000
"""The same for a job that switches something: its conditions must be judged anew before it is sent."""
FUNCTIONAL_IDS = frozenset({0x7DF, CAN_EFF_FLAG | 0x18DB33F1})
"""`can_id`s of functional requests (ISO 15765-4:2021, 10.5)."""
_FLOW_CONTROL = 3
_ECHOED_BYTES = {0x10: 1, 0x22: 2, 0x2E: 2, 0x31: 3}
"""Bytes after the SID that a positive response repeats (ISO 14229-1:2020, 10.2, 11.2, 12.7, 14.2)."""
_NEGATIVE = 0x7F
_SWITCH_INDEX = 1
"""Place of the request that carries the token: after the session, before the read-back."""
_FIRST_UDS_SERVICE = 0x10
_POSITIVE_OFFSET = 0x40

_log = log.get(__name__)


@dataclass
class _Ecu:
    """One ECU's transport layer and jobs."""

    spec: EcuSpec
    layer: isotp.TransportLayerLogic
    received: deque[isotp.CanMessage] = field(default_factory=deque)
    jobs: deque[RunEcu] = field(default_factory=deque)
    waiting_ns: int = 0
    job: RunEcu | None = None
    index: int = 0
    request: bytes = b""
    has_announced: bool = False
    answer: bytes = b""
    deadline_ns: int = 0
    pending: int = 0
    is_answering: bool = False
    trouble: Exception | None = None


class UdsClient:
    """Runs jobs; driven by `poll` and `on_frame` from the agent's loop."""

    def __init__(
        self,
        guard: Guard,
        send: Callable[[Frame], None],
        monotonic_ns: Callable[[], int],
        done: Callable[[EcuDone], None],
    ) -> None:
        """Starts without any ECU.

        Args:
            send: puts a frame on its bus; raises VehicleError.
            done: takes the outcome of a job.
        """
        self._guard = guard
        self._send = send
        self._monotonic_ns = monotonic_ns
        self._done = done
        self._ecus: dict[tuple[str, int], _Ecu] = {}
        self._answers: dict[tuple[str, int], _Ecu] = {}
        self._foreign_until_ns = 0

    @property
    def is_active(self) -> bool:
        """True while a job is at work: `poll` is wanted every few milliseconds."""
        waiting = self._monotonic_ns() < self._foreign_until_ns
        return any(e.job or (e.jobs and not waiting) for e in self._ecus.values())

    def run(self, job: RunEcu) -> None:
        """Queues a job; its outcome comes through `done`."""
        key = (job.ecu.bus, job.ecu.request_id)
        ecu = self._ecus.get(key)
        if ecu is None or ecu.spec != job.ecu:
            if ecu is not None:
                self._drop(ecu)
            try:
                ecu = self._connect(job.ecu)
            except ValueError as error:
                problem = VehicleError(f"{job.ecu.identifier}: ISO-TP cannot be set up for it: {error}")
                self._done(EcuDone(job.feature_id, b"", problem))
                return
            self._ecus[key] = ecu
            self._answers[(job.ecu.bus, job.ecu.response_id)] = ecu
        ecu.jobs.append(job)
        self.poll()

    def on_frame(self, bus: str, frame: RawFrame) -> None:
        """Takes a frame from a bus; those of no interest are ignored."""
        can_id = frame.can_id & CAN_EFF_MASK
        if frame.can_id != raw_id(can_id):
            return
        ecu = self._answers.get((bus, can_id))
        if ecu is not None and ecu.job is not None:
            is_extended = can_id > MAX_STANDARD_ID
            ecu.received.append(isotp.CanMessage(can_id, data=frame.data, extended_id=is_extended))
            self.poll()
        elif _is_functional_tester(frame) or self._guard.is_request_id(bus, can_id):
            now_ns = self._monotonic_ns()
            if now_ns >= self._foreign_until_ns:
                _log.info("another tester speaks; ECU jobs wait", can_id=f"0x{can_id:X}", bus=bus)
            self._foreign_until_ns = now_ns + FOREIGN_TESTER_NS

    def poll(self) -> None:
        """Moves every job on as far as it goes now."""
        for ecu in list(self._ecus.values()):
            self._poll(ecu)

    def _drop(self, ecu: _Ecu) -> None:
        """Forgets an ECU whose catalogue entry has changed; each of its jobs still gets an outcome."""
        del self._ecus[(ecu.spec.bus, ecu.spec.request_id)]
        self._answers.pop((ecu.spec.bus, ecu.spec.response_id), None)
        changed = f"{ecu.spec.identifier}: its catalogue entry has changed; its jobs are given up"
        waiting = list(ecu.jobs)
        ecu.jobs.clear()
        self._end(ecu, VehicleError(changed))
        for job in waiting:
            self._done(EcuDone(job.feature_id, b"", VehicleError(changed)))

    def _connect(self, spec: EcuSpec) -> _Ecu:
        mode = isotp.AddressingMode.Normal_11bits
        if spec.request_id > MAX_STANDARD_ID:
            mode = isotp.AddressingMode.Normal_29bits
        address = isotp.Address(mode, txid=spec.request_id, rxid=spec.response_id)
        received: deque[isotp.CanMessage] = deque()

        def transmit(message: isotp.CanMessage) -> None:
            frame = Frame(
                spec.bus,
                message.arbitration_id,
                bytes(message.data),
                self._monotonic_ns(),
                is_extended=message.is_extended_id,
            )
            self._guard.check_frame(frame, frame.monotonic_ns)
            self._send(frame)
            if frame.data[0] >> 4 != _FLOW_CONTROL:
                ecu.deadline_ns = frame.monotonic_ns + P2_NS
            trace_id = ecu.job.trace_id if ecu.job else ""
            _log.debug(
                "frame sent",
                bus=spec.bus,
                can_id=f"0x{frame.can_id:X}",
                data=frame.data.hex(),
                trace_id=trace_id,
            )

        def receive(_timeout_s: float) -> isotp.CanMessage | None:
            return received.popleft() if received else None

        def trouble(error: Exception) -> None:
            ecu.trouble = error

        layer = isotp.TransportLayerLogic(
            receive,
            transmit,
            address,
            error_handler=trouble,
            # Our loop paces the layer; it must not sleep, not even to try whether it could.
            params={"max_frame_size": MAX_ANSWER_BYTES, "wait_func": lambda _seconds: None},
        )
        ecu = _Ecu(spec, layer, received)
        return ecu

    def _poll(self, ecu: _Ecu) -> None:
        now_ns = self._monotonic_ns()
        if ecu.job is None:
            if not ecu.jobs:
                return
            if now_ns < self._foreign_until_ns:
                self._wait(ecu, now_ns)
                return
            ecu.waiting_ns = 0
            ecu.job, ecu.index, ecu.has_announced = ecu.jobs.popleft(), 0, False
            self._begin(ecu, ecu.job.requests[0], now_ns)
        while ecu.job is not None:
            try:
                ecu.layer.process()
                answer = ecu.layer.recv()
            except VehicleError as error:
                self._end(ecu, error)
                return
            if ecu.layer.is_rx_active() and not ecu.is_answering:
                ecu.is_answering = True
                ecu.deadline_ns = now_ns + ANSWER_NS
            if ecu.trouble is not None:
                self._end(ecu, UnexpectedResponseError(f"{ecu.spec.identifier}: {ecu.trouble}"))
            elif answer is not None:
                self._take(ecu, bytes(answer), now_ns)
            elif now_ns >= ecu.deadline_ns:
                wait_ns = ANSWER_NS if ecu.is_answering else P2_STAR_NS if ecu.pending else P2_NS
                wait_ms = wait_ns // 1_000_000
                self._end(ecu, EcuSilentError(f"{ecu.spec.identifier} did not answer within {wait_ms} ms"))
            else:
                return

    def _wait(self, ecu: _Ecu, now_ns: int) -> None:
        """Lets another tester speak, but not for ever: whoever waits for the job must hear of it."""
        ecu.waiting_ns = ecu.waiting_ns or now_ns
        patience_ns = SWITCH_PATIENCE_NS if ecu.jobs[0].switches else PATIENCE_NS
        if now_ns - ecu.waiting_ns >= patience_ns:
            ecu.waiting_ns = 0
            seconds = patience_ns // 1_000_000_000
            error = EcuBusyError(f"{ecu.spec.identifier}: another tester has spoken for {seconds} s")
            self._done(EcuDone(ecu.jobs.popleft().feature_id, b"", error))

    def _begin(self, ecu: _Ecu, request: bytes, now_ns: int) -> None:
        assert ecu.job is not None
        ecu.request = request
        ecu.layer.reset()
        ecu.received.clear()
        ecu.pending, ecu.is_answering, ecu.trouble = 0, False, None
        ecu.deadline_ns = now_ns + P2_NS
        try:
            self._guard.approve(ecu.spec, request)
            ecu.layer.send(request)
        except VehicleError as error:
            self._end(ecu, error)
            return
        _log.info(
            "request to ECU",
            ecu=ecu.spec.identifier,
            purpose=ecu.job.purpose,
            request=request[:4].hex(" "),
            size=len(request),
            trace_id=ecu.job.trace_id,
        )

    def _take(self, ecu: _Ecu, answer: bytes, now_ns: int) -> None:
        assert ecu.job is not None
        request = ecu.request
        if answer[:2] == bytes([_NEGATIVE, request[0]]) and len(answer) >= 3:  # noqa: PLR2004 (7F SID NRC)
            nrc = answer[2]
            if nrc == ResponseCode.RequestCorrectlyReceived_ResponsePending and ecu.pending < MAX_PENDING:
                ecu.pending += 1
                ecu.is_answering = False
                ecu.deadline_ns = now_ns + P2_STAR_NS
                return
            if nrc == ResponseCode.SecurityAccessDenied and self._announce(ecu, now_ns):
                return
            name = ResponseCode.get_name(nrc)
            self._end(ecu, NegativeResponseError(ecu.spec.identifier, service=answer[1], nrc=nrc, name=name))
            return
        echo = request[1 : 1 + _ECHOED_BYTES.get(request[0], 0)]
        expected = bytes([request[0] + _POSITIVE_OFFSET]) + echo
        problem = ""
        if not answer.startswith(expected):
            problem = f"expected a response {expected.hex(' ')}"
        elif ecu.layer.transmitting():
            problem = "before it had the whole request"
        if problem:
            found = answer[:8].hex(" ")
            self._end(ecu, UnexpectedResponseError(f"{ecu.spec.identifier} answered {found}, {problem}"))
            return
        self._guard.close(ecu.spec)
        ecu.answer = answer
        if request != ecu.job.token_key:  # after the key, the token once more
            ecu.index += 1
        if ecu.index < len(ecu.job.requests):
            self._begin(ecu, ecu.job.requests[ecu.index], now_ns)
        else:
            self._end(ecu, None)

    def _announce(self, ecu: _Ecu, now_ns: int) -> bool:
        """Sends the token key that a refused token may lack, if the job brings one; once in each job."""
        assert ecu.job is not None
        if ecu.has_announced or not ecu.job.token_key or ecu.index != _SWITCH_INDEX:
            return False
        ecu.has_announced = True
        self._guard.close(ecu.spec)
        self._begin(ecu, ecu.job.token_key, now_ns)
        return True

    def _end(self, ecu: _Ecu, error: VehicleError | None) -> None:
        job, ecu.job = ecu.job, None
        self._guard.close(ecu.spec)
        ecu.layer.reset()
        if job is not None:
            self._done(EcuDone(job.feature_id, b"" if error else ecu.answer, error))


def raw_id(can_id: int) -> int:
    """The `can_id` (RawFrame) of an ECU's identifier, which has 29 bits only if it needs them."""
    return can_id | CAN_EFF_FLAG if can_id > MAX_STANDARD_ID else can_id


def _is_functional_tester(frame: RawFrame) -> bool:
    """A functional request, other than the reads of emission-related services 0x01 to 0x0F (ISO 15031-5)."""
    if frame.can_id not in FUNCTIONAL_IDS:
        return False
    return len(frame.data) < 2 or frame.data[1] >= _FIRST_UDS_SERVICE  # noqa: PLR2004 (length and service)
