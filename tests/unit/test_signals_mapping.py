"""A mapping names signals that exist, or says at which line it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.signals_data import DEMO_SIGNALS, SMALL_DBC, simulated_database, small_database

from agent.errors import DatabaseError
from agent.signals import mapping
from agent.signals.checks import Scheme
from agent.signals.database import parse

SPEED = '[[signals]]\nvss = "Vehicle.Speed"\nmessage = "SPEEDS"\nsignal = "SPEED"\nmax_age_ms = 500\n'


def problems(tmp_path: Path, text: str) -> str:
    with pytest.raises(DatabaseError) as caught:
        mapping.read(text.encode(), tmp_path / "signals.toml", small_database())
    return str(caught.value)


def test_the_demonstration_maps_the_simulated_vehicle() -> None:
    found = mapping.read(DEMO_SIGNALS.read_bytes(), DEMO_SIGNALS, simulated_database())
    entries = {e.vss: e for e in found.entries}
    assert len(entries) == 6
    assert entries["Vehicle.TraveledDistance"].scale == 0.001
    assert entries["Vehicle.LowVoltageSystemState"].text
    assert {m.name: m.check for m in found.messages} == dict.fromkeys(
        {e.message for e in found.entries}, Scheme.OPENFOD_J1850
    )


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
    with pytest.raises(DatabaseError, match=r"message SPEEDS was skipped at small\.dbc:5: Invalid syntax"):
        mapping.read(SPEED.encode(), tmp_path / "signals.toml", database)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, SPEED.replace("SPEEDS", "X1") + SPEED.replace('"SPEED"', '"X2"'))
    assert len(found.splitlines()) == 3
    assert "Vehicle.Speed is mapped twice" in found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            'unit = "mph"',
            "signals.toml:6: signals[0].unit: small.dbc has 'km/h': 'mph' needs scale = 0.621371192",
        ),
        ('unit = "V"', "signals[0].unit: small.dbc has 'km/h': that is no voltage in 'V'"),
        (
            'unit = "m/s"\nscale = 3.6',
            "signals[0].unit: small.dbc has 'km/h': 'm/s' needs scale = 0.277777778",
        ),
        ("scale = 0.0", "signals[0].scale: expected a finite number other than 0"),
        ("scale = nan", "signals[0].scale: expected a number, found"),
        ("offset = inf", "signals[0].offset: expected a number, found"),
        ("text = true", "signals[0].text: signal SPEED has no value table"),
        (
            '[[messages]]\nname = "SPEEDS"\ncheck = "none"',
            "messages[0].check: expected one of openfod-j1850, e2e-1",
        ),
        (
            '[[messages]]\nname = "SPEED"',
            "messages[0].name: small.dbc has no message 'SPEED'; the closest is",
        ),
        ('[[messages]]\nname = "SELECTED"', "messages[0].name: no signal of message SELECTED is mapped"),
        ('[[messages]]\nname = "SPEEDS"\n' * 2, "messages[1].name: message SPEEDS stands here twice"),
        (
            '[[messages]]\nname = "SPEEDS"\ncounter = "COUNT"',
            "messages[0].counter: message SPEEDS has no signal",
        ),
        ('[[messages]]\nname = "SPEEDS"\ndata_id = 65536', "messages[0].data_id: expected at most 65535"),
        ("max_age = 1", "signals[0].max_age: unknown key"),
    ],
)
def test_what_does_not_fit_the_database_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in problems(tmp_path, f"{SPEED}{line}\n")


def test_the_same_unit_in_another_spelling_is_accepted(tmp_path: Path) -> None:
    text = f'{SPEED}unit = "km/h"\n'
    database = parse(SMALL_DBC.replace('"km/h"', '"kph"'), Path("small.dbc"))
    assert mapping.read(text.encode(), tmp_path / "signals.toml", database).entries[0].unit == "km/h"


def test_a_scale_that_leads_to_the_unit_is_accepted(tmp_path: Path) -> None:
    text = f'{SPEED}unit = "m/s"\nscale = 0.2778\n'
    found = mapping.read(text.encode(), tmp_path / "signals.toml", small_database())
    assert found.entries[0].scale == 0.2778
