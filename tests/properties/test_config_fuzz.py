"""Any bytes and any TOML end in a configuration or in a ConfigError with lines, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import AgentConfig
from common.config import ConfigError, parse

PATH = Path("/nowhere/agent.toml")
TABLES = ["vehicle", "cloud", "trust", "state", "buses", "metering", "log", "x"]
KEYS = [
    "vin",
    "listen_only",
    "endpoint",
    "root_ca",
    "directory",
    "name",
    "checkpoint_s",
    "level",
    "speed",
    "y",
]

values = st.recursive(
    st.one_of(
        st.booleans().map(lambda v: str(v).lower()),
        st.integers().map(str),
        st.integers(10**300, 10**400).map(str),
        st.floats().map(str),
        st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=30).map(json.dumps),
        st.sampled_from(["1979-05-27", "'h:1'", '"""\nvin = 1\n"""', "nan", '"~x/y"', '"\\u0000"']),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda v: "[" + ", ".join(v) + "]"),
        inner.map(lambda v: f"{{name = {v}}}"),
    ),
    max_leaves=4,
)
lines = st.one_of(
    st.sampled_from(TABLES).map("[{}]".format),
    st.sampled_from(TABLES).map("[[{}]]".format),
    st.builds("{} = {}".format, st.sampled_from(KEYS + TABLES), values),
    st.builds('"{}".{} = {}'.format, st.sampled_from(TABLES), st.sampled_from(KEYS), values),
    st.sampled_from(["", "# note", "[ 'a b' . c ]"]),
)


def check(raw: bytes) -> None:
    # No text of these strategies is a whole configuration: every one has a problem.
    with pytest.raises(ConfigError) as caught:
        parse(raw, PATH, AgentConfig)
    count = raw.count(b"\n") + 1
    assert caught.value.problems
    for problem in caught.value.problems:
        place = re.match(r"/nowhere/agent\.toml(?::(\d+))?: .", problem)
        assert place, problem
        assert place[1] is None or 1 <= int(place[1]) <= count


@settings(max_examples=300, deadline=None)
@given(st.lists(lines, max_size=12).map("\n".join))
def test_any_toml_is_read_or_refused(text: str) -> None:
    check(text.encode())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(raw: bytes) -> None:
    check(raw)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_text_is_refused_or_read(raw: bytes) -> None:
    check(raw)
