"""Compiles a database and a mapping into what each frame of a bus is decoded with.

Pure: no I/O, no clock, no randomness. Only subscribed signals are looked at. A
mask of their bits, and of the multiplexers that select them, tells cheaply
whether a frame can change any value, so that alive counters and checksums do
not defeat the comparison. Bits are cut out of the whole payload taken as one
number: unlike a packed format this stays right where a database's signals
overlap. Values are those of the database's own conversion.
Raises only DatabaseError, and only while compiling.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from cantools.database.can import Message, Signal

from agent.errors import DatabaseError
from agent.model import SignalInfo, SignalValue
from agent.signals.database import SignalDatabase
from agent.signals.mapping import Check, MappingEntry

NS_PER_MS: Final = 1_000_000

MAX_MULTIPLEXER_DEPTH: Final = 8
"""Deepest chain of multiplexers that select one another."""

FrameKey = tuple[int, bool]
"""CAN identifier, and whether it has 29 bits."""

_FLOATS: Final = {16: ("<e", 2), 32: ("<f", 4), 64: ("<d", 8)}


@dataclass(frozen=True, slots=True)
class Bits:
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

    def raw(self, little: int, big: int) -> int | float:
        """Cuts the raw value out of the payload, given as a number in both byte orders."""
        bits = ((big if self.is_big_endian else little) >> self.shift) & ((1 << self.length) - 1)
        if self.is_float:
            code, size = _FLOATS[self.length]
            (value,) = struct.unpack(code, bits.to_bytes(size, "little"))
            return float(value)
        if self.is_signed and bits >> (self.length - 1):
            return bits - (1 << self.length)
        return bits

    def mask(self, message_length: int) -> int:
        """The bits it takes of the payload as a little-endian number."""
        mask = ((1 << self.length) - 1) << self.shift
        if self.is_big_endian:
            return int.from_bytes(mask.to_bytes(message_length, "big"), "little")
        return mask


@dataclass(frozen=True, slots=True)
class Selector:
    """A multiplexer and the values for which a signal is in the frame."""

    bits: Bits
    ids: frozenset[int]


@dataclass(frozen=True, slots=True)
class SignalPlan:
    """How one subscribed signal is read from its message."""

    vss: str
    signal: Signal
    bits: Bits
    selectors: tuple[Selector, ...]
    scale: float
    offset: float
    texts: Mapping[int, str] | None

    def value(self, little: int, big: int) -> SignalValue | None:
        """The signal's value; None if the frame does not carry one that can be used."""
        for selector in self.selectors:
            if selector.bits.raw(little, big) not in selector.ids:
                return None
        raw = self.bits.raw(little, big)
        if self.texts is not None:
            return self.texts.get(raw) if isinstance(raw, int) else None
        scaled = self.signal.conversion.raw_to_scaled(raw, decode_choices=False)
        if not isinstance(scaled, int | float):
            return None
        if self.scale != 1 or self.offset != 0:
            scaled = scaled * self.scale + self.offset
        return scaled if math.isfinite(scaled) else None


