"""Judges a catalogue source before anyone signs it.

Says everything that is wrong at once, each with file and line. What passes
here is what a vehicle may be told to put on a bus, so the rules are an
allow-list: unknown keys, unknown kinds and unlisted services are refused.
Whatever a vehicle would refuse is refused here: one signed file that it does
not take would stop all its updates (`tests/vectors/catalogue.json`).
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cel

from common import config
from common.config import option
from keys.errors import CatalogueError

MAX_FEATURE_BYTES = 65_536
"""Largest feature file, bytes: the limit of a target on its way to a vehicle."""
MAX_LINE_BYTES = 2_048
"""Longest line of a feature file, bytes."""
MAX_RELEASES = 256
"""Most feature files in one catalogue."""
MAX_METERS = 16
"""Most meters of one feature."""
MAX_DIMENSIONS = 4
"""Most dimensions of one meter."""
MAX_VALUES = 8
"""Most values of one dimension."""
MAX_INPUTS = 16
"""Most signals that one condition reads."""
MAX_EXPRESSION = 512
"""Longest condition, characters."""
MAX_DEPTH = 16
"""Deepest nesting of brackets in a condition."""
MAX_STANDARD_ID = 0x7FF
"""Highest CAN identifier of 11 bits; a higher one has 29 (ISO 11898-1:2015)."""
MAX_COUNTER_OFFSET = 64
"""Where a token's counter may begin in a read-back, bytes."""
PROGRAMMING_SESSION = 0x02
"""ISO 14229-1:2020: the session for flashing, which no feature may ask for."""
MAX_REQUEST_BYTES = 64
"""Longest UDS request that a feature file may hold."""
MAX_READING_INTERVAL_S = 86_400
"""Longest period of an ECU's signed reading, seconds."""
MAX_HOLD_S = 86_400
"""Longest time for which an ended right may be held, seconds."""

HEAD_UNIT = "head-unit"
"""ECU identifier of features that live on the agent itself: no ECU verifies their tokens."""
IDENTIFIER = r"[a-z][a-z0-9-]{1,47}"
_HEX = re.compile(r"[0-9A-F]{2}( [0-9A-F]{2})*")
_VSS_NAME = re.compile(r"Vehicle(\.[A-Z][A-Za-z0-9]*){1,15}")

# The part of CEL (cel.dev) that a vehicle evaluates, token by token.
_CEL_TOKEN = re.compile(
    r"""(?P<name>[A-Za-z_][A-Za-z0-9_.]*)(?P<call>(?=\x20*\())?
      | "[^"'\\]*" | '[^"'\\]*'
      | [0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?
      | == | != | <= | >= | && | \|\| | [-+*/%<>!?:,]
      | (?P<open>[(\[]) | (?P<close>[)\]])
      | \x20+""",
    re.VERBOSE,
)
_CEL_WORDS = frozenset({"true", "false", "in"})
_CEL_FUNCTIONS = frozenset({"double", "int", "size", "string"})
_CEL_METHODS = frozenset({"contains", "endsWith", "startsWith"})

Problems = Iterator[tuple[str, str]]


class ActuatorKind(enum.Enum):
    """How a feature is switched."""

    TOKEN = "token"  # noqa: S105 (a kind of actuator, not a password)
    NONE = "none"


class MeterKind(enum.Enum):
    """What a meter measures."""

    DURATION = "duration"
    DISTANCE = "distance"
    ENERGY = "energy"
    COUNT = "count"


@dataclass(frozen=True)
class Feature:
    """Table [feature]."""

    id: str = option(pattern=IDENTIFIER)
    release: int = option(minimum=1, maximum=4_294_967_295)
    title: str = option(pattern=r".{1,100}")
    enforcement: str = option(choices=("ecu-token", "detect-only"))
    loss_in_motion: str = option(choices=("harmless", "unknown"))
    safety_relevant: bool = option()
    withdrawn: bool = option()
    by_use: bool = option(default=False)

    def problems(self) -> Problems:
        """A feature that a person's safety or the type approval depends on is never on demand."""
        if self.safety_relevant:
            yield "safety_relevant", "features relevant to safety or type approval are refused"
        if not self.title.isprintable():
            yield "title", "has a character that cannot be printed"


