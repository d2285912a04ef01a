"""What the simulated vehicle parses: tokens, UDS, ISO-TP, its clients' lines, its files."""

from __future__ import annotations

import asyncio
import functools
import os
from unittest import mock

from fuzz.registry import cut, joined, register, scratch, target
from support import sim_process, sim_world
from vectors import make_token_vectors as signer

from common.config import ConfigError, parse
from firmware_sim import control, token
from firmware_sim.adapter import SlcanAdapter
from firmware_sim.diagnostics import DiagnosticLink
from firmware_sim.ecu import StoreError
from firmware_sim.frame import Frame
from firmware_sim.hub import Bus, Socketcand
from firmware_sim.scenario import Scenario
from firmware_sim.store import FileStore
from firmware_sim.token import TokenError
from firmware_sim.vehicle import ControlError

TERMS: tuple[dict[int, int], ...] = ({}, {5: 10}, {6: 600, 7: 3})
NEGATIVE = 0x7F


def tokens() -> list[bytes]:
    """Tokens for the test's seat module."""
    return [sim_world.token(7, terms=terms or None) for terms in TERMS] + [sim_world.token(8, state=0)]


def verify(content: bytes) -> None:
    """Reads a token and checks its signature, as the seat module does."""
    found = token.parse(content)
    found.check_signature(signer.KEY_1.public, vin=signer.VIN, uid=signer.UID)


register("sim-token", verify, TokenError, tokens)
register(
    "sim-announcement",
    lambda content: token.verify_announcement(content, root=signer.ROOT.public),
    TokenError,
    lambda: [signer.announcement(1, signer.KEY_1)],
)

REQUESTS = (
    sim_world.EXTENDED,
    sim_world.READ_BACK,
    sim_world.RELEASE,
    bytes.fromhex("22 F1 90 0F 10"),
    bytes.fromhex("3E 00"),
)


def requests() -> list[bytes]:
    """Requests that the seat module answers positively."""
    announcement = signer.announcement(1, signer.KEY_1)
    installs = [sim_world.INSTALL + content for content in tokens()]
    return [*REQUESTS, sim_world.ANNOUNCE + announcement, *installs]


@target("sim-uds", requests, max_bytes=1_024)
def uds(content: bytes) -> bool:
    """A request to a fresh seat module in the extended session."""
    seat = sim_world.seat_module(sim_world.MemoryStore())
    seat.handle(sim_world.EXTENDED, 0)
    answer = seat.handle(content, 0)
    return answer is not None and answer[0] != NEGATIVE


FRAMES = (
    [(0, bytes.fromhex("02 10 03"))],
    [(0, bytes.fromhex("10 09 22 F1 90 0F 10 0F")), (0, bytes.fromhex("21 21 F1 90"))],
)


@target("sim-iso-tp", lambda: [joined(*frames) for frames in FRAMES], max_bytes=2_048)
def iso_tp(content: bytes) -> bool:
    """Frames to a seat module, some of them not for it."""
    seat = sim_world.seat_module(sim_world.MemoryStore())
    sent: list[tuple[int, bytes]] = []
    ids = sim_world.IDENTITY
    link = DiagnosticLink(
        request_id=ids.request_id,
        response_id=ids.response_id,
        send=lambda can_id, data: sent.append((can_id, data)),
        serve=lambda request: seat.handle(request, 0),
    )
    for number, data in cut(content):
        link.receive(Frame(ids.request_id + (number == 15), data[:8], 0, number == 14))
        link.poll()
    return bool(sent)


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    """One for all inputs; nothing waits in it."""
    return asyncio.new_event_loop()


SLCAN = b"V\rN\rS6\rO\rt1232AABB\rT18DAF1101FF\rr1230\rF\rC\r"
PIECE_BYTES = 1_024


@target("slcan", lambda: [SLCAN])
def slcan(content: bytes) -> bool:
    """What a client writes on the adapter's serial line."""

    async def play() -> bool:
        adapter = SlcanAdapter(Bus())
        said = b""
        try:
            os.set_blocking(adapter._far, False)
            for at in range(0, len(content), PIECE_BYTES):
                os.write(adapter._far, content[at : at + PIECE_BYTES])
                adapter._readable()
                said += _read(adapter._far)
            return b"\\a" not in said
        finally:
            adapter.close()

    return loop().run_until_complete(play())


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65_536)
    except BlockingIOError:
        return b""


SOCKETCAND = b"< open can0 >< rawmode >< echo >< send 123 2 AA BB >< send 18DAF110 0 >"


@target("sim-socketcand", lambda: [SOCKETCAND])
def socketcand(content: bytes) -> bool:
    """What a client of the hub sends."""

    async def play() -> bool:
        with mock.patch.object(asyncio.get_running_loop(), "create_server", mock.AsyncMock()) as create:
            await Socketcand(Bus()).start(0)
        assert create.await_args is not None
        client = create.await_args.args[0]()
        transport = mock.Mock(spec=asyncio.Transport)
        transport.get_write_buffer_size.return_value = 0
        client.connection_made(transport)
        client.data_received(content)
        client.connection_lost(None)
        said = b"".join(call.args[0] for call in transport.write.call_args_list)
        return b"error" not in said and not transport.abort.called

    return loop().run_until_complete(play())


register(
    "scenario",
    lambda content: parse(content, scratch() / "scenario.toml", Scenario),
    ConfigError,
    lambda: [sim_process.write_scenario(scratch()).read_bytes()],
)

COMMANDS = ("stop", "ignition on", "seat 3", "ecu seat-module reset", "fault silent seat-module 3", "truth")


def obey(content: bytes) -> None:
    """Carries out a command on a fresh vehicle."""
    vehicle = sim_world.vehicle(sim_world.seat_module(sim_world.MemoryStore()))
    command = control.parse(content.decode("utf-8", errors="replace"))
    control.carry_out(command, vehicle, 0)


register("sim-control", obey, ControlError, lambda: [text.encode() for text in COMMANDS], max_bytes=512)


def state_file() -> list[bytes]:
    """A seat module's durable file, with a right in it."""
    path = scratch() / "seat.json"
    path.unlink(missing_ok=True)
    seat = sim_world.seat_module(FileStore(path))
    sim_world.ask(seat, sim_world.INSTALL + sim_world.token(7, terms={5: 10}))
    return [path.read_bytes()]


def load_state(content: bytes) -> None:
    """Starts a seat module on a file."""
    path = scratch() / "state.json"
    path.write_bytes(content)
    sim_world.seat_module(FileStore(path), epochs=0)


register("ecu-state", load_state, StoreError, state_file)
