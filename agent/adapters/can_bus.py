"""One CAN bus: frames in batches to the agent, single frames to the bus.

A reader thread opens the bus through python-can, collects frames for one
window, or less when an urgent identifier arrives, and hands them on. A bus that
is lost (reader error, bus-off, vanished interface) is a state, not a crash: it
is reported and opened again with full-jitter backoff. The thread ends only with
a state that says so. Nothing is sent unless the caller sends it; a listen-only
bus refuses to send.

`interface` is one of python-can's (socketcan, slcan, virtual, ...),
`socketcand`, or `replay` for any log that python-can reads.
"""

from __future__ import annotations

import contextlib
import enum
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import can

from agent.adapters.socketcand import SocketcandBus
from agent.errors import TransportError, VehicleError
from agent.model import Frame
from common import log as logs

log = logs.get(__name__)

WINDOW_S: Final = 0.02
"""Longest time, in seconds, that a frame waits for others before it is handed on."""
IDLE_RECEIVE_S: Final = 0.1
"""Longest time, in seconds, that the reader waits before it looks whether it is to end."""
MAX_BATCH_FRAMES: Final = 4096
"""Most frames in one batch; a full batch is handed on at once."""
MAX_MALFORMED_IN_A_ROW: Final = 100
"""Frames that cannot be parsed, without a good one between, that make a bus count as lost."""
MAX_TIMESTAMP_LAG_NS: Final = 1_000_000_000
"""A frame's time stamp is believed if it is not in the future and not older than this."""
SEND_TIMEOUT_S: Final = 0.05
"""Longest wait, in seconds, until the bus takes a frame."""
BACKOFF_BASE_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
"""Waits before a lost bus is opened again lie in [0, min(max, base * 2^n)] seconds."""
MAX_SPEED: Final = 1_000_000.0
"""Fastest replay with spacing, as a multiple of the log's own speed."""
CLOSE_TIMEOUT_S: Final = 5.0
"""Longest wait, in seconds, for the reader thread to end."""

_CAN_ERR_BUSOFF: Final = 0x40  # include/uapi/linux/can/error.h

CanId = tuple[int, bool]
"""CAN identifier, and whether it has 29 bits."""


class BusState(enum.StrEnum):
    """Where a bus is in its life."""

    OPENING = "opening"
    UP = "up"
    LOST = "lost"
    """Not usable; it is being opened again."""
    ENDED = "ended"
    """The log that was replayed is at its end."""
    CLOSED = "closed"
    FAILED = "failed"
    """The reader stopped by an error in this program; frames no longer arrive."""


NEXT_STATES: Final[Mapping[BusState, frozenset[BusState]]] = MappingProxyType(
    {
        BusState.OPENING: frozenset({BusState.UP, BusState.LOST, BusState.CLOSED, BusState.FAILED}),
        BusState.UP: frozenset({BusState.LOST, BusState.ENDED, BusState.CLOSED, BusState.FAILED}),
        BusState.LOST: frozenset({BusState.LOST, BusState.UP, BusState.CLOSED, BusState.FAILED}),
        BusState.ENDED: frozenset({BusState.CLOSED}),
        BusState.CLOSED: frozenset(),
        BusState.FAILED: frozenset({BusState.CLOSED}),
    }
)
"""The states that each state may be followed by."""


@dataclass(slots=True)
class BusCounts:
    """What a bus brought: frames handed on, error frames, frames that could not be parsed, losses."""

    frames: int = 0
    error_frames: int = 0
    malformed: int = 0
    lost: int = 0


class OpenBus(Protocol):
    """What is used of a python-can bus."""

    def recv(self, timeout: float | None = None) -> can.Message | None:
        """The next message; None if there is none within `timeout` seconds."""

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        """Sends one message within `timeout` seconds."""

    def set_filters(self, filters: Any = None) -> None:
        """Receives only what one of the filters matches; None: everything."""

    def shutdown(self) -> None:
        """Closes the bus."""


class _Lost(Exception):
    """The bus said by itself that it is gone."""


class _EndOfLog(Exception):
    """A replayed log has no more frames."""


