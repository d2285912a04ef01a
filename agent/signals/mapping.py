"""Reads which signal of a database is which VSS signal of the vehicle.

One TOML table `[[signals]]` for each signal; an entry that names a message or
a signal that the database does not have is an error, never a signal that
silently stays unknown. All problems come at once, each with file and line.
Raises only DatabaseError.
"""

from __future__ import annotations

import difflib
import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.errors import DatabaseError
from agent.signals.database import SignalDatabase
from common import config

MAX_ENTRIES: Final = 4096
"""Most signals that one mapping file may hold."""
MAX_AGE_LIMIT_MS: Final = 3_600_000
"""Longest age, in milliseconds, at which a value may still count as known."""

# Spellings of the same unit in public databases; the first is that of VSS 4.0.
_UNITS: Final = (
    ("km/h", "kph", "kmh", "km/hr"),
    ("mph", "mi/h"),
    ("m/s",),
    ("km",),
    ("m", "meter", "metre"),
    ("mi", "mile", "miles"),
    ("percent", "%"),
    ("celsius", "degc", "°c", "c"),
    ("degrees", "deg", "°", "degree"),
    ("rpm", "1/min"),
    ("V", "volt", "volts"),
    ("mV",),
    ("A", "amp", "amps"),
    ("kW",),
    ("W",),
    ("Nm",),
    ("s", "sec"),
    ("ms",),
)
_SAME_UNIT: Final = {spelling.casefold(): names[0] for names in _UNITS for spelling in names}


class Check(enum.Enum):
    """How a message protects its content."""

    OPENFOD_J1850 = "openfod-j1850"
    """CRC-8 SAE J1850 in byte 0, alive counter 0 to 14 in byte 1."""
    HONDA = "honda"
    """4-bit sum of nibbles and 2-bit counter, in the signals CHECKSUM and COUNTER."""


@dataclass(frozen=True, slots=True)
class MappingEntry:
    """One VSS signal and where its values come from.

    Args:
        vss: VSS name, such as "Vehicle.Speed".
        message, signal: names in the database.
        max_age_ms: age from which a value counts as unknown.
        unit: unit of the values here; "" if they have none.
        scale, offset: value here = value of the database * scale + offset.
        text: take the text of the value table; a value without text is not used.
        check: the message's integrity scheme, the same in all its entries; a
            frame that fails is never used.
    """

    vss: str = config.option(pattern=r"[A-Za-z][A-Za-z0-9]*(\.[A-Za-z][A-Za-z0-9]*)*")
    message: str = config.option()
    signal: str = config.option()
    max_age_ms: int = config.option(minimum=1, maximum=MAX_AGE_LIMIT_MS)
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0
    text: bool = False
    check: Check | None = None


@dataclass(frozen=True)
class _MappingFile:
    signals: tuple[MappingEntry, ...]


def load(path: Path, database: SignalDatabase) -> tuple[MappingEntry, ...]:
    """Reads the mapping at `path` for the messages of `database`.

    Raises:
        DatabaseError: with one line `file:line: key: what` for each problem.
    """

    @dataclass(frozen=True)
    class Checked(_MappingFile):
        def problems(self) -> Iterator[tuple[str, str]]:
            return _problems(self.signals, database)

    try:
        return config.read(path, Checked).signals
    except config.ConfigError as error:
        raise DatabaseError(str(error)) from error


def _problems(entries: tuple[MappingEntry, ...], database: SignalDatabase) -> Iterator[tuple[str, str]]:
    if len(entries) > MAX_ENTRIES:
        yield "signals", f"{len(entries)} entries are more than the limit of {MAX_ENTRIES}"
        return
    names: set[str] = set()
    checks: dict[str, Check | None] = {}
    for index, entry in enumerate(entries):
        key = f"signals[{index}]"
        if entry.vss in names:
            yield f"{key}.vss", f"{entry.vss} is mapped twice"
        names.add(entry.vss)
        if checks.setdefault(entry.message, entry.check) != entry.check:
            yield f"{key}.check", f"differs from that of another signal of message {entry.message}"
        yield from ((f"{key}.{name}", what) for name, what in _entry_problems(entry, database))


def _entry_problems(entry: MappingEntry, database: SignalDatabase) -> Iterator[tuple[str, str]]:
    message = database.messages.get(entry.message)
    if message is None:
        yield "message", _no_message(entry.message, database)
        return
    signal = next((s for s in message.signals if s.name == entry.signal), None)
    if signal is None:
        known = [s.name for s in message.signals]
        yield (
            "signal",
            f"message {entry.message} has no signal {entry.signal!r}{closest(entry.signal, known)}",
        )
        return
    unscaled = entry.scale == 1 and entry.offset == 0
    if entry.scale == 0 or not math.isfinite(entry.scale):
        yield "scale", f"expected a finite number other than 0, found {entry.scale}"
    if not math.isfinite(entry.offset):
        yield "offset", f"expected a finite number, found {entry.offset}"
    if entry.text and not signal.choices:
        yield "text", f"signal {entry.signal} has no value table in {database.path.name}"
    if entry.text and not unscaled:
        yield "text", "a text has neither scale nor offset"
    here, there = (_SAME_UNIT.get(unit.casefold()) for unit in (entry.unit, signal.unit or ""))
    if unscaled and here and there and here != there:
        yield "unit", f"expected {signal.unit!r} as in {database.path.name}, or a scale; found {entry.unit!r}"


def _no_message(name: str, database: SignalDatabase) -> str:
    for skipped in database.skipped:
        if skipped.message == name:
            return f"message {name} was skipped at {database.path.name}:{skipped.line}: {skipped.reason}"
    return f"{database.path.name} has no message {name!r}{closest(name, list(database.messages))}"


def closest(name: str, known: list[str]) -> str:
    """The end of an error that names what may have been meant; "" if nothing is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the closest is {near[0]!r}" if near else ""
