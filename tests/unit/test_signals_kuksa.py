"""A mapping of Kuksa's CAN provider is read as it is; what is wrong or left out is named with its key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.signals_data import SMALL_DBC, data_file, decoded, load, small_database

from agent.errors import DatabaseError
from agent.signals import kuksa
from agent.signals.compiler import compile_table
from agent.signals.database import SignalDatabase, parse
from agent.signals.mapping import MappingEntry, SignalMapping
from agent.signals.table import MessageRow

PATH = Path("vss_dbc.json")
STATE = {0: "OFF", 1: "ON", 2: "START"}


def tree(datatype: str, found: object, **node: object) -> bytes:
    """A tree with one signal, Vehicle.A.B."""
    leaf = {"type": "sensor", "datatype": datatype, "description": "", "dbc2vss": found, **node}
    inner = {"type": "branch", "children": {"B": leaf}}
    return json.dumps({"Vehicle": {"type": "branch", "children": {"A": inner}}}).encode()


def read(content: bytes, database: SignalDatabase | None = None) -> SignalMapping:
    return kuksa.read(content, PATH, database or small_database())


def entry_of(datatype: str, found: object, **node: object) -> MappingEntry:
    mapping = read(tree(datatype, found, **node))
    assert mapping.notes == ()
    (entry,) = mapping.entries
    return entry


def row_of(datatype: str, found: object, **node: object) -> MessageRow:
    (row,) = compile_table(small_database(), read(tree(datatype, found, **node))).messages
    return row


def value(row: MessageRow, payload: str) -> object:
    return decoded(row, bytes.fromhex(payload)).get("Vehicle.A.B")


# --- the published pair ------------------------------------------------------------


def published() -> tuple[SignalDatabase, SignalMapping]:
    database = load(data_file("Model3CAN.dbc"))
    path = data_file("kuksa_vss_4.0_dbc.json")
    return database, kuksa.read(path.read_bytes(), path, database)


def test_the_published_mapping_is_read_as_it_is() -> None:
    _, mapping = published()
    entries = {e.vss: e for e in mapping.entries}
    assert len(entries) == 31
    belted = entries["Vehicle.Cabin.Seat.Row1.DriverSide.IsBelted"]
    assert belted.mapping == (("BUCKLED", True), ("UNBUCKLED", False))
    assert belted.interval_ms == 1000
    speed = entries["Vehicle.Speed"]
    assert (speed.signal, speed.unit, speed.interval_ms, speed.math) == ("DI_uiSpeed", "km/h", 100, ())
    assert entries["Vehicle.OBD.EngineLoad"].math == ("x", 5, "/", "abs", "floor")


def test_what_of_the_published_mapping_is_not_used_is_named() -> None:
    _, mapping = published()
    ambiguous = [(key, why) for key, why in mapping.notes if key.endswith("dbc2vss.signal")]
    ((key, why),) = ambiguous
    assert key == "Vehicle.Powertrain.TractionBattery.Charging.IsCharging.dbc2vss.signal"
    assert why.startswith("several messages have a signal CP_hvChargeStatus: ID13DCP_chargeStatus, ID23DCP_")
    assert sum(key.endswith("vss2dbc") for key, _ in mapping.notes) == 3


def test_the_published_mapping_gives_kuksa_s_values() -> None:
    database, mapping = published()
    table = compile_table(database, mapping)
    rows = {row.name: row for row in table.messages}
    gear = rows["ID118DriveSystemStatus"]
    message = database.messages[gear.name]
    known = {"DI_GEAR_D": (1, False), "DI_GEAR_P": (0, True), "DI_GEAR_R": (-1, False)}
    signal = message.get_signal_by_name("DI_gear")
    for raw, text in (signal.choices or {}).items():
        payload = (int(raw) << signal.start).to_bytes(message.length, "little")
        found = decoded(gear, payload)
        expected = known.get(str(text), (0, False) if str(text) == "DI_GEAR_INVALID" else (None, None))
        names = ("CurrentGear", "IsParkLockEngaged")
        assert tuple(found[f"Vehicle.Powertrain.Transmission.{n}"] for n in names) == expected


# --- transforms ----------------------------------------------------------------------


def test_math_is_computed_of_the_physical_value() -> None:
    row = row_of("int8", {"signal": "SPEED", "transform": {"math": "floor((x*40)-100)"}})
    assert value(row, "c800000000000000") == -20  # 2.00 km/h


def test_a_number_with_a_text_does_not_go_through_math() -> None:
    row = row_of("uint8", {"signal": "STATE", "transform": {"math": "x*2"}})
    assert value(row, "0000000001000000") is None
    assert value(row, "0000000003000000") == 6


def test_texts_and_numbers_are_mapped_and_others_are_not_used() -> None:
    pairs = [{"from": "ON", "to": True}, {"from": 5, "to": True}, {"from": "OFF", "to": False}]
    row = row_of("boolean", {"signal": "STATE", "transform": {"mapping": pairs}})
    expected = {0: False, 1: True, 2: None, 3: None, 5: True}
    assert {raw: value(row, f"00000000{raw:02x}000000") for raw in expected} == expected


def test_the_first_of_two_pairs_counts() -> None:
    pairs = [{"from": "ON", "to": 7}, {"from": "ON", "to": 8}]
    row = row_of("uint8", {"signal": "STATE", "transform": {"mapping": pairs}})
    assert value(row, "0000000001000000") == 7


def test_without_transform_the_data_type_decides() -> None:
    found = {"signal": "STATE"}
    assert value(row_of("string", found), "0000000002000000") == "START"
    assert value(row_of("uint8", found), "0000000002000000") == 2
    truth = row_of("boolean", found)
    assert [value(truth, f"00000000{raw:02x}000000") for raw in (0, 1, 2)] == [False, True, None]


def test_values_outside_of_type_or_limits_are_not_used() -> None:
    found = {"signal": "SPEED", "transform": {"math": "x*100"}}
    assert value(row_of("uint8", found), "ff00000000000000") == pytest.approx(255)
    assert value(row_of("uint8", found), "0001000000000000") is None
    limited = row_of("float", found, min=1, max=2.5)
    assert [value(limited, f"{raw:02x}00000000000000") for raw in (0, 1, 2, 3)] == [None, 1.0, 2.0, None]


def test_intervals_and_changes_are_as_kuksa_defaults_them() -> None:
    assert entry_of("float", {"signal": "SPEED"}).interval_ms == 1000
    assert entry_of("float", {"signal": "SPEED", "on_change": True}).interval_ms == 0
    assert entry_of("float", {"signal": "SPEED", "on_change": True, "interval_ms": 50}).interval_ms == 50
    assert entry_of("float", {"signal": "SPEED", "max_age_ms": 77}).max_age_ms == 77


def test_dbc_is_an_older_name_of_dbc2vss() -> None:
    content = tree("float", {"signal": "SPEED"}).replace(b"dbc2vss", b"dbc")
    assert read(content).entries[0].signal == "SPEED"


def test_a_multiplexer_filter_needs_all_its_values() -> None:
    filters = [{"signal": "STATE", "value": 2}, {"signal": "LATERAL", "value": 0}]
    text = SMALL_DBC.replace("(0.5,-2)", "(1,0)")
    database = parse(text, Path("small.dbc"))
    mapping = read(tree("float", {"signal": "SPEED", "multiplexer": filters}), database)
    (row,) = compile_table(database, mapping).messages
    assert value(row, "6400000002000000") == 1.0
    assert value(row, "6400000001000000") is None
    assert value(row, "6400010002000000") is None


def test_a_message_may_be_named_where_several_have_the_signal() -> None:
    text = SMALL_DBC.replace("SG_ FIRST", "SG_ SPEED")
    database = parse(text, Path("small.dbc"))
    unnamed = read(tree("float", {"signal": "SPEED"}), database)
    assert unnamed.entries == ()
    assert unnamed.notes[0][0] == "Vehicle.A.B.dbc2vss.signal"
    named = read(tree("float", {"signal": "SPEED", "message": "SPEEDS"}), database)
    assert named.entries[0].message == "SPEEDS"


def test_checks_stand_under_openfod() -> None:
    content = json.loads(tree("float", {"signal": "SPEED"}))
    content["openfod"] = {"messages": [{"name": "SPEEDS", "check": "toyota"}]}
    assert read(json.dumps(content).encode()).messages[0].name == "SPEEDS"
    content["openfod"] = {"messages": [{"name": "SPEEDS", "chek": "toyota"}]}
    with pytest.raises(DatabaseError, match=r"vss_dbc\.json: openfod\.messages\[0\]\.chek: unknown key"):
        read(json.dumps(content).encode())
    content["openfod"] = {"messages": [{"name": "SPED"}]}
    with pytest.raises(DatabaseError, match=r"messages\[0\]\.name: small\.dbc has no message 'SPED'"):
        read(json.dumps(content).encode())


def test_signals_that_the_database_does_not_have_are_noted() -> None:
    mapping = read(tree("float", {"signal": "NONE"}))
    assert mapping.entries == ()
    assert mapping.notes == (("Vehicle.A.B.dbc2vss.signal", "small.dbc has no signal 'NONE'"),)


def test_keys_that_are_not_read_are_noted() -> None:
    mapping = read(tree("float", {"signal": "SPEED", "intervall": 5}))
    assert mapping.notes == (("Vehicle.A.B.dbc2vss.intervall", "unknown; not read"),)


# --- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datatype", "found", "expected"),
    [
        ("float", 5, "dbc2vss: expected an object"),
        ("float", {}, "dbc2vss.signal: missing"),
        ("float", {"signal": 5}, "dbc2vss.signal: expected a text"),
        ("float", {"signal": "SPEED", "interval_ms": "5"}, "interval_ms: expected a whole number"),
        ("float", {"signal": "SPEED", "interval_ms": True}, "interval_ms: expected a whole number"),
        ("float", {"signal": "SPEED", "interval_ms": -1}, "interval_ms: expected 0 to"),
        ("float", {"signal": "SPEED", "on_change": 1}, "on_change: expected true or false"),
        ("float", {"signal": "SPEED", "transform": {}}, "transform: expected either mapping or math"),
        ("float", {"signal": "SPEED", "transform": {"math": "x", "mapping": []}}, "either mapping or math"),
        (
            "float",
            {"signal": "SPEED", "transform": {"math": "open('x')"}},
            "transform.math: \"open('x')\" at",
        ),
        ("string", {"signal": "SPEED", "transform": {"math": "x"}}, "for a data type that is a number"),
        ("string", {"signal": "SPEED"}, "signal SPEED has no value table"),
        ("float", {"signal": "SPEED", "transform": {"mapping": []}}, "expected an array of objects"),
        ("float", {"signal": "SPEED", "transform": {"mapping": [{"from": 1}]}}, "mapping[0]: expected"),
        (
            "uint8",
            {"signal": "STATE", "transform": {"mapping": [{"from": "NO", "to": 1}]}},
            "has no text 'NO'",
        ),
        ("uint8", {"signal": "STATE", "transform": {"mapping": [{"from": "ON", "to": "1"}]}}, "is no uint8"),
        ("boolean", {"signal": "STATE", "transform": {"mapping": [{"from": "ON", "to": 1}]}}, "no boolean"),
        ("float", {"signal": "SPEED", "multiplexer": 1}, "multiplexer: expected an array"),
        ("float", {"signal": "SPEED", "multiplexer": [{"signal": "X", "value": 1}]}, "has no signal 'X'"),
        ("float", {"signal": "SPEED", "multiplexer": [{"signal": "STATE", "value": "1"}]}, "whole number"),
    ],
)
def test_an_entry_that_contradicts_itself_is_refused_with_its_key(
    datatype: str, found: object, expected: str
) -> None:
    with pytest.raises(DatabaseError) as caught:
        read(tree(datatype, found))
    assert str(caught.value).startswith("vss_dbc.json: Vehicle.A.B.dbc2vss")
    assert expected in str(caught.value)


def test_a_wrong_pair_of_units_is_refused_with_file_and_key() -> None:
    with pytest.raises(DatabaseError) as caught:
        read(tree("float", {"signal": "SPEED"}, unit="m/s"))
    assert str(caught.value) == (
        "vss_dbc.json: Vehicle.A.B.dbc2vss: signal SPEED has the unit 'km/h': 'm/s' needs"
        " scale = 0.277777778 and offset = 0, found 1 and 0, or a transform"
    )
    assert entry_of("float", {"signal": "SPEED", "transform": {"math": "x/3.6"}}, unit="m/s").unit == "m/s"


def test_two_names_of_one_entry_are_refused() -> None:
    content = tree("float", {"signal": "SPEED"}, dbc={"signal": "SPEED"})
    with pytest.raises(DatabaseError, match="only one of them may stand here"):
        read(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_tree_is_refused(content: bytes) -> None:
    with pytest.raises(DatabaseError, match=r"vss_dbc\.json"):
        read(content)


def test_all_problems_come_at_once() -> None:
    content = json.loads(tree("float", {"signal": "SPEED", "interval_ms": -1}))
    leaf = {"type": "sensor", "datatype": "float", "dbc2vss": {"signal": "SPEED", "on_change": 1}}
    content["Vehicle"]["children"]["C"] = leaf
    with pytest.raises(DatabaseError) as caught:
        read(json.dumps(content).encode())
    assert len(str(caught.value).splitlines()) == 2
