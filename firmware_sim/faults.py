"""Faults that a control command puts into the simulated vehicle for a while.

Pure: callers pass monotonic nanoseconds. Messages are named as in the DBC,
ECUs by their identifier.
"""

from __future__ import annotations

import enum


class Fault(enum.Enum):
    """What can go wrong."""

    DROP = "drop"
    """A message is not sent; its alive counter goes on."""
    CRC = "crc"
    """A message carries a wrong checksum."""
    FREEZE = "freeze"
    """A message's alive counter stands still; its checksum is right."""
    SILENT = "silent"
    """An ECU does not answer diagnostic requests."""


class Faults:
    """The faults that are active now."""

    def __init__(self) -> None:
        self._until_ns: dict[tuple[Fault, str], int] = {}

    def begin(self, fault: Fault, target: str, *, until_ns: int) -> None:
        """Begins a fault of a message or an ECU; it ends by itself at `until_ns`."""
        self._until_ns[fault, target] = until_ns

    def clear(self) -> None:
        """Ends all faults."""
        self._until_ns.clear()

    def has(self, fault: Fault, target: str, now_ns: int) -> bool:
        """True while a fault of this target lasts."""
        return now_ns < self._until_ns.get((fault, target), now_ns)
