"""The documentation says what the code does: links, commands, tables, tests and the diagram."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import agent.__main__
import cloud.__main__
import firmware_sim.__main__
import keys.__main__
from agent.config import AgentConfig
from agent.features.lifecycle import diagram
from cloud.config import CloudConfig
from keys.lint import Reading

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {"run", "dist", "node_modules", "__pycache__"}
PARSERS: Mapping[str, argparse.ArgumentParser] = {
    "fod-agent": agent.__main__._parser(),
    "fod-cloud": cloud.__main__._parser(),
    "fod-keys": keys.__main__._parser(),
    "fod-sim": firmware_sim.__main__._parser(),
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
CODE_NAME = re.compile(r"`([A-Za-z_]\w*)`")
MAKE = re.compile(r"(?<![\w-])make ([a-z][a-z-]*)((?: [A-Z]+=)?)")


def _pages() -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(f for f in folders if f not in NOT_OURS and not f.startswith("."))
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".md")]
    return found


PAGES = _pages()
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@cache
def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _prose(page: Path) -> str:
    return FENCE.sub("", _text(page))


@cache
def _anchors(page: Path) -> frozenset[str]:
    """Anchors as GitHub makes them from headings."""
    words = (re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()) for h in HEADING.findall(_prose(page)))
    return frozenset(w.strip().replace(" ", "-") for w in words)


def _links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Text, file and anchor of each link that stays in this repository."""
    for text, target in LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        yield text, (page.parent / path).resolve() if path else page, anchor


@cache
def _defines(file: Path, name: str) -> bool:
    pattern = rf"^\s*(?:(?:async )?def|class) {name}\b|^{name}\b.*="
    return re.search(pattern, _text(file), re.MULTILINE) is not None


def _code(page: Path) -> Iterator[tuple[str, bool]]:
    """Each line of code blocks that are no data, and each inline code; and whether it is inline."""
    for language, block in FENCE.findall(_text(page)):
        if language in {"", "sh", "console"}:
            for line in block.replace("\\\n", " ").splitlines():
                yield line.strip().removeprefix("$ "), False
    for code in INLINE.findall(_prose(page)):
        yield code, True


def _subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return typing.cast("Mapping[str, argparse.ArgumentParser]", action.choices)
    return {}


def _names_a_command(words: list[str]) -> bool:
    """True for the name of a program or command, without its arguments."""
    parser = PARSERS[words[0]]
    for word in words[1:]:
        if word not in _subcommands(parser):
            return False
        parser = _subcommands(parser)[word]
    return True


def _section(page: str, heading: str) -> str:
    _, _, rest = _text(ROOT / page).partition(f"\n{heading}\n")
    assert rest, f"{page} has no heading {heading!r}"
    level = heading.split(" ", maxsplit=1)[0]
    return re.split(rf"^{level[0]}{{1,{len(level)}}} ", rest, flags=re.MULTILINE)[0]


def _rows(section: str) -> list[list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def _keys(kind: type, prefix: str = "") -> dict[str, str]:
    """Each key of a configuration file with its default, written as in TOML."""
    hints = typing.get_type_hints(kind)
    found: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= _keys(hint, f"{prefix}{field.name}.")
            continue
        default = field.default
        if default is dataclasses.MISSING:
            written = "required"
        elif default is None:
            written = "none"
        elif isinstance(default, bool):
            written = f"`{str(default).lower()}`"
        elif default == ():
            written = "`[]`"
        else:
            written = f'`"{default}"`' if isinstance(default, str) else f"`{default}`"
        found[prefix + field.name] = written
    return found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    wrong = []
    for text, file, anchor in _links(page):
        if not file.is_relative_to(ROOT) or not file.exists():
            wrong.append(f"{text}: no such file: {file}")
        elif anchor and (file.suffix != ".md" or anchor not in _anchors(file)):
            wrong.append(f"{text}: {file.name} has no heading for #{anchor}")
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_name_that_links_to_code_is_defined_there(page: Path) -> None:
    named = [(m[1], file) for text, file, _ in _links(page) if (m := CODE_NAME.fullmatch(text))]
    wrong = [f"{name}: not in {file.name}" for name, file in named if not _defines(file, name)]
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_line_is_one_that_the_program_takes(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for line, is_inline in _code(page):
        if line.split(" ")[0] not in PARSERS:
            continue
        words = shlex.split(line, comments=True)
        if is_inline and _names_a_command(words):
            continue
        try:
            PARSERS[words[0]].parse_args(words[1:])
        except SystemExit as error:
            if error.code != 0:  # 0: --help and --version
                wrong.append(f"{line}: {capsys.readouterr().err.splitlines()[-1]}")
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_make_target_and_variable_is_in_the_makefile(page: Path) -> None:
    makefile = _text(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    variables = set(re.findall(r"\b([A-Z]+)(?:\b|:-)", makefile))
    wrong = []
    for line, _ in _code(page):
        for target, variable in MAKE.findall(line):
            if target not in targets or variable.strip(" =") not in variables | {""}:
                wrong.append(line)
    assert not wrong, wrong


def test_the_lifecycle_diagram_is_the_table() -> None:
    found = re.search(
        r"<!-- lifecycle -->\n```mermaid\n(.*?)\n```\n<!-- /lifecycle -->",
        _text(ROOT / "docs/lifecycle.md"),
        re.DOTALL,
    )
    assert found
    assert found[1] == diagram(), "put the output of python -m agent.features.lifecycle between the markers"


@pytest.mark.parametrize(
    ("heading", "kind"), [("### agent.toml", AgentConfig), ("### cloud.toml", CloudConfig)]
)
def test_the_configuration_tables_hold_every_key_with_its_default(heading: str, kind: type) -> None:
    rows = _rows(_section("README.md", heading))
    assert {row[0].strip("`"): row[1] for row in rows} == _keys(kind)
    assert len(rows) == len(_keys(kind)), "a key stands twice"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_toml_example_holds_only_known_keys(page: Path) -> None:
    known = _keys(AgentConfig).keys() | _keys(CloudConfig).keys()
    known |= {f"reading.{field.name}" for field in dataclasses.fields(Reading)}
    for language, block in FENCE.findall(_text(page)):
        if language != "toml":
            continue
        for table, content in tomllib.loads(block).items():
            for part in content if isinstance(content, list) else [content]:
                unknown = {f"{table}.{key}" for key in part} - known
                assert not unknown, f"{page.name}: {unknown}"


def test_every_threat_names_a_test() -> None:
    rows = _rows(_section("README.md", "## Threats and the tests that try them"))
    assert len(rows) > 10
    for row in rows:
        tests = LINK.findall(row[2])
        assert tests, f"no test: {row[0]}"
        for text, target in tests:
            name = text.strip("`")
            assert name.startswith("test_"), text
            assert target.startswith("tests/"), target
            assert _defines(ROOT / target, name), f"{name} is not in {target}"
