"""The agent's vocabulary: plain values that its parts pass to one another.

Pure: no I/O, no clock, no randomness. Times in `_ns` are of the monotonic
clock, times in `_ms` and `_s` are Unix time of the trusted clock, unless the
name says otherwise.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

SignalValue = float | int | str | bool

MAX_ODOMETER_M = 10_000_000_000
"""Ten million kilometres: what is beyond it is no odometer reading."""


def odometer_metres(value: SignalValue | None) -> int | None:
    """Whole metres from an odometer in kilometres (VSS); None if it is no such reading."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return round(value * 1000) if 0 <= value * 1000 <= MAX_ODOMETER_M else None


# --- bus and signals ---------------------------------------------------------


class Frame(NamedTuple):
    """One CAN frame.

    Args:
        bus: name of the bus in the agent's configuration.
        can_id: identifier, 11 or 29 bits.
        data: 0 to 8 bytes, with CAN FD to 64.
        monotonic_ns: when it was on the bus.
        is_extended: True for a 29-bit identifier.
    """

    bus: str
    can_id: int
    data: bytes
    monotonic_ns: int = 0
    is_extended: bool = False
    is_fd: bool = False


class SignalInfo(NamedTuple):
    """What is known of a signal besides its value.

    Args:
        unit: unit of its values, as in VSS.
        resolution: smallest step of its values, in its unit; 0 if not numeric.
        max_age_ns: age from which its value counts as unknown.
    """

    name: str
    unit: str
    resolution: float
    max_age_ns: int


class SignalChange(NamedTuple):
    """A signal took a new value. A tuple, because a full bus brings thousands in a second.

    Args:
        at_ns: first frame with the new value.
        previous_seen_ns: last frame with the value before; None for the first
            value ever. The true change lies between the two.
    """

    name: str
    value: SignalValue
    at_ns: int
    previous_seen_ns: int | None


@dataclass(frozen=True)
class SignalBatch:
    """What the bus brought in one window.

    Args:
        changes: changed values, in the order of their frames.
        seen_ns: the signals that were seen since the batch before, changed or
            not, and the time of the latest frame that carried a valid value.
        broken: those of them between whose frames others were lost, or could
            not be used, since the batch before, and when they were last seen
            before the first of those losses, -1 for never: from then to
            `seen_ns` equal values say nothing of the time between them.
    """

    changes: tuple[SignalChange, ...]
    seen_ns: Mapping[str, int]
    broken: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[SignalChange]]:
        """The changes of each signal that has any: every meter asks for a few of them."""
        found: dict[str, list[SignalChange]] = {}
        for change in self.changes:
            found.setdefault(change.name, []).append(change)
        return found


# --- catalogue ---------------------------------------------------------------


class ActuatorKind(enum.Enum):
    """How a feature is switched."""

    TOKEN = "token"  # noqa: S105 (a kind of actuator, not a password)
    """The ECU verifies a token of its own."""
    NONE = "none"
    """The feature lives on the head unit: apps read its state, no bus is written."""


class WhenDead(enum.Enum):
    """What a feature does while its use cannot be written down; the catalogue's choice."""

    HOLD = "hold"
    """Its right rests: it ends by its release condition, never in motion."""
    GO_ON_FREE = "go-on-free"
    """It goes on, may be switched on, and nothing is billed."""


class MeterKind(enum.Enum):
    """What a meter measures."""

    DURATION = "duration"
    """Milliseconds."""
    DISTANCE = "distance"
    """Metres."""
    ENERGY = "energy"
    """Milliwatt-hours."""
    COUNT = "count"
    """Events."""


class ConditionSpec(NamedTuple):
    """An expression over signals, and the signals that it reads.

    Args:
        expression: CEL source over VSS names, such as "Vehicle.Speed < 1.0".
        inputs: VSS names that it reads; any that is stale or missing makes
            the whole condition unknown.
    """

    expression: str
    inputs: tuple[str, ...]


class DimensionSpec(NamedTuple):
    """A dimension of a meter: the first value whose condition holds is taken."""

    name: str
    values: tuple[tuple[str, ConditionSpec], ...]


