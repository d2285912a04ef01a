"""How messages protect their content: checksums of the common makers and of AUTOSAR E2E.

Pure. A check is plain data; `residue` makes a function of it whose result is 0
for a payload that is as it was sent. Makers' schemes are as public databases
document them; where one of their messages differs, it must not be configured.
"""

from __future__ import annotations

import binascii
import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from agent.errors import DatabaseError

_CAN_EFF_FLAG: Final = 0x8000_0000
_DATA_ID_LIST: Final = 16
E2E1_COUNTER_VALUES: Final = 15
"""The counter of profile 1 runs from 0 to 14."""


class Scheme(enum.StrEnum):
    """Which checksum a message carries, and where."""

    OPENFOD_J1850 = "openfod-j1850"
    """CRC-8 SAE J1850 over the identifier and bytes 1 to the end, in byte 0; counter 0 to 14 in byte 1."""
    E2E_1 = "e2e-1"
    """AUTOSAR E2E profile 1: CRC-8 in byte 0, counter in the low nibble of byte 1."""
    E2E_2 = "e2e-2"
    """AUTOSAR E2E profile 2, as in VW's MQB: CRC-8H2F in byte 0, counter in the low nibble of byte 1."""
    E2E_5 = "e2e-5"
    """AUTOSAR E2E profile 5: CRC-16 in bytes 0 and 1, counter in byte 2."""
    HONDA = "honda"
    """Sum of nibbles in the last nibble; counter of two bits before it."""
    TOYOTA = "toyota"
    """Sum of length, identifier and bytes, in the last byte; most messages have no counter."""
    SUBARU = "subaru"
    """Sum of identifier and bytes, in byte 0; counter in the low nibble of byte 1."""
    CHRYSLER = "chrysler"
    """CRC-8 SAE J1850 in the last byte; counter in the high nibble before it."""
    HYUNDAI = "hyundai"
    """Hyundai and Kia on classic CAN: all nibbles, that of the checksum included, sum to 0 modulo 16."""
    HYUNDAI_CANFD = "hyundai-canfd"
    """Hyundai and Kia on CAN FD: CRC-16 XMODEM, coded by length, in bytes 0 and 1; counter in byte 2."""


class DataIdMode(enum.StrEnum):
    """What of the data id goes into the CRC of profile 1 (AUTOSAR_PRS_E2EProtocol R22-11, 6.3)."""

    BOTH = "both"
    """Both bytes (variant 1A)."""
    ALTERNATING = "alternating"
    """The low byte if the counter is even, else the high one (variant 1B)."""
    LOW = "low"
    """The low byte."""
    NIBBLE = "nibble"
    """The low byte; the low nibble of the high byte is sent beside the counter (variant 1C)."""


@dataclass(frozen=True, slots=True)
class Check:
    """An integrity scheme and its parameters.

    Args:
        scheme: value of a Scheme.
        data_id: 16 bits, profiles 1 and 5.
        data_id_mode: value of a DataIdMode, profile 1.
        data_ids: one byte for each counter value, profile 2.
        offset: byte at which the header of profile 1 or 5 begins.
    """

    scheme: str
    data_id: int = 0
    data_id_mode: str = DataIdMode.BOTH.value
    data_ids: tuple[int, ...] = ()
    offset: int = 0

    def __post_init__(self) -> None:
        for value, kind in ((self.scheme, Scheme), (self.data_id_mode, DataIdMode)):
            if value not in {member.value for member in kind}:
                raise DatabaseError(f"there is no check of the form {value[:20]!r}")
        if not 0 <= self.data_id <= 0xFFFF or not all(0 <= d <= 0xFF for d in self.data_ids):  # noqa: PLR2004
            raise DatabaseError("a data id is out of its range")
        if self.scheme == Scheme.E2E_2 and len(self.data_ids) != _DATA_ID_LIST:
            raise DatabaseError(f"check e2e-2 needs {_DATA_ID_LIST} data_ids, found {len(self.data_ids)}")
        if self.offset < 0:
            raise DatabaseError("a header begins at byte 0 or later")

    @property
    def least_length(self) -> int:
        """Bytes of the shortest message that can carry it."""
        header = {Scheme.E2E_1: 2, Scheme.E2E_5: 3, Scheme.HYUNDAI_CANFD: 3, Scheme.HYUNDAI: 1}
        return self.offset + header.get(Scheme(self.scheme), 2)


Residue = Callable[[bytes], int]


