"""Whatever is changed in an update: a TrustError, or what was signed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from securesystemslib.formats import encode_canonical
from support.trust_repo import LOGBOOK, VIN, Cloud, Vehicle, make_right

from agent.errors import TrustError
from agent.model import RepositoryBytes, TrustBytes, Verdict
from agent.trust.catalogue import parse_feature
from agent.trust.token import parse_token
from agent.trust.verifier import Floors, verify_stored, verify_update
from agent.wire import entitlements_from_bytes, trust_bytes_to_proto, trust_update_from_proto
from openfod.entitlement.v1 import entitlement_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

CLOUD = Cloud()
VEHICLE = Vehicle(CLOUD)
CLOUD.director.add_root()
CLOUD.catalogue.add_root()
CLOUD.grant()
CLOUD.grant(LOGBOOK)
UPDATE = CLOUD.answer(VEHICLE.nonce)

ROLES = ("timestamp", "snapshot", "targets")
PARTS = [
    *((repository, part) for repository in ("director", "catalogue") for part in (*ROLES, "roots")),
    *(("director_targets", path) for path in UPDATE.director_targets),
    *(("catalogue_targets", path) for path in UPDATE.catalogue_targets),
]


def verify(update: TrustBytes) -> Verdict:
    return verify_update(VEHICLE.stored, update, vin=VIN, nonce=VEHICLE.nonce, now_ms=0, floors=Floors())


GENUINE = verify(UPDATE)


def part_of(part: tuple[str, str]) -> bytes:
    holder: Any = getattr(UPDATE, part[0])
    if isinstance(holder, RepositoryBytes):
        holder = {"roots": holder.roots[0], **{r: getattr(holder, r) for r in ROLES}}
    content: bytes = holder[part[1]]
    return content


def with_part(part: tuple[str, str], content: bytes) -> TrustBytes:
    holder: Any = getattr(UPDATE, part[0])
    if isinstance(holder, RepositoryBytes):
        value: Any = (content,) if part[1] == "roots" else content
        holder = replace(holder, **{part[1]: value})
    else:
        holder = {**holder, part[1]: content}
    return replace(UPDATE, **{part[0]: holder})


def is_refused_or_genuine(update: TrustBytes) -> None:
    try:
        verdict = verify(update)
    except TrustError:
        return
    assert verdict.rights == GENUINE.rights
    assert verdict.signed_ms == GENUINE.signed_ms
    assert (verdict.director, verdict.catalogue) == (GENUINE.director, GENUINE.catalogue)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PARTS), st.data())
def test_any_changed_byte_is_refused_or_changes_nothing(part: tuple[str, str], data: st.DataObject) -> None:
    content = part_of(part)
    at = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat"]))
    extra = data.draw(st.binary(min_size=1, max_size=3))
    changed = {
        "flip": content[:at] + bytes([content[at] ^ extra[0]]) + content[at + 1 :],
        "cut": content[:at],
        "drop": content[:at] + content[at + len(extra) :],
        "insert": content[:at] + extra + content[at:],
        "repeat": content[:at] + content,
    }[change]
    is_refused_or_genuine(with_part(part, changed))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(PARTS), st.sampled_from(PARTS))
def test_any_part_in_the_place_of_another_is_refused(one: tuple[str, str], other: tuple[str, str]) -> None:
    is_refused_or_genuine(with_part(one, part_of(other)))


@settings(max_examples=150, deadline=None)
@given(st.sets(st.sampled_from(PARTS), min_size=1))
def test_any_missing_parts_are_refused(parts: set[tuple[str, str]]) -> None:
    update = UPDATE
    for name, part in parts:
        holder: Any = getattr(update, name)
        if isinstance(holder, RepositoryBytes):
            empty: Any = () if part == "roots" else b""
            holder = replace(holder, **{part: empty})
        else:
            holder = {path: content for path, content in holder.items() if path != part}
        update = replace(update, **{name: holder})
    try:
        verdict = verify(update)
    except TrustError:
        return
    assert verdict.rights == GENUINE.rights  # roots that were held back change no right


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PARTS), st.binary(max_size=300))
@example(PARTS[0], b'{"signed":{"version":1,"vin":"\\ud800"}}')
def test_arbitrary_bytes_in_any_field_end_in_a_trust_error(part: tuple[str, str], content: bytes) -> None:
    is_refused_or_genuine(with_part(part, content))


FIELDS = [
    "version",
    "expires",
    "spec_version",
    "meta",
    "targets",
    "keys",
    "roles",
    "vin",
    "nonce",
    "time_ms",
    "_type",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["timestamp", "snapshot", "targets", "roots"]), st.sampled_from(FIELDS), JSON)
def test_nonsense_under_genuine_signatures_raises_only_trust_errors(
    part: str, field: str, value: object
) -> None:
    content = nonsense(part_of(("director", part)), part, field, value)
    with suppress(TrustError):
        verify(with_part(("director", part), content))


def nonsense(content: bytes, part: str, field: str, value: object) -> bytes:
    """Set a field to any JSON value and sign it with the role's own keys."""
    document = json.loads(content)
    document["signed"][field] = value
    try:
        canonical = encode_canonical(document["signed"])
        assert canonical is not None
        keys = CLOUD.director.keys[part.removesuffix("s") if part == "roots" else part]
        document["signatures"] = [key.sign(canonical.encode()).to_dict() for key in keys]
    except UnicodeEncodeError:  # a lone surrogate cannot be signed: the old signatures stay
        pass
    return json.dumps(document).encode()


PARSERS: list[Callable[[bytes], object]] = [
    parse_feature,
    parse_token,
    lambda content: entitlements_from_bytes(content, VIN),
]


@pytest.mark.parametrize("parser", PARSERS, ids=["feature", "token", "entitlements"])
@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=400))
def test_a_parser_of_arbitrary_bytes_raises_only_trust_errors(
    parser: Callable[[bytes], object], content: bytes
) -> None:
    with suppress(TrustError):
        parser(content)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_changed_set_of_entitlements_is_read_or_refused(data: st.DataObject) -> None:
    whole = entitlement_pb2.VehicleEntitlements(
        vin=VIN, version=1, entitlements=[make_right(), make_right(LOGBOOK, 2)]
    ).SerializeToString()
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(0, 255))
    with suppress(TrustError):
        entitlements_from_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :], VIN)


def test_a_verdict_survives_storing_and_reading() -> None:
    message = trust_bytes_to_proto(GENUINE.state).SerializeToString()
    read = trust_update_from_proto(vehicle_service_pb2.TrustUpdate.FromString(message))
    assert read == GENUINE.state
    again = verify_stored(read, vin=VIN, as_of_ms=GENUINE.signed_ms, floors=Floors())
    assert again.rights == GENUINE.rights
