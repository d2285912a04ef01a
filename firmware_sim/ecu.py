"""The ECUs of the simulated vehicle: UDS servers that decide for themselves.

Bytes in, bytes out: no I/O and no clock; callers pass monotonic nanoseconds.
Services 0x10, 0x22, 0x31 and 0x3E of ISO 14229-1:2020 as docs/token.md uses
them, with the negative responses in the order that it states. Durable state
goes through a store that is written before anything acts; if it cannot be
written, the answer is NRC 0x72 and nothing has changed.

What terms 5 to 7 count: wake-ups by terminal 15 after acceptance; time with
the heater on; each time the heater goes from off to on. Terms 1 to 4 are
measured by a clock and an odometer of the ECU's own if it has them; else they
are advisory, by what the bus says, and one of terms 5 to 7 has to stand beside
them. All are judged at wake-up only. Operating time and executions are written
ahead of use, so that cutting the power never returns any of them.

An ECU with a key of its own also signs what it has counted since production
(docs/reading.md): never more than was used. Each time the output goes on is
written ahead; time is written behind, so that cutting the power loses at most
RESERVE_MS of it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from firmware_sim import token as tokens
from firmware_sim.measures import ODOMETER, UNIX_TIME, BusSignal, Measure, Measures
from firmware_sim.reading import Counted, sign
from firmware_sim.token import ALL_TERMS, COUNTED_TERMS, Term, TokenError

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000

S3_NS = 5 * NS_PER_S
"""Session timeout S3server, ISO 14229-2:2021."""
P2_MS = 50
P2_STAR_10MS = 500
MOTION_LIMIT_KMH = 5.0
"""Above this speed nothing is switched (docs/token.md, NRC 0x88)."""
BOOT_NS = 200 * NS_PER_MS
"""How long an ECU is silent after a reset."""
RESERVE_MS = 10_000
"""Operating time that is written ahead of its use, and use that may be counted and not written yet."""
MAX_DIDS = 8
"""Most data identifiers in one read request."""
NO_LIMIT = 0xFFFF_FFFF
SEAT_HEATING = 1
"""Number of the feature that drives the seat module's heater."""
HEAT_POWER_W = (0.0, 30.0, 60.0, 90.0)
"""Heater power by level."""
MAX_HEAT_LEVEL = 3

DEFAULT_SESSION = 0x01
EXTENDED_SESSION = 0x03
SID_SESSION = 0x10
SID_READ = 0x22
SID_ROUTINE = 0x31
SID_TESTER_PRESENT = 0x3E
_SUPPRESS = 0x80  # suppressPosRspMsgIndicationBit, ISO 14229-1:2020 section 8.2.2
_START_ROUTINE = 0x01
_OUTPUT_TERMS = frozenset({Term.OPERATING_TIME, Term.EXECUTIONS, Term.SPEED_LIMIT})
"""Limits that only a feature with an output can measure."""

_TIME_TERMS = frozenset({Term.NOT_AFTER, Term.DAYS})
_ODOMETER_TERMS = frozenset({Term.DISTANCE, Term.ODOMETER_RANGE})
SECONDS_PER_DAY = 86_400

RID_ANNOUNCE = 0x0F0C
RID_INSTALL = 0x0F0D
RID_RELEASE = 0x0F0E
DID_VIN = 0xF190
DID_UID = 0x0F00
DID_HARDWARE = 0x0F01
DID_ODOMETER = 0x0F10
DID_FEATURE_BASE = 0x0F20
DID_READING_BASE = 0x0F40
MAX_READ_BACK_FEATURE = 31
FEATURE_BYTES = 2


class Nrc(enum.IntEnum):
    """Negative response codes, ISO 14229-1:2020 annex A."""

    SERVICE_NOT_SUPPORTED = 0x11
    SUB_FUNCTION_NOT_SUPPORTED = 0x12
    INCORRECT_LENGTH_OR_FORMAT = 0x13
    CONDITIONS_NOT_CORRECT = 0x22
    REQUEST_SEQUENCE_ERROR = 0x24
    REQUEST_OUT_OF_RANGE = 0x31
    SECURITY_ACCESS_DENIED = 0x33
    GENERAL_PROGRAMMING_FAILURE = 0x72
    SERVICE_NOT_SUPPORTED_IN_SESSION = 0x7F
    VEHICLE_SPEED_TOO_HIGH = 0x88


class NegativeResponse(Exception):
    """A request that is refused with an NRC; the ECU's state is unchanged."""

    def __init__(self, nrc: int, why: str) -> None:
        super().__init__(f"NRC 0x{nrc:02X}: {why}")
        self.nrc = nrc


