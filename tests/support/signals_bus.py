"""Buses that a test controls, and waiting for what a reader thread does."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from agent.adapters.bus import RawFrame
from agent.adapters.can_bus import BusState, CanBus

DEADLINE_S = 5.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls until `condition` holds; fails after the deadline."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, "nothing happened within the deadline"
        time.sleep(0.001)


@contextmanager
def running_bus(**options: Any) -> Iterator[tuple[CanBus, Listener]]:
    """A bus that is up, and what hears it; reopened at once when it is lost."""
    listener = Listener()
    bus = CanBus(
        "body",
        on_frames=listener.on_frames,
        on_state=listener.on_state,
        on_dropped=listener.on_dropped,
        uniform=lambda low, _high: low + 0.01,
        **options,
    )
    bus.open()
    try:
        wait_until(listener.saw(BusState.UP))
        yield bus, listener
    finally:
        bus.close()


class Listener:
    """Collects what a bus reports."""

    def __init__(self) -> None:
        self.batches: list[list[RawFrame]] = []
        self.states: list[tuple[BusState, str]] = []
        self.drops: list[tuple[int, int, int]] = []
        self.order: list[str] = []

    def on_frames(self, name: str, frames: Sequence[RawFrame]) -> None:
        assert name
        self.order.append("frames")
        self.batches.append(list(frames))

    def on_state(self, name: str, state: BusState, reason: str) -> None:
        assert name
        self.states.append((state, reason))

    def on_dropped(self, name: str, from_ns: int, to_ns: int, count: int) -> None:
        assert name
        self.order.append("drop")
        self.drops.append((from_ns, to_ns, count))

    @property
    def frames(self) -> list[RawFrame]:
        return [frame for batch in list(self.batches) for frame in batch]

    def saw(self, state: BusState) -> Callable[[], bool]:
        return lambda: any(found is state for found, _ in list(self.states))


class FakeBus:
    """An adapter whose frames and errors come from the test."""

    def __init__(self) -> None:
        self.dropped = self.malformed = 0
        self.items: queue.SimpleQueue[Sequence[RawFrame] | Exception] = queue.SimpleQueue()
        self.sent: list[tuple[int, bytes, bool]] = []
        self.filters: list[tuple[frozenset[int] | None, frozenset[int]]] = []
        self.send_error: Exception | None = None
        self.filter_error: OSError | None = None
        self.is_closed = False

    def read(self, timeout_s: float) -> Sequence[RawFrame]:
        try:
            item = self.items.get(timeout=timeout_s)
        except queue.Empty:
            return ()
        if isinstance(item, Exception):
            raise item
        return item

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:
        if self.send_error is not None:
            raise self.send_error
        self.sent.append((can_id, data, is_fd))

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        if self.filter_error is not None:
            raise self.filter_error
        self.filters.append((wanted, urgent))

    def close(self) -> None:
        self.is_closed = True
        self.items.put(())


class FakeGarage:
    """Opens fake buses, one after the other, or refuses to."""

    def __init__(self) -> None:
        self.buses: list[FakeBus] = []
        self.refusals: list[Exception] = []

    def __call__(self) -> FakeBus:
        if self.refusals:
            raise self.refusals.pop(0)
        self.buses.append(FakeBus())
        return self.buses[-1]
