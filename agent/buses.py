"""The buses of agent.toml: by which tables they are read, and what their readers do with frames.

Signals are read in the readers' own threads, so that a full bus wakes one thread for
each window and not two: the agent's loop hears of them when something that it waits
for has changed, and else once in a while. Frames of ECUs, states and losses go to the
loop's queue at once.

Light to import, because a start opens the buses first: adapters answer and the first
frames gather while the rest of the agent is still being loaded.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from agent.adapters import signal_table
from agent.adapters.bus import WINDOW_S, RawFrame, Watch
from agent.adapters.can_bus import BusState, CanBus
from agent.adapters.clock import SystemClock, SystemRandom
from agent.config import AgentConfig, BusConfig
from agent.errors import AgentError, VehicleError
from agent.model import Frame, SignalBatch
from common import log

if TYPE_CHECKING:  # its generated decoders are made after the buses are open
    from agent.signals.state import Collector

MAX_EARLY_FRAMES: Final = 16_384
"""Most frames that wait for the signals' reader at a start; a full 1 Mbit/s bus has 9,000 a second."""

_log = log.get(__name__)


class Frames(NamedTuple):
    """A bus brought frames of ECUs or of another tester."""

    bus: str
    frames: Sequence[RawFrame]


class Dropped(NamedTuple):
    """Frames of a bus were lost between two monotonic times; at least so many."""

    bus: str
    from_ns: int
    to_ns: int
    frames: int


class SignalsReady(NamedTuple):
    """There is something to `drain`."""


class StateChanged(NamedTuple):
    """A bus is in another state."""

    bus: str
    state: BusState
    reason: str


