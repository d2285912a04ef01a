"""Makes one function of each message that reads its signals from a payload.

Pure. The functions are Python, generated from the checked numbers of a table:
no text of a database or a mapping is ever part of the code; names, texts and
other values stand beside it, as constants. What a payload holds decides first
which signals are in it; only those are read. Values are those of the
database's own conversion, in value and in type.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agent.model import SignalChange, SignalValue
from agent.signals import arithmetic
from agent.signals.table import BitField, Conversion, MessageRow, Selector, SignalRow

Decode = Callable[[bytes], tuple[tuple[str, ...], tuple[SignalValue | None, ...]]]
"""Takes a payload of the message's length; returns the names of the signals that
are in it, and their values. None: it holds no value that can be used."""

_FLOATS: Final = {16: "e", 32: "f", 64: "d"}
_BYTE_BITS: Final = 8
_EXACT_BITS: Final = 32
"""Whole numbers of so few bits differ as scaled floats too, with the scales that occur."""
_FEW_BYTES: Final = 4
"""Up to so many bytes are put together one by one: quicker than a number made of a slice."""
_WORTH_UNPACKING: Final = 0.6
"""Share of the bytes that must be read before all of them are taken apart at once."""


Take = Callable[[bytes, int, int | None, list[int | None], Callable[[SignalChange], None]], None]
"""Takes a payload of the message's length, its time, the time of the frame before
it, the raw values of that frame, which it brings up to date, and what is called
with each change."""


def decoder(message: MessageRow) -> Decode:
    """The function that reads all of one message's payload."""
    return _Writer(message).decode()


def taker(message: MessageRow) -> Take | None:
    """The function that reads what is new in one message's payload.

    Returns:
        None if the message is not so simple that its raw values alone say what is new.
    """
    return _Writer(message).take() if all(map(_is_steady, message.signals)) else None


@dataclass(frozen=True, slots=True)
class _Source:
    """A signal and the multiplexers that are not decided yet, the outermost first."""

    row: SignalRow
    open: tuple[Selector, ...]


def reader(message: MessageRow, bits: BitField) -> Callable[[bytes], int]:
    """The function that reads one whole number of a payload, such as a counter."""
    return _Writer(message).read(bits)


