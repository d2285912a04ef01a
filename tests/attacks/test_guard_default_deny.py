"""Nothing passes the guard but the next piece of the approved request; a refusal changes nothing."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import CodeType

import pytest
from support.edge_ecu import (
    ACTIVATE,
    LAMP,
    READ,
    RELEASE,
    S_NS,
    SEAT,
    SESSION,
    WIDE,
    feature,
    open_guard,
    pieces,
    rights,
    token,
    twin,
)

from agent.errors import GuardRefusal
from agent.features import guard as guard_module
from agent.features.guard import (
    MAX_FRAMES_PER_S,
    MAX_REQUEST_BYTES,
    Guard,
    activation_request,
    announcement_request,
    read_back_request,
    reading_request,
    session_request,
)
from agent.model import Frame, ReadingSpec, Rights, TokenKeyAnnouncement

REQUEST = activation_request(feature(), token())
FLOW_CONTROL = bytes.fromhex("30 08 00")
BUSES = ("body", "power", "Body", "")


def seat(data: bytes) -> Frame:
    return Frame("body", SEAT.request_id, data)


def state(guard: Guard) -> object:
    return copy.deepcopy(vars(guard))


def refused(guard: Guard, act: Callable[[], None], words: str) -> None:
    before = state(guard)
    with pytest.raises(GuardRefusal, match=words):
        act()
    assert state(guard) == before


def send_all(guard: Guard, frames: list[Frame], now_ns: int = S_NS) -> None:
    for frame in frames:
        guard.check_frame(frame, now_ns)


def payloads() -> list[bytes]:
    dice = random.Random(7)
    return [
        b"",
        bytes(8),
        b"\x02\x10\x03",
        b"\x03" + READ,
        FLOW_CONTROL,
        b"\x02\x3e\x80",
        b"\x10\x9a" + REQUEST[:6],
        b"\x21" + REQUEST[6:13],
        *(dice.randbytes(dice.randrange(1, 9)) for _ in range(4)),
    ]


def test_every_identifier_on_every_bus_is_refused_while_nothing_is_approved() -> None:
    guard = open_guard()
    before = state(guard)
    for bus in BUSES:
        for can_id in range(0x800):
            for data in payloads():
                with pytest.raises(GuardRefusal):
                    guard.check_frame(Frame(bus, can_id, data), S_NS)
    assert state(guard) == before


def test_of_every_identifier_on_every_bus_only_the_next_piece_passes() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    first = pieces(REQUEST)[0]
    dice = random.Random(11)
    wide = [dice.randrange(0x800, 2**29) for _ in range(500)] + [0x18DA10F1, 0x18DAF110]
    before, passed = state(guard), []
    for bus in BUSES:
        for can_id in [*range(0x800), *wide]:
            for data in (first.data, *payloads()[:4]):
                for is_extended in (False, True):
                    frame = Frame(bus, can_id, data, is_extended=is_extended)
                    if frame == first:
                        continue
                    try:
                        guard.check_frame(frame, S_NS)
                    except GuardRefusal:
                        continue
                    passed.append(frame)
    assert passed == []
    assert state(guard) == before
    guard.check_frame(first, S_NS)


def test_frame_before_its_request_is_approved_is_refused() -> None:
    guard = open_guard()
    refused(guard, lambda: guard.check_frame(pieces(REQUEST)[0], S_NS), "no approved request")


@pytest.mark.parametrize("index", [0, 1, 2, 15, 16, 17, len(pieces(REQUEST)) - 1])
@pytest.mark.parametrize("bit", [0, 1, 9, 17, 23])
def test_one_other_bit_in_any_frame_is_refused(index: int, bit: int) -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    send_all(guard, frames[:index])
    changed = bytearray(frames[index].data)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    refused(guard, lambda: guard.check_frame(seat(bytes(changed)), S_NS), "not the next piece")
    send_all(guard, frames[index:])


def test_frames_out_of_order_skipped_or_replayed_are_refused() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    refused(guard, lambda: guard.check_frame(frames[1], S_NS), "not the next piece")
    guard.check_frame(frames[0], S_NS)
    refused(guard, lambda: guard.check_frame(frames[0], S_NS), "not the next piece")
    refused(guard, lambda: guard.check_frame(frames[2], S_NS), "not the next piece")
    guard.check_frame(frames[1], S_NS)
    refused(guard, lambda: guard.check_frame(frames[1], S_NS), "not the next piece")
    send_all(guard, frames[2:])
    for frame in frames:
        refused(guard, lambda f=frame: guard.check_frame(f, S_NS), "not the next piece")  # type: ignore[misc]


def test_frames_after_close_are_refused() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    guard.check_frame(frames[0], S_NS)
    guard.close(SEAT)
    for frame in (*frames, seat(FLOW_CONTROL)):
        refused(guard, lambda f=frame: guard.check_frame(f, S_NS), "no approved request")  # type: ignore[misc]


@pytest.mark.parametrize(
    "frame",
    [
        Frame("power", SEAT.request_id, pieces(READ)[0].data),
        Frame("body", SEAT.response_id, pieces(READ)[0].data),
        Frame("body", SEAT.request_id, pieces(READ)[0].data, is_extended=True),
        Frame("body", SEAT.request_id, pieces(READ)[0].data, is_fd=True),
        Frame("body", SEAT.request_id, pieces(READ)[0].data + bytes(5)),
        Frame("body", SEAT.request_id, pieces(READ)[0].data + bytes(60), is_fd=True),
        Frame("body", SEAT.request_id, b"\x04" + READ),
        Frame("body", SEAT.request_id, b"\x03" + READ + b"\x01"),
        Frame("body", SEAT.request_id, b"\x03" + READ[:2]),
        Frame("body", SEAT.request_id, b""),
    ],
)
def test_right_request_in_another_frame_is_refused(frame: Frame) -> None:
    guard = open_guard()
    guard.approve(SEAT, READ)
    refused(guard, lambda: guard.check_frame(frame, S_NS), "frame 0x")
    guard.check_frame(seat(b"\x03" + READ + bytes(4)), S_NS)


@pytest.mark.parametrize(
    "flow", ["30", "30 08", "30 08 00 00", "30 08 00 01 00 00 00 00", "33 00 00", "3F 0 0"]
)
def test_malformed_flow_control_is_refused(flow: str) -> None:
    guard = open_guard()
    guard.approve(SEAT, READ)
    send_all(guard, pieces(READ))
    data = bytes(int(byte, 16) for byte in flow.split())
    refused(guard, lambda: guard.check_frame(seat(data), S_NS), "not the next piece")


def test_flow_control_passes_only_after_the_whole_request() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    for frame in pieces(REQUEST):
        refused(guard, lambda: guard.check_frame(seat(FLOW_CONTROL), S_NS), "not the next piece")
        guard.check_frame(frame, S_NS)
    for flow in (FLOW_CONTROL, FLOW_CONTROL + bytes(5), b"\x32\x00\x00"):
        guard.check_frame(seat(flow), S_NS)


def test_token_of_a_feature_that_is_not_live_is_refused() -> None:
    guard = open_guard(live=())
    refused(guard, lambda: guard.approve(SEAT, REQUEST), "live right")
    for request in (READ, RELEASE, SESSION, session_request(1)):
        guard.approve(SEAT, request)
        guard.close(SEAT)


def test_token_that_takes_away_passes_without_a_live_right() -> None:
    guard = Guard(listen_only=False)
    burning = token(counter=2, allows=False)
    guard.allow(rights(feature(), tokens=(burning,)), ())
    guard.approve(SEAT, activation_request(feature(), burning))
    refused(guard, lambda: guard.approve(SEAT, REQUEST), "still open")
    guard.close(SEAT)
    refused(guard, lambda: guard.approve(SEAT, REQUEST), "live right")


def test_every_single_bit_of_the_token_request_is_judged() -> None:
    guard = open_guard()
    before = state(guard)
    for bit in range(8 * len(REQUEST)):
        changed = bytearray(REQUEST)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(GuardRefusal):
            guard.approve(SEAT, bytes(changed))
    for request in (REQUEST[:-1], REQUEST + b"\x00", ACTIVATE, token().content, REQUEST[1:]):
        with pytest.raises(GuardRefusal):
            guard.approve(SEAT, request)
    assert state(guard) == before


def test_every_two_byte_request_but_the_sessions_is_refused() -> None:
    guard = open_guard()
    allowed = []
    for first in range(256):
        for second in range(256):
            try:
                guard.approve(SEAT, bytes([first, second]))
            except GuardRefusal:
                continue
            guard.close(SEAT)
            allowed.append(bytes([first, second]))
    assert allowed == [session_request(1), SESSION]


def test_requests_of_another_ecu_are_refused() -> None:
    lamp = feature("lamp", LAMP)
    guard = open_guard(feature(), lamp, live=("seat-heating",))
    refused(guard, lambda: guard.approve(LAMP, REQUEST), "live right")
    refused(guard, lambda: guard.approve(WIDE, READ), "no live catalogue entry")
    other = Guard(listen_only=False)
    other.allow(rights(feature()), ())
    refused(other, lambda: other.approve(LAMP, RELEASE), "no live catalogue entry")


@pytest.mark.parametrize("changes", [{"response_id": 0x7A9}, {"identifier": "x"}, {"hardware_id": "x"}])
def test_ecu_that_only_shares_the_request_id_gets_nothing_of_the_other(changes: dict[str, object]) -> None:
    guard = open_guard()
    refused(guard, lambda: guard.approve(twin(SEAT, **changes), READ), "no live catalogue entry")
    # Even if the catalogue names both: each has its own list, and there is one request at a time.
    lamp = feature("lamp", twin(SEAT, **changes))
    guard = open_guard(feature(), lamp, live=("lamp",))
    refused(guard, lambda: guard.approve(SEAT, activation_request(lamp, token("lamp"))), "live right")
    guard.approve(SEAT, READ)
    refused(guard, lambda: guard.approve(twin(SEAT, **changes), READ), "still open")


def test_second_request_while_one_is_open_is_refused() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    refused(guard, lambda: guard.approve(SEAT, READ), "still open")
    guard.check_frame(pieces(REQUEST)[0], S_NS)


@pytest.mark.parametrize("size", [0, MAX_REQUEST_BYTES + 1, 4096])
def test_request_of_no_or_too_many_bytes_is_refused(size: int) -> None:
    guard = open_guard()
    refused(guard, lambda: guard.approve(SEAT, bytes(size)), f"of {size} bytes")


def test_longest_request_passes_whole() -> None:
    guard, spec = Guard(listen_only=False), feature()
    long = token(size=200)
    guard.allow(rights(spec, tokens=(long,)), (spec.feature_id,))
    guard.approve(SEAT, activation_request(spec, long))
    send_all(guard, pieces(activation_request(spec, long)))


def test_listen_only_refuses_everything() -> None:
    guard = Guard(listen_only=True)
    guard.allow(rights(feature(), tokens=(token(),)), ("seat-heating",))
    refused(guard, lambda: guard.approve(SEAT, READ), "listen-only")
    refused(guard, lambda: guard.check_frame(pieces(READ)[0], S_NS), "listen-only")


def test_pause_ends_the_open_request_and_resume_does_not_bring_it_back() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    guard.check_frame(frames[0], S_NS)
    guard.pause("a tester speaks")
    refused(guard, lambda: guard.check_frame(frames[1], S_NS), "a tester speaks")
    refused(guard, lambda: guard.approve(SEAT, READ), "a tester speaks")
    guard.resume()
    refused(guard, lambda: guard.check_frame(frames[1], S_NS), "no approved request")
    guard.approve(SEAT, READ)


def test_right_that_ends_while_its_token_is_sent_stops_the_next_piece() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    send_all(guard, frames[:5])
    guard.allow(rights(feature(), tokens=(token(),)), ())
    refused(guard, lambda: guard.check_frame(frames[5], S_NS), "no approved request")
    guard.approve(SEAT, RELEASE)


def test_ecu_that_the_next_rights_no_longer_name_gets_no_further_piece() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    send_all(guard, frames[:5])
    guard.allow(rights(feature("lamp", LAMP)), ())
    refused(guard, lambda: guard.check_frame(frames[5], S_NS), "no approved request")
    guard.approve(LAMP, READ)


def test_right_that_stays_keeps_its_open_request_and_a_sent_one_may_be_answered() -> None:
    guard = open_guard()
    guard.approve(SEAT, REQUEST)
    frames = pieces(REQUEST)
    send_all(guard, frames[:5])
    guard.allow(rights(feature(), tokens=(token(),)), ("seat-heating",))
    send_all(guard, frames[5:])
    guard.allow(rights(), ())
    guard.check_frame(seat(FLOW_CONTROL), S_NS)
    refused(guard, lambda: guard.check_frame(frames[-1], S_NS), "not the next piece")


def test_rate_over_all_ecus_is_limited_and_its_window_moves_with_time() -> None:
    guard = open_guard(feature(), feature("lamp", LAMP), live=())
    ecus = (SEAT, LAMP)

    def send(number: int, now_ns: int) -> None:
        ecu = ecus[number % 2]
        guard.approve(ecu, READ)
        try:
            guard.check_frame(pieces(READ, ecu)[0], now_ns)
        finally:
            guard.close(ecu)

    for number in range(MAX_FRAMES_PER_S):
        send(number, S_NS + number)
    last_ns = 2 * S_NS - 1
    refused(guard, lambda: send(0, last_ns), f"more than {MAX_FRAMES_PER_S}")
    send(0, 2 * S_NS)
    refused(guard, lambda: send(0, 2 * S_NS), f"more than {MAX_FRAMES_PER_S}")
    send(0, 2 * S_NS + 1)


def test_wide_identifier_needs_the_extended_flag() -> None:
    wide = feature("wide", WIDE)
    guard = open_guard(wide, live=())
    guard.approve(WIDE, READ)
    narrow = Frame("power", WIDE.request_id, pieces(READ)[0].data)
    refused(guard, lambda: guard.check_frame(narrow, S_NS), "no approved request")
    guard.check_frame(pieces(READ, WIDE)[0], S_NS)


def test_feature_without_actuator_or_read_back_asks_nothing() -> None:
    from agent.model import ActuatorKind

    screen = replace(feature("screen"), kind=ActuatorKind.NONE, ecu=None)
    guard = open_guard(screen)
    refused(guard, lambda: guard.approve(SEAT, READ), "no live catalogue entry")
    blind = replace(feature(), read_back=None, release_request=b"")
    with pytest.raises(GuardRefusal, match="no read-back"):
        read_back_request(blind)
    guard = open_guard(blind, live=())
    refused(guard, lambda: guard.approve(SEAT, read_back_request(feature())), "live right")
    refused(guard, lambda: guard.approve(SEAT, RELEASE), "live right")
    assert guard.is_request_id("body", SEAT.request_id)
    assert not guard.is_request_id("power", SEAT.request_id)


# --- the token key --------------------------------------------------------------


def announcement(epoch: int) -> TokenKeyAnnouncement:
    content = hashlib.sha512(f"epoch {epoch}".encode()).digest() * 2
    return TokenKeyAnnouncement(epoch, content, hashlib.sha256(content).hexdigest())


KEY_REQUEST = announcement_request(announcement(2))


def keyed(rights_: Rights) -> Rights:
    return replace(rights_, token_key=announcement(2))


def test_the_listed_token_key_passes_to_the_ecu_of_a_token_and_to_no_other() -> None:
    lamp, guard = feature("lamp", LAMP), Guard(listen_only=False)
    guard.allow(keyed(rights(feature(), lamp, tokens=(token(),))), ())
    assert announcement_request(announcement(2))[:4] == bytes.fromhex("31010F0C")
    refused(guard, lambda: guard.approve(LAMP, KEY_REQUEST), "listed token key")
    refused(guard, lambda: guard.approve(WIDE, KEY_REQUEST), "no live catalogue entry")
    guard.approve(SEAT, KEY_REQUEST)
    send_all(guard, pieces(KEY_REQUEST))


def test_a_token_key_that_is_not_listed_or_is_another_is_refused() -> None:
    unlisted = open_guard()
    refused(unlisted, lambda: unlisted.approve(SEAT, KEY_REQUEST), "listed token key")
    refused(unlisted, lambda: unlisted.approve(SEAT, KEY_REQUEST[:4]), "listed token key")
    guard = Guard(listen_only=False)
    guard.allow(keyed(rights(feature(), tokens=(token(),))), ("seat-heating",))
    for other in (
        announcement_request(announcement(3)),
        KEY_REQUEST[:4],
        KEY_REQUEST[:-1],
        KEY_REQUEST + b"\x00",
        KEY_REQUEST[4:],
        KEY_REQUEST[:4] + token().content,
        ACTIVATE + announcement(2).content,
    ):
        refused(guard, lambda r=other: guard.approve(SEAT, r), "listed token key")  # type: ignore[misc]


def test_every_single_bit_of_the_token_key_is_judged() -> None:
    guard = Guard(listen_only=False)
    guard.allow(keyed(rights(feature(), tokens=(token(),))), ("seat-heating",))
    before = state(guard)
    for bit in range(8 * len(KEY_REQUEST)):
        changed = bytearray(KEY_REQUEST)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(GuardRefusal):
            guard.approve(SEAT, bytes(changed))
    assert state(guard) == before


def test_a_token_key_that_is_no_longer_listed_stops_in_the_middle() -> None:
    guard = Guard(listen_only=False)
    guard.allow(keyed(rights(feature(), tokens=(token(),))), ())
    guard.approve(SEAT, KEY_REQUEST)
    frames = pieces(KEY_REQUEST)
    send_all(guard, frames[:3])
    guard.allow(rights(feature(), tokens=(token(),)), ())
    refused(guard, lambda: guard.check_frame(frames[3], S_NS), "no approved request")


def test_a_reading_leaves_only_as_the_catalogue_describes_it() -> None:
    described = replace(feature(), reading=ReadingSpec(0xF041, 600, "active-time"))
    guard = open_guard(described)
    passed = set()
    for did in [*range(0, 0x10000, 251), 0xF001, 0xF041]:
        request = b"\x22" + did.to_bytes(2, "big")
        for candidate in (request, request + b"\x00", request + READ[1:]):
            try:
                guard.approve(SEAT, candidate)
            except GuardRefusal:
                continue
            guard.close(SEAT)
            passed.add(candidate)
    assert passed == {READ, reading_request(described)}
    with pytest.raises(GuardRefusal, match="no reading in the catalogue"):
        reading_request(feature())


# --- the gate's own coverage ---------------------------------------------------


def code_lines(code: CodeType) -> set[int]:
    lines = {line for _, _, line in code.co_lines() if line}
    lines.discard(code.co_firstlineno)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            lines |= code_lines(inner)
    return lines


def function_lines(code: CodeType) -> set[int]:
    """Lines of all functions and methods; what runs at import is not at issue."""
    found: set[int] = set()
    for inner in code.co_consts:
        if not isinstance(inner, CodeType):
            continue
        # A class body runs at import; its methods do not.
        is_class = "__qualname__" in inner.co_names
        found |= function_lines(inner) if is_class else code_lines(inner)
    return found


def test_these_tests_run_every_line_of_the_gate(pytester_lines: set[int]) -> None:
    source = Path(guard_module.__file__)
    wanted = function_lines(compile(source.read_text(), str(source), "exec"))
    text = source.read_text().splitlines()
    missed = {n: text[n - 1] for n in sorted(wanted - pytester_lines)}
    assert len(wanted) > 80
    assert missed == {}


@pytest.fixture
def pytester_lines() -> set[int]:
    """Lines of the guard that run in this file's plain tests, traced by the interpreter."""
    import sys

    name = guard_module.__file__
    lines: set[int] = set()

    def local(frame: object, event: str, _argument: object) -> object:
        if event == "line":
            lines.add(frame.f_lineno)  # type: ignore[attr-defined]
        return local

    def trace(frame: object, _event: str, _argument: object) -> object:
        return local if frame.f_code.co_filename == name else None  # type: ignore[attr-defined]

    tests = [
        test_frame_before_its_request_is_approved_is_refused,
        test_frames_out_of_order_skipped_or_replayed_are_refused,
        test_frames_after_close_are_refused,
        test_flow_control_passes_only_after_the_whole_request,
        test_token_of_a_feature_that_is_not_live_is_refused,
        test_token_that_takes_away_passes_without_a_live_right,
        test_requests_of_another_ecu_are_refused,
        test_second_request_while_one_is_open_is_refused,
        test_listen_only_refuses_everything,
        test_pause_ends_the_open_request_and_resume_does_not_bring_it_back,
        test_right_that_stays_keeps_its_open_request_and_a_sent_one_may_be_answered,
        test_rate_over_all_ecus_is_limited_and_its_window_moves_with_time,
        test_feature_without_actuator_or_read_back_asks_nothing,
        test_the_listed_token_key_passes_to_the_ecu_of_a_token_and_to_no_other,
        test_a_reading_leaves_only_as_the_catalogue_describes_it,
    ]
    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        for test in tests:
            test()
        test_request_of_no_or_too_many_bytes_is_refused(0)
        test_right_request_in_another_frame_is_refused(
            Frame("body", SEAT.request_id, READ, is_fd=True),
        )
        test_right_request_in_another_frame_is_refused(Frame("body", SEAT.request_id, b""))
    finally:
        sys.settrace(before)
    return lines
