"""Who gets hold of an operator's certificate cannot have a fleet's worth of rights signed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
from support.cloud_world import START_MS, World, code_of, open_world, write_config

SEAT, LOGBOOK = "seat-heating-for-ever", "logbook-per-km"
VINS = [f"WFDSEAT10N000000{number}" for number in range(1, 5)]
HOUR_MS = 3_600_000


def config(folder: Path) -> Path:
    limits = "[signer]\nnew_rights_per_hour = 5\nrevocations_per_hour = 1\n\n[log]"
    return write_config(folder, **{"[log]": limits})


async def alarms(world: World, action: str) -> list[dict[str, object]]:
    entries = await world.audit(alarms_only=True)
    return [json.loads(entry.detail) for entry in entries if entry.action == action]


async def is_refused(world: World, vin: str) -> None:
    state = await world.state()
    code, words = await code_of(world.grant(SEAT, vin))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "signer.new_rights_per_hour" in words
    assert await world.state() == state


def test_grants_end_at_the_limit_with_alarms_and_vehicles_go_on(tmp_path: Path) -> None:
    async def run() -> None:
        path = config(tmp_path)
        async with open_world(path) as world:
            device = await world.device(VINS[0])
            for vin in VINS[1:]:
                await world.add_vehicle(vin)
            for plan in (SEAT, LOGBOOK):
                await world.grant(plan, VINS[0])
            await world.grant(SEAT, VINS[1])
            assert await alarms(world, "signer-limit-near") == []
            await world.grant(LOGBOOK, VINS[1])
            (near,) = await alarms(world, "signer-limit-near")
            assert near == {"kind": "new_rights", "count": 4, "limit": 5}
            await world.grant(SEAT, VINS[2])
            await is_refused(world, VINS[3])
            (refused,) = await alarms(world, "refused")
            assert refused["error"] == "SignerLimitError"
            assert (await world.connect(device).hello()).director.targets
        async with open_world(path, START_MS + HOUR_MS - 1) as world:
            await is_refused(world, VINS[3])  # a restart forgets nothing
            world.now_ms[0] = START_MS - HOUR_MS
            await is_refused(world, VINS[3])  # nor does a clock that is set back
            world.now_ms[0] = START_MS + HOUR_MS
            await world.grant(SEAT, VINS[3])

    asyncio.run(run())


def test_revocations_end_at_their_own_limit(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_world(config(tmp_path)) as world:
            await world.add_vehicle(VINS[0])
            first = await world.grant(SEAT, VINS[0])
            second = await world.grant(LOGBOOK, VINS[0])
            await world.revoke(first.entitlement.entitlement_id, VINS[0])
            state = await world.state()
            code, words = await code_of(world.revoke(second.entitlement.entitlement_id, VINS[0]))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "signer.revocations_per_hour" in words
            assert await world.state() == state

    asyncio.run(run())


def test_renewals_are_not_held_back(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_world(config(tmp_path)) as world:
            device = await world.device(VINS[0])
            await world.grant("seat-heating-monthly", VINS[0])
            for plan, vin in ((SEAT, VINS[1]), (SEAT, VINS[2])):
                await world.add_vehicle(vin)
                await world.grant(plan, vin)
                await world.grant(LOGBOOK, vin)
            before = (await world.connect(device).hello()).director.targets
            for _ in range(2):
                world.now_ms[0] += 29 * 24 * HOUR_MS
                after = (await world.connect(device).hello()).director.targets
                assert json.loads(after)["signed"]["version"] > json.loads(before)["signed"]["version"]
                before = after

    asyncio.run(run())
