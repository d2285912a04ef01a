"""The attacker of the demonstration: a cloud with the genuine cloud's stolen TLS key.

Vehicles take it for the real one, because to TLS it is. It answers the first
nonce of each stream with one bundle that it was given, keeps what the vehicle
says to it, and ends the stream. All bundles are well-formed; the forged one is
made with the published software and the attacker's own keys.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from cloud import director, token
from deploy.demo.stage import SEAT_ECU, SEAT_HARDWARE, SEAT_UID, Stage, StageError
from openfod.entitlement.v1 import entitlement_pb2 as rights_pb
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc as rpc

FEATURE_PATH = "features/seat-heating/1.toml"
TOKEN_PATH = director.token_path(SEAT_ECU, "seat-heating")
FEATURE_NUMBER = 1
VERSION = 1_000
"""Version of forged metadata: newer than all that is genuine."""
JOURNAL_ID = "0" * 16
CALL_S = 15.0
"""Longest wait for the genuine cloud's answer."""
ANSWER_S = 45.0
"""Longest wait for the vehicle."""

Bundle = Callable[[bytes], pb.TrustUpdate]
"""Makes the answer to a nonce of 16 bytes."""


@dataclass(frozen=True)
class Attempt:
    """How an attack ended.

    Args:
        before: what the vehicle trusted when it opened the stream: director, catalogue.
        result: what it reported of the bundle.
    """

    before: tuple[pb.RepositoryVersions, pb.RepositoryVersions]
    result: pb.UpdateResult

    @property
    def is_unchanged(self) -> bool:
        """True if the vehicle trusts exactly what it trusted before."""
        return (self.result.director, self.result.catalogue) == self.before


class RogueCloud(rpc.VehicleServiceServicer):
    """A gRPC server on a free loopback port that answers vehicles as it is told."""

    def __init__(self, keys: Path) -> None:
        """Starts it.

        Args:
            keys: key folder of the cloud, of which it has server.key and server.crt.
        """
        self._bundles: queue.Queue[Bundle] = queue.Queue()
        self._attempts: queue.Queue[Attempt] = queue.Queue()
        pair = (keys / "tls/server.key").read_bytes(), (keys / "tls/server.crt").read_bytes()
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        rpc.add_VehicleServiceServicer_to_server(self, self._server)
        self.port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=0).wait()

    def attack(self, bundle: Bundle) -> Attempt:
        """Answers the next stream's nonce with a bundle; returns how the vehicle took it.

        Raises:
            StageError: no vehicle came, or it did not say.
        """
        self._bundles.put(bundle)
        try:
            return self._attempts.get(timeout=ANSWER_S)
        except queue.Empty:
            raise StageError(f"the vehicle did not answer the attacker within {ANSWER_S:.0f} s") from None

    def Connect(  # noqa: N802 (named by the contract)
        self, request_iterator: Iterator[pb.ConnectRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ConnectResponse]:
        """Serves one stream: a bundle for its first nonce, until the vehicle reports on it."""
        hello = next(request_iterator).hello
        bundle = self._next_bundle(context)
        if bundle is None:
            return
        yield pb.ConnectResponse(trust_update=bundle(hello.nonce))
        for request in request_iterator:
            if request.WhichOneof("payload") == "update_result":
                self._attempts.put(Attempt((hello.director, hello.catalogue), request.update_result))
                return

    def _next_bundle(self, context: grpc.ServicerContext) -> Bundle | None:
        """Waits for something to send, as long as the vehicle does."""
        deadline = time.monotonic() + ANSWER_S
        while context.is_active() and time.monotonic() < deadline:
            try:
                return self._bundles.get(timeout=0.1)
            except queue.Empty:
                continue
        return None


def forged(vin: str, feature_file: bytes) -> Bundle:
    """A perpetual right to seat heating, well-formed in every part, under the attacker's keys.

    Args:
        vin: the vehicle to be fooled.
        feature_file: the genuine description of the feature, which is public.
    """
    uid = bytes.fromhex(SEAT_UID)
    right = rights_pb.Entitlement(
        entitlement_id="ent-00000000000000ff",
        feature_id="seat-heating",
        min_release=1,
        account="acc-thief",
        plan_kind=rights_pb.PLAN_KIND_PERPETUAL,
        plan_id="seat-heating-for-ever",
        plan_version=1,
        resale=rights_pb.RESALE_STAYS_WITH_VEHICLE,
        display_terms=rights_pb.DisplayTerms(currency="EUR"),
        trace_id="f" * 32,
    )
    cose = token.sign(
        Ed25519PrivateKey.generate(),
        vin=vin,
        uid=uid,
        feature_number=FEATURE_NUMBER,
        counter=VERSION,
        state=token.ALLOWED,
        terms={},
    )
    items = [
        director.entitlements(vin, VERSION, 1, [right]),
        director.Item(FEATURE_PATH, feature_file, SEAT_ECU, SEAT_HARDWARE, 1),
        director.Item(TOKEN_PATH, cose, SEAT_ECU, SEAT_HARDWARE, VERSION),
    ]
    targets_key, snapshot_key, timestamp_key = (CryptoSigner.generate_ed25519() for _ in range(3))

    def bundle(nonce: bytes) -> pb.TrustUpdate:
        now_ms = time.time_ns() // 1_000_000
        signed = director.sign_set(
            vin, VERSION, items, targets_key=targets_key, snapshot_key=snapshot_key, now_ms=now_ms
        )
        timestamp = director.sign_timestamp(
            vin,
            VERSION,
            set_version=VERSION,
            snapshot=signed.snapshot,
            nonce=nonce,
            timestamp_key=timestamp_key,
            now_ms=now_ms,
        )
        return pb.TrustUpdate(
            director=pb.RepositoryMetadata(
                timestamp=timestamp, snapshot=signed.snapshot, targets=signed.targets
            ),
            director_targets=[
                pb.TargetFile(path=item.path, content=item.content)
                for item in items
                if item.path != FEATURE_PATH
            ],
            catalogue_targets=[pb.TargetFile(path=FEATURE_PATH, content=feature_file)],
        )

    return bundle


def genuine(stage: Stage, who: str, nonce: bytes) -> pb.TrustUpdate:
    """What the genuine cloud signs for a vehicle that knows nothing yet, in answer to a nonce.

    Args:
        who: the vehicle, by the folder with its device key and certificate.
        nonce: 16 bytes.

    Raises:
        StageError: the cloud does not answer.
    """
    device = stage.device_folder(who)
    credentials = grpc.ssl_channel_credentials(
        (stage.keys / "public/tls-ca.crt").read_bytes(),
        (device / "device.key").read_bytes(),
        (device / "device.crt").read_bytes(),
    )
    hello = pb.ConnectRequest(hello=pb.Hello(nonce=nonce, journal_id=JOURNAL_ID))
    with grpc.secure_channel(f"localhost:{stage.cloud_port}", credentials) as channel:
        try:
            stream = rpc.VehicleServiceStub(channel).Connect(iter([hello]), timeout=CALL_S)
            return next(stream).trust_update
        except (grpc.RpcError, StopIteration) as error:
            raise StageError(f"the cloud did not answer vehicle {who}: {error}") from error


def owners_token(vin: str) -> bytes:
    """A well-formed token for the seat module, signed by a key of the owner's own."""
    return token.sign(
        Ed25519PrivateKey.generate(),
        vin=vin,
        uid=bytes.fromhex(SEAT_UID),
        feature_number=FEATURE_NUMBER,
        counter=1,
        state=token.ALLOWED,
        terms={},
    )
