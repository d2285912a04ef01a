"""The guard at its limits: lengths, identifiers, and what may follow a finished request."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.edge_ecu import LAMP, READ, S_NS, SEAT, feature, open_guard, pieces, rights, token, twin

from agent.errors import GuardRefusal
from agent.features.guard import MAX_REQUEST_BYTES, MAX_STANDARD_ID, Guard
from agent.model import ActuatorKind, FeatureSpec, Frame


def guard_of(*features: FeatureSpec, size: int = 150) -> Guard:
    guard = Guard(listen_only=False)
    tokens = tuple(token(f.feature_id, size=size) for f in features)
    guard.allow(rights(*features, tokens=tokens), [f.feature_id for f in features])
    return guard


def seat(data: bytes) -> Frame:
    return Frame("body", SEAT.request_id, data)


@pytest.mark.parametrize(
    "silent", [replace(feature(), kind=ActuatorKind.NONE), replace(feature(), ecu=None)], ids=["kind", "ecu"]
)
def test_a_feature_that_writes_to_no_bus_opens_nothing_and_does_not_close_the_others(
    silent: FeatureSpec,
) -> None:
    lamp = feature("lamp", LAMP)
    guard = guard_of(silent, lamp)
    with pytest.raises(GuardRefusal, match="no live catalogue entry"):
        guard.approve(SEAT, READ)
    assert not guard.is_request_id("body", SEAT.request_id)
    guard.approve(LAMP, READ)


@pytest.mark.parametrize("size", [1, 6, 7, 8, 9, 13, 14])
def test_a_listed_request_of_any_length_goes_out_in_its_frames_and_ends_with_them(size: int) -> None:
    request = bytes(range(0x31, 0x31 + size))
    guard = guard_of(replace(feature(), release_request=request))
    guard.approve(SEAT, request)
    frames = pieces(request)
    assert (len(frames) == 1) == (size <= 7)
    for frame in frames:
        guard.check_frame(frame, S_NS)
    for rest in ([size], [0x20 | len(frames)], [0x20 | len(frames), 0, 0, 0, 0, 0, 0, 0], [0x10, size]):
        with pytest.raises(GuardRefusal, match="not the next piece"):
            guard.check_frame(seat(bytes(rest)), S_NS)


def test_a_request_of_the_longest_length_passes_and_a_longer_one_does_not() -> None:
    guard = guard_of(replace(feature(), release_request=bytes(MAX_REQUEST_BYTES)))
    guard.approve(SEAT, bytes(MAX_REQUEST_BYTES))
    guard.close(SEAT)
    longer = bytes(MAX_REQUEST_BYTES + 1)
    guard = guard_of(replace(feature(), release_request=longer))
    with pytest.raises(GuardRefusal, match=f"{len(longer)} bytes, expected 1 to 512"):
        guard.approve(SEAT, longer)


def test_closing_what_is_not_open_changes_nothing() -> None:
    guard = guard_of(feature(), feature("lamp", LAMP))
    guard.approve(SEAT, READ)
    guard.close(LAMP)
    guard.check_frame(pieces(READ)[0], S_NS)


def test_the_highest_standard_identifier_is_standard() -> None:
    highest = twin(SEAT, request_id=MAX_STANDARD_ID)
    assert MAX_STANDARD_ID == 0x7FF
    guard = open_guard(feature(ecu=highest))
    guard.approve(highest, READ)
    with pytest.raises(GuardRefusal, match="no approved request"):
        guard.check_frame(Frame("body", 0x7FF, b"\x03" + READ, is_extended=True), S_NS)
    guard.check_frame(Frame("body", 0x7FF, b"\x03" + READ), S_NS)


@pytest.mark.parametrize("data", ["30 00 0A", "31 08 7F", "32 FF FF 00 00 00 00 00"])
def test_flow_control_may_ask_for_any_block_size_and_pause(data: str) -> None:
    guard = open_guard()
    guard.approve(SEAT, READ)
    guard.check_frame(seat(b"\x03" + READ), S_NS)
    guard.check_frame(seat(bytes.fromhex(data)), S_NS)
