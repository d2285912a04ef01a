"""A bus over a socketcand server, for machines without SocketCAN.

Speaks socketcand's raw mode (doc/protocol.md of linux-can/socketcand). In the
place of python-can's own client, which takes a closed connection for silence,
waits for its handshake for ever, and loses the handshake on a busy bus. Here a
lost connection is a lost bus, and a malformed message is counted with the
connection kept. Classic CAN only.
"""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from agent.adapters.bus import (
    CAN_EFF_FLAG,
    CAN_EFF_MASK,
    CAN_ERR_FLAG,
    MAX_CLASSIC_BYTES,
    WINDOW_S,
    BusLostError,
    RawFrame,
    Stamps,
)
from agent.adapters.frame_by_frame import FrameByFrameBus, MalformedFrameError

CONNECT_TIMEOUT_S: Final = 3.0
"""Longest wait for the connection, and for each answer of the handshake."""
SEND_TIMEOUT_S: Final = 0.1
"""Longest wait until the server takes a frame."""
MAX_MESSAGE_BYTES: Final = 512
"""Longest message of the protocol."""
MAX_HANDSHAKE_MESSAGES: Final = 64
"""Frames that may arrive between the handshake's answers."""
_READ_BYTES: Final = 65_536
_EXTENDED_DIGITS: Final = 8
_MAX_STANDARD_ID: Final = 0x7FF

_CHANNEL: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_FRAME: Final = re.compile(
    rb"< frame ([0-9A-Fa-f]{3}|[0-9A-Fa-f]{8}) (\d{1,12}\.\d{1,9}) ((?:[0-9A-Fa-f]{2} ?){0,8}) ?>"
)
_ERROR: Final = re.compile(rb"< error ([0-9A-Fa-f]{1,8}) (\d{1,12}\.\d{1,9}) ?>")


class SocketcandBus(FrameByFrameBus):
    """One channel of a socketcand server."""

    def __init__(
        self,
        channel: str,
        host: str,
        port: int,
        *,
        window_s: float = WINDOW_S,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Connects and opens `channel` in raw mode.

        Raises:
            ValueError: a channel's name that the protocol does not have.
            OSError: no connection.
            BusLostError: the server does not speak the protocol, or refuses the channel.
        """
        if not _CHANNEL.fullmatch(channel):
            raise ValueError(f"socketcand: channel {channel!r}: not supported")
        super().__init__(window_s, monotonic_ns)
        self._stamps = Stamps(monotonic_ns, wall_ns)
        self._info = f"socketcand {channel}@{host}:{port}"
        self._buffer = b""
        self._socket = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(SEND_TIMEOUT_S)
            self._poll = select.poll()
            self._poll.register(self._socket, select.POLLIN)
            self._expect(b"< hi >")
            self._socket.sendall(f"< open {channel} >".encode("ascii"))
            self._expect(b"< ok >")
            self._socket.sendall(b"< rawmode >")
            self._expect(b"< ok >")
        except (OSError, BusLostError):
            self._socket.close()
            raise

    def _expect(self, expected: bytes) -> None:
        for _ in range(MAX_HANDSHAKE_MESSAGES):
            found = self._message(CONNECT_TIMEOUT_S)
            if found == expected:
                return
            if found is None or not found.startswith(b"< frame "):
                raise BusLostError(f"{self._info}: expected {expected!r}, found {found!r}")
        raise BusLostError(f"{self._info}: expected {expected!r}, found only frames")

    def _message(self, timeout_s: float) -> bytes | None:
        """The next message of the stream; None if none is complete in time."""
        while b">" not in self._buffer:
            if len(self._buffer) > MAX_MESSAGE_BYTES:
                raise BusLostError(f"{self._info}: a message of more than {MAX_MESSAGE_BYTES} bytes")
            if not self._poll.poll(timeout_s * 1000):
                return None
            try:
                received = self._socket.recv(_READ_BYTES)
            except OSError as error:
                raise BusLostError(f"{self._info}: {error.strerror}") from error
            if not received:
                raise BusLostError(f"{self._info}: the server closed the connection")
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b">")
        return message.lstrip() + b">"

    def _receive(self, wait_s: float) -> RawFrame | None:
        message = self._message(wait_s)
        if message is None:
            return None
        if frame := _FRAME.fullmatch(message):
            digits, stamp_s, data = frame.groups()
            can_id = int(digits, 16) | (CAN_EFF_FLAG if len(digits) == _EXTENDED_DIGITS else 0)
            highest = CAN_EFF_FLAG | CAN_EFF_MASK if can_id & CAN_EFF_FLAG else _MAX_STANDARD_ID
            if can_id > highest:
                raise MalformedFrameError(f"{self._info}: not an identifier: {digits!r}")
            payload = bytes.fromhex(data.decode("ascii"))
        elif error := _ERROR.fullmatch(message):
            digits, stamp_s = error.groups()
            can_id, payload = CAN_ERR_FLAG | (int(digits, 16) & CAN_EFF_MASK), bytes(MAX_CLASSIC_BYTES)
        else:
            raise MalformedFrameError(f"{self._info}: not a frame: {message[:MAX_MESSAGE_BYTES]!r}")
        (at_ns,) = self._stamps.monotonic([round(float(stamp_s) * 1e9)])
        return RawFrame(can_id, payload, at_ns)

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:
        """Sends one frame (OpenBus.send).

        Raises:
            ValueError: a CAN FD frame.
            OSError: the server did not take it; the connection is given up.
        """
        if is_fd:
            raise ValueError(f"{self._info}: classic CAN only")
        digits = f"{can_id & CAN_EFF_MASK:08X}" if can_id & CAN_EFF_FLAG else f"{can_id:03X}"
        payload = "".join(f"{byte:02X} " for byte in data)
        try:
            self._socket.sendall(f"< send {digits} {len(data):X} {payload}>".encode("ascii"))
        except OSError:
            # Part of the message may be out: nothing that follows could be understood.
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # not connected any more
            return

    def _shut(self) -> None:
        self._socket.close()
