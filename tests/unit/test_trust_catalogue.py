"""A feature's description is read strictly, and all its problems are named at once."""

from __future__ import annotations

import hashlib

import pytest
from support.trust_repo import LOGBOOK, SEAT, feature_file

from agent.errors import LimitError, MalformedError
from agent.model import ActuatorKind, ConditionSpec, EcuSpec, MeterKind, ReadBackSpec, WhenDead
from agent.trust.catalogue import parse_feature

SEAT_TOML = feature_file(SEAT).decode()


def test_a_feature_with_a_token_is_read_whole() -> None:
    content = feature_file(SEAT)
    spec = parse_feature(content)
    assert spec.target_path == "features/seat-heating/1.toml"
    assert spec.kind is ActuatorKind.TOKEN
    assert spec.ecu == EcuSpec("seat-module", "openfod-seat-1", "body", 0x744, 0x74C)
    assert spec.activate == bytes.fromhex("31010F0D")
    assert spec.release_request == bytes.fromhex("31010F0E0001")
    assert (spec.feature_number, spec.session, spec.hold_max_s, spec.read_back_interval_s) == (
        1,
        3,
        14_400,
        10,
    )
    assert spec.read_back == ReadBackSpec(0x0F21, b"\xff", b"\x01", 2)
    assert spec.release_when == ConditionSpec("Vehicle.Speed < 1.0", ("Vehicle.Speed",))
    assert [meter.kind for meter in spec.meters] == [MeterKind.DURATION, MeterKind.DISTANCE]
    assert spec.sha256 == hashlib.sha256(content).hexdigest()


def test_what_it_does_on_a_dead_journal_is_the_catalogues_choice() -> None:
    assert parse_feature(SEAT_TOML.encode()).when_dead is WhenDead.HOLD
    for choice in WhenDead:
        text = f'{SEAT_TOML}\n[journal]\nwhen_dead = "{choice.value}"\n'
        assert parse_feature(text.encode()).when_dead is choice
    for wrong in ('when_dead = "bill"', "", 'when_dead = "hold"\nelse = 1'):
        with pytest.raises(MalformedError, match="journal"):
            parse_feature(f"{SEAT_TOML}\n[journal]\n{wrong}\n".encode())


def test_a_feature_of_the_head_unit_writes_to_no_bus() -> None:
    spec = parse_feature(feature_file(LOGBOOK))
    assert (spec.kind, spec.ecu, spec.activate, spec.read_back) == (ActuatorKind.NONE, None, b"", None)
    assert [value for value, _ in spec.meters[1].dimensions[0].values] == ["driving", "parked"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("withdrawn = false", "withdrawn = false\nsurprise = 1", "feature.'surprise': unknown key"),
        ("[hold]", "[surprise]\n[hold]", "'surprise': unknown key"),
        ("safety_relevant = false", "safety_relevant = true", "feature.safety_relevant"),
        ('kind = "token"', 'kind = "none"', "feature.enforcement: expected detect-only"),
        ('kind = "token"', 'kind = "frame"', "actuator.kind: expected token or none"),
        ("31 01 0F 0D", "11 01", "actuator.activate: expected a request of service 0x31 or 0x2E"),
        ("31 01 0F 0E 00 01", "34 00", "actuator.release: expected a request"),
        ("31 01 0F 0D", "3 1", "actuator.activate: expected 1 to 64 bytes in hex"),
        ("31 01 0F 0D", "31" * 65, "actuator.activate: expected 1 to 64 bytes in hex"),
        ("session = 0x03", "session = 0x80", "actuator.session: expected 1 to 127"),
        ("feature_number = 1", "feature_number = true", "actuator.feature_number"),
        ('active = "01"', 'active = "0101"', "read_back.active"),
        ('mask = "FF"', 'mask = "FE"', "read_back.active"),
        ("interval_s = 10", "interval_s = 0", "read_back.interval_s"),
        ("request_id = 0x744", "request_id = -1", "ecu.request_id"),
        ("max_s = 14400", "max_s = 0", "hold.max_s"),
        ('inputs = ["Vehicle.Speed"]', 'inputs = "Vehicle.Speed"', "conditions.release.inputs"),
        ('inputs = ["Vehicle.Speed"]', 'inputs = ["speed"]', "conditions.release.inputs"),
        ('when = "Vehicle.Speed < 1.0"\n', "", "conditions.release.when"),
        ('id = "heated-distance"', 'id = "active-time"', "meters[1].id: expected each meter once"),
        ('odometer = "Vehicle.TraveledDistance"\n', "", "meters[1].odometer"),
        ('kind = "duration"', 'kind = "weight"', "meters[0].kind"),
        ("[hold]\nmax_s = 14400", "hold = 1", "hold: expected a table"),
    ],
)
def test_a_problem_is_named(old: str, new: str, problem: str) -> None:
    assert old in SEAT_TOML
    with pytest.raises(MalformedError) as caught:
        parse_feature(SEAT_TOML.replace(old, new, 1).encode())
    assert problem in str(caught.value)


def test_all_problems_come_at_once() -> None:
    wrong = SEAT_TOML.replace("session = 0x03", "session = 0").replace("max_s = 14400", "max_s = -1")
    with pytest.raises(MalformedError) as caught:
        parse_feature(wrong.encode())
    assert "actuator.session" in str(caught.value)
    assert "hold.max_s" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"\xff", b"a =", b"a = 1\na = 2", b"a = " + b"[\n" * 30_000, b"", b"meters = [1]"]
)
def test_what_is_no_feature_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_feature(content)


def test_a_long_file_or_line_is_refused_unread() -> None:
    with pytest.raises(LimitError, match="bytes of a line"):
        parse_feature(b"a." * 1_100 + b"a = 1")
    with pytest.raises(LimitError, match="feature file, bytes"):
        parse_feature(b"# comment\n" * 6_600)