@dataclass(frozen=True)
class Ecu:
    """Table [ecu]; bus and identifiers are absent if nothing is put on a bus."""

    identifier: str = option(pattern=IDENTIFIER)
    hardware_id: str = option(pattern=IDENTIFIER)
    bus: str | None = option(default=None, pattern=r"[a-z][a-z0-9_-]{0,31}")
    request_id: int | None = option(default=None, minimum=0, maximum=0x1FFFFFFF)
    response_id: int | None = option(default=None, minimum=0, maximum=0x1FFFFFFF)

    def problems(self) -> Problems:
        """ISO 15765-2 needs two different identifiers; both have 11 bits, or both 29."""
        if self.request_id is None or self.response_id is None:
            return
        if self.request_id == self.response_id:
            yield "response_id", f"expected another identifier than request_id 0x{self.request_id:X}"
        elif (self.request_id > MAX_STANDARD_ID) != (self.response_id > MAX_STANDARD_ID):
            yield (
                "response_id",
                f"expected 11 or 29 bits as request_id 0x{self.request_id:X}, found 0x{self.response_id:X}",
            )


@dataclass(frozen=True)
class Actuator:
    """Table [actuator]."""

    kind: ActuatorKind
    feature_number: int | None = option(default=None, minimum=1, maximum=65_535)
    session: int | None = option(default=None, minimum=1, maximum=0x7F)
    activate: str | None = None
    release: str | None = None

    def problems(self) -> Problems:
        """Only the listed ISO 14229-1 services may be asked for; kind "none" asks for nothing."""
        given = {n: getattr(self, n) for n in ("feature_number", "session", "activate", "release")}
        if self.kind is ActuatorKind.NONE:
            for name, value in given.items():
                if value is not None:
                    yield name, 'kind "none" puts nothing on a bus; remove it'
            return
        for name, value in given.items():
            if value is None:
                yield name, f'missing; kind "{self.kind.value}" needs it'
        if self.session == PROGRAMMING_SESSION:
            yield "session", "the programming session is for flashing; no feature may ask for it"
        if self.activate is not None:
            yield from (("activate", what) for what in _activate_problems(self.activate))
        if self.release is not None:
            yield from (("release", what) for what in _release_problems(self.release))


@dataclass(frozen=True)
class ReadBack:
    """Table [read_back]."""

    did: int = option(minimum=0, maximum=0xFFFF)
    mask: str = option()
    active: str = option()
    interval_s: int = option(minimum=1, maximum=3600)
    counter_offset: int | None = option(default=None, minimum=0, maximum=MAX_COUNTER_OFFSET)

    def problems(self) -> Problems:
        """`active` must be reachable under `mask`, and the mask must look at something."""
        for name in ("mask", "active"):
            for what in _hex_problems(getattr(self, name)):
                yield name, what
                return
        mask, active = bytes.fromhex(self.mask), bytes.fromhex(self.active)
        if len(mask) != len(active):
            yield "active", f"expected {len(mask)} bytes as in mask, found {len(active)}"
        elif not any(mask):
            yield "mask", "looks at no bit, so every answer would count as active"
        elif any(a & ~m for a, m in zip(active, mask, strict=True)):
            yield "active", "has bits outside mask, so no answer could count as active"


@dataclass(frozen=True)
class Reading:
    """Table [reading]: where the ECU signs what it counts (docs/reading.md)."""

    did: int = option(minimum=0, maximum=0xFFFF)
    interval_s: int = option(minimum=1, maximum=MAX_READING_INTERVAL_S)
    meter: str = option(pattern=IDENTIFIER)


