"""A USB-CAN adapter in software: the LAWICEL (slcan) protocol on a pseudo-terminal.

For programs that reach a bus through a serial line. Commands O, L, C, S0 to S8,
t, T, r, R, V, N, F, Z0 and Z1, answered by CR or BEL (LAWICEL CANUSB manual,
version 1.0); with CAN FD also Y0 to Y8, d, D, b and B, as CANable 2 has them.
If the reader is too slow, frames are dropped and counted, and F says so. It can
be told to misbehave, so that programs learn to live with it.
"""

from __future__ import annotations

import asyncio
import os
import re
import termios
import time
import tty
from pathlib import Path

from common import log as logs
from firmware_sim.frame import FD_SIZES, MAX_DATA_BYTES, MAX_EXTENDED_ID, MAX_STANDARD_ID, Frame
from firmware_sim.hub import Bus

MAX_COMMAND_BYTES = 160
"""Longest command line; a longer one is answered by BEL and forgotten."""
MAX_BACKLOG_BYTES = 65_536
"""What waits for a slow reader; beyond it frames are dropped."""
BITRATES = (10_000, 20_000, 50_000, 100_000, 125_000, 250_000, 500_000, 800_000, 1_000_000)
"""Bit rates of S0 to S8."""
GARBAGE = b"\x00\xfft12\x80\rt1239ZZ\rgarbage\rt7F"
"""What a disturbed serial line brings; its last line runs into the next frame."""
_CR = b"\r"
_BEL = b"\a"
_VERSION = b"V1013\r"
_SERIAL_NUMBER = b"NF00D\r"
_READ_BYTES = 4096
_STAMP_WRAP_MS = 60_000
# Status bits of F: receive queue full, data overrun, error passive, bus error.
_QUEUE_FULL, _OVERRUN, _PASSIVE, _BUS_ERROR = 0x01, 0x08, 0x20, 0x80

log = logs.get(__name__)

_FRAME = re.compile(rb"(?:[tdbr]([0-9A-Fa-f]{3})|[TDBR]([0-9A-Fa-f]{8}))([0-9A-Fa-f])((?:[0-9A-Fa-f]{2})*)")


