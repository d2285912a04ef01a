"""Turns protobuf messages of the trust path into the agent's values, and back.

Does no I/O and reads no clock. What a trust update carries is only bounded
here, not trusted: `agent.trust.verifier` decides. What `entitlements_from_bytes`
reads has been verified already; it is still checked field by field against
the ranges that `entitlement.proto` gives, because a signature says who wrote a
field and not that it makes sense.
Raises only TrustError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from google.protobuf.message import DecodeError, Message

from agent.errors import LimitError, MalformedError, VehicleMismatchError
from agent.model import Entitlement, PlanKind, Quota, RepositoryBytes, TrustBytes
from openfod.entitlement.v1 import entitlement_pb2
from openfod.vehicle.v1 import vehicle_service_pb2

MAX_ROOTS = 32
MAX_ROOT_BYTES = 65_536
MAX_TIMESTAMP_BYTES = 16_384
MAX_SNAPSHOT_BYTES = 65_536
MAX_TARGETS_BYTES = 524_288
MAX_DIRECTOR_TARGETS = 512
MAX_CATALOGUE_TARGETS = 256
MAX_PATH_CHARS = 256
MAX_TARGET_BYTES = 65_536

MAX_ENTITLEMENTS_BYTES = 65_536
MAX_ENTITLEMENTS = 256
MAX_QUOTAS = 16
MAX_WARNINGS = 8
MAX_PERIOD_STARTS = 16
MAX_TIERS = 8
PERCENT = 100
MAX_PARAMETERS = 16
MAX_USE_PRICES = 16
MAX_PARAMETER_VALUE_BYTES = 64
MAX_OFFLINE_GRACE_S = 7_776_000  # 90 days
MAX_UNIX_S = 253_402_300_799  # 9999-12-31T23:59:59Z
MAX_SHOWN_CHARS = 60  # of a found value in an error's text

VIN = re.compile(r"[A-HJ-NPR-Z0-9]{17}")  # ISO 3779: no I, O, Q
FEATURE_ID = re.compile(r"[a-z][a-z0-9-]{1,47}")
_ENTITLEMENT_ID = re.compile(r"ent-[0-9a-f]{16}")
_ACCOUNT = re.compile(r"acc-[0-9a-z-]{1,40}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # plans, meters and parameters
_CURRENCY = re.compile(r"[A-Z]{3}")
_PERIOD = re.compile(r"|P(?=[0-9T])([0-9]{1,4}[YMWD]){0,4}(T([0-9]{1,4}[HMS]){1,3})?")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")


def shown(value: object) -> str:
    """Show a value that came from outside: printable ASCII of bounded length."""
    text = ascii(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}... ({len(text)} characters)"


def bounded(what: str, *, limit: int, found: int) -> None:
    """Raise LimitError if `found` (bytes, characters or a count) is above the limit."""
    if found > limit:
        raise LimitError(what, limit=limit, found=found)


def trust_update_from_proto(msg: vehicle_service_pb2.TrustUpdate) -> TrustBytes:
    """Take the bytes out of a trust update.

    Args:
        msg: as received; a part that is empty has not changed.

    Raises:
        LimitError: a part is larger than vehicle_service.proto allows.
        MalformedError: two target files of one repository have the same path.
    """
    return bounded_trust_bytes(
        TrustBytes(
            director=_repository(msg.director),
            catalogue=_repository(msg.catalogue),
            director_targets=_files("director", msg.director_targets, MAX_DIRECTOR_TARGETS),
            catalogue_targets=_files("catalogue", msg.catalogue_targets, MAX_CATALOGUE_TARGETS),
        )
    )


def trust_bytes_to_proto(value: TrustBytes) -> vehicle_service_pb2.TrustUpdate:
    """Put an update or a stored state into a message: the inverse of `trust_update_from_proto`."""
    return vehicle_service_pb2.TrustUpdate(
        director=_repository_to_proto(value.director),
        catalogue=_repository_to_proto(value.catalogue),
        director_targets=_files_to_proto(value.director_targets),
        catalogue_targets=_files_to_proto(value.catalogue_targets),
    )


def bounded_trust_bytes(value: TrustBytes) -> TrustBytes:
    """Return the value if every part is within the limits of vehicle_service.proto.

    Raises:
        LimitError: a size or a count is above its limit.
    """
    for name, repository in (("director", value.director), ("catalogue", value.catalogue)):
        bounded(f"{name} root files", limit=MAX_ROOTS, found=len(repository.roots))
        for root in repository.roots:
            bounded(f"{name} root, bytes", limit=MAX_ROOT_BYTES, found=len(root))
        bounded(f"{name} timestamp, bytes", limit=MAX_TIMESTAMP_BYTES, found=len(repository.timestamp))
        bounded(f"{name} snapshot, bytes", limit=MAX_SNAPSHOT_BYTES, found=len(repository.snapshot))
        bounded(f"{name} targets, bytes", limit=MAX_TARGETS_BYTES, found=len(repository.targets))
    _bounded_files("director", value.director_targets, MAX_DIRECTOR_TARGETS)
    _bounded_files("catalogue", value.catalogue_targets, MAX_CATALOGUE_TARGETS)
    return value


def entitlements_from_bytes(content: bytes, vin: str) -> tuple[int, int, tuple[Entitlement, ...]]:
    """Read the verified file `entitlements.pb`.

    A field that this agent does not know is refused like a wrong one: a term
    that is not understood must not be read as "no such term".

    Args:
        content: serialised VehicleEntitlements.
        vin: VIN of this vehicle.

    Returns:
        Version of the set, from 1, owner epoch, from 1 (0 is read as 1), and its rights.

    Raises:
        LimitError: more bytes or rights than allowed.
        MalformedError: not a VehicleEntitlements, or a field out of its range.
        VehicleMismatchError: the set of another vehicle.
    """
    bounded("entitlements, bytes", limit=MAX_ENTITLEMENTS_BYTES, found=len(content))
    message = entitlement_pb2.VehicleEntitlements()
    try:
        message.ParseFromString(content)
    except DecodeError as error:
        raise MalformedError(f"entitlements: not a VehicleEntitlements message: {error}") from error
    _require_known_fields(message)
    if message.vin != vin:
        _require_match("entitlements.vin", VIN, message.vin)
        raise VehicleMismatchError("the set of entitlements", expected=vin, found=message.vin)
    _require(message.version >= 1, "entitlements.version", "1 or more", message.version)
    bounded("entitlements, rights", limit=MAX_ENTITLEMENTS, found=len(message.entitlements))
    rights = tuple(_entitlement(f"entitlements[{i}]", e) for i, e in enumerate(message.entitlements))
    _require_unique("entitlements: entitlement_id", (right.entitlement_id for right in rights))
    _require_unique("entitlements: feature_id", (right.feature_id for right in rights))
    return message.version, max(1, message.owner_epoch), rights


def _repository(msg: vehicle_service_pb2.RepositoryMetadata) -> RepositoryBytes:
    return RepositoryBytes(tuple(msg.roots), msg.timestamp, msg.snapshot, msg.targets)


def _repository_to_proto(value: RepositoryBytes) -> vehicle_service_pb2.RepositoryMetadata:
    return vehicle_service_pb2.RepositoryMetadata(
        roots=value.roots, timestamp=value.timestamp, snapshot=value.snapshot, targets=value.targets
    )


def _files(name: str, files: Iterable[vehicle_service_pb2.TargetFile], limit: int) -> dict[str, bytes]:
    listed = list(files)
    bounded(f"{name} target files", limit=limit, found=len(listed))
    _require_unique(f"{name} target files: path", (file.path for file in listed))
    return {file.path: file.content for file in listed}


def _files_to_proto(files: Mapping[str, bytes]) -> list[vehicle_service_pb2.TargetFile]:
    return [vehicle_service_pb2.TargetFile(path=path, content=files[path]) for path in sorted(files)]


def _bounded_files(name: str, files: Mapping[str, bytes], limit: int) -> None:
    bounded(f"{name} target files", limit=limit, found=len(files))
    for path, content in files.items():
        bounded(f"{name} target path, characters", limit=MAX_PATH_CHARS, found=len(path))
        bounded(f"{name} target {shown(path)}, bytes", limit=MAX_TARGET_BYTES, found=len(content))


def _require(condition: bool, field: str, expected: str, found: object) -> None:
    if not condition:
        raise MalformedError(f"{field}: expected {expected}, found {shown(found)}")


def _require_match(field: str, pattern: re.Pattern[str], found: str) -> None:
    _require(pattern.fullmatch(found) is not None, field, f"text of the form {pattern.pattern}", found)


def _require_unique(field: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        _require(value not in seen, field, "each value once", value)
        seen.add(value)


def _require_ascending(field: str, values: Sequence[int], highest: int) -> None:
    for before, value in zip((0, *values), values, strict=False):
        _require(before < value <= highest, field, f"{before + 1} to {highest}, ascending", value)


def _require_known_fields(message: Message) -> None:
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    surplus_bytes = message.ByteSize() - known.ByteSize()
    _require(
        surplus_bytes == 0, "entitlements", "only fields that this agent knows", f"{surplus_bytes} bytes"
    )


def _entitlement(at: str, message: entitlement_pb2.Entitlement) -> Entitlement:
    _require_match(f"{at}.entitlement_id", _ENTITLEMENT_ID, message.entitlement_id)
    _require_match(f"{at}.feature_id", FEATURE_ID, message.feature_id)
    _require(message.min_release >= 1, f"{at}.min_release", "1 or more", message.min_release)
    _require_match(f"{at}.account", _ACCOUNT, message.account)
    kinds = {kind.value for kind in PlanKind}
    _require(message.plan_kind in kinds, f"{at}.plan_kind", "a known plan kind", message.plan_kind)
    _require_match(f"{at}.plan_id", _NAME, message.plan_id)
    _require(message.plan_version >= 1, f"{at}.plan_version", "1 or more", message.plan_version)
    _require(
        message.offline_grace_s <= MAX_OFFLINE_GRACE_S,
        f"{at}.offline_grace_s",
        f"0 to {MAX_OFFLINE_GRACE_S}",
        message.offline_grace_s,
    )
    stays = message.resale == entitlement_pb2.RESALE_STAYS_WITH_VEHICLE
    goes = message.resale == entitlement_pb2.RESALE_GOES_WITH_ACCOUNT
    _require(stays or goes, f"{at}.resale", "stays with vehicle or goes with account", message.resale)
    _require_match(f"{at}.trace_id", _TRACE_ID, message.trace_id)
    kind = PlanKind(message.plan_kind)
    validity = message.validity
    _check_validity(f"{at}.validity", validity, kind)
    return Entitlement(
        entitlement_id=message.entitlement_id,
        feature_id=message.feature_id,
        min_release=message.min_release,
        account=message.account,
        plan_kind=kind,
        plan_id=message.plan_id,
        plan_version=message.plan_version,
        not_before_s=validity.not_before_s,
        not_after_s=validity.not_after_s,
        odometer_from_m=validity.odometer_from_m,
        odometer_to_m=validity.odometer_to_m,
        ignition_cycles=validity.ignition_cycles,
        operating_s=validity.operating_s,
        offline_grace_s=message.offline_grace_s,
        quotas=_quotas(f"{at}.quotas", message.quotas),
        parameters=_parameters(f"{at}.parameters", message.parameters),
        stays_with_vehicle=stays,
        display=_display(f"{at}.display_terms", message),
        trace_id=message.trace_id,
    )


def _check_validity(at: str, validity: entitlement_pb2.Validity, kind: PlanKind) -> None:
    begin, end = validity.not_before_s, validity.not_after_s
    _require(0 <= begin <= MAX_UNIX_S, f"{at}.not_before_s", f"0 to {MAX_UNIX_S}", begin)
    _require(
        end == 0 or begin < end <= MAX_UNIX_S,
        f"{at}.not_after_s",
        f"0, or after not_before_s {begin} and at most {MAX_UNIX_S}",
        end,
    )
    _require(
        validity.odometer_to_m == 0 or validity.odometer_from_m < validity.odometer_to_m,
        f"{at}.odometer_to_m",
        f"0, or more than odometer_from_m {validity.odometer_from_m}",
        validity.odometer_to_m,
    )
    if kind is PlanKind.PERPETUAL:  # what was bought outright works for ever
        limits = (end, validity.odometer_to_m, validity.ignition_cycles, validity.operating_s)
        _require(not any(limits), at, "no upper limit of any kind in a perpetual right", limits)


def _quotas(at: str, messages: Iterable[entitlement_pb2.Quota]) -> tuple[Quota, ...]:
    quotas = tuple(
        Quota(m.meter_id, m.limit, m.hard, tuple(m.warn_percent), tuple(m.period_starts_s)) for m in messages
    )
    bounded(at, limit=MAX_QUOTAS, found=len(quotas))
    for quota in quotas:
        _require_match(f"{at}.meter_id", _NAME, quota.meter_id)
        _require(quota.limit >= 1, f"{at}.limit", "1 or more", quota.limit)
        bounded(f"{at}.warn_percent", limit=MAX_WARNINGS, found=len(quota.warn_percent))
        _require_ascending(f"{at}.warn_percent", quota.warn_percent, PERCENT)
        bounded(f"{at}.period_starts_s", limit=MAX_PERIOD_STARTS, found=len(quota.period_starts_s))
        _require_ascending(f"{at}.period_starts_s", quota.period_starts_s, MAX_UNIX_S)
    _require_unique(f"{at}.meter_id", (quota.meter_id for quota in quotas))
    return quotas


def _parameters(at: str, messages: Iterable[entitlement_pb2.Parameter]) -> tuple[tuple[str, str], ...]:
    parameters = tuple((message.name, message.value) for message in messages)
    bounded(at, limit=MAX_PARAMETERS, found=len(parameters))
    for name, value in parameters:
        _require_match(f"{at}.name", _NAME, name)
        bounded(f"{at}.value, bytes", limit=MAX_PARAMETER_VALUE_BYTES, found=len(value.encode()))
    _require_unique(f"{at}.name", (name for name, _ in parameters))
    return parameters


def _display(at: str, message: entitlement_pb2.Entitlement) -> dict[str, object]:
    _require(message.HasField("display_terms"), at, "the terms that the driver sees", "nothing")
    terms = message.display_terms
    _require_match(f"{at}.currency", _CURRENCY, terms.currency)
    _require_match(f"{at}.period", _PERIOD, terms.period)
    bounded(f"{at}.use_prices", limit=MAX_USE_PRICES, found=len(terms.use_prices))
    for price in terms.use_prices:
        _check_price(f"{at}.use_prices", price)
    keys = (f"{p.meter_id} {p.dimension} {p.value}".strip() for p in terms.use_prices)
    _require_unique(f"{at}.use_prices.meter_id", keys)
    return {
        "price_minor": terms.price_minor,
        "currency": terms.currency,
        "period": terms.period,
        "renews": terms.renews,
        "entry_minor": terms.entry_minor,
        "payment_failed": terms.payment_failed,
        "use_prices": tuple(
            {
                "meter_id": p.meter_id,
                "price_minor": p.price_minor,
                "per_units": p.per_units,
                "dimension": p.dimension,
                "value": p.value,
                "included_units": p.included_units,
                "tiers": tuple((t.above_units, t.price_minor, t.per_units) for t in p.tiers),
            }
            for p in terms.use_prices
        ),
    }


def _check_price(at: str, price: entitlement_pb2.UsePrice) -> None:
    _require_match(f"{at}.meter_id", _NAME, price.meter_id)
    _require(price.per_units >= 1, f"{at}.per_units", "1 or more", price.per_units)
    if price.dimension or price.value:
        _require_match(f"{at}.dimension", _NAME, price.dimension)
        _require_match(f"{at}.value", _NAME, price.value)
    bounded(f"{at}.tiers", limit=MAX_TIERS, found=len(price.tiers))
    before = price.included_units
    for tier in price.tiers:
        _require(
            tier.above_units > before, f"{at}.tiers.above_units", f"more than {before}", tier.above_units
        )
        _require(tier.per_units >= 1, f"{at}.tiers.per_units", "1 or more", tier.per_units)
        before = tier.above_units
