"""A stolen director: whoever holds all of its keys still puts nothing but the catalogue's bytes on a bus.

The catalogue is genuine: its keys are offline and are not among the loot. All parts from the verifier to
ISO-TP are the agent's own; the seat module is the simulated one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.edge_vehicle import ANNOUNCE, INSTALL, READ, RELEASE, SESSION, EdgeVehicle
from support.trust_repo import LOGBOOK, SEAT, SEAT_ECU, Cloud, feature_file, make_announcement, make_token
from tuf.api.metadata import TargetFile

from agent.errors import DisagreementError, MalformedError, TrustError
from agent.trust.token import parse_announcement, parse_token

PATH = f"features/{SEAT}/1.toml"
TOKEN_PATH = f"tokens/{SEAT_ECU[0]}/{SEAT}.cose"
SEAT_ID, DEFAULT_SESSION = 0x744, bytes.fromhex("1001")


@pytest.fixture
def cloud() -> Cloud:
    """The cloud as the thief finds it: its signers for the director are now the thief's."""
    return Cloud()


@pytest.fixture
def vehicle(cloud: Cloud) -> EdgeVehicle:
    """A parked vehicle without any right."""
    return EdgeVehicle(cloud)


def assert_only_the_catalogue_was_sent(vehicle: EdgeVehicle) -> None:
    """Every frame went to the seat module, and every request is one that the catalogue's entry allows."""
    assert {(frame.bus, frame.can_id, frame.is_extended) for frame in vehicle.frames} <= {
        ("body", SEAT_ID, False)
    }
    for request in vehicle.requests:
        if request.startswith(INSTALL):
            parse_token(request[4:])
        elif request.startswith(ANNOUNCE):
            parse_announcement(request[4:])
        else:
            assert request in {SESSION, DEFAULT_SESSION, READ, RELEASE}, request.hex()


def list_target(
    cloud: Cloud, path: str, content: bytes, *, ecu: tuple[str, str] = SEAT_ECU, counter: int = 1
) -> None:
    """Signs a set with one more target, or with other bytes under a path, as only the director's keys can."""
    target = TargetFile.from_data(path, content, ["sha256"])
    target.unrecognized_fields["custom"] = {
        "ecu_identifier": ecu[0],
        "hardware_id": ecu[1],
        "release_counter": counter,
    }
    cloud.director.targets[path] = target
    cloud.files[path] = content
    # The set's version stands in its entitlements, so the same set is signed once more.
    cloud.director.publish(cloud.director.version)


def edited(old: str, new: str) -> bytes:
    text = feature_file(SEAT).decode()
    assert old in text
    return text.replace(old, new).encode()


OTHER_BYTES = {
    "another request that activates": edited('"31 01 0F 0D"', '"31 01 FF 00"'),
    "another request that releases": edited('"31 01 0F 0E 00 01"', '"2E F1 90 00 01"'),
    "another ECU's address": edited("request_id = 0x744", "request_id = 0x7E0"),
    "another bus": edited('bus = "body"', 'bus = "powertrain"'),
    "the programming session": edited("session = 0x03", "session = 0x02"),
    "another identifier to read": edited("did = 0x0F21", "did = 0xF190"),
    "a condition that always holds": edited(
        "Vehicle.Speed < 1.0 && Vehicle.LowVoltageSystemState == 'ON'", "true"
    ),
    "no token": edited('kind = "token"', 'kind = "none"'),
}


@pytest.mark.parametrize("content", OTHER_BYTES.values(), ids=OTHER_BYTES.keys())
def test_other_bytes_for_a_feature_of_the_catalogue_are_refused(
    cloud: Cloud, vehicle: EdgeVehicle, content: bytes
) -> None:
    cloud.grant()
    list_target(cloud, PATH, content)
    assert_refused(cloud, vehicle, DisagreementError)


def assert_refused(cloud: Cloud, vehicle: EdgeVehicle, error: type[TrustError]) -> None:
    state, trusted = vehicle.seat.state, vehicle.trusted
    vehicle.receive(cloud.answer)
    assert [type(refusal) for refusal in vehicle.refusals] == [error], vehicle.refusals
    assert vehicle.trusted is trusted
    assert vehicle.seat.state == state
    assert vehicle.frames == []
    assert vehicle.engine.features() == ()


@pytest.mark.parametrize("release", [1, 2])
def test_a_feature_that_the_catalogue_does_not_know_is_refused(
    cloud: Cloud, vehicle: EdgeVehicle, release: int
) -> None:
    content = edited(f'id = "{SEAT}"', 'id = "brake-release"')
    cloud.grant()
    list_target(cloud, f"features/brake-release/{release}.toml", content, counter=release)
    assert_refused(cloud, vehicle, DisagreementError)


