"""SocketCAN's broadcast manager: the kernel compares, and wakes the agent only on a change.

A watched message is reported when one of its masked bits changes, and when it
has been silent for its timeout T. What is known in between is a bound: with no
timeout reported until now, the message was heard later than now - T. So its
last frame is repeated with that time, and no later one: it is never fresher
than is certain, and does not go stale while it is being sent. After a timeout
nothing is repeated until the message is heard again.

Messages that are not watched, urgent ones, error frames and sending go through
the raw socket. Repeated frames stand in front of a batch, with times before
those of the batch. Structures are of include/uapi/linux/can/bcm.h.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from agent.adapters.bus import (
    MAX_BATCH_FRAMES,
    MAX_CLASSIC_BYTES,
    WINDOW_S,
    BusLostError,
    RawFrame,
    Stamps,
    Watch,
)
from agent.adapters.socketcan import SocketcanBus, drops, force_buffer, stamp_of
from agent.signals.table import Table

MIN_MAX_AGE_NS: Final = 400_000_000
"""A message whose values grow stale sooner is not worth watching; it stays on the raw socket."""
TIMER_SLACK_NS: Final = 50_000_000
"""How much later than due the kernel's timer may report a timeout; repeated frames are older by it."""

_RX_SETUP: Final = 5
_RX_DELETE: Final = 6
_RX_TIMEOUT: Final = 11
_RX_CHANGED: Final = 12
_SETTIMER: Final = 0x01
_STARTTIMER: Final = 0x02
_RX_CHECK_DLC: Final = 0x40
_RX_ANNOUNCE_RESUME: Final = 0x100
_SO_TIMESTAMPNS: Final = 35
_MSG_DONTWAIT: Final = 0x40

# struct bcm_msg_head, native sizes; 0q brings the frames behind it to their alignment.
_HEAD: Final = struct.Struct("@IIIllllII0q")
_FRAME: Final = struct.Struct("=IB3x8s")


@dataclass(slots=True)
class _Watched:
    """One message that the kernel watches.

    Args:
        timeout_ns: T.
        data: of the last frame that was reported.
        certain_ns: until when it was heard for certain.
        is_heard: no timeout was reported since.
    """

    timeout_ns: int
    data: bytes = b""
    certain_ns: int = 0
    is_heard: bool = False


