"""The lines of the slcan protocol: bytes of a serial line to frames, and a frame to its line.

LAWICEL's protocol (CANUSB manual, version 1.0), with the CAN FD lines d, D, b
and B of CANable 2 and of what is derived from it, and the state and error lines
that Linux reads (drivers/net/can/slcan). Does no I/O and reads no clock. No
bytes raise: what is not a frame and no known answer is counted as dropped,
because it may have been a frame.

A line of an identifier that was met before costs one look into a table, whether
it is wanted or not; only the data of wanted frames are converted.
"""

from __future__ import annotations

import re
from binascii import unhexlify
from collections.abc import Mapping
from itertools import count
from types import MappingProxyType
from typing import Final

from agent.adapters.bus import (
    CAN_EFF_FLAG,
    CAN_EFF_MASK,
    CAN_ERR_FLAG,
    FD_LENGTHS,
    MAX_CLASSIC_BYTES,
    RawFrame,
)

MAX_LINE_BYTES: Final = 256
"""Longest line that is kept; a frame with 64 bytes of data and a time stamp has 146."""
MAX_HEADS: Final = 8_192
"""Most beginnings of lines that are remembered; with one more all are forgotten."""
MAX_GARBAGE_LINES: Final = 100
"""Lines that are nothing known, without a good one between, that make the adapter count as lost."""
MAX_QUIET_ERRORS: Final = 3
"""Statuses with bus errors, without a frame between, that make the bus count as lost."""
FD_SIZES: Final = tuple(sorted(FD_LENGTHS))
"""Bytes of data for each data length code."""

_STAMP_WRAP_MS: Final = 60_000
_NS_PER_MS: Final = 1_000_000
_UNKNOWN_FORM: Final = -MAX_LINE_BYTES
_STAMP_FORMS: Final = frozenset({0, 2, 4})
"""Bytes of time stamp behind the data: none, milliseconds (Z1), microseconds (Z2, which some have)."""

_HEAD: Final = re.compile(rb"(?:([tdbr])([0-7][0-9A-Fa-f]{2})|([TDBR])([01][0-9A-Fa-f]{7}))([0-9A-Fa-f])")
_STATUS: Final = re.compile(rb"F([0-9A-Fa-f]{2})")
_STATE: Final = re.compile(rb"s([awpb])(\d{3})(\d{3})")
_ERRORS: Final = re.compile(rb"e[1-8]([abBcfoOs]{1,8})")
_ANSWER: Final = re.compile(rb"[VvNEzZ]")
"""Begins the answer to a question about the adapter, or what follows a frame that was sent."""

Head = tuple[int, int, int] | tuple[()]
"""`can_id`, where the data begin, and their bytes; empty: the line holds no wanted frame."""
_NO_FRAME: Final[Mapping[bytes, Head]] = MappingProxyType({b"": (), b"z": (), b"Z": ()})

# Status bits of F. Bits 0 and 1 are the queues for receiving and for sending with LAWICEL, and the
# other way round with others: either counts as a loss, because none may go unnoticed.
_F_LOST: Final = 0b0000_1011
_F_WARNING: Final = 0x04
_F_PASSIVE: Final = 0x20
_F_BUS_ERROR: Final = 0x80

# include/uapi/linux/can/error.h: classes in the identifier, and bytes 1 to 3 of the data.
_ERR_CONTROLLER, _ERR_PROTOCOL, _ERR_ACK = 0x04, 0x08, 0x20
_ERR_BUS_OFF, _ERR_BUS_ERROR, _ERR_COUNTERS = 0x40, 0x80, 0x200
_RX_OVERFLOW, _TX_OVERFLOW = 0x01, 0x02
_ACTIVE, _WARNING, _PASSIVE = 0x40, 0x04 | 0x08, 0x10 | 0x20
_ERROR_OF: Final[Mapping[int, tuple[int, int, int, int]]] = MappingProxyType(
    {
        ord("a"): (_ERR_ACK, 0, 0, 0x19),
        ord("b"): (0, 0, 0x08, 0),
        ord("B"): (0, 0, 0x10, 0),
        ord("c"): (0, 0, 0, 0x08),
        ord("f"): (0, 0, 0x02, 0),
        ord("o"): (_ERR_CONTROLLER, _RX_OVERFLOW, 0, 0),
        ord("O"): (_ERR_CONTROLLER, _TX_OVERFLOW, 0, 0),
        ord("s"): (0, 0, 0x04, 0),
    }
)


