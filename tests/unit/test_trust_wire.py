"""Entitlements and updates are read within the ranges of their contracts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.trust_repo import LOGBOOK, OTHER_VIN, SEAT, VIN, make_right

from agent.errors import LimitError, MalformedError, VehicleMismatchError
from agent.model import PlanKind, Quota, RepositoryBytes, TrustBytes
from agent.wire import entitlements_from_bytes, trust_bytes_to_proto, trust_update_from_proto
from openfod.entitlement.v1 import entitlement_pb2 as pb
from openfod.vehicle.v1 import vehicle_service_pb2


def written(*rights: pb.Entitlement, vin: str = VIN, version: int = 1) -> bytes:
    return pb.VehicleEntitlements(vin=vin, version=version, entitlements=rights).SerializeToString()


def test_a_right_is_read_whole() -> None:
    right = make_right(
        validity=pb.Validity(
            not_before_s=1,
            not_after_s=2,
            odometer_from_m=3,
            odometer_to_m=4,
            ignition_cycles=5,
            operating_s=6,
        ),
        quotas=[
            pb.Quota(
                meter_id="active-time", limit=9, hard=True, warn_percent=[50, 80], period_starts_s=[1, 2]
            )
        ],
        parameters=[pb.Parameter(name="level", value="3")],
        display_terms=pb.DisplayTerms(
            price_minor=499,
            currency="EUR",
            period="P1M",
            renews=True,
            use_prices=[pb.UsePrice(meter_id="active-time", price_minor=3, per_units=60_000)],
        ),
    )
    version, owner_epoch, (read,) = entitlements_from_bytes(written(right, version=7), VIN)
    assert (version, owner_epoch) == (7, 1)  # an owner epoch of 0 is read as 1
    assert read.feature_id == SEAT
    assert read.plan_kind is PlanKind.SUBSCRIPTION
    assert (read.not_before_s, read.not_after_s, read.odometer_from_m, read.odometer_to_m) == (1, 2, 3, 4)
    assert (read.ignition_cycles, read.operating_s) == (5, 6)
    assert read.quotas == (Quota("active-time", 9, hard=True, warn_percent=(50, 80), period_starts_s=(1, 2)),)
    assert read.parameters == (("level", "3"),)
    assert not read.stays_with_vehicle
    assert read.display == {
        "price_minor": 499,
        "currency": "EUR",
        "period": "P1M",
        "renews": True,
        "entry_minor": 0,
        "payment_failed": False,
        "use_prices": (
            {
                "meter_id": "active-time",
                "price_minor": 3,
                "per_units": 60_000,
                "dimension": "",
                "value": "",
                "included_units": 0,
                "tiers": (),
            },
        ),
    }


def test_the_rights_of_another_vehicle_are_refused() -> None:
    with pytest.raises(VehicleMismatchError) as caught:
        entitlements_from_bytes(written(make_right(), vin=OTHER_VIN), VIN)
    assert (caught.value.expected, caught.value.found) == (VIN, OTHER_VIN)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("entitlement_id", {"entitlement_id": "ent-1"}),
    ("feature_id", {"feature_id": "Seat"}),
    ("min_release", {"min_release": 0}),
    ("account", {"account": "me@example.org"}),
    ("plan_kind", {"plan_kind": pb.PLAN_KIND_UNSPECIFIED}),
    ("plan_kind", {"plan_kind": 7}),
    ("plan_id", {"plan_id": ""}),
    ("plan_version", {"plan_version": 0}),
    ("offline_grace_s", {"offline_grace_s": 7_776_001}),
    ("resale", {"resale": pb.RESALE_UNSPECIFIED}),
    ("resale", {"resale": 3}),
    ("trace_id", {"trace_id": "0AF7651916CD43DD8448EB211C80319C"}),
    ("not_before_s", {"validity": pb.Validity(not_before_s=-1)}),
    ("not_after_s", {"validity": pb.Validity(not_before_s=5, not_after_s=5)}),
    ("not_after_s", {"validity": pb.Validity(not_after_s=2**62)}),
    ("odometer_to_m", {"validity": pb.Validity(odometer_from_m=5, odometer_to_m=5)}),
    ("perpetual", {"plan_kind": pb.PLAN_KIND_PERPETUAL, "validity": pb.Validity(not_after_s=5)}),
    ("perpetual", {"plan_kind": pb.PLAN_KIND_PERPETUAL, "validity": pb.Validity(ignition_cycles=5)}),
    ("quotas.meter_id", {"quotas": [pb.Quota(meter_id="", limit=1)]}),
    ("quotas.limit", {"quotas": [pb.Quota(meter_id="m", limit=0)]}),
    ("quotas.warn_percent", {"quotas": [pb.Quota(meter_id="m", limit=1, warn_percent=[80, 50])]}),
    ("quotas.warn_percent", {"quotas": [pb.Quota(meter_id="m", limit=1, warn_percent=[101])]}),
    ("quotas.period_starts_s", {"quotas": [pb.Quota(meter_id="m", limit=1, period_starts_s=[5, 5])]}),
    ("quotas.period_starts_s", {"quotas": [pb.Quota(meter_id="m", limit=1, period_starts_s=[-1])]}),
    ("quotas.meter_id", {"quotas": [pb.Quota(meter_id="m", limit=1)] * 2}),
    ("parameters.name", {"parameters": [pb.Parameter(name=" ")]}),
    ("parameters.name", {"parameters": [pb.Parameter(name="a")] * 2}),
    ("display_terms", {"display_terms": None}),
    ("currency", {"display_terms": pb.DisplayTerms(currency="eur")}),
    ("period", {"display_terms": pb.DisplayTerms(currency="EUR", period="monthly")}),
    (
        "per_units",
        {"display_terms": pb.DisplayTerms(currency="EUR", use_prices=[pb.UsePrice(meter_id="m")])},
    ),
]


@pytest.mark.parametrize(("field", "values"), WRONG, ids=[f"{f}-{i}" for i, (f, _) in enumerate(WRONG)])
def test_a_field_out_of_its_range_is_refused_by_name(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(MalformedError, match=field) as caught:
        entitlements_from_bytes(written(make_right(**values)), VIN)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("rights", written(*(make_right(f"feature-{i}", i) for i in range(257)))),
        ("bytes", b"\x00" * 65_537),
        ("quotas", written(make_right(quotas=[pb.Quota(meter_id=f"m{i}", limit=1) for i in range(17)]))),
        (
            "warn_percent",
            written(make_right(quotas=[pb.Quota(meter_id="m", limit=1, warn_percent=range(1, 10))])),
        ),
        (
            "period_starts_s",
            written(make_right(quotas=[pb.Quota(meter_id="m", limit=1, period_starts_s=range(1, 18))])),
        ),
        ("parameters", written(make_right(parameters=[pb.Parameter(name=f"p{i}") for i in range(17)]))),
        ("value", written(make_right(parameters=[pb.Parameter(name="p", value="x" * 65)]))),
    ],
)
def test_too_much_is_refused_by_name(what: str, content: bytes) -> None:
    with pytest.raises(LimitError, match=what):
        entitlements_from_bytes(content, VIN)


def test_a_feature_or_an_id_that_stands_twice_is_refused() -> None:
    with pytest.raises(MalformedError, match="feature_id"):
        entitlements_from_bytes(written(make_right(SEAT, 1), make_right(SEAT, 2)), VIN)
    with pytest.raises(MalformedError, match="entitlement_id"):
        entitlements_from_bytes(written(make_right(SEAT, 1), make_right(LOGBOOK, 1)), VIN)


def test_an_unknown_field_is_refused() -> None:
    unknown_in_right = make_right()
    unknown_in_right.MergeFromString(b"\xf8\x07\x01")  # field 127
    for content in (written() + b"\xf8\x07\x01", written(unknown_in_right)):
        with pytest.raises(MalformedError, match="only fields that this agent knows"):
            entitlements_from_bytes(content, VIN)


def test_version_0_and_a_malformed_message_are_refused() -> None:
    with pytest.raises(MalformedError, match="version"):
        entitlements_from_bytes(written(version=0), VIN)
    with pytest.raises(MalformedError, match="not a VehicleEntitlements"):
        entitlements_from_bytes(b"\xff", VIN)
    with pytest.raises(MalformedError, match="vin"):
        entitlements_from_bytes(b"", VIN)


def test_an_update_is_read_and_written_back() -> None:
    value = TrustBytes(
        RepositoryBytes((b"r",), b"t", b"s", b"g"), RepositoryBytes(), {"entitlements.pb": b"e"}, {"f": b"c"}
    )
    assert trust_update_from_proto(trust_bytes_to_proto(value)) == value


TOO_MUCH: list[tuple[str, Callable[[vehicle_service_pb2.TrustUpdate], object]]] = [
    ("director root files", lambda m: m.director.roots.extend([b""] * 33)),
    ("catalogue root, bytes", lambda m: m.catalogue.roots.append(b" " * 65_537)),
    ("director timestamp", lambda m: setattr(m.director, "timestamp", b" " * 16_385)),
    ("catalogue snapshot", lambda m: setattr(m.catalogue, "snapshot", b" " * 65_537)),
    ("catalogue targets", lambda m: setattr(m.catalogue, "targets", b" " * 524_289)),
    ("director target files", lambda m: [m.director_targets.add(path=str(i)) for i in range(513)]),
    ("catalogue target files", lambda m: [m.catalogue_targets.add(path=str(i)) for i in range(257)]),
    ("path", lambda m: m.director_targets.add(path="p" * 257)),
    ("director target 'p', bytes", lambda m: m.director_targets.add(path="p", content=b" " * 65_537)),
]


@pytest.mark.parametrize(("what", "overfill"), TOO_MUCH, ids=[what for what, _ in TOO_MUCH])
def test_an_update_beyond_its_limits_is_refused_by_name(
    what: str, overfill: Callable[[vehicle_service_pb2.TrustUpdate], object]
) -> None:
    message = vehicle_service_pb2.TrustUpdate()
    overfill(message)
    with pytest.raises(LimitError, match=what):
        trust_update_from_proto(message)


def test_two_files_at_one_path_are_refused() -> None:
    message = vehicle_service_pb2.TrustUpdate()
    message.director_targets.add(path="p", content=b"1")
    message.director_targets.add(path="p", content=b"2")
    with pytest.raises(MalformedError, match="path"):
        trust_update_from_proto(message)
