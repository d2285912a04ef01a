"""A cloud with keys of its own, real TLS sockets on free ports, and vehicles that talk to it."""

from __future__ import annotations

import asyncio
import atexit
import functools
import hashlib
import itertools
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from tuf.api.metadata import TargetFile
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from cloud import config, schema, server
from cloud.store import Transaction
from keys import catalogue, ceremony, certificates
from openfod.entitlement.v1 import entitlement_pb2
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.operator.v1 import operator_service_pb2_grpc
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as vehicle_pb2
from openfod.vehicle.v1 import vehicle_service_pb2_grpc

DEMO = Path(__file__).parents[2] / "deploy" / "demo"
VIN = "WFDSEAT10N0000001"
OTHER_VIN = "WFDSEAT10N0000002"
ECU = "seat-module"
HARDWARE = "openfod-seat-1"
ACCOUNT = "acc-4711"
NEW_ACCOUNT = "acc-0815"
JOURNAL = "00112233445566aa"
START_MS = int(datetime(2026, 3, 31, 12, tzinfo=UTC).timestamp()) * 1000
DAY_MS = 86_400_000
DEADLINE_S = 10.0


def uid(vin: str) -> bytes:
    """The uid of a vehicle's seat module."""
    return hashlib.sha256(vin.encode()).digest()[:16]


@functools.cache
def demo_keys() -> Path:
    """A key folder and the signed demo catalogue, made once for a test run."""
    folder = Path(tempfile.mkdtemp(prefix="openfod-keys-"))
    atexit.register(shutil.rmtree, folder)
    now = datetime.fromtimestamp(START_MS / 1000, UTC)
    ceremony.init(folder / "keys", now, replace=False)
    catalogue.sign_catalogue(folder / "keys", DEMO / "catalogue", folder / "catalogue", now)
    return folder


def write_config(folder: Path, **changes: str) -> Path:
    """Writes a cloud.toml with free ports; `changes` replace text in it."""
    made = demo_keys()
    text = (DEMO / "cloud.toml").read_text()
    text = text.replace("../../run/demo/keys", str(made / "keys"))
    text = text.replace("../../run/demo/catalogue", str(made / "catalogue"))
    text = text.replace("../../run/demo/cloud.db", "cloud.db")
    text = text.replace('"plans.toml"', f'"{DEMO / "plans.toml"}"')
    text = text.replace("127.0.0.1:7443", "127.0.0.1:0").replace("127.0.0.1:7444", "127.0.0.1:0")
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "cloud.toml"
    path.write_text(text)
    return path