@dataclass(frozen=True, slots=True)
class MessagePlan:
    """How the frames of one message are checked and decoded.

    Args:
        length: payload length in bytes; a shorter frame is invalid.
        mask: the bits that can change a subscribed value, of the payload
            taken as a little-endian number.
        counter: where the alive counter is, if the message is checked.
        counter_modulus: number of values that the counter runs through.
    """

    bus: str
    name: str
    key: FrameKey
    length: int
    mask: int
    signals: tuple[SignalPlan, ...]
    check: Check | None
    counter: Bits | None
    counter_modulus: int

    def passes_check(self, data: bytes) -> bool:
        """Whether the payload's checksum is right; True where none is declared."""
        if self.check is Check.OPENFOD_J1850:
            return j1850_crc(self.key[0], data) == data[0] and data[1] & 0xF < self.counter_modulus
        if self.check is Check.HONDA:
            return honda_checksum(self.key[0], data[: self.length]) == data[self.length - 1] & 0xF
        return True

    def decode(self, data: bytes) -> dict[str, SignalValue | None]:
        """All subscribed signals of a payload of at least `length` bytes; None: not in it."""
        little = int.from_bytes(data[: self.length], "little")
        big = int.from_bytes(data[: self.length], "big")
        return {signal.vss: signal.value(little, big) for signal in self.signals}


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What to do with the frames of one bus.

    Args:
        messages: by CAN identifier; frames of any other identifier are not wanted.
        infos: what is known of each signal that this bus brings, by VSS name.
    """

    bus_name: str
    messages: Mapping[FrameKey, MessagePlan]
    infos: Mapping[str, SignalInfo]

    @property
    def can_ids(self) -> frozenset[FrameKey]:
        """The identifiers that the bus has to be filtered for."""
        return frozenset(self.messages)

    @classmethod
    def compile(
        cls,
        database: SignalDatabase,
        mapping: Iterable[MappingEntry],
        bus_name: str,
        subscribed: Iterable[str],
    ) -> DecodePlan:
        """Makes the plan of one bus.

        Args:
            mapping: entries whose names are in the database, as `mapping.load` returns them.
            subscribed: VSS names wanted; those that this mapping does not have
                are left out: another bus may bring them.

        Raises:
            DatabaseError: a subscribed signal does not fit in its message, or
                a message lacks what its integrity scheme needs.
        """
        wanted = set(subscribed)
        entries: dict[str, list[MappingEntry]] = {}
        for entry in mapping:
            if entry.vss in wanted:
                entries.setdefault(entry.message, []).append(entry)
        messages: dict[FrameKey, MessagePlan] = {}
        infos: dict[str, SignalInfo] = {}
        for name, of_message in entries.items():
            plan = _message_plan(bus_name, database.messages[name], of_message)
            if plan.key in messages:
                raise DatabaseError(
                    f"{database.path}: messages {messages[plan.key].name} and {name} both have the "
                    f"identifier 0x{plan.key[0]:X}; only one of them can be subscribed"
                )
            messages[plan.key] = plan
            infos |= {e.vss: _info(e, s.signal) for e, s in zip(of_message, plan.signals, strict=True)}
        return cls(bus_name, MappingProxyType(messages), MappingProxyType(infos))


def _message_plan(bus: str, message: Message, entries: Sequence[MappingEntry]) -> MessagePlan:
    if message.is_container:
        raise DatabaseError(f"message {message.name} is a container; its signals cannot be subscribed")
    by_name = {signal.name: signal for signal in message.signals}
    signals = tuple(_signal_plan(message, by_name, entry) for entry in entries)
    mask = 0
    for signal in signals:
        mask |= signal.bits.mask(message.length)
        for selector in signal.selectors:
            mask |= selector.bits.mask(message.length)
    check = entries[0].check
    counter, modulus = _counter(message, by_name, check)
    key = (message.frame_id, message.is_extended_frame)
    return MessagePlan(bus, message.name, key, message.length, mask, signals, check, counter, modulus)


def _signal_plan(message: Message, by_name: Mapping[str, Signal], entry: MappingEntry) -> SignalPlan:
    signal = by_name[entry.signal]
    selectors: list[Selector] = []
    selected = signal
    while selected.multiplexer_signal is not None and selected.multiplexer_ids is not None:
        multiplexer = by_name.get(selected.multiplexer_signal)
        if multiplexer is None or len(selectors) >= MAX_MULTIPLEXER_DEPTH:
            raise DatabaseError(
                f"message {message.name}, signal {entry.signal}: its chain of multiplexers has no end"
            )
        selectors.append(Selector(_bits(message, multiplexer), frozenset(selected.multiplexer_ids)))
        selected = multiplexer
    texts = {raw: str(text) for raw, text in (signal.choices or {}).items()} if entry.text else None
    return SignalPlan(
        vss=entry.vss,
        signal=signal,
        bits=_bits(message, signal),
        selectors=tuple(selectors),
        scale=entry.scale,
        offset=entry.offset,
        texts=texts,
    )


def _bits(message: Message, signal: Signal) -> Bits:
    is_big_endian = signal.byte_order == "big_endian"
    if is_big_endian:
        # A big-endian signal starts at its highest bit; bits of a byte are numbered from the right.
        first = 8 * (signal.start // 8) + 7 - signal.start % 8
        shift = 8 * message.length - first - signal.length
    else:
        shift = signal.start
    if shift < 0 or shift + signal.length > 8 * message.length:
        raise DatabaseError(
            f"message {message.name} has {message.length} bytes; signal {signal.name} "
            f"(start bit {signal.start}, {signal.length} bits) does not fit in it"
        )
    is_float = signal.conversion.is_float
    if is_float and signal.length not in _FLOATS:
        raise DatabaseError(
            f"message {message.name}, signal {signal.name}: expected a floating point number of "
            f"16, 32 or 64 bits; found {signal.length}"
        )
    return Bits(shift, signal.length, is_big_endian, signal.is_signed, is_float)


def _info(entry: MappingEntry, signal: Signal) -> SignalInfo:
    # A floating point number has no fixed step.
    stepless = entry.text or signal.conversion.is_float
    return SignalInfo(
        name=entry.vss,
        unit=entry.unit,
        resolution=0.0 if stepless else abs(signal.conversion.scale * entry.scale),
        max_age_ns=entry.max_age_ms * NS_PER_MS,
    )


# --- integrity schemes -------------------------------------------------------


def _counter(message: Message, by_name: Mapping[str, Signal], check: Check | None) -> tuple[Bits | None, int]:
    """Where the counter is and how far it counts; refuses a message without the scheme's signals."""
    if check is None:
        return None, 1
    if check is Check.OPENFOD_J1850:
        names = (f"{message.name}_CRC", f"{message.name}_COUNTER")
        crc_bits, counter_bits, modulus = Bits(0, 8, False, False, False), Bits(8, 4, False, False, False), 15
    else:
        names = ("CHECKSUM", "COUNTER")
        crc_bits = Bits(0, 4, True, False, False)
        counter_bits, modulus = Bits(4, 2, True, False, False), 4
    crc, counter = (by_name.get(name) for name in names)
    if crc is None or counter is None:
        raise DatabaseError(
            f"message {message.name}: check {check.value} needs the signals {' and '.join(names)}"
        )
    if (_bits(message, crc), _bits(message, counter)) != (crc_bits, counter_bits):
        raise DatabaseError(
            f"message {message.name}: {' and '.join(names)} are not where check {check.value} has them"
        )
    if check is Check.OPENFOD_J1850 and message.is_extended_frame:
        raise DatabaseError(f"message {message.name}: check {check.value} is for 11-bit identifiers")
    return counter_bits, modulus


