"""The UDS client against ECUs that answer well, badly, late, twice, or not at all."""

from __future__ import annotations

import random

import pytest
from support.edge_ecu import (
    LAMP,
    READ,
    RELEASE,
    SEAT,
    SESSION,
    WIDE,
    Bench,
    FakeEcu,
    as_heard,
    feature,
    open_guard,
    rights,
    token,
    twin,
)

from agent.adapters import uds
from agent.errors import (
    EcuBusyError,
    EcuSilentError,
    GuardRefusal,
    NegativeResponseError,
    UnexpectedResponseError,
    VehicleError,
)
from agent.features.guard import Guard, activation_request
from agent.model import Frame

REQUEST = activation_request(feature(), token())
POSITIVE = {REQUEST: bytes.fromhex("71 01 02 01 00"), SESSION: bytes.fromhex("50 03 00 32 01 F4")}
POSITIVE |= {READ: bytes.fromhex("62 F0 01 01"), RELEASE: bytes.fromhex("71 02 02 01")}


def obedient(spec: object = SEAT, **params: object) -> FakeEcu:
    assert isinstance(spec, type(SEAT))
    return FakeEcu(spec, lambda request: [POSITIVE[request]], **params)


def saying(*answers: bytes) -> FakeEcu:
    return FakeEcu(SEAT, lambda _: list(answers))


def test_requests_of_a_job_are_sent_whole_and_in_order() -> None:
    ecu = obedient()
    bench = Bench(ecu)
    done = bench.run(SESSION, REQUEST, READ)
    assert ecu.requests == [SESSION, REQUEST, READ]
    assert (done.error, done.answer, done.feature_id) == (None, POSITIVE[READ], "seat-heating")
    assert not bench.client.is_active


def test_answer_of_many_frames_is_read_whole() -> None:
    long = bytes.fromhex("62 F0 01") + random.Random(1).randbytes(500)
    done = Bench(saying(long)).run(READ)
    assert (done.error, done.answer) == (None, long)


def test_answer_beyond_the_limit_is_refused() -> None:
    long = bytes.fromhex("62 F0 01") + bytes(uds.MAX_ANSWER_BYTES)
    done = Bench(saying(long)).run(READ)
    assert isinstance(done.error, UnexpectedResponseError)
    assert f"length of {len(long)}" in str(done.error)


def test_small_blocks_of_the_ecu_are_kept() -> None:
    ecu = obedient(blocksize=2)
    assert Bench(ecu).run(REQUEST).error is None
    assert ecu.requests == [REQUEST]


def test_negative_response_ends_the_job_with_its_code() -> None:
    ecu = FakeEcu(SEAT, lambda r: [POSITIVE[r] if r == SESSION else bytes([0x7F, r[0], 0x33])])
    bench = Bench(ecu)
    done = bench.run(SESSION, REQUEST, READ)
    assert isinstance(done.error, NegativeResponseError)
    assert (done.error.service, done.error.nrc, done.error.name) == (0x31, 0x33, "SecurityAccessDenied")
    assert done.answer == b""
    assert ecu.requests == [SESSION, REQUEST]


def test_unknown_negative_code_is_passed_on() -> None:
    done = Bench(saying(b"\x7f\x22\x99")).run(READ)
    assert isinstance(done.error, NegativeResponseError)
    assert done.error.nrc == 0x99


def test_response_pending_gives_time_and_then_the_answer_counts() -> None:
    ecu = saying(b"\x7f\x22\x78")
    bench = Bench(ecu)
    bench.start(READ)
    bench.settle()
    bench.pass_s(4.9)
    assert bench.outcomes == []
    bench.hear(b"\x04" + POSITIVE[READ])
    assert [o.error for o in bench.outcomes] == [None]


def test_response_pending_for_ever_is_bounded() -> None:
    bench = Bench()
    bench.start(READ)
    for heard in range(uds.MAX_PENDING + 1):
        assert bench.outcomes == [], heard
        bench.pass_s(4 if heard else 0.9)
        bench.hear(b"\x03\x7f\x22\x78")
    (done,) = bench.outcomes
    assert isinstance(done.error, NegativeResponseError)
    assert done.error.nrc == 0x78


def test_silence_after_response_pending_ends_the_job() -> None:
    bench = Bench(saying(b"\x7f\x22\x78"))
    bench.start(READ)
    bench.settle()
    bench.pass_s(5)
    (done,) = bench.outcomes
    assert isinstance(done.error, EcuSilentError)
    assert "within 5000 ms" in str(done.error)


