"""The socketcand client survives a busy, a silent, a broken and a vanished server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.signals_bus import Listener, wait_until

from agent.adapters import socketcand
from agent.adapters.bus import CAN_EFF_FLAG, CAN_ERR_FLAG, BusLostError, RawFrame
from agent.adapters.can_bus import BusState, CanBus
from agent.adapters.socketcand import SocketcandBus
from agent.model import Frame

Script = Callable[[socket.socket], None]


@contextmanager
def server(script: Script) -> Iterator[int]:
    """Serves each connection with `script` on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            try:
                script(connection)
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            connection.close()
        thread.join(5)


def handshake(connection: socket.socket, after: bytes = b"") -> None:
    connection.sendall(b"< hi >")
    assert connection.recv(64) == b"< open can0 >"
    connection.sendall(b"< ok >")
    assert connection.recv(64) == b"< rawmode >"
    connection.sendall(b"< ok >" + after)


def read(bus: SocketcandBus, count: int) -> list[RawFrame]:
    """So many frames; fails if they do not come."""
    frames: list[RawFrame] = []
    for _ in range(count + 10):
        frames += bus.read(0.5)
        if len(frames) >= count:
            return frames
    raise AssertionError(f"only {frames} came")


def test_frames_right_behind_the_handshake_are_not_lost() -> None:
    stream = (
        b"< frame 123 1.500000 0102 >< frame 18DAF110 2.000000 03 04 >\n< error 4 3.0 >< frame 001 4.0  >"
    )
    now_ns = 5_000_000_000
    with server(lambda c: handshake(c, stream)) as port:
        clocks = iter([0])  # the bus is opened at 0, and everything is read at the same time
        bus = SocketcandBus(
            "can0",
            "127.0.0.1",
            port,
            window_s=0,
            monotonic_ns=lambda: next(clocks, now_ns),
            wall_ns=lambda: now_ns,
        )
        frames = read(bus, 4)
        bus.close()
    assert frames == [
        RawFrame(0x123, b"\1\2", 1_500_000_000),
        RawFrame(CAN_EFF_FLAG | 0x18DAF110, b"\3\4", 2_000_000_000),
        RawFrame(CAN_ERR_FLAG | 4, bytes(8), 3_000_000_000),
        RawFrame(1, b"", 4_000_000_000),
    ]


def test_a_closed_connection_is_an_error_not_silence() -> None:
    def close(connection: socket.socket) -> None:
        handshake(connection)
        connection.close()

    with server(close) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        with pytest.raises(BusLostError, match="closed the connection"):
            bus.read(5)
        bus.close()


def test_a_frame_that_cannot_be_read_does_not_end_the_stream() -> None:
    stream = b"< frame XYZ 1.0 01 >< frame FFF 1.0 01 >< frame 1 1.0 01 >< frame 123 1.0 05 >"
    with server(lambda c: handshake(c, stream)) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        (received,) = read(bus, 1)
        bus.close()
    assert received.data == b"\5"
    assert bus.malformed == 3


def test_a_message_without_end_is_refused() -> None:
    with server(lambda c: handshake(c, b"< frame " + b"0" * 5000)) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        with pytest.raises(BusLostError, match="more than 512 bytes"):
            bus.read(5)
        bus.close()


def test_a_silent_or_other_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socketcand, "CONNECT_TIMEOUT_S", 0.05)
    with (
        server(lambda _connection: None) as port,
        pytest.raises(BusLostError, match="found None"),
    ):
        SocketcandBus("can0", "127.0.0.1", port)
    with (
        server(lambda c: c.sendall(b"<html>")) as port,
        pytest.raises(BusLostError, match="<html>"),
    ):
        SocketcandBus("can0", "127.0.0.1", port)


def test_a_channel_cannot_smuggle_a_command() -> None:
    with pytest.raises(ValueError, match="not supported"):
        SocketcandBus("can0 >< send 1 0 ", "127.0.0.1", 1)


def test_a_frame_is_sent_in_the_form_of_the_protocol() -> None:
    received: list[bytes] = []

    def script(connection: socket.socket) -> None:
        handshake(connection)
        received.append(connection.recv(256))

    with server(script) as port:
        listener = Listener()
        bus = CanBus(
            "body",
            "socketcand",
            "can0",
            on_frames=listener.on_frames,
            on_state=listener.on_state,
            listen_only=False,
            host="127.0.0.1",
            port=port,
        )
        bus.open()
        wait_until(lambda: bus.state is BusState.UP)
        bus.send(Frame("body", 0x744, b"\x02\x10\x03"))
        wait_until(lambda: bool(received))
        bus.close()
    assert received == [b"< send 744 3 02 10 03 >"]


def test_a_server_that_went_away_is_lost_and_found_again() -> None:
    served: list[int] = []

    def script(connection: socket.socket) -> None:
        served.append(1)
        handshake(connection, b"< frame 123 1.0 05 >")
        if len(served) == 1:
            connection.close()

    with server(script) as port:
        listener = Listener()
        bus = CanBus(
            "body",
            "socketcand",
            "can0",
            on_frames=listener.on_frames,
            on_state=listener.on_state,
            uniform=lambda low, _high: low,
            host="127.0.0.1",
            port=port,
        )
        bus.open()
        wait_until(lambda: len(listener.frames) == 2)
        bus.close()
    states = [state for state, _ in listener.states]
    assert states == [BusState.UP, BusState.LOST, BusState.UP, BusState.CLOSED]
    assert listener.states[1][1].endswith("the server closed the connection")