def _crc8_table() -> bytes:
    table = bytearray()
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = (crc << 1) ^ 0x1D if crc & 0x80 else crc << 1
        table.append(crc & 0xFF)
    return bytes(table)


_MAX_STANDARD_ID: Final = 0x7FF

_CRC8: Final = _crc8_table()


def j1850_crc(can_id: int, data: bytes) -> int:
    """CRC-8 SAE J1850 over the identifier (two bytes, low first) and bytes 1 to the end.

    Polynomial 0x1D, initial value and final XOR 0xFF, as in AUTOSAR E2E profile 1
    (AUTOSAR_SWS_CRCLibrary R22-11 7.2.1.1).
    """
    crc = _CRC8[0xFF ^ (can_id & 0xFF)]
    crc = _CRC8[crc ^ (can_id >> 8)]
    for byte in data[1:]:
        crc = _CRC8[crc ^ byte]
    return crc ^ 0xFF


def honda_checksum(can_id: int, data: bytes) -> int:
    """The checksum in the last nibble of many Honda messages, as public databases document it.

    8 minus the sum of all nibbles of the identifier and of the payload without
    the last one, plus 3 for a 29-bit identifier, modulo 16.
    """
    total = 0
    remaining = can_id
    while remaining:
        total += remaining & 0xF
        remaining >>= 4
    for byte in data:
        total += (byte >> 4) + (byte & 0xF)
    total -= data[-1] & 0xF
    return (8 - total + (3 if can_id > _MAX_STANDARD_ID else 0)) & 0xF
