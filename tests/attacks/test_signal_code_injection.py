"""Databases, mappings and stored tables that try to become code, or to make wrong code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cantools.database.can import Message, Signal
from cantools.database.conversion import BaseConversion
from cantools.database.namedsignalvalue import NamedSignalValue
from support.signals_data import DEMO_SIGNALS, decoded, simulated_database, table_of

from agent.errors import DatabaseError
from agent.signals import mapping, table
from agent.signals.compiler import compile_table
from agent.signals.database import SignalDatabase
from agent.signals.decoder import decoder, taker
from agent.signals.mapping import MappingEntry
from agent.signals.table import BitField, Conversion, MessageRow, SignalRow, Table

HOSTILE = (
    "__import__('os').system('touch {path}')",
    "'); __import__('pathlib').Path('{path}').touch(); ('",
    '\\")\n    open("{path}", "w")\n#',
    "x\n import os",
    "{{}}%s\0",
)


@pytest.mark.parametrize("form", HOSTILE)
def test_names_and_texts_never_become_code(form: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    text = form.format(path=touched)
    choices = OrderedDict[int, str | NamedSignalValue]({0: text, 1: "plain"})
    signal = Signal(
        text,
        0,
        8,
        conversion=BaseConversion.factory(1, 0, choices, is_float=False),
        unit=text,
    )
    selector = Signal(f"{text}M", 8, 8, is_multiplexer=True)
    inside = Signal(f"{text}S", 16, 8, multiplexer_ids=[1], multiplexer_signal=f"{text}M")
    message = Message(1, text, 4, [signal, selector, inside], strict=False)
    database = SignalDatabase(Path(text.replace("\0", "")), {text: message})
    entries = (
        MappingEntry(f"{text}.a", text, text, 1000, unit=text, text=True),
        MappingEntry(f"{text}.b", text, f"{text}S", 1000),
        MappingEntry(f"{text}.c", text, text, 1000, mapping=((text, text), ("plain", f"{text}2"))),
    )
    made = table_of(database, *entries)
    row = table.from_bytes(table.to_bytes(made, "k"), "k").messages[0]
    assert decoded(row, bytes([0, 1, 7, 0])) == {f"{text}.a": text, f"{text}.b": 7, f"{text}.c": text}
    assert decoded(row, bytes([1, 0, 7, 0])) == {f"{text}.a": "plain", f"{text}.c": f"{text}2"}
    assert not touched.exists()


def row_with(bits: BitField, conversion: Conversion) -> MessageRow:
    return MessageRow("M", 1, False, 8, (SignalRow("A.B", "", 1.0, 1000, 0, bits, (), conversion),))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["messages"][0].update(length="8); import os; ("),
        lambda body: body["messages"][0].update(length=8.0),
        lambda body: body["messages"][0].update(length=True),
        lambda body: body["messages"][0].update(length=0),
        lambda body: body["messages"][0].update(length=65),
        lambda body: body["messages"][0].update(can_id=0x800),
        lambda body: body["messages"][0].update(can_id=-1),
        lambda body: body["messages"][0].update(counter_modulus=0),
        lambda body: body["messages"][0].update(any_source=True),
        lambda body: body["messages"][0].update(extra=1),
        lambda body: body["messages"][0].pop("name"),
        lambda body: body["messages"][0]["check"].update(scheme="__import__('os')"),
        lambda body: body["messages"][0]["check"].update(offset=64),
        lambda body: body["messages"].append(body["messages"][0]),
        lambda body: body["messages"][0]["signals"].clear(),
        lambda body: body["messages"][0]["signals"][0].update(max_age_ms=0),
        lambda body: body["messages"][0]["signals"][0]["bits"].update(shift="0 or exit()"),
        lambda body: body["messages"][0]["signals"][0]["bits"].update(shift=-1),
        lambda body: body["messages"][0]["signals"][0]["bits"].update(shift=10**30),
        lambda body: body["messages"][0]["signals"][0]["bits"].update(length=0),
        lambda body: body["messages"][0]["signals"][0]["bits"].update(is_float=True, length=24),
        lambda body: body["messages"][0]["signals"][0]["conversion"].update(scale="1"),
        lambda body: body["messages"][0]["signals"][0]["conversion"].update(scale=1e300),
        lambda body: body["messages"][0]["signals"][0]["conversion"].update(scale=10**400),
        lambda body: body["messages"][0]["signals"][0]["conversion"].update(math=["x", "system"]),
        lambda body: body["messages"][0]["signals"][0]["conversion"].update(by_raw=[["0", 1]]),
        lambda body: body["messages"][0]["signals"][0].update(selectors=[{"bits": None, "ids": []}]),
        lambda body: body.update(notes=[["a"]]),
    ],
)
def test_a_stored_table_of_anything_else_than_checked_values_is_refused(
    change: Callable[[Any], object],
) -> None:
    database = simulated_database()
    made = compile_table(database, mapping.read(DEMO_SIGNALS.read_bytes(), DEMO_SIGNALS, database))
    body = json.loads(json.dumps(dataclasses.asdict(made)))
    change(body)
    content = json.dumps(body).encode()
    head = f"openfod-signals k {hashlib.sha256(content).hexdigest()}\n".encode()
    with pytest.raises(DatabaseError):
        table.from_bytes(head + content, "k")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"NaN", b'{"messages": 1e999}'])
def test_a_stored_table_that_is_no_table_is_refused(content: bytes) -> None:
    head = f"openfod-signals k {hashlib.sha256(content).hexdigest()}\n".encode()
    with pytest.raises(DatabaseError):
        table.from_bytes(head + content, "k")


@pytest.mark.parametrize(
    ("bits", "conversion"),
    [
        (BitField(0, 64, False, True, False), Conversion(scale=10**59, offset=-(10**59))),
        (BitField(0, 64, True, False, False), Conversion(scale=1e60, factor=1e60, shift=-1e60)),
        (BitField(0, 64, False, False, True), Conversion(scale=1e60, factor=1e60)),
        (BitField(0, 64, False, False, False), Conversion(math=("x", 1e30, "^"))),
    ],
)
def test_the_largest_numbers_overflow_nothing(bits: BitField, conversion: Conversion) -> None:
    row = row_with(bits, conversion)
    for payload in (bytes(8), b"\xff" * 8, b"\x00" * 7 + b"\x80", b"\xef\xff\xff\xff\xff\xff\xef\x7f"):
        decoder(row)(payload)
        take = taker(row)
        if take is not None:
            take(payload, 1, None, [None], lambda _: None)


def test_a_table_has_an_end() -> None:
    signal = SignalRow("A.B", "", 1.0, 1000, 0, BitField(0, 8, False, False, False), (), Conversion())
    with pytest.raises(DatabaseError, match="more than"):
        Table((MessageRow("M", 1, False, 8, (signal,) * (table.MAX_SIGNALS + 1)),))
