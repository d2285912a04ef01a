"""The simulated serial adapter: CAN FD, what it loses, how it misbehaves, and `fod-sim adapter` itself."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import can
import pytest
from support.sim_hub import DEADLINE_S, RunningHub, receive, running_hub, wait_for

from firmware_sim import adapter_run
from firmware_sim.__main__ import main
from firmware_sim.adapter import GARBAGE
from firmware_sim.frame import Frame
from firmware_sim.replay import ReplayError

LOG = "(1000.000000) can0 123#AABB\n(1000.500000) can0 18DAF110#01\n(1001.000000) can0 124##1{}\n"


class Line:
    """A client's end of the serial line."""

    def __init__(self, path: str) -> None:
        self._port = os.open(path, os.O_RDWR | os.O_NOCTTY)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._port)

    def ask(self, command: bytes) -> bytes:
        """Gives a command and returns the next line, with its end."""
        os.write(self._port, command + b"\r")
        return self.next()

    def next(self) -> bytes:
        """The next line, or BEL."""
        while not (ends := [at for end in b"\r\a" if (at := self._received.find(end)) >= 0]):
            assert select.select([self._port], [], [], DEADLINE_S)[0], self._received
            self._received += os.read(self._port, 4096)
        line, self._received = self._received[: min(ends) + 1], self._received[min(ends) + 1 :]
        return line

    def rest(self, size: int) -> bytes:
        """So many bytes, as they are."""
        while len(self._received) < size:
            self._received += os.read(self._port, 4096)
        return self._received


@contextlib.contextmanager
def opened(**options: Any) -> Iterator[tuple[RunningHub, Line]]:
    with running_hub(**options) as hub, Line(hub.adapter.path) as line:
        assert line.ask(b"O") == b"\r"
        yield hub, line


# --- CAN FD and time stamps -------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "line"),
    [
        (Frame(0x123, bytes(12), is_fd=True), b"d1239" + b"0" * 24),
        (Frame(0x123, bytes(64), is_fd=True, is_switched=True), b"b123F" + b"0" * 128),
        (Frame(0x18DAF110, b"\xaa", is_extended=True, is_fd=True), b"D18DAF1101AA"),
        (Frame(0x18DAF110, b"", is_extended=True, is_fd=True, is_switched=True), b"B18DAF1100"),
        (Frame(0x123, b"\xaa"), b"t1231AA"),
    ],
)
def test_frames_of_can_fd_go_both_ways(frame: Frame, line: bytes) -> None:
    with opened(fd=True) as (hub, serial):
        hub.send(frame)
        assert serial.next() == line + b"\r"
        assert serial.ask(line) == b"\r"
        wait_for(lambda: bool(hub.recorder.frames))
        heard = hub.recorder.frames[0]
        assert (heard.can_id, heard.data, heard.is_extended) == (frame.can_id, frame.data, frame.is_extended)
        assert (heard.is_fd, heard.is_switched) == (frame.is_fd, frame.is_switched)


def test_a_classic_adapter_knows_no_can_fd() -> None:
    with opened() as (hub, serial):
        hub.send(Frame(0x123, bytes(12), is_fd=True))
        hub.send(Frame(0x124))
        assert serial.next() == b"t1240\r"
        assert serial.ask(b"d1230") == b"\a"
        assert serial.ask(b"C") == b"\r"
        assert serial.ask(b"Y2") == b"\a"


def test_data_bit_rates_are_those_of_can_fd_adapters() -> None:
    with running_hub(fd=True) as hub, Line(hub.adapter.path) as serial:
        rates = [n for n in range(10) if serial.ask(b"Y%d" % n) == b"\r"]
    assert rates == [0, 1, 2, 3, 4, 5, 8]


def test_time_stamps_are_sent_when_they_are_asked_for() -> None:
    with running_hub() as hub, Line(hub.adapter.path) as serial:
        assert [serial.ask(command) for command in (b"Z1", b"O")] == [b"\r", b"\r"]
        hub.send(Frame(0x123, b"\xaa"))
        line = serial.next()
        assert line[:7] == b"t1231AA"
        assert int(line[7:11], 16) < 60_000
        assert len(line) == 12


# --- misbehaviour -------------------------------------------------------------------


