"""A feature file at each of its limits: what is just allowed, and what is just not."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest

from agent.errors import LimitError, MalformedError
from agent.model import ActuatorKind, FeatureSpec
from agent.trust import catalogue
from agent.trust.catalogue import parse_feature

U16, U32 = 65_535, 4_294_967_295
CAN_ID = 2**29 - 1
SIGNALS = [f"Vehicle.S{i}" for i in range(33)]
BASE = """
[feature]
id = "seat-heating"
release = 1
title = "Seat heating"
enforcement = "ecu-token"
loss_in_motion = "harmless"
safety_relevant = false
withdrawn = false
[ecu]
identifier = "seat-module"
hardware_id = "openfod-seat-1"
bus = "body"
request_id = 0x7A0
response_id = 0x7A8
[actuator]
kind = "token"
feature_number = 1
session = 3
activate = "31 01 0F 0D"
release = "31 01 0F 0E 00 01"
[read_back]
did = 0x0F21
mask = "FF 00"
active = "01 00"
interval_s = 10
[conditions.activate]
when = "Vehicle.Speed < 5.0"
inputs = ["Vehicle.Speed"]
[conditions.release]
when = "true"
inputs = []
[hold]
max_s = 60
[[meters]]
id = "active-time"
kind = "duration"
"""
HEAD_UNIT = {
    "feature.enforcement": "detect-only",
    "actuator.kind": "none",
    **dict.fromkeys(
        (
            "actuator.feature_number",
            "actuator.session",
            "actuator.activate",
            "actuator.release",
            "ecu.bus",
            "ecu.request_id",
            "ecu.response_id",
            "read_back",
        )
    ),
}


def feature(**changes: object) -> FeatureSpec:
    """Reads the file with changes by dotted name, written with "__"; None leaves a key out."""
    document = tomllib.loads(BASE)
    for name, value in changes.items():
        *tables, key = name.replace("__", ".").split(".")
        table: Any = document
        for part in tables:
            table = table[part]
        if value is None:
            del table[key]
        else:
            table[key] = value
    return parse_feature(written(document).encode())


def written(document: dict[str, object]) -> str:
    return "\n".join(f"{key} = {literal(value)}" for key, value in document.items())


def literal(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(inner) for inner in value) + "]"
    return json.dumps(value)


def meters(count: int, **fields: object) -> list[dict[str, object]]:
    return [{"id": f"m{i}", "kind": "duration", **fields} for i in range(count)]


def dimensions(count: int, values: int = 1) -> list[dict[str, object]]:
    value = [{"value": f"v{i}", "when": "true", "inputs": []} for i in range(values)]
    return [{"name": f"d{i}", "values": value} for i in range(count)]


ALLOWED: list[tuple[str, object]] = [
    ("feature__id", "ab"),
    ("feature__id", "a" * 48),
    ("feature__release", 1),
    ("feature__release", U32),
    ("feature__title", "x"),
    ("feature__title", "x" * 128),
    ("feature__enforcement", "detect-only"),
    ("feature__loss_in_motion", "unknown"),
    ("feature__withdrawn", True),
    ("ecu__identifier", "A"),
    ("ecu__identifier", "A" * 64),
    ("ecu__request_id", 0),
    ("ecu__response_id", 0),
    ("ecu__request_id", 0x7FF),
    ("ecu__response_id", 0x7FF),
    ("actuator__feature_number", 1),
    ("actuator__feature_number", U16),
    ("actuator__session", 1),
    ("actuator__session", 0x7F),
    ("actuator__activate", "2E 0F 21"),
    ("actuator__activate", "31" + "00" * 63),
    ("actuator__release", "31"),
    ("read_back__did", 0),
    ("read_back__did", 0xFFFF),
    ("read_back__interval_s", 1),
    ("read_back__interval_s", 3_600),
    ("read_back__counter_offset", 0),
    ("read_back__counter_offset", 64),
    ("read_back__active", "FF 00"),
    ("read_back__active", "00 00"),
    ("conditions__activate__when", "x"),
    ("conditions__activate__when", "x" * 1_024),
    ("conditions__activate__inputs", SIGNALS[:32]),
    ("conditions__activate__inputs", ["V.S"]),
    ("hold__max_s", 1),
    ("hold__max_s", 604_800),
    ("meters", []),
    ("meters", meters(16)),
    ("meters", meters(1, dimensions=dimensions(4))),
    ("meters", meters(1, dimensions=dimensions(1, 16))),
]


@pytest.mark.parametrize(("name", "value"), ALLOWED)
def test_what_is_just_allowed_is_read(name: str, value: object) -> None:
    spec = feature(**{name: value})
    assert spec.feature_id == (value if name == "feature__id" else "seat-heating")
    said: dict[str, object] = {
        "feature__release": spec.release,
        "feature__title": spec.title,
        "feature__withdrawn": spec.withdrawn,
        "feature__enforcement": spec.enforcement,
        "actuator__feature_number": spec.feature_number,
        "actuator__session": spec.session,
        "read_back__interval_s": spec.read_back_interval_s,
        "hold__max_s": spec.hold_max_s,
        "conditions__activate__when": spec.activate_when.expression,
    }
    assert said.get(name, value) == value


REFUSED: list[tuple[str, object, str]] = [
    ("feature__id", "a", "feature.id: expected text of the form"),
    ("feature__id", "a" * 49, "feature.id"),
    ("feature__id", "Seat", "feature.id"),
    ("feature__id", 1, "feature.id"),
    ("feature__id", None, "feature.id"),
    ("feature__release", 0, "feature.release: expected 1 to 4294967295, found 0"),
    ("feature__release", U32 + 1, "feature.release"),
    ("feature__release", True, "feature.release"),
    ("feature__release", "1", "feature.release"),
    ("feature__title", "", "feature.title: expected 1 to 128 printable characters"),
    ("feature__title", "x" * 129, "feature.title"),
    ("feature__title", "x\ty", "feature.title"),
    ("feature__title", 1, "feature.title"),
    ("feature__enforcement", "none", "feature.enforcement: expected detect-only or ecu-token"),
    ("feature__enforcement", 1, "feature.enforcement"),
    ("feature__loss_in_motion", "harmful", "feature.loss_in_motion: expected harmless or unknown"),
    ("feature__safety_relevant", True, "feature.safety_relevant: expected false: .*, found True"),
    ("feature__safety_relevant", 0, "feature.safety_relevant: expected true or false, found 0"),
    ("feature__withdrawn", "no", "feature.withdrawn: expected true or false, found 'no'"),
    ("feature__more", 1, "feature.'more': unknown key"),
    ("more", 1, "'more': unknown key"),
    ("ecu__identifier", "", "ecu.identifier"),
    ("ecu__identifier", "A" * 65, "ecu.identifier"),
    ("ecu__hardware_id", "-x", "ecu.hardware_id"),
    ("ecu__bus", " ", "ecu.bus"),
    ("ecu__request_id", -1, "ecu.request_id: expected 0 to 536870911, found -1"),
    ("ecu__request_id", CAN_ID + 1, "ecu.request_id"),
    ("ecu__response_id", -1, "ecu.response_id: expected 0 to 536870911, found -1"),
    ("ecu__response_id", CAN_ID + 1, "ecu.response_id"),
    ("ecu__response_id", 0x7A0, "ecu.response_id: expected another identifier"),
    ("ecu__response_id", 0x800, "ecu.response_id: expected another identifier"),
    ("ecu__request_id", 0x800, "ecu.response_id: expected another identifier"),
    ("actuator__kind", "relay", "actuator.kind: expected"),
    ("actuator__feature_number", 0, "actuator.feature_number: expected 1 to 65535, found 0"),
    ("actuator__feature_number", U16 + 1, "actuator.feature_number"),
    ("actuator__session", 0, "actuator.session: expected 1 to 127, found 0"),
    ("actuator__session", 0x80, "actuator.session"),
    ("actuator__activate", "31" + "00" * 64, "actuator.activate: expected 1 to 64 bytes in hex"),
    ("actuator__activate", "", "actuator.activate: expected 1 to 64 bytes in hex"),
    ("actuator__activate", "3", "actuator.activate: expected 1 to 64 bytes in hex"),
    ("actuator__activate", 31, "actuator.activate: expected 1 to 64 bytes in hex"),
    ("actuator__activate", "11 01", "actuator.activate: expected a request of service 0x31 or 0x2E"),
    ("actuator__release", "30 01", "actuator.release: expected a request of service"),
    ("actuator__release", "2D 01", "actuator.release: expected a request of service"),
    ("read_back__did", -1, "read_back.did"),
    ("read_back__did", 0x1_0000, "read_back.did: expected 0 to 65535"),
    ("read_back__mask", "FF", "read_back.active: expected 1 bytes within the mask ff"),
    ("read_back__mask", "00 00", "which is not 0"),
    ("read_back__active", "01", "read_back.active: expected 2 bytes"),
    ("read_back__active", "01 01", "read_back.active: expected 2 bytes within the mask ff00"),
    ("read_back__active", "00 01", "read_back.active: expected 2 bytes within the mask ff00"),
    ("read_back__active", "01" * 65, "read_back.active: expected 1 to 64 bytes in hex"),
    ("read_back__interval_s", 0, "read_back.interval_s: expected 1 to 3600, found 0"),
    ("read_back__interval_s", 3_601, "read_back.interval_s"),
    ("read_back__counter_offset", -1, "read_back.counter_offset: expected 0 to 64"),
    ("read_back__counter_offset", 65, "read_back.counter_offset"),
    ("read_back", None, "read_back: expected a table"),
    ("read_back", 1, "read_back: expected a table, found 1"),
    ("conditions__activate__when", "", "conditions.activate.when"),
    ("conditions__activate__when", "x" * 1_025, "conditions.activate.when"),
    ("conditions__activate__inputs", SIGNALS, "conditions.activate.inputs: expected at most 32 VSS names"),
    ("conditions__activate__inputs", ["V.S", "V.S"], "conditions.activate.inputs"),
    ("conditions__activate__inputs", ["Vehicle"], "conditions.activate.inputs"),
    ("conditions__activate__inputs", [1], "conditions.activate.inputs"),
    ("conditions__activate__inputs", "V.S", "conditions.activate.inputs"),
    ("conditions__activate__inputs", None, "conditions.activate.inputs"),
    ("conditions__release__more", 1, "conditions.release.'more': unknown key"),
    ("conditions__more", 1, "conditions.'more': unknown key"),
    ("hold__max_s", 0, "hold.max_s: expected 1 to 604800, found 0"),
    ("hold__max_s", 604_801, "hold.max_s"),
    ("meters", meters(17), "meters: expected at most 16 tables"),
    ("meters", 1, "meters: expected at most 16 tables, found 1"),
    ("meters", [1], "meters: expected at most 16 tables"),
    ("meters", [{"id": "m", "kind": "duration"}] * 2, r"meters\[1\].id: expected each meter once, found 'm'"),
    ("meters", meters(1, kind="weight"), r"meters\[0\].kind"),
    ("meters", meters(1, kind="energy"), r"meters\[0\].counter: expected counter, power or both"),
    ("meters", meters(1, kind="energy", debounce_ms=1), r"meters\[0\].'debounce_ms': unknown key"),
    ("meters", meters(1, kind="energy", power="Vehicle.P", wraps_at=1), r"'wraps_at': unknown key"),
    ("meters", meters(1, kind="energy", counter="Vehicle.E", wraps_at=0), r"wraps_at: expected 1 to"),
    ("meters", meters(1, kind="count"), r"meters\[0\].when: expected the event that is counted"),
    ("meters", meters(1, kind="count", counter="Vehicle.C", debounce_ms=1), r"'debounce_ms': unknown key"),
    ("meters", meters(1, kind="count", when="true", inputs=[], debounce_ms=60_001), r"debounce_ms: expected"),
    ("meters", meters(1, kind="count", counter="Vehicle.C", at_most_per_h=0), r"at_most_per_h: expected"),
    ("meters", meters(1, kind="count", counter="c"), r"meters\[0\].counter: expected text"),
    ("meters", meters(1, more=1), r"meters\[0\].'more': unknown key"),
    ("meters", meters(1, when="true"), r"meters\[0\].inputs"),
    ("meters", meters(1, inputs=[]), r"meters\[0\].when"),
    ("meters", meters(1, odometer="V.O"), r"meters\[0\].'odometer': unknown key"),
    ("meters", meters(1, speed="V.S"), r"meters\[0\].'speed': unknown key"),
    ("meters", meters(1, kind="distance"), r"meters\[0\].odometer: expected text"),
    ("meters", meters(1, dimensions=dimensions(5)), r"meters\[0\].dimensions: expected at most 4 tables"),
    (
        "meters",
        meters(1, dimensions=dimensions(1, 17)),
        r"dimensions\[0\].values: expected at most 16 tables",
    ),
    (
        "meters",
        meters(1, dimensions=dimensions(1, 0)),
        r"dimensions\[0\].values: expected 1 or more, each once",
    ),
    (
        "meters",
        meters(1, dimensions=[dimensions(1)[0] | {"more": 1}]),
        r"dimensions\[0\].'more': unknown key",
    ),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_what_is_just_not_allowed_is_refused_by_its_name(name: str, value: object, words: str) -> None:
    assert feature().kind is ActuatorKind.TOKEN
    with pytest.raises(MalformedError, match=f"feature file [a-z0-9-]*/[0-9]+: .*{words}"):
        feature(**{name: value})


def test_a_mask_of_nothing_reads_nothing_back() -> None:
    with pytest.raises(MalformedError, match="within the mask 0000, which is not 0, found '0000'"):
        feature(read_back__mask="00 00", read_back__active="00 00")


def test_each_value_of_a_dimension_stands_once_and_has_known_keys() -> None:
    twice = dimensions(1)
    twice[0]["values"] = [{"value": "v", "when": "true", "inputs": []}] * 2
    with pytest.raises(MalformedError, match="each once"):
        feature(meters=meters(1, dimensions=twice))
    more = dimensions(1)
    more[0]["values"] = [{"value": "v", "when": "true", "inputs": [], "more": 1}]
    with pytest.raises(MalformedError, match=r"values\[0\]\.'more': unknown key"):
        feature(meters=meters(1, dimensions=more))


def test_a_distance_reads_an_odometer_and_perhaps_a_speed() -> None:
    distance = {"kind": "distance", "odometer": "Vehicle.O"}
    (plain,) = feature(meters=meters(1, **distance)).meters
    assert (plain.odometer, plain.speed, plain.condition) == ("Vehicle.O", None, None)
    (full,) = feature(meters=meters(1, speed="Vehicle.V", when="true", inputs=[], **distance)).meters
    assert (full.odometer, full.speed) == ("Vehicle.O", "Vehicle.V")
    assert full.condition is not None


def test_energy_and_events_are_read_from_a_counter_or_added_up() -> None:
    both = {"counter": "Vehicle.E", "power": "Vehicle.P", "wraps_at": 2**53, "at_most_per_h": 10**12}
    (energy,) = feature(meters=meters(1, kind="energy", **both)).meters
    assert (energy.counter, energy.power, energy.cumulative) == ("Vehicle.E", "Vehicle.P", "Vehicle.E")
    assert (energy.wraps_at, energy.at_most_per_h) == (2**53, 10**12)
    (power,) = feature(meters=meters(1, kind="energy", power="Vehicle.P")).meters
    assert (power.counter, power.power, power.at_most_per_h) == (None, "Vehicle.P", 0)
    (events,) = feature(meters=meters(1, kind="count", when="true", inputs=[], debounce_ms=60_000)).meters
    assert (events.counter, events.debounce_ms) == (None, 60_000)
    (counted,) = feature(meters=meters(1, kind="count", counter="Vehicle.C")).meters
    assert (counted.counter, counted.condition, counted.debounce_ms) == ("Vehicle.C", None, 0)


def test_a_feature_of_the_head_unit_has_no_ecu_and_its_keys_are_unknown() -> None:
    spec = feature(**{name.replace(".", "__"): value for name, value in HEAD_UNIT.items()})
    assert (spec.kind, spec.ecu, spec.read_back) == (ActuatorKind.NONE, None, None)
    assert (spec.activate, spec.release_request) == (b"", b"")
    assert (spec.feature_number, spec.session, spec.read_back_interval_s) == (0, 0, 0)
    for name in ("ecu__request_id", "actuator__session", "read_back"):
        changes = {key.replace(".", "__"): value for key, value in HEAD_UNIT.items()}
        del changes[name]
        with pytest.raises(MalformedError, match="unknown key"):
            feature(**changes)


def test_nothing_but_an_ecu_enforces_tokens() -> None:
    changes = {name.replace(".", "__"): value for name, value in HEAD_UNIT.items()}
    with pytest.raises(MalformedError, match="enforcement: expected detect-only with actuator kind none"):
        feature(**{**changes, "feature__enforcement": "ecu-token"})


def test_the_highest_identifiers_of_29_bits_are_a_pair() -> None:
    assert feature(ecu__request_id=CAN_ID, ecu__response_id=0x800).ecu is not None
    assert feature(ecu__request_id=0x800, ecu__response_id=CAN_ID).ecu is not None


def test_a_file_and_a_line_as_long_as_the_limit_says_are_read_and_no_longer() -> None:
    line = "#" + " " * (catalogue.MAX_LINE_BYTES - 1)
    assert (catalogue.MAX_LINE_BYTES, catalogue.MAX_FEATURE_BYTES) == (2_048, 65_536)
    base = BASE.encode()
    assert parse_feature(base + line.encode()).release == 1
    with pytest.raises(LimitError, match="bytes of a line: 2049"):
        parse_feature(base + line.encode() + b" ")
    filler = b"#\n" * ((65_536 - len(base)) // 2) + b"\n" * ((65_536 - len(base)) % 2)
    assert parse_feature(base + filler).release == 1
    with pytest.raises(LimitError, match="feature file, bytes: 65537"):
        parse_feature(base + filler + b"\n")


def test_no_more_problems_are_named_than_the_limit_says() -> None:
    content = BASE.encode() + b"".join(b"x%d = 1\n" % number for number in range(40))
    with pytest.raises(MalformedError) as caught:
        parse_feature(content)
    assert str(caught.value).count("unknown key") == catalogue.MAX_PROBLEMS == 32
