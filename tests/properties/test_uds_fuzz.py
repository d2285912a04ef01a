"""Whatever is heard on the bus: no exception, and no job ends well without its answer."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.edge_ecu import READ, SEAT, Bench, as_heard, feature, token

from agent.features.guard import activation_request
from agent.model import Frame

REQUEST = activation_request(feature(), token())

frames = st.builds(
    Frame,
    bus=st.sampled_from(["body", "power"]),
    can_id=st.one_of(st.just(SEAT.response_id), st.integers(0, 2**29 - 1)),
    data=st.one_of(
        st.binary(max_size=64),
        st.builds(
            lambda head, rest: bytes([head]) + rest,
            st.sampled_from([0x02, 0x03, 0x07, 0x10, 0x20, 0x21, 0x22, 0x30, 0x31, 0x32]),
            st.binary(max_size=7),
        ),
        st.just(bytes.fromhex("03 7F 22 78")),
        st.just(bytes.fromhex("30 00 00")),
    ),
    is_extended=st.booleans(),
    is_fd=st.booleans(),
)


def could_answer(request: bytes, heard: list[Frame]) -> bool:
    """True if the frames hold the bytes that a positive response begins with."""
    echo = 3 if request == READ else 4
    start = bytes([request[0] + 0x40]) + request[1:echo]
    return any(start in frame.data for frame in heard)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([READ, REQUEST]), st.lists(st.tuples(frames, st.integers(0, 2)), max_size=30))
def test_noise_raises_nothing_and_is_no_success(request: bytes, heard: list[tuple[Frame, int]]) -> None:
    bench = Bench()
    bench.start(request)
    for frame, seconds in heard:
        bench.client.on_frame(*as_heard(frame))
        bench.pass_s(seconds)
    bench.pass_s(20)
    assert len(bench.outcomes) == 1
    if not could_answer(request, [frame for frame, _ in heard]):
        assert bench.outcomes[0].error is not None
        assert bench.outcomes[0].answer == b""


@settings(max_examples=100, deadline=None)
@given(st.lists(frames, max_size=20))
def test_after_noise_the_next_job_still_runs(heard: list[Frame]) -> None:
    bench = Bench()
    bench.start(READ)
    for frame in heard:
        bench.client.on_frame(*as_heard(frame))
    bench.pass_s(20)
    bench.pass_s(20)
    sent = len(bench.sent)
    bench.start(READ)
    assert len(bench.sent) == sent + 1
    bench.hear(bytes.fromhex("04 62 F0 01 01"))
    assert bench.outcomes[-1].error is None
