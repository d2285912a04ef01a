"""A fully loaded bus on SocketCAN, live: what reading it costs, beside python-can with cantools.

The kernel sends the traffic by itself (broadcast manager): a hundred identifiers
in turn, of which 17 are subscribed; alive counters change with each frame,
subscribed bits with every eighth. Each receiver is a process of its own on the
second core. On an emulated machine everything takes many times as long as on a
real one: `OPENFOD_BENCH_SLOW=16` makes the traffic and the windows as many
times slower, so that as many frames come in a window as on a real machine.
Ratios are what counts there. `make bench-socketcan` runs this in a guest.

It receives through:
    naive      python-can, every frame; cantools for the subscribed ones
    filtered   the same with the kernel's filters
    all        the agent's bus and collector, every frame received
    ours       the same with the kernel's filters
    engine     the same with the engine and a feature with three meters
    ten        the same with ten features, each with a meter of driving and parked time
    manager    the agent's bus with `changes_only`
    m-engine   the same with the engine
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

from agent.adapters.bus import WINDOW_S

if TYPE_CHECKING:
    from agent.buses import Buses
    from agent.config import AgentConfig
    from agent.model import SignalInfo

RECEIVERS: Final = ("naive", "filtered", "all", "ours", "engine", "ten", "manager", "m-engine")
RATES: Final = (4500, 9000)
IDS: Final = 100
SUBSCRIBED: Final = 17
FRAMES_EACH: Final = 64
ROUNDS: Final = int(os.environ.get("OPENFOD_BENCH_ROUNDS", "3"))
SECONDS: Final = float(os.environ.get("OPENFOD_BENCH_SECONDS", "10"))
SLOW: Final = float(os.environ.get("OPENFOD_BENCH_SLOW", "1"))
CHANNEL: Final = os.environ.get("OPENFOD_CAN", "vcan0")
GATHER_S: Final = 0.5
"""How long signals gather that decide nothing at once (agent.engine.GATHER_NS)."""
TICK_S: Final = 2.0
VIN: Final = "1FTFW1ET5DFC10312"
WARM_UP_S: Final = 1.0 * SLOW**0.5

_SO_MEMINFO: Final = 55
_BCM_HEAD: Final = struct.Struct("@IIIllllII0q")
_TX_SETUP, _SETTIMER, _STARTTIMER = 1, 1, 2

MESSAGE: Final = """
BO_ {can_id} M{can_id}: 8 A
 SG_ COUNTER : 0|8@1+ (1,0) [0|255] "" A
 SG_ SPEED : 8|16@1+ (0.01,0) [0|300] "km/h" A
 SG_ TEMPERATURE : 24|8@1- (1,-40) [-40|215] "degC" A
 SG_ STATE : 32|3@1+ (1,0) [0|7] "" A
 SG_ ODOMETER : 40|24@1+ (0.1,0) [0|1677721] "km" A
