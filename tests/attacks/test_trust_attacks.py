"""Attacks on what a vehicle trusts: each is refused, and what was trusted is trusted on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from support.trust_repo import (
    DAY_MS,
    LOGBOOK,
    NOW_MS,
    OTHER_VIN,
    SEAT,
    UID,
    VIN,
    Cloud,
    Vehicle,
    feature_file,
    make_announcement,
    make_token,
    nonce,
    resigned,
    supplied,
)
from tuf.api.metadata import DelegatedRole, Delegations, Key, MetaFile

from agent.errors import (
    DisagreementError,
    ExpiredError,
    LimitError,
    MalformedError,
    ReplayError,
    RollbackError,
    SignatureError,
    TrustError,
    VehicleMismatchError,
)
from agent.model import RepositoryBytes, TrustBytes
from agent.trust.verifier import Floors, starts_new_epoch
from openfod.entitlement.v1 import entitlement_pb2

SEAT_FILE = "features/seat-heating/1.toml"
TOKEN_FILE = "tokens/seat-module/seat-heating.cose"

TLS = b'{"servers":[{"certificate":"%s","not_before_ms":%d,"not_after_ms":%d}]}'
ANNOUNCED = make_announcement(Ed25519PrivateKey.generate(), 1)


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


def with_part(update: TrustBytes, repository: str, **parts: Any) -> TrustBytes:
    """Replace parts of one repository in an update."""
    return replace(update, **{repository: replace(getattr(update, repository), **parts)})


# --- forged and tampered -----------------------------------------------------


@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_metadata_forged_with_other_keys_is_refused(cloud: Cloud, repository: str, role: str) -> None:
    vehicle = supplied(cloud)
    getattr(cloud, repository).signers[role] = [CryptoSigner.generate_ed25519() for _ in range(3)]
    cloud.publish_catalogue()
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), SignatureError, match=f"{repository} {role}")


def test_a_wholly_forged_cloud_for_the_right_vehicle_and_nonce_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    forger = Cloud()
    forger.grant()
    vehicle.refuses(forger.answer(vehicle.nonce), SignatureError, match="director timestamp")


@pytest.mark.parametrize("repository", ["director", "catalogue"])
def test_a_forged_root_is_refused(cloud: Cloud, repository: str) -> None:
    vehicle = supplied(cloud)
    forger = Cloud()
    forger.director.add_root()
    forged = forger.director.roots[1]
    vehicle.refuses(
        with_part(cloud.answer(vehicle.nonce), repository, roots=(forged,)), SignatureError, match="root"
    )


@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_later_expiry_written_into_signed_metadata_is_refused(
    cloud: Cloud, repository: str, role: str
) -> None:
    vehicle = supplied(cloud)
    cloud.publish_catalogue()
    cloud.publish()
    update = cloud.answer(vehicle.nonce)
    content = getattr(getattr(update, repository), role)
    tampered = content.replace(b'"expires":"20', b'"expires":"30')
    assert tampered != content
    with pytest.raises((SignatureError, MalformedError)):
        vehicle.take(with_part(update, repository, **{role: tampered}))
    assert SEAT in vehicle.boot().rights.entitlements


@pytest.mark.parametrize("path", ["entitlements.pb", TOKEN_FILE, SEAT_FILE])
def test_a_target_file_of_other_content_is_refused(cloud: Cloud, path: str) -> None:
    vehicle = supplied(cloud)
    content = (cloud.files | cloud.catalogue_files)[path]
    cloud.tamper[path] = content[:-1] + bytes([content[-1] ^ 1])
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="does not match")


@pytest.mark.parametrize(("repository", "role"), [("director", "root"), ("catalogue", "root")])
def test_a_root_below_the_threshold_is_refused(cloud: Cloud, repository: str, role: str) -> None:
    vehicle = supplied(cloud)
    source = getattr(cloud, repository)
    source.signers[role] = source.keys[role][:1]
    source.add_root()
    vehicle.refuses(cloud.answer(vehicle.nonce), SignatureError, match="1/2")


def test_catalogue_targets_below_the_threshold_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.catalogue.signers["targets"] = cloud.catalogue.keys["targets"][:1]
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), SignatureError, match="catalogue targets: .*1/2")


def test_one_signature_twice_does_not_make_a_threshold(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.catalogue.signers["targets"] = cloud.catalogue.keys["targets"][:1] * 2
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), SignatureError)


@pytest.mark.parametrize("provisioned", [False, True])
def test_one_key_under_two_ids_is_refused_in_a_root(cloud: Cloud, provisioned: bool) -> None:
    vehicle = supplied(cloud)

    def double(root: Any) -> None:
        key = cloud.director.keys["targets"][0].public_key
        twin = type(key)("0" * 64, key.keytype, key.scheme, key.keyval)
        root.keys[twin.keyid] = twin
        root.roles["targets"].keyids.append(twin.keyid)
        root.roles["targets"].threshold = 2

    cloud.director.edits["root"] = double
    if provisioned:
        cloud.director.roots.clear()
        cloud.director.add_root()
        with pytest.raises(MalformedError, match="two key ids"):
            Vehicle(cloud).take(cloud.answer(nonce(1)))
        return
    cloud.director.add_root()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="two key ids")


def test_a_key_without_a_public_half_is_refused_in_a_root(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    gpg = {"keytype": "rsa", "scheme": "pgp+rsa-pkcsv1.5", "keyval": {"private": "", "public": {"n": "1"}}}
    cloud.director.edits["root"] = lambda root: root.keys.update(a=Key.from_dict("a", dict(gpg)))
    cloud.director.add_root()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="no public half")


def test_a_skipped_root_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.add_root()
    cloud.director.add_root()
    update = with_part(cloud.answer(vehicle.nonce), "director", roots=(cloud.director.roots[2],))
    vehicle.refuses(update, DisagreementError, match="root")


def test_metadata_of_revoked_keys_is_refused_after_a_rotation(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    stolen = cloud.director.keys["timestamp"]
    cloud.director.rotate("timestamp")
    vehicle.take(cloud.answer(vehicle.nonce))
    cloud.director.signers["timestamp"] = stolen
    vehicle.refuses(cloud.answer(vehicle.nonce), SignatureError)


def test_one_role_in_place_of_another_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.publish()
    update = cloud.answer(vehicle.nonce)
    swapped = with_part(update, "director", targets=update.director.snapshot)
    vehicle.refuses(swapped, MalformedError)


# --- another vehicle ---------------------------------------------------------


def test_genuine_metadata_of_another_vehicle_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.extra["vin"] = OTHER_VIN
    cloud.publish()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), VehicleMismatchError)
    assert OTHER_VIN in message
    assert VIN in message


def test_the_answer_to_another_vehicle_is_named_as_such_whatever_else_is_wrong(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    other = Cloud(OTHER_VIN)
    vehicle.refuses(other.answer(nonce(77)), VehicleMismatchError)


@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_one_file_of_another_vehicle_is_refused(cloud: Cloud, role: str) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits[role] = lambda signed: signed.unrecognized_fields.update(vin=OTHER_VIN)
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), VehicleMismatchError, match=role)


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_metadata_that_names_no_vehicle_is_refused(cloud: Cloud, role: str) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits[role] = lambda signed: signed.unrecognized_fields.pop("vin")
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="vin")


def test_entitlements_of_another_vehicle_in_genuine_metadata_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.vin = OTHER_VIN
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), VehicleMismatchError, match="entitlements")


def test_a_store_moved_to_another_vehicle_is_refused_at_boot(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    other = Vehicle(cloud, vin=OTHER_VIN)
    other.stored, other.refreshed_ms = vehicle.stored, vehicle.refreshed_ms
    with pytest.raises(VehicleMismatchError):
        other.boot()


# --- replay, freeze and rollback ---------------------------------------------


def test_an_old_unexpired_answer_is_refused_by_its_nonce(cloud: Cloud) -> None:
    vehicle = Vehicle(cloud)
    cloud.grant()
    captured = cloud.answer(vehicle.nonce)
    vehicle.take(captured)
    cloud.revoke()
    vehicle.take(cloud.answer(vehicle.nonce))
    message = vehicle.refuses(captured, ReplayError)
    assert nonce(1).hex() in message
    assert vehicle.nonce.hex() in message


def test_an_answer_without_a_nonce_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.refuses(cloud.answer(None), ReplayError, match="None")


def test_a_timestamp_of_the_same_version_and_another_nonce_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.timestamp_version -= 1
    vehicle.refuses(cloud.answer(vehicle.nonce), ReplayError, match="director timestamp version 1")


@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_an_equal_version_with_other_bytes_is_refused(cloud: Cloud, repository: str, role: str) -> None:
    vehicle = supplied(cloud)
    source = getattr(cloud, repository)
    source.edits[role] = lambda signed: signed.unrecognized_fields.update(note="other bytes")
    source.publish(source.version)
    cloud.catalogue_timestamp = cloud.catalogue.stamp()
    vehicle.refuses(cloud.answer(vehicle.nonce), ReplayError, match=f"{repository} {role}")


def test_a_catalogue_timestamp_of_equal_version_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.at(NOW_MS + 1_000)
    cloud.catalogue.timestamp_version -= 1
    cloud.catalogue_timestamp = cloud.catalogue.stamp()
    vehicle.refuses(cloud.answer(vehicle.nonce), ReplayError, match="catalogue timestamp")


def test_an_older_director_timestamp_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.take(cloud.answer(vehicle.nonce))
    cloud.director.timestamp_version = 0
    with pytest.raises(RollbackError) as caught:
        vehicle.take(cloud.answer(vehicle.nonce))
    assert (caught.value.trusted, caught.value.received) == (2, 1)
    assert SEAT in vehicle.boot().rights.entitlements


@pytest.mark.parametrize("repository", ["director", "catalogue"])
def test_an_older_set_under_a_new_timestamp_is_refused(cloud: Cloud, repository: str) -> None:
    vehicle = supplied(cloud)
    cloud.publish()
    cloud.publish_catalogue()
    vehicle.take(cloud.answer(vehicle.nonce))
    source = getattr(cloud, repository)
    source.publish(source.version - 1)
    cloud.catalogue_timestamp = cloud.catalogue.stamp()
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, match=f"{repository} snapshot")


@pytest.mark.parametrize("repository", ["director", "catalogue"])
def test_older_targets_under_a_new_snapshot_are_refused(cloud: Cloud, repository: str) -> None:
    vehicle = supplied(cloud)
    cloud.publish()
    cloud.publish_catalogue()
    vehicle.take(cloud.answer(vehicle.nonce))
    source = getattr(cloud, repository)

    def older(snapshot: Any) -> None:
        snapshot.version += 2
        source.version = snapshot.version

    source.edits["snapshot"] = older
    source.publish(source.version - 1)
    cloud.catalogue_timestamp = cloud.catalogue.stamp()
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, match=f"{repository} targets")


@pytest.mark.parametrize("repository", ["director", "catalogue"])
def test_older_targets_are_refused_by_the_stored_snapshot_where_the_floors_are_lost(
    cloud: Cloud, repository: str
) -> None:
    vehicle = supplied(cloud)
    source = getattr(cloud, repository)
    older = source.version
    cloud.publish_catalogue()
    cloud.publish()
    vehicle.take(cloud.answer(vehicle.nonce))
    vehicle.floors = Floors()
    source.edits["snapshot"] = lambda snapshot: setattr(snapshot.meta["targets.json"], "version", older)
    cloud.publish_catalogue()
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, match=f"{repository} targets")


def test_an_older_catalogue_timestamp_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    old = cloud.catalogue_timestamp
    cloud.catalogue_timestamp = cloud.catalogue.stamp()
    vehicle.take(cloud.answer(vehicle.nonce))
    cloud.catalogue_timestamp = old
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, match="catalogue timestamp")


def test_a_store_without_the_newer_roots_is_refused_by_the_floor(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    old = vehicle.stored
    cloud.director.rotate("root")
    vehicle.take(cloud.answer(vehicle.nonce))
    vehicle.stored = old
    with pytest.raises(RollbackError, match="director root"):
        vehicle.boot()


@pytest.mark.parametrize("role", ["root", "timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("epochs", [{}, {"director_epoch": "", "catalogue_epoch": ""}], ids=["named", "none"])
def test_a_store_below_any_floor_is_refused(
    cloud: Cloud, repository: str, role: str, epochs: dict[str, str]
) -> None:
    vehicle = supplied(cloud)
    versions = getattr(vehicle.floors, repository)
    newer = replace(versions, **{role: getattr(versions, role) + 1})
    changed: dict[str, Any] = {repository: newer, **epochs}
    vehicle.floors = replace(vehicle.floors, **changed)
    with pytest.raises(RollbackError) as caught:
        vehicle.boot()
    assert caught.value.what == f"{repository} {role}"


def test_floors_that_name_no_keys_yet_hold_all_the_same(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    floors = replace(vehicle.floors, director_epoch="", catalogue_epoch="")
    vehicle.floors = replace(floors, token_counters={("seat-module", SEAT): 2})
    with pytest.raises(RollbackError, match="token counter"):
        vehicle.boot()
    vehicle.floors = replace(floors, releases={SEAT: 2})
    with pytest.raises(RollbackError, match="release"):
        vehicle.boot()
    vehicle.floors = replace(floors, owner_epoch=2)
    with pytest.raises(RollbackError, match="owner epoch"):
        vehicle.boot()


def test_a_token_with_an_older_counter_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.revoke()
    vehicle.take(cloud.answer(vehicle.nonce))
    cloud.counters[SEAT] = 0
    cloud.grant()
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, match="token counter")


def test_an_older_release_of_a_feature_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.describe(SEAT, 2)
    cloud.publish_catalogue()
    cloud.grant(SEAT, release=2)
    vehicle.take(cloud.answer(vehicle.nonce))
    cloud.grant(SEAT, release=1)
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, match="release")


@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_frozen_metadata_is_refused_once_it_has_expired(cloud: Cloud, repository: str, role: str) -> None:
    vehicle = supplied(cloud)
    source = getattr(cloud, repository)
    source.edits[role] = lambda s: setattr(s, "expires", s.expires - timedelta(days=31))
    cloud.publish()
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), ExpiredError, match=f"{repository} {role}")


def test_a_catalogue_that_is_withheld_is_refused_once_it_has_expired(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.at(NOW_MS + 2 * DAY_MS)
    cloud.publish()
    frozen = replace(cloud.answer(vehicle.nonce), catalogue=RepositoryBytes(), catalogue_targets={})
    vehicle.refuses(frozen, ExpiredError, match="catalogue timestamp")


def test_an_expired_root_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.at(NOW_MS + 6 * 365 * DAY_MS)
    cloud.publish()
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), ExpiredError, match=r"root\.json is expired")


def test_an_unverified_time_moves_nothing(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    update = cloud.answer(vehicle.nonce, time_ms=NOW_MS + 9_000 * DAY_MS)
    forged = resigned(update.director.timestamp, CryptoSigner.generate_ed25519())
    vehicle.refuses(with_part(update, "director", timestamp=forged), SignatureError)


# --- mix and match, and disagreement -----------------------------------------


def test_targets_of_another_set_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.publish()
    middle = cloud.director.targets_bytes
    cloud.publish()
    update = with_part(cloud.answer(vehicle.nonce), "director", targets=middle)
    vehicle.refuses(update, RollbackError, match="director targets")


def test_targets_newer_than_their_snapshot_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.publish()
    older = cloud.answer(vehicle.nonce)
    cloud.publish()
    update = with_part(older, "director", targets=cloud.director.targets_bytes)
    vehicle.refuses(update, DisagreementError, match="different sets")


def test_a_snapshot_of_another_set_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.publish()
    middle = cloud.director.snapshot_bytes
    cloud.publish()
    update = with_part(cloud.answer(vehicle.nonce), "director", snapshot=middle)
    vehicle.refuses(update, MalformedError, match="director snapshot")


def test_a_feature_that_the_catalogue_does_not_list_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.describe(SEAT, 2)  # described, never signed by the catalogue's keys
    cloud.grant(SEAT, release=2)
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="the catalogue does not")


def test_a_feature_of_other_content_than_in_the_catalogue_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    harmful = feature_file(SEAT).replace(b"31 01 0F 0E 00 01", b"31 01 0F 0E 00 02")
    cloud.catalogue_files[SEAT_FILE] = harmful  # the director's keys are stolen
    cloud.publish()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert message.startswith(f"{SEAT_FILE}: the director says sha256")
    assert "the catalogue" in message


def test_a_feature_of_another_length_than_in_the_catalogue_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["targets"] = lambda targets: setattr(targets.targets[SEAT_FILE], "length", 1)
    cloud.publish()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert message.startswith(f"{SEAT_FILE}: the director says length 1,")


def edit_custom(path: str, **custom: object) -> Callable[[Any], None]:
    """Change custom metadata of a target before it is signed."""

    def edit(targets: Any) -> None:
        targets.targets[path].unrecognized_fields["custom"].update(custom)

    return edit


@pytest.mark.parametrize(
    ("path", "custom", "match"),
    [
        (SEAT_FILE, {"hardware_id": "other-module"}, "hardware_id 'other-module'"),
        (SEAT_FILE, {"release_counter": 2}, "release_counter"),
        (SEAT_FILE, {"release_counter": True}, "release_counter"),
        (SEAT_FILE, {"ecu_identifier": "brake-module"}, "ecu_identifier"),
        (TOKEN_FILE, {"ecu_identifier": "brake-module"}, "ecu_identifier"),
        (TOKEN_FILE, {"hardware_id": "other-module"}, "hardware_id"),
        (TOKEN_FILE, {"release_counter": 9}, "release_counter"),
    ],
)
def test_custom_metadata_that_disagrees_is_refused(
    cloud: Cloud, path: str, custom: dict[str, object], match: str
) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["targets"] = edit_custom(path, **custom)
    cloud.publish()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert message.startswith(f"{path}: the director says {match}")


@pytest.mark.parametrize("listed", [["another"], [], "openfod-seat-1", None], ids=repr)
def test_a_catalogue_that_no_longer_lists_the_hardware_is_refused(cloud: Cloud, listed: object) -> None:
    vehicle = supplied(cloud)
    cloud.catalogue.edits["targets"] = edit_custom(SEAT_FILE, hardware_ids=listed)
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="hardware_id")


def test_a_hardware_that_the_feature_file_does_not_name_is_refused_though_both_list_it(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["targets"] = edit_custom(SEAT_FILE, hardware_id="another")
    cloud.catalogue.edits["targets"] = edit_custom(SEAT_FILE, hardware_ids=["another"])
    cloud.publish()
    cloud.publish_catalogue()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert message.startswith(f"{SEAT_FILE}: the director says hardware_id 'another', the catalogue 'openfod")


def test_targets_without_custom_metadata_or_hash_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["targets"] = lambda t: t.targets[TOKEN_FILE].unrecognized_fields.clear()
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="custom")

    def only_md5(targets: Any) -> None:
        targets.targets["entitlements.pb"].hashes = {"md5": "0" * 32}

    cloud.director.edits["targets"] = only_md5
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="sha256")


def test_delegations_of_the_director_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["targets"] = lambda t: setattr(t, "delegations", Delegations({}, {}))
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="delegations")


def test_delegations_of_the_catalogue_give_nothing(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    key = CryptoSigner.generate_ed25519().public_key
    role = DelegatedRole("other", [key.keyid], 1, terminating=False, paths=["features/*/*"])
    delegations = Delegations({key.keyid: key}, {"other": role})
    cloud.catalogue.edits["targets"] = lambda targets: setattr(targets, "delegations", delegations)
    cloud.publish_catalogue()
    assert vehicle.take(cloud.answer(vehicle.nonce)).rights == vehicle.boot().rights
    del cloud.catalogue.targets[SEAT_FILE]
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="the catalogue does not")


def test_a_snapshot_that_drops_targets_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["snapshot"] = lambda s: setattr(s, "meta", {"other.json": MetaFile(9)})
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="missing info")


def test_a_right_to_a_release_that_is_not_listed_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.grant(SEAT, release=1, min_release=2)
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="release 2 or later")


def test_a_quota_of_a_meter_that_the_feature_lacks_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    quota = entitlement_pb2.Quota(meter_id="no-such-meter", limit=5, hard=True)
    cloud.grant(quotas=[quota])
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, "no-such-meter")


@pytest.mark.parametrize("kind", [entitlement_pb2.PLAN_KIND_PREPAID, entitlement_pb2.PLAN_KIND_PAY_PER_USE])
def test_a_right_by_use_is_refused_where_no_ecu_counts_and_the_catalogue_does_not_admit_it(
    cloud: Cloud, kind: entitlement_pb2.PlanKind.ValueType
) -> None:
    vehicle = supplied(cloud)
    cloud.grant(LOGBOOK, plan_kind=kind)  # "detect-only"
    assert LOGBOOK in vehicle.take(cloud.answer(vehicle.nonce)).rights.entitlements
    cloud.rights[SEAT].plan_kind = kind  # "ecu-token", and no count of its own
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, "its ECU signs no count")


@pytest.mark.parametrize("limit", ["ignition_cycles", "operating_s"])
def test_a_limit_that_no_ecu_could_measure_is_refused(cloud: Cloud, limit: str) -> None:
    vehicle = supplied(cloud)
    measured: Any = {limit: 5}
    cloud.rights[SEAT].validity.CopyFrom(entitlement_pb2.Validity(**measured))
    cloud.publish()
    assert getattr(vehicle.take(cloud.answer(vehicle.nonce)).rights.entitlements[SEAT], limit) == 5
    cloud.grant(LOGBOOK, validity=entitlement_pb2.Validity(**measured))
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, "has no ECU")


def test_a_right_to_a_feature_that_is_not_listed_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.rights[SEAT].feature_id = "massage"
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="lists none")


def test_a_set_without_entitlements_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.director.edits["targets"] = lambda targets: targets.targets.pop("entitlements.pb")
    cloud.publish()
    del cloud.files["entitlements.pb"]
    vehicle.refuses(cloud.answer(vehicle.nonce), MalformedError, match="entitlements.pb is not listed")


def test_entitlements_of_another_version_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.publish(said_version=2)
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="of version 2")


def test_a_token_for_another_feature_of_the_ecu_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.tokens[SEAT] = make_token(cloud.token_key, feature=2, counter=cloud.counters[SEAT], uid=UID)
    cloud.publish()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert message.startswith(f"{TOKEN_FILE}: the director says feature number (in its token) 2,")


def test_a_token_for_a_feature_that_takes_none_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.grant(LOGBOOK)
    cloud.tokens[LOGBOOK] = cloud.tokens[SEAT]
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="takes a token")


def test_a_token_for_a_feature_that_is_not_listed_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.tokens["massage"] = cloud.tokens[SEAT]
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="no feature massage")


def test_a_token_in_the_place_of_another_ecu_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    elsewhere = TOKEN_FILE.replace("seat-module", "brake-module")

    def move(targets: Any) -> None:
        targets.targets[elsewhere] = targets.targets.pop(TOKEN_FILE)

    cloud.director.edits["targets"] = move
    cloud.publish()
    update = cloud.answer(vehicle.nonce)
    files = {
        elsewhere if path == TOKEN_FILE else path: file for path, file in update.director_targets.items()
    }
    message = vehicle.refuses(replace(update, director_targets=files), DisagreementError)
    assert message.startswith(f"{elsewhere}: the director says ecu_identifier 'brake-module'")


def test_two_releases_of_one_feature_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.describe(SEAT, 2)
    cloud.publish_catalogue()

    def both(targets: Any) -> None:
        targets.targets["features/seat-heating/2.toml"] = targets.targets[SEAT_FILE]

    cloud.director.edits["targets"] = both
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="more than one release")


@pytest.mark.parametrize("path", ["../evil", "tokens/a/b/c.cose", "features/x/0.toml", "firmware.bin"])
def test_a_target_at_a_path_of_no_contract_is_refused(cloud: Cloud, path: str) -> None:
    vehicle = supplied(cloud)

    def add(targets: Any) -> None:
        targets.targets[path] = targets.targets["entitlements.pb"]

    cloud.director.edits["targets"] = add
    cloud.publish()
    update = cloud.answer(vehicle.nonce)
    files = {**update.director_targets, path: cloud.files["entitlements.pb"]}
    vehicle.refuses(replace(update, director_targets=files), MalformedError, match="expected entitlements")


@pytest.mark.parametrize("kind", ["director_targets", "catalogue_targets"])
def test_a_file_that_nobody_listed_is_refused(cloud: Cloud, kind: str) -> None:
    vehicle = supplied(cloud)
    update = cloud.answer(vehicle.nonce)
    files: Any = {**getattr(update, kind), "features/drivers-logbook/1.toml": feature_file(LOGBOOK)}
    vehicle.refuses(replace(update, **{kind: files}), DisagreementError, match="not listed")


@pytest.mark.parametrize("kind", ["director_targets", "catalogue_targets"])
def test_a_listed_file_that_was_never_sent_is_refused(cloud: Cloud, kind: str) -> None:
    vehicle = Vehicle(cloud)
    cloud.grant()
    nothing: Any = {}
    update = replace(cloud.answer(vehicle.nonce), **{kind: nothing})
    with pytest.raises(MalformedError, match="neither received nor stored"):
        vehicle.take(update)
    assert vehicle.stored == cloud.provisioned()


def test_a_feature_file_under_the_path_of_another_release_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.describe(SEAT, 2, content=feature_file(SEAT, 1))
    cloud.publish_catalogue()
    cloud.grant(SEAT, release=2)
    vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError, match="the file itself says")


# --- endless data ------------------------------------------------------------

SIZES = {"timestamp": 16_384, "snapshot": 65_536, "targets": 524_288}


@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("role", list(SIZES))
def test_oversized_metadata_is_refused_unread(cloud: Cloud, repository: str, role: str) -> None:
    vehicle = supplied(cloud)
    endless = b"[" * (SIZES[role] + 1)
    update = with_part(cloud.answer(vehicle.nonce), repository, **{role: endless})
    vehicle.refuses(update, LimitError, match=f"{repository} {role}, bytes")


@pytest.mark.parametrize("repository", ["director", "catalogue"])
@pytest.mark.parametrize("role", list(SIZES))
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deeply_nested_metadata_is_refused_unread(
    cloud: Cloud, repository: str, role: str, opening: bytes
) -> None:
    vehicle = supplied(cloud)
    deep = opening * 2_000
    update = with_part(cloud.answer(vehicle.nonce), repository, **{role: deep})
    vehicle.refuses(update, LimitError, match="depth")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("repository", ["director", "catalogue"])
def test_a_stored_root_that_two_readers_could_read_differently_is_refused(
    cloud: Cloud, repository: str, place: int
) -> None:
    vehicle = supplied(cloud)
    getattr(cloud, repository).rotate("root")
    vehicle.take(cloud.answer(vehicle.nonce))
    roots = list(getattr(vehicle.stored, repository).roots)
    roots[place] = roots[place].replace(b"{", b'{"signatures":[],', 1)
    vehicle.stored = with_part(vehicle.stored, repository, roots=tuple(roots))
    with pytest.raises(MalformedError, match=f"{repository} root: a key stands twice"):
        vehicle.boot()


def test_too_many_or_too_large_roots_are_refused_unread(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    update = cloud.answer(vehicle.nonce)
    vehicle.refuses(with_part(update, "director", roots=(b"{}",) * 33), LimitError)
    vehicle.refuses(with_part(update, "catalogue", roots=(b" " * 65_537,)), LimitError)


def test_too_many_or_too_large_targets_are_refused_unread(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    update = cloud.answer(vehicle.nonce)
    many = {f"t{i}": b"" for i in range(513)}
    vehicle.refuses(replace(update, director_targets=many), LimitError)
    vehicle.refuses(replace(update, catalogue_targets=many), LimitError)
    vehicle.refuses(replace(update, director_targets={"t": b" " * 65_537}), LimitError)
    cloud.director.edits["targets"] = lambda targets: targets.targets.update(
        dict.fromkeys(many, targets.targets["entitlements.pb"])
    )
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), LimitError, match="director targets listed")
    vehicle.refuses(replace(update, director_targets={"t" * 257: b""}), LimitError)


def test_a_file_of_too_many_roots_is_refused_though_each_is_trusted(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    trusted = vehicle.stored.director.roots[0]
    bundle = with_part(cloud.answer(None, offline=True), "director", roots=(trusted,) * 33)
    vehicle.refuses(bundle, LimitError, match="root files", as_file=True)


def test_a_feature_more_than_a_store_may_hold_is_refused_though_the_update_is_small(cloud: Cloud) -> None:
    vehicle = supplied(cloud)

    def add(name: str) -> str:
        cloud.describe(name, 1, content=feature_file(SEAT).replace(SEAT.encode(), name.encode()))
        cloud.releases[name] = 1
        return f"features/{name}/1.toml"

    for number in range(255):
        add(f"seat-{number}")
    cloud.publish_catalogue()
    cloud.publish()
    assert len(vehicle.take(cloud.answer(vehicle.nonce)).rights.features) == 256
    path = add("seat-255")
    cloud.publish_catalogue()
    cloud.publish()
    small = replace(cloud.answer(vehicle.nonce), catalogue_targets={path: cloud.catalogue_files[path]})
    vehicle.refuses(small, LimitError, match="feature files in use")


def test_a_store_of_too_many_targets_is_refused_though_none_is_listed(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    many = {f"t{i}": b"" for i in range(513)}
    vehicle.stored = replace(vehicle.stored, director_targets={**vehicle.stored.director_targets, **many})
    with pytest.raises(LimitError):
        vehicle.boot()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"{}",
        b'{"signed":{"version":1.5}}',
        b'{"signed":{"version":NaN}}',
        b'{"signed":{"version":true}}',
        b'{"signed":{"version":0}}',
        b'{"signed":{"version":1,"version":2}}',
        b'{"signed":{"version":' + b"9" * 5_000 + b"}}",
        b"\xff\xfe",
        b'"' + b'\\"' * 8_000,
    ],
)
def test_metadata_of_another_form_is_refused(cloud: Cloud, content: bytes) -> None:
    vehicle = Vehicle(cloud)
    cloud.grant()
    update = with_part(cloud.answer(vehicle.nonce), "director", timestamp=content)
    with pytest.raises(MalformedError):
        vehicle.take(update)
    assert vehicle.floors == Floors()


def test_signed_numbers_beyond_every_calendar_are_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    for time_ms in (-1, 0, 10**18):
        vehicle.refuses(cloud.answer(vehicle.nonce, time_ms=time_ms), MalformedError, "time_ms")


# --- rights as a file, and owners --------------------------------------------


def test_an_offline_timestamp_over_the_stream_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.refuses(cloud.answer(vehicle.nonce, offline=True), ReplayError, "signed as offline")
    vehicle.refuses(cloud.answer(None, offline=True), ReplayError, "nonce")


def test_a_captured_answer_to_a_nonce_as_a_file_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.refuses(cloud.answer(vehicle.nonce), ReplayError, "not made as a file", as_file=True)
    both = cloud.answer(vehicle.nonce, offline=True)
    vehicle.refuses(both, ReplayError, "not made as a file", as_file=True)


def test_the_file_of_another_vehicle_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    other = Cloud(OTHER_VIN)
    other.grant()
    vehicle.refuses(other.answer(None, offline=True), VehicleMismatchError, as_file=True)


def test_an_older_file_after_a_newer_one_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    older, newer = cloud.answer(None, offline=True), cloud.answer(None, offline=True)
    vehicle.take_bundle(newer)
    vehicle.refuses(older, RollbackError, "timestamp", as_file=True)


def test_a_file_of_a_trusted_version_with_other_bytes_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    vehicle.take_bundle(cloud.answer(None, offline=True))
    cloud.director.timestamp_version -= 1
    again = cloud.answer(None, offline=True, time_ms=NOW_MS + 1)
    vehicle.refuses(again, ReplayError, "with other bytes", as_file=True)


def test_an_expired_file_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    bundle = cloud.answer(None, offline=True)
    vehicle.now_ms = NOW_MS + DAY_MS
    vehicle.refuses(bundle, ExpiredError, "timestamp", as_file=True)


def test_an_owner_epoch_that_goes_back_is_refused(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.owner_epoch = 3
    cloud.publish()
    vehicle.take(cloud.answer(vehicle.nonce))
    cloud.owner_epoch = 2
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, "owner epoch")


@pytest.mark.parametrize(
    ("notices", "error", "match"),
    [
        ({"tls.json": b"{}"}, MalformedError, "servers"),
        ({"tls.json": b'{"servers":[]}'}, MalformedError, "servers"),
        ({"tls.json": b'{"servers":[{}]}'}, MalformedError, "keys"),
        ({"tls.json": b'{"servers":[{},{},{},{},{},{},{},{},{}]}'}, LimitError, "servers"),
        ({"tls.json": b" " * 16_385}, LimitError, "bytes"),
        ({"tls.json": TLS % (b"AAAA", 2, 2)}, MalformedError, "not_before_ms"),
        ({"tls.json": TLS % (b"!", 1, 2)}, MalformedError, "base64"),
        ({"token-keys/1.cose": b"\xff"}, MalformedError, "token"),
        ({"token-keys/2.cose": ANNOUNCED}, DisagreementError, "epoch 2, the file itself 1"),
        ({"token-keys/1.cose": ANNOUNCED, "token-keys/2.cose": ANNOUNCED}, DisagreementError, "found 2"),
        ({"token-keys/0.cose": ANNOUNCED}, MalformedError, "token key"),
    ],
)
def test_token_keys_and_tls_anchors_out_of_their_form_are_refused(
    cloud: Cloud, notices: dict[str, bytes], error: type[TrustError], match: str
) -> None:
    vehicle = supplied(cloud)
    cloud.notices = notices
    cloud.publish()
    vehicle.refuses(cloud.answer(vehicle.nonce), error, match)


# --- fast-forward and rotation -------------------------------------------------


def run_ahead(cloud: Cloud, repository: str) -> None:
    """Let stolen online keys sign versions far ahead."""
    source = getattr(cloud, repository)
    source.timestamp_version = 2**40
    source.publish(2**40)
    if repository == "director":
        cloud.publish(2**40)
    cloud.catalogue_timestamp = cloud.catalogue.stamp()


@pytest.mark.parametrize("repository", ["director", "catalogue"])
def test_versions_run_ahead_are_undone_by_rotated_timestamp_and_snapshot_keys(
    cloud: Cloud, repository: str
) -> None:
    vehicle = supplied(cloud)
    run_ahead(cloud, repository)
    vehicle.take(cloud.answer(vehicle.nonce))
    source = getattr(cloud, repository)
    source.timestamp_version = 5
    source.version = 5
    cloud.publish() if repository == "director" else cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError, repository)
    source.rotate("timestamp")
    source.rotate("snapshot")
    cloud.publish() if repository == "director" else cloud.publish_catalogue()
    verdict = vehicle.take(cloud.answer(vehicle.nonce))
    assert SEAT in verdict.rights.entitlements
    assert getattr(vehicle.floors, repository).targets == 7
    assert vehicle.boot().rights == verdict.rights


def test_a_year_2099_by_stolen_online_keys_is_undone_by_a_threshold_root(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    year_2099_ms = 4_070_908_800_000
    cloud.at(year_2099_ms)
    cloud.director.edits["root"] = lambda root: setattr(
        root, "expires", root.expires + timedelta(days=36_500)
    )
    cloud.catalogue.edits["root"] = cloud.director.edits["root"]
    cloud.director.add_root()  # long-lived roots: else the year itself would be refused
    cloud.catalogue.add_root()
    cloud.publish()
    cloud.publish_catalogue()
    vehicle.take(cloud.answer(vehicle.nonce))
    vehicle.now_ms, ahead = year_2099_ms, vehicle.floors
    cloud.at(NOW_MS + DAY_MS)
    cloud.publish()
    cloud.publish_catalogue()
    vehicle.refuses(cloud.answer(vehicle.nonce), ExpiredError)
    cloud.director.rotate("timestamp")
    verdict = vehicle.take(cloud.answer(vehicle.nonce))
    assert starts_new_epoch(verdict, ahead)
    assert vehicle.floors.time_ms == NOW_MS + DAY_MS


@pytest.mark.parametrize("signers", [0, 1])
def test_rotated_online_keys_below_the_root_threshold_undo_nothing(cloud: Cloud, signers: int) -> None:
    vehicle = supplied(cloud)
    cloud.director.signers["root"] = [
        *cloud.director.keys["root"][:signers],
        *[CryptoSigner.generate_ed25519() for _ in range(2)],
    ]
    cloud.director.rotate("timestamp")
    vehicle.refuses(cloud.answer(vehicle.nonce), SignatureError, f"{signers}/2")


def test_an_old_vehicle_follows_ten_roots_at_once_and_refuses_a_gap_in_them(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    for role in ("root", "timestamp", "snapshot", "targets", "root") * 2:
        cloud.director.rotate(role)
        cloud.catalogue.rotate(role)
    cloud.publish()
    cloud.publish_catalogue()
    update = cloud.answer(vehicle.nonce)
    gap = (*update.catalogue.roots[:4], *update.catalogue.roots[5:])
    vehicle.refuses(with_part(update, "catalogue", roots=gap), SignatureError, "catalogue root")
    verdict = vehicle.take(update)
    assert (verdict.director.root, verdict.catalogue.root) == (11, 11)
    assert SEAT in vehicle.boot().rights.entitlements


def test_a_file_with_rotated_keys_undoes_stolen_ones_without_network(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    run_ahead(cloud, "director")
    vehicle.take(cloud.answer(vehicle.nonce))
    before = vehicle.floors
    cloud.director.timestamp_version = 5
    cloud.publish(5)
    vehicle.refuses(cloud.answer(None, offline=True), RollbackError, "director timestamp", as_file=True)
    cloud.director.rotate("timestamp")
    cloud.director.rotate("snapshot")
    cloud.publish(6)
    verdict = vehicle.take_bundle(cloud.answer(None, offline=True))
    assert starts_new_epoch(verdict, before)
    assert vehicle.floors.director.targets == 6
    assert SEAT in vehicle.boot().rights.entitlements


# --- catalogue and director disagree -------------------------------------------


@pytest.mark.parametrize(
    ("edit", "director_says", "catalogue_says"),
    [
        ({"hardware_ids": ["openfod-seat-9"]}, "hardware_id 'openfod-seat-1'", "openfod-seat-9"),
        ({"release_counter": 3}, "release_counter 1", "the catalogue 3"),
    ],
)
def test_what_disagrees_is_named_with_both_sides(
    cloud: Cloud, edit: dict[str, object], director_says: str, catalogue_says: str
) -> None:
    vehicle = supplied(cloud)
    cloud.catalogue.edits["targets"] = edit_custom(SEAT_FILE, **edit)
    cloud.publish_catalogue()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert message.startswith(f"{SEAT_FILE}: the director says {director_says}")
    assert catalogue_says in message


def test_a_feature_struck_from_the_catalogue_activates_nothing_new_and_names_both(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    del cloud.catalogue.targets[SEAT_FILE]
    cloud.publish_catalogue()
    message = vehicle.refuses(cloud.answer(vehicle.nonce), DisagreementError)
    assert "the director lists it, the catalogue does not" in message
    assert SEAT in vehicle.boot().rights.entitlements


def test_a_withdrawn_feature_goes_on_for_who_has_the_right(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    before = vehicle.boot().rights
    withdrawn = feature_file(SEAT, 2).replace(b"withdrawn = false", b"withdrawn = true")
    assert withdrawn != feature_file(SEAT, 2)
    cloud.describe(SEAT, 2, content=withdrawn)
    cloud.publish_catalogue()
    assert vehicle.take(cloud.answer(vehicle.nonce)).rights == before


def test_owner_epochs_and_counters_that_stolen_keys_ran_ahead_are_undone_by_the_root(cloud: Cloud) -> None:
    vehicle = supplied(cloud)
    cloud.owner_epoch, cloud.counters[SEAT] = 2**32 - 1, 2**32 - 2
    cloud.grant(SEAT)
    vehicle.take(cloud.answer(vehicle.nonce))
    assert vehicle.floors.owner_epoch == 2**32 - 1
    assert vehicle.floors.token_counters["seat-module", SEAT] == 2**32 - 1
    cloud.owner_epoch, cloud.counters[SEAT] = 1, 1
    cloud.grant(SEAT)
    vehicle.refuses(cloud.answer(vehicle.nonce), RollbackError)
    for role in ("timestamp", "snapshot", "targets"):
        cloud.director.rotate(role)
    cloud.grant(SEAT)
    vehicle.take(cloud.answer(vehicle.nonce))
    assert vehicle.floors.owner_epoch == 1
    assert vehicle.floors.token_counters["seat-module", SEAT] == cloud.counters[SEAT]
