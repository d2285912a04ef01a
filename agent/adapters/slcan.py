"""A bus behind a serial adapter that speaks slcan: USB adapters, and a pseudo-terminal without hardware.

Reads whatever has arrived once a window, so that the number of wake-ups does
not grow with the load; `agent.adapters.slcan_lines` says what the bytes mean.
Asks the adapter for its status once a second, so that frames that it lost are
counted and its bus errors are seen. Writes never wait longer than
SEND_TIMEOUT_S. Opens the port for itself alone: a second program would take
half of the frames.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import re
import select
import termios
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import serial

from agent.adapters.bus import BusLostError, RawFrame
from agent.adapters.slcan_lines import LineDecoder, Selection, line_of
from common import log as logs

BAUD: Final = 115_200
"""Speed of the serial line, bit/s, unless the channel names one; USB adapters ignore it."""
ANSWER_S: Final = 0.5
"""Longest wait, in seconds, for the answer to a command; an adapter that answers none waits in vain once."""
GREETINGS: Final = 5
"""How often an adapter is spoken to before it counts as none; some start when the port is opened."""
QUIET_S: Final = 0.1
"""Silence, in seconds, after which an answer is complete that does not show its end."""
MAX_GREETING_BYTES: Final = 262_144
"""Most that an adapter may still send after its channel was closed."""
URGENT_STEP_NS: Final = 5_000_000
"""Longest time that an urgent frame waits in a window."""
ANSWER_STEP_NS: Final = 1_000_000
"""The same, while an answer may be on its way."""
ATTENTIVE_NS: Final = 200_000_000
"""How long, after a frame was sent or an urgent one came, an answer may be on its way; above UDS's P2."""
STATUS_EVERY_NS: Final = 1_000_000_000
"""How often the adapter is asked for its status."""
MAX_UNANSWERED: Final = 3
"""Questions for the status without an answer, after which no more are asked."""
SEND_TIMEOUT_S: Final = 0.05
"""Longest wait, in seconds, until the serial line takes a frame."""
MAX_WINDOW_BYTES: Final = 65_536
"""Most that is read in one window."""
_READ_BYTES: Final = 65_536
_FULL_READ_BYTES: Final = 2_048

NOMINAL: Final = {
    10_000: b"S0",
    20_000: b"S1",
    50_000: b"S2",
    83_300: b"S9",
    83_333: b"S9",
    100_000: b"S3",
    125_000: b"S4",
    250_000: b"S5",
    500_000: b"S6",
    800_000: b"S7",
    1_000_000: b"S8",
}
"""Bit rates with a command of their own: LAWICEL's, and S9, which many have."""
DATA: Final = {
    500_000: b"Y0",
    1_000_000: b"Y1",
    2_000_000: b"Y2",
    3_000_000: b"Y3",
    4_000_000: b"Y4",
    5_000_000: b"Y5",
    8_000_000: b"Y8",
}
"""Bit rates of the data phase; no adapter has all of them."""
DATA_BITRATE: Final = 2_000_000
"""Bit rate of the data phase, bit/s, unless told otherwise; the one that all adapters have."""
TIMING_TOLERANCE: Final = 0.001
"""How far, as a share, a bit rate that was calculated may be off."""
_SJA1000_HZ: Final = 8_000_000
_PRESCALERS: Final = range(1, 65)
_BEFORE_SAMPLE: Final = range(1, 17)

_CHANNEL: Final = re.compile(r"(?P<port>.+?)(?:@(?P<baud>[1-9][0-9]{2,7}))?")
_VERSION: Final = re.compile(rb"(?:^|[\r\a])V[0-9A-Za-z]{4}\r$")
_END: Final = re.compile(rb"[\r\a]")

_log = logs.get(__name__)


