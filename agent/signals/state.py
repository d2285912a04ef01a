"""Turns frames into batches of changed values, and batches into current values with ages.

Pure: no I/O, no clock, no randomness. A value that is older than its signal's
longest age is unknown, and so is one that was never seen. A frame that is too
short, fails its checksum or repeats its alive counter brings no value and keeps
none alive; it is counted, and so are the frames that a counter's jump shows as
lost. What is counted, and what a batch may hold, grows only with the frames
fed: the reader bounds those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from agent.errors import DatabaseError
from agent.model import SignalBatch, SignalChange, SignalInfo, SignalValue
from agent.signals.plan import DecodePlan, MessagePlan

_CAN_EFF_FLAG: Final = 0x8000_0000  # include/uapi/linux/can.h


@dataclass(slots=True)
class MessageHealth:
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


@dataclass(slots=True)
class _MessageState:
    plan: MessagePlan
    health: MessageHealth = field(default_factory=MessageHealth)
    masked: int | None = None
    counter: int | None = None
    carried: tuple[str, ...] = ()


class Collector:
    """Collects what the frames of all buses change, for one window at a time."""

    def __init__(self, plans: Iterable[DecodePlan]) -> None:
        """Takes one plan for each bus.

        Raises:
            DatabaseError: two buses bring the same VSS signal.
        """
        self._messages: dict[str, dict[int, _MessageState]] = {}
        infos: dict[str, SignalInfo] = {}
        for plan in plans:
            if twice := sorted(set(infos) & set(plan.infos)):
                raise DatabaseError(f"bus {plan.bus_name}: {', '.join(twice)} come from another bus already")
            infos |= plan.infos
            states = {
                can_id | (_CAN_EFF_FLAG if extended else 0): _MessageState(message)
                for (can_id, extended), message in plan.messages.items()
            }
            self._messages.setdefault(plan.bus_name, {}).update(states)
        self.infos: Mapping[str, SignalInfo] = MappingProxyType(infos)
        self._values: dict[str, SignalValue] = {}
        self._seen_ns: dict[str, int] = {}
        self._changes: list[SignalChange] = []

    def feed(self, bus: str, frames: Iterable[tuple[int, bytes, int]]) -> None:
        """Takes frames of one bus in the order of their times.

        Args:
            frames: (`can_id` with the kernel's flags, data, monotonic nanoseconds).
        """
        states = self._messages.get(bus, {})
        for can_id, data, at_ns in frames:
            state = states.get(can_id)
            if state is not None and _is_usable(state, data):
                self._decode(state, data, at_ns)

    def _decode(self, state: _MessageState, data: bytes, at_ns: int) -> None:
        plan = state.plan
        payload = data[: plan.length]
        little = int.from_bytes(payload, "little")
        masked = little & plan.mask
        if masked == state.masked:
            for name in state.carried:
                self._seen_ns[name] = at_ns
            return
        state.masked = masked
        big = int.from_bytes(payload, "big")
        carried = []
        for signal in plan.signals:
            value = signal.value(little, big)
            if value is None:
                continue
            carried.append(signal.vss)
            self._take(signal.vss, value, at_ns)
        state.carried = tuple(carried)

    def _take(self, name: str, value: SignalValue, at_ns: int) -> None:
        previous_seen_ns = self._seen_ns.get(name)
        self._seen_ns[name] = at_ns
        if previous_seen_ns is None or self._values[name] != value:
            self._values[name] = value
            self._changes.append(SignalChange(name, value, at_ns, previous_seen_ns))

    def drain(self) -> SignalBatch:
        """The changes since the last call; an empty batch still says what was seen."""
        batch = SignalBatch(tuple(self._changes), MappingProxyType(dict(self._seen_ns)))
        self._changes.clear()
        return batch

    @property
    def health(self) -> Mapping[tuple[str, str], MessageHealth]:
        """Counts by (bus, message name); live objects, for reading only."""
        return {
            (bus, state.plan.name): state.health
            for bus, states in self._messages.items()
            for state in states.values()
        }


def _is_usable(state: _MessageState, data: bytes) -> bool:
    """Checks and counts one frame."""
    plan, health = state.plan, state.health
    if len(data) < plan.length:
        health.too_short += 1
        return False
    if not plan.passes_check(data):
        health.check_failed += 1
        return False
    if plan.counter is not None:
        payload = data[: plan.length]
        counter = int(plan.counter.raw(int.from_bytes(payload, "little"), int.from_bytes(payload, "big")))
        before, state.counter = state.counter, counter
        if counter == before:
            health.repeated += 1
            return False
        if before is not None:
            health.lost += (counter - before - 1) % plan.counter_modulus
    health.used += 1
    return True


@dataclass(frozen=True, slots=True)
class Reading:
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
