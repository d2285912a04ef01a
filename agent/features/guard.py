"""The last gate before a bus: what is not allowed here is not sent.

Pure. Default deny: the allow-list is made from the verified catalogue and the
live rights alone. A UDS request is judged first (`approve`), and then every
single frame of it (`check_frame`), so that a fault in the transport layer or
in whoever calls it cannot put other bytes on the bus.

Limits: one open request per ECU; MAX_FRAMES_PER_S frames a second over all ECUs.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.errors import GuardRefusal
from agent.model import ActuatorKind, EcuSpec, FeatureSpec, Frame, Rights, Token, TokenKeyAnnouncement

MAX_FRAMES_PER_S = 200
"""Frames in any second, all ECUs together: a token takes about 20."""
MAX_REQUEST_BYTES = 512
"""Longest UDS request: a token of 256 bytes and its header fit."""

MAX_STANDARD_ID = 0x7FF
"""Highest 11-bit identifier."""
MAX_FRAME_BYTES = 8
"""Data of a classic CAN frame; CAN FD is never sent."""

_FLOW_CONTROL = 3
_MAX_FLOW_STATUS = 2
_SESSION_CONTROL = 0x10
_DEFAULT_SESSION = 0x01
_READ = 0x22
_ANNOUNCE = bytes.fromhex("31010F0C")
_NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class _Allowed:
    """What may be asked of one ECU."""

    exact: frozenset[bytes]
    """Requests that are allowed as they stand: reads, sessions, releases."""
    tokens: Mapping[tuple[bytes, str], str]
    """(request before the token, SHA-256 of the token) → feature, while it may be sent."""
    token_key: str
    """SHA-256 of the token key's announcement; empty if it may not be sent."""


@dataclass
class _Open:
    """The request that is being sent to one ECU."""

    ecu: EcuSpec
    payload: bytes
    sent: int = 0
    next_sequence: int = 1


class Guard:
    """Judges requests and frames against the catalogue and the live rights."""

    def __init__(self, *, listen_only: bool) -> None:
        """Starts with an empty allow-list.

        Args:
            listen_only: nothing at all may be sent.
        """
        self._listen_only = listen_only
        self._paused: str = ""
        self._ecus: dict[EcuSpec, _Allowed] = {}
        self._request_ids: frozenset[tuple[str, int]] = frozenset()
        self._open: dict[tuple[str, int], _Open] = {}
        self._sent_ns: deque[int] = deque(maxlen=MAX_FRAMES_PER_S)

    def allow(self, rights: Rights, live: Iterable[str]) -> None:
        """Replaces the allow-list; an open request that it no longer holds sends no further piece.

        Args:
            rights: the verified rights; their features may be read and released.
            live: ids of the features that may be switched on now. A token with
                state 0 takes something away and may always be sent.
        """
        live = frozenset(live)
        exact: dict[EcuSpec, set[bytes]] = {}
        tokens: dict[EcuSpec, dict[tuple[bytes, str], str]] = {}
        for feature in rights.features.values():
            if feature.ecu is None or feature.kind is ActuatorKind.NONE:
                continue
            exact.setdefault(feature.ecu, set()).update(_exact_requests(feature))
            token = rights.tokens.get(feature.feature_id)
            if token is not None and (not token.allows or feature.feature_id in live):
                place = (feature.activate, token.sha256)
                tokens.setdefault(feature.ecu, {})[place] = feature.feature_id
        # Who gets no token of this set needs no key for it.
        keyed = {f.ecu for f in rights.features.values() if f.feature_id in rights.tokens}
        token_key = rights.token_key.sha256 if rights.token_key else ""
        self._ecus = {
            ecu: _Allowed(frozenset(exact[ecu]), tokens.get(ecu, {}), token_key if ecu in keyed else "")
            for ecu in exact
        }
        self._request_ids = frozenset((ecu.bus, ecu.request_id) for ecu in exact)
        # What is out already can only be answered; the rest of a request must still be allowed.
        self._open = {
            key: request
            for key, request in self._open.items()
            if request.sent == len(request.payload) or self._allows(request.ecu, request.payload)
        }

    def is_request_id(self, bus: str, can_id: int) -> bool:
        """True if an ECU of the allow-list takes its requests there."""
        return (bus, can_id) in self._request_ids

    def pause(self, reason: str) -> None:
        """Sends nothing until `resume`, for example while another tester speaks."""
        self._paused = reason
        self._open.clear()

    def resume(self) -> None:
        """Ends a pause."""
        self._paused = ""

    def approve(self, ecu: EcuSpec, payload: bytes) -> None:
        """Judges a UDS request; its frames may follow until `close`.

        Raises:
            GuardRefusal: it is not in the allow-list, or another is still open.
        """
        self._refuse_if_silent()
        key = (ecu.bus, ecu.request_id)
        if ecu not in self._ecus:
            raise GuardRefusal(f"no live catalogue entry names {ecu.identifier} at 0x{ecu.request_id:X}")
        if not 0 < len(payload) <= MAX_REQUEST_BYTES:
            raise GuardRefusal(
                f"request to {ecu.identifier} of {len(payload)} bytes, expected 1 to {MAX_REQUEST_BYTES}"
            )
        if key in self._open:
            raise GuardRefusal(f"a request to {ecu.identifier} is still open")
        if not self._allows(ecu, payload):
            raise GuardRefusal(
                f"request {payload[:8].hex(' ')}… to {ecu.identifier} is neither in the signed catalogue"
                " nor does it carry the token of a live right or the listed token key"
            )
        self._open[key] = _Open(ecu, payload)

    def close(self, ecu: EcuSpec) -> None:
        """Ends the request that is open to an ECU; frames to it are refused again."""
        self._open.pop((ecu.bus, ecu.request_id), None)

    def check_frame(self, frame: Frame, now_ns: int) -> None:
        """Judges one frame right before it is sent.

        The frame must be the next piece of the approved request, byte by byte
        (ISO 15765-2:2016, 9.6: single, first and consecutive frames), or a
        flow control for its answer.

        Args:
            now_ns: monotonic time, for the rate.

        Raises:
            GuardRefusal: it is anything else, or there are too many.
        """
        self._refuse_if_silent()
        request = self._open.get((frame.bus, frame.can_id))
        if request is None or frame.is_extended != (frame.can_id > MAX_STANDARD_ID):
            raise GuardRefusal(f"frame 0x{frame.can_id:X} on {frame.bus}: no approved request is open for it")
        if frame.is_fd or len(frame.data) > MAX_FRAME_BYTES:
            raise GuardRefusal(
                f"frame 0x{frame.can_id:X} on {frame.bus} is CAN FD; only classic frames are sent"
            )
        full = len(self._sent_ns) == MAX_FRAMES_PER_S
        if full and now_ns - self._sent_ns[0] < _NS_PER_S:
            raise GuardRefusal(f"more than {MAX_FRAMES_PER_S} frames in a second")
        if not _take(request, frame.data):
            raise GuardRefusal(
                f"frame 0x{frame.can_id:X} {frame.data.hex(' ')} is not the next piece of the"
                " approved request"
            )
        self._sent_ns.append(now_ns)

    def _allows(self, ecu: EcuSpec, payload: bytes) -> bool:
        allowed = self._ecus.get(ecu)
        return allowed is not None and (
            payload in allowed.exact or _carries_token(payload, allowed) or _carries_key(payload, allowed)
        )

    def _refuse_if_silent(self) -> None:
        if self._listen_only:
            raise GuardRefusal("the agent is listen-only; set [vehicle] listen_only = false to let it write")
        if self._paused:
            raise GuardRefusal(f"paused: {self._paused}")