@dataclass(frozen=True)
class Condition:
    """An expression over signals, and the signals that it reads."""

    when: str
    inputs: tuple[str, ...]

    def problems(self) -> Problems:
        """Expression and inputs must name the same signals."""
        yield from _condition_problems(self.when, self.inputs)


@dataclass(frozen=True)
class Conditions:
    """Table [conditions]."""

    activate: Condition
    release: Condition


@dataclass(frozen=True)
class Hold:
    """Table [hold]."""

    max_s: int = option(minimum=1, maximum=MAX_HOLD_S)


@dataclass(frozen=True)
class Value:
    """One value of a dimension, and when it applies."""

    value: str = option(pattern=IDENTIFIER)
    when: str = option()
    inputs: tuple[str, ...] = option()

    def problems(self) -> Problems:
        """As for a condition."""
        yield from _condition_problems(self.when, self.inputs)


@dataclass(frozen=True)
class Dimension:
    """Table [[meters.dimensions]]."""

    name: str = option(pattern=IDENTIFIER)
    values: tuple[Value, ...] = option()

    def problems(self) -> Problems:
        """1 to MAX_VALUES different values."""
        yield from _count_problems("values", [v.value for v in self.values], 1, MAX_VALUES)


_COUNTED = frozenset({MeterKind.ENERGY, MeterKind.COUNT})
_KINDS_WITH = {
    "odometer": frozenset({MeterKind.DISTANCE}),
    "speed": frozenset({MeterKind.DISTANCE}),
    "counter": _COUNTED,
    "power": frozenset({MeterKind.ENERGY}),
    "wraps_at": _COUNTED,
    "debounce_ms": frozenset({MeterKind.COUNT}),
    "at_most_per_h": _COUNTED | {MeterKind.DISTANCE},
}
"""By key of [[meters]]: the kinds of meter that have it."""


@dataclass(frozen=True)
class Meter:
    """Table [[meters]]."""

    id: str = option(pattern=IDENTIFIER)
    kind: MeterKind = option()
    odometer: str | None = None
    speed: str | None = None
    counter: str | None = None
    power: str | None = None
    wraps_at: int | None = option(default=None, minimum=1, maximum=2**53)
    debounce_ms: int | None = option(default=None, minimum=1, maximum=60_000)
    at_most_per_h: int | None = option(default=None, minimum=1, maximum=1_000_000_000_000)
    when: str | None = None
    inputs: tuple[str, ...] | None = None
    dimensions: tuple[Dimension, ...] = ()

    def problems(self) -> Problems:
        """Each kind needs its signals and has no others; a condition needs its inputs."""
        has = {name: getattr(self, name) is not None for name in _KINDS_WITH}
        for name, kinds in _KINDS_WITH.items():
            if has[name] and self.kind not in kinds:
                yield name, f"only a meter of kind {' or '.join(sorted(k.value for k in kinds))} has it"
        for name in ("odometer", "speed"):
            if self.kind is MeterKind.DISTANCE and not has[name]:
                yield name, "missing; a distance meter needs it"
        if self.kind is MeterKind.ENERGY and not (has["counter"] or has["power"]):
            yield "counter", "missing; an energy meter needs counter, power or both"
        if self.kind is MeterKind.COUNT and not has["counter"] and self.when is None:
            yield "when", "missing; it is the event that is counted, unless a counter is named"
        if has["wraps_at"] and not has["counter"]:
            yield "wraps_at", "only a counter begins anew"
        if has["debounce_ms"] and has["counter"]:
            yield "debounce_ms", "a counter has no edges"
        if has["at_most_per_h"] and self.kind is MeterKind.COUNT and not has["counter"]:
            yield "at_most_per_h", "events are bounded by debounce_ms"
        for name in ("odometer", "speed", "counter", "power"):
            value = getattr(self, name)
            if value is not None and not _VSS_NAME.fullmatch(value):
                yield name, f"expected a VSS name, found {value!r}"
        if (self.when is None) != (self.inputs is None):
            yield "when", "when and inputs are given together or not at all"
        elif self.when is not None and self.inputs is not None:
            yield from _condition_problems(self.when, self.inputs)
        yield from _count_problems("dimensions", [d.name for d in self.dimensions], 0, MAX_DIMENSIONS)


