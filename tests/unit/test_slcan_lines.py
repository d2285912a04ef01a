"""Lines of the slcan protocol: what is a frame, what is an answer, and what counts as lost."""

from __future__ import annotations

import pytest

from agent.adapters.bus import CAN_EFF_FLAG, CAN_ERR_FLAG, RawFrame
from agent.adapters.slcan_lines import (
    FD_SIZES,
    MAX_GARBAGE_LINES,
    MAX_HEADS,
    MAX_LINE_BYTES,
    MAX_QUIET_ERRORS,
    LineDecoder,
    Selection,
    line_of,
)

MS = 1_000_000
DATA_64 = bytes(range(64))


def decode(decoder: LineDecoder, received: bytes) -> list[RawFrame]:
    return decoder.decode(received, 100 * MS, 120 * MS)


def frames_of(received: bytes) -> list[tuple[int, bytes]]:
    decoder = LineDecoder()
    frames = [(f.can_id, f.data) for f in decode(decoder, received)]
    assert decoder.dropped == 0
    assert decoder.lost == ""
    return frames


@pytest.mark.parametrize(
    ("line", "can_id", "data"),
    [
        (b"t1232AABB", 0x123, b"\xaa\xbb"),
        (b"t0000", 0, b""),
        (b"t7FF81122334455667788", 0x7FF, bytes.fromhex("1122334455667788")),
        (b"t7ff2aabb", 0x7FF, b"\xaa\xbb"),
        (b"T18DAF1103010203", 0x18DAF110 | CAN_EFF_FLAG, b"\x01\x02\x03"),
        (b"T000001230", 0x123 | CAN_EFF_FLAG, b""),
        (b"t123F" + b"00" * 8, 0x123, bytes(8)),  # classic frames have 8 bytes at most
        (b"d1239" + DATA_64[:12].hex().encode(), 0x123, DATA_64[:12]),
        (b"b123F" + DATA_64.hex().upper().encode(), 0x123, DATA_64),
        (b"D1FFFFFFFE" + DATA_64[:48].hex().encode(), 0x1FFFFFFF | CAN_EFF_FLAG, DATA_64[:48]),
        (b"B000000002AABB", CAN_EFF_FLAG, b"\xaa\xbb"),
    ],
)
def test_every_kind_of_frame_is_read(line: bytes, can_id: int, data: bytes) -> None:
    assert frames_of(line + b"\r") == [(can_id, data)]
    assert frames_of((line + b"\r") * 3) == [(can_id, data)] * 3
    assert frames_of(b"\r\n".join([line, line, b""])) == [(can_id, data)] * 2


@pytest.mark.parametrize(
    "line", [b"", b"z", b"Z", b"V1013", b"NF00D", b"r1238", b"R18DAF1108", b"zt1232AABB"]
)
def test_answers_and_remote_frames_are_no_frames_and_no_loss(line: bytes) -> None:
    assert frames_of(line + b"\rt1230\r" + line + b"\rt1230\r") == [(0x123, b"")] * 2


@pytest.mark.parametrize(
    "line",
    [
        b"t8001AA",  # no 11-bit identifier
        b"T200000001AA",  # no 29-bit identifier
        b"t1232AA",
        b"t1232AABBC",
        b"t1232AABBCC",
        b"t1232AAG0",
        b"t123",
        b"t12",
        b"t123g",
        b"123281122",
        b"t1232AA\xff\xfe",
        b"\x00",
        b"hello",
        b"t123281122334455667788" * 20,
    ],
)
def test_what_may_have_been_a_frame_counts_as_dropped(line: bytes) -> None:
    decoder = LineDecoder()
    received = b"t1232AABB\r" + line + b"\rt1232AABB\r"
    assert [(f.can_id, f.data) for f in decode(decoder, received)] == [(0x123, b"\xaa\xbb")] * 2
    assert decoder.dropped == 1
    assert decoder.lost == ""


def test_unwanted_frames_are_left_out_and_urgent_ones_are_not() -> None:
    decoder = LineDecoder()
    decoder.selection = Selection(frozenset({0x100, 0x101 | CAN_EFF_FLAG}), frozenset({0x7E8}))
    received = b"t1000\rt1010\rT000001010\rT000001000\rt7E80\rr1000\rd1000\rR000001011\r"
    for _ in range(2):  # met for the first time, and known
        ids = [f.can_id for f in decode(decoder, received)]
        assert ids == [0x100, 0x101 | CAN_EFF_FLAG, 0x7E8, 0x100]
    decoder.selection = Selection(frozenset(), frozenset())
    assert decode(decoder, received) == []
    decoder.selection = Selection(None, frozenset())
    assert len(decode(decoder, received)) == 6
    assert decoder.dropped == 0


