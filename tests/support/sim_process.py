"""`fod-sim run` as a process that a test talks to."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from vectors import make_token_vectors as signer

DEADLINE_S = 20.0
SCENARIO = """
truth = "truth.jsonl"
control = "stdin"
[vehicle]
vin = "{vin}"
odometer_m = 1000
[bus]
transport = "socketcand"
slcan = true
[trust]
token_root = "root.pub"
token_keys = ["key-1.cose"]
[[ecu]]
identifier = "seat-module"
hardware_id = "openfod-seat-1"
uid = "{uid}"
request_id = 0x744
response_id = 0x74C
features = [1]
state = "state/seat.json"
[[ecu]]
identifier = "powertrain"
kind = "powertrain"
hardware_id = "openfod-powertrain-1"
uid = "{other_uid}"
request_id = 0x7E0
response_id = 0x7E8
[[timeline]]
at_s = 0
do = "ignition on"
"""


def write_scenario(folder: Path) -> Path:
    """Writes a scenario with the published test keys."""
    root = Ed25519PublicKey.from_public_bytes(signer.ROOT.public)
    (folder / "root.pub").write_bytes(root.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (folder / "key-1.cose").write_bytes(signer.announcement(1, signer.KEY_1))
    path = folder / "scenario.toml"
    text = SCENARIO.format(vin=signer.VIN, uid=signer.UID.hex(), other_uid=signer.OTHER_UID.hex())
    path.write_text(text, encoding="utf-8")
    return path


class SimProcess:
    """A running `fod-sim run --stdin`; ends with the with-block."""

    def __init__(self, scenario: Path) -> None:
        command = [sys.executable, "-m", "firmware_sim", "run", str(scenario), "--stdin"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.events: list[dict[str, Any]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def tell(self, line: str) -> dict[str, Any]:
        """Gives a command and returns its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.wait_for(
            lambda e: e["event"] in {"ok", "error", "truth"} and e.get("command", line) == line
        )

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits for an event; those that come before it stay in `events`."""
        deadline = time.monotonic() + DEADLINE_S
        while (left := deadline - time.monotonic()) > 0:
            line = self._lines.get(timeout=left)
            assert line, f"it has ended; seen: {self.events}"
            event: dict[str, Any] = json.loads(line)
            self.events.append(event)
            if wanted(event):
                return event
        raise AssertionError(f"no such event; seen: {self.events}")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")
