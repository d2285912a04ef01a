"""The vehicle of a simulated life, which alone knows the truth: what was on, how long, how far."""

from __future__ import annotations

import json
from dataclasses import dataclass

import cbor2
from support.engine_world import HEAT, IGNITION, MS, ODO, SPEED, STEP_M

from agent.errors import EcuSilentError, NegativeResponseError, VehicleError
from agent.model import SignalInfo, SignalValue

AGE_MS = 40_000
"""Age at which a signal counts as silent; frames come at every change and every BEAT_MS."""
BEAT_MS = 15_000
INFOS = {
    SPEED: SignalInfo(SPEED, "km/h", 0.01, AGE_MS * MS),
    ODO: SignalInfo(ODO, "km", STEP_M / 1000, AGE_MS * MS),
    HEAT: SignalInfo(HEAT, "percent", 1, AGE_MS * MS),
    IGNITION: SignalInfo(IGNITION, "", 0, AGE_MS * MS),
}
_INSTALL = bytes.fromhex("31010F0D")
_RELEASE = bytes.fromhex("31010F0E")


@dataclass
class SeatEcu:
    """The seat module: takes tokens by their counter, and ends a lease by its own ignition cycles."""

    counter: int = 0
    on: bool = False
    is_silent: bool = False
    cycles_left: int = 0
    lease_cycles: int = 200
    took_older: bool = False

    def wake(self) -> None:
        """The ignition comes on: the one moment at which a lease is judged."""
        if self.on:
            self.cycles_left -= 1
            self.on = self.cycles_left > 0

    def request(self, request: bytes, speed_kmh: float) -> VehicleError | None:
        """Does one request; reads change nothing."""
        if request.startswith(_INSTALL):
            counter, allows = _read_token(request[4:])
            if counter < self.counter:
                return NegativeResponseError("seat-module", service=0x31, nrc=0x24, name="sequence")
            if speed_kmh > 5 and allows != self.on:
                return NegativeResponseError("seat-module", service=0x31, nrc=0x88, name="speed")
            if counter > self.counter:
                self.cycles_left = self.lease_cycles
            self.counter, self.on = counter, allows and self.cycles_left > 0
        elif request.startswith(_RELEASE):
            self.on = False
        return None

    def run(self, requests: tuple[bytes, ...], speed_kmh: float) -> VehicleError | None:
        """Does the requests of a job, one after the other."""
        if self.is_silent:
            return EcuSilentError("seat-module did not answer within 1000 ms")
        for request in requests:
            error = self.request(request, speed_kmh)
            if error is not None:
                return error
        return None

    def read_back(self) -> bytes:
        """The answer to ReadDataByIdentifier 0x0F21."""
        state = bytes([int(self.on), 0]) + self.counter.to_bytes(4, "big")
        return bytes.fromhex("620F21") + state + b"\xff" * 8


def _read_token(content: bytes) -> tuple[int, bool]:
    """Counter and state of a token: JSON of the lives without signatures, else COSE (docs/token.md)."""
    if content.startswith(b"{"):
        said = json.loads(content)
        return said["counter"], said["allows"]
    claims = cbor2.loads(cbor2.loads(content).value[2])
    return claims[3], claims[4] == 1


class Car:
    """Position, speed, key and button; `move` counts what is true."""

    def __init__(self) -> None:
        self.ecu = SeatEcu()
        self.speed_kmh = 0.0
        self.is_on = False
        self.is_pressed = False
        self.position_m = 12_345_678.0
        self.heated_ms = 0
        self.heated_m = 0.0

    @property
    def is_heating(self) -> bool:
        """Whether the heater's output is on."""
        return self.ecu.on and self.is_pressed and self.is_on

    def move(self, elapsed_ms: int) -> None:
        """Lets time pass in which nothing changes."""
        moved_m = self.speed_kmh * elapsed_ms / 3600
        self.position_m += moved_m
        if self.is_heating:
            self.heated_ms += elapsed_ms
            self.heated_m += moved_m

    def frames(self) -> dict[str, SignalValue]:
        """What the bus says now."""
        return {
            SPEED: self.speed_kmh,
            ODO: int(self.position_m) // STEP_M * STEP_M / 1000,
            HEAT: 66.0 if self.is_heating else 0.0,
            IGNITION: "ON" if self.is_on else "OFF",
        }
