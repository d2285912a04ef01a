"""Dates records of weak clocks by the signed times around them.

Pure. Records are never edited: what is said here is made anew at each reading,
and the same records give the same dates.

A record is appended when its window is closed, so records of one journal stand
in the order in which they were closed. A window of a weak clock was thus closed
behind those before it, before those behind it, and before the cloud stored it.
Its length is kept: the monotonic clock measured it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from openfod.usage.v1 import usage_pb2


class Window(NamedTuple):
    """When a record says that its window was.

    Args:
        start_ms, end_ms: of the vehicle's trusted clock, Unix milliseconds.
        signed: its clock was derived from a signed time.
        stored_ms: when the cloud stored the record, Unix milliseconds.
    """

    start_ms: int
    end_ms: int
    signed: bool
    stored_ms: int


class Dated(NamedTuple):
    """When a window was, as far as signed times say; all in Unix milliseconds.

    Args:
        start_ms, end_ms: the window's own if its clock was signed.
        earliest_end_ms: the end is not before it; 0 if no signed time says so.
        latest_end_ms: the end is not after it.
    """

    start_ms: int
    end_ms: int
    earliest_end_ms: int
    latest_end_ms: int


def dated(windows: Sequence[Window]) -> list[Dated]:
    """Dates all windows of one journal, in the order of their records.

    The ends of windows of weak clocks never go back from one to the next. Where
    signed times contradict one another, the earlier bound on the end counts.
    """
    latest = [window.stored_ms for window in windows]
    bound: int | None = None
    for index in reversed(range(len(windows))):
        bound = latest[index] if bound is None else min(bound, latest[index])
        latest[index] = bound
        if windows[index].signed:
            bound = min(bound, windows[index].end_ms)
    found = []
    earliest, last_weak = 0, 0
    for window, limit in zip(windows, latest, strict=True):
        if window.signed:
            found.append(Dated(window.start_ms, window.end_ms, window.end_ms, window.end_ms))
            earliest = max(earliest, window.end_ms)
            continue
        lower = min(earliest, limit)
        end = min(max(window.end_ms, lower, last_weak), limit)
        last_weak = end
        start = max(0, end - (window.end_ms - window.start_ms))
        found.append(Dated(start, end, lower, limit))
    return found


def window(content: bytes, stored_ms: int) -> Window:
    """What a stored record says of its time."""
    record = usage_pb2.UsageRecord.FromString(content)
    signed = record.clock_trust == usage_pb2.CLOCK_TRUST_SIGNED
    return Window(record.window_start_ms, record.window_end_ms, signed, stored_ms)


def is_weak(content: bytes) -> bool:
    """True if a stored record needs the times around it."""
    return usage_pb2.UsageRecord.FromString(content).clock_trust != usage_pb2.CLOCK_TRUST_SIGNED


def as_signed(content: bytes, stored_ms: int) -> Dated:
    """How a stored record of a signed clock is dated: as it says."""
    return dated([window(content, stored_ms)._replace(signed=True)])[0]
