"""Turns frames into batches of changed values, and batches into current values with ages.

Pure: no I/O, no clock, no randomness. A value that is older than its signal's
longest age is unknown, and so is one that was never seen. A frame that is too
short, fails its checksum or repeats its alive counter brings no value and keeps
none alive; it is counted, and so are the frames that a counter's jump shows as
lost. Where frames were lost, or did not say what they should have, the batch
says that the signal's course is broken, so that nobody takes two equal values
for an unbroken state. What is counted, and what a batch may hold, grows only
with the frames fed: the reader bounds those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from agent.errors import DatabaseError
from agent.model import SignalBatch, SignalChange, SignalInfo, SignalValue
from agent.signals import checks
from agent.signals.decoder import decoder, reader, taker
from agent.signals.table import CAN_EFF_FLAG, MessageRow, Table, parameter_group

HURT_NS: Final = 1_000_000_000
"""For so long after the last good frame before a loss the signals' course is told at once."""
_NS_PER_MS: Final = 1_000_000
_FEW_SIGNALS: Final = 4
_FLAGS: Final = 0xE000_0000  # extended, remote, error (include/uapi/linux/can.h)


class MessageHealth(NamedTuple):
    """What became of one message's frames.

    Args:
        used: frames whose values counted.
        too_short: frames shorter than the message.
        check_failed: frames with a wrong checksum or an impossible counter.
        repeated: frames with the counter of the frame before: no new data
            (AUTOSAR E2E profile 1, status REPEATED).
        lost: frames that jumps of the counter show as missing; at least.
    """

    used: int = 0
    too_short: int = 0
    check_failed: int = 0
    repeated: int = 0
    lost: int = 0


class _Unseen:
    """Stands for the value of a signal that has none yet; equal to nothing."""


_UNSEEN: Final = _Unseen()


class _Message:
    """One message of one bus: how it is read, and where its frames are at."""

    __slots__ = (
        "at_ns",
        "broken_ns",
        "carried",
        "check_failed",
        "counter_modulus",
        "data",
        "decode",
        "intervals_ns",
        "is_checked",
        "last",
        "length",
        "lost",
        "mask",
        "masked",
        "name",
        "names",
        "next_counter",
        "noted_ns",
        "read_counter",
        "repeated",
        "residue",
        "take",
        "too_short",
        "used",
    )

    def __init__(self, row: MessageRow) -> None:
        self.name = row.name
        self.length = row.length
        self.decode = decoder(row)
        self.take = taker(row)
        # `take` compares each raw value itself: for few of them a mask before it costs more than it spares.
        self.mask = 0 if self.take and len(row.signals) <= _FEW_SIGNALS else row.mask
        self.last: list[int | None] = [None] * len(row.signals)
        """The raw values of the last frame, for `take`."""
        self.names = tuple(s.vss for s in row.signals)
        self.intervals_ns = {s.vss: s.interval_ms * _NS_PER_MS for s in row.signals if s.interval_ms}
        self.residue = checks.residue(row.check, row.can_id) if row.check else None
        self.read_counter = reader(row, row.counter) if row.counter else None
        self.counter_modulus = row.counter_modulus
        self.is_checked = row.check is not None or row.counter is not None
        self.next_counter: int | None = None
        """What the next frame should have; None: anything."""
        self.data: bytes | None = None
        """The last payload that was taken."""
        self.masked = -1
        """The bits of it that can change a value; -1: look at the next frame in any case."""
        self.carried: tuple[str, ...] = self.names if self.take else ()
        """Names of the signals that it held."""
        self.at_ns: int | None = None
        """When it was taken."""
        self.noted_ns: int | None = None
        """Up to when that is noted as seen."""
        self.broken_ns: int | None = None
        """The frame after which something was lost."""
        self.used = self.too_short = self.check_failed = self.repeated = self.lost = 0

    @property
    def health(self) -> MessageHealth:
        return MessageHealth(self.used, self.too_short, self.check_failed, self.repeated, self.lost)


