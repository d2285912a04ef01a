"""The stream to the cloud: one thread that connects, reads, and connects again.

gRPC over mTLS. The server is known by the certificates that the director has
signed for this, each within its signed validity at trusted time; before it has
signed any, by the CA that ships in the image. There is no way around it, and no
fallback from one to the other. After a failure the next try waits for a random
time below a bound that doubles (full jitter), from BACKOFF_FIRST_S up to
BACKOFF_MOST_S; it begins anew once the cloud has said something.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from agent import wire
from agent.adapters.identity import Identity
from agent.errors import NoValidAnchorError, TransportError, TrustError
from agent.events import Event, LinkDown, LinkUp, UpdateArrived, UpdateRefused, UsageRefused
from agent.model import TlsAnchor
from agent.ports import Random
from common import log
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc as rpc

BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 60.0
CONNECT_S = 10.0
"""Longest wait for a connection."""
REASON_S = 1.0
"""Longest wait for the reason why there is no connection."""
WATCH_S = 0.3
"""How long gRPC's own thread may watch a channel that nobody asks about (it looks every 0.2 s)."""
MAX_REASON_CHARS = 500
"""Longest text of the other side that is passed on."""
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
    # Each try is a new one: no failure of the last is remembered.
    ("grpc.use_local_subchannel_pool", 1),
]

