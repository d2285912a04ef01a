"""From exec to "agent is ready" with stored rights, and what of it are imports and verification."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agent.adapters.store import Store
from agent.trust.verifier import verify_stored
from deploy.demo.stage import COMMANDS, SEAT_ECU, SEAT_HARDWARE, SEAT_UID, VIN, Stage

RUNS = 10
_READY = "agent is ready"
_ENDS_WITHIN_S = 20.0


def main() -> None:
    """Starts the agent RUNS times with a right on disk; prints medians."""
    with tempfile.TemporaryDirectory(prefix="openfod-") as folder, Stage(Path(folder) / "b") as stage:
        _prepare(stage)
        started_ms = [_start_ms(stage) for _ in range(RUNS)]
        verified_ms = _verified_ms(stage.device_folder() / "agent.db")
    imported_ms = [_imported_ms() for _ in range(RUNS)]
    for what, found in (
        (f'exec → "{_READY}", one right stored', started_ms),
        ("of it, imports of agent.app (python -X importtime)", imported_ms),
        ("of it, verification of the stored state", verified_ms),
    ):
        print(f"{what}: median {statistics.median(found):.1f} ms, worst of {RUNS} {max(found):.1f} ms")


def _prepare(stage: Stage) -> None:
    """Leaves a stopped agent with a verified right in its database."""
    stage.done("fod-keys", "init", stage.keys)
    stage.done("fod-keys", "sign-catalogue", stage.keys, "deploy/demo/catalogue", stage.folder / "catalogue")
    stage.start_cloud()
    stage.start_vehicle()
    config = ("--json", "--config", stage.cloud_config)
    ecu = f"{SEAT_ECU}:{SEAT_HARDWARE}:{SEAT_UID}"
    claim = stage.done("fod-cloud", "vehicle", "add", VIN, "--ecu", ecu, *config).data["claim_token"]
    stage.write_agent_config()
    stage.done("fod-agent", "enroll", "--config", stage.agent_config(), "--claim", claim)
    stage.start_agent()
    stage.done("fod-cloud", "grant", VIN, "seat-heating-monthly", "--account", "acc-bench", "--wait", *config)
    stage.agent.end()


def _start_ms(stage: Stage) -> float:
    command = [str(COMMANDS / "fod-agent"), "run", "--config", str(stage.agent_config())]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if _READY in line:
                break
        took_ms = (time.perf_counter() - begun) * 1e3
        process.terminate()
        process.communicate(timeout=_ENDS_WITHIN_S)
    return took_ms


def _imported_ms() -> float:
    command = [sys.executable, "-X", "importtime", "-c", "import agent.app"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    return int(lines[-1].split("|")[1]) / 1e3


def _verified_ms(database: Path) -> list[float]:
    store = Store(database, boot_id="bench", journal_id=None)
    stored = store.load()
    store.close()
    found = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        verify_stored(stored.trust, vin=VIN, as_of_ms=stored.as_of_ms, floors=stored.floors)
        found.append((time.perf_counter() - begun) * 1e3)
    return found
