"""The head unit is rooted: its owner controls the agent, its disk and keys, and every frame on the bus.

Against such an attacker only the ECU counts. The attacks here go to the ECU's own door: UDS requests, frames,
resets and power cuts. The first parts show what gives nothing and changes nothing. Tests named `test_bound_…`
show what the attacker *can* do, and where it ends (docs/threat-model.md).

Feature thefts that are publicly known, and where they are tried: keys taken from a rooted head unit, key
generators for activation codes, boxes spliced into the bus that replay enable frames.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import cbor2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from support.sim_world import (
    ANNOUNCE,
    DATABASE,
    EXTENDED,
    IDENTITY,
    INSTALL,
    RELEASE,
    MemoryStore,
    S,
    ask,
    read_back,
    seat_module,
    token,
    vehicle,
)
from vectors import make_token_vectors as signer

from firmware_sim.diagnostics import DiagnosticLink
from firmware_sim.ecu import MAX_HEAT_LEVEL, EcuState, SeatModule
from firmware_sim.frame import Frame

ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
LEASE = 5
Terms = dict[int, int | list[int]]


class PowerCut(Exception):
    """The power went at this moment; nothing after it was executed."""


@dataclass
class CutStore(MemoryStore):
    """A memory whose power goes right before or right after a write, counted from 1."""

    cut_before: int = 0
    cut_after: int = 0
    begun: int = 0

    def save(self, state: EcuState) -> None:
        self.begun += 1
        if self.begun == self.cut_before:
            raise PowerCut
        super().save(state)
        if self.begun == self.cut_after:
            raise PowerCut


@dataclass
class Target:
    """The ECU under attack, with its memory."""

    store: MemoryStore = field(default_factory=MemoryStore)
    epochs: int = 1

    def __post_init__(self) -> None:
        self.seat = seat_module(self.store, epochs=self.epochs)
        self.seat.terminal_15(on=True, now_ns=0)

    def install(self, content: bytes) -> bytes:
        return ask(self.seat, INSTALL + content)

    def wake(self) -> tuple[int, int]:
        """Ignition off and on; state and reason after it."""
        self.seat.terminal_15(on=False, now_ns=0)
        self.seat.terminal_15(on=True, now_ns=0)
        return read_back(self.seat)[:2]

    def restart(self) -> None:
        """Power off and on: a new ECU with the old memory, asleep until terminal 15."""
        self.seat = seat_module(self.store, epochs=0)

    def heats(self) -> bool:
        """The driver asks for heat; True if the seat gets warm."""
        self.seat.press(MAX_HEAT_LEVEL, 0)
        is_warm = self.seat.heat_level > 0
        self.seat.press(0, 0)
        return is_warm

    def refuses(self, content: bytes, nrc: int) -> None:
        """Asserts that the ECU refuses a token and that nothing whatever has changed."""
        was_warm = self.heats()
        before, writes = self.store.state, self.store.writes
        assert self.install(content) == bytes([0x7F, 0x31, nrc])
        assert self.store.state is before
        assert self.store.writes == writes
        assert self.seat.state == before
        assert self.heats() == was_warm


def rights(state: EcuState) -> dict[int, tuple[int, str, bool]]:
    """What tokens have decided: counter, hash and state by feature."""
    return {number: (r.counter, r.sha256, r.allowed) for number, r in state.rights.items()}


def sealed(claims: dict[int, object], external: list[object], key: signer.Key = signer.KEY_1) -> bytes:
    """A token that the token key really signed, for whatever it was made."""
    return signer.sign1(signer.dumps(claims), external, key)


# --- nothing is switched on without a valid token ---


def requests() -> Iterator[bytes]:
    """Every service and sub-function, with and without data, and every routine and identifier nearby."""
    for service, sub_function in itertools.product(range(256), range(256)):
        yield bytes([service, sub_function])
    for service in range(256):
        yield bytes([service])
        for data in (bytes.fromhex("0F0D01"), bytes.fromhex("0F210100000001"), b"\xff" * 20):
            yield bytes([service, 0x01]) + data
            yield bytes([service]) + data
    for low in range(0x100):
        for action in (1, 2, 3):
            yield bytes([0x31, action, 0x0F, low, 0x00, 0x01])
            yield bytes([0x31, action, 0x0F, low])


def test_no_request_whatever_switches_on_what_has_no_token() -> None:
    target = Target()
    before, writes = target.store.state, target.store.writes
    for request in requests():
        target.seat.handle(EXTENDED, 0)
        target.seat.handle(request, 0)
    assert not target.heats()
    assert read_back(target.seat)[:3] == (0, 1, 0)
    assert target.store.state is before
    assert target.store.writes == writes


def test_no_service_reaches_the_memory_of_a_token_that_was_burnt() -> None:
    target = Target()
    target.install(token(1))
    target.install(token(2, state=0))
    before, writes = target.store.state, target.store.writes
    for request in requests():
        target.seat.handle(EXTENDED, 0)
        target.seat.handle(request, 0)
    assert target.store.state is before
    assert target.store.writes == writes
    target.refuses(token(1), 0x24)


def test_brute_force_of_sessions_and_security_access_opens_nothing() -> None:
    """There is no seed and no key to guess: the session is open to all, and only a signature counts."""
    target = Target()
    before = target.store.state
    answers = {target.seat.handle(bytes([0x10, n]), 0) for n in range(256)}
    assert {a[:2] for a in answers if a is not None and a[0] == 0x50} == {b"\x50\x01", b"\x50\x03"}
    for guess in range(10_000):
        assert target.seat.handle(b"\x27\x02" + guess.to_bytes(4), 0) == bytes.fromhex("7F2711")
    for second in range(0, 600, 6):  # each in a new session
        target.seat.handle(EXTENDED, second * S)
        assert target.seat.handle(INSTALL + bytes(64), second * S) == bytes.fromhex("7F3131")
    assert target.store.state is before
    assert not target.heats()


# --- keys taken from the head unit, key generators ---


def test_keys_taken_from_the_head_unit_sign_no_token() -> None:
    """The device key is P-256 and for TLS and usage; the agent holds nothing that the ECU trusts."""
    target = Target()
    device = ec.generate_private_key(ec.SECP256R1())
    protected = signer.dumps({1: -7, 4: signer.KEY_1.kid})
    payload = signer.dumps({1: 1, 2: 1, 3: 1, 4: 1})
    external = signer.dumps(signer.external())
    r, s = decode_dss_signature(
        device.sign(signer.dumps(["Signature1", protected, external, payload]), ec.ECDSA(SHA256()))
    )
    content = cbor2.CBORTag(18, [protected, {}, payload, r.to_bytes(32) + s.to_bytes(32)])
    target.refuses(signer.dumps(content), 0x31)
    target.refuses(sealed({1: 1, 2: 1, 3: 1, 4: 1}, signer.external(), signer.FOREIGN), 0x33)
    under_its_kid = signer.sign1(
        payload, signer.external(), signer.FOREIGN, protected=signer.dumps({1: -8, 4: signer.KEY_1.kid})
    )
    target.refuses(under_its_kid, 0x33)


def generated_keys() -> Iterator[bytes]:
    """Seeds as key generators make them: from all that can be read from a car, and well-known secrets."""
    public = (signer.VIN.encode(), signer.UID, signer.KEY_1.public, signer.KEY_1.kid, signer.ROOT.public, b"")
    for first, second in itertools.product(public, repeat=2):
        for digest in (hashlib.sha256, hashlib.sha3_256, hashlib.blake2s):
            yield digest(first + second).digest()
    yield from (public[2], public[4], bytes(32), b"\xff" * 32)
    yield from (n.to_bytes(32) for n in range(1, 100))


def test_a_key_generator_that_knows_every_public_part_makes_no_token() -> None:
    target = Target()
    payload = signer.dumps({1: 1, 2: 1, 3: 1, 4: 1})
    protected = signer.dumps({1: -8, 4: signer.KEY_1.kid})
    signed = signer.dumps(["Signature1", protected, signer.dumps(signer.external()), payload])
    for seed in generated_keys():
        signature = Ed25519PrivateKey.from_private_bytes(seed).sign(signed)
        content = signer.dumps(cbor2.CBORTag(18, [protected, {}, payload, signature]))
        assert target.install(content) == bytes.fromhex("7F3133")
    assert not target.store.state.rights
    assert not target.heats()


def test_activation_codes_of_every_length_are_no_tokens() -> None:
    target = Target()
    for length in range(1, 65):
        for code in (b"0" * length, bytes(length), hashlib.sha512(bytes([length])).digest()[:length]):
            assert target.install(code) == bytes.fromhex("7F3131")
    assert not target.store.state.rights


def signatures() -> dict[str, bytes]:
    """Signatures that weak verifiers have taken."""
    genuine = signer.GOOD[-64:]
    r, s = genuine[:32], int.from_bytes(genuine[32:], "little")
    identity = (1).to_bytes(32, "little")
    return {
        "all zero": bytes(64),
        "all ones": b"\xff" * 64,
        "neutral element and zero": identity + bytes(32),
        "point of small order": bytes(32) + bytes(32),
        "scalar plus the order of the group": r + (s + ED25519_ORDER).to_bytes(32, "little"),
        "halves exchanged": genuine[32:] + genuine[:32],
        "of another token": token(9)[-64:],
        "of an announcement": signer.announcement(1, signer.KEY_1)[-64:],
    }


@pytest.mark.parametrize("name", signatures())
def test_a_signature_that_weak_verifiers_take_is_refused(name: str) -> None:
    target = Target()
    assert signatures()[name] != signer.GOOD[-64:]
    target.refuses(signer.GOOD[:-64] + signatures()[name], 0x33)


def test_every_single_bit_of_a_genuine_token_counts() -> None:
    target = Target()
    before = target.store.state
    for position, bit in itertools.product(range(len(signer.GOOD)), range(8)):
        content = bytearray(signer.GOOD)
        content[position] ^= 1 << bit
        answer = target.install(bytes(content))
        assert answer[:2] == b"\x7f\x31", (position, bit)
        assert answer[2] in {0x31, 0x33}, (position, bit)
    assert target.store.state is before
    assert target.install(signer.GOOD)[0] == 0x71  # and the genuine one is still good


# --- tokens of others ---

PLAIN: dict[int, object] = {1: 1, 2: 1, 3: 1, 4: 1}


@pytest.mark.parametrize(
    ("claims", "external", "nrc"),
    [
        (PLAIN, signer.external(vin=signer.OTHER_VIN), 0x33),
        (PLAIN, signer.external(uid=signer.OTHER_UID), 0x33),
        (PLAIN, signer.external(vin=signer.OTHER_VIN, uid=signer.OTHER_UID), 0x33),
        ({**PLAIN, 5: 1}, signer.external(1, vin=signer.OTHER_VIN), 0x33),
        ({**PLAIN, 5: 2}, signer.external(2, uid=signer.OTHER_UID), 0x33),
        ({**PLAIN, 5: 1}, signer.external(2), 0x33),
        ({**PLAIN, 2: 2}, signer.external(), 0x31),
    ],
    ids=["car", "ECU", "car and ECU", "car, by VIN", "ECU, by uid", "another link", "feature"],
)
def test_a_genuine_token_of_another_is_worth_nothing_here(
    claims: dict[int, object], external: list[object], nrc: int
) -> None:
    Target().refuses(sealed(claims, external), nrc)


def test_a_token_of_another_feature_cannot_be_rewritten_for_this_one() -> None:
    other = sealed({**PLAIN, 2: 2}, signer.external())
    rewritten = other.replace(signer.dumps({**PLAIN, 2: 2}), signer.dumps(PLAIN))
    assert rewritten != other
    Target().refuses(rewritten, 0x33)


def test_of_two_features_each_takes_its_own_token_only() -> None:
    store = MemoryStore()
    seat = seat_module(store, features=frozenset({1, 2}))
    assert ask(seat, INSTALL + sealed({**PLAIN, 2: 2, 3: 50}, signer.external()))[0] == 0x71
    assert rights(store.state).keys() == {2}
    seat.terminal_15(on=True, now_ns=0)
    seat.press(MAX_HEAT_LEVEL, 0)
    assert seat.heat_level == 0


# --- boxes spliced into the bus ---


class Wire:
    """One ECU's end of the bus, frame by frame; `sent` is what went over it to the ECU."""

    def __init__(self, seat: SeatModule) -> None:
        self.sent: list[Frame] = []
        self.answers: list[Frame] = []
        self._link = DiagnosticLink(
            request_id=IDENTITY.request_id,
            response_id=IDENTITY.response_id,
            send=lambda can_id, data: self.answers.append(Frame(can_id, data, 0)),
            serve=lambda request: seat.handle(request, 0),
        )

    def put(self, frame: Frame) -> None:
        self.sent.append(frame)
        self._link.receive(frame)

    def request(self, content: bytes) -> None:
        """Sends a request in ISO-TP frames (ISO 15765-2:2016), and takes the answer."""
        if len(content) < 8:
            self._piece(bytes([len(content)]) + content)
        else:
            self._piece((0x1000 | len(content)).to_bytes(2) + content[:6])
            for index, at in enumerate(range(6, len(content), 7), start=1):
                self._piece(bytes([0x20 | index % 16]) + content[at : at + 7])
        self._piece(bytes.fromhex("300000"))  # whatever it answers may follow at once
        self._link.poll()

    def _piece(self, data: bytes) -> None:
        self.put(Frame(IDENTITY.request_id, data.ljust(8, b"\xcc"), 0))