class Selection:
    """What is received, with the beginnings of the lines met so far."""

    def __init__(self, wanted: frozenset[int] | None = None, urgent: frozenset[int] = frozenset()) -> None:
        """As `OpenBus.receive_only`; None: all.

        Attributes:
            urgent: finds the line of an urgent frame in what was received; None: there are none.
        """
        self._wanted = None if wanted is None else wanted | urgent
        self.heads: dict[bytes, Head] = dict(_NO_FRAME)
        self.urgent = _pattern(urgent) if urgent else None

    def meet(self, line: bytes) -> Head | None:
        """Remembers the beginning of a line; None if it is not that of a frame."""
        match = _HEAD.match(line)
        if match is None:
            return None
        kind = match[1] or match[3]
        can_id = int(match[2] or match[4], 16) | (CAN_EFF_FLAG if match[3] else 0)
        head: Head = ()
        if kind not in b"rR" and (self._wanted is None or can_id in self._wanted):
            size = FD_SIZES[int(match[5], 16)]
            # A classic frame with a code above 8 has 8 bytes (ISO 11898-1:2015, table 5).
            head = (can_id, match.end(), min(size, MAX_CLASSIC_BYTES) if kind in b"tT" else size)
        if len(self.heads) >= MAX_HEADS:
            self.heads = dict(_NO_FRAME)
        self.heads[match[0]] = head
        return head


def _pattern(can_ids: frozenset[int]) -> re.Pattern[bytes]:
    """Finds a line, behind the end of the one before it, that begins as one of these frames does."""
    texts = []
    for can_id in sorted(can_ids):
        is_extended = bool(can_id & CAN_EFF_FLAG)
        digits = f"{can_id & CAN_EFF_MASK:0{8 if is_extended else 3}X}"
        either = "".join(f"[{d}{d.lower()}]" if d.isalpha() else d for d in digits)
        texts.append(("[TDB]" if is_extended else "[tdb]") + either)
    return re.compile(f"[\r\a\n](?:{'|'.join(texts)})".encode())


