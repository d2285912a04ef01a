"""`fod-sim run`: the simulated vehicle in real time, on a bus that other programs join.

The composition root of the simulation: clocks, files, standard input and
output meet the pure parts here. One loop, no waiting for anything but time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TextIO

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from common import cli
from common import log as logs
from firmware_sim import control
from firmware_sim.diagnostics import DiagnosticLink
from firmware_sim.ecu import NS_PER_MS, NS_PER_S, Ecu, Identity, Powertrain, SeatModule, StoreError
from firmware_sim.faults import Fault
from firmware_sim.frame import Frame
from firmware_sim.hub import Bus
from firmware_sim.scenario import EcuConfig, EcuKind, Scenario
from firmware_sim.store import FileStore
from firmware_sim.token import MAX_TOKEN_BYTES, Term, TokenError
from firmware_sim.transport import TransportError, open_bus
from firmware_sim.vehicle import ControlError, DriveCycle, Truth, Vehicle, load_database, read_cycle

BUSY_POLL_NS = NS_PER_MS
"""Longest pause while an ECU is answering in several frames."""
MAX_PEM_BYTES = 4096
MAX_READ_BYTES = 4096
STDIN = 0

log = logs.get(__name__)


class ScenarioError(Exception):
    """A scenario whose files cannot be used."""


def build(scenario: Scenario, *, now_ns: int) -> Vehicle:
    """Puts the vehicle of a scenario together.

    Raises:
        ScenarioError: a key, an announcement or a state file cannot be used.
    """

    def odometer_m() -> int:
        return vehicle.odometer_m  # asked for when the vehicle stands complete

    root = _public_key(scenario.trust.token_root)
    others: list[Ecu] = []
    seat: SeatModule | None = None
    for config in scenario.ecu:
        identity = _identity(config, scenario.vehicle.vin)
        if config.kind is EcuKind.POWERTRAIN:
            others.append(Powertrain(identity, odometer_m=odometer_m, now_ns=now_ns))
        else:
            seat = _seat_module(config, identity, root, scenario.trust.token_keys, odometer_m, now_ns)
    if seat is None:
        raise ScenarioError("the scenario has no seat module")
    vehicle = Vehicle(
        database=load_database(_data("openfod_sim.dbc")),
        cycle=udds(),
        seat=seat,
        others=tuple(others),
        odometer_m=scenario.vehicle.odometer_m,
        battery_v=scenario.vehicle.battery_v,
        now_ns=now_ns,
    )
    return vehicle


def udds() -> DriveCycle:
    """The Urban Dynamometer Driving Schedule that ships with the simulator."""
    return read_cycle(_data("udds_mph.csv"))


class TruthLog:
    """The truth as JSON lines, each flushed as it is written.

    Args:
        path: the file; begun anew.

    Raises:
        OSError: cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = path.open("w", encoding="utf-8")

    def write(self, truth: Truth) -> None:
        """Adds a line; `unix_ms` is the moment on the wall clock."""
        unix_ms = (time.time_ns() - (time.monotonic_ns() - truth.at_ns)) // NS_PER_MS
        self._file.write(json.dumps({"unix_ms": unix_ms, **truth.as_json()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Simulation:
    """The vehicle on its bus.

    Args:
        vehicle: what is simulated.
        bus: where its frames go and requests come from.
        truth_log: where the truth is written.
    """

    def __init__(self, vehicle: Vehicle, bus: Bus, truth_log: TruthLog) -> None:
        self.vehicle = vehicle
        self.is_over = False
        self._bus, self._truth_log = bus, truth_log
        self._links = {name: self._link(ecu) for name, ecu in vehicle.ecus.items()}
        bus.join(self)

    def deliver(self, frame: Frame) -> None:
        """Takes a frame that someone else has sent."""
        now_ns = time.monotonic_ns()
        for name, link in self._links.items():
            if not self._hears(name, now_ns):
                link.reset()
                continue
            link.receive(frame)
        self.report()

    def tick(self) -> int:
        """Sends what is due and returns when to come back, monotonic nanoseconds."""
        now_ns = time.monotonic_ns()
        for frame in self.vehicle.step(now_ns):
            self._bus.send(frame, self)
        for link in self._links.values():
            link.poll()
        self.report()
        if any(link.is_busy for link in self._links.values()):
            return now_ns + BUSY_POLL_NS
        return self.vehicle.next_due_ns

    def command(self, line: str) -> None:
        """Carries out a command and prints its one answer."""
        try:
            command = control.parse(line)
            answer = control.carry_out(command, self.vehicle, time.monotonic_ns())
        except ControlError as error:
            answer = {"event": "error", "command": line[: control.MAX_LINE_CHARS], "message": str(error)}
        else:
            self.is_over = self.is_over or command.words == ("quit",)
        self.report()
        _print(answer)

    def report(self) -> None:
        """Writes the truth and prints what has happened."""
        for truth in self.vehicle.take_truths():
            self._truth_log.write(truth)
        for happening in self.vehicle.take_happenings():
            _print({"event": happening.name, **happening.facts, "monotonic_ns": happening.at_ns})

    def finish(self) -> None:
        """Writes the last truth."""
        self.vehicle.catch_up(time.monotonic_ns())
        self.report()
        self._truth_log.write(self.vehicle.truth)
        self._truth_log.close()

    def _link(self, ecu: Ecu) -> DiagnosticLink:
        name = ecu.identity.identifier
        return DiagnosticLink(
            request_id=ecu.identity.request_id,
            response_id=ecu.identity.response_id,
            send=lambda can_id, data: self._bus.send(Frame(can_id, data, time.monotonic_ns()), self),
            serve=lambda request: self.vehicle.request(name, request, time.monotonic_ns()),
        )

    def _hears(self, name: str, now_ns: int) -> bool:
        is_silent = self.vehicle.faults.has(Fault.SILENT, name, now_ns)
        return not is_silent and self.vehicle.ecus[name].is_awake(now_ns)


async def simulate(scenario: Scenario, *, commands: bool, until_eof: bool) -> None:
    """Runs a scenario until `quit`, SIGTERM, SIGINT, or the end of standard input.

    Args:
        scenario: what to simulate.
        commands: take commands from standard input.
        until_eof: end when standard input ends.

    Raises:
        ScenarioError: as `build`, or the truth file cannot be written.
        TransportError: the bus cannot be opened.
    """
    vehicle = build(scenario, now_ns=time.monotonic_ns())
    try:
        truth_log = TruthLog(scenario.truth)
    except OSError as error:
        raise ScenarioError(f"{scenario.truth}: cannot be written: {error.strerror}") from error
    try:
        opened = await open_bus(scenario.bus)
    except TransportError:
        truth_log.close()
        raise
    simulation = Simulation(vehicle, opened.bus, truth_log)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, simulation)
    _print({"event": "ready", **opened.ready})
    if commands:
        _read_commands(loop, simulation, until_eof=until_eof)
    begun_ns = time.monotonic_ns()
    waiting = sorted(scenario.timeline, key=lambda entry: entry.at_s)
    try:
        while not simulation.is_over:
            due_ns = simulation.tick()
            while waiting and begun_ns + round(waiting[0].at_s * NS_PER_S) <= time.monotonic_ns():
                simulation.command(waiting.pop(0).do)
            await asyncio.sleep(max(0, due_ns - time.monotonic_ns()) / NS_PER_S)
    finally:
        simulation.finish()
        await opened.close()
    _print({"event": "ended"})


def _end(simulation: Simulation) -> None:
    simulation.is_over = True


def _read_commands(loop: asyncio.AbstractEventLoop, simulation: Simulation, *, until_eof: bool) -> None:
    """Reads standard input in a thread of its own: it may be a file, a pipe or a terminal."""

    def read() -> None:
        # Not through sys.stdin: its lock, held here, would break the interpreter's exit.
        waiting = b""
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            while received := os.read(STDIN, MAX_READ_BYTES):
                *lines, waiting = (waiting + received).split(b"\n")
                if len(waiting) > MAX_READ_BYTES:
                    lines, waiting = [*lines, waiting], b""
                for line in lines:
                    if text := line.decode("utf-8", errors="replace").strip():
                        loop.call_soon_threadsafe(simulation.command, text)
            if until_eof:
                loop.call_soon_threadsafe(_end, simulation)

    threading.Thread(target=read, name="commands", daemon=True).start()


def _print(event: dict[str, object]) -> None:
    cli.print_event(str(event["event"]), **{name: value for name, value in event.items() if name != "event"})


def _identity(config: EcuConfig, vin: str) -> Identity:
    return Identity(
        identifier=config.identifier,
        hardware_id=config.hardware_id,
        vin=vin,
        uid=bytes.fromhex(config.uid),
        request_id=config.request_id,
        response_id=config.response_id,
    )


def _seat_module(
    config: EcuConfig,
    identity: Identity,
    root: bytes,
    announcements: tuple[Path, ...],
    odometer_m: Callable[[], int],
    now_ns: int,
) -> SeatModule:
    if config.state is None:
        raise ScenarioError(f"ECU {config.identifier} has no state file")
    try:
        config.state.parent.mkdir(parents=True, exist_ok=True)
        seat = SeatModule(
            identity,
            features=frozenset(config.features),
            token_root=root,
            store=FileStore(config.state),
            now_ns=now_ns,
            changes_in_motion=config.changes_in_motion,
            terms=frozenset(Term(number) for number in config.terms),
            clock=(lambda: int(time.time())) if "clock" in config.own else None,
            odometer=odometer_m if "odometer" in config.own else None,
            reading_key=_private_key(config.reading_key) if config.reading_key else None,
        )
        for path in announcements:
            seat.learn_key(_read(path, MAX_TOKEN_BYTES))
    except TokenError as error:
        raise ScenarioError(f"announcement of a token key refused: {error}") from error
    except (StoreError, OSError) as error:
        raise ScenarioError(f"state of ECU {config.identifier}: {error}") from error
    return seat


def _public_key(path: Path) -> bytes:
    """Reads an Ed25519 public key, PEM (RFC 8410)."""
    try:
        key = load_pem_public_key(_read(path, MAX_PEM_BYTES))
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ScenarioError(f"{path}: not a public key in PEM: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ScenarioError(f"{path}: expected an Ed25519 key")
    return key.public_bytes_raw()


def _private_key(path: Path) -> Ed25519PrivateKey:
    """Reads an Ed25519 private key, PEM (RFC 8410) without a password."""
    try:
        key = load_pem_private_key(_read(path, MAX_PEM_BYTES), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ScenarioError(f"{path}: not a private key in PEM without a password: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ScenarioError(f"{path}: expected an Ed25519 key")
    return key


def _read(path: Path, limit: int) -> bytes:
    """Reads one byte more than `limit` at most, so that too long is seen as too long."""
    with path.open("rb") as file:
        return file.read(limit + 1)


def _data(name: str) -> str:
    return (resources.files("firmware_sim") / "data" / name).read_text(encoding="utf-8")
