"""The stream to the cloud: one thread that connects, reads, and connects again.

gRPC over mTLS; the server is checked against the CA that ships in the image,
and there is no way around it. After a failure the next try waits for a random
time below a bound that doubles (full jitter), from BACKOFF_FIRST_S up to
BACKOFF_MOST_S.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from agent import wire
from agent.adapters.identity import Identity
from agent.errors import TransportError, TrustError
from agent.events import Event, LinkDown, LinkUp, UpdateArrived, UpdateRefused, UsageRefused
from agent.ports import Random
from common import log
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc as rpc

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 60.0
CONNECT_S = 10.0
"""Longest wait for a connection."""
MAX_MESSAGE_BYTES = 4_194_304
"""Largest message that is read: metadata of both repositories with room."""
MAX_WAITING = 1_000
"""Messages that wait for a slow stream; beyond it the stream is given up."""

_log = log.get(__name__)

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # The loop here decides when to try again.
    ("grpc.enable_retries", 0),
]


class Link:
    """Keeps the stream open from `start` to `stop`."""

    def __init__(
        self,
        endpoint: str,
        root_ca: bytes,
        server_name: str,
        identity: Identity,
        random: Random,
        post: Callable[[Event], None],
        receipt: Callable[[usage_pb2.SignedUsageReceipt], None],
    ) -> None:
        """Prepares the link; nothing is connected yet.

        Args:
            server_name: name in the server's certificate, if not the endpoint's.
            post: takes events, from the link's thread.
            receipt: takes receipts, unverified.
        """
        self._endpoint = endpoint
        self._root_ca = root_ca
        self._server_name = server_name
        self._identity = identity
        self._random = random
        self._post = post
        self._receipt = receipt
        self._stop = threading.Event()
        self._out: queue.Queue[pb.ConnectRequest | None] | None = None
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        """Begins to connect."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream and the thread."""
        self._stop.set()
        with self._lock:
            if self._call is not None:
                self._call.cancel()
        self._thread.join(timeout=CONNECT_S + 1)

    def send(self, request: pb.ConnectRequest) -> None:
        """Sends on the open stream; dropped if there is none: the engine learns of LinkDown."""
        with self._lock:
            out = self._out
            if out is None:
                return
            try:
                out.put_nowait(request)
            except queue.Full:
                _log.warning("the cloud does not read; giving the stream up", waiting=MAX_WAITING)
                if self._call is not None:
                    self._call.cancel()

    def _run(self) -> None:
        bound_s = BACKOFF_FIRST_S
        while not self._stop.is_set():
            try:
                self._connect_once()
                bound_s = BACKOFF_FIRST_S
            except TransportError as error:
                self._post(LinkDown(str(error)))
            wait_s = self._random.uniform(0, bound_s)
            bound_s = min(2 * bound_s, BACKOFF_MOST_S)
            self._stop.wait(wait_s)

    def _connect_once(self) -> None:
        """Connects, and reads until the stream ends.

        Raises:
            TransportError: there was no connection.
        """
        credentials = grpc.ssl_channel_credentials(
            self._root_ca, self._identity.key_pem, self._identity.certificate_pem
        )
        options = list(_OPTIONS)
        if self._server_name:
            options.append(("grpc.ssl_target_name_override", self._server_name))  # type: ignore[arg-type]
        with grpc.secure_channel(self._endpoint, credentials, options=options) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
            except grpc.FutureTimeoutError as error:
                raise TransportError(f"{self._endpoint}: no connection within {CONNECT_S:.0f} s") from error
            out: queue.Queue[pb.ConnectRequest | None] = queue.Queue(MAX_WAITING)
            call = rpc.VehicleServiceStub(channel).Connect(_drain(out))
            with self._lock:
                self._out, self._call = out, call
            self._post(LinkUp())
            reason = "the cloud ended the stream"
            try:
                for response in call:
                    self._take(response)
            except grpc.RpcError as error:
                reason = _describe(error)
            finally:
                with self._lock:
                    self._out = self._call = None
                out.put(None)
                call.cancel()
            self._post(LinkDown(reason))

    def _take(self, response: pb.ConnectResponse) -> None:
        match response.WhichOneof("payload"):
            case "trust_update":
                try:
                    update = wire.trust_update_from_proto(response.trust_update)
                except TrustError as error:
                    self._post(UpdateRefused(error.kind, str(error)))
                else:
                    self._post(UpdateArrived(update))
            case "receipt":
                self._receipt(response.receipt)
            case "usage_refusal":
                refusal = response.usage_refusal
                self._post(UsageRefused(refusal.error_type, refusal.error, refusal.stored_through_seq))
            case _:
                _log.warning("the cloud sent a message of a kind that this agent does not know")


def _drain(out: queue.Queue[pb.ConnectRequest | None]) -> Iterator[pb.ConnectRequest]:
    while (request := out.get()) is not None:
        yield request


def _describe(error: grpc.RpcError) -> str:
    code = getattr(error, "code", None)
    details = getattr(error, "details", None)
    name = code().name if callable(code) and code() is not None else type(error).__name__
    return f"{name}: {details() if callable(details) else error}"


def enroll(endpoint: str, root_ca: bytes, server_name: str, request: pb.EnrollRequest) -> pb.EnrollResponse:
    """Asks the cloud for a device certificate.

    Raises:
        TransportError: the cloud is out of reach, or refused; says why.
    """
    credentials = grpc.ssl_channel_credentials(root_ca)
    options = [("grpc.ssl_target_name_override", server_name)] if server_name else []
    with grpc.secure_channel(endpoint, credentials, options=options) as channel:
        try:
            return rpc.EnrolmentServiceStub(channel).Enroll(request, timeout=CONNECT_S)
        except grpc.RpcError as error:
            raise TransportError(f"{endpoint}: {_describe(error)}") from error


def read_ca(path: Path) -> bytes:
    """The CA file's bytes.

    Raises:
        TransportError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TransportError(f"{path} cannot be read: {error.strerror}") from error
