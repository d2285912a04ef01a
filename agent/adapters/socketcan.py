"""Linux SocketCAN, with as few wake-ups and system calls as a full bus allows.

A raw socket with the kernel's identifier filters collects frames while the
reader sleeps for the window; then all of them are fetched at once (recvmmsg),
with the kernel's time stamps and its count of what it had to drop. A second
socket, whose frames are thrown away, ends the sleep when an urgent identifier
arrives: all frames come from one queue, so their order is the bus's.

What the kernel lacks is done without: no recvmmsg, one call for each frame; no
right to a large buffer, a smaller one, which is logged; more identifiers than
filters, all frames and a set. Numbers are of include/uapi/linux/can.h and
include/uapi/asm-generic/socket.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from itertools import repeat, takewhile
from typing import Any, Final

from agent.adapters.bus import (
    CAN_EFF_FLAG,
    CAN_EFF_MASK,
    CAN_ERR_FLAG,
    MAX_BATCH_FRAMES,
    WINDOW_S,
    BusLostError,
    RawFrame,
    Stamps,
)
from common import log as logs

log = logs.get(__name__)

RECEIVE_BUFFER_BYTES: Final = 8 * 1024 * 1024
"""Receive buffer that is asked for; the kernel counts about 770 bytes for each frame, and doubles this."""
SEND_TIMEOUT_S: Final = 0.05
"""Longest wait, in seconds, until the interface takes a frame."""
SEND_RETRY_S: Final = 0.001
"""Pause, in seconds, before a frame is offered again to a full queue."""
URGENT_PAUSE_S: Final = 0.001
"""Shortest time, in seconds, between two wake-ups by urgent frames: a flood of them must not spin."""

_CAN_RTR_FLAG: Final = 0x4000_0000
_CAN_SFF_MASK: Final = 0x7FF
_CAN_RAW_ERR_FILTER: Final = 2  # missing in the socket module of Python 3.11
_CAN_RAW_FILTER_MAX: Final = 512
_ALL_ERRORS: Final = 0x1FFF_FFFF
_SO_RXQ_OVFL: Final = 40
_SO_TIMESTAMPNS: Final = 35
_SO_RCVBUFFORCE: Final = 33
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")
_MEMINFO_DROPS: Final = 8
_MSG_DONTWAIT: Final = 0x40

_FRAME: Final = struct.Struct("=IB3x8s")
_FD_FRAME: Final = struct.Struct("=IBB2x64s")
_FD_MTU: Final = _FD_FRAME.size
_SLOTS: Final = 256
_NOTHING_WAITS: Final = frozenset({errno.EAGAIN, errno.EINTR})

# The control data of a frame on a 64-bit kernel: a time stamp, then the count of drops (net/socket.c,
# __sock_recv_cmsgs), each behind a header of a size_t and two ints.
_CONTROL: Final = "16x qq 16x I4x"
_CONTROL_BYTES: Final = 56
_NATIVE_TIMESPEC: Final = struct.Struct("@ll")
_COUNT: Final = struct.Struct("=I")

_Row = tuple[int, int, bytes, int, int, int]
"""`can_id`, length, data, seconds, nanoseconds, frames dropped so far."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("header", _Msghdr), ("length", ctypes.c_uint32))


_HEADER_BYTES: Final = ctypes.sizeof(_Mmsghdr)


