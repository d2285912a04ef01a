"""Every other interface of python-can, one message at a time: right, and slower than our own adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final, Protocol

import can

from agent.adapters.bus import CAN_EFF_FLAG, CAN_EFF_MASK, BusLostError, RawFrame, Stamps
from agent.adapters.frame_by_frame import FrameByFrameBus, MalformedFrameError
from agent.adapters.replay import raw_id

SEND_TIMEOUT_S: Final = 0.05
"""Longest wait, in seconds, until the bus takes a frame."""

_STANDARD_MASK: Final = 0x7FF
_NOTHING: Final[dict[str, object]] = {
    "can_id": _STANDARD_MASK,
    "can_mask": CAN_EFF_MASK,
    "extended": True,
}
"""Without any filter python-can receives everything; this one matches nothing that is wanted."""


class _Bus(Protocol):
    """What is used of a bus of python-can."""

    def recv(self, timeout: float | None = None) -> can.Message | None: ...
    def send(self, msg: can.Message, timeout: float | None = None) -> None: ...
    def set_filters(self, filters: Any = None) -> None: ...
    def shutdown(self) -> None: ...


class PythonCanBus(FrameByFrameBus):
    """One bus that python-can has opened."""

    def __init__(
        self,
        bus: _Bus,
        *,
        window_s: float,
        monotonic_ns: Callable[[], int],
        wall_ns: Callable[[], int],
    ) -> None:
        super().__init__(window_s, monotonic_ns)
        self._bus = bus
        self._stamps = Stamps(monotonic_ns, wall_ns)

    def _receive(self, wait_s: float) -> RawFrame | None:
        try:
            message = self._bus.recv(wait_s)
        except (ValueError, IndexError) as error:
            # Parsers of serial lines and sockets raise these on a damaged frame.
            raise MalformedFrameError(str(error)) from error
        except (can.CanError, OSError) as error:
            raise BusLostError(str(error)) from error
        if message is None or message.is_remote_frame:
            return None
        (at_ns,) = self._stamps.monotonic([round(message.timestamp * 1e9)])
        return RawFrame(raw_id(message), bytes(message.data), at_ns)

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:
        """Sends one frame (OpenBus.send)."""
        message = can.Message(
            arbitration_id=can_id & CAN_EFF_MASK,
            is_extended_id=bool(can_id & CAN_EFF_FLAG),
            is_fd=is_fd,
            data=data,
            check=True,
        )
        try:
            self._bus.send(message, timeout=SEND_TIMEOUT_S)
        except can.CanError as error:
            raise OSError(str(error)) from error

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        """Changes what is received (OpenBus.receive_only)."""
        filters = None
        if wanted is not None:
            filters = [_filter(can_id) for can_id in sorted(wanted | urgent)] or [_NOTHING]
        try:
            self._bus.set_filters(filters)
        except can.CanError as error:
            raise OSError(str(error)) from error
        super().receive_only(wanted, urgent)

    def _shut(self) -> None:
        # A device that has vanished cannot be closed in good order.
        with contextlib.suppress(can.CanError, OSError):
            self._bus.shutdown()


def _filter(can_id: int) -> dict[str, object]:
    is_extended = bool(can_id & CAN_EFF_FLAG)
    mask = CAN_EFF_MASK if is_extended else _STANDARD_MASK
    return {"can_id": can_id & CAN_EFF_MASK, "can_mask": mask, "extended": is_extended}


def open_bus(
    interface: str,
    channel: str,
    options: dict[str, Any],
    *,
    window_s: float,
    monotonic_ns: Callable[[], int],
    wall_ns: Callable[[], int],
) -> PythonCanBus:
    """Opens a bus; configuration of python-can outside of the agent's is not looked at.

    Args:
        options: further ones, by python-can's names.

    Raises:
        OSError, TypeError, ValueError: it cannot be opened.
    """
    try:
        bus = can.Bus(channel=channel, interface=interface, ignore_config=True, **options)
    except (can.CanError, NotImplementedError) as error:
        raise OSError(str(error)) from error
    return PythonCanBus(bus, window_s=window_s, monotonic_ns=monotonic_ns, wall_ns=wall_ns)
