"""What every bus does, whatever carries it: one suite over virtual, slcan and SocketCAN."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support.bus_wires import EFF, RTR, Station, own_interface, wire
from support.signals_bus import Listener, running_bus, wait_until

from agent.adapters import socketcan
from agent.adapters.bus import RawFrame
from agent.adapters.can_bus import BusState, CanBus
from agent.errors import VehicleError
from agent.model import Frame

FAST = ("virtual", "slcan", "vcan", "vcan-recvmsg")
KINDS = (*FAST, "controllers")
LONG_S = 1000.0


@pytest.fixture(params=KINDS)
def station(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Station]:
    yield from _station(request.param, tmp_path, monkeypatch)


@pytest.fixture(params=FAST)
def fast_station(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Station]:
    """Not the emulated controllers: they have no wire that would take its time, and lose frames in bursts."""
    yield from _station(request.param, tmp_path, monkeypatch)


def _station(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Station]:
    if kind == "vcan-recvmsg":

        def none_here(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSYS, "no recvmmsg")

        monkeypatch.setattr(socketcan, "_Recvmmsg", none_here)
    with wire(kind, folder) as made:
        yield made


def running(station: Station, **options: Any) -> AbstractContextManager[tuple[CanBus, Listener]]:
    """A bus on the station's wire, up; it may send."""
    return running_bus(**{"listen_only": False, **station.options, **options})


def heard(listener: Listener, count: int) -> list[RawFrame]:
    """So many frames; fails if they do not come."""
    wait_until(lambda: len(listener.frames) >= count)
    return listener.frames


def plain(frames: list[RawFrame]) -> list[tuple[int, bytes]]:
    return [(frame.can_id, frame.data) for frame in frames]


FRAMES = [
    *((0x100 + length, bytes(range(length))) for length in range(9)),
    (0, b"\0"),
    (0x7FF, b"\xff" * 8),
    (EFF | 0, b"\1"),
    (EFF | 0x7FF, b"\2"),
    (EFF | 0x1FFFFFFF, b"\3"),
]


def test_frames_of_both_kinds_and_all_lengths_cross_in_order(station: Station) -> None:
    with running(station) as (bus, listener):
        for can_id, data in FRAMES:
            station.send(can_id, data)
        assert plain(heard(listener, len(FRAMES))) == FRAMES
        for can_id, data in FRAMES:
            bus.send(Frame("body", can_id & ~EFF, data, is_extended=bool(can_id & EFF)))
            assert station.hear() == (can_id, data)
        assert bus.counts.frames == len(FRAMES)  # none of its own
    assert (bus.counts.dropped, bus.counts.malformed, listener.drops) == (0, 0, [])


def test_only_wanted_and_urgent_identifiers_arrive(station: Station) -> None:
    extended = EFF | 0x100
    with running(station, wanted_ids=[0x100, EFF | 0x200], urgent_ids=[0x7E8]) as (bus, listener):
        for can_id in (0x100, extended, 0x200, EFF | 0x200, 0x7E8, 0x101, 0x100):
            station.send(can_id, b"\1")
        assert [f.can_id for f in heard(listener, 4)] == [0x100, EFF | 0x200, 0x7E8, 0x100]
        bus.receive([extended], [])
        for can_id in (0x100, 0x7E8, extended):
            station.send(can_id, b"\2")
        assert heard(listener, 5)[4:][0].can_id == extended
        bus.receive(None, [])
        station.send(0x555, b"\3")
        assert [f.can_id for f in heard(listener, 6)[5:]] == [0x555]
        bus.receive([], [])
        station.send(0x100, b"\4")
        bus.receive([0x101], [])
        station.send(0x101, b"\5")
        assert [f.can_id for f in heard(listener, 7)[6:]] == [0x101]


def test_hundreds_of_identifiers_are_filtered_right(station: Station) -> None:
    # SocketCAN takes 512 filters for a socket.
    for count in (512, 700):
        wanted = [*range(0, 2 * (count - 10), 2), *(EFF | (n << 12) for n in range(10))]
        assert len(set(wanted)) == count
        with running(station, wanted_ids=wanted) as (_, listener):
            for can_id in (*range(40), EFF | 0x1000, EFF | 0x1001, EFF | 0x9000, 0x7FF):
                station.send(can_id, b"\1")
            expected = [*range(0, 40, 2), EFF | 0x1000, EFF | 0x9000]
            assert [f.can_id for f in heard(listener, len(expected))] == expected


