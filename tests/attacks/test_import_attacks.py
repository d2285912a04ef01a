"""A file of rights is judged as the cloud's answers are: what is forged, old or another's changes nothing."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.agent_world import AgentWorld, Life, bundle
from support.trust_repo import DAY_MS, LOGBOOK, OTHER_VIN, SEAT, Cloud, nonce

from agent.__main__ import main
from agent.adapters.local_api import LocalApi
from agent.errors import (
    ExpiredError,
    LimitError,
    MalformedError,
    ReplayError,
    RollbackError,
    SignatureError,
    TrustError,
    VehicleMismatchError,
)
from agent.importing import MAX_BUNDLE_BYTES
from agent.wire import trust_bytes_to_proto


@pytest.fixture
def world(tmp_path: Path) -> AgentWorld:
    return AgentWorld(tmp_path)


def captured(cloud: Cloud) -> bytes:
    """A genuine answer to a nonce, kept as a file."""
    return trust_bytes_to_proto(cloud.answer(nonce(1))).SerializeToString()


def older(cloud: Cloud) -> bytes:
    """A file that was good before the vehicle's last update."""
    director = cloud.director
    director.timestamp_version -= 3
    content = bundle(cloud)
    director.timestamp_version += 3
    return content


def same_version_with_other_bytes(cloud: Cloud) -> bytes:
    cloud.director.timestamp_version -= 1
    return bundle(cloud.at(cloud.director.now_ms + 1000))


def forged(cloud: Cloud) -> bytes:
    stranger = Cloud()
    stranger.grant(LOGBOOK)
    return bundle(stranger)


def of_another_vehicle(_cloud: Cloud) -> bytes:
    return bundle(Cloud(vin=OTHER_VIN))


def expired(cloud: Cloud) -> bytes:
    def long_ago(signed: object) -> None:
        signed.expires = signed.expires.replace(year=2020)  # type: ignore[attr-defined]

    cloud.director.edits["timestamp"] = long_ago
    content = bundle(cloud)
    cloud.director.edits.clear()
    return content


ATTACKS: list[tuple[Callable[[Cloud], bytes], type[TrustError]]] = [
    (lambda _: b"", MalformedError),
    (lambda _: b"\xff" * 64, MalformedError),
    (lambda c: bundle(c)[:-7], MalformedError),
    (lambda _: bytes(MAX_BUNDLE_BYTES + 1), LimitError),
    (captured, ReplayError),
    (older, RollbackError),
    (same_version_with_other_bytes, ReplayError),
    (forged, SignatureError),
    (of_another_vehicle, VehicleMismatchError),
    (expired, ExpiredError),
]
NAMES = [
    "empty",
    "garbage",
    "cut",
    "oversized",
    "captured",
    "older",
    "same-version",
    "forged",
    "other",
    "expired",
]


def served(world: AgentWorld) -> None:
    """The vehicle holds a right, and has had more contacts since."""
    world.supplied()
    with world.boot() as life:
        for _ in range(3):
            life.contact()


def seen(world: AgentWorld, life: Life) -> tuple[object, ...]:
    return (life.live, life.time, life.status["rights_version"], world.floors.read_bytes(), life.app._trusted)


@pytest.mark.parametrize(("make", "error"), ATTACKS, ids=NAMES)
def test_file_is_refused_by_a_running_agent_and_nothing_changes(
    world: AgentWorld, make: Callable[[Cloud], bytes], error: type[TrustError]
) -> None:
    served(world)
    content = make(world.cloud)
    with world.boot() as life:
        before = seen(world, life)
        with pytest.raises(error) as caught:
            life.bring(content)
        assert type(caught.value) is error
        assert seen(world, life) == before
        assert life.contact().error_type == ""  # and it goes on with its own next update


