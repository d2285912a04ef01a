"""Lines of an adapter, cut anywhere: the same frames, in order, and no bytes raise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.adapters.bus import CAN_EFF_FLAG
from agent.adapters.slcan_lines import FD_SIZES, LineDecoder, Selection, line_of

STANDARD = st.integers(0, 0x7FF)
EXTENDED = st.integers(0, 0x1FFF_FFFF).map(lambda can_id: can_id | CAN_EFF_FLAG)
IDS = STANDARD | EXTENDED
CLASSIC = st.tuples(IDS, st.binary(max_size=8), st.just(value=False))
FD = st.tuples(
    IDS,
    st.sampled_from(FD_SIZES).flatmap(lambda size: st.binary(min_size=size, max_size=size)),
    st.just(value=True),
)
BETWEEN = st.sampled_from([b"", b"\r", b"\a", b"z\r", b"Z\r", b"F00\r", b"V1013\r", b"r1234\r"])
CUTS = st.lists(st.integers(1, 300), max_size=40)


def pieces(content: bytes, cuts: list[int]) -> list[bytes]:
    """The content in pieces of these lengths; the last has the rest."""
    found = []
    for length in cuts:
        found.append(content[:length])
        content = content[length:]
    return [*found, content]


@given(st.lists(st.tuples(BETWEEN, CLASSIC | FD), max_size=60), CUTS, st.booleans())
def test_frames_are_the_same_however_their_lines_are_cut(
    sent: list[tuple[bytes, tuple[int, bytes, bool]]], cuts: list[int], is_lower: bool
) -> None:
    decoder = LineDecoder()
    lines = [line_of(can_id, data, is_fd=is_fd) for _, (can_id, data, is_fd) in sent]
    if is_lower:  # digits only: the letters mean something
        lines = [line[:1] + line[1:].lower() for line in lines]
    content = b"".join(between + line for (between, _), line in zip(sent, lines, strict=True))
    frames = []
    for now_ns, piece in enumerate(pieces(content, cuts)):
        frames += decoder.decode(piece, now_ns * 1000, now_ns * 1000 + 999)
    assert [(f.can_id, f.data) for f in frames] == [(can_id, data) for _, (can_id, data, _) in sent]
    assert (decoder.dropped, decoder.lost) == (0, "")
    assert [f.at_ns for f in frames] == sorted(f.at_ns for f in frames)


@given(st.lists(CLASSIC, max_size=40), st.frozensets(IDS, max_size=10), st.frozensets(IDS, max_size=3))
def test_what_is_wanted_or_urgent_is_received_and_nothing_else(
    sent: list[tuple[int, bytes, bool]], wanted: frozenset[int], urgent: frozenset[int]
) -> None:
    wanted |= {can_id for can_id, _, _ in sent[::3]}
    decoder = LineDecoder()
    decoder.selection = Selection(wanted, urgent)
    content = b"".join(line_of(can_id, data, is_fd=False) for can_id, data, _ in sent)
    frames = decoder.decode(content, 0, 1000)
    expected = [(can_id, data) for can_id, data, _ in sent if can_id in wanted | urgent]
    assert [(f.can_id, f.data) for f in frames] == expected
    if decoder.selection.urgent is not None:
        found = decoder.selection.urgent.search(b"\r" + content) is not None
        assert found == any(can_id in urgent for can_id, _, _ in sent)


@given(st.lists(st.tuples(CLASSIC, st.integers(0, 0xFFFF)), min_size=1, max_size=40), st.integers(0, 10**9))
def test_time_stamps_never_leave_the_time_in_which_they_came_and_never_go_back(
    sent: list[tuple[tuple[int, bytes, bool], int]], length_ns: int
) -> None:
    decoder = LineDecoder()
    lines = [line_of(can_id, data, is_fd=False)[:-1] + b"%04X\r" % stamp for (can_id, data, _), stamp in sent]
    frames = decoder.decode(b"".join(lines), 5, 5 + length_ns)
    assert [(f.can_id, f.data) for f in frames] == [(can_id, data) for (can_id, data, _), _ in sent]
    times = [f.at_ns for f in frames]
    assert times == sorted(times)
    assert times[0] >= 5
    assert times[-1] <= 5 + length_ns


@given(st.lists(st.binary(max_size=400) | st.from_regex(rb"[tTdDbBrRFzse0-9A-F\r\a\n]{0,99}"), max_size=20))
def test_no_bytes_raise_and_what_is_kept_is_bounded(received: list[bytes]) -> None:
    decoder = LineDecoder()
    for piece in received:
        for frame in decoder.decode(piece, 0, 0):
            assert len(frame.data) <= 64
        assert len(decoder.rest) <= 256
