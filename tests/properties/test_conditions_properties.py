"""Whatever a condition's source and inputs are: an answer, or our error, and unknown is never true."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.errors import ConditionError
from agent.features.conditions import Condition
from agent.model import ConditionSpec, SignalValue

INPUTS = ("Vehicle.Speed", "Vehicle.State")
PIECES = st.sampled_from(
    (
        *INPUTS,
        "Vehicle.Other",
        "x",
        "size",
        "int",
        "string",
        "double",
        ".startsWith",
        "true",
        "false",
        "in",
        "(",
        ")",
        "[",
        "]",
        "!",
        "-",
        "+",
        "*",
        "/",
        "%",
        "<",
        "==",
        "!=",
        "&&",
        "||",
        "?",
        ":",
        ",",
        " ",
        "1",
        "0.5",
        "1e308",
        "9223372036854775807",
        "'ON'",
        "'",
        "`",
        "{",
    )
)
VALUES = st.one_of(st.integers(-(2**64), 2**64), st.floats(), st.text(max_size=5), st.booleans())
SOURCES = st.lists(PIECES, max_size=14).map("".join) | st.text(max_size=40)


@given(SOURCES, VALUES, VALUES)
def test_any_source_ends_in_an_answer_or_an_error_of_ours(
    source: str, speed: SignalValue, state: SignalValue
) -> None:
    try:
        condition = Condition.compile(ConditionSpec(source, INPUTS))
    except ConditionError:
        return
    assert condition.evaluate({"Vehicle.Speed": speed, "Vehicle.State": state}) in (True, False, None)
    assert condition.evaluate({"Vehicle.Speed": speed, "Vehicle.State": None}) is None
    assert condition.evaluate({"Vehicle.State": state}) is None


@given(st.lists(st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-(2**62), 2**62)), max_size=20))
def test_earlier_values_leave_no_trace(values: list[float | None]) -> None:
    condition = Condition.compile(ConditionSpec("Vehicle.Speed < 1.0", ("Vehicle.Speed",)))
    for value in values:
        assert condition.evaluate({"Vehicle.Speed": value}) is (None if value is None else value < 1.0)