class CanBus:
    """One bus of the vehicle; `open` starts it, `close` ends it."""

    def __init__(
        self,
        name: str,
        interface: str,
        channel: str,
        bitrate: int | None = None,
        fd: bool = False,
        *,
        on_frames: Callable[[list[Frame]], None],
        on_state: Callable[[str, BusState, str], None],
        wanted_ids: Iterable[CanId] | None = None,
        urgent_ids: Iterable[CanId] = (),
        listen_only: bool = True,
        window_s: float = WINDOW_S,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
        uniform: Callable[[float, float], float] = random.uniform,
        open_bus: Callable[..., OpenBus] | None = None,
        **options: object,
    ) -> None:
        """Prepares a bus; nothing is opened yet.

        Args:
            on_frames: called in the reader's thread with each batch, in the
                order of the frames; their times never go back.
            on_state: called in the reader's thread with name, state and reason.
            wanted_ids: identifiers that are received; None: all.
            urgent_ids: identifiers that are received and do not wait for the window.
            listen_only: `send` refuses; the interface is told where it can be.
            options: further ones of python-can; for `replay`: `speed`, 1 for
                the log's own spacing, 0 for as fast as possible.
            open_bus: opens the bus from interface, channel and options.
        """
        self.name = name
        self.interface = interface
        self.counts = BusCounts()
        self._on_frames, self._on_state = on_frames, on_state
        self._urgent_ids = frozenset(urgent_ids)
        self._wanted_ids = None if wanted_ids is None else frozenset(wanted_ids)
        self._listen_only = listen_only
        self._window_ns = int(window_s * 1e9)
        self._monotonic_ns, self._wall_ns, self._uniform = monotonic_ns, wall_ns, uniform
        self._open_bus = open_bus or open_python_can
        self._options: dict[str, Any] = {"interface": interface, "channel": channel, **options}
        if bitrate is not None:
            self._options["bitrate"] = bitrate
        if fd:
            self._options["fd"] = True
        if listen_only and interface == "slcan":
            self._options["listen_only"] = True
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _bus, _state and the filters against the sender's thread
        self._bus: OpenBus | None = None
        self._state, self._reason = BusState.OPENING, ""
        self._last_ns = 0
        self._malformed_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name=f"can-{name}", daemon=True)

    @property
    def state(self) -> BusState:
        """The present state."""
        return self._state

    def open(self) -> None:
        """Starts the reader; the bus is up when `on_state` says so."""
        self._thread.start()

    def close(self) -> None:
        """Ends the reader and closes the bus.

        Raises:
            TransportError: the reader did not end within CLOSE_TIMEOUT_S.
        """
        self._closing.set()
        if self._thread.ident is None:
            return
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise TransportError(f"bus {self.name}: the reader did not end within {CLOSE_TIMEOUT_S} s")

    def receive(self, wanted_ids: Iterable[CanId] | None, urgent_ids: Iterable[CanId]) -> None:
        """Changes what is received, and what of it does not wait for the window.

        Args:
            wanted_ids: None: everything.
            urgent_ids: these are received in any case.

        Raises:
            VehicleError: the bus did not take the filters; it gets them when it is opened again.
        """
        with self._lock:
            self._wanted_ids = None if wanted_ids is None else frozenset(wanted_ids)
            self._urgent_ids = frozenset(urgent_ids)
            if self._bus is None:
                return
            try:
                self._bus.set_filters(self._filters())
            except (can.CanError, OSError) as error:
                raise VehicleError(f"bus {self.name} keeps its old filters: {error}") from error

    def send(self, frame: Frame) -> None:
        """Sends one frame.

        Raises:
            VehicleError: listen-only, not up, or the bus did not take it.
        """
        what = f"frame 0x{frame.can_id:X} was not sent"
        if self._listen_only:
            raise VehicleError(f"bus {self.name} is listen-only; {what}")
        with self._lock:
            bus, state = self._bus, self._state
        if bus is None:
            raise VehicleError(f"bus {self.name} is {state}; {what}")
        try:
            message = can.Message(
                arbitration_id=frame.can_id,
                is_extended_id=frame.is_extended,
                is_fd=frame.is_fd,
                data=frame.data,
                check=True,
            )
            bus.send(message, timeout=SEND_TIMEOUT_S)
        except (can.CanError, OSError, ValueError) as error:
            raise VehicleError(f"bus {self.name}: {what}: {error}") from error

    # --- the reader's thread -------------------------------------------------

    def _run(self) -> None:
        last = BusState.FAILED
        reason = "the reader stopped by an error in this program"
        try:
            last, reason = self._keep_open()
        finally:
            # An error goes on to threading.excepthook; the state must be known all the same.
            self._set_state(last, reason)

    def _keep_open(self) -> tuple[BusState, str]:
        """Opens the bus, again and again; returns the state in which it ends."""
        attempt = 0
        while not self._closing.is_set():
            frames_before = self.counts.frames
            try:
                with self._opened() as bus:
                    self._set_state(BusState.UP, "")
                    self._read(bus)
            except _EndOfLog as end:
                return BusState.ENDED, str(end)
            except _Lost as error:
                self.counts.lost += 1
                self._set_state(BusState.LOST, str(error))
                # A bus that opens but brings nothing must not be opened in a tight loop.
                attempt = 0 if self.counts.frames > frames_before else attempt + 1
                limit_s = min(BACKOFF_MAX_S, BACKOFF_BASE_S * 2.0 ** min(attempt, 10))
                self._closing.wait(self._uniform(0, limit_s))
        return BusState.CLOSED, "closed by the agent"

    @contextlib.contextmanager
    def _opened(self) -> Iterator[OpenBus]:
        try:
            if self.interface == "replay":
                bus: OpenBus = _ReplayBus(self._closing, self._monotonic_ns, **self._replay_options())
            else:
                bus = self._open_bus(**self._options)
            with self._lock:
                bus.set_filters(self._filters())
                self._bus = bus
        except (can.CanError, OSError, TypeError, ValueError) as error:
            raise _Lost(f"cannot be opened: {error}") from error
        try:
            yield bus
        finally:
            with self._lock:
                self._bus = None
            # A device that has vanished cannot be closed in good order.
            with contextlib.suppress(can.CanError, OSError):
                bus.shutdown()

    def _replay_options(self) -> dict[str, Any]:
        return {name: value for name, value in self._options.items() if name != "interface"}

    def _read(self, bus: OpenBus) -> None:
        """Reads until the agent closes the bus.

        Raises:
            _Lost, _EndOfLog: after the frames read so far were handed on.
        """
        batch: list[Frame] = []
        window_ends_ns = 0
        while not self._closing.is_set():
            wait_s = IDLE_RECEIVE_S
            if batch:
                wait_s = min(wait_s, max(0.0, (window_ends_ns - self._monotonic_ns()) / 1e9))
            try:
                frame = self._receive(bus, wait_s)
            except (_Lost, _EndOfLog):
                self._hand_on(batch)
                raise
            now_ns = self._monotonic_ns()
            if frame is not None:
                if not batch:
                    window_ends_ns = now_ns + self._window_ns
                batch.append(frame)
                if (frame.can_id, frame.is_extended) in self._urgent_ids:
                    window_ends_ns = now_ns
            if batch and (now_ns >= window_ends_ns or len(batch) >= MAX_BATCH_FRAMES):
                self._hand_on(batch)
                batch = []
        self._hand_on(batch)

    def _receive(self, bus: OpenBus, wait_s: float) -> Frame | None:
        try:
            message = bus.recv(wait_s)
        except (ValueError, IndexError) as error:
            # python-can's parsers of serial lines and sockets raise these on a damaged frame.
            self.counts.malformed += 1
            self._malformed_in_a_row += 1
            if self._malformed_in_a_row >= MAX_MALFORMED_IN_A_ROW:
                self._malformed_in_a_row = 0
                raise _Lost(f"{MAX_MALFORMED_IN_A_ROW} malformed frames in a row; last: {error}") from error
            return None
        except (can.CanError, OSError) as error:
            raise _Lost(str(error)) from error
        except TransportError as error:
            # Only a log raises this; to open it again would replay it from its start.
            raise _EndOfLog(str(error)) from error
        if message is None:
            return None
        self._malformed_in_a_row = 0
        return self._frame(message, self._monotonic_ns())

    def _hand_on(self, batch: list[Frame]) -> None:
        if batch:
            self.counts.frames += len(batch)
            self._on_frames(batch)

    def _frame(self, message: can.Message, now_ns: int) -> Frame | None:
        if message.is_error_frame:
            self.counts.error_frames += 1
            if self.interface == "socketcan" and message.arbitration_id & _CAN_ERR_BUSOFF:
                raise _Lost("bus-off")
            return None
        if message.is_remote_frame:
            return None
        at_ns = round(message.timestamp * 1e9)
        if self.interface != "replay":  # whose times are of the monotonic clock already
            lag_ns = self._wall_ns() - at_ns
            at_ns = now_ns - lag_ns if 0 <= lag_ns <= MAX_TIMESTAMP_LAG_NS else now_ns
        self._last_ns = max(self._last_ns, at_ns)
        return Frame(
            bus=self.name,
            can_id=message.arbitration_id,
            data=bytes(message.data),
            monotonic_ns=self._last_ns,
            is_extended=message.is_extended_id,
            is_fd=message.is_fd,
        )

    def _filters(self) -> list[dict[str, object]] | None:
        if self._wanted_ids is None:
            return None
        ids = sorted(self._wanted_ids | self._urgent_ids)
        # Without any filter python-can receives everything; this one matches nothing.
        nothing: list[dict[str, object]] = [{"can_id": 0x7FF, "can_mask": 0x1FFFFFFF, "extended": True}]
        return [
            {"can_id": can_id, "can_mask": 0x1FFFFFFF if extended else 0x7FF, "extended": extended}
            for can_id, extended in ids
        ] or nothing

    def _set_state(self, state: BusState, reason: str) -> None:
        if state not in NEXT_STATES[self._state]:
            raise RuntimeError(f"bus {self.name}: {state} may not follow {self._state}")
        if (state, reason) == (self._state, self._reason):
            return
        with self._lock:
            self._state, self._reason = state, reason
        log.debug("bus state", bus=self.name, state=state.value, reason=reason)
        self._on_state(self.name, state, reason)


