"""Buses that a test controls, and waiting for what a reader thread does."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import can

from agent.adapters.can_bus import BusState
from agent.model import Frame

DEADLINE_S = 5.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls until `condition` holds; fails after the deadline."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "nothing happened within the deadline"
        time.sleep(0.001)


class Listener:
    """Collects what a bus reports."""

    def __init__(self) -> None:
        self.batches: list[list[Frame]] = []
        self.states: list[tuple[BusState, str]] = []

    def on_frames(self, frames: list[Frame]) -> None:
        self.batches.append(list(frames))

    def on_state(self, name: str, state: BusState, reason: str) -> None:
        assert name
        self.states.append((state, reason))

    @property
    def frames(self) -> list[Frame]:
        return [frame for batch in self.batches for frame in batch]

    def saw(self, state: BusState) -> Callable[[], bool]:
        return lambda: any(found is state for found, _ in self.states)


class FakeBus:
    """A python-can bus whose messages and errors come from the test."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[can.Message | Exception] = queue.SimpleQueue()
        self.sent: list[can.Message] = []
        self.filters: object = None
        self.send_error: Exception | None = None
        self.is_shut_down = False

    def recv(self, timeout: float | None = None) -> can.Message | None:
        try:
            item = self.items.get(timeout=timeout) if timeout else self.items.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        assert timeout is not None
        if self.send_error is not None:
            raise self.send_error
        self.sent.append(msg)

    def set_filters(self, filters: object = None) -> None:
        self.filters = filters

    def shutdown(self) -> None:
        self.is_shut_down = True


class FakeGarage:
    """Opens fake buses, one after the other, or refuses to."""

    def __init__(self) -> None:
        self.buses: list[FakeBus] = []
        self.options: dict[str, object] = {}
        self.refusals: list[Exception] = []

    def __call__(self, **options: object) -> FakeBus:
        self.options = options
        if self.refusals:
            raise self.refusals.pop(0)
        self.buses.append(FakeBus())
        return self.buses[-1]
