"""Databases load as they are published; what is left out is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.signals_data import SMALL_DBC, data_file, data_folder, load, simulated_database

from agent.adapters import signal_table
from agent.errors import DatabaseError
from agent.signals.database import MAX_MESSAGE_BYTES, parse

SMALL = Path("small.dbc")


def test_published_honda_database_loads_and_names_its_bad_lines() -> None:
    database = load(data_file("honda_civic_touring_2016_can_generated.dbc"))
    assert len(database.messages) == 38
    assert [s.line for s in database.skipped] == [211, 212]
    assert database.skipped[0].statement.startswith('CM_ SG_ 304 "Seems')
    assert database.skipped[0].reason.startswith("Invalid syntax")
    assert database.messages["ENGINE_DATA"].get_signal_by_name("XMISSION_SPEED").unit == "kph"
    # What follows the bad lines is used.
    assert database.messages["EPB_STATUS"].get_signal_by_name("EPB_STATE").choices


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("Model3CAN.dbc", 159),
        ("hyundai_canfd_generated.dbc", 88),
        ("hyundai_i30_2014.dbc", 32),
        ("nissan_leaf_2018_generated.dbc", 19),
        ("toyota_new_mc_pt_generated.dbc", 57),
        ("test1_1.kcd", 1),
        ("duplicate_signal_name.kcd", 2),
        ("cantools/floating_point.dbc", 2),
        ("cantools/foobar.dbc", 5),
        ("cantools/motohawk.dbc", 1),
        ("cantools/multiplex.dbc", 1),
        ("cantools/signed.dbc", 11),
    ],
)
def test_public_databases_load_whole(name: str, messages: int) -> None:
    database = load(data_file(name))
    assert len(database.messages) == messages
    assert database.skipped == ()


def test_every_file_that_is_no_database_is_refused_with_its_name() -> None:
    others = [p for p in data_folder().rglob("*") if p.is_file() and p.suffix not in {".dbc", ".kcd"}]
    assert others
    for path in others:
        with pytest.raises(DatabaseError, match=re.escape(path.name)):
            load(path)


def test_simulated_vehicle_loads_whole() -> None:
    database = simulated_database()
    assert len(database.messages) == 6
    assert database.skipped == ()


def test_a_message_that_does_not_parse_is_missing_and_named() -> None:
    text = SMALL_DBC.replace("SG_ SPEED : 0|16@1+", "SG_ SPEED : 0|16@1*")
    database = parse(text, SMALL)
    assert list(database.messages) == ["SELECTED"]
    skipped, value_table = database.skipped
    assert value_table.reason == "there is no signal STATE of message 256"
    assert (skipped.line, skipped.message) == (5, "SPEEDS")


def test_an_absurd_size_never_reaches_the_parser() -> None:
    database = parse(SMALL_DBC.replace("SPEEDS: 8", "SPEEDS: 4000000000"), SMALL)
    assert list(database.messages) == ["SELECTED"]
    assert str(MAX_MESSAGE_BYTES) in database.skipped[0].reason
    database = parse(SMALL_DBC.replace("m0 : 8|16@", "m0 : 8|999999999@"), SMALL)
    assert list(database.messages) == ["SPEEDS"]
    database = parse(SMALL_DBC + "\nSG_MUL_VAL_ 2147484160 FIRST WHICH 0-4000000000;\n", SMALL)
    assert list(database.messages) == ["SPEEDS"]
    assert "multiplexer values" in database.skipped[1].reason
    database = parse(SMALL_DBC.replace("SPEEDS: 8", f"SPEEDS: {'9' * 5000}"), SMALL)
    assert list(database.messages) == ["SELECTED"]


def test_an_open_text_does_not_swallow_what_follows() -> None:
    text = SMALL_DBC.replace('as the driver sees it";', "as the driver sees it;")
    database = parse(text, SMALL)
    assert len(database.messages) == 2
    assert [s.statement[:3] for s in database.skipped] == ["CM_"]
    assert database.messages["SPEEDS"].get_signal_by_name("STATE").choices


def test_a_comment_that_quotes_a_statement_stays_a_comment() -> None:
    text = SMALL_DBC.replace("as the driver sees it", "see\nVAL_TABLE_ of the manual")
    database = parse(text, SMALL)
    assert database.skipped == ()
    comment = database.messages["SPEEDS"].get_signal_by_name("SPEED").comment
    assert comment == "see\nVAL_TABLE_ of the manual"


def test_attributes_that_do_not_fit_are_given_up_and_messages_kept() -> None:
    database = parse(SMALL_DBC + 'BA_ "Undefined" BO_ 256 1;\n', SMALL)
    assert len(database.messages) == 2
    assert [s.statement[:3] for s in database.skipped] == ["BA_"]


def test_a_message_whose_number_format_cannot_be_read_is_missing() -> None:
    database = parse(SMALL_DBC + "SIG_VALTYPE_ 256 SPEED : one;\n", SMALL)
    assert list(database.messages) == ["SELECTED"]
    assert database.skipped[0].message == "SPEEDS"
    with pytest.raises(DatabaseError, match=r"small\.dbc:17: .* nor which message it changes"):
        parse(SMALL_DBC + "SIG_VALTYPE_ two : 1;\n", SMALL)


def test_a_file_without_messages_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.dbc"
    path.write_text('VERSION "1"\n')
    with pytest.raises(DatabaseError, match=r"empty\.dbc: expected at least one message; found none"):
        load(path)


def test_a_file_that_is_missing_or_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"none\.dbc: cannot be read"):
        signal_table.read(tmp_path / "none.dbc", 1)
    path = tmp_path / "signals.xls"
    path.write_bytes(b"")
    with pytest.raises(DatabaseError, match=r"expected a file \.dbc"):
        load(path)
    path = tmp_path / "bad.kcd"
    path.write_text("<NetworkDefinition")
    with pytest.raises(DatabaseError, match=r"bad\.kcd: expected a kcd database"):
        load(path)


def test_of_two_messages_of_one_name_the_later_counts_and_the_other_is_named() -> None:
    database = parse(
        SMALL_DBC.replace("SELECTED: 4", "SPEEDS: 4").replace("VAL_ 256", 'CM_ "";\nVAL_ 256'), SMALL
    )
    assert database.messages["SPEEDS"].frame_id == 512
    (skipped,) = database.skipped
    assert "0x100 is not used" in skipped.reason


def test_windows_text_is_read_where_it_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "celsius.dbc"
    path.write_bytes(SMALL_DBC.replace('"V"', '"°C"').encode("cp1252"))
    signal = load(path).messages["SELECTED"].get_signal_by_name("SECOND")
    assert signal.unit == "°C"