class StoreError(Exception):
    """Durable state that could not be read or written; what was stored stays stored."""


class State(enum.IntEnum):
    """Read-back state of a feature."""

    OFF = 0
    ON = 1
    ENDED = 2


class Reason(enum.IntEnum):
    """Read-back reason of a feature's state."""

    NONE = 0
    NO_TOKEN = 1
    RELEASED = 2
    NOT_ALLOWED = 3
    CYCLES_USED = 4
    TIME_USED = 5
    EXECUTIONS_USED = 6
    DATE_PASSED = 7
    DAYS_USED = 8
    DISTANCE_USED = 9
    OUT_OF_ODOMETER_RANGE = 10
    NO_VALUE = 11


@dataclass(frozen=True, slots=True)
class Right:
    """The token accepted last for one feature, and what was used of it.

    Args:
        terms: value of each limit, as in the token.
        cycles_used, executions_used: counts since acceptance.
        operating_ms: milliseconds since acceptance, including what is reserved.
        accepted_s, accepted_m: date (Unix seconds) and odometer (metres) at acceptance, or at
            the first wake-up after it at which they were known.
        ended: NONE, or the limit that ended it.
        is_final: True if only a newer token brings an ended right back; an end by an
            advisory limit is judged again at each wake-up.
        waits: NONE, or why it does not hold yet.
    """

    counter: int
    sha256: str
    allowed: bool
    terms: Mapping[int, int | tuple[int, int]]
    parameters: bytes = b""
    released: bool = False
    cycles_used: int = 0
    operating_ms: int = 0
    executions_used: int = 0
    accepted_s: int | None = None
    accepted_m: int | None = None
    ended: Reason = Reason.NONE
    is_final: bool = False
    waits: Reason = Reason.NONE

    @property
    def status(self) -> tuple[State, Reason]:
        """State and reason as read back."""
        if not self.allowed:
            return State.OFF, Reason.NOT_ALLOWED
        if self.ended is not Reason.NONE:
            return State.ENDED, self.ended
        if self.released:
            return State.OFF, Reason.RELEASED
        if self.waits is not Reason.NONE:
            return State.OFF, self.waits
        return State.ON, Reason.NONE

    def limit(self, term: Term) -> int | None:
        """Value of a limit that is one number; None if the token does not carry it."""
        value = self.terms.get(term)
        return value if isinstance(value, int) else None

    def begun_at(self, measures: Measures) -> Right:
        """Returns the right with the date and the odometer that it is measured from, once they are known."""
        accepted_s, accepted_m = self.accepted_s, self.accepted_m
        if accepted_s is None and Term.DAYS in self.terms:
            accepted_s = measures.time_s.value
        if accepted_m is None and Term.DISTANCE in self.terms:
            accepted_m = measures.odometer_m.value
        return replace(self, accepted_s=accepted_s, accepted_m=accepted_m)

    def judged(self, measures: Measures) -> Right:
        """Returns the right after one wake-up: ended by a limit, or with the cycle counted."""
        if not self.allowed or self.is_final:
            return self
        used = (
            (Term.IGNITION_CYCLES, self.cycles_used, Reason.CYCLES_USED),
            (Term.OPERATING_TIME, self.operating_ms // 1000, Reason.TIME_USED),
            (Term.EXECUTIONS, self.executions_used, Reason.EXECUTIONS_USED),
        )
        for term, amount, reason in used:
            limit = self.limit(term)
            if limit is not None and amount >= limit:
                return replace(self, ended=reason, is_final=True, waits=Reason.NONE)
        right = self.begun_at(measures).measured(measures)
        if Term.IGNITION_CYCLES in self.terms and not right.is_final:
            # Also while it waits or rests: what the bus says must not stretch a lease.
            return replace(right, cycles_used=right.cycles_used + 1)
        return right

    def measured(self, measures: Measures) -> Right:
        """Judges date and distance; an end by an authenticated source comes before one by the bus."""
        ended, is_final, waits = Reason.NONE, False, Reason.NONE
        for term in sorted(_MEASURED_BY.keys() & self.terms.keys()):
            measure = measures.time_s if term in _TIME_TERMS else measures.odometer_m
            if measure.value is None:
                if COUNTED_TERMS.isdisjoint(self.terms):
                    waits = Reason.NO_VALUE
                continue
            state = self._state_by(term, measure.value)
            if state is State.ENDED and (ended is Reason.NONE or (measure.is_trusted and not is_final)):
                ended, is_final = _MEASURED_BY[term], measure.is_trusted
            elif state is State.OFF:
                waits = _MEASURED_BY[term]
        return replace(self, ended=ended, is_final=is_final, waits=waits)

    def _state_by(self, term: int, value: int) -> State:
        """What one limit says of the date (Unix seconds) or the odometer (metres)."""
        limit = self.terms[term]
        if isinstance(limit, tuple):
            from_m, to_m = limit
            return State.OFF if value < from_m else State.ON if value < to_m else State.ENDED
        if term == Term.NOT_AFTER:
            return State.ENDED if value > limit else State.ON
        begun = self.accepted_s if term == Term.DAYS else self.accepted_m
        span = limit * SECONDS_PER_DAY if term == Term.DAYS else limit
        return State.ENDED if begun is not None and value - begun >= span else State.ON


_MEASURED_BY: Mapping[int, Reason] = {
    Term.NOT_AFTER: Reason.DATE_PASSED,
    Term.DAYS: Reason.DAYS_USED,
    Term.DISTANCE: Reason.DISTANCE_USED,
    Term.ODOMETER_RANGE: Reason.OUT_OF_ODOMETER_RANGE,
}
"""Limits that need a date or an odometer, and the reason that each gives."""


@dataclass(frozen=True, slots=True)
class Total:
    """Use of one feature since production, under whatever token.

    Args:
        on_ms: time with the output on, milliseconds; never more than it was.
        executions: how often the output went on.
    """

    on_ms: int = 0
    executions: int = 0


@dataclass(frozen=True, slots=True)
class EcuState:
    """Everything that an ECU keeps without power.

    Args:
        token_keys: Ed25519 public key of each epoch.
        rights: by feature number.
        heard_s, heard_m: date (Unix seconds) and odometer (metres) that the bus said last
            and that were plausible; None if nothing needs them.
        totals: by feature number; counted only by an ECU that signs readings.
        readings: how many readings it has signed.
    """

    token_keys: Mapping[int, bytes] = field(default_factory=dict)
    rights: Mapping[int, Right] = field(default_factory=dict)
    heard_s: int | None = None
    heard_m: int | None = None
    totals: Mapping[int, Total] = field(default_factory=dict)
    readings: int = 0


class Store(Protocol):
    """Where an ECU keeps its state."""

    def load(self) -> EcuState:
        """Returns what was saved last, or an empty state; raises StoreError."""
        ...

    def save(self, state: EcuState) -> None:
        """Returns when the state is durable; raises StoreError and keeps the old one."""
        ...


@dataclass(frozen=True, slots=True)
class Happening:
    """Something worth telling: a name, a time and facts."""

    name: str
    at_ns: int
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Identity:
    """What an ECU knows of itself since its production.

    Args:
        vin: 17 characters.
        uid: 16 bytes.
        request_id, response_id: CAN identifiers of ISO-TP, 11 bits.
    """

    identifier: str
    hardware_id: str
    vin: str
    uid: bytes
    request_id: int
    response_id: int


class Ecu:
    """A UDS server: sessions, identification and what a subclass adds.

    Args:
        identity: who it is.
        now_ns: when it starts.
    """

    def __init__(self, identity: Identity, *, now_ns: int) -> None:
        self.identity = identity
        self.session = DEFAULT_SESSION
        self.happenings: list[Happening] = []
        self._last_request_ns = now_ns
        self._booting_until_ns = now_ns
        self._dids: dict[int, Callable[[int], bytes]] = {
            DID_VIN: lambda _now: identity.vin.encode("ascii"),
            DID_UID: lambda _now: identity.uid,
            DID_HARDWARE: lambda _now: identity.hardware_id.encode("ascii"),
        }
        self._routines: dict[int, Callable[[bytes, int], bytes]] = {}

    def is_awake(self, now_ns: int) -> bool:
        """False while it boots: then it neither sends nor answers."""
        return now_ns >= self._booting_until_ns

    def reset(self, now_ns: int) -> None:
        """Restarts it; only what is durable survives. This is no wake-up by terminal 15."""
        self.session = DEFAULT_SESSION
        self._booting_until_ns = now_ns + BOOT_NS
        self._tell("ecu-reset", now_ns)

    def handle(self, request: bytes, now_ns: int) -> bytes | None:
        """Answers one UDS request.

        Args:
            request: the request's bytes, at least the service identifier.
            now_ns: monotonic time.

        Returns:
            The response; None if there is none to send.
        """
        if not self.is_awake(now_ns) or not request:
            return None
        if now_ns - self._last_request_ns > S3_NS:
            self.session = DEFAULT_SESSION
        self._last_request_ns = now_ns
        try:
            return self._serve(request, now_ns)
        except NegativeResponse as refusal:
            return bytes([0x7F, request[0], refusal.nrc])

    def _serve(self, request: bytes, now_ns: int) -> bytes | None:
        service = request[0]
        if service == SID_READ:
            return b"\x62" + self._read(request[1:], now_ns)
        if service not in {SID_SESSION, SID_ROUTINE, SID_TESTER_PRESENT} or (
            service == SID_ROUTINE and not self._routines
        ):
            raise NegativeResponse(Nrc.SERVICE_NOT_SUPPORTED, f"service 0x{service:02X}")
        if service == SID_ROUTINE and self.session != EXTENDED_SESSION:
            raise NegativeResponse(Nrc.SERVICE_NOT_SUPPORTED_IN_SESSION, "needs the extended session")
        if len(request) < (4 if service == SID_ROUTINE else 2):
            raise NegativeResponse(Nrc.INCORRECT_LENGTH_OR_FORMAT, "too short")
        sub_function, data = request[1] & ~_SUPPRESS, request[2:]
        if service == SID_SESSION:
            answer = self._change_session(sub_function, data)
        elif service == SID_TESTER_PRESENT:
            answer = self._tester_present(sub_function, data)
        else:
            answer = self._routine(sub_function, data, now_ns)
        return None if request[1] & _SUPPRESS else bytes([service + 0x40, sub_function]) + answer

    def _change_session(self, session: int, data: bytes) -> bytes:
        if session not in {DEFAULT_SESSION, EXTENDED_SESSION}:
            raise NegativeResponse(Nrc.SUB_FUNCTION_NOT_SUPPORTED, f"session 0x{session:02X}")
        if data:
            raise NegativeResponse(Nrc.INCORRECT_LENGTH_OR_FORMAT, "session control takes no data")
        self.session = session
        return P2_MS.to_bytes(2) + P2_STAR_10MS.to_bytes(2)

    def _tester_present(self, sub_function: int, data: bytes) -> bytes:
        if sub_function != 0:
            raise NegativeResponse(Nrc.SUB_FUNCTION_NOT_SUPPORTED, f"sub-function 0x{sub_function:02X}")
        if data:
            raise NegativeResponse(Nrc.INCORRECT_LENGTH_OR_FORMAT, "tester present takes no data")
        return b""

    def _routine(self, sub_function: int, data: bytes, now_ns: int) -> bytes:
        if sub_function != _START_ROUTINE:
            raise NegativeResponse(Nrc.SUB_FUNCTION_NOT_SUPPORTED, "only startRoutine")
        routine = self._routines.get(int.from_bytes(data[:2]))
        if routine is None:
            raise NegativeResponse(Nrc.REQUEST_OUT_OF_RANGE, f"routine {data[:2].hex()}")
        return data[:2] + routine(data[2:], now_ns)

    def _read(self, data: bytes, now_ns: int) -> bytes:
        if not data or len(data) % 2 or len(data) > 2 * MAX_DIDS:
            raise NegativeResponse(Nrc.INCORRECT_LENGTH_OR_FORMAT, f"1 to {MAX_DIDS} identifiers of 2 bytes")
        found = b""
        for offset in range(0, len(data), 2):
            did = data[offset : offset + 2]
            reader = self._dids.get(int.from_bytes(did))
            if reader is not None:
                found += did + reader(now_ns)
        if not found:
            raise NegativeResponse(Nrc.REQUEST_OUT_OF_RANGE, f"identifiers {data.hex()}")
        return found

    def _tell(self, name: str, now_ns: int, **facts: object) -> None:
        self.happenings.append(Happening(name, now_ns, {"ecu": self.identity.identifier, **facts}))


class Powertrain(Ecu):
    """The powertrain's ECU: VIN and odometer (DID 0x0F10: metres, 4 bytes).

    Args:
        odometer_m: returns the odometer now, metres.
    """

    def __init__(self, identity: Identity, *, odometer_m: Callable[[], int], now_ns: int) -> None:
        super().__init__(identity, now_ns=now_ns)
        self._dids[DID_ODOMETER] = lambda _now: odometer_m().to_bytes(4)


class SeatModule(Ecu):
    """The seat's ECU: verifies tokens and drives the seat heater.

    Args:
        features: numbers of the features that it has; 1 is seat heating.
        token_root: Ed25519 public key from production, 32 bytes.
        store: its durable memory.
        changes_in_motion: True if features may be switched above 5 km/h.
        terms: limits that it implements; a token with another one is refused.
        clock: its own authenticated clock, Unix seconds, or None while that is not set;
            without one, dates are advisory.
        odometer: its own odometer, metres; without one, distances are advisory.
        reading_key: its own key, with which it signs readings; without one it gives none.

    Raises:
        StoreError: the durable state cannot be read.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        features: frozenset[int],
        token_root: bytes,
        store: Store,
        now_ns: int,
        changes_in_motion: bool = False,
        terms: frozenset[Term] = ALL_TERMS,
        clock: Callable[[], int | None] | None = None,
        odometer: Callable[[], int | None] | None = None,
        reading_key: Ed25519PrivateKey | None = None,
    ) -> None:
        super().__init__(identity, now_ns=now_ns)
        self._features = features
        self._token_root = token_root
        self._store = store
        self._changes_in_motion = changes_in_motion
        self._terms = terms
        self._clock = clock
        self._odometer = odometer
        self._reading_key = reading_key
        self._advisory_terms: frozenset[Term] = (frozenset() if clock else _TIME_TERMS) | (
            frozenset() if odometer else _ODOMETER_TERMS
        )
        self._heard_time = BusSignal(UNIX_TIME)
        self._heard_odometer = BusSignal(ODOMETER)
        self._state = store.load()
        self._store_failed = False
        self._speed_kmh = 0.0
        self._ignition_on = False
        self._requested = 0
        self._level = 0
        self._on_since_ns = 0
        self._operating_before_ms = 0
        self._used_since_ns = 0
        self._unwritten_ns = 0
        self._uncounted = False
        self._output_barred = False
        self._routines.update(
            {RID_INSTALL: self._install, RID_RELEASE: self._release, RID_ANNOUNCE: self._announce}
        )
        for number in features:
            if number <= MAX_READ_BACK_FEATURE:
                self._dids[DID_FEATURE_BASE + number] = self._reader(number)
        if reading_key is not None and SEAT_HEATING in features:
            self._dids[DID_READING_BASE + SEAT_HEATING] = self._attest

    # --- what the vehicle sees and does ---

    @property
    def state(self) -> EcuState:
        """The durable state."""
        return self._state

    @property
    def heat_requested(self) -> int:
        """Level that the driver asked for, 0 to 3."""
        return self._requested

    @property
    def heat_level(self) -> int:
        """Level at which the heater works, 0 to 3."""
        return self._level

    @property
    def heat_power_w(self) -> float:
        """Electric power of the heater, watts."""
        return HEAT_POWER_W[self._level]

    def status(self, feature: int) -> tuple[State, Reason]:
        """State and reason of a feature, as read back."""
        right = self._state.rights.get(feature)
        if right is None:
            return State.OFF, Reason.NO_TOKEN
        if self._uncounted and right.terms and right.status[0] is State.ON:
            return State.OFF, Reason.NONE
        return right.status

    def press(self, level: int, now_ns: int) -> None:
        """The driver asks for a heat level, 0 to 3."""
        self._requested = level
        state, reason = self.status(SEAT_HEATING)
        if level > 0 and state is not State.ON:
            self._tell("heater-refused", now_ns, level=level, state=state.name, reason=reason.name)
        self._drive_output(now_ns)

    def sense(self, *, speed_kmh: float, now_ns: int) -> None:
        """Takes the speed signal and lets time pass."""
        self._speed_kmh = speed_kmh
        self._drive_output(now_ns)

    def hear_time(self, unix_s: int, now_ns: int) -> None:
        """Takes the date that the bus says, Unix seconds; it is advisory."""
        self._heard_time.hear(unix_s, now_ns)

    def hear_odometer(self, odometer_m: int, now_ns: int) -> None:
        """Takes the odometer that the bus says, metres; it is advisory."""
        self._heard_odometer.hear(odometer_m, now_ns)

    def terminal_15(self, *, on: bool, now_ns: int) -> None:
        """Ignition on or off. Going on is the wake-up at which limits are judged."""
        changed = on != self._ignition_on
        self._ignition_on = on
        if changed and on:
            self._judge(now_ns)
        elif changed:
            self._remember_heard(now_ns)
        self._drive_output(now_ns)

    def reset(self, now_ns: int) -> None:
        """Restarts it; only what is durable survives."""
        self._level = 0
        self._unwritten_ns = 0
        self._heard_time.forget()
        self._heard_odometer.forget()
        super().reset(now_ns)
        try:
            self._state = self._store.load()
            self._store_failed = False
        except StoreError as error:
            # An empty memory must not make burnt tokens good again: nothing is
            # allowed, and nothing is stored, until the memory can be read.
            self._state = EcuState()
            self._store_failed = True
            self._tell("store-failed", now_ns, message=str(error))

    def learn_key(self, announcement: bytes) -> int:
        """Takes the announcement of a token key and returns its epoch.

        Raises:
            TokenError: refused.
            StoreError: could not be stored; nothing has changed.
        """
        announced = tokens.verify_announcement(announcement, root=self._token_root)
        known = self._state.token_keys.get(announced.epoch)
        if known is not None and known != announced.key:
            raise tokens.CounterError(f"epoch {announced.epoch} is known with another key; keeping that one")
        if known is None:
            self._save(
                replace(self._state, token_keys={**self._state.token_keys, announced.epoch: announced.key})
            )
        return announced.epoch

    # --- routines ---

    def _install(self, content: bytes, now_ns: int) -> bytes:
        try:
            feature = self._accept(content, now_ns)
        except (TokenError, NegativeResponse) as error:
            self._tell("token-refused", now_ns, nrc=int(error.nrc), why=str(error))
            raise NegativeResponse(error.nrc, str(error)) from error
        state, _ = self.status(feature)
        counter = self._state.rights[feature].counter
        return feature.to_bytes(2) + bytes([state]) + counter.to_bytes(4)

    def _accept(self, content: bytes, now_ns: int) -> int:
        """Makes the checks in the order of docs/token.md; returns the feature's number."""
        token = tokens.parse(content, implemented=self._terms, advisory=self._advisory_terms)
        feature = token.claims.feature
        if feature not in self._features:
            raise NegativeResponse(Nrc.REQUEST_OUT_OF_RANGE, f"this ECU has no feature {feature}")
        if feature != SEAT_HEATING and (unmeasured := _OUTPUT_TERMS & token.claims.terms.keys()):
            raise tokens.UnknownTermError(min(unmeasured))
        keys = self._state.token_keys
        newest = keys[max(keys)] if keys else None
        if newest is None or token.kid != tokens.key_id(newest):
            raise tokens.SignatureError(f"kid {token.kid.hex()} is not that of the highest epoch known")
        token.check_signature(newest, vin=self.identity.vin, uid=self.identity.uid)
        stored = self._state.rights.get(feature)
        freshness = tokens.check_counter(
            token, counter=stored.counter if stored else 0, sha256=stored.sha256 if stored else ""
        )
        if stored is not None and freshness is tokens.Freshness.REPEATED:
            right = replace(stored, released=False)
        else:
            right = Right(
                counter=token.claims.counter,
                sha256=token.sha256,
                allowed=token.claims.allowed,
                terms=token.claims.terms,
                parameters=token.claims.parameters,
            ).begun_at(self._measures())
        self._change(feature, right, now_ns)
        self._tell(
            "token-accepted",
            now_ns,
            feature=feature,
            counter=right.counter,
            allowed=right.allowed,
            outcome=freshness.value,
        )
        return feature

    def _release(self, data: bytes, now_ns: int) -> bytes:
        if len(data) != FEATURE_BYTES:
            raise NegativeResponse(Nrc.INCORRECT_LENGTH_OR_FORMAT, "release takes a feature of 2 bytes")
        feature = int.from_bytes(data)
        if feature not in self._features:
            raise NegativeResponse(Nrc.REQUEST_OUT_OF_RANGE, f"this ECU has no feature {feature}")
        right = self._state.rights.get(feature)
        if right is not None and right.allowed and not right.is_final:
            # Also while it rests: at a later wake-up it would come back.
            self._change(feature, replace(right, released=True), now_ns)
        return data + bytes([self.status(feature)[0]])

    def _announce(self, content: bytes, now_ns: int) -> bytes:
        try:
            epoch = self.learn_key(content)
        except TokenError as error:
            self._tell("token-key-refused", now_ns, nrc=int(error.nrc), why=str(error))
            raise NegativeResponse(error.nrc, str(error)) from error
        except StoreError as error:
            raise NegativeResponse(Nrc.GENERAL_PROGRAMMING_FAILURE, str(error)) from error
        self._tell("token-key-accepted", now_ns, epoch=epoch)
        return epoch.to_bytes(4)

    def _change(self, feature: int, right: Right, now_ns: int) -> None:
        """Stores a new right and lets it act; refuses what may not change in motion."""
        stored = self._state.rights.get(feature)
        if right == stored:
            return
        before = self.status(feature)
        switches = (right.status[0] is State.ON) != (before[0] is State.ON)
        reshapes = stored is not None and right.parameters != stored.parameters
        moving = self._speed_kmh > MOTION_LIMIT_KMH and not self._changes_in_motion
        if moving and (switches or reshapes):
            raise NegativeResponse(Nrc.VEHICLE_SPEED_TOO_HIGH, f"at {self._speed_kmh:.1f} km/h")
        try:
            self._save_right(feature, right)
        except StoreError as error:
            raise NegativeResponse(Nrc.GENERAL_PROGRAMMING_FAILURE, str(error)) from error
        if feature == SEAT_HEATING and (stored is None or stored.counter != right.counter):
            # If the heater stays on under a new token, its use is counted from here.
            self._on_since_ns, self._operating_before_ms = now_ns, 0
        self._tell_status(feature, before, now_ns)
        self._drive_output(now_ns)

    # --- limits and output ---

    def _measures(self) -> Measures:
        """Date and odometer now: the ECU's own, or what the bus said last."""
        heard_s, heard_m = self._heard()
        return Measures(
            Measure(self._clock(), is_trusted=True) if self._clock else Measure(heard_s, is_trusted=False),
            Measure(self._odometer(), is_trusted=True)
            if self._odometer
            else Measure(heard_m, is_trusted=False),
        )

    def _heard(self) -> tuple[int | None, int | None]:
        """Date and odometer that the bus said last, in this drive or before it."""
        heard_s, heard_m = self._heard_time.plausible, self._heard_odometer.plausible
        return (
            self._state.heard_s if heard_s is None else heard_s,
            self._state.heard_m if heard_m is None else heard_m,
        )

    def _remember_heard(self, now_ns: int) -> None:
        """Keeps what the bus said for the next wake-up, if a right is judged by it."""
        carried = {term for right in self._state.rights.values() for term in right.terms}
        if self._advisory_terms.isdisjoint(carried):
            return
        heard_s, heard_m = self._heard()
        heard = replace(self._state, heard_s=heard_s, heard_m=heard_m)
        try:
            if heard != self._state:
                self._save(heard)
        except StoreError as error:
            self._tell("store-failed", now_ns, message=str(error))

    def _judge(self, now_ns: int) -> None:
        before = {number: self.status(number) for number in self._state.rights}
        measures = self._measures()
        judged = {number: right.judged(measures) for number, right in self._state.rights.items()}
        try:
            if judged != self._state.rights:
                self._save(replace(self._state, rights=judged))
            self._uncounted = False
        except StoreError as error:
            # A cycle that cannot be counted must not be a free one.
            self._uncounted = True
            self._tell("store-failed", now_ns, message=str(error))
        for number, was in before.items():
            self._tell_status(number, was, now_ns)

    def _drive_output(self, now_ns: int) -> None:
        """Sets the heater to what the driver asked for, as far as the right goes."""
        right = self._state.rights.get(SEAT_HEATING)
        wanted = self._requested
        if right is None or not self._may_heat(right, now_ns):
            wanted = 0
        if wanted > 0 and right is not None:
            try:
                self._count_use(right, now_ns)
                self._output_barred = False
            except StoreError as error:
                wanted = 0
                if not self._output_barred:
                    self._tell("store-failed", now_ns, message=str(error))
                self._output_barred = True
        if wanted == 0 and self._level > 0:
            self._end_operating(now_ns)
        self._level = wanted

    def _may_heat(self, right: Right, now_ns: int) -> bool:
        limit = right.limit(Term.SPEED_LIMIT)
        return (
            self.is_awake(now_ns)
            and self._ignition_on
            and self.status(SEAT_HEATING)[0] is State.ON
            and (limit is None or self._speed_kmh <= limit)
        )

    def _count_use(self, right: Right, now_ns: int) -> None:
        """Writes executions and operating time ahead of their use."""
        starts = self._level == 0
        used_ms = 0 if starts else (now_ns - self._on_since_ns) // NS_PER_MS
        before_ms = right.operating_ms if starts else self._operating_before_ms
        ahead = right
        if starts and Term.EXECUTIONS in right.terms:
            ahead = replace(ahead, executions_used=right.executions_used + 1)
        if Term.OPERATING_TIME in right.terms and (starts or before_ms + used_ms >= right.operating_ms):
            ahead = replace(ahead, operating_ms=before_ms + used_ms + RESERVE_MS)
        state = self._state_with(ahead)
        if starts:
            state = self._one_execution_more(state)
        if state != self._state or self._unwritten(now_ns) >= RESERVE_MS * NS_PER_MS:
            self._save_counted(state, now_ns)
        if starts:
            self._on_since_ns, self._operating_before_ms = now_ns, before_ms
            self._used_since_ns = now_ns

    def _end_operating(self, now_ns: int) -> None:
        """Gives back what was reserved and not used; if that fails it counts as used."""
        state, right = self._state, self._state.rights.get(SEAT_HEATING)
        if right is not None and Term.OPERATING_TIME in right.terms:
            state = self._state_with(replace(right, operating_ms=self._operating_ms(right, now_ns)))
        try:
            if state != self._state or self._unwritten(now_ns):
                self._save_counted(state, now_ns)
        except StoreError as error:
            self._tell("store-failed", now_ns, message=str(error))
        self._unwritten_ns = self._unwritten(now_ns)

    def _state_with(self, right: Right) -> EcuState:
        return replace(self._state, rights={**self._state.rights, SEAT_HEATING: right})

    def _one_execution_more(self, state: EcuState) -> EcuState:
        if self._reading_key is None:
            return state
        total = state.totals.get(SEAT_HEATING, Total())
        more = replace(total, executions=total.executions + 1)
        return replace(state, totals={**state.totals, SEAT_HEATING: more})

    def _unwritten(self, now_ns: int) -> int:
        """Use that was counted and is not in the durable total, nanoseconds."""
        if self._reading_key is None:
            return 0
        return self._unwritten_ns + (now_ns - self._used_since_ns if self._level else 0)

    def _save_counted(self, state: EcuState, now_ns: int) -> None:
        """Saves a state, with all use up to now in the total."""
        used_ms, rest_ns = divmod(self._unwritten(now_ns), NS_PER_MS)
        if used_ms:
            total = state.totals.get(SEAT_HEATING, Total())
            more = replace(total, on_ms=total.on_ms + used_ms)
            state = replace(state, totals={**state.totals, SEAT_HEATING: more})
        self._save(state)
        self._unwritten_ns, self._used_since_ns = rest_ns, now_ns

    def _attest(self, now_ns: int) -> bytes:
        """Signs what was counted; that and the reading's number are written before it leaves."""
        assert self._reading_key is not None
        try:
            self._save_counted(replace(self._state, readings=self._state.readings + 1), now_ns)
        except StoreError as error:
            self._tell("store-failed", now_ns, message=str(error))
            raise NegativeResponse(Nrc.CONDITIONS_NOT_CORRECT, str(error)) from error
        right = self._state.rights.get(SEAT_HEATING)
        total = self._state.totals.get(SEAT_HEATING, Total())
        counted = Counted(
            feature=SEAT_HEATING,
            reading=self._state.readings,
            token_counter=right.counter if right else 0,
            on_ms=total.on_ms,
            executions=total.executions,
        )
        return sign(self._reading_key, self.identity.uid, counted)

    def _operating_ms(self, right: Right, now_ns: int) -> int:
        """Operating time that was really used, milliseconds."""
        if self._level == 0:
            return right.operating_ms
        return self._operating_before_ms + (now_ns - self._on_since_ns) // NS_PER_MS

    def _reader(self, feature: int) -> Callable[[int], bytes]:
        def read(now_ns: int) -> bytes:
            state, reason = self.status(feature)
            right = self._state.rights.get(feature)
            counter, cycles, seconds = 0, NO_LIMIT, NO_LIMIT
            if right is not None:
                counter = right.counter
                used_ms = self._operating_ms(right, now_ns) if feature == SEAT_HEATING else 0
                if (limit := right.limit(Term.IGNITION_CYCLES)) is not None:
                    cycles = max(0, limit - right.cycles_used)
                if (limit := right.limit(Term.OPERATING_TIME)) is not None:
                    seconds = max(0, limit - used_ms // 1000)
            return bytes([state, reason]) + b"".join(n.to_bytes(4) for n in (counter, cycles, seconds))

        return read

    def _tell_status(self, feature: int, before: tuple[State, Reason], now_ns: int) -> None:
        after = self.status(feature)
        if after != before:
            state, reason = after
            self._tell("feature", now_ns, feature=feature, state=state.name, reason=reason.name)

    def _save_right(self, feature: int, right: Right) -> None:
        self._save(replace(self._state, rights={**self._state.rights, feature: right}))

    def _save(self, state: EcuState) -> None:
        if self._store_failed:
            raise StoreError("the durable memory could not be read at start; nothing is stored over it")
        self._store.save(state)
        self._state = state