def paid_exchange(*contents: bytes, vin: str = signer.VIN, uid: bytes = signer.UID) -> list[Frame]:
    """Records all that a tester sees going to the ECU of a car whose feature was paid for."""
    seat = SeatModule(
        replace(IDENTITY, vin=vin, uid=uid),
        features=frozenset({1}),
        token_root=signer.ROOT.public,
        store=MemoryStore(),
        now_ns=0,
    )
    wire = Wire(seat)
    wire.request(EXTENDED)
    wire.request(ANNOUNCE + signer.announcement(1, signer.KEY_1))
    for content in contents:
        wire.request(INSTALL + content)
    assert seat.status(1)[0].name == "ON"  # there it works
    return wire.sent


def test_a_box_that_replays_the_frames_of_a_paid_car_enables_nothing_here() -> None:
    frames = paid_exchange(
        sealed(PLAIN, signer.external(vin=signer.OTHER_VIN, uid=signer.OTHER_UID)),
        vin=signer.OTHER_VIN,
        uid=signer.OTHER_UID,
    )
    target = Target()
    before = target.store.state
    wire = Wire(target.seat)
    for frame in frames * 3:
        wire.put(frame)
    refusals = [f for f in wire.answers if f.data[1:4] == bytes.fromhex("7F3133")]
    assert len(refusals) == 3
    assert target.store.state is before
    assert not target.heats()


