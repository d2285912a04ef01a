"""Real programs on one stage: cloud, vehicle and agent, enrolled and connected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.demo.stage import VIN, Stage


@contextmanager
def enrolled(folder: Path, *, log_level: str = "info", slcan: bool = False) -> Iterator[Stage]:
    """A parked vehicle with its ignition on, enrolled, agent running, without any right."""
    with Stage(folder, transport="socketcand", slcan=slcan) as stage:
        stage.done("fod-keys", "init", stage.keys)
        catalogue = stage.folder / "catalogue"
        stage.done("fod-keys", "sign-catalogue", stage.keys, "deploy/demo/catalogue", catalogue)
        stage.start_cloud()
        stage.start_vehicle()
        ecu = stage.seat_ecu
        words = ("vehicle", "add", VIN, "--ecu", ecu, "--json", "--config", stage.cloud_config)
        vehicle = stage.done("fod-cloud", *words).data
        config = stage.write_agent_config()
        config.write_text(config.read_text() + f'\n[log]\nlevel = "{log_level}"\nform = "json"\n')
        stage.done("fod-agent", "enroll", "--config", config, "--claim", vehicle["claim_token"])
        stage.start_agent()
        yield stage
