"""Any frame decodes as cantools decodes it; no change is missed; any text of a database ends well."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import cantools.database
from cantools.database.can import Message, Signal
from cantools.database.conversion import BaseConversion
from cantools.database.namedsignalvalue import NamedSignalValue
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.signals_data import (
    SIMULATED_DBC,
    SMALL_DBC,
    data_folder,
    decoded,
    load,
    map_all,
    simulated_database,
    small_database,
    table_of,
)

from agent.errors import DatabaseError
from agent.model import SignalValue
from agent.signals.database import SignalDatabase, parse
from agent.signals.state import Collector, SignalState
from agent.signals.table import CAN_EFF_FLAG, MessageRow, Table


def reference(message: Message, payload: bytes) -> Mapping[str, object] | None:
    """What cantools reads; None where it refuses the message for a multiplexer value that is not listed."""
    try:
        values = message.decode(payload, decode_choices=False)
    except cantools.database.DecodeError:
        return None
    assert isinstance(values, dict)
    return {
        f"{message.name}.{name}": value
        for name, value in values.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


def assert_same(row: MessageRow, message: Message, payload: bytes) -> None:
    expected = reference(message, payload)
    if expected is None:
        return
    found = {name: value for name, value in decoded(row, payload).items() if value is not None}
    assert {n: (v, type(v)) for n, v in found.items()} == {n: (v, type(v)) for n, v in expected.items()}


# --- every frame against cantools ------------------------------------------------


@functools.cache
def everything() -> tuple[SignalDatabase, Table]:
    small, simulated = small_database(), simulated_database()
    database = SignalDatabase(Path("both"), {**small.messages, **simulated.messages})
    return database, table_of(database, *map_all(database))


@functools.cache
def published() -> tuple[tuple[MessageRow, Message], ...]:
    """Every message of every public database, those of one identifier included."""
    folder = data_folder()
    found = []
    for path in sorted((*folder.rglob("*.dbc"), *folder.rglob("*.kcd"))):
        database = load(path)
        for message in database.messages.values():
            one = SignalDatabase(path, {message.name: message})
            if entries := map_all(one):
                found.append((table_of(one, *entries).messages[0], message))
    assert len(found) > 400
    return tuple(found)


@given(st.data())
def test_any_payload_decodes_as_cantools_decodes_it(data: st.DataObject) -> None:
    database, table = everything()
    row = data.draw(st.sampled_from(table.messages), label="message")
    payload = data.draw(st.binary(min_size=row.length, max_size=row.length), label="payload")
    assert_same(row, database.messages[row.name], payload)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**64))
def test_any_payload_of_any_public_database_decodes_as_cantools_decodes_it(seed: int) -> None:
    random = Random(seed)
    for row, message in published():
        assert_same(row, message, random.randbytes(row.length))


SCALES = st.one_of(
    st.sampled_from([1, 2, -3, 0.5, 1.0, 0.01, -0.1, 0.0039215686, 1e-9, 0]),
    st.floats(-1e6, 1e6, allow_nan=False),
    st.integers(-(2**40), 2**40),
)


@st.composite
def signals(draw: st.DrawFn, name: str, at: int, size: int) -> Signal:
    """A signal within whole bytes of its own, so that none overlaps."""
    is_big_endian = draw(st.booleans())
    is_float = size in (2, 4, 8) and draw(st.booleans())
    length = 8 * size if is_float else draw(st.integers(1, 8 * size))
    down = 0 if is_float else draw(st.integers(0, 8 * size - length))
    start = 8 * at + 7 - down % 8 + 8 * (down // 8) if is_big_endian else 8 * at + down
    choices = draw(st.sampled_from([None, OrderedDict[int, str | NamedSignalValue]({0: "off", 1: "on"})]))
    conversion = BaseConversion.factory(draw(SCALES), draw(SCALES), choices, is_float)
    return Signal(
        name,
        start,
        length,
        byte_order="big_endian" if is_big_endian else "little_endian",
        is_signed=draw(st.booleans()),
        conversion=conversion,
    )


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """A message of up to 64 bytes, perhaps with a multiplexer in its first byte and one inside of it."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 2, 3, 4, 5, 8]), min_size=1, max_size=8))
    found = [Signal("M", 0, 8, is_multiplexer=True), Signal("N", 8, 4, is_multiplexer=True)]
    nested = draw(st.booleans())
    if nested:
        found[1].multiplexer_signal, found[1].multiplexer_ids = "M", [1]
    at = 2
    for n, size in enumerate(sizes):
        signal = draw(signals(f"S{n}", at, size))
        at += size
        match draw(st.sampled_from(["always", "outer", "inner"])):
            case "outer":
                signal.multiplexer_signal = "M"
                signal.multiplexer_ids = draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
            case "inner":
                signal.multiplexer_signal = "N"
                signal.multiplexer_ids = draw(st.lists(st.integers(0, 2), min_size=1, unique=True))
        found.append(signal)
    return Message(1, "X", at, found, strict=False)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_payload_of_any_message_decodes_as_cantools_decodes_it(data: st.DataObject) -> None:
    message = data.draw(messages(), label="message")
    database = SignalDatabase(Path("made.dbc"), {"X": message})
    row = table_of(database, *map_all(database)).messages[0]
    for _ in range(8):
        body = data.draw(st.binary(min_size=message.length - 2, max_size=message.length - 2))
        head = bytes([data.draw(st.integers(0, 4)), data.draw(st.integers(0, 3))])
        assert_same(row, message, head + body)


