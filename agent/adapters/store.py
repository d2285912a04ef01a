"""What must survive a power cut: one SQLite file, WAL, synchronous=FULL.

Trusted metadata, floors, time mark and the usage journal share the file, so
that each change is one transaction: the old or the new state, never neither.
The trusted state is what was received, byte for byte; it is verified again at
each start. A file of a newer schema is refused, not guessed at.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.errors import JournalError
from agent.events import StoreTrust, StoreUsage
from agent.metering.meter import OpenWindow
from agent.metering.record import GENESIS_HASH, Head
from agent.model import MeterKind, RepositoryBytes, TrustBytes, Versions
from agent.trust.verifier import Floors

SCHEMA_VERSION = 1
"""PRAGMA user_version of the files that this code reads and writes."""

_SCHEMA = """
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


@dataclass(frozen=True, slots=True)
class Stored:
    """What a store holds at start.

    Args:
        as_of_ms: signed time of the last good refresh; 0 if there was none.
        mark_ms: highest trusted time that was ever noted.
        same_boot: the open windows' monotonic times are of this boot.
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


class Store:
    """The agent's durable state; used by one thread at a time."""

    def __init__(self, path: Path, *, boot_id: str, journal_id: str) -> None:
        """Opens or creates the file, mode 0600.

        Args:
            boot_id: identifier of the present boot.
            journal_id: identifier of the journal, should a new one be made.

        Raises:
            JournalError: it cannot be opened, is damaged, or is of a newer schema.
        """
        self._boot_id = boot_id
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if problem != "ok":
                raise JournalError(f"{path} is damaged: {problem}")
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"{path} cannot be opened: {error}") from error
        if version > SCHEMA_VERSION:
            raise JournalError(
                f"{path} has schema {version}, this agent knows up to {SCHEMA_VERSION};"
                " install the newer agent"
            )
        if version == 0:
            with self._transaction() as db:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                self._put("journal_id", journal_id)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._rollback()
            raise JournalError(f"{self.path} cannot be written: {error}") from error
        except BaseException:
            self._rollback()
            raise

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _put(self, name: str, content: object) -> None:
        self._db.execute(
            "INSERT INTO value VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET content = excluded.content",
            (name, json.dumps(content).encode()),
        )

    def _get(self, name: str, default: object) -> object:
        row = self._db.execute("SELECT content FROM value WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def _number(self, name: str) -> int:
        value = self._get(name, 0)
        return value if isinstance(value, int) else 0

    # --- trust -----------------------------------------------------------------

    def store_trust(self, command: StoreTrust, floors: Floors) -> None:
        """Replaces the trusted state, with its floors and the time mark.

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
                db.executemany("INSERT INTO metadata VALUES (?, ?, ?, ?)", rows)
                db.executemany(
                    "INSERT INTO target VALUES (?, ?, ?)", [(name, p, c) for p, c in targets.items()]
                )
            self._put("floors", _floors_to_json(floors))
            self._put("as_of_ms", command.signed_ms)
            self._put("contact_ms", command.mark_ms)
            self._put("mark_ms", max(command.mark_ms, self._number("mark_ms")))

    def _trust(self) -> TrustBytes:
        def repository(name: str) -> RepositoryBytes:
            rows = self._db.execute(
                "SELECT role, content FROM metadata WHERE repository = ? ORDER BY role, position", (name,)
            ).fetchall()
            single = {role: content for role, content in rows if role != "root"}
            roots = tuple(content for role, content in rows if role == "root")
            return RepositoryBytes(roots, **single)

        def targets(name: str) -> dict[str, bytes]:
            return dict(
                self._db.execute("SELECT path, content FROM target WHERE repository = ?", (name,)).fetchall()
            )

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
            db.executemany(
                "INSERT INTO record VALUES (?, ?, ?)", [(r.seq, r.hash, r.content) for r in command.records]
            )
            db.execute("DELETE FROM open_window")
            db.executemany(
                "INSERT INTO open_window VALUES (?, ?)",
                [(i, json.dumps(_window_to_json(w))) for i, w in enumerate(command.windows)],
            )
            db.executemany(
                "INSERT INTO used VALUES (?, ?, ?)"
                " ON CONFLICT (entitlement_id, meter_id) DO UPDATE SET amount = excluded.amount",
                [(e, m, amount) for (e, m), amount in command.used.items()],
            )
            self._put("boot_id", self._boot_id)
            self._put("mark_ms", max(command.mark_ms, self._number("mark_ms")))

    def mark_sent(self, through_seq: int) -> None:
        """Notes, before they leave, that records up to here may have been seen."""
        with self._transaction():
            self._put("sent_through", max(through_seq, self._number("sent_through")))

    def records(self, first_seq: int, through_seq: int) -> tuple[bytes, ...]:
        """The records of [first_seq, through_seq], as written."""
        rows = self._db.execute(
            "SELECT content FROM record WHERE seq BETWEEN ? AND ? ORDER BY seq", (first_seq, through_seq)
        ).fetchall()
        return tuple(content for (content,) in rows)

    def record_hash(self, seq: int) -> bytes | None:
        """SHA-256 of a record, or None if the journal does not hold it."""
        row = self._db.execute("SELECT hash FROM record WHERE seq = ?", (seq,)).fetchone()
        return None if row is None else bytes(row[0])

    def store_receipt(self, through_seq: int, content: bytes, signature: bytes) -> None:
        """Keeps a verified receipt of the cloud."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO receipt VALUES (?, ?, ?)", (through_seq, content, signature))

    def journal_id(self) -> str:
        """Identifier of the journal, 16 hex digits."""
        return str(self._get("journal_id", ""))

    # --- start -------------------------------------------------------------------

    def load(self) -> Stored:
        """Reads everything that the agent starts from.

        Raises:
            JournalError: a part cannot be read.
        """
        try:
            last = self._db.execute("SELECT seq, hash FROM record ORDER BY seq DESC LIMIT 1").fetchone()
            acked = self._db.execute("SELECT max(through_seq) FROM receipt").fetchone()[0]
            windows = self._db.execute("SELECT content FROM open_window ORDER BY position").fetchall()
            used = self._db.execute("SELECT entitlement_id, meter_id, amount FROM used").fetchall()
            seq, digest = last or (0, GENESIS_HASH)
            return Stored(
                trust=self._trust(),
                floors=_floors_from_json(self._get("floors", {})),
                as_of_ms=self._number("as_of_ms"),
                mark_ms=self._number("mark_ms"),
                contact_ms=self._number("contact_ms"),
                head=Head(self.journal_id(), seq, bytes(digest)),
                acked_seq=acked or 0,
                windows=tuple(_window_from_json(json.loads(content)) for (content,) in windows),
                used={(e, m): amount for e, m, amount in used},
                same_boot=self._get("boot_id", "") == self._boot_id,
            )
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{self.path} cannot be read: {error}") from error


