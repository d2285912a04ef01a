"""ISO-TP (ISO 15765-2:2016) on the ECU's side, driven by the simulation's loop.

can-isotp does the segmenting; nothing here has a thread or waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import isotp

from common import log as logs
from firmware_sim.frame import Frame

MAX_INBOX_FRAMES = 1024
"""Frames that wait for the transport layer; older ones are lost beyond it."""
PADDING = 0xCC
MAX_REQUEST_BYTES = 4095

log = logs.get(__name__)


class DiagnosticLink:
    """One ECU's transport layer.

    Args:
        request_id, response_id: CAN identifiers, 11 bits.
        send: puts (identifier, data) on the bus.
        serve: answers a request, or returns None.
    """

    def __init__(
        self,
        *,
        request_id: int,
        response_id: int,
        send: Callable[[int, bytes], None],
        serve: Callable[[bytes], bytes | None],
    ) -> None:
        self._request_id = request_id
        self._serve = serve
        self._inbox: deque[isotp.CanMessage] = deque(maxlen=MAX_INBOX_FRAMES)
        self._layer = isotp.TransportLayerLogic(
            rxfn=self._take,
            txfn=lambda message: send(message.arbitration_id, bytes(message.data)),
            address=isotp.Address(rxid=request_id, txid=response_id),
            error_handler=lambda error: log.debug("ISO-TP error", request_id=request_id, why=str(error)),
            params={"tx_padding": PADDING, "max_frame_size": MAX_REQUEST_BYTES, "blocksize": 8, "stmin": 0},
        )

    @property
    def is_busy(self) -> bool:
        """True while it must be polled often: an answer is on its way."""
        return bool(self._layer.transmitting())

    def receive(self, frame: Frame) -> None:
        """Takes a frame from the bus and answers what is complete."""
        if frame.can_id != self._request_id or frame.is_extended or frame.remote_dlc is not None:
            return
        message = isotp.CanMessage(arbitration_id=frame.can_id, dlc=len(frame.data), data=frame.data)
        self._inbox.append(message)
        self.poll()

    def poll(self) -> None:
        """Lets the transport layer work: timeouts, and frames that are due."""
        self._layer.process()
        while (request := self._layer.recv()) is not None:
            response = self._serve(bytes(request))
            if response is not None:
                self._layer.send(response)
            self._layer.process()

    def reset(self) -> None:
        """Forgets half a request and half an answer, as a restarted ECU does."""
        self._inbox.clear()
        self._layer.reset()

    def _take(self, _timeout: float) -> isotp.CanMessage | None:
        return self._inbox.popleft() if self._inbox else None
