"""A disk that was copied, set back, wiped or damaged gives nobody a right that has ended."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support.agent_world import AgentWorld
from support.trust_repo import DAY_MS, LOGBOOK, SEAT

from agent.__main__ import main

REVOKED = frozenset[str]()
HELD = frozenset({SEAT})


@pytest.fixture
def world(tmp_path: Path) -> AgentWorld:
    return AgentWorld(tmp_path)


def revoke(world: AgentWorld) -> None:
    world.cloud.revoke()
    with world.boot() as life:
        assert life.contact().error_type == ""
        assert life.live == REVOKED


def test_older_copy_of_the_database_brings_no_right_back(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.supplied()
    old = world.image("old")
    revoke(world)
    world.restore(old)
    floors = world.floors.read_bytes()
    with world.boot() as life:
        assert life.live == REVOKED
        (problem,) = life.status["problems"]
        assert "an old copy of its disk?" in problem
        assert "RollbackError" in problem
        assert "next contact" in problem
        # Nothing was lowered by looking at it.
        assert world.floors.read_bytes() == floors
    assert main(["status", "--config", str(world.path)]) == 0
    assert "an old copy of its disk?" in capsys.readouterr().out
    assert main(["check", "--config", str(world.path)]) == 1
    assert "an old copy of its disk?" in capsys.readouterr().err


def test_vehicle_with_a_refused_copy_recovers_at_the_next_contact(world: AgentWorld) -> None:
    world.supplied()
    old = world.image("old")
    revoke(world)
    world.cloud.grant(LOGBOOK)
    world.restore(old)
    with world.boot() as life:
        hello = life.greet()
        # It asks for everything, and says which counters its ECUs have seen.
        assert hello.director.targets == 0
        assert [(c.ecu_identifier, c.feature_id, c.counter) for c in hello.token_counters] == [
            ("seat-module", SEAT, 2)
        ]
        assert life.contact().error_type == ""
        assert life.live == {LOGBOOK}
        assert life.status["problems"] == []
    with world.boot() as life:
        assert life.live == {LOGBOOK}


def test_refused_copy_takes_no_older_answer_either(world: AgentWorld) -> None:
    world.supplied()
    director = world.cloud.director
    old_image, old_set = (
        world.image("old"),
        (director.version, director.snapshot_bytes, director.targets_bytes),
    )
    old_files = dict(world.cloud.files)
    revoke(world)
    world.restore(old_image)
    # Whoever has the timestamp key alone can sign a fresh time over the old set.
    director.version, director.snapshot_bytes, director.targets_bytes = old_set
    world.cloud.files = old_files
    floors = world.floors.read_bytes()
    with world.boot() as life:
        assert life.contact().error_type == "RollbackError"
        assert life.live == REVOKED
    assert world.floors.read_bytes() == floors


def test_wiped_database_refuses_what_the_floors_know_as_old(world: AgentWorld) -> None:
    world.supplied()
    director = world.cloud.director
    old_set, old_files = (
        (director.version, director.snapshot_bytes, director.targets_bytes),
        dict(world.cloud.files),
    )
    revoke(world)
    new_set, new_files = (
        (director.version, director.snapshot_bytes, director.targets_bytes),
        dict(world.cloud.files),
    )
    for file in world.state.glob("agent.db*"):
        file.unlink()
    director.version, director.snapshot_bytes, director.targets_bytes = old_set
    world.cloud.files = old_files
    with world.boot() as life:
        assert life.contact().error_type == "RollbackError"
        assert life.live == REVOKED
        director.version, director.snapshot_bytes, director.targets_bytes = new_set
        world.cloud.files = new_files
        assert life.contact().error_type == ""


def test_wiped_database_does_not_forget_the_time(world: AgentWorld) -> None:
    world.supplied()
    world.machine.stand(10 * DAY_MS)
    world.cloud.at(world.machine.true_ms).publish()
    with world.boot() as life:
        life.contact()
        before_ms, _ = life.time
    for file in world.state.glob("agent.db*"):
        file.unlink()
    with world.boot() as life:
        now_ms, source = life.time
        assert now_ms >= before_ms
        assert source == "mark"


def test_whole_disk_set_back_regains_rights_until_the_next_contact_and_no_longer(world: AgentWorld) -> None:
    """The honest limit: where both copies lie on the disk that is set back, only the cloud remembers."""
    world.supplied()
    old, old_floors = world.image("old"), world.floors.read_bytes()
    revoke(world)
    world.restore(old)
    world.floors.write_bytes(old_floors)
    with world.boot() as life:
        assert life.live == HELD
        # The cloud hears which versions it has, older than those it confirmed.
        hello = life.greet()
        assert 0 < hello.director.targets < world.cloud.director.version
        assert life.contact().error_type == ""
        assert life.live == REVOKED


def test_clone_reports_the_versions_of_its_own_copy(world: AgentWorld) -> None:
    world.supplied()
    clone = world.image("clone")
    with world.boot() as life:
        life.contact()
        life.contact()
        first = life.greet()
    world.restore(clone)
    shutil.rmtree(world.floors.parent)
    with world.boot() as life:
        second = life.greet()
    assert second.director.timestamp < first.director.timestamp
    assert (second.journal_id, second.owner_epoch) == (first.journal_id, 1)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"form": 2}',
        b'{"form": 1}',
        b"\xff" * 50,
        b"[" * 100_000,
        b"9" * 2_000_000,
    ],
)
def test_damaged_floors_are_named_and_the_database_counts(world: AgentWorld, damage: bytes) -> None:
    world.supplied()
    genuine = world.floors.read_bytes()
    world.floors.write_bytes(damage)
    with world.boot() as life:
        assert life.live == HELD
        (problem,) = life.status["problems"]
        assert "floors.json is damaged" in problem
        assert "the next update writes this file anew" in problem
        life.contact()
        assert life.status["problems"] == []
    assert json.loads(world.floors.read_bytes()).keys() == json.loads(genuine).keys()


def test_floors_with_a_raised_digit_are_named_and_lock_nobody_out(world: AgentWorld) -> None:
    world.supplied()
    document = json.loads(world.floors.read_bytes())
    document["floors"]["director"][3] += 8
    world.floors.write_text(json.dumps(document))
    with world.boot() as life:
        assert life.live == HELD
        assert "does not have the hash" in life.status["problems"][0]


def test_no_flipped_bit_in_the_floors_locks_a_vehicle_out_or_lowers_a_floor(world: AgentWorld) -> None:
    world.supplied()
    genuine, dice = world.floors.read_bytes(), random.Random(7)
    for _ in range(60):
        damaged = bytearray(genuine)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        world.floors.write_bytes(damaged)
        with world.boot() as life:
            assert life.live == HELD


def test_floors_of_another_vehicle_are_named_and_not_used(world: AgentWorld) -> None:
    world.supplied()
    document = json.loads(world.floors.read_bytes())
    document["vin"] = "WFDSEAT10N0000002"
    world.floors.write_text(json.dumps(document))
    with world.boot() as life:
        assert "of another vehicle" in life.status["problems"][0]
        assert life.live == HELD


def test_floors_that_cannot_be_read_or_written_hold_nothing_up(world: AgentWorld) -> None:
    world.supplied()
    world.floors.unlink()
    world.floors.mkdir()
    with world.boot() as life:
        assert "floors.json cannot be read" in life.status["problems"][0]
        assert life.live == HELD
        world.cloud.revoke()
        assert life.contact().error_type == ""
        assert life.live == REVOKED
        assert "floors.json cannot be written" in life.status["problems"][0]
        world.floors.rmdir()
        life.contact()
        assert life.status["problems"] == []
    assert world.floors.is_file()


def test_deleted_floors_lower_nothing(world: AgentWorld) -> None:
    world.supplied()
    revoke(world)
    world.floors.unlink()
    with world.boot() as life:
        assert life.live == REVOKED
        assert life.app._keeper.floors.token_counters == {("seat-module", SEAT): 2}
