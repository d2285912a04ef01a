"""A cloud and agents as real processes, with keys of their own, on loopback and free ports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.signals_data import REPOSITORY

from agent.adapters import local_api
from agent.errors import TransportError
from keys import catalogue, ceremony

DEMO = REPOSITORY / "deploy" / "demo"
VIN = "SHHFK8G70HU000001"
ACCOUNT = "acc-real-car"
DEADLINE_S = 60.0
POLL_S = 0.05

AGENT = """
[vehicle]
vin = "{vin}"
listen_only = true
[cloud]
endpoint = "127.0.0.1:{port}"
enrolment_endpoint = "127.0.0.1:{enrolment_port}"
root_ca = "keys/public/tls-ca.crt"
server_name = "localhost"
[trust]
director_root = "keys/public/director-root.json"
catalogue_root = "keys/public/catalogue-root.json"
receipt_key = "keys/public/receipt.pub"
[state]
directory = "agent"
[metering]
checkpoint_s = 0.5
window_s = 5
[[buses]]
name = "car"
{bus}
"""
SILENT_BUS = 'interface = "virtual"\nchannel = "silent"'


class Running:
    """A cloud on a folder of its own, and the agent of one vehicle."""

    def __init__(self, folder: Path, port: int, enrolment_port: int) -> None:
        self.folder = folder
        self._ports = {"port": port, "enrolment_port": enrolment_port}

    def cloud(self, *words: str) -> Any:
        """Runs an operator's command with --json and returns its answer."""
        return _run("cloud", *words, "--config", str(self.folder / "cloud.toml"), "--json")

    def configure(self, bus: str) -> None:
        """Writes agent.toml with one bus."""
        text = AGENT.format(vin=VIN, bus=bus, **self._ports)
        (self.folder / "agent.toml").write_text(text, encoding="utf-8")

    def command(self, *words: str) -> Any:
        """Runs a command of the agent with --json and returns its answer."""
        return _run("agent", *words, "--config", str(self.folder / "agent.toml"), "--json")

    @contextmanager
    def agent(self) -> Iterator[None]:
        """Runs the agent; ends it in good order with the with-block."""
        arguments = ["agent", "run", "--config", str(self.folder / "agent.toml")]
        with _process(arguments, self.folder / "agent.log"):
            yield

    def status(self) -> dict[str, Any] | None:
        """What the running agent says; None while it does not answer."""
        try:
            return local_api.ask(self.folder / "agent" / "agent.sock", "/v1/status")
        except TransportError:
            return None

    def wait_for(self, what: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Asks the agent until its status is as wanted."""
        deadline = time.monotonic() + DEADLINE_S
        status = None
        while time.monotonic() < deadline:
            status = self.status()
            if status is not None and wanted(status):
                return status
            time.sleep(POLL_S)
        log = (self.folder / "agent.log").read_text(encoding="utf-8")
        raise AssertionError(f"not within {DEADLINE_S:.0f} s: {what}; status {status}; log:\n{log}")


@contextmanager
def running(folder: Path) -> Iterator[Running]:
    """Makes keys, signs the demo's catalogue and serves the cloud until the with-block ends."""
    now = datetime.now(UTC)
    ceremony.init(folder / "keys", now, replace=False)
    catalogue.sign_catalogue(folder / "keys", DEMO / "catalogue", folder / "catalogue", now)
    text = (DEMO / "cloud.toml").read_text(encoding="utf-8")
    text = text.replace("../../run/demo/", "").replace('"plans.toml"', f'"{DEMO / "plans.toml"}"')
    served = text.replace("127.0.0.1:7443", "127.0.0.1:0").replace("127.0.0.1:7444", "127.0.0.1:0")
    (folder / "serve.toml").write_text(served, encoding="utf-8")
    with _process(
        ["cloud", "serve", "--config", str(folder / "serve.toml")], folder / "cloud.log"
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline() or "{}")
        assert ready.get("event") == "ready", (folder / "cloud.log").read_text(encoding="utf-8")
        operated = text.replace("127.0.0.1:7443", f"127.0.0.1:{ready['port']}")
        (folder / "cloud.toml").write_text(operated, encoding="utf-8")
        yield Running(folder, ready["port"], ready["enrolment_port"])


@contextmanager
def serving(config: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The real program in a process of its own; killed at the end if it still runs."""
    with (
        log.open("a", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "cloud", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=REPOSITORY,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline() or "{}")
            assert ready.get("event") == "ready", log.read_text(encoding="utf-8")
            yield process, ready
        finally:
            process.kill()


@contextmanager
def _process(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Runs a program of ours; one that does not end with exit code 0 fails the test."""
    with (
        log.open("a", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=REPOSITORY,
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                code = process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    assert code == 0, log.read_text(encoding="utf-8")


def _run(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