def _versions(versions: Versions) -> list[int]:
    return [versions.root, versions.timestamp, versions.snapshot, versions.targets]


def _floors_to_json(floors: Floors) -> dict[str, object]:
    return {
        "director": _versions(floors.director),
        "catalogue": _versions(floors.catalogue),
        "time_ms": floors.time_ms,
        "tokens": [[e, f, c] for (e, f), c in floors.token_counters.items()],
        "releases": dict(floors.releases),
        "director_epoch": floors.director_epoch,
        "catalogue_epoch": floors.catalogue_epoch,
    }


def _floors_from_json(content: object) -> Floors:
    if not isinstance(content, dict) or not content:
        return Floors()
    return Floors(
        director=Versions(*content["director"]),
        catalogue=Versions(*content["catalogue"]),
        time_ms=content["time_ms"],
        token_counters={(e, f): c for e, f, c in content["tokens"]},
        releases=content["releases"],
        director_epoch=content["director_epoch"],
        catalogue_epoch=content["catalogue_epoch"],
    )


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
        "odometer_m": window.odometer_m,
        "totals": [[list(d), v, g, r] for d, v, g, r in window.totals],
    }


def _window_from_json(content: dict[str, object]) -> OpenWindow:
    totals = content["totals"]
    if not isinstance(totals, list):
        raise TypeError("totals of an open window are not a list")
    odometer = content["odometer_m"]
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
        odometer_m=None if odometer is None else _int(odometer),
        totals=tuple(
            (tuple((n, v) for n, v in d), _int(value), _int(g), str(r)) for d, value, g, r in totals
        ),
    )


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"expected a whole number, found {value!r}")
    return value
