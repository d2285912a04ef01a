"""Reads which signal of a database is which VSS signal of the vehicle.

The form read here is ours: one TOML table `[[signals]]` for each signal, and
one `[[messages]]` for each message with an integrity scheme. An entry that
names a message or a signal that the database does not have is an error, never a
signal that silently stays unknown. All problems come at once, each with file
and line. `agent.signals.kuksa` reads the other form into the same entries.
Raises only DatabaseError.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.errors import DatabaseError
from agent.model import SignalValue
from agent.signals.arithmetic import Program
from agent.signals.checks import DataIdMode, Scheme
from agent.signals.database import SignalDatabase
from agent.signals.units import conversion_problem
from common import config

MAX_ENTRIES: Final = 4096
"""Most signals that one mapping file may hold."""
MAX_AGE_LIMIT_MS: Final = 3_600_000
"""Longest age, in milliseconds, at which a value may still count as known."""
VSS_NAME: Final = r"[A-Za-z][A-Za-z0-9]*(\.[A-Za-z][A-Za-z0-9]*)*"


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
        interval_ms: shortest time between two values that are taken; 0: every one is.
        mapping: value here for each text or number of the database; others are not used.
        math: arithmetic on the value of the database; empty: none.
        minimum, maximum: a number outside of them is not used.
        only_if: raw numbers that other signals of the frame must have.
    """

    vss: str
    message: str
    signal: str
    max_age_ms: int
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0
    text: bool = False
    interval_ms: int = 0
    mapping: tuple[tuple[SignalValue, SignalValue], ...] | None = None
    math: Program = ()
    minimum: float | None = None
    maximum: float | None = None
    only_if: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class MessageSettings:
    """[[messages]]: how the frames of one message are recognised and checked.

    Args:
        name: of the message in the database.
        check: its integrity scheme; a frame that fails is never used.
        counter: name of the signal that is its alive counter, where the scheme
            does not say it itself.
        data_id, data_id_mode, data_ids, offset: parameters of AUTOSAR E2E, see Check.
        any_source: SAE J1939: frames of the parameter group from any source
            address are this message, and raw values that stand for "error" or
            "not available" (SAE J1939-71, 5.1.4) are not used.
    """

    name: str
    check: Scheme | None = None
    counter: str = ""
    data_id: int = config.option(default=0, minimum=0, maximum=0xFFFF)
    data_id_mode: DataIdMode = DataIdMode.BOTH
    data_ids: tuple[int, ...] = ()
    offset: int = config.option(default=0, minimum=0, maximum=61)
    any_source: bool = False


@dataclass(frozen=True, slots=True)
class SignalMapping:
    """What a mapping file says.

    Args:
        notes: what of it is not used: (key in the file, reason).
    """

    entries: tuple[MappingEntry, ...]
    messages: tuple[MessageSettings, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _TomlSignal:
    """[[signals]], see MappingEntry."""

    vss: str = config.option(pattern=VSS_NAME)
    message: str = config.option()
    signal: str = config.option()
    max_age_ms: int = config.option(minimum=1, maximum=MAX_AGE_LIMIT_MS)
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0
    text: bool = False
    interval_ms: int = config.option(default=0, minimum=0, maximum=MAX_AGE_LIMIT_MS)


@dataclass(frozen=True)
class _TomlFile:
    signals: tuple[_TomlSignal, ...]
    messages: tuple[MessageSettings, ...] = ()


def read(content: bytes, path: Path, database: SignalDatabase) -> SignalMapping:
    """Reads a mapping in TOML for the messages of `database`; `path` names it in errors.

    Raises:
        DatabaseError: with one line `file:line: key: what` for each problem.
    """

    @dataclass(frozen=True)
    class Checked(_TomlFile):
        def problems(self) -> Iterator[tuple[str, str]]:
            yield from _problems(_entries(self.signals), database)
            yield from settings_problems(self.messages, {s.message for s in self.signals}, database)

    try:
        file = config.parse(content, path, Checked)
    except config.ConfigError as error:
        raise DatabaseError(str(error)) from error
    return SignalMapping(_entries(file.signals), file.messages)


def _entries(signals: tuple[_TomlSignal, ...]) -> tuple[MappingEntry, ...]:
    return tuple(MappingEntry(**vars(signal)) for signal in signals)


def settings_problems(
    messages: tuple[MessageSettings, ...], used: set[str], database: SignalDatabase
) -> Iterator[tuple[str, str]]:
    """What is wrong with settings of messages, as (key, what)."""
    names = [settings.name for settings in messages]
    for index, settings in enumerate(messages):
        key = f"messages[{index}]"
        message = database.messages.get(settings.name)
        if message is None:
            yield f"{key}.name", _no_message(settings.name, database)
            continue
        if settings.name not in used:
            yield f"{key}.name", f"no signal of message {settings.name} is mapped"
        if settings.name in names[:index]:
            yield f"{key}.name", f"message {settings.name} stands here twice"
        if settings.counter and not any(s.name == settings.counter for s in message.signals):
            known = [s.name for s in message.signals]
            what = f"message {settings.name} has no signal {settings.counter!r}"
            yield f"{key}.counter", f"{what}{closest(settings.counter, known)}"


def _problems(entries: tuple[MappingEntry, ...], database: SignalDatabase) -> Iterator[tuple[str, str]]:
    if len(entries) > MAX_ENTRIES:
        yield "signals", f"{len(entries)} entries are more than the limit of {MAX_ENTRIES}"
        return
    names: set[str] = set()
    for index, entry in enumerate(entries):
        key = f"signals[{index}]"
        if entry.vss in names:
            yield f"{key}.vss", f"{entry.vss} is mapped twice"
        names.add(entry.vss)
        yield from ((f"{key}.{name}", what) for name, what in _entry_problems(entry, database))


def _entry_problems(entry: MappingEntry, database: SignalDatabase) -> Iterator[tuple[str, str]]:
    message = database.messages.get(entry.message)
    if message is None:
        yield "message", _no_message(entry.message, database)
        return
    signal = next((s for s in message.signals if s.name == entry.signal), None)
    if signal is None:
        known = [s.name for s in message.signals]
        what = f"message {entry.message} has no signal {entry.signal!r}"
        yield "signal", f"{what}{closest(entry.signal, known)}"
        return
    if entry.scale == 0 or not math.isfinite(entry.scale):
        yield "scale", f"expected a finite number other than 0, found {entry.scale}"
    if not math.isfinite(entry.offset):
        yield "offset", f"expected a finite number, found {entry.offset}"
    if entry.text and not signal.choices:
        yield "text", f"signal {entry.signal} has no value table in {database.path.name}"
    if entry.text and (entry.scale != 1 or entry.offset != 0):
        yield "text", "a text has neither scale nor offset"
    wrong = conversion_problem(signal.unit or "", entry.unit, entry.scale, entry.offset)
    if wrong:
        yield "unit", f"{database.path.name} has {signal.unit!r}: {wrong}"


def _no_message(name: str, database: SignalDatabase) -> str:
    for skipped in database.skipped:
        if skipped.message == name:
            return f"message {name} was skipped at {database.path.name}:{skipped.line}: {skipped.reason}"
    return f"{database.path.name} has no message {name!r}{closest(name, list(database.messages))}"


def closest(name: str, known: list[str]) -> str:
    """The end of an error that names what may have been meant; "" if nothing is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; the closest is {near[0]!r}" if near else ""