def test_remote_frames_are_left_out(station: Station) -> None:
    with running(station) as (_, listener):
        station.send(RTR | 0x100, b"")
        station.send(0x101, b"\1")
        assert [f.can_id for f in heard(listener, 1)] == [0x101]


def test_times_lie_between_sending_and_hearing_and_never_go_back(station: Station) -> None:
    with running(station) as (_, listener):
        sent_ns = []
        for number in range(50):
            sent_ns.append(time.monotonic_ns())
            station.send(0x100, bytes([number]))
        frames = heard(listener, 50)
        heard_ns = time.monotonic_ns()
    # The kernel's clocks and time stamps have their own grain.
    assert all(before - 5_000_000 <= f.at_ns <= heard_ns for before, f in zip(sent_ns, frames, strict=True))
    assert [f.at_ns for f in frames] == sorted(f.at_ns for f in frames)


def test_an_urgent_frame_does_not_wait_for_the_window_and_keeps_the_order(station: Station) -> None:
    with running(station, wanted_ids=[1, 2], urgent_ids=[0x7E8], window_s=LONG_S) as (_, listener):
        station.send(1, b"\1")
        station.send(2, b"\1")
        station.send(0x7E8, b"\1")
        assert [f.can_id for f in heard(listener, 3)] == [1, 2, 0x7E8]


def test_a_burst_arrives_whole(fast_station: Station) -> None:
    with running(fast_station) as (bus, listener):
        for number in range(1500):
            fast_station.send(0x100 + number % 7, number.to_bytes(2, "big"))
        frames = heard(listener, 1500)
    assert [int.from_bytes(f.data, "big") for f in frames] == list(range(1500))
    assert (bus.counts.dropped, listener.drops) == (0, [])


def test_what_is_no_frame_is_not_sent(station: Station) -> None:
    with running(station) as (bus, _):
        with pytest.raises(VehicleError, match="frame 0x1 was not sent"):
            bus.send(Frame("body", 1, bytes(9)))
        with pytest.raises(VehicleError, match="frame 0x2 was not sent"):
            bus.send(Frame("body", 2, bytes(8), is_fd=True))
        bus.send(Frame("body", 3, b"\1"))
        assert station.hear() == (3, b"\1")


def test_a_bus_is_closed_at_once_and_can_be_opened_again(station: Station) -> None:
    for _ in range(2):
        with running(station, window_s=LONG_S) as (bus, listener):
            station.send(1, b"\1")
        assert [s for s, _ in listener.states] == [BusState.UP, BusState.CLOSED]
        assert bus.state is BusState.CLOSED


def test_filters_may_change_while_frames_come(fast_station: Station) -> None:
    with running(fast_station, wanted_ids=[1], urgent_ids=[2]) as (bus, listener):
        done = threading.Event()

        def change() -> None:
            while not done.is_set():
                bus.receive([1, 3], [2])
                bus.receive([1], [2])

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for number in range(300):
                fast_station.send(1 + number % 2, number.to_bytes(2, "big"))
            frames = heard(listener, 300)
        finally:
            done.set()
            thread.join()
    assert [int.from_bytes(f.data, "big") for f in frames] == list(range(300))


@pytest.fixture(params=["slcan", "vcan"])
def pullable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "vcan":
        own_interface()
    with wire(request.param, tmp_path) as made:
        yield made


def test_a_wire_that_was_cut_is_lost_and_found_again(pullable: Station) -> None:
    with running(pullable) as (bus, listener):
        pullable.send(1, b"\1")
        heard(listener, 1)
        pullable.cut()
        wait_until(lambda: bus.state is BusState.LOST)
        with pytest.raises(VehicleError, match="bus body is lost"):
            bus.send(Frame("body", 1, b"\1"))
        ups = len([s for s, _ in listener.states if s is BusState.UP])
        pullable.mend()
        wait_until(lambda: len([s for s, _ in listener.states if s is BusState.UP]) > ups)
        _until_heard(lambda: pullable.send(2, b"\2"), listener, 2)
        assert bus.counts.lost >= 1


def _until_heard(send: Callable[[], None], listener: Listener, can_id: int) -> None:
    """A bus that has just come up may lose its first frames."""

    def seen() -> bool:
        send()
        return any(frame.can_id == can_id for frame in listener.frames)

    wait_until(seen)