def test_a_box_that_replays_this_cars_own_frames_does_not_undo_a_revocation() -> None:
    frames = paid_exchange(token(1), token(2))
    target = Target()
    wire = Wire(target.seat)
    for frame in frames:
        wire.put(frame)
    assert target.heats()
    target.install(token(3, state=0))
    before = target.store.state
    for frame in frames * 3:
        wire.put(frame)
    assert target.store.state is before
    assert not target.heats()


def test_a_box_that_replays_enable_frames_of_the_seat_enables_nothing() -> None:
    """The cyclic frames tell what the ECU does; the ECU does not listen to them."""
    paid = Target()
    paid.install(token(1))
    car = vehicle(paid.seat)
    car.ignition(on=True, now_ns=0)
    car.press_seat(MAX_HEAT_LEVEL, 0)
    recorded = car.step(3 * S)
    by_id = {DATABASE.get_message_by_name("SEAT_HEAT").frame_id}
    assert any(f.can_id in by_id and f.data[2:] != bytes(6) for f in recorded)
    target = Target()
    before, wire = target.store.state, Wire(target.seat)
    for frame in recorded:
        wire.put(frame)
    for can_id in range(0x800):
        for data in (b"\xff" * 8, bytes(8), b"\x01" * 8):
            if can_id != IDENTITY.request_id:
                wire.put(Frame(can_id, data, 0))
    assert target.store.state is before
    assert not wire.answers
    assert not target.heats()