class Collector:
    """Collects what the frames of all buses change, for one window at a time."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        """Takes the tables by name of bus.

        Raises:
            DatabaseError: two buses bring the same VSS signal.
        """
        self._buses: dict[str, tuple[_Message, ...]] = {}
        self._find: dict[str, Callable[[int], _Message | None]] = {}
        infos: dict[str, SignalInfo] = {}
        for bus, table in tables.items():
            if twice := sorted(infos.keys() & table.infos.keys()):
                raise DatabaseError(f"bus {bus}: {', '.join(twice)} come from another bus already")
            infos |= table.infos
            messages = [(row, _Message(row)) for row in table.messages]
            self._buses[bus] = tuple(message for _, message in messages)
            self._find[bus] = _Groups(messages).find
        self.infos: Mapping[str, SignalInfo] = MappingProxyType(infos)
        self._values: dict[str, SignalValue | _Unseen] = dict.fromkeys(infos, _UNSEEN)
        self._seen_ns: dict[str, int] = {}
        """When each signal was seen, up to the last batch."""
        self._fresh_ns: dict[str, int] = {}
        """The same since the last batch, as far as it is noted."""
        self._broken: dict[str, int] = {}
        """Names whose course is broken, and when each was last seen before that; -1: never."""
        self._mended: dict[str, int] = {}
        """Names that were broken, and seen again, since the last batch, and when they were seen before."""
        self._taken_ns: dict[str, int] = {}
        """When the value of a signal with an interval was taken."""
        self._changes: list[SignalChange] = []
        self._looked = 0
        """Changes that `is_urgent` has seen."""
        self._hurt_until_ns = 0
        """Until when what came after a loss should be drained soon, so that no more than it is declared."""

    def feed(self, bus: str, frames: Iterable[tuple[int, bytes, int]]) -> None:
        """Takes frames of one bus in the order of their times.

        Args:
            frames: (`can_id` with the kernel's flags, data, monotonic nanoseconds).
        """
        find = self._find.get(bus)
        if find is None:
            return
        from_bytes, append = int.from_bytes, self._changes.append
        for can_id, data, at_ns in frames:
            message = find(can_id)
            if message is None:
                continue
            size = len(data)
            if size != message.length:
                if size < message.length:
                    message.too_short += 1
                    self._break(message)
                    continue
                data = data[: message.length]  # noqa: PLW2901 (what is behind the message's end is padding)
            if message.is_checked:
                if not self._passes(message, data):
                    continue
            elif data == message.data:
                message.used += 1
                message.at_ns = at_ns
                continue
            message.used += 1
            message.data = data
            if message.mask:
                masked = from_bytes(data, "little") & message.mask
                if masked == message.masked:
                    message.at_ns = at_ns
                    continue
                message.masked = masked
            if message.take is None:
                self._decode(message, data, at_ns)
            else:
                message.take(data, at_ns, message.at_ns, message.last, append)
                message.at_ns = at_ns

    def lost(self, bus: str) -> None:
        """Frames of a bus were lost; which ones, nobody knows.

        The course of its signals is broken between the frames that were fed
        before this call and those that come after it: call it before the frames
        that were read after the loss are fed, and before the next `drain` at
        the latest. Whoever cannot tell calls it before and after them.
        """
        for message in self._buses.get(bus, ()):
            message.next_counter = None  # what the jump would show is said already
            self._break(message)

    def is_urgent(self, names: frozenset[str], now_ns: int) -> bool:
        """Whether `drain` should not wait: a signal of these has changed, or frames were lost a moment ago.

        Args:
            names: VSS names.
            now_ns: of the latest frame.
        """
        if now_ns < self._hurt_until_ns:
            return True
        if not names:
            return False
        begin, self._looked = self._looked, len(self._changes)
        return any(change.name in names for change in self._changes[begin:])

    def drain(self) -> SignalBatch:
        """What has come since the last call."""
        for messages in self._buses.values():
            for message in messages:
                self._note(message)
        seen_ns = self._fresh_ns
        if self._broken:
            for name in self._broken.keys() & seen_ns.keys():
                if seen_ns[name] > self._broken[name]:
                    self._mended.setdefault(name, self._broken.pop(name))
        batch = SignalBatch(tuple(self._changes), MappingProxyType(seen_ns), MappingProxyType(self._mended))
        self._seen_ns.update(seen_ns)
        self._changes, self._fresh_ns, self._mended, self._looked = [], {}, {}, 0
        return batch

    @property
    def health(self) -> Mapping[tuple[str, str], MessageHealth]:
        """Counts by (bus, message name)."""
        return {(bus, m.name): m.health for bus, messages in self._buses.items() for m in messages}

    def _passes(self, message: _Message, data: bytes) -> bool:
        """Whether a frame's checksum and counter are right; counts it if not."""
        if message.residue is not None and message.residue(data):
            message.check_failed += 1
            self._break(message)
            return False
        if message.read_counter is None:
            return True
        counter = message.read_counter(data)
        if counter == message.next_counter:
            message.next_counter = (counter + 1) % message.counter_modulus
            return True
        return self._follows(message, counter)

    def _follows(self, message: _Message, counter: int) -> bool:
        """Whether a frame can be used whose counter is not the next one."""
        modulus, expected = message.counter_modulus, message.next_counter
        if counter >= modulus:
            message.check_failed += 1
            self._break(message)
            return False
        message.next_counter = (counter + 1) % modulus
        if expected is None:
            return True
        missing = (counter - expected) % modulus
        if missing == modulus - 1:
            message.repeated += 1
            return False
        message.lost += missing
        self._break(message)
        return True

    def _decode(self, message: _Message, data: bytes, at_ns: int) -> None:
        """Reads the values of a frame that does not hold the same as the one before."""
        names, values = message.decode(data)
        is_same, before_ns = names is message.carried, message.at_ns
        if not is_same:
            self._note(message)
        unused: list[str] = []
        known = self._values
        for name, value in zip(names, values, strict=True):
            if value == known[name]:
                continue
            if value is None or (message.intervals_ns and self._is_too_soon(message, name, at_ns)):
                unused.append(name)
                continue
            known[name] = value
            seen_ns = before_ns if is_same else self._last_seen_ns(name)
            self._changes.append(SignalChange(name, value, at_ns, seen_ns))
        if unused:
            self._note(message)
            for name in unused:
                self._break_name(name)
            names = tuple(name for name in names if name not in unused)
        if names is not message.carried:
            message.carried, message.noted_ns = names, None
        message.at_ns = at_ns

    def _is_too_soon(self, message: _Message, name: str, at_ns: int) -> bool:
        """Whether the last value was taken too short a time ago; then the next frame is looked at again."""
        interval_ns = message.intervals_ns.get(name, 0)
        taken_ns = self._taken_ns.get(name)
        if taken_ns is None or at_ns - taken_ns >= interval_ns:
            self._taken_ns[name] = at_ns
            return False
        message.masked, message.data = -1, None
        return True

    # --- what is seen, and what is broken ---------------------------------------

    def _note(self, message: _Message) -> None:
        """Notes for each signal that a message carries when it was seen, if that is not noted yet."""
        if message.at_ns is not None and message.at_ns != message.noted_ns:
            self._fresh_ns.update(dict.fromkeys(message.carried, message.at_ns))
            message.noted_ns = message.at_ns

    def _last_seen_ns(self, name: str) -> int | None:
        seen_ns = self._fresh_ns.get(name)
        return self._seen_ns.get(name) if seen_ns is None else seen_ns

    def _break(self, message: _Message) -> None:
        """The frames of a message no longer follow one another."""
        if message.broken_ns == message.at_ns and message.at_ns is not None:
            return
        message.broken_ns = message.at_ns
        if message.at_ns is not None:
            self._hurt_until_ns = max(self._hurt_until_ns, message.at_ns + HURT_NS)
        self._note(message)
        for name in message.names:
            self._break_name(name)

    def _break_name(self, name: str) -> None:
        last_ns = self._last_seen_ns(name)
        seen_ns = -1 if last_ns is None else last_ns
        before_ns = self._broken.get(name, seen_ns)
        if seen_ns > before_ns:
            self._mended.setdefault(name, before_ns)
        self._broken[name] = seen_ns


class _Groups:
    """Finds messages by identifier, and by parameter group where any source address will do."""

    def __init__(self, messages: Iterable[tuple[MessageRow, _Message]]) -> None:
        self._by_id: dict[int, _Message] = {}
        self._by_group: dict[int, _Message] = {}
        for row, message in messages:
            if row.any_source:
                self._by_group[parameter_group(row.can_id)] = message
            else:
                self._by_id[row.can_id] = message

    @property
    def find(self) -> Callable[[int], _Message | None]:
        return self._find if self._by_group else self._by_id.get

    def _find(self, can_id: int) -> _Message | None:
        message = self._by_id.get(can_id)
        if message is None and can_id & _FLAGS == CAN_EFF_FLAG:
            message = self._by_group.get(parameter_group(can_id))
        return message


class Reading(NamedTuple):
    """One signal as status pages show it.

    Args:
        value: None if unknown: never seen, or too old.
        age_ms: since it was last seen; None if never.
    """

    value: SignalValue | None
    unit: str
    age_ms: int | None


class SignalState:
    """The current value of each signal, and how old it is."""

    def __init__(self, infos: Mapping[str, SignalInfo]) -> None:
        self._infos = infos
        self._values: dict[str, SignalValue] = {}
        self._seen_ns: dict[str, int] = {}

    def apply(self, batch: SignalBatch) -> None:
        """Takes over one batch; batches come in the order in which they were drained."""
        for change in batch.changes:
            self._values[change.name] = change.value
            self._seen_ns[change.name] = change.at_ns
        self._seen_ns.update(batch.seen_ns)

    @property
    def seen_ns(self) -> Mapping[str, int]:
        """When each signal was last heard, monotonic."""
        return MappingProxyType(self._seen_ns)

    def value(self, name: str, now_ns: int) -> SignalValue | None:
        """The signal's value; None if unknown: never seen, or as old as its longest age."""
        age_ns = self.age_ns(name, now_ns)
        info = self._infos.get(name)
        if age_ns is None or info is None or age_ns >= info.max_age_ns:
            return None
        return self._values.get(name)

    @property
    def last(self) -> Mapping[str, SignalValue]:
        """The latest value of each signal, however old."""
        return MappingProxyType(self._values)

    def age_ns(self, name: str, now_ns: int) -> int | None:
        """Nanoseconds since the signal was last seen; None if never."""
        seen_ns = self._seen_ns.get(name)
        return None if seen_ns is None else max(0, now_ns - seen_ns)

    def snapshot(self, now_ns: int) -> dict[str, Reading]:
        """All signals by VSS name, as they are at `now_ns`."""
        readings = {}
        for name, info in self._infos.items():
            age_ns = self.age_ns(name, now_ns)
            age_ms = None if age_ns is None else age_ns // 1_000_000
            readings[name] = Reading(self.value(name, now_ns), info.unit, age_ms)
        return readings
