"""What a database and a mapping compile to: numbers and texts that say how frames are read.

Pure, and plain data: a table can be written to a file and read back by a start
that has no time for a database. Every table is checked when it is made, from
whichever source, because code is generated from its numbers.
Raises only DatabaseError.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from agent.errors import DatabaseError
from agent.model import SignalInfo, SignalValue
from agent.signals import arithmetic
from agent.signals.checks import Check

FORMAT: Final = 1
"""Version of the table's form and meaning; a table of another version is compiled again."""
CAN_EFF_FLAG: Final = 0x8000_0000
"""Set in a `can_id` of 29 bits (include/uapi/linux/can.h)."""

MAX_FRAME_BYTES: Final = 64
"""Longest payload of one frame (CAN FD, ISO 11898-1:2015)."""
MAX_MULTIPLEXER_DEPTH: Final = 8
"""Deepest chain of multiplexers that select one another."""
MAX_SIGNALS: Final = 65_536
"""Most signals of one table."""
MAX_FACTOR: Final = 1e60
"""Largest scale or offset; with it no whole number of a frame leaves the range of floats."""

_FLOAT_BITS: Final = (16, 32, 64)
_NS_PER_MS: Final = 1_000_000


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise DatabaseError(f"a table of signals is refused: {what}")


@dataclass(frozen=True, slots=True)
class BitField:
    """Where a raw value lies in a payload.

    Args:
        shift: position of its lowest bit in the payload taken as one number.
        length: number of bits.
        is_big_endian: the number's first byte is the most significant one.
    """

    shift: int
    length: int
    is_big_endian: bool
    is_signed: bool
    is_float: bool

    def __post_init__(self) -> None:
        _require(self.shift >= 0 and self.length >= 1, "bits that do not exist")
        _require(self.end <= 8 * MAX_FRAME_BYTES, "bits beyond every frame")
        _require(not self.is_float or self.length in _FLOAT_BITS, "a float of unknown form")

    @property
    def end(self) -> int:
        """Bits of the shortest payload that holds it."""
        return self.shift + self.length

    def mask(self, message_length: int) -> int:
        """The bits it takes of the payload as a little-endian number."""
        mask = ((1 << self.length) - 1) << self.shift
        if self.is_big_endian:
            return int.from_bytes(mask.to_bytes(message_length, "big"), "little")
        return mask


@dataclass(frozen=True, slots=True)
class Selector:
    """A multiplexer and the raw values for which a signal is in the frame."""

    bits: BitField
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(not self.bits.is_float, "a multiplexer that is no whole number")


@dataclass(frozen=True, slots=True)
class Conversion:
    """How a raw value becomes the signal's value, in this order.

    Args:
        scale, offset: physical value = raw * scale + offset; whole numbers
            keep whole values whole, as in the database's own conversion.
        by_raw: values of raw numbers, such as those with a text.
        excluded: raw numbers that are no quantity and have no value.
        invalid_from: raw numbers from this one on have no value.
        by_number: values of physical numbers; any other has none. None: the
            number itself is the value.
        only_by_raw: a raw number that `by_raw` does not list has no value.
        math: arithmetic on the physical value; empty: none.
        factor, shift: value = that * factor + shift, the mapping's own scale.
        minimum, maximum: a number outside of them is no value.
    """

    scale: int | float = 1
    offset: int | float = 0
    by_raw: tuple[tuple[int, SignalValue], ...] = ()
    excluded: tuple[int, ...] = ()
    invalid_from: int | None = None
    by_number: tuple[tuple[int | float, SignalValue], ...] | None = None
    only_by_raw: bool = False
    math: arithmetic.Program = ()
    factor: float = 1.0
    shift: float = 0.0
    minimum: float | None = None
    maximum: float | None = None

    def __post_init__(self) -> None:
        for number in (self.scale, self.offset, self.factor, self.shift):
            _require(abs(number) <= MAX_FACTOR, f"a scale or offset of more than {MAX_FACTOR:g}")
        for bound in (self.minimum, self.maximum):
            _require(bound is None or math.isfinite(bound), "a bound that is not finite")
        if self.math:
            arithmetic.check(self.math)


@dataclass(frozen=True, slots=True)
class SignalRow:
    """How one signal is read from its message, and what is known of it.

    Args:
        vss: VSS name.
        resolution: smallest step of its values, in its unit; 0 if not numeric.
        max_age_ms: age from which its value counts as unknown.
        interval_ms: shortest time between two values that are taken; 0: every one is.
    """

    vss: str
    unit: str
    resolution: float
    max_age_ms: int
    interval_ms: int
    bits: BitField
    selectors: tuple[Selector, ...]
    conversion: Conversion

    def __post_init__(self) -> None:
        _require(len(self.selectors) <= MAX_MULTIPLEXER_DEPTH, "a chain of multiplexers without end")
        _require(self.max_age_ms > 0 and self.interval_ms >= 0, "an age or interval below 0")


