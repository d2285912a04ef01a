"""Rights as a file: made by the cloud, judged by the agent's own verification."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.cloud_world import (
    DAY_MS,
    START_MS,
    VIN,
    World,
    code_of,
    demo_keys,
    open_world,
    play,
    write_config,
)

from agent.errors import ReplayError
from agent.model import RepositoryBytes, TrustBytes
from agent.trust.verifier import Floors, verify_bundle, verify_update
from agent.wire import trust_update_from_proto
from cloud.__main__ import main
from openfod.operator.v1 import operator_service_pb2 as operator_pb2
from openfod.vehicle.v1 import vehicle_service_pb2 as pb


async def export(world: World, stub: Any = None) -> operator_pb2.ExportBundleResponse:
    stub = stub or world.operator
    answer: operator_pb2.ExportBundleResponse = await stub.ExportBundle(
        operator_pb2.ExportBundleRequest(vin=VIN)
    )
    return answer


def read(bundle: bytes) -> TrustBytes:
    return trust_update_from_proto(pb.TrustUpdate.FromString(bundle))


def provisioned() -> TrustBytes:
    public = demo_keys() / "keys/public"
    director, catalogue = ((public / f"{name}-root.json").read_bytes() for name in ("director", "catalogue"))
    return TrustBytes(RepositoryBytes(roots=(director,)), RepositoryBytes(roots=(catalogue,)))


def test_the_agent_takes_a_bundle_and_no_stream_would(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.device()
        await world.grant()
        answer = await export(world)
        bundle = read(answer.bundle)
        assert answer.expires_ms == START_MS + 7 * DAY_MS
        verdict = verify_bundle(provisioned(), bundle, vin=VIN, now_ms=0, floors=Floors())
        assert set(verdict.rights.entitlements) == {"seat-heating"}
        assert set(verdict.rights.tokens) == {"seat-heating"}
        assert min(verdict.expires_ms.values()) == answer.expires_ms
        assert len(bundle.director.roots) == len(bundle.catalogue.roots) == 1
        with pytest.raises(ReplayError):
            verify_update(provisioned(), bundle, vin=VIN, nonce=bytes(16), now_ms=0, floors=Floors())
        (entry,) = [e for e in await world.audit(vin=VIN) if e.action == "export-bundle"]
        assert json.loads(entry.detail)["expires_ms"] == answer.expires_ms

    play(tmp_path, story)


def test_the_next_live_answer_is_newer_than_a_bundle(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        device = await world.device()
        bundle = read((await export(world)).bundle)
        stream = world.connect(device)
        update = await stream.hello()
        versions = [
            json.loads(c)["signed"]["version"] for c in (bundle.director.timestamp, update.director.timestamp)
        ]
        assert versions[0] < versions[1]

    play(tmp_path, story)


def test_a_workshop_exports_but_confirms_no_restore(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.device()
        assert (await export(world, world.as_operator("shop", "workshop"))).bundle
        state = await world.state()
        request = operator_pb2.ConfirmRestoreRequest(backup_ms=1, reason="r", request_id="")
        code, _ = await code_of(world.as_operator("shop", "workshop").ConfirmRestore(request))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert await world.state() == state

    play(tmp_path, story)


@pytest.mark.parametrize("backup_ms", [0, -1, START_MS + 1])
def test_a_backup_from_the_future_is_refused(tmp_path: Path, backup_ms: int) -> None:
    async def story(world: World) -> None:
        state = await world.state()
        request = operator_pb2.ConfirmRestoreRequest(backup_ms=backup_ms, reason="r", request_id="")
        code, words = await code_of(world.operator.ConfirmRestore(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "backup_ms" in words
        assert await world.state() == state

    play(tmp_path, story)


def test_the_commands_write_a_private_file_and_confirm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rights.bundle"

    async def run() -> None:
        path = write_config(tmp_path)
        async with open_world(path) as world:
            await world.device()
            path.write_text(
                path.read_text().replace(
                    'endpoint = "127.0.0.1:0"', f'endpoint = "127.0.0.1:{world.cloud.port}"'
                )
            )
            common = ["--config", str(path)]

            async def command(*words: str) -> int:
                return await asyncio.to_thread(main, [*words, *common])

            assert await command("export-bundle", VIN, "--out", str(out)) == 0
            assert "good until" in capsys.readouterr().out
            assert stat.S_IMODE(out.stat().st_mode) == 0o600
            first = out.read_bytes()
            verify_bundle(provisioned(), read(first), vin=VIN, now_ms=0, floors=Floors())
            assert await command("export-bundle", VIN, "--out", str(out)) == 1
            assert "--force" in capsys.readouterr().err
            assert out.read_bytes() == first
            assert await command("export-bundle", VIN, "--out", str(out), "--force", "--json") == 0
            assert json.loads(capsys.readouterr().out)["bytes"] == len(out.read_bytes())
            assert out.read_bytes() != first
            missing = tmp_path / "missing" / "x"
            assert await command("export-bundle", VIN, "--out", str(missing)) == 1
            assert "cannot be written" in capsys.readouterr().err
            words = ("confirm-restore", "--backup-time", "2026-03-30T00:00:00Z", "--reason", "disk died")
            assert await command(*words) == 0
            assert "confirmed" in capsys.readouterr().out

    asyncio.run(run())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".rights")]


def test_a_backup_time_needs_its_zone(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("2026-03-30T00:00:00", "yesterday"):
        with pytest.raises(SystemExit):
            main(["confirm-restore", "--backup-time", text, "--reason", "r", "--config", "x"])
    assert "no time zone" in capsys.readouterr().err
