"""An honest restore with the real server and the operator's commands, and a vehicle that plays its part."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.cloud_world import (
    JOURNAL,
    START_MS,
    VIN,
    Device,
    Stream,
    World,
    chain,
    record,
    signed_batch,
    write_config,
)
from support.real_process import serving
from support.signals_data import REPOSITORY

from openfod.operator.v1 import operator_service_pb2
from openfod.usage.v1 import usage_pb2

NEW_JOURNAL = "00112233445566bb"
REQUEST_ID = "6f1c2d3e-0000-4000-8000-000000000001"


def operate(config: Path, ready: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    """Runs an operator's command against the running server."""
    used = config.with_name("operator.toml")
    text = config.read_text(encoding="utf-8")
    used.write_text(
        text.replace('endpoint = "127.0.0.1:0"', f'endpoint = "127.0.0.1:{ready["port"]}"'), encoding="utf-8"
    )
    return subprocess.run(
        [sys.executable, "-m", "cloud", *words, "--config", str(used)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
    )


def world_of(ready: dict[str, Any]) -> World:
    """A way to the server for scripted vehicles and operators."""
    cloud: Any = SimpleNamespace(port=ready["port"], enrolment_port=ready["enrolment_port"])
    return World(cloud, [START_MS])


async def closed(world: World) -> None:
    for channel in world.channels:
        await channel.close()


async def taken(stream: Stream, device: Device, records: list[bytes], journal: str = JOURNAL) -> bool:
    answer = await stream.upload(signed_batch(device.key, device.source, records, journal))
    return answer.WhichOneof("payload") == "receipt"


def test_a_restored_vehicle_goes_on_by_the_operators_commands(tmp_path: Path) -> None:
    config, log = write_config(tmp_path), tmp_path / "cloud.log"
    devices: list[Device] = []
    sent: list[bytes] = []
    lived: list[bytes] = []

    async def forks(ready: dict[str, Any]) -> None:
        world = world_of(ready)
        device = await world.device()
        devices.append(device)
        sent.extend(chain(device.source, 5))
        head = hashlib.sha256(sent[1]).digest()
        lived.extend(chain(device.source, 3, first=3, prev_hash=head, value=7))
        stream = world.connect(device)
        await stream.hello()
        assert await taken(stream, device, sent)
        assert not await taken(stream, device, lived)
        await closed(world)

    with serving(config, log) as (process, ready):
        early = operate(
            config, ready, "vehicle", "restart-journal", VIN, "--journal", JOURNAL, "--reason", "r"
        )
        assert early.returncode == 1  # not even the vehicle is known
        asyncio.run(forks(ready))
        out = tmp_path / "evidence"
        shown = operate(config, ready, "vehicle", "evidence", VIN, "--out", str(out), "--json")
        assert shown.returncode == 0, shown.stderr
        (found,) = json.loads(shown.stdout)["evidence"]
        assert (found["kind"], found["journal_id"], int(found["seq"])) == ("journal-fork", JOURNAL, 3)
        assert (out / f"{found['evidence_id']}-stored.pb").read_bytes() == sent[2]
        received = usage_pb2.SignedUsageBatch.FromString(
            (out / f"{found['evidence_id']}-received.pb").read_bytes()
        )
        assert list(usage_pb2.UsageBatch.FromString(received.batch).records) == lived
        table = operate(config, ready, "vehicle", "evidence", VIN)
        assert "journal-fork" in table.stdout
        words = ("vehicle", "restart-journal", VIN, "--journal", JOURNAL, "--request-id", REQUEST_ID)
        first = operate(config, ready, *words, "--reason", "head unit restored", "--json")
        assert first.returncode == 0, first.stderr
        again = operate(config, ready, *words, "--reason", "head unit restored", "--json")
        assert again.stdout == first.stdout
        other = operate(config, ready, *words, "--reason", "something else")
        assert other.returncode == 1
        assert "was used for another request" in other.stderr
        process.kill()  # the word stands, whatever becomes of the server

    async def restored(ready: dict[str, Any]) -> None:
        world, (device,) = world_of(ready), devices
        stream = world.connect(device)
        await stream.hello()
        answer = await stream.receive()
        while answer.WhichOneof("payload") != "journal_restart":
            answer = await stream.receive()
        restart = usage_pb2.JournalRestart.FromString(answer.journal_restart.restart)
        assert (restart.fork_seq, restart.head_seq) == (3, 5)
        assert restart.head_hash == hashlib.sha256(sent[-1]).digest()
        assert not await taken(stream, device, lived)
        moved, named = [], restart.head_hash
        for seq in range(1, 4):
            moved.append(record(device.source, seq, named, id=f"{NEW_JOURNAL}/{seq}", value=7))
            named = hashlib.sha256(moved[-1]).digest()
        assert await taken(stream, device, moved, NEW_JOURNAL)
        state = await world.operator.ListEvidence(operator_service_pb2.ListEvidenceRequest(vin=VIN))
        assert len(state.evidence) == 1
        await closed(world)

    with serving(config, log) as (_, ready):
        asyncio.run(restored(ready))
        audit = operate(config, ready, "audit", "--vin", VIN, "--alarms")
        assert "restart-journal" in audit.stdout
        assert "head unit restored" in audit.stdout