# --- replay ---


def test_an_older_token_is_refused_and_the_newer_one_stays() -> None:
    target = Target()
    target.install(token(7, terms={5: LEASE}))
    for counter in range(1, 7):
        target.refuses(token(counter), 0x24)
    target.refuses(token(7), 0x24)  # the same counter, other bytes: without its lease


def test_after_a_revocation_no_token_of_before_works_whatever_comes_between() -> None:
    target = Target()
    for counter in (1, 2, 3):
        target.install(token(counter))
    target.install(token(4, state=0))
    shocks: list[Callable[[], object]] = [
        lambda: None,
        target.wake,
        target.restart,
        lambda: target.seat.handle(bytes.fromhex("1001"), 0),
        lambda: ask(target.seat, RELEASE),
        lambda: ask(target.seat, ANNOUNCE + signer.announcement(1, signer.KEY_1)),
    ]
    for shock in shocks:
        shock()
        for counter in (1, 2, 3):
            target.refuses(token(counter), 0x24)
        assert target.install(token(4, state=0))[:2] == b"\x71\x01"  # success, and nothing changes
        assert read_back(target.seat)[:3] == (0, 3, 4)
        target.seat.terminal_15(on=True, now_ns=0)
        assert not target.heats()


def test_a_forged_token_cannot_move_the_counter() -> None:
    target = Target()
    target.install(token(1))
    target.refuses(sealed({**PLAIN, 3: 0xFFFFFFFF}, signer.external(), signer.FOREIGN), 0x33)
    assert target.install(token(2))[0] == 0x71


