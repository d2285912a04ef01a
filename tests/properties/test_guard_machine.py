"""The guard against a model that keeps nothing but the list of frames that may still come."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.edge_ecu import LAMP, READ, RELEASE, S_NS, SEAT, SESSION, feature, pieces, rights, token

from agent.errors import GuardRefusal
from agent.features.guard import MAX_FRAMES_PER_S, Guard, activation_request
from agent.model import EcuSpec, Frame

FEATURES = {"seat-heating": feature(), "lamp": feature("lamp", LAMP)}
TOKENS = {name: token(name) for name in FEATURES}
REQUESTS = [
    READ,
    RELEASE,
    SESSION,
    b"\x11\x01",
    *(activation_request(FEATURES[name], TOKENS[name]) for name in FEATURES),
]
ECUS = {"seat-heating": SEAT, "lamp": LAMP}


class GuardMachine(RuleBasedStateMachine):
    """Approves, sends, closes and changes rights in any order."""

    @initialize()
    def start(self) -> None:
        self.guard = Guard(listen_only=False)
        self.known: frozenset[str] = frozenset()
        self.live: frozenset[str] = frozenset()
        self.paused = False
        self.now_ns = S_NS
        self.sent_ns: list[int] = []
        # ECU → (request, frames still to come)
        self.open: dict[EcuSpec, tuple[bytes, list[Frame]]] = {}

    def is_allowed(self, ecu: EcuSpec, request: bytes) -> bool:
        for name in self.known:
            if ECUS[name] == ecu:
                if request in (READ, RELEASE, SESSION):
                    return True
                if name in self.live and request == activation_request(FEATURES[name], TOKENS[name]):
                    return True
        return False

    @rule(
        known=st.frozensets(st.sampled_from(sorted(FEATURES))),
        live=st.frozensets(st.sampled_from(sorted(FEATURES))),
    )
    def allow(self, known: frozenset[str], live: frozenset[str]) -> None:
        features = [FEATURES[name] for name in known]
        self.guard.allow(rights(*features, tokens=tuple(TOKENS[n] for n in known)), live)
        self.known, self.live = known, live
        self.open = {
            ecu: (request, rest)
            for ecu, (request, rest) in self.open.items()
            if not rest or self.is_allowed(ecu, request)
        }

    @rule(ecu=st.sampled_from([SEAT, LAMP]), request=st.sampled_from(REQUESTS))
    def approve(self, ecu: EcuSpec, request: bytes) -> None:
        expected = not self.paused and ecu not in self.open and self.is_allowed(ecu, request)
        try:
            self.guard.approve(ecu, request)
        except GuardRefusal:
            assert not expected
        else:
            assert expected
            self.open[ecu] = (request, pieces(request, ecu))

    @rule(ecu=st.sampled_from([SEAT, LAMP]))
    def close(self, ecu: EcuSpec) -> None:
        self.guard.close(ecu)
        self.open.pop(ecu, None)

    @rule(is_paused=st.booleans())
    def pause(self, is_paused: bool) -> None:
        if is_paused:
            self.guard.pause("test")
            self.open.clear()
        else:
            self.guard.resume()
        self.paused = is_paused

    @rule(step_ns=st.integers(0, S_NS))
    def pass_time(self, step_ns: int) -> None:
        self.now_ns += step_ns

    def send(self, frame: Frame, expected: bool) -> bool:
        recent = [t for t in self.sent_ns if self.now_ns - t < S_NS]
        expected = expected and not self.paused and len(recent) < MAX_FRAMES_PER_S
        try:
            self.guard.check_frame(frame, self.now_ns)
        except GuardRefusal:
            assert not expected, frame
            return False
        assert expected, frame
        self.sent_ns = [*recent, self.now_ns]
        return True

    @rule(ecu=st.sampled_from([SEAT, LAMP]), count=st.integers(1, 30))
    def send_next(self, ecu: EcuSpec, count: int) -> None:
        for _ in range(count):
            rest = self.open[ecu][1] if ecu in self.open else []
            if not rest:
                return
            if self.send(rest[0], expected=True):
                rest.pop(0)

    @rule(ecu=st.sampled_from([SEAT, LAMP]))
    def flow_control(self, ecu: EcuSpec) -> None:
        frame = Frame(ecu.bus, ecu.request_id, b"\x30\x08\x00")
        self.send(frame, expected=ecu in self.open and not self.open[ecu][1])

    @rule(
        ecu=st.sampled_from([SEAT, LAMP]),
        request=st.sampled_from(REQUESTS),
        index=st.integers(0, 40),
        bus=st.sampled_from(["body", "power"]),
    )
    def send_any_piece(self, ecu: EcuSpec, request: bytes, index: int, bus: str) -> None:
        frames = pieces(request, ecu)
        piece = frames[index % len(frames)]
        frame = Frame(bus, piece.can_id, piece.data)
        rest = self.open[ecu][1] if ecu in self.open else []
        if self.send(frame, expected=bool(rest) and rest[0] == frame):
            rest.pop(0)

    @rule(can_id=st.integers(0, 0x7FF), data=st.binary(max_size=8))
    def send_anything(self, can_id: int, data: bytes) -> None:
        frame = Frame("body", can_id, data)
        for ecu, (_, rest) in self.open.items():
            if rest and rest[0] == frame:
                return  # the machine has found a real piece by chance
            if not rest and can_id == ecu.request_id and data[:1] in {b"\x30", b"\x31", b"\x32"}:
                return
        self.send(frame, expected=False)

    @invariant()
    def nothing_waits_without_a_right(self) -> None:
        for ecu, (request, rest) in self.open.items():
            assert not rest or self.is_allowed(ecu, request)


GuardMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGuardMachine = GuardMachine.TestCase
