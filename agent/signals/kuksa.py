"""Reads a mapping in the form of Kuksa's CAN provider: a VSS tree with `dbc2vss` entries.

Read as they are: `dbc2vss` (or `dbc`), `signal`, `interval_ms`, `on_change`,
`transform` with `mapping` or `math`, `multiplexer`. Added, and unknown to Kuksa,
which leaves them out: `message` where several messages have the signal,
`max_age_ms`, and at the top `"openfod": {"messages": [...]}` with what
`[[messages]]` is in our own form. Signals that the database does not have are
noted and left out, as Kuksa leaves them out; what contradicts itself, the units
included, is an error.

Where it differs: values outside of the data type or of `min` and `max` are not
used; a number that has a text never goes through `math`; a boolean without
transform takes 0 and 1 only. `vss2dbc` is not used: frames are written as the
signed catalogue says, and no other.
Raises only DatabaseError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from cantools.database.can import Message, Signal

from agent.errors import DatabaseError
from agent.model import SignalValue
from agent.signals import arithmetic
from agent.signals.database import SignalDatabase
from agent.signals.mapping import (
    MAX_AGE_LIMIT_MS,
    MAX_ENTRIES,
    VSS_NAME,
    MappingEntry,
    MessageSettings,
    SignalMapping,
    settings_problems,
)
from agent.signals.units import conversion_problem
from common import config

T = TypeVar("T")

DEFAULT_INTERVAL_MS: Final = 1000
"""Shortest time between two values if neither `interval_ms` nor `on_change` is there."""
LEAST_AGE_MS: Final = 1000
CYCLES_MISSED: Final = 5
"""Without `max_age_ms` a value is known for so many cycles of its message, and for LEAST_AGE_MS at least."""
MAX_LIMIT: Final = 1e300
"""Largest `min` or `max`."""
MAX_DEPTH: Final = 32
"""Deepest nesting of the tree."""

_KEYS: Final = frozenset(
    {"signal", "message", "interval_ms", "on_change", "max_age_ms", "transform", "multiplexer"}
)
# What rounds to a number of the type is one: 2.55 * 100 is a little more than 255.
_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    f"{sign}int{bits}": (low - 0.5, low + 2.0**bits - 0.5)
    for bits in (8, 16, 32, 64)
    for sign, low in (("u", 0), ("", -(2 ** (bits - 1))))
}
_NUMBERS: Final = frozenset({*_RANGES, "float", "double"})


@dataclass(frozen=True)
class _Extension:
    """What stands under "openfod"."""

    messages: tuple[MessageSettings, ...] = ()


class _Wrong(Exception):
    """An entry that contradicts itself or the database: (key behind the entry's own, what)."""


class _Missing(Exception):
    """An entry that this database has nothing for: (key behind the entry's own, what)."""


def read(content: bytes, path: Path, database: SignalDatabase) -> SignalMapping:
    """Reads a mapping in JSON for the messages of `database`; `path` names it in errors.

    Raises:
        DatabaseError: with one line `file: key: what` for each problem.
    """
    try:
        tree = json.loads(content, object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise DatabaseError(f"{path}: not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise DatabaseError(f"{path}: expected a VSS tree, an object; found something else")
    problems: list[str] = []
    notes: list[tuple[str, str]] = []
    entries: list[MappingEntry] = []
    extension = _extension(tree.pop("openfod", {}), path)
    try:
        nodes = list(_nodes(tree, "", 0))
    except _Wrong as error:
        raise DatabaseError(f"{path}: {error.args[0]}: {error.args[1]}") from error
    for vss, node in nodes:
        if "vss2dbc" in node:
            notes.append((f"{vss}.vss2dbc", "not used: frames are written only as the signed catalogue says"))
        kind = next((k for k in ("dbc2vss", "dbc") if k in node), None)
        if kind is None:
            continue
        try:
            entry, unread = _entry(vss, node, kind, database)
        except _Missing as error:
            notes.append((f"{vss}.{kind}{error.args[0]}", error.args[1]))
        except _Wrong as error:
            problems.append(f"{path}: {vss}.{kind}{error.args[0]}: {error.args[1]}")
        else:
            entries.append(entry)
            notes += [(f"{vss}.{kind}.{key}", "unknown; not read") for key in unread]
    if len(entries) > MAX_ENTRIES:
        problems.append(f"{path}: {len(entries)} entries are more than the limit of {MAX_ENTRIES}")
    used = {entry.message for entry in entries}
    problems += [
        f"{path}: openfod.{key}: {what}"
        for key, what in settings_problems(extension.messages, used, database)
    ]
    if problems:
        raise DatabaseError("\n".join(problems))
    return SignalMapping(tuple(entries), extension.messages, tuple(notes))


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _extension(found: object, path: Path) -> _Extension:
    try:
        return config.check(found, path, _Extension, "openfod")
    except config.ConfigError as error:
        raise DatabaseError(str(error)) from error


def _nodes(tree: Mapping[str, object], prefix: str, depth: int) -> Iterator[tuple[str, dict[str, object]]]:
    """The signals of a tree by their full names."""
    if depth > MAX_DEPTH:
        raise _Wrong(prefix, f"nested more than {MAX_DEPTH} deep")
    for name, node in tree.items():
        if not isinstance(node, dict):
            continue
        match node.get("type"):
            case "branch":
                children = node.get("children")
                if isinstance(children, dict):
                    yield from _nodes(children, f"{prefix}{name}.", depth + 1)
            case "sensor" | "actuator" | "attribute":
                yield f"{prefix}{name}", node
            case _:
                yield from _nodes(node, prefix, depth + 1)


def _entry(
    vss: str, node: Mapping[str, object], kind: str, database: SignalDatabase
) -> tuple[MappingEntry, list[str]]:
    """One entry, and the keys of it that are not read."""
    if not re.fullmatch(VSS_NAME, vss):
        raise _Wrong("", f"{vss[:80]!r} is no VSS name")
    if "dbc" in node and "dbc2vss" in node:
        raise _Wrong("", "dbc and dbc2vss mean the same; only one of them may stand here")
    found = node[kind]
    if not isinstance(found, dict):
        raise _Wrong("", "expected an object")
    message, signal = _source(found, database)
    on_change = _of(found, "on_change", bool, default=False)
    interval_ms = _whole(found, "interval_ms", 0, 0 if on_change else DEFAULT_INTERVAL_MS)
    least_ms = max(LEAST_AGE_MS, CYCLES_MISSED * int(message.cycle_time or 0))
    unit = _of(node, "unit", str, default="")
    entry = MappingEntry(
        vss=vss,
        message=message.name,
        signal=signal.name,
        max_age_ms=_whole(found, "max_age_ms", 1, min(least_ms, MAX_AGE_LIMIT_MS)),
        unit=unit,
        interval_ms=interval_ms,
        only_if=_multiplexer(found, message),
    )
    datatype = _of(node, "datatype", str, default="")
    entry = _transformed(entry, found, datatype, signal)
    if datatype in _NUMBERS and entry.mapping is None:
        if not entry.math and (wrong := conversion_problem(signal.unit or "", unit, 1, 0)):
            raise _Wrong("", f"signal {signal.name} has the unit {signal.unit!r}: {wrong}, or a transform")
        entry = _bounded(entry, node, datatype)
    return entry, sorted(found.keys() - _KEYS)


def _source(found: Mapping[str, object], database: SignalDatabase) -> tuple[Message, Signal]:
    name = _of(found, "signal", str, default="")
    if not name:
        raise _Wrong(".signal", "missing; it is required")
    wanted = _of(found, "message", str, default="")
    having = [
        (message, signal)
        for message in database.messages.values()
        for signal in message.signals
        if signal.name == name and wanted in ("", message.name)
    ]
    if not having:
        where = f"message {wanted} of {database.path.name}" if wanted else database.path.name
        raise _Missing(".signal", f"{where} has no signal {name!r}")
    if len(having) > 1:
        names = ", ".join(sorted(message.name for message, _ in having))
        raise _Missing(".signal", f"several messages have a signal {name}: {names}; say which with message")
    return having[0]


def _transformed(
    entry: MappingEntry, found: Mapping[str, object], datatype: str, signal: Signal
) -> MappingEntry:
    transform = found.get("transform")
    if transform is None:
        if datatype == "string":
            if not signal.choices:
                raise _Wrong("", f"signal {signal.name} has no value table, so that it gives no text")
            return replace(entry, text=True)
        if datatype == "boolean":
            texts = {int(raw): str(text) for raw, text in (signal.choices or {}).items()}
            return replace(entry, mapping=((texts.get(0, 0), False), (texts.get(1, 1), True)))
        return entry
    if not isinstance(transform, dict) or len(transform) != 1 or not transform.keys() <= {"mapping", "math"}:
        raise _Wrong(".transform", "expected either mapping or math")
    if "math" in transform:
        text = transform["math"]
        if not isinstance(text, str) or datatype not in _NUMBERS:
            raise _Wrong(".transform.math", "expected a text, for a data type that is a number")
        try:
            return replace(entry, math=arithmetic.parse(text))
        except DatabaseError as error:
            raise _Wrong(".transform.math", str(error)) from error
    pairs = transform["mapping"]
    if not isinstance(pairs, list) or not pairs:
        raise _Wrong(".transform.mapping", "expected an array of objects with from and to")
    return replace(entry, mapping=tuple(_pair(pair, n, datatype, signal) for n, pair in enumerate(pairs)))


def _pair(pair: object, nth: int, datatype: str, signal: Signal) -> tuple[SignalValue, SignalValue]:
    key = f".transform.mapping[{nth}]"
    if not isinstance(pair, dict) or pair.keys() != {"from", "to"}:
        raise _Wrong(key, "expected an object with from and to")
    before, after = pair["from"], pair["to"]
    if not isinstance(before, str | int | float) or not isinstance(after, str | int | float):
        raise _Wrong(key, "from and to are texts, numbers or truth values")
    fits = {"boolean": isinstance(after, bool), "string": isinstance(after, str)}.get(
        datatype, not isinstance(after, bool | str)
    )
    if not fits:
        raise _Wrong(f"{key}.to", f"{after!r} is no {datatype}")
    choices = {str(text) for text in (signal.choices or {}).values()}
    if isinstance(before, str) and before not in choices:
        raise _Wrong(f"{key}.from", f"the value table of signal {signal.name} has no text {before!r}")
    return before, after


def _multiplexer(found: Mapping[str, object], message: Message) -> tuple[tuple[str, int], ...]:
    listed = found.get("multiplexer", [])
    if not isinstance(listed, list):
        raise _Wrong(".multiplexer", "expected an array of objects with signal and value")
    names = {signal.name for signal in message.signals}
    filters = []
    for nth, item in enumerate(listed):
        key = f".multiplexer[{nth}]"
        if not isinstance(item, dict) or item.keys() != {"signal", "value"}:
            raise _Wrong(key, "expected an object with signal and value")
        name, value = item["signal"], item["value"]
        if not isinstance(name, str) or name not in names:
            raise _Wrong(f"{key}.signal", f"message {message.name} has no signal {name!r}")
        if type(value) is not int:
            raise _Wrong(f"{key}.value", f"expected a whole number, found {value!r}")
        filters.append((name, value))
    return tuple(filters)


def _bounded(entry: MappingEntry, node: Mapping[str, object], datatype: str) -> MappingEntry:
    """Values outside of the data type or of the tree's own limits are not used."""
    low, high = _RANGES.get(datatype, (None, None))
    return replace(entry, minimum=_limit(node, "min", low), maximum=_limit(node, "max", high))


def _limit(node: Mapping[str, object], name: str, of_type: float | None) -> float | None:
    own = node.get(name, of_type)
    if own is None:
        return None
    if isinstance(own, bool) or not isinstance(own, int | float) or abs(own) > MAX_LIMIT:
        raise _Wrong("", f"expected {name} to be a number of at most {MAX_LIMIT:g}, found {str(own)[:80]!r}")
    return float(own)


def _of(found: Mapping[str, object], key: str, kind: type[T], *, default: T) -> T:
    value = found.get(key, default)
    if type(value) is not kind:
        raise _Wrong(f".{key}", f"expected {config.name_of(kind)}, found {str(value)[:80]!r}")
    return value


def _whole(found: Mapping[str, object], key: str, least: int, default: int) -> int:
    value = _of(found, key, int, default=default)
    if not least <= value <= MAX_AGE_LIMIT_MS:
        raise _Wrong(f".{key}", f"expected {least} to {MAX_AGE_LIMIT_MS}, found {value}")
    return value
