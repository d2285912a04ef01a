"""`fod-sim tester`: a diagnostic tester of its own, such as an owner may hold.

Sends raw UDS requests over ISO-TP on the bus and says the answers in words.
It knows nothing of tokens and rights: what it cannot get, nobody on the bus can.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import can
import isotp
from udsoncan.Response import Response

ANSWER_TIMEOUT_S = 2.0
"""How long an answer may take."""
MAX_REQUEST_BYTES = 4095
ECUS = {"seat-module": (0x744, 0x74C), "powertrain": (0x7E0, 0x7E8)}
"""Request and response identifiers of the demo's ECUs."""
_POLL_S = 0.01
_NEGATIVE = 0x7F
_NEGATIVE_BYTES = 3


class TesterError(Exception):
    """The request cannot be sent, or nobody answers."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its answer.

    Args:
        response: None if a positive answer was suppressed by the request.
    """

    request: bytes
    response: bytes | None

    @property
    def nrc(self) -> int | None:
        """Negative response code; None if the answer is positive."""
        response = self.response
        if response is None or len(response) < _NEGATIVE_BYTES or response[0] != _NEGATIVE:
            return None
        return response[2]

    def in_words(self) -> str:
        """The answer as a person reads it."""
        if self.response is None:
            return f"{self.request.hex(' ').upper()} -> no answer asked for"
        line = f"{self.request.hex(' ').upper()} -> {self.response.hex(' ').upper()}"
        if self.nrc is not None:
            return f"{line}\n  refused: NRC 0x{self.nrc:02X} {nrc_name(self.nrc)}"
        text = "".join(
            c if c.isascii() and c.isprintable() else "." for c in self.response[1:].decode("latin-1")
        )
        return f"{line}\n  positive: {text}"

    def as_json(self) -> dict[str, object]:
        """The exchange for a program."""
        return {
            "request": self.request.hex(),
            "response": None if self.response is None else self.response.hex(),
            "positive": self.nrc is None,
            "nrc": self.nrc,
            "nrc_name": None if self.nrc is None else nrc_name(self.nrc),
        }


def nrc_name(nrc: int) -> str:
    """Name of a negative response code, ISO 14229-1:2020 annex A."""
    name = Response.Code.get_name(nrc)
    return "unknown" if name is None else str(name)


def read_request(text: str) -> bytes:
    """Reads a request: hex digits, and behind an `@` a file whose bytes are put after them.

    Raises:
        TesterError: no hex, no such file, or too long.
    """
    digits, at, path = text.partition("@")
    try:
        request = bytes.fromhex(digits)
        if at:
            with Path(path).open("rb") as file:
                request += file.read(MAX_REQUEST_BYTES + 1)
    except ValueError as error:
        raise TesterError(f"{digits!r} is not hex: {error}") from error
    except OSError as error:
        raise TesterError(f"{path}: cannot be read: {error.strerror}") from error
    if not 1 <= len(request) <= MAX_REQUEST_BYTES:
        raise TesterError(f"a request has 1 to {MAX_REQUEST_BYTES} bytes, found {len(request)}")
    return request


class Tester:
    """A tester on a bus.

    Args:
        bus: where it sends.
        tx_id, rx_id: CAN identifiers of requests and of answers, 11 bits.
    """

    def __init__(self, bus: can.BusABC, *, tx_id: int, rx_id: int) -> None:
        self._bus = bus
        bus.set_filters([{"can_id": rx_id, "can_mask": 0x7FF, "extended": False}])
        self._layer = isotp.TransportLayerLogic(
            rxfn=self._receive,
            txfn=self._send,
            address=isotp.Address(rxid=rx_id, txid=tx_id),
            params={"tx_padding": 0x55, "max_frame_size": MAX_REQUEST_BYTES},
        )

    def ask(self, request: bytes, *, timeout_s: float) -> Exchange:
        """Sends a request and waits for the final answer.

        Raises:
            TesterError: nobody answers.
        """
        asks_silence = request[0] in {0x10, 0x31, 0x3E} and len(request) > 1 and request[1] & 0x80 != 0
        self._layer.send(request)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self._layer.process(_POLL_S)
            response = self._layer.recv()
            if response is None or bytes(response[:3]) == bytes([_NEGATIVE, request[0], 0x78]):
                continue  # 0x78: response pending
            return Exchange(request, bytes(response))
        self._layer.reset()
        if asks_silence:
            return Exchange(request, None)
        raise TesterError(f"no answer to {request[:8].hex(' ').upper()} within {timeout_s:.1f} s")

    def _receive(self, timeout: float) -> isotp.CanMessage | None:
        message = self._bus.recv(timeout)
        if message is None or message.is_error_frame or message.is_remote_frame:
            return None
        return isotp.CanMessage(
            arbitration_id=message.arbitration_id,
            dlc=message.dlc,
            data=bytes(message.data),
            extended_id=message.is_extended_id,
        )

    def _send(self, message: isotp.CanMessage) -> None:
        self._bus.send(
            can.Message(arbitration_id=message.arbitration_id, is_extended_id=False, data=message.data)
        )
