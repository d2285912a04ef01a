"""What no right explains reaches the cloud, the status and the log, through the whole agent."""

from __future__ import annotations

import json
from pathlib import Path

from support.agent_world import AgentWorld, Life
from support.trust_repo import SEAT

from agent import events as ev
from agent.trust.grant_log import verify_chain
from openfod.vehicle.v1 import vehicle_service_pb2 as pb

FINDING = "the ECU names token counter 9, the highest one known is 1"


def read_back(*, on: bool, counter: int) -> ev.EcuDone:
    answer = bytes.fromhex("620F21") + bytes([on, 0]) + counter.to_bytes(4, "big") + b"\xff" * 8
    return ev.EcuDone(SEAT, answer, None)


def reported(life: Life) -> pb.FeatureStatus:
    """The latest status of the seat heating that went to the cloud."""
    return [r.feature_status for r in life.wire.sent if r.HasField("feature_status")][-1].features[0]


def test_a_foreign_counter_is_reported_shown_and_logged_and_goes_again(tmp_path: Path) -> None:
    world = AgentWorld(tmp_path)
    world.supplied()
    with world.boot() as life:  # the counter that is known comes from the disk
        life.greet()
        assert not reported(life).HasField("evidence")
        foreign = read_back(on=False, counter=9)
        life.tell(foreign)
        evidence = reported(life).evidence
        assert (evidence.finding, evidence.counter) == (FINDING, 9)
        assert evidence.read_back == foreign.answer
        assert evidence.at_ms == life.time[0]
        assert reported(life).reason.startswith(FINDING)
        shown = life.status["features"][0]["evidence"]
        assert (shown["finding"], shown["read_back"]) == (FINDING, foreign.answer.hex())
        json.dumps(life.status["features"])
        life.tell(read_back(on=False, counter=1))
        assert not reported(life).HasField("evidence")
        assert life.status["features"][0]["evidence"] is None
        head = life.status["log"]
        contents = life.app._store.grant_log()
    assert [json.loads(content)["kind"] for content in contents] == ["granted", "evidence"]
    assert head == {"entries": 2, "head": verify_chain(contents).hash.hex()}


def test_the_log_goes_on_after_a_restart_and_names_the_sets_that_signed(tmp_path: Path) -> None:
    world = AgentWorld(tmp_path)
    world.supplied()
    world.cloud.revoke()
    with world.boot() as life:
        assert life.contact().error_type == ""
        entries = [json.loads(content) for content in life.app._store.grant_log()]
    assert [(e["kind"], e["feature"]) for e in entries] == [("granted", SEAT), ("ended", SEAT)]
    first, second = (e["signed_by"]["director"] for e in entries)
    assert second == first + 1 == world.cloud.director.version
    assert {e["time_source"] for e in entries} == {"signed"}
