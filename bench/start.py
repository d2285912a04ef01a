"""From exec to stored rights verified and first frame decoded, beside what a usual start imports and loads.

The agent holds a verified right and reads a serial adapter that replays a log of Model 3 frames, decoded by
Model3CAN.dbc and the VSS mapping of Kuksa. Its compiled table is there already, as after any first start.
The peer is a script that imports python-can, cantools, gRPC and python-tuf and loads the same database; it
verifies and decodes nothing.
"""

from __future__ import annotations

import compileall
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agent.adapters.store import Store
from agent.trust.verifier import verify_stored
from deploy.demo.stage import COMMANDS, VIN, Stage

RUNS = 15
DATA = Path(os.environ.get("OPENFOD_TEST_DATA", "../shared/data")).absolute()
DBC, LOG = DATA / "Model3CAN.dbc", DATA / "kuksa_model3_dogmode_candump.log"
MAPPING = DATA / "kuksa_vss_4.0_dbc.json"
RATE = 4_500
_READY, _DECODED = "agent is ready", "first frame is decoded"
_ENDS_WITHIN_S = 20.0
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
_PEER = """
import can, cantools, grpc, tuf.api.metadata, tuf.ngclient
cantools.database.load_file({dbc!r}, strict=False)
print("done", flush=True)
"""


def main() -> None:
    """Starts the agent and the peer in turn, RUNS times; prints medians."""
    if not DBC.exists():
        print(f"skipped: {DBC} is not here; set OPENFOD_TEST_DATA")
        return
    # As an installer leaves it, and as the peer's packages are: compiled.
    for package in ("agent", "common", "openfod"):
        compileall.compile_dir(Path(package), quiet=1)
    ready, decoded, peer = [], [], []
    with tempfile.TemporaryDirectory(prefix="openfod-") as folder, Stage(Path(folder) / "b") as stage:
        _prepare(stage)
        agent = [str(COMMANDS / "fod-agent"), "run", "--config", str(stage.agent_config())]
        script = [sys.executable, "-c", _PEER.format(dbc=str(DBC))]
        _until(agent, _DECODED)  # compiles the table
        for _ in range(RUNS):
            found = _until(agent, _READY, _DECODED)
            ready.append(found[_READY])
            decoded.append(found[_DECODED])
            peer.append(_until(script, "done")["done"])
        verified_ms = _verified_ms(stage.device_folder() / "agent.db")
    for what, found_ms in (
        ("exec → stored rights verified and first frame decoded", decoded),
        (f'of it, until "{_READY}"', ready),
        ("of it, verification of the stored state (alone)", verified_ms),
        ("peer: imports of can, cantools, grpc and tuf, and the same database", peer),
    ):
        print(f"{what}: median {statistics.median(found_ms):.0f} ms, worst of {RUNS} {max(found_ms):.0f} ms")
    print(f"peer to agent, ratio of medians {statistics.median(peer) / statistics.median(decoded):.1f}")


def _prepare(stage: Stage) -> None:
    """Leaves a stopped agent with a verified right in its database, before a bus that speaks."""
    stage.done("fod-keys", "init", stage.keys)
    stage.done("fod-keys", "sign-catalogue", stage.keys, "deploy/demo/catalogue", stage.folder / "catalogue")
    stage.start_cloud()
    stage.start_vehicle()
    config = ("--json", "--config", stage.cloud_config)
    ecu = stage.seat_ecu
    claim = stage.done("fod-cloud", "vehicle", "add", VIN, "--ecu", ecu, *config).data["claim_token"]
    agent = stage.write_agent_config()
    stage.done("fod-agent", "enroll", "--config", agent, "--claim", claim)
    stage.start_agent()
    stage.done("fod-cloud", "grant", VIN, "seat-heating-monthly", "--account", "acc-bench", "--wait", *config)
    stage.end_agent()
    line = stage.folder / "model3.tty"
    words = ("--log", LOG, "--rate", str(RATE), "--seconds", "3600", "--link", line)
    stage.start("model3", "fod-sim", "adapter", *words)
    bus = (
        f'[[buses]]\nname = "car"\ninterface = "slcan"\nchannel = "{line}"\nbitrate = 500000\n'
        f'database = "{DBC}"\nsignals = "{MAPPING}"\n'
    )
    agent.write_text(re.sub(r"\[\[buses\]\].*?(?=\n\[)", lambda _: bus, agent.read_text(), flags=re.DOTALL))


def _until(command: list[str], *texts: str) -> dict[str, float]:
    """Milliseconds from exec until each of the texts is printed."""
    found: dict[str, float] = {}
    begun = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1, env=_ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for text in texts:
                if text in line:
                    found.setdefault(text, (time.perf_counter() - begun) * 1e3)
            if len(found) == len(texts):
                break
        process.terminate()
        process.communicate(timeout=_ENDS_WITHIN_S)
    return found


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