class _Recvmmsg:
    """Fetches many frames in one call, into memory that is laid out once."""

    def __init__(self, sock: socket.socket, *, fd: bool) -> None:
        """Prepares the memory.

        Raises:
            OSError: this system's library or kernel has no such call, or another layout.
        """
        if struct.calcsize("@N") != 8 or struct.calcsize("@l") != 8:  # noqa: PLR2004 (bytes of LP64)
            raise OSError(errno.ENOSYS, "control data has another layout than on 64-bit systems")
        try:
            self._call = ctypes.CDLL(None, use_errno=True).recvmmsg
        except (AttributeError, OSError) as error:
            raise OSError(errno.ENOSYS, f"no recvmmsg: {error}") from error
        self._call.argtypes = (
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_void_p,
        )
        self._file = sock.fileno()
        frame = "IB3x64s" if fd else "IB3x8s"
        frame_bytes = _FD_FRAME.size if fd else _FRAME.size
        self._row = struct.Struct(f"={frame}{_CONTROL}")
        stride = self._row.size
        memory = ctypes.create_string_buffer(_SLOTS * stride)
        base = ctypes.addressof(memory)
        self._view = memoryview(memory)
        self._iovecs = (_Iovec * _SLOTS)(
            *(_Iovec(base + slot * stride, frame_bytes) for slot in range(_SLOTS))
        )
        self._headers = (_Mmsghdr * _SLOTS)()
        for slot in range(_SLOTS):
            header = self._headers[slot].header
            header.iov = ctypes.pointer(self._iovecs[slot])
            header.iov_count = 1
            header.control = base + slot * stride + frame_bytes
            header.control_length = _CONTROL_BYTES
        # The kernel writes lengths into the headers: they are made anew before each call.
        self._fresh = memoryview(bytes(self._headers))
        self._headers_view = memoryview(self._headers).cast("B")
        self._headers_at = ctypes.addressof(self._headers)
        self._used_bytes = 0
        with contextlib.suppress(BlockingIOError):
            self.rows()

    def rows(self) -> list[_Row]:
        """Up to _SLOTS frames that are waiting.

        Raises:
            BlockingIOError: none is.
            OSError: the interface has a problem.
        """
        used_bytes = self._used_bytes
        self._headers_view[:used_bytes] = self._fresh[:used_bytes]
        self._used_bytes = 0
        count: int = self._call(self._file, self._headers_at, _SLOTS, _MSG_DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._used_bytes = count * _HEADER_BYTES
        return list(self._row.iter_unpack(self._view[: count * self._row.size]))


def stamp_of(control: Iterable[tuple[int, int, bytes]]) -> int:
    """The kernel's time stamp among the control data of a message, Unix nanoseconds; 0 if there is none."""
    for level, kind, value in control:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = _NATIVE_TIMESPEC.unpack(value)
            return int(seconds) * 1_000_000_000 + int(nanoseconds)
    return 0


class _Recvmsg:
    """Fetches one frame in a call, where there is no better way."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._dropped = 0

    def rows(self) -> list[_Row]:
        """As `_Recvmmsg.rows`."""
        rows: list[_Row] = []
        while len(rows) < _SLOTS:
            try:
                content, control, _, _ = self._socket.recvmsg(_FD_MTU, 128, _MSG_DONTWAIT)
            except OSError:
                if not rows:
                    raise
                break
            for level, kind, value in control:
                if (level, kind) == (socket.SOL_SOCKET, _SO_RXQ_OVFL):
                    (self._dropped,) = _COUNT.unpack(value[: _COUNT.size])
            can_id, length = struct.unpack_from("=IB", content)
            rows.append((can_id, length, content[8:], 0, stamp_of(control), self._dropped))
        return rows


def _rows_of(sock: socket.socket, *, fd: bool) -> Callable[[], list[_Row]]:
    try:
        return _Recvmmsg(sock, fd=fd).rows
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        log.warning("frames are fetched one at a time", reason=str(error))
        return _Recvmsg(sock).rows


class SocketcanBus:
    """One CAN interface of the kernel (OpenBus)."""

    def __init__(
        self,
        channel: str,
        *,
        fd: bool = False,
        window_s: float = WINDOW_S,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Opens an interface; until `receive_only`, nothing but errors is received.

        Raises:
            OSError: no such interface, or no SocketCAN.
            BusLostError: it is down.
        """
        self.dropped = 0
        self.malformed = 0
        self._channel = channel
        self._window_ns = int(window_s * 1e9)
        self._monotonic_ns = monotonic_ns
        self._stamps = Stamps(monotonic_ns, wall_ns)
        self._selected: frozenset[int] | None = None
        self._urgent: frozenset[int] = frozenset()
        self._later: list[tuple[int, RawFrame]] = []
        self._emptied_ns = 0
        self._is_busy = False
        self._error: BusLostError | None = None
        self._closed = False
        self._reading = threading.Lock()
        with contextlib.ExitStack() as opened:
            self._socket = opened.enter_context(_raw_socket())
            self._signal = opened.enter_context(_raw_socket())
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            opened.callback(os.close, self._stop)
            self._configure(fd=fd)
            for sock in (self._socket, self._signal):
                sock.bind((channel,))
            self._rows = _rows_of(self._socket, fd=fd)
            self._asleep = _poll(self._signal, self._stop)
            self._idle = _poll(self._socket, self._signal, self._stop)
            self._opened = opened.pop_all()

    def _configure(self, *, fd: bool) -> None:
        sock, signal = self._socket, self._signal
        signal.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is: one frame will do
        signal.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
        sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, b"")
        sock.setsockopt(socket.SOL_CAN_RAW, _CAN_RAW_ERR_FILTER, _COUNT.pack(_ALL_ERRORS))
        if fd:
            for either in (sock, signal):
                either.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
        force_buffer(sock, self._channel)

    # --- receiving -----------------------------------------------------------------

    def read(self, timeout_s: float) -> list[RawFrame]:
        """What has arrived, oldest first (OpenBus.read)."""
        with self._reading:
            if self._closed:
                raise BusLostError("closed")
            if self._later:
                return self._up_to_loss()
            if self._error is not None:
                raise self._error
            was_urgent = self._wait(timeout_s)
            frames = self._drain()
            if was_urgent and not any(frame[0] in self._urgent for frame in frames):
                # The kernel gave it to the socket that wakes us first: the next read takes it at once.
                self._is_busy = False
            return frames

    def _wait(self, timeout_s: float) -> bool:
        """Sleeps until there is something to fetch; True if an urgent frame is why."""
        if not self._is_busy:
            events = self._idle.poll(timeout_s * 1000)
        else:
            # On a busy bus frames come all the time: only the window's end, or urgency, wakes us.
            left_s = (self._emptied_ns + self._window_ns - self._monotonic_ns()) / 1e9
            events = self._asleep.poll(min(timeout_s, left_s) * 1000) if left_s > 0 else []
        if not any(number == self._signal.fileno() for number, _ in events):
            return False
        slept_s = (self._monotonic_ns() - self._emptied_ns) / 1e9
        if slept_s < URGENT_PAUSE_S:
            time.sleep(URGENT_PAUSE_S - slept_s)
        # An error of the interface is seen on the other socket too.
        with contextlib.suppress(OSError):
            while self._signal.recv(_FD_MTU):
                pass
        return True

    def _drain(self) -> list[RawFrame]:
        """Fetches all that is waiting, up to MAX_BATCH_FRAMES."""
        rows: list[_Row] = []
        is_empty = False
        while not is_empty and len(rows) < MAX_BATCH_FRAMES:
            try:
                more = self._rows()
            except OSError as error:
                is_empty = True
                if error.errno not in _NOTHING_WAITS:
                    self._error = BusLostError(error.strerror or str(error))
                    if not rows:
                        raise self._error from error
            else:
                is_empty = len(more) < _SLOTS
                rows += more
        self._is_busy = bool(rows)
        if not rows:
            self._stamps.monotonic((), was_emptied=is_empty)
            self._emptied_ns = self._monotonic_ns()
            self.dropped = max(self.dropped, drops(self._socket))
            return []
        # Columns: what is done to all frames at once is done in C.
        ids, lengths, contents, seconds, nanoseconds, dropped = zip(*rows, strict=True)
        times = self._stamps.monotonic(
            [s * 1_000_000_000 + ns for s, ns in zip(seconds, nanoseconds, strict=True)],
            was_emptied=is_empty,
        )
        self._emptied_ns = self._monotonic_ns() if is_empty else 0
        data = [content[:length] for content, length in zip(contents, lengths, strict=True)]
        frames: list[RawFrame] = list(
            map(tuple.__new__, repeat(RawFrame), zip(ids, data, times, strict=True))
        )
        if dropped[-1] > self.dropped:
            self._later = list(zip(dropped, frames, strict=True))
            return self._up_to_loss()
        return self._only_selected(frames)

    def _up_to_loss(self) -> list[RawFrame]:
        """What was fetched, up to the next place where the kernel dropped frames, which are counted then."""
        self.dropped = max(self.dropped, self._later[0][0])
        frames = [frame for _, frame in takewhile(lambda it: it[0] <= self.dropped, self._later)]
        del self._later[: len(frames)]
        return self._only_selected(frames)

    def _only_selected(self, frames: list[RawFrame]) -> list[RawFrame]:
        selected = self._selected
        if selected is None:
            return frames
        return [frame for frame in frames if frame[0] in selected or frame[0] & CAN_ERR_FLAG]

    # --- everything else, from any thread --------------------------------------------

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        """Changes what is received (OpenBus.receive_only)."""
        ids = None if wanted is None else wanted | urgent
        before = self._urgent
        _filter(self._signal, urgent)
        try:
            exact = _filter(self._socket, ids)
        except OSError:
            _filter(self._signal, before)
            raise
        self._urgent = urgent
        self._selected = None if exact else ids

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:
        """Sends one frame (OpenBus.send)."""
        if is_fd:
            content = _FD_FRAME.pack(can_id, len(data), 0, data)
        else:
            content = _FRAME.pack(can_id, len(data), data)
        ends_ns = self._monotonic_ns() + int(SEND_TIMEOUT_S * 1e9)
        while True:
            try:
                self._socket.send(content, _MSG_DONTWAIT)
            except OSError as error:
                # The interface's queue is full (ENOBUFS), or what the socket may have in it (EAGAIN).
                is_full = error.errno in {errno.ENOBUFS, errno.EAGAIN}
                if not is_full or self._monotonic_ns() >= ends_ns:
                    raise
                time.sleep(SEND_RETRY_S)
            else:
                return

    def close(self) -> None:
        """Closes it; wakes the reader up."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._stop, 1)
        with self._reading:
            self._opened.close()


def _raw_socket() -> socket.socket:
    if not hasattr(socket, "AF_CAN"):
        raise OSError(errno.EAFNOSUPPORT, "this Python has no SocketCAN")
    sock = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
    sock.setblocking(False)
    return sock


def _poll(*files: socket.socket | int) -> Any:
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return poll


def force_buffer(sock: socket.socket, channel: str) -> None:
    """Gives a socket the large receive buffer, or what it may have of it, and logs its size."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    has_bytes = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    log.info("CAN receive buffer", channel=channel, bytes=has_bytes)
    if has_bytes < RECEIVE_BUFFER_BYTES:
        log.warning(
            "the CAN receive buffer is small: give the agent CAP_NET_ADMIN, or raise net.core.rmem_max",
            channel=channel,
            bytes=has_bytes,
            wanted=RECEIVE_BUFFER_BYTES,
        )


def drops(sock: socket.socket) -> int:
    """Frames that the kernel could not queue for this socket, as of now."""
    content = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
    return int(_MEMINFO.unpack(content)[_MEMINFO_DROPS]) if len(content) == _MEMINFO.size else 0


def _filter(sock: socket.socket, ids: Iterable[int] | None) -> bool:
    """Receives only these identifiers, None: all; False if the kernel cannot hold so many filters.

    Masks are whole, so that the kernel finds the socket by the identifier and
    compares nothing (net/can/af_can.c, can_rcv_list_find); remote frames carry
    no data and are left out.
    """
    ids = None if ids is None else sorted(ids)
    exact = ids is None or len(ids) <= _CAN_RAW_FILTER_MAX
    if ids is None or not exact:
        content = struct.pack("=II", 0, _CAN_RTR_FLAG)
    else:
        content = b"".join(struct.pack("=II", can_id, _mask(can_id)) for can_id in ids)
    sock.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FILTER, content)
    return exact


def _mask(can_id: int) -> int:
    bits = CAN_EFF_MASK if can_id & CAN_EFF_FLAG else _CAN_SFF_MASK
    return CAN_EFF_FLAG | _CAN_RTR_FLAG | bits
