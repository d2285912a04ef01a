"""Rights as a file, and the sale of the vehicle, with real programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.story_stage import enrolled

from deploy.demo.stage import VIN, Stage

OLD, NEW = "acc-former-owner", "acc-new-owner"


def grant(stage: Stage, account: str) -> str:
    """Grants the seat heating; returns the right's id."""
    words = ("grant", VIN, "seat-heating-monthly", "--account", account, "--json")
    granted = stage.done("fod-cloud", *words, "--config", stage.cloud_config).data
    return str(granted["grant"]["entitlement"]["entitlement_id"])


def export(stage: Stage, name: str) -> Path:
    """Writes the vehicle's rights to a file."""
    out = stage.folder / name
    stage.done("fod-cloud", "export-bundle", VIN, "--out", out, "--config", stage.cloud_config)
    return out


def on_disk(stage: Stage) -> bytes:
    """Every byte of the agent's database."""
    return b"".join(p.read_bytes() for p in sorted(stage.device_folder().glob("agent.db*")))


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_a_workshop_without_network_brings_rights_as_a_file(tmp_path: Path) -> None:
    with enrolled(tmp_path / "file") as stage:
        stage.until_status("it is connected", lambda status: status["link"] == "up")
        stage.relay.lead_to(None)
        stage.kill_agent()
        right = grant(stage, OLD)
        first = export(stage, "first.bundle")
        # Into a stopped agent's store: the owner's log has the grant.
        taken = stage.done("fod-agent", "import", first, "--json", "--config", stage.agent_config()).data
        assert [gained["entitlement"] for gained in taken["gained"]] == [right]
        log = stage.done("fod-agent", "log", "--json", "--config", stage.agent_config()).data
        assert [(e["kind"], e["entitlement"]) for e in log["entries"]] == [("granted", right)]
        stage.start_agent()
        stage.until_state("ACTIVE")
        # Into a running agent, still without network: a second time, and an end.
        again = stage.done("fod-agent", "import", first, "--json", "--config", stage.agent_config()).data
        assert (again["gained"], again["ended"]) == ([], [])
        words = ("fod-cloud", "revoke", VIN, right, "--reason", "test", "--config", stage.cloud_config)
        stage.done(*words)
        second = export(stage, "second.bundle")
        taken = stage.done("fod-agent", "import", second, "--json", "--config", stage.agent_config()).data
        assert [ended["entitlement"] for ended in taken["ended"]] == [right]
        stage.until_state("LOCKED")
        # The older file is refused, and nothing changes.
        old = stage.run("fod-agent", "import", first, "--json", "--config", stage.agent_config())
        assert old.code == 1
        assert json.loads(old.text)["error"] == "RollbackError"
        assert stage.seat_heating()["state"] == "LOCKED"


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_after_a_sale_the_vehicle_holds_nothing_of_the_former_owner_that_can_be_read(tmp_path: Path) -> None:
    with enrolled(tmp_path / "sale") as stage:
        right = grant(stage, OLD)
        stage.until_state("ACTIVE")
        stage.tell("seat 2")

        def is_taken() -> dict[str, int] | None:
            journal = stage.status()["journal"]
            return journal if journal["receipts_to"] else None

        stage.until("usage is acknowledged", is_taken, 90)
        assert OLD.encode() in on_disk(stage)
        words = ("fod-cloud", "vehicle", "transfer")
        config = ("--json", "--config", stage.cloud_config)
        code = stage.done(*words, "begin", VIN, *config).data["transfer_code"]
        stage.done(*words, "complete", VIN, "--code", code, "--account", NEW, *config)
        stage.until_state("LOCKED", 60)

        def is_gone() -> bool | None:
            found = on_disk(stage)
            return True if OLD.encode() not in found and right.encode() not in found else None

        stage.until("the former owner is gone from the disk", is_gone, 90)
        log = stage.done("fod-agent", "log", "--json", "--config", stage.agent_config()).data
        assert [entry["kind"] for entry in log["entries"]] == ["owner"]
        # The cloud still has what was used, for the former owner's bill alone.
        mine = stage.done("fod-cloud", "usage", VIN, *config).data
        assert OLD not in json.dumps(mine)
