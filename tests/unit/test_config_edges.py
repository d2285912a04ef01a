"""A configuration that is wrong in any way is refused with every reason and its line."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.config import load as load_agent
from common.config import MAX_FILE_BYTES, ConfigError, option, parse, read


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Leaf:
    name: str = option()
    weight: float = option(default=1.0, minimum=0, maximum=10)


@dataclass(frozen=True)
class Branch:
    leaves: tuple[Leaf, ...] = option(default=())
    length: int | None = option(default=None, minimum=1)


@dataclass(frozen=True)
class Tree:
    colour: Colour = option(default=Colour.RED)
    alive: bool = option(default=True)
    soil: Path | None = option(default=None, existing=True)
    branches: tuple[Branch, ...] = option(default=())
    notes: dict[str, str] = option(default=None)
    trunk: Leaf | None = option(default=None)

    def problems(self) -> Iterator[tuple[str, str]]:
        if not self.alive:
            yield "alive", "a tree must live"


def problems(text: str | bytes, kind: type = Tree) -> list[str]:
    raw = text.encode() if isinstance(text, str) else text
    with pytest.raises(ConfigError) as caught:
        parse(raw, Path("/etc/tree.toml"), kind)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return [p.removeprefix("/etc/tree.toml") for p in caught.value.problems]


NESTED = """\
colour = "green"        # 1
bogus = 1
[[branches]]
length = 0              # 4
[[branches.leaves]]
name = 7                # 6
[[branches.leaves]]
name = "b"
weight = 11             # 9
[[branches]]
[[branches.leaves]]     # 11
weight = "heavy"        # 12
[trunk]
"na\\u006de" = "t"
weight = nan            # 15
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_all_problems_come_at_once_with_their_lines(end: str) -> None:
    expected = [
        ":2: bogus: unknown key; known here: alive, branches, colour, notes, soil, trunk",
        ":1: colour: expected one of red, blue; found 'green'",
        ":6: branches[0].leaves[0].name: expected a text, found 7",
        ":9: branches[0].leaves[1].weight: expected at most 10, found 11.0",
        ":4: branches[0].length: expected at least 1, found 0",
        ":12: branches[1].leaves[0].weight: expected a number, found a text ('heavy')",
        ":11: branches[1].leaves[0].name: missing; it is required",
        ":15: trunk.weight: expected a number, found nan",
    ]
    assert sorted(problems(NESTED.replace("\n", end))) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\n'alive' = 3", ":3: alive: expected true or false, found 3"),
        ('\n"al\\u0069ve" = 3', ":2: alive: expected true or false, found 3"),
        ('\n"a b" = 3', ":2: a b: unknown key; known here: alive, branches, colour, notes, soil, trunk"),
        ("\ntrunk . name = 3", ":2: trunk.name: expected a text, found 3"),
        ("\n[ 'trunk' ]  # x\nname = 3", ":3: trunk.name: expected a text, found 3"),
        ("\ntrunk = {name = 3}", ":2: trunk.name: expected a text, found 3"),
        ("\nbranches = [\n {length = 0},\n]", ":2: branches[0].length: expected at least 1, found 0"),
        ("\nbranches = [3]", ":2: branches[0]: expected a table, found 3"),
        ("\nbranches = 3", ":2: branches: expected an array, found 3"),
        ("[trunk]\n", ":1: trunk.name: missing; it is required"),
        ("\ntrunk = 3", ":2: trunk: expected a table, found 3"),
        ("\nnotes = 3", ":2: notes: expected a table, found 3"),
        ("[notes]\n\na = 3", ":3: notes.a: expected a text, found 3"),
        ("\nalive = false", ":2: alive: a tree must live"),
        # A line that only looks like a key or a table.
        (
            '[notes]\na = """\nalive = 1\n[trunk]\n"""\n[trunk]\nname = 1',
            ":7: trunk.name: expected a text, found 1",
        ),
        # Quotes in a comment open no text, and a comment's sign in a text is none.
        ('# """\nalive = 3 # """\n', ":2: alive: expected true or false, found 3"),
        ('# """""\n# ""\n# """"\\p"=""""\nalive = 3', ":4: alive: expected true or false, found 3"),
        ("# '''\nalive = 3\n# '''", ":2: alive: expected true or false, found 3"),
        ('[notes]\na = "#"\nb = 1', ":3: notes.b: expected a text, found 1"),
        ('[notes]\na = """#\\""""""\nb = 1', ":3: notes.b: expected a text, found 1"),
        ("# \u2028 \u0085 \nalive = 3", ":2: alive: expected true or false, found 3"),
        ("colour = ['red']", ":1: colour: expected one of red, blue; found ['red']"),
        ("\n[trunk]\nname='a'\nweight = " + "9" * 400, ":4: trunk.weight: expected a number, found inf"),
        ("[trunk]\nname='a'\nweight = -inf", ":3: trunk.weight: expected a number, found -inf"),
        ("soil = ''", ":1: soil: expected a path, found an empty text"),
        ("soil = 'no/such'", ":1: soil: no such file: '/etc/no/such'"),
        ("soil = '/'", ":1: soil: not a file: '/'"),
        ('soil = "a\\u0000b"', ":1: soil: not a file: '/etc/a\\x00b'"),
    ],
)
def test_each_problem_names_file_line_key_and_what_was_expected(text: str, expected: str) -> None:
    assert expected in problems(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nalive = true\nalive = true", ":3: not TOML: Cannot overwrite a value"),
        ("[trunk]\n[trunk]", ":2: not TOML: Cannot declare"),
        ("a = ", ":1: not TOML: Invalid value"),
        ("a = 'x", ":1: not TOML: "),
        (b"\xff", ": not UTF-8 at byte 0"),
        ("a = " + "1" * 5000, ": not TOML: "),
        ("a = " + "[" * 5000, ": not TOML: "),
        (b"#" * (MAX_FILE_BYTES + 1), f": it has more than {MAX_FILE_BYTES} bytes, the limit"),
    ],
)
def test_what_is_not_toml_is_refused_with_its_line(text: str | bytes, expected: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith(expected)


def test_paths_that_the_system_refuses_are_problems(tmp_path: Path) -> None:
    assert "cannot be used" in problems("soil = '" + "x" * 5000 + "'")[0]
    assert "cannot be used" in problems("soil = '~nobody-of-that-name/x'")[0]


def test_long_values_are_not_repeated_whole() -> None:
    (problem,) = problems(f"alive = '{'x' * 100_000}'")
    assert len(problem) < 200


def test_missing_file_folder_and_endless_file_are_refused(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "more than"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(path, Tree)


def test_paths_start_at_the_files_folder(tmp_path: Path) -> None:
    (tmp_path / "soil.txt").write_text("")
    (tmp_path / "tree.toml").write_text("soil = 'soil.txt'\n[[branches]]\nlength = 3\n[notes]\na = 'b'\n")
    tree = read(tmp_path / "tree.toml", Tree)
    assert (tree.soil, tree.branches, tree.notes) == (tmp_path / "soil.txt", (Branch((), 3),), {"a": "b"})


# --- agent.toml --------------------------------------------------------------------

AGENT = """\
[vehicle]
vin = "WFDSEAT10N000000I"
listen = true
[cloud]
endpoint = "127.0.0.1:70000"
enrolment_endpoint = "localhost:٣"
root_ca = "none.crt"
[trust]
director_root = 3
catalogue_root = "."
[state]
directory = "state"
[[buses]]
name = "body"
interface = "virtual"
channel = "x"
database = "agent.toml"
[[buses]]
name = "Body"
interface = "virtual"
channel = "x"
bitrate = 1
"""


def test_agent_file_says_everything_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text(AGENT)
    with pytest.raises(ConfigError) as caught:
        load_agent(path)
    found = {
        p.removeprefix(f"{path}:").split(": ")[0] + " " + p.split(": ")[1] for p in caught.value.problems
    }
    assert found >= {
        "2 vehicle.vin",
        "3 vehicle.listen",
        "6 cloud.enrolment_endpoint",
        "7 cloud.root_ca",
        "9 trust.director_root",
        "10 trust.catalogue_root",
        "8 trust.receipt_key",
        "17 buses[0].database",
        "19 buses[1].name",
        "22 buses[1].bitrate",
    }


def test_agent_file_checks_ports_names_and_that_there_is_a_bus(tmp_path: Path) -> None:
    for name in ("ca", "d", "c", "r"):
        (tmp_path / name).write_text("")
    head = (
        '[vehicle]\nvin = "WFDSEAT10N0000001"\n[cloud]\nendpoint = "h:0"\nenrolment_endpoint = "h:65536"\n'
        'root_ca = "ca"\n[trust]\ndirector_root = "d"\ncatalogue_root = "c"\nreceipt_key = "r"\n'
        '[state]\ndirectory = "s"\n'
    )
    bus = '[[buses]]\nname = "body"\ninterface = "virtual"\nchannel = "x"\n'
    path = tmp_path / "agent.toml"

    def lines(text: str) -> list[str]:
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_agent(path)
        return [p.removeprefix(f"{path}") for p in caught.value.problems]

    assert lines(head + bus) == [
        ":4: cloud.endpoint: expected a port of 1 to 65535, found 0",
        ":5: cloud.enrolment_endpoint: expected a port of 1 to 65535, found 65536",
    ]
    good = head.replace("h:0", "h:1").replace("h:65536", "h:65535")
    assert lines(good + bus + bus) == [":18: buses[1].name: 'body' names two buses"]
    assert lines("buses = []\n" + good) == [":1: buses: at least one bus is needed"]
    path.write_text(good + bus)
    config = load_agent(path)
    assert isinstance(config, AgentConfig)
    assert config.vehicle.listen_only
    assert config.api_socket == tmp_path / "s" / "agent.sock"