@dataclass(frozen=True)
class FeatureFile:
    """One release of one feature."""

    feature: Feature
    ecu: Ecu
    actuator: Actuator
    conditions: Conditions
    hold: Hold
    read_back: ReadBack | None = None
    reading: Reading | None = None
    meters: tuple[Meter, ...] = ()

    def problems(self) -> Problems:
        """What the tables must say together."""
        token = self.actuator.kind is ActuatorKind.TOKEN
        if self.feature.enforcement == "ecu-token" and not token:
            yield "actuator.kind", 'enforcement "ecu-token" needs kind "token"'
        if token is (self.ecu.identifier == HEAD_UNIT):
            yield "ecu.identifier", f'kind "none" belongs to {HEAD_UNIT}, and nothing else does'
        for name in ("bus", "request_id", "response_id"):
            given = getattr(self.ecu, name) is not None
            if token and not given:
                yield f"ecu.{name}", f'missing; kind "{self.actuator.kind.value}" needs it'
            elif given and not token:
                yield f"ecu.{name}", 'kind "none" puts nothing on a bus; remove it'
        if token and self.read_back is None:
            yield "read_back", f'missing; kind "{self.actuator.kind.value}" needs it'
        elif self.read_back is not None and not token:
            yield "read_back", 'kind "none" has nothing to read back; remove it'
        if self.reading is not None:
            yield from self._reading_problems(self.reading, token=token)
        yield from _count_problems("meters", [m.id for m in self.meters], 0, MAX_METERS)
        yield from self._count_by_whom()

    def _count_by_whom(self) -> Problems:
        """Whoever has root on the head unit uses without being counted, unless the ECU counts by itself."""
        if not self.feature.by_use or self.feature.enforcement == "detect-only":
            return
        if self.reading is None:
            what = "pay-per-use and prepaid renew only against a count that the ECU itself signs"
            yield (
                "feature.by_use",
                f'{what}, and there is no [reading]; say enforcement "detect-only" if no ECU counts',
            )

    def _reading_problems(self, reading: Reading, *, token: bool) -> Problems:
        """What the ECU counts must be metered as well: the cloud compares the two."""
        if not token:
            yield "reading", 'kind "none" has no ECU that could sign; remove it'
        if self.read_back is not None and reading.did == self.read_back.did:
            yield "reading.did", f"expected another one than the read-back's 0x{reading.did:04X}"
        if reading.meter not in {meter.id for meter in self.meters if meter.kind is MeterKind.DURATION}:
            yield "reading.meter", f"expected a duration meter of this feature, found {reading.meter!r}"


@dataclass(frozen=True)
class Release:
    """A feature file that passed.

    Args:
        path: its path in the repository, "features/<id>/<release>.toml".
        content: the bytes as read, which are what is signed.
    """

    path: str
    content: bytes
    file: FeatureFile


def lint(source: Path) -> tuple[Release, ...]:
    """Reads and judges every feature file below `source`/features.

    Returns:
        the releases, by path.

    Raises:
        CatalogueError: for all problems of all files together.
    """
    problems: list[str] = []
    releases: list[Release] = []
    found = sorted(p for p in (source / "features").rglob("*") if not p.is_dir())
    if not found:
        raise CatalogueError([f"{source / 'features'}: no feature file; a catalogue has at least one"])
    if len(found) > MAX_RELEASES:
        raise CatalogueError([f"{source}: {len(found)} files are more than the limit of {MAX_RELEASES}"])
    for path in found:
        try:
            releases.append(_release(source, path))
        except (CatalogueError, config.ConfigError) as error:
            problems.extend(error.problems)
    problems.extend(_shared_numbers(source, releases))
    problems.extend(_changed_meanings(source, releases))
    if problems:
        raise CatalogueError(problems)
    return tuple(releases)


