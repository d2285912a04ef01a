"""A mapping names signals that exist, or says at which line it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.signals_data import DEMO_SIGNALS, SMALL_DBC, simulated_database, small_database

from agent.errors import DatabaseError
from agent.signals import mapping
from agent.signals.database import parse
from agent.signals.mapping import Check

SPEED = '[[signals]]\nvss = "Vehicle.Speed"\nmessage = "SPEEDS"\nsignal = "SPEED"\nmax_age_ms = 500\n'


def problems(tmp_path: Path, text: str) -> str:
    path = tmp_path / "signals.toml"
    path.write_text(text)
    with pytest.raises(DatabaseError) as caught:
        mapping.load(path, small_database())
    return str(caught.value)


def test_the_demonstration_maps_the_simulated_vehicle() -> None:
    entries = {e.vss: e for e in mapping.load(DEMO_SIGNALS, simulated_database())}
    assert len(entries) == 6
    assert entries["Vehicle.TraveledDistance"].scale == 0.001
    assert entries["Vehicle.LowVoltageSystemState"].text
    assert {e.check for e in entries.values()} == {Check.OPENFOD_J1850}


def test_an_unknown_message_is_named_with_line_and_closest(tmp_path: Path) -> None:
    found = problems(tmp_path, SPEED.replace("SPEEDS", "SPEDS"))
    assert found.endswith(
        "signals.toml:3: signals[0].message: small.dbc has no message 'SPEDS'; the closest is 'SPEEDS'"
    )


def test_an_unknown_signal_is_named_with_line_and_closest(tmp_path: Path) -> None:
    found = problems(tmp_path, SPEED.replace('"SPEED"', '"SPED"'))
    assert "signals.toml:4: signals[0].signal: message SPEEDS has no signal 'SPED'" in found
    assert "the closest is 'SPEED'" in found


def test_a_message_that_was_skipped_is_not_called_unknown(tmp_path: Path) -> None:
    database = parse(SMALL_DBC.replace("SPEED : 0|16@1+", "SPEED : 0|16@1*"), Path("small.dbc"))
    path = tmp_path / "signals.toml"
    path.write_text(SPEED)
    with pytest.raises(DatabaseError, match=r"message SPEEDS was skipped at small\.dbc:5: Invalid syntax"):
        mapping.load(path, database)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, SPEED.replace("SPEEDS", "X1") + SPEED.replace('"SPEED"', '"X2"'))
    assert len(found.splitlines()) == 3
    assert "Vehicle.Speed is mapped twice" in found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('unit = "mph"', "signals.toml:6: signals[0].unit: expected 'km/h' as in small.dbc"),
        ("scale = 0.0", "signals[0].scale: expected a finite number other than 0"),
        ("scale = nan", "signals[0].scale: expected a number, found"),
        ("offset = inf", "signals[0].offset: expected a number, found"),
        ("text = true", "signals[0].text: signal SPEED has no value table"),
        ('check = "none"', "signals[0].check: expected one of openfod-j1850, honda"),
        ("max_age = 1", "signals[0].max_age: unknown key"),
    ],
)
def test_what_does_not_fit_the_database_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in problems(tmp_path, f"{SPEED}{line}\n")


def test_the_same_unit_in_another_spelling_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "signals.toml"
    path.write_text(f'{SPEED}unit = "km/h"\n')
    database = parse(SMALL_DBC.replace('"km/h"', '"kph"'), Path("small.dbc"))
    assert mapping.load(path, database)[0].unit == "km/h"


def test_signals_of_one_message_share_one_check(tmp_path: Path) -> None:
    second = SPEED.replace("Vehicle.Speed", "Vehicle.Lateral").replace('"SPEED"', '"LATERAL"')
    assert "signals[1].check: differs" in problems(tmp_path, f'{SPEED}{second}check = "honda"\n')
