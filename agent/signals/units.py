"""Units of signals: spellings of the same one, and what leads from one to another.

Pure.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple


class _Unit(NamedTuple):
    """base = value * factor + offset, in the base unit of its quantity."""

    quantity: str
    factor: float
    offset: float = 0.0


# The first spelling is that of VSS 4.0; the others are those of public databases.
_UNITS: Final[tuple[tuple[tuple[str, ...], _Unit], ...]] = (
    (("km/h", "kph", "kmh", "km/hr", "kilometer per hour"), _Unit("speed", 1)),
    (("mph", "mi/h"), _Unit("speed", 1.609344)),
    (("m/s", "mps"), _Unit("speed", 3.6)),
    (("m/s^2", "m/s2", "m/s/s", "m/s²"), _Unit("acceleration", 1)),
    (("km", "kilometer", "kilometre"), _Unit("length", 1000)),
    (("m", "meter", "metre", "meters", "metres"), _Unit("length", 1)),
    (("cm",), _Unit("length", 0.01)),
    (("mm",), _Unit("length", 0.001)),
    (("mi", "mile", "miles"), _Unit("length", 1609.344)),
    (("percent", "%", "pct"), _Unit("ratio", 1)),
    (("celsius", "degc", "deg c", "°c", "c"), _Unit("temperature", 1)),
    (("kelvin", "k"), _Unit("temperature", 1, -273.15)),
    (("fahrenheit", "degf", "deg f", "°f", "f"), _Unit("temperature", 5 / 9, -160 / 9)),
    (("degrees", "deg", "°", "degree"), _Unit("angle", 1)),
    (("rad", "radian", "radians"), _Unit("angle", 57.29577951308232)),
    (("degrees/s", "deg/s", "°/s"), _Unit("turning", 1)),
    (("rpm", "1/min", "r/min"), _Unit("revolutions", 1)),
    (("V", "volt", "volts"), _Unit("voltage", 1)),
    (("mV", "millivolt"), _Unit("voltage", 0.001)),
    (("A", "amp", "amps", "ampere"), _Unit("current", 1)),
    (("mA",), _Unit("current", 0.001)),
    (("kW",), _Unit("power", 1000)),
    (("W", "watt"), _Unit("power", 1)),
    (("kWh",), _Unit("energy", 1000)),
    (("Wh",), _Unit("energy", 1)),
    (("Nm", "n*m", "n-m"), _Unit("torque", 1)),
    (("bar",), _Unit("pressure", 100)),
    (("kPa",), _Unit("pressure", 1)),
    (("Pa",), _Unit("pressure", 0.001)),
    (("psi",), _Unit("pressure", 6.894757293168)),
    (("s", "sec", "second", "seconds"), _Unit("time", 1)),
    (("ms", "msec"), _Unit("time", 0.001)),
    (("min", "minute", "minutes"), _Unit("time", 60)),
    (("h", "hour", "hours"), _Unit("time", 3600)),
    (("l", "liter", "litre"), _Unit("volume", 1)),
    (("ml",), _Unit("volume", 0.001)),
)
_BY_SPELLING: Final = MappingProxyType(
    {spelling.casefold(): unit for spellings, unit in _UNITS for spelling in spellings}
)
_NEAR: Final = 0.01
"""Difference from the true factor, as a share of it, that a rounded one may have."""


def factor(there: str, here: str) -> float | None:
    """What a value in unit `there` is multiplied by to be one in unit `here`; None if nothing does it."""
    before, after = (_BY_SPELLING.get(unit.strip().casefold()) for unit in (there, here))
    if before is None or after is None or before.quantity != after.quantity:
        return None
    return before.factor / after.factor if before.offset == after.offset else None


def conversion_problem(there: str, here: str, scale: float, offset: float) -> str:
    """What is wrong with reading a value in unit `there` as `value * scale + offset` in unit `here`.

    Returns:
        "" if nothing is, or if one of the units is not known.
    """
    before, after = (_BY_SPELLING.get(unit.strip().casefold()) for unit in (there, here))
    if before is None or after is None:
        return ""
    if before.quantity != after.quantity:
        # A scale may lead from one quantity to another: a position that is sent as a voltage.
        return f"that is no {after.quantity} in {here!r}" if (scale, offset) == (1, 0) else ""
    right = before.factor / after.factor
    shift = (before.offset - after.offset) / after.factor
    if abs(scale - right) <= _NEAR * right and abs(offset - shift) <= _NEAR * max(1.0, abs(shift)):
        return ""
    return f"{here!r} needs scale = {right:.9g} and offset = {shift:.9g}, found {scale:.9g} and {offset:.9g}"
