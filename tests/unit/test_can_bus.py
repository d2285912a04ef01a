"""A bus brings frames in batches, and every way in which it can be lost is a state."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
from support.signals_bus import FakeBus, FakeGarage, Listener, wait_until

from agent.adapters.bus import CAN_EFF_FLAG, CAN_ERR_FLAG, BusEndedError, BusLostError, RawFrame
from agent.adapters.can_bus import (
    NEXT_STATES,
    BusState,
    CanBus,
    ControllerState,
    controller_after,
)
from agent.errors import VehicleError
from agent.model import Frame

CRTL, BUSOFF, RESTARTED = CAN_ERR_FLAG | 0x04, CAN_ERR_FLAG | 0x40, CAN_ERR_FLAG | 0x100


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
        "fake",
        "c0",
        on_frames=listener.on_frames,
        on_state=listener.on_state,
        on_dropped=listener.on_dropped,
        open_bus=garage,
        uniform=uniform or (lambda low, _high: low),
        **options,
    )


def frame(can_id: int = 0x100, at_ns: int = 0, data: bytes = b"\1") -> RawFrame:
    return RawFrame(can_id, data, at_ns)


def error(can_id: int, control: int = 0, at_ns: int = 0) -> RawFrame:
    return RawFrame(can_id, bytes([0, control, 0, 0, 0, 0, 0, 0]), at_ns)


def first_bus(garage: FakeGarage) -> FakeBus:
    wait_until(lambda: bool(garage.buses))
    return garage.buses[0]


def test_a_lost_bus_is_reported_and_opened_again() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)):
        bus = first_bus(garage)
        bus.items.put([frame(1)])
        bus.items.put(BusLostError("network is down"))
        wait_until(lambda: len(garage.buses) == 2)
        garage.buses[1].items.put([frame(2)])
        wait_until(lambda: len(listener.frames) == 2)
    assert bus.is_closed
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
    errors = [OSError("gone"), BusLostError("down"), ValueError("bitrate"), TypeError("option")]
    garage.refusals = list(errors)
    with running(fake_bus(listener, garage)):
        wait_until(listener.saw(BusState.UP))
    assert [r for _, r in listener.states[:4]] == [f"cannot be opened: {e}" for e in errors]


def test_a_bus_that_refuses_the_filters_is_not_up() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)) as bus:
        first_bus(garage).filter_error = OSError("too many")
        with pytest.raises(VehicleError, match="bus body keeps its old filters: too many"):
            bus.receive([1], ())
    refused = FakeBus()
    refused.filter_error = OSError("too many")
    openings = iter([refused, FakeBus()])
    listener = Listener()
    with running(fake_bus(listener, openings.__next__)):  # type: ignore[arg-type]
        wait_until(listener.saw(BusState.UP))
    assert listener.states[0] == (BusState.LOST, "does not take the filters: too many")
    assert refused.is_closed


# --- the controller --------------------------------------------------------------


def test_a_bus_off_is_a_loss_after_what_came_before_it() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)) as bus:
        first_bus(garage).items.put([error(CRTL), frame(1), error(BUSOFF), error(RESTARTED), frame(2)])
        wait_until(listener.saw(BusState.LOST))
        wait_until(lambda: len(garage.buses) == 2)
    assert (BusState.LOST, "bus-off") in listener.states
    assert bus.counts.error_frames == 3
    assert [f.can_id for f in listener.frames] == [1, 2]


def test_the_controllers_state_follows_its_error_frames() -> None:
    told = [
        (error(CRTL, 0x04), ControllerState.ERROR_WARNING),
        (error(CRTL, 0x20), ControllerState.ERROR_PASSIVE),
        (error(CAN_ERR_FLAG | 0x80), ControllerState.ERROR_PASSIVE),  # a bus error says nothing of it
        (error(CRTL, 0x08), ControllerState.ERROR_WARNING),
        (error(CRTL, 0x40), ControllerState.ERROR_ACTIVE),
    ]
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)) as bus:
        assert bus.controller is ControllerState.UNKNOWN
        for index, (told_frame, state) in enumerate(told):
            first_bus(garage).items.put([told_frame, frame(index)])
            wait_until(lambda seen=index: len(listener.frames) == seen + 1)  # type: ignore[misc]
            assert bus.controller is state
    assert bus.counts.error_frames == len(told)
    assert [s for s, _ in listener.states] == [BusState.UP, BusState.CLOSED]


def test_every_error_frame_leads_to_one_state_of_the_table() -> None:
    for state, control in product(ControllerState, range(256)):
        after = controller_after(state, CRTL, bytes([0, control]))
        expected = (
            ControllerState.ERROR_PASSIVE
            if control & 0x30
            else ControllerState.ERROR_WARNING
            if control & 0x0C
            else ControllerState.ERROR_ACTIVE
            if control & 0x40
            else state
        )
        assert after is expected
        assert controller_after(state, BUSOFF, bytes([0, control])) is ControllerState.BUS_OFF
        assert controller_after(state, RESTARTED, bytes([0, control])) is ControllerState.ERROR_ACTIVE
        assert controller_after(state, CRTL, b"") is state


# --- what is lost is declared ------------------------------------------------------


def test_drops_are_declared_between_the_frames_around_them() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage, monotonic_ns=lambda: 0)) as bus:
        fake = first_bus(garage)
        fake.items.put([frame(1, 10_000), frame(2, 20_000)])
        wait_until(lambda: len(listener.frames) == 2)
        assert listener.drops == []
        fake.dropped = 7
        fake.items.put([frame(3, 30_000), frame(4, 40_000)])
        wait_until(lambda: len(listener.frames) == 4)
    assert listener.drops == [(20_000, 30_000, 7)]
    assert listener.order == ["frames", "drop", "frames"]
    assert bus.counts.dropped == 7


def test_what_was_missed_while_the_bus_was_lost_is_declared_without_a_number() -> None:
    now_ns = [1000]
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage, monotonic_ns=lambda: now_ns[0])) as bus:
        fake = first_bus(garage)
        fake.dropped = 5
        fake.items.put([frame(1, 2000)])
        wait_until(lambda: bool(listener.frames))
        now_ns[0] = 3000
        fake.items.put(BusLostError("gone"))
        wait_until(lambda: len(garage.buses) == 2)
        wait_until(lambda: len(listener.drops) == 2)
        now_ns[0] = 4000
        # A bus that was opened anew counts anew.
        garage.buses[1].dropped = 2
        garage.buses[1].items.put([])
        wait_until(lambda: len(listener.drops) == 3)
    assert listener.drops == [(1000, 2000, 5), (2000, 3000, 0), (3000, 4000, 2)]
    assert bus.counts.dropped == 7


def test_an_overflow_of_the_controller_is_declared_at_its_place() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage, monotonic_ns=lambda: 1000)) as bus:
        overflow = error(CRTL, 0x01, 3000)
        first_bus(garage).items.put([frame(1, 2000), overflow, frame(2, 4000)])
        wait_until(lambda: len(listener.frames) == 2)
    assert listener.drops == [(2000, 3000, 1)]
    assert listener.order == ["frames", "drop", "frames"]
    assert bus.counts.dropped == 1


def test_damaged_frames_of_every_opening_are_counted() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)) as bus:
        first_bus(garage).malformed = 3
        first_bus(garage).items.put(BusLostError("too many malformed frames"))
        wait_until(lambda: len(garage.buses) == 2)
        garage.buses[1].malformed = 2
        garage.buses[1].items.put([frame()])
        wait_until(lambda: bool(listener.frames))
    assert bus.counts.malformed == 5


# --- filters and sending -------------------------------------------------------------


def test_filters_hold_after_every_opening() -> None:
    listener, garage = Listener(), FakeGarage()
    extended = CAN_EFF_FLAG | 0x18DAF110
    bus = fake_bus(listener, garage, wanted_ids=[0x100], urgent_ids=[extended])
    bus.receive([0x101], [extended])
    with running(bus):
        wait_until(lambda: bus.state is BusState.UP)
        bus.receive([], [0x744])
        bus.receive(None, ())
        first_bus(garage).items.put(BusLostError("gone"))
        wait_until(lambda: len(garage.buses) == 2)
        wait_until(lambda: bool(garage.buses[1].filters))
    assert garage.buses[0].filters == [
        (frozenset({0x101}), frozenset({extended})),
        (frozenset(), frozenset({0x744})),
        (None, frozenset()),
    ]
    assert garage.buses[1].filters == [(None, frozenset())]


def test_a_listen_only_bus_refuses_to_send() -> None:
    garage = FakeGarage()
    with running(fake_bus(Listener(), garage, listen_only=True)) as bus:
        wait_until(lambda: bus.state is BusState.UP)
        with pytest.raises(VehicleError, match="bus body is listen-only; frame 0x123 was not sent"):
            bus.send(Frame("body", 0x123, b""))
    assert garage.buses[0].sent == []


def test_frames_are_sent_as_they_are_and_fail_with_our_error() -> None:
    listener, garage = Listener(), FakeGarage()
    bus = fake_bus(listener, garage, fd=True)
    with pytest.raises(VehicleError, match="bus body is opening"):
        bus.send(Frame("body", 1, b""))
    with running(bus):
        wait_until(lambda: bus.state is BusState.UP)
        bus.send(Frame("body", 0x123, b"\1\2"))
        bus.send(Frame("body", 0x18DAF110, bytes(12), is_extended=True, is_fd=True))
        assert first_bus(garage).sent == [
            (0x123, b"\1\2", False),
            (CAN_EFF_FLAG | 0x18DAF110, bytes(12), True),
        ]
        for problem in (OSError("no buffer space"), ValueError("9 bytes")):
            first_bus(garage).send_error = problem
            with pytest.raises(VehicleError, match=f"frame 0x1 was not sent: {problem}"):
                bus.send(Frame("body", 1, b""))
    with pytest.raises(VehicleError, match="bus body is closed"):
        bus.send(Frame("body", 1, b""))


# --- the end -------------------------------------------------------------------------


def test_an_error_of_the_receiver_is_not_taken_for_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: raised.append(arguments.exc_value))
    listener, garage = Listener(), FakeGarage()

    def on_frames(_name: str, _frames: Sequence[RawFrame]) -> None:
        raise ValueError("a bug")

    bus = CanBus("body", "fake", "c0", on_frames=on_frames, on_state=listener.on_state, open_bus=garage)
    with running(bus):
        first_bus(garage).items.put([frame()])
        wait_until(listener.saw(BusState.FAILED))
    assert [str(problem) for problem in raised] == ["a bug"]
    assert len(garage.buses) == 1
    assert garage.buses[0].is_closed


def test_what_ended_is_not_opened_again() -> None:
    listener, garage = Listener(), FakeGarage()
    with running(fake_bus(listener, garage)):
        first_bus(garage).items.put([frame()])
        first_bus(garage).items.put(BusEndedError("end of the log"))
        wait_until(listener.saw(BusState.ENDED))
    assert len(listener.frames) == 1
    assert listener.states[-1] == (BusState.ENDED, "end of the log")
    assert len(garage.buses) == 1


def test_no_state_follows_the_end_but_closed() -> None:
    assert set(NEXT_STATES) == set(BusState)
    assert NEXT_STATES[BusState.CLOSED] == frozenset()
    assert NEXT_STATES[BusState.ENDED] == {BusState.CLOSED}


@pytest.mark.parametrize("interface", ["socketcan", "socketcand"])
def test_a_bus_of_our_own_does_not_import_python_can(interface: str) -> None:
    # The bus cannot be opened here; what is imported for it is.
    code = f"""
import sys
from agent.adapters.can_bus import BusState, CanBus
from threading import Event
said = Event()
bus = CanBus("b", {interface!r}, "none0", on_frames=print, on_state=lambda *_: said.set(),
             **({{"host": "127.0.0.1", "port": 1}} if {interface!r} == "socketcand" else {{}}))
bus.open()
assert said.wait(10)
bus.close()
assert "agent.adapters.{interface}" in sys.modules
print(*(name for name in ("can", "serial", "cantools", "grpc") if name in sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout.split(), found.stderr) == (0, [], "")
