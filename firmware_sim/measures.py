"""What an ECU knows of date and distance, and how far it may believe it.

Pure: no I/O and no clock. An authenticated source is the ECU's own; what the
bus says is advisory. A plausible value says that no single frame was wrong,
never that the bus is honest: whoever can send every frame can make any value
plausible (docs/token.md, "Advisory terms").
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_GAP_NS = 10_000_000_000
"""Two values further apart than this say nothing about each other."""
_NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Measure:
    """A quantity at one moment.

    Args:
        value: Unix seconds or metres; None if nothing is known.
        is_trusted: True if it comes from an authenticated source.
    """

    value: int | None
    is_trusted: bool


@dataclass(frozen=True, slots=True)
class Measures:
    """What limits are judged by."""

    time_s: Measure
    odometer_m: Measure


@dataclass(frozen=True, slots=True)
class Pace:
    """How a signal can change.

    Args:
        lowest, highest: range of its values.
        slowest, fastest: change per second.
        slack: change that is always allowed upwards, and downwards if it has a pace.
    """

    lowest: int
    highest: int
    slowest: int
    fastest: int
    slack: int

    def allows(self, change: int, elapsed_ns: int) -> bool:
        """True if a signal can have changed by so much in this time."""
        least = max(0, self.slowest * elapsed_ns - self.slack * _NS_PER_S)
        most = self.fastest * elapsed_ns + self.slack * _NS_PER_S
        return least <= change * _NS_PER_S <= most


UNIX_TIME = Pace(lowest=1_704_067_200, highest=0xFFFF_FFFF, slowest=1, fastest=1, slack=2)
"""Unix seconds, from 2024 on."""
ODOMETER = Pace(lowest=0, highest=0xFFFF_FFFF, slowest=0, fastest=100, slack=10)
"""Metres, in steps of at most 10, at no more than 360 km/h."""


class BusSignal:
    """Remembers the last plausible value of a signal: one that fits the value heard just before it.

    Only neighbours are compared, so that a wrong value cannot make later right ones implausible.

    Args:
        pace: how it can change.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._before: tuple[int, int] | None = None
        self.plausible: int | None = None

    def hear(self, value: int, now_ns: int) -> None:
        """Takes a value from the bus."""
        before, self._before = self._before, (value, now_ns)
        if before is None or not self._pace.lowest <= value <= self._pace.highest:
            return
        elapsed_ns = now_ns - before[1]
        if elapsed_ns <= MAX_GAP_NS and self._pace.allows(value - before[0], elapsed_ns):
            self.plausible = value

    def forget(self) -> None:
        """What was heard is lost with the power."""
        self._before = self.plausible = None
