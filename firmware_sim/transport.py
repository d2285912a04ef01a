"""Opens the bus on which other programs meet the simulated vehicle, and says which it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import can

from common import log as logs
from firmware_sim.adapter import SlcanAdapter
from firmware_sim.hub import CHANNEL, HOST, Bus, SocketCan, Socketcand
from firmware_sim.scenario import BusConfig

_IFF_UP = 1
_ARPHRD_CAN = 280

log = logs.get(__name__)


class TransportError(Exception):
    """The bus cannot be opened."""


@dataclass(slots=True)
class OpenBus:
    """A bus that is open.

    Args:
        bus: the wire.
        ready: how python-can reaches it, for the ready line.
    """

    bus: Bus
    ready: dict[str, object]
    socketcand: Socketcand | None = None
    socketcan: SocketCan | None = None
    slcan: SlcanAdapter | None = None

    async def close(self) -> None:
        """Closes everything that was opened."""
        if self.slcan is not None:
            self.slcan.close()
        if self.socketcan is not None:
            self.socketcan.close()
        if self.socketcand is not None:
            await self.socketcand.close()


async def open_bus(config: BusConfig) -> OpenBus:
    """Opens the bus that the configuration asks for.

    Raises:
        TransportError: the port is taken, or there is no such interface.
    """
    use_socketcan = config.transport == "socketcan" or (config.transport == "auto" and is_up(config.channel))
    opened = OpenBus(Bus(), {})
    try:
        if use_socketcan:
            opened.socketcan = SocketCan(opened.bus, config.channel)
            opened.ready = {
                "interface": "socketcan",
                "host": None,
                "port": None,
                "channel": config.channel,
            }
            log.info("bus: SocketCAN", channel=config.channel)
        else:
            server = Socketcand(opened.bus)
            await server.start(config.port)
            opened.socketcand = server
            opened.ready = {"interface": "socketcand", "host": HOST, "port": server.port, "channel": CHANNEL}
            why = "asked for" if config.transport == "socketcand" else f"{config.channel} is not up"
            log.info("bus: socketcand on loopback", port=server.port, why=why)
        if config.slcan:
            opened.slcan = SlcanAdapter(opened.bus)
            log.info("bus: serial adapter (slcan)", path=opened.slcan.path)
    except (OSError, can.CanError) as error:
        await opened.close()
        raise TransportError(f"the bus cannot be opened: {error}") from error
    opened.ready["slcan"] = opened.slcan.path if opened.slcan is not None else None
    return opened


def is_up(channel: str) -> bool:
    """True if there is a CAN interface of this name, and it is up."""
    folder = Path("/sys/class/net") / channel
    try:
        flags = int((folder / "flags").read_text(), 16)
        kind = int((folder / "type").read_text())
    except (OSError, ValueError):
        return False
    return kind == _ARPHRD_CAN and bool(flags & _IFF_UP)
