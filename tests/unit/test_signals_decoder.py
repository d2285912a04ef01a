"""Decoded values are those of cantools on every frame of real logs, in value and in type."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.signals_data import (
    SMALL_DBC,
    data_file,
    decoded,
    entry,
    load,
    map_all,
    raw_frame,
    simulated_database,
    small_database,
    table_of,
)

from agent.adapters.replay import replay_log
from agent.errors import DatabaseError
from agent.signals.checks import Scheme
from agent.signals.database import SignalDatabase, parse
from agent.signals.mapping import MessageSettings
from agent.signals.state import Collector
from agent.signals.table import CAN_EFF_FLAG, MessageRow, Table


def rows_of(database: SignalDatabase, *, text: bool) -> Mapping[int, MessageRow]:
    entries = map_all(database, text=text)
    # Public databases give one identifier to several messages; the last one is what cantools takes.
    keys = {(m.frame_id, m.is_extended_frame): m.name for m in database.messages.values()}
    table = table_of(database, *(e for e in entries if e.message in keys.values()))
    return {row.can_id: row for row in table.messages}


def only_row(table: Table) -> MessageRow:
    (row,) = table.messages
    return row


@pytest.mark.parametrize(
    ("database_name", "log_name", "least_frames"),
    [
        ("honda_civic_touring_2016_can_generated.dbc", "civic_typeR_turnonanddrive.log", 16_900),
        ("Model3CAN.dbc", "kuksa_model3_dogmode_candump.log", 9_900),
    ],
)
def test_real_logs_decode_as_cantools_decodes_them(
    database_name: str, log_name: str, least_frames: int
) -> None:
    database = load(data_file(database_name))
    numbers, texts = rows_of(database, text=False), rows_of(database, text=True)
    seen: set[tuple[int, bytes]] = set()
    frames = 0
    for frame in map(raw_frame, replay_log(data_file(log_name), "b")):
        row = numbers.get(frame.can_id)
        if row is None or len(frame.data) < row.length:
            continue
        frames += 1
        if (frame.can_id, frame.data) in seen:
            continue
        seen.add((frame.can_id, frame.data))
        message = database.messages[row.name]
        expected = message.decode(frame.data, decode_choices=False, allow_excess=True)
        named = message.decode(frame.data, decode_choices=True, allow_excess=True)
        assert isinstance(expected, dict)
        assert isinstance(named, dict)
        found = decoded(row, frame.data)
        exactly = {f"{row.name}.{k}": (v, type(v)) for k, v in expected.items()}
        assert {k: (v, type(v)) for k, v in found.items() if v is not None} == exactly
        if text_row := texts.get(frame.can_id):
            for name, text in decoded(text_row, frame.data).items():
                if text is not None:
                    assert text == str(named[name.removeprefix(f"{row.name}.")])
    assert frames >= least_frames


def test_bits_are_cut_right_where_a_database_overlaps() -> None:
    text = SMALL_DBC.replace(
        ' SG_ LATERAL : 23|12@0- (0.5,-2) [0|0] "m/s2" A\n', ' SG_ LOW : 0|8@1+ (1,0) [0|0] "" A\n'
    )
    database = parse(text, Path("overlap.dbc"))
    row = only_row(table_of(database, entry("A.Speed", "SPEEDS", "SPEED"), entry("A.Low", "SPEEDS", "LOW")))
    assert decoded(row, bytes.fromhex("3412000000000000")) == {
        "A.Speed": pytest.approx(0x1234 * 0.01),
        "A.Low": 0x34,
    }


def test_only_the_selected_signal_of_a_multiplexer_is_in_a_frame() -> None:
    entries = [entry("A.First", "SELECTED", "FIRST"), entry("A.Second", "SELECTED", "SECOND")]
    row = only_row(table_of(small_database(), *entries))
    assert row.can_id == CAN_EFF_FLAG | 512
    assert decoded(row, bytes.fromhex("00ffff00")) == {"A.First": -1}
    assert decoded(row, bytes.fromhex("01000a00")) == {"A.Second": 1.0}
    assert decoded(row, bytes.fromhex("07ffff00")) == {}


def test_only_mapped_signals_are_looked_at() -> None:
    table = table_of(small_database(), entry("A.Speed", "SPEEDS", "SPEED", scale=2.0))
    assert table.can_ids == frozenset({256})
    assert list(table.infos) == ["A.Speed"]
    assert only_row(table).mask == 0xFFFF


def test_infos_say_unit_step_and_age() -> None:
    entries = [
        entry("A.Distance", "PT_ODOMETER", "Odometer", scale=0.001, unit="km", max_age_ms=700),
        entry("A.Gear", "PT_GEAR", "Gear", text=True),
    ]
    infos = table_of(simulated_database(), *entries).infos
    assert infos["A.Distance"].resolution == pytest.approx(0.01)
    assert (infos["A.Distance"].unit, infos["A.Distance"].max_age_ns) == ("km", 700_000_000)
    assert infos["A.Gear"].resolution == 0


def test_a_signal_beyond_its_message_is_refused() -> None:
    database = parse(SMALL_DBC.replace("SPEEDS: 8", "SPEEDS: 1"), Path("small.dbc"))
    with pytest.raises(DatabaseError, match=r"SPEEDS has 1 bytes; signal SPEED .* does not fit"):
        table_of(database, entry("A.Speed", "SPEEDS", "SPEED"))


def test_two_messages_with_one_identifier_cannot_both_be_subscribed() -> None:
    text = SMALL_DBC.replace("BO_ 2147484160 ", "BO_ 256 ")
    entries = [entry("A.Speed", "SPEEDS", "SPEED"), entry("A.First", "SELECTED", "FIRST")]
    database = parse(text, Path("small.dbc"))
    with pytest.raises(DatabaseError, match="both have the identifier 0x100"):
        table_of(database, *entries)


def settings(**found: object) -> tuple[MessageSettings, ...]:
    return (MessageSettings(**found),)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"check": Scheme.HONDA}, "check honda needs the signal COUNTER"),
        ({"check": Scheme.HONDA, "counter": "STATE"}, "check honda needs the signal CHECKSUM"),
        ({"check": Scheme.OPENFOD_J1850}, "check openfod-j1850 needs the signal SPEEDS_COUNTER"),
        ({"check": Scheme.TOYOTA}, "check toyota needs the signal CHECKSUM"),
        ({"check": Scheme.SUBARU, "counter": "STATE"}, "check subaru needs the signal CHECKSUM"),
        ({"check": Scheme.CHRYSLER, "counter": "STATE"}, "check chrysler needs the signal CHECKSUM"),
        (
            {"check": Scheme.HYUNDAI_CANFD, "counter": "STATE"},
            "hyundai-canfd needs the signal CHECKSUM",
        ),
        ({"check": Scheme.E2E_2}, "check e2e-2 needs 16 data_ids"),
        ({"check": Scheme.E2E_5, "offset": 6}, "too short for check e2e-5"),
        ({"counter": "SPEDE"}, "its counter needs the signal SPEDE"),
        ({"counter": "SPEED"}, "multiplexer SPEED is scaled"),
        ({"any_source": True}, "any_source is for 29-bit identifiers"),
    ],
)
def test_a_message_that_lacks_what_its_settings_need_is_refused(
    found: dict[str, object], expected: str
) -> None:
    with pytest.raises(DatabaseError, match=re.escape(expected)):
        table_of(
            small_database(), entry("A.Speed", "SPEEDS", "SPEED"), messages=settings(name="SPEEDS", **found)
        )


def test_a_checksum_at_another_place_is_refused() -> None:
    database = simulated_database()
    message = database.messages["PT_GEAR"]
    message.get_signal_by_name("PT_GEAR_CRC").start = 16
    moved = SignalDatabase(database.path, {"PT_GEAR": message})
    with pytest.raises(DatabaseError, match="PT_GEAR_CRC is not where check openfod-j1850 has it"):
        table_of(
            moved,
            entry("A.Gear", "PT_GEAR", "Gear"),
            messages=settings(name="PT_GEAR", check=Scheme.OPENFOD_J1850),
        )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("M : 0|8@1+ (1,0)", "M : 0|8@1+ (2,0)", "multiplexer WHICH is scaled"),
        ("SELECTED: 4", "SELECTED: 65", "one frame holds 1 to 64"),
        ("m0 : 8|16@1- (1,0)", "m0 : 8|16@1- (1e99,0)", "a scale or offset of more than"),
    ],
)
def test_what_could_not_be_read_exactly_is_refused(before: str, after: str, expected: str) -> None:
    assert before in SMALL_DBC
    database = parse(SMALL_DBC.replace(before, after), Path("small.dbc"))
    with pytest.raises(DatabaseError, match=re.escape(expected)):
        table_of(database, entry("A.First", "SELECTED", "FIRST"))


def test_what_is_behind_the_end_of_a_message_is_padding() -> None:
    collector = Collector({"b": table_of(small_database(), entry("A.First", "SELECTED", "FIRST"))})
    collector.feed("b", [(CAN_EFF_FLAG | 512, bytes.fromhex("000100ffffff"), 1)])
    assert [c.value for c in collector.drain().changes] == [1]
