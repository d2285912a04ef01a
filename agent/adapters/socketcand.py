"""A python-can bus over a socketcand server, for machines without SocketCAN.

Speaks socketcand's raw mode (doc/protocol.md of linux-can/socketcand). In the
place of python-can's own client, which takes a closed connection for silence,
waits for its handshake for ever, and loses the handshake on a busy bus. Here a
lost connection raises can.CanOperationError, and a malformed message ValueError
with the connection kept. Classic CAN only.
"""

from __future__ import annotations

import re
import select
import socket
from typing import Any, Final

import can

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

_CHANNEL: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_FRAME: Final = re.compile(
    rb"< frame ([0-9A-Fa-f]{3}|[0-9A-Fa-f]{8}) (\d{1,12}\.\d{1,9}) ((?:[0-9A-Fa-f]{2} ?){0,8}) ?>"
)
_ERROR: Final = re.compile(rb"< error ([0-9A-Fa-f]{1,8}) (\d{1,12}\.\d{1,9}) ?>")


class SocketcandBus(can.BusABC):
    """One channel of a socketcand server."""

    def __init__(
        self,
        channel: str,
        host: str,
        port: int,
        can_filters: Any = None,
        **options: object,
    ) -> None:
        """Connects and opens `channel` in raw mode.

        Raises:
            ValueError: a channel's name or an option that the protocol does not have.
            OSError: no connection.
            can.CanError: the server does not speak the protocol, or refuses the channel.
        """
        if not _CHANNEL.fullmatch(channel) or options:
            raise ValueError(f"socketcand: channel {channel!r}, options {sorted(options)}: not supported")
        self.channel_info = f"socketcand {channel}@{host}:{port}"
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
        except (OSError, can.CanError):
            self._socket.close()
            raise
        super().__init__(channel=channel, can_filters=can_filters)

    def _expect(self, expected: bytes) -> None:
        for _ in range(MAX_HANDSHAKE_MESSAGES):
            found = self._message(CONNECT_TIMEOUT_S)
            if found == expected:
                return
            if found is None or not found.startswith(b"< frame "):
                raise can.CanInitializationError(
                    f"{self.channel_info}: expected {expected!r}, found {found!r}"
                )
        raise can.CanInitializationError(f"{self.channel_info}: expected {expected!r}, found only frames")

    def _message(self, timeout_s: float | None) -> bytes | None:
        """The next message of the stream; None if none is complete in time."""
        while b">" not in self._buffer:
            if len(self._buffer) > MAX_MESSAGE_BYTES:
                raise can.CanOperationError(
                    f"{self.channel_info}: a message of more than {MAX_MESSAGE_BYTES} bytes"
                )
            if not self._poll.poll(None if timeout_s is None else timeout_s * 1000):
                return None
            try:
                received = self._socket.recv(_READ_BYTES)
            except OSError as error:
                raise can.CanOperationError(f"{self.channel_info}: {error.strerror}") from error
            if not received:
                raise can.CanOperationError(f"{self.channel_info}: the server closed the connection")
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b">")
        return message.lstrip() + b">"

    def _recv_internal(self, timeout: float | None) -> tuple[can.Message | None, bool]:
        message = self._message(timeout)
        if message is None:
            return None, False
        if frame := _FRAME.fullmatch(message):
            can_id, timestamp, data = frame.groups()
            payload = bytes.fromhex(data.decode("ascii"))
            received = can.Message(
                timestamp=float(timestamp),
                arbitration_id=int(can_id, 16),
                is_extended_id=len(can_id) == _EXTENDED_DIGITS,
                data=payload,
                channel=self.channel_info,
                check=True,
            )
        elif error := _ERROR.fullmatch(message):
            received = can.Message(timestamp=float(error.group(2)), is_error_frame=True)
        else:
            raise ValueError(f"{self.channel_info}: not a frame: {message[:MAX_MESSAGE_BYTES]!r}")
        return received, False

    def send(self, msg: can.Message, timeout: float | None = None) -> None:  # noqa: ARG002
        """Sends one frame.

        Raises:
            ValueError: a CAN FD frame.
            can.CanOperationError: the server did not take it; the connection is given up.
        """
        if msg.is_fd:
            raise ValueError(f"{self.channel_info}: classic CAN only")
        can_id = f"{msg.arbitration_id:08X}" if msg.is_extended_id else f"{msg.arbitration_id:03X}"
        data = "".join(f"{byte:02X} " for byte in msg.data)
        try:
            self._socket.sendall(f"< send {can_id} {msg.dlc:X} {data}>".encode("ascii"))
        except OSError as error:
            # Part of the message may be out: nothing that follows could be understood.
            self._hang_up()
            raise can.CanOperationError(f"{self.channel_info}: {error}") from error

    def _hang_up(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # not connected any more
            return

    def shutdown(self) -> None:
        """Closes the connection."""
        super().shutdown()
        self._socket.close()
