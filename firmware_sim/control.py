"""The commands that a person or a script gives the simulated vehicle.

Pure: a line of text and a vehicle in, an answer out. The same grammar serves
standard input and the scenario's timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from firmware_sim.ecu import NS_PER_S
from firmware_sim.faults import Fault
from firmware_sim.vehicle import ControlError, Vehicle

MAX_LINE_CHARS = 256
"""Longest command."""
MAX_FAULT_S = 86_400
MAX_DIGITS = 6

GRAMMAR = """\
drive START STOP         drive from second START to second STOP of the cycle
stop                     stand still
ignition on|off          terminal 15
seat LEVEL               the driver asks for seat heat, 0 to 3
ecu ECU reset            restart an ECU
fault drop MESSAGE S     do not send a message for S seconds
fault crc MESSAGE S      send it with a wrong checksum
fault freeze MESSAGE S   send it with a frozen alive counter
fault silent ECU S       an ECU does not answer
fault clear              end all faults
truth                    print the truth
quit                     end"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the grammar, with its words."""

    line: str
    words: tuple[str, ...]


def parse(line: str) -> Command:
    """Reads a command.

    Raises:
        ControlError: not of the grammar.
    """
    words = tuple(line.split())
    if len(line) > MAX_LINE_CHARS or not _is_command(words):
        raise ControlError(f"not a command: {line[:80]!r}; known:\n{GRAMMAR}")
    return Command(" ".join(words), words)


def carry_out(command: Command, vehicle: Vehicle, now_ns: int) -> dict[str, object]:
    """Carries out a command and returns the answer, with "event" as its first field.

    `truth` answers {"event": "truth", ...}, the others {"event": "ok", "command": ...}.

    Raises:
        ControlError: does not fit the situation; nothing has changed.
    """
    verb, *rest = command.words
    if verb == "truth":
        vehicle.catch_up(now_ns)
        return {"event": "truth", **vehicle.truth.as_json()}
    if verb != "quit":
        _VERBS[verb](vehicle, rest, now_ns)
    return {"event": "ok", "command": command.line}


def _drive(vehicle: Vehicle, words: list[str], now_ns: int) -> None:
    vehicle.drive(int(words[0]), int(words[1]), now_ns)


def _stop(vehicle: Vehicle, _words: list[str], now_ns: int) -> None:
    vehicle.stop(now_ns)


def _ignition(vehicle: Vehicle, words: list[str], now_ns: int) -> None:
    vehicle.ignition(on=words[0] == "on", now_ns=now_ns)


def _seat(vehicle: Vehicle, words: list[str], now_ns: int) -> None:
    vehicle.press_seat(int(words[0]), now_ns)


def _ecu(vehicle: Vehicle, words: list[str], now_ns: int) -> None:
    vehicle.reset(words[0], now_ns)


def _fault(vehicle: Vehicle, words: list[str], now_ns: int) -> None:
    if words[0] == "clear":
        vehicle.faults.clear()
        return
    fault, target, duration_s = Fault(words[0]), words[1], int(words[2])
    known = vehicle.ecus if fault is Fault.SILENT else vehicle.message_names
    if target not in known:
        raise ControlError(f"no {target!r} here; known: {', '.join(sorted(known))}")
    vehicle.faults.begin(fault, target, until_ns=now_ns + duration_s * NS_PER_S)


_VERBS: Mapping[str, Callable[[Vehicle, list[str], int], None]] = {
    "drive": _drive,
    "stop": _stop,
    "ignition": _ignition,
    "seat": _seat,
    "ecu": _ecu,
    "fault": _fault,
}


def _is_command(words: tuple[str, ...]) -> bool:
    match words:
        case ("stop" | "truth" | "quit",) | ("ignition", "on" | "off") | ("ecu", _, "reset"):
            return True
        case ("drive", start, stop):
            return _is_number(start) and _is_number(stop)
        case ("seat", level):
            return _is_number(level)
        case ("fault", "clear"):
            return True
        case ("fault", "drop" | "crc" | "freeze" | "silent", _, duration_s):
            return _is_number(duration_s) and int(duration_s) <= MAX_FAULT_S
        case _:
            return False


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS
