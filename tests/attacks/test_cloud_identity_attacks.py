"""Attacks on who may call what: each is refused, and nothing has changed."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from support.cloud_world import OTHER_VIN, VIN, Device, Stream, World, code_of, csr, play

from cloud.enrolment import issue
from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.operator.v1 import operator_service_pb2_grpc
from openfod.vehicle.v1 import vehicle_service_pb2, vehicle_service_pb2_grpc

OPERATOR_CALLS = pb.DESCRIPTOR.services_by_name["OperatorService"].methods


@pytest.mark.parametrize("method", [m.name for m in OPERATOR_CALLS])
def test_a_vehicle_cannot_call_any_operator_rpc(tmp_path: Path, method: str) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        channel = world.channel(device.key_pem, device.certificate.public_bytes(Encoding.PEM))
        stub = operator_service_pb2_grpc.OperatorServiceStub(channel)
        kind = next(m for m in OPERATOR_CALLS if m.name == method).input_type
        request: Any = getattr(pb, kind.name)()
        if "vin" in kind.fields_by_name:
            request.vin = VIN
        call = getattr(stub, method)(request)
        answer = call.read() if method == "WatchFeatures" else call
        code, words = await code_of(answer)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "this call is for an operator" in words

    play(tmp_path, story)


def test_an_operator_cannot_open_a_vehicles_stream(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        folder = world.keys / "operator"
        channel = world.channel(
            (folder / "operator.key").read_bytes(), (folder / "operator.crt").read_bytes()
        )
        stub: Any = vehicle_service_pb2_grpc.VehicleServiceStub(channel)
        assert await Stream(stub.Connect()).ended() is grpc.StatusCode.PERMISSION_DENIED

    play(tmp_path, story)


def test_nobody_calls_the_main_port_without_a_certificate(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        channel = world.channel(None, None)
        stub: Any = operator_service_pb2_grpc.OperatorServiceStub(channel)
        code, _ = await code_of(stub.ListVehicles(pb.ListVehiclesRequest()))
        assert code is grpc.StatusCode.UNAVAILABLE

    play(tmp_path, story)


def test_a_certificate_of_a_foreign_authority_is_refused(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "operator")])
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:openfod:operator:mallory")])
        real = x509.load_pem_x509_certificate((world.keys / "operator/operator.crt").read_bytes())
        forged = (
            x509.CertificateBuilder(name, name, key.public_key(), 1)
            .not_valid_before(real.not_valid_before_utc)
            .not_valid_after(real.not_valid_after_utc)
            .add_extension(names, critical=False)
            .sign(key, hashes.SHA256())
        )
        mallory = Device(VIN, key, forged, "")
        channel = world.channel(mallory.key_pem, forged.public_bytes(Encoding.PEM))
        stub: Any = operator_service_pb2_grpc.OperatorServiceStub(channel)
        code, _ = await code_of(stub.ListVehicles(pb.ListVehiclesRequest()))
        assert code is grpc.StatusCode.UNAVAILABLE

    play(tmp_path, story)


def test_a_claim_works_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        added = await world.add_vehicle()
        await world.enroll(VIN, added.claim_token)
        code, words = await code_of(world.enroll(VIN, added.claim_token))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "unknown, used, expired or of another VIN" in words

    play(tmp_path, story)


def test_an_enrolled_vehicle_gets_no_new_claim_by_registering_again(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        code, _ = await code_of(world.add_vehicle())
        assert code is grpc.StatusCode.ALREADY_EXISTS
        await world.connect(device).hello()

    play(tmp_path, story)


def test_a_late_claim_is_refused_until_the_operator_makes_a_new_one(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        added = await world.add_vehicle()
        world.now_ms[0] = added.claim_expires_ms
        code, _ = await code_of(world.enroll(VIN, added.claim_token))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        again = await world.add_vehicle()
        assert again.vehicle == added.vehicle
        await world.enroll(VIN, again.claim_token)

    play(tmp_path, story)


def test_a_claim_of_another_vin_is_refused_and_stays_usable(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        added = await world.add_vehicle(VIN)
        await world.add_vehicle(OTHER_VIN)
        code, _ = await code_of(world.enroll(OTHER_VIN, added.claim_token))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        device = await world.enroll(VIN, added.claim_token)
        uris = device.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert uris.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:openfod:vehicle:{VIN}"]

    play(tmp_path, story)


def _broken_request() -> bytes:
    good = bytearray(csr(ec.generate_private_key(ec.SECP256R1())))
    good[-1] ^= 1
    return bytes(good)


@pytest.mark.parametrize(
    "request_der",
    [
        b"",
        b"\x30\x00",
        _broken_request(),
        csr(ec.generate_private_key(ec.SECP384R1())),
        csr(rsa.generate_private_key(65537, 2048)),
        csr(ec.generate_private_key(ec.SECP256R1())) + bytes(4_096),
    ],
    ids=["empty", "not a request", "signature broken", "other curve", "RSA", "endless"],
)
def test_a_bad_certificate_request_does_not_use_up_the_claim(tmp_path: Path, request_der: bytes) -> None:
    async def story(world: World) -> None:
        added = await world.add_vehicle()
        channel = world.channel(None, None, port=world.cloud.enrolment_port)
        stub: Any = vehicle_service_pb2_grpc.EnrolmentServiceStub(channel)
        request = vehicle_service_pb2.EnrollRequest(
            vin=VIN, claim_token=added.claim_token, csr_der=request_der
        )
        code, words = await code_of(stub.Enroll(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert words.startswith("csr_der: expected")
        await world.enroll(VIN, added.claim_token)

    play(tmp_path, story)


def test_the_enrolment_port_serves_nothing_else(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        channel = world.channel(None, None, port=world.cloud.enrolment_port)
        stub: Any = operator_service_pb2_grpc.OperatorServiceStub(channel)
        code, _ = await code_of(stub.ListVehicles(pb.ListVehiclesRequest()))
        assert code is grpc.StatusCode.UNIMPLEMENTED

    play(tmp_path, story)


def test_a_certificate_that_the_cloud_did_not_issue_for_this_vehicle_opens_no_stream(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        """The enrolment CA signed it, but no enrolment did: a leaked CA key, or an ended device."""
        await world.device()
        ca = x509.load_pem_x509_certificate((world.keys / "enrolment/ca.crt").read_bytes())
        ca_key = load_pem_private_key((world.keys / "enrolment/ca.key").read_bytes(), None)
        assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP256R1())
        stream = world.connect(Device(VIN, key, issue(VIN, key.public_key(), ca, ca_key), ""))
        assert await stream.ended() is grpc.StatusCode.PERMISSION_DENIED

    play(tmp_path, story)


@pytest.mark.parametrize("nonce", [b"", bytes(15), bytes(17)])
def test_a_nonce_of_another_length_ends_the_stream(tmp_path: Path, nonce: bytes) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        await stream.send(hello=vehicle_service_pb2.Hello(nonce=nonce))
        assert await stream.ended() is grpc.StatusCode.INVALID_ARGUMENT

    play(tmp_path, story)


def test_a_stream_must_open_with_one_hello(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.offer()
        assert await stream.ended() is grpc.StatusCode.INVALID_ARGUMENT
        stream = world.connect(device)
        await stream.hello()
        await stream.send(hello=vehicle_service_pb2.Hello(nonce=bytes(16)))
        assert await stream.ended() is grpc.StatusCode.INVALID_ARGUMENT

    play(tmp_path, story)


def test_a_request_id_of_another_operator_reveals_nothing(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        """Answers are kept by operator: the same id of another one is a new request."""
        request_id = str(uuid.uuid4())
        await world.device()
        await world.grant(request_id=request_id)
        row = await world.cloud.store.run(lambda tx: tx.request("mallory", request_id))
        assert row is None

    play(tmp_path, story)
