"""Connections that are not what they should be reach no service of the cloud."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from support.cloud_world import World, code_of, demo_keys, play

from openfod.operator.v1 import operator_service_pb2 as pb
from openfod.operator.v1 import operator_service_pb2_grpc

Opened = Callable[[World], grpc.aio.Channel]
URI = "urn:openfod:operator:mallory"


def public(name: str) -> bytes:
    return (demo_keys() / "keys" / name).read_bytes()


def client_pair(ca_key: ec.EllipticCurvePrivateKey, ends: datetime) -> tuple[bytes, bytes]:
    """A key, and a certificate of an operator in the enrolment CA's name, signed by any key."""
    ca = x509.load_pem_x509_certificate(public("enrolment/ca.crt"))
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2019, 1, 1, tzinfo=UTC))
        .not_valid_after(ends)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(URI)]), critical=True)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, certificate.public_bytes(Encoding.PEM)


def enrolment_key() -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(public("enrolment/ca.key"), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def channel(
    world: World, *, roots: bytes = b"", pair: tuple[bytes, bytes] | None = None, name: str = "localhost"
) -> grpc.aio.Channel:
    key, certificate = pair or (public("operator/operator.key"), public("operator/operator.crt"))
    credentials = grpc.ssl_channel_credentials(roots or public("public/tls-ca.crt"), key, certificate)
    options = [("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(f"localhost:{world.cloud.port}", credentials, options)


def genuine(world: World) -> grpc.aio.Channel:
    return channel(world)


def genuine_signed_by_hand(world: World) -> grpc.aio.Channel:
    """What the attacks below are but for one point each."""
    return channel(world, pair=client_pair(enrolment_key(), datetime.now(UTC) + timedelta(days=1)))


def wrong_ca(world: World) -> grpc.aio.Channel:
    return channel(world, roots=public("enrolment/ca.crt"))


def wrong_name(world: World) -> grpc.aio.Channel:
    return channel(world, name="cloud.example")


def no_client_certificate(world: World) -> grpc.aio.Channel:
    return world.channel(None, None)


def client_certificate_of_another_ca(world: World) -> grpc.aio.Channel:
    stranger = ec.generate_private_key(ec.SECP256R1())
    return channel(world, pair=client_pair(stranger, datetime.now(UTC) + timedelta(days=1)))


def ended_client_certificate(world: World) -> grpc.aio.Channel:
    return channel(world, pair=client_pair(enrolment_key(), datetime(2020, 1, 1, tzinfo=UTC)))


def plain_text(world: World) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"localhost:{world.cloud.port}")


async def call(opened: grpc.aio.Channel) -> pb.ListVehiclesResponse:
    stub: Any = operator_service_pb2_grpc.OperatorServiceStub(opened)
    answer: pb.ListVehiclesResponse = await stub.ListVehicles(pb.ListVehiclesRequest(), timeout=10)
    return answer


@pytest.mark.parametrize("opened", [genuine, genuine_signed_by_hand])
def test_the_connections_that_the_attacks_are_made_from_work(tmp_path: Path, opened: Opened) -> None:
    async def story(world: World) -> None:
        async with opened(world) as made:
            assert list((await call(made)).vehicles) == []

    play(tmp_path, story)


@pytest.mark.parametrize(
    "opened",
    [
        wrong_ca,
        wrong_name,
        no_client_certificate,
        client_certificate_of_another_ca,
        ended_client_certificate,
        plain_text,
    ],
)
def test_no_call_gets_through_and_nothing_changes(tmp_path: Path, opened: Opened) -> None:
    async def story(world: World) -> None:
        await world.device()
        state, log = await world.state(), await world.audit()
        async with opened(world) as made:
            code, _ = await code_of(call(made))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert await world.state() == state
        assert await world.audit() == log

    play(tmp_path, story)
