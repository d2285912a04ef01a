"""Joins the bus of another process: the client's side of the hub's protocol, as a member of a bus here."""

from __future__ import annotations

import asyncio
import os
import re
import time

from common import log as logs
from firmware_sim.frame import Frame
from firmware_sim.hub import CHANNEL, MAX_BACKLOG_BYTES, MAX_COMMAND_CHARS, STANDARD_ID_DIGITS, Bus

JOIN_TIMEOUT_S = 5.0
"""Longest time until the hub has let a client join."""

log = logs.get(__name__)

_FRAME = re.compile(r"< frame ([0-9A-Fa-f]{3}|[0-9A-Fa-f]{8}) [0-9.]{1,24} ((?:[0-9A-Fa-f]{2}){0,8}) >")
_GREETING = ("< hi >", f"< open {CHANNEL} >"), ("< ok >", "< rawmode >"), ("< ok >", "< echo >")
"""What the hub says, and what is answered; the echo ends the hub's pause after rawmode."""


class HubError(Exception):
    """The hub cannot be reached, or does not speak the protocol."""


class HubClient(asyncio.Protocol):
    """A connection to a hub; `left` is done when the hub has ended it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._transport: asyncio.Transport | None = None
        self._received = ""
        self._greetings = list(_GREETING)
        loop = asyncio.get_running_loop()
        self.joined: asyncio.Future[None] = loop.create_future()
        self.left: asyncio.Future[None] = loop.create_future()
        self.dropped = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the connection; the hub speaks first."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 (signature given)
        """Leaves the bus."""
        self._bus.leave(self)
        self._transport = None
        for waiting in (self.joined, self.left):
            if not waiting.done():
                waiting.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Answers the greeting, then puts frames on the bus."""
        self._received += data.decode("ascii", errors="replace")
        *messages, self._received = self._received.split(">")
        for message in messages:
            self._take(message.lstrip() + ">")
        if len(self._received) > MAX_COMMAND_CHARS:
            self.close()

    def _take(self, message: str) -> None:
        if self._greetings:
            expected, answer = self._greetings.pop(0)
            if message != expected:
                self.close()
                return
            self._write(answer)
            if not self._greetings:
                self._bus.join(self)
                self.joined.set_result(None)
            return
        match = _FRAME.fullmatch(message)
        if match is not None:
            is_extended = len(match[1]) > STANDARD_ID_DIGITS
            frame = Frame(int(match[1], 16), bytes.fromhex(match[2]), time.monotonic_ns(), is_extended)
            self._bus.send(frame, self)

    def deliver(self, frame: Frame) -> None:
        """Sends a frame to the hub; its protocol has neither remote nor CAN FD frames."""
        if self._transport is None or frame.remote_dlc is not None or frame.is_fd:
            return
        if self._transport.get_write_buffer_size() > MAX_BACKLOG_BYTES:
            if self.dropped == 0:
                log.warning("the hub is too slow; frames to it are dropped")
            self.dropped += 1
            return
        width = 8 if frame.is_extended else STANDARD_ID_DIGITS
        self._write(f"< send {frame.can_id:0{width}X} {len(frame.data):X} {frame.data.hex(' ')} >")

    def close(self) -> None:
        """Ends the connection."""
        if self._transport is not None:
            self._transport.close()

    def _write(self, text: str) -> None:
        if self._transport is not None:
            self._transport.write(text.encode("ascii"))


async def join_hub(bus: Bus, host: str, port: int) -> HubClient:
    """Makes the bus of a hub and this one the same.

    Raises:
        HubError: no hub there.
    """
    try:
        async with asyncio.timeout(JOIN_TIMEOUT_S):
            loop = asyncio.get_running_loop()
            _, client = await loop.create_connection(lambda: HubClient(bus), host, port)
            await client.joined
    except TimeoutError as error:
        raise HubError(f"the hub at {host}:{port} does not answer within {JOIN_TIMEOUT_S:.0f} s") from error
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise HubError(f"no hub at {host}:{port}: {why}; is fod-sim run or replay running there?") from error
    if client.left.done():
        raise HubError(f"what listens at {host}:{port} is no socketcand hub with a channel {CHANNEL}")
    return client
