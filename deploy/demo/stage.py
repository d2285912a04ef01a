"""The stage of the demonstration: real processes on free loopback ports, and the wire between them.

Starts what `fod-keys`, `fod-cloud`, `fod-sim` and `fod-agent` are, waits for
events and never for time, and ends every process that it has started. Files of
a run lie below one folder that is wiped at the start. Waits are bounded: what
does not come in time raises StageError with what was waited for.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from agent.adapters import local_api
from agent.errors import TransportError

REPOSITORY = Path(__file__).parents[2]
DEMO = Path(__file__).parent
COMMANDS = Path(sys.executable).parent
"""Where the four programs are installed."""
VIN = "WFDSEAT10N0000001"
SEAT_ECU, SEAT_HARDWARE, SEAT_UID = "seat-module", "openfod-seat-1", "0f0d5ea7000000000000000000000001"
"""The seat module of scenario.toml."""
WAIT_S = 45.0
"""Longest wait for an event, also on a slow machine."""
END_S = 8.0
"""Longest wait for a process to end before it is killed."""
POLL_S = 0.03
MAX_SOCKET_PATH = 100
"""Longest path of a Unix socket that every system takes."""
_CHUNK_BYTES = 65_536
_STATE = 'state = "seat-module.json"'

_Found = TypeVar("_Found")


class StageError(Exception):
    """Something did not happen in time, or a program failed."""


@dataclass(frozen=True)
class Result:
    """A command that has ended.

    Args:
        text: what it printed on both outputs, standard output first.
    """

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both outputs."""
        return self.out + self.err

    @property
    def data(self) -> Any:
        """The JSON document that it printed."""
        return json.loads(self.out)


class Program:
    """A process whose output goes to files, so that it never waits for a reader.

    Args:
        name: names its files, NAME.out and NAME.log; a later life appends.
        command: program and arguments.
        folder: where the files are.
    """

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name = name
        self.command = command
        self._out, self._log = folder / f"{name}.out", folder / f"{name}.log"
        self._out_from, self._log_from = _size(self._out), _size(self._log)
        with self._out.open("ab") as out, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the story, which ends the others in order
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def events(self) -> list[dict[str, Any]]:
        """What this life of it has printed, as JSON lines."""
        return [json.loads(line) for line in _lines(self._out, self._out_from)]

    def log(self) -> list[str]:
        """What this life of it has logged."""
        return _lines(self._log, self._log_from)

    def tell(self, line: str) -> None:
        """Writes a line to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """Ends it as a power cut does: SIGKILL, no chance to write anything."""
        self._process.kill()
        self._close()

    def end(self) -> None:
        """Asks it to end, and kills it if it does not."""
        self._process.terminate()
        self._close()

    def _close(self) -> None:
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()


class Relay:
    """A TCP relay on a free loopback port: the network between vehicle and cloud.

    It carries bytes and understands none of them.
    """

    def __init__(self) -> None:
        self._target: int | None = None
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="relay", daemon=True)
        self._thread.start()

    def lead_to(self, port: int | None) -> None:
        """Cuts all connections; new ones lead to a port, or nowhere: then the network is down."""
        with self._lock:
            self._target = port
            for connection in self._open:
                with contextlib.suppress(OSError):  # its other end was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cuts everything and stops listening."""
        self.lead_to(None)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(END_S)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with near:
            target = self._target
            if target is None:
                return
            try:
                far = socket.create_connection(("127.0.0.1", target), timeout=END_S)
            except OSError:
                return
            far.settimeout(None)
            with far:
                with self._lock:
                    if self._target != target:
                        return
                    self._open |= {near, far}
                back = threading.Thread(target=_pump, args=(far, near), daemon=True)
                back.start()
                _pump(near, far)
                back.join()
                with self._lock:
                    self._open -= {near, far}


