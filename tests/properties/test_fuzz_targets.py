"""Every parser of bytes from outside takes genuine inputs; damaged ones end in an error of ours, in time.

The targets are those of `make fuzz`; here each gets a sample of damaged genuine inputs and of noise.
"""

from __future__ import annotations

import functools
import time

import pytest
from fuzz.registry import TARGETS
from fuzz.run import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

load()

MAX_INPUT_S = 5.0
"""Processor time for one input, all threads together."""
JUNK = st.sampled_from(
    [
        b"\x00",
        b"\xff" * 9,
        b"\x80" * 6,
        b'"',
        b"[" * 100,
        b"{" * 100,
        b"\n",
        b"=",
        b"<",
        b">",
        b"9" * 400,
        b"\xd2\x84",
    ]
)


@functools.cache
def corpus(name: str) -> list[bytes]:
    """Genuine inputs of a target, made once."""
    return list(TARGETS[name].seeds())


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """A genuine input with a few changes, or noise."""
    seeds = corpus(name)
    content = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut", "drop", "junk", "repeat", "splice"])):
            case "flip":
                content[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + draw(st.integers(1, 20))]
            case "junk":
                content[at:at] = draw(JUNK)
            case "repeat":
                content[at:at] = content[max(0, at - draw(st.integers(1, 40))) : at]
            case _:
                other = draw(st.sampled_from(seeds))
                content[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(content[: TARGETS[name].max_bytes])


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_genuine_inputs_are_taken(name: str) -> None:
    target = TARGETS[name]
    for _ in range(2):  # whatever was run before, here or by another test, left them genuine
        seeds = list(target.seeds())
        assert seeds
        assert [target.run(seed) for seed in seeds] == [True] * len(seeds)


@pytest.mark.parametrize("name", sorted(TARGETS))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_inputs_end_in_an_error_of_ours_and_in_time(name: str, data: st.DataObject) -> None:
    content = data.draw(damaged(name))
    begun_s = time.process_time()
    assert TARGETS[name].run(content) in (True, False)
    assert time.process_time() - begun_s < MAX_INPUT_S


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize(
    "unit", [b"\x00", b"[", b"{", b"\xff", b"\x22", b"\n", b"a=", b"<a>", b"\x81", b"\xa1\x01"]
)
def test_endless_repetition_ends_in_time(name: str, unit: bytes) -> None:
    target = TARGETS[name]
    begun_s = time.process_time()
    assert target.run((unit * target.max_bytes)[: target.max_bytes]) in (True, False)
    assert time.process_time() - begun_s < MAX_INPUT_S