def test_the_same_token_again_gives_nothing_back() -> None:
    target = Target()
    lease = token(1, terms={5: LEASE, 6: 3600, 7: 100})
    target.install(lease)
    for left in range(LEASE - 1, -1, -1):
        target.wake()
        assert target.heats()
        for again in (lease, lease):
            target.install(again)
            ask(target.seat, RELEASE)
            target.install(again)
        assert read_back(target.seat)[:4] == (1, 0, 1, left)
    assert target.store.state.rights[1].executions_used == LEASE
    assert target.wake() == (2, 4)
    target.install(lease)
    assert read_back(target.seat)[:2] == (2, 4)
    assert not target.heats()


def test_replaying_a_release_only_ever_switches_off() -> None:
    target = Target()
    for _ in range(3):
        ask(target.seat, RELEASE)
        assert read_back(target.seat)[:2] == (0, 1)
    target.install(token(1))
    for _ in range(3):
        ask(target.seat, RELEASE)
        assert read_back(target.seat)[:3] == (0, 2, 1)
    target.install(token(2, state=0))
    ask(target.seat, RELEASE)
    target.refuses(token(1), 0x24)
    assert read_back(target.seat)[:3] == (0, 3, 2)


# --- power cuts ---

STORY = (token(1, terms={5: LEASE}), token(2, terms={5: LEASE, 6: 60}), token(3, state=0))


@pytest.mark.parametrize("write", [1, 2, 3])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_power_cut_between_storing_and_acting_gives_no_older_token_back(write: int, moment: str) -> None:
    store = CutStore()
    target = Target(store)
    store.begun = 0
    store.cut_before, store.cut_after = (write, 0) if moment == "before" else (0, write)
    answers = (target.install(content) for content in STORY)
    with pytest.raises(PowerCut):
        list(answers)
    store.cut_before = store.cut_after = 0
    target.restart()
    known = write if moment == "after" else write - 1
    assert {n: r[0] for n, r in rights(store.state).items()} == ({1: known} if known else {})
    for older in STORY[: max(0, known - 1)]:
        target.refuses(older, 0x24)
    for content in STORY[max(0, known - 1) :]:  # the one that was cut is repeated, the rest follows
        assert target.install(content)[0] == 0x71
    assert read_back(target.seat)[:3] == (0, 3, 3)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_cutting_the_power_at_every_wake_up_does_not_stretch_a_lease(moment: str) -> None:
    """A cut before the count is written also comes before the output: then the seat stayed cold."""
    store = CutStore()
    target = Target(store)
    target.install(token(1, terms={5: LEASE}))
    warm = 0
    for _ in range(50):
        target.restart()
        store.begun = 0
        store.cut_before, store.cut_after = (1, 0) if moment == "before" else (0, 1)
        try:
            target.seat.terminal_15(on=True, now_ns=0)
        except PowerCut:
            continue
        store.cut_before = store.cut_after = 0
        warm += target.heats()
    assert warm == 0
    store.cut_before = store.cut_after = 0
    target.restart()
    assert target.wake() == ((1, 0) if moment == "before" else (2, 4))


