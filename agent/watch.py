"""`fod-agent watch`: live signals, buses and messages in the terminal, or as JSON lines.

A running agent holds the buses, so it is asked for what it hears; it is never
disturbed. Without one the buses of agent.toml are opened here, listen-only, and
let go as soon as an agent answers. A value that is too old is shown as stale
and one that was never heard as unknown; neither is shown as a number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

from agent.config import AgentConfig
from agent.errors import NotRunningError, TransportError
from common.log import printable

if TYPE_CHECKING:
    from agent.adapters.bus import RawFrame

MIN_INTERVAL_S: Final = 0.1
MAX_INTERVAL_S: Final = 3600.0
"""Shortest and longest time between two looks, seconds."""
HIGHLIGHT_S: Final = 1.0
"""How long a change is highlighted, seconds."""
_BUS_HEADS: Final = (
    *("bus", "state", "controller", "frames/s", "frames"),
    *("dropped", "malformed", "errors", "times lost"),
)
_SIGNAL_HEADS: Final = ("signal", "value", "unit", "age")
_MESSAGE_HEADS: Final = ("message", "frames/s", "used", "check failed", "lost", "repeated", "too short")
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # another screen, without cursor; and back
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_BOLD, _DIM, _RED, _PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class BusRow:
    """One bus; the counts are of its whole life, `lost` counts how often it was gone."""

    state: str
    reason: str = ""
    controller: str = "unknown"
    frames: int = 0
    dropped: int = 0
    malformed: int = 0
    error_frames: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class SignalRow:
    """One signal; `age_ms` is None if it was never heard, `value` also if it is too old."""

    value: object
    unit: str
    age_ms: int | None

    @property
    def state(self) -> str:
        """Whether the value counts."""
        if self.age_ms is None:
            return "unknown"
        return "stale" if self.value is None else "fresh"


@dataclass(frozen=True, slots=True)
class MessageRow:
    """What became of one message's frames (agent.signals.state.MessageHealth)."""

    used: int = 0
    too_short: int = 0
    check_failed: int = 0
    repeated: int = 0
    lost: int = 0

    @property
    def frames(self) -> int:
        """All that arrived."""
        return self.used + self.too_short + self.check_failed + self.repeated


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All there is to see at one monotonic moment."""

    at_ns: int
    source: str
    buses: Mapping[str, BusRow] = field(default_factory=dict)
    signals: Mapping[str, SignalRow] = field(default_factory=dict)
    messages: Mapping[str, MessageRow] = field(default_factory=dict)
    problem: str = ""


# --- where it comes from ----------------------------------------------------------


class Source(Protocol):
    """Where snapshots come from."""

    def snapshot(self) -> Snapshot:
        """What there is to see now.

        Raises:
            NotRunningError, TransportError: the agent does not answer.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Lets time pass."""
        ...

    def close(self) -> None:
        """Lets go of everything."""
        ...


class RunningAgent:
    """An agent that answers on its local socket."""

    def __init__(self, config: AgentConfig, monotonic_ns: Callable[[], int]) -> None:
        self._socket, self._monotonic_ns = config.api_socket, monotonic_ns

    def snapshot(self) -> Snapshot:
        """As `Source.snapshot`."""
        from agent.adapters import local_api

        status = local_api.ask(self._socket)
        return snapshot_of(status, self._monotonic_ns(), f"agent at {self._socket}")

    def wait(self, seconds: float) -> None:
        """As `Source.wait`."""
        time.sleep(seconds)

    def close(self) -> None:
        """As `Source.close`."""


def snapshot_of(status: Mapping[str, Any], at_ns: int, source: str) -> Snapshot:
    """Reads the status of an agent, of this version or another: what is missing is left out."""

    def part(name: str) -> dict[str, Any]:
        found = status.get(name)
        return found if isinstance(found, dict) else {}

    def counts(found: object, kind: type[BusRow | MessageRow]) -> dict[str, int]:
        known = {f: found.get(f) for f in kind.__slots__} if isinstance(found, dict) else {}
        return {name: value for name, value in known.items() if isinstance(value, int)}

    buses = {
        name: BusRow(
            state=str(state),
            reason=str(part("bus_reasons").get(name, "")),
            controller=str(part("controllers").get(name, "unknown")),
            **counts(part("bus_counts").get(name), BusRow),
        )
        for name, state in part("buses").items()
    }
    signals = {
        name: SignalRow(found.get("value"), str(found.get("unit", "")), found.get("age_ms"))
        for name, found in part("signals").items()
        if isinstance(found, dict)
    }
    messages = {name: MessageRow(**counts(found, MessageRow)) for name, found in part("messages").items()}
    return Snapshot(at_ns, source, buses, signals, messages)


class OwnBuses:
    """The buses of agent.toml, opened here to listen only."""

    def __init__(self, config: AgentConfig, monotonic_ns: Callable[[], int]) -> None:
        """Opens them.

        Raises:
            DatabaseError: a database or mapping cannot be used.
        """
        from agent.adapters.can_bus import CanBus
        from agent.adapters.signal_table import compile_anew
        from agent.signals.state import Collector, SignalState

        self._socket, self._monotonic_ns = config.api_socket, monotonic_ns
        compiled = {bus.name: compile_anew(bus) for bus in config.buses}
        self._collector = Collector({name: made.table for name, made in compiled.items() if made is not None})
        self._state = SignalState(self._collector.infos)
        self._lock = threading.Lock()  # guards the collector, between the readers and us
        self._buses = {
            bus.name: CanBus(
                bus.name,
                bus.interface,
                bus.channel,
                bus.bitrate,
                bus.fd,
                on_frames=self._take,
                on_state=lambda *_: None,
                listen_only=True,
                **bus.options,
            )
            for bus in config.buses
        }
        for bus in self._buses.values():
            bus.open()

    def _take(self, bus: str, frames: Sequence[RawFrame]) -> None:
        """Decodes frames, in the reader's thread."""
        with self._lock:
            self._collector.feed(bus, frames)

    def wait(self, seconds: float) -> None:
        """As `Source.wait`; frames are decoded meanwhile."""
        time.sleep(seconds)

    def snapshot(self) -> Snapshot:
        """As `Source.snapshot`."""
        with self._lock:
            self._state.apply(self._collector.drain())
        now_ns = self._monotonic_ns()
        return Snapshot(
            now_ns,
            "own buses, listen-only: no agent runs",
            {
                name: BusRow(
                    bus.state.value,
                    bus.reason,
                    bus.controller.value,
                    bus.counts.frames,
                    bus.counts.dropped,
                    bus.counts.malformed,
                    bus.counts.error_frames,
                    bus.counts.lost,
                )
                for name, bus in self._buses.items()
            },
            {
                name: SignalRow(reading.value, reading.unit, reading.age_ms)
                for name, reading in self._state.snapshot(now_ns).items()
            },
            {
                f"{bus}/{message}": MessageRow(
                    health.used, health.too_short, health.check_failed, health.repeated, health.lost
                )
                for (bus, message), health in self._collector.health.items()
            },
        )

    def close(self) -> None:
        """As `Source.close`."""
        for bus in self._buses.values():
            with contextlib.suppress(TransportError):  # its reader is a daemon, and ends with us
                bus.close()