def test_what_it_loses_it_counts_and_says_once() -> None:
    with opened() as (hub, serial):
        assert serial.ask(b"F") == b"F00\r"
        hub.call(lambda: hub.adapter.lose(2))
        for can_id in (0x100, 0x101, 0x102):
            hub.send(Frame(can_id))
        assert serial.next() == b"t1020\r"
        assert [serial.ask(b"F"), serial.ask(b"F")] == [b"F08\r", b"F00\r"]
        assert (hub.adapter.passed, hub.adapter.dropped) == (1, 2)


def test_a_slow_reader_is_told_that_frames_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firmware_sim.adapter.MAX_BACKLOG_BYTES", 1000)
    with opened() as (hub, serial):

        def burst() -> None:
            for _ in range(60):
                hub.adapter.deliver(Frame(0x100, bytes(8)))

        hub.call(burst)
        lines = [serial.next() for _ in range(hub.adapter.passed)]
        assert set(lines) == {b"t1008" + b"0" * 16 + b"\r"}
        assert len(lines) + hub.adapter.dropped == 60
        assert hub.adapter.dropped > 0
        assert serial.ask(b"F") == b"F01\r"


def test_a_client_at_another_bit_rate_hears_nothing_but_bus_errors() -> None:
    with running_hub(bitrate=500_000) as hub, Line(hub.adapter.path) as serial:
        assert [serial.ask(command) for command in (b"S5", b"O")] == [b"\r", b"\r"]
        hub.call(lambda: hub.adapter.deliver(Frame(0x100)))
        assert serial.ask(b"F") == b"FA0\r"
        assert [serial.ask(command) for command in (b"C", b"S6", b"O")] == [b"\r"] * 3
        hub.send(Frame(0x101))
        assert serial.next() == b"t1010\r"


def test_bus_off_lasts_until_the_channel_is_opened_again() -> None:
    with opened() as (hub, serial):
        hub.call(hub.adapter.go_off)
        hub.call(lambda: hub.adapter.deliver(Frame(0x100)))
        assert serial.ask(b"t1230") == b"\a"
        assert serial.ask(b"F") == b"FA0\r"
        assert [serial.ask(command) for command in (b"C", b"O", b"F")] == [b"\r", b"\r", b"F00\r"]
        hub.send(Frame(0x101))
        assert serial.next() == b"t1010\r"


def test_garbage_spoils_one_frame() -> None:
    with opened() as (hub, serial):
        hub.call(hub.adapter.garble)
        hub.send(Frame(0x100))
        hub.send(Frame(0x101))
        assert serial.rest(len(GARBAGE) + 12) == GARBAGE + b"t1000\rt1010\r"


def test_a_pulled_adapter_is_gone_and_a_plugged_one_is_a_new_line(tmp_path: Path) -> None:
    link = tmp_path / "tty"
    with running_hub(link=link) as hub:
        first = os.open(link, os.O_RDWR | os.O_NOCTTY)
        hub.call(hub.adapter.pull)
        hub.call(hub.adapter.pull)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(first, b"V\r")
        hub.call(lambda: hub.adapter.deliver(Frame(0x100)))
        hub.call(hub.adapter.plug)
        hub.call(hub.adapter.plug)
        os.close(first)
        with Line(str(link)) as serial:
            assert serial.ask(b"V") == b"V1013\r"
    assert not link.is_symlink()


# --- the sources ------------------------------------------------------------------------


def test_frames_are_due_in_the_logs_rhythm_or_at_a_rate_and_again() -> None:
    frames = [(0.0, Frame(1)), (0.5, Frame(2))]
    assert [at for at, _ in adapter_run.schedule(frames, None, None)] == [0, 0.5]
    assert [at for at, _ in adapter_run.schedule(frames, 4, None)] == [0, 0.25]
    assert [at for at, _ in adapter_run.schedule(frames, None, 1.4)] == [0, 0.5, 0.75, 1.25]
    assert [(at, f.can_id) for at, f in adapter_run.schedule(frames, 4, 1)] == [
        (0, 1),
        (0.25, 2),
        (0.5, 1),
        (0.75, 2),
    ]
    assert len(list(adapter_run.schedule([(0.0, Frame(1))], None, 0.01))) == 10


def write_log(folder: Path) -> Path:
    path = folder / "drive.log"
    path.write_text(LOG.format("00" * 12), encoding="utf-8")
    return path


