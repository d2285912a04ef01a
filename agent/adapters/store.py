"""What must survive a power cut: one SQLite file, WAL, synchronous=FULL.

Trusted metadata, floors, time mark and the usage journal share the file, so
that each change is one transaction: the old or the new state, never neither.
The trusted state is what was received, byte for byte; it is verified again at
each start. A file of a newer schema says from which version of this code on it may
be read (`min_reader`) and is refused before; one of an older schema is brought up in
one transaction. A file comes into being whole, so that an
empty one is damage and not a first start. One agent at a time may hold it: two
would write two continuations of one journal.
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agent.adapters import journal
from agent.adapters.files import sync_folder
from agent.adapters.journal import FORMER, PRESENT, SEALED
from agent.errors import JournalError, RestartError
from agent.events import StoreTrust, StoreUsage
from agent.metering.merge import stands_for
from agent.metering.meter import OpenWindow
from agent.metering.record import Head, Record
from agent.metering.statement import Key, Pruned
from agent.model import MeterKind, RepositoryBytes, TrustBytes
from agent.trust.floors import floors_to_json, read_floors
from agent.trust.grant_log import LogEntry, LogHead
from agent.trust.verifier import Floors

SCHEMA_VERSION = 4
"""PRAGMA user_version of the files that this code writes; it brings older ones up to this."""
MIN_READER = 4
"""Lowest SCHEMA_VERSION of code that may go on with files of this schema.

It is noted in each file. A schema that only adds tables, or columns with a
default, keeps it: code of MIN_READER and later leaves alone what it does not
know. Whatever else changes raises it, and older code refuses the file.
"""

_TABLES_1 = """
CREATE TABLE value (name TEXT PRIMARY KEY, content BLOB NOT NULL) STRICT;
CREATE TABLE metadata (
    repository TEXT NOT NULL, role TEXT NOT NULL, position INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (repository, role, position)) STRICT;
CREATE TABLE target (
    repository TEXT NOT NULL, path TEXT NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (repository, path)) STRICT;
CREATE TABLE record (seq INTEGER PRIMARY KEY, hash BLOB NOT NULL, content BLOB NOT NULL) STRICT;
CREATE TABLE open_window (position INTEGER PRIMARY KEY, content TEXT NOT NULL) STRICT;
CREATE TABLE used (
    entitlement_id TEXT NOT NULL, meter_id TEXT NOT NULL, amount INTEGER NOT NULL,
    PRIMARY KEY (entitlement_id, meter_id)) STRICT;
CREATE TABLE receipt (through_seq INTEGER PRIMARY KEY, content BLOB NOT NULL, signature BLOB NOT NULL) STRICT;
"""
_TABLES_2 = """
CREATE TABLE grant_log (seq INTEGER PRIMARY KEY, hash BLOB NOT NULL, content BLOB NOT NULL) STRICT;
"""
"""What version 2 adds to version 1."""
_TABLES_3 = """
ALTER TABLE record ADD COLUMN owner INTEGER NOT NULL DEFAULT 0;
"""
"""What version 3 adds: whose a record is, one of the numbers below."""

DEFAULT_LIMIT_BYTES = 64 * 1024 * 1024
"""How large the store may grow before the journal makes room (`agent.adapters.journal`)."""
LOW_WATER = 15, 16
"""Down to this part of the limit, so that not every commit has to make room."""
CHECKPOINT_PAGES = 1_000
"""Pages in the write-ahead log from which on it is written back (4 MB)."""
LOG_BYTES = 4 * 1024 * 1024
"""Length to which the write-ahead log is cut back after a large transaction."""
MAX_NUMBER = 2**63 - 1
"""Largest number that a store holds."""
BUSY_S = 10
"""Longest wait for another reader of the file."""
MAX_OWN = 1_024
"""Rights of one owner that are told from a former one's; more than any honest cloud grants."""
SEAL_RECORDS = 200
"""Records that are sealed in one transaction: usage must not wait long behind them."""

_NEXT_STEP = (
    "put a backup in its place, or move it and the -wal and -shm files beside it away and start again:"
    " the cloud sends the rights anew, usage that was not sent is lost"
)