"""


def identifier(number: int) -> int:
    """The identifier of the n-th message; the subscribed ones lie among the others."""
    return 0x100 + 3 * number


def subscribed_ids() -> list[int]:
    """Identifiers of the subscribed messages."""
    return [identifier(number * IDS // SUBSCRIBED) for number in range(SUBSCRIBED)]


def database() -> str:
    """A DBC with the subscribed messages."""
    return 'VERSION ""\n\nBU_: A\n' + "".join(MESSAGE.format(can_id=i) for i in subscribed_ids())


def payloads(seed: int) -> list[bytes]:
    """What one message sends, again and again."""
    rng = random.Random(seed)
    speed, odometer = rng.randrange(0, 5000), rng.randrange(0, 1 << 20)
    found = []
    for number in range(FRAMES_EACH):
        step = number // 8
        values = (number, speed + 10 * step, 60, step % 2, odometer + step // 4)
        found.append(struct.pack("<BHBB", *values[:4]) + values[4].to_bytes(3, "little"))
    return found


def frame(can_id: int, data: bytes) -> bytes:
    """A `struct can_frame` (include/uapi/linux/can.h)."""
    return struct.pack("=IB3x8s", can_id, 8, data)


# --- the traffic ---------------------------------------------------------------------


@contextmanager
def traffic(rate: float) -> Iterator[None]:
    """Sends `rate` frames per second while it is entered; the kernel does it."""
    os.sched_setaffinity(0, {0})
    interval_s = IDS / rate
    with socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_BCM) as manager:
        manager.connect((CHANNEL,))
        for number in range(IDS):
            can_id = identifier(number)
            frames = b"".join(frame(can_id, data) for data in payloads(number))
            seconds, microseconds = divmod(round(interval_s * 1e6), 1_000_000)
            timers = (0, 0, seconds, microseconds)
            head = _BCM_HEAD.pack(_TX_SETUP, _SETTIMER | _STARTTIMER, 0, *timers, can_id, FRAMES_EACH)
            manager.send(head + frames)
            time.sleep(interval_s / IDS)  # they take turns
        yield


def sent() -> int:
    """Frames that the interface has sent."""
    return int(Path(f"/sys/class/net/{CHANNEL}/statistics/tx_packets").read_text())


# --- the receivers -------------------------------------------------------------------


def kernel_drops(sock: socket.socket) -> int:
    """Frames that the kernel could not queue."""
    return int(struct.unpack("=9I", sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36))[8])


class Measure:
    """CPU time of this process, and wake-ups, over the measured seconds."""

    def __init__(self) -> None:
        self._begun = resource.getrusage(resource.RUSAGE_SELF)
        self._begun_s, self._begun_sent = time.monotonic(), sent()

    def result(self, frames: int, dropped: int, batches: int = 0) -> dict[str, float]:
        """What is printed for the parent."""
        now = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = now.ru_utime + now.ru_stime - self._begun.ru_utime - self._begun.ru_stime
        took_s = time.monotonic() - self._begun_s
        offered = sent() - self._begun_sent
        return {
            "cpu_s": cpu_s,
            "took_s": took_s,
            "offered": offered,
            "frames": frames,
            "dropped": dropped,
            "batches": batches,
            "wakes": now.ru_nvcsw - self._begun.ru_nvcsw,
        }


def peer(*, filtered: bool) -> dict[str, float]:
    """python-can and cantools, as their documentation has it."""
    import can
    import cantools

    dbc: Any = cantools.database.load_string(database())
    wanted = frozenset(subscribed_ids())
    filters = [{"can_id": i, "can_mask": 0x7FF, "extended": False} for i in wanted] if filtered else None
    with can.Bus(interface="socketcan", channel=CHANNEL, can_filters=filters) as bus:
        sock: socket.socket = bus.socket  # type: ignore[attr-defined]
        sock.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE: the same chance for all
        frames = 0
        ends_s = time.monotonic() + WARM_UP_S
        measure: Measure | None = None
        while True:
            message = bus.recv(1.0)
            if message is not None:
                frames += 1
                if message.arbitration_id in wanted:
                    dbc.decode_message(message.arbitration_id, message.data)
            if time.monotonic() >= ends_s:
                if measure is not None:
                    return measure.result(frames, kernel_drops(sock))
                measure, frames, ends_s = Measure(), 0, time.monotonic() + SECONDS


def mapping() -> str:
    """Gives each signal of the subscribed messages a VSS name."""
    names = {"SPEED": "Vehicle.Speed", "ODOMETER": "Vehicle.TraveledDistance"}
    units = {"SPEED": "km/h", "ODOMETER": "km"}
    first = subscribed_ids()[0]

    def vss(can_id: int, signal: str) -> str:
        return names[signal] if can_id == first and signal in names else f"Bench.M{can_id}.{signal.title()}"

    return "\n".join(
        f'[[signals]]\nmessage = "M{can_id}"\nsignal = "{signal}"\nunit = "{units.get(signal, "")}"\n'
        f'vss = "{vss(can_id, signal)}"\n'
        f"max_age_ms = {round(1000 * max(1.0, SLOW))}\n"
        for can_id in subscribed_ids()
        for signal in ("SPEED", "TEMPERATURE", "STATE", "ODOMETER")
    )


def fetch(buses: Buses) -> None:
    """Takes what has been read, as a loop without an engine would."""
    buses.drain(time.monotonic_ns() + round(GATHER_S * SLOW * 1e9))


def ours(*, everything: bool, manager: bool, features: int) -> dict[str, float]:
    """The agent's buses, and a loop that fetches what they read as agent.app does."""
    from agent.buses import Buses, SignalsReady
    from agent.config import BusConfig, StateConfig, VehicleConfig
    from agent.signals.state import Collector

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "load.dbc").write_text(database())
        (folder / "load.toml").write_text(mapping())
        bus = BusConfig(
            name="b",
            interface="socketcan",
            channel=CHANNEL,
            database=folder / "load.dbc",
            signals=folder / "load.toml",
            changes_only=manager,
        )
        config: Any = SimpleNamespace(
            buses=(bus,), state=StateConfig(directory=folder), vehicle=VehicleConfig(vin=VIN)
        )
        buses = Buses(cast("AgentConfig", config), window_s=WINDOW_S * SLOW)
        collector = Collector(buses.tables)
    buses.attach(collector)
    take = meters(buses, collector.infos, features) if features else partial(fetch, buses)
    if everything:
        buses.by_name["b"].receive(None, ())
    buses.open()
    counts = buses.by_name["b"].counts
    measure: Measure | None = None
    ends_s = time.monotonic() + WARM_UP_S
    frames = taken = 0
    while True:
        with contextlib.suppress(queue.Empty):
            if isinstance(buses.queue.get(timeout=TICK_S), SignalsReady):
                taken += 1
                take()
        if time.monotonic() >= ends_s:
            if measure is not None:
                found = measure.result(counts.frames - frames, counts.dropped, taken)
                buses.close()
                return found
            measure, frames, taken = Measure(), counts.frames, 0
            ends_s = time.monotonic() + SECONDS