class _Writer:
    """Writes the source of one function, and collects the constants beside it."""

    def __init__(self, message: MessageRow) -> None:
        self._message = message
        self._lines: list[str] = []
        self._names: dict[str, object] = {
            "__builtins__": {},
            "from_bytes": int.from_bytes,
            "isfinite": math.isfinite,
        }
        self._variables = 0
        fields = [b for s in message.signals for b in (s.bits, *(x.bits for x in s.selectors))]
        places = [_bytes_of(bits, message.length) for bits in set(fields)]
        read = sum(len(at) for at in places if len(at) <= _FEW_BYTES)
        self._unpacked = read >= _WORTH_UNPACKING * message.length

    def decode(self) -> Decode:
        self._begin("data")
        sources = [_Source(s, tuple(reversed(s.selectors))) for s in self._message.signals]
        self._branch(1, sources, [], [])
        function: Decode = self._end()
        return function

    def take(self) -> Take:
        self._begin("data, at_ns, before_ns, last, take")
        # SignalChange's own constructor is a function in Python.
        new, change = self._constant(tuple.__new__), self._constant(SignalChange)
        for nth, row in enumerate(self._message.signals):
            raw = self._variable()
            self._line(1, f"{raw} = {self._raw(row.bits)}")
            self._line(1, f"if {raw} != last[{nth}]:")
            self._line(2, f"last[{nth}] = {raw}")
            value = self._converted(2, raw, row.bits, row.conversion)
            self._line(2, f"take({new}({change}, ({self._constant(row.vss)}, {value}, at_ns, before_ns)))")
        function: Take = self._end()
        return function

    def read(self, bits: BitField) -> Callable[[bytes], int]:
        self._unpacked = False
        self._begin("data")
        self._line(1, f"return {self._raw(bits)}")
        function: Callable[[bytes], int] = self._end()
        return function

    def _begin(self, parameters: str) -> None:
        self._lines.append(f"def f({parameters}):")
        if self._unpacked:
            every = ", ".join(f"b{n}" for n in range(self._message.length))
            self._line(1, f"{every}{',' if self._message.length == 1 else ''} = data")

    def _end(self) -> Any:
        exec(compile("\n".join(self._lines), "<decoder>", "exec"), self._names)  # noqa: S102 (numbers only)
        return self._names["f"]

    def _branch(
        self, indent: int, sources: Sequence[_Source], names: Sequence[str], values: Sequence[str]
    ) -> None:
        """Reads what is certain here, then asks one multiplexer for the rest."""
        names, values = list(names), list(values)
        chosen = next((s.open[0].bits for s in sources if s.open), None)
        inside: list[_Source] = []
        for source in sources:
            if source.open and source.open[0].bits == chosen:
                inside.append(source)
                continue
            # Of several multiplexers beside one another only one makes branches.
            names.append(source.row.vss)
            values.append(self._value(indent, source))
        if chosen is None:
            self._line(
                indent, f"return {self._constant(tuple(names))}, ({''.join(f'{v}, ' for v in values)})"
            )
            return
        selected = self._raw(chosen)
        groups: dict[tuple[int, ...], list[int]] = {}
        by_id: dict[int, list[int]] = {}
        for nth, source in enumerate(inside):
            for number in source.open[0].ids:
                by_id.setdefault(number, []).append(nth)
        for number, members in by_id.items():
            groups.setdefault(tuple(members), []).append(number)
        branches = list(groups)
        index = {number: nth for nth, members in enumerate(branches) for number in groups[members]}
        variable = self._variable()
        self._line(indent, f"{variable} = {self._constant(index)}.get({selected}, {len(branches)})")

        def leaf(at: int, nth: int) -> None:
            members = branches[nth] if nth < len(branches) else ()
            self._branch(at, [_Source(inside[m].row, inside[m].open[1:]) for m in members], names, values)

        self._tree(indent, variable, (0, len(branches) + 1), leaf)

    def _tree(
        self, indent: int, variable: str, span: tuple[int, int], leaf: Callable[[int, int], None]
    ) -> None:
        """Decides among many branches in few comparisons."""
        low, high = span
        if high - low == 1:
            leaf(indent, low)
            return
        middle = (low + high) // 2
        self._line(indent, f"if {variable} < {middle}:")
        self._tree(indent + 1, variable, (low, middle), leaf)
        self._tree(indent, variable, (middle, high), leaf)

    # --- values --------------------------------------------------------------

    def _value(self, indent: int, source: _Source) -> str:
        """Writes what a signal's value needs, and returns the expression of it."""
        bits, conversion = source.row.bits, source.row.conversion
        raw, result = self._raw(bits), ""
        if source.open:
            result = self._variable()
            self._line(indent, f"{result} = None")
            condition = " and ".join(
                f"{self._raw(s.bits)} in {self._constant(frozenset(s.ids))}" for s in source.open
            )
            self._line(indent, f"if {condition}:")
            indent += 1
        value = self._converted(indent, raw, bits, conversion)
        if not result:
            return value
        self._line(indent, f"{result} = {value}")
        return result

    def _converted(self, indent: int, raw: str, bits: BitField, conversion: Conversion) -> str:
        if conversion.only_by_raw:
            return f"{self._constant(dict(conversion.by_raw))}.get({raw})"
        if not _is_plain(conversion):
            function = self._constant(_slow(conversion))
            return f"{function}({raw})"
        value = _linear(raw, conversion.scale, conversion.offset, is_float=bits.is_float)
        if (conversion.factor, conversion.shift) != (1.0, 0.0):
            value = f"({value}) * {conversion.factor!r} + {conversion.shift!r}"
        if not bits.is_float:
            return value
        variable = self._variable()
        self._line(indent, f"{variable} = {value}")
        return f"{variable} if isfinite({variable}) else None"

    def _raw(self, bits: BitField) -> str:
        """The expression of a raw value."""
        at = _bytes_of(bits, self._message.length)
        number = self._joined(at) if len(at) <= _FEW_BYTES else _sliced(bits, at)
        down = bits.shift % _BYTE_BITS
        if down:
            number = f"{number} >> {down}"
        if down + bits.length < _BYTE_BITS * len(at):
            number = f"{number} & {(1 << bits.length) - 1}"
        if bits.is_float:
            unpack = self._constant(struct.Struct(f"<{_FLOATS[bits.length]}").unpack)
            to_bytes = self._constant(int.to_bytes)
            return f'{unpack}({to_bytes}({number}, {bits.length // _BYTE_BITS}, "little"))[0]'
        if bits.is_signed:
            half = 1 << (bits.length - 1)
            return f"(({number} ^ {half}) - {half})"
        return f"({number})"

    def _joined(self, at: Sequence[int]) -> str:
        """Few bytes put together, the most significant one first."""
        parts = []
        for nth, byte in enumerate(at):
            up = _BYTE_BITS * (len(at) - 1 - nth)
            name = f"b{byte}" if self._unpacked else f"data[{byte}]"
            parts.append(f"{name} << {up}" if up else name)
        return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"

    # --- text ------------------------------------------------------------------

    def _line(self, indent: int, text: str) -> None:
        self._lines.append(" " * indent + text)

    def _variable(self) -> str:
        self._variables += 1
        return f"v{self._variables}"

    def _constant(self, value: object) -> str:
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name