_WORDS = (
    (
        "CERTIFICATE_VERIFY_FAILED",
        "its certificate is not from the CA in cloud.root_ca, or from the anchors that the director signed",
    ),
    ("Hostname Verification Check failed", "its certificate is for another name; see cloud.server_name"),
    ("is not verified by", "its certificate is for another name; see cloud.server_name"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS, and this agent speaks nothing else"),
    ("Connection refused", "nothing listens there"),
    ("Deadline Exceeded", "it did not answer in time"),
)
"""What gRPC says, and what it means here."""


class Link:
    """Keeps the stream open from `start` to `stop`."""

    def __init__(
        self,
        endpoint: str,
        roots: Callable[[], tuple[bytes, ...]],
        server_name: str,
        identity: Identity,
        random: Random,
        post: Callable[[Event], None],
        receipt: Callable[[usage_pb2.SignedUsageReceipt], None],
        restart: Callable[[usage_pb2.SignedJournalRestart], None],
    ) -> None:
        """Prepares the link; nothing is connected yet.

        Args:
            roots: gives the certificates, PEM, by which the server may be known
                now (`server_roots`); raises TransportError if there are none.
                Called in this link's thread and in that of `recheck`.
            server_name: name in the server's certificate, if not the endpoint's.
            post: takes events, from the link's thread.
            receipt: takes receipts, unverified.
            restart: takes restarts of the journal, unverified.
        """
        self._endpoint = endpoint
        self._roots = roots
        self._known_by: frozenset[bytes] = frozenset()
        self._given_up = ""
        self._server_name = server_name
        self._identity = identity
        self._random = random
        self._post = post
        self._receipt = receipt
        self._restart = restart
        self._stop = threading.Event()
        self._out: queue.SimpleQueue[pb.ConnectRequest | None] | None = None
        self._lock = threading.Lock()
        self._call: grpc.Call | None = None
        self._states: queue.SimpleQueue[grpc.ChannelConnectivity | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        """Begins to connect."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the stream and the thread."""
        self._stop.set()
        self._states.put(None)
        with self._lock:
            if self._call is not None:
                self._call.cancel()
        if self._thread.is_alive():
            self._thread.join(timeout=CONNECT_S)

    def send(self, request: pb.ConnectRequest) -> None:
        """Sends on the open stream; dropped if there is none: the engine learns of LinkDown."""
        with self._lock:
            out = self._out
            if out is None:
                return
            if out.qsize() < MAX_WAITING:
                out.put(request)
            elif self._call is not None:
                _log.warning("the cloud does not read; giving the stream up", waiting=MAX_WAITING)
                self._call.cancel()

    def recheck(self) -> None:
        """Ends the stream if what its server was known by is no longer all valid.

        The next try then uses what is valid. To be called several times a minute.
        """
        with self._lock:
            if self._call is None or self._given_up:
                return
            try:
                valid, reason = (
                    frozenset(self._roots()),
                    "the certificates that the cloud is known by have changed; connecting anew",
                )
            except TransportError as error:
                valid, reason = frozenset(), str(error)
            if not self._known_by <= valid:
                self._given_up = reason
                self._call.cancel()

    def _run(self) -> None:
        bound_s = BACKOFF_FIRST_S
        while not self._stop.is_set():
            try:
                if self._connect_once():
                    bound_s = BACKOFF_FIRST_S
            except TransportError as error:
                self._post(LinkDown(str(error)))
            wait_s = self._random.uniform(0, bound_s)
            bound_s = min(2 * bound_s, BACKOFF_MOST_S)
            self._stop.wait(wait_s)

    def _connect_once(self) -> bool:
        """Connects, and reads until the stream ends; True if the cloud said anything.

        Raises:
            TransportError: there was no connection.
        """
        roots = self._roots()
        self._known_by = frozenset(roots)
        credentials = grpc.ssl_channel_credentials(
            b"".join(roots), self._identity.key_pem, self._identity.certificate_pem
        )
        options = list(_OPTIONS)
        if self._server_name:
            options.append(("grpc.ssl_target_name_override", self._server_name))  # type: ignore[arg-type]
        with grpc.secure_channel(self._endpoint, credentials, options=options) as channel:
            try:
                return self._converse(channel)
            finally:
                # A channel that is closed under gRPC's watcher leaves a traceback of its thread.
                time.sleep(WATCH_S)

    def _converse(self, channel: grpc.Channel) -> bool:
        if not self._is_ready(channel):
            return False
        out: queue.SimpleQueue[pb.ConnectRequest | None] = queue.SimpleQueue()
        call = rpc.VehicleServiceStub(channel).Connect(_drain(out))
        with self._lock:
            self._out, self._call, self._given_up = out, call, ""
            if self._stop.is_set():  # since the check above: nobody else would end this call
                call.cancel()
        self._post(LinkUp())
        reason, was_heard = "the cloud ended the stream", False
        try:
            for response in call:
                was_heard = True
                self._take(response)
        except grpc.RpcError as error:
            reason = _describe(error)
        finally:
            with self._lock:
                self._out = self._call = None
            out.put(None)
            call.cancel()
        self._post(LinkDown(self._given_up or reason))
        return was_heard

    def _is_ready(self, channel: grpc.Channel) -> bool:
        """Waits for the connection; False if the link is to stop.

        Raises:
            TransportError: there is none, and why.
        """
        states = self._states = queue.SimpleQueue()
        if self._stop.is_set():
            return False
        tell = states.put
        channel.subscribe(tell, try_to_connect=True)
        try:
            return self._await_ready(channel, states)
        finally:
            channel.unsubscribe(tell)

    def _await_ready(
        self, channel: grpc.Channel, states: queue.SimpleQueue[grpc.ChannelConnectivity | None]
    ) -> bool:
        end_s = time.monotonic() + CONNECT_S
        while True:
            try:
                state = states.get(timeout=max(0.0, end_s - time.monotonic()))
            except queue.Empty as error:
                raise TransportError(f"{self._endpoint}: no connection within {CONNECT_S:.0f} s") from error
            if state is None:
                return False
            if state is grpc.ChannelConnectivity.READY:
                return True
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                raise TransportError(f"{self._endpoint}: {_why_not(channel)}")

    def _take(self, response: pb.ConnectResponse) -> None:
        match response.WhichOneof("payload"):
            case "trust_update":
                try:
                    update = wire.trust_update_from_proto(response.trust_update)
                except TrustError as error:
                    self._post(UpdateRefused(error.kind, str(error), verified=False))
                else:
                    self._post(UpdateArrived(update))
            case "receipt":
                self._receipt(response.receipt)
            case "journal_restart":
                self._restart(response.journal_restart)
            case "usage_refusal":
                refusal = response.usage_refusal
                self._post(UsageRefused(refusal.error_type, refusal.error, refusal.stored_through_seq))
            case _:
                _log.warning("the cloud sent a message of a kind that this agent does not know")


def _why_not(channel: grpc.Channel) -> str:
    """Why a channel has failed; only a call on it is told."""
    try:
        for _ in rpc.VehicleServiceStub(channel).Connect(iter(()), timeout=REASON_S):
            break
    except grpc.RpcError as error:
        return _describe(error)
    return "the connection failed"


def _drain(out: queue.SimpleQueue[pb.ConnectRequest | None]) -> Iterator[pb.ConnectRequest]:
    while (request := out.get()) is not None:
        yield request


def _describe(error: grpc.RpcError) -> str:
    code = getattr(error, "code", None)
    details = getattr(error, "details", None)
    name = code().name if callable(code) and code() is not None else type(error).__name__
    text = str(details() if callable(details) else error)[:MAX_REASON_CHARS]
    words = next((f"{words} ({name}: {text})" for sign, words in _WORDS if sign in text), "")
    return words or f"{name}: {text}"


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


def server_roots(anchors: Sequence[TlsAnchor], ca: bytes, now_ms: int) -> tuple[bytes, ...]:
    """The certificates by which the cloud's servers may be known now, PEM.

    The certificates' own dates say nothing, so that TLS needs no clock: the
    signed ones decide, at trusted time. A certificate that is no X.509 is
    left out: it would spoil the others.

    Args:
        anchors: as the director signed them; empty before it has signed any.
        ca: CA of the image, PEM; counts only if there are no anchors.
        now_ms: trusted time, Unix milliseconds.

    Raises:
        NoValidAnchorError: there are anchors, and none is valid.
    """
    if not anchors:
        return (ca,)
    valid = [a.certificate_der for a in anchors if a.not_before_ms <= now_ms < a.not_after_ms]
    roots = tuple(pem for der in valid if (pem := _pem(der)))
    if not roots:
        raise NoValidAnchorError(
            f"none of the {len(anchors)} certificates that the director signed for the cloud's servers"
            " is valid at the trusted time, so there is no connection;"
            " fod-agent import of a new file brings newer ones"
        )
    return roots


def _pem(der: bytes) -> bytes:
    try:
        return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    except (ValueError, x509.InvalidVersion):
        return b""


def read_ca(path: Path) -> bytes:
    """The CA file's bytes.

    Raises:
        TransportError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise TransportError(f"{path} cannot be read: {error.strerror}") from error
