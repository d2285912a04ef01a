"""Compiles a database and a mapping into the table that the frames of a bus are read by.

Pure. Needs the database's library, which a start that has a stored table never
loads. A signal that cannot be read exactly is refused here: one that does not
fit in its message, whose multiplexers have no end or are scaled, or that no
single frame can hold.
Raises only DatabaseError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from cantools.database.can import Message, Signal
from cantools.database.conversion import BaseConversion

from agent.errors import DatabaseError
from agent.model import SignalValue
from agent.signals.checks import E2E1_COUNTER_VALUES, Check, Scheme
from agent.signals.database import SignalDatabase
from agent.signals.mapping import MappingEntry, MessageSettings, SignalMapping
from agent.signals.table import (
    CAN_EFF_FLAG,
    MAX_FRAME_BYTES,
    MAX_MULTIPLEXER_DEPTH,
    BitField,
    Conversion,
    MessageRow,
    Selector,
    SignalRow,
    Table,
)

_FLOAT_BITS: Final = (16, 32, 64)


def compile_table(database: SignalDatabase, mapping: SignalMapping) -> Table:
    """The table of one bus.

    Args:
        mapping: entries whose names are in the database, as `mapping.read` returns them.

    Raises:
        DatabaseError: a signal cannot be read exactly, or a message lacks what
            its integrity scheme needs.
    """
    entries: dict[str, list[MappingEntry]] = {}
    for entry in mapping.entries:
        entries.setdefault(entry.message, []).append(entry)
    settings = {s.name: s for s in mapping.messages}
    rows: dict[tuple[bool, int], MessageRow] = {}
    for name, of_message in entries.items():
        row = _message_row(database.messages[name], of_message, settings.get(name, MessageSettings(name)))
        if row.key in rows:
            raise DatabaseError(
                f"{database.path}: messages {rows[row.key].name} and {name} both have the "
                f"identifier 0x{row.can_id & ~CAN_EFF_FLAG:X}; only one of them can be subscribed"
            )
        rows[row.key] = row
    return Table(tuple(rows.values()), mapping.notes)


def _message_row(message: Message, entries: Sequence[MappingEntry], settings: MessageSettings) -> MessageRow:
    if message.is_container:
        raise DatabaseError(f"message {message.name} is a container; its signals cannot be subscribed")
    if not 1 <= message.length <= MAX_FRAME_BYTES:
        raise DatabaseError(
            f"message {message.name} has {message.length} bytes; one frame holds 1 to {MAX_FRAME_BYTES}"
        )
    if settings.any_source and not message.is_extended_frame:
        raise DatabaseError(f"message {message.name}: any_source is for 29-bit identifiers (SAE J1939)")
    by_name = {signal.name: signal for signal in message.signals}
    signals = tuple(_signal_row(message, by_name, e, is_j1939=settings.any_source) for e in entries)
    counter, modulus = _counter(message, by_name, settings)
    check = None
    if settings.check is not None:
        _find_checksum(message, by_name, settings.check)
        check = Check(
            scheme=settings.check.value,
            data_id=settings.data_id,
            data_id_mode=settings.data_id_mode.value,
            data_ids=settings.data_ids,
            offset=settings.offset,
        )
        if check.least_length > message.length:
            raise DatabaseError(f"message {message.name} is too short for check {check.scheme}")
    return MessageRow(
        name=message.name,
        can_id=message.frame_id | (CAN_EFF_FLAG if message.is_extended_frame else 0),
        any_source=settings.any_source,
        length=message.length,
        signals=signals,
        check=check,
        counter=counter,
        counter_modulus=modulus,
    )


def _signal_row(
    message: Message, by_name: Mapping[str, Signal], entry: MappingEntry, *, is_j1939: bool
) -> SignalRow:
    signal = by_name[entry.signal]
    bits = _bits(message, signal)
    conversion = _conversion(signal, bits, entry, is_j1939=is_j1939)
    has_step = conversion.by_number is None and not (conversion.only_by_raw or entry.math or bits.is_float)
    return SignalRow(
        vss=entry.vss,
        unit=entry.unit,
        resolution=abs(float(conversion.scale) * entry.scale) if has_step else 0.0,
        max_age_ms=entry.max_age_ms,
        interval_ms=entry.interval_ms,
        bits=bits,
        selectors=(*_selectors(message, by_name, signal), *_filters(message, by_name, entry)),
        conversion=conversion,
    )


def _selectors(message: Message, by_name: Mapping[str, Signal], signal: Signal) -> Iterable[Selector]:
    selected, depth = signal, 0
    while selected.multiplexer_signal is not None and selected.multiplexer_ids is not None:
        multiplexer = by_name.get(selected.multiplexer_signal)
        if multiplexer is None or depth >= MAX_MULTIPLEXER_DEPTH:
            raise DatabaseError(
                f"message {message.name}, signal {signal.name}: its chain of multiplexers has no end"
            )
        yield Selector(_whole(message, multiplexer), tuple(sorted(set(selected.multiplexer_ids))))
        selected, depth = multiplexer, depth + 1


def _filters(message: Message, by_name: Mapping[str, Signal], entry: MappingEntry) -> Iterable[Selector]:
    for name, number in entry.only_if:
        yield Selector(_whole(message, by_name[name]), (number,))


def _whole(message: Message, multiplexer: Signal) -> BitField:
    """The bits of a signal whose raw number selects others."""
    conversion = multiplexer.conversion
    if (conversion.scale, conversion.offset) != (1, 0) or conversion.is_float:
        # Readers differ in whether the raw or the scaled number selects.
        raise DatabaseError(f"message {message.name}: multiplexer {multiplexer.name} is scaled")
    return _bits(message, multiplexer)


def _bits(message: Message, signal: Signal) -> BitField:
    is_big_endian = signal.byte_order == "big_endian"
    if is_big_endian:
        # A big-endian signal starts at its highest bit; bits of a byte are numbered from the right.
        first = 8 * (signal.start // 8) + 7 - signal.start % 8
        shift = 8 * message.length - first - signal.length
    else:
        shift = signal.start
    if shift < 0 or signal.length < 1 or shift + signal.length > 8 * message.length:
        raise DatabaseError(
            f"message {message.name} has {message.length} bytes; signal {signal.name} "
            f"(start bit {signal.start}, {signal.length} bits) does not fit in it"
        )
    is_float = signal.conversion.is_float
    if is_float and signal.length not in _FLOAT_BITS:
        raise DatabaseError(
            f"message {message.name}, signal {signal.name}: expected a floating point number of "
            f"16, 32 or 64 bits; found {signal.length}"
        )
    return BitField(shift, signal.length, is_big_endian, bool(signal.is_signed) and not is_float, is_float)


def _conversion(signal: Signal, bits: BitField, entry: MappingEntry, *, is_j1939: bool) -> Conversion:
    own = signal.conversion
    # Which kind of numbers it computes with is the library's own decision.
    linear = BaseConversion.factory(own.scale, own.offset, None, own.is_float)
    choices = {int(raw): str(text) for raw, text in (signal.choices or {}).items()}
    by_raw: tuple[tuple[int, SignalValue], ...] = ()
    by_number: tuple[tuple[int | float, SignalValue], ...] | None = None
    excluded: tuple[int, ...] = ()
    if entry.text:
        by_raw = tuple(choices.items())
    elif entry.mapping is not None:
        outputs: dict[SignalValue, SignalValue] = {}
        for found, value in entry.mapping:
            outputs.setdefault(found, value)
        by_raw = tuple((raw, outputs[text]) for raw, text in choices.items() if text in outputs)
        numbers = tuple((k, v) for k, v in outputs.items() if isinstance(k, int | float))
        by_number = numbers or None
    if entry.mapping is not None or entry.math:
        # A number that has a text is a state such as "not available", and no quantity.
        excluded = tuple(sorted(set(choices) - {raw for raw, _ in by_raw}))
    invalid_from = None
    if is_j1939 and not (bits.is_float or bits.is_signed or entry.text) and bits.length > 1:
        # SAE J1939-71, 5.1.4: the highest byte 0xFE says error, 0xFF not available; fewer bits all ones.
        whole = bits.length - 8
        invalid_from = 0xFE << whole if whole >= 0 else (1 << bits.length) - 1
    return Conversion(
        scale=linear.scale,
        offset=linear.offset,
        by_raw=by_raw,
        excluded=excluded,
        invalid_from=invalid_from,
        by_number=by_number,
        only_by_raw=entry.text or (entry.mapping is not None and by_number is None),
        math=entry.math,
        factor=entry.scale,
        shift=entry.offset,
        minimum=entry.minimum,
        maximum=entry.maximum,
    )


def _counter(
    message: Message, by_name: Mapping[str, Signal], settings: MessageSettings
) -> tuple[BitField | None, int]:
    """Where the counter is and how many values it has."""
    at = settings.offset
    match settings.check:
        case Scheme.E2E_1:
            return BitField(8 * at + 8, 4, False, False, False), E2E1_COUNTER_VALUES
        case Scheme.E2E_2:
            return BitField(8, 4, False, False, False), 16
        case Scheme.E2E_5:
            return BitField(8 * at + 16, 8, False, False, False), 256
        case Scheme.OPENFOD_J1850:
            name, modulus = f"{message.name}_COUNTER", 15
        case Scheme.HONDA | Scheme.SUBARU | Scheme.CHRYSLER | Scheme.HYUNDAI_CANFD:
            name, modulus = settings.counter or "COUNTER", 0
        case _:
            name, modulus = settings.counter, 0
    if not name:
        return None, 1
    signal = by_name.get(name)
    if signal is None:
        what = f"check {settings.check.value}" if settings.check else "its counter"
        raise DatabaseError(f"message {message.name}: {what} needs the signal {name}")
    bits = _whole(message, signal)
    return bits, modulus or 1 << bits.length


# Where a scheme has its checksum, and what the maker's databases call the signal.
_CHECKSUMS: Final[Mapping[Scheme, tuple[str, BitField]]] = MappingProxyType(
    {
        Scheme.OPENFOD_J1850: ("{message}_CRC", BitField(0, 8, False, False, False)),
        Scheme.HONDA: ("CHECKSUM", BitField(0, 4, True, False, False)),
        Scheme.TOYOTA: ("CHECKSUM", BitField(0, 8, True, False, False)),
        Scheme.SUBARU: ("CHECKSUM", BitField(0, 8, False, False, False)),
        Scheme.CHRYSLER: ("CHECKSUM", BitField(0, 8, True, False, False)),
        Scheme.HYUNDAI_CANFD: ("CHECKSUM", BitField(0, 16, False, False, False)),
    }
)


def _find_checksum(message: Message, by_name: Mapping[str, Signal], scheme: Scheme) -> None:
    """Refuses a message whose checksum is not where the scheme has it."""
    if scheme not in _CHECKSUMS:
        return
    form, place = _CHECKSUMS[scheme]
    name = form.format(message=message.name)
    signal = by_name.get(name)
    if signal is None:
        raise DatabaseError(f"message {message.name}: check {scheme.value} needs the signal {name}")
    if place.end > 8 * message.length or _bits(message, signal).mask(message.length) != place.mask(
        message.length
    ):
        raise DatabaseError(f"message {message.name}: {name} is not where check {scheme.value} has it")
    if scheme is Scheme.OPENFOD_J1850 and message.is_extended_frame:
        raise DatabaseError(f"message {message.name}: check {scheme.value} is for 11-bit identifiers")
