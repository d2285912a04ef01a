"""What the adapters of all kinds of bus have in common: frames in chunks, and how a bus ends.

`agent.adapters.can_bus` owns the life of a bus (thread, states, backoff) and
opens one of the adapters by its `interface`; each adapter imports its library
when it is opened, because a start must not wait for libraries of other buses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

CAN_EFF_FLAG: Final = 0x8000_0000
"""Set in a `can_id` of 29 bits (include/uapi/linux/can.h)."""
CAN_ERR_FLAG: Final = 0x2000_0000
"""Set in the `can_id` of an error frame (include/uapi/linux/can.h)."""


class RawFrame(NamedTuple):
    """One received frame, as cheap as Python has it.

    Args:
        can_id: identifier and flags as in the kernel's `struct can_frame`: a
            29-bit identifier carries CAN_EFF_FLAG, an error frame CAN_ERR_FLAG.
        data: 0 to 8 bytes, with CAN FD to 64.
        at_ns: when it was on the bus, monotonic; never goes back within a bus.
    """

    can_id: int
    data: bytes
    at_ns: int


class BusLostError(Exception):
    """The bus is gone: it has to be opened again. The text says why."""


class BusEndedError(Exception):
    """A replayed log is at its end: nothing is opened again."""


class OpenBus(Protocol):
    """A bus that is open. `read` belongs to one thread, everything else to any."""

    dropped: int
    """Frames that the kernel or the adapter says it lost since the bus was opened; at least."""

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
