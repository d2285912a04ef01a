"""A full 500 kbit/s bus behind a serial adapter: the agent's slcan beside python-can's, in one run.

The adapter is `fod-sim adapter` on a pseudo-terminal, in a process of its own,
so that only the receiver's CPU time is counted. FOD_BENCH_S sets the seconds of
each measurement (60).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import can

from agent.adapters.bus import BusLostError
from agent.adapters.slcan import SlcanBus

RATE = 4500
"""Frames a second: 8 bytes each, a full bus at 500 kbit/s."""
SECONDS = float(os.environ.get("FOD_BENCH_S", "60"))
SLICES = 12
"""Parts of a measurement; the median of their costs is shown."""
IDS = range(0x100, 0x164)
WANTED = frozenset(IDS[:17])
"""17 % of the frames."""
URGENT = frozenset({0x7DF, 0x7E8})


@dataclass
class Result:
    """What one receiver did.

    Args:
        share: of the frames on the bus that are subscribed.
        cpu_us: CPU time for each frame on the bus that reached the receiver, in each slice.
    """

    what: str
    share: float
    received: int = 0
    expected: int = 0
    reads: int = 0
    cpu_us: list[float] = field(default_factory=list)

    @property
    def median_us(self) -> float:
        """Of the slices."""
        return statistics.median(self.cpu_us)

    def in_words(self) -> str:
        """One line."""
        core = self.median_us * RATE / 1e6
        return (
            f"{self.what:38} {self.median_us:6.2f} µs a frame on the bus, {core:6.2%} of a core;"
            f" {self.received} received, {self.expected - self.received} lost;"
            f" {self.reads / SECONDS:.0f} reads/s"
        )


def write_log(folder: Path) -> Path:
    """A log of all identifiers, mixed, with random data."""
    mixed = random.Random(1)
    ids = [can_id for can_id in IDS for _ in range(RATE // len(IDS))]
    mixed.shuffle(ids)
    path = folder / "full.log"
    lines = (
        f"({n / RATE:.6f}) can0 {can_id:03X}#{mixed.randbytes(8).hex()}\n" for n, can_id in enumerate(ids)
    )
    path.write_text("".join(lines))
    return path


@contextlib.contextmanager
def adapter(log: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """The sender; gives the serial line, and later how many frames were on the bus."""
    arguments = ["--log", log, "--rate", RATE, "--seconds", SECONDS, "--wait-client"]
    command = [sys.executable, "-m", "firmware_sim", "--log-level", "error", "adapter", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = json.loads(process.stdout.readline())["slcan"]

        def ended() -> int:
            assert process.stdout is not None
            event = json.loads(process.stdout.readline())
            return int(event["frames"] + event["dropped"])

        yield path, ended
        process.terminate()


def measure(result: Result, receive: Callable[[], int]) -> None:
    """Receives until nothing has come for a second after the end."""
    begun_s = slice_s = heard_s = time.monotonic()
    cpu_s, before = time.process_time(), 0
    while time.monotonic() < max(heard_s + 1, begun_s + SECONDS):
        number = receive()
        result.reads += 1
        result.received += number
        now_s = time.monotonic()
        if number:
            heard_s = now_s
        if now_s - slice_s >= SECONDS / SLICES and now_s < begun_s + SECONDS:
            on_bus = (result.received - before) / result.share
            result.cpu_us.append((time.process_time() - cpu_s) * 1e6 / on_bus)
            slice_s, cpu_s, before = now_s, time.process_time(), result.received


def ours(path: str, result: Result, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
    """The agent's bus."""
    bus = SlcanBus(path, 500_000, fd=False, listen_only=True, window_s=0.02, monotonic_ns=time.monotonic_ns)
    bus.receive_only(wanted, urgent)

    def receive() -> int:
        try:
            return len(bus.read(0.1))
        except BusLostError:
            return 0

    measure(result, receive)
    bus.close()


def theirs(path: str, result: Result, wanted: frozenset[int] | None) -> None:
    """python-can's."""
    bus = can.Bus(
        interface="slcan",
        channel=path,
        bitrate=500_000,
        sleep_after_open=0,
        listen_only=True,
        ignore_config=True,
    )
    if wanted is not None:
        bus.set_filters([{"can_id": can_id, "can_mask": 0x7FF, "extended": False} for can_id in wanted])
    measure(result, lambda: int(bus.recv(0.1) is not None))
    with contextlib.suppress(can.CanError):  # the adapter may have ended already
        bus.shutdown()


def expected(log: Path, sent: int, wanted: frozenset[int] | None) -> int:
    """How many of the frames that were on the bus are wanted."""
    ids = [int(line.split()[2].split("#")[0], 16) for line in log.read_text().splitlines()]
    return sum(wanted is None or ids[number % len(ids)] in wanted for number in range(sent))


def main() -> None:
    """Prints the CPU time of each, what was lost, and the ratios."""
    print(f"{RATE} frames/s for {SECONDS:.0f} s each; the sender in a process of its own")
    results: dict[tuple[str, str], Result] = {}
    with tempfile.TemporaryDirectory() as folder:
        log = write_log(Path(folder))
        for share, wanted in (("17 %", WANTED), ("all", None)):
            for who in ("ours", "ours, with urgent ids", "python-can"):
                part = 1.0 if wanted is None else len(wanted) / len(IDS)
                result = results[who, share] = Result(f"{who}, {share} subscribed", part)
                with adapter(log) as (path, ended):
                    if who == "python-can":
                        theirs(path, result, wanted)
                    else:
                        ours(path, result, wanted, URGENT if "urgent" in who else frozenset())
                    result.expected = expected(log, ended(), wanted)
                print(result.in_words(), flush=True)
    for share in ("17 %", "all"):
        ratio = results["python-can", share].median_us / results["ours", share].median_us
        print(f"{share} subscribed: python-can's median is {ratio:.0f} times ours")