class Room(enum.Enum):
    """How it stands with the journal's limit."""

    ENOUGH = "below the limit"
    PRUNED = "some of what the cloud has signed for was removed; there may be more"
    MERGE = "only what was never sent is left: the engine has to have it merged"


class KeptRecord(NamedTuple):
    """A record of the journal as it is kept.

    Args:
        content: as written, or sealed, so that only the cloud can read it.
    """

    content: bytes
    is_sealed: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds at start.

    Args:
        as_of_ms: signed time of the last good refresh; 0 if there was none.
        mark_ms: highest trusted time that was ever noted.
        same_boot: the open windows' monotonic times are of this boot.
        mark_epoch: director keys that the mark belongs to, as `Floors.director_epoch`
            names them; empty if nothing was ever signed for it.
        owner_epoch: that log and journal are of; the floors may be higher, if the file is an older copy.
        former: ids of former owners' rights that `windows` are of.
    """

    trust: TrustBytes
    floors: Floors
    as_of_ms: int
    mark_ms: int
    contact_ms: int
    head: Head
    acked_seq: int
    windows: tuple[OpenWindow, ...]
    used: Mapping[tuple[str, str], int]
    same_boot: bool
    mark_epoch: str = ""
    log_head: LogHead = LogHead()
    owner_epoch: int = 0
    former: frozenset[str] = frozenset()


class Store:
    """The agent's durable state; used by one thread at a time."""

    def __init__(
        self,
        path: Path,
        *,
        boot_id: str,
        journal_id: str | None,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        """Opens the file, or creates it with mode 0600.

        Args:
            boot_id: identifier of the present boot.
            journal_id: identifier of the journal, should a new one be made;
                None to look only: nothing is made, changed or locked.
            limit_bytes: above it the journal makes room.

        Raises:
            JournalError: it cannot be opened, is damaged, is of a newer schema,
                or another agent holds it.
        """
        self._boot_id = boot_id
        self.path = path
        self._lock = -1
        self._log_holds_former = False
        self.unsealed = 0
        """Records of former owners that can still be read; any thread may ask."""
        self.limit_bytes = limit_bytes
        self._merge_at = journal.MERGE_RECORDS
        self._is_pruning = False
        self.used_bytes = 0
        """Size as of the last commit of usage; any thread may ask."""
        self._db: sqlite3.Connection | None = None
        try:
            self._open(journal_id)
            self._journal_id = str(self._get("journal_id", ""))
            self._log_holds_former = self._own() is not None
            self._count_unsealed()
            if not self._journal_id:
                raise JournalError(f"{path} is damaged: it names no journal; {_NEXT_STEP}")
            if journal_id is not None:  # a damaged file was left as it was until here
                self._read("PRAGMA journal_mode=WAL")
                self._read("PRAGMA synchronous=FULL")
                self._read("PRAGMA secure_delete=ON")  # a former owner's data is overwritten
                self._read(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
                self._read(f"PRAGMA journal_size_limit={LOG_BYTES}")
            self._measure()
        except (OSError, sqlite3.Error, ValueError, KeyError, TypeError) as error:
            self.close()
            reason = error.strerror if isinstance(error, OSError) else error
            next_step = "" if isinstance(error, OSError) else f"; {_NEXT_STEP}"
            raise JournalError(f"{path} cannot be opened: {reason}{next_step}") from error
        except JournalError:
            self.close()
            raise

    def _open(self, journal_id: str | None) -> None:
        if journal_id is None:
            self._connect(f"{self.path.absolute().as_uri()}?mode=ro")
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_file()
            if not self.path.exists():
                _create(self.path, journal_id)
            self.path.chmod(0o600)
            self._connect(f"{self.path.absolute().as_uri()}?mode=rw")
        problem = self._read("PRAGMA quick_check(1)")[0][0]
        if problem != "ok":
            raise JournalError(f"{self.path} is damaged: {problem}; {_NEXT_STEP}")
        version = self._read("PRAGMA user_version")[0][0]
        if version > SCHEMA_VERSION and (reader := self._min_reader(version)) > SCHEMA_VERSION:
            raise JournalError(
                f"{self.path} has schema {version}, for agents that know schema {reader} or later; this one"
                f" knows up to {SCHEMA_VERSION}; install the newer agent"
            )
        if version < 1:
            raise JournalError(f"{self.path} is damaged: it is empty; {_NEXT_STEP}")
        if version < SCHEMA_VERSION:
            if journal_id is None:
                self._look_at_a_copy()
            assert self._db is not None
            _bring_up(self._db, version)
            if journal_id is None:
                self._read("PRAGMA query_only=ON")
            else:
                # Older versions left deleted bytes in free pages where SQLite is built to.
                with suppress(sqlite3.Error):
                    self._read("PRAGMA secure_delete=ON")
                    self._read("VACUUM")

    def _min_reader(self, version: int) -> int:
        try:
            return _int(self._get("min_reader", version))
        except (sqlite3.Error, ValueError, TypeError):
            return version  # a schema that this code cannot even ask

    def _look_at_a_copy(self) -> None:
        """Goes on with a copy in memory: who only looks leaves an older file as it is."""
        assert self._db is not None
        copy = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._db.backup(copy)
        self._db.close()
        self._db = copy

    def _connect(self, uri: str) -> None:
        self._db = sqlite3.connect(
            uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_S
        )

    def _lock_file(self) -> None:
        """Takes the place of the one agent that may write; the system frees it when the process ends."""
        lock = self.path.with_name(self.path.name + ".lock")
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(
                f"{self.path} is in use: another agent runs on it; end that one first"
            ) from error

    def close(self) -> None:
        """Closes the file."""
        if self._db is not None:
            self._db.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        assert self._db is not None
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
            self._rollback()
            raise JournalError(f"{self.path} cannot be written: {error}") from error
        except BaseException:
            self._rollback()
            raise

    def _rollback(self) -> None:
        assert self._db is not None
        if self._db.in_transaction:
            # A disk that fails here as well is named by the error that led here.
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")

    def _read(self, statement: str, values: tuple[object, ...] = ()) -> list[Any]:
        assert self._db is not None
        return self._db.execute(statement, values).fetchall()

    def _get(self, name: str, default: object) -> object:
        rows = self._read("SELECT content FROM value WHERE name = ?", (name,))
        if not rows:
            return default
        content, _, digest = bytes(rows[0][0]).rpartition(b"\n")
        if digest != _value_digest(name, content):
            raise ValueError(f"value {name} does not have the checksum that is noted for it")
        return json.loads(content)

    def _number(self, name: str) -> int:
        return _int(self._get(name, 0))

    # --- trust -----------------------------------------------------------------

    def store_trust(self, command: StoreTrust, floors: Floors, mark_epoch: str | None = None) -> None:
        """Replaces the trusted state, with its floors and the time mark; appends to the owner's log.

        Args:
            mark_epoch: director keys that the mark belongs to from now; None: as before.

        Raises:
            JournalError: nothing was changed.
        """
        with self._transaction() as db:
            db.execute("DELETE FROM metadata")
            db.execute("DELETE FROM target")
            state = command.verdict.state
            for name, repository, targets in (
                ("director", state.director, state.director_targets),
                ("catalogue", state.catalogue, state.catalogue_targets),
            ):
                rows = [(name, "root", i, c) for i, c in enumerate(repository.roots)]
                rows += [
                    (name, role, 0, content)
                    for role in ("timestamp", "snapshot", "targets")
                    if (content := getattr(repository, role))
                ]
                db.executemany(
                    "INSERT INTO metadata (repository, role, position, content) VALUES (?, ?, ?, ?)", rows
                )
                db.executemany(
                    "INSERT INTO target (repository, path, content) VALUES (?, ?, ?)",
                    [(name, p, c) for p, c in targets.items()],
                )
            _put(db, "floors", floors_to_json(floors))
            _put(db, "as_of_ms", command.signed_ms)
            if command.live:
                _put(db, "contact_ms", command.mark_ms)
            if mark_epoch is not None:
                _put(db, "mark_epoch", mark_epoch)
            self._note_owner(db, command)
            _append_log(db, command.entries)
            # As the clock says it: only a new epoch of the director's keys may set it back.
            _put(db, "mark_ms", command.mark_ms)

    def _note_owner(self, db: sqlite3.Connection, command: StoreTrust) -> None:
        """Notes which rights are the present owner's; at a sale, nothing of the one before stays readable."""
        now = [_digest(right.entitlement_id) for right in command.verdict.rights.entitlements.values()]
        own = self._own()
        if not command.new_owner:
            if own is not None:
                _put(db, "own", list(dict.fromkeys([*own, *now]))[-MAX_OWN:])
            return
        self._log_holds_former = True
        _put(db, "own", now)
        db.execute("UPDATE record SET owner = ? WHERE owner = ?", (FORMER, PRESENT))
        ended = [
            (i,) for (i,) in db.execute("SELECT DISTINCT entitlement_id FROM used") if _digest(i) not in now
        ]
        db.executemany("DELETE FROM used WHERE entitlement_id = ?", ended)
        db.execute("DELETE FROM grant_log")
        for table in ("reported", "old_record", "old_receipt"):
            db.execute(f"DELETE FROM {table}")  # noqa: S608 (names of this line)
        db.execute("DELETE FROM receipt WHERE through_seq < (SELECT max(through_seq) FROM receipt)")

    def _own(self) -> list[str] | None:
        """Digests of the present owner's rights, the latest last; None before the first sale: all are.

        Whatever else is used, such as by a feature that is still held, is a former owner's.
        """
        found = self._get("own", None)
        if found is None:
            return None
        if not isinstance(found, list):
            raise TypeError("the owner's rights are not a list")
        return list(map(str, found))

    def _trust(self) -> TrustBytes:
        def repository(name: str) -> RepositoryBytes:
            rows = self._read(
                "SELECT role, content FROM metadata WHERE repository = ? ORDER BY role, position", (name,)
            )
            single = {role: content for role, content in rows if role != "root"}
            roots = tuple(content for role, content in rows if role == "root")
            return RepositoryBytes(roots, **single)

        def targets(name: str) -> dict[str, bytes]:
            return dict(self._read("SELECT path, content FROM target WHERE repository = ?", (name,)))

        return TrustBytes(
            repository("director"), repository("catalogue"), targets("director"), targets("catalogue")
        )

    # --- journal ---------------------------------------------------------------

    def store_usage(self, command: StoreUsage) -> None:
        """Appends records and replaces the open windows, in one commit.

        Raises:
            JournalError: nothing was changed.
        """
        with self._transaction() as db:
            own = self._own()
            _insert(db, command.records, own)
            db.execute("DELETE FROM open_window")
            db.executemany(
                "INSERT INTO open_window (position, content) VALUES (?, ?)",
                [(i, json.dumps(_window_to_json(w))) for i, w in enumerate(command.windows)],
            )
            db.executemany(
                "INSERT INTO used (entitlement_id, meter_id, amount) VALUES (?, ?, ?)"
                " ON CONFLICT (entitlement_id, meter_id) DO UPDATE SET amount = excluded.amount",
                [(e, m, amount) for (e, m), amount in command.used.items() if _is_own(e, own)],
            )
            _append_log(db, command.entries)
            _put(db, "boot_id", self._boot_id)
            _put(db, "mark_ms", command.mark_ms)
        with self._reading():
            self._measure()

    def mark_sent(self, first_seq: int, records: int) -> None:
        """Notes, before they leave, that the next records from here on may have been seen.

        Args:
            records: how many; merges leave holes in the positions.

        Raises:
            JournalError: nothing was changed.
        """
        with self._transaction() as db:
            last = db.execute(
                "SELECT max(seq) FROM (SELECT seq FROM record WHERE seq >= ? ORDER BY seq LIMIT ?)",
                (first_seq, records),
            ).fetchone()[0]
            _put(db, "sent_through", max(last or 0, self._number("sent_through")))

    def records(self, first_seq: int, through_seq: int) -> tuple[KeptRecord, ...]:
        """The records of [first_seq, through_seq], as they are kept.

        Raises:
            JournalError: they cannot be read.
        """
        return self._records(first_seq, through_seq, -1)

    def marked(self, first_seq: int, records: int) -> tuple[KeptRecord, ...]:
        """The records from first_seq on that are marked as sent, at most so many.

        Raises:
            JournalError: they cannot be read, or first_seq and later ones were removed after their receipt.
        """
        with self._reading():
            sent_through = self._number("sent_through")
            rows = self._read(
                "SELECT seq, content, owner FROM record WHERE seq >= ? ORDER BY seq LIMIT 1", (first_seq,)
            )
        found, content, owner = rows[0] if rows else (first_seq, b"", SEALED)
        if found > first_seq and owner != SEALED and not stands_for(content, first_seq):
            raise JournalError(
                f"the cloud asks for records from {first_seq} on again; those before {found} were removed"
                " to make room, and the cloud has signed for them: fod-agent export holds its receipts"
            )
        return self._records(first_seq, sent_through, records)

    def _records(self, first_seq: int, through_seq: int, limit: int) -> tuple[KeptRecord, ...]:
        with self._reading():
            rows = self._read(
                "SELECT content, owner FROM record WHERE seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
                (first_seq, through_seq, limit),
            )
        return tuple(KeptRecord(content, owner == SEALED) for content, owner in rows)

    def acked_seq(self) -> int:
        """Position up to which the cloud has signed.

        Raises:
            JournalError: it cannot be read.
        """
        with self._reading():
            assert self._db is not None
            return journal.acked_seq(self._db)

    # --- the journal's limit, and its restart --------------------------------------

    def _measure(self) -> None:
        assert self._db is not None
        self.used_bytes = journal.used_bytes(self._db)

    @property
    def is_over(self) -> bool:
        """Whether the store is larger than it may be."""
        return self.used_bytes > self.limit_bytes

    def make_room(self, now_ms: int) -> Room:
        """Removes some of what the cloud has signed for, if the store is above its limit.

        Args:
            now_ms: trusted time.

        Raises:
            JournalError: nothing was changed.
        """
        if not (self.is_over or self._is_pruning):
            return Room.ENOUGH
        part, whole = LOW_WATER
        with self._transaction() as db:
            removed = journal.prune(
                db, self._journal_id, enough_bytes=self.limit_bytes * part // whole, now_ms=now_ms
            )
            waiting = journal.unsent(db, self._number("sent_through"))
        with self._reading():
            self._measure()
        self._is_pruning = bool(removed)
        if removed:
            return Room.PRUNED
        return Room.MERGE if self.is_over and waiting >= self._merge_at else Room.ENOUGH

    def merge_unsent(self) -> tuple[Head, int]:
        """Merges what was never sent, in one transaction; see `agent.metering.merge`.

        Returns:
            The journal's end, which is as before if there was nothing to gain, and how
            many records were merged.

        Raises:
            JournalError: nothing was changed; the next merge waits for as many records again.
        """
        try:
            with self._transaction() as db:
                sent, genesis = self._number("sent_through"), journal.genesis(db, self._journal_id)
                head, records, count = journal.merge_unsent(db, self._head(), genesis, sent)
                _insert(db, records, self._own())
            with self._reading():
                self._measure()
        except JournalError:
            self._merge_at += journal.MERGE_RECORDS
            raise
        self._merge_at = journal.MERGE_RECORDS + len(records)
        return head, count

    def restart_journal(self, restart: journal.Restart, new_id: str) -> Head:
        """Begins a new journal with what the vehicle holds beyond the fork.

        Raises:
            RestartError: it does not fit the records that are here; nothing was changed.
            JournalError: nothing was changed.
        """
        with self._transaction() as db:
            self.check_restart(restart)
            head, records = journal.restart_journal(db, restart, new_id)
            _insert(db, records, self._own())
            _put(db, "journal_id", new_id)
            _put(db, "sent_through", 0)
        self._journal_id = new_id
        return head

    def check_restart(self, restart: journal.Restart) -> bool:
        """Judges a restart; False if this very one has been carried out already.

        Raises:
            RestartError: it does not fit the records that are here.
        """
        with self._reading():
            done = self._read("SELECT content FROM restart WHERE old_journal = ?", (restart.journal_id,))
            if done and bytes(done[0][0]) == restart.content:
                return False
            if restart.journal_id != self._journal_id:
                raise RestartError(f"it is for journal {restart.journal_id}, this one is {self._journal_id}")
            assert self._db is not None
            journal.check_restart(self._db, self._head(), restart)
        return True

    def pruned_sums(self) -> tuple[journal.PrunedSum, ...]:
        """What was removed after its receipt, as sums.

        Raises:
            JournalError: it cannot be read.
        """
        with self._reading():
            assert self._db is not None
            return journal.pruned_sums(self._db)

    def pruned(self) -> tuple[Pruned, ...]:
        """The same, as a statement of usage takes it.

        Raises:
            JournalError: it cannot be read.
        """
        return tuple(
            Pruned(
                s.journal,
                Key(s.entitlement, s.feature, s.meter, s.account, s.unit, s.dimensions),
                *s[8:],
            )
            for s in self.pruned_sums()
        )

    @contextmanager
    def at_one_moment(self) -> Iterator[None]:
        """All that is read in it is as of one commit, whatever a running agent writes meanwhile.

        Raises:
            JournalError: it cannot be read.
        """
        with self._reading():
            self._read("BEGIN")
        try:
            yield
        finally:
            with suppress(sqlite3.Error):
                self._read("ROLLBACK")

    def receipts(self) -> tuple[journal.KeptReceipt, ...]:
        """The receipts that are kept, in their order.

        Raises:
            JournalError: they cannot be read.
        """
        with self._reading():
            assert self._db is not None
            return journal.receipts(self._db, self._journal_id)

    def restarts(self) -> tuple[journal.KeptRestart, ...]:
        """The restarts that were carried out, in their order.

        Raises:
            JournalError: they cannot be read.
        """
        with self._reading():
            assert self._db is not None
            return journal.restarts(self._db)

    def own_records(self) -> Iterator[tuple[str, bytes]]:
        """(journal, content) of the present owner's records, in the order in which they were made.

        Raises:
            JournalError: they cannot be read.
        """
        with self._reading():
            assert self._db is not None
            yield from journal.own_records(self._db, self._journal_id)

    def head(self) -> Head:
        """Where the journal ends.

        Raises:
            JournalError: it cannot be read.
        """
        with self._reading():
            return self._head()

    def _head(self) -> Head:
        last = self._read("SELECT seq, hash, content, owner FROM record ORDER BY seq DESC LIMIT 1")
        assert self._db is not None
        if not last:
            return Head(self._journal_id, 0, journal.genesis(self._db, self._journal_id))
        seq, digest, content, owner = last[0]
        if owner != SEALED and hashlib.sha256(content).digest() != digest:
            raise ValueError(f"record {seq} does not have the hash that is noted for it")
        return Head(self._journal_id, seq, bytes(digest))

    def record_hash(self, seq: int) -> bytes | None:
        """SHA-256 of a record, or None if the journal does not hold it.

        Raises:
            JournalError: it cannot be read.
        """
        with self._reading():
            rows = self._read("SELECT hash FROM record WHERE seq = ?", (seq,))
        return bytes(rows[0][0]) if rows else None

    def store_receipt(
        self, through_seq: int, content: bytes, signature: bytes, archive_key: bytes = b"", signer: str = ""
    ) -> None:
        """Keeps a verified receipt of the cloud.

        Args:
            archive_key: to which former owners' records are sealed; empty: as before.
            signer: names the receipt key that announced it: with another one it counts no more.

        Raises:
            JournalError: nothing was changed.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO receipt (through_seq, content, signature) VALUES (?, ?, ?)",
                (through_seq, content, signature),
            )
            if archive_key:
                _put(db, "archive_key", [archive_key.hex(), signer])

    def seal_former(self, seal: Callable[[bytes, bytes, str], bytes], signer: str = "") -> bool:
        """Seals some of what former owners used, as far as the cloud has signed for it.

        What the cloud has not signed for is sent first. Once nothing is left,
        the write-ahead log, which still holds the readable bytes, is emptied.

        Args:
            seal: `agent.adapters.archive.seal`.
            signer: names the receipt key that is trusted now.

        Returns:
            Whether there is more to be sealed now.

        Raises:
            JournalError: nothing was changed.
        """
        with self._reading():
            key = self._archive_key(signer)
            acked = self.acked_seq()
            rows = self._read(
                "SELECT seq, content FROM record WHERE owner = ? AND seq <= ? ORDER BY seq LIMIT ?",
                (FORMER, acked, SEAL_RECORDS),
            )
        if not rows or not key:
            self._count_unsealed()
            self._empty_log()
            return False
        sealed = [(seal(content, key, self._journal_id), SEALED, seq) for seq, content in rows]
        self._log_holds_former = True
        with self._transaction() as db:
            db.executemany("UPDATE record SET content = ?, owner = ? WHERE seq = ?", sealed)
        self._count_unsealed()
        if len(rows) == SEAL_RECORDS:
            return True
        self._empty_log()
        return False

    def _archive_key(self, signer: str) -> bytes:
        found = self._get("archive_key", ["", signer])
        if not isinstance(found, list) or len(found) != 2:  # noqa: PLR2004 (key and signer)
            raise TypeError("the archive key is not noted as such")
        return bytes.fromhex(str(found[0])) if found[1] == signer else b""

    def _count_unsealed(self) -> None:
        self.unsealed = self._read("SELECT count(*) FROM record WHERE owner = ?", (FORMER,))[0][0]

    def _empty_log(self) -> None:
        """Empties the write-ahead log if what a sale has overwritten may still be in it."""
        if self._log_holds_former:
            with self._reading():
                # Who reads the file at this moment keeps the log in use: then it is tried again later.
                self._read("PRAGMA busy_timeout=100")
                is_busy = self._read("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
                self._read(f"PRAGMA busy_timeout={BUSY_S * 1000}")
            self._log_holds_former = bool(is_busy)

    def grant_log(self) -> tuple[bytes, ...]:
        """The entries of the owner's log, as written.

        Raises:
            JournalError: they cannot be read.
        """
        with self._reading():
            rows = self._read("SELECT content FROM grant_log ORDER BY seq")
        return tuple(content for (content,) in rows)

    def journal_id(self) -> str:
        """Identifier of the journal, 16 hex digits; any thread may ask."""
        return self._journal_id

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, KeyError, TypeError, OverflowError) as error:
            raise JournalError(f"{self.path} cannot be read: {error}; {_NEXT_STEP}") from error

    # --- start -------------------------------------------------------------------

    def _log_head(self) -> LogHead:
        last = self._read("SELECT seq, hash FROM grant_log ORDER BY seq DESC LIMIT 1")
        return LogHead(last[0][0], bytes(last[0][1])) if last else LogHead()

    def load(self) -> Stored:
        """Reads everything that the agent starts from.

        Raises:
            JournalError: a part cannot be read.
        """
        with self._reading():
            windows = self._read("SELECT content FROM open_window ORDER BY position")
            used = self._read("SELECT entitlement_id, meter_id, amount FROM used")
            restored = tuple(_window_from_json(json.loads(content)) for (content,) in windows)
            floors = read_floors(found) if (found := self._get("floors", {})) != {} else Floors()
            own = self._own()
            return Stored(
                trust=self._trust(),
                floors=floors,
                as_of_ms=self._number("as_of_ms"),
                mark_ms=self._number("mark_ms"),
                contact_ms=self._number("contact_ms"),
                head=self._head(),
                acked_seq=self.acked_seq(),
                windows=restored,
                used={(e, m): amount for e, m, amount in used},
                same_boot=self._get("boot_id", "") == self._boot_id,
                mark_epoch=str(self._get("mark_epoch", "")),
                log_head=self._log_head(),
                owner_epoch=floors.owner_epoch,
                former=frozenset(w.entitlement_id for w in restored if not _is_own(w.entitlement_id, own)),
            )


def _is_own(entitlement_id: str, own: list[str] | None) -> bool:
    return own is None or _digest(entitlement_id) in own


def _digest(entitlement_id: str) -> str:
    """Tells a right again without naming it: ids are random, so that nobody can try them all."""
    return hashlib.sha256(entitlement_id.encode()).hexdigest()


def _insert(db: sqlite3.Connection, records: tuple[Record, ...], own: list[str] | None) -> None:
    db.executemany(
        "INSERT INTO record (seq, hash, content, owner) VALUES (?, ?, ?, ?)",
        [(r.seq, r.hash, r.content, PRESENT if _is_own(r.entitlement_id, own) else FORMER) for r in records],
    )


def _append_log(db: sqlite3.Connection, entries: tuple[LogEntry, ...]) -> None:
    db.executemany(
        "INSERT INTO grant_log (seq, hash, content) VALUES (?, ?, ?)",
        [(e.seq, e.hash, e.content) for e in entries],
    )


def _create(path: Path, journal_id: str) -> None:
    """Makes a new store beside its place, and puts it there whole."""
    fresh = path.with_name(path.name + ".new")
    log = path.with_name(path.name + "-wal")
    if log.exists():
        raise JournalError(f"{log} is here, but {path} is not; {_NEXT_STEP}")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600, exist_ok=False)
    with closing(sqlite3.connect(fresh, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous=FULL")
        db.execute("BEGIN")
        for statement in (_TABLES_1 + _TABLES_2 + _TABLES_3 + journal.TABLES).split(";"):
            db.execute(statement)
        _put(db, "journal_id", journal_id)
        _put(db, "min_reader", MIN_READER)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    fresh.rename(path)
    sync_folder(path.parent)


def _bring_up(db: sqlite3.Connection, version: int) -> None:
    """Brings a file of an older version up to this one, in one transaction; closing undoes half a one."""
    db.execute("BEGIN IMMEDIATE")
    added = (_TABLES_2, _TABLES_3, journal.TABLES)[version - 1 :]
    for statement in "".join(added).split(";"):
        db.execute(statement)
    _put(db, "min_reader", MIN_READER)
    if version < 3:  # noqa: PLR2004
        _add_checksums(db, version)
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute("COMMIT")


def _add_checksums(db: sqlite3.Connection, version: int) -> None:
    """Gives named values the checksums that they have since version 3."""
    rows = db.execute("SELECT name, content FROM value WHERE name != 'min_reader'")
    values = {name: json.loads(content) for name, content in rows}
    if version == 1 and "floors" in values:
        # Version 1 knew no owner epochs, and its mark was of the keys that its floors name.
        floors = read_floors({**values["floors"], "owner_epoch": 0})
        values |= {"floors": floors_to_json(floors), "mark_epoch": floors.director_epoch}
    for name, content in values.items():
        _put(db, name, content)


def _put(db: sqlite3.Connection, name: str, content: object) -> None:
    line = json.dumps(content).encode()
    db.execute(
        "INSERT INTO value (name, content) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET content = excluded.content",
        (name, line + b"\n" + _value_digest(name, line)),
    )


def _value_digest(name: str, content: bytes) -> bytes:
    """Eight bytes in hex: a flipped bit in a time mark could hold every update off, or let an old one in."""
    return hashlib.sha256(name.encode() + b"\x00" + content).hexdigest()[:16].encode()


def _window_to_json(window: OpenWindow) -> dict[str, object]:
    return {
        "feature": window.feature_id,
        "meter": window.meter_id,
        "entitlement": window.entitlement_id,
        "account": window.account,
        "trace_id": window.trace_id,
        "kind": window.kind.value,
        "start_ms": window.start_ms,
        "mark_ns": window.mark_ns,
        "mark_ms": window.mark_ms,
        "odometer": window.odometer,
        "odometer_m": window.odometer_m,
        "totals": [[list(d), v, g, r] for d, v, g, r in window.totals],
    }


def _window_from_json(content: dict[str, object]) -> OpenWindow:
    totals = content["totals"]
    if not isinstance(totals, list):
        raise TypeError("totals of an open window are not a list")
    odometer, odometer_m = content["odometer"], content["odometer_m"]
    return OpenWindow(
        feature_id=str(content["feature"]),
        meter_id=str(content["meter"]),
        entitlement_id=str(content["entitlement"]),
        account=str(content["account"]),
        trace_id=str(content["trace_id"]),
        kind=MeterKind(content["kind"]),
        start_ms=_int(content["start_ms"]),
        mark_ns=_int(content["mark_ns"]),
        mark_ms=_int(content["mark_ms"]),
        odometer=None if odometer is None else str(odometer),
        odometer_m=None if odometer_m is None else _int(odometer_m),
        totals=tuple(
            (tuple((n, v) for n, v in d), _int(value), _int(g), str(r)) for d, value, g, r in totals
        ),
    )


def _int(value: object) -> int:
    if type(value) is not int or not -MAX_NUMBER - 1 <= value <= MAX_NUMBER:
        raise TypeError(f"expected a whole number up to {MAX_NUMBER}, found {value!r}")
    return value
