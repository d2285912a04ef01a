"""A bus brings frames in batches, and every way in which it can be lost is a state."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import can
import pytest
from support.signals_bus import FakeBus, FakeGarage, Listener, wait_until
from support.signals_data import data_file

from agent.adapters.can_bus import (
    MAX_BATCH_FRAMES,
    MAX_MALFORMED_IN_A_ROW,
    NEXT_STATES,
    BusState,
    CanBus,
    replay_log,
)
from agent.errors import TransportError, VehicleError
from agent.model import Frame

NEVER_S = 3600.0


@contextmanager
def running(bus: CanBus) -> Iterator[CanBus]:
    bus.open()
    try:
        yield bus
    finally:
        bus.close()


def fake_bus(
    listener: Listener,
    garage: FakeGarage,
    *,
    uniform: Callable[[float, float], float] | None = None,
    **options: Any,
) -> CanBus:
    options.setdefault("listen_only", False)
    return CanBus(
        "body",
        options.pop("interface", "fake"),
        "c0",
        on_frames=listener.on_frames,
        on_state=listener.on_state,
        open_bus=garage,
        uniform=uniform or (lambda low, _high: low),
        **options,
    )


def message(can_id: int = 0x100, data: bytes = b"\1", timestamp: float = 0.0, **options: Any) -> can.Message:
    options.setdefault("is_extended_id", False)
    return can.Message(timestamp=timestamp, arbitration_id=can_id, data=data, **options)


def first_bus(garage: FakeGarage) -> FakeBus:
    wait_until(lambda: bool(garage.buses))
    return garage.buses[0]


def test_frames_cross_a_virtual_bus_in_both_directions() -> None:
    channel = uuid.uuid4().hex
    listeners = Listener(), Listener()
    one, two = (
        CanBus(name, "virtual", channel, on_frames=seen.on_frames, on_state=seen.on_state, listen_only=False)
        for name, seen in zip(("one", "two"), listeners, strict=True)
    )
    with running(one), running(two):
        wait_until(lambda: one.state is BusState.UP and two.state is BusState.UP)
        one.send(Frame("one", 0x123, b"\1\2"))
        two.send(Frame("two", 0x18DAF110, b"\3", is_extended=True))
        wait_until(lambda: bool(listeners[0].frames and listeners[1].frames))
    (frame,) = listeners[1].frames
    assert (frame.bus, frame.can_id, frame.data, frame.is_extended) == ("two", 0x123, b"\1\2", False)
    (frame,) = listeners[0].frames
    assert (frame.bus, frame.can_id, frame.data, frame.is_extended) == ("one", 0x18DAF110, b"\3", True)
    assert one.state is BusState.CLOSED


def test_a_lost_bus_is_reported_and_opened_again() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)):
        bus = first_bus(garage)
        bus.items.put(message(1))
        bus.items.put(can.CanOperationError("network is down"))
        wait_until(lambda: len(garage.buses) == 2)
        garage.buses[1].items.put(message(2))
        wait_until(lambda: len(listener.frames) == 2)
    assert bus.is_shut_down
    assert [s for s, _ in listener.states] == [BusState.UP, BusState.LOST, BusState.UP, BusState.CLOSED]
    assert listener.states[1][1] == "network is down"
    assert [f.can_id for f in listener.frames] == [1, 2]


def test_a_bus_that_cannot_be_opened_is_tried_with_growing_jitter() -> None:
    limits: list[float] = []

    def uniform(low: float, high: float) -> float:
        limits.append(high)
        return low

    listener, garage = Listener(), FakeGarage()
    garage.refusals = [OSError("no such device")] * 8
    with running(fake_bus(listener, garage, uniform=uniform)):
        wait_until(listener.saw(BusState.UP))
    assert limits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    # The same state with the same reason is said once.
    assert [s for s, _ in listener.states] == [BusState.LOST, BusState.UP, BusState.CLOSED]


def test_a_broken_device_never_ends_the_thread() -> None:
    listener, garage = Listener(), FakeGarage()
    errors = [OSError("gone"), can.CanInitializationError("x"), ValueError("bitrate"), TypeError("option")]
    garage.refusals = list(errors)
    with running(fake_bus(listener, garage)):
        wait_until(listener.saw(BusState.UP))
    assert [r for _, r in listener.states[:4]] == [f"cannot be opened: {e}" for e in errors]


def test_a_bus_off_is_a_loss() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage, interface="socketcan")) as bus:
        first_bus(garage).items.put(message(0x04, is_error_frame=True))
        first_bus(garage).items.put(message(0x40, is_error_frame=True))
        wait_until(listener.saw(BusState.LOST))
    assert (BusState.LOST, "bus-off") in listener.states
    assert bus.counts.error_frames == 2
    assert listener.frames == []


def test_damaged_frames_are_counted_and_only_many_in_a_row_are_a_loss() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)) as bus:
        items = first_bus(garage).items
        for _ in range(MAX_MALFORMED_IN_A_ROW - 1):
            items.put(ValueError("no hex"))
        items.put(message(1))
        wait_until(lambda: bool(listener.frames))
        assert bus.state is BusState.UP
        for _ in range(MAX_MALFORMED_IN_A_ROW):
            items.put(IndexError("short"))
        wait_until(listener.saw(BusState.LOST))
    assert bus.counts.malformed == 2 * MAX_MALFORMED_IN_A_ROW - 1


def test_an_urgent_frame_does_not_wait_and_keeps_the_order() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage, window_s=NEVER_S, urgent_ids=[(0x744, False)])):
        items = first_bus(garage).items
        items.put(message(1))
        items.put(message(2))
        items.put(message(0x744))
        wait_until(lambda: bool(listener.batches))
        assert [f.can_id for f in listener.batches[0]] == [1, 2, 0x744]


def test_a_window_gathers_frames_and_closing_hands_on_the_rest() -> None:
    listener, garage = Listener(), FakeGarage()
    now_ns = [0]
    with running(fake_bus(listener, garage, window_s=0.01, monotonic_ns=lambda: now_ns[0])):
        items = first_bus(garage).items
        items.put(message(1))
        items.put(message(2))
        wait_until(items.empty)
        assert listener.batches == []
        now_ns[0] = 10_000_000
        items.put(message(3))
        wait_until(lambda: bool(listener.batches))
        items.put(message(4))
        wait_until(items.empty)
    assert [f.can_id for f in listener.frames] == [1, 2, 3, 4]


def test_a_full_batch_is_handed_on_at_once() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage, window_s=NEVER_S)):
        for _ in range(MAX_BATCH_FRAMES):
            first_bus(garage).items.put(message())
        wait_until(lambda: bool(listener.batches))
    assert len(listener.batches[0]) == MAX_BATCH_FRAMES


def test_time_stamps_are_mapped_and_never_go_back() -> None:
    listener, garage = Listener(), FakeGarage()
    wall_ns, mono_ns = 1_700_000_000_000_000_000, 50_000_000_000
    with running(
        fake_bus(listener, garage, window_s=0, monotonic_ns=lambda: mono_ns, wall_ns=lambda: wall_ns)
    ):
        for stamp_s in (-2.0, -0.5, 0.25):  # a jumped clock, a waiting frame, the future
            first_bus(garage).items.put(message(timestamp=wall_ns / 1e9 + stamp_s))
        wait_until(lambda: len(listener.frames) == 3)
    assert [f.monotonic_ns for f in listener.frames] == [mono_ns] * 3
    listener, garage = Listener(), FakeGarage()
    with running(
        fake_bus(listener, garage, window_s=0, monotonic_ns=lambda: mono_ns, wall_ns=lambda: wall_ns)
    ):
        for stamp_s in (-1.0, -0.5, -0.75):
            first_bus(garage).items.put(message(timestamp=wall_ns / 1e9 + stamp_s))
        wait_until(lambda: len(listener.frames) == 3)
    assert [f.monotonic_ns for f in listener.frames] == [
        mono_ns - 1_000_000_000,
        mono_ns - 500_000_000,
        mono_ns - 500_000_000,
    ]


def test_filters_hold_wanted_and_urgent_identifiers() -> None:
    garage = FakeGarage()
    bus = fake_bus(Listener(), garage, wanted_ids=[(0x100, False)], urgent_ids=[(0x18DAF110, True)])
    with running(bus):
        wait_until(lambda: bus.state is BusState.UP)
        fake = first_bus(garage)
        assert fake.filters == [
            {"can_id": 0x100, "can_mask": 0x7FF, "extended": False},
            {"can_id": 0x18DAF110, "can_mask": 0x1FFFFFFF, "extended": True},
        ]
        bus.receive([], [(0x744, False)])
        assert fake.filters == [{"can_id": 0x744, "can_mask": 0x7FF, "extended": False}]
        bus.receive(None, ())
        assert not fake.filters
    garage = FakeGarage()
    with running(fake_bus(Listener(), garage, wanted_ids=[])) as bus:
        wait_until(lambda: bus.state is BusState.UP)
        # An empty list would mean everything to python-can.
        assert first_bus(garage).filters


def test_a_listen_only_bus_refuses_to_send() -> None:
    garage = FakeGarage()
    with running(fake_bus(Listener(), garage, listen_only=True)) as bus:
        wait_until(lambda: bus.state is BusState.UP)
        with pytest.raises(VehicleError, match="bus body is listen-only; frame 0x123 was not sent"):
            bus.send(Frame("body", 0x123, b""))
    assert garage.buses[0].sent == []


def test_sending_fails_with_our_error() -> None:
    listener, garage = Listener(), FakeGarage()
    bus = fake_bus(listener, garage)
    with pytest.raises(VehicleError, match="bus body is opening"):
        bus.send(Frame("body", 1, b""))
    with running(bus):
        wait_until(lambda: bus.state is BusState.UP)
        for error in (can.CanOperationError("Transmit buffer full"), OSError("down"), ValueError("-1")):
            first_bus(garage).send_error = error
            with pytest.raises(VehicleError, match=str(error)):
                bus.send(Frame("body", 1, b""))
        with pytest.raises(VehicleError, match="was not sent"):
            bus.send(Frame("body", 1, bytes(9)))
    with pytest.raises(VehicleError, match="bus body is closed"):
        bus.send(Frame("body", 1, b""))


def test_an_error_of_the_receiver_is_not_taken_for_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: raised.append(arguments.exc_value))
    listener, garage = Listener(), FakeGarage()

    def on_frames(_frames: list[Frame]) -> None:
        raise ValueError("a bug")

    bus = CanBus("body", "fake", "c0", on_frames=on_frames, on_state=listener.on_state, open_bus=garage)
    with running(bus):
        first_bus(garage).items.put(message())
        wait_until(listener.saw(BusState.FAILED))
    assert [str(error) for error in raised] == ["a bug"]
    assert len(garage.buses) == 1
    assert garage.buses[0].is_shut_down


def test_no_state_follows_the_end_but_closed() -> None:
    assert set(NEXT_STATES) == set(BusState)
    assert NEXT_STATES[BusState.CLOSED] == frozenset()
    assert NEXT_STATES[BusState.ENDED] == {BusState.CLOSED}


# --- replay ------------------------------------------------------------------


def test_a_log_is_replayed_whole_and_then_ended() -> None:
    path = data_file("kuksa_model3_dogmode_candump.log")
    listener = Listener()
    bus = CanBus("b", "replay", str(path), on_frames=listener.on_frames, on_state=listener.on_state, speed=0)
    with running(bus):
        wait_until(listener.saw(BusState.ENDED))
    expected = list(replay_log(path, "b"))
    assert [(f.can_id, f.data) for f in listener.frames] == [(f.can_id, f.data) for f in expected]
    first_ns = listener.frames[0].monotonic_ns
    spacing = [f.monotonic_ns - first_ns for f in listener.frames]
    assert all(
        abs(found - max(frame.monotonic_ns, before)) <= 1000
        for found, frame, before in zip(spacing, expected, [0, *spacing], strict=False)
    )
    assert listener.states[-1] == (BusState.ENDED, "end of the log")


def test_a_log_keeps_its_own_spacing(tmp_path: Path) -> None:
    path = tmp_path / "short.log"
    path.write_text("(100.000000) can0 001#01\n(100.050000) can0 002#02\n(100.060000) can0 003#03\n")
    listener = Listener()
    bus = CanBus(
        "b",
        "replay",
        str(path),
        on_frames=listener.on_frames,
        on_state=listener.on_state,
        wanted_ids=[(1, False), (3, False)],
        speed=2.0,
    )
    with running(bus):
        wait_until(listener.saw(BusState.ENDED))
    one, three = listener.frames
    assert (one.can_id, three.can_id) == (1, 3)
    assert abs(three.monotonic_ns - one.monotonic_ns - 30_000_000) < 1000


@pytest.mark.parametrize("name", ["logfile.asc", "test_CanMessage.blf", "test_CanMessage_V2_1.trc"])
def test_logs_of_other_formats_are_read(name: str) -> None:
    frames = list(replay_log(data_file("python-can") / name, "b"))
    assert frames
    assert all(a.monotonic_ns >= 0 for a in frames)


def test_a_log_that_is_none_ends_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "bad.log"
    path.write_text("not a log at all\n")
    with pytest.raises(TransportError, match=r"bad\.log: not a log"):
        list(replay_log(path, "b"))
    with pytest.raises(TransportError, match=r"none\.log: not a log"):
        list(replay_log(tmp_path / "none.log", "b"))
    listener = Listener()
    bus = CanBus("b", "replay", str(path), on_frames=listener.on_frames, on_state=listener.on_state, speed=0)
    with running(bus):
        wait_until(listener.saw(BusState.ENDED))
    assert "not a log" in listener.states[-1][1]
