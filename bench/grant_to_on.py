"""From the grant in the cloud to the ECU's confirmed read-back, with real processes.

Cloud, simulated vehicle and agent run on this machine, joined by mTLS and a
socketcand bus with the vehicle's normal traffic (about 170 frames/s).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from deploy.demo.stage import VIN, Stage

GRANTS = 30


def main() -> None:
    """Grants and revokes GRANTS times; prints the median and the worst."""
    operator_ms, vehicle_ms = [], []
    with tempfile.TemporaryDirectory(prefix="openfod-") as folder, Stage(Path(folder) / "b") as stage:
        stage.done("fod-keys", "init", stage.keys)
        catalogue = stage.folder / "catalogue"
        stage.done("fod-keys", "sign-catalogue", stage.keys, "deploy/demo/catalogue", catalogue)
        stage.start_cloud()
        stage.start_vehicle()
        config = ("--json", "--config", stage.cloud_config)
        ecu = stage.seat_ecu
        claim = stage.done("fod-cloud", "vehicle", "add", VIN, "--ecu", ecu, *config).data["claim_token"]
        stage.write_agent_config()
        stage.done("fod-agent", "enroll", "--config", stage.agent_config(), "--claim", claim)
        stage.start_agent()
        grant = ("fod-cloud", "grant", VIN, "seat-heating-monthly", "--account", "acc-bench", "--wait")
        for _ in range(GRANTS):
            done = stage.done(*grant, *config).data
            operator_ms.append(done["waited_ms"])
            vehicle_ms.append(stage.seat_heating()["activation_ms"])
            right = done["grant"]["entitlement"]["entitlement_id"]
            stage.done("fod-cloud", "revoke", VIN, right, "--reason", "benchmark", *config)
            stage.until_state("LOCKED")
    for what, found in (
        ("grant request → operator sees ACTIVE", operator_ms),
        ("update arrives → read-back confirms, on the vehicle", vehicle_ms),
    ):
        print(f"{what}: median {statistics.median(found):.0f} ms, worst of {GRANTS} {max(found)} ms")
