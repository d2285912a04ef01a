"""The one thing that travels on the simulated bus: a classic CAN frame."""

from __future__ import annotations

from dataclasses import dataclass

MAX_DATA_BYTES = 8
MAX_STANDARD_ID = 0x7FF
MAX_EXTENDED_ID = 0x1FFF_FFFF


@dataclass(frozen=True, slots=True)
class Frame:
    """A classic CAN frame (ISO 11898-1).

    Args:
        can_id: 11 bits, or 29 if `is_extended`.
        data: 0 to 8 bytes; empty for a remote frame.
        at_ns: when it left its sender, monotonic nanoseconds.
        remote_dlc: data length that a remote frame asks for; None for a data frame.
    """

    can_id: int
    data: bytes = b""
    at_ns: int = 0
    is_extended: bool = False
    remote_dlc: int | None = None
