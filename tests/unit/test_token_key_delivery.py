"""A token key reaches an ECU that does not know it: the agent brings the announcement, once in each job."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.edge_vehicle import ANNOUNCE, INSTALL, READ, SESSION, EdgeVehicle
from support.trust_repo import Cloud, make_announcement


@pytest.fixture
def cloud() -> Cloud:
    """A cloud whose token key the ECU knows as epoch 1."""
    return Cloud()


@pytest.fixture
def vehicle(cloud: Cloud) -> EdgeVehicle:
    """A parked vehicle that has heard of no right."""
    return EdgeVehicle(cloud)


READING = bytes.fromhex("220F41")


def rotate(cloud: Cloud, vehicle: EdgeVehicle, *, listed: bool = True) -> bytes:
    """The cloud signs tokens with a new key from now on; returns its announcement."""
    cloud.token_key = Ed25519PrivateKey.generate()
    content = vehicle.announcement(2, cloud.token_key)
    if listed:
        cloud.notices = {"token-keys/2.cose": content}
    return content


def token(cloud: Cloud) -> bytes:
    return INSTALL + cloud.tokens["seat-heating"]


def test_an_ecu_that_lacks_the_key_gets_it_and_takes_the_token_in_the_same_job(
    cloud: Cloud, vehicle: EdgeVehicle
) -> None:
    announcement = rotate(cloud, vehicle)
    cloud.grant()
    vehicle.receive(cloud.answer)
    assert vehicle.refusals == []
    assert vehicle.requests == [
        READ,
        SESSION,
        token(cloud),
        ANNOUNCE + announcement,
        token(cloud),
        READ,
        READING,
    ]
    assert (vehicle.view().state, vehicle.is_on) == ("ACTIVE", True)
    assert set(vehicle.seat.state.token_keys) == {1, 2}


def test_an_ecu_that_knows_the_key_is_not_told_again(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    announcement = rotate(cloud, vehicle)
    vehicle.seat.learn_key(announcement)
    cloud.grant()
    vehicle.receive(cloud.answer)
    assert vehicle.is_on
    assert ANNOUNCE + announcement not in vehicle.requests


def test_a_token_that_burns_brings_its_key_as_well(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    cloud.grant()
    vehicle.receive(cloud.answer)
    assert vehicle.is_on
    announcement = rotate(cloud, vehicle)
    cloud.revoke()
    vehicle.receive(cloud.answer)
    assert vehicle.requests.count(ANNOUNCE + announcement) == 1
    assert (vehicle.view().state, vehicle.is_on) == ("LOCKED", False)
    assert vehicle.seat.state.rights[1].counter == 2


def test_without_a_listed_key_the_refusal_is_a_fault_at_once(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    rotate(cloud, vehicle, listed=False)
    cloud.grant()
    vehicle.receive(cloud.answer)
    assert (vehicle.view().nrc, vehicle.is_on) == (0x33, False)
    assert not [r for r in vehicle.requests if r.startswith(ANNOUNCE)]


def test_an_announcement_that_helps_nothing_is_sent_once_in_a_job_and_ends_in_a_fault(
    cloud: Cloud, vehicle: EdgeVehicle
) -> None:
    # Genuine, but of another key than the one that signed the token.
    cloud.notices = {"token-keys/2.cose": vehicle.announcement(2, Ed25519PrivateKey.generate())}
    cloud.token_key = Ed25519PrivateKey.generate()
    cloud.grant()
    vehicle.receive(cloud.answer)
    jobs = vehicle.requests.count(SESSION)
    announced = [r for r in vehicle.requests if r.startswith(ANNOUNCE)]
    assert jobs >= 1
    assert len(announced) == jobs
    assert vehicle.requests.count(token(cloud)) == 2 * jobs
    assert (vehicle.view().nrc, vehicle.is_on) == (0x33, False)
    assert vehicle.view().state in {"FAULT", "PENDING"}


def test_a_forged_announcement_is_refused_by_the_ecu_and_changes_nothing(
    cloud: Cloud, vehicle: EdgeVehicle
) -> None:
    before = vehicle.seat.state
    thief = cloud.token_key = Ed25519PrivateKey.generate()
    cloud.notices = {"token-keys/2.cose": make_announcement(thief, 2, thief.public_key().public_bytes_raw())}
    cloud.grant()
    vehicle.receive(cloud.answer)
    assert ANNOUNCE + cloud.notices["token-keys/2.cose"] in vehicle.requests
    assert vehicle.seat.state == before
    assert (vehicle.view().nrc, vehicle.is_on) == (0x33, False)


def test_a_refusal_for_another_reason_brings_no_key(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    announcement = rotate(cloud, vehicle)
    vehicle.seat.learn_key(announcement)
    cloud.counters["seat-heating"] = 4
    cloud.grant()
    vehicle.receive(cloud.answer)
    stored = vehicle.seat.state.rights[1]
    vehicle.seat._state = replace(  # as if a workshop had put a newer token into it
        vehicle.seat.state, rights={1: replace(stored, counter=9, released=True)}
    )
    vehicle.run_ms(15_000)
    assert vehicle.view().nrc == 0x24
    assert ANNOUNCE + announcement not in vehicle.requests
