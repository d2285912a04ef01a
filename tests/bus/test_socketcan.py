"""What only SocketCAN does: error frames, counted drops, floods, CAN FD, vanished interfaces."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.bus_wires import (
    EFF,
    ERR,
    KernelStation,
    controllers,
    ip,
    kernel_interface,
    own_interface,
    wire,
)
from support.signals_bus import Listener, running_bus, wait_until

from agent.adapters import socketcan
from agent.adapters.bus import BusLostError, RawFrame
from agent.adapters.can_bus import BusState, CanBus, ControllerState
from agent.adapters.socketcan import SocketcanBus
from agent.model import Frame


@pytest.fixture
def station(tmp_path: Path) -> Iterator[KernelStation]:
    with wire("vcan", tmp_path) as made:
        yield made


@pytest.fixture(params=["recvmmsg", "recvmsg"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of fetching frames."""
    name: str = request.param
    if name == "recvmsg":

        def none_here(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSYS, "no recvmmsg")

        monkeypatch.setattr(socketcan, "_Recvmmsg", none_here)
    return name


@contextmanager
def opened(channel: str, **options: Any) -> Iterator[SocketcanBus]:
    bus = SocketcanBus(channel, **options)
    bus.receive_only(None, frozenset())
    try:
        yield bus
    finally:
        bus.close()


def running(channel: str, **options: Any) -> AbstractContextManager[tuple[CanBus, Listener]]:
    return running_bus(interface="socketcan", channel=channel, **options)


def states(listener: Listener) -> list[BusState]:
    return [state for state, _ in listener.states]


def control(bits: int) -> bytes:
    return bytes([0, bits, 0, 0, 0, 0, 0, 0])


# --- the controller's states -------------------------------------------------------


def test_error_frames_lead_through_all_states_of_the_controller(station: KernelStation) -> None:
    with running(kernel_interface(), wanted_ids=[1]) as (bus, listener):
        for number, (bits, state) in enumerate(
            (
                (0x08, ControllerState.ERROR_WARNING),
                (0x20, ControllerState.ERROR_PASSIVE),
                (0x40, ControllerState.ERROR_ACTIVE),
            ),
            start=1,
        ):
            station.send(ERR | 0x04, control(bits))
            station.send(1, bytes([number]))
            wait_until(lambda count=number: len(listener.frames) == count)  # type: ignore[misc]
            assert bus.controller is state
        station.send(ERR | 0x40, bytes(8))
        wait_until(lambda: bus.state is BusState.LOST)
        assert (BusState.LOST, "bus-off") in listener.states
        wait_until(lambda: states(listener).count(BusState.UP) == 2)
        station.send(1, b"\4")
        wait_until(lambda: len(listener.frames) == 4)
        assert bus.counts.error_frames == 4
        assert bus.counts.lost == 1


def test_an_overflow_of_the_controller_is_declared(station: KernelStation) -> None:
    with running(kernel_interface()) as (bus, listener):
        begun_ns = time.monotonic_ns()
        station.send(1, b"\1")
        station.send(ERR | 0x04, control(0x01))
        station.send(1, b"\2")
        wait_until(lambda: len(listener.frames) == 2)
        ((from_ns, to_ns, count),) = listener.drops
        assert from_ns <= to_ns
        assert begun_ns <= to_ns <= time.monotonic_ns()
        assert (count, bus.counts.dropped) == (1, 1)


def test_an_interface_that_vanishes_is_lost_and_found_again() -> None:
    name = own_interface()
    with running(name) as (bus, listener):
        ip("link", "del", name)
        try:
            wait_until(lambda: bus.state is BusState.LOST)
            wait_until(lambda: any("No such device" in reason for _, reason in listener.states))
        finally:
            ip("link", "add", name, "type", "vcan")
            ip("link", "set", name, "up", "mtu", "72")
        wait_until(lambda: bus.state is BusState.UP)
        station = KernelStation(name, name)
        station.send(1, b"\1")
        wait_until(lambda: bool(listener.frames))
        station.close()