def _release(source: Path, path: Path) -> Release:
    relative = path.relative_to(source).as_posix()
    match = re.fullmatch(rf"features/({IDENTIFIER})/([1-9][0-9]{{0,9}})\.toml", relative)
    if match is None or path.is_symlink():
        raise CatalogueError([f"{path}: expected a plain file features/<id>/<release>.toml"])
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CatalogueError([f"{path}: cannot be read: {error.strerror}"]) from error
    if len(content) > MAX_FEATURE_BYTES:
        raise CatalogueError([f"{path}: {len(content)} bytes are more than the limit of {MAX_FEATURE_BYTES}"])
    for number, line in enumerate(content.split(b"\n"), 1):
        if len(line) > MAX_LINE_BYTES:
            raise CatalogueError(
                [f"{path}:{number}: {len(line)} bytes are more than a line's limit of {MAX_LINE_BYTES}"]
            )
    file = config.parse(content, path, FeatureFile)
    problems = []
    if file.feature.id != match.group(1):
        problems.append(
            f"{path}: feature.id: expected {match.group(1)!r} as in the path, found {file.feature.id!r}"
        )
    if file.feature.release != int(match.group(2)):
        problems.append(
            f"{path}: feature.release: expected {match.group(2)} as in the path, found {file.feature.release}"
        )
    if problems:
        raise CatalogueError(problems)
    return Release(relative, content, file)


def _shared_numbers(source: Path, releases: Sequence[Release]) -> Iterator[str]:
    """A token names its feature by number alone, so a number belongs to one feature of a hardware."""
    owners: dict[tuple[str, int], str] = {}
    for release in releases:
        number = release.file.actuator.feature_number
        if number is None:
            continue
        owner = owners.setdefault((release.file.ecu.hardware_id, number), release.file.feature.id)
        if owner != release.file.feature.id:
            yield (
                f"{source / release.path}: actuator.feature_number: {number} of hardware "
                f"{release.file.ecu.hardware_id} belongs to feature {owner}"
            )


def _changed_meanings(source: Path, releases: Sequence[Release]) -> Iterator[str]:
    """What rights, tokens and usage refer to by name never changes its meaning from release to release.

    A token that denies must reach the ECU and the number of the one that
    allowed, so a feature stays in one ECU (of whatever hardware) and has one
    number for each hardware. A meter that is priced goes on, in the same unit.
    """
    ordered = sorted(releases, key=lambda r: (r.file.feature.id, r.file.feature.release))
    for older, newer in itertools.pairwise(ordered):
        if older.file.feature.id != newer.file.feature.id:
            continue
        where = source / newer.path
        before = {meter.id: meter.kind for meter in older.file.meters}
        after = {meter.id: meter.kind for meter in newer.file.meters}
        for meter_id, kind in before.items():
            if after.get(meter_id) is not kind:
                now = after[meter_id].value if meter_id in after else "none"
                yield (
                    f"{where}: meters: expected {meter_id} of kind {kind.value} as in release "
                    f"{older.file.feature.release}, found {now}; make a new feature id"
                )
    first: dict[tuple[str, ...], tuple[Release, object]] = {}
    for release in ordered:
        feature, ecu, actuator = release.file.feature, release.file.ecu, release.file.actuator
        for key, found, owned_by in (
            ("ecu.identifier", ecu.identifier, (feature.id,)),
            ("actuator.kind", actuator.kind.value, (feature.id,)),
            ("actuator.feature_number", actuator.feature_number, (feature.id, ecu.hardware_id)),
        ):
            owner, expected = first.setdefault((key, *owned_by), (release, found))
            if found != expected:
                yield (
                    f"{source / release.path}: {key}: expected {expected} as in release "
                    f"{owner.file.feature.release}, found {found}; make a new feature id"
                )