# --- no change is missed -----------------------------------------------------------


@dataclass
class Model:
    """What a collector should say, told frame by frame with nothing left out."""

    values: dict[str, SignalValue] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    torn: dict[str, int] = field(default_factory=dict)
    """Names that a loss followed since they were seen, and when that was; -1: never."""
    changes: list[tuple[str, SignalValue, int, int | None]] = field(default_factory=list)
    fresh: dict[str, int] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)

    def lose(self, row: MessageRow) -> None:
        self.torn |= {s.vss: self.seen.get(s.vss, -1) for s in row.signals}

    def take(self, row: MessageRow, payload: bytes, at_ns: int) -> None:
        if len(payload) < row.length:
            self.lose(row)
            return
        for name, value in decoded(row, payload).items():
            assert value is not None, "these databases give every signal a value"
            if self.values.get(name) != value:
                self.changes.append((name, value, at_ns, self.seen.get(name)))
            self.values[name] = value
            self.seen[name] = self.fresh[name] = at_ns
            if name in self.torn:
                self.broken.setdefault(name, self.torn.pop(name))

    def drain(self) -> tuple[list[tuple[str, SignalValue, int, int | None]], dict[str, int], dict[str, int]]:
        drained = self.changes, self.fresh, self.broken
        self.changes, self.fresh, self.broken = [], {}, {}
        return drained


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), st.integers(0, 7), st.binary(min_size=0, max_size=9)),
        st.tuples(st.just("same"), st.integers(0, 7), st.just(b"")),
        st.tuples(st.sampled_from(["drain", "lost"]), st.just(0), st.just(b"")),
    ),
    max_size=60,
)


@given(STEPS)
def test_no_change_is_missed_and_none_is_made_up(steps: list[tuple[str, int, bytes]]) -> None:
    _, table = everything()
    collector, state, model = Collector({"b": table}), SignalState(table.infos), Model()
    last: dict[int, bytes] = {}
    for at_ns, (what, which, drawn) in enumerate([*steps, ("drain", 0, b"")]):
        row = table.messages[which % len(table.messages)]
        match what:
            case "drain":
                batch = collector.drain()
                changes, fresh, broken = model.drain()
                assert [tuple(change) for change in batch.changes] == changes
                assert dict(batch.seen_ns) == fresh
                assert dict(batch.broken) == broken
                state.apply(batch)
                assert {n: state.value(n, at_ns) for n in model.values} == model.values
            case "lost":
                collector.lost("b")
                for each in table.messages:
                    model.lose(each)
            case _:
                payload = drawn if what == "frame" else last.get(which, drawn)
                last[which] = payload
                collector.feed("b", [(row.can_id, payload, at_ns)])
                model.take(row, payload, at_ns)


@given(st.lists(st.binary(max_size=64), max_size=10), st.integers(0, 0xFFFF_FFFF))
def test_any_frame_is_taken_without_an_error(payloads: list[bytes], can_id: int) -> None:
    _, table = everything()
    collector = Collector({"b": table})
    for payload in payloads:
        for identifier in (can_id, *(row.can_id for row in table.messages)):
            collector.feed("b", [(identifier, payload, 0), (identifier ^ CAN_EFF_FLAG, payload, 0)])
    collector.drain()


# --- any text ----------------------------------------------------------------------


SOURCES = (SMALL_DBC, SIMULATED_DBC.read_text())
JUNK = st.sampled_from(
    (
        *('"', ";", ":", "BO_ ", "SG_ ", "VAL_ ", "CM_ ", "\n", "|", "@", "-1", "m", "M", "\x00", "é"),
        *("99999999999", "1e999", "(0,0)", "NS_ :\n", 'BA_ "X" 1;\n', "SIG_VALTYPE_ 256 SPEED : 1;\n"),
        "SG_MUL_VAL_ 2147484160 FIRST WHICH 0-9, 3-999999999;\n",
        'BO_ 1 A: 9999999999 B\n SG_ C : 0|1@1+ (1,0) [0|0] "" B\n',
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(SOURCES), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), JUNK), max_size=4))
def test_any_damage_to_a_database_ends_in_our_error_or_a_database(
    text: str, damages: list[tuple[float, int, str]]
) -> None:
    for place, cut, junk in damages:
        position = int(place * len(text))
        text = text[:position] + junk + text[position + cut :]
    try:
        database = parse(text, Path("damaged.dbc"))
    except DatabaseError:
        return
    assert database.messages
    for entry in map_all(database):
        try:
            table = table_of(database, entry)
        except DatabaseError:
            continue
        for row in table.messages:
            decoded(row, bytes(row.length))