def open_python_can(interface: str, channel: str, **options: Any) -> OpenBus:
    """Opens a bus; configuration of python-can outside of the agent's is not looked at.

    Raises:
        ValueError, OSError, can.CanError: it cannot be opened.
    """
    if interface == "socketcand":
        return SocketcandBus(channel, **options)
    return can.Bus(channel=channel, interface=interface, ignore_config=True, **options)


# --- replay ------------------------------------------------------------------


def _messages(path: Path) -> Iterator[can.Message]:
    """The messages of a log, with one kind of error for all formats."""
    try:
        with can.LogReader(path) as reader:
            yield from reader
    except (OSError, ValueError, LookupError, TypeError, can.CanError) as error:
        raise TransportError(f"{path}: not a log that can be replayed: {error}") from error


def replay_log(path: Path, bus: str) -> Iterator[Frame]:
    """The data frames of a log, their times counted from its first message.

    Raises:
        TransportError: not readable, or not a log.
    """
    first_s: float | None = None
    for message in _messages(path):
        if first_s is None:
            first_s = message.timestamp
        if message.is_error_frame or message.is_remote_frame:
            continue
        yield Frame(
            bus=bus,
            can_id=message.arbitration_id,
            data=bytes(message.data),
            monotonic_ns=max(0, round((message.timestamp - first_s) * 1e9)),
            is_extended=message.is_extended_id,
            is_fd=message.is_fd,
        )


