"""What the engine is told, and what it asks for.

Pure values. Commands that must survive a power cut carry a number; the loop
answers each with Persisted(number) once it is on disk, so that "persist
before acting" can be read in the engine.

Most are named tuples: a class of them is made in an eighth of the time, and a start
makes all of them before the first frame. Two of different kinds are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.errors import VehicleError
from agent.metering.meter import OpenWindow
from agent.metering.record import Head, Record
from agent.model import EcuSpec, Rights, SignalBatch, TrustBytes, Verdict, Versions
from agent.trust.grant_log import LogEntry, LogHead

# --- events ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Booted:
    """The agent has started; this is what its store holds.

    Args:
        verdict: stored rights, verified again; None before the first contact.
        windows: metering windows that were open when the agent ended.
        same_boot: monotonic times in `windows` are of the present boot.
        acked_seq: the cloud has signed for records up to here.
        used: amounts closed under each (entitlement, meter), in ms or m.
        last_contact_ms: trusted time of the last signed answer, 0 if none.
        token_counters: highest counter ever seen of each (ECU, feature).
        log_head: where the owner's log ends.
        owner_epoch: that the stored history is of, 0 if none.
        former: ids of former owners' rights that `windows` are of.
    """

    verdict: Verdict | None
    head: Head
    acked_seq: int
    windows: tuple[OpenWindow, ...]
    same_boot: bool
    used: Mapping[tuple[str, str], int]
    last_contact_ms: int
    token_counters: Mapping[tuple[str, str], int] = field(default_factory=dict)
    log_head: LogHead = LogHead()
    owner_epoch: int = 0
    former: frozenset[str] = frozenset()


class SignalsArrived(NamedTuple):
    """A bus brought frames in one window."""

    batch: SignalBatch


class BusChanged(NamedTuple):
    """A bus is up or lost."""

    bus: str
    state: str
    reason: str


class NonceMade(NamedTuple):
    """The random bytes that were asked for."""

    nonce: bytes


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The stream to the cloud is open."""


class LinkDown(NamedTuple):
    """The stream to the cloud has ended."""

    reason: str


class UpdateArrived(NamedTuple):
    """The cloud sent metadata; nothing of it is verified."""

    update: TrustBytes


class UpdateVerified(NamedTuple):
    """A worker verified an update.

    Args:
        nonce: the one that it answers.
        new_epoch: root keys replaced the keys that signed all earlier times.
    """

    verdict: Verdict
    nonce: bytes
    received_ns: int
    new_epoch: bool = False


class BundleVerified(NamedTuple):
    """A worker verified rights that came as a file: no contact with the cloud."""

    verdict: Verdict
    received_ns: int


class UpdateRefused(NamedTuple):
    """An update was refused; the trusted state is unchanged.

    Args:
        verified: it came as far as the worker; False if the link refused it unread.
    """

    kind: str
    reason: str
    verified: bool = True


class Persisted(NamedTuple):
    """The command with this number is on disk."""

    number: int


class EcuDone(NamedTuple):
    """An ECU job has ended.

    Args:
        answer: response to the job's last request; empty on error.
        error: why it failed, or None.
    """

    feature_id: str
    answer: bytes
    error: VehicleError | None


class ReceiptStored(NamedTuple):
    """A genuine receipt of the cloud is on disk."""

    through_seq: int


class JournalFull(NamedTuple):
    """The journal is at its limit, and only what was never sent is left to be made smaller."""


class RestartSigned(NamedTuple):
    """An operator's word, verified, that the journal goes on in a new one.

    Args:
        restart: what the store is to do; of no interest here.
    """

    restart: object


class JournalMoved(NamedTuple):
    """The command with this number has changed where the journal ends, or left it as it was.

    Args:
        head: where it ends now, on disk.
        restarted: it is another journal, of which the cloud has signed for nothing yet.
    """

    number: int
    head: Head
    restarted: bool = False


class JournalDead(NamedTuple):
    """Usage cannot be made durable; what was handed over is not lost, and is tried again."""

    reason: str


class JournalAlive(NamedTuple):
    """Usage is made durable again, and so is all that waited."""


class UsageRefused(NamedTuple):
    """The cloud did not store a batch; it holds records up to `stored_through_seq`."""

    kind: str
    reason: str
    stored_through_seq: int


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stopping:
    """The agent will end; open windows are closed."""