def test_an_interface_that_is_down_is_no_open_bus() -> None:
    name = own_interface()
    ip("link", "set", name, "down")
    try:
        with pytest.raises(OSError, match="Network is down"):
            SocketcanBus(name)
    finally:
        ip("link", "set", name, "up")
    with pytest.raises(OSError, match="No such device"):
        SocketcanBus("none0")


@pytest.mark.timeout(120)
def test_an_adapter_that_is_pulled_is_lost_and_found_again(tmp_path: Path) -> None:
    near, _ = controllers()
    device = Path("/sys/class/net", near, "device").resolve()
    with wire("controllers", tmp_path) as station, running(near) as (bus, listener):
        station.send(1, b"\1")
        wait_until(lambda: bool(listener.frames))
        (device / "remove").write_text("1")
        wait_until(lambda: bus.state is BusState.LOST)
        Path("/sys/bus/pci/rescan").write_text("1")
        wait_until(Path("/sys/class/net", near).exists)
        ip("link", "set", near, "type", "can", "bitrate", "500000")
        ip("link", "set", near, "up")
        wait_until(lambda: bus.state is BusState.UP)
        station.send(2, b"\2")
        wait_until(lambda: listener.frames[-1].can_id == 2)
        assert bus.counts.lost >= 1


# --- drops -----------------------------------------------------------------------------


