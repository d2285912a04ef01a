"""Wrong clocks gain nobody a right, and lose nobody one; every row of the clock's table."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from support.agent_world import AgentWorld, bundle
from support.trust_repo import DAY_MS, LOGBOOK, NOW_MS, SEAT
from tuf.api.metadata import Timestamp

from agent.model import TrustBytes
from openfod.entitlement.v1 import entitlement_pb2

HOUR_MS = 3_600_000


def year_ms(year: int) -> int:
    return int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * 1000


def valid(*, begin_ms: int = 0, end_ms: int = 0) -> entitlement_pb2.Validity:
    return entitlement_pb2.Validity(not_before_s=begin_ms // 1000, not_after_s=end_ms // 1000)


MONTHLY = valid(begin_ms=NOW_MS - 1000, end_ms=NOW_MS + 20 * DAY_MS)


@pytest.fixture
def world(tmp_path: Path) -> AgentWorld:
    return AgentWorld(tmp_path)


@pytest.mark.parametrize("year", [1970, 2020, 2040, 2099])
def test_wall_clock_of_another_year_changes_no_right_and_no_contact(world: AgentWorld, year: int) -> None:
    world.supplied(validity=MONTHLY)
    world.cloud.grant(LOGBOOK, validity=valid(begin_ms=NOW_MS + 10 * DAY_MS))  # not begun yet
    world.machine.stand(HOUR_MS)
    world.machine.wall_ms = year_ms(year)
    with world.boot() as life:
        assert life.live == {SEAT}
        before_ms, source = life.time
        assert (source, life.status["time"]["uncertainty_ms"]) == ("mark", None)
        assert NOW_MS <= before_ms < NOW_MS + HOUR_MS
        world.cloud.at(world.machine.true_ms)
        assert life.contact().error_type == ""
        assert life.live == {SEAT}
        status = life.status["time"]
        assert (status["unix_ms"], status["source"]) == (world.machine.true_ms, "signed")
        assert status["uncertainty_ms"] < 60_000


def test_jumping_wall_clock_moves_nothing(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY)
    with world.boot() as life:
        life.contact()
        for year in (1970, 2040, 2020, 2099, 1971):
            world.machine.wall_ms = year_ms(year)
            world.machine.true_ms += 1000
            assert life.live == {SEAT}
            assert life.time == (world.machine.true_ms, "signed")


def test_first_boot_without_rtc_and_network_starts_at_the_build_and_holds_no_right(world: AgentWorld) -> None:
    world.machine.wall_ms = 0
    with world.boot() as life:
        assert life.live == frozenset()
        assert life.time[1] == "build"
        assert life.status["time"]["uncertainty_ms"] is None


def test_boots_without_network_carry_the_mark_on_and_end_what_their_own_time_ends(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY, offline_grace_s=0)
    world.machine.wall_ms = 0
    seen_ms = 0
    for _ in range(5):
        world.machine.stand(DAY_MS)  # parked time does not pass
        with world.boot() as life:
            now_ms, source = life.time
            assert (source, now_ms >= seen_ms) == ("mark", True)
            assert life.live == {SEAT}
            world.machine.true_ms += 5 * HOUR_MS  # driven time does
            assert life.live == {SEAT}
            seen_ms = life.time[0]
    assert seen_ms >= NOW_MS + 25 * HOUR_MS
    with world.boot() as life:
        world.machine.true_ms += 20 * DAY_MS
        assert life.live == frozenset()
    world.machine.stand(0)
    with world.boot() as life:
        assert life.live == frozenset()  # a restart does not turn it back


def test_power_cut_right_after_a_right_has_ended_does_not_bring_it_back(world: AgentWorld) -> None:
    world.supplied(validity=valid(end_ms=NOW_MS + 30_000), offline_grace_s=0)
    with world.boot() as life:
        assert life.live == {SEAT}
        world.machine.true_ms += 35_000
        assert life.live == frozenset()
    world.machine.stand(0)
    with world.boot() as life:
        assert life.live == frozenset()


def test_metadata_that_expired_while_the_car_stood_a_year_bricks_nothing(world: AgentWorld) -> None:
    bought = entitlement_pb2.PLAN_KIND_PERPETUAL
    world.supplied(plan_kind=bought, offline_grace_s=0)
    world.machine.stand(366 * DAY_MS)
    with world.boot() as life:
        assert life.live == {SEAT}
        assert life.status["problems"] == []
    world.cloud.at(world.machine.true_ms)
    world.cloud.publish_catalogue()
    world.cloud.publish()
    with world.boot() as life:
        assert life.contact().error_type == ""
        assert life.live == {SEAT}
        assert life.time == (world.machine.true_ms, "signed")
        assert life.status["warnings"] == []


def test_after_a_year_on_the_road_without_contact_terms_and_grace_decide(world: AgentWorld) -> None:
    world.supplied(validity=valid(end_ms=NOW_MS + 300 * DAY_MS), offline_grace_s=90 * 86_400)
    with world.boot() as life:
        world.machine.true_ms += 366 * DAY_MS
        assert life.live == {SEAT}  # in its grace
    with world.boot() as life:  # every file on disk has expired by this clock
        assert life.live == {SEAT}
        words = " ".join(warning["words"] for warning in life.status["warnings"])
        assert "director timestamp ended" in words
        assert "catalogue targets ended" in words
        world.machine.true_ms += 30 * DAY_MS
        assert life.live == frozenset()
        world.cloud.at(world.machine.true_ms)
        world.cloud.publish_catalogue()
        world.cloud.grant(validity=valid(end_ms=world.machine.true_ms + 30 * DAY_MS))
        assert life.contact().error_type == ""
        assert life.live == {SEAT}


def test_expired_answer_is_refused_whatever_the_wall_clock_says(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY)
    with world.boot() as life:
        world.machine.true_ms += 40 * DAY_MS
        world.machine.wall_ms = NOW_MS
        world.cloud.revoke()  # signed as of 40 days ago: all of it has expired
        assert life.contact().error_type == "ExpiredError"


def republish(world: AgentWorld, now_ms: int) -> None:
    """The cloud signs everything anew at that time."""
    world.cloud.at(now_ms).publish_catalogue()
    world.cloud.publish()


def test_stolen_timestamp_key_alone_cannot_sign_2099(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY)
    with world.boot() as life:
        before_ms, _ = life.time

        def in_2099(nonce: bytes) -> TrustBytes:
            return world.cloud.answer(nonce, time_ms=year_ms(2099))

        assert life.contact(in_2099).error_type == "ExpiredError"
        assert life.time[0] == before_ms
        assert life.live == {SEAT}


def stolen(world: AgentWorld) -> int:
    """All online keys are stolen and sign a time as far ahead as the roots allow; returns that time."""
    future_ms = NOW_MS + 4 * 365 * DAY_MS
    republish(world, future_ms)
    with world.boot() as life:
        assert life.contact().error_type == ""
        assert life.time[0] >= future_ms
    world.cloud.at(world.machine.true_ms)
    return future_ms


def renew_keys(world: AgentWorld) -> None:
    """Root keys replace the keys that sign timestamps."""
    world.cloud.director.rotate(Timestamp.type)
    world.cloud.catalogue.rotate(Timestamp.type)
    republish(world, world.machine.true_ms)


def test_stolen_future_is_undone_by_new_keys_and_stays_undone(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY)
    stolen(world)
    with world.boot() as life:
        assert life.live == frozenset()  # ended, by the stolen time
    renew_keys(world)
    world.cloud.grant(validity=MONTHLY)
    for _ in range(2):
        with world.boot() as life:
            assert life.contact().error_type == ""
            assert life.time == (world.machine.true_ms, "signed")
            assert life.live == {SEAT}
    with world.boot() as life:
        assert life.time[0] < world.machine.true_ms + DAY_MS
        assert life.live == {SEAT}


def test_older_database_of_a_stolen_future_does_not_bring_it_back(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY)
    stolen(world)
    image = world.image("stolen")
    renew_keys(world)
    with world.boot() as life:
        assert life.contact().error_type == ""
    world.restore(image)
    with world.boot() as life:
        assert life.time[0] < world.machine.true_ms + DAY_MS
        assert life.contact().error_type == ""
        assert life.time == (world.machine.true_ms, "signed")


def test_file_of_rights_raises_the_time_never_lowers_it_and_is_no_contact(world: AgentWorld) -> None:
    world.supplied(validity=MONTHLY)
    with world.boot() as life:
        life.contact()
        world.machine.true_ms += DAY_MS
        contact_ms = life.status["last_contact_ms"]
        republish(world, world.machine.true_ms - HOUR_MS)  # signed before what the clock knows
        life.bring(bundle(world.cloud))
        assert life.time == (world.machine.true_ms, "signed")
        later_ms = NOW_MS + 2 * DAY_MS
        republish(world, later_ms)
        life.bring(bundle(world.cloud))
        assert life.time == (later_ms, "file")
        assert life.status["time"]["uncertainty_ms"] is None
        assert life.status["last_contact_ms"] == contact_ms
    with world.boot() as life:
        assert life.time == (later_ms, "mark")
        assert life.status["last_contact_ms"] == contact_ms


def test_file_of_rights_does_not_undo_a_stolen_future_but_the_next_contact_still_does(
    world: AgentWorld,
) -> None:
    world.supplied(validity=MONTHLY)
    future_ms = stolen(world)
    renew_keys(world)
    with world.boot() as life:
        life.bring(bundle(world.cloud))
        assert life.time[0] >= future_ms
    with world.boot() as life:
        assert life.time[0] >= future_ms
        assert life.contact().error_type == ""
        assert life.time == (world.machine.true_ms, "signed")
