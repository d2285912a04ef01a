"""Decoded values are those of cantools on every frame, and checks are what databases document."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.signals_data import (
    SMALL_DBC,
    data_file,
    entry,
    map_all,
    simulated_database,
    small_database,
)

from agent.adapters.replay import replay_log
from agent.errors import DatabaseError
from agent.signals.database import SignalDatabase, load, parse
from agent.signals.mapping import Check
from agent.signals.plan import DecodePlan, honda_checksum, j1850_crc


def compile_all(database: SignalDatabase, *, text: bool) -> DecodePlan:
    entries = map_all(database, text=text)
    # Public databases give one identifier to several messages; the last one is what cantools takes.
    keys = {(m.frame_id, m.is_extended_frame): m.name for m in database.messages.values()}
    entries = [e for e in entries if e.message in keys.values()]
    return DecodePlan.compile(database, entries, "b", {e.vss for e in entries})


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
    numbers, texts = compile_all(database, text=False), compile_all(database, text=True)
    decoded: dict[tuple[int, bytes], None] = {}
    frames = 0
    for frame in replay_log(data_file(log_name), "b"):
        plan = numbers.messages.get((frame.can_id, frame.is_extended))
        if plan is None or len(frame.data) < plan.length:
            continue
        frames += 1
        if (frame.can_id, frame.data) in decoded:
            continue
        decoded[frame.can_id, frame.data] = None
        message = database.messages[plan.name]
        prefix = f"{plan.name}."
        expected = message.decode(frame.data, decode_choices=False, allow_excess=True)
        named = message.decode(frame.data, decode_choices=True, allow_excess=True)
        assert isinstance(expected, dict)
        assert isinstance(named, dict)
        found = plan.decode(frame.data)
        assert {k.removeprefix(prefix): v for k, v in found.items() if v is not None} == expected
        if text_plan := texts.messages.get((frame.can_id, frame.is_extended)):
            for name, text in text_plan.decode(frame.data).items():
                if text is not None:
                    assert text == str(named[name.removeprefix(prefix)])
    assert frames >= least_frames


def test_bits_are_cut_right_where_a_database_overlaps() -> None:
    text = SMALL_DBC.replace(
        ' SG_ LATERAL : 23|12@0- (0.5,-2) [0|0] "m/s2" A\n', ' SG_ LOW : 0|8@1+ (1,0) [0|0] "" A\n'
    )
    database = parse(text, Path("overlap.dbc"))
    entries = [entry("A.Speed", "SPEEDS", "SPEED"), entry("A.Low", "SPEEDS", "LOW")]
    plan = DecodePlan.compile(database, entries, "b", ["A.Speed", "A.Low"])
    assert plan.messages[256, False].decode(bytes.fromhex("3412000000000000")) == {
        "A.Speed": pytest.approx(0x1234 * 0.01),
        "A.Low": 0x34,
    }


def test_only_the_selected_signal_of_a_multiplexer_is_in_a_frame() -> None:
    entries = [entry("A.First", "SELECTED", "FIRST"), entry("A.Second", "SELECTED", "SECOND")]
    plan = DecodePlan.compile(small_database(), entries, "b", ["A.First", "A.Second"])
    message = plan.messages[512, True]
    assert message.decode(bytes.fromhex("00ffff00")) == {"A.First": -1, "A.Second": None}
    assert message.decode(bytes.fromhex("01000a00")) == {"A.First": None, "A.Second": 1.0}
    assert message.decode(bytes.fromhex("07ffff00")) == {"A.First": None, "A.Second": None}


def test_only_subscribed_signals_are_in_the_plan() -> None:
    entries = [entry("A.Speed", "SPEEDS", "SPEED", scale=2.0), entry("A.First", "SELECTED", "FIRST")]
    plan = DecodePlan.compile(small_database(), entries, "b", ["A.Speed", "A.OnAnotherBus"])
    assert plan.can_ids == {(256, False)}
    assert list(plan.infos) == ["A.Speed"]
    assert plan.messages[256, False].mask == 0xFFFF


def test_infos_say_unit_step_and_age() -> None:
    entries = [
        entry("A.Distance", "PT_ODOMETER", "Odometer", scale=0.001, unit="km", max_age_ms=700),
        entry("A.Gear", "PT_GEAR", "Gear", text=True),
    ]
    infos = DecodePlan.compile(simulated_database(), entries, "b", ["A.Distance", "A.Gear"]).infos
    assert infos["A.Distance"].resolution == pytest.approx(0.01)
    assert (infos["A.Distance"].unit, infos["A.Distance"].max_age_ns) == ("km", 700_000_000)
    assert infos["A.Gear"].resolution == 0


def test_a_signal_beyond_its_message_is_refused() -> None:
    database = parse(SMALL_DBC.replace("SPEEDS: 8", "SPEEDS: 1"), Path("small.dbc"))
    with pytest.raises(DatabaseError, match=r"SPEEDS has 1 bytes; signal SPEED .* does not fit"):
        DecodePlan.compile(database, [entry("A.Speed", "SPEEDS", "SPEED")], "b", ["A.Speed"])


def test_crc_is_that_of_the_catalogued_vectors() -> None:
    # AUTOSAR_SWS_CRCLibrary R22-11, table of 7.2.1.1: the first two bytes stand for the identifier.
    assert j1850_crc(0x0000, b"\xee\x00\x00") == 0x59
    assert j1850_crc(0x01F2, b"\xee\x83") == 0x37
    assert j1850_crc(0xAA0F, b"\xee\x00\x55") == 0x79


def test_honda_checksum_holds_for_real_frames() -> None:
    database = load(data_file("honda_civic_touring_2016_can_generated.dbc"))
    lengths = {
        m.frame_id: m.length
        for m in database.messages.values()
        # This one's checksum is not where the database has it.
        if any(s.name == "CHECKSUM" for s in m.signals) and m.name != "ROUGH_WHEEL_SPEED"
    }
    checked = 0
    for frame in replay_log(data_file("civic_typeR_turnonanddrive.log"), "b"):
        length = lengths.get(frame.can_id)
        if length is not None:
            data = frame.data[:length]
            assert honda_checksum(frame.can_id, data) == data[-1] & 0xF
            checked += 1
    assert checked > 14_000


@pytest.mark.parametrize("check", list(Check))
def test_a_check_needs_the_signals_it_reads(check: Check) -> None:
    entries = [entry("A.Speed", "SPEEDS", "SPEED", check=check)]
    with pytest.raises(DatabaseError, match=rf"message SPEEDS: check {check.value} needs the signals"):
        DecodePlan.compile(small_database(), entries, "b", ["A.Speed"])


def test_a_check_at_another_place_is_refused() -> None:
    database = simulated_database()
    message = database.messages["PT_GEAR"]
    message.get_signal_by_name("PT_GEAR_CRC").start = 16
    moved = replace(database, messages={"PT_GEAR": message})
    entries = [entry("A.Gear", "PT_GEAR", "Gear", check=Check.OPENFOD_J1850)]
    with pytest.raises(DatabaseError, match=r"PT_GEAR_CRC and PT_GEAR_COUNTER are not where"):
        DecodePlan.compile(moved, entries, "b", ["A.Gear"])


def test_two_messages_with_one_identifier_cannot_both_be_subscribed() -> None:
    text = SMALL_DBC.replace("BO_ 2147484160 ", "BO_ 256 ")
    entries = [entry("A.Speed", "SPEEDS", "SPEED"), entry("A.First", "SELECTED", "FIRST")]
    database = parse(text, Path("small.dbc"))
    with pytest.raises(DatabaseError, match="both have the identifier 0x100"):
        DecodePlan.compile(database, entries, "b", ["A.Speed", "A.First"])
