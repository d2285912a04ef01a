"""The kernel compares: changes arrive, unchanged values neither go stale nor look fresher than is certain."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bus_wires import ERR, KernelStation, ip, kernel_interface, own_interface, wire
from support.signals_bus import Listener, wait_until
from support.signals_data import entry, simulated_database, small_database, table_of

from agent.adapters import broadcast_manager
from agent.adapters.broadcast_manager import MIN_MAX_AGE_NS, TIMER_SLACK_NS, BroadcastManagerBus, watches_of
from agent.adapters.bus import CAN_EFF_FLAG, BusLostError, RawFrame, Watch
from agent.adapters.can_bus import BusState, CanBus
from agent.signals.checks import Scheme
from agent.signals.mapping import MessageSettings

MAX_AGE_NS = 600_000_000
WATCHED, RAW, URGENT = 0x300, 0x301, 0x302
WATCHES = {can_id: Watch(b"\0\xf0", MAX_AGE_NS) for can_id in (WATCHED, URGENT, CAN_EFF_FLAG | WATCHED)}


@pytest.fixture
def station(tmp_path: Path) -> Iterator[KernelStation]:
    with wire("vcan", tmp_path) as made:
        yield made


@pytest.fixture
def bus(station: KernelStation) -> Iterator[BroadcastManagerBus]:
    made = BroadcastManagerBus(station.options["channel"], WATCHES)
    made.receive_only(frozenset({WATCHED, RAW, CAN_EFF_FLAG | WATCHED}), frozenset({URGENT}))
    yield made
    made.close()


def read_for(bus: BroadcastManagerBus, seconds: float) -> list[tuple[int, RawFrame]]:
    """Frames, each with the time at which it was read."""
    ends_ns = time.monotonic_ns() + int(seconds * 1e9)
    found: list[tuple[int, RawFrame]] = []
    while (left_ns := ends_ns - time.monotonic_ns()) > 0:
        frames = bus.read(left_ns / 1e9)
        found += [(time.monotonic_ns(), frame) for frame in frames]
    return found


def plain(found: list[tuple[int, RawFrame]]) -> list[tuple[int, bytes]]:
    return [(frame.can_id, frame.data) for _, frame in found]


def test_only_changes_of_the_masked_bits_are_handed_on(
    bus: BroadcastManagerBus, station: KernelStation
) -> None:
    for first, second in ((1, 0x10), (2, 0x1F), (3, 0x20), (4, 0x2A), (5, 0x10)):
        station.send(WATCHED, bytes([first, second]))
        station.send(CAN_EFF_FLAG | WATCHED, bytes([first, 0x10]))
        station.send(RAW, bytes([first]))
    found = plain(read_for(bus, 0.1))
    assert [data for can_id, data in found if can_id == WATCHED] == [b"\1\x10", b"\3\x20", b"\5\x10"]
    assert [data for can_id, data in found if can_id == CAN_EFF_FLAG | WATCHED] == [b"\1\x10"]
    assert [data for can_id, data in found if can_id == RAW] == [bytes([n]) for n in range(1, 6)]


def test_a_shorter_frame_is_a_change(bus: BroadcastManagerBus, station: KernelStation) -> None:
    for data in (b"\0\0\0", b"\0", b"\0", b"\0\0\0"):
        station.send(WATCHED, data)
    assert plain(read_for(bus, 0.1)) == [(WATCHED, b"\0\0\0"), (WATCHED, b"\0"), (WATCHED, b"\0\0\0")]


def test_what_is_sent_unchanged_does_not_go_stale_and_is_never_too_fresh(
    bus: BroadcastManagerBus, station: KernelStation
) -> None:
    sent_ns: list[int] = []
    found: list[tuple[int, RawFrame]] = []
    begun_ns = time.monotonic_ns()
    while time.monotonic_ns() - begun_ns < 2_000_000_000:
        sent_ns.append(time.monotonic_ns())
        station.send(WATCHED, b"\0\x10")
        found += read_for(bus, 0.05)
    stopped_ns = time.monotonic_ns()
    found += read_for(bus, 1.5)
    stamps = [frame.at_ns for _, frame in found]
    assert stamps == sorted(stamps)
    assert all(frame.data == b"\0\x10" for _, frame in found)
    # As old as it says, or older, the message was on the bus: never fresher than certain.
    for read_ns, frame in found:
        heard_ns = max(t for t in [*sent_ns, begun_ns] if t <= read_ns)
        assert frame.at_ns <= heard_ns + 1_000_000
    # Between two readings the value is never as old as its age: it stays known.
    ages = [
        later_ns - frame.at_ns
        for (_, frame), (later_ns, _) in itertools.pairwise(found)
        if later_ns < stopped_ns
    ]
    assert len(ages) > 10
    assert max(ages) < MAX_AGE_NS
    # After the timeout nothing is repeated: it goes stale as it should.
    assert found[-1][0] <= sent_ns[-1] + MAX_AGE_NS // 2 + 2 * TIMER_SLACK_NS
    assert found[-1][1].at_ns <= sent_ns[-1]


def test_a_message_that_comes_back_unchanged_is_heard_at_once(
    bus: BroadcastManagerBus, station: KernelStation
) -> None:
    station.send(WATCHED, b"\0\x10")
    assert [frame.data for _, frame in read_for(bus, 0.1)] == [b"\0\x10"]
    read_for(bus, 0.6)
    assert read_for(bus, 0.3) == []
    before_ns = time.monotonic_ns()
    station.send(WATCHED, b"\0\x10")
    ((_, frame),) = read_for(bus, 0.1)
    assert frame.at_ns >= before_ns - 1_000_000


def test_a_message_that_is_never_sent_is_never_heard(bus: BroadcastManagerBus) -> None:
    assert read_for(bus, 1.0) == []


def test_urgent_messages_and_those_of_a_new_subscription_move_without_a_loss(
    bus: BroadcastManagerBus, station: KernelStation
) -> None:
    station.send(URGENT, b"\0\x10")
    station.send(URGENT, b"\0\x10")
    assert plain(read_for(bus, 0.05)) == [(URGENT, b"\0\x10")] * 2
    bus.receive_only(frozenset({URGENT}), frozenset({WATCHED}))
    for _ in range(2):
        station.send(URGENT, b"\0\x20")
        station.send(WATCHED, b"\0\x20")
    assert sorted(plain(read_for(bus, 0.05))) == [(WATCHED, b"\0\x20")] * 2 + [(URGENT, b"\0\x20")]
    bus.receive_only(None, frozenset())
    for _ in range(2):
        station.send(WATCHED, b"\0\x30")
    assert plain(read_for(bus, 0.05)) == [(WATCHED, b"\0\x30")] * 2
    bus.receive_only(frozenset(), frozenset())
    station.send(WATCHED, b"\0\x40")
    assert read_for(bus, 0.7) == []


def test_a_flood_of_one_unchanged_message_wakes_nobody(
    bus: BroadcastManagerBus, station: KernelStation
) -> None:
    station.send(WATCHED, b"\0\x10")
    assert len(read_for(bus, 0.05)) == 1
    for number in range(5000):
        station.send(WATCHED, bytes([number & 0xFF, 0x10]))
    assert all(frame.at_ns < time.monotonic_ns() - MAX_AGE_NS // 2 for _, frame in read_for(bus, 0.05))


def test_reports_that_are_lost_are_a_lost_bus(
    station: KernelStation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.adapters.socketcan.RECEIVE_BUFFER_BYTES", 4096)
    bus = BroadcastManagerBus(kernel_interface(), WATCHES)
    try:
        bus.receive_only(frozenset({WATCHED}), frozenset())
        for number in range(500):
            station.send(WATCHED, bytes([0, (number & 1) << 4]))
        with pytest.raises(BusLostError, match=r"lost \d+ reports"):
            read_for(bus, 1)
    finally:
        bus.close()


def test_a_bus_of_the_agent_hears_changes_and_error_frames_and_comes_back(station: KernelStation) -> None:
    name, listener = own_interface(), Listener()
    bus = CanBus(
        "body",
        "socketcan",
        name,
        on_frames=listener.on_frames,
        on_state=listener.on_state,
        wanted_ids=[WATCHED],
        watches=WATCHES,
        uniform=lambda low, _high: low + 0.01,
    )
    bus.open()
    try:
        wait_until(listener.saw(BusState.UP))
        station.send(WATCHED, b"\0\x10")
        wait_until(lambda: len(listener.frames) == 1)
        station.send(ERR | 0x40, bytes(8))
        wait_until(lambda: [s for s, _ in listener.states].count(BusState.UP) == 2)
        # A bus that was opened again compares anew: what it had is not what it knows.
        station.send(WATCHED, b"\0\x10")
        wait_until(lambda: len(listener.frames) == 2)
        ip("link", "set", name, "down")
        wait_until(lambda: bus.state is BusState.LOST)
        ip("link", "set", name, "up")
        wait_until(lambda: bus.state is BusState.UP)
        station.mend()
        station.send(WATCHED, b"\0\x20")
        wait_until(lambda: listener.frames[-1].data == b"\0\x20")
    finally:
        bus.close()


def test_messages_with_a_checksum_or_of_can_fd_are_not_watched() -> None:
    database = small_database()
    table = table_of(
        database,
        entry("A.Speed", "SPEEDS", "SPEED", max_age_ms=1000),
        entry("A.State", "SPEEDS", "STATE", max_age_ms=500),
        entry("A.First", "SELECTED", "FIRST", max_age_ms=2000),
    )
    assert watches_of(table) == {
        256: Watch(bytes([0xFF, 0xFF, 0, 0, 7, 0, 0, 0]), 500_000_000),
        CAN_EFF_FLAG | 512: Watch(bytes([0xFF, 0xFF, 0xFF, 0]), 2_000_000_000),
    }
    checked = simulated_database()
    message = next(m for m in checked.messages.values() if f"{m.name}_CRC" in {s.name for s in m.signals})
    signal = next(s.name for s in message.signals if not s.name.endswith(("_CRC", "_COUNTER")))
    settings = MessageSettings(message.name, check=Scheme.OPENFOD_J1850)
    table = table_of(checked, entry("A.Checked", message.name, signal), messages=(settings,))
    assert watches_of(table) == {}


def test_what_grows_stale_too_soon_is_left_to_the_raw_socket(station: KernelStation) -> None:
    soon = {WATCHED: Watch(b"\xff", MIN_MAX_AGE_NS - 1), RAW: Watch(bytes(9), MAX_AGE_NS)}
    bus = BroadcastManagerBus(kernel_interface(), soon)
    try:
        bus.receive_only(frozenset({WATCHED, RAW}), frozenset())
        for _ in range(2):
            station.send(WATCHED, b"\1")
        assert plain(read_for(bus, 0.05)) == [(WATCHED, b"\1")] * 2
    finally:
        bus.close()


def test_repetitions_leave_room_before_a_value_grows_stale() -> None:
    for max_age_ns in (MIN_MAX_AGE_NS, MAX_AGE_NS, 10_000_000_000):
        timeout_ns = broadcast_manager._timeout_ns(Watch(b"", max_age_ns))
        every_ns = (max_age_ns - timeout_ns - TIMER_SLACK_NS) // 2
        assert timeout_ns + TIMER_SLACK_NS + every_ns < max_age_ns
