"""What the composition root hands on: anchors and trusted time to the link, counters to the cloud."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.agent_world import AgentWorld
from support.edge_cloud import Pair, authority, issue
from support.trust_repo import DAY_MS, NOW_MS, SEAT

from agent import events as ev
from agent.__main__ import _print_status
from agent.adapters.can_bus import ControllerState
from agent.app import MAX_COUNTERS, WATCH_NS, _counters
from agent.errors import NoValidAnchorError
from agent.trust.verifier import Floors

CA = authority().pem


def tls_file(pair: Pair, end_ms: int) -> bytes:
    certificate = base64.b64encode(pair.der).decode()
    server = {"certificate": certificate, "not_before_ms": NOW_MS - 1, "not_after_ms": end_ms}
    return json.dumps({"servers": [server]}).encode()


@pytest.fixture
def world(tmp_path: Path) -> AgentWorld:
    return AgentWorld(tmp_path)


def test_signed_anchors_replace_the_ca_once_they_are_stored_and_end_at_trusted_time(
    world: AgentWorld,
) -> None:
    own = issue("localhost", issue("an authority of its own"))
    world.supplied()
    with world.boot() as life:
        assert life.app._server_roots(CA) == (CA,)
        world.cloud.notices["tls.json"] = tls_file(own, NOW_MS + 5 * DAY_MS)
        world.cloud.publish()
        assert life.contact().error_type == ""
        assert life.app._server_roots(CA) == (own.pem,)
    world.machine.wall_ms = 4_000_000_000_000
    with world.boot() as life:
        assert life.app._server_roots(CA) == (own.pem,)
        world.machine.true_ms += 5 * DAY_MS
        with pytest.raises(NoValidAnchorError, match="fod-agent import"):
            life.app._server_roots(CA)
        words = [warning["words"] for warning in life.status["warnings"]]
        assert any("last certificate that the cloud is known by ended" in w for w in words)


def test_open_connection_is_looked_at_several_times_a_minute(
    world: AgentWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    with world.boot() as life:
        monkeypatch.setattr(life.wire, "recheck", lambda: looks.append(life.machine.true_ms))
        for _ in range(60):
            world.machine.true_ms += 1000
            life.app._watch()
    assert len(looks) == 60_000_000_000 // WATCH_NS


def test_status_says_why_there_is_no_connection(world: AgentWorld) -> None:
    with world.boot() as life:
        life.tell(ev.LinkDown("none of the 2 certificates is valid"))
        assert (life.status["link"], life.status["link_reason"]) == (
            "down",
            "none of the 2 certificates is valid",
        )
        life.tell(ev.LinkUp())
        assert life.status["link_reason"] == ""


def test_hello_tells_the_counters_and_the_owner_epoch(world: AgentWorld) -> None:
    world.cloud.owner_epoch = 3
    with world.boot() as life:
        assert (list(life.greet().token_counters), life.greet().owner_epoch) == ([], 0)
    world.supplied()
    with world.boot() as life:
        hello = life.greet()
    assert [(c.ecu_identifier, c.feature_id, c.counter) for c in hello.token_counters] == [
        ("seat-module", SEAT, 1)
    ]
    assert hello.owner_epoch == 3


def test_counters_are_bounded() -> None:
    many = replace(Floors(), token_counters={("ecu", f"feature-{i}"): i + 1 for i in range(300)})
    assert len(_counters(many)) == MAX_COUNTERS


def test_status_shows_the_controller_and_what_the_bus_lost(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    with world.boot() as life:
        (bus,) = life.app._buses.by_name.values()
        said = f"Bus {bus.name}: opening"
        _print_status({**life.status, "running": True})
        assert f"{said}\n" in capsys.readouterr().out
        bus.controller = ControllerState.ERROR_PASSIVE
        bus.counts.dropped, bus.counts.lost, bus.counts.error_frames = 3, 1, 2
        assert life.status["controllers"] == {bus.name: "error-passive"}
        _print_status({**life.status, "running": True})
        assert f"{said}, error-passive, 3 dropped, 1 times lost, 2 error frames\n" in capsys.readouterr().out
