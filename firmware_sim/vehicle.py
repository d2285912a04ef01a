"""The simulated vehicle: its drive, its cyclic frames and the truth about its use.

Pure: no I/O and no clock; callers pass monotonic nanoseconds, in real time or
as fast as they like. Everything inside happens at its exact moment, whatever
the steps of the caller: `step` replays frames, the end of a drive and truth
lines one after the other.

The drive is the Urban Dynamometer Driving Schedule (40 CFR 1066.801; one point
a second, linear between the points). Distances are integers in micrometres
from a closed form, so that sums of parts equal the whole.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import cantools.database
from cantools.database.can import Database, Message

from firmware_sim.ecu import (
    MAX_HEAT_LEVEL,
    NS_PER_MS,
    NS_PER_S,
    SEAT_HEATING,
    Ecu,
    Happening,
    Powertrain,
    SeatModule,
    State,
)
from firmware_sim.faults import Fault, Faults
from firmware_sim.frame import Frame

MIN_CYCLE_POINTS = 2
MAX_CYCLE_POINTS = 100_000
MAX_SPEED_TENTH_MPH = 2_000
"""Fastest point of a drive cycle, tenths of a mile per hour."""
UM_PER_S_PER_TENTH_MPH = 44_704
"""0.1 mile/h in micrometres per second, exactly (1 mile = 1609.344 m)."""
TRUTH_PERIOD_NS = NS_PER_S
POWERTRAIN_AFTER_RUN_NS = 10 * NS_PER_S
"""How long the powertrain still sends after ignition off."""
ALIVE_COUNTER_VALUES = 15
ODOMETER_STEP_M = 10
_UM_PER_M = 1_000_000
_COLUMNS = 2
_ROUNDING = 1e-6
_POWERTRAIN_NODE = "POWERTRAIN"


class CycleError(ValueError):
    """A drive cycle file, or a part of a cycle, that cannot be driven."""


class ControlError(ValueError):
    """A command that does not fit the vehicle's situation; nothing has changed."""


class DriveCycle:
    """Speed over time, one point a second.

    Args:
        speeds: tenths of a mile per hour.
    """

    def __init__(self, speeds: tuple[int, ...]) -> None:
        self._speeds = speeds
        self._sums = [0]
        for before, after in itertools.pairwise(speeds):
            self._sums.append(self._sums[-1] + before + after)

    @property
    def duration_s(self) -> int:
        """Time from the first to the last point, seconds."""
        return len(self._speeds) - 1

    def speed_kmh(self, at_ns: int) -> float:
        """Speed at a time of the cycle (0 to its duration), km/h."""
        second, rest_ns = divmod(at_ns, NS_PER_S)
        before = self._speeds[second]
        after = self._speeds[min(second + 1, self.duration_s)]
        tenths = before + (after - before) * rest_ns / NS_PER_S
        return tenths * UM_PER_S_PER_TENTH_MPH * 3.6e-6

    def distance_um(self, at_ns: int) -> int:
        """Distance from the beginning to a time of the cycle, micrometres."""
        second, rest_ns = divmod(at_ns, NS_PER_S)
        before = self._speeds[second]
        after = self._speeds[min(second + 1, self.duration_s)]
        # The integral over whole seconds and the rest, in 0.1 mph * s / (2 * 10^18).
        doubled = self._sums[second] * NS_PER_S**2 + 2 * before * rest_ns * NS_PER_S
        doubled += (after - before) * rest_ns**2
        return doubled * UM_PER_S_PER_TENTH_MPH // (2 * NS_PER_S**2)


