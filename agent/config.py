"""The agent's configuration: agent.toml, read once and frozen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import option, read

DEFAULT_PATH = Path("/etc/openfod/agent.toml")
"""Where a packaged agent looks for its configuration."""
MAX_PORT = 65_535


@dataclass(frozen=True)
class VehicleConfig:
    """[vehicle]: who this is, and whether it may write to a bus."""

    vin: str = option(pattern=r"[A-HJ-NPR-Z0-9]{17}")
    listen_only: bool = option(default=True)


@dataclass(frozen=True)
class CloudConfig:
    """[cloud]: where the cloud is, and who may call itself that."""

    endpoint: str = option(pattern=r"[^:/\s]+:[0-9]{1,5}")
    enrolment_endpoint: str = option(pattern=r"[^:/\s]+:[0-9]{1,5}")
    root_ca: Path = option(existing=True)
    server_name: str = option(default="", pattern=r"[^\s]*")

    def problems(self) -> Iterator[tuple[str, str]]:
        """Ports in range."""
        for name in ("endpoint", "enrolment_endpoint"):
            port = int(getattr(self, name).rpartition(":")[2])
            if not 0 < port <= MAX_PORT:
                yield name, f"expected a port of 1 to {MAX_PORT}, found {port}"


@dataclass(frozen=True)
class TrustConfig:
    """[trust]: the anchors that ship in the image."""

    director_root: Path = option(existing=True)
    catalogue_root: Path = option(existing=True)
    receipt_key: Path = option(existing=True)


@dataclass(frozen=True)
class StateConfig:
    """[state]: where the agent keeps what must survive."""

    directory: Path = option()
    api_socket: Path | None = option(default=None)
    floors_directory: Path | None = option(default=None)


@dataclass(frozen=True)
class BusConfig:
    """[[buses]]: one bus, named as python-can names it."""

    name: str = option(pattern=r"[a-z][a-z0-9-]{0,31}")
    interface: str = option()
    channel: str = option()
    bitrate: int | None = option(default=None, minimum=10_000, maximum=1_000_000)
    fd: bool = option(default=False)
    data_bitrate: int | None = option(default=None, minimum=500_000, maximum=8_000_000)
    host: str | None = option(default=None)
    port: int | None = option(default=None, minimum=1, maximum=MAX_PORT)
    speed: float | None = option(default=None, minimum=0)
    changes_only: bool = option(default=False)
    database: Path | None = option(default=None, existing=True)
    signals: Path | None = option(default=None, existing=True)

    @property
    def options(self) -> dict[str, Any]:
        """What only some interfaces have, by python-can's names."""
        names = ("host", "port", "speed", "data_bitrate")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def problems(self) -> Iterator[tuple[str, str]]:
        """Cross-checks of one bus."""
        if (self.database is None) != (self.signals is None):
            yield "database", "database and signals go together: one of them is missing"
        if self.data_bitrate is not None and (self.interface != "slcan" or not self.fd):
            yield "data_bitrate", "only slcan with fd has one; that of socketcan is set by ip link"
        if self.changes_only and (self.interface != "socketcan" or self.fd):
            yield "changes_only", "only socketcan without fd can do it"


@dataclass(frozen=True)
class MeteringConfig:
    """[metering]: how often usage becomes durable, and is sent."""

    checkpoint_s: float = option(default=2.0, minimum=0.5, maximum=5)
    window_s: float = option(default=60.0, minimum=1, maximum=3600)
    journal_mb: int = option(default=64, minimum=4, maximum=4096)


@dataclass(frozen=True)
class LogConfig:
    """[log]: how much is said, and in which form."""

    level: str = option(default="info", choices=("debug", "info", "warning", "error"))
    form: str = option(default="text", choices=("text", "json"))


@dataclass(frozen=True)
class AgentConfig:
    """agent.toml."""

    vehicle: VehicleConfig
    cloud: CloudConfig
    trust: TrustConfig
    state: StateConfig
    buses: tuple[BusConfig, ...]
    metering: MeteringConfig = field(default=MeteringConfig())
    log: LogConfig = field(default=LogConfig())

    def problems(self) -> Iterator[tuple[str, str]]:
        """Cross-checks of the whole file."""
        names = [b.name for b in self.buses]
        if not names:
            yield "buses", "at least one bus is needed"
        for index, name in enumerate(names):
            if name in names[:index]:
                yield f"buses[{index}].name", f"{name!r} names two buses"

    @property
    def api_socket(self) -> Path:
        """Unix socket of the local interface."""
        return self.state.api_socket or self.state.directory / "agent.sock"

    @property
    def floors_directory(self) -> Path:
        """Folder of the second copy of the floors."""
        return self.state.floors_directory or self.state.directory


def load(path: Path) -> AgentConfig:
    """Reads agent.toml.

    Raises:
        ConfigError: all that is wrong with it, with lines.
    """
    return read(path, AgentConfig)
