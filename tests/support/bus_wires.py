"""Wires with the agent's bus at one end and a plain station at the other, over every transport.

The station has nothing of the agent's: it puts frames on the wire and hears
those of others through python-can's virtual bus, its own slcan on a
pseudo-terminal, or a bare socket of the kernel.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import select
import socket
import struct
import subprocess
import threading
import time
import tty
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import can
import pytest

EFF, RTR, ERR = 0x8000_0000, 0x4000_0000, 0x2000_0000
HEAR_S = 10.0
PACE_S = 0.002


class Station(Protocol):
    """The other end of a wire."""

    options: dict[str, Any]
    """What `CanBus` needs to be on the same wire."""

    def send(self, can_id: int, data: bytes) -> None:
        """Puts a frame on the wire; `can_id` with the kernel's flags."""

    def hear(self) -> tuple[int, bytes]:
        """The next frame of somebody else."""

    def cut(self) -> None:
        """Cuts the wire, or pulls the adapter."""

    def mend(self) -> None:
        """Makes it whole again."""


class VirtualStation:
    """python-can's virtual bus: one process, no wire that could be cut."""

    def __init__(self) -> None:
        channel = uuid.uuid4().hex
        self.options: dict[str, Any] = {"interface": "virtual", "channel": channel}
        self._bus = can.Bus(interface="virtual", channel=channel)

    def send(self, can_id: int, data: bytes) -> None:
        self._bus.send(
            can.Message(
                arbitration_id=can_id & 0x1FFF_FFFF,
                is_extended_id=bool(can_id & EFF),
                is_remote_frame=bool(can_id & RTR),
                data=b"" if can_id & RTR else data,
            )
        )

    def hear(self) -> tuple[int, bytes]:
        message = self._bus.recv(HEAR_S)
        assert message is not None, "nothing was heard"
        return message.arbitration_id | (EFF if message.is_extended_id else 0), bytes(message.data)

    def close(self) -> None:
        self._bus.shutdown()


class SlcanStation:
    """A LAWICEL adapter on a pseudo-terminal, and whoever is on the bus behind it."""

    LINE = re.compile(rb"([tT])([0-9A-Fa-f]{3}|[0-9A-Fa-f]{8})([0-8])((?:[0-9A-Fa-f]{2})*)")

    def __init__(self, folder: Path) -> None:
        self._path = folder / "adapter"
        self.options: dict[str, Any] = {
            "interface": "slcan",
            "channel": str(self._path),
            "bitrate": 500_000,
        }
        self._heard: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._is_open = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._master = -1
        self.mend()

    def mend(self) -> None:
        self._stop.clear()
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self._path.unlink(missing_ok=True)
        self._path.symlink_to(os.ttyname(slave))
        # Held open, or the master would see an error while nobody has the port open.
        self._thread = threading.Thread(target=self._serve, args=(self._master, slave), daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join(5)
        self._path.unlink()
        self._is_open.clear()

    close = cut

    def _serve(self, master: int, slave: int) -> None:
        rest = b""
        try:
            while not self._stop.is_set():
                if not select.select([master], [], [], 0.02)[0]:
                    continue
                *lines, rest = (rest + os.read(master, 4096)).split(b"\r")
                for line in lines:
                    self._take(master, line)
        finally:
            os.close(slave)
            os.close(master)

    def _take(self, master: int, line: bytes) -> None:
        if frame := self.LINE.fullmatch(line):
            digits = frame[2].decode()
            flag = EFF if frame[1] == b"T" else 0
            self._heard.put((int(digits, 16) | flag, bytes.fromhex(frame[4].decode())))
            os.write(master, b"z\r")
        elif line in {b"V", b"v", b"N", b"F"}:
            os.write(master, {b"V": b"V1013\r", b"v": b"v1013\r", b"N": b"NA123\r", b"F": b"F00\r"}[line])
        else:
            if line in {b"O", b"L"}:
                self._is_open.set()
            elif line == b"C":
                self._is_open.clear()
            os.write(master, b"\r")

    def send(self, can_id: int, data: bytes) -> None:
        assert self._is_open.wait(HEAR_S), "the adapter was never opened"
        kind = "r" if can_id & RTR else "t"
        name = f"{can_id & 0x1FFF_FFFF:08X}" if can_id & EFF else f"{can_id & 0x7FF:03X}"
        line = f"{kind.upper() if can_id & EFF else kind}{name}{len(data):X}"
        content = (line + ("" if can_id & RTR else data.hex().upper()) + "\r").encode()
        while content:
            content = content[os.write(self._master, content) :]

    def hear(self) -> tuple[int, bytes]:
        return self._heard.get(timeout=HEAR_S)


class KernelStation:
    """A bare socket on an interface of the kernel.

    Args:
        near: interface of the agent.
        far: interface of this station; the same one on a virtual interface.
    """

    def __init__(self, near: str, far: str) -> None:
        self.options: dict[str, Any] = {"interface": "socketcan", "channel": near}
        self._near = near
        self._far = far
        self._open()

    def _open(self) -> None:
        self.socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        self.socket.bind((self._far,))
        self.socket.settimeout(HEAR_S)

    def send(self, can_id: int, data: bytes) -> None:
        self.put(struct.pack("=IB3x8s", can_id, len(data), data))

    def send_fd(self, can_id: int, data: bytes) -> None:
        self.put(struct.pack("=IBB2x64s", can_id, len(data), 0, data))

    def put(self, content: bytes) -> None:
        self.socket.send(content)
        if self._far != self._near:
            # Emulated controllers have no wire that would take its time, and room for a few frames only.
            time.sleep(PACE_S)

    def hear(self) -> tuple[int, bytes]:
        can_id, length, data = struct.unpack("=IB3x64s", self.socket.recv(72).ljust(72, b"\0"))
        return can_id, data[:length]

    def cut(self) -> None:
        ip("link", "set", self._near, "down")

    def mend(self) -> None:
        ip("link", "set", self._near, "up")
        self.socket.close()
        self._open()

    def close(self) -> None:
        self.socket.close()


def ip(*arguments: str) -> None:
    """Configures an interface; only in a guest, or as root."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def kernel_interface() -> str:
    """The virtual CAN interface of this kernel; skips the test if there is none."""
    name = os.environ.get("OPENFOD_CAN", "vcan0")
    if "OPENFOD_CAN" in os.environ or Path("/sys/class/net", name).exists():
        return name
    pytest.skip("no vcan0 here; `make test-socketcan` runs this in a guest")


def own_interface() -> str:
    """The same, if it may be taken down: in a guest that was made for it."""
    name = kernel_interface()
    if "OPENFOD_CAN" not in os.environ:
        pytest.skip("interfaces are taken down only in a guest: make test-socketcan")
    return name


def controllers() -> tuple[str, str]:
    """Two controllers on one wire; skips the test if there are none."""
    pair = os.environ.get("OPENFOD_CAN_PAIR")
    if not pair:
        pytest.skip("no pair of controllers; `make test-socketcan` emulates one")
    near, far = pair.split(",")
    return near, far


@contextlib.contextmanager
def wire(kind: str, folder: Path) -> Iterator[Any]:
    """A station on a wire of a kind: virtual, slcan, vcan or controllers."""
    station: VirtualStation | SlcanStation | KernelStation
    if kind == "virtual":
        station = VirtualStation()
    elif kind == "slcan":
        station = SlcanStation(folder)
    elif kind.startswith("vcan"):
        name = kernel_interface()
        station = KernelStation(name, name)
    else:
        station = KernelStation(*controllers())
    try:
        yield station
    finally:
        station.close()
