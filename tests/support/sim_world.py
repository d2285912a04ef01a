"""A simulated seat module and vehicle for tests: memory instead of files, time by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vectors import make_token_vectors as signer

import firmware_sim
from firmware_sim.ecu import Ecu, EcuState, Identity, SeatModule, Store, StoreError
from firmware_sim.vehicle import DriveCycle, Vehicle, load_database, read_cycle

S = 1_000_000_000
MS = 1_000_000
EXTENDED = bytes.fromhex("1003")
INSTALL = bytes.fromhex("31010F0D")
RELEASE = bytes.fromhex("31010F0E0001")
ANNOUNCE = bytes.fromhex("31010F0C")
READ_BACK = bytes.fromhex("220F21")
NO_LIMIT = 0xFFFFFFFF

DATA = Path(firmware_sim.__file__).parent / "data"
DATABASE = load_database((DATA / "openfod_sim.dbc").read_text(encoding="utf-8"))
UDDS: DriveCycle = read_cycle((DATA / "udds_mph.csv").read_text(encoding="utf-8"))
IDENTITY = Identity("seat-module", "openfod-seat-1", signer.VIN, signer.UID, 0x744, 0x74C)


@dataclass
class MemoryStore:
    """A store that can fail; `writes` counts the saves that worked."""

    state: EcuState = field(default_factory=EcuState)
    is_broken: bool = False
    writes: int = 0

    def load(self) -> EcuState:
        if self.is_broken:
            raise StoreError("broken for the test")
        return self.state

    def save(self, state: EcuState) -> None:
        if self.is_broken:
            raise StoreError("broken for the test")
        self.state = state
        self.writes += 1


def token(
    counter: int,
    *,
    state: int = 1,
    terms: Mapping[int, int | list[int]] | None = None,
    parameters: bytes | None = None,
) -> bytes:
    """A genuine token for feature 1 of the test's seat module."""
    claims: dict[int, object] = {1: 1, 2: 1, 3: counter, 4: state}
    if terms is not None:
        claims[6] = dict(terms)
    if parameters is not None:
        claims[7] = parameters
    return signer.sign1(signer.dumps(claims), signer.external(), signer.KEY_1)


def seat_module(
    store: Store, *, features: frozenset[int] = frozenset({1}), epochs: int = 1, **sources: Any
) -> SeatModule:
    """A seat module that knows the test's token keys; `sources` are its terms, clock and odometer."""
    seat = SeatModule(
        IDENTITY, features=features, token_root=signer.ROOT.public, store=store, now_ns=0, **sources
    )
    for epoch, key in list(enumerate((signer.KEY_1, signer.KEY_2), start=1))[:epochs]:
        seat.learn_key(signer.announcement(epoch, key))
    return seat


def vehicle(seat: SeatModule, *, odometer_m: int = 1000, others: tuple[Ecu, ...] = ()) -> Vehicle:
    """A vehicle around a seat module."""
    return Vehicle(
        database=DATABASE,
        cycle=UDDS,
        seat=seat,
        others=others,
        odometer_m=odometer_m,
        battery_v=12.6,
        now_ns=0,
    )


def ask(seat: SeatModule, request: bytes, now_ns: int = 0) -> bytes:
    """Sends a request in the extended session and returns the answer."""
    seat.handle(EXTENDED, now_ns)
    answer = seat.handle(request, now_ns)
    assert answer is not None
    return answer


def read_back(seat: SeatModule, now_ns: int = 0) -> tuple[int, int, int, int, int]:
    """State, reason, counter, cycles left, seconds left of feature 1."""
    answer = ask(seat, READ_BACK, now_ns)
    assert answer[:3] == bytes.fromhex("620F21")
    numbers = [int.from_bytes(answer[i : i + 4], "big") for i in (5, 9, 13)]
    return answer[3], answer[4], numbers[0], numbers[1], numbers[2]
