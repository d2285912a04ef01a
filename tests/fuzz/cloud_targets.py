"""What the cloud and the key tools parse: vehicles, strangers, operators, and their own files.

Requests go through real TLS connections to a running cloud: whatever is not refused on purpose comes
back as UNKNOWN, and is a finding.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import tempfile
import threading
import uuid
from collections.abc import Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from fuzz.registry import chosen, register, scratch, target
from google.protobuf.message import DecodeError
from support import cloud_world
from vectors import make_reading_vectors

from cloud import enrolment, ingest, plans
from cloud.catalogue import _release
from cloud.config import CloudConfig
from cloud.errors import InvalidRequestError, ReadingError, StartError, UsageError
from cloud.readings import MAX_READING_BYTES
from cloud.readings import parse as parse_reading
from common.config import ConfigError, parse
from keys.errors import CatalogueError
from keys.lint import lint
from openfod.operator.v1 import operator_service_pb2
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

T = TypeVar("T")
DEADLINE_S = 9.0
"""Longest time for one request."""
REFUSALS = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""How the cloud says no on purpose."""
NO_MESSAGE = "google.protobuf.message.DecodeError"
"""What gRPC answers by itself to bytes that are no message."""
VEHICLE = "/openfod.vehicle.v1.VehicleService/Connect"
ENROL = "/openfod.vehicle.v1.EnrolmentService/Enroll"


class Finding(AssertionError):
    """An answer that nobody meant to give."""


class RunningCloud:
    """A cloud in a thread of its own, one enrolled vehicle with a right, and plain channels to it.

    It ends with its process.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._folder = tempfile.TemporaryDirectory(prefix="openfod-fuzz-")
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        path = cloud_world.write_config(Path(self._folder.name))
        self._open = cloud_world.open_world(path)
        self.world = self.wait(self._open.__aenter__())
        self.device = self.wait(self.world.device())
        self.wait(self.world.grant())
        folder = self.world.keys / "operator"
        certificate = self.device.certificate.public_bytes(Encoding.PEM)
        self.vehicle = self._channel(self.device.key_pem, certificate)
        self.stranger = self._channel(None, None, self.world.cloud.enrolment_port)
        self.operator = self._channel(
            (folder / "operator.key").read_bytes(), (folder / "operator.crt").read_bytes()
        )
        self._vins = itertools.count(2)

    def wait(self, story: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the cloud's loop."""
        return asyncio.run_coroutine_threadsafe(story, self._loop).result(30)

    def new_vin(self) -> str:
        """A VIN that this cloud has not heard yet."""
        return f"WFDSEAT10N1{next(self._vins):06d}"

    def new_claim(self) -> vehicle_service_pb2.EnrollRequest:
        """A genuine request of a vehicle that has not enrolled yet."""
        vin = self.new_vin()
        claim = self.wait(self.world.add_vehicle(vin)).claim_token
        key = ec.generate_private_key(ec.SECP256R1())
        return vehicle_service_pb2.EnrollRequest(vin=vin, claim_token=claim, csr_der=cloud_world.csr(key))

    def _channel(self, key: bytes | None, certificate: bytes | None, port: int = 0) -> grpc.Channel:
        root = (self.world.keys / "public/tls-ca.crt").read_bytes()
        credentials = grpc.ssl_channel_credentials(root, key, certificate)
        return grpc.secure_channel(f"localhost:{port or self.world.cloud.port}", credentials)


@functools.cache
def running() -> RunningCloud:
    """One for all inputs."""
    return RunningCloud()


def answered(answers: Iterable[bytes]) -> bool:
    """Tells whether a call was answered; any answer that is not meant is a finding."""
    try:
        for _ in answers:
            pass
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
        if code not in REFUSALS and NO_MESSAGE not in details:
            raise Finding(f"{code.name}: {details}") from error
        return False
    return True


def messages(content: bytes) -> list[bytes]:
    """Cuts a stream: each message behind its length in two bytes."""
    found: list[bytes] = []
    while content:
        size = int.from_bytes(content[:2], "big")
        found.append(content[2 : 2 + size])
        content = content[2 + size :]
    return found


def streams() -> Iterator[bytes]:
    """What a vehicle says: each kind of message behind a hello."""
    pb = vehicle_service_pb2
    here = running()
    hello = pb.Hello(nonce=bytes(16), journal_id=cloud_world.JOURNAL, agent_version="1")
    usage = cloud_world.signed_batch(
        here.device.key, here.device.source, cloud_world.chain(here.device.source, 2)
    )
    status = pb.FeatureStatus(feature_id="seat-heating", reason="in force")
    said = [
        pb.ConnectRequest(nonce_offer=pb.NonceOffer(nonce=bytes(15) + b"\x01")),
        pb.ConnectRequest(update_result=pb.UpdateResult(error_type="ReplayError", error="late")),
        pb.ConnectRequest(feature_status=pb.FeatureStatusReport(features=[status])),
        pb.ConnectRequest(usage=usage),
    ]
    for request in said:
        parts = [pb.ConnectRequest(hello=hello).SerializeToString(), request.SerializeToString()]
        yield b"".join(len(part).to_bytes(2, "big") + part for part in parts)


