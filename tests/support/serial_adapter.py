"""The far end of a serial line: an adapter that answers as it is told, and can be pulled."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence

from support.sim_hub import wait_for

from agent.adapters.bus import BusLostError, RawFrame
from agent.adapters.slcan import SlcanBus

DEADLINE_S = 10.0

Answer = Callable[[bytes], bytes]


def lawicel(command: bytes) -> bytes:
    """An adapter that knows everything that LAWICEL's does, and CAN FD; status is fine."""
    answers = {b"V": b"V1013\r", b"F": b"F00\r"}
    if command in answers:
        return answers[command]
    if command[:1] in b"SsYOLC" and command:
        return b"\r"
    return b"z\r" if command[:1] in b"tTdDbB" and command else b"\a"


def silent_canable(command: bytes) -> bytes:
    """CANable 2 as first published: it says its version, and acknowledges nothing."""
    return b"b158aa7 github.com/normaldotcom/canable2.git\r" if command == b"V" else b""


def weact(command: bytes) -> bytes:
    """CANable's commands, acknowledged: no L, no F."""
    if command == b"V":
        return b"WeAct Studio V1.0\r"
    return b"\r" if command[:1] in b"SYMOCtTdDbB" and command else b"\a"


class SerialAdapter:
    """A pseudo-terminal with an adapter behind it, in a thread."""

    def __init__(self, answer: Answer = lawicel) -> None:
        self._answer = answer
        self.commands: list[bytes] = []
        self.near, self._far = os.openpty()
        tty.setraw(self._far)
        self.path = os.ttyname(self._far)
        self._end, self._told = os.pipe()
        self._thread = threading.Thread(target=self._obey, daemon=True)
        self._thread.start()

    def say(self, content: bytes) -> None:
        """Sends bytes to whoever has opened the line."""
        while content:
            content = content[os.write(self.near, content) :]

    def pull(self) -> None:
        """Unplugs it."""
        self.stop()
        self.cut()
        os.close(self._told)

    def stop(self) -> None:
        """Reads and answers no more, but stays plugged."""
        os.write(self._told, b"x")
        self._thread.join(DEADLINE_S)

    def cut(self) -> None:
        """Closes the line, from whichever thread."""
        for descriptor in (self.near, self._far):
            os.close(descriptor)

    def heard(self, command: bytes) -> None:
        """Waits until it was given a command."""
        wait_for(lambda: command in self.commands)

    def _obey(self) -> None:
        received = b""
        with contextlib.suppress(OSError):  # cut by its own answer
            while True:
                ready, _, _ = select.select([self.near, self._end], [], [])
                if self._end in ready:
                    break
                received += os.read(self.near, 4096)
                *commands, received = received.split(b"\r")
                for command in commands:
                    self.commands.append(command)
                    self.say(self._answer(command))
        os.close(self._end)


@contextlib.contextmanager
def plugged(answer: Answer = lawicel) -> Iterator[SerialAdapter]:
    """An adapter that is unplugged at the end."""
    adapter = SerialAdapter(answer)
    try:
        yield adapter
    finally:
        with contextlib.suppress(OSError):  # pulled in the test
            adapter.pull()


@contextlib.contextmanager
def opened(
    adapter: SerialAdapter,
    bitrate: int | None = 500_000,
    *,
    fd: bool = False,
    listen_only: bool = False,
    window_s: float = 0.0,
    **options: int,
) -> Iterator[SlcanBus]:
    """The agent's bus on it."""
    bus = SlcanBus(
        adapter.path,
        bitrate,
        fd=fd,
        listen_only=listen_only,
        window_s=window_s,
        monotonic_ns=time.monotonic_ns,
        **options,
    )
    try:
        yield bus
    finally:
        bus.close()


def read(bus: SlcanBus, number: int) -> list[RawFrame]:
    """Reads until there are so many frames."""
    frames: list[RawFrame] = []
    ends_s = time.monotonic() + DEADLINE_S
    while len(frames) < number:
        assert time.monotonic() < ends_s, frames
        frames += bus.read(0.1)
    return frames


def read_until_lost(bus: SlcanBus) -> tuple[Sequence[RawFrame], str]:
    """What is read before the bus is lost, and why it is."""
    frames: list[RawFrame] = []
    ends_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends_s:
        try:
            frames += bus.read(0.1)
        except BusLostError as error:
            return frames, str(error)
    raise AssertionError("the bus was not lost")