def _hex_problems(text: str) -> Iterator[str]:
    if not _HEX.fullmatch(text):
        yield f'expected bytes as in "31 01 0F 0D", found {text!r}'
    elif len(bytes.fromhex(text)) > MAX_REQUEST_BYTES:
        yield f"{len(bytes.fromhex(text))} bytes are more than the limit of {MAX_REQUEST_BYTES}"


def _activate_problems(text: str) -> Iterator[str]:
    """RoutineControl start of one routine, or WriteDataByIdentifier of one DID; the token follows."""
    yield from (problems := list(_hex_problems(text)))
    if problems:
        return
    request = bytes.fromhex(text)
    is_start = request[:2] == b"\x31\x01" and len(request) == len(b"\x31\x01\x00\x00")
    is_write = request[:1] == b"\x2e" and len(request) == len(b"\x2e\x00\x00")
    if not (is_start or is_write):
        yield f"expected 31 01 and a routine, or 2E and a data identifier; found {text}"


def _release_problems(text: str) -> Iterator[str]:
    """RoutineControl start or stop of one routine, with its parameters."""
    yield from (problems := list(_hex_problems(text)))
    if problems:
        return
    request = bytes.fromhex(text)
    if request[:2] not in (b"\x31\x01", b"\x31\x02") or len(request) < len(b"\x31\x01\x00\x00"):
        yield f"expected 31 01 or 31 02 and a routine; found {text}"


def _condition_problems(when: str, inputs: Sequence[str]) -> Problems:
    if not when.strip():
        yield "when", 'empty; write "true" for a condition that always holds'
    elif len(when) > MAX_EXPRESSION:
        yield "when", f"{len(when)} characters are more than the limit of {MAX_EXPRESSION}"
    elif not when.isprintable():
        yield "when", "has a character that cannot be printed, such as a line break"
    else:
        try:
            cel.compile(when)
        except ValueError as error:
            reason = str(error).partition("ERROR: ")[2].partition("\n")[0]
            yield "when", f"not CEL: {reason}"
    yield from _count_problems("inputs", list(inputs), 0, MAX_INPUTS)
    for name in inputs:
        if not _VSS_NAME.fullmatch(name):
            yield "inputs", f"expected a VSS name, found {name!r}"
    named, problems = _read_names(when)
    yield from (("when", what) for what in problems)
    for name in sorted(named - set(inputs)):
        yield "inputs", f"{name} is read by the expression and not listed"
    if not problems:
        for name in sorted(set(inputs) - named):
            yield "inputs", f"{name} is listed and not read by the expression"


def _read_names(when: str) -> tuple[set[str], list[str]]:
    """The signals that an expression reads, and where it leaves the part of CEL that vehicles evaluate."""
    named: set[str] = set()
    position = depth = 0
    while position < len(when):
        token = _CEL_TOKEN.match(when, position)
        if token is None:
            return named, [f"not in the language of conditions at character {position + 1}"]
        position = token.end()
        depth += (token["open"] is not None) - (token["close"] is not None)
        if depth > MAX_DEPTH:
            return named, [f"nested deeper than the limit of {MAX_DEPTH}"]
        name = token["name"]
        if name is None or name == "in":
            continue
        if token["call"] is None:
            named |= {name} - _CEL_WORDS
        elif name not in _CEL_FUNCTIONS:
            owner, _, method = name.rpartition(".")
            if method not in _CEL_METHODS or not owner:
                return named, [f"no function {name} in the language of conditions"]
            named.add(owner)
    return named, []


def _count_problems(key: str, names: Sequence[str], least: int, most: int) -> Problems:
    if not least <= len(names) <= most:
        yield key, f"expected {least} to {most} entries, found {len(names)}"
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield key, f"{name} occurs more than once"