def read_cycle(text: str) -> DriveCycle:
    """Reads a drive cycle: CSV with the header `time_s,speed_mph`, one line a second from 0.

    Raises:
        CycleError: another header, a missing second, or a speed that is no number.
    """
    rows = csv.reader(io.StringIO(text))
    if next(rows, None) != ["time_s", "speed_mph"]:
        raise CycleError("line 1: expected the header time_s,speed_mph")
    speeds: list[int] = []
    for row in rows:
        line = len(speeds) + 2
        if len(row) != _COLUMNS or row[0] != str(len(speeds)) or line > MAX_CYCLE_POINTS:
            raise CycleError(f"line {line}: expected second {len(speeds)} and its speed")
        try:
            tenths = float(row[1]) * 10
        except ValueError as error:
            raise CycleError(f"line {line}: {row[1]!r} is no speed") from error
        if not 0 <= tenths <= MAX_SPEED_TENTH_MPH or abs(tenths - round(tenths)) > _ROUNDING:
            raise CycleError(f"line {line}: expected 0 to 200 miles/h in tenths, found {row[1]}")
        speeds.append(round(tenths))
    if len(speeds) < MIN_CYCLE_POINTS:
        raise CycleError("a drive cycle has at least two points")
    return DriveCycle(tuple(speeds))


@dataclass(frozen=True, slots=True)
class Truth:
    """What really happened, up to one moment. Billing is compared with it.

    Args:
        at_ns: the moment, monotonic.
        odometer_um: total of the odometer, micrometres.
        driven_um: distance since the simulation began.
        heater_on_ns, heated_um: time and distance with the heater on.
        feature_on_ns, feature_on_um: time and distance with a feature on, by number.
        heat_level: level at which the heater works from this moment, 0 to 3.
    """

    at_ns: int
    odometer_um: int
    driven_um: int
    heater_on_ns: int
    heated_um: int
    feature_on_ns: Mapping[int, int]
    feature_on_um: Mapping[int, int]
    heat_level: int
    speed_kmh: float
    ignition_on: bool

    def as_json(self) -> dict[str, object]:
        """The truth in milliseconds and metres at full precision."""
        return {
            "monotonic_ns": self.at_ns,
            "odometer_m": self.odometer_um / _UM_PER_M,
            "total_distance_m": self.driven_um / _UM_PER_M,
            "heater_on_ms": self.heater_on_ns / NS_PER_MS,
            "heated_distance_m": self.heated_um / _UM_PER_M,
            "feature_on_ms": {str(n): ns / NS_PER_MS for n, ns in self.feature_on_ns.items()},
            "feature_on_distance_m": {str(n): um / _UM_PER_M for n, um in self.feature_on_um.items()},
            "heat_level": self.heat_level,
            "speed_kmh": self.speed_kmh,
            "ignition": "on" if self.ignition_on else "off",
        }


@dataclass(slots=True)
class _Drive:
    begun_ns: int
    from_ns: int
    to_ns: int
    odometer_um: int

    @property
    def end_ns(self) -> int:
        return self.begun_ns + self.to_ns - self.from_ns


@dataclass(slots=True)
class _Cyclic:
    message: Message
    period_ns: int
    due_ns: int
    counter: int = 0


@dataclass(slots=True)
class _Totals:
    heater_on_ns: int = 0
    heated_um: int = 0
    feature_on_ns: dict[int, int] = field(default_factory=dict)
    feature_on_um: dict[int, int] = field(default_factory=dict)


