"""Over its releases a feature keeps ECU, number and meters; what changes them is another feature."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from keys.errors import CatalogueError
from keys.lint import lint

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "catalogue"
HARDWARE = 'hardware_id = "openfod-seat-1"'
OTHER_HARDWARE = 'hardware_id = "openfod-seat-2"'
IDENTIFIER = ('identifier = "seat-module"', 'identifier = "seat-module-b"')
NUMBER = ("feature_number = 1", "feature_number = 9")
DURATION = 'kind = "duration"                # milliseconds'
DISTANCE = 'kind = "distance"\nodometer = "Vehicle.TraveledDistance"\nspeed = "Vehicle.Speed"'


def _releases(folder: Path, *edits: tuple[str, str]) -> Path:
    """The demonstration's catalogue with a second release of the seat heating."""
    source = folder / "source"
    shutil.copytree(DEMO, source)
    text = (source / "features/seat-heating/1.toml").read_text()
    # It would name a meter that an edit takes away, which is refused for a reason of its own.
    text = re.sub(r"\n\[reading\]\n(.+\n)+", "\n", text)
    for old, new in (("release = 1  ", "release = 2  "), *edits):
        assert old in text, old
        text = text.replace(old, new)
    (source / "features/seat-heating/2.toml").write_text(text)
    return source


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (IDENTIFIER, "ecu.identifier: expected seat-module as in release 1, found seat-module-b"),
        (NUMBER, "actuator.feature_number: expected 1 as in release 1, found 9"),
        (('"active-time"', '"on-time"'), "meters: expected active-time of kind duration"),
        ((DURATION, DISTANCE), "active-time of kind duration as in release 1, found distance"),
    ],
    ids=["ECU", "number", "meter renamed", "meter of another kind"],
)
def test_a_release_that_changes_a_meaning_is_refused(
    tmp_path: Path, edit: tuple[str, str], reason: str
) -> None:
    source = _releases(tmp_path, edit)
    with pytest.raises(CatalogueError) as caught:
        lint(source)
    assert reason in str(caught.value)
    assert str(caught.value).startswith(str(source / "features/seat-heating/2.toml"))
    assert str(caught.value).endswith("make a new feature id")


def test_a_release_without_a_token_is_refused(tmp_path: Path) -> None:
    source = _releases(tmp_path)
    path = source / "features/seat-heating/2.toml"
    logbook = (source / "features/drivers-logbook/1.toml").read_text()
    text = logbook.replace('id = "drivers-logbook"', 'id = "seat-heating"').replace(
        "release = 1", "release = 2"
    )
    path.write_text(text)
    with pytest.raises(CatalogueError, match=r"actuator\.kind: expected token as in release 1"):
        lint(source)


def test_another_hardware_may_have_another_number_and_not_another_ecu(tmp_path: Path) -> None:
    source = _releases(tmp_path, (HARDWARE, OTHER_HARDWARE), NUMBER)
    assert len(lint(source)) == 3
    source = _releases(tmp_path / "moved", (HARDWARE, OTHER_HARDWARE), IDENTIFIER)
    with pytest.raises(CatalogueError, match=r"ecu\.identifier"):
        lint(source)


def test_a_release_may_add_a_meter(tmp_path: Path) -> None:
    source = _releases(tmp_path, ("[hold]", '[[meters]]\nid = "time"\nkind = "duration"\n\n[hold]'))
    assert len(lint(source)) == 3
