"""Real databases and logs for the signal tests, and small ones written here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cantools.database.can import Signal

from agent.adapters.bus import CAN_EFF_FLAG, RawFrame
from agent.model import Frame, SignalValue
from agent.signals.compiler import compile_table
from agent.signals.database import SignalDatabase, parse, read
from agent.signals.decoder import decoder
from agent.signals.mapping import MappingEntry, MessageSettings, SignalMapping
from agent.signals.state import Collector
from agent.signals.table import MessageRow, Table

REPOSITORY = Path(__file__).resolve().parents[2]
SIMULATED_DBC = REPOSITORY / "firmware_sim" / "data" / "openfod_sim.dbc"
DEMO_SIGNALS = REPOSITORY / "deploy" / "demo" / "signals.toml"

SMALL_DBC = """VERSION "1"

BU_: A

BO_ 256 SPEEDS: 8 A
 SG_ SPEED : 0|16@1+ (0.01,0) [0|300] "km/h" A
 SG_ LATERAL : 23|12@0- (0.5,-2) [0|0] "m/s2" A
 SG_ STATE : 32|3@1+ (1,0) [0|7] "" A

BO_ 2147484160 SELECTED: 4 A
 SG_ WHICH M : 0|8@1+ (1,0) [0|3] "" A
 SG_ FIRST m0 : 8|16@1- (1,0) [0|0] "" A
 SG_ SECOND m1 : 15|16@0+ (0.1,0) [0|0] "V" A

CM_ SG_ 256 SPEED "as the driver sees it";
VAL_ 256 STATE 0 "OFF" 1 "ON" 2 "START" ;
"""


def data_folder() -> Path:
    """The folder of real data; skips the test if it is not there."""
    folder = Path(os.environ.get("OPENFOD_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}; set OPENFOD_TEST_DATA")
    return folder


def data_file(name: str) -> Path:
    """One file of the real data."""
    return data_folder() / name


def small_database() -> SignalDatabase:
    """A database of two messages: both byte orders, a value table, a multiplexer."""
    return parse(SMALL_DBC, Path("small.dbc"))


def simulated_database() -> SignalDatabase:
    """The database of the simulated vehicle."""
    return load(SIMULATED_DBC)


def raw_frame(frame: Frame) -> RawFrame:
    """The frame as a bus adapter brings it."""
    flags = CAN_EFF_FLAG if frame.is_extended else 0
    return RawFrame(frame.can_id | flags, frame.data, frame.monotonic_ns)


def feed(collector: Collector, *frames: Frame) -> None:
    """Gives a collector frames one by one, each on its bus."""
    for frame in frames:
        collector.feed(frame.bus, [raw_frame(frame)])


def load(path: Path) -> SignalDatabase:
    """The database of a file."""
    return read(path.read_bytes(), path)


def table_of(
    database: SignalDatabase, *entries: MappingEntry, messages: tuple[MessageSettings, ...] = ()
) -> Table:
    """The table of these entries."""
    return compile_table(database, SignalMapping(entries, messages))


def decoded(row: MessageRow, payload: bytes) -> dict[str, SignalValue | None]:
    """What a payload holds, by VSS name."""
    names, values = decoder(row)(payload[: row.length])
    return dict(zip(names, values, strict=True))


def start_bit(signal: Signal) -> int:
    """Its first bit in the order of transmission."""
    start: int = signal.start
    return 8 * (start // 8) + 7 - start % 8 if signal.byte_order == "big_endian" else start


def map_all(database: SignalDatabase, *, text: bool = False) -> list[MappingEntry]:
    """Maps every signal that fits in its message, as message.signal; with `text` those with value tables."""
    return [
        entry(f"{message.name}.{signal.name}", message.name, signal.name, text=text)
        for message in database.messages.values()
        for signal in message.signals
        if start_bit(signal) + signal.length <= 8 * message.length and (signal.choices or not text)
    ]


def entry(
    vss: str,
    message: str,
    signal: str,
    *,
    max_age_ms: int = 1000,
    scale: float = 1.0,
    offset: float = 0.0,
    text: bool = False,
    unit: str = "",
    interval_ms: int = 0,
) -> MappingEntry:
    """A mapping entry with short defaults."""
    return MappingEntry(vss, message, signal, max_age_ms, unit, scale, offset, text, interval_ms)
