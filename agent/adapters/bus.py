"""What the adapters of all kinds of bus have in common: frames in chunks, and how a bus ends.

`agent.adapters.can_bus` owns the life of a bus (thread, states, backoff) and
opens one of the adapters by its `interface`; each adapter imports its library
when it is opened, because a start must not wait for libraries of other buses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple, Protocol

WINDOW_S: Final = 0.02
"""Longest time, in seconds, that a frame waits for others before it is handed on."""
MAX_BATCH_FRAMES: Final = 4096
"""From this many frames on, `OpenBus.read` returns what it has."""
MAX_CLASSIC_BYTES: Final = 8
"""Most data bytes of a frame that is not CAN FD (ISO 11898-1:2015, 10.4.2.4)."""
MAX_CLOCK_DOUBT_NS: Final = 50_000
"""Two clocks that were read in more time than this are read again, at most MAX_CLOCK_READINGS times."""
MAX_CLOCK_READINGS: Final = 4
FD_LENGTHS: Final = frozenset({*range(9), 12, 16, 20, 24, 32, 48, 64})
"""The data lengths that CAN FD has (ISO 11898-1:2015, 10.4.2.4)."""
CAN_EFF_FLAG: Final = 0x8000_0000
"""Set in a `can_id` of 29 bits (include/uapi/linux/can.h)."""
CAN_EFF_MASK: Final = 0x1FFF_FFFF
"""The identifier within a `can_id`."""
CAN_ERR_FLAG: Final = 0x2000_0000
"""Set in the `can_id` of an error frame (include/uapi/linux/can.h)."""


class RawFrame(NamedTuple):
    """One received frame, as cheap as Python has it.

    Args:
        can_id: identifier and flags as in the kernel's `struct can_frame`: a
            29-bit identifier carries CAN_EFF_FLAG, an error frame CAN_ERR_FLAG.
        data: 0 to 8 bytes, with CAN FD to 64.
        at_ns: when it was on the bus, monotonic; never goes back within an
            identifier, and not within a bus unless its adapter says so.
    """

    can_id: int
    data: bytes
    at_ns: int


@dataclass(frozen=True, slots=True)
class Watch:
    """A message of which only changes are of interest.

    Args:
        mask: the data bits whose change counts, 1 to 8 bytes.
        max_age_ns: its values must be heard again before they are this old.
    """

    mask: bytes
    max_age_ns: int


class BusLostError(Exception):
    """The bus is gone: it has to be opened again. The text says why."""


class BusEndedError(Exception):
    """A replayed log is at its end: nothing is opened again."""


class OpenBus(Protocol):
    """A bus that is open. `read` belongs to one thread, everything else to any."""

    @property
    def dropped(self) -> int:
        """Frames that the kernel or the adapter says it lost since the bus was opened; at least.

        It grows with the call of `read` whose frames came after the loss, not before.
        """
        ...

    @property
    def malformed(self) -> int:
        """Pieces that were no frame, since the bus was opened."""
        ...

    def read(self, timeout_s: float) -> Sequence[RawFrame]:
        """What has arrived, oldest first; waits at most `timeout_s` for the first frame.

        An adapter with a coalescing window waits for it here, and does not let
        frames of urgent identifiers wait.

        Raises:
            BusLostError, BusEndedError: after what was read before was returned.
        """
        ...

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:
        """Puts one frame on the bus.

        Args:
            can_id: as in RawFrame.
            data: 0 to 8 bytes, with CAN FD as many as in FD_LENGTHS.

        Raises:
            OSError: the bus did not take it in time.
        """
        ...

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        """Changes what is received; error frames always are.

        Args:
            wanted: `can_id`s as in RawFrame; None: all.
            urgent: received too, and handed on without waiting for a window.

        Raises:
            OSError: the filters did not hold; the old ones stand.
        """
        ...

    def close(self) -> None:
        """Closes it; `read` in another thread ends soon."""
        ...


class Stamps:
    """Brings time stamps of the wall clock to the monotonic one.

    A frame is not older than the one before it, nor than a moment at which
    nothing was waiting, nor is it of the future: a stamp that says so, because
    the wall clock was set, is brought into these bounds.
    """

    def __init__(self, monotonic_ns: Callable[[], int], wall_ns: Callable[[], int]) -> None:
        self._monotonic_ns, self._wall_ns = monotonic_ns, wall_ns
        self._floor_ns = monotonic_ns()

    def monotonic(self, stamps_ns: Iterable[int], *, was_emptied: bool = False) -> list[int]:
        """The monotonic times of frames that were read just now; they never go back.

        Args:
            stamps_ns: Unix nanoseconds, in the order of the frames.
            was_emptied: nothing is waiting any more.
        """
        now_ns, offset_ns = self._clocks()
        times = [stamp_ns + offset_ns for stamp_ns in stamps_ns]
        if times and not (self._floor_ns <= times[0] and times[-1] <= now_ns and times == sorted(times)):
            rising = accumulate(times, max, initial=self._floor_ns)
            times = [min(time_ns, now_ns) for time_ns in rising][1:]
        if was_emptied:
            self._floor_ns = now_ns
        elif times:
            self._floor_ns = times[-1]
        return times

    def _clocks(self) -> tuple[int, int]:
        """The monotonic time, and how much it is ahead of the wall clock."""
        before_ns, wall_ns, now_ns = self._monotonic_ns(), self._wall_ns(), self._monotonic_ns()
        if now_ns - before_ns < MAX_CLOCK_DOUBT_NS:
            return now_ns, now_ns - wall_ns
        readings = [(now_ns - before_ns, now_ns, now_ns - wall_ns)]
        for _ in range(MAX_CLOCK_READINGS):
            # Whatever interrupts us between the clocks would move the frames by as much.
            before_ns, wall_ns, now_ns = self._monotonic_ns(), self._wall_ns(), self._monotonic_ns()
            readings.append((now_ns - before_ns, now_ns, now_ns - wall_ns))
            if now_ns - before_ns < MAX_CLOCK_DOUBT_NS:
                break
        _, now_ns, offset_ns = min(readings)
        return now_ns, offset_ns