FEATURE: Final = b"""
[feature]
id = "load"
release = 1
title = "Three meters"
enforcement = "detect-only"
loss_in_motion = "harmless"
safety_relevant = false
withdrawn = false
[ecu]
identifier = "head-unit"
hardware_id = "openfod-agent"
[actuator]
kind = "none"
[conditions.activate]
when = "true"
inputs = []
[conditions.release]
when = "true"
inputs = []
[hold]
max_s = 3600
[[meters]]
id = "time"
kind = "duration"
[[meters.dimensions]]
name = "motion"
values = [
  { value = "driving", when = "Vehicle.Speed >= 1.0", inputs = ["Vehicle.Speed"] },
  { value = "parked", when = "Vehicle.Speed < 1.0", inputs = ["Vehicle.Speed"] },
]
[[meters]]
id = "fast"
kind = "duration"
when = "Vehicle.Speed > 20.0"
inputs = ["Vehicle.Speed"]
[[meters]]
id = "distance"
kind = "distance"
odometer = "Vehicle.TraveledDistance"
speed = "Vehicle.Speed"
"""


def described(number: int, of: int) -> bytes:
    """A feature; it has three meters if it is the only one, else one."""
    text = FEATURE.replace(b'id = "load"', f'id = "load-{number}"'.encode())
    return text if of == 1 else text[: text.index(b'[[meters]]\nid = "fast"')]