def residue(check: Check, can_id: int) -> Residue:
    """A function that is 0 for payloads of the message's length that are intact.

    Args:
        can_id: identifier, with CAN_EFF_FLAG if it has 29 bits.
    """
    identifier = can_id & ~_CAN_EFF_FLAG
    match Scheme(check.scheme):
        case Scheme.OPENFOD_J1850:
            head = identifier.to_bytes(2, "little")
            return lambda data: j1850_crc(head + data[1:]) ^ data[0]
        case Scheme.E2E_1:
            return _e2e_1(check)
        case Scheme.E2E_2:
            return _e2e_2(bytes(check.data_ids))
        case Scheme.E2E_5:
            return _e2e_5(check)
        case Scheme.HONDA:
            target = (8 + (3 if can_id & _CAN_EFF_FLAG else 0)) - _nibbles(identifier.to_bytes(4, "big"))
            return lambda data: (target - _nibbles(data)) & 0xF
        case Scheme.TOYOTA:
            fixed = sum(identifier.to_bytes(4, "big"))
            return lambda data: (fixed + len(data) + sum(data) - 2 * data[-1]) & 0xFF
        case Scheme.SUBARU:
            fixed = sum(identifier.to_bytes(4, "big"))
            return lambda data: (fixed + sum(data) - 2 * data[0]) & 0xFF
        case Scheme.CHRYSLER:
            return lambda data: j1850_crc(data[:-1]) ^ data[-1]
        case Scheme.HYUNDAI:
            return lambda data: _nibbles(data) & 0xF
        case Scheme.HYUNDAI_CANFD:
            return _hyundai_canfd(identifier)


# --- AUTOSAR E2E, AUTOSAR_PRS_E2EProtocol R22-11 -------------------------------


def _e2e_1(check: Check) -> Residue:
    """Profile 1 (6.3): over the data id, then over all bytes but the CRC's, starting from 0."""
    low, high = check.data_id & 0xFF, check.data_id >> 8
    at, mode = check.offset, check.data_id_mode
    starts = {
        DataIdMode.BOTH: [_CRC8[_CRC8[low] ^ high]] * 2,
        DataIdMode.ALTERNATING: [_CRC8[low], _CRC8[high]],
        DataIdMode.LOW: [_CRC8[low]] * 2,
        DataIdMode.NIBBLE: [_CRC8[_CRC8[low]]] * 2,
    }[DataIdMode(mode)]
    sent_nibble = (high & 0xF) << 4 if mode == DataIdMode.NIBBLE else None

    def remaining(data: bytes) -> int:
        header = data[at + 1]
        crc = starts[header & 1]
        for byte in data[:at] + data[at + 1 :]:
            crc = _CRC8[crc ^ byte]
        wrong = crc ^ data[at]
        if sent_nibble is not None:
            wrong |= (header & 0xF0) ^ sent_nibble
        return wrong

    return remaining


def _e2e_2(data_ids: bytes) -> Residue:
    """Profile 2 (6.4): over all bytes but the first, then over the data id of the counter's value."""

    def remaining(data: bytes) -> int:
        crc = 0xFF
        for byte in data[1:]:
            crc = _CRC8H2F[crc ^ byte]
        return _CRC8H2F[crc ^ data_ids[data[1] & 0xF]] ^ 0xFF ^ data[0]

    return remaining


def _e2e_5(check: Check) -> Residue:
    """Profile 5 (6.7): CRC-16 over all bytes but its own, then over the data id, low byte first."""
    at, end = check.offset, check.data_id.to_bytes(2, "little")

    def remaining(data: bytes) -> int:
        crc = binascii.crc_hqx(data[:at] + data[at + 2 :] + end, 0xFFFF)
        return crc ^ (data[at] | data[at + 1] << 8)

    return remaining


# --- makers ------------------------------------------------------------------

_HYUNDAI_BY_LENGTH: Final = {8: 0x5F29, 16: 0x041D, 24: 0x819D, 32: 0x9F5B}


def _hyundai_canfd(identifier: int) -> Residue:
    end = (identifier & 0xFFFF).to_bytes(2, "little")

    def remaining(data: bytes) -> int:
        crc = binascii.crc_hqx(data[2:] + end, 0) ^ _HYUNDAI_BY_LENGTH.get(len(data), 0)
        return crc ^ (data[0] | data[1] << 8)

    return remaining


_NIBBLES: Final = bytes((byte >> 4) + (byte & 0xF) for byte in range(256))


def _nibbles(data: bytes) -> int:
    return sum(data.translate(_NIBBLES))


# --- CRCs --------------------------------------------------------------------


def _crc8_table(polynomial: int) -> bytes:
    table = bytearray()
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = (crc << 1) ^ polynomial if crc & 0x80 else crc << 1
        table.append(crc & 0xFF)
    return bytes(table)


_CRC8: Final = _crc8_table(0x1D)
_CRC8H2F: Final = _crc8_table(0x2F)


def j1850_crc(data: bytes) -> int:
    """CRC-8 SAE J1850: polynomial 0x1D, initial value and final XOR 0xFF (AUTOSAR_SWS_CRCLibrary R22-11)."""
    crc = 0xFF
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc ^ 0xFF