Event = (
    Booted
    | SignalsArrived
    | BusChanged
    | NonceMade
    | LinkUp
    | LinkDown
    | UpdateArrived
    | UpdateVerified
    | BundleVerified
    | UpdateRefused
    | Persisted
    | EcuDone
    | ReceiptStored
    | JournalFull
    | RestartSigned
    | JournalMoved
    | JournalDead
    | JournalAlive
    | UsageRefused
    | Ticked
    | Stopping
)

# --- commands ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MakeNonce:
    """Give 16 random bytes; answered by NonceMade."""


class SendHello(NamedTuple):
    """Open the conversation on a new stream."""

    nonce: bytes
    director: Versions
    catalogue: Versions
    journal_id: str


class OfferNonce(NamedTuple):
    """Give the cloud the nonce for its next signed time."""

    nonce: bytes


class Verify(NamedTuple):
    """Verify an update; answered by UpdateVerified or UpdateRefused.

    Args:
        nonces: the unused nonces, the latest first: an answer to the one
            before may have crossed the latest on its way.
        now_ms: trusted time.
    """

    update: TrustBytes
    nonces: tuple[bytes, ...]
    now_ms: int


@dataclass(frozen=True, slots=True)
class StoreTrust:
    """Make a verified state durable, with floors and time mark.

    Args:
        mark_ms: trusted time, never to be undercut.
        signed_ms: time of the answer: as of when the state was good.
        live: it answers a nonce; False for rights that came as a file, which
            are no contact with the cloud.
        entries: of the owner's log, to be written in the same commit.
        new_owner: the history of the owner before ends: records are sealed, the log begins anew.
    """

    number: int
    verdict: Verdict
    mark_ms: int
    signed_ms: int
    live: bool = True
    entries: tuple[LogEntry, ...] = ()
    new_owner: bool = False


class SendResult(NamedTuple):
    """Tell the cloud how an update ended."""

    director: Versions
    catalogue: Versions
    error_type: str
    error: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an ECU said that no right explains (Evidence of vehicle_service.proto).

    Args:
        finding: in words.
        read_back: the ECU's answer, at most 64 bytes.
        counter: of the token that the ECU names; 0 if it names none.
        at_ms: trusted time at which it was first seen.
    """

    finding: str
    read_back: bytes
    counter: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class FeatureView:
    """What one feature does, for the cloud, the page and the status command."""

    feature_id: str
    title: str
    entitlement_id: str
    state: str
    reason: str
    nrc: int
    since_ms: int
    activation_ms: int
    trace_id: str
    evidence: Evidence | None = None


class SendStatus(NamedTuple):
    """Tell the cloud what the features do."""

    features: tuple[FeatureView, ...]


class Allow(NamedTuple):
    """Replace the guard's allow-list."""

    rights: Rights
    live: frozenset[str]


@dataclass(frozen=True, slots=True)
class RunEcu:
    """Send requests to an ECU one after the other; answered by EcuDone.

    Args:
        token_key: request that announces a token key. If the ECU refuses the
            request that switches (the second) with NRC 0x33, this is sent
            once and then that request once more. Empty: there is none.
    """

    feature_id: str
    purpose: str
    ecu: EcuSpec
    requests: tuple[bytes, ...]
    trace_id: str
    token_key: bytes = b""

    @property
    def switches(self) -> bool:
        """Whether it changes what the ECU does; a read does not."""
        return len(self.requests) > 1


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Make records, open windows, quota use and entries of the owner's log durable in one commit."""

    number: int
    records: tuple[Record, ...]
    windows: tuple[OpenWindow, ...]
    used: Mapping[tuple[str, str], int]
    mark_ms: int
    entries: tuple[LogEntry, ...] = ()


class MarkSent(NamedTuple):
    """Note that the next records from here on are about to be sent.

    Args:
        records: how many; merges leave holes in the positions.
    """

    number: int
    first_seq: int
    records: int


class SendUsage(NamedTuple):
    """Sign and send the records from first_seq on that are marked as sent, at most so many."""

    first_seq: int
    records: int


class MergeUnsent(NamedTuple):
    """Put a few records in the place of all that were never sent; answered by JournalMoved.

    Until the answer no record is made, because it could not name the hash before it.
    """

    number: int


class RestartJournal(NamedTuple):
    """Begin a new journal; answered by JournalMoved. No record is made until then."""

    number: int
    restart: object


class Say(NamedTuple):
    """Write a log record."""

    level: str
    message: str
    fields: Mapping[str, object]


Command = (
    MakeNonce
    | SendHello
    | OfferNonce
    | Verify
    | StoreTrust
    | SendResult
    | SendStatus
    | Allow
    | RunEcu
    | StoreUsage
    | MarkSent
    | SendUsage
    | MergeUnsent
    | RestartJournal
    | Say
)
