"""A real car: its log, read with code of our own and no CAN library, and how the agent reads it.

The log is candump's text. Both figures travel in ENGINE_DATA of a Honda Civic
(honda_civic_touring_2016_can_generated.dbc):

    BO_ 344 ENGINE_DATA: 8 PCM
     SG_ XMISSION_SPEED : 7|16@0+ (0.01,0) "kph"      bytes 0 and 1
     SG_ ODOMETER : 55|8@0+ (10,0) "m"                byte 6
     SG_ COUNTER : 61|2@0+ (1,0)                      byte 7, bits 4 and 5
     SG_ CHECKSUM : 59|4@0+ (1,0)                     byte 7, bits 0 to 3

A frame with the counter of the frame before counts as sent twice and says
nothing. The log has holes of up to ten seconds, in which nobody knows what the
car did.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.signals_data import REPOSITORY, data_file

from agent.model import Frame
from agent.signals.sources import compile_sources
from agent.signals.table import Table

LOG_NAME = "civic_typeR_turnonanddrive.log"
DBC_NAME = "honda_civic_touring_2016_can_generated.dbc"
SIGNALS = REPOSITORY / "deploy" / "signals" / "honda_civic_2016.toml"
MALFORMED_LINES = (211, 212)
"""Two comments of the DBC that name no signal."""
BUS = "car"
ENGINE_DATA = 344
STEP_M = 10
SPEED_MAX_AGE_NS = 500_000_000

_LINE = re.compile(r"\((\d+)\.(\d{6})\) \S+ ([0-9A-F]+)#([0-9A-F]*)")


@dataclass(frozen=True)
class Reading:
    """One frame of ENGINE_DATA.

    Args:
        at_ns: since the log's first frame.
        follows: no frame is missing before it, as far as the counter tells.
    """

    at_ns: int
    follows: bool
    kmh: float
    odometer_m: int

    @property
    def is_driving(self) -> bool:
        return self.kmh >= 1


@dataclass(frozen=True)
class Figures:
    """What the log says of a logbook.

    Args:
        length_ns: from its first frame to its last.
        odometer_m: last reading less the first.
        tail_m: driven since the last step of the odometer, if every speed holds until the next.
        certain_ns: by "driving" and "parked": time between two readings that
            agree and follow one another, no further apart than a speed may be old.
        held_ns: the same if every reading holds until the next, holes included.
        unsure_ns: time between readings that do not, and at both ends.
        edges: how often time changes between sure and unsure.
    """

    length_ns: int
    odometer_m: int
    tail_m: float
    certain_ns: dict[str, int]
    held_ns: dict[str, int]
    unsure_ns: int
    edges: int


def log_file() -> Path:
    """The log; skips the test if it is not there."""
    return _present(LOG_NAME)


def dbc_file() -> Path:
    """Its database, malformed as published; skips the test if it is not there."""
    return _present(DBC_NAME)


def _present(name: str) -> Path:
    path = data_file(name)
    if not path.is_file():
        pytest.skip(f"no file {path}; set OPENFOD_TEST_DATA")
    return path


def figures(log: Path, speed: float = 1.0) -> Figures:
    """Reads the log as if it were replayed at a multiple of its speed."""
    length_ns, readings = _read(log, speed)
    certain = {"driving": 0, "parked": 0}
    held = {"driving": 0, "parked": 0}
    unsure_ns, edges = readings[0].at_ns + length_ns - readings[-1].at_ns, 2
    for before, after in itertools.pairwise(readings):
        elapsed_ns = after.at_ns - before.at_ns
        status = "driving" if before.is_driving else "parked"
        held[status] += elapsed_ns
        agree = before.is_driving == after.is_driving
        if agree and after.follows and elapsed_ns <= SPEED_MAX_AGE_NS:
            certain[status] += elapsed_ns
        else:
            unsure_ns, edges = unsure_ns + elapsed_ns, edges + 2
    moved_m, tail_m = readings[-1].odometer_m - readings[0].odometer_m, 0.0
    for before, after in itertools.pairwise(readings):
        tail_m = tail_m + before.kmh / 3.6 * (after.at_ns - before.at_ns) / 1e9
        if after.odometer_m != before.odometer_m:
            tail_m = 0.0
    return Figures(length_ns, moved_m, tail_m, certain, held, unsure_ns, edges)


def _read(log: Path, speed: float) -> tuple[int, list[Reading]]:
    readings: list[Reading] = []
    first_us: int | None = None
    at_us: int | None = None
    counter: int | None = None
    for line in log.read_text(encoding="ascii").splitlines():
        match = _LINE.fullmatch(line)
        assert match, line
        at_us = int(match[1]) * 1_000_000 + int(match[2])
        first_us = at_us if first_us is None else first_us
        if int(match[3], 16) != ENGINE_DATA:
            continue
        data = bytes.fromhex(match[4])
        assert _checksum(data) == data[7] & 0xF, line
        before, counter = counter, data[7] >> 4 & 0b11
        if counter == before:
            continue
        hundredths = data[0] << 8 | data[1]
        readings.append(
            Reading(
                at_ns=round((at_us - first_us) * 1000 / speed),
                follows=before is not None and (counter - before) % 4 == 1,
                kmh=hundredths / 100,
                odometer_m=data[6] * STEP_M,
            )
        )
    assert first_us is not None
    assert at_us is not None
    return round((at_us - first_us) * 1000 / speed), readings


def civic_table() -> Table:
    """How the agent reads the car, from the published database and our mapping."""
    dbc = dbc_file()
    compiled = compile_sources(dbc.read_bytes(), dbc, SIGNALS.read_bytes(), SIGNALS)
    assert tuple(skipped.line for skipped in compiled.skipped) == MALFORMED_LINES
    return compiled.table


def civic_frame(at_ns: int, speed_kmh: float, odometer_m: int) -> Frame:
    """A frame of ENGINE_DATA, sent every 100 ms."""
    speed = round(speed_kmh * 100).to_bytes(2, "big")
    counter = at_ns // 100_000_000 % 4
    data = speed + bytes(2) + speed + bytes([odometer_m // STEP_M % 256, counter << 4])
    return Frame(BUS, ENGINE_DATA, data[:7] + bytes([data[7] | _checksum(data)]), at_ns)


def _checksum(data: bytes) -> int:
    """All nibbles of identifier, payload and checksum sum to 8 modulo 16."""
    digits = f"{ENGINE_DATA:x}{data.hex()}"[:-1]
    return (8 - sum(int(digit, 16) for digit in digits)) % 16