def test_cutting_the_power_in_use_gives_no_operating_time_and_no_execution_back() -> None:
    target = Target()
    target.install(token(1, terms={6: 60, 7: 1000}))
    warm_s = 0
    for _ in range(100):
        target.seat.press(MAX_HEAT_LEVEL, 0)
        if target.seat.heat_level == 0:
            break
        target.seat.sense(speed_kmh=0, now_ns=9 * S)
        warm_s += 9
        target.restart()  # the power goes while it heats
        target.seat.terminal_15(on=True, now_ns=0)
    assert read_back(target.seat)[:2] == (2, 5)
    assert warm_s <= 60
    assert target.store.state.rights[1].executions_used == warm_s // 9


# --- limits that the ECU counts ---


def lie(seat: SeatModule, now_ns: int) -> None:
    """The bus says: standing still, at the beginning of time, a new odometer, and the ignition is off."""
    wire = Wire(seat)
    for _ in range(2):
        seat.hear_time(1_704_067_200, now_ns)
        seat.hear_odometer(0, now_ns)
    power = DATABASE.get_message_by_name("BODY_POWER")
    for ignition in (0, 2, 0):
        values = {f"{power.name}_CRC": 0, f"{power.name}_COUNTER": 1, "BatteryVoltage": 12.0}
        wire.put(Frame(power.frame_id, bytes(power.encode({**values, "IgnitionState": ignition})), 0))
    seat.sense(speed_kmh=0.0, now_ns=now_ns)


@pytest.mark.parametrize(
    ("terms", "reason"),
    [({5: LEASE}, 4), ({6: LEASE}, 5), ({7: LEASE}, 6)],
    ids=["cycles", "time", "executions"],
)
def test_a_counted_limit_ends_without_any_network_although_the_bus_lies(terms: Terms, reason: int) -> None:
    target = Target()
    target.install(token(1, terms={**terms, 1: 1_704_067_300, 2: 9999, 3: 10**9, 4: [0, 10**9]}))
    now_ns, drives = 0, 0
    while read_back(target.seat, now_ns)[0] == 1:
        lie(target.seat, now_ns)
        target.seat.press(MAX_HEAT_LEVEL, now_ns)
        assert target.seat.heat_level == MAX_HEAT_LEVEL
        now_ns += S
        lie(target.seat, now_ns)
        target.seat.press(0, now_ns)
        target.seat.terminal_15(on=False, now_ns=now_ns)
        target.seat.terminal_15(on=True, now_ns=now_ns)
        drives += 1
        assert drives <= LEASE + 1
    assert read_back(target.seat, now_ns)[:2] == (2, reason)
    lie(target.seat, now_ns)
    target.seat.press(MAX_HEAT_LEVEL, now_ns)
    assert target.seat.heat_level == 0
    target.restart()
    assert target.wake() == (2, reason)


def test_resets_are_no_wake_ups_and_no_way_around_them() -> None:
    target = Target()
    target.install(token(1, terms={5: 1}))
    target.wake()
    for _ in range(20):
        target.seat.reset(0)
    assert read_back(target.seat, S)[:2] == (1, 0)
    target.seat.terminal_15(on=False, now_ns=S)
    target.seat.terminal_15(on=True, now_ns=S)
    for _ in range(20):
        target.seat.reset(S)
    assert read_back(target.seat, 2 * S)[:2] == (2, 4)


# --- forged keys ---


@pytest.mark.parametrize(
    ("announcement", "nrc"),
    [
        (signer.announcement(2, signer.FOREIGN, signer.FOREIGN), 0x33),
        (signer.announcement(0xFFFFFFFF, signer.FOREIGN, signer.FOREIGN), 0x33),
        (signer.announcement(2, signer.FOREIGN, signer.KEY_1), 0x33),
        (signer.announcement(1, signer.KEY_1).replace(signer.KEY_1.public, signer.FOREIGN.public), 0x33),
        (signer.announcement(1, signer.FOREIGN), 0x24),
    ],
    ids=["own root", "highest epoch", "by the token key", "tampered", "known epoch, other key"],
)
def test_a_forged_token_key_is_not_learnt_and_its_tokens_are_refused(announcement: bytes, nrc: int) -> None:
    target = Target()
    target.install(token(1))
    before = target.store.state
    assert ask(target.seat, ANNOUNCE + announcement) == bytes([0x7F, 0x31, nrc])
    assert target.store.state is before
    target.refuses(sealed({**PLAIN, 3: 2}, signer.external(), signer.FOREIGN), 0x33)
    assert target.install(token(2))[0] == 0x71


