"""The simulator's hub and serial adapter in a thread, for tests with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import can

from firmware_sim.adapter import SlcanAdapter
from firmware_sim.frame import Frame
from firmware_sim.hub import Bus, Socketcand

DEADLINE_S = 10.0


@dataclass
class Recorder:
    """A member of the bus that remembers what it hears."""

    frames: list[Frame] = field(default_factory=list)

    def deliver(self, frame: Frame) -> None:
        self.frames.append(frame)


@dataclass
class RunningHub:
    """A hub that runs in its thread."""

    loop: asyncio.AbstractEventLoop
    bus: Bus
    server: Socketcand
    adapter: SlcanAdapter
    recorder: Recorder

    def send(self, frame: Frame) -> None:
        """Puts a frame on the bus from the simulator's side."""
        self.loop.call_soon_threadsafe(self.bus.send, frame, self.recorder)

    def call(self, work: Callable[[], object]) -> None:
        """Does something in the hub's thread, and waits until it is done."""
        done = threading.Event()

        def do() -> None:
            try:
                work()
            finally:
                done.set()

        self.loop.call_soon_threadsafe(do)
        assert done.wait(DEADLINE_S)

    def client(self) -> can.BusABC:
        """A python-can client that has joined."""
        joined = can.Bus(
            interface="socketcand",
            channel="can0",
            host="127.0.0.1",
            port=self.server.port,
            tcp_tune=True,
            ignore_config=True,
        )
        joined.send(can.Message(arbitration_id=0x7FF, is_extended_id=False))  # ends the settling pause
        wait_for(lambda: any(f.can_id == 0x7FF for f in self.recorder.frames))
        self.recorder.frames.clear()
        return joined

    def raw(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection(("127.0.0.1", self.server.port), timeout=DEADLINE_S)


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until something is so, or fails."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def receive(bus: can.BusABC, can_id: int) -> can.Message:
    """Waits for a message with an identifier."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        message = bus.recv(timeout=0.1)
        if message is not None and message.arbitration_id == can_id:
            return message
    raise AssertionError(f"no message 0x{can_id:X}")


@contextlib.contextmanager
def running_hub(**adapter_options: Any) -> Iterator[RunningHub]:
    """Starts a hub with a serial adapter on free addresses, and ends it."""
    started: list[RunningHub] = []
    is_ready = threading.Event()
    ended: list[asyncio.Event] = []

    async def serve() -> None:
        bus, recorder = Bus(), Recorder()
        bus.join(recorder)
        server = Socketcand(bus)
        await server.start(0)
        adapter = SlcanAdapter(bus, **adapter_options)
        ended.append(asyncio.Event())
        started.append(RunningHub(asyncio.get_running_loop(), bus, server, adapter, recorder))
        is_ready.set()
        await ended[0].wait()
        adapter.close()
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_ready.wait(DEADLINE_S)
    try:
        yield started[0]
    finally:
        started[0].loop.call_soon_threadsafe(ended[0].set)
        thread.join(DEADLINE_S)