@dataclass(frozen=True, slots=True)
class MessageRow:
    """How the frames of one message are recognised, checked and read.

    Args:
        can_id: identifier, with CAN_EFF_FLAG if it has 29 bits.
        any_source: frames of the same SAE J1939 parameter group from any
            source address, at any priority, are this message.
        length: payload length in bytes; a shorter frame is not used.
        check: its integrity scheme.
        counter: where the alive counter is.
        counter_modulus: number of values that the counter runs through.
    """

    name: str
    can_id: int
    any_source: bool
    length: int
    signals: tuple[SignalRow, ...]
    check: Check | None = None
    counter: BitField | None = None
    counter_modulus: int = 1

    def __post_init__(self) -> None:
        highest = CAN_EFF_FLAG | 0x1FFF_FFFF if self.can_id & CAN_EFF_FLAG else 0x7FF
        _require(0 <= self.can_id <= highest, "an identifier that does not exist")
        _require(self.can_id & CAN_EFF_FLAG != 0 or not self.any_source, "a parameter group of 11 bits")
        _require(1 <= self.length <= MAX_FRAME_BYTES, "a message longer than a frame")
        _require(bool(self.signals), "a message without signals")
        _require(self.counter_modulus >= 1, "a counter that does not count")
        _require(self.counter is None or not self.counter.is_float, "a counter that is no whole number")
        for bits in self._fields():
            _require(bits.end <= 8 * self.length, "bits beyond their message")
        if self.check is not None:
            _require(self.check.least_length <= self.length, "a check beyond its message")

    @property
    def key(self) -> tuple[bool, int]:
        """What its frames are recognised by: the parameter group, or the whole identifier."""
        return self.any_source, parameter_group(self.can_id) if self.any_source else self.can_id

    def _fields(self) -> Iterator[BitField]:
        if self.counter is not None:
            yield self.counter
        for signal in self.signals:
            yield signal.bits
            for selector in signal.selectors:
                yield selector.bits

    @property
    def mask(self) -> int:
        """The bits that can change a value, of the payload taken as a little-endian number."""
        mask = 0
        for signal in self.signals:
            mask |= signal.bits.mask(self.length)
            for selector in signal.selectors:
                mask |= selector.bits.mask(self.length)
        return mask


@dataclass(frozen=True, slots=True)
class Table:
    """How the frames of one bus are read.

    Args:
        notes: what of the mapping is not used: (key in its file, reason).
    """

    messages: tuple[MessageRow, ...]
    notes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        _require(len({m.key for m in self.messages}) == len(self.messages), "two messages of one identifier")
        names = [s.vss for m in self.messages for s in m.signals]
        _require(len(names) <= MAX_SIGNALS, f"more than {MAX_SIGNALS} signals")
        _require(len(names) == len(set(names)), "two signals of one name")

    @property
    def can_ids(self) -> frozenset[int] | None:
        """The identifiers that a bus has to receive, flags as in the kernel; None: all."""
        if any(m.any_source for m in self.messages):
            return None
        return frozenset(m.can_id for m in self.messages)

    @property
    def infos(self) -> dict[str, SignalInfo]:
        """What is known of each signal, by VSS name."""
        return {
            s.vss: SignalInfo(s.vss, s.unit, s.resolution, s.max_age_ms * _NS_PER_MS)
            for m in self.messages
            for s in m.signals
        }


def parameter_group(can_id: int) -> int:
    """The parameter group number of a 29-bit identifier (SAE J1939-21, 5.2)."""
    # Below 240 the next byte is a destination and no part of the number (PDU 1).
    is_addressed = can_id >> 16 & 0xFF < 240  # noqa: PLR2004
    return can_id >> 8 & (0x3FF00 if is_addressed else 0x3FFFF)


# --- as bytes ----------------------------------------------------------------


def source_key(database: bytes, mapping: bytes, kinds: str) -> str:
    """Names what a table was compiled from, and by which version; hex.

    Args:
        database, mapping: the files as they are.
        kinds: how they are read, such as ".dbc .toml".
    """
    digest = hashlib.sha256(f"{FORMAT} {kinds}".encode())
    for content in (database, mapping):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def to_bytes(table: Table, key: str) -> bytes:
    """The table as a file: its key, the hash of its content, and its content as JSON."""
    body = json.dumps(dataclasses.asdict(table), allow_nan=False, separators=(",", ":")).encode()
    return f"{_MAGIC} {key} {hashlib.sha256(body).hexdigest()}\n".encode() + body


def from_bytes(content: bytes, key: str) -> Table:
    """The table of a file, if it was made from the sources of `key` and is whole.

    Raises:
        DatabaseError: it was not, or is not.
    """
    head, _, body = content.partition(b"\n")
    if head != f"{_MAGIC} {key} {hashlib.sha256(body).hexdigest()}".encode():
        raise DatabaseError("a stored table of signals is damaged, or of other files")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DatabaseError(f"a stored table of signals is not JSON: {error}") from error
    table: Table = _read(found, Table)
    return table


_MAGIC: Final = "openfod-signals"


def _read(found: object, kind: Any) -> Any:
    """A value of JSON as a value of `kind`, exactly: no other type will do."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        if not isinstance(found, dict) or found.keys() != hints.keys():
            raise DatabaseError(f"a stored table of signals has another {kind.__name__}")
        return kind(**{name: _read(found[name], hint) for name, hint in hints.items()})
    origin = typing.get_origin(kind)
    if origin is tuple:
        return _read_tuple(found, typing.get_args(kind))
    if origin in (types.UnionType, typing.Union):
        for choice in typing.get_args(kind):
            if found is None and choice is types.NoneType:
                return None
            if typing.get_origin(choice) or dataclasses.is_dataclass(choice):
                if found is not None:
                    return _read(found, choice)
            elif type(found) is choice:
                return _read(found, choice)
    elif type(found) is kind and (kind is not float or math.isfinite(found)):  # type: ignore[arg-type]
        return found
    raise DatabaseError(f"a stored table of signals holds {str(found)[:40]!r} in place of {kind}")


def _read_tuple(found: object, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if isinstance(found, list):
        if kinds[-1] is ...:
            return tuple(_read(value, kinds[0]) for value in found)
        if len(found) == len(kinds):
            return tuple(_read(value, kind) for value, kind in zip(found, kinds, strict=True))
    raise DatabaseError("a stored table of signals holds something else in place of a list")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