class SlcanAdapter:
    """The adapter; `path` is where its serial line is found.

    Args:
        bus: the wire behind it.
        fd: it is one for CAN FD.
        bitrate: of the wire; a client that sets another one gets bus errors. None: any will do.
        link: a symbolic link to the serial line, which stays when it is unplugged and plugged again.

    Attributes:
        passed: frames handed to the client.
        dropped: frames that the client was too slow for, or that it was told to lose.
    """

    def __init__(
        self, bus: Bus, *, fd: bool = False, bitrate: int | None = None, link: Path | None = None
    ) -> None:
        self._bus, self._is_fd, self._bitrate, self._link = bus, fd, bitrate, link
        self._loop = asyncio.get_running_loop()
        self.passed = self.dropped = 0
        self.opened, self.closed = asyncio.Event(), asyncio.Event()
        """The channel is open, or it is not."""
        self._is_plugged = False
        self.path = ""
        self.plug()
        bus.join(self)

    def plug(self) -> None:
        """Has a serial line, a new one each time; nothing happens if it has one."""
        if self._is_plugged:
            return
        # The far end stays open here, so that a client may come and go.
        self._near, self._far = os.openpty()
        tty.setraw(self._far)
        os.set_blocking(self._near, False)
        self.path = os.ttyname(self._far)
        self._received, self._waiting = bytearray(), bytearray()
        self._set_open(is_open=False)
        self._is_listening = self._is_stamped = self._is_off = False
        self._client_bitrate = self._bitrate
        self._status = self._to_lose = 0
        self._flushing: asyncio.Handle | None = None
        self._is_plugged = True
        self._loop.add_reader(self._near, self._readable)
        if self._link is not None:
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(self.path)

    def close(self) -> None:
        """Leaves the bus and removes the serial line."""
        self._bus.leave(self)
        self.pull()
        if self._link is not None:
            self._link.unlink(missing_ok=True)

    # --- misbehaviour ----------------------------------------------------------

    def pull(self) -> None:
        """Unplugs it: the serial line is gone; nothing happens if it is unplugged."""
        if not self._is_plugged:
            return
        self._is_plugged = False
        self._set_open(is_open=False)
        if self._flushing is not None:
            self._flushing.cancel()
        self._loop.remove_reader(self._near)
        self._loop.remove_writer(self._near)
        os.close(self._near)
        os.close(self._far)

    def lose(self, frames: int = 10) -> None:
        """Loses the next frames, as an adapter whose queue overruns."""
        self._to_lose = frames

    def garble(self) -> None:
        """Says what no adapter says; the next frame is spoilt by it."""
        if self.opened.is_set():
            self._write(GARBAGE)

    def go_off(self) -> None:
        """Goes bus-off: nothing is heard or sent until the channel is opened again."""
        self._is_off = True

    # --- the wire ----------------------------------------------------------------

    def deliver(self, frame: Frame) -> None:
        """Passes a frame on to the client, if it has opened the channel and listens at this bit rate."""
        if not self.opened.is_set() or (frame.is_fd and not self._is_fd):
            return
        if self._is_off or self._client_bitrate != self._bitrate:
            self._status |= _BUS_ERROR | _PASSIVE
        elif self._to_lose:
            self._to_lose -= 1
            self.dropped += 1
            self._status |= _OVERRUN
        elif len(self._waiting) > MAX_BACKLOG_BYTES:
            if self.dropped == 0:
                log.warning("slcan reader is too slow; its frames are dropped")
            self.dropped += 1
            self._status |= _QUEUE_FULL
        else:
            self.passed += 1
            self._waiting += self._line(frame)
            # What is due at once goes out in one piece, as a USB packet would.
            if self._flushing is None:
                self._flushing = self._loop.call_soon(self._flush)

    def _line(self, frame: Frame) -> bytes:
        letter = "r" if frame.remote_dlc is not None else "t"
        if frame.is_fd:
            letter = "b" if frame.is_switched else "d"
        length = FD_SIZES.index(len(frame.data)) if frame.remote_dlc is None else frame.remote_dlc
        head = f"{letter.upper()}{frame.can_id:08X}" if frame.is_extended else f"{letter}{frame.can_id:03X}"
        stamp = f"{time.monotonic_ns() // 1_000_000 % _STAMP_WRAP_MS:04X}" if self._is_stamped else ""
        return f"{head}{length:X}{frame.data.hex().upper()}{stamp}\r".encode("ascii")

    # --- the serial line -----------------------------------------------------------

    def _readable(self) -> None:
        self._received += os.read(self._near, _READ_BYTES)
        while (end := self._received.find(_CR)) >= 0:
            command = bytes(self._received[:end])
            del self._received[: end + 1]
            self._write(self._obey(command))
        if len(self._received) > MAX_COMMAND_BYTES:
            log.warning("slcan command too long", limit=MAX_COMMAND_BYTES)
            self._received.clear()
            self._write(_BEL)

    def _obey(self, command: bytes) -> bytes:
        """Carries out one command and returns the answer."""
        answers = {b"": _CR, b"V": _VERSION, b"N": _SERIAL_NUMBER}
        if command in answers:
            return answers[command]
        if command == b"C":
            return self._close_channel()
        if command == b"F" and self.opened.is_set():
            status, self._status = self._status, 0
            return b"F%02X\r" % status
        if not self.opened.is_set() and self._configure(command):
            return _CR
        frame = self._parse_frame(command)
        if frame is None or not self.opened.is_set() or self._is_listening or self._is_off:
            log.info("slcan command refused", command=command[:40].decode("ascii", errors="replace"))
            return _BEL
        self._bus.send(frame, self)
        return _CR

    def _configure(self, command: bytes) -> bool:
        """Carries out what needs a closed channel; False if it is none of that."""
        if command in {b"O", b"L"}:
            self._set_open(is_open=True)
            self._is_listening = command == b"L"
            self._is_off, self._status = False, 0
        elif command in {b"Z0", b"Z1"}:
            self._is_stamped = command == b"Z1"
        elif re.fullmatch(rb"S[0-8]", command):
            if self._bitrate is not None:
                self._client_bitrate = BITRATES[int(command[1:])]
        else:
            return self._is_fd and re.fullmatch(rb"Y[0-58]", command) is not None
        return True

    def _close_channel(self) -> bytes:
        """Also forgets frames that nobody has read: the next client must not meet the past."""
        self._set_open(is_open=False)
        self._waiting.clear()
        termios.tcflush(self._far, termios.TCIFLUSH)
        return _CR

    def _set_open(self, *, is_open: bool) -> None:
        now, before = (self.opened, self.closed) if is_open else (self.closed, self.opened)
        now.set()
        before.clear()

    def _write(self, answer: bytes) -> None:
        """Sends an answer, behind the frames that came before it."""
        if len(self._waiting) <= MAX_BACKLOG_BYTES:
            self._waiting += answer
        self._flush()

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        try:
            written = os.write(self._near, self._waiting)
        except BlockingIOError:
            written = 0
        del self._waiting[:written]
        if self._waiting:
            self._loop.add_writer(self._near, self._flush)
        else:
            self._loop.remove_writer(self._near)

    def _parse_frame(self, command: bytes) -> Frame | None:
        """Reads a transmit command; None if it is malformed."""
        match = _FRAME.fullmatch(command)
        if match is None:
            return None
        letter = command[:1].lower()
        is_extended, is_remote, is_fd = match[2] is not None, letter == b"r", letter in b"db"
        can_id, code = int(match[2] or match[1], 16), int(match[3], 16)
        data = bytes.fromhex(match[4].decode("ascii"))
        if can_id > (MAX_EXTENDED_ID if is_extended else MAX_STANDARD_ID):
            return None
        if (is_fd and not self._is_fd) or (not is_fd and code > MAX_DATA_BYTES):
            return None
        if len(data) != (0 if is_remote else FD_SIZES[code]):
            return None
        return Frame(
            can_id,
            data,
            time.monotonic_ns(),
            is_extended,
            code if is_remote else None,
            is_fd,
            letter == b"b",
        )