class SlcanBus:
    """A channel of an adapter, open; as `agent.adapters.bus.OpenBus` has it."""

    def __init__(
        self,
        channel: str,
        bitrate: int | None,
        *,
        fd: bool,
        listen_only: bool,
        window_s: float,
        monotonic_ns: Callable[[], int],
        data_bitrate: int = DATA_BITRATE,
    ) -> None:
        """Opens the serial line, configures the adapter and opens its channel.

        Args:
            channel: device, such as `/dev/ttyACM0`; behind an `@` its baud rate.
            bitrate: of the bus, bit/s; None: as the adapter is set.
            fd: CAN FD frames are received and may be sent.
            listen_only: the adapter acknowledges nothing, and nothing is sent.
            window_s: longest time that a frame waits for others, seconds.
            data_bitrate: of the data phase of CAN FD, bit/s.

        Raises:
            BusLostError: it cannot be opened; the text says why, and what to do.
        """
        self._channel, self._bitrate = channel, bitrate
        self._is_fd, self._is_listening = fd, listen_only
        self._window_ns = int(window_s * 1e9)
        self._monotonic_ns = monotonic_ns
        self._lines = LineDecoder()
        self._patience_s = ANSWER_S
        self._lost = ""
        self._is_closed = False
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._status_ns, self._asked, self._attentive_ns = 0, 0, 0
        self._has_sent, self._refusals_told = False, 0
        commands = self._configuration(data_bitrate)
        self._port = _open_port(channel)
        self._fd = self._port.fileno()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._arrival, self._departure, self._waking = select.poll(), select.poll(), select.poll()
        self._arrival.register(self._fd, select.POLLIN)
        self._departure.register(self._fd, select.POLLOUT)
        for poll in (self._arrival, self._waking):
            poll.register(self._wake, select.POLLIN)
        with contextlib.ExitStack() as unless_open:
            unless_open.callback(self._close_port)
            try:
                self._greet()
                for command, problem in commands:
                    if self._command(command) is False:
                        raise BusLostError(f"{channel}: {problem}")
                self._open_channel()
            except OSError as error:
                reason = error.strerror or str(error)
                raise BusLostError(f"{channel}: lost while it was opened: {reason}") from error
            unless_open.pop_all()

    # --- opening -------------------------------------------------------------

    def _configuration(self, data_bitrate: int) -> list[tuple[bytes, str]]:
        """The commands that set bit rates, each with what its refusal means."""
        commands = []
        if self._bitrate is not None:
            command = NOMINAL.get(self._bitrate) or _timing(self._bitrate)
            rates = ", ".join(map(str, NOMINAL))
            refused = f"bit rate {self._bitrate} is not one of this adapter's; most have {rates}"
            if command is None:
                raise BusLostError(f"{self._channel}: {refused}")
            commands.append((command, refused))
        if self._is_fd:
            if data_bitrate not in DATA:
                rates = ", ".join(map(str, DATA))
                raise BusLostError(f"{self._channel}: data bit rate {data_bitrate}: expected one of {rates}")
            refused = (
                f"data bit rate {data_bitrate} was refused: an adapter without CAN FD (then fd = false), "
                "or without this rate"
            )
            commands.append((DATA[data_bitrate], refused))
        return commands

    def _greet(self) -> None:
        """Closes the channel as it was left, and waits until the adapter answers."""
        for _ in range(GREETINGS):
            # Twice: the first may end up behind half a command. No empty line: one kind of firmware
            # takes it for the frame before.
            self._write(b"C\rC\rV\r")
            received = b""
            while self._arrival.poll((QUIET_S if received else ANSWER_S) * 1000):
                received += self._read_some()
                if _VERSION.search(received):
                    break
                if len(received) > MAX_GREETING_BYTES:
                    raise BusLostError(f"{self._channel}: it goes on sending after C; no slcan adapter?")
            if _END.search(received):
                return
        raise BusLostError(
            f"{self._channel}: no answer; not an adapter that speaks slcan (with candleLight firmware it is "
            f'a SocketCAN interface), or another baud rate (channel = "{self._channel}@BAUD")'
        )

    def _open_channel(self) -> None:
        """Opens it in the way that the adapter knows; LAWICEL's L is M1 and O on others."""
        if self._is_listening:
            if self._command(b"L"):
                return
            confirmed = self._command(b"M1")
            if confirmed is None:
                _log.warning(
                    "the adapter confirms nothing: whether it only listens is unknown", channel=self._channel
                )
            elif not confirmed:
                raise BusLostError(
                    f"{self._channel}: the adapter has no listen-only mode, and without it would acknowledge "
                    "frames of the vehicle; use another adapter"
                )
        else:
            self._command(b"M0")  # LAWICEL refuses it; elsewhere it ends an earlier M1
        if self._command(b"O") is False:
            raise BusLostError(f"{self._channel}: the adapter refuses to open its channel; unplug it once")

    def _command(self, command: bytes) -> bool | None:
        """Gives a command; whether it was acknowledged, None if there was no answer."""
        self._write(command + b"\r")
        lines = self._lines
        while True:
            if match := _END.search(lines.rest):
                line = lines.rest[: match.start()]
                if match[0] == b"\r" and line:  # frames already: this adapter acknowledges nothing
                    return None
                lines.rest = lines.rest[match.end() :]
                return match[0] == b"\r"
            if not self._arrival.poll(self._patience_s * 1000):
                self._patience_s = 0.0
                return None
            lines.rest += self._read_some()

    # --- the reader's thread -----------------------------------------------------

    @property
    def dropped(self) -> int:
        """Frames that the adapter says it lost, and what is malformed; at least."""
        return self._lines.dropped

    @property
    def malformed(self) -> int:
        """Lines that are nothing known, and may have been frames."""
        return self._lines.malformed

    def read(self, timeout_s: float) -> Sequence[RawFrame]:
        """As `OpenBus.read`."""
        with self._reading:
            if self._lost:
                raise BusLostError(f"{self._channel}: {self._lost}")
            if self._is_closed:
                raise BusLostError(f"{self._channel}: closed")
            self._ask_status()
            # What came with the answer to O may hold whole lines already.
            if b"\r" not in self._lines.rest and not self._arrival.poll(timeout_s * 1000):
                return ()
            begun_ns = self._monotonic_ns()
            received = self._gather(begun_ns)
            frames = self._lines.decode(received, begun_ns, self._monotonic_ns())
            self._lost = self._lost or self._lines.lost
            # More and more rarely: a bus that takes nothing refuses every frame.
            if self._has_sent and self._lines.refused > 2 * self._refusals_told:
                self._refusals_told = self._lines.refused
                _log.warning("the adapter refuses frames", channel=self._channel, refused=self._refusals_told)
            return frames

    def _gather(self, begun_ns: int) -> bytes:
        """What arrives in one window, or until an urgent frame does."""
        urgent = self._lines.selection.urgent
        # Without urgent frames nothing is looked at before the window is over.
        wait_ns = 0 if urgent else self._window_ns
        ends_ns = begun_ns + self._window_ns
        received = b""
        while True:
            is_closing = wait_ns > 0 and bool(self._waking.poll(wait_ns / 1e6))
            received += self._read_all()
            now_ns = self._monotonic_ns()
            if now_ns >= ends_ns or is_closing or self._lost or len(received) > MAX_WINDOW_BYTES:
                return received
            step_ns = ANSWER_STEP_NS if now_ns < self._attentive_ns else URGENT_STEP_NS
            if urgent and urgent.search(b"\r" + self._lines.rest + received):
                self._attentive_ns = now_ns + ATTENTIVE_NS
                return received
            wait_ns = min(ends_ns - now_ns, step_ns)

    def _read_all(self) -> bytes:
        """What is there now; `_lost` says if the adapter is gone."""
        received = b""
        try:
            while not self._is_closed:
                piece = self._read_some()
                received += piece
                # A read returns what the line holds, and a short one has emptied it.
                if len(piece) < _FULL_READ_BYTES or len(received) > MAX_WINDOW_BYTES:
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost = f"the adapter is gone: {error.strerror or error}"
        return received

    def _read_some(self) -> bytes:
        """Raises BlockingIOError if nothing is there, and OSError if nothing will ever be."""
        piece = os.read(self._fd, _READ_BYTES)
        if not piece:
            raise OSError(errno.ENODEV, "unplugged")
        return piece

    def _ask_status(self) -> None:
        """Asks now and then; an adapter that does not answer is asked no more."""
        now_ns = self._monotonic_ns()
        if now_ns < self._status_ns or self._asked - self._lines.statuses >= MAX_UNANSWERED:
            return
        self._status_ns = now_ns + STATUS_EVERY_NS
        self._asked += 1
        try:
            self._write(b"F\r")
        except TimeoutError:
            pass  # it is asked again
        except OSError as error:
            self._lost = f"the adapter is gone: {error.strerror or error}"

    # --- any thread ------------------------------------------------------------------

    def receive_only(self, wanted: frozenset[int] | None, urgent: frozenset[int]) -> None:
        """As `OpenBus.receive_only`; the adapter sends everything, and the rest is left out here."""
        self._lines.selection = Selection(wanted, urgent)

    def send(self, can_id: int, data: bytes, *, is_fd: bool) -> None:
        """As `OpenBus.send`; that the adapter refuses a frame is logged, not raised."""
        if self._is_listening:
            raise PermissionError(errno.EPERM, "the adapter is listen-only", self._channel)
        if is_fd and not self._is_fd:
            raise OSError(errno.EINVAL, "a CAN FD frame on a bus without fd = true", self._channel)
        try:
            line = line_of(can_id, data, is_fd=is_fd)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error), self._channel) from error
        self._write(line)
        self._has_sent = True
        self._attentive_ns = self._monotonic_ns() + ATTENTIVE_NS

    def close(self) -> None:
        """As `OpenBus.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        os.eventfd_write(self._wake, 1)
        with self._reading, self._writing:
            with contextlib.suppress(OSError):  # it is gone, or takes nothing: it cannot be told
                os.write(self._fd, b"C\r")
            self._close_port()

    def _close_port(self) -> None:
        self._is_closed = True
        self._port.close()
        os.close(self._wake)

    def _write(self, content: bytes) -> None:
        """Writes all of it, or nothing.

        Raises:
            OSError: not within SEND_TIMEOUT_S. If a part was written, the bus is lost: what would end
                this line could be taken for a frame that nobody wanted.
        """
        with self._writing:
            if self._is_closed:
                raise OSError(errno.EBADF, "closed", self._channel)
            written = 0
            ends_ns = self._monotonic_ns() + int(SEND_TIMEOUT_S * 1e9)
            while True:
                with contextlib.suppress(BlockingIOError):
                    written += os.write(self._fd, content[written:])
                if written == len(content):
                    return
                left_ns = ends_ns - self._monotonic_ns()
                if left_ns <= 0 or not self._departure.poll(left_ns / 1e6):
                    break
            if written:
                self._lost = "the adapter stopped taking bytes within a frame"
        raise OSError(errno.ETIMEDOUT, f"the adapter took nothing for {SEND_TIMEOUT_S} s", self._channel)


def _open_port(channel: str) -> serial.Serial:
    match = _CHANNEL.fullmatch(channel)
    if match is None:
        raise BusLostError(f"channel {channel!r}: expected a device such as /dev/ttyACM0")
    port = match["port"]
    try:
        return serial.Serial(
            port,
            int(match["baud"] or BAUD),
            timeout=0,
            write_timeout=0,
            inter_byte_timeout=0,  # VMIN 1: nothing there and gone for ever are told apart
            exclusive=True,
        )
    except (OSError, ValueError, termios.error) as error:  # SerialException is an OSError
        raise BusLostError(f"{port}: {_why(port, error)}") from error


def _why(port: str, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:
        return "no such device; is the adapter plugged in? (ls /dev/ttyACM* /dev/ttyUSB*)"
    if number in {errno.EACCES, errno.EPERM}:
        return f"permission denied; its group is {_group(port)} (sudo usermod -aG {_group(port)} USER)"
    if number in {errno.EAGAIN, errno.EBUSY}:
        return "in use by another program (another agent, slcand, ModemManager?)"
    if not isinstance(error, ValueError) and number in {None, errno.ENOTTY, errno.EINVAL}:
        return f"not a serial device ({error})"
    return str(error) if number is None else os.strerror(number)


def _group(port: str) -> str:
    try:
        return grp.getgrgid(Path(port).stat().st_gid).gr_name
    except (OSError, KeyError):
        return "dialout"


def _timing(bitrate: int) -> bytes | None:
    """The command s for a bit rate without one of its own: BTR0 and BTR1 of an SJA1000 at 8 MHz.

    Of the timings within TIMING_TOLERANCE the one with its sample point nearest
    to 87.5 % (CiA 301). None if there is none.
    """
    best: tuple[float, int, int] | None = None
    for quanta in range(8, 26):
        prescaler = round(_SJA1000_HZ / (bitrate * quanta))
        behind = min(max(round(quanta / 8), 1), 8)  # quanta behind the sample point
        before = quanta - behind - 1  # and in front of it, without the first, which synchronises
        off = abs(behind / quanta - 1 / 8)
        if (
            prescaler in _PRESCALERS
            and before in _BEFORE_SAMPLE
            and abs(_SJA1000_HZ / (prescaler * quanta) / bitrate - 1) <= TIMING_TOLERANCE
            and (best is None or off <= best[0])  # the finer of two that are as near
        ):
            best = (off, prescaler - 1, (behind - 1) << 4 | (before - 1))
    return None if best is None else f"s{best[1]:02X}{best[2]:02X}".encode("ascii")
