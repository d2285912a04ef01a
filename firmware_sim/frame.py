"""The one thing that travels on the simulated bus: a CAN frame."""

from __future__ import annotations

from dataclasses import dataclass

MAX_DATA_BYTES = 8
MAX_STANDARD_ID = 0x7FF
MAX_EXTENDED_ID = 0x1FFF_FFFF
FD_SIZES = (*range(MAX_DATA_BYTES + 1), 12, 16, 20, 24, 32, 48, 64)
"""Bytes of data for each data length code of CAN FD (ISO 11898-1:2015, table 5)."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A CAN frame (ISO 11898-1:2015), classic unless it says otherwise.

    Args:
        can_id: 11 bits, or 29 if `is_extended`.
        data: 0 to 8 bytes, with CAN FD a length of FD_SIZES; empty for a remote frame.
        at_ns: when it left its sender, monotonic nanoseconds.
        remote_dlc: data length that a remote frame asks for; None for a data frame.
        is_fd: True for a CAN FD frame; `is_switched` if its data have a bit rate of their own.
    """

    can_id: int
    data: bytes = b""
    at_ns: int = 0
    is_extended: bool = False
    remote_dlc: int | None = None
    is_fd: bool = False
    is_switched: bool = False
