"""Any frame decodes as cantools decodes it; no change is missed; any text of a database ends well."""

from __future__ import annotations

import functools
from pathlib import Path

import cantools.database
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.signals_data import SIMULATED_DBC, SMALL_DBC, feed, map_all, simulated_database, small_database

from agent.errors import DatabaseError
from agent.model import Frame, SignalValue
from agent.signals.database import SignalDatabase, parse
from agent.signals.plan import DecodePlan
from agent.signals.state import Collector, SignalState


@functools.cache
def everything() -> tuple[SignalDatabase, DecodePlan]:
    small, simulated = small_database(), simulated_database()
    database = SignalDatabase(Path("both"), {**small.messages, **simulated.messages})
    entries = map_all(database)
    return database, DecodePlan.compile(database, entries, "b", [e.vss for e in entries])


def reference(database: SignalDatabase, name: str, data: bytes) -> dict[str, object] | None:
    try:
        decoded = database.messages[name].decode(data, decode_choices=False)
    except cantools.database.DecodeError:
        return None  # cantools refuses the whole message for an unlisted multiplexer value
    assert isinstance(decoded, dict)
    return {f"{name}.{signal}": value for signal, value in decoded.items()}


@given(st.data())
def test_any_payload_decodes_as_cantools_decodes_it(data: st.DataObject) -> None:
    database, plan = everything()
    message = data.draw(st.sampled_from(list(plan.messages.values())), label="message")
    payload = data.draw(st.binary(min_size=message.length, max_size=message.length), label="payload")
    expected = reference(database, message.name, payload)
    found = {name: value for name, value in message.decode(payload).items() if value is not None}
    if expected is None:
        assert set(found) == {"SELECTED.WHICH"}
    else:
        assert found == expected


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=0, max_size=9)), max_size=40))
def test_no_change_is_missed_and_none_is_made_up(payloads: list[tuple[bool, bytes]]) -> None:
    _, plan = everything()
    small, selected = plan.messages[256, False], plan.messages[512, True]
    collector, state = Collector([plan]), SignalState(plan.infos)
    values: dict[str, SignalValue] = {}
    seen: dict[str, int] = {}
    for at_ns, (first, payload) in enumerate(payloads):
        message = small if first else selected
        feed(collector, Frame("b", message.key[0], payload, at_ns, message.key[1]))
        batch = collector.drain()
        expected = {}
        if len(payload) >= message.length:
            decoded = message.decode(payload)
            expected = {name: value for name, value in decoded.items() if value is not None}
        changed = {n: (v, seen.get(n)) for n, v in expected.items() if values.get(n) != v}
        assert {c.name: (c.value, c.previous_seen_ns) for c in batch.changes} == changed
        assert all(c.at_ns == at_ns for c in batch.changes)
        values |= expected
        seen |= dict.fromkeys(expected, at_ns)
        assert batch.seen_ns == seen
        state.apply(batch)
    now_ns = len(payloads)
    assert {n: state.value(n, now_ns) for n in values} == values


@given(st.lists(st.binary(max_size=64), max_size=10), st.integers(0, 0x7FF))
def test_any_frame_is_taken_without_an_error(payloads: list[bytes], can_id: int) -> None:
    _, plan = everything()
    collector = Collector([plan])
    for payload in payloads:
        for identifier in (can_id, *(key[0] for key in plan.can_ids)):
            for extended in (False, True):
                feed(collector, Frame("b", identifier, payload, is_extended=extended))
    collector.drain()


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
            plan = DecodePlan.compile(database, [entry], "b", [entry.vss])
        except DatabaseError:
            continue
        for message in plan.messages.values():
            message.decode(bytes(message.length))