class Buses:
    """All buses of one vehicle; what they bring is put into `queue`, in order."""

    def __init__(
        self, config: AgentConfig, clock: SystemClock | None = None, *, window_s: float = WINDOW_S
    ) -> None:
        """Reads the tables; opens nothing.

        Args:
            clock: the machine's clocks, if not those of this machine.
            window_s: longest time, in seconds, that a frame waits for others before it is read.

        Raises:
            DatabaseError: a database or mapping cannot be used.
        """
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._window_s = window_s
        self._config, self._clock, self._random = config, clock or SystemClock(), SystemRandom()
        loaded = {b.name: signal_table.load(b, config.state.directory) for b in config.buses}
        self.tables = {name: table for name, table in loaded.items() if table is not None}
        self.by_name: Mapping[str, CanBus] = {bus.name: self._make(bus) for bus in config.buses}
        self._is_open = False
        self._lock = threading.Lock()  # guards what follows, between the readers and the loop
        self._collector: Collector | None = None
        self._early: list[tuple[str, Sequence[RawFrame]]] = []
        """What came before there was a collector; a loss is an empty batch."""
        self._early_frames = 0
        self._urgent: frozenset[str] = frozenset()
        self._ecu_ids: Mapping[str, frozenset[int]] = {}
        self._is_ready = False
        self._due_ns = 0

    # --- in the readers' threads -------------------------------------------------

    def _take(self, bus: str, frames: Sequence[RawFrame]) -> None:
        ecu_ids = self._ecu_ids.get(bus)
        if ecu_ids and (from_ecus := [frame for frame in frames if frame[0] in ecu_ids]):
            self.queue.put(Frames(bus, from_ecus))
        with self._lock:
            collector = self._collector
            if collector is None:
                self._keep(bus, frames)
                return
            collector.feed(bus, frames)
            now_ns = frames[-1].at_ns
            if self._is_ready or not (now_ns >= self._due_ns or collector.is_urgent(self._urgent, now_ns)):
                return
            self._is_ready = True
        self.queue.put(SignalsReady())

    def _keep(self, bus: str, frames: Sequence[RawFrame]) -> None:
        self._early_frames += len(frames)
        if self._early_frames > MAX_EARLY_FRAMES:
            self._early = [(name, ()) for name in self.by_name]
            self._early_frames = 0
        self._early.append((bus, frames))

    def _lose(self, bus: str, from_ns: int, to_ns: int, count: int) -> None:
        with self._lock:
            if self._collector is None:
                self._early.append((bus, ()))
            else:
                self._collector.lost(bus)
        self.queue.put(Dropped(bus, from_ns, to_ns, count))

    # --- in the loop's -------------------------------------------------------------

    def attach(self, collector: Collector) -> None:
        """Gives the readers what reads the signals; what came before is read first."""
        with self._lock:
            for bus, frames in self._early:
                if frames:
                    collector.feed(bus, frames)
                else:
                    collector.lost(bus)
            is_ready = bool(self._early)
            self._early, self._collector, self._is_ready = [], collector, is_ready
        if is_ready:
            self.queue.put(SignalsReady())

    def drain(self, due_ns: int) -> SignalBatch:
        """What the signals did since the last call.

        Args:
            due_ns: frames from this monotonic time on make it ready again, whatever they say.
        """
        assert self._collector is not None, "there is no collector"
        with self._lock:
            self._is_ready, self._due_ns = False, due_ns
            return self._collector.drain()

    def look_for(self, urgent: frozenset[str]) -> None:
        """Changes the signals whose change is told at once; VSS names."""
        self._urgent = urgent

    def _make(self, bus: BusConfig) -> CanBus:
        table = self.tables.get(bus.name)
        watches: dict[int, Watch] = {}
        if table is not None and bus.changes_only:
            from agent.adapters.broadcast_manager import watches_of

            watches = watches_of(table)
        return CanBus(
            bus.name,
            bus.interface,
            bus.channel,
            bus.bitrate,
            bus.fd,
            on_frames=self._take,
            on_state=lambda *changed: self.queue.put(StateChanged(*changed)),
            on_dropped=self._lose,
            wanted_ids=self._wanted(bus.name),
            watches=watches,
            listen_only=self._config.vehicle.listen_only,
            window_s=self._window_s,
            monotonic_ns=self._clock.monotonic_ns,
            wall_ns=self._clock.wall_ns,
            uniform=self._random.uniform,
            **bus.options,
        )

    def _wanted(self, bus: str) -> frozenset[int] | None:
        table = self.tables.get(bus)
        return table.can_ids if table else frozenset()

    def open(self) -> None:
        """Starts all readers, if they do not run yet."""
        if not self._is_open:
            self._is_open = True
            for bus in self.by_name.values():
                bus.open()

    def receive(self, ecu_ids: Mapping[str, frozenset[int]]) -> None:
        """Changes which `can_id`s of each bus are received besides the signals', and put into the queue."""
        self._ecu_ids = ecu_ids
        for name, bus in self.by_name.items():
            try:
                bus.receive(self._wanted(name), ecu_ids.get(name, ()))
            except VehicleError as error:
                _log.warning(str(error), bus=name)

    def send(self, frame: Frame) -> None:
        """Sends one frame on its bus.

        Raises:
            VehicleError: there is no such bus, or it did not take the frame.
        """
        bus = self.by_name.get(frame.bus)
        if bus is None:
            raise VehicleError(f"the catalogue names bus {frame.bus!r}, agent.toml has none of that name")
        bus.send(frame)

    def status(self) -> dict[str, object]:
        """What each bus brought, and how its controller is."""
        names = ("frames", "error_frames", "malformed", "dropped", "lost")
        buses = self.by_name.items()
        return {
            "bus_counts": {bus: {n: getattr(b.counts, n) for n in names} for bus, b in buses},
            "bus_reasons": {name: bus.reason for name, bus in buses},
            "controllers": {name: bus.controller.value for name, bus in buses},
        }

    def close(self) -> None:
        """Ends all readers."""
        for bus in self.by_name.values():
            try:
                bus.close()
            except AgentError as error:
                _log.warning(str(error))