@dataclass
class World:
    """One running cloud and its clock."""

    cloud: server.Cloud
    now_ms: list[int]
    channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def keys(self) -> Path:
        """The key folder."""
        return demo_keys() / "keys"

    def channel(
        self, key: bytes | None, certificate: bytes | None, *, port: int | None = None
    ) -> grpc.aio.Channel:
        """Opens a channel with or without a client certificate."""
        credentials = grpc.ssl_channel_credentials(
            (self.keys / "public/tls-ca.crt").read_bytes(), key, certificate
        )
        channel = grpc.aio.secure_channel(f"localhost:{port or self.cloud.port}", credentials)
        self.channels.append(channel)
        return channel

    @functools.cached_property
    def operator(self) -> Any:
        """The operator API, as the first operator."""
        folder = self.keys / "operator"
        channel = self.channel((folder / "operator.key").read_bytes(), (folder / "operator.crt").read_bytes())
        return operator_service_pb2_grpc.OperatorServiceStub(channel)

    def as_operator(self, name: str, role: str = "operator") -> Any:
        """The operator API, as another operator, in any role that a certificate can name."""
        key = ec.generate_private_key(ec.SECP256R1())
        ca = x509.load_pem_x509_certificate((self.keys / "enrolment/ca.crt").read_bytes())
        ca_key = load_pem_private_key((self.keys / "enrolment/ca.key").read_bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        certificate = certificates.operator(name, key.public_key(), ca, ca_key, role=role)
        device = Device("", key, certificate, "")
        channel = self.channel(device.key_pem, certificate.public_bytes(Encoding.PEM))
        return operator_service_pb2_grpc.OperatorServiceStub(channel)

    async def state(self) -> dict[str, list[tuple[object, ...]]]:
        """Every row of every table, but for the audit log and the counts of wrong tries."""
        counts = {"wrong_tries", "wrong_claims"}

        def dump(tx: Transaction) -> dict[str, list[tuple[object, ...]]]:
            found = {}
            for name, table in schema.metadata.tables.items():
                if name != "audit_log":
                    columns = [column for column in table.columns if column.name not in counts]
                    rows = tx._connection.execute(sa.select(*columns).order_by(*columns))
                    found[name] = [tuple(row) for row in rows]
            return found

        return await self.cloud.store.run(dump)

    async def audit(self, **fields: Any) -> list[operator_pb2.AuditEntry]:
        """The audit log, as the first operator reads it."""
        answer = await self.operator.ListAudit(operator_pb2.ListAuditRequest(**fields))
        return list(answer.entries)

    async def claim(self, vin: str = VIN) -> operator_pb2.CreateClaimResponse:
        """Makes a claim for a second enrolment."""
        request = operator_pb2.CreateClaimRequest(vin=vin, reason="key lost", request_id=str(uuid.uuid4()))
        answer: operator_pb2.CreateClaimResponse = await self.operator.CreateClaim(request)
        return answer

    async def block(self, vin: str = VIN) -> operator_pb2.BlockVehicleResponse:
        """Blocks a vehicle."""
        request = operator_pb2.BlockVehicleRequest(vin=vin, reason="stolen", request_id=str(uuid.uuid4()))
        answer: operator_pb2.BlockVehicleResponse = await self.operator.BlockVehicle(request)
        return answer

    async def rebind(
        self,
        new_uid: bytes,
        old_uid: bytes = b"",
        vin: str = VIN,
        *,
        stub: Any = None,
        reading_key: bytes = b"",
    ) -> operator_pb2.RebindEcuResponse:
        """Swaps the seat module, as the first operator or another."""
        request = operator_pb2.RebindEcuRequest(
            vin=vin,
            ecu_identifier=ECU,
            old_uid=old_uid or uid(vin),
            new_uid=new_uid,
            new_reading_key=reading_key,
            reason="water damage",
            request_id=str(uuid.uuid4()),
        )
        answer: operator_pb2.RebindEcuResponse = await (stub or self.operator).RebindEcu(request)
        return answer

    async def begin_transfer(self, vin: str = VIN) -> operator_pb2.BeginTransferResponse:
        """Begins a sale."""
        request = operator_pb2.BeginTransferRequest(vin=vin, request_id=str(uuid.uuid4()))
        answer: operator_pb2.BeginTransferResponse = await self.operator.BeginTransfer(request)
        return answer

    async def complete_transfer(
        self, code: str, vin: str = VIN, account: str = NEW_ACCOUNT
    ) -> operator_pb2.CompleteTransferResponse:
        """Completes a sale."""
        request = operator_pb2.CompleteTransferRequest(
            vin=vin, transfer_code=code, account=account, request_id=str(uuid.uuid4())
        )
        answer: operator_pb2.CompleteTransferResponse = await self.operator.CompleteTransfer(request)
        return answer

    async def sell(self, vin: str = VIN) -> operator_pb2.CompleteTransferResponse:
        """Sells a vehicle to the next account."""
        begun = await self.begin_transfer(vin)
        return await self.complete_transfer(begun.transfer_code, vin)

    async def add_vehicle(
        self, vin: str = VIN, *, with_ecu: bool = True, reading_key: bytes = b""
    ) -> operator_pb2.CreateVehicleResponse:
        """Registers a vehicle with a seat module."""
        ecu = operator_pb2.Ecu(
            ecu_identifier=ECU, hardware_id=HARDWARE, ecu_uid=uid(vin), reading_key=reading_key
        )
        ecus = [ecu] if with_ecu else []
        request = operator_pb2.CreateVehicleRequest(vin=vin, ecus=ecus, request_id=str(uuid.uuid4()))
        answer: operator_pb2.CreateVehicleResponse = await self.operator.CreateVehicle(request)
        return answer

    async def grant(
        self, plan: str = "seat-heating-monthly", vin: str = VIN, **fields: str
    ) -> operator_pb2.GrantEntitlementResponse:
        """Grants a plan."""
        values = {"request_id": str(uuid.uuid4()), "account": ACCOUNT, **fields}
        request = operator_pb2.GrantEntitlementRequest(vin=vin, plan_id=plan, **values)
        answer: operator_pb2.GrantEntitlementResponse = await self.operator.GrantEntitlement(request)
        return answer

    async def revoke(self, entitlement_id: str, vin: str = VIN) -> operator_pb2.RevokeEntitlementResponse:
        """Ends a right."""
        request = operator_pb2.RevokeEntitlementRequest(
            vin=vin, entitlement_id=entitlement_id, reason="asked for", request_id=str(uuid.uuid4())
        )
        answer: operator_pb2.RevokeEntitlementResponse = await self.operator.RevokeEntitlement(request)
        return answer

    async def enroll(self, vin: str, claim: str, key: ec.EllipticCurvePrivateKey | None = None) -> Device:
        """Makes a device key and has it certified."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        channel = self.channel(None, None, port=self.cloud.enrolment_port)
        stub: Any = vehicle_service_pb2_grpc.EnrolmentServiceStub(channel)
        request = vehicle_pb2.EnrollRequest(vin=vin, claim_token=claim, csr_der=csr(key))
        answer = await stub.Enroll(request)
        certificate = x509.load_der_x509_certificate(answer.certificate_der)
        return Device(vin, key, certificate, answer.source)

    async def device(self, vin: str = VIN, *, with_ecu: bool = True, reading_key: bytes = b"") -> Device:
        """Registers and enrols a vehicle."""
        added = await self.add_vehicle(vin, with_ecu=with_ecu, reading_key=reading_key)
        return await self.enroll(vin, added.claim_token)

    def vehicle_stub(self, device: Device) -> Any:
        """The vehicle API, as this device."""
        channel = self.channel(device.key_pem, device.certificate.public_bytes(Encoding.PEM))
        return vehicle_service_pb2_grpc.VehicleServiceStub(channel)

    def connect(self, device: Device) -> Stream:
        """Opens the vehicle's stream; nothing is sent yet."""
        return Stream(self.vehicle_stub(device).Connect())


@dataclass
class Device:
    """An enrolled vehicle's identity."""

    vin: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    source: str

    @property
    def key_pem(self) -> bytes:
        """The private key."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


class Stream:
    """The vehicle's end of a stream."""

    _nonces = itertools.count(1)

    def __init__(self, call: Any) -> None:
        self.call = call
        self.nonce = b""

    async def send(self, **payload: Any) -> None:
        """Sends one message."""
        await asyncio.wait_for(self.call.write(vehicle_pb2.ConnectRequest(**payload)), DEADLINE_S)

    async def receive(self) -> vehicle_pb2.ConnectResponse:
        """Receives one message."""
        answer = await asyncio.wait_for(self.call.read(), DEADLINE_S)
        assert answer is not grpc.aio.EOF, await self.call.code()
        assert isinstance(answer, vehicle_pb2.ConnectResponse)
        return answer

    def next_nonce(self) -> bytes:
        """A nonce that was not used before."""
        self.nonce = next(self._nonces).to_bytes(16, "big")
        return self.nonce

    async def hello(self, journal_id: str = JOURNAL, **versions: Any) -> vehicle_pb2.TrustUpdate:
        """Opens the stream; returns the first update."""
        await self.send(hello=vehicle_pb2.Hello(nonce=self.next_nonce(), journal_id=journal_id, **versions))
        return await self.update()

    async def offer(self) -> None:
        """Offers the next nonce."""
        await self.send(nonce_offer=vehicle_pb2.NonceOffer(nonce=self.next_nonce()))

    async def update(self) -> vehicle_pb2.TrustUpdate:
        """Receives a trust update."""
        answer = await self.receive()
        assert answer.WhichOneof("payload") == "trust_update", answer
        return answer.trust_update

    async def ended(self) -> grpc.StatusCode:
        """The status with which the cloud ends the stream."""
        return (await code_of(asyncio.wait_for(self.call.read(), DEADLINE_S)))[0]

    async def upload(self, signed: usage_pb2.SignedUsageBatch) -> vehicle_pb2.ConnectResponse:
        """Uploads usage; returns the answer."""
        await self.send(usage=signed)
        return await self.receive()


async def code_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """The status and the words in which a call that must fail does so."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    message = f"expected a refusal, got {answer!r}"
    raise AssertionError(message)


def csr(key: Any, name: str = "vehicle") -> bytes:
    """A certificate request in DER."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.DER)


@asynccontextmanager
async def open_world(path: Path, now_ms: int = START_MS) -> AsyncIterator[World]:
    """Runs a cloud on a configuration file."""
    clock = [now_ms]
    numbers = itertools.count(now_ms)

    def random(size: int) -> bytes:
        return hashlib.shake_128(str(next(numbers)).encode()).digest(size)

    cloud = await server.start(path, config.read(path), now_ms=lambda: clock[0], random=random)
    world = World(cloud, clock)
    try:
        yield world
    finally:
        for channel in world.channels:
            await channel.close()
        await cloud.stop(0)


def play(folder: Path, story: Callable[[World], Awaitable[None]]) -> None:
    """Plays a story on a cloud of its own."""

    async def run() -> None:
        async with open_world(write_config(folder)) as world:
            await asyncio.wait_for(story(world), 30)

    asyncio.run(run())


# --- usage -----------------------------------------------------------------------


def record(source: str, seq: int, prev_hash: bytes, **fields: Any) -> bytes:
    """One serialised usage record."""
    values: dict[str, Any] = {
        "id": f"{JOURNAL}/{seq}",
        "source": source,
        "subject": ACCOUNT,
        "feature_id": "seat-heating",
        "meter_id": "active-time",
        "value": 60_000,
        "unit": usage_pb2.UNIT_MILLISECOND,
        "entitlement_id": "ent-0123456789abcdef",
        "window_start_ms": START_MS,
        "window_end_ms": START_MS + 60_000,
        "seq": seq,
        "prev_hash": prev_hash,
        "clock_trust": usage_pb2.CLOCK_TRUST_SIGNED,
        "trace_id": "0" * 31 + "1",
        **fields,
    }
    return usage_pb2.UsageRecord(**values).SerializeToString(deterministic=True)


def chain(
    source: str, count: int, *, first: int = 1, prev_hash: bytes = bytes(32), **fields: Any
) -> list[bytes]:
    """Chained records from seq `first`."""
    records: list[bytes] = []
    for seq in range(first, first + count):
        content = record(source, seq, prev_hash, **fields)
        records.append(content)
        prev_hash = hashlib.sha256(content).digest()
    return records


def signed_batch(
    key: ec.EllipticCurvePrivateKey,
    source: str,
    records: Sequence[bytes],
    journal_id: str = JOURNAL,
    sealed: Sequence[int] = (),
) -> usage_pb2.SignedUsageBatch:
    """A batch as a vehicle signs it."""
    message = usage_pb2.UsageBatch(source=source, journal_id=journal_id, records=records, sealed=sealed)
    batch = message.SerializeToString()
    signature = key.sign(b"openfod.usage.batch.v1\x00" + batch, ec.ECDSA(hashes.SHA256()))
    return usage_pb2.SignedUsageBatch(batch=batch, signature=signature)


# --- a stock TUF client ------------------------------------------------------------


@dataclass
class Verified:
    """What a stock TUF client took from an update."""

    director: TrustedMetadataSet
    catalogue: TrustedMetadataSet
    rights: entitlement_pb2.VehicleEntitlements
    tokens: dict[str, bytes]
    features: dict[str, bytes]


def verify_with_tuf(update: vehicle_pb2.TrustUpdate, now_ms: int) -> Verified:
    """Verifies a complete update with python-tuf, from the shipped roots on."""
    sets = []
    for name, part in (("director", update.director), ("catalogue", update.catalogue)):
        trusted = TrustedMetadataSet(
            (demo_keys() / f"keys/public/{name}-root.json").read_bytes(), EnvelopeType.METADATA
        )
        trusted.reference_time = datetime.fromtimestamp(now_ms / 1000, UTC)
        trusted.update_timestamp(part.timestamp)
        trusted.update_snapshot(part.snapshot)
        trusted.update_targets(part.targets)
        sets.append(trusted)
    director, listed = sets
    contents = {t.path: t.content for t in (*update.director_targets, *update.catalogue_targets)}
    assert set(contents) == set(director.targets.targets)
    for path, info in director.targets.targets.items():
        info.verify_length_and_hashes(contents[path])
        if path.startswith("features/"):
            theirs: TargetFile = listed.targets.targets[path]
            assert (theirs.length, theirs.hashes) == (info.length, info.hashes)
    rights = entitlement_pb2.VehicleEntitlements.FromString(contents["entitlements.pb"])
    tokens = {path: content for path, content in contents.items() if path.startswith("tokens/")}
    features = {path: content for path, content in contents.items() if path.startswith("features/")}
    return Verified(director, listed, rights, tokens, features)
