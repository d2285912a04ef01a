"""SYM and ARXML: the values of every frame are those of cantools, as for DBC and KCD."""

from __future__ import annotations

import contextlib
from pathlib import Path

import cantools.database
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.signals_data import REPOSITORY, decoded, load, map_all, table_of

from agent.errors import DatabaseError
from agent.signals.database import read

FILES = ("small.sym", "small.arxml")
DATABASES = REPOSITORY / "tests/databases"


@pytest.mark.parametrize("name", FILES)
@given(payload=st.binary(min_size=8, max_size=8))
def test_values_are_those_of_cantools(name: str, payload: bytes) -> None:
    ours, theirs = load(DATABASES / name), cantools.database.load_file(DATABASES / name, strict=False)
    assert isinstance(theirs, cantools.database.can.Database)
    rows = table_of(ours, *map_all(ours)).messages
    assert len(rows) == len(theirs.messages)
    for row in rows:
        expected = theirs.get_message_by_name(row.name).decode(payload, decode_choices=False)
        found = {vss.partition(".")[2]: value for vss, value in decoded(row, payload).items()}
        assert found == expected


def test_texts_and_units_of_a_sym_file_arrive() -> None:
    database = load(DATABASES / "small.sym")
    texts = table_of(database, *map_all(database, text=True)).messages
    (row,) = texts
    assert decoded(row, bytes([0, 0, 0, 2, 0, 0, 0, 0])) == {"Engine.Selector": "Drive"}
    assert database.messages["Engine"].get_signal_by_name("Speed").unit == "km/h"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_anywhere_is_refused_or_read(name: str) -> None:
    content = (DATABASES / name).read_bytes()
    for end in range(0, len(content), 97):
        with contextlib.suppress(DatabaseError):
            read(content[:end], Path(name))