@pytest.mark.usefixtures("call")
@pytest.mark.parametrize("last", [True, False], ids=["a frame after it", "silence after it"])
def test_what_the_kernel_drops_is_counted(
    station: KernelStation, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    monkeypatch.setattr(socketcan, "RECEIVE_BUFFER_BYTES", 4096)
    with opened(kernel_interface()) as bus:
        assert bus.read(0) == []
        for number in range(500):
            station.send(1, number.to_bytes(2, "big"))
        frames = bus.read(0.1)
        if last:
            station.send(1, b"\xff\xff")
        while more := bus.read(0.1):
            frames += more
        kept = [int.from_bytes(f.data, "big") for f in frames]
        assert 0 < len(frames) < 500
        assert kept[: len(kept) - last] == list(range(len(kept) - last))
        assert bus.dropped == 500 - (len(frames) - last)


@pytest.mark.usefixtures("call")
def test_what_came_before_a_loss_and_after_it_are_told_apart(
    station: KernelStation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketcan, "RECEIVE_BUFFER_BYTES", 4096)
    with opened(kernel_interface()) as bus:
        for number in range(200):
            station.send(1, bytes([number]))
        bus._socket.recv(16)  # room for one more, behind the loss
        station.send(1, b"\xff")
        before = bus.read(0.1)
        assert bus.dropped == 0
        assert [f.data[0] for f in before] == list(range(1, 1 + len(before)))
        assert [f.data for f in bus.read(0)] == [b"\xff"]
        assert bus.dropped == 200 - 1 - len(before)


def test_drops_reach_the_agent_with_their_bounds(
    station: KernelStation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socketcan, "RECEIVE_BUFFER_BYTES", 4096)
    stalled, go_on = threading.Event(), threading.Event()
    listener = Listener()

    def on_frames(name: str, frames: Sequence[RawFrame]) -> None:
        listener.on_frames(name, frames)
        stalled.set()
        assert go_on.wait(10)

    bus = CanBus(
        "body",
        "socketcan",
        kernel_interface(),
        on_frames=on_frames,
        on_state=listener.on_state,
        on_dropped=listener.on_dropped,
    )
    bus.open()
    try:
        wait_until(listener.saw(BusState.UP))
        station.send(1, b"\1")
        assert stalled.wait(10)
        for _ in range(300):
            station.send(1, b"\2")
        go_on.set()
        wait_until(lambda: bus.counts.frames + bus.counts.dropped == 301)
        station.send(1, b"\3")
        wait_until(lambda: bus.counts.frames + bus.counts.dropped == 302)
        first_ns = listener.frames[0].at_ns
        assert listener.drops[0][0] >= first_ns
        assert all(from_ns <= to_ns <= time.monotonic_ns() for from_ns, to_ns, _ in listener.drops)
        assert sum(count for _, _, count in listener.drops) == bus.counts.dropped > 0
        # The loss lies between the frames that were handed on before it and those that came after it.
        before = listener.batches[: listener.order.index("drop")]
        assert listener.drops[0][0] == before[-1][-1].at_ns
        assert listener.frames[-1].data == b"\3"
        assert listener.order[-1] == "frames"
    finally:
        go_on.set()
        bus.close()


def test_the_buffer_holds_seconds_of_a_full_bus(station: KernelStation) -> None:
    if os.geteuid() != 0:
        pytest.skip("the large buffer needs CAP_NET_ADMIN")
    with opened(kernel_interface()) as bus:
        for number in range(9000):
            station.send(1, number.to_bytes(2, "big"))
        frames: list[RawFrame] = []
        while more := bus.read(0.1):
            assert len(more) <= 5000
            frames += more
        assert [int.from_bytes(f.data, "big") for f in frames] == list(range(9000))
        assert bus.dropped == 0


def test_without_the_right_to_a_large_buffer_the_bus_opens_and_says_so(
    station: KernelStation, caplog: pytest.LogCaptureFixture
) -> None:
    own_interface()
    os.seteuid(65_534)
    try:
        with opened(kernel_interface()) as bus:
            station.send(1, b"\1")
            assert [f.can_id for f in bus.read(1)] == [1]
    finally:
        os.seteuid(0)
    assert "the CAN receive buffer is small" in caplog.text


# --- floods ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_babbling_identifier_does_not_hide_the_others(station: KernelStation, is_wanted: bool) -> None:
    babble, other = 0x001, 0x200
    wanted = [babble, other] if is_wanted else [other]
    stop = threading.Event()
    sent = 0
    with running(kernel_interface(), wanted_ids=wanted, urgent_ids=[0x7E8]) as (bus, listener):

        def flood() -> None:
            nonlocal sent
            while not stop.is_set():
                for _ in range(100):
                    station.send(babble, b"\xff" * 8)
                sent += 100

        thread = threading.Thread(target=flood)
        peer = KernelStation(kernel_interface(), kernel_interface())
        thread.start()
        try:
            for number in range(50):
                peer.send(other, bytes([number]))
                peer.send(0x7E8, bytes([number]))
                time.sleep(0.01)
        finally:
            stop.set()
            thread.join()
            peer.close()
        expected = 100 + (sent if is_wanted else 0)
        wait_until(lambda: bus.counts.frames + bus.counts.dropped == expected)
        for can_id in (other, 0x7E8):
            assert [f.data[0] for f in listener.frames if f.can_id == can_id] == list(range(50))
        assert bus.counts.dropped == sum(count for _, _, count in listener.drops)
        assert bus.state is BusState.UP


def test_a_flood_of_urgent_frames_does_not_spin(station: KernelStation) -> None:
    stop = threading.Event()
    with opened(kernel_interface()) as bus:
        bus.receive_only(frozenset(), frozenset({0x7E8}))

        def flood() -> None:
            while not stop.is_set():
                station.send(0x7E8, b"\1")

        thread = threading.Thread(target=flood)
        begun_ns = time.monotonic_ns()
        thread.start()
        reads = 0
        while time.monotonic_ns() - begun_ns < 300_000_000:
            bus.read(1)
            reads += 1
        stop.set()
        thread.join()
        took_ms = (time.monotonic_ns() - begun_ns) / 1e6
    assert reads <= took_ms + 1


# --- frames ------------------------------------------------------------------------------


@pytest.mark.usefixtures("call")
def test_frames_of_can_fd_cross_whole_beside_classic_ones(station: KernelStation) -> None:
    with running(kernel_interface(), fd=True, listen_only=False) as (bus, listener):
        for length in (0, 8, 12, 64):
            station.send_fd(EFF | 0x100, bytes(range(length)))
        station.send(0x101, b"\1\2")
        wait_until(lambda: len(listener.frames) == 5)
        expected = [(EFF | 0x100, bytes(range(length))) for length in (0, 8, 12, 64)]
        assert [(f.can_id, f.data) for f in listener.frames] == [*expected, (0x101, b"\1\2")]
        bus.send(Frame("body", 0x123, bytes(range(64)), is_fd=True))
        assert station.hear() == (0x123, bytes(range(64)))
        bus.send(Frame("body", 0x124, b"\1"))
        assert len(station.socket.recv(72)) == 16


def test_a_bus_without_can_fd_hears_nothing_of_it(station: KernelStation) -> None:
    with opened(kernel_interface()) as bus:
        station.send_fd(0x100, bytes(64))
        station.send(0x101, b"\1")
        assert [f.can_id for f in bus.read(1)] == [0x101]


def test_own_frames_are_not_heard_and_those_of_a_neighbour_are(station: KernelStation) -> None:
    # The identifier is urgent: the socket that wakes the reader would hear it.
    with opened(kernel_interface()) as one, opened(kernel_interface()) as two:
        for bus in (one, two):
            bus.receive_only(frozenset(), frozenset({0x744}))
        one.send(0x744, b"\1", is_fd=False)
        assert [f.can_id for f in two.read(1)] == [0x744]
        assert station.hear() == (0x744, b"\1")
        assert one.read(0.05) == []


def test_a_full_queue_is_waited_for_and_not_for_ever(
    station: KernelStation, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = [0]
    with opened(kernel_interface(), monotonic_ns=lambda: now_ns[0]) as bus:

        class Full:
            """A socket whose interface has no room for a while."""

            def __init__(self, refusals: int, real: socket.socket) -> None:
                self.refusals, self.real = refusals, real

            def send(self, content: bytes, flags: int) -> int:
                now_ns[0] += 1_000_000
                self.refusals -= 1
                if self.refusals >= 0:
                    raise OSError(errno.ENOBUFS, "No buffer space available")
                return self.real.send(content, flags)

        with monkeypatch.context() as patch:
            patch.setattr(bus, "_socket", Full(20, bus._socket))
            bus.send(1, b"\1", is_fd=False)
        assert station.hear() == (1, b"\1")
        with monkeypatch.context() as patch:
            patch.setattr(bus, "_socket", full := Full(1000, bus._socket))
            with pytest.raises(OSError, match="No buffer space"):
                bus.send(1, b"\1", is_fd=False)
        assert 40 < 1000 - full.refusals < 60


def test_a_clock_that_is_set_moves_no_frame_out_of_its_window(station: KernelStation) -> None:
    wall_ns = [0]
    with opened(kernel_interface(), wall_ns=lambda: time.time_ns() + wall_ns[0]) as bus:
        last_ns = time.monotonic_ns()
        for step_ns in (0, 3600 * 10**9, -7200 * 10**9, 10**6):
            wall_ns[0] += step_ns
            station.send(1, b"\1")
            (frame,) = bus.read(1)
            assert last_ns - 5_000_000 <= frame.at_ns <= time.monotonic_ns()
            last_ns = time.monotonic_ns()
            assert bus.read(0) == []


def _read_for_ever(bus: SocketcanBus) -> None:
    while True:
        bus.read(60)


def test_a_closed_bus_is_a_lost_one_to_its_reader() -> None:
    bus = SocketcanBus(kernel_interface())
    closed = threading.Event()

    def read() -> None:
        with pytest.raises(BusLostError, match="closed"):
            _read_for_ever(bus)
        closed.set()

    reader = threading.Thread(target=read)
    reader.start()
    bus.close()
    bus.close()
    assert closed.wait(10)
    reader.join()
    with pytest.raises(OSError, match="Bad file descriptor"):
        bus.send(1, b"", is_fd=False)


def test_the_memory_of_the_call_is_laid_out_as_the_kernel_writes_it(station: KernelStation) -> None:
    with opened(kernel_interface()) as bus:
        for number in range(3):
            station.send(EFF | number, bytes(number))
        before_s = time.time()
        rows = bus._rows()
        assert [(row[0], row[1], row[2][: row[1]]) for row in rows] == [
            (EFF | number, number, bytes(number)) for number in range(3)
        ]
        assert all(abs(row[3] + row[4] / 1e9 - before_s) < 60 for row in rows)
        assert [row[5] for row in rows] == [0, 0, 0]
        assert struct.calcsize("=IB3x8s") == 16
