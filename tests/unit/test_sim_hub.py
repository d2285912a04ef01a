"""The hub and the serial adapter join real python-can clients into one bus."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator

import can
import pytest
from support.sim_hub import RunningHub, receive, running_hub, wait_for

from firmware_sim import hub as sim_hub
from firmware_sim.adapter import MAX_BACKLOG_BYTES
from firmware_sim.frame import Frame

STANDARD = can.Message(arbitration_id=0x123, is_extended_id=False, data=b"\x00\x01\xff")
EXTENDED = can.Message(arbitration_id=0x18DAF110, is_extended_id=True, data=bytes(8))
EMPTY = can.Message(arbitration_id=0x124, is_extended_id=False, data=b"")


@pytest.fixture
def hub() -> Iterator[RunningHub]:
    with running_hub() as running:
        yield running


def read_until(connection: socket.socket, text: bytes) -> bytes:
    received = b""
    while text not in received:
        part = connection.recv(4096)
        assert part, f"closed after {received!r}"
        received += part
    return received


def join(hub: RunningHub) -> socket.socket:
    """A plain client in raw mode."""
    connection = hub.raw()
    read_until(connection, b"< hi >")
    connection.sendall(b"< open can0 >")
    read_until(connection, b"< ok >")
    connection.sendall(b"< rawmode >")
    read_until(connection, b"< ok >")
    return connection


@pytest.mark.parametrize("message", [STANDARD, EXTENDED, EMPTY])
def test_two_clients_and_the_simulator_hear_one_another(hub: RunningHub, message: can.Message) -> None:
    with hub.client() as first, hub.client() as second:
        first.send(message)
        heard = receive(second, message.arbitration_id)
        assert bytes(heard.data) == bytes(message.data)
        assert heard.is_extended_id == message.is_extended_id
        assert abs(heard.timestamp - time.time()) < 10
        wait_for(lambda: any(f.can_id == message.arbitration_id for f in hub.recorder.frames))
        hub.send(Frame(0x321, b"\x42"))
        assert bytes(receive(first, 0x321).data) == b"\x42"
        assert bytes(receive(second, 0x321).data) == b"\x42"


def test_a_client_does_not_hear_itself(hub: RunningHub) -> None:
    with hub.client() as client:
        client.send(STANDARD)
        hub.send(Frame(0x321))
        message = client.recv(timeout=5)
        assert message is not None
        assert message.arbitration_id == 0x321


@pytest.mark.parametrize(
    "line",
    [
        b"< send 800 0 >",
        b"< send 12 1 00 >",
        b"< send 123 2 00 >",
        b"< send 123 9 0 0 0 0 0 0 0 0 0 >",
        b"< send 20000000 0 >",
        b"< send 123 1 zz >",
        b"< fly >",
        b"send 123 0 >",
        b"< send \xff\xfe >",
        b">",
        b"< rawmode >",
    ],
)
def test_a_malformed_line_gets_an_error_and_the_next_one_works(hub: RunningHub, line: bytes) -> None:
    with join(hub) as connection:
        connection.sendall(line)
        assert b"malformed" in read_until(connection, b"malformed command >")
        connection.sendall(b"< send 123 1 7 >")
        wait_for(lambda: any(f.data == b"\x07" for f in hub.recorder.frames))
        assert len(hub.recorder.frames) == 1


def test_a_line_without_end_disconnects(hub: RunningHub) -> None:
    with join(hub) as connection:
        connection.sendall(b"< " + b"x" * 1000)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    wait_for(lambda: hub.server.client_count == 0)


def test_nothing_is_sent_before_raw_mode(hub: RunningHub) -> None:
    with hub.raw() as connection:
        read_until(connection, b"< hi >")
        connection.sendall(b"< send 123 0 >")
        read_until(connection, b"malformed command >")
        assert hub.recorder.frames == []


def test_another_channel_is_refused(hub: RunningHub) -> None:
    with hub.raw() as connection:
        read_until(connection, b"< hi >")
        connection.sendall(b"< open can7 >")
        assert b"ok" not in read_until(connection, b"malformed command >")


def test_a_client_that_does_not_read_loses_frames_and_others_do_not(
    hub: RunningHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sim_hub, "MAX_BACKLOG_BYTES", 2000)
    with hub.client() as reader, join(hub) as sleeper:
        sleeper.sendall(b"< send 7FE 0 >")
        receive(reader, 0x7FE)
        for burst in range(200):
            for _ in range(500):
                hub.send(Frame(0x100, bytes(8)))
            hub.send(Frame(0x200, burst.to_bytes(2)))
            assert bytes(receive(reader, 0x200).data) == burst.to_bytes(2)
            if "too slow" in caplog.text:
                break
        assert "too slow" in caplog.text


def test_too_many_clients_are_turned_away(hub: RunningHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_hub, "MAX_CLIENTS", 1)
    with hub.raw() as first, hub.raw() as second:
        read_until(first, b"< hi >")
        with contextlib.suppress(ConnectionResetError):
            assert second.recv(100) == b""


# --- slcan ---


def slcan(hub: RunningHub) -> can.BusABC:
    return can.Bus(
        interface="slcan",
        channel=hub.adapter.path,
        bitrate=500_000,
        sleep_after_open=0,
        ignore_config=True,
    )


def test_python_can_speaks_slcan_to_the_adapter(hub: RunningHub) -> None:
    remote = can.Message(arbitration_id=0x125, is_extended_id=False, is_remote_frame=True, dlc=4)
    with slcan(hub) as serial, hub.client() as other:
        for message in (STANDARD, EXTENDED, EMPTY):
            serial.send(message)
            assert bytes(receive(other, message.arbitration_id).data) == bytes(message.data)
            other.send(message)
            heard = receive(serial, message.arbitration_id)
            assert bytes(heard.data) == bytes(message.data)
            assert heard.is_extended_id == message.is_extended_id
        serial.send(remote)
        wait_for(lambda: any(f.remote_dlc == 4 for f in hub.recorder.frames))
        hub.send(Frame(0x126, remote_dlc=2))
        assert receive(serial, 0x126).is_remote_frame


def exchange(port: int, command: bytes) -> bytes:
    os.write(port, command)
    return os.read(port, 100)


def test_adapter_answers_each_command_with_cr_or_bel(hub: RunningHub) -> None:
    port = os.open(hub.adapter.path, os.O_RDWR | os.O_NOCTTY)
    try:
        for command, answer in [
            (b"V\r", b"V1013\r"),
            (b"N\r", b"NF00D\r"),
            (b"\r", b"\r"),
            (b"F\r", b"\a"),
            (b"t1230\r", b"\a"),
            (b"S9\r", b"\a"),
            (b"S6\r", b"\r"),
            (b"O\r", b"\r"),
            (b"O\r", b"\a"),
            (b"S6\r", b"\a"),
            (b"F\r", b"F00\r"),
            (b"t1232AABB\r", b"\r"),
            (b"t1232AAB\r", b"\a"),
            (b"t8000\r", b"\a"),
            (b"t1239" + b"00" * 9 + b"\r", b"\a"),
            (b"T200000000\r", b"\a"),
            (b"r1234\r", b"\r"),
            (b"r123400000000\r", b"\a"),
            (b"x\xff\r", b"\a"),
            (b"y" * 200, b"\a"),
            (b"C\r", b"\r"),
            (b"L\r", b"\r"),
            (b"t1230\r", b"\a"),
        ]:
            assert exchange(port, command) == answer, command
    finally:
        os.close(port)
    assert [(f.can_id, f.data, f.remote_dlc) for f in hub.recorder.frames] == [
        (0x123, b"\xaa\xbb", None),
        (0x123, b"", 4),
    ]


def test_a_serial_reader_that_sleeps_loses_frames_and_memory_stays_bounded(hub: RunningHub) -> None:
    port = os.open(hub.adapter.path, os.O_RDWR | os.O_NOCTTY)
    try:
        assert exchange(port, b"O\r") == b"\r"
        # By load, a pseudo-terminal takes 4 to 64 KiB before the bounded backlog fills (22 bytes a frame).
        for _ in range(20_000):
            hub.send(Frame(0x100, bytes(8)))
        wait_for(lambda: hub.adapter.dropped > 0)
        assert len(hub.adapter._waiting) <= MAX_BACKLOG_BYTES + 64
    finally:
        os.close(port)