def meters(buses: Buses, infos: Mapping[str, SignalInfo], features: int) -> Callable[[], None]:
    """Steps an engine with what has been read; so many features of it are active and metered."""
    from agent import engine as engine_module
    from agent import events as ev
    from agent.engine import Engine
    from agent.metering.record import GENESIS_HASH, Head
    from agent.model import Entitlement, PlanKind, Rights, TrustBytes, Verdict, Versions
    from agent.trust.catalogue import parse_feature
    from agent.trust.clock import TrustedClock

    engine_module.GATHER_NS = round(GATHER_S * SLOW * 1e9)
    specs = [parse_feature(described(number, features)) for number in range(features)]
    now_ns, now_ms = time.monotonic_ns(), 1_790_000_000_000
    right = Entitlement(
        entitlement_id="ent-load",
        feature_id="",
        min_release=1,
        account="acc-load",
        plan_kind=PlanKind.PAY_PER_USE,
        plan_id="load",
        plan_version=1,
        not_before_s=0,
        not_after_s=0,
        odometer_from_m=0,
        odometer_to_m=0,
        ignition_cycles=0,
        operating_s=0,
        offline_grace_s=0,
        quotas=(),
        parameters=(),
        stays_with_vehicle=False,
        display={},
        trace_id="0" * 32,
    )
    ids = [spec.feature_id for spec in specs]
    mine = {i: replace(right, entitlement_id=f"ent-{i}", feature_id=i) for i in ids}
    rights = Rights(1, mine, dict(zip(ids, specs, strict=True)))
    engine = Engine(
        source="veh-load",
        clock=TrustedClock(mark_ms=now_ms, build_ms=0, monotonic_ns=now_ns),
        infos=infos,
        checkpoint_ns=2_000_000_000,
        window_ns=60_000_000_000,
    )

    def step(event: ev.Event) -> None:
        for command in engine.step(event, time.monotonic_ns()):
            match command:
                case ev.StoreUsage(number) | ev.StoreTrust(number) | ev.MarkSent(number):
                    step(ev.Persisted(number))
                case _:
                    pass

    verdict = Verdict(TrustBytes(), Versions(), Versions(), rights, now_ms)
    head = Head("0123456789abcdef", 0, GENESIS_HASH)
    step(ev.Booted(verdict, head, 0, (), same_boot=True, used={}, last_contact_ms=now_ms))

    def take() -> None:
        due_ns = time.monotonic_ns() + engine.patience_ns
        step(ev.SignalsArrived(buses.drain(due_ns)))
        if time.monotonic_ns() >= engine.wake_ns():
            step(ev.Ticked())
        buses.look_for(engine.urgent)

    take()
    assert [view.state for view in engine.features()] == ["ACTIVE"] * features
    return take


# --- the benchmark -------------------------------------------------------------------


def receive(name: str) -> dict[str, float]:
    """Runs one receiver in this process."""
    os.sched_setaffinity(0, {(os.cpu_count() or 1) - 1})
    if name in {"naive", "filtered"}:
        return peer(filtered=name == "filtered")
    features = 10 if name == "ten" else int(name.endswith("engine"))
    return ours(everything=name == "all", manager=name[0] == "m", features=features)


def main() -> None:
    """Prints the CPU of a core for each receiver, and the ratios of medians."""
    if not Path("/sys/class/net", CHANNEL).exists():
        print(f"skipped: no {CHANNEL} here; run: make bench-socketcan")
        return
    if SLOW != 1:
        print(f"an emulated machine: {SLOW:g} times slower traffic and windows; only ratios count")
    names = os.environ.get("OPENFOD_BENCH_RECEIVERS", " ".join(RECEIVERS)).split()
    for rate in RATES:
        print(f"{rate} frames/s, {SUBSCRIBED} % of them subscribed, {ROUNDS} rounds of {SECONDS:g} s")
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        with traffic(rate / SLOW):
            for _ in range(ROUNDS):
                for name in names:
                    command = [sys.executable, "-m", "bench.bus_load", "--receive", name]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs[name].append(json.loads(done.stdout))
        report(runs, rate)


def report(runs: dict[str, list[dict[str, float]]], rate: float) -> None:
    """Prints a line for each receiver, with the ratios of medians."""
    costs = {
        # Of the time in which a real machine would have had this traffic.
        name: statistics.median(run["cpu_s"] / (run["offered"] / rate) for run in found)
        for name, found in runs.items()
    }
    for name, found in runs.items():
        cost, last = costs[name], found[-1]
        print(
            f"  {name:9s} {cost:8.2%} of a core, {1e6 * cost / rate:8.2f} µs for each frame of the bus;"
            f" naive / this {costs['naive'] / cost:6.1f}, filtered / this {costs['filtered'] / cost:6.1f};"
            f" {last['frames']:.0f} of {last['offered']:.0f} handed on,"
            f" {last['wakes'] / last['took_s']:.0f} wake-ups/s,"
            f" {sum(run['dropped'] for run in found):.0f} dropped"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--receive", choices=RECEIVERS, required=True)
    print(json.dumps(receive(parser.parse_args().receive)))
