"""A model of the agent's database on a disk that knows what was synced.

A commit is written first and durable only when it was synced. A killed process
loses nothing that was written; a power cut loses what was not synced, or keeps
a part of it: whole commits from the oldest on, since a torn one fails SQLite's
checksum and ends the write-ahead log (https://www.sqlite.org/walformat.html).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

from agent import events as ev
from agent.metering.meter import OpenWindow
from agent.metering.record import GENESIS_HASH, Head, Record
from agent.model import Verdict


@dataclass(frozen=True, slots=True)
class State:
    """What the database holds after a commit; `count` says how many of the records are in it.

    Args:
        mark_ms, contact_ms: trusted time and time of the last live answer, Unix milliseconds.
        own: ids of the present owner's rights once the vehicle was sold; None before.
        log: entries of the owner's log.
    """

    journal_id: str
    count: int = 0
    verdict: Verdict | None = None
    mark_ms: int = 0
    contact_ms: int = 0
    windows: tuple[OpenWindow, ...] = ()
    used: Mapping[tuple[str, str], int] = field(default_factory=dict)
    acked_seq: int = 0
    owner_epoch: int = 0
    own: frozenset[str] | None = None
    log: tuple[bytes, ...] = ()
    boot: int = 0


@dataclass(frozen=True)
class Image:
    """A copy of a whole disk, as somebody takes it who wants the old state back."""

    state: State
    records: tuple[Record, ...]
    taken_ms: int


class Disk:
    """The database of one vehicle."""

    def __init__(self, journal_id: str) -> None:
        self.records: list[Record] = []
        self.durable = State(journal_id)
        self._unsynced: list[State] = []
        self.is_full = False

    @property
    def state(self) -> State:
        """What a process reads: synced or not."""
        return self._unsynced[-1] if self._unsynced else self.durable

    @property
    def head(self) -> Head:
        """Where the journal ends."""
        state = self.state
        if not state.count:
            return Head(state.journal_id, 0, GENESIS_HASH)
        last = self.records[state.count - 1]
        return Head(state.journal_id, last.seq, last.hash)

    def write_usage(self, command: ev.StoreUsage, boot: int) -> str:
        """Writes usage; returns what is wrong with it, or an empty string."""
        state = self.state
        del self.records[state.count :]
        for record in command.records:
            if record.seq != len(self.records) + 1:
                return f"record {record.seq} was written after {len(self.records)} records"
            self.records.append(record)
        used = dict(state.used)
        used.update((key, n) for key, n in command.used.items() if state.own is None or key[0] in state.own)
        self._unsynced.append(
            replace(
                state,
                count=len(self.records),
                windows=command.windows,
                used=used,
                mark_ms=command.mark_ms,
                log=state.log + tuple(entry.content for entry in command.entries),
                boot=boot,
            )
        )
        return ""

    def write_trust(self, command: ev.StoreTrust) -> None:
        """Writes a verified state; at a sale the former owner's history ends."""
        state, rights = self.state, command.verdict.rights
        ids = frozenset(right.entitlement_id for right in rights.entitlements.values())
        own = ids if command.new_owner else None if state.own is None else state.own | ids
        self._unsynced.append(
            replace(
                state,
                verdict=command.verdict,
                mark_ms=command.mark_ms,
                contact_ms=command.mark_ms if command.live else state.contact_ms,
                own=own,
                used={key: n for key, n in state.used.items() if own is None or key[0] in own},
                owner_epoch=rights.owner_epoch,
                log=(() if command.new_owner else state.log)
                + tuple(entry.content for entry in command.entries),
            )
        )

    def write_receipt(self, through_seq: int) -> None:
        """Writes that the cloud has signed for records up to here."""
        self._unsynced.append(replace(self.state, acked_seq=max(self.state.acked_seq, through_seq)))

    def write_nothing(self) -> None:
        """A commit whose content nothing here reads."""
        self._unsynced.append(self.state)

    def sync(self) -> None:
        """What the database asks for at each commit: all that was written is durable."""
        self.flush()

    def flush(self) -> None:
        """What the system does by itself before it shuts down."""
        self.durable = self.state
        self._unsynced.clear()

    def cut_power(self, random: Random) -> None:
        """Loses what was not synced, or all but some of the oldest commits of it."""
        kept = random.randint(0, len(self._unsynced))
        if kept:
            self.durable = self._unsynced[kept - 1]
        self._unsynced.clear()
        del self.records[self.durable.count :]

    def image(self, now_ms: int) -> Image:
        """Copies the disk."""
        return Image(self.durable, tuple(self.records[: self.durable.count]), now_ms)

    def put_back(self, image: Image) -> None:
        """Replaces everything by an old copy."""
        self.durable, self.records = image.state, list(image.records)
        self._unsynced.clear()

    def begin_journal(self, journal_id: str) -> None:
        """A workshop begins a new journal; rights and time stay."""
        kept = self.durable
        self.durable = replace(kept, journal_id=journal_id, count=0, windows=(), acked_seq=0)
        self._unsynced.clear()
        self.records = []