@pytest.mark.parametrize("received", [b"\rt7E80", b"\rt7e8", b"\aT18DAf110", b"t1230\r\nd7E8"])
def test_an_urgent_line_is_found_before_it_has_ended(received: bytes) -> None:
    urgent = Selection(None, frozenset({0x7E8, 0x18DAF110 | CAN_EFF_FLAG})).urgent
    assert urgent is not None
    assert urgent.search(received)


@pytest.mark.parametrize("received", [b"\rt7E90", b"\rT000007E8", b"\rt1238E8t7E8", b"\rt18DAF110", b"t7E8"])
def test_other_lines_are_not_taken_for_urgent(received: bytes) -> None:
    urgent = Selection(None, frozenset({0x7E8, 0x18DAF110 | CAN_EFF_FLAG})).urgent
    assert urgent is not None
    assert urgent.search(received) is None


def test_frames_without_time_stamps_are_spread_over_the_time_in_which_they_came() -> None:
    decoder = LineDecoder()
    decoder.selection = Selection(frozenset({0x100}))
    received = b"t1000\rt2000\rt1000\rt2000\rt1000\r"
    assert [f.at_ns // MS for f in decode(decoder, received)] == [100, 108, 116]


def test_time_stamps_of_the_adapter_place_frames_within_the_time_in_which_they_came() -> None:
    decoder = LineDecoder()
    received = b"t1000EA5D\rt1010EA5F\rt10200003\rt1030FFFF\rt10400002\r"  # 59,997 ms and on
    frames = decode(decoder, received)
    assert [(f.can_id, f.at_ns // MS) for f in frames] == [
        (0x100, 100),
        (0x101, 102),
        (0x102, 106),
        (0x103, 120),  # later than it was read: no stamp of this adapter
        (0x104, 120),  # and never back
    ]
    assert decoder.dropped == 0


def test_error_frames_between_stamped_ones_do_not_go_back() -> None:
    decoder = LineDecoder()
    frames = decode(decoder, b"t10000001\rt10000010\rF80\rt10000011\r")
    assert [f.at_ns // MS for f in frames] == [100, 115, 115, 116]
    frames = decode(decoder, b"t10000001\rt10000002\rF80\rt10000003\r")
    assert [f.at_ns // MS for f in frames] == [100, 101, 110, 110]


def test_stamps_in_microseconds_are_cut_off() -> None:
    decoder = LineDecoder()
    frames = decode(decoder, b"t1002AABB0000000F\rt1002CCDD000000FF\r")
    assert [f.data for f in frames] == [b"\xaa\xbb", b"\xcc\xdd"]


def test_a_line_whose_stamp_is_missing_is_not_a_frame_of_this_adapter() -> None:
    decoder = LineDecoder()
    frames = decode(decoder, b"t1002AABB0001\rt1002CCDD\rt1002EEFF0002\r")
    assert [f.data for f in frames] == [b"\xaa\xbb", b"\xee\xff"]
    assert decoder.dropped == 1


def test_a_line_without_end_is_bounded_and_its_rest_is_no_frame() -> None:
    decoder = LineDecoder()
    for _ in range(10):
        assert decode(decoder, b"t100811223344" * 30) == []
        assert len(decoder.rest) <= MAX_LINE_BYTES
    assert [f.can_id for f in decode(decoder, b"t2000\rt3000\r")] == [0x300]
    assert decoder.dropped == 1


def test_garbage_alone_counts_as_another_kind_of_adapter() -> None:
    decoder = LineDecoder()
    decode(decoder, b"\x80\x81\r" * (MAX_GARBAGE_LINES - 1))
    assert decoder.lost == ""
    decode(decoder, b"t1000\r")
    decode(decoder, b"\x80\x81\r" * (MAX_GARBAGE_LINES - 1))
    assert decoder.lost == ""
    decode(decoder, b"\x80\x81\r")
    assert "baud rate" in decoder.lost


def test_a_flood_of_identifiers_does_not_grow_the_table() -> None:
    decoder = LineDecoder()
    for base in range(0, 4 * MAX_HEADS, 1024):
        received = b"".join(b"T%08X0\r" % can_id for can_id in range(base, base + 1024))
        assert len(decode(decoder, received)) == 1024
        assert len(decoder.selection.heads) <= MAX_HEADS


# --- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "dropped"), [("00", 0), ("01", 1), ("02", 1), ("08", 1), ("0B", 3), ("F4", 0)]
)
def test_losses_of_the_adapter_are_counted(flags: str, dropped: int) -> None:
    decoder = LineDecoder()
    decode(decoder, f"t1000\rF{flags}\r".encode())
    assert (decoder.dropped, decoder.statuses) == (dropped, 1)


def errors_of(received: bytes) -> list[tuple[int, str]]:
    decoder = LineDecoder()
    frames = decode(decoder, received)
    assert all(f.can_id & CAN_ERR_FLAG and len(f.data) == 8 for f in frames)
    return [(f.can_id & ~CAN_ERR_FLAG, f.data.hex(" ")) for f in frames]


def test_the_state_of_the_controller_is_an_error_frame_when_it_changes() -> None:
    assert errors_of(b"F00\rF04\rF04\rF24\rF20\rF00\rF00\r") == [
        (0x04, "00 0c 00 00 00 00 00 00"),
        (0x04, "00 30 00 00 00 00 00 00"),
        (0x04, "00 40 00 00 00 00 00 00"),
    ]
    assert errors_of(b"sa000000\rsw096007\rsp128999\rsa000000\r") == [
        (0x204, "00 0c 00 00 00 00 07 60"),
        (0x204, "00 30 00 00 00 00 ff 80"),
        (0x204, "00 40 00 00 00 00 00 00"),
    ]
    assert errors_of(b"F80\r") == [(0x80, "00 00 00 00 00 00 00 00")]


def test_errors_that_the_adapter_reports_are_error_frames() -> None:
    assert errors_of(b"e1a\re3bcO\re2sf\r") == [
        (0xA8, "00 00 00 19 00 00 00 00"),
        (0x8C, "00 02 08 08 00 00 00 00"),
        (0x88, "00 00 06 00 00 00 00 00"),
    ]
    decoder = LineDecoder()
    decode(decoder, b"e1o\r")
    assert decoder.dropped == 1


def test_bus_off_is_said_after_what_was_read_before() -> None:
    decoder = LineDecoder()
    frames = decode(decoder, b"t1000\rsb255256\r")
    assert [f.can_id for f in frames] == [0x100, CAN_ERR_FLAG | 0x40]
    assert "bus-off" in decoder.lost


def test_bus_errors_without_any_frame_are_a_wrong_bit_rate_and_with_frames_are_not() -> None:
    decoder = LineDecoder()
    for _ in range(10):
        decode(decoder, b"t1000\r")
        decode(decoder, b"FA4\r")
    assert decoder.lost == ""
    for _ in range(MAX_QUIET_ERRORS - 1):
        decode(decoder, b"FA4\r")
    assert decoder.lost == ""
    decode(decoder, b"FA4\r")
    assert "wrong bit rate" in decoder.lost


def test_refusals_are_counted_and_end_no_frame() -> None:
    decoder = LineDecoder()
    assert len(decode(decoder, b"\at1000\r\a\at1000\r")) == 2
    assert (decoder.refused, decoder.dropped) == (3, 0)


# --- sending --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("can_id", "data", "is_fd", "line"),
    [
        (0x7E0, b"\x02\x10\x03", False, b"t7E03021003\r"),
        (0x001, b"", False, b"t0010\r"),
        (0x18DAF110 | CAN_EFF_FLAG, bytes(8), False, b"T18DAF1108" + b"0" * 16 + b"\r"),
        (0x7E0, bytes(12), True, b"d7E09" + b"0" * 24 + b"\r"),
        (CAN_EFF_FLAG, bytes(64), True, b"D00000000F" + b"0" * 128 + b"\r"),
    ],
)
def test_a_frame_is_written_as_its_command(can_id: int, data: bytes, is_fd: bool, line: bytes) -> None:
    assert line_of(can_id, data, is_fd=is_fd) == line
    assert frames_of(line) == [(can_id, data)]


@pytest.mark.parametrize(
    ("size", "is_fd"),
    [*((n, True) for n in range(70) if n not in FD_SIZES), *((n, False) for n in range(9, 70))],
)
def test_a_length_that_no_frame_has_is_refused(size: int, is_fd: bool) -> None:
    with pytest.raises(ValueError, match=f"{size} bytes"):
        line_of(0x100, bytes(size), is_fd=is_fd)
