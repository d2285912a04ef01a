"""A bus whose frames come one at a time: the window, the filters and the count of damage.

For adapters that have no faster way. What is not wanted is left out here, after
it was received; an urgent frame, and every error frame, ends the window.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable
from typing import Final

from agent.adapters.bus import CAN_ERR_FLAG, MAX_BATCH_FRAMES, BusEndedError, BusLostError, RawFrame

MAX_MALFORMED_IN_A_ROW: Final = 100
"""Pieces that are no frame, without a good one between, that make a bus count as lost."""
RECEIVE_S: Final = 0.1
"""Longest single wait, in seconds; a bus that was closed is noticed after it."""


class MalformedFrameError(Exception):
    """What arrived is no frame; the ones behind it may be."""


class FrameByFrameBus(abc.ABC):
    """`OpenBus` on top of a function that receives one frame."""

    def __init__(self, window_s: float, monotonic_ns: Callable[[], int]) -> None:
        self.dropped = 0
        self.malformed = 0
        self._window_ns = int(window_s * 1e9)
        self._monotonic_ns = monotonic_ns
        self._closed = threading.Event()
        self._wanted: frozenset[int] | None = None
        self._urgent: frozenset[int] = frozenset()
        self._malformed_in_a_row = 0
        self._end: BusLostError | BusEndedError | None = None
        self._reading = threading.Lock()

    @abc.abstractmethod
    def _receive(self, wait_s: float) -> RawFrame | None:
        """The next frame; None if there is none within `wait_s` seconds.

        Raises:
            MalformedFrameError, BusLostError, BusEndedError.
        """

    def read(self, timeout_s: float) -> list[RawFrame]:
        """What has arrived, oldest first (OpenBus.read)."""
        with self._reading:
            return self._gather(timeout_s)

    def _gather(self, timeout_s: float) -> list[RawFrame]:
        if self._end is not None:
            raise self._end
        frames: list[RawFrame] = []
        ends_ns = self._monotonic_ns() + int(timeout_s * 1e9)
        while not self._closed.is_set():
            left_s = max(0.0, (ends_ns - self._monotonic_ns()) / 1e9)
            try:
                frame = self._next(min(RECEIVE_S, left_s))
            except (BusLostError, BusEndedError) as end:
                if not frames:
                    raise
                self._end = end
                break
            if frame is not None:
                is_urgent = frame.can_id & CAN_ERR_FLAG or frame.can_id in self._urgent
                if not frames:
                    ends_ns = self._monotonic_ns() + self._window_ns
                frames.append(frame)
                if is_urgent or len(frames) >= MAX_BATCH_FRAMES:
                    break
            if self._monotonic_ns() >= ends_ns:
                break
        return frames

    def _next(self, wait_s: float) -> RawFrame | None:
        """The next frame that is wanted."""
        try:
            frame = self._receive(wait_s)
        except MalformedFrameError as error:
            self.malformed += 1
            self._malformed_in_a_row += 1
            if self._malformed_in_a_row >= MAX_MALFORMED_IN_A_ROW:
                raise BusLostError(
                    f"{MAX_MALFORMED_IN_A_ROW} malformed frames in a row; last: {error}"
                ) from error
            return None
        if frame is None:
            return None
        self._malformed_in_a_row = 0
        can_id, wanted = frame.can_id, self._wanted
        if wanted is None or can_id in wanted or can_id in self._urgent or can_id & CAN_ERR_FLAG:
            return frame
        return None

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        """Changes what is received (OpenBus.receive_only)."""
        self._wanted, self._urgent = wanted, urgent

    def close(self) -> None:
        """Lets `read` end, then closes what is open."""
        self._closed.set()
        with self._reading:
            self._shut()

    def _shut(self) -> None:
        """Closes what is open; nobody reads any more."""
        return
