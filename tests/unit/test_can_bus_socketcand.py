"""The socketcand client survives a busy, a silent, a broken and a vanished server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import can
import pytest
from support.signals_bus import Listener, wait_until

from agent.adapters import socketcand
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


def test_frames_right_behind_the_handshake_are_not_lost() -> None:
    stream = (
        b"< frame 123 1.500000 0102 >< frame 18DAF110 2.000000 03 04 >\n< error 4 3.0 >< frame 001 4.0  >"
    )
    with server(lambda c: handshake(c, stream)) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        frames = [bus.recv(5) for _ in range(4)]
        bus.shutdown()
    found = [f for f in frames if f is not None]
    assert [f.arbitration_id for f in found if not f.is_error_frame] == [0x123, 0x18DAF110, 1]
    assert [bytes(f.data) for f in found if not f.is_error_frame] == [b"\1\2", b"\3\4", b""]
    assert [f.is_extended_id for f in found if not f.is_error_frame] == [False, True, False]
    assert found[0].timestamp == 1.5
    assert found[2].is_error_frame


def test_a_closed_connection_is_an_error_not_silence() -> None:
    def close(connection: socket.socket) -> None:
        handshake(connection)
        connection.close()

    with server(close) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        with pytest.raises(can.CanOperationError, match="closed the connection"):
            bus.recv(5)
        bus.shutdown()


def test_a_frame_that_cannot_be_read_does_not_end_the_stream() -> None:
    stream = b"< frame XYZ 1.0 01 >< frame FFF 1.0 01 >< frame 1 1.0 01 >< frame 123 1.0 05 >"
    with server(lambda c: handshake(c, stream)) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        for _ in range(3):
            with pytest.raises(ValueError):  # noqa: PT011
                bus.recv(5)
        received = bus.recv(5)
        bus.shutdown()
    assert received is not None
    assert bytes(received.data) == b"\5"


def test_a_message_without_end_is_refused() -> None:
    with server(lambda c: handshake(c, b"< frame " + b"0" * 5000)) as port:
        bus = SocketcandBus("can0", "127.0.0.1", port)
        with pytest.raises(can.CanOperationError, match="more than 512 bytes"):
            bus.recv(5)
        bus.shutdown()


def test_a_silent_or_other_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socketcand, "CONNECT_TIMEOUT_S", 0.05)
    with (
        server(lambda _connection: None) as port,
        pytest.raises(can.CanInitializationError, match="found None"),
    ):
        SocketcandBus("can0", "127.0.0.1", port)
    with (
        server(lambda c: c.sendall(b"<html>")) as port,
        pytest.raises(can.CanInitializationError, match="<html>"),
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
