"""Keys, certificates and servers that do what no cloud should, for tests of the link."""

from __future__ import annotations

import functools
import ipaddress
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from agent.adapters.identity import Identity
from agent.adapters.link import Link
from agent.events import Event, LinkDown, LinkUp

DEADLINE_S = 10.0
SERVICE = "openfod.vehicle.v1.VehicleService"
START, END = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)


@dataclass(frozen=True)
class Pair:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        """PKCS #8."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def der(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.DER)


def issue(
    name: str, issuer: Pair | None = None, key: ec.EllipticCurvePrivateKey | None = None, *, ip: str = ""
) -> Pair:
    """Makes a certificate; without an issuer it is a CA."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    if ip:
        names.append(x509.IPAddress(ipaddress.ip_address(ip)))
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(START)
        .not_valid_after(END)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    return Pair(key, builder.sign(issuer.key if issuer else key, hashes.SHA256()))


@functools.cache
def authority(name: str = "test CA") -> Pair:
    """A CA, made once for a test run."""
    return issue(name)


@functools.cache
def server_pair() -> Pair:
    """The right server's certificate."""
    return issue("localhost", authority(), ip="127.0.0.1")


@functools.cache
def device() -> Identity:
    """An enrolled vehicle."""
    pair = issue("vehicle", authority())
    return Identity(pair.key, pair.key_pem, pair.pem, "veh-1")


class _Generic(grpc.GenericRpcHandler):
    def __init__(self, answer: Callable[[Iterator[bytes], Any], Iterator[bytes]]) -> None:
        self._answer = answer

    def service(self, _details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(self._answer)


@contextmanager
def serve(
    answer: Callable[[Iterator[bytes], Any], Iterator[bytes]],
    pair: Pair | None = None,
    *,
    with_tls: bool = True,
) -> Iterator[int]:
    """Serves every method with raw bytes; gives the port."""
    pair = pair or server_pair()
    server = grpc.server(ThreadPoolExecutor(8), handlers=[_Generic(answer)])
    if with_tls:
        credentials = grpc.ssl_server_credentials([(pair.key_pem, pair.pem)], authority().pem, True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


@contextmanager
def deaf_server() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Dice:
    """Randomness that notes what it was asked, and answers with the lowest."""

    def __init__(self) -> None:
        self.bounds: list[float] = []
        self.enough = threading.Event()
        self.wanted = 8

    def token(self, size: int) -> bytes:
        """Not asked for here."""
        return bytes(size)

    def uniform(self, low: float, high: float) -> float:
        """Notes the bound; no wait until there are enough."""
        assert low == 0
        self.bounds.append(high)
        if len(self.bounds) >= self.wanted:
            self.enough.set()
            return 3600.0
        return low


class Listener:
    """Events of a link, in order."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def next(self) -> Event:
        """The next event, within the deadline."""
        return self.queue.get(timeout=DEADLINE_S)

    def down(self) -> LinkDown:
        """The next event, which must be that there is no link."""
        event = self.next()
        assert isinstance(event, LinkDown), event
        return event

    def up(self) -> None:
        """The next event, which must be that there is a link."""
        event = self.next()
        assert isinstance(event, LinkUp), event


@contextmanager
def linked(
    port: int,
    *,
    roots: Callable[[], tuple[bytes, ...]] = lambda: (authority().pem,),
    name: str = "",
    dice: Dice | None = None,
) -> Iterator[tuple[Link, Listener]]:
    """A link to that port, stopped at the end."""
    listener = Listener()
    dice = dice or Dice()
    link = Link(
        f"127.0.0.1:{port}",
        roots,
        name,
        device(),
        dice,
        listener.queue.put,
        lambda _receipt: None,
        lambda _restart: None,
    )
    link.start()
    try:
        yield link, listener
    finally:
        link.stop()