@dataclass(frozen=True, slots=True)
class MeterSpec:
    """One meter of a feature.

    Args:
        condition: when it counts, besides the feature being active; None: always. Of a
            count without a counter: the event is that it comes true.
        odometer: VSS name of the odometer in km (distance only).
        speed: VSS name of the speed in km/h, cross-check and fine part (distance only).
        counter: VSS name of a cumulative counter, in kWh (energy) or events (count).
        power: VSS name of the power in W: cross-check of the counter, or added up (energy).
        wraps_at: reading at which the counter begins at 0 again; 0: it does not.
        debounce_ms: for so long an event must last (count without a counter).
        at_most_per_h: units in an hour that are never exceeded; 0: the kind's own limit.
    """

    meter_id: str
    kind: MeterKind
    condition: ConditionSpec | None
    dimensions: tuple[DimensionSpec, ...] = ()
    odometer: str | None = None
    speed: str | None = None
    counter: str | None = None
    power: str | None = None
    wraps_at: int = 0
    debounce_ms: int = 0
    at_most_per_h: int = 0

    @property
    def cumulative(self) -> str | None:
        """VSS name of the signal that says how much there was ever."""
        return self.odometer or self.counter


@dataclass(frozen=True, slots=True)
class EcuSpec:
    """Where a feature's ECU is reached.

    Args:
        identifier: Uptane ECU identifier.
        hardware_id: Uptane hardware identifier.
        bus: name of the bus in the agent's configuration.
        request_id, response_id: CAN identifiers of ISO-TP (ISO 15765-2).
    """

    identifier: str
    hardware_id: str
    bus: str
    request_id: int
    response_id: int


class ReadBackSpec(NamedTuple):
    """How to see what the ECU really does: bytes of a DID under a mask.

    Args:
        did: data identifier, ISO 14229-1 service 0x22.
        mask, active: the answer's first bytes, masked, equal `active` when on.
        counter_offset: offset of the 4-byte token counter in the answer, or None.
    """

    did: int
    mask: bytes
    active: bytes
    counter_offset: int | None


class ReadingSpec(NamedTuple):
    """Where the ECU says, under its own signature, what it counted (docs/reading.md).

    Args:
        did: data identifier, ISO 14229-1 service 0x22.
        interval_s: period of the reading while the feature is on, seconds.
        meter_id: duration meter that measures the same, whose records carry it.
    """

    did: int
    interval_s: int
    meter_id: str


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """One release of one feature, as the signed catalogue describes it.

    Args:
        release: release counter, from 1.
        withdrawn: no new grants; existing rights go on.
        session: diagnostic session for the requests, 1 to 0x7F.
        activate: UDS request in front of the token (RoutineControl or
            WriteDataByIdentifier); empty for kind NONE.
        release_request: UDS request that switches the feature off without a token.
        activate_when: must hold before the ECU is asked.
        release_when: must hold before a feature is taken away.
        hold_max_s: longest time in HELD, seconds.
        read_back_interval_s: period of the read-back while active, seconds.
        by_use: it may be sold by use: its ECU signs its count, or the file admits that nobody counts.
        reading: the ECU's own signed count; None if it signs none.
        when_dead: what it does while the journal cannot be written.
    """

    feature_id: str
    release: int
    title: str
    enforcement: str
    withdrawn: bool
    kind: ActuatorKind
    ecu: EcuSpec | None
    feature_number: int
    session: int
    activate: bytes
    release_request: bytes
    read_back: ReadBackSpec | None
    activate_when: ConditionSpec
    release_when: ConditionSpec
    hold_max_s: int
    read_back_interval_s: int
    meters: tuple[MeterSpec, ...]
    sha256: str = ""
    by_use: bool = False
    reading: ReadingSpec | None = None
    when_dead: WhenDead = WhenDead.HOLD

    @property
    def inputs(self) -> frozenset[str]:
        """VSS names of all signals that the feature's conditions and meters read."""
        conditions = [self.activate_when, self.release_when]
        names: set[str] = set()
        for meter in self.meters:
            names.update(n for n in (meter.cumulative, meter.speed, meter.power) if n)
            conditions += [meter.condition] if meter.condition else []
            conditions += [c for d in meter.dimensions for _, c in d.values]
        return frozenset(names.union(*(c.inputs for c in conditions)))

    @property
    def target_path(self) -> str:
        """Path of this release in the catalogue repository."""
        return f"features/{self.feature_id}/{self.release}.toml"


# --- rights ------------------------------------------------------------------


class PlanKind(enum.Enum):
    """How a right is paid for; values as in the protobuf contract."""

    PERPETUAL = 1
    SUBSCRIPTION = 2
    TRIAL = 3
    WINDOW = 4
    PREPAID = 5
    PAY_PER_USE = 6