def test_a_log_is_loaded_with_can_fd_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = write_log(tmp_path)
    assert [(at, f.can_id) for at, f in adapter_run.load(path, fd=False)] == [(0, 0x123), (0.5, 0x18DAF110)]
    at_s, frame = adapter_run.load(path, fd=True)[-1]
    assert (at_s, frame.is_fd, frame.is_switched, len(frame.data)) == (1, True, True, 12)
    path.write_text(path.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ReplayError, match="CAN FD frames need --fd"):
        adapter_run.load(path, fd=False)


class AdapterProcess:
    """A running `fod-sim adapter`."""

    def __init__(self, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "firmware_sim", "adapter", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.path = self.next("ready")["slcan"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def next(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        event: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert event["event"] == name
        return event


def python_can(path: str) -> can.BusABC:
    return can.Bus(interface="slcan", channel=path, bitrate=500_000, sleep_after_open=0, ignore_config=True)


@pytest.mark.e2e
def test_a_log_reaches_a_client_that_shares_no_code(tmp_path: Path) -> None:
    arguments = ["--log", write_log(tmp_path), "--rate", 100, "--seconds", 0.5, "--fd", "--wait-client"]
    with AdapterProcess(*arguments, "--fault", "overrun@0.1") as adapter:
        with python_can(adapter.path) as bus:
            messages = [receive_any(bus) for _ in range(40)]
            assert adapter.next("fault")["kind"] == "overrun"
            assert adapter.next("ended") == {"event": "ended", "frames": 40, "dropped": 10}
        assert adapter.process.wait(DEADLINE_S) == 0
    sizes = {m.arbitration_id: (len(m.data), m.is_extended_id, m.is_fd) for m in messages}
    assert sizes == {0x123: (2, False, False), 0x18DAF110: (1, True, False), 0x124: (12, False, True)}


def receive_any(bus: can.BusABC) -> can.Message:
    message = bus.recv(timeout=DEADLINE_S)
    assert message is not None
    return message


@pytest.mark.e2e
def test_it_joins_a_hub_and_ends_with_it(tmp_path: Path) -> None:
    link = tmp_path / "tty"
    with running_hub() as hub, AdapterProcess("--port", hub.server.port, "--link", link) as adapter:
        assert adapter.path == str(link)
        with python_can(str(link)) as bus:
            bus.send(can.Message(arbitration_id=0x7FF, is_extended_id=False, data=b"\x01"))
            wait_for(lambda: any(f.can_id == 0x7FF for f in hub.recorder.frames))
            hub.send(Frame(0x18DAF110, b"\x02\x03", is_extended=True))
            assert bytes(receive(bus, 0x18DAF110).data) == b"\x02\x03"
        hub.loop.call_soon_threadsafe(lambda: hub.loop.create_task(hub.server.close()))
        assert adapter.next("ended")["frames"] == 1
        _, said = adapter.process.communicate(timeout=DEADLINE_S)
        assert adapter.process.returncode == 1
        assert "error: the bus that the adapter had joined is gone" in said


@pytest.mark.e2e
def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with AdapterProcess("--log", write_log(tmp_path), "--wait-client") as adapter:
        adapter.process.send_signal(signal.SIGINT)
        assert adapter.next("ended")["frames"] == 0
        assert adapter.process.wait(DEADLINE_S) == 0


def test_what_is_no_hub_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2 >\r\n")
                connection.recv(100)

        thread = threading.Thread(target=answer)
        thread.start()
        assert main(["adapter", "--port", str(port)]) == 1
        thread.join(DEADLINE_S)
    assert f"127.0.0.1:{port} is no socketcand hub" in capsys.readouterr().err
    assert main(["adapter", "--port", str(port)]) == 1
    assert "Connection refused; is fod-sim run or replay running there?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "one of the arguments --log --port --socketcan is required"),
        (["--port", "1", "--rate", "5"], "go with --log"),
        (["--port", "1", "--fault", "fly@3"], "expected KIND@S, KIND one of pull, plug, overrun"),
        (["--port", "1", "--fault", "pull"], "is not a number"),
        (["--port", "1", "--bitrate", "7"], "7 is not one of 10000, 20000"),
        (["--log", "x", "--rate", "0"], "0 is not from 0.001 to 100000"),
    ],
)
def test_wrong_use_says_what_was_expected(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["adapter", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--log", "/nothing/here.log"], ["--socketcan", "no-such-can"]])
def test_a_source_that_is_not_there_is_named(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapter", *arguments]) == 1
    assert arguments[1] in capsys.readouterr().err
