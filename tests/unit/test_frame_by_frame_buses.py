"""Buses whose frames come one at a time: the window, urgency, filters, damage, and replayed logs."""

from __future__ import annotations

import queue
from collections.abc import Callable
from pathlib import Path
from typing import Any

import can
import pytest
from support.signals_data import data_file

from agent.adapters.bus import (
    CAN_EFF_FLAG,
    CAN_ERR_FLAG,
    MAX_BATCH_FRAMES,
    BusEndedError,
    BusLostError,
    RawFrame,
)
from agent.adapters.frame_by_frame import MAX_MALFORMED_IN_A_ROW
from agent.adapters.python_can import PythonCanBus, open_bus
from agent.adapters.replay import ReplayBus, replay_log
from agent.errors import TransportError

NEVER_S = 3600.0
WALL_NS = 1_700_000_000_000_000_000


class PythonBus:
    """A python-can bus whose messages and errors come from the test."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[can.Message | Exception] = queue.SimpleQueue()
        self.sent: list[can.Message] = []
        self.filters: Any = None
        self.error: Exception | None = None
        self.is_shut_down = False
        self.on_empty: Callable[[], None] = lambda: None

    def recv(self, timeout: float | None = None) -> can.Message | None:
        assert timeout is not None
        try:
            item = self.items.get_nowait()
        except queue.Empty:
            self.on_empty()
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def send(self, msg: can.Message, timeout: float | None = None) -> None:
        assert timeout is not None
        if self.error is not None:
            raise self.error
        self.sent.append(msg)

    def set_filters(self, filters: object = None) -> None:
        if self.error is not None:
            raise self.error
        self.filters = filters

    def shutdown(self) -> None:
        self.is_shut_down = True
        raise can.CanOperationError("the device has vanished")


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wall_ns(self) -> int:
        return WALL_NS + self.now_ns

    def run_out(self) -> None:
        """Any wait ends."""
        self.now_ns += int(2 * NEVER_S * 1e9)


def fake(window_s: float = 0.02) -> tuple[PythonCanBus, PythonBus, Clock]:
    clock, inner = Clock(), PythonBus()
    bus = PythonCanBus(inner, window_s=window_s, monotonic_ns=clock.monotonic_ns, wall_ns=clock.wall_ns)
    return bus, inner, clock


def message(can_id: int = 0x100, data: bytes = b"\1", at_s: float = 0.0, **options: bool) -> can.Message:
    options.setdefault("is_extended_id", False)
    return can.Message(timestamp=WALL_NS / 1e9 + at_s, arbitration_id=can_id, data=data, **options)


def ids(frames: list[RawFrame]) -> list[int]:
    return [frame.can_id for frame in frames]


def test_a_window_gathers_frames() -> None:
    bus, inner, clock = fake(window_s=0.02)
    inner.on_empty = lambda: setattr(clock, "now_ns", clock.now_ns + 5_000_000)
    assert bus.read(0.05) == []
    assert clock.now_ns == 50_000_000
    inner.items.put(message(1))
    inner.items.put(message(2))
    assert ids(bus.read(1)) == [1, 2]
    assert clock.now_ns == 70_000_000


def test_an_urgent_frame_does_not_wait_and_keeps_the_order() -> None:
    bus, inner, _ = fake(window_s=NEVER_S)
    bus.receive_only(None, frozenset({0x744}))
    for can_id in (1, 2, 0x744, 3):
        inner.items.put(message(can_id))
    assert ids(bus.read(NEVER_S)) == [1, 2, 0x744]


def test_an_error_frame_does_not_wait() -> None:
    bus, inner, _ = fake(window_s=NEVER_S)
    bus.receive_only(frozenset(), frozenset())
    inner.items.put(message(1))
    inner.items.put(message(0x40, is_error_frame=True))
    assert ids(bus.read(NEVER_S)) == [CAN_ERR_FLAG | 0x40]


def test_a_full_batch_is_handed_on_at_once() -> None:
    bus, inner, _ = fake(window_s=NEVER_S)
    for _ in range(MAX_BATCH_FRAMES + 1):
        inner.items.put(message())
    assert len(bus.read(NEVER_S)) == MAX_BATCH_FRAMES


def test_a_loss_comes_after_what_was_read_before_it() -> None:
    bus, inner, _ = fake(window_s=NEVER_S)
    inner.items.put(message(1))
    inner.items.put(can.CanOperationError("network is down"))
    assert ids(bus.read(NEVER_S)) == [1]
    for _ in range(2):
        with pytest.raises(BusLostError, match="network is down"):
            bus.read(NEVER_S)


def test_damaged_frames_are_counted_and_only_many_in_a_row_are_a_loss() -> None:
    bus, inner, clock = fake(window_s=NEVER_S)
    inner.on_empty = clock.run_out
    for _ in range(MAX_MALFORMED_IN_A_ROW - 1):
        inner.items.put(ValueError("no hex"))
    inner.items.put(message(1))
    assert ids(bus.read(NEVER_S)) == [1]
    assert bus.malformed == MAX_MALFORMED_IN_A_ROW - 1
    for _ in range(MAX_MALFORMED_IN_A_ROW):
        inner.items.put(IndexError("short"))
    with pytest.raises(BusLostError, match="100 malformed frames in a row; last: short"):
        bus.read(NEVER_S)


def test_time_stamps_are_mapped_and_never_go_back_nor_ahead() -> None:
    bus, inner, clock = fake(window_s=NEVER_S)
    clock.now_ns = 10_000_000_000
    inner.on_empty = clock.run_out
    for at_s in (-5.0, 3.0, 2.0, 9.0, 12.0):  # before the opening, then one goes back, one is ahead
        inner.items.put(message(at_s=at_s))
    times_s = [frame.at_ns / 1e9 for frame in bus.read(NEVER_S)]
    assert times_s == pytest.approx([0.0, 3.0, 3.0, 9.0, 10.0], abs=1e-6)


def test_filters_hold_wanted_and_urgent_identifiers() -> None:
    bus, inner, clock = fake(window_s=NEVER_S)
    inner.on_empty = clock.run_out
    bus.receive_only(frozenset({0x100}), frozenset({CAN_EFF_FLAG | 0x18DAF110}))
    assert inner.filters == [
        {"can_id": 0x100, "can_mask": 0x7FF, "extended": False},
        {"can_id": 0x18DAF110, "can_mask": 0x1FFFFFFF, "extended": True},
    ]
    # An interface that cannot filter hands on all.
    inner.items.put(message(0x101))
    inner.items.put(message(0x100, is_extended_id=True))
    inner.items.put(message(0x100, is_remote_frame=True, data=b""))
    inner.items.put(message(0x100))
    assert ids(bus.read(NEVER_S)) == [0x100]
    bus.receive_only(None, frozenset())
    everything = inner.filters
    bus.receive_only(frozenset(), frozenset())
    # To python-can an empty list would mean everything, as None does.
    assert (everything, bool(inner.filters)) == (None, True)
    inner.error = can.CanOperationError("busy")
    with pytest.raises(OSError, match="busy"):
        bus.receive_only(None, frozenset())
    inner.items.put(message(0x100))
    assert bus.read(0) == []


def test_frames_are_sent_with_their_kind_and_errors_are_oserrors() -> None:
    bus, inner, _ = fake()
    bus.send(0x123, b"\1\2", is_fd=False)
    bus.send(CAN_EFF_FLAG | 0x18DAF110, bytes(12), is_fd=True)
    sent = [(m.arbitration_id, m.is_extended_id, m.is_fd, bytes(m.data)) for m in inner.sent]
    assert sent == [(0x123, False, False, b"\1\2"), (0x18DAF110, True, True, bytes(12))]
    with pytest.raises(ValueError, match="DLC was 9"):
        bus.send(1, bytes(9), is_fd=False)
    inner.error = can.CanOperationError("Transmit buffer full")
    with pytest.raises(OSError, match="Transmit buffer full"):
        bus.send(1, b"", is_fd=False)


def test_a_device_that_cannot_be_closed_is_closed() -> None:
    bus, inner, _ = fake()
    bus.close()
    assert inner.is_shut_down
    assert bus.read(NEVER_S) == []


def test_an_interface_that_is_none_is_an_oserror() -> None:
    clock = Clock()
    with pytest.raises(OSError, match="none"):
        open_bus("none", "c", {}, window_s=0, monotonic_ns=clock.monotonic_ns, wall_ns=clock.wall_ns)


# --- replay ------------------------------------------------------------------


def replayed(bus: ReplayBus) -> tuple[list[RawFrame], str]:
    """All frames of a log, and why it ended."""
    frames: list[RawFrame] = []
    try:
        while True:
            frames += bus.read(NEVER_S)
    except BusEndedError as end:
        return frames, str(end)


def test_a_log_is_replayed_whole_and_then_ended() -> None:
    path = data_file("kuksa_model3_dogmode_candump.log")
    frames, end = replayed(ReplayBus(path, 0, monotonic_ns=Clock().monotonic_ns))
    expected = list(replay_log(path, "b"))
    assert [(f.can_id, f.data) for f in frames] == [(f.can_id, f.data) for f in expected]
    assert all(
        abs(found.at_ns - max(frame.monotonic_ns, before)) <= 1000
        for found, frame, before in zip(frames, expected, [0, *(f.at_ns for f in frames)], strict=False)
    )
    assert end == "end of the log"


def test_a_log_keeps_its_own_spacing(tmp_path: Path) -> None:
    path = tmp_path / "short.log"
    path.write_text("(100.000000) can0 001#01\n(100.050000) can0 002#02\n(100.060000) can0 003#03\n")
    clock = Clock()
    bus = ReplayBus(path, 2.0, window_s=0, monotonic_ns=clock.monotonic_ns)
    bus.receive_only(frozenset({1, 3}), frozenset())
    assert ids(bus.read(0)) == [1]
    clock.now_ns = 29_000_000
    assert bus.read(0) == []
    clock.now_ns = 30_000_000
    (three,) = bus.read(0)
    assert (three.can_id, three.at_ns) == (3, 30_000_000)


@pytest.mark.parametrize("name", ["logfile.asc", "test_CanMessage.blf", "test_CanMessage_V2_1.trc"])
def test_logs_of_other_formats_are_read(name: str) -> None:
    frames = list(replay_log(data_file("python-can") / name, "b"))
    assert frames
    assert all(a.monotonic_ns >= 0 for a in frames)


def test_a_log_that_is_none_ends_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "bad.log"
    path.write_text("not a log at all\n")
    with pytest.raises(TransportError, match=r"bad\.log: not a log"):
        list(replay_log(path, "b"))
    with pytest.raises(TransportError, match=r"none\.log: not a log"):
        list(replay_log(tmp_path / "none.log", "b"))
    frames, end = replayed(ReplayBus(path, 0, monotonic_ns=Clock().monotonic_ns))
    assert (frames, "not a log" in end) == ([], True)
    with pytest.raises(ValueError, match="speed -1"):
        ReplayBus(path, -1, monotonic_ns=Clock().monotonic_ns)


def test_a_log_takes_no_frames(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="takes no frames; 0x123"):
        ReplayBus(tmp_path / "any.log", monotonic_ns=Clock().monotonic_ns).send(0x123, b"", is_fd=False)
