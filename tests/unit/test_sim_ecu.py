"""The simulated ECU decides by itself, in the order of docs/token.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.sim_world import (
    ANNOUNCE,
    EXTENDED,
    IDENTITY,
    INSTALL,
    MS,
    NO_LIMIT,
    READ_BACK,
    RELEASE,
    MemoryStore,
    S,
    ask,
    read_back,
    seat_module,
    token,
)
from vectors import make_token_vectors as signer

from firmware_sim.ecu import EcuState, Identity, Powertrain, Right, SeatModule, StoreError
from firmware_sim.store import FileStore
from firmware_sim.token import Term

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent.parent / "vectors" / "token.json").read_text(encoding="utf-8")
)


def negative(answer: bytes) -> int:
    assert answer[0] == 0x7F
    return answer[2]


def seat_of(vector: dict[str, Any]) -> tuple[SeatModule, MemoryStore]:
    """An ECU in the situation of a vector."""
    store = MemoryStore()
    if vector["stored"]:
        stored = Right(vector["stored"]["counter"], vector["stored"]["sha256"], allowed=True, terms={})
        store.state = EcuState(rights={1: stored})
    seat = SeatModule(
        replace(IDENTITY, vin=vector["vin"], uid=bytes.fromhex(vector["uid"])),
        features=frozenset({1}),
        token_root=bytes.fromhex(vector["root_public"]),
        store=store,
        now_ns=0,
        terms=frozenset(Term(number) for number in vector["terms"]),
        clock=(lambda: None) if "clock" in vector["own"] else None,
        odometer=(lambda: None) if "odometer" in vector["own"] else None,
    )
    for announcement in vector["announcements"]:
        seat.learn_key(bytes.fromhex(announcement))
    return seat, store


@pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in VECTORS["accepted"]])
def test_accepted_vector_is_answered_as_written(vector: dict[str, Any]) -> None:
    seat, store = seat_of(vector)
    assert ask(seat, INSTALL + bytes.fromhex(vector["token"])).hex() == vector["response"]
    assert store.state.rights[1].sha256 == vector["sha256"]


@pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in VECTORS["refused"]])
def test_refused_vector_is_refused_and_changes_nothing(vector: dict[str, Any]) -> None:
    seat, store = seat_of(vector)
    before = store.state
    assert negative(ask(seat, INSTALL + bytes.fromhex(vector["token"]))) == vector["nrc"]
    assert store.state is before
    assert seat.state == before


def test_announcements_are_judged_one_after_the_other() -> None:
    seat = seat_module(MemoryStore(), epochs=0)
    for vector in VECTORS["announcements"]:
        answer = ask(seat, ANNOUNCE + bytes.fromhex(vector["announcement"]))
        if vector["nrc"] is None:
            assert answer == bytes.fromhex("71010F0C") + vector["epoch"].to_bytes(4, "big"), vector["name"]
            assert seat.state.token_keys[vector["epoch"]].hex() == vector["public"]
        else:
            assert negative(answer) == vector["nrc"], vector["name"]
    said = {v["epoch"] for v in VECTORS["announcements"] if v["nrc"] is None}
    assert set(seat.state.token_keys) == said == {1, 2, 4, 5}


def test_a_right_outlives_a_newer_token_key() -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1))
    ask(seat, ANNOUNCE + signer.announcement(2, signer.KEY_2))
    assert read_back(seat)[:2] == (1, 0)
    assert negative(ask(seat, INSTALL + token(2))) == 0x33


# --- UDS ---


def test_routines_need_the_extended_session() -> None:
    seat = seat_module(MemoryStore())
    assert seat.handle(INSTALL + token(1), 0) == bytes.fromhex("7F317F")


def test_session_falls_back_after_five_silent_seconds() -> None:
    seat = seat_module(MemoryStore())
    assert seat.handle(EXTENDED, 0) == bytes.fromhex("5003003201F4")
    assert seat.handle(bytes.fromhex("3E00"), 5 * S) == bytes.fromhex("7E00")
    assert seat.handle(RELEASE, 10 * S) == bytes.fromhex("71010F0E000100")
    assert seat.handle(RELEASE, 15 * S + 1) == bytes.fromhex("7F317F")


def test_a_suppressed_answer_is_not_sent_but_a_refusal_is() -> None:
    seat = seat_module(MemoryStore())
    assert seat.handle(bytes.fromhex("3E80"), 0) is None
    assert seat.handle(bytes.fromhex("1083"), 0) is None
    assert seat.handle(bytes.fromhex("31810F0D00"), 0) == bytes.fromhex("7F3131")


@pytest.mark.parametrize(
    ("request_hex", "nrc"),
    [
        ("27 01", 0x11),
        ("10", 0x13),
        ("10 02", 0x12),
        ("10 03 00", 0x13),
        ("3E 01", 0x12),
        ("3E 00 00", 0x13),
        ("22", 0x13),
        ("22 0F", 0x13),
        ("22 FF FF", 0x31),
        ("22 0F 22", 0x31),
        ("22" + " F1 90" * 9, 0x13),
        ("31 01 0F", 0x13),
        ("31 02 0F 0D 00", 0x12),
        ("31 01 0F FF", 0x31),
        ("31 01 0F 0D", 0x13),
        ("31 01 0F 0E", 0x13),
        ("31 01 0F 0E 00 01 00", 0x13),
        ("31 01 0F 0E 00 02", 0x31),
    ],
)
def test_a_wrong_request_gets_its_negative_response(request_hex: str, nrc: int) -> None:
    request = bytes.fromhex(request_hex)
    assert ask(seat_module(MemoryStore()), request) == bytes([0x7F, request[0], nrc])


def test_it_says_who_it_is() -> None:
    seat = seat_module(MemoryStore())
    assert seat.handle(bytes.fromhex("22F1900F000F01"), 0) == (
        b"\x62\xf1\x90" + signer.VIN.encode() + b"\x0f\x00" + signer.UID + b"\x0f\x01openfod-seat-1"
    )


def test_the_powertrain_reads_out_its_odometer_and_has_no_routines() -> None:
    identity = Identity("powertrain", "hw", signer.VIN, signer.OTHER_UID, 0x7E0, 0x7E8)
    powertrain = Powertrain(identity, odometer_m=lambda: 123456, now_ns=0)
    assert powertrain.handle(bytes.fromhex("220F10"), 0) == bytes.fromhex("620F100001E240")
    assert powertrain.handle(INSTALL, 0) == bytes.fromhex("7F3111")


# --- install and release ---


def test_an_unknown_feature_is_out_of_range() -> None:
    seat = seat_module(MemoryStore(), features=frozenset({2}))
    assert negative(ask(seat, INSTALL + token(1))) == 0x31


@pytest.mark.parametrize("term", [6, 7, 8])
def test_a_feature_without_output_refuses_limits_that_it_cannot_measure(term: int) -> None:
    seat = seat_module(MemoryStore(), features=frozenset({1, 2}))
    content = {
        number: signer.sign1(
            signer.dumps({1: 1, 2: number, 3: 1, 4: 1, 6: {term: 1}}), signer.external(), signer.KEY_1
        )
        for number in (1, 2)
    }
    assert ask(seat, INSTALL + content[1])[0] == 0x71
    assert negative(ask(seat, INSTALL + content[2])) == 0x31


def test_a_released_feature_comes_back_with_the_same_token() -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1))
    assert ask(seat, RELEASE) == bytes.fromhex("71010F0E000100")
    assert read_back(seat) == (0, 2, 1, NO_LIMIT, NO_LIMIT)
    assert ask(seat, INSTALL + token(1)) == bytes.fromhex("71010F0D00010100000001")
    assert read_back(seat)[:2] == (1, 0)


def test_state_0_burns_older_tokens() -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1))
    assert ask(seat, INSTALL + token(2, state=0)) == bytes.fromhex("71010F0D00010000000002")
    assert read_back(seat)[:3] == (0, 3, 2)
    assert negative(ask(seat, INSTALL + token(1))) == 0x24


@pytest.mark.parametrize("request_bytes", [INSTALL + token(2, state=0), RELEASE])
def test_nothing_is_switched_in_motion(request_bytes: bytes) -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1))
    seat.sense(speed_kmh=5.1, now_ns=0)
    before = seat.state
    assert negative(ask(seat, request_bytes)) == 0x88
    assert seat.state is before
    seat.sense(speed_kmh=5.0, now_ns=0)
    assert ask(seat, request_bytes)[0] == 0x71


def test_renewing_in_motion_switches_nothing_and_is_accepted() -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1, terms={5: 10}))
    seat.sense(speed_kmh=80.0, now_ns=0)
    assert ask(seat, INSTALL + token(2, terms={5: 20}))[0] == 0x71
    assert read_back(seat) == (1, 0, 2, 20, NO_LIMIT)


# --- durable state ---


@pytest.mark.parametrize(
    "request_bytes",
    [INSTALL + token(2, terms={5: 3}), RELEASE, ANNOUNCE + signer.announcement(2, signer.KEY_2)],
)
def test_a_failing_store_gives_0x72_and_changes_nothing(request_bytes: bytes) -> None:
    store = MemoryStore()
    seat = seat_module(store)
    ask(seat, INSTALL + token(1))
    before = seat.state
    store.is_broken = True
    assert negative(ask(seat, request_bytes)) == 0x72
    assert seat.state is before
    assert read_back(seat) == (1, 0, 1, NO_LIMIT, NO_LIMIT)


def test_counters_and_used_amounts_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "seat.json"
    seat = seat_module(FileStore(path))
    ask(seat, INSTALL + token(7, terms={5: 5, 6: 100, 7: 9}, parameters=b"\x01"))
    seat.terminal_15(on=True, now_ns=0)
    seat.press(1, 0)
    seat.press(0, 2500 * MS)
    again = seat_module(FileStore(path))
    assert again.state == seat.state
    assert read_back(again) == (1, 0, 7, 4, 98)
    assert negative(ask(again, INSTALL + token(6))) == 0x24


def test_a_file_that_is_no_state_is_an_error_and_not_an_empty_state(tmp_path: Path) -> None:
    path = tmp_path / "seat.json"
    for content in (
        b"",
        b"[]",
        b'{"format": 2}',
        b'{"format": 1, "token_keys": {}, "rights": {"1": {}}}',
        b"[" * 9999,
        b'{"format": 1, "token_keys": {"1": 1}, "rights": {}}',
        b'{"format": 1, "token_keys": {}, "rights": {"1": {"counter": 1e999}}}',
        b" " * 70_000,
    ):
        path.write_bytes(content)
        with pytest.raises(StoreError):
            FileStore(path).load()


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "seat.json"
    seat = seat_module(FileStore(path))
    ask(seat, INSTALL + token(1))
    before = path.read_bytes()
    (tmp_path / "seat.json.new").mkdir()  # where the new file would be written
    assert negative(ask(seat, INSTALL + token(2))) == 0x72
    assert path.read_bytes() == before


def test_a_reset_ecu_that_cannot_read_its_memory_allows_and_stores_nothing() -> None:
    store = MemoryStore()
    seat = seat_module(store)
    ask(seat, INSTALL + token(5))
    kept, store.is_broken = store.state, True
    seat.reset(0)
    store.is_broken = False
    assert read_back(seat, S)[:2] == (0, 1)
    assert negative(ask(seat, ANNOUNCE + signer.announcement(1, signer.KEY_1), S)) == 0x72
    assert store.state is kept


# --- limits ---


def cycle(seat: SeatModule, now_ns: int = 0) -> None:
    """Ignition off and on."""
    seat.terminal_15(on=False, now_ns=now_ns)
    seat.terminal_15(on=True, now_ns=now_ns)


def test_ignition_cycles_end_the_right_at_the_wake_up_after_the_last() -> None:
    seat = seat_module(MemoryStore())
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={5: 2}))
    seen = [read_back(seat)[:4]]
    for _ in range(3):
        cycle(seat)
        seen.append(read_back(seat)[:4])
    assert seen == [(1, 0, 1, 2), (1, 0, 1, 1), (1, 0, 1, 0), (2, 4, 1, 0)]


def test_operating_time_may_overrun_by_the_cycle_and_ends_at_wake_up() -> None:
    seat = seat_module(MemoryStore())
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={6: 30}))
    seat.press(3, 0)
    for second in range(1, 61):
        seat.sense(speed_kmh=100.0, now_ns=second * S)
    assert seat.heat_level == 3
    assert read_back(seat, 60 * S) == (1, 0, 1, NO_LIMIT, 0)
    cycle(seat, 60 * S)
    assert read_back(seat, 60 * S)[:2] == (2, 5)
    assert seat.heat_level == 0


def test_executions_are_counted_and_end_at_wake_up() -> None:
    seat = seat_module(MemoryStore())
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={7: 2}))
    for _ in range(3):
        seat.press(1, 0)
        assert seat.heat_level == 1
        seat.press(0, 0)
    assert seat.state.rights[1].executions_used == 3
    cycle(seat)
    assert read_back(seat)[:2] == (2, 6)


def test_an_ended_right_comes_back_with_a_newer_token_only() -> None:
    seat = seat_module(MemoryStore())
    ask(seat, INSTALL + token(1, terms={5: 1}))
    cycle(seat)
    cycle(seat)
    assert ask(seat, INSTALL + token(1, terms={5: 1})) == bytes.fromhex("71010F0D00010200000001")
    assert read_back(seat)[:2] == (2, 4)
    ask(seat, INSTALL + token(2, terms={5: 1}))
    assert read_back(seat) == (1, 0, 2, 1, NO_LIMIT)


def test_cutting_the_power_gives_no_operating_time_back() -> None:
    store = MemoryStore()
    seat = seat_module(store)
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={6: 3600}))
    seat.press(2, 0)
    seat.sense(speed_kmh=0, now_ns=9 * S)
    assert store.state.rights[1].operating_ms >= 9000
    assert seat_module(store).state.rights[1].operating_ms >= 9000


def test_a_reset_is_no_wake_up() -> None:
    seat = seat_module(MemoryStore())
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={5: 5}))
    seat.press(2, 0)
    seat.reset(0)
    assert seat.heat_level == 0
    assert seat.handle(READ_BACK, 100 * MS) is None
    seat.sense(speed_kmh=50, now_ns=S)
    assert seat.heat_level == 2
    assert read_back(seat, S) == (1, 0, 1, 5, NO_LIMIT)


def test_a_cycle_that_cannot_be_counted_is_not_a_free_one() -> None:
    store = MemoryStore()
    seat = seat_module(store)
    ask(seat, INSTALL + token(1, terms={5: 5}))
    seat.press(2, 0)
    store.is_broken = True
    cycle(seat)
    assert seat.heat_level == 0
    assert read_back(seat)[:2] == (0, 0)
    store.is_broken = False
    cycle(seat)
    assert seat.heat_level == 2


def test_a_heater_whose_use_cannot_be_counted_stays_off() -> None:
    store = MemoryStore()
    seat = seat_module(store)
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={6: 30}))
    store.is_broken = True
    seat.press(2, 0)
    seat.sense(speed_kmh=0, now_ns=S)
    assert seat.heat_level == 0
    assert [h.name for h in seat.happenings].count("store-failed") == 1


def test_above_the_speed_limit_the_heater_rests_and_the_right_goes_on() -> None:
    seat = seat_module(MemoryStore())
    seat.terminal_15(on=True, now_ns=0)
    ask(seat, INSTALL + token(1, terms={5: 9, 8: 100}))
    seat.press(1, 0)
    seat.sense(speed_kmh=100.1, now_ns=S)
    assert (seat.heat_level, read_back(seat, S)[0]) == (0, 1)
    seat.sense(speed_kmh=100.0, now_ns=2 * S)
    assert seat.heat_level == 1


def test_the_heater_follows_ignition_right_and_driver() -> None:
    seat = seat_module(MemoryStore())
    seat.press(3, 0)
    assert [h.name for h in seat.happenings] == ["heater-refused"]
    ask(seat, INSTALL + token(1))
    assert seat.heat_level == 0  # the ignition is off
    seat.terminal_15(on=True, now_ns=0)
    assert (seat.heat_level, seat.heat_power_w) == (3, 90.0)
    ask(seat, RELEASE)
    assert (seat.heat_level, seat.heat_requested) == (0, 3)