class Quota(NamedTuple):
    """A limit on a meter, in the meter's unit.

    Args:
        hard: the feature is suspended at the limit; else what is beyond is billed as overage.
        warn_percent: parts of the limit at which the driver is warned, ascending.
        period_starts_s: starts of the periods that the limit is for, Unix
            seconds, ascending; empty: it is for the whole right.
    """

    meter_id: str
    limit: int
    hard: bool
    warn_percent: tuple[int, ...] = ()
    period_starts_s: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entitlement:
    """One signed right of this vehicle; fields as in entitlement.proto."""

    entitlement_id: str
    feature_id: str
    min_release: int
    account: str
    plan_kind: PlanKind
    plan_id: str
    plan_version: int
    not_before_s: int
    not_after_s: int
    odometer_from_m: int
    odometer_to_m: int
    ignition_cycles: int
    operating_s: int
    offline_grace_s: int
    quotas: tuple[Quota, ...]
    parameters: tuple[tuple[str, str], ...]
    stays_with_vehicle: bool
    display: Mapping[str, object]
    trace_id: str


class Token(NamedTuple):
    """An ECU token that the director listed for this vehicle.

    Args:
        content: the COSE_Sign1 bytes as signed.
        sha256: hash of the content, hex; what the guard compares.
        allows: claim "state": True switches on, False burns older tokens.
    """

    ecu_identifier: str
    feature_id: str
    feature_number: int
    counter: int
    allows: bool
    content: bytes
    sha256: str


class TokenKeyAnnouncement(NamedTuple):
    """A token key that the offline token root announces to ECUs (docs/token.md, "Keys").

    Args:
        epoch: from 1; grows with each key.
        content: the COSE_Sign1 bytes as signed.
        sha256: hash of the content, hex; what the guard compares.
    """

    epoch: int
    content: bytes
    sha256: str


class TlsAnchor(NamedTuple):
    """A certificate that the cloud's servers may be known by, and for how long.

    The certificate's own dates say nothing, so that TLS needs no clock; these
    do, at trusted time.

    Args:
        certificate_der: X.509, of a server or of an authority above it.
        not_before_ms, not_after_ms: Unix milliseconds; the second is exclusive.
    """

    certificate_der: bytes
    not_before_ms: int
    not_after_ms: int


@dataclass(frozen=True, slots=True)
class Rights:
    """Everything that one verified update says; all of it agrees.

    Args:
        version: version of the director's targets.
        entitlements: by feature id.
        features: the release of each feature that rights or tokens use, by feature id.
        tokens: by feature id.
        owner_epoch: counts the vehicle's owners, from 1; 0 before there are any rights.
        token_key: key that signed the newest tokens; None if the director lists none.
        tls_anchors: how to know the cloud's servers; empty: by the CA of the image.
    """

    version: int
    entitlements: Mapping[str, Entitlement] = field(default_factory=dict)
    features: Mapping[str, FeatureSpec] = field(default_factory=dict)
    tokens: Mapping[str, Token] = field(default_factory=dict)
    owner_epoch: int = 0
    token_key: TokenKeyAnnouncement | None = None
    tls_anchors: tuple[TlsAnchor, ...] = ()


# --- trust -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of one repository's trusted metadata; 0 means none."""

    root: int = 0
    timestamp: int = 0
    snapshot: int = 0
    targets: int = 0


@dataclass(frozen=True, slots=True)
class RepositoryBytes:
    """Metadata of one repository as received: verified, or to be verified.

    Args:
        roots: root files in the order of their versions.
        timestamp, snapshot, targets: empty if absent.
    """

    roots: tuple[bytes, ...] = ()
    timestamp: bytes = b""
    snapshot: bytes = b""
    targets: bytes = b""


@dataclass(frozen=True, slots=True)
class TrustBytes:
    """Both repositories and their targets: an update, or the stored state."""

    director: RepositoryBytes = RepositoryBytes()
    catalogue: RepositoryBytes = RepositoryBytes()
    director_targets: Mapping[str, bytes] = field(default_factory=dict)
    catalogue_targets: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrustedTime:
    """A moment of the trusted clock.

    Args:
        unix_ms: best estimate that never goes back.
        uncertainty_ms: how far it may be behind.
        source: "signed", "mark", "file" or "build".
    """

    unix_ms: int
    uncertainty_ms: int
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verified update.

    Args:
        state: complete new trusted state, to be stored before it is used.
        signed_ms: time that the director signed, Unix milliseconds; 0 for
            stored state.
        expires_ms: expiry of each metadata file, Unix milliseconds, by
            repository and role, such as "director targets".
    """

    state: TrustBytes
    director: Versions
    catalogue: Versions
    rights: Rights
    signed_ms: int
    expires_ms: Mapping[str, int] = field(default_factory=dict)
