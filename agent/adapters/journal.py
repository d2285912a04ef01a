"""The journal within the store: how it stays bounded, and how it goes on after an honest restore.

Each function works in a transaction of its caller's, so that what is removed
and what takes its place change together or not at all. In this order, and only
while the store is above its limit: records that the cloud has signed for and
that are older than RETENTION_MS, then the oldest others that it has signed for,
then a merge of those that were never sent (`agent.metering.merge`). What is
removed after a receipt stays as exact sums by month (table `reported`).
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from agent.errors import RestartError
from agent.metering.merge import Kept, merge, parsed, rechain
from agent.metering.record import GENESIS_HASH, Head, Record

PRESENT, FORMER, SEALED = 0, 1, 2
"""A record of the present owner; of a former one, still readable; of a former one, sealed."""

RETENTION_MS = 90 * 24 * 3600 * 1000
"""How long what the cloud has signed for is kept, if there is room: a cloud restored from a backup asks."""
PRUNE_RECORDS = 500
"""Most records that are removed in one transaction: usage must not wait long behind them."""
MERGE_RECORDS = 1_000
"""Fewest records that are worth a merge: below it there is too little to gain."""
_PIECE = 50

_Row = tuple[str, int, bytes, int]
"""Journal, position, content, owner."""

TABLES = """
CREATE TABLE reported (
    journal TEXT NOT NULL, month TEXT NOT NULL, entitlement TEXT NOT NULL, feature TEXT NOT NULL,
    meter TEXT NOT NULL, account TEXT NOT NULL, unit INTEGER NOT NULL, dimensions TEXT NOT NULL,
    value INTEGER NOT NULL, gap INTEGER NOT NULL, unbounded INTEGER NOT NULL, records INTEGER NOT NULL,
    start_ms INTEGER NOT NULL, end_ms INTEGER NOT NULL, through_seq INTEGER NOT NULL,
    PRIMARY KEY (journal, month, entitlement, feature, meter, account, unit, dimensions)) STRICT;
CREATE TABLE old_record (
    journal TEXT NOT NULL, seq INTEGER NOT NULL, hash BLOB NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (journal, seq)) STRICT;
CREATE TABLE old_receipt (
    journal TEXT NOT NULL, through_seq INTEGER NOT NULL, content BLOB NOT NULL, signature BLOB NOT NULL,
    PRIMARY KEY (journal, through_seq)) STRICT;
CREATE TABLE restart (
    old_journal TEXT PRIMARY KEY, journal TEXT NOT NULL, head_hash BLOB NOT NULL, content BLOB NOT NULL,
    signature BLOB NOT NULL) STRICT;