@target("connect-request", streams)
def connect(content: bytes) -> bool:
    """A vehicle's stream, from its first byte to its end."""
    call: Any = running().vehicle.stream_stream(VEHICLE)
    return answered(call(iter(messages(content)), timeout=DEADLINE_S))


@target("enroll-request", lambda: [running().new_claim().SerializeToString()])
def enroll(content: bytes) -> bool:
    """A stranger's request for a device certificate."""
    call: Any = running().stranger.unary_unary(ENROL)
    return answered(_once(call, content))


def _once(call: Any, content: bytes) -> Iterator[bytes]:
    yield call(content, timeout=DEADLINE_S)


SERVICE = operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"]
CALLS = sorted(m.name for m in SERVICE.methods if not m.server_streaming)


def operations() -> Iterator[bytes]:
    """Requests of an operator, behind the number of their call."""
    pb, here = operator_service_pb2, running()
    vin = here.new_vin()
    here.wait(here.world.add_vehicle(vin))
    said: dict[str, Any] = {
        "CreateVehicle": pb.CreateVehicleRequest(vin=here.new_vin(), request_id=str(uuid.uuid4())),
        "ListVehicles": pb.ListVehiclesRequest(),
        "ListEntitlements": pb.ListEntitlementsRequest(vin=vin),
        "GrantEntitlement": pb.GrantEntitlementRequest(
            vin=vin,
            plan_id="logbook-per-km",
            account=cloud_world.ACCOUNT,
            request_id=str(uuid.uuid4()),
        ),
    }
    for name, request in said.items():
        if name in CALLS:
            yield bytes([CALLS.index(name)]) + request.SerializeToString()


@target("operator-request", operations)
def operate(content: bytes) -> bool:
    """An operator's call."""
    number, request = chosen(content, len(CALLS))
    call: Any = running().operator.unary_unary(f"/{SERVICE.full_name}/{CALLS[number]}")
    return answered(_once(call, request))


# --- what a device signs ------------------------------------------------------------------------

SOURCE = "veh-0000000000000000"


@functools.cache
def device_key() -> ec.EllipticCurvePrivateKey:
    """A device key."""
    return ec.generate_private_key(ec.SECP256R1())


register("csr", enrolment.device_key, InvalidRequestError, lambda: [cloud_world.csr(device_key())])


@functools.cache
def archive() -> list[X25519PrivateKey]:
    """Opens records of former owners."""
    return [ingest.archive_key(Ed25519PrivateKey.generate())]


def usage(content: bytes) -> None:
    """A batch of any bytes that the device has signed."""
    signature = device_key().sign(ingest.BATCH_CONTEXT + content, ec.ECDSA(hashes.SHA256()))
    signed = usage_pb2.SignedUsageBatch(batch=content, signature=signature)
    ingest.claimed_journal(signed)
    ingest.verify(signed, device_key().public_key(), SOURCE, {}, archive())


def batches() -> list[bytes]:
    """A batch of three records."""
    records = cloud_world.chain(SOURCE, 3)
    return [cloud_world.signed_batch(device_key(), SOURCE, records).batch]


def record(content: bytes) -> None:
    """A record of any bytes in a batch that the device has signed."""
    usage(
        usage_pb2.UsageBatch(
            source=SOURCE, journal_id=cloud_world.JOURNAL, records=[content]
        ).SerializeToString()
    )


register("usage-batch", usage, UsageError, batches)
register("usage-record", record, UsageError, lambda: [cloud_world.record(SOURCE, 1, bytes(32))])
register(
    "reading",
    parse_reading,
    ReadingError,
    lambda: [make_reading_vectors.sign(make_reading_vectors.claims())],
    max_bytes=2 * MAX_READING_BYTES,
)
register(
    "signed-usage",
    lambda content: ingest.verify(
        usage_pb2.SignedUsageBatch.FromString(content), device_key().public_key(), SOURCE, {}, archive()
    ),
    (UsageError, DecodeError),
    lambda: [
        cloud_world.signed_batch(device_key(), SOURCE, cloud_world.chain(SOURCE, 1)).SerializeToString()
    ],
)


# --- files -------------------------------------------------------------------------


FEATURES = cloud_world.DEMO / "catalogue/features"

register(
    "cloud-config",
    lambda content: parse(content, scratch() / "cloud.toml", CloudConfig),
    ConfigError,
    lambda: [cloud_world.write_config(scratch()).read_bytes()],
)


def price_list(content: bytes) -> None:
    """A price list against the demo's catalogue."""
    path = scratch() / "plans.toml"
    path.write_bytes(content)
    releases = [
        _release(str(file.relative_to(FEATURES.parent)), file.read_bytes())
        for file in FEATURES.rglob("*.toml")
    ]
    plans.read(path, {release.feature_id: (release,) for release in releases})


register("plans", price_list, ConfigError, lambda: [(cloud_world.DEMO / "plans.toml").read_bytes()])
register(
    "cloud-feature",
    lambda content: _release("features/seat-heating/1.toml", content),
    StartError,
    lambda: [(FEATURES / "seat-heating/1.toml").read_bytes()],
)


def source(content: bytes) -> None:
    """A feature file that somebody wants to have signed."""
    path = scratch() / "source/features/seat-heating/1.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    lint(scratch() / "source")


register(
    "catalogue-source",
    source,
    CatalogueError,
    lambda: [(FEATURES / "seat-heating/1.toml").read_bytes()],
)
