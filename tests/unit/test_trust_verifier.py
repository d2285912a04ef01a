"""What a vehicle takes, and how it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from support.trust_repo import DAY_MS, LOGBOOK, NOW_MS, SEAT, VIN, Cloud, Vehicle, make_announcement, supplied

from agent.errors import ExpiredError, MalformedError, RollbackError, SignatureError
from agent.model import ActuatorKind, RepositoryBytes, TlsAnchor, TokenKeyAnnouncement, TrustBytes
from agent.trust.verifier import Floors, check_anchors, floors_after, starts_new_epoch, verify_stored


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


def test_a_grant_reaches_a_vehicle_that_knows_only_its_provisioned_roots(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud)
    cloud.grant()
    cloud.grant(LOGBOOK)
    verdict = vehicle.take(cloud.answer(vehicle.nonce))
    rights = verdict.rights
    assert set(rights.entitlements) == {SEAT, LOGBOOK}
    assert rights.entitlements[SEAT].trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert rights.version == verdict.director.targets == 3
    assert rights.features[SEAT].kind is ActuatorKind.TOKEN
    assert rights.tokens[SEAT].allows
    assert set(rights.tokens) == {SEAT}
    assert verdict.signed_ms == NOW_MS


def test_a_verdict_says_when_each_file_expires(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    days = {"root": 5 * 365, "timestamp": 1, "snapshot": 30, "targets": 30}
    assert vehicle.boot().expires_ms == {
        f"{repository} {role}": NOW_MS + count * DAY_MS
        for repository in ("director", "catalogue")
        for role, count in days.items()
    }


def test_rights_as_a_file_are_taken_and_taken_again(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud)
    cloud.grant()
    bundle = cloud.answer(None, offline=True)
    verdict = vehicle.take_bundle(bundle)
    assert set(verdict.rights.entitlements) == {SEAT}
    assert verdict.signed_ms == NOW_MS
    assert vehicle.take_bundle(bundle) == verdict


def test_the_token_key_and_the_servers_certificates_are_read(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    announced = make_announcement(cloud.token_key, 3)
    server = b'{"servers":[{"certificate":"AQID","not_before_ms":1,"not_after_ms":2}]}'
    cloud.notices = {"token-keys/3.cose": announced, "tls.json": server}
    cloud.publish()
    rights = vehicle.take(cloud.answer(vehicle.nonce)).rights
    assert rights.token_key == TokenKeyAnnouncement(3, announced, sha256(announced).hexdigest())
    assert rights.tls_anchors == (TlsAnchor(b"\x01\x02\x03", 1, 2),)
    assert vehicle.boot().rights == rights


def test_the_owner_epoch_is_remembered(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    assert vehicle.floors.owner_epoch == vehicle.boot().rights.owner_epoch == 1
    cloud.owner_epoch = 2
    cloud.publish()
    assert vehicle.take(cloud.answer(vehicle.nonce)).rights.owner_epoch == 2
    assert vehicle.floors.owner_epoch == 2


def test_a_vehicle_without_rights_takes_an_empty_set(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud)
    assert vehicle.take(cloud.answer(vehicle.nonce)).rights.entitlements == {}


def test_a_fresh_time_alone_keeps_the_rights(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    before = vehicle.boot()
    cloud.at(NOW_MS + 60_000)
    update = cloud.answer(vehicle.nonce, only_time=True)
    verdict = vehicle.take(update)
    assert verdict.rights == vehicle.boot().rights == before.rights
    director = replace(before.state.director, timestamp=update.director.timestamp)
    assert verdict.state == replace(before.state, director=director)
    assert verdict.signed_ms == NOW_MS + 60_000
    assert verdict.director.timestamp == 2


def test_a_revoked_right_vanishes_and_its_token_burns_the_older_one(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.revoke()
    rights = vehicle.take(cloud.answer(vehicle.nonce)).rights
    assert rights.entitlements == {}
    assert not rights.tokens[SEAT].allows
    assert SEAT in rights.features


def test_a_catalogue_edit_keeps_the_right_to_an_older_release(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.describe(SEAT, 2)
    cloud.publish_catalogue()
    rights = vehicle.take(cloud.answer(vehicle.nonce)).rights
    assert rights.features[SEAT].release == 1
    assert SEAT in rights.entitlements


def test_a_newer_release_replaces_the_older_one(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.describe(SEAT, 2)
    cloud.publish_catalogue()
    cloud.grant(SEAT, release=2, min_release=2)
    verdict = vehicle.take(cloud.answer(vehicle.nonce))
    assert verdict.rights.features[SEAT].release == 2
    assert set(verdict.state.catalogue_targets) == {
        "features/seat-heating/2.toml"
    }  # the stale one is dropped


def test_the_same_files_sent_again_are_no_replay(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    assert vehicle.take(cloud.answer(vehicle.nonce)).rights == vehicle.boot().rights


def test_boot_with_everything_expired_keeps_the_rights(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.now_ms = NOW_MS + 3_000 * DAY_MS  # the mark of a vehicle that stood for eight years
    assert SEAT in vehicle.boot().rights.entitlements


def test_a_vehicle_at_1970_learns_the_time_from_the_signed_time(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud, now_ms=0)
    assert vehicle.take(cloud.answer(vehicle.nonce)).signed_ms == NOW_MS


def test_a_vehicle_at_1970_is_not_fooled_by_expired_metadata(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud, now_ms=0)
    update = cloud.answer(vehicle.nonce, time_ms=NOW_MS + 2 * DAY_MS)
    with pytest.raises(ExpiredError):
        vehicle.take(update)


def test_a_mark_ahead_of_the_signed_time_goes_on_counting_for_expiry(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud, now_ms=NOW_MS + 2 * DAY_MS)
    with pytest.raises(ExpiredError, match="director timestamp"):
        vehicle.take(cloud.answer(vehicle.nonce))
    by_floor = Vehicle(cloud)
    by_floor.floors = Floors(time_ms=NOW_MS + 2 * DAY_MS)
    with pytest.raises(ExpiredError, match="director timestamp"):
        by_floor.take(cloud.answer(by_floor.nonce))


def test_roots_are_followed_and_kept(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.rotate("root")
    cloud.director.rotate("root")
    cloud.catalogue.rotate("root")
    verdict = vehicle.take(cloud.answer(vehicle.nonce))
    assert (verdict.director.root, verdict.catalogue.root) == (3, 2)
    assert verdict.state.director.roots == tuple(cloud.director.roots)
    assert vehicle.boot().director == verdict.director
    vehicle.take(cloud.answer(vehicle.nonce))  # the same roots sent again


def test_stolen_online_keys_that_ran_ahead_are_undone_by_the_root(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.at(NOW_MS + 1_000 * DAY_MS)
    cloud.director.timestamp_version = 2**40
    cloud.publish(2**40)
    cloud.publish_catalogue()
    vehicle.take(cloud.answer(vehicle.nonce))
    vehicle.now_ms = NOW_MS + 1_000 * DAY_MS
    ahead = vehicle.floors

    cloud.at(NOW_MS + DAY_MS)
    cloud.director.rotate("timestamp")
    cloud.director.rotate("snapshot")
    cloud.director.rotate("targets")
    cloud.director.timestamp_version = 0
    cloud.publish(3)
    cloud.publish_catalogue()
    verdict = vehicle.take(cloud.answer(vehicle.nonce))
    assert starts_new_epoch(verdict, ahead)
    assert vehicle.floors.director.timestamp == 1
    assert vehicle.floors.director.targets == 3
    assert vehicle.floors.time_ms == NOW_MS + DAY_MS
    assert not starts_new_epoch(verdict, vehicle.floors)


def test_a_signed_time_beyond_the_life_of_the_other_metadata_is_not_taken(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.now_ms = NOW_MS + 10_000 * DAY_MS  # the timestamp key alone is stolen
    with pytest.raises(ExpiredError):
        vehicle.take(cloud.answer(vehicle.nonce, only_time=True))
    assert vehicle.floors.time_ms == NOW_MS


def test_floors_refuse_a_store_that_was_set_back(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    old_disk, old_refresh = vehicle.stored, vehicle.refreshed_ms
    cloud.revoke()
    vehicle.take(cloud.answer(vehicle.nonce))
    with pytest.raises(RollbackError) as caught:
        verify_stored(old_disk, vin=VIN, as_of_ms=old_refresh, floors=vehicle.floors)
    assert (caught.value.trusted, caught.value.received) == (2, 1)


def test_a_lost_store_is_filled_again_above_the_floors(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.stored = cloud.provisioned()
    assert SEAT in vehicle.take(cloud.answer(vehicle.nonce)).rights.entitlements


def test_floors_never_fall(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    first = vehicle.floors
    assert first.token_counters == {("seat-module", SEAT): 1}
    assert first.releases == {SEAT: 1}
    assert floors_after(vehicle.boot(), first) == first  # stored state carries no time
    cloud.revoke()
    vehicle.take(cloud.answer(vehicle.nonce))
    assert vehicle.floors.token_counters == {("seat-module", SEAT): 2}
    assert vehicle.floors.director.targets > first.director.targets


def test_floors_of_what_a_set_no_longer_lists_stay_until_the_keys_are_replaced(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    elsewhere = {("lamp-module", "lamp"): 9}
    now = replace(vehicle.floors, token_counters={**vehicle.floors.token_counters, **elsewhere})
    after = floors_after(vehicle.boot(), now)
    assert after.token_counters == {("seat-module", SEAT): 1, ("lamp-module", "lamp"): 9}
    replaced = floors_after(vehicle.boot(), replace(now, director_epoch="of older keys"))
    assert replaced.token_counters == {("seat-module", SEAT): 1}


def test_floors_that_name_no_keys_yet_are_not_of_other_keys(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    verdict = vehicle.boot()
    nameless = replace(
        vehicle.floors, director_epoch="", catalogue_epoch="", time_ms=NOW_MS + 5, owner_epoch=7
    )
    after = floors_after(verdict, nameless)
    assert after == replace(vehicle.floors, time_ms=NOW_MS + 5, owner_epoch=7)
    assert not starts_new_epoch(verdict, nameless)


def test_a_stored_set_says_no_time(cloud: Cloud) -> None:
    assert supplied(cloud).boot().signed_ms == 0


@pytest.mark.parametrize("name", ["director", "catalogue"])
def test_each_provisioned_root_must_be_one(cloud: Cloud, name: str) -> None:
    good, other = cloud.provisioned(), Cloud().provisioned()
    check_anchors(good)
    (own,), (foreign,) = getattr(good, name).roots, getattr(other, name).roots
    signed = json.loads(own)
    signed["signatures"] = json.loads(foreign)["signatures"]
    with pytest.raises(SignatureError, match=f"{name} root"):
        check_anchors(replace(good, **{name: RepositoryBytes(roots=(json.dumps(signed).encode(),))}))  # type: ignore[arg-type]
    with pytest.raises(MalformedError, match=f"{name} root"):
        check_anchors(replace(good, **{name: RepositoryBytes()}))  # type: ignore[arg-type]


def test_the_first_update_must_bring_everything(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud)
    with pytest.raises(MalformedError, match="director snapshot: missing"):
        vehicle.take(cloud.answer(vehicle.nonce, only_time=True))


def test_a_vehicle_without_roots_trusts_nothing() -> None:
    with pytest.raises(MalformedError, match="none is provisioned"):
        verify_stored(TrustBytes(), vin=VIN, as_of_ms=NOW_MS, floors=Floors())


def test_an_update_without_a_signed_time_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    with pytest.raises(MalformedError, match="director timestamp: missing"):
        vehicle.take(TrustBytes())