@pytest.mark.parametrize(("make", "error"), ATTACKS, ids=NAMES)
def test_file_is_refused_without_a_running_agent_and_nothing_changes(
    world: AgentWorld,
    make: Callable[[Cloud], bytes],
    error: type[TrustError],
    capsys: pytest.CaptureFixture[str],
) -> None:
    served(world)
    file = world.folder / "rights.bundle"
    file.write_bytes(make(world.cloud))
    floors = world.floors.read_bytes()
    with world.boot() as life:
        before = seen(world, life)
    assert main(["import", str(file), "--config", str(world.path)]) == 1
    shown = capsys.readouterr()
    assert (shown.out, f"refused, nothing was changed: {error.__name__}: " in shown.err) == ("", True)
    assert main(["import", str(file), "--json", "--config", str(world.path)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["taken"], report["error"]) == (False, error.__name__)
    assert world.floors.read_bytes() == floors
    with world.boot() as life:
        assert seen(world, life)[:1] + seen(world, life)[2:] == before[:1] + before[2:]


def test_file_signed_as_offline_is_refused_over_the_stream(world: AgentWorld) -> None:
    world.supplied()
    with world.boot() as life:
        for make in (
            lambda n: world.cloud.answer(None, offline=True),
            lambda n: world.cloud.answer(n, offline=True),
        ):
            before = seen(world, life)
            assert life.contact(make).error_type == "ReplayError"
            assert seen(world, life)[2:] == before[2:]


def test_no_flipped_byte_of_a_file_is_taken(world: AgentWorld) -> None:
    world.supplied()
    world.cloud.grant(LOGBOOK)
    genuine, dice = bundle(world.cloud), random.Random(11)
    with world.boot() as life:
        before = seen(world, life)
        for _ in range(100):
            damaged = bytearray(genuine)
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
            try:
                life.bring(bytes(damaged))
            except TrustError:
                assert seen(world, life) == before
            else:
                # A byte that no signature covers, such as one of the envelope: the same rights, no others.
                assert life.live == {SEAT, LOGBOOK}
                break
        assert life.live <= {SEAT, LOGBOOK}


def test_genuine_file_is_taken_once_and_again_without_an_agent(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.supplied()
    world.cloud.revoke()
    world.cloud.grant(LOGBOOK, entitlement_id="ent-00000000000000aa")
    file = world.folder / "rights.bundle"
    file.write_bytes(bundle(world.cloud))
    assert main(["import", str(file), "--json", "--config", str(world.path)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["taken"]
    assert [entry["feature"] for entry in report["gained"]] == [LOGBOOK]
    assert [entry["feature"] for entry in report["ended"]] == [SEAT]
    assert main(["import", str(file), "--config", str(world.path)]) == 0
    assert "No right has changed." in capsys.readouterr().out
    with world.boot() as life:
        assert life.live == {LOGBOOK}
        assert life.contact().error_type == ""


def test_first_rights_of_a_vehicle_may_come_as_a_file(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.cloud.grant()
    file = world.folder / "rights.bundle"
    file.write_bytes(bundle(world.cloud))
    assert main(["import", str(file), "--config", str(world.path)]) == 0
    assert "(before: none)" in capsys.readouterr().out
    with world.boot() as life:
        assert life.live == {SEAT}
        assert life.status["last_contact_ms"] == 0


def test_file_beside_an_agent_whose_socket_is_gone_is_refused_by_the_lock(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.supplied()
    file = world.folder / "rights.bundle"
    file.write_bytes(bundle(world.cloud))
    with world.boot() as life:
        before = seen(world, life)
        assert main(["import", str(file), "--config", str(world.path)]) == 1
        assert "another agent runs on it" in capsys.readouterr().err
        assert seen(world, life) == before


def test_running_agent_takes_a_file_over_its_socket(
    world: AgentWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    world.supplied()
    world.cloud.grant(LOGBOOK)
    good, bad = world.folder / "good.bundle", world.folder / "bad.bundle"
    good.write_bytes(bundle(world.cloud))
    bad.write_bytes(b"\xff")
    codes: list[int] = []
    with world.boot() as life:
        api = LocalApi(world.config.api_socket, life.app._ask, life.app._take)
        try:
            for file in (bad, good):
                arguments = ["import", str(file), "--config", str(world.path)]
                asking = threading.Thread(target=lambda words=arguments: codes.append(main(words)))
                asking.start()
                life.app._take_item(life.app._queue.get(timeout=10))
                life.settle()
                asking.join(10)
        finally:
            api.close()
        assert life.live == {SEAT, LOGBOOK}
    assert codes == [1, 0]
    shown = capsys.readouterr()
    assert "MalformedError" in shown.err
    assert LOGBOOK in shown.out


def test_file_of_a_sold_car_ends_the_old_owners_rights_and_never_returns_them(world: AgentWorld) -> None:
    world.supplied()
    old = bundle(world.cloud)
    world.cloud.revoke()
    world.cloud.owner_epoch = 2
    world.cloud.grant(LOGBOOK)
    with world.boot() as life:
        life.bring(bundle(world.cloud))
        assert life.live == {LOGBOOK}
        with pytest.raises(RollbackError):
            life.bring(old)
        assert life.greet().owner_epoch == 2
    with world.boot() as life:
        assert life.live == {LOGBOOK}


def test_file_renews_a_right_that_has_ended_offline(world: AgentWorld) -> None:
    world.supplied()
    world.machine.stand(DAY_MS)
    world.cloud.at(world.machine.true_ms).publish_catalogue()
    world.cloud.grant(LOGBOOK)
    with world.boot() as life:
        life.bring(bundle(world.cloud))
        assert life.live == {SEAT, LOGBOOK}
        assert life.time[1] == "file"
