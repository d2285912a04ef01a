"""Floods: a vehicle that reports megabytes, and strangers at the enrolment port."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from support.cloud_world import VIN, World, csr, play

from cloud.vehicle_service import MAX_ENROLMENTS
from openfod.operator.v1 import operator_service_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2_grpc


@pytest.mark.parametrize("field", ["entitlement_id", "trace_id", "reason"])
def test_a_status_is_bounded(tmp_path: Path, field: str) -> None:
    async def story(world: World) -> None:
        stream = world.connect(await world.device())
        await stream.hello()
        status = pb.FeatureStatus(feature_id="seat-heating")
        setattr(status, field, "x" * 1_000_000)
        await stream.send(feature_status=pb.FeatureStatusReport(features=[status]))
        assert await stream.ended() is grpc.StatusCode.INVALID_ARGUMENT
        assert await world.cloud.store.run(lambda tx: tx.status(VIN)) == {}

    play(tmp_path, story)


def test_strangers_at_the_enrolment_port_do_not_fill_the_queue_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way: list[int] = [0, 0]

    async def story(world: World) -> None:
        run = world.cloud.store.run

        async def counted(work: Any) -> Any:
            under_way[0] += 1
            under_way[1] = max(under_way)
            try:
                return await run(work)
            finally:
                under_way[0] -= 1

        monkeypatch.setattr(world.cloud.store, "run", counted)
        request = pb.EnrollRequest(
            vin=VIN, claim_token="x", csr_der=csr(ec.generate_private_key(ec.SECP256R1()))
        )
        stub: Any = vehicle_service_pb2_grpc.EnrolmentServiceStub(
            world.channel(None, None, port=world.cloud.enrolment_port)
        )
        calls = [stub.Enroll(request) for _ in range(50)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {a.code() for a in answers if isinstance(a, grpc.aio.AioRpcError)} == {
            grpc.StatusCode.UNAUTHENTICATED
        }
        assert 1 <= under_way[1] <= MAX_ENROLMENTS
        await world.operator.ListVehicles(operator_service_pb2.ListVehiclesRequest())

    play(tmp_path, story)