class Stage:
    """All that the demonstration needs; ends what it has started with the with-block.

    Args:
        folder: everything is written there; wiped first.
        transport: bus of the simulator: "auto", "socketcan" or "socketcand".
        slcan: the agent is joined by the simulator's serial adapter instead.

    Attributes:
        seat_key: public key with which the seat module signs what it counts, hex.
    """

    def __init__(self, folder: Path, *, transport: str = "auto", slcan: bool = False) -> None:
        self.folder = folder
        self._slcan = slcan
        self._transport = transport
        self._programs: dict[str, Program] = {}
        self._lock: IO[str] | None = None
        self._sockets: tempfile.TemporaryDirectory[str] | None = None
        self.relay = Relay()
        self.cloud_port = self.enrolment_port = 0
        self.seat_key = ""
        self.bus: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock = self.folder.with_name(f"{self.folder.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            self.relay.close()
            raise StageError(f"{self.folder} is in use by another run") from error
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "logs").mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        for program in reversed(self._programs.values()):
            program.end()
        self.relay.close()
        if self._sockets is not None:
            self._sockets.cleanup()
        if self._lock is not None:
            self._lock.close()

    # --- files ---------------------------------------------------------------

    @property
    def keys(self) -> Path:
        """The key folder."""
        return self.folder / "keys"

    @property
    def cloud_config(self) -> Path:
        """The cloud's configuration file."""
        return self.folder / "cloud.toml"

    def agent_config(self, who: str = "agent") -> Path:
        """The configuration file of a vehicle's agent."""
        return self.folder / f"{who}.toml"

    def device_folder(self, who: str = "agent") -> Path:
        """Where a vehicle's agent keeps its key, its certificate and its store."""
        return self.folder / who

    def shown(self, path: Path) -> str:
        """A path as one would type it in the repository's folder."""
        return os.path.relpath(path, REPOSITORY) if path.is_relative_to(REPOSITORY) else str(path)

    # --- programs --------------------------------------------------------------

    def command_line(self, *words: str | Path) -> str:
        """A command as one would type it."""
        texts = [self.shown(w) if isinstance(w, Path) else w for w in words]
        return " ".join(f'"{t}"' if " " in t else t for t in texts)

    def run(self, *words: str | Path, timeout_s: float = WAIT_S) -> Result:
        """Runs a command to its end.

        Raises:
            StageError: it did not end in time.
        """
        command = [
            str(COMMANDS / words[0]),
            *(self.shown(w) if isinstance(w, Path) else w for w in words[1:]),
        ]
        try:
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(f"{self.command_line(*words)}: not done within {timeout_s:.0f} s") from error
        return Result(done.returncode, done.stdout, done.stderr)

    def done(self, *words: str | Path) -> Result:
        """Runs a command that must succeed.

        Raises:
            StageError: it failed; with what it said.
        """
        result = self.run(*words)
        if result.code != 0:
            raise StageError(f"{self.command_line(*words)}: exit code {result.code}\n{result.text}")
        return result

    @property
    def cloud(self) -> Program:
        """The running cloud."""
        return self._programs["cloud"]

    @property
    def sim(self) -> Program:
        """The running simulator."""
        return self._programs["vehicle"]

    @property
    def agent(self) -> Program:
        """The running agent."""
        return self._programs["agent"]

    def programs(self) -> Iterator[Program]:
        """Everything that was started, in order."""
        yield from self._programs.values()

    def start_cloud(self) -> Program:
        """Starts the cloud on free ports, and writes them into its file for the operator's commands."""
        text = (DEMO / "cloud.toml").read_text()
        endpoint = 'endpoint = "127.0.0.1:7443"'
        text = _filled(
            text,
            {
                "../../run/demo/": "",
                '"plans.toml"': f'"{DEMO / "plans.toml"}"',
                'listen = "127.0.0.1:7443"': 'listen = "127.0.0.1:0"',
                'enrolment_listen = "127.0.0.1:7444"': 'enrolment_listen = "127.0.0.1:0"',
            },
        )
        self.cloud_config.write_text(text)
        ready = self.start("cloud", "fod-cloud", "serve", "--config", self.cloud_config)
        self.cloud_port, self.enrolment_port = ready["port"], ready["enrolment_port"]
        text = _filled(text, {endpoint: f'endpoint = "127.0.0.1:{self.cloud_port}"'})
        self.cloud_config.write_text(text)
        self.relay.lead_to(self.cloud_port)
        return self.cloud

    @property
    def seat_ecu(self) -> str:
        """The seat module as an operator registers it."""
        return f"{SEAT_ECU}:{SEAT_HARDWARE}:{SEAT_UID}:{self.seat_key}"

    def start_vehicle(self) -> Program:
        """Starts the simulated vehicle, whose seat module has its own key; its bus is in `bus`."""
        made = self.done("fod-sim", "ecu-key", self.folder / "seat-module.key")
        self.seat_key = made.out.strip()
        text = _filled(
            (DEMO / "scenario.toml").read_text(),
            {
                "../../run/demo/": "",
                'transport = "auto"': f'transport = "{self._transport}"',
                "slcan = false": f"slcan = {json.dumps(self._slcan)}",
                _STATE: f'{_STATE}\nreading_key = "seat-module.key"',
            },
        )
        # The driver of the story presses the seat's button; the timeline only switches the ignition on.
        text = text[: text.index("[[timeline]]")] + '[[timeline]]\nat_s = 0\ndo = "ignition on"\n'
        path = self.folder / "scenario.toml"
        path.write_text(text)
        self.bus = self.start("vehicle", "fod-sim", "run", path, "--stdin")
        self.event("the ignition is on", lambda e: e["event"] == "ignition")
        return self.sim

    def write_agent_config(self, who: str = "agent", vin: str = VIN) -> Path:
        """Writes a vehicle's configuration: its cloud is the far end of the relay."""
        bus = [f"{key} = {json.dumps(self.bus[key])}" for key in _BUS_KEYS if self.bus[key] is not None]
        if self._slcan:
            bus = ['interface = "slcan"', f"channel = {json.dumps(self.bus['slcan'])}", "bitrate = 500000"]
        path = self.agent_config(who)
        text = _filled(
            (DEMO / "agent.toml").read_text(),
            {
                VIN: vin,
                '"../../run/demo/agent"': f'"{who}"\napi_socket = "{self._socket(who)}"',
                "../../run/demo/": "",
                "../../firmware_sim": str(REPOSITORY / "firmware_sim"),
                '"signals.toml"': f'"{DEMO / "signals.toml"}"',
                "127.0.0.1:7443": f"127.0.0.1:{self.relay.port}",
                "127.0.0.1:7444": f"127.0.0.1:{self.enrolment_port}",
                'interface = "socketcan"\nchannel = "vcan0"': "\n".join(bus),
            },
        )
        path.write_text(text)
        return path

    def start_agent(self) -> Program:
        """Starts the agent, and waits until its local interface answers."""
        self._spawn("agent", "fod-agent", "run", "--config", self.agent_config())
        self.until("the agent answers", self._answer)
        return self.agent

    def end_agent(self) -> None:
        """Asks the agent to end."""
        self._programs.pop("agent").end()

    def kill_agent(self) -> float:
        """Kills the agent with SIGKILL; returns when, monotonic seconds."""
        self._programs.pop("agent").kill()
        return time.monotonic()

    def start(self, name: str, *words: str | Path) -> dict[str, Any]:
        """Starts a program, and waits for the line in which it says that it is ready; returns that."""
        program = self._spawn(name, *words)
        return self.until(
            f"{name} is ready", lambda: next((e for e in program.events() if e["event"] == "ready"), None)
        )

    def _spawn(self, name: str, *words: str | Path) -> Program:
        command = [
            str(COMMANDS / words[0]),
            *(self.shown(w) if isinstance(w, Path) else w for w in words[1:]),
        ]
        program = self._programs[name] = Program(name, command, self.folder / "logs")
        return program

    def _socket(self, who: str) -> Path:
        path = self.folder / f"{who}.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        self._sockets = self._sockets or tempfile.TemporaryDirectory(prefix="openfod-")
        return Path(self._sockets.name) / path.name

    # --- seeing and waiting -----------------------------------------------------

    def until(self, what: str, look: Callable[[], _Found | None], timeout_s: float = WAIT_S) -> _Found:
        """Looks again and again until there is something to see.

        Raises:
            StageError: not in time, or a program has ended meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = look()
            if found:
                return found
            for program in self._programs.values():
                if program.exit_code is not None:
                    raise StageError(f"{program.name} has ended with {program.exit_code}, before: {what}")
            if time.monotonic() > deadline:
                raise StageError(f"not within {timeout_s:.0f} s: {what}")
            time.sleep(POLL_S)

    def status(self) -> dict[str, Any]:
        """What `fod-agent status --json` shows, without the start of a process.

        Raises:
            StageError: no agent answers.
        """
        try:
            return local_api.ask(self._socket("agent"), "/v1/status")
        except TransportError as error:
            raise StageError(str(error)) from error

    def seat_heating(self) -> dict[str, Any]:
        """What the agent says of the seat heating; empty before there was any right."""
        return next((f for f in self.status()["features"] if f["feature"] == "seat-heating"), {})

    def until_status(
        self, what: str, holds: Callable[[dict[str, Any]], bool], timeout_s: float = WAIT_S
    ) -> dict[str, Any]:
        """Waits until the agent's status is as wanted, and returns it."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            return status if holds(status) else None

        return self.until(what, look, timeout_s)

    def until_state(self, state: str, timeout_s: float = WAIT_S) -> dict[str, Any]:
        """Waits until the seat heating is in a state."""

        def look() -> dict[str, Any] | None:
            feature = self.seat_heating()
            return feature if feature.get("state") == state else None

        return self.until(f"the seat heating is {state}", look, timeout_s)

    def event(
        self,
        what: str,
        wanted: Callable[[dict[str, Any]], bool],
        *,
        after: int = 0,
        timeout_s: float = WAIT_S,
    ) -> dict[str, Any]:
        """Waits for an event of the simulator, from the one numbered `after` on."""
        return self.until(
            what, lambda: next((e for e in self.sim.events()[after:] if wanted(e)), None), timeout_s
        )

    def tell(self, line: str) -> dict[str, Any]:
        """Gives the simulated vehicle a command and returns its answer.

        Raises:
            StageError: it refuses.
        """
        before = len(self.sim.events())
        self.sim.tell(line)
        answer = self.event(
            line,
            lambda e: e["event"] == "truth" if line == "truth" else e.get("command") == line,
            after=before,
        )
        if answer["event"] == "error":
            raise StageError(f"the vehicle refuses {line!r}: {answer['message']}")
        return answer

    def truth(self) -> dict[str, Any]:
        """What really happened up to now, as the simulator has written it down."""
        return self.tell("truth")

    def tester(self, *requests: str) -> tuple[str | Path, ...]:
        """The command of a diagnostic tester on the vehicle's bus."""
        if self.bus["interface"] == "socketcand":
            return ("fod-sim", "tester", "--port", str(self.bus["port"]), *requests)
        return ("fod-sim", "tester", "--interface", "socketcan", "--channel", self.bus["channel"], *requests)

    def _answer(self) -> dict[str, Any] | None:
        try:
            return self.status()
        except StageError:
            return None


_BUS_KEYS = ("interface", "channel", "host", "port")


def _filled(template: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        if old not in template:
            raise StageError(f"the template does not hold {old!r} any more")
        template = template.replace(old, new)
    return template


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := source.recv(_CHUNK_BYTES):
            sink.sendall(content)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _lines(path: Path, start: int) -> list[str]:
    """Complete lines of a file, from a position on."""
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    return content[: content.rfind(b"\n") + 1].decode(errors="replace").splitlines()