def test_silent_ecu_ends_the_job_and_the_next_one_runs() -> None:
    bench = Bench()
    bench.start(READ)
    bench.start(READ)
    bench.pass_s(0.999)
    assert bench.outcomes == []
    bench.pass_s(0.001)
    (done,) = bench.outcomes
    assert isinstance(done.error, EcuSilentError)
    bench.ecus.append(obedient())
    bench.pass_s(0)
    bench.settle()
    assert len(bench.sent) == 2
    assert isinstance(done.error, EcuSilentError)


def test_silence_in_the_middle_of_a_request_ends_the_job_and_closes_the_gate() -> None:
    bench = Bench()
    bench.start(REQUEST)
    assert len(bench.sent) == 1
    bench.pass_s(1)
    (done,) = bench.outcomes
    assert isinstance(done.error, EcuSilentError)
    with pytest.raises(GuardRefusal):
        bench.guard.check_frame(bench.sent[0], bench.now_ns)


def test_time_for_the_answer_begins_when_the_request_is_out() -> None:
    bench = Bench()
    bench.start(REQUEST)
    while len(bench.sent) < 23:
        before = len(bench.sent)
        bench.pass_s(0.9)
        bench.hear(b"\x30\x01\x00")
        assert len(bench.sent) == before + 1, bench.outcomes
    bench.pass_s(0.9)
    bench.hear(b"\x05" + POSITIVE[REQUEST])
    assert [o.error for o in bench.outcomes] == [None]


def test_slow_answer_of_many_frames_is_taken_and_one_without_end_is_not() -> None:
    long = POSITIVE[READ][:3] + bytes(28)
    for pace_s, good in ((1.5, True), (3, False)):
        bench = Bench()
        bench.start(READ)
        bench.hear(b"\x10\x1f" + long[:6])
        for i in range(4):
            bench.pass_s(pace_s)
            bench.hear(bytes([0x21 + i]) + long[6 + 7 * i : 13 + 7 * i])
        (done,) = bench.outcomes
        assert (done.error is None) is good
        assert good or isinstance(done.error, EcuSilentError)


@pytest.mark.parametrize(
    "answer",
    [
        "50 03 00 32 01 F4",  # another service
        "62 F1 90 01",  # another identifier
        "62 F0",  # cut off
        "62",
        "7F",
        "7F 22",
        "7F 31 33",  # a refusal of what somebody else asked
        "7F 31 78",
        "22 F0 01",  # the request come back
        "00",
        "FF FF FF FF FF FF",
    ],
)
def test_answer_to_something_else_is_not_taken_for_ours(answer: str) -> None:
    done = Bench(saying(bytes.fromhex(answer))).run(READ)
    assert isinstance(done.error, UnexpectedResponseError)
    assert done.answer == b""
    assert "seat-module answered" in str(done.error)


@pytest.mark.parametrize("answer", ["71 02 02 01", "71 01 02 02", "71 01 02", "6E 01 02 01"])
def test_routine_answer_must_name_the_same_routine(answer: str) -> None:
    done = Bench(saying(bytes.fromhex(answer))).run(REQUEST)
    assert isinstance(done.error, UnexpectedResponseError)


def test_late_answer_to_the_job_before_is_not_taken() -> None:
    bench = Bench()
    bench.start(RELEASE)
    bench.pass_s(1)
    bench.start(REQUEST)
    bench.hear(b"\x04" + POSITIVE[RELEASE])
    assert len(bench.outcomes) == 2
    assert all(o.error is not None for o in bench.outcomes)


def test_answer_before_the_request_is_out_is_no_success() -> None:
    bench = Bench()
    bench.start(REQUEST)
    bench.hear(b"\x05" + POSITIVE[REQUEST])
    (done,) = bench.outcomes
    assert isinstance(done.error, UnexpectedResponseError)
    assert "before it had the whole request" in str(done.error)


def test_frames_of_two_ecus_do_not_mix() -> None:
    guard = open_guard(feature(), feature("lamp", LAMP), live=())
    long = {SEAT: POSITIVE[READ] + b"S" * 60, LAMP: POSITIVE[READ] + b"L" * 60}
    ecus = [FakeEcu(spec, lambda _, spec=spec: [long[spec]]) for spec in (SEAT, LAMP)]  # type: ignore[misc]
    bench = Bench(*ecus, guard=guard)
    bench.start(READ, ecu=SEAT)
    bench.start(READ, ecu=LAMP)
    bench.settle()
    assert sorted(o.answer for o in bench.outcomes) == sorted(long.values())


