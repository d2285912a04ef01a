"""A vehicle enrols again: a new key beside the old one, and one moment at which it counts."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from support.agent_world import SOURCE, AgentWorld
from support.edge_cloud import Pair, authority, issue, server_pair
from support.trust_repo import NOW_MS, SEAT

from agent.__main__ import main
from agent.adapters import identity
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc as rpc


@dataclass
class Enrolment(rpc.EnrolmentServiceServicer):
    """Issues what it is asked for, under any name."""

    source: str = SOURCE
    refuse: bool = False
    other_key: bool = False
    asked: list[pb.EnrollRequest] = field(default_factory=list)

    def Enroll(self, request: pb.EnrollRequest, context: Any) -> pb.EnrollResponse:  # noqa: N802 (name given)
        self.asked.append(request)
        if self.refuse:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the claim is used")
        key = x509.load_der_x509_csr(request.csr_der).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = issue("vehicle", authority()) if self.other_key else _for(key)
        return pb.EnrollResponse(certificate_der=certificate.der, source=self.source)


def _for(public_key: ec.EllipticCurvePublicKey) -> Pair:
    """A certificate for a key of which only the public half is known."""

    class _Public:
        def public_key(self) -> ec.EllipticCurvePublicKey:
            return public_key

    return issue("vehicle", authority(), _Public())  # type: ignore[arg-type]


@contextmanager
def serving(enrolment: Enrolment, pair: Pair | None = None) -> Iterator[int]:
    pair = pair or server_pair()
    server = grpc.server(ThreadPoolExecutor(2))
    rpc.add_EnrolmentServiceServicer_to_server(enrolment, server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pair.key_pem, pair.pem)]))
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def again(world: AgentWorld, port: int, *words: str) -> int:
    path = world.folder / "again.toml"
    path.write_text(world.path.read_text().replace("127.0.0.1:1", f"127.0.0.1:{port}"))
    return main(["enroll", "--claim", "CLAIM", *words, "--config", str(path)])


def files(world: AgentWorld) -> dict[str, bytes]:
    return {
        str(f.relative_to(world.state)): f.read_bytes()
        for f in world.state.rglob("*")
        if f.is_file() and f.parent.name != identity.STAGED and f.suffix not in {".db-wal", ".db-shm"}
    }


@pytest.fixture
def world(tmp_path: Path) -> AgentWorld:
    world = AgentWorld(tmp_path)
    world.supplied()
    return world


def test_new_key_counts_and_rights_and_journal_are_kept(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    old = identity.load(world.state)
    enrolment = Enrolment()
    with serving(enrolment) as port:
        assert again(world, port, "--again", "--json") == 0
    assert json.loads(capsys.readouterr().out)["source"] == SOURCE
    new = identity.load(world.state)
    assert old is not None
    assert new is not None
    assert (new.source, new.key_pem == old.key_pem) == (SOURCE, False)
    assert not (world.state / identity.STAGED).exists()
    with world.boot() as life:
        assert life.live == {SEAT}


def test_without_again_it_is_refused_and_the_cloud_not_asked(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    before, enrolment = files(world), Enrolment()
    with serving(enrolment) as port:
        assert again(world, port) == 1
    assert "fod-agent enroll --again" in capsys.readouterr().err
    assert (files(world), enrolment.asked) == (before, [])


@pytest.mark.parametrize(
    ("enrolment", "words"),
    [
        (Enrolment(refuse=True), "the claim is used"),
        (Enrolment(source="veh-ffffffffffffffff"), f"its usage is reported as {SOURCE}"),
        (Enrolment(source=""), "names this vehicle nothing"),
        (Enrolment(other_key=True), "another key than this vehicle's"),
    ],
    ids=["refused", "other pseudonym", "no pseudonym", "other key"],
)
def test_answer_that_does_not_fit_leaves_the_old_identity(
    world: AgentWorld, enrolment: Enrolment, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(world)
    with serving(enrolment) as port:
        assert again(world, port, "--again") == 1
    assert words in capsys.readouterr().err
    assert files(world) == before
    with world.boot() as life:
        assert life.live == {SEAT}


def test_second_try_asks_with_the_same_new_key(world: AgentWorld) -> None:
    enrolment = Enrolment(refuse=True)
    with serving(enrolment) as port:
        again(world, port, "--again")
        enrolment.refuse = False
        assert again(world, port, "--again") == 0
    first, second = (x509.load_der_x509_csr(r.csr_der).public_key() for r in enrolment.asked)
    assert first == second


def test_lost_device_key_is_replaced(world: AgentWorld) -> None:
    (world.state / identity.KEY_FILE).unlink()
    with serving(Enrolment()) as port:
        assert again(world, port, "--again") == 0
    with world.boot() as life:
        assert life.live == {SEAT}


def test_vehicle_that_never_enrolled_has_nothing_to_replace(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.state / identity.CERTIFICATE_FILE).unlink()
    enrolment = Enrolment()
    with serving(enrolment) as port:
        assert again(world, port, "--again") == 1
    assert "leave --again out" in capsys.readouterr().err
    assert enrolment.asked == []


def test_cloud_is_known_by_the_stored_anchors_and_not_by_the_authority_of_the_image(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    own = issue("localhost", issue("an authority of its own"), ip="127.0.0.1")
    world.cloud.notices["tls.json"] = tls_file(own)
    world.cloud.publish()
    with world.boot() as life:
        assert life.contact().error_type == ""
    enrolment = Enrolment()
    with serving(enrolment) as port:
        assert again(world, port, "--again") == 1
    assert "the anchors that the director signed" in capsys.readouterr().err
    assert enrolment.asked == []
    with serving(enrolment, own) as port:
        assert again(world, port, "--again") == 0


def tls_file(pair: Pair) -> bytes:
    server = {
        "certificate": base64.b64encode(pair.der).decode(),
        "not_before_ms": NOW_MS - 1,
        "not_after_ms": NOW_MS + 30 * 86_400_000,
    }
    return json.dumps({"servers": [server]}).encode()
