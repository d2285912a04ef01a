"""A condition is true only when all it reads is known and says so."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
from support.signals_data import REPOSITORY, entry, feed, small_database, table_of

from agent.errors import ConditionError
from agent.features.conditions import MAX_DEPTH, MAX_EXPRESSION_CHARS, MAX_INPUTS, Condition
from agent.model import ConditionSpec, Frame, SignalValue
from agent.signals.state import Collector, SignalState

SPEED = "Vehicle.Speed"
IGNITION = "Vehicle.LowVoltageSystemState"


def compiled(expression: str, *inputs: str) -> Condition:
    return Condition.compile(ConditionSpec(expression, inputs))


@pytest.mark.parametrize(
    ("expression", "values", "expected"),
    [
        ("Vehicle.Speed < 1.0", {SPEED: 0.5}, True),
        ("Vehicle.Speed < 1.0", {SPEED: 1.0}, False),
        ("Vehicle.Speed < 1.0", {SPEED: 0}, True),
        ("Vehicle.Speed > 0", {SPEED: 99.0}, True),
        ("Vehicle.Speed < 1.0", {SPEED: None}, None),
        ("Vehicle.Speed < 1.0", {}, None),
        ("Vehicle.Speed < 1.0", {SPEED: "fast"}, None),
        ("Vehicle.Speed < 1.0", {SPEED: float("nan")}, None),
        ("!(Vehicle.Speed < 1.0)", {SPEED: None}, None),
        ("true || Vehicle.Speed < 1.0", {}, None),
        ("Vehicle.Speed", {SPEED: 1.0}, None),
        ("Vehicle.Speed / 0 > 1", {SPEED: 1}, None),
        ("Vehicle.Speed + 1.5 > 2.0", {SPEED: 1.0}, True),
        ("double(Vehicle.Speed) + 1.5 > 2.0", {SPEED: 1}, True),
        ("Vehicle.Speed in [1, 2]", {SPEED: 2}, True),
        ("Vehicle.Speed > 5.0 ? false : true", {SPEED: 1.0}, True),
        ("Vehicle.Speed == 'a.b < Vehicle.Other'", {SPEED: "a.b < Vehicle.Other"}, True),
        ('Vehicle.Speed.startsWith("O")', {SPEED: "ON"}, True),
        ("size(Vehicle.Speed) == 2", {SPEED: "ON"}, True),
        ("Vehicle.Speed > 0", {SPEED: 2**70}, True),
    ],
)
def test_evaluation(expression: str, values: dict[str, SignalValue | None], expected: object) -> None:
    assert compiled(expression, SPEED).evaluate(values) is expected


def test_a_condition_without_inputs_is_evaluated() -> None:
    assert compiled("true").evaluate({}) is True
    assert compiled("1 < 0").evaluate({SPEED: 1.0}) is False


def test_any_unknown_input_makes_the_whole_unknown() -> None:
    condition = compiled("Vehicle.Speed < 1.0 && Vehicle.LowVoltageSystemState == 'ON'", SPEED, IGNITION)
    assert condition.evaluate({SPEED: 0.0, IGNITION: "ON"}) is True
    assert condition.evaluate({SPEED: 0.0, IGNITION: None}) is None
    assert condition.evaluate({SPEED: 0.0}) is None
    assert condition.evaluate({SPEED: 0.0, IGNITION: "ON"}) is True
    assert condition.evaluate({SPEED: 9.0, IGNITION: "ON"}) is False
    assert condition.evaluate({SPEED: 9.0, IGNITION: None}) is None


def test_an_input_that_is_a_part_of_another_is_a_signal_of_its_own() -> None:
    condition = compiled("Vehicle.Speed < Vehicle.Speed.Limit", SPEED, "Vehicle.Speed.Limit")
    assert condition.evaluate({SPEED: 1.0, "Vehicle.Speed.Limit": 2.0}) is True


@pytest.mark.parametrize(
    "expression",
    [
        "Vehicle.Spee < 1.0",
        "Vehicle < 1",
        "Vehicle['Speed'] < 1.0",
        "Speed < 1.0",
        "v0 < 1.0",
        "true || Vehicle.Other",
        "Vehicle.Speed.Other < 1.0",
        ".Vehicle.Speed < 1.0",
        "has(Vehicle.Speed)",
        "[1].exists(x, x == 1)",
        "now() > 1",
        "Vehicle.Speed.matches('.*')",
        "Vehicle.Speed < 1.0 // always",
        "Vehicle.Speed < 1.0 \\ 2",
        "Vehicle.Speed == r'ON'",
        "Vehicle.Speed == 'O\\x4e'",
        "{'a': 1} == Vehicle.Speed",
        "null == Vehicle.Speed",
        "Vehicle.Speed <",
        "",
        "in",
        "1 ** 2",
        "(Vehicle.Speed < 1.0",
    ],
)
def test_what_is_not_in_the_language_is_refused(expression: str) -> None:
    with pytest.raises(ConditionError):
        compiled(expression, SPEED)


def test_an_undeclared_name_is_named() -> None:
    with pytest.raises(ConditionError, match=r"reads Vehicle\.Other; declared inputs: Vehicle\.Speed"):
        compiled("Vehicle.Speed < Vehicle.Other", SPEED)


def test_limits_are_exact() -> None:
    source = "true" + " " * (MAX_EXPRESSION_CHARS - 4)
    assert compiled(source).evaluate({}) is True
    with pytest.raises(ConditionError, match="the limit is 1024"):
        compiled(source + " ")
    names = tuple(f"Vehicle.S{i}" for i in range(MAX_INPUTS))
    assert compiled("true", *names).evaluate(dict.fromkeys(names, 1)) is True
    with pytest.raises(ConditionError, match="33 inputs; the limit is 32"):
        compiled("true", *names, "Vehicle.More")
    assert compiled("(" * MAX_DEPTH + "true" + ")" * MAX_DEPTH).evaluate({}) is True
    with pytest.raises(ConditionError, match="nested deeper than 16"):
        compiled("(" * (MAX_DEPTH + 1) + "true" + ")" * (MAX_DEPTH + 1))


@pytest.mark.parametrize("name", ["", "Vehicle.", "true + x", "Vehicle Speed", "véhicule"])
def test_an_input_that_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConditionError, match="is not a VSS name"):
        compiled("true", name)


def test_every_condition_of_the_demonstration_compiles() -> None:
    found = 0

    def walk(node: object) -> None:
        nonlocal found
        if isinstance(node, dict):
            if "when" in node:
                Condition.compile(ConditionSpec(node["when"], tuple(node["inputs"])))
                found += 1
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    for path in (REPOSITORY / "deploy" / "demo" / "catalogue" / "features").rglob("*.toml"):
        walk(tomllib.loads(path.read_text()))
    assert found >= 6


def test_a_stale_signal_never_makes_a_condition_true() -> None:
    mapping = [entry(SPEED, "SPEEDS", "SPEED", max_age_ms=500)]
    collector = Collector({"b": table_of(small_database(), *mapping)})
    state = SignalState(collector.infos)
    stands, moves = compiled("Vehicle.Speed < 1.0", SPEED), compiled("!(Vehicle.Speed < 1.0)", SPEED)

    def evaluated(condition: Condition, now_ns: int) -> bool | None:
        return condition.evaluate({SPEED: state.value(SPEED, now_ns)})

    assert evaluated(stands, 0) is None
    feed(collector, Frame("b", 256, bytes(8), monotonic_ns=1_000_000))
    state.apply(collector.drain())
    assert evaluated(stands, 500_999_999) is True
    assert evaluated(stands, 501_000_000) is None
    assert evaluated(moves, 501_000_000) is None


def test_the_evaluator_is_loaded_without_its_command_line() -> None:
    code = (
        "import sys; import agent.features.conditions; "
        "bad = {'cel', 'cel.cli', 'typer', 'rich', 'click', 'prompt_toolkit'} & set(sys.modules); "
        "assert not bad, bad; import cel; assert cel.evaluate('1 + 1') == 2"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=30)
