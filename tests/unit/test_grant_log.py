"""The owner's log says what was granted, changed and ended, by whose set, and what no right explains."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.edge_store import open_store, trust, usage
from support.engine_world import World, entitlement, with_quota

from agent.errors import JournalError
from agent.model import PlanKind, Quota, Rights, TrustBytes, TrustedTime, Verdict, Versions
from agent.trust.grant_log import (
    LogEntry,
    LogHead,
    changes,
    entry,
    follow,
    summary,
    terms_in_words,
    verify_chain,
)

NOW = TrustedTime(1_800_000_000_000, 40, "signed")


def verdict(*rights: Any, owner_epoch: int = 1, version: int = 7) -> Verdict:
    by_feature = {right.feature_id: right for right in rights}
    versions = Versions(1, 2, 3, version)
    return Verdict(
        TrustBytes(), versions, Versions(1, 1, 1, 4), Rights(version, by_feature, owner_epoch=owner_epoch), 0
    )


def read(entries: tuple[LogEntry, ...]) -> list[dict[str, Any]]:
    return [json.loads(e.content) for e in entries]


def test_a_grant_is_noted_with_time_source_versions_plan_and_terms() -> None:
    right = entitlement(1)
    (found,) = read(changes(LogHead(), verdict(right), NOW, before={}))
    assert found == {
        "seq": 1,
        "previous": bytes(32).hex(),
        "kind": "granted",
        "at_ms": NOW.unix_ms,
        "time_source": "signed",
        "uncertainty_ms": 40,
        "feature": right.feature_id,
        "entitlement": right.entitlement_id,
        "plan": "seat-heating-monthly version 1 (SUBSCRIPTION)",
        "terms": "200 ignition cycles",
        "release": 0,
        "signed_by": {"director": 7, "catalogue": 4},
    }
    assert summary(found) == (
        f"{right.entitlement_id}: seat-heating-monthly version 1 (SUBSCRIPTION); 200 ignition cycles;"
        " director's set 7, catalogue 4"
    )


def test_an_entry_has_the_same_bytes_wherever_it_is_made() -> None:
    """A head that an owner has noted must still fit after an update of the agent."""
    made = entry(LogHead(), "evidence", NOW, {"finding": "Sitz: Zündung"})
    assert made.content == (
        b'{"at_ms":1800000000000,"finding":"Sitz: Z\\u00fcndung","kind":"evidence",'
        b'"previous":"' + b"0" * 64 + b'","seq":1,"time_source":"signed","uncertainty_ms":40}'
    )
    assert made.head == LogHead(1, hashlib.sha256(made.content).digest())


def test_a_change_an_end_and_a_replacement_have_entries_and_sameness_has_none() -> None:
    right = entitlement(1)
    known = {right.feature_id: right}
    longer, other = replace(right, ignition_cycles=300), entitlement(2)

    def kinds(*rights: Any) -> list[tuple[object, object]]:
        found = changes(LogHead(), verdict(*rights), NOW, before=known)
        assert verify_chain(e.content for e in found).seq == len(found)
        return [(e["kind"], e.get("entitlement")) for e in read(found)]

    assert kinds(right) == []
    assert kinds(longer) == [("changed", right.entitlement_id)]
    assert kinds() == [("ended", right.entitlement_id)]
    assert kinds(other) == [("ended", right.entitlement_id), ("granted", other.entitlement_id)]


def test_entries_of_one_set_follow_one_another_past_rights_that_stay() -> None:
    stays, *others = (entitlement(n, feature_id=f"feature-{n}") for n in range(5))
    found = changes(LogHead(), verdict(stays, *others), NOW, before={stays.feature_id: stays})
    assert verify_chain(e.content for e in found) == LogHead(4, found[-1].hash)
    assert [e["feature"] for e in read(found)] == [right.feature_id for right in others]


def test_a_new_owners_log_begins_anew_and_says_nothing_of_the_rights_before() -> None:
    right, other = entitlement(1), entitlement(2)
    before = Rights(6, {right.feature_id: right}, owner_epoch=2)
    head = LogHead(5, b"\x05" * 32)
    entries, new_owner = follow(head, verdict(other, owner_epoch=3), NOW, before=before, owner_epoch=2)
    assert new_owner
    assert verify_chain(e.content for e in entries) == entries[-1].head
    owner, granted = read(entries)
    assert owner["log_before"] == {"entries": 5, "head": head.hash.hex()}
    assert summary(owner) == "owner 3; director's set 7, catalogue 4"
    assert (granted["kind"], granted["entitlement"]) == ("granted", other.entitlement_id)
    assert right.entitlement_id.encode() not in b"".join(e.content for e in entries)


def test_the_first_set_and_the_same_owner_are_no_change_of_owner() -> None:
    head = LogHead(5, b"\x05" * 32)
    for known in (0, 3):
        assert follow(head, verdict(owner_epoch=3), NOW, before=Rights(1), owner_epoch=known) == ((), False)


def test_an_unknown_uncertainty_is_noted_as_unknown() -> None:
    for uncertainty_ms, noted in ((10**12 - 1, 10**12 - 1), (10**12, None), (10**15, None)):
        made = entry(LogHead(), "evidence", replace(NOW, uncertainty_ms=uncertainty_ms), {"finding": "f"})
        assert json.loads(made.content)["uncertainty_ms"] == noted
        assert summary(json.loads(made.content)) == "f"


@pytest.mark.usefixtures("far_east")
def test_terms_are_said_in_words() -> None:
    right = entitlement(
        1,
        plan_kind=PlanKind.WINDOW,
        not_before_s=1_800_000_000,
        not_after_s=1_800_086_400,
        odometer_from_m=5,
        odometer_to_m=9,
        operating_s=60,
        offline_grace_s=30,
        quotas=(Quota("active-time", 5, hard=True), Quota("heated-distance", 6, hard=False)),
    )
    assert terms_in_words(right) == (
        "from 2027-01-15 08:00:00 UTC, until 2027-01-16 08:00:00 UTC, from 5 m on the odometer,"
        " up to 9 m on the odometer, 200 ignition cycles, 60 s of operation,"
        " 30 s without contact to the cloud, active-time at most 5,"
        " heated-distance above, charged extra: 6"
    )
    assert terms_in_words(entitlement(1, ignition_cycles=0)) == "no limit"


@pytest.mark.parametrize("end_s", [9_999_999_999_999, 2**60, 2**64])  # as Python, C and time_t refuse it
def test_an_end_that_no_calendar_knows_is_told_as_a_number(end_s: int) -> None:
    assert f"until Unix second {end_s}" in terms_in_words(entitlement(1, not_after_s=end_s))


# --- on disk ------------------------------------------------------------------------------


def kinds(world: World) -> list[str]:
    return [json.loads(content)["kind"] for content in world.disk.log]


def test_a_life_is_told_in_one_chain_over_restarts() -> None:
    world = World()
    world.boot()
    world.run_ms(2000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(3000)
    world.kill()
    world.run_ms(500)
    world.boot()
    world.run_ms(3000)
    world.cloud.grant(with_quota(2, 60_000))
    world.push()
    world.run_ms(3000)
    world.cloud.revoke()
    world.push()
    world.run_ms(12_000)
    world.ecu.on = True
    world.run_ms(20_000)
    assert kinds(world) == ["granted", "ended", "granted", "ended", "evidence"]
    assert world.engine is not None
    head = verify_chain(world.disk.log)
    assert world.engine.status(0)["log"] == {"entries": 5, "head": head.hash.hex()}
    assert world.violations == []


def test_a_box_that_never_rests_does_not_fill_the_log() -> None:
    world = World()
    world.boot()
    world.run_ms(2000)
    world.cloud.grant(entitlement(1))
    world.push()
    world.run_ms(3000)
    world.cloud.revoke()
    world.push()
    world.run_ms(12_000)
    for _ in range(5):
        world.ecu.on = True
        world.run_ms(14_000)
    assert kinds(world) == ["granted", "ended", "evidence"]


def test_entries_are_written_with_what_they_tell_of_and_read_again(tmp_path: Path) -> None:
    first = changes(LogHead(), verdict(entitlement(1)), NOW, before={})
    second = (entry(first[-1].head, "evidence", NOW, {"finding": "f"}),)
    store = open_store(tmp_path / "agent.db")
    store.store_trust(replace(trust(1), entries=first), store.load().floors)
    store.store_usage(replace(usage(1), entries=second))
    store.close()
    store = open_store(tmp_path / "agent.db")
    assert store.grant_log() == (first[0].content, second[0].content)
    assert store.load().log_head == second[0].head
    store.close()


@pytest.mark.parametrize("failing", ["trust", "usage"])
def test_entries_that_do_not_follow_are_not_written_and_nothing_else_is(tmp_path: Path, failing: str) -> None:
    first = (entry(LogHead(), "evidence", NOW, {"finding": "f"}),)
    store = open_store(tmp_path / "agent.db")
    store.store_usage(replace(usage(1), entries=first))
    before = store.load()
    write = {
        "trust": partial(store.store_trust, replace(trust(2), entries=first), before.floors),
        "usage": partial(store.store_usage, replace(usage(2), entries=first)),
    }[failing]
    with pytest.raises(JournalError):
        write()
    assert store.load() == before
    store.close()
