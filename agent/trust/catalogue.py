"""Reads a feature's description, the TOML file that the catalogue signs.

Strict: an unknown key is refused, because a key that this agent does not know
may be a limit that it would not keep. All problems come in one error.
Conditions are only bounded here; `agent.features.conditions` compiles them.
Does no I/O. Raises only TrustError.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import tomli

from agent.errors import MalformedError
from agent.model import (
    ActuatorKind,
    ConditionSpec,
    DimensionSpec,
    EcuSpec,
    FeatureSpec,
    MeterKind,
    MeterSpec,
    ReadBackSpec,
    ReadingSpec,
    WhenDead,
)
from agent.wire import FEATURE_ID, bounded, shown

MAX_FEATURE_BYTES = 65_536
MAX_LINE_BYTES = 2_048
MAX_PROBLEMS = 32  # named in one error
MAX_TITLE_CHARS = 128
MAX_EXPRESSION_CHARS = 1_024
MAX_INPUTS = 32
MAX_METERS = 16
MAX_DIMENSIONS = 4
MAX_DIMENSION_VALUES = 16
MAX_REQUEST_BYTES = 64
MAX_READ_BACK_BYTES = 64
MAX_HOLD_S = 604_800  # a week
MAX_READ_BACK_INTERVAL_S = 3_600
MAX_READING_INTERVAL_S = 86_400
MAX_RELEASE = 2**32 - 1
MAX_FEATURE_NUMBER = 2**16 - 1
MAX_STANDARD_ID = 0x7FF
MAX_CAN_ID = 2**29 - 1
MAX_DID = 0xFFFF
MAX_SESSION = 0x7F
MAX_READING = 2**53
MAX_DEBOUNCE_MS = 60_000
MAX_PER_H = 10**12

# Services with which a catalogue may switch: RoutineControl and
# WriteDataByIdentifier (ISO 14229-1:2020). Never a reset, never programming.
SWITCHING_SERVICES = (0x31, 0x2E)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SIGNAL = re.compile(r"[A-Z][A-Za-z0-9]*(\.[A-Z][A-Za-z0-9]*){1,15}")  # VSS
_HEX = re.compile(r"[0-9A-Fa-f]{2}( ?[0-9A-Fa-f]{2})*")
_NEVER = ConditionSpec("false", ())  # stands in for a condition that was refused


def parse_feature(content: bytes) -> FeatureSpec:
    """Read one release of one feature.

    Args:
        content: the verified bytes of `features/<id>/<release>.toml`.

    Raises:
        LimitError: the file or one of its lines is too long.
        MalformedError: not TOML, or all the problems of its content.
    """
    bounded("feature file, bytes", limit=MAX_FEATURE_BYTES, found=len(content))
    for line in content.split(b"\n"):
        bounded("feature file, bytes of a line", limit=MAX_LINE_BYTES, found=len(line))
    try:
        document = tomli.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad TOML, arrays nested without end
        raise MalformedError(f"feature file: not TOML: {shown(str(error))}") from error
    problems: list[str] = []
    spec = _feature(_Table("", document, problems), hashlib.sha256(content).hexdigest())
    if problems:
        raise MalformedError(
            f"feature file {spec.feature_id}/{spec.release}: " + "; ".join(problems[:MAX_PROBLEMS])
        )
    return spec


class _Table:
    """A table whose keys are taken one by one; what was not taken at the end is unknown.

    A problem is noted, and a harmless value of the right type is returned, so
    that all problems of a file come at once.
    """

    def __init__(self, name: str, values: Mapping[str, object], problems: list[str]) -> None:
        self._name = name
        self._values = dict(values)
        self._problems = problems

    def has(self, key: str) -> bool:
        return key in self._values

    def note(self, key: str, expected: str, found: object) -> None:
        self._problems.append(f"{self._name}{key}: expected {expected}, found {shown(found)}")

    def close(self) -> None:
        for key in self._values:
            self._problems.append(f"{self._name}{shown(key)}: unknown key")

    def text(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self._values.pop(key, None)
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        self.note(key, f"text of the form {pattern.pattern}", value)
        return ""

    def words(self, key: str, limit: int) -> str:
        value = self._values.pop(key, None)
        if isinstance(value, str) and 1 <= len(value) <= limit and value.isprintable():
            return value
        self.note(key, f"1 to {limit} printable characters", value)
        return ""

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self._values.pop(key, None)
        if isinstance(value, str) and value in choices:
            return value
        self.note(key, " or ".join(choices), value)
        return choices[0]

    def flag(self, key: str) -> bool:
        value = self._values.pop(key, None)
        if isinstance(value, bool):
            return value
        self.note(key, "true or false", value)
        return False

    def number(self, key: str, lowest: int, highest: int) -> int:
        value = self._values.pop(key, None)
        if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
            return value
        self.note(key, f"{lowest} to {highest}", value)
        return lowest

    def octets(self, key: str, limit: int) -> bytes:
        value = self._values.pop(key, None)
        if isinstance(value, str) and _HEX.fullmatch(value):
            octets = bytes.fromhex(value)
            if len(octets) <= limit:
                return octets
        self.note(key, f"1 to {limit} bytes in hex", value)
        return b"\x00"

    def table(self, key: str) -> _Table:
        value = self._values.pop(key, None)
        if not isinstance(value, dict):
            self.note(key, "a table", value)
            value = {}
        return _Table(f"{self._name}{key}.", value, self._problems)

    def tables(self, key: str, limit: int) -> list[_Table]:
        value = self._values.pop(key, [])
        if not isinstance(value, list) or len(value) > limit or not all(isinstance(v, dict) for v in value):
            self.note(key, f"at most {limit} tables", value)
            return []
        return [_Table(f"{self._name}{key}[{i}].", v, self._problems) for i, v in enumerate(value)]

    def condition(self) -> ConditionSpec:
        expression = self.words("when", MAX_EXPRESSION_CHARS)
        inputs = self._values.pop("inputs", None)
        if (
            isinstance(inputs, list)
            and len(inputs) <= MAX_INPUTS
            and all(isinstance(name, str) and _SIGNAL.fullmatch(name) for name in inputs)
            and len(set(inputs)) == len(inputs)
        ):
            return ConditionSpec(expression, tuple(inputs))
        self.note("inputs", f"at most {MAX_INPUTS} VSS names, each once", inputs)
        return _NEVER


def _feature(document: _Table, sha256: str) -> FeatureSpec:
    feature = document.table("feature")
    feature_id = feature.text("id", FEATURE_ID)
    release = feature.number("release", 1, MAX_RELEASE)
    title = feature.words("title", MAX_TITLE_CHARS)
    enforcement = feature.choice("enforcement", ("detect-only", "ecu-token"))
    feature.choice("loss_in_motion", ("harmless", "unknown"))
    if feature.flag("safety_relevant"):
        feature.note("safety_relevant", "false: such features are not licensed", found=True)
    withdrawn = feature.flag("withdrawn")
    by_use = feature.flag("by_use") if feature.has("by_use") else False

    actuator = document.table("actuator")
    kind = ActuatorKind(actuator.choice("kind", [kind.value for kind in ActuatorKind]))
    is_token = kind is ActuatorKind.TOKEN
    if enforcement == "ecu-token" and not is_token:
        feature.note("enforcement", f"detect-only with actuator kind {kind.value}", enforcement)

    if by_use and enforcement == "ecu-token" and not document.has("reading"):
        feature.note("enforcement", "detect-only with by_use and no [reading]", enforcement)

    conditions = document.table("conditions")
    activate, release_when = conditions.table("activate"), conditions.table("release")
    hold = document.table("hold")
    journal = document.table("journal") if document.has("journal") else None
    ecu = document.table("ecu")
    read_back = document.table("read_back") if is_token else None
    reading = document.table("reading") if is_token and document.has("reading") else None
    meters = _meters(document)
    spec = FeatureSpec(
        feature_id=feature_id,
        release=release,
        title=title,
        enforcement=enforcement,
        withdrawn=withdrawn,
        kind=kind,
        ecu=_ecu(ecu, is_token=is_token),
        feature_number=actuator.number("feature_number", 1, MAX_FEATURE_NUMBER) if is_token else 0,
        session=actuator.number("session", 1, MAX_SESSION) if is_token else 0,
        activate=_request(actuator, "activate") if is_token else b"",
        release_request=_request(actuator, "release") if is_token else b"",
        read_back_interval_s=read_back.number("interval_s", 1, MAX_READ_BACK_INTERVAL_S) if read_back else 0,
        read_back=_read_back(read_back) if read_back else None,
        activate_when=activate.condition(),
        release_when=release_when.condition(),
        hold_max_s=hold.number("max_s", 1, MAX_HOLD_S),
        meters=meters,
        sha256=sha256,
        by_use=by_use or enforcement == "detect-only",
        reading=_reading(reading, meters) if reading else None,
        when_dead=(
            WhenDead(journal.choice("when_dead", [choice.value for choice in WhenDead]))
            if journal
            else WhenDead.HOLD
        ),
    )
    tables = (journal, feature, actuator, activate, release_when, conditions, hold, ecu, read_back, reading)
    for table in (*tables, document):
        if table:
            table.close()
    return spec


def _ecu(table: _Table, *, is_token: bool) -> EcuSpec | None:
    """Read where the ECU is reached; None for a feature that writes to no bus."""
    identifier = table.text("identifier", _NAME)
    hardware_id = table.text("hardware_id", _NAME)
    if not is_token:
        return None
    request_id = table.number("request_id", 0, MAX_CAN_ID)
    response_id = table.number("response_id", 0, MAX_CAN_ID)
    if request_id == response_id or (request_id > MAX_STANDARD_ID) != (response_id > MAX_STANDARD_ID):
        expected = "another identifier than the request's, of the same length (11 or 29 bits)"
        table.note("response_id", expected, f"0x{response_id:X} beside 0x{request_id:X}")
    return EcuSpec(identifier, hardware_id, table.text("bus", _NAME), request_id, response_id)


def _request(actuator: _Table, key: str) -> bytes:
    request = actuator.octets(key, MAX_REQUEST_BYTES)
    if request[0] not in SWITCHING_SERVICES:
        services = " or ".join(f"0x{service:02X}" for service in SWITCHING_SERVICES)
        actuator.note(key, f"a request of service {services}", request.hex(" "))
    return request


def _read_back(table: _Table) -> ReadBackSpec:
    mask = table.octets("mask", MAX_READ_BACK_BYTES)
    active = table.octets("active", MAX_READ_BACK_BYTES)
    outside = any(a & ~m for m, a in zip(mask, active, strict=False))
    if len(mask) != len(active) or outside or not any(mask):
        table.note("active", f"{len(mask)} bytes within the mask {mask.hex()}, which is not 0", active.hex())
    offset = None
    if table.has("counter_offset"):
        offset = table.number("counter_offset", 0, MAX_READ_BACK_BYTES)
    return ReadBackSpec(table.number("did", 0, MAX_DID), mask, active, offset)


def _reading(table: _Table, meters: tuple[MeterSpec, ...]) -> ReadingSpec:
    reading = ReadingSpec(
        table.number("did", 0, MAX_DID),
        table.number("interval_s", 1, MAX_READING_INTERVAL_S),
        table.text("meter", _NAME),
    )
    if (reading.meter_id, MeterKind.DURATION) not in {(meter.meter_id, meter.kind) for meter in meters}:
        table.note("meter", "a duration meter of this feature", reading.meter_id)
    return reading


def _meters(document: _Table) -> tuple[MeterSpec, ...]:
    meters: list[MeterSpec] = []
    for table in document.tables("meters", MAX_METERS):
        meter_id = table.text("id", _NAME)
        if any(meter.meter_id == meter_id for meter in meters):
            table.note("id", "each meter once", meter_id)
        kind = MeterKind(table.choice("kind", [kind.value for kind in MeterKind]))
        condition = table.condition() if table.has("when") or table.has("inputs") else None
        meters.append(_meter(table, meter_id, kind, condition))
        table.close()
    return tuple(meters)


def _meter(table: _Table, meter_id: str, kind: MeterKind, condition: ConditionSpec | None) -> MeterSpec:
    is_distance, is_energy = kind is MeterKind.DISTANCE, kind is MeterKind.ENERGY
    has_counter = kind in {MeterKind.ENERGY, MeterKind.COUNT} and table.has("counter")
    if is_energy and not (has_counter or table.has("power")):
        table.note("counter", "counter, power or both, for a meter of kind energy", None)
    counts_events = kind is MeterKind.COUNT and not has_counter
    if counts_events and condition is None:
        table.note("when", "the event that is counted, or counter", None)

    def signal(key: str, *, wanted: bool) -> str | None:
        return table.text(key, _SIGNAL) if wanted and table.has(key) else None

    def number(key: str, highest: int, *, wanted: bool) -> int:
        return table.number(key, 1, highest) if wanted and table.has(key) else 0

    return MeterSpec(
        meter_id=meter_id,
        kind=kind,
        condition=condition,
        dimensions=_dimensions(table),
        odometer=table.text("odometer", _SIGNAL) if is_distance else None,
        speed=signal("speed", wanted=is_distance),
        counter=signal("counter", wanted=has_counter),
        power=signal("power", wanted=is_energy),
        wraps_at=number("wraps_at", MAX_READING, wanted=has_counter),
        debounce_ms=number("debounce_ms", MAX_DEBOUNCE_MS, wanted=counts_events),
        at_most_per_h=number("at_most_per_h", MAX_PER_H, wanted=is_distance or is_energy or has_counter),
    )


def _dimensions(meter: _Table) -> tuple[DimensionSpec, ...]:
    dimensions = []
    for table in meter.tables("dimensions", MAX_DIMENSIONS):
        name = table.text("name", _NAME)
        values = []
        for value in table.tables("values", MAX_DIMENSION_VALUES):
            values.append((value.text("value", _NAME), value.condition()))
            value.close()
        if not values or len({v for v, _ in values}) != len(values):
            table.note("values", "1 or more, each once", [v for v, _ in values])
        dimensions.append(DimensionSpec(name, tuple(values)))
        table.close()
    return tuple(dimensions)
