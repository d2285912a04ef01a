"""Logs in the place of a bus, in any form that python-can reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import can

from agent.adapters.bus import CAN_EFF_FLAG, CAN_ERR_FLAG, WINDOW_S, BusEndedError, RawFrame
from agent.adapters.frame_by_frame import FrameByFrameBus
from agent.errors import TransportError
from agent.model import Frame

MAX_SPEED: Final = 1_000_000.0
"""Fastest replay with spacing, as a multiple of the log's own speed."""


def _messages(path: Path) -> Iterator[can.Message]:
    """The messages of a log, with one kind of error for all formats."""
    try:
        with can.LogReader(path) as reader:
            yield from reader
    except (OSError, ValueError, LookupError, TypeError, can.CanError) as error:
        raise TransportError(f"{path}: not a log that can be replayed: {error}") from error


def replay_log(path: Path, bus: str) -> Iterator[Frame]:
    """The data frames of a log, their times counted from its first message.

    Raises:
        TransportError: not readable, or not a log.
    """
    first_s: float | None = None
    for message in _messages(path):
        if first_s is None:
            first_s = message.timestamp
        if message.is_error_frame or message.is_remote_frame:
            continue
        yield Frame(
            bus=bus,
            can_id=message.arbitration_id,
            data=bytes(message.data),
            monotonic_ns=max(0, round((message.timestamp - first_s) * 1e9)),
            is_extended=message.is_extended_id,
            is_fd=message.is_fd,
        )


class ReplayBus(FrameByFrameBus):
    """A log whose messages come at their own pace, or another; it takes no frames."""

    def __init__(
        self,
        path: Path,
        speed: float = 1.0,
        *,
        window_s: float = WINDOW_S,
        monotonic_ns: Callable[[], int],
    ) -> None:
        """Begins the log now.

        Args:
            speed: 1 for the log's own spacing, 0 for as fast as possible. Times
                at 0 keep the log's spacing, so that ages stay what they were.

        Raises:
            ValueError: not a speed.
        """
        if not 0 <= speed <= MAX_SPEED:
            raise ValueError(f"speed {speed}: expected 0 to {MAX_SPEED}")
        super().__init__(window_s, monotonic_ns)
        self._speed = speed
        self._messages = _messages(path)
        self._next_frame: RawFrame | None = None
        self._start_ns = self._last_ns = monotonic_ns()
        self._first_s: float | None = None

    def _receive(self, wait_s: float) -> RawFrame | None:
        frame = self._next_frame
        if frame is None:
            frame = self._parse()
            if frame is None:
                return None
        self._next_frame = frame
        if self._speed:
            due_s = (frame.at_ns - self._monotonic_ns()) / 1e9
            self._closed.wait(max(0.0, min(due_s, wait_s)))
            if due_s > wait_s:
                return None
        self._next_frame = None
        return frame

    def _parse(self) -> RawFrame | None:
        try:
            message = next(self._messages, None)
        except TransportError as error:
            # To open it again would replay it from its start.
            raise BusEndedError(str(error)) from error
        if message is None:
            raise BusEndedError("end of the log")
        if self._first_s is None:
            self._first_s = message.timestamp
        if message.is_remote_frame:
            return None
        offset_ns = round((message.timestamp - self._first_s) * 1e9 / (self._speed or 1.0))
        self._last_ns = max(self._last_ns, self._start_ns + offset_ns)
        return RawFrame(raw_id(message), bytes(message.data), self._last_ns)

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:  # noqa: ARG002
        """Refuses.

        Raises:
            OSError: always.
        """
        raise OSError(f"a replayed log takes no frames; 0x{can_id:X}")


def raw_id(message: can.Message) -> int:
    """The `can_id` of a message of python-can, as in RawFrame."""
    if message.is_error_frame:
        return CAN_ERR_FLAG | message.arbitration_id
    return message.arbitration_id | (CAN_EFF_FLAG if message.is_extended_id else 0)
