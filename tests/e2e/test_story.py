"""Chapters of `make run` that need no drive, as a test: a stolen cloud on the wire changes nothing."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.demo import rogue
from deploy.demo.page import Page
from deploy.demo.stage import Stage
from deploy.demo.story import Story


@pytest.fixture
def stage() -> Iterator[Stage]:
    # Not pytest's own folder: a Unix socket's path must stay short.
    with (
        tempfile.TemporaryDirectory(prefix="fod-") as folder,
        Stage(Path(folder) / "run", transport="socketcand") as opened,
    ):
        yield opened


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_stolen_cloud_is_refused_by_a_running_vehicle_and_its_state_is_kept(stage: Stage) -> None:
    page = Page()
    story = Story(stage, page)
    story.enrolment()
    story.refused_without_a_right()
    story.grant()
    stage.relay.lead_to(None)
    story.captured = rogue.genuine(stage, "agent", secrets.token_bytes(16))
    stage.relay.lead_to(stage.cloud_port)
    before = stage.until_status("the cloud is back", lambda s: s["link"] == "up")
    told = len(page.steps)

    story.attacks()

    forged, replayed, misdirected, unchanged = page.steps[told:]
    assert forged.found.startswith("SignatureError: director timestamp")
    assert replayed.found.startswith("ReplayError: director timestamp.nonce")
    assert misdirected.found.startswith("VehicleMismatchError: director timestamp is signed for vehicle")
    assert unchanged.held
    after = stage.status()
    assert after["rights_version"] == before["rights_version"]
    assert after["features"] == before["features"]
    assert stage.truth()["heat_level"] == 2