class BroadcastManagerBus(SocketcanBus):
    """One CAN interface, some of whose messages the kernel watches (OpenBus). Classic CAN only."""

    def __init__(
        self,
        channel: str,
        watches: Mapping[int, Watch],
        *,
        window_s: float = WINDOW_S,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Opens an interface; see SocketcanBus.

        Args:
            watches: by `can_id`; those of messages that are wanted come into force.
        """
        super().__init__(channel, window_s=window_s, monotonic_ns=monotonic_ns, wall_ns=wall_ns)
        self._watches = {
            can_id: watch
            for can_id, watch in watches.items()
            if watch.max_age_ns >= MIN_MAX_AGE_NS and len(watch.mask) <= MAX_CLASSIC_BYTES
        }
        self._watched: dict[int, _Watched] = {}
        # Often enough that no value grows stale between two repetitions of its frame.
        ages = [watch.max_age_ns - _timeout_ns(watch) - TIMER_SLACK_NS for watch in self._watches.values()]
        self._repeat_every_ns = min(ages, default=0) // 2
        self._repeated_ns = 0
        self._changes_stamps = Stamps(monotonic_ns, wall_ns)
        try:
            self._manager = socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_BCM)
            self._opened.callback(self._manager.close)
            self._manager.setblocking(False)
            force_buffer(self._manager, channel)
            self._manager.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            self._manager.connect((channel,))  # a broadcast manager is connected, not bound
        except OSError:
            self.close()
            raise
        self._idle.register(self._manager, select.POLLIN)

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        """Changes what is received (OpenBus.receive_only)."""
        watched = frozenset(self._watches) & (wanted or frozenset()) - urgent
        for can_id in watched - self._watched.keys():
            watch = self._watches[can_id]
            # Known before the kernel can report it.
            self._watched[can_id] = _Watched(_timeout_ns(watch))
            self._manager.send(_setup(can_id, watch))
        super().receive_only(None if wanted is None else wanted - watched, urgent)
        for can_id in self._watched.keys() - watched:
            del self._watched[can_id]
            self._manager.send(_HEAD.pack(_RX_DELETE, 0, 0, 0, 0, 0, 0, can_id, 0))

    def read(self, timeout_s: float) -> list[RawFrame]:
        """What has arrived or changed, and what is known to be as it was (OpenBus.read)."""
        if self._watched:
            due_s = (self._repeated_ns + self._repeat_every_ns - self._monotonic_ns()) / 1e9
            timeout_s = min(timeout_s, max(0.0, due_s))
        return super().read(timeout_s)

    def _drain(self) -> list[RawFrame]:
        frames = super()._drain()
        # Whatever had timed out by now is reported by the end of the next call.
        now_ns = self._monotonic_ns()
        changes, is_empty = self._changes()
        if changes:
            frames = sorted([*frames, *changes], key=lambda frame: frame.at_ns)
            self._is_busy = True
        if is_empty and now_ns - self._repeated_ns >= self._repeat_every_ns:
            self._repeated_ns = now_ns
            return [*self._repetitions(now_ns), *frames]
        return frames

    def _changes(self) -> tuple[list[RawFrame], bool]:
        """Fetches the reports, notes the timeouts; and whether that was all."""
        found: list[tuple[int, bytes]] = []
        stamps: list[int] = []
        is_empty = False
        for _ in range(MAX_BATCH_FRAMES):
            try:
                content, control, _, _ = self._manager.recvmsg(_HEAD.size + _FRAME.size, 128, _MSG_DONTWAIT)
            except BlockingIOError:
                is_empty = True
                break
            except OSError as error:
                raise BusLostError(error.strerror or str(error)) from error
            opcode, _, _, _, _, _, _, can_id, _ = _HEAD.unpack_from(content)
            watched = self._watched.get(can_id)
            if watched is None:  # it was deleted after this was reported
                continue
            if opcode == _RX_TIMEOUT:
                watched.is_heard = False
            elif opcode == _RX_CHANGED:
                _, length, data = _FRAME.unpack_from(content, _HEAD.size)
                watched.data, watched.is_heard = data[:length], True
                found.append((can_id, watched.data))
                stamps.append(stamp_of(control))
        if lost := drops(self._manager):
            # Among them may be a timeout: nothing would be certain any more.
            raise BusLostError(f"the broadcast manager lost {lost} reports")
        frames = []
        times = self._changes_stamps.monotonic(stamps, was_emptied=is_empty)
        for (can_id, data), at_ns in zip(found, times, strict=True):
            if (watched := self._watched.get(can_id)) is not None:
                watched.certain_ns = max(watched.certain_ns, at_ns)
                frames.append(RawFrame(can_id, data, watched.certain_ns))
        return frames, is_empty

    def _repetitions(self, now_ns: int) -> list[RawFrame]:
        """The last frame of each message that is still being sent, as old as it may be at most."""
        frames = []
        for can_id, watched in list(self._watched.items()):
            certain_ns = now_ns - watched.timeout_ns - TIMER_SLACK_NS
            if watched.is_heard and certain_ns > watched.certain_ns:
                watched.certain_ns = certain_ns
                frames.append(RawFrame(can_id, watched.data, certain_ns))
        return frames


def watches_of(table: Table) -> dict[int, Watch]:
    """What may be watched of a bus: messages without checksum and counter, which need every frame."""
    return {
        message.can_id: Watch(
            message.mask.to_bytes(message.length, "little"),
            min(signal.max_age_ms for signal in message.signals) * 1_000_000,
        )
        for message in table.messages
        if message.check is None and not message.any_source and message.length <= MAX_CLASSIC_BYTES
    }


def _timeout_ns(watch: Watch) -> int:
    return watch.max_age_ns // 2


def _setup(can_id: int, watch: Watch) -> bytes:
    """Asks for changes of the masked bits and of the length, timeouts, and the first frame after one."""
    flags = _SETTIMER | _STARTTIMER | _RX_CHECK_DLC | _RX_ANNOUNCE_RESUME
    seconds, nanoseconds = divmod(_timeout_ns(watch), 1_000_000_000)
    head = _HEAD.pack(_RX_SETUP, flags, 0, seconds, nanoseconds // 1000, 0, 0, can_id, 1)
    return head + _FRAME.pack(can_id, MAX_CLASSIC_BYTES, watch.mask)