def test_a_newer_release_of_the_thief_s_own_making_is_refused(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    cloud.grant()
    del cloud.director.targets[PATH]
    list_target(cloud, f"features/{SEAT}/2.toml", feature_file(SEAT, 2), counter=2)
    assert_refused(cloud, vehicle, DisagreementError)


@pytest.mark.parametrize("ecu", ["brake-module", "head-unit", "seat-module-2"])
def test_a_token_to_another_ecu_is_refused(cloud: Cloud, vehicle: EdgeVehicle, ecu: str) -> None:
    cloud.grant()
    token = cloud.tokens[SEAT]
    list_target(cloud, f"tokens/{ecu}/{SEAT}.cose", token, ecu=(ecu, SEAT_ECU[1]))
    assert_refused(cloud, vehicle, DisagreementError)


def test_a_token_for_a_feature_without_an_ecu_is_refused(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    cloud.grant(LOGBOOK)
    list_target(cloud, f"tokens/{SEAT_ECU[0]}/{LOGBOOK}.cose", make_token(cloud.token_key))
    assert_refused(cloud, vehicle, DisagreementError)


@pytest.mark.parametrize("ecu", [("brake-module", SEAT_ECU[1]), (SEAT_ECU[0], "openfod-brake-1")])
def test_a_feature_moved_to_another_ecu_is_refused(
    cloud: Cloud, vehicle: EdgeVehicle, ecu: tuple[str, str]
) -> None:
    cloud.grant()
    list_target(cloud, PATH, feature_file(SEAT), ecu=ecu)
    assert_refused(cloud, vehicle, DisagreementError)


@pytest.mark.parametrize(
    "payload", [b"", bytes(64), bytes.fromhex("2EF19001"), bytes.fromhex("31010203") * 60, b"\xff" * 257]
)
def test_bytes_that_are_no_token_are_not_carried_as_one(
    cloud: Cloud, vehicle: EdgeVehicle, payload: bytes
) -> None:
    cloud.grant()
    list_target(cloud, TOKEN_PATH, payload)
    state = vehicle.seat.state
    vehicle.receive(cloud.answer)
    assert len(vehicle.refusals) == 1
    assert vehicle.frames == []
    assert vehicle.seat.state == state


def test_bytes_that_are_no_token_key_are_not_carried_as_one(cloud: Cloud, vehicle: EdgeVehicle) -> None:
    cloud.notices = {"token-keys/2.cose": bytes.fromhex("2EF19001") * 8}
    cloud.grant()
    assert_refused(cloud, vehicle, MalformedError)


# --- what the director's keys do allow: the ECU has the last word ------------------------


def own_token(_cloud: Cloud) -> bytes:
    return make_token(Ed25519PrivateKey.generate(), terms={5: 200})


def token_of_another_vehicle(cloud: Cloud) -> bytes:
    return make_token(cloud.token_key, terms={5: 200}, vin="WFDSEAT10N0000002")


@pytest.mark.parametrize("make", [own_token, token_of_another_vehicle])
def test_a_right_of_the_thief_s_own_with_a_token_of_another_key_or_vehicle_heats_nothing(
    cloud: Cloud, vehicle: EdgeVehicle, make: Callable[[Cloud], bytes]
) -> None:
    cloud.grant()
    cloud.tokens[SEAT] = make(cloud)
    cloud.publish()
    state = vehicle.seat.state
    vehicle.receive(cloud.answer)
    vehicle.run_ms(20_000)
    assert vehicle.refusals == []
    assert INSTALL + cloud.tokens[SEAT] in vehicle.requests
    assert (vehicle.view().nrc, vehicle.is_on) == (0x33, False)
    assert vehicle.seat.state == state
    assert_only_the_catalogue_was_sent(vehicle)


def test_a_token_key_of_the_thief_s_own_is_carried_and_refused_by_the_ecu(
    cloud: Cloud, vehicle: EdgeVehicle
) -> None:
    thief = Ed25519PrivateKey.generate()
    public = thief.public_key().public_bytes_raw()
    cloud.notices = {"token-keys/2.cose": make_announcement(thief, 2, public)}
    cloud.token_key = thief
    cloud.grant()
    state = vehicle.seat.state
    vehicle.receive(cloud.answer)
    vehicle.run_ms(20_000)
    assert ANNOUNCE + cloud.notices["token-keys/2.cose"] in vehicle.requests
    assert not vehicle.is_on
    assert vehicle.seat.state == state
    assert_only_the_catalogue_was_sent(vehicle)


def test_a_right_in_motion_waits_for_the_catalogue_s_condition_whoever_signed_it(
    cloud: Cloud, vehicle: EdgeVehicle
) -> None:
    vehicle.speed_kmh = 90.0
    vehicle.run_ms(100)
    cloud.grant()
    vehicle.receive(cloud.answer)
    vehicle.run_ms(5000)
    assert vehicle.view().state == "PENDING"
    assert set(vehicle.requests) == {READ}
    assert_only_the_catalogue_was_sent(vehicle)