# --- what is shown ---------------------------------------------------------------------


class View:
    """Makes text of snapshots, one after the other."""

    def __init__(self, wanted: str = "", *, colours: bool = False) -> None:
        """Shows signals and messages whose names contain `wanted`, in capitals or not; "" is all."""
        self._wanted, self._colours = wanted.lower(), colours
        self._before: Snapshot | None = None
        self._now = Snapshot(0, "")
        self._rates: dict[str, float] = {}
        """Frames a second of each bus and message since the snapshot before."""
        self._changed_ns: dict[str, int] = {}
        self._is_same_problem = True

    def take(self, snapshot: Snapshot) -> None:
        """The next snapshot; without anything but a problem, the last one stays beside it."""
        self._is_same_problem = snapshot.problem == self._now.problem
        if snapshot.problem:
            self._now = Snapshot(snapshot.at_ns, self._now.source, self._now.buses, {}, {}, snapshot.problem)
            self._before = None
            return
        before = self._before = self._now if self._now.source == snapshot.source else None
        self._now = snapshot
        self._rates = {}
        if before is not None and snapshot.at_ns > before.at_ns:
            span_s = (snapshot.at_ns - before.at_ns) / 1e9
            counts = _frames(before)
            for name, frames in _frames(snapshot).items():
                if name in counts:
                    self._rates[name] = max(0, frames - counts[name]) / span_s
        for name, row in snapshot.signals.items():
            old = before.signals.get(name) if before else None
            if old is not None and (old.value, old.state) != (row.value, row.state):
                self._changed_ns[name] = snapshot.at_ns

    def _matches(self, name: str) -> bool:
        return self._wanted in name.lower()

    def _signals(self) -> list[tuple[str, SignalRow]]:
        return [(name, row) for name, row in sorted(self._now.signals.items()) if self._matches(name)]

    def _messages(self) -> list[tuple[str, MessageRow]]:
        return [(name, row) for name, row in sorted(self._now.messages.items()) if self._matches(name)]

    def document(self, unix_ms: int) -> dict[str, object]:
        """The snapshot for a program."""
        now = self._now
        return {
            "unix_ms": unix_ms,
            "source": now.source,
            "problem": now.problem or None,
            "buses": {
                name: {**asdict(row), "frames_per_s": _rounded(self._rates.get(name))}
                for name, row in now.buses.items()
            },
            "signals": {name: {**asdict(row), "state": row.state} for name, row in self._signals()},
            "messages": {
                name: {**asdict(row), "frames_per_s": _rounded(self._rates.get(name))}
                for name, row in self._messages()
            },
        }

    def news(self) -> list[str]:
        """What is different from the snapshot before, as lines; everything the first time."""
        now, before = self._now, self._before
        if now.problem:
            return [] if self._is_same_problem else [printable(f"problem: {now.problem}")]
        lines = []
        for name, row in now.buses.items():
            old = before.buses.get(name) if before else None
            if old is None or (row.state, row.controller) != (old.state, old.controller):
                why = f" ({row.reason})" if row.reason else ""
                lines.append(f"bus {name} {row.state}, controller {row.controller}{why}")
            if old is not None and (row.dropped, row.malformed) != (old.dropped, old.malformed):
                lines.append(f"bus {name} has lost frames: {row.dropped} dropped, {row.malformed} malformed")
        for name, health in self._messages():
            was = before.messages.get(name, MessageRow()) if before else health
            if (health.check_failed, health.lost) != (was.check_failed, was.lost):
                lines.append(f"message {name}: {health.check_failed} failed checks, {health.lost} lost")
        for name, found in self._signals():
            past = before.signals.get(name) if before else None
            if past is None or (found.value, found.state) != (past.value, past.state):
                lines.append(f"{name} {_value(found)} {found.unit}".rstrip())
        return [printable(line) for line in lines]

    def screen(self, width: int, height: int) -> list[str]:
        """The whole as lines that fit a terminal; what does not fit is said."""
        now = self._now
        lines = [self._styled(printable(f"fod-agent watch: {now.source}")[:width], _BOLD)]
        if now.problem:
            lines.append(self._styled(printable(now.problem)[:width], _RED))
        buses = [
            (
                (
                    name,
                    row.state,
                    row.controller,
                    _rate(self._rates.get(name)),
                    *map(str, (row.frames, row.dropped, row.malformed, row.error_frames, row.lost)),
                ),
                _RED if row.state != "up" or row.dropped else "",
            )
            for name, row in now.buses.items()
        ]
        lines += ["", *self._table(_BUS_HEADS, buses, width)]
        for name, row in now.buses.items():
            if row.reason:
                lines.append(self._styled(printable(f"{name}: {row.reason}")[:width], _RED))
        signals = [
            ((name, _value(row), row.unit, _age(row)), self._signal_style(name, row))
            for name, row in self._signals()
        ]
        messages = [
            (
                (
                    name,
                    _rate(self._rates.get(name)),
                    *map(str, (row.used, row.check_failed, row.lost, row.repeated, row.too_short)),
                ),
                _RED if row.check_failed or row.lost else "",
            )
            for name, row in self._messages()
        ]
        signal_lines = self._table(_SIGNAL_HEADS, signals, width)
        message_lines = self._table(_MESSAGE_HEADS, messages, width)
        # Two blank lines between the tables; the signals are first, the messages get what is left.
        room = height - len(lines) - 2
        signal_lines = _cut(signal_lines, max(room - min(len(message_lines), room // 3), 0))
        message_lines = _cut(message_lines, max(room - len(signal_lines), 0))
        return [*lines, "", *signal_lines, "", *message_lines][:height]

    def _signal_style(self, name: str, row: SignalRow) -> str:
        if row.state != "fresh":
            return _DIM
        changed_ns = self._changed_ns.get(name)
        recent = changed_ns is not None and self._now.at_ns - changed_ns < HIGHLIGHT_S * 1e9
        return _BOLD if recent else ""

    def _table(
        self, heads: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], width: int
    ) -> list[str]:
        cells = [[printable(cell) for cell in row] for row, _ in rows]
        widths = [max([len(head), *(len(row[i]) for row in cells)]) for i, head in enumerate(heads)]

        def line(row: Sequence[str]) -> str:
            return "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()[
                :width
            ]

        return [
            self._styled(line([head.upper() for head in heads]), _DIM),
            *(self._styled(line(row), style) for row, (_, style) in zip(cells, rows, strict=True)),
        ]

    def _styled(self, text: str, style: str) -> str:
        return f"{style}{text}{_PLAIN}" if style and self._colours else text


def _frames(snapshot: Snapshot) -> dict[str, int]:
    """How many frames each bus and each message had; a message's name has a slash."""
    return {name: row.frames for name, row in snapshot.buses.items()} | {
        name: row.frames for name, row in snapshot.messages.items()
    }


def _cut(lines: list[str], room: int) -> list[str]:
    """Lines that fit; the last says how many do not."""
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], f"... {len(lines) - room + 1} more (--filter NAME)"] if room > 0 else []


