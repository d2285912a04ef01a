"""What `fod-sim run` simulates: the scenario file's form and its cross-checks."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import option
from firmware_sim import control
from firmware_sim.token import MAX_FEATURE, Term
from firmware_sim.vehicle import ControlError

MAX_STANDARD_ID = 0x7FF


class EcuKind(enum.Enum):
    """What an ECU does."""

    SEAT_MODULE = "seat-module"
    POWERTRAIN = "powertrain"


@dataclass(frozen=True)
class VehicleConfig:
    """The vehicle.

    Args:
        vin: 17 characters, without I, O and Q (ISO 3779:2009).
        odometer_m: odometer at the beginning, metres.
        battery_v: voltage of the low-voltage battery.
    """

    vin: str = option(pattern=r"[A-HJ-NPR-Z0-9]{17}")
    odometer_m: int = option(default=0, minimum=0, maximum=4_000_000_000)
    battery_v: float = option(default=12.6, minimum=0, maximum=25)


@dataclass(frozen=True)
class BusConfig:
    """How other programs reach the bus.

    Args:
        transport: "auto" takes SocketCAN if `channel` is up, else socketcand on loopback.
        channel: SocketCAN interface.
        port: of socketcand; 0 takes a free one.
        slcan: also offer a serial adapter on a pseudo-terminal.
    """

    transport: str = option(default="auto", choices=("auto", "socketcan", "socketcand"))
    channel: str = option(default="vcan0", pattern=r"[A-Za-z0-9_.-]{1,15}")
    port: int = option(default=0, minimum=0, maximum=65535)
    slcan: bool = False


@dataclass(frozen=True)
class EcuConfig:
    """One ECU.

    Args:
        identifier, hardware_id: as Uptane names them.
        uid: 16 bytes, hex.
        features: numbers of its features (seat module only).
        state: its durable file (seat module only).
        changes_in_motion: True if features may be switched above 5 km/h.
        terms: limits of tokens that it implements (seat module only); it refuses the others.
        own: what it measures by itself instead of believing the bus (seat module only): "clock"
            is this machine's, "odometer" that of the simulated vehicle.
        reading_key: its own private key, PEM, with which it signs what it counted (seat module
            only); `fod-sim ecu-key` makes one. Without it, it signs nothing.
    """

    identifier: str = option(pattern=r"[A-Za-z0-9._-]{1,64}")
    hardware_id: str = option(pattern=r"[ -~]{1,64}")
    uid: str = option(pattern=r"[0-9a-fA-F]{32}")
    request_id: int = option(minimum=0, maximum=MAX_STANDARD_ID)
    response_id: int = option(minimum=0, maximum=MAX_STANDARD_ID)
    kind: EcuKind = EcuKind.SEAT_MODULE
    features: tuple[int, ...] = option(default=(), minimum=1, maximum=MAX_FEATURE)
    state: Path | None = None
    changes_in_motion: bool = False
    terms: tuple[int, ...] = option(
        default=tuple(int(term) for term in Term), minimum=min(Term), maximum=max(Term)
    )
    own: tuple[str, ...] = option(default=(), choices=("clock", "odometer"))
    reading_key: Path | None = option(default=None, existing=True)

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        if self.kind is EcuKind.SEAT_MODULE and not self.features:
            yield "features", "a seat module needs at least one feature"
        if self.kind is EcuKind.SEAT_MODULE and self.state is None:
            yield "state", "a seat module needs a file for its durable state"
        if self.kind is EcuKind.POWERTRAIN and (self.features or self.state or self.own or self.reading_key):
            yield "kind", "a powertrain has no features, no state, no reading key and nothing in 'own'"


@dataclass(frozen=True)
class TrustConfig:
    """What the ECUs trust from their production.

    Args:
        token_root: public key of the token root, PEM.
        token_keys: announcements of token keys.
    """

    token_root: Path = option(existing=True)
    token_keys: tuple[Path, ...] = option(default=(), existing=True)


@dataclass(frozen=True)
class TimelineEntry:
    """A command at a time after the start.

    Args:
        at_s: seconds after the start.
        do: a command line.
    """

    at_s: float = option(minimum=0)
    do: str = option()

    def problems(self) -> Iterator[tuple[str, str]]:
        """What is no command."""
        try:
            control.parse(self.do)
        except ControlError as error:
            yield "do", str(error).partition(";")[0]


@dataclass(frozen=True)
class Scenario:
    """The whole scenario.

    Args:
        truth: file that gets the truth, JSON lines; begun anew by each run.
        control: "stdin" takes commands from standard input.
    """

    vehicle: VehicleConfig
    ecu: tuple[EcuConfig, ...]
    trust: TrustConfig
    truth: Path
    bus: BusConfig = BusConfig()
    control: str = option(default="none", choices=("stdin", "none"))
    timeline: tuple[TimelineEntry, ...] = ()

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        seats = [e for e in self.ecu if e.kind is EcuKind.SEAT_MODULE]
        if len(seats) != 1:
            yield "ecu", f"expected exactly one seat module, found {len(seats)}"
        identifiers = Counter(e.identifier for e in self.ecu)
        can_ids = Counter(can_id for e in self.ecu for can_id in (e.request_id, e.response_id))
        for name in (n for n, count in identifiers.items() if count > 1):
            yield "ecu", f"identifier {name!r} is used more than once"
        for can_id in (i for i, count in can_ids.items() if count > 1):
            yield "ecu", f"CAN identifier 0x{can_id:X} is used more than once"
