"""Usage taken end to end: a real server on SQLite, mTLS, batches that a vehicle signs, a receipt for each."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from keys import catalogue, ceremony
from openfod.operator.v1 import operator_service_pb2, operator_service_pb2_grpc
from openfod.usage.v1 import usage_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "deploy" / "demo"
RECORDS = 30_000
"""Records of each round, in one journal."""
SIZES = (100, 500)
"""Records in a batch."""
ROUNDS = 3
IN_FLIGHT = 4
"""Batches that the vehicle sends before it has the receipt of the first."""
GOAL = 5_000
"""Records/s."""


def main() -> None:
    """Prints records per second for each size of a batch, all receipts held and all sums checked."""
    with tempfile.TemporaryDirectory(prefix="openfod-") as name, _serving(Path(name)) as ready:
        for number, size in enumerate(SIZES):
            found = [asyncio.run(_round(Path(name), ready, size, number * ROUNDS + i)) for i in range(ROUNDS)]
            best, rates = max(found), ", ".join(f"{rate:,.0f}" for rate in found)
            print(f"batches of {size}: {rates} records/s, best {best:,.0f}; goal {GOAL:,}")


@contextmanager
def _serving(folder: Path) -> Iterator[dict[str, Any]]:
    now = datetime.now(UTC)
    ceremony.init(folder / "keys", now, replace=False)
    catalogue.sign_catalogue(folder / "keys", DEMO / "catalogue", folder / "catalogue", now)
    text = (DEMO / "cloud.toml").read_text(encoding="utf-8")
    text = text.replace("../../run/demo/", "").replace('"plans.toml"', f'"{DEMO / "plans.toml"}"')
    text = text.replace("127.0.0.1:7443", "127.0.0.1:0").replace("127.0.0.1:7444", "127.0.0.1:0")
    (folder / "cloud.toml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "cloud", "serve", "--config", str(folder / "cloud.toml")]
    with (
        (folder / "cloud.log").open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT) as process,
    ):
        try:
            assert process.stdout is not None
            ready: dict[str, Any] = json.loads(process.stdout.readline())
            yield ready
        finally:
            process.terminate()
            process.wait(60)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"the server used {used.ru_utime + used.ru_stime:.1f} s of CPU in all")


async def _round(folder: Path, ready: dict[str, Any], size: int, number: int) -> float:
    """Uploads a whole journal of a new vehicle; returns records/s from the first byte to the last receipt."""
    root = (folder / "keys/public/tls-ca.crt").read_bytes()
    vin = f"WFDBENCH0N{number:07}"
    operator = folder / "keys/operator"
    channels = []

    def channel(port: int, key: bytes | None = None, certificate: bytes | None = None) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(root, key, certificate)
        channels.append(grpc.aio.secure_channel(f"localhost:{port}", credentials))
        return channels[-1]

    try:
        operated = channel(
            ready["port"], (operator / "operator.key").read_bytes(), (operator / "operator.crt").read_bytes()
        )
        stub: Any = operator_service_pb2_grpc.OperatorServiceStub(operated)
        request = operator_service_pb2.CreateVehicleRequest(
            vin=vin, request_id=f"00000000-0000-4000-8000-{number:012}"
        )
        added = await stub.CreateVehicle(request)
        key = ec.generate_private_key(ec.SECP256R1())
        enrolling: Any = vehicle_service_pb2_grpc.EnrolmentServiceStub(channel(ready["enrolment_port"]))
        named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vehicle")])
        csr = x509.CertificateSigningRequestBuilder().subject_name(named).sign(key, hashes.SHA256())
        enrolled = await enrolling.Enroll(
            pb.EnrollRequest(vin=vin, claim_token=added.claim_token, csr_der=csr.public_bytes(Encoding.DER))
        )
        certificate = x509.load_der_x509_certificate(enrolled.certificate_der).public_bytes(Encoding.PEM)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        vehicle: Any = vehicle_service_pb2_grpc.VehicleServiceStub(channel(ready["port"], pem, certificate))
        records = list(_records(enrolled.source, RECORDS))
        batches = [_signed(key, enrolled.source, records[i : i + size]) for i in range(0, RECORDS, size)]
        stream = vehicle.Connect()
        await stream.write(pb.ConnectRequest(hello=pb.Hello(nonce=number.to_bytes(16, "big"))))
        await stream.read()
        begun = time.perf_counter()
        async for _ in _upload(stream, batches):
            pass
        seconds = time.perf_counter() - begun
    finally:
        for opened in channels:
            await opened.close()
    with closing(sqlite3.connect(folder / "cloud.db")) as database:
        query = "SELECT content FROM usage_records WHERE source = ? ORDER BY seq"
        assert [row[0] for row in database.execute(query, (enrolled.source,))] == records
    return RECORDS / seconds


async def _upload(stream: Any, batches: list[usage_pb2.SignedUsageBatch]) -> AsyncIterator[int]:
    places = asyncio.Semaphore(IN_FLIGHT)

    async def send() -> None:
        for batch in batches:
            await places.acquire()
            await stream.write(pb.ConnectRequest(usage=batch))

    sending = asyncio.ensure_future(send())
    for _ in batches:
        answer = await stream.read()
        assert answer.WhichOneof("payload") == "receipt", answer
        places.release()
        yield usage_pb2.UsageReceipt.FromString(answer.receipt.receipt).through_seq
    await sending


JOURNAL = "00112233445566aa"


def _records(source: str, count: int) -> Iterator[bytes]:
    previous = bytes(32)
    for seq in range(1, count + 1):
        content = usage_pb2.UsageRecord(
            id=f"{JOURNAL}/{seq}",
            source=source,
            subject="acc-4711",
            feature_id="seat-heating",
            meter_id="active-time",
            value=60_000,
            unit=usage_pb2.UNIT_MILLISECOND,
            dimensions=[usage_pb2.Dimension(name="motion", value="driving")],
            entitlement_id="ent-0123456789abcdef",
            window_start_ms=1_774_958_400_000 + seq * 60_000,
            window_end_ms=1_774_958_460_000 + seq * 60_000,
            seq=seq,
            prev_hash=previous,
            clock_trust=usage_pb2.CLOCK_TRUST_SIGNED,
            gap=20,
            gap_reason=usage_pb2.GAP_REASON_EDGE,
            trace_id=f"{seq // 10:032x}",
        ).SerializeToString(deterministic=True)
        previous = hashlib.sha256(content).digest()
        yield content


def _signed(key: ec.EllipticCurvePrivateKey, source: str, records: list[bytes]) -> usage_pb2.SignedUsageBatch:
    batch = usage_pb2.UsageBatch(source=source, journal_id=JOURNAL, records=records).SerializeToString()
    signature = key.sign(b"openfod.usage.batch.v1\x00" + batch, ec.ECDSA(hashes.SHA256()))
    return usage_pb2.SignedUsageBatch(batch=batch, signature=signature)
