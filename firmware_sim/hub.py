"""Joins processes into one CAN bus where there is no SocketCAN: a socketcand server on loopback.

Every frame that one member sends reaches all others, stamped with the hub's
time. Speaks the part of the socketcand protocol (github.com/linux-can/socketcand)
that python-can's `socketcand` interface uses: open, rawmode, echo, send, and
`frame` and `error` towards the client. Classic frames only; the protocol has
no remote and no CAN FD frames. A client that reads too slowly loses frames, which are
counted and logged; memory stays bounded.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from typing import Protocol

import can

from common import log as logs
from firmware_sim.frame import MAX_DATA_BYTES, MAX_EXTENDED_ID, MAX_STANDARD_ID, Frame

HOST = "127.0.0.1"
CHANNEL = "can0"
MAX_CLIENTS = 32
STANDARD_ID_DIGITS = 3
MAX_COMMAND_CHARS = 256
"""Longest command of a client; more without an end disconnects it."""
MAX_BACKLOG_BYTES = 1_048_576
"""What waits for a slow client; beyond it frames are dropped."""
SETTLE_S = 0.2
"""Pause after rawmode's `< ok >`: python-can takes whatever arrives with it for a failed
handshake. The client's first command ends the pause."""

log = logs.get(__name__)

_SEND = re.compile(r"send ([0-9A-Fa-f]{3}|[0-9A-Fa-f]{8}) ([0-9A-Fa-f])((?: [0-9A-Fa-f]{1,2})*)\s*")


class Member(Protocol):
    """One station on the bus."""

    def deliver(self, frame: Frame) -> None:
        """Takes a frame that another member has sent; must not block."""
        ...


class Bus:
    """The wire: hands each frame to everyone but its sender."""

    def __init__(self) -> None:
        self._members: list[Member] = []

    def join(self, member: Member) -> None:
        """Adds a station."""
        self._members.append(member)

    def leave(self, member: Member) -> None:
        """Removes a station; nothing happens if it is not there."""
        if member in self._members:
            self._members.remove(member)

    def send(self, frame: Frame, sender: Member | None) -> None:
        """Puts a frame on the wire."""
        for member in tuple(self._members):
            if member is not sender:
                member.deliver(frame)


class Socketcand:
    """The server.

    Args:
        bus: the wire that its clients join.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._server: asyncio.Server | None = None
        self._clients: set[_Client] = set()
        self.port = 0

    async def start(self, port: int) -> None:
        """Listens on 127.0.0.1; port 0 takes a free one, then `port` says which.

        Raises:
            OSError: the port is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self._bus, self._clients), HOST, port)
        self.port = self._server.sockets[0].getsockname()[1]

    @property
    def client_count(self) -> int:
        """Clients that are connected."""
        return len(self._clients)

    async def close(self) -> None:
        """Disconnects everyone."""
        if self._server is not None:
            self._server.close()
        for client in tuple(self._clients):
            client.disconnect()
        if self._server is not None:
            await self._server.wait_closed()


