"""One CAN bus: frames in batches to the agent, single frames to the bus.

A reader thread opens the adapter of the bus's interface, reads frames and hands
them on. A bus that is lost (reader error, bus-off, vanished interface) is a
state, not a crash: it is reported and opened again with full-jitter backoff.
The thread ends only with a state that says so. Frames that were lost are declared
with the times between which they were, and at their place between those that are
handed on.
Nothing is sent unless the caller sends it; a listen-only bus refuses to send.

`interface` is `socketcan`, `slcan`, `socketcand`, `replay` for any log that
python-can reads, or another interface of python-can's. Each adapter is imported
when its first bus is opened.
"""

from __future__ import annotations

import contextlib
import enum
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from agent.adapters.bus import (
    CAN_EFF_FLAG,
    CAN_ERR_FLAG,
    FD_LENGTHS,
    MAX_CLASSIC_BYTES,
    WINDOW_S,
    BusEndedError,
    BusLostError,
    OpenBus,
    RawFrame,
    Watch,
)
from agent.errors import TransportError, VehicleError
from agent.model import Frame
from common import log as logs

log = logs.get(__name__)

IDLE_READ_S: Final = 1.0
"""Longest time, in seconds, that the reader waits for a frame."""
BACKOFF_BASE_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
"""Waits before a lost bus is opened again lie in [0, min(max, base * 2^n)] seconds."""
CLOSE_TIMEOUT_S: Final = 5.0
"""Longest wait, in seconds, for the reader thread to end."""


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


class ControllerState(enum.StrEnum):
    """The fault confinement of the CAN controller (ISO 11898-1:2015, 12.1.4)."""

    UNKNOWN = "unknown"
    """Nothing was heard of it: all is well, or the interface does not tell."""
    ERROR_ACTIVE = "error-active"
    ERROR_WARNING = "error-warning"
    ERROR_PASSIVE = "error-passive"
    BUS_OFF = "bus-off"


# include/uapi/linux/can/error.h
_CAN_ERR_CRTL: Final = 0x04
_CAN_ERR_BUSOFF: Final = 0x40
_CAN_ERR_RESTARTED: Final = 0x100
_CRTL_OVERFLOW: Final = 0x01
_CRTL_STATES: Final = (
    (0x10 | 0x20, ControllerState.ERROR_PASSIVE),
    (0x04 | 0x08, ControllerState.ERROR_WARNING),
    (0x40, ControllerState.ERROR_ACTIVE),
)
"""Bits of an error frame's second byte, receiving and sending, and what they say; the worst first."""


def controller_after(state: ControllerState, can_id: int, data: bytes) -> ControllerState:
    """The controller's state after an error frame, which may say nothing of it."""
    if can_id & _CAN_ERR_BUSOFF:
        return ControllerState.BUS_OFF
    if can_id & _CAN_ERR_CRTL and len(data) > 1:
        for bits, said in _CRTL_STATES:
            if data[1] & bits:
                return said
    if can_id & _CAN_ERR_RESTARTED:
        return ControllerState.ERROR_ACTIVE
    return state