class Vehicle:
    """The vehicle, from the moment `now_ns` on.

    Args:
        seat: its seat module.
        others: its other ECUs.
        odometer_m: odometer at the beginning, metres.
        battery_v: voltage of the low-voltage battery.

    It begins parked with the ignition off.
    """

    def __init__(
        self,
        *,
        database: Database,
        cycle: DriveCycle,
        seat: SeatModule,
        others: tuple[Ecu, ...] = (),
        odometer_m: int,
        battery_v: float,
        now_ns: int,
    ) -> None:
        self.faults = Faults()
        self._cycle = cycle
        self._seat = seat
        self._ecus: dict[str, Ecu] = {e.identity.identifier: e for e in (seat, *others)}
        self._battery_v = battery_v
        self._now_ns = now_ns
        self._base_um = self._first_um = odometer_m * _UM_PER_M
        self._drive: _Drive | None = None
        self._ignition_on = False
        self._ignition_off_ns = now_ns - POWERTRAIN_AFTER_RUN_NS
        self._totals = _Totals()
        self._happenings: list[Happening] = []
        self._truths: list[Truth] = [self.truth]
        self._next_truth_ns = now_ns + TRUTH_PERIOD_NS
        self._cyclic = [
            # One millisecond apart: senders of a real bus do not speak all at once.
            _Cyclic(message, message.cycle_time * NS_PER_MS, now_ns + index * NS_PER_MS)
            for index, message in enumerate(database.messages)
            if message.cycle_time
        ]

    # --- what a caller drives ---

    @property
    def ecus(self) -> Mapping[str, Ecu]:
        """The ECUs by identifier."""
        return self._ecus

    @property
    def message_names(self) -> frozenset[str]:
        """Names of the messages that it sends."""
        return frozenset(c.message.name for c in self._cyclic)

    @property
    def next_due_ns(self) -> int:
        """When the next frame leaves."""
        return min(c.due_ns for c in self._cyclic)

    def step(self, now_ns: int) -> list[Frame]:
        """Lets time pass until `now_ns` and returns the frames that left meanwhile."""
        frames: list[Frame] = []
        while True:
            cyclic = min(self._cyclic, key=lambda c: c.due_ns)
            due_ns = min(cyclic.due_ns, self._next_truth_ns)
            if due_ns > now_ns:
                break
            # What fell due before the last command leaves late, not in the past.
            moment = max(due_ns, self._now_ns)
            self._advance(moment)
            if due_ns == self._next_truth_ns:
                self._next_truth_ns += TRUTH_PERIOD_NS
                if self._drive is not None or self._seat.heat_level > 0:
                    self._truths.append(self.truth)
            else:
                cyclic.due_ns += cyclic.period_ns
                frame = self._frame(cyclic, moment)
                if frame is not None:
                    frames.append(frame)
        self._advance(now_ns)
        return frames

    def drive(self, start_s: int, stop_s: int, now_ns: int) -> None:
        """Drives a part of the cycle, from one second of it to another.

        Raises:
            ControlError: the ignition is off, or the cycle has no such part.
        """
        if not self._ignition_on:
            raise ControlError("the ignition is off; nothing drives")
        if not 0 <= start_s < stop_s <= self._cycle.duration_s:
            raise ControlError(f"expected 0 <= START < STOP <= {self._cycle.duration_s} seconds")
        self.stop(now_ns)
        self._drive = _Drive(now_ns, start_s * NS_PER_S, stop_s * NS_PER_S, self._base_um)
        self._tell("drive-begun", start_s=start_s, stop_s=stop_s, odometer_m=self._base_um / _UM_PER_M)
        self._truths.append(self.truth)

    def stop(self, now_ns: int) -> None:
        """Stands still from now on."""
        self._advance(now_ns)
        if self._drive is not None:
            self._end_drive(now_ns)

    def ignition(self, *, on: bool, now_ns: int) -> None:
        """Switches terminal 15; off also ends a drive."""
        self.stop(now_ns)
        if on == self._ignition_on:
            return
        self._ignition_on = on
        if not on:
            self._ignition_off_ns = now_ns
        before = self._seat.heat_level
        self._seat.terminal_15(on=on, now_ns=now_ns)
        self._tell("ignition", state="on" if on else "off")
        self._note(before)

    def press_seat(self, level: int, now_ns: int) -> None:
        """The driver asks for a heat level, 0 to 3.

        Raises:
            ControlError: no such level.
        """
        if not 0 <= level <= MAX_HEAT_LEVEL:
            raise ControlError(f"expected a level from 0 to {MAX_HEAT_LEVEL}")
        self._advance(now_ns)
        before = self._seat.heat_level
        self._seat.press(level, now_ns)
        self._note(before)

    def request(self, identifier: str, request: bytes, now_ns: int) -> bytes | None:
        """Gives a UDS request to an ECU and returns its response, or None."""
        self._advance(now_ns)
        if self.faults.has(Fault.SILENT, identifier, now_ns):
            return None
        before = self._seat.heat_level
        response = self._ecus[identifier].handle(request, now_ns)
        self._note(before)
        return response

    def reset(self, identifier: str, now_ns: int) -> None:
        """Restarts an ECU.

        Raises:
            ControlError: no such ECU.
        """
        self._advance(now_ns)
        if identifier not in self._ecus:
            raise ControlError(f"no ECU {identifier!r}; known: {', '.join(sorted(self._ecus))}")
        before = self._seat.heat_level
        self._ecus[identifier].reset(now_ns)
        self._note(before)

    def catch_up(self, now_ns: int) -> None:
        """Lets time pass without collecting frames; what is due leaves with the next step."""
        self._advance(now_ns)

    def take_happenings(self) -> list[Happening]:
        """Returns what happened since the last call, in order of time."""
        taken = [*self._happenings, *(h for ecu in self._ecus.values() for h in ecu.happenings)]
        self._happenings.clear()
        for ecu in self._ecus.values():
            ecu.happenings.clear()
        return sorted(taken, key=lambda h: h.at_ns)

    def take_truths(self) -> list[Truth]:
        """Returns the truth since the last call: each second of use, and each change of the heater."""
        taken, self._truths = self._truths, []
        return taken

    # --- the truth ---

    @property
    def speed_kmh(self) -> float:
        """Speed now."""
        drive = self._drive
        if drive is None:
            return 0.0
        return self._cycle.speed_kmh(drive.from_ns + self._now_ns - drive.begun_ns)

    @property
    def odometer_m(self) -> int:
        """Odometer now, whole metres, rounded down."""
        return self._odometer_um(self._now_ns) // _UM_PER_M

    @property
    def truth(self) -> Truth:
        """The truth up to now."""
        odometer_um = self._odometer_um(self._now_ns)
        return Truth(
            at_ns=self._now_ns,
            odometer_um=odometer_um,
            driven_um=odometer_um - self._first_um,
            heater_on_ns=self._totals.heater_on_ns,
            heated_um=self._totals.heated_um,
            feature_on_ns=dict(self._totals.feature_on_ns),
            feature_on_um=dict(self._totals.feature_on_um),
            heat_level=self._seat.heat_level,
            speed_kmh=self.speed_kmh,
            ignition_on=self._ignition_on,
        )

    def _odometer_um(self, now_ns: int) -> int:
        drive = self._drive
        if drive is None:
            return self._base_um
        at_ns = drive.from_ns + now_ns - drive.begun_ns
        return drive.odometer_um + self._cycle.distance_um(at_ns) - self._cycle.distance_um(drive.from_ns)

    def _advance(self, now_ns: int) -> None:
        """Lets time pass, and ends the drive at its own moment."""
        if self._drive is not None and self._drive.end_ns <= now_ns:
            self._end_drive(self._drive.end_ns)
        self._pass_time(now_ns)

    def _pass_time(self, now_ns: int) -> None:
        """Counts what was on since the last moment, then lets the seat module see the speed."""
        elapsed_ns = now_ns - self._now_ns
        driven_um = self._odometer_um(now_ns) - self._odometer_um(self._now_ns)
        totals = self._totals
        if self._seat.heat_level > 0:
            totals.heater_on_ns += elapsed_ns
            totals.heated_um += driven_um
        for number in self._seat.state.rights:
            if self._seat.status(number)[0] is State.ON:
                totals.feature_on_ns[number] = totals.feature_on_ns.get(number, 0) + elapsed_ns
                totals.feature_on_um[number] = totals.feature_on_um.get(number, 0) + driven_um
        self._now_ns = now_ns
        before = self._seat.heat_level
        self._seat.sense(speed_kmh=self.speed_kmh, now_ns=now_ns)
        self._note(before)

    def _end_drive(self, now_ns: int) -> None:
        self._pass_time(now_ns)
        self._base_um = self._odometer_um(now_ns)
        self._drive = None
        self._tell("drive-ended", odometer_m=self._base_um / _UM_PER_M)
        self._pass_time(now_ns)
        self._truths.append(self.truth)

    def _note(self, heat_level_before: int) -> None:
        """Writes down the truth where the heater changed."""
        level = self._seat.heat_level
        if level != heat_level_before:
            self._truths.append(self.truth)
            self._tell("heater", level=level)

    def _tell(self, name: str, **facts: object) -> None:
        self._happenings.append(Happening(name, self._now_ns, facts))

    # --- frames ---

    def _frame(self, cyclic: _Cyclic, at_ns: int) -> Frame | None:
        """The next frame of a message; None while its sender is silent."""
        message = cyclic.message
        name = message.name
        if not self.faults.has(Fault.FREEZE, name, at_ns):
            cyclic.counter = (cyclic.counter + 1) % ALIVE_COUNTER_VALUES
        if self._sleeps(message, at_ns) or self.faults.has(Fault.DROP, name, at_ns):
            return None
        values = {f"{name}_CRC": 0, f"{name}_COUNTER": cyclic.counter, **self._values(name)}
        data = bytearray(message.encode(values))
        data[0] = crc8_j1850(message.frame_id.to_bytes(2, "little") + data[1:])
        if self.faults.has(Fault.CRC, name, at_ns):
            data[0] ^= 0xFF
        elif name == "PT_ODOMETER":
            self._seat.hear_odometer(self.odometer_m // ODOMETER_STEP_M * ODOMETER_STEP_M, at_ns)
        return Frame(message.frame_id, bytes(data), at_ns)

    def _sleeps(self, message: Message, at_ns: int) -> bool:
        if message.name == "SEAT_HEAT":
            return not self._seat.is_awake(at_ns)
        if _POWERTRAIN_NODE not in message.senders:
            return False
        if any(isinstance(ecu, Powertrain) and not ecu.is_awake(at_ns) for ecu in self._ecus.values()):
            return True
        return not self._ignition_on and at_ns - self._ignition_off_ns >= POWERTRAIN_AFTER_RUN_NS

    def _values(self, name: str) -> dict[str, float]:
        speed = self.speed_kmh
        if name == "PT_SPEED":
            rounded = round(speed, 2)
            return {"VehicleSpeed": rounded, "WheelSpeed": rounded}
        if name == "PT_GEAR":
            return {"Gear": 3 if self._drive is not None else 0}
        if name == "PT_ENGINE":
            rpm = 800 + 25 * speed if self._ignition_on else 0
            return {"EngineSpeed": round(rpm * 4) / 4, "CoolantTemperature": 88 if self._ignition_on else 20}
        if name == "PT_ODOMETER":
            return {"Odometer": self.odometer_m // ODOMETER_STEP_M * ODOMETER_STEP_M}
        if name == "BODY_POWER":
            return {"IgnitionState": 2 if self._ignition_on else 0, "BatteryVoltage": self._battery_v}
        return {
            "HeatLevel": self._seat.heat_level,
            "HeatRequested": self._seat.heat_requested,
            "FeatureState": self._seat.status(SEAT_HEATING)[0],
            "HeatPower": self._seat.heat_power_w,
        }


def load_database(text: str) -> Database:
    """Reads the vehicle's DBC."""
    database = cantools.database.load_string(text, database_format="dbc")
    if not isinstance(database, Database):
        raise TypeError("expected a database of CAN messages")
    return database


def crc8_j1850(content: bytes) -> int:
    """CRC-8 SAE J1850: polynomial 0x1D, initial value and final XOR 0xFF."""
    remainder = 0xFF
    for byte in content:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder << 1) ^ 0x1D if remainder & 0x80 else remainder << 1
            remainder &= 0xFF
    return remainder ^ 0xFF
