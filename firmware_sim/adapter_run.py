"""`fod-sim adapter`: a serial CAN adapter on a pseudo-terminal, before a bus or a recorded log.

Prints where its serial line is, then what happens to it, as JSON lines. Ends
with SIGTERM or SIGINT, with the log, or when the bus it has joined is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import can

from common import cli
from firmware_sim import replay
from firmware_sim.adapter import SlcanAdapter
from firmware_sim.frame import Frame
from firmware_sim.hub import Bus, SocketCan, from_message
from firmware_sim.hub_client import join_hub

MAX_LOG_FRAMES = 1_000_000
"""Frames that are taken of a log, which is held in memory."""
LINGER_S = 5.0
"""How long the adapter stays plugged after a log, unless the client closes the channel before."""
TICK_S = 0.001
"""Frames that are due within it leave together, as in one USB frame."""

FAULTS: Mapping[str, Callable[[SlcanAdapter], None]] = {
    "pull": SlcanAdapter.pull,
    "plug": SlcanAdapter.plug,
    "overrun": SlcanAdapter.lose,
    "garbage": SlcanAdapter.garble,
    "bus-off": SlcanAdapter.go_off,
}


class SourceError(Exception):
    """What the adapter is to stand before is not there, or has gone."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A misbehaviour, seconds after the start; with `wait_client`, after the channel was opened."""

    kind: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Options:
    """What `fod-sim adapter` was asked for; exactly one of log, port and channel is given.

    Args:
        rate: frames of the log a second; None: in its own rhythm.
        duration_s: how long the log is repeated; None: it is sent once.
        wait_client: the log begins when a client has opened the channel.
        host, port: of a socketcand hub.
        channel: a SocketCAN interface.
        fd, bitrate, link: as SlcanAdapter has them.
    """

    log: Path | None = None
    rate: float | None = None
    duration_s: float | None = None
    wait_client: bool = False
    host: str = ""
    port: int | None = None
    channel: str | None = None
    fd: bool = False
    bitrate: int | None = None
    link: Path | None = None
    faults: Sequence[Fault] = ()


async def run(options: Options) -> None:
    """Runs the adapter until its source ends, or it is told to end.

    Raises:
        SourceError, HubError, ReplayError: no source, or it has gone.
    """
    frames = [] if options.log is None else load(options.log, fd=options.fd)
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end.set)
    bus = Bus()
    try:
        adapter = SlcanAdapter(bus, fd=options.fd, bitrate=options.bitrate, link=options.link)
    except OSError as error:
        raise SourceError(f"no serial line: {error.filename or ''} {error.strerror}") from error
    try:
        async with _source(options, bus) as gone:
            cli.print_event("ready", slcan=str(options.link or adapter.path))
            send = functools.partial(bus.send, sender=None)
            try:
                is_fed = await _serve(adapter, frames, send, gone, end, options)
            finally:
                cli.print_event("ended", frames=adapter.passed, dropped=adapter.dropped)
            if is_fed:  # a client reads what is left, and learns nothing from an adapter that vanishes
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(adapter.closed.wait(), LINGER_S)
    finally:
        adapter.close()


async def _serve(
    adapter: SlcanAdapter,
    frames: Sequence[tuple[float, Frame]],
    send: Callable[[Frame], None],
    gone: asyncio.Future[None],
    end: asyncio.Event,
    options: Options,
) -> bool:
    """Serves until the source or the user ends it; whether all of a log was sent."""
    ending = asyncio.ensure_future(end.wait())
    reasons: set[asyncio.Future[Any]] = {gone, ending}
    if options.wait_client:
        opened = asyncio.ensure_future(adapter.opened.wait())
        await asyncio.wait({opened, *reasons}, return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
    loop = asyncio.get_running_loop()
    faults = [loop.call_later(fault.at_s, _misbehave, adapter, fault) for fault in options.faults]
    feeding = asyncio.ensure_future(feed(frames, send, options)) if frames else ending
    await asyncio.wait({feeding, *reasons}, return_when=asyncio.FIRST_COMPLETED)
    is_fed = feeding.done() and not ending.done()
    for waiting in (*faults, ending, feeding):
        waiting.cancel()
    if gone.done():
        raise SourceError("the bus that the adapter had joined is gone")
    return is_fed


@contextlib.asynccontextmanager
async def _source(options: Options, bus: Bus) -> AsyncIterator[asyncio.Future[None]]:
    """Joins the bus that is asked for; the future is done when it has gone."""
    if options.port is not None:
        client = await join_hub(bus, options.host, options.port)
        try:
            yield client.left
        finally:
            client.close()
        return
    for_ever: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if options.channel is None:
        yield for_ever
        return
    try:
        interface = SocketCan(bus, options.channel, fd=options.fd)
    except (OSError, can.CanError) as error:
        raise SourceError(f"cannot join SocketCAN {options.channel}: {error}") from error
    try:
        yield for_ever
    finally:
        interface.close()


def _misbehave(adapter: SlcanAdapter, fault: Fault) -> None:
    FAULTS[fault.kind](adapter)
    cli.print_event("fault", kind=fault.kind, at_s=fault.at_s, slcan=adapter.path)


def load(path: Path, *, fd: bool) -> list[tuple[float, Frame]]:
    """The frames of a log, each with its time since the first, seconds.

    Raises:
        ReplayError: not readable, too long, or without a frame that can be sent.
    """
    frames: list[tuple[float, Frame]] = []
    first_s: float | None = None
    for message in replay.messages(path):
        if first_s is None:
            first_s = message.timestamp
        frame = from_message(message)
        if frame is None or (frame.is_fd and not fd):
            continue
        if len(frames) >= MAX_LOG_FRAMES:
            raise replay.ReplayError(f"{path}: more than {MAX_LOG_FRAMES} frames")
        frames.append((message.timestamp - first_s, frame))
    if not frames:
        kinds = "" if fd else "; CAN FD frames need --fd"
        raise replay.ReplayError(f"{path}: no frame that can be sent{kinds}")
    return frames


def schedule(
    frames: Sequence[tuple[float, Frame]], rate: float | None, duration_s: float | None
) -> Iterator[tuple[float, Frame]]:
    """The frames with the time when each is due, seconds; again and again if there is a duration."""
    number, round_s = 0, 0.0
    while True:
        for at_s, frame in frames:
            due_s = round_s + at_s if rate is None else number / rate
            if duration_s is not None and due_s >= duration_s:
                return
            yield due_s, frame
            number += 1
        if duration_s is None:
            return
        # A log that begins anew goes on in its mean rhythm.
        round_s += frames[-1][0] * (1 + 1 / len(frames)) or TICK_S


async def feed(
    frames: Sequence[tuple[float, Frame]], send: Callable[[Frame], None], options: Options
) -> None:
    """Sends the frames when they are due; what is late is sent at once."""
    begun_s = time.monotonic()
    for due_s, frame in schedule(frames, options.rate, options.duration_s):
        early_s = begun_s + due_s - time.monotonic()
        if early_s > 0:
            await asyncio.sleep(max(early_s, TICK_S))
        send(frame)
