"""The higher of two copies of the floors, value by value, and their file."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.adapters.floors_file import FloorsFile
from agent.errors import FloorsError
from agent.model import Versions
from agent.trust.floors import floors_to_json, highest, read_floors
from agent.trust.verifier import Floors

VIN = "WFDSEAT10N0000001"

number = st.integers(0, 50)
versions = st.builds(Versions, number, number, number, number)
counters = st.dictionaries(st.tuples(st.sampled_from("ab"), st.sampled_from("cd")), number)
releases = st.dictionaries(st.sampled_from("abc"), number)
one_epoch = st.builds(
    Floors, versions, versions, number, counters, releases, st.just("e"), st.just("e"), owner_epoch=number
)


@given(one_epoch, one_epoch)
def test_no_value_is_below_either_copy_and_none_is_above_both(a: Floors, b: Floors) -> None:
    both = highest(a, b)
    assert both == highest(b, a)
    for name in ("director", "catalogue"):
        for role in ("root", "timestamp", "snapshot", "targets"):
            values = [getattr(getattr(f, name), role) for f in (a, b)]
            assert getattr(getattr(both, name), role) == max(values)
    assert (both.time_ms, both.owner_epoch) == (
        max(a.time_ms, b.time_ms),
        max(a.owner_epoch, b.owner_epoch),
    )
    for key in {*a.token_counters, *b.token_counters}:
        assert both.token_counters[key] == max(a.token_counters.get(key, 0), b.token_counters.get(key, 0))
    for name in {*a.releases, *b.releases}:
        assert both.releases[name] == max(a.releases.get(name, 0), b.releases.get(name, 0))


@given(one_epoch)
def test_a_copy_that_is_empty_changes_nothing(a: Floors) -> None:
    assert highest(a, Floors()) == a == highest(Floors(), a) == highest(a, a)


@given(one_epoch)
def test_form_in_json_comes_back(a: Floors) -> None:
    assert read_floors(floors_to_json(a)) == a


def test_of_two_epochs_the_one_under_the_newer_root_counts() -> None:
    stolen = Floors(
        Versions(1, 999, 999, 9), Versions(1, 5, 5, 5), 4_000, {("e", "f"): 7}, {"f": 9}, "old", "c"
    )
    renewed = Floors(
        Versions(2, 1, 1, 10), Versions(1, 6, 4, 5), 1_000, {("e", "f"): 6}, {"f": 2}, "new", "c"
    )
    for both in (highest(stolen, renewed), highest(renewed, stolen)):
        assert both.director == renewed.director
        assert (both.time_ms, both.releases, both.director_epoch) == (1_000, {"f": 2}, "new")
        assert both.catalogue == Versions(1, 6, 5, 5)
        # A stolen director can list any counter; the ECU's own stands in any case.
        assert both.token_counters == {("e", "f"): 6}


@pytest.mark.parametrize("role", ["director", "catalogue"])
def test_epochs_that_no_root_orders_are_left_to_the_first(role: str) -> None:
    a = replace(Floors(**{role: Versions(3, 1, 1, 1)}), **{f"{role}_epoch": "a"})  # type: ignore[arg-type]
    b = replace(Floors(**{role: Versions(3, 9, 9, 9)}), **{f"{role}_epoch": "b"})  # type: ignore[arg-type]
    assert getattr(highest(a, b), role) == getattr(a, role)


def test_of_directors_that_no_root_orders_nothing_is_mixed() -> None:
    a, b = (
        Floors(Versions(3, n, n, n), Versions(), n, {("e", "f"): n}, {"f": n}, epoch, "c", n)
        for n, epoch in ((5, "a"), (9, "b"))
    )
    assert highest(a, b) == a
    assert highest(b, a) == b


@given(one_epoch, one_epoch)
def test_a_copy_that_names_no_epoch_is_compared_with_any(a: Floors, b: Floors) -> None:
    nameless = replace(b, director_epoch="", catalogue_epoch="")
    assert highest(a, nameless) == highest(nameless, a) == highest(a, b)


WRITTEN = floors_to_json(
    Floors(Versions(1, 2, 3, 4), Versions(5, 6, 7, 8), 9, {("e", "f"): 1}, {"f": 2}, "x", "y", 3)
)


@pytest.mark.parametrize("value", [-1, -2, 1.0, 1.5, -1.5, True, "1", None, [1]], ids=repr)
@pytest.mark.parametrize("at", ["director", "catalogue", "time_ms", "tokens", "releases", "owner_epoch"])
def test_a_floor_that_is_no_count_is_refused_wherever_it_stands(at: str, value: object) -> None:
    wrong = {
        "director": [1, 2, value, 4],
        "catalogue": [5, 6, 7, value],
        "tokens": [["e", "f", value]],
        "releases": {"f": value},
    }
    with pytest.raises(TypeError):
        read_floors({**WRITTEN, at: wrong.get(at, value)})


@pytest.mark.parametrize("content", [None, [], "", 1, list(WRITTEN)], ids=repr)
def test_what_is_no_table_has_no_floors(content: object) -> None:
    with pytest.raises(TypeError):
        read_floors(content)


@pytest.mark.parametrize("name", WRITTEN)
def test_no_floor_may_be_missing(name: str) -> None:
    with pytest.raises(KeyError):
        read_floors({key: value for key, value in WRITTEN.items() if key != name})


def test_file_is_private_and_gives_back_what_it_was_given(tmp_path: Path) -> None:
    file = FloorsFile(tmp_path / "other partition", VIN)
    assert file.read() is None
    floors = Floors(Versions(1, 2, 3, 4), Versions(5, 6, 7, 8), 9, {("e", "f"): 1}, {"f": 2}, "x", "y", 3)
    file.write(floors)
    assert file.read() == floors
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [f.name for f in file.path.parent.iterdir()] == ["floors.json"]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = FloorsFile(tmp_path / "file" / "floors", VIN)
    with pytest.raises(FloorsError, match=r"floors\.json cannot be written"):
        file.write(Floors())
    with pytest.raises(FloorsError, match=r"floors\.json cannot be read"):
        file.read()
