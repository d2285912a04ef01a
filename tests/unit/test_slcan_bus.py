"""The slcan bus on a pseudo-terminal: opening every kind of adapter, windows, sending, and its end."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.serial_adapter import (
    SerialAdapter,
    lawicel,
    opened,
    plugged,
    read,
    read_until_lost,
    silent_canable,
    weact,
)
from support.sim_hub import wait_for

from agent.adapters import slcan
from agent.adapters.bus import CAN_EFF_FLAG, CAN_ERR_FLAG, BusLostError
from agent.adapters.slcan import SlcanBus, _timing

# --- opening ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "listen_only", "commands"),
    [
        (lawicel, False, [b"C", b"C", b"V", b"S6", b"M0", b"O"]),
        (lawicel, True, [b"C", b"C", b"V", b"S6", b"L"]),
        (weact, False, [b"C", b"C", b"V", b"S6", b"M0", b"O"]),
        (weact, True, [b"C", b"C", b"V", b"S6", b"L", b"M1", b"O"]),
        (silent_canable, False, [b"C", b"C", b"V", b"S6", b"M0", b"O"]),
        (silent_canable, True, [b"C", b"C", b"V", b"S6", b"L", b"M1", b"O"]),
    ],
)
def test_each_kind_of_adapter_is_opened_in_its_way_and_closed(
    answer: Callable[[bytes], bytes], listen_only: bool, commands: list[bytes]
) -> None:
    with plugged(answer) as adapter:
        with opened(adapter, listen_only=listen_only) as bus:
            adapter.heard(commands[-1])
            assert adapter.commands == commands
            adapter.say(b"t1232AABB\r")
            assert [(f.can_id, f.data) for f in read(bus, 1)] == [(0x123, b"\xaa\xbb")]
            assert bus.dropped == 0
        wait_for(lambda: adapter.commands[-1] == b"C")


@pytest.mark.parametrize(
    ("bitrate", "fd", "data_bitrate", "commands"),
    [
        (None, False, 2_000_000, []),
        (125_000, False, 2_000_000, [b"S4"]),
        (83_333, False, 2_000_000, [b"S9"]),
        (33_333, False, 2_000_000, [b"s0E1C"]),
        (500_000, True, 2_000_000, [b"S6", b"Y2"]),
        (1_000_000, True, 5_000_000, [b"S8", b"Y5"]),
    ],
)
def test_bit_rates_are_set_as_the_adapter_names_them(
    bitrate: int | None, fd: bool, data_bitrate: int, commands: list[bytes]
) -> None:
    with plugged() as adapter, opened(adapter, bitrate, fd=fd, data_bitrate=data_bitrate):
        assert adapter.commands[3:-2] == commands


def test_timings_are_those_of_the_sja1000_tables() -> None:
    assert _timing(500_000) == b"s001C"
    assert _timing(250_000) == b"s011C"
    assert _timing(125_000) == b"s031C"
    assert _timing(750_000) is None
    assert _timing(999_000) is None


def test_frames_of_an_earlier_channel_are_not_read() -> None:
    with plugged() as adapter:
        adapter.say(b"t7770\r" * 50 + b"t77")
        with opened(adapter) as bus:
            adapter.say(b"t1230\r")
            assert [f.can_id for f in read(bus, 1)] == [0x123]


def test_frames_that_come_with_the_answer_are_read_at_once() -> None:
    def eager(command: bytes) -> bytes:
        return b"\rt1230\rt1240\rt12" if command == b"O" else b"50\r" if command == b"F" else lawicel(command)

    with plugged(eager) as adapter, opened(adapter) as bus:
        assert [f.can_id for f in read(bus, 3)] == [0x123, 0x124, 0x125]


def test_an_adapter_that_starts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slcan, "ANSWER_S", 0.05)
    greetings: list[bytes] = []

    def late(command: bytes) -> bytes:
        greetings.extend([command] if command == b"V" else [])
        return lawicel(command) if len(greetings) > 1 else b""

    with plugged(late) as adapter, opened(adapter) as bus:
        adapter.say(b"t1230\r")
        assert len(read(bus, 1)) == 1


def refusing(*commands: bytes) -> Callable[[bytes], bytes]:
    return lambda command: b"\a" if command in commands else lawicel(command)


@pytest.mark.parametrize(
    ("answer", "bitrate", "fd", "listen_only", "why"),
    [
        (lambda _: b"", 500_000, False, False, r'no answer; .*candleLight.*@BAUD"'),
        (refusing(b"S6"), 500_000, False, False, r"bit rate 500000 is not one of this adapter's; most have"),
        (lawicel, 750_000, False, False, r"bit rate 750000 is not one of this adapter's; most have"),
        (refusing(b"Y2"), 500_000, True, False, r"data bit rate 2000000 was refused: .*fd = false"),
        (refusing(b"L", b"M1"), 500_000, False, True, r"no listen-only mode.*another adapter"),
        (refusing(b"O"), 500_000, False, False, r"refuses to open its channel; unplug"),
    ],
)
def test_what_cannot_be_opened_says_why_and_what_to_do(
    answer: Callable[[bytes], bytes],
    bitrate: int,
    fd: bool,
    listen_only: bool,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slcan, "GREETINGS", 2)
    with plugged(answer) as adapter:
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(BusLostError, match=why), opened(adapter, bitrate, fd=fd, listen_only=listen_only):
            pass
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_an_unknown_data_bit_rate_is_refused_before_anything_is_opened() -> None:
    with pytest.raises(BusLostError, match="expected one of 500000"):
        SlcanBus("/nowhere", 500_000, fd=True, listen_only=True, window_s=0, monotonic_ns=int, data_bitrate=7)


@pytest.mark.parametrize(
    ("channel", "why"),
    [
        ("/dev/nothing-here", "no such device; is the adapter plugged in"),
        ("/dev/null", "not a serial device"),
        ("/dev", "Is a directory"),
        ("", "expected a device"),
    ],
)
def test_what_is_no_serial_device_is_named(channel: str, why: str) -> None:
    with pytest.raises(BusLostError, match=why):
        SlcanBus(channel, None, fd=False, listen_only=True, window_s=0, monotonic_ns=int)


def test_permission_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "could not open port")

    monkeypatch.setattr("serial.Serial", refuse)
    with pytest.raises(BusLostError, match=r"permission denied; its group is .*usermod -aG"):
        SlcanBus(str(tmp_path), None, fd=False, listen_only=True, window_s=0, monotonic_ns=int)


def test_a_device_has_one_user() -> None:
    with (
        plugged() as adapter,
        opened(adapter),
        pytest.raises(BusLostError, match="in use by another program"),
        opened(adapter),
    ):
        pass


def test_a_baud_rate_may_stand_behind_the_device() -> None:
    with plugged() as adapter:
        bus = SlcanBus(
            f"{adapter.path}@1000000",
            None,
            fd=False,
            listen_only=True,
            window_s=0,
            monotonic_ns=time.monotonic_ns,
        )
        assert bus._port.baudrate == 1_000_000
        bus.close()


# --- receiving ------------------------------------------------------------------


def test_frames_of_one_window_come_together() -> None:
    with plugged() as adapter, opened(adapter, window_s=0.3) as bus:
        adapter.heard(b"O")
        adapter.say(b"t1000\r")
        threading.Timer(0.05, adapter.say, [b"t1010\rt1020\r"]).start()
        frames = bus.read(5)
    assert [f.can_id for f in frames] == [0x100, 0x101, 0x102]
    assert [f.at_ns for f in frames] == sorted(f.at_ns for f in frames)


def test_an_urgent_frame_ends_the_window() -> None:
    with plugged() as adapter, opened(adapter, window_s=30) as bus:
        bus.receive_only(frozenset({0x100}), frozenset({0x7E8}))
        adapter.say(b"t1000\rt2000\r")
        threading.Timer(0.05, adapter.say, [b"t7E80\r"]).start()
        frames = bus.read(5)
        assert [f.can_id for f in frames] == [0x100, 0x7E8]
        adapter.say(b"t7E8")
        assert bus.read(5) == []  # only its beginning is there
        adapter.say(b"0\r")
        assert [f.can_id for f in bus.read(5)] == [0x7E8]


def test_nothing_arrives_in_silence() -> None:
    with plugged() as adapter, opened(adapter) as bus:
        assert list(bus.read(0.01)) == []


def test_times_are_of_the_injected_clock_and_do_not_go_back() -> None:
    with plugged() as adapter:
        now_ns = iter(range(10**15, 10**16, 10**7))
        bus = SlcanBus(
            adapter.path, None, fd=False, listen_only=False, window_s=0, monotonic_ns=lambda: next(now_ns)
        )
        adapter.say(b"t1000\r" * 5)
        first = read(bus, 5)
        adapter.say(b"t1000\r" * 5)
        second = read(bus, 5)
        bus.close()
    times = [f.at_ns for f in first + second]
    assert times == sorted(times)
    assert 10**15 < times[0] <= times[-1] < next(now_ns)


def test_the_adapter_is_asked_for_what_it_lost() -> None:
    statuses = iter([b"F09\r", b"F04\r", b"F04\r"])

    def overrun(command: bytes) -> bytes:
        return next(statuses) if command == b"F" else lawicel(command)

    seconds_ns = iter(range(0, 10**13, 10**9))
    with plugged(overrun) as adapter:
        bus = SlcanBus(
            adapter.path, None, fd=False, listen_only=True, window_s=0, monotonic_ns=lambda: next(seconds_ns)
        )
        frames = read(bus, 1)
        assert frames[0].can_id == CAN_ERR_FLAG | 0x04
        assert bus.dropped == 2
        bus.close()


@pytest.mark.parametrize("answer", [silent_canable, weact])
def test_an_adapter_without_status_is_asked_no_more(answer: Callable[[bytes], bytes]) -> None:
    hours_ns = iter(range(0, 10**18, 10**12))
    with plugged(answer) as adapter:
        bus = SlcanBus(
            adapter.path, None, fd=False, listen_only=False, window_s=0, monotonic_ns=lambda: next(hours_ns)
        )
        for can_id in range(0x100, 0x120):
            adapter.say(b"t%03X0\r" % can_id)
            assert [f.can_id for f in read(bus, 1)] == [can_id]
        bus.send(0x7E0, b"", is_fd=False)
        adapter.heard(b"t7E00")  # and with it all that was said before
        assert adapter.commands.count(b"F") == slcan.MAX_UNANSWERED
        assert bus.dropped == 0
        bus.close()


# --- sending ----------------------------------------------------------------------


def test_frames_are_sent_as_commands_and_their_acknowledgement_is_no_frame() -> None:
    with plugged() as adapter, opened(adapter, fd=True) as bus:
        bus.send(0x7E0, b"\x02\x10\x03", is_fd=False)
        bus.send(0x18DAF110 | CAN_EFF_FLAG, bytes(12), is_fd=True)
        adapter.heard(b"D18DAF1109" + b"0" * 24)
        assert b"t7E03021003" in adapter.commands
        adapter.say(b"t7E80\r")
        assert [f.can_id for f in read(bus, 1)] == [0x7E8]
        assert bus.dropped == 0


def test_frames_that_the_adapter_refuses_are_logged_more_and_more_rarely(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with plugged(lambda command: b"\a" if command[:1] == b"t" else lawicel(command)) as adapter:
        with opened(adapter) as bus:
            for number in range(1, 9):
                bus.send(0x7E0, bytes((number,)), is_fd=False)
                while bus._lines.refused < number:
                    bus.read(0.1)
        told = [record for record in caplog.records if "refuses frames" in record.message]
        assert 1 <= len(told) <= 4


@pytest.mark.parametrize(
    ("listen_only", "size", "is_fd", "why"),
    [
        (True, 8, False, "listen-only"),
        (False, 8, True, "without fd = true"),
        (False, 9, False, "9 bytes of data"),
    ],
)
def test_what_the_bus_cannot_send_is_an_error(listen_only: bool, size: int, is_fd: bool, why: str) -> None:
    with plugged() as adapter, opened(adapter, listen_only=listen_only) as bus:
        before = list(adapter.commands)
        with pytest.raises(OSError, match=why):
            bus.send(0x100, bytes(size), is_fd=is_fd)
        assert adapter.commands == before


def stuck(adapter: SerialAdapter, bus: SlcanBus) -> None:
    """Sends until the line takes no more: nobody reads at the far end."""
    adapter.stop()
    for _ in range(10_000):
        bus.send(0x7E0, bytes(8), is_fd=False)


def test_a_line_that_takes_nothing_ends_the_wait_and_never_leaves_half_a_frame() -> None:
    with plugged() as adapter, opened(adapter) as bus:
        with pytest.raises(TimeoutError, match="the adapter took nothing"):
            stuck(adapter, bus)
        written = b""
        while not written.endswith(b"\r"):
            piece = os.read(adapter.near, 65_536)
            written += piece
            if len(piece) < 4096:
                break
        if not written.endswith(b"\r"):  # half a frame is in the line: nothing may follow it
            frames, why = read_until_lost(bus)
            assert frames == []
            assert "within a frame" in why


# --- the end ------------------------------------------------------------------------


def test_a_pulled_adapter_is_lost_after_what_it_said_and_can_be_opened_again() -> None:
    with plugged() as adapter, opened(adapter) as bus:
        adapter.say(b"t1000\r")
        assert len(read(bus, 1)) == 1
        adapter.say(b"t1010\rt10")
        first = list(bus.read(1))
        adapter.pull()
        frames, why = read_until_lost(bus)
        assert [f.can_id for f in (*first, *frames)] == [0x101]
        assert "the adapter is gone" in why
        with pytest.raises(OSError, match="Input/output error"):
            bus.send(0x100, b"", is_fd=False)
        with pytest.raises(BusLostError, match="the adapter is gone"):
            bus.read(0)
        bus.close()
        with pytest.raises(BusLostError), opened(adapter):
            pass
    with plugged() as again, opened(again) as bus:
        again.say(b"t1020\r")
        assert [f.can_id for f in read(bus, 1)] == [0x102]


def test_an_adapter_that_is_pulled_while_it_is_opened_is_lost() -> None:
    adapters: list[SerialAdapter] = []

    def pulled(command: bytes) -> bytes:
        if command == b"S6":
            adapters[0].cut()
        return lawicel(command)

    adapters.append(SerialAdapter(pulled))
    with pytest.raises(BusLostError, match="lost while it was opened"), opened(adapters[0]):
        pass


def test_bus_off_is_lost_after_its_error_frame() -> None:
    with plugged() as adapter, opened(adapter) as bus:
        adapter.say(b"t1000\rsb255255\rt1010\r")
        frames, why = read_until_lost(bus)
        assert [f.can_id for f in frames] == [0x100, CAN_ERR_FLAG | 0x40, 0x101]
        assert "bus-off" in why


def test_closing_ends_a_read_of_another_thread() -> None:
    ended: list[str] = []
    with plugged() as adapter, opened(adapter, window_s=30) as bus:
        bus.receive_only(frozenset({0x100}), frozenset())
        adapter.say(b"t1000\r")

        def endless() -> None:
            try:
                while True:
                    bus.read(30)
            except BusLostError as error:
                ended.append(str(error))

        reader = threading.Thread(target=endless)
        reader.start()
        wait_for(bus._reading.locked)
        bus.close()
        reader.join(5)
        assert not reader.is_alive()
        assert "closed" in ended[0]
        with pytest.raises(OSError, match="closed"):
            bus.send(0x100, b"", is_fd=False)
        bus.close()