def _value(row: SignalRow) -> str:
    if row.state == "unknown":
        return "unknown"
    if row.state == "stale":
        return "stale"
    return f"{row.value:.10g}" if isinstance(row.value, float) else str(row.value)


def _age(row: SignalRow) -> str:
    if row.age_ms is None:
        return "never heard"
    return f"{row.age_ms} ms" if row.age_ms < 10_000 else f"{row.age_ms // 1000} s"  # noqa: PLR2004


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f}"


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


# --- the command --------------------------------------------------------------------------


def watch(
    config: AgentConfig,
    *,
    interval_s: float,
    once: bool,
    wanted: str,
    as_json: bool,
    out: TextIO,
    monotonic_ns: Callable[[], int] = time.monotonic_ns,
    unix_ns: Callable[[], int] = time.time_ns,
) -> None:
    """Shows snapshots until Ctrl-C, SIGTERM, or until nobody reads any more.

    Args:
        interval_s: time between two of them, seconds.
        once: one of them, after one interval of listening.
        wanted: part of the names of signals and messages that are shown.
        as_json: one JSON document a line.

    Raises:
        AgentError: a database or mapping cannot be used, and no agent runs.
    """
    is_screen = out.isatty() and not (as_json or once)
    view = View(wanted, colours=is_screen and "NO_COLOR" not in os.environ)
    source: Source | None = None
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        source = _choose(config, monotonic_ns)
        with _terminal(out) if is_screen else contextlib.nullcontext():
            view.take(_look(source, monotonic_ns))
            while True:
                if not once:
                    _show(view, out, is_screen=is_screen, as_json=as_json, unix_ns=unix_ns())
                source.wait(interval_s)
                if isinstance(source, OwnBuses) and config.api_socket.exists():
                    source = _yield_to_agent(source, config, monotonic_ns)
                view.take(_look(source, monotonic_ns))
                if once:
                    break
        if as_json:
            _show(view, out, is_screen=False, as_json=True, unix_ns=unix_ns())
        else:
            out.write("\n".join(view.screen(sys.maxsize, sys.maxsize)) + "\n")
            out.flush()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Whoever read has enough; what Python still has for them must not fail at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    finally:
        signal.signal(signal.SIGTERM, before)
        if source is not None:
            source.close()


