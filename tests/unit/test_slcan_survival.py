"""A bus behind the simulated adapter: pulled, bus-off, overrun, disturbed; nothing is silently lost."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.sim_hub import RunningHub, running_hub, wait_for

from agent.adapters import slcan
from agent.adapters.bus import RawFrame
from agent.adapters.can_bus import BusState, CanBus, ControllerState
from agent.errors import VehicleError
from agent.model import Frame as AgentFrame
from firmware_sim.frame import Frame


@dataclass
class Heard:
    """What a bus told the agent."""

    frames: list[RawFrame] = field(default_factory=list)
    states: list[tuple[BusState, str]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    def ids(self) -> list[int]:
        return [frame.can_id for frame in self.frames]

    def until(self, state: BusState, times: int = 1) -> str:
        """Waits until a state was reached so often; returns the last reason."""
        wait_for(lambda: [s for s, _ in self.states].count(state) >= times)
        return [why for s, why in self.states if s is state][times - 1]


@contextlib.contextmanager
def heard_through(hub: RunningHub, channel: Path, *, fd: bool = False) -> Iterator[tuple[CanBus, Heard]]:
    heard = Heard()
    bus = CanBus(
        "body",
        "slcan",
        str(channel),
        500_000,
        fd,
        on_frames=lambda _, frames: heard.frames.extend(frames),
        on_state=lambda _, state, why: heard.states.append((state, why)),
        on_dropped=lambda _, _from, _to, count: heard.dropped.append(count),
        listen_only=False,
        window_s=0.005,
        uniform=lambda _low, high: min(high, 0.02),
    )
    bus.open()
    try:
        heard.until(BusState.UP)
        yield bus, heard
    finally:
        bus.close()


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "tty"


def test_a_pulled_adapter_is_opened_again_and_heard_again(link: Path) -> None:
    with running_hub(link=link) as hub, heard_through(hub, link) as (bus, heard):
        hub.send(Frame(0x100))
        wait_for(lambda: heard.ids() == [0x100])
        hub.call(hub.adapter.pull)
        assert "the adapter is gone" in heard.until(BusState.LOST)
        with pytest.raises(VehicleError, match="bus body is lost"):
            bus.send(AgentFrame("body", 0x7E0, b"\x01"))
        hub.call(hub.adapter.plug)
        heard.until(BusState.UP, 2)
        hub.send(Frame(0x101))
        wait_for(lambda: heard.ids() == [0x100, 0x101])
        bus.send(AgentFrame("body", 0x7E0, b"\x01"))
        wait_for(lambda: [f.can_id for f in hub.recorder.frames] == [0x7E0])
        assert bus.counts.lost >= 1
    assert heard.states[-1][0] is BusState.CLOSED


def test_frames_of_can_fd_go_both_ways(link: Path) -> None:
    with running_hub(link=link, fd=True) as hub, heard_through(hub, link, fd=True) as (bus, heard):
        hub.send(Frame(0x18DAF110, bytes(range(64)), is_extended=True, is_fd=True, is_switched=True))
        hub.send(Frame(0x100, bytes(12), is_fd=True))
        hub.send(Frame(0x101, bytes(8)))
        wait_for(lambda: len(heard.frames) == 3)
        assert [(f.can_id, f.data) for f in heard.frames] == [
            (0x98DAF110, bytes(range(64))),
            (0x100, bytes(12)),
            (0x101, bytes(8)),
        ]
        bus.send(AgentFrame("body", 0x18DA10F1, bytes(range(48)), is_extended=True, is_fd=True))
        wait_for(lambda: bool(hub.recorder.frames))
        sent = hub.recorder.frames[0]
        assert (sent.can_id, sent.data, sent.is_fd) == (0x18DA10F1, bytes(range(48)), True)


def test_bus_off_and_a_wrong_bit_rate_end_in_a_lost_bus_that_says_so(
    link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slcan, "STATUS_EVERY_NS", 20_000_000)
    with running_hub(link=link, bitrate=500_000) as hub, heard_through(hub, link) as (bus, heard):
        hub.call(hub.adapter.go_off)
        traffic = (Frame(0x100 + n % 8) for n in itertools.count())

        def is_lost() -> bool:
            hub.send(next(traffic))
            return any(state is BusState.LOST for state, _ in heard.states)

        wait_for(is_lost)
        assert "wrong bit rate, bus-off, or a bus that is not connected" in heard.until(BusState.LOST)
        heard.until(BusState.UP, 2)  # opening the channel again ends the bus-off
        before = len(heard.frames)
        hub.send(Frame(0x7FF))
        wait_for(lambda: heard.ids()[before:][-1:] == [0x7FF])
        assert bus.counts.error_frames > 0


def test_what_the_adapter_loses_is_declared(link: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slcan, "STATUS_EVERY_NS", 20_000_000)
    with running_hub(link=link) as hub, heard_through(hub, link) as (bus, heard):
        hub.call(lambda: hub.adapter.lose(3))
        for can_id in range(0x100, 0x105):
            hub.send(Frame(can_id))
        wait_for(lambda: heard.dropped == [1])  # at least one, says the flag
        assert heard.ids() == [0x103, 0x104]
        assert (bus.counts.dropped, bus.counts.malformed) == (1, 0)
        assert bus.controller is ControllerState.UNKNOWN


def test_a_disturbed_line_spoils_what_it_hits_and_that_is_declared(link: Path) -> None:
    with running_hub(link=link) as hub, heard_through(hub, link) as (bus, heard):
        for can_id in range(0x100, 0x110):
            hub.call(hub.adapter.garble)
            hub.send(Frame(can_id))  # behind "t7F": spoilt
            hub.send(Frame(can_id + 0x100))
        wait_for(lambda: heard.ids()[-1:] == [0x20F])
        assert heard.ids() == list(range(0x200, 0x210))
        assert bus.counts.malformed == bus.counts.dropped == sum(heard.dropped) == 16 * 4
        assert [state for state, _ in heard.states] == [BusState.UP]


def test_a_babbling_identifier_is_heard_with_the_others(link: Path) -> None:
    with running_hub(link=link) as hub, heard_through(hub, link) as (_, heard):
        for _ in range(20):
            for _ in range(100):
                hub.send(Frame(0x001, bytes(8)))
            hub.send(Frame(0x200))
        wait_for(lambda: heard.ids().count(0x200) == 20)
        assert heard.ids().count(0x001) + hub.adapter.dropped == 2000
