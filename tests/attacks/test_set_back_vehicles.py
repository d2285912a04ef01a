"""Old disk images, clones, forked journals and boxes on the bus: each is found once, with an alarm."""

from __future__ import annotations

import json
from pathlib import Path

from support.cloud_world import (
    JOURNAL,
    VIN,
    World,
    chain,
    play,
    record,
    signed_batch,
)

from cloud.findings import MAX_FINDINGS
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

NEW = pb.RepositoryVersions(root=1, timestamp=2, snapshot=2, targets=2)
OLD = pb.RepositoryVersions(root=1, timestamp=1, snapshot=1, targets=1)


async def findings(world: World) -> list[str]:
    answer = await world.operator.ListVehicles(operator_pb2.ListVehiclesRequest())
    return list(answer.vehicles[0].findings)


async def alarms(world: World, action: str) -> list[dict[str, object]]:
    entries = await world.audit(vin=VIN, alarms_only=True)
    return [json.loads(entry.detail) for entry in entries if entry.action == action]


def test_an_older_disk_is_found_and_gets_the_present_set_at_once(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        await world.grant()
        stream = world.connect(device)
        await stream.hello()
        await stream.offer()
        await stream.send(update_result=pb.UpdateResult(director=NEW, catalogue=NEW))
        answer = await stream.upload(signed_batch(device.key, device.source, chain(device.source, 1)))
        assert answer.WhichOneof("payload") == "receipt"  # what was sent before is stored by now
        assert await findings(world) == []

        for _ in range(2):
            update = await world.connect(device).hello(director=OLD)
            assert json.loads(update.director.targets)["signed"]["version"] == 2
        (finding,) = await findings(world)
        assert "timestamp 2, now 1" in finding
        assert "targets 2, now 1" in finding
        (alarm,) = await alarms(world, "set-back")
        assert alarm["finding"] == finding

    play(tmp_path, story)


def test_a_vehicle_that_reports_what_it_confirmed_is_no_finding(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        await world.grant()
        stream = world.connect(device)
        await stream.hello()
        await stream.send(update_result=pb.UpdateResult(director=OLD))
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 1)))
        await world.connect(device).hello(director=OLD)
        assert await findings(world) == []

    play(tmp_path, story)


def test_a_forked_journal_is_refused_and_both_hashes_are_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 2)))
        before = (await world.state())["usage_records"]
        forked = chain(device.source, 2, value=1)
        for _ in range(2):
            answer = await stream.upload(signed_batch(device.key, device.source, forked))
            assert answer.usage_refusal.error_type == "ChainError"
            assert answer.usage_refusal.stored_through_seq == 2
        assert (await world.state())["usage_records"] == before
        (finding,) = await findings(world)
        (alarm,) = await alarms(world, "journal-fork")
        assert (alarm["journal"], alarm["seq"]) == (JOURNAL, 1)
        for name in ("stored_hash", "received_hash"):
            assert str(alarm[name]) in finding
        assert alarm["stored_hash"] != alarm["received_hash"]

    play(tmp_path, story)


def test_a_clone_that_continues_another_history_is_a_fork(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 2)))
        other = [record(device.source, 3, b"\x07" * 32)]
        answer = await stream.upload(signed_batch(device.key, device.source, other))
        assert answer.usage_refusal.error_type == "ChainError"
        (alarm,) = await alarms(world, "journal-fork")
        assert (alarm["seq"], alarm["received_hash"]) == (2, "07" * 32)

    play(tmp_path, story)


def test_evidence_of_a_box_on_the_bus_is_kept_once_and_in_bounds(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()

        async def report(finding: str) -> None:
            evidence = pb.Evidence(finding=finding, read_back=b"\x62\x01", counter=7, at_ms=5)
            status = pb.FeatureStatus(feature_id="seat-heating", evidence=evidence)
            await stream.send(feature_status=pb.FeatureStatusReport(features=[status]))

        for _ in range(2):
            await report("on without a live right")
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 1)))
        assert await findings(world) == ["seat-heating: on without a live right"]
        (alarm,) = await alarms(world, "evidence")
        assert (alarm["read_back"], alarm["counter"], alarm["seen_ms"]) == ("6201", 7, 5)

        for number in range(MAX_FINDINGS + 5):
            await report(f"made up {number}")
        await stream.upload(signed_batch(device.key, device.source, chain(device.source, 1)))
        assert len(await findings(world)) == MAX_FINDINGS
        assert len(await alarms(world, "evidence")) == MAX_FINDINGS

    play(tmp_path, story)


def test_evidence_beyond_the_contract_ends_the_stream_and_is_not_kept(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        stream = world.connect(device)
        await stream.hello()
        state = await world.state()
        evidence = pb.Evidence(finding="x", read_back=bytes(65))
        status = pb.FeatureStatus(feature_id="seat-heating", evidence=evidence)
        await stream.send(feature_status=pb.FeatureStatusReport(features=[status]))
        assert (await stream.ended()).name == "INVALID_ARGUMENT"
        assert await world.state() == state

    play(tmp_path, story)
