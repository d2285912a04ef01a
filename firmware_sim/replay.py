"""`fod-sim replay`: puts a recorded log on a bus again, in its own rhythm or faster.

Reads every log that python-can reads. Error frames and CAN FD frames are
counted and left out.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import can
import cantools.database
from cantools.database.errors import Error as DatabaseError

from firmware_sim.frame import Frame
from firmware_sim.hub import from_message

PROGRESS_EVERY_S = 1.0
MAX_PAUSE_S = 3600.0
"""Longest pause between two frames; a longer one is a broken log."""
_YIELD_EVERY = 64
_MALFORMED = (ValueError, LookupError, TypeError, EOFError, AssertionError, struct.error, can.CanError)
"""What python-can's readers raise on broken files."""


class ReplayError(Exception):
    """A log or a DBC that cannot be read."""


@dataclass(slots=True)
class Summary:
    """What was replayed.

    Args:
        frames: frames sent.
        left_out: error frames and CAN FD frames.
        ids: identifiers seen, 29-bit ones with bit 31 set.
        known: those of them that the DBC describes; None without a DBC.
    """

    frames: int = 0
    left_out: int = 0
    ids: set[int] = field(default_factory=set)
    known: int | None = None
    duration_s: float = 0.0

    def as_json(self) -> dict[str, object]:
        """The summary for a program."""
        return {
            "frames": self.frames,
            "left_out": self.left_out,
            "ids": len(self.ids),
            "ids_known": self.known,
            "duration_s": round(self.duration_s, 3),
        }


def known_ids(path: Path) -> frozenset[int]:
    """Identifiers that a DBC describes, 29-bit ones with bit 31 set.

    Raises:
        ReplayError: not a database that cantools reads.
    """
    try:
        database = cantools.database.load_file(str(path), strict=False)
    except (OSError, ValueError, KeyError, DatabaseError) as error:
        raise ReplayError(f"{path}: not a signal database: {error}") from error
    messages = getattr(database, "messages", [])
    return frozenset(m.frame_id | (0x8000_0000 if m.is_extended_frame else 0) for m in messages)


def messages(path: Path) -> Iterator[can.Message]:
    """Yields the messages of a log.

    Raises:
        ReplayError: missing, of an unknown kind, or malformed; says after how many messages.
    """
    count = 0
    try:
        with can.LogReader(path) as reader:
            for message in reader:
                count += 1
                yield message
    except OSError as error:
        raise ReplayError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _MALFORMED as error:
        raise ReplayError(f"{path}: malformed after {count} messages: {error}") from error


async def replay(
    path: Path, send: Callable[[Frame], None], *, speed: float, known: frozenset[int] | None
) -> Summary:
    """Sends the frames of a log.

    Args:
        path: the log.
        send: puts a frame on the bus.
        speed: 1.0 is the log's own rhythm, 2.0 twice as fast; 0 is as fast as possible.
        known: identifiers of the DBC, or None.

    Raises:
        ReplayError: as `messages`; frames before the fault were sent.
    """
    summary = Summary()
    begun_s = told_s = time.monotonic()
    first_s: float | None = None
    for message in messages(path):
        if first_s is None:
            first_s = message.timestamp
        await _keep_time(summary.frames, begun_s, (message.timestamp - first_s) / speed if speed else 0.0)
        frame = from_message(message)
        if frame is None or frame.is_fd:
            summary.left_out += 1
            continue
        send(frame)
        summary.frames += 1
        summary.ids.add(frame.can_id | (0x8000_0000 if frame.is_extended else 0))
        if time.monotonic() - told_s >= PROGRESS_EVERY_S:
            told_s = time.monotonic()
            print(f"{summary.frames} frames, {told_s - begun_s:.0f} s", file=sys.stderr)
    summary.duration_s = time.monotonic() - begun_s
    if known is not None:
        summary.known = len(summary.ids & known)
    return summary


async def _keep_time(sent: int, begun_s: float, offset_s: float) -> None:
    """Waits until a frame is due; now and then lets others work in any case."""
    pause_s = begun_s + offset_s - time.monotonic()
    if pause_s > MAX_PAUSE_S:
        raise ReplayError(f"frame {sent + 1} is due in {pause_s:.0f} s; the log's times are broken")
    if pause_s > 0:
        await asyncio.sleep(pause_s)
    elif sent % _YIELD_EVERY == 0:
        await asyncio.sleep(0)