class _ReplayBus:
    """A log in the place of a bus; the time stamps of its messages are of the monotonic clock."""

    def __init__(
        self, closing: threading.Event, monotonic_ns: Callable[[], int], channel: str, speed: float = 1.0
    ) -> None:
        if not 0 <= speed <= MAX_SPEED:
            raise ValueError(f"speed {speed}: expected 0 to {MAX_SPEED}")
        self._closing, self._monotonic_ns = closing, monotonic_ns
        self._messages = _messages(Path(channel))
        self._speed = speed
        self._wanted: frozenset[CanId] | None = None
        self._next: can.Message | None = None
        self._start_ns = monotonic_ns()
        self._first_s: float | None = None

    def set_filters(self, filters: list[dict[str, Any]] | None = None) -> None:
        self._wanted = None if filters is None else frozenset((f["can_id"], f["extended"]) for f in filters)

    def recv(self, timeout: float | None = None) -> can.Message | None:
        message = self._next
        while message is None:
            message = next(self._messages, None)
            if message is None:
                raise _EndOfLog("end of the log")
            if self._first_s is None:
                self._first_s = message.timestamp
            # Times at speed 0 keep the log's spacing, so that ages stay what they were.
            offset_ns = (message.timestamp - self._first_s) * 1e9 / (self._speed or 1.0)
            message.timestamp = (self._start_ns + offset_ns) / 1e9
            key = (message.arbitration_id, message.is_extended_id)
            if self._wanted is not None and key not in self._wanted and not message.is_error_frame:
                message = None
        self._next = message
        if self._speed:
            due_s = message.timestamp - self._monotonic_ns() / 1e9
            if due_s > (IDLE_RECEIVE_S if timeout is None else timeout):
                self._closing.wait(timeout)
                return None
            if due_s > 0:
                self._closing.wait(due_s)
        self._next = None
        return message

    def send(self, msg: can.Message, timeout: float | None = None) -> None:  # noqa: ARG002
        raise can.CanOperationError(f"a replayed log takes no frames; 0x{msg.arbitration_id:X}")

    def shutdown(self) -> None:
        self._messages = iter(())
