"""The simulated ECU signs what it counted: never more than was used, never less than it signed before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sim_world import INSTALL, MS, MemoryStore, S, ask, seat_module, token
from vectors.make_reading_vectors import ECU_KEY

from cloud.readings import Reading, parse
from firmware_sim.__main__ import main
from firmware_sim.ecu import RESERVE_MS, EcuState, SeatModule, Total
from firmware_sim.store import FileStore

READ = bytes.fromhex("220F41")


def seat(store: MemoryStore) -> SeatModule:
    """A seat module with a key, ready to heat."""
    module = seat_module(store, reading_key=ECU_KEY.private)
    ask(module, INSTALL + token(1))
    module.terminal_15(on=True, now_ns=0)
    return module


def read(module: SeatModule, now_ns: int) -> Reading:
    """Reads it as the cloud does."""
    answer = module.handle(READ, now_ns)
    assert answer is not None
    assert answer[:3] == bytes.fromhex("620F41")
    reading = parse(answer[3:])
    reading.check_signature(ECU_KEY.public)
    return reading


def test_time_and_starts_are_counted_to_the_millisecond() -> None:
    module = seat(MemoryStore())
    module.press(2, 0)
    module.press(0, 7_001 * MS)
    module.press(1, 10_000 * MS)
    reading = read(module, 12_345 * MS)
    assert (reading.on_ms, reading.executions) == (7_001 + 2_345, 2)
    assert (reading.reading, reading.token_counter, reading.feature) == (1, 1, 1)
    assert read(module, 12_346 * MS).reading == 2


def test_a_new_token_begins_no_new_count() -> None:
    module = seat(MemoryStore())
    module.press(2, 0)
    ask(module, INSTALL + token(2), 5 * S)
    reading = read(module, 8 * S)
    assert (reading.on_ms, reading.token_counter) == (8_000, 2)


def test_a_power_cut_takes_ten_seconds_at_most_and_nothing_that_was_signed() -> None:
    store = MemoryStore()
    module = seat(store)
    module.press(2, 0)
    for ms in range(0, 25_000, 100):
        module.sense(speed_kmh=0, now_ns=ms * MS)
    signed = read(module, 25_000 * MS)
    module.sense(speed_kmh=0, now_ns=33_000 * MS)
    module.reset(33_000 * MS)
    after = read(module, 34_000 * MS)
    assert signed.on_ms == 25_000
    assert signed.on_ms <= after.on_ms <= 33_000
    assert 33_000 - after.on_ms <= RESERVE_MS
    assert after.reading == signed.reading + 1


def test_what_cannot_be_stored_is_not_signed() -> None:
    store = MemoryStore()
    module = seat(store)
    read(module, 0)

    store.is_broken = True
    assert module.handle(READ, S) == bytes.fromhex("7F2222")
    store.is_broken = False
    assert read(module, 2 * S).reading == 2


def test_use_that_could_not_be_stored_is_counted_later() -> None:
    store = MemoryStore()
    module = seat(store)
    module.press(2, 0)

    store.is_broken = True
    module.press(0, 5 * S)
    store.is_broken = False
    assert read(module, 9 * S).on_ms == 5_000


def test_an_ecu_without_a_key_says_nothing() -> None:
    module = seat_module(MemoryStore())
    assert module.handle(READ, 0) == bytes.fromhex("7F2231")


STEPS = st.lists(
    st.tuples(st.integers(0, 15_000), st.sampled_from(["press", "cut", "read", "sense"])), max_size=40
)


@settings(deadline=None)
@given(STEPS)
def test_no_life_counts_more_than_was_used_or_less_than_was_signed(steps: list[tuple[int, str]]) -> None:
    module, now_ms, used_ms, cuts = seat(MemoryStore()), 0, 0, 0
    signed = read(module, 0)
    for pause_ms, step in [*steps, (0, "read")]:
        for _ in range(pause_ms // 50):
            used_ms += 50 if module.heat_level else 0
            now_ms += 50
            module.sense(speed_kmh=0, now_ns=now_ms * MS)
        if step == "press":
            module.press(0 if module.heat_requested else 2, now_ms * MS)
        elif step == "cut":
            cuts += 1
            module.reset(now_ms * MS)
        elif step == "read" and module.is_awake(now_ms * MS):
            before, signed = signed, read(module, now_ms * MS)
            assert before.on_ms <= signed.on_ms <= used_ms
            assert before.reading + 1 == signed.reading
            assert used_ms - signed.on_ms <= cuts * (RESERVE_MS + 50)


def test_totals_survive_in_the_file_and_an_older_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "seat.json"
    state = EcuState(totals={1: Total(on_ms=5, executions=2)}, readings=9)
    FileStore(path).save(state)
    assert FileStore(path).load() == state
    old = json.loads(path.read_text())
    old["format"] = 2
    del old["totals"], old["readings"]
    path.write_text(json.dumps(old))
    assert FileStore(path).load() == EcuState()


def test_the_factory_makes_a_key_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "seat.key"
    assert main(["ecu-key", str(path)]) == 0
    public = capsys.readouterr().out.strip()
    assert len(bytes.fromhex(public)) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    content = path.read_bytes()
    assert main(["ecu-key", str(path)]) == 1
    assert path.read_bytes() == content