class LineDecoder:
    """Turns what an adapter sends into frames.

    Attributes:
        selection: what is received; replaced as a whole, by any thread.
        rest: the line that has not ended yet.
        dropped: frames that the adapter says it lost, and what is malformed; at least.
        malformed: lines that are nothing known, and may have been frames.
        refused: commands that were answered by BEL.
        statuses: answers to F.
        lost: why the bus has to be opened again; empty: it does not.
    """

    def __init__(self) -> None:
        self.selection = Selection()
        self.rest = b""
        self.dropped = self.malformed = self.refused = self.statuses = 0
        self.lost = ""
        self._stamp_bytes = _UNKNOWN_FORM
        self._is_overlong = False
        self._lines = self._heard = 0
        self._garbage = self._quiet_errors = 0
        self._state = _ACTIVE

    def decode(self, received: bytes, begun_ns: int, ended_ns: int) -> list[RawFrame]:
        """The frames whose lines have ended, in their order.

        Args:
            begun_ns, ended_ns: when it was received, monotonic. Without time
                stamps of the adapter the lines count as spread evenly over it.
        """
        if b"\n" in received:
            received = received.replace(b"\n", b"")
        if b"\a" in received:
            self.refused += received.count(b"\a")
            received = received.replace(b"\a", b"\r")
        lines = self._split(received)
        if not lines:
            return []
        self._lines += len(lines)
        frames: list[RawFrame] = []
        selection = self.selection
        stamp_bytes, first_ms, first_ns, last_ns = self._stamp_bytes, -1, 0, begun_ns
        garbage = 0
        find, add, make = selection.heads.get, frames.append, tuple.__new__
        for line, spread_ns in zip(lines, count(begun_ns, (ended_ns - begun_ns) // len(lines)), strict=False):
            head = find(line[:5])  # a standard frame's letter, identifier and length code
            if head is None:
                head = find(line[:10])  # an extended frame's
                if head is None:
                    met_ns = max(spread_ns, last_ns)
                    head = self._meet(selection, line, met_ns, frames)
                    if frames and frames[-1].at_ns == met_ns:  # an error frame: what follows is not older
                        last_ns = met_ns
                    find = selection.heads.get
                    if head is None:
                        garbage += 1
                        continue
            if not head:
                continue
            can_id, start, size = head
            try:
                data = unhexlify(line[start:])
            except ValueError:
                garbage += 1
                continue
            if len(data) != size + stamp_bytes:
                if stamp_bytes != _UNKNOWN_FORM or len(data) - size not in _STAMP_FORMS:
                    garbage += 1
                    continue
                stamp_bytes = self._stamp_bytes = len(data) - size
            at_ns = spread_ns
            if stamp_bytes:
                if stamp_bytes == 2:  # noqa: PLR2004 (milliseconds; the longer form is not used)
                    at_ms = data[size] << 8 | data[size + 1]
                    if first_ms < 0:
                        first_ms, first_ns = at_ms, spread_ns
                    at_ns = first_ns + (at_ms - first_ms) % _STAMP_WRAP_MS * _NS_PER_MS
                    at_ns = last_ns = max(last_ns, min(at_ns, ended_ns))
                data = data[:size]
            add(make(RawFrame, (can_id, data, at_ns)))
        self._count(garbage, len(lines))
        return frames

    def _split(self, received: bytes) -> list[bytes]:
        """The lines that have ended; what is left is bounded."""
        lines = (self.rest + received).split(b"\r")
        self.rest = lines.pop()
        if self._is_overlong and lines:
            del lines[0]
            self._is_overlong = False
        elif self._is_overlong:
            self.rest = b""
        if len(self.rest) > MAX_LINE_BYTES:
            self.rest = b""
            self._is_overlong = True
            self._count(1, 1)
        return lines

    def _count(self, garbage: int, lines: int) -> None:
        """Counts lines that are nothing known, of a number of lines."""
        self.dropped += garbage
        self.malformed += garbage
        self._garbage = self._garbage + garbage if garbage == lines else 0
        if self._garbage >= MAX_GARBAGE_LINES:
            self.lost = (
                f"{self._garbage} lines in a row are no slcan: another kind of adapter, or another baud rate"
            )

    def _meet(self, selection: Selection, line: bytes, at_ns: int, frames: list[RawFrame]) -> Head | None:
        """Takes a line whose beginning is new; None if it is nothing known."""
        head = selection.meet(line)
        if head is not None:
            return head
        if match := _STATUS.fullmatch(line):
            self._take_status(int(match[1], 16), at_ns, frames)
        elif match := _STATE.fullmatch(line):
            self._take_state(match[1], int(match[2]), int(match[3]), at_ns, frames)
        elif match := _ERRORS.fullmatch(line):
            self._take_errors(match[1], at_ns, frames)
        elif _ANSWER.match(line) is None:
            return None
        return ()

    def _take_status(self, flags: int, at_ns: int, frames: list[RawFrame]) -> None:
        self.statuses += 1
        self.dropped += (flags & _F_LOST).bit_count()
        self._change_state(
            _PASSIVE if flags & _F_PASSIVE else _WARNING if flags & _F_WARNING else _ACTIVE, at_ns, frames
        )
        if flags & _F_BUS_ERROR:
            frames.append(_error(_ERR_BUS_ERROR, at_ns))
        heard = self._lines - self.statuses
        has_errors = bool(flags & (_F_BUS_ERROR | _F_PASSIVE))
        self._quiet_errors = self._quiet_errors + 1 if has_errors and heard == self._heard else 0
        self._heard = heard
        if self._quiet_errors >= MAX_QUIET_ERRORS:
            self.lost = (
                f"bus errors and no frame (status F{flags:02X}): wrong bit rate, bus-off, or a bus that is "
                "not connected or not terminated"
            )

    def _change_state(self, state: int, at_ns: int, frames: list[RawFrame], counters: bytes = b"") -> None:
        if state == self._state:
            return
        self._state = state
        kind = _ERR_CONTROLLER | (_ERR_COUNTERS if counters else 0)
        frames.append(_error(kind, at_ns, controller=state, counters=counters))

    def _take_state(self, letter: bytes, receive: int, send: int, at_ns: int, frames: list[RawFrame]) -> None:
        if letter == b"b":
            frames.append(_error(_ERR_BUS_OFF, at_ns))
            self.lost = f"bus-off, says the adapter (error counters: receive {receive}, send {send})"
            return
        state = {b"a": _ACTIVE, b"w": _WARNING, b"p": _PASSIVE}[letter]
        self._change_state(state, at_ns, frames, bytes((min(send, 255), min(receive, 255))))

    def _take_errors(self, letters: bytes, at_ns: int, frames: list[RawFrame]) -> None:
        kind, controller, protocol, location = _ERR_PROTOCOL | _ERR_BUS_ERROR, 0, 0, 0
        for letter in letters:
            errors = _ERROR_OF[letter]
            kind, controller = kind | errors[0], controller | errors[1]
            protocol, location = protocol | errors[2], errors[3] or location
        self.dropped += letters.count(b"o")
        frames.append(_error(kind, at_ns, controller=controller, protocol=protocol, location=location))


def _error(
    kind: int,
    at_ns: int,
    *,
    controller: int = 0,
    protocol: int = 0,
    location: int = 0,
    counters: bytes = b"",
) -> RawFrame:
    """An error frame as SocketCAN has it."""
    data = bytes((0, controller, protocol, location, 0, 0)) + (counters or bytes(2))
    return RawFrame(CAN_ERR_FLAG | kind, data, at_ns)


def line_of(can_id: int, data: bytes, *, is_fd: bool) -> bytes:
    """The command that sends a frame, with its end.

    Args:
        can_id: as in RawFrame.
        is_fd: without bit rate switch, which every CAN FD receiver takes.

    Raises:
        ValueError: a length that the kind of frame does not have.
    """
    most = FD_SIZES[-1] if is_fd else MAX_CLASSIC_BYTES
    if len(data) > most or len(data) not in FD_SIZES:
        raise ValueError(
            f"{len(data)} bytes of data: no {'CAN FD' if is_fd else 'classic CAN'} frame has them"
        )
    letter = "d" if is_fd else "t"
    identifier = can_id & CAN_EFF_MASK
    text = f"{letter.upper()}{identifier:08X}" if can_id & CAN_EFF_FLAG else f"{letter}{identifier:03X}"
    return f"{text}{FD_SIZES.index(len(data)):X}{data.hex().upper()}\r".encode("ascii")