@dataclass(slots=True)
class BusCounts:
    """What a bus brought, and what it did not.

    Args:
        frames: handed on.
        error_frames: of the controller.
        malformed: pieces that were no frame.
        dropped: frames that were lost in the controller, the kernel or the
            adapter; at least.
        lost: times that the bus was lost.
    """

    frames: int = 0
    error_frames: int = 0
    malformed: int = 0
    dropped: int = 0
    lost: int = 0


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
        on_frames: Callable[[str, Sequence[RawFrame]], None],
        on_state: Callable[[str, BusState, str], None],
        on_dropped: Callable[[str, int, int, int], None] = lambda *_: None,
        wanted_ids: Iterable[int] | None = None,
        urgent_ids: Iterable[int] = (),
        watches: Mapping[int, Watch] = MappingProxyType({}),
        listen_only: bool = True,
        window_s: float = WINDOW_S,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
        uniform: Callable[[float, float], float] = random.uniform,
        open_bus: Callable[[], OpenBus] | None = None,
        **options: Any,
    ) -> None:
        """Prepares a bus; nothing is opened yet.

        Args:
            on_frames: called in the reader's thread with the bus's name and
                each batch, in the order of the frames, without error frames.
                Whoever is slow there loses frames in the kernel, which counts them.
            on_state: called in the reader's thread with name, state and reason.
            on_dropped: called in the reader's thread with name, two monotonic
                times and the number of frames that were lost between them, at
                least, and 0 if the bus was lost meanwhile. What was handed on
                before is older than the loss, what comes after it is newer.
            wanted_ids: `can_id`s (RawFrame) that are received; None: all.
            urgent_ids: are received and do not wait for the window.
            watches: messages of which only changes are to be received, where
                the interface can do it (`socketcan`).
            listen_only: `send` refuses; the interface is told where it can be.
            options: further ones, by python-can's names; for `replay`: `speed`,
                1 for the log's own spacing, 0 for as fast as possible.
            open_bus: opens the adapter, in the place of the interface's own.
        """
        self.name = name
        self.interface = interface
        self.counts = BusCounts()
        self.controller = ControllerState.UNKNOWN
        self._on_frames, self._on_state, self._on_dropped = on_frames, on_state, on_dropped
        self._wanted = None if wanted_ids is None else frozenset(wanted_ids)
        self._urgent = frozenset(urgent_ids)
        self._fd = fd
        self._listen_only = listen_only
        self._monotonic_ns, self._uniform = monotonic_ns, uniform
        self._open_bus = open_bus or (
            lambda: open_adapter(
                interface,
                channel,
                bitrate,
                fd=fd,
                listen_only=listen_only,
                window_s=window_s,
                monotonic_ns=monotonic_ns,
                wall_ns=wall_ns,
                watches=watches,
                options=options,
            )
        )
        self._closing = threading.Event()
        self._lock = threading.Lock()  # guards _bus, _state and the filters against other threads
        self._bus: OpenBus | None = None
        self._state, self._reason = BusState.OPENING, ""
        self._heard_ns = 0
        self._dropped = self._malformed = 0
        self._thread = threading.Thread(target=self._run, name=f"can-{name}", daemon=True)

    @property
    def state(self) -> BusState:
        """The present state."""
        return self._state

    @property
    def reason(self) -> str:
        """Why it is in its state; empty: all is well."""
        return self._reason

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
        with self._lock:
            bus = self._bus
        if bus is not None:
            with contextlib.suppress(OSError):
                bus.close()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise TransportError(f"bus {self.name}: the reader did not end within {CLOSE_TIMEOUT_S} s")

    def receive(self, wanted_ids: Iterable[int] | None, urgent_ids: Iterable[int]) -> None:
        """Changes what is received, and what of it does not wait for the window.

        Args:
            wanted_ids: `can_id`s; None: everything.
            urgent_ids: these are received in any case.

        Raises:
            VehicleError: the bus did not take the filters; it gets them when it is opened again.
        """
        with self._lock:
            self._wanted = None if wanted_ids is None else frozenset(wanted_ids)
            self._urgent = frozenset(urgent_ids)
            if self._bus is None:
                return
            try:
                self._bus.receive_only(self._wanted, self._urgent)
            except OSError as error:
                raise VehicleError(f"bus {self.name} keeps its old filters: {error}") from error

    def send(self, frame: Frame) -> None:
        """Sends one frame.

        Raises:
            VehicleError: listen-only, not up, no frame of this bus, or the bus did not take it.
        """
        what = f"frame 0x{frame.can_id:X} was not sent"
        if self._listen_only:
            raise VehicleError(f"bus {self.name} is listen-only; {what}")
        with self._lock:
            bus, state = self._bus, self._state
        if bus is None:
            raise VehicleError(f"bus {self.name} is {state}; {what}")
        can_id = frame.can_id | (CAN_EFF_FLAG if frame.is_extended else 0)
        length = len(frame.data)
        fits = length in FD_LENGTHS and self._fd if frame.is_fd else length <= MAX_CLASSIC_BYTES
        if not fits:
            kind = "CAN FD" if frame.is_fd else "classic"
            raise VehicleError(f"bus {self.name}: {what}: the bus has no {kind} frame of {length} bytes")
        try:
            bus.send(can_id, frame.data, is_fd=frame.is_fd)
        except (OSError, ValueError) as error:
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
            except BusEndedError as end:
                return BusState.ENDED, str(end)
            except BusLostError as error:
                if self._closing.is_set():
                    break
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
            bus = self._open_bus()
        except (OSError, TypeError, ValueError, BusLostError) as error:
            raise BusLostError(f"cannot be opened: {error}") from error
        try:
            self._dropped = self._malformed = 0
            now_ns = self._monotonic_ns()
            if self.counts.lost:
                self._declare(now_ns, 0)  # what was on the bus meanwhile, nobody knows
            self._heard_ns = now_ns
            self._set_controller(ControllerState.UNKNOWN)
            with self._lock:
                try:
                    bus.receive_only(self._wanted, self._urgent)
                except OSError as error:
                    raise BusLostError(f"does not take the filters: {error}") from error
                self._bus = bus
            yield bus
        finally:
            with self._lock:
                self._bus = None
            # A device that has vanished cannot be closed in good order.
            with contextlib.suppress(OSError):
                bus.close()

    def _read(self, bus: OpenBus) -> None:
        """Reads until the agent closes the bus.

        Raises:
            BusLostError, BusEndedError: after the frames read so far were handed on.
        """
        while not self._closing.is_set():
            try:
                frames = bus.read(IDLE_READ_S)
            finally:
                self.counts.malformed += bus.malformed - self._malformed
                self._malformed = bus.malformed
            if bus.dropped > self._dropped:
                count, self._dropped = bus.dropped - self._dropped, bus.dropped
                self._declare(frames[0].at_ns if frames else self._monotonic_ns(), count)
            errors = [i for i, frame in enumerate(frames) if frame[0] & CAN_ERR_FLAG]
            if not errors:
                self._hand_on(frames)
                continue
            for start, end in pairwise([-1, *errors]):
                self._hand_on(frames[start + 1 : end])
                self._take_error(frames[end])
            self._hand_on(frames[errors[-1] + 1 :])
            if self.controller is ControllerState.BUS_OFF:
                raise BusLostError("bus-off")

    def _take_error(self, error: RawFrame) -> None:
        """Follows the controller, and declares what it says it lost."""
        self.counts.error_frames += 1
        can_id, data, at_ns = error
        if can_id & _CAN_ERR_CRTL and len(data) > 1 and data[1] & _CRTL_OVERFLOW:
            self._declare(at_ns, 1)
        # Frames that still come after a bus-off are handed on before the bus is opened again.
        if self.controller is not ControllerState.BUS_OFF:
            self._set_controller(controller_after(self.controller, can_id, data))

    def _hand_on(self, frames: Sequence[RawFrame]) -> None:
        if frames:
            self._heard_ns = max(self._heard_ns, frames[-1].at_ns)
            self._on_frames(self.name, frames)
            self.counts.frames += len(frames)

    def _declare(self, until_ns: int, count: int) -> None:
        self.counts.dropped += count
        self._on_dropped(self.name, self._heard_ns, max(until_ns, self._heard_ns), count)

    def _set_controller(self, state: ControllerState) -> None:
        if state is self.controller:
            return
        before, self.controller = self.controller, state
        if state is not ControllerState.UNKNOWN:
            say = log.info if state is ControllerState.ERROR_ACTIVE else log.warning
            say("CAN controller", bus=self.name, state=state.value, before=before.value)

    def _set_state(self, state: BusState, reason: str) -> None:
        if state not in NEXT_STATES[self._state]:
            raise RuntimeError(f"bus {self.name}: {state} may not follow {self._state}")
        if (state, reason) == (self._state, self._reason):
            return
        with self._lock:
            self._state, self._reason = state, reason
        log.debug("bus state", bus=self.name, state=state.value, reason=reason)
        self._on_state(self.name, state, reason)