class _Client(asyncio.Protocol):
    """One connection. It becomes a member of the bus with rawmode."""

    def __init__(self, bus: Bus, clients: set[_Client]) -> None:
        self._bus, self._clients = bus, clients
        self._transport: asyncio.Transport | None = None
        self._received = ""
        self._is_open = False
        self._settling: asyncio.TimerHandle | None = None
        self._is_raw = False
        self._dropped = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("expected a stream")
        self._transport = transport
        if len(self._clients) >= MAX_CLIENTS:
            log.warning("socketcand client refused", limit=MAX_CLIENTS)
            transport.abort()
            return
        raw_socket = transport.get_extra_info("socket")
        raw_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.add(self)
        self._write("< hi >")

    def connection_lost(self, _exc: Exception | None) -> None:
        self._bus.leave(self)
        self._clients.discard(self)
        if self._settling is not None:
            self._settling.cancel()
        if self._dropped:
            log.warning("socketcand client left; it was too slow", frames_dropped=self._dropped)
        self._transport = None

    def disconnect(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._received += data.decode("ascii", errors="replace")
        while (end := self._received.find(">")) >= 0 and self._transport is not None:
            command, self._received = self._received[: end + 1].strip(), self._received[end + 1 :]
            if len(command) > MAX_COMMAND_CHARS or not command.startswith("< ") or not command.endswith(" >"):
                self._refuse(command)
            else:
                self._obey(command[2:-2])
        if len(self._received) > MAX_COMMAND_CHARS:
            self._refuse(self._received)
            self.disconnect()

    def deliver(self, frame: Frame) -> None:
        transport = self._transport
        if transport is None or not self._is_raw or frame.remote_dlc is not None or frame.is_fd:
            return
        if transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            if self._dropped == 0:
                log.warning("socketcand client is too slow; its frames are dropped")
            self._dropped += 1
            return
        width = 8 if frame.is_extended else 3
        self._write(f"< frame {frame.can_id:0{width}X} {time.time():.6f} {frame.data.hex().upper()} >")

    def _obey(self, command: str) -> None:
        if self._settling is not None:
            self._begin_raw()
        if command == "echo":
            self._write("< echo >")
        elif command == f"open {CHANNEL}" and not self._is_open:
            self._is_open = True
            self._write("< ok >")
        elif command == "rawmode" and self._is_open and not self._is_raw:
            self._write("< ok >")
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self._begin_raw)
            self._bus.join(self)
        elif self._is_raw and (frame := _parse_send(command)) is not None:
            self._bus.send(frame, self)
        else:
            self._refuse(command)

    def _begin_raw(self) -> None:
        if self._settling is not None:
            self._settling.cancel()
            self._settling = None
        self._is_raw = True

    def _refuse(self, command: str) -> None:
        log.warning("malformed socketcand command", command=command[:80])
        # With an identifier and a time in front, python-can reads it as an error frame.
        self._write(f"< error 20000000 {time.time():.6f} malformed command >")

    def _write(self, text: str) -> None:
        if self._transport is not None:
            self._transport.write(text.encode("ascii"))


def _parse_send(command: str) -> Frame | None:
    """Reads `send ID LENGTH BYTE...`; None if it is malformed."""
    match = _SEND.fullmatch(command)
    if match is None:
        return None
    is_extended = len(match[1]) > STANDARD_ID_DIGITS
    can_id = int(match[1], 16)
    data = bytes(int(b, 16) for b in match[3].split())
    if can_id > (MAX_EXTENDED_ID if is_extended else MAX_STANDARD_ID) or len(data) > MAX_DATA_BYTES:
        return None
    if len(data) != int(match[2], 16):
        return None
    return Frame(can_id, data, time.monotonic_ns(), is_extended)


class SocketCan:
    """A SocketCAN interface as a member of the bus, for machines that have one.

    Args:
        bus: the wire.
        channel: interface, such as "vcan0".
        fd: CAN FD frames as well.

    Raises:
        OSError, can.CanError: the interface cannot be opened.
    """

    def __init__(self, bus: Bus, channel: str, *, fd: bool = False) -> None:
        self._bus = bus
        self._port = can.Bus(interface="socketcan", channel=channel, fd=fd)
        self._dropped = 0
        bus.join(self)
        asyncio.get_running_loop().add_reader(self._port.fileno(), self._receive)

    def deliver(self, frame: Frame) -> None:
        """Sends a frame to the interface; a full transmit queue drops it, counted and logged."""
        try:
            self._port.send(to_message(frame), timeout=0)
        except can.CanError as error:
            if self._dropped == 0:
                log.warning("SocketCAN does not take frames; they are dropped", why=str(error))
            self._dropped += 1

    def close(self) -> None:
        """Leaves the interface and the bus."""
        self._bus.leave(self)
        asyncio.get_running_loop().remove_reader(self._port.fileno())
        self._port.shutdown()

    def _receive(self) -> None:
        message = self._port.recv(timeout=0)
        frame = None if message is None else from_message(message)
        if frame is not None:
            self._bus.send(frame, self)


def to_message(frame: Frame) -> can.Message:
    """The frame as python-can's message."""
    return can.Message(
        arbitration_id=frame.can_id,
        is_extended_id=frame.is_extended,
        is_remote_frame=frame.remote_dlc is not None,
        is_fd=frame.is_fd,
        bitrate_switch=frame.is_switched,
        dlc=len(frame.data) if frame.remote_dlc is None else frame.remote_dlc,
        data=None if frame.remote_dlc is not None else frame.data,
    )


def from_message(message: can.Message) -> Frame | None:
    """The frame of python-can's message; None for an error frame."""
    if message.is_error_frame:
        return None
    return Frame(
        message.arbitration_id,
        b"" if message.is_remote_frame else bytes(message.data),
        time.monotonic_ns(),
        message.is_extended_id,
        message.dlc if message.is_remote_frame else None,
        message.is_fd,
        message.bitrate_switch,
    )