def activation_request(feature: FeatureSpec, token: Token) -> bytes:
    """The request that carries a token to its ECU."""
    return feature.activate + token.content


def announcement_request(token_key: TokenKeyAnnouncement) -> bytes:
    """The request that announces a token key to an ECU (docs/token.md, "UDS")."""
    return _ANNOUNCE + token_key.content


def read_back_request(feature: FeatureSpec) -> bytes:
    """The request that reads what the ECU does (ISO 14229-1:2020, service 0x22)."""
    if feature.read_back is None:
        raise GuardRefusal(f"{feature.feature_id} has no read-back in the catalogue")
    return bytes([_READ]) + feature.read_back.did.to_bytes(2, "big")


def reading_request(feature: FeatureSpec) -> bytes:
    """The request for what the ECU signs of its own count (ISO 14229-1:2020, service 0x22)."""
    if feature.reading is None:
        raise GuardRefusal(f"{feature.feature_id} has no reading in the catalogue")
    return bytes([_READ]) + feature.reading.did.to_bytes(2, "big")


def session_request(session: int) -> bytes:
    """The request that opens a diagnostic session (ISO 14229-1:2020, service 0x10)."""
    return bytes([_SESSION_CONTROL, session])


def _exact_requests(feature: FeatureSpec) -> set[bytes]:
    requests = {session_request(feature.session), session_request(_DEFAULT_SESSION)}
    if feature.release_request:
        requests.add(feature.release_request)
    if feature.read_back is not None:
        requests.add(read_back_request(feature))
    if feature.reading is not None:
        requests.add(reading_request(feature))
    return requests


def _carries_token(payload: bytes, allowed: _Allowed) -> bool:
    return any(
        payload.startswith(prefix) and hashlib.sha256(payload[len(prefix) :]).hexdigest() == sha256
        for prefix, sha256 in allowed.tokens
    )


def _carries_key(payload: bytes, allowed: _Allowed) -> bool:
    digest = hashlib.sha256(payload.removeprefix(_ANNOUNCE)).hexdigest()
    return payload.startswith(_ANNOUNCE) and digest == allowed.token_key


def _take(request: _Open, data: bytes) -> bool:
    """True if `data` is the next piece of the request; then it counts as sent."""
    if not data:
        return False
    total, kind = len(request.payload), data[0] >> 4
    if kind == _FLOW_CONTROL:
        # Only after the whole request is out can there be an answer to control.
        has_form = len(data) in (3, 8) and data[0] & 0x0F <= _MAX_FLOW_STATUS and not any(data[3:])
        return request.sent == total and has_form
    if request.sent == 0 and total <= 7:  # noqa: PLR2004 (payload of a single frame)
        piece, expected = data[1:], bytes([total])
        size = total
    elif request.sent == 0:
        piece, expected = data[2:], (0x1000 | total).to_bytes(2, "big")
        size = 6
    else:
        piece, expected = data[1:], bytes([0x20 | request.next_sequence])
        size = min(7, total - request.sent)
    wanted = request.payload[request.sent : request.sent + size]
    if size == 0 or data[: len(expected)] != expected or piece[:size] != wanted or any(piece[size:]):
        return False
    if request.sent:
        request.next_sequence = (request.next_sequence + 1) % 16
    request.sent += size
    return True
