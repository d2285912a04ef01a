"""The buses of agent.toml: by which tables they are read, and one queue of what they bring.

Light to import, because a start opens the buses first: adapters answer and the first
frames gather while the rest of the agent is still being loaded.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any, NamedTuple

from agent.adapters import signal_table
from agent.adapters.bus import RawFrame, Watch
from agent.adapters.can_bus import BusState, CanBus
from agent.adapters.clock import SystemClock, SystemRandom
from agent.config import AgentConfig, BusConfig
from agent.errors import AgentError, VehicleError
from agent.model import Frame
from common import log

_log = log.get(__name__)


class Frames(NamedTuple):
    """A bus brought frames."""

    bus: str
    frames: list[RawFrame]


class Dropped(NamedTuple):
    """Frames of a bus were lost between two monotonic times; at least so many."""

    bus: str
    from_ns: int
    to_ns: int
    frames: int


class StateChanged(NamedTuple):
    """A bus is in another state."""

    bus: str
    state: BusState
    reason: str


class Buses:
    """All buses of one vehicle; what they bring is put into `queue`, in order."""

    def __init__(self, config: AgentConfig, clock: SystemClock | None = None) -> None:
        """Reads the tables; opens nothing.

        Args:
            clock: the machine's clocks, if not those of this machine.

        Raises:
            DatabaseError: a database or mapping cannot be used.
        """
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._config, self._clock, self._random = config, clock or SystemClock(), SystemRandom()
        loaded = {b.name: signal_table.load(b, config.state.directory) for b in config.buses}
        self.tables = {name: table for name, table in loaded.items() if table is not None}
        self.by_name: Mapping[str, CanBus] = {bus.name: self._make(bus) for bus in config.buses}
        self._is_open = False

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
            on_frames=lambda *brought: self.queue.put(Frames(*brought)),
            on_state=lambda *changed: self.queue.put(StateChanged(*changed)),
            on_dropped=lambda *dropped: self.queue.put(Dropped(*dropped)),
            wanted_ids=self._wanted(bus.name),
            watches=watches,
            listen_only=self._config.vehicle.listen_only,
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

    def receive(self, urgent: Mapping[str, frozenset[int]]) -> None:
        """Changes which `can_id`s of each bus are received besides the signals', at once."""
        for name, bus in self.by_name.items():
            try:
                bus.receive(self._wanted(name), urgent.get(name, ()))
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
