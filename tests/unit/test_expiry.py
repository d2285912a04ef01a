"""What will end soon is told ahead, in words; what is renewed by itself is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from support.agent_world import AgentWorld
from support.engine_world import entitlement
from support.trust_repo import DAY_MS

from agent.__main__ import main
from agent.model import Entitlement, PlanKind, Rights, TlsAnchor
from agent.trust.expiry import endings

NOW_MS = 1_800_000_000_000
NOTHING = Rights(version=1)


def told(*, expires_ms: dict[str, int] | None = None, rights: Rights = NOTHING) -> list[str]:
    return [ending.what for ending in endings(expires_ms or {}, rights, NOW_MS)]


@pytest.mark.parametrize(
    ("what", "ahead_days"),
    [
        ("director root", 90),
        ("catalogue root", 90),
        ("catalogue targets", 14),
        ("director targets", 14),
        ("catalogue snapshot", 14),
        ("director timestamp", 0),
        ("catalogue timestamp", 0),
    ],
)
def test_metadata_is_told_ahead_by_its_role(what: str, ahead_days: int) -> None:
    ends_ms = NOW_MS + ahead_days * DAY_MS
    assert told(expires_ms={what: ends_ms + 1}) == []
    assert told(expires_ms={what: ends_ms}) == [what]
    (ending,) = endings({what: NOW_MS - 1}, NOTHING, NOW_MS)
    assert f"{what} ended 2027-01-15" in ending.words
    assert "stored rights go on" in ending.words


def test_what_ends_at_this_moment_has_ended() -> None:
    (at_once,) = endings({"director timestamp": NOW_MS}, NOTHING, NOW_MS)
    assert "timestamp ended" in at_once.words
    (later,) = endings({"director targets": NOW_MS + 1}, NOTHING, NOW_MS)
    assert "targets ends" in later.words


@pytest.mark.parametrize(
    ("what", "command"),
    [
        ("director root", "fod-keys rotate"),
        ("catalogue root", "fod-keys rotate"),
        ("catalogue targets", "fod-keys sign-catalogue"),
        ("director targets", "fod-agent import"),
        ("catalogue snapshot", "fod-agent import"),
    ],
)
def test_metadata_is_told_with_the_command_of_who_renews_it(what: str, command: str) -> None:
    (ending,) = endings({what: NOW_MS}, NOTHING, NOW_MS)
    commands = ("fod-keys rotate", "fod-keys sign-catalogue", "fod-agent import")
    assert [c for c in commands if c in ending.words] == [command]


@pytest.mark.usefixtures("far_east")
def test_times_are_told_in_utc_wherever_the_machine_stands() -> None:
    (ending,) = endings({"director targets": NOW_MS}, NOTHING, NOW_MS)
    assert "2027-01-15 08:00 UTC" in ending.words


def test_last_of_the_clouds_certificates_is_told_with_what_follows() -> None:
    soon, edge, late = (TlsAnchor(b"x", 0, NOW_MS + days * DAY_MS) for days in (3, 14, 30))
    assert told(rights=replace(NOTHING, tls_anchors=(edge,))) == [
        "last certificate that the cloud is known by"
    ]
    assert told(rights=replace(NOTHING, tls_anchors=(soon, late))) == []
    (ending,) = endings({}, replace(NOTHING, tls_anchors=(soon,)), NOW_MS)
    assert ending.ends_ms == NOW_MS + 3 * DAY_MS
    assert "fod-agent import" in ending.words


def right(**changes: object) -> Rights:
    found: Entitlement = entitlement(1, not_after_s=(NOW_MS + 10 * DAY_MS) // 1000, **changes)
    return replace(NOTHING, entitlements={found.feature_id: found})


def test_right_that_nobody_renews_is_told() -> None:
    (ending,) = endings({}, right(), NOW_MS)
    assert "right ent-0000000000000001 to seat-heating ends" in ending.words
    assert "does not renew by itself" in ending.words
    assert told(rights=right(display={"renews": True})) == []
    assert told(rights=right(plan_kind=PlanKind.PERPETUAL)) == []
    without_end = replace(right().entitlements["seat-heating"], not_after_s=0)
    assert told(rights=replace(NOTHING, entitlements={"seat-heating": without_end})) == []


def test_right_is_told_from_two_weeks_ahead_whichever_come_before_it() -> None:
    ahead_s = (NOW_MS + 14 * DAY_MS) // 1000
    rights = {
        "renewed": entitlement(1, not_after_s=ahead_s, display={"renews": True}),
        "later": entitlement(2, not_after_s=ahead_s + 1),
        "soon": entitlement(3, not_after_s=ahead_s),
    }
    assert told(rights=replace(NOTHING, entitlements=rights)) == ["right ent-0000000000000003 to soon"]


def test_the_earliest_comes_first() -> None:
    found = told(
        expires_ms={"director root": NOW_MS + 80 * DAY_MS, "catalogue targets": NOW_MS - 1}, rights=right()
    )
    assert found == ["catalogue targets", "right ent-0000000000000001 to seat-heating", "director root"]


def test_status_warns_while_the_agent_runs_and_while_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = AgentWorld(tmp_path)
    world.supplied()
    with world.boot() as life:
        assert life.status["warnings"] == []
        world.machine.true_ms += 20 * DAY_MS  # the signed sets live for 30 days
        life.live  # noqa: B018 (a tick, which makes the time durable)
        words = [warning["words"] for warning in life.status["warnings"]]
    assert any(w.startswith("catalogue targets ends 2027-02-14 08:00 UTC") for w in words), words
    assert main(["status", "--config", str(world.path)]) == 0
    out = capsys.readouterr().out
    assert "Warning: catalogue targets ends 2027-02-14 08:00 UTC" in out
    assert "uncertainty unknown" in out


def test_log_warns_at_start_and_then_once_a_day(tmp_path: Path) -> None:
    world = AgentWorld(tmp_path)
    world.supplied()
    world.machine.true_ms += 20 * DAY_MS
    with world.boot() as life:
        life.tell(life.app._booted)
        world.machine.true_ms += 20 * DAY_MS
        with mock.patch("agent.app._log") as log:
            for _ in range(200):
                world.machine.true_ms += 15 * 60_000
                life.app._watch()
    said = [call for call in log.warning.call_args_list if "catalogue targets end" in call.args[0]]
    assert len(said) == 3  # 50 hours