def test_announcing_an_older_epoch_again_does_not_bring_its_key_back() -> None:
    target = Target(epochs=2)
    before = target.store.state
    assert ask(target.seat, ANNOUNCE + signer.announcement(1, signer.KEY_1))[0] == 0x71
    assert target.store.state is before
    target.refuses(token(1), 0x33)  # made with the key of epoch 1, which may have been stolen


# --- malformed and endless ---


def test_malformed_requests_of_every_length_change_nothing() -> None:
    target = Target()
    target.install(token(1))
    before = target.store.state
    bodies = (bytes, lambda n: b"\xff" * n, lambda n: (signer.GOOD * 42)[:n], lambda n: b"\x81" * n)
    for length in (*range(300), 511, 512, 1024, 2048, 4000, 4091):
        for body in bodies:
            content = body(length)
            if content == signer.GOOD:
                continue
            for head in (INSTALL, ANNOUNCE):
                answer = ask(target.seat, head + content)
                assert answer[:2] == b"\x7f\x31"
                assert answer[2] == (0x13 if not 1 <= length <= 256 else 0x31)
    assert target.store.state is before


def test_transfers_that_never_end_hold_the_ecu_up_for_nobody() -> None:
    target = Target()
    before, wire = target.store.state, Wire(target.seat)
    for _ in range(2000):  # first frames of 4,095 bytes, and pieces out of order
        wire.put(Frame(IDENTITY.request_id, bytes.fromhex("1FFF31010F0DD284"), 0))
        wire.put(Frame(IDENTITY.request_id, bytes.fromhex("27FFFFFFFFFFFFFF"), 0))
    assert target.store.state is before
    wire.answers.clear()
    wire.request(EXTENDED)
    wire.request(INSTALL + token(1))
    assert bytes.fromhex("71010F0D") in b"".join(f.data for f in wire.answers)
    assert target.heats()


# --- what the attacker can do, and where it ends ---


def test_bound_a_withheld_revocation_is_worth_the_rest_of_the_lease() -> None:
    target = Target()
    target.install(token(1, terms={5: LEASE}))
    revocation = token(2, state=0)  # signed, sent, and dropped by the head unit
    drives = 0
    while target.wake()[0] == 1:
        assert target.heats()
        drives += 1
        assert drives <= LEASE
    assert drives == LEASE
    for _ in range(10):
        target.install(token(1, terms={5: LEASE}))
        assert target.wake() == (2, 4)
        assert not target.heats()
    assert target.install(revocation)[:2] == b"\x71\x01"
    assert read_back(target.seat)[:3] == (0, 3, 2)


def test_bound_an_unlimited_right_lives_for_as_long_as_its_revocation_is_withheld() -> None:
    """No counted term, no end: what is sold for ever is beyond the cloud's reach if the owner wants it so."""
    target = Target()
    target.install(token(1))
    for _ in range(1000):
        assert target.wake() == (1, 0)
    assert target.heats()
    target.install(token(2, state=0))  # but the first tester that delivers the revocation ends it
    assert not target.heats()
    target.refuses(token(1), 0x24)


@pytest.mark.parametrize(("terms", "reason"), [({6: 60}, 5), ({7: 10}, 6)], ids=["time", "executions"])
def test_bound_use_that_is_never_metered_is_at_most_what_the_lease_allows(terms: Terms, reason: int) -> None:
    """With the agent stopped nothing is billed; the ECU counts on, to its limit and the end of that cycle."""
    target = Target()
    target.install(token(1, terms=terms))
    now_ns = warm_s = starts = 0
    while read_back(target.seat, now_ns)[0] == 1:
        for _ in range(2):  # each cycle: two starts of 5 s
            target.seat.press(MAX_HEAT_LEVEL, now_ns)
            now_ns += 5 * S
            target.seat.sense(speed_kmh=0, now_ns=now_ns)
            target.seat.press(0, now_ns)
            warm_s, starts = warm_s + 5, starts + 1
        target.seat.terminal_15(on=False, now_ns=now_ns)
        target.seat.terminal_15(on=True, now_ns=now_ns)
        assert starts < 100
    assert read_back(target.seat, now_ns)[:2] == (2, reason)
    assert warm_s == 60 if reason == 5 else starts == 10