def _bytes_of(bits: BitField, length: int) -> tuple[int, ...]:
    """The bytes that hold it, the most significant one first."""
    low, high = bits.shift // _BYTE_BITS, (bits.end - 1) // _BYTE_BITS
    places = range(high, low - 1, -1)
    return tuple(length - 1 - p for p in places) if bits.is_big_endian else tuple(places)


def _sliced(bits: BitField, at: Sequence[int]) -> str:
    """Many bytes as one number."""
    order = '"big"' if bits.is_big_endian else '"little"'
    return f"from_bytes(data[{min(at)}:{max(at) + 1}], {order})"


def _linear(raw: str, scale: float, offset: float, *, is_float: bool) -> str:
    """What the database's conversion computes, without the steps that change nothing."""
    value = raw
    if scale != 1 or (isinstance(scale, float) and offset != 0):
        value = f"{value} * {scale!r}"
    # A product of a whole number and a positive scale is never -0.0, which + 0 would change.
    if offset != 0 or (scale != 1 and (is_float or scale <= 0)):
        value = f"{value} + {offset!r}"
    return value


def _is_plain(conversion: Conversion) -> bool:
    """Whether the value is the number alone; whole raw numbers then always make finite ones (MAX_FACTOR)."""
    no_tables = not (conversion.by_raw or conversion.excluded) and conversion.by_number is None
    no_bounds = conversion.minimum is conversion.maximum is conversion.invalid_from is None
    return no_tables and no_bounds and not conversion.math


def _is_steady(row: SignalRow) -> bool:
    """Whether each frame holds its value, and another raw value is another value."""
    conversion = row.conversion
    is_exact = row.bits.length <= _EXACT_BITS and not row.bits.is_float and conversion.scale != 0
    return is_exact and _is_plain(conversion) and not (row.selectors or row.interval_ms)


def _slow(conversion: Conversion) -> Callable[[float], SignalValue | None]:
    """Conversions with tables, arithmetic or bounds."""
    by_raw: Mapping[float, SignalValue] = dict(conversion.by_raw)
    excluded = frozenset(conversion.excluded)
    invalid_from = math.inf if conversion.invalid_from is None else conversion.invalid_from
    by_number = None if conversion.by_number is None else dict(conversion.by_number)
    calculate = arithmetic.compiled(conversion.math) if conversion.math else None
    low = -math.inf if conversion.minimum is None else conversion.minimum
    high = math.inf if conversion.maximum is None else conversion.maximum
    scale, offset = conversion.scale, conversion.offset
    is_scaled = (conversion.factor, conversion.shift) != (1.0, 0.0)

    def value(raw: float) -> SignalValue | None:
        if raw in by_raw:
            return by_raw[raw]
        if raw in excluded or raw >= invalid_from:
            return None
        number = raw if (scale, offset) == (1, 0) else raw * scale + offset
        if by_number is not None:
            return by_number.get(number)
        if calculate is not None:
            result = calculate(number)
            if result is None:
                return None
            number = result
        if is_scaled:
            number = number * conversion.factor + conversion.shift
        return number if math.isfinite(number) and low <= number <= high else None

    return value