def test_two_ecus_answering_on_one_identifier_spoil_the_job() -> None:
    bench = Bench()
    bench.start(READ)
    bench.hear(b"\x10\x20" + POSITIVE[READ][:3] + bytes(3))
    bench.hear(b"\x10\x30" + POSITIVE[READ][:3] + bytes(3))
    (done,) = bench.outcomes
    assert isinstance(done.error, UnexpectedResponseError)


@pytest.mark.parametrize("can_id", [0x7DF, SEAT.request_id])
def test_jobs_wait_while_another_tester_speaks(can_id: int) -> None:
    bench = Bench(obedient())
    bench.hear(b"\x02\x3e\x80", can_id)
    bench.start(READ)
    bench.pass_s(2.9)
    assert bench.sent == []
    bench.hear(b"\x02\x3e\x80", can_id)
    bench.pass_s(2.9)
    assert (bench.sent, bench.outcomes) == ([], [])
    bench.pass_s(0.1)
    bench.settle()
    assert [o.error for o in bench.outcomes] == [None]


def test_a_tester_that_never_stops_gives_the_job_back_with_the_reason() -> None:
    bench = Bench(obedient())
    bench.hear(b"\x02\x3e\x80", 0x7DF)
    bench.start(READ)
    for _ in range(16):
        bench.pass_s(2.0)
        bench.hear(b"\x02\x3e\x80", 0x7DF)
    (done,) = bench.outcomes
    assert isinstance(done.error, EcuBusyError)
    assert bench.sent == []


@pytest.mark.parametrize(
    "frame",
    [
        Frame("body", SEAT.request_id, b"\x02\x3e\x80", is_extended=True),
        Frame("body", 0x7DF, b"\x02\x3e\x80", is_extended=True),
        Frame("power", SEAT.request_id, b"\x02\x3e\x80"),
        Frame("body", 0x123, b"\x02\x3e\x80"),
    ],
)
def test_other_frames_are_no_tester(frame: Frame) -> None:
    bench = Bench(obedient())
    bench.client.on_frame(*as_heard(frame))
    assert bench.run(READ).error is None


def test_refusal_of_the_guard_ends_the_job_and_nothing_is_sent() -> None:
    for guard in (Guard(listen_only=True), open_guard(live=())):
        bench = Bench(obedient(), guard=guard)
        done = bench.run(REQUEST)
        assert isinstance(done.error, GuardRefusal)
        assert bench.sent == []
        assert not bench.client.is_active


def test_right_that_ends_in_the_middle_of_a_request_ends_the_job() -> None:
    bench = Bench()
    bench.start(REQUEST)
    bench.guard.allow(rights(feature(), tokens=(token(),)), ())
    bench.hear(b"\x30\x00\x00")
    (done,) = bench.outcomes
    assert isinstance(done.error, GuardRefusal)
    assert len(bench.sent) == 1


def test_bus_that_cannot_send_ends_the_job_and_later_ones_run() -> None:
    bench = Bench(obedient())
    bench.broken = "bus-off"
    assert str(bench.run(READ).error) == "bus-off"
    bench.broken = ""
    assert bench.run(READ).error is None


def test_changed_ecu_ends_the_jobs_of_the_old_one() -> None:
    bench = Bench()
    bench.start(READ)
    bench.start(RELEASE)
    moved = twin(SEAT, response_id=0x7AF)
    bench.guard.allow(rights(feature("seat-heating", moved)), ())
    bench.start(READ, ecu=moved)
    assert [type(o.error) for o in bench.outcomes] == [VehicleError, VehicleError]
    bench.hear(b"\x04" + POSITIVE[READ])
    assert len(bench.outcomes) == 2
    bench.hear(b"\x04" + POSITIVE[READ], 0x7AF)
    assert bench.outcomes[-1].error is None


@pytest.mark.parametrize("changes", [{"response_id": SEAT.request_id}, {"response_id": 0x18DAF110}])
def test_identifiers_that_iso_tp_cannot_use_end_the_job(changes: dict[str, object]) -> None:
    spec = twin(SEAT, **changes)
    bench = Bench(guard=open_guard(feature("seat-heating", spec)))
    done = bench.run(READ, ecu=spec)
    assert isinstance(done.error, VehicleError)
    assert "ISO-TP cannot be set up" in str(done.error)


def test_wide_identifiers_are_sent_as_such() -> None:
    bench = Bench(guard=open_guard(feature("wide", WIDE), live=()))
    bench.start(READ, ecu=WIDE)
    assert [(f.can_id, f.is_extended, f.bus) for f in bench.sent] == [(WIDE.request_id, True, "power")]
    bench.hear(b"\x04" + POSITIVE[READ], WIDE.response_id, bus="power")
    assert bench.outcomes[0].error is None
