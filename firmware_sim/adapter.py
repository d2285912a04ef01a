"""A USB-CAN adapter in software: the LAWICEL (slcan) protocol on a pseudo-terminal.

For programs that reach a bus through a serial line, such as python-can's
`slcan` interface. Commands O, L, C, S0 to S8, t, T, r, R, V, N and F, answered
by CR or BEL (LAWICEL CANUSB manual, version 1.0). The bit rate is taken and
ignored: the wire behind it has none. If the reader is too slow, frames are
dropped and counted.
"""

from __future__ import annotations

import asyncio
import os
import re
import termios
import time
import tty

from common import log as logs
from firmware_sim.frame import MAX_DATA_BYTES, MAX_EXTENDED_ID, MAX_STANDARD_ID, Frame
from firmware_sim.hub import Bus

MAX_COMMAND_BYTES = 64
"""Longest command line; a longer one is answered by BEL and forgotten."""
MAX_BACKLOG_BYTES = 65_536
"""What waits for a slow reader; beyond it frames are dropped."""
_CR = b"\r"
_BEL = b"\a"
_VERSION = b"V1013\r"
_SERIAL_NUMBER = b"NF00D\r"
_STATUS_FINE = b"F00\r"
_READ_BYTES = 4096

log = logs.get(__name__)

_FRAME = re.compile(rb"(?:[tr]([0-9A-Fa-f]{3})|[TR]([0-9A-Fa-f]{8}))([0-8])((?:[0-9A-Fa-f]{2})*)")


class SlcanAdapter:
    """The adapter; `path` is where its serial line is found.

    Args:
        bus: the wire behind it.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        # The far end stays open here, so that a client may come and go.
        self._near, self._far = os.openpty()
        tty.setraw(self._far)
        os.set_blocking(self._near, False)
        self.path = os.ttyname(self._far)
        self._received = bytearray()
        self._waiting = bytearray()
        self._is_open = False
        self._is_listening = False
        self.dropped = 0
        bus.join(self)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._near, self._readable)

    def close(self) -> None:
        """Leaves the bus and removes the serial line."""
        self._bus.leave(self)
        self._loop.remove_reader(self._near)
        self._loop.remove_writer(self._near)
        os.close(self._near)
        os.close(self._far)

    def deliver(self, frame: Frame) -> None:
        """Passes a frame on to the client, if it has opened the channel."""
        if not self._is_open:
            return
        letter = "t" if frame.remote_dlc is None else "r"
        letter = letter.upper() if frame.is_extended else letter
        length = len(frame.data) if frame.remote_dlc is None else frame.remote_dlc
        identifier = f"{frame.can_id:08X}" if frame.is_extended else f"{frame.can_id:03X}"
        self._write(f"{letter}{identifier}{length}{frame.data.hex().upper()}\r".encode(), may_drop=True)

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
        if command in {b"O", b"L"} and not self._is_open:
            self._is_open, self._is_listening = True, command == b"L"
            return _CR
        if command == b"C":
            return self._close_channel()
        if command == b"F" and self._is_open:
            return _STATUS_FINE
        if re.fullmatch(rb"S[0-8]", command) and not self._is_open:
            return _CR
        frame = _parse_frame(command)
        if frame is None or not self._is_open or self._is_listening:
            log.info("slcan command refused", command=command[:40].decode("ascii", errors="replace"))
            return _BEL
        self._bus.send(frame, self)
        return _CR

    def _close_channel(self) -> bytes:
        """Also forgets frames that nobody has read: the next client must not meet the past."""
        self._is_open = False
        self._waiting.clear()
        termios.tcflush(self._far, termios.TCIFLUSH)
        return _CR

    def _write(self, content: bytes, *, may_drop: bool = False) -> None:
        if len(self._waiting) > MAX_BACKLOG_BYTES:
            if self.dropped == 0:
                log.warning("slcan reader is too slow; its frames are dropped")
            self.dropped += may_drop
            return
        self._waiting += content
        self._flush()

    def _flush(self) -> None:
        try:
            written = os.write(self._near, self._waiting)
        except BlockingIOError:
            written = 0
        del self._waiting[:written]
        if self._waiting:
            self._loop.add_writer(self._near, self._flush)
        else:
            self._loop.remove_writer(self._near)


def _parse_frame(command: bytes) -> Frame | None:
    """Reads a transmit command; None if it is malformed."""
    match = _FRAME.fullmatch(command)
    if match is None:
        return None
    is_extended, is_remote = match[2] is not None, command[:1] in b"rR"
    can_id, length = int(match[2] or match[1], 16), int(match[3])
    data = bytes.fromhex(match[4].decode("ascii"))
    if can_id > (MAX_EXTENDED_ID if is_extended else MAX_STANDARD_ID) or length > MAX_DATA_BYTES:
        return None
    if len(data) != (0 if is_remote else length):
        return None
    return Frame(can_id, data, time.monotonic_ns(), is_extended, length if is_remote else None)