def _choose(config: AgentConfig, monotonic_ns: Callable[[], int]) -> Source:
    agent = RunningAgent(config, monotonic_ns)
    try:
        agent.snapshot()
    except NotRunningError:
        return OwnBuses(config, monotonic_ns)
    except TransportError:  # it runs, and is busy
        return agent
    return agent


def _yield_to_agent(own: OwnBuses, config: AgentConfig, monotonic_ns: Callable[[], int]) -> Source:
    """An agent has started: it gets the buses, and is asked from now on."""
    agent = RunningAgent(config, monotonic_ns)
    try:
        agent.snapshot()
    except TransportError:  # a socket that was left behind
        return own
    own.close()
    return agent


def _look(source: Source, monotonic_ns: Callable[[], int]) -> Snapshot:
    try:
        return source.snapshot()
    except TransportError as error:
        return Snapshot(monotonic_ns(), "", problem=f"{error}; waiting for it")


def _show(view: View, out: TextIO, *, is_screen: bool, as_json: bool, unix_ns: int) -> None:
    if as_json:
        out.write(json.dumps(view.document(unix_ns // 1_000_000), default=str, ensure_ascii=False) + "\n")
    elif is_screen:
        size = shutil.get_terminal_size()
        lines = view.screen(size.columns, size.lines)
        out.write(_HOME + "\r\n".join(line + _END_OF_LINE for line in lines) + _END_OF_SCREEN)
    else:
        moment = datetime.fromtimestamp(unix_ns / 1e9, UTC).strftime("%H:%M:%S.%f")[:-3]
        out.writelines(f"{moment} {line}\n" for line in view.news())
    out.flush()


@contextlib.contextmanager
def _terminal(out: TextIO) -> Iterator[None]:
    """Another screen, so that what stood in the terminal is there again afterwards; no log lines in it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # what matters of them is on the screen
    out.write(_ENTER)
    try:
        yield
    finally:
        logging.disable(disabled)
        out.write(_LEAVE)
        out.flush()