def open_adapter(
    interface: str,
    channel: str,
    bitrate: int | None,
    *,
    fd: bool,
    listen_only: bool,
    window_s: float,
    monotonic_ns: Callable[[], int],
    wall_ns: Callable[[], int],
    watches: Mapping[int, Watch],
    options: dict[str, Any],
) -> OpenBus:
    """Opens the adapter of an interface, and imports what it needs.

    Raises:
        OSError, TypeError, ValueError, BusLostError: it cannot be opened.
    """
    if interface == "socketcan":
        if watches:
            from agent.adapters.broadcast_manager import BroadcastManagerBus

            return BroadcastManagerBus(
                channel, watches, window_s=window_s, monotonic_ns=monotonic_ns, wall_ns=wall_ns
            )
        from agent.adapters.socketcan import SocketcanBus

        return SocketcanBus(channel, fd=fd, window_s=window_s, monotonic_ns=monotonic_ns, wall_ns=wall_ns)
    if interface == "slcan":
        from agent.adapters.slcan import SlcanBus

        return SlcanBus(
            channel,
            bitrate,
            fd=fd,
            listen_only=listen_only,
            window_s=window_s,
            monotonic_ns=monotonic_ns,
            **options,
        )
    if interface == "socketcand":
        from agent.adapters.socketcand import SocketcandBus

        return SocketcandBus(
            channel, **options, window_s=window_s, monotonic_ns=monotonic_ns, wall_ns=wall_ns
        )
    if interface == "replay":
        from agent.adapters.replay import ReplayBus

        return ReplayBus(Path(channel), **options, window_s=window_s, monotonic_ns=monotonic_ns)
    from agent.adapters.python_can import open_bus

    if bitrate is not None:
        options = {**options, "bitrate": bitrate}
    if fd:
        options = {**options, "fd": True}
    return open_bus(
        interface, channel, options, window_s=window_s, monotonic_ns=monotonic_ns, wall_ns=wall_ns
    )