def test_bound_an_ignition_that_is_never_switched_off_stretches_the_last_cycle_only() -> None:
    """Nothing is taken away under a moving vehicle: the price is one cycle, however long it is held."""
    target = Target()
    target.install(token(1, terms={5: 1, 6: 10}))
    target.wake()
    target.seat.press(MAX_HEAT_LEVEL, 0)
    hours = 100
    for hour in range(hours):
        target.seat.sense(speed_kmh=0, now_ns=hour * 3600 * S)
    assert target.seat.heat_level == MAX_HEAT_LEVEL
    target.seat.terminal_15(on=False, now_ns=hours * 3600 * S)
    target.seat.terminal_15(on=True, now_ns=hours * 3600 * S)
    assert target.seat.heat_level == 0
    assert read_back(target.seat, hours * 3600 * S)[0] == 2


@pytest.mark.parametrize(
    "terms", [{1: 1_800_000_000}, {2: 1}, {3: 1}, {4: [0, 1]}], ids=["date", "days", "distance", "range"]
)
def test_bound_lies_about_date_and_odometer_give_no_more_than_the_counted_limit(terms: Terms) -> None:
    honest, lied_to = Target(), Target()
    for target in (honest, lied_to):
        lie(target.seat, 0)
        target.install(token(1, terms={**terms, 5: LEASE}))
        for _ in range(2):
            honest.seat.hear_time(1_900_000_000, 0)
            honest.seat.hear_odometer(10**6, 0)
    drives = {"honest": 0, "lied to": 0}
    for _ in range(3 * LEASE):
        lie(lied_to.seat, 0)
        drives["honest"] += honest.wake()[0] == 1
        drives["lied to"] += lied_to.wake()[0] == 1
    assert drives == {"honest": 0, "lied to": LEASE}


def test_bound_a_false_date_rests_a_right_and_takes_it_from_nobody() -> None:
    target = Target()
    target.install(token(1, terms={1: 1_800_000_000, 5: 9}))
    for _ in range(2):
        target.seat.hear_time(4_000_000_000, 0)
    assert target.wake() == (2, 7)
    for _ in range(2):
        target.seat.hear_time(1_790_000_000, 0)
    assert target.wake() == (1, 0)
    assert target.heats()


def test_bound_a_false_speed_lifts_the_speed_limit_and_the_interlock_but_gives_no_right() -> None:
    target = Target()
    target.seat.sense(speed_kmh=0.0, now_ns=0)  # whatever the car really does
    assert not target.heats()
    target.install(token(1, terms={5: 2, 8: 30}))  # NRC 0x88 is not given at a false 0 km/h
    assert target.heats()
    assert [target.wake()[0] for _ in range(3)] == [1, 1, 2]
    assert not target.heats()


def test_bound_a_forged_read_back_deceives_the_cloud_and_not_the_ecu() -> None:
    """A read-back carries no proof: the bytes of any state can be made up. The ECU's own door stays."""
    target = Target()
    target.install(token(1))
    genuine = ask(target.seat, bytes.fromhex("220F21"))
    forged = bytes.fromhex("620F21") + bytes([0, 3]) + (2).to_bytes(4) + b"\xff" * 8  # "it is revoked"
    assert genuine != forged
    assert len(forged) == len(genuine)
    assert target.heats()  # as long as the revocation is withheld
    target.install(token(2, state=0))
    assert ask(target.seat, bytes.fromhex("220F21")) == forged  # not to be told from the truth
    target.refuses(token(1), 0x24)
    assert not target.heats()


def test_bound_switching_off_is_open_to_all_and_the_owner_loses_nothing_by_it() -> None:
    target = Target()
    lease = token(1, terms={5: LEASE})
    target.install(lease)
    for _ in range(100):
        ask(target.seat, RELEASE)
        assert not target.heats()
    assert target.install(lease)[0] == 0x71
    assert read_back(target.seat)[:4] == (1, 0, 1, LEASE)
    assert target.heats()