"""
"""Sums of what was removed after its receipt; and what is kept of journals that a restart has ended."""


class Restart(NamedTuple):
    """An operator's word, verified, that the journal goes on in a new one (JournalRestart of usage.proto).

    Args:
        content, signature: as received.
    """

    journal_id: str
    fork_seq: int
    head_seq: int
    head_hash: bytes
    content: bytes
    signature: bytes


class PrunedSum(NamedTuple):
    """What records that are removed add up to, in one month (UTC, of the windows' ends).

    Args:
        through_seq: the last of them; the first receipt from there on covers them.
    """

    journal: str
    month: str
    entitlement: str
    feature: str
    meter: str
    account: str
    unit: int
    dimensions: tuple[tuple[str, str], ...]
    value: int
    gap: int
    unbounded: bool
    records: int
    start_ms: int
    end_ms: int
    through_seq: int


class KeptReceipt(NamedTuple):
    """A receipt of the cloud, as received."""

    journal: str
    through_seq: int
    content: bytes
    signature: bytes


class KeptRestart(NamedTuple):
    """A restart that was carried out, as received.

    Args:
        journal: the journal that it began.
    """

    old_journal: str
    journal: str
    content: bytes
    signature: bytes


def used_bytes(db: sqlite3.Connection) -> int:
    """Bytes of the pages in use; free ones are used again before the file grows."""
    pages, free, size = (
        int(db.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size


def acked_seq(db: sqlite3.Connection) -> int:
    """Position up to which the cloud has signed."""
    return int(db.execute("SELECT coalesce(max(through_seq), 0) FROM receipt").fetchone()[0])


def prune(db: sqlite3.Connection, journal_id: str, *, enough_bytes: int, now_ms: int) -> int:
    """Removes some of what the cloud has signed for, the oldest first; sums stay.

    The record at the last receipt's end and the last one of all stay: the
    chain goes on from there.

    Args:
        enough_bytes: from there on only what is older than RETENTION_MS is removed.
        now_ms: trusted time.

    Returns:
        How many records were removed.
    """
    removed = 0
    while removed < PRUNE_RECORDS:
        rows = db.execute(
            "SELECT journal, seq, content, 0 FROM old_record ORDER BY rowid LIMIT ?", (_PIECE,)
        ).fetchall()
        is_old = bool(rows)
        if not rows:
            rows = db.execute(
                "SELECT ?, seq, content, owner FROM record WHERE seq < ? AND seq < "
                "(SELECT max(seq) FROM record) ORDER BY seq LIMIT ?",
                (journal_id, acked_seq(db), _PIECE),
            ).fetchall()
        if used_bytes(db) <= enough_bytes:
            rows = _past_retention(rows, now_ms)
        if not rows:
            break
        _sum_up(db, rows)
        removed += len(rows)
        last = (rows[-1][0], rows[-1][1])
        if is_old:
            db.executemany("DELETE FROM old_record WHERE journal = ? AND seq = ?", [r[:2] for r in rows])
            db.execute(
                "DELETE FROM old_receipt WHERE journal = ?1 AND through_seq < (SELECT min(through_seq)"
                " FROM old_receipt WHERE journal = ?1 AND through_seq >= ?2)",
                last,
            )
        else:
            db.execute("DELETE FROM record WHERE seq <= ?", last[1:])
            # A receipt covers everything before it, so the first one that is not behind them is enough.
            db.execute(
                "DELETE FROM receipt WHERE through_seq <"
                " (SELECT min(through_seq) FROM receipt WHERE through_seq >= ?)",
                last[1:],
            )
    return removed


def _past_retention(rows: Sequence[_Row], now_ms: int) -> list[_Row]:
    """The first of them, as far as they are older than RETENTION_MS; of sealed ones nobody knows."""
    found = []
    for row in rows:
        if row[3] == SEALED or parsed(row[2]).window_end_ms >= now_ms - RETENTION_MS:
            break
        found.append(row)
    return found


def _sum_up(db: sqlite3.Connection, rows: Iterable[_Row]) -> None:
    """Adds the present owner's records to the sums; of former owners nothing is kept to be shown."""
    for journal, seq, content, owner in rows:
        if owner != PRESENT:
            continue
        record = parsed(content)
        db.execute(
            "INSERT INTO reported (journal, month, entitlement, feature, meter, account, unit, dimensions,"
            " value, gap, unbounded, records, start_ms, end_ms, through_seq)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET value = value + excluded.value, gap = gap + excluded.gap,"
            " unbounded = max(unbounded, excluded.unbounded), records = records + 1,"
            " start_ms = min(start_ms, excluded.start_ms), end_ms = max(end_ms, excluded.end_ms),"
            " through_seq = max(through_seq, excluded.through_seq)",
            (
                journal,
                _month(record.window_end_ms),
                record.entitlement_id,
                record.feature_id,
                record.meter_id,
                record.subject,
                record.unit,
                json.dumps([[d.name, d.value] for d in record.dimensions]),
                record.value,
                record.gap,
                record.gap_unbounded,
                1,
                record.window_start_ms,
                record.window_end_ms,
                seq,
            ),
        )


def _month(unix_ms: int) -> str:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m")
    except (ValueError, OverflowError, OSError):
        return "unknown"


def unsent(db: sqlite3.Connection, sent_through: int) -> int:
    """How many records were never sent."""
    behind = max(sent_through, acked_seq(db))
    return int(db.execute("SELECT count(*) FROM record WHERE seq > ?", (behind,)).fetchone()[0])


def merge_unsent(
    db: sqlite3.Connection, head: Head, genesis: bytes, sent_through: int
) -> tuple[Head, tuple[Record, ...], int]:
    """Puts a few records in the place of all that were never sent.

    Args:
        head: where the journal ends.
        genesis: what its first record names as the hash before it.

    Returns:
        The new end, the records to be inserted, and how many they stand for. Nothing
        changes if there are fewer than MERGE_RECORDS, or if no record would be saved.
    """
    behind = max(sent_through, acked_seq(db))
    found = db.execute(
        "SELECT seq, hash FROM record WHERE seq <= ? ORDER BY seq DESC LIMIT 1", (behind,)
    ).fetchone()
    kept = Kept(found[0], bytes(found[1])) if found else Kept(0, genesis)
    count = unsent(db, sent_through)
    if count < MERGE_RECORDS:
        return head, (), 0
    contents = db.execute("SELECT content FROM record WHERE seq > ? ORDER BY seq", (kept.seq,))
    new_head, records = merge(head, kept, (content for (content,) in contents))
    if len(records) >= count:
        return head, (), 0
    db.execute("DELETE FROM record WHERE seq > ?", (kept.seq,))
    return new_head, records, count


def check_restart(db: sqlite3.Connection, head: Head, restart: Restart) -> None:
    """Judges whether a restart fits the records that are here.

    Raises:
        RestartError: it does not; nothing may be changed.
    """
    known = acked_seq(db)
    if restart.fork_seq <= known:
        raise RestartError(
            f"it says that the journal forks at record {restart.fork_seq}, but the cloud has signed for"
            f" this vehicle's own records up to {known}"
        )
    if restart.fork_seq > head.seq + 1:
        raise RestartError(
            f"it says that cloud and vehicle agree up to record {restart.fork_seq - 1}, but the journal"
            f" here ends at {head.seq}"
        )
    if restart.head_seq < restart.fork_seq:
        raise RestartError(
            f"the cloud's journal ends at {restart.head_seq}, before the fork at {restart.fork_seq}:"
            " nothing has forked"
        )
    own = db.execute("SELECT hash FROM record WHERE seq = ?", (restart.head_seq,)).fetchone()
    if own is not None and bytes(own[0]) == restart.head_hash:
        raise RestartError(f"record {restart.head_seq} is the same here as in the cloud: nothing has forked")


def restart_journal(db: sqlite3.Connection, restart: Restart, new_id: str) -> tuple[Head, tuple[Record, ...]]:
    """Ends the journal, and makes its records from the fork on anew behind the cloud's head.

    What both sides hold of the old journal stays to be shown, with its receipts.

    Returns:
        The new journal's end, and its records, to be inserted.
    """
    old_id = restart.journal_id
    db.execute(
        "INSERT INTO restart (old_journal, journal, head_hash, content, signature) VALUES (?, ?, ?, ?, ?)",
        (old_id, new_id, restart.head_hash, restart.content, restart.signature),
    )
    contents = db.execute("SELECT content FROM record WHERE seq >= ? ORDER BY seq", (restart.fork_seq,))
    head, records = rechain(Head(new_id, 0, restart.head_hash), (content for (content,) in contents))
    db.execute(
        "INSERT INTO old_record (journal, seq, hash, content) SELECT ?, seq, hash, content FROM record"
        " WHERE seq < ? AND owner = ? ORDER BY seq",
        (old_id, restart.fork_seq, PRESENT),
    )
    db.execute(
        "INSERT INTO old_receipt (journal, through_seq, content, signature)"
        " SELECT ?, through_seq, content, signature FROM receipt",
        (old_id,),
    )
    db.execute("DELETE FROM record")
    db.execute("DELETE FROM receipt")
    return head, records


def pruned_sums(db: sqlite3.Connection) -> tuple[PrunedSum, ...]:
    """The sums of what was removed after its receipt."""
    rows = db.execute(
        "SELECT journal, month, entitlement, feature, meter, account, unit, dimensions, value, gap,"
        " unbounded, records, start_ms, end_ms, through_seq FROM reported"
        " ORDER BY journal, month, entitlement, feature, meter, account, unit, dimensions"
    )
    return tuple(
        PrunedSum._make((*row[:7], _dimensions(row[7]), *row[8:10], bool(row[10]), *row[11:])) for row in rows
    )


def _dimensions(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((str(name), str(value)) for name, value in json.loads(text))


def receipts(db: sqlite3.Connection, journal_id: str) -> tuple[KeptReceipt, ...]:
    """The receipts that are kept, of journals that a restart has ended first."""
    rows = db.execute(
        "SELECT journal, through_seq, content, signature FROM old_receipt ORDER BY rowid"
    ).fetchall()
    rows += db.execute(
        "SELECT ?, through_seq, content, signature FROM receipt ORDER BY through_seq", (journal_id,)
    ).fetchall()
    return tuple(KeptReceipt(*row) for row in rows)


def restarts(db: sqlite3.Connection) -> tuple[KeptRestart, ...]:
    """The restarts that were carried out, in their order."""
    rows = db.execute("SELECT old_journal, journal, content, signature FROM restart ORDER BY rowid")
    return tuple(KeptRestart(*row) for row in rows)


def own_records(db: sqlite3.Connection, journal_id: str) -> Iterator[tuple[str, bytes]]:
    """The present owner's records that are kept, with their journals, the oldest first."""
    yield from db.execute("SELECT journal, content FROM old_record ORDER BY rowid")
    yield from db.execute("SELECT ?, content FROM record WHERE owner = ? ORDER BY seq", (journal_id, PRESENT))


def genesis(db: sqlite3.Connection, journal_id: str) -> bytes:
    """What the first record of a journal names as the hash before it."""
    row = db.execute("SELECT head_hash FROM restart WHERE journal = ?", (journal_id,)).fetchone()
    return bytes(row[0]) if row else GENESIS_HASH
