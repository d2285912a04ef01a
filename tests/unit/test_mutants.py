"""The mutation tool changes what it says it changes, and its list names changes that exist."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest
from support.trust_repo import SEAT, feature_file
from tools import mutants
from tools.mutants import LISTED, ListedFile, Module

from agent.trust.verifier import parse_known_feature
from common.config import read

SOURCE = '''
"""Text for people."""
LIMIT = 4
FIRST = 1

def check(found: int, limit: int = LIMIT) -> str:
    """Text for people."""
    if not 0 < found <= limit or limit == 7 * FIRST:
        raise ValueError(f"found {found}, expected 1 to {limit}")
    for known in {"a": 1, "b": 2}.values():
        if known == found:
            continue
        report(known, found, loud=True)
    return "taken"

def other() -> int:
    return FIRST
'''


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    (tmp_path / "small.py").write_text(SOURCE)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    return Module("small.py")


def codes(code: CodeType) -> Iterator[bytes]:
    yield code.co_code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)
        else:
            yield repr(constant).encode()
    yield repr((code.co_names, code.co_varnames)).encode()


def test_every_kind_of_change_is_found_once(small: Module) -> None:
    found = [mutant.change for mutant in small.mutants]
    assert len({mutant.key for mutant in small.mutants}) == len(found)
    for expected in (
        "LIMIT = 4 → LIMIT = 5",
        "LIMIT = 4 → LIMIT = 3",
        "not 0 < found <= limit or limit == 7 * FIRST → not 0 < found <= limit and limit == 7 * FIRST",
        "not 0 < found <= limit or limit == 7 * FIRST → limit == 7 * FIRST",
        "not 0 < found <= limit or limit == 7 * FIRST → not 0 < found <= limit",
        "not 0 < found <= limit → bool(0 < found <= limit)",
        "0 < found <= limit → 0 <= found <= limit",
        "0 < found <= limit → 0 < found < limit",
        "0 < found <= limit → 1 < found <= limit",
        "limit == 7 * FIRST → limit != 7 * FIRST",
        "7 * FIRST → 8 * FIRST",
        "raise ValueError(f'found {found}, expected 1 to {limit}') → pass",
        "{'a': 1, 'b': 2} → {'a~': 1, 'b': 2}",
        "{'a': 1, 'b': 2} → {'a': 1, 'b': 3}",
        "continue → pass",
        "continue → break",
        "report(known, found, loud=True) → pass",
        "report(known, found, loud=True) → report(found, known, loud=True)",
        "report(known, found, loud=True) → report(known, loud=True)",
        "report(known, found, loud=True) → report(known, found)",
        "loud=True → loud=False",
    ):
        assert found.count(expected) == 1, expected
    assert not [change for change in found if "people" in change or "~found" in change]


def test_each_mutant_differs_from_the_module_and_leaves_it_as_it_was(small: Module) -> None:
    original = list(codes(compile(ast.parse(SOURCE), "small.py", "exec")))
    for mutant in small.mutants:
        assert list(codes(small.compile(mutant))) != original, mutant.key
    assert list(codes(compile(small._tree, "small.py", "exec"))) == original


def test_where_a_mutant_stands_says_which_tests_may_notice_it(small: Module) -> None:
    by_change = {mutant.change: mutant for mutant in small.mutants}
    limit = by_change["LIMIT = 4 → LIMIT = 5"]
    assert (limit.function, limit.lines[0]) == ("", 3)
    assert small.uses(limit) is None  # a default uses it, at import
    first = by_change["FIRST = 1 → FIRST = 2"]
    assert small.uses(first) == ("FIRST", {8, 17})
    inside = by_change["limit == 7 * FIRST → limit != 7 * FIRST"]
    assert (inside.function, inside.lines) == ("check", (8, 8, 8))


def test_no_test_gets_what_a_cached_function_returned_to_another() -> None:
    parse_known_feature(feature_file(SEAT, 1))
    assert parse_known_feature.cache_info().currsize > 0
    mutants._empty_caches()
    assert parse_known_feature.cache_info().currsize == 0


def test_every_listed_survivor_is_a_change_that_can_be_made() -> None:
    listed = read(LISTED, ListedFile).survivors
    known = {mutant.key for file in {entry.file for entry in listed} for mutant in Module(file).mutants}
    assert [entry.key for entry in listed if entry.key not in known] == []
    assert len({entry.key for entry in listed}) == len(listed)


def test_every_module_has_tests_that_may_notice() -> None:
    for file in mutants.MODULES:
        assert mutants.tests_of(file), file
