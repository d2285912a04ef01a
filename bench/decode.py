"""Reading the frames of a real car, beside cantools and opendbc's parser, in one run.

Three costs, each per frame and with the peers given the same frames: every
signal of every known message; the few signals that an agent subscribes to, with
and without their checks; and the whole of Collector.feed and drain for those.
opendbc is installed into an environment of its own, and left out if it cannot be.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from cantools.database.can import Message

from agent.adapters.bus import CAN_EFF_FLAG, RawFrame
from agent.adapters.replay import replay_log
from agent.signals.checks import Scheme
from agent.signals.compiler import compile_table
from agent.signals.database import SignalDatabase, read
from agent.signals.decoder import decoder
from agent.signals.mapping import MappingEntry, MessageSettings, SignalMapping
from agent.signals.state import Collector
from agent.signals.table import Table

DATA = Path(os.environ.get("OPENFOD_TEST_DATA", "../shared/data"))
CIVIC = "honda_civic_touring_2016_can_generated.dbc"
LOGS = (
    (CIVIC, "civic_typeR_turnonanddrive.log"),
    ("Model3CAN.dbc", "kuksa_model3_dogmode_candump.log"),
)
ROUNDS = 15
WINDOW_NS = 20_000_000
FULL_WINDOW = 30
DRIVE_NS = 70_000_000_000
REPEATED = 6
OPENDBC = "opendbc==0.3.1"
ENVIRONMENT = Path(".cache/bench-opendbc")

Job = Callable[[], None]

SUBSCRIBED = (
    ("ENGINE_DATA", "XMISSION_SPEED"),
    ("ENGINE_DATA", "ODOMETER"),
    ("POWERTRAIN_DATA", "PEDAL_GAS"),
    ("POWERTRAIN_DATA", "ENGINE_RPM"),
    ("GEARBOX_AUTO", "GEAR_SHIFTER"),
    ("SEATBELT_STATUS", "SEATBELT_DRIVER_LATCHED"),
    ("DOORS_STATUS", "DOOR_OPEN_FL"),
    ("EPB_STATUS", "EPB_STATE"),
    ("SCM_FEEDBACK", "REVERSE_LIGHT"),
)
"""What a logbook, a seat heating and a parking aid would read of this car."""


def main() -> None:
    """Prints medians and their ratios; skipped without the logs."""
    if not DATA.is_dir():
        print(f"skipped: {DATA} is not here (set OPENFOD_TEST_DATA)")
        return
    for name, log in LOGS:
        _every_signal(name, log)
    _subscribed()


def _every_signal(name: str, log: str) -> None:
    database = _database(name)
    table = _table(database, every_signal(database))
    messages = {
        m.frame_id | (CAN_EFF_FLAG if m.is_extended_frame else 0): m for m in database.messages.values()
    }
    decoders = {row.can_id: decoder(row) for row in table.messages}
    lengths = {row.can_id: row.length for row in table.messages}
    frames = [f for f in _frames(log) if f.can_id in decoders and len(f.data) == lengths[f.can_id]]

    def ours() -> None:
        for can_id, data, _ in frames:
            decoders[can_id](data)

    jobs: list[Job] = [ours, _collect(table, _full_bus(frames)), partial(_cantools, messages, frames)]
    own, feed, peer = _medians(jobs, len(frames))
    print(f"{name}: every signal of {len(frames)} frames, microseconds a frame:")
    print(f"  cantools {peer:.3f}; ours {own:.3f}, ratio of medians {peer / own:.1f}")
    print(f"  ours with feed and drain, changes found: {feed:.3f}, ratio {peer / feed:.1f}")


def _subscribed() -> None:
    name, log = LOGS[0]
    database = _database(name)
    entries = tuple(
        MappingEntry(f"Bench.{message}.{signal}", message, signal, 1000) for message, signal in SUBSCRIBED
    )
    wanted = {message for message, _ in SUBSCRIBED}
    checks = tuple(MessageSettings(message, check=Scheme.HONDA) for message in sorted(wanted))
    plain, checked = _table(database, entries), _table(database, entries, checks)
    everything = _frames(log)
    once = [f for f in everything if f.can_id in (plain.can_ids or ())]
    # The drive several times over: one of it is too short to measure.
    frames = [f._replace(at_ns=f.at_ns + n * DRIVE_NS) for n in range(REPEATED) for f in once]
    messages = {database.messages[m].frame_id: database.messages[m] for m in wanted}

    jobs: list[Job] = [
        _collect(plain, _full_bus(frames)),
        _collect(checked, _full_bus(frames)),
        _collect(plain, _windows(frames)),
        partial(_cantools, messages, frames),
    ]
    decoders = {row.can_id: decoder(row) for row in plain.messages}

    def bare() -> None:
        for can_id, data, _ in frames:
            decoders[can_id](data)

    own_bare, own, own_checked, own_pace, peer = _medians([bare, *jobs], len(frames))
    share = len(once) / len(everything)
    print(f"{name}: {len(SUBSCRIBED)} signals of {len(wanted)} messages, {share:.0%} of the log's frames:")
    print(f"  cantools (no checks, no changes) {peer:.3f} µs a frame")
    print(f"  ours, the values alone {own_bare:.3f}, ratio of medians {peer / own_bare:.1f}")
    print(f"  ours, feed and drain {own:.3f}, ratio {peer / own:.1f}")
    print(f"  ours with checksums and counters {own_checked:.3f}, ratio {peer / own_checked:.1f}")
    print(f"  ours with a drain every 20 ms of this quiet log {own_pace:.3f}, ratio {peer / own_pace:.1f}")
    parser = _opendbc(DATA / name, sorted(wanted), frames)
    if parser is None:
        return
    print(f"  {OPENDBC} CANParser (checksums and counters) {parser:.3f} µs a frame")
    print(f"  ratio to ours {parser / own:.1f}; to ours with checks {parser / own_checked:.1f}")


def every_signal(database: SignalDatabase) -> tuple[MappingEntry, ...]:
    """Maps all signals of all messages; of two messages with one identifier those of the last."""
    by_id = {_can_id(m): m for m in database.messages.values()}
    return tuple(
        MappingEntry(f"Bench.M{i}.S{j}", m.name, s.name, 1000)
        for i, m in enumerate(by_id.values())
        for j, s in enumerate(m.signals)
    )


def _can_id(message: Message) -> int:
    return int(message.frame_id) | (CAN_EFF_FLAG if message.is_extended_frame else 0)


def _database(name: str) -> SignalDatabase:
    path = DATA / name
    return read(path.read_bytes(), path)


def _table(
    database: SignalDatabase,
    entries: Sequence[MappingEntry],
    messages: tuple[MessageSettings, ...] = (),
) -> Table:
    return compile_table(database, SignalMapping(tuple(entries), messages))


def _frames(log: str) -> list[RawFrame]:
    return [
        RawFrame(f.can_id | (CAN_EFF_FLAG if f.is_extended else 0), f.data, f.monotonic_ns)
        for f in replay_log(DATA / log, "b")
    ]


def _collect(table: Table, windows: Sequence[Sequence[RawFrame]]) -> Job:
    """Feeds and drains window by window; the collector is made beforehand."""
    collector = Collector({"b": table})

    def run() -> None:
        for window in windows:
            collector.feed("b", window)
            collector.drain()

    return run


def _full_bus(frames: Sequence[RawFrame]) -> list[Sequence[RawFrame]]:
    """As many frames in each window as a full bus brings of 17 % of 9,000 a second."""
    return [frames[at : at + FULL_WINDOW] for at in range(0, len(frames), FULL_WINDOW)]


def _windows(frames: Sequence[RawFrame]) -> list[list[RawFrame]]:
    windows: list[list[RawFrame]] = []
    ends_ns = -1
    for frame in frames:
        if frame.at_ns >= ends_ns:
            windows.append([])
            ends_ns = frame.at_ns + WINDOW_NS
        windows[-1].append(frame)
    return windows


def _cantools(messages: dict[int, Message], frames: Sequence[RawFrame]) -> None:
    for can_id, data, _ in frames:
        messages[can_id].decode(data, decode_choices=False, allow_truncated=True)


def _medians(jobs: Sequence[Job], frames: int) -> list[float]:
    """Microseconds of CPU a frame; the jobs take turns."""
    taken: list[list[float]] = [[] for _ in jobs]
    for _ in range(ROUNDS):
        for job, found in zip(jobs, taken, strict=True):
            begun = time.process_time()
            job()
            found.append((time.process_time() - begun) * 1e6 / frames)
    return [statistics.median(found) for found in taken]


# --- opendbc -------------------------------------------------------------------

_PARSER = """
import json, statistics, sys, time
from opendbc.can.parser import CANParser
given = json.load(sys.stdin)
windows = [(at, [(i, bytes.fromhex(d), 0) for i, d in frames]) for at, frames in given["windows"]]
count = sum(len(frames) for _, frames in windows)
found = []
for _ in range(given["rounds"]):
    parser = CANParser(given["database"], [(name, float("nan")) for name in given["messages"]], 0)
    begun = time.process_time()
    for window in windows:
        parser.update([window])
    found.append((time.process_time() - begun) * 1e6 / count)
print(json.dumps(statistics.median(found)))
"""


def _opendbc(database: Path, messages: Sequence[str], frames: Sequence[RawFrame]) -> float | None:
    """Microseconds a frame of its parser; None where it cannot be installed."""
    python = ENVIRONMENT / "bin" / "python"
    try:
        if not python.exists():
            venv.create(ENVIRONMENT, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", OPENDBC]
            subprocess.run(install, check=True, capture_output=True, text=True)
        given = {
            "database": str(database.resolve()),
            "messages": list(messages),
            "rounds": ROUNDS,
            "windows": [(w[-1].at_ns, [(f.can_id, f.data.hex()) for f in w]) for w in _windows(frames)],
        }
        ran = subprocess.run(
            [str(python), "-c", _PARSER], input=json.dumps(given), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
        print(f"  {OPENDBC} is left out, it does not run here: {' '.join(said)}", file=sys.stderr)
        return None
    median: float = json.loads(ran.stdout)
    return median
