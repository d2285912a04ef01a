"""A fully loaded bus without SocketCAN: the same receivers at full speed, on a stand-in for its sockets.

`bus_load` needs a kernel with CAN; in an emulated machine only its ratios count, and roughly. Here each CAN
socket is a datagram socket on loopback with the same calls, time stamps and counts of drops, and a second
process paces the frames one by one, 111 µs apart at 9,000 a second. What the kernel's filters would keep
back is not sent. The broadcast manager has no stand-in. Receivers, database and figures are `bus_load`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from typing import Any

from bench import bus_load

RECEIVERS = ("naive", "filtered", "all", "ours", "engine", "ten")
FILTERED = frozenset({"filtered", "ours", "engine", "ten"})
SETTLE_S = 1.0
_HOST = "127.0.0.1"


class StandIn(socket.socket):
    """A CAN socket as its users see it, and a datagram socket on loopback in truth."""

    ports: tuple[int, ...] = ()
    """Where the frames arrive; sockets beyond the first get ports on which nothing does."""
    bound = 0

    def __init__(self, family: int = -1, type: int = -1, proto: int = -1, fileno: Any = None) -> None:  # noqa: A002
        is_can = family == socket.AF_CAN
        self._is_can = is_can
        super().__init__(*(socket.AF_INET, socket.SOCK_DGRAM, 0) if is_can else (family, type, proto), fileno)

    def bind(self, address: Any) -> None:
        """Binds the first CAN socket to where the frames arrive."""
        if self._is_can:
            port = StandIn.ports[StandIn.bound] if StandIn.bound < len(StandIn.ports) else 0
            StandIn.bound += 1
            address = (_HOST, port)
        super().bind(address)

    def setsockopt(self, level: int, *rest: Any) -> None:
        """Takes all options but those of CAN, which mean nothing here."""
        if level != socket.SOL_CAN_RAW:
            super().setsockopt(level, *rest)


def send(port: int, rate: float, *, everything: bool) -> None:
    """Paces frames to a port until this process is ended."""
    wanted = frozenset(bus_load.subscribed_ids())
    contents = []
    for number in range(bus_load.IDS):
        can_id = bus_load.identifier(number)
        contents.append((can_id, [bus_load.frame(can_id, data) for data in bus_load.payloads(number)]))
    order = [
        each[turn] if everything or can_id in wanted else b""
        for turn in range(bus_load.FRAMES_EACH)
        for can_id, each in contents
    ]
    os.sched_setaffinity(0, {0})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((_HOST, port))
        begun_ns, step_ns, number = time.monotonic_ns(), round(1e9 / rate), 0
        while True:
            content = order[number % len(order)]
            while time.monotonic_ns() < begun_ns + number * step_ns:
                pass
            if content:
                try:
                    sock.send(content)
                except ConnectionRefusedError:
                    return
            number += 1


def receive(name: str, port: int, rate: float) -> dict[str, float]:
    """Runs one receiver in this process, on stand-in sockets."""
    StandIn.ports = (port,)
    socket.socket = StandIn  # type: ignore[misc]
    begun_s = time.monotonic()
    bus_load.sent = lambda: round((time.monotonic() - begun_s) * rate)
    return bus_load.receive(name)


def main() -> None:
    """Prints the CPU of a core for each receiver, and the ratios of medians."""
    for rate in bus_load.RATES:
        print(
            f"{rate} frames/s, {bus_load.SUBSCRIBED} % of them subscribed,"
            f" {bus_load.ROUNDS} rounds of {bus_load.SECONDS:g} s"
        )
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in RECEIVERS}
        for _ in range(bus_load.ROUNDS):
            for name in RECEIVERS:
                runs[name].append(_one(name, rate))
        bus_load.report(runs, rate)


def _one(name: str, rate: float) -> dict[str, float]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    module = [sys.executable, "-m", "bench.bus_paced", "--port", str(port), "--rate", str(rate)]
    with subprocess.Popen([*module, "--receive", name], stdout=subprocess.PIPE, text=True) as receiver:
        time.sleep(SETTLE_S)
        words = ["--send", "some" if name in FILTERED else "all"]
        with subprocess.Popen([*module, *words]) as sender:
            output, _ = receiver.communicate(timeout=bus_load.SECONDS * 10 + 60)
            sender.terminate()
    found: dict[str, float] = json.loads(output)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--receive", choices=RECEIVERS)
    parser.add_argument("--send", choices=("all", "some"))
    options = parser.parse_args()
    if options.send:
        send(options.port, options.rate, everything=options.send == "all")
    else:
        print(json.dumps(receive(options.receive, options.port, options.rate)))
