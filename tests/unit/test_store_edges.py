"""The store under power cuts, damage, full disks, and more than one agent."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from support.edge_store import (
    BOOT,
    JOURNAL,
    contents,
    floors,
    open_store,
    power_cut_at_each_creation_step,
    power_cut_at_each_statement,
    record,
    trust,
    trust_bytes,
    usage,
    value,
    window,
)

from agent.adapters.store import CHECKPOINT_PAGES, LOG_BYTES, SCHEMA_VERSION, KeptRecord, Store
from agent.errors import JournalError
from agent.events import StoreTrust, StoreUsage


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "agent.db"


def filled(path: Path, records: int = 20) -> None:
    store = open_store(path)
    store.store_trust(trust(1), floors(1))
    store.store_usage(usage(*range(1, records + 1), windows=(window(),)))
    store.store_receipt(2, b"receipt", b"signature")
    store.mark_sent(3, 1)
    store.close()


def test_new_store_is_empty_private_and_keeps_its_journal(path: Path) -> None:
    store = open_store(path)
    stored = store.load()
    assert (stored.head.seq, stored.as_of_ms, stored.windows, stored.used) == (0, 0, (), {})
    assert stored.trust.director.roots == ()
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    store.close()
    again = Store(path, boot_id=BOOT, journal_id="ffffffffffffffff")
    assert (again.journal_id(), again.load().head.journal_id) == (JOURNAL, JOURNAL)
    again.close()


def test_file_that_others_could_read_is_closed_to_them(path: Path) -> None:
    open_store(path).close()
    path.chmod(0o644)
    open_store(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_power_cut_while_the_store_is_made_leaves_none_or_all(path: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    with power_cut_at_each_creation_step(copies, path):
        open_store(path).close()
    cuts = [folder for made in copies.iterdir() for folder in made.iterdir()]
    assert len(cuts) > 10
    for folder in cuts:
        copy = folder / path.name
        if copy.exists():
            assert contents(copy)[5].journal_id == JOURNAL
    path.unlink()
    path.with_name(path.name + ".new").write_bytes(b"what a power cut left")
    open_store(path).close()


@pytest.mark.parametrize("command", [trust(2), usage(4, 5, windows=(window("a"), window("b")))])
def test_power_cut_at_any_statement_leaves_the_old_or_the_new(
    path: Path, tmp_path: Path, command: StoreTrust | StoreUsage
) -> None:
    filled(path, records=3)
    old = contents(path)
    store = open_store(path)
    with power_cut_at_each_statement(store, tmp_path / "copies"):
        if isinstance(command, StoreTrust):
            store.store_trust(command, floors(2))
        else:
            store.store_usage(command)
    store.close()
    new = contents(path)
    assert new != old
    cuts = sorted((tmp_path / "copies").iterdir(), key=lambda folder: int(folder.name))
    seen = [contents(folder / path.name) for folder in cuts]
    assert all(state in (old, new) for state in seen)
    assert (seen[0], seen[-1]) == (old, new)
    assert len(seen) > 8


def test_failure_in_the_middle_of_a_write_changes_nothing(path: Path) -> None:
    filled(path)
    store = open_store(path)
    before = store.load()
    # The last record exists already: the ones before it must not stay.
    with pytest.raises(JournalError, match="cannot be written"):
        store.store_usage(usage(21, 22, 20))
    assert store.load() == before
    store.store_usage(usage(21))
    assert store.load().head.seq == 21
    store.close()


def test_record_is_never_rewritten(path: Path) -> None:
    filled(path)
    store = open_store(path)
    with pytest.raises(JournalError):
        store.store_usage(usage(7))
    assert store.records(7, 7) == (KeptRecord(record(7).content),)
    assert store.record_hash(7) == record(7).hash
    assert store.record_hash(99) is None
    store.close()


def test_number_beyond_the_database_is_refused_and_nothing_changes(path: Path) -> None:
    filled(path)
    store = open_store(path)
    before = store.load()
    with pytest.raises(JournalError):
        store.store_usage(usage(21, used={("ent-1", "heated"): 2**63}))
    assert store.load() == before
    with pytest.raises(JournalError):
        store.records(0, 2**63)
    store.close()


def test_full_disk_is_an_error_and_the_next_write_works_once_there_is_space(path: Path) -> None:
    filled(path)
    store = open_store(path)
    assert store._db is not None
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={pages}")
    before = store.load()
    big = trust(1)
    big.verdict.state.director_targets["big"] = bytes(200_000)  # type: ignore[index]
    for _ in range(2):
        with pytest.raises(JournalError, match="full"):
            store.store_trust(big, floors(2))
        assert store.load() == before
    store._db.execute("PRAGMA max_page_count=100000")
    store.store_trust(big, floors(2))
    assert store.load().floors == floors(2)
    store.close()


def test_the_mark_is_what_the_clock_says_and_sent_never_goes_back(path: Path) -> None:
    store = open_store(path)
    store.store_usage(usage(1, mark_ms=5000))
    store.store_usage(usage(2, 3, 4, mark_ms=10))
    store.mark_sent(1, 3)
    store.mark_sent(1, 2)
    assert (store.load().mark_ms, store._number("sent_through")) == (10, 3)
    store.close()


def test_windows_of_another_boot_are_known_as_such(path: Path) -> None:
    filled(path)
    store = open_store(path)
    assert store.load().same_boot
    store.close()
    store = open_store(path, boot_id="boot-2")
    assert not store.load().same_boot
    store.close()


def test_trust_comes_back_byte_for_byte(path: Path) -> None:
    filled(path)
    store = open_store(path)
    store.store_trust(trust(12), floors(12))
    assert (store.load().trust, store.load().floors) == (trust_bytes(12), floors(12))
    store.close()


# --- damage ----------------------------------------------------------------------


def refused(path: Path, words: str) -> None:
    before = path.read_bytes()
    with pytest.raises(JournalError, match=words) as caught:
        open_store(path).close()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all", bytes(4096), b"SQLite format 3\0" + bytes(9)])
def test_file_that_is_no_database_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    refused(path, "backup")


def test_file_cut_to_nothing_is_damage_and_not_a_first_start(path: Path) -> None:
    filled(path)
    os.truncate(path, 0)
    refused(path, "is empty.*backup")


@pytest.mark.parametrize("size", [1, 100, 4096, 8192, 20000])
def test_file_cut_short_is_refused_and_kept(path: Path, size: int) -> None:
    filled(path)
    assert path.stat().st_size > size
    os.truncate(path, size)
    refused(path, "backup")


def test_lost_file_beside_its_log_is_damage_and_not_a_first_start(path: Path) -> None:
    filled(path)
    path.with_name("agent.db-wal").write_bytes(b"log")
    path.unlink()
    with pytest.raises(JournalError, match=r"agent\.db-wal is here.*backup"):
        open_store(path)
    assert not path.exists()


def test_flipped_bytes_end_in_our_error_or_in_content_that_can_be_checked(path: Path, tmp_path: Path) -> None:
    filled(path)
    good, dice = path.read_bytes(), random.Random(3)
    copy = tmp_path / "copy" / "agent.db"
    copy.parent.mkdir()
    refusals = 0
    for _ in range(150):
        damaged = bytearray(good)
        for _ in range(8):
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        for old in copy.parent.iterdir():
            old.unlink()
        copy.write_bytes(damaged)
        try:
            store = open_store(copy)
        except JournalError:
            refusals += 1
            continue
        try:
            store.load()
            store.records(1, 100)
            store.store_usage(usage(1000))
        except JournalError:
            refusals += 1
        finally:
            store.close()
    assert refusals > 10


def newer(path: Path, *, min_reader: int | None) -> None:
    """Makes a file as a later release may leave it: another version, a new table, a new column."""
    filled(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 3}")
    db.execute("CREATE TABLE later (x INTEGER NOT NULL) STRICT")
    db.execute("INSERT INTO later VALUES (7)")
    for table in ("record", "value", "receipt", "open_window", "used", "metadata", "target", "grant_log"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN later TEXT NOT NULL DEFAULT 'x'")
    if min_reader is None:
        db.execute("DELETE FROM value WHERE name = 'min_reader'")
    else:
        content = value("min_reader", min_reader)
        db.execute("UPDATE value SET content = ? WHERE name = 'min_reader'", (content,))
    db.commit()
    db.close()


@pytest.mark.parametrize("min_reader", [SCHEMA_VERSION + 1, SCHEMA_VERSION + 3, None])
def test_newer_schema_that_this_code_may_not_read_is_refused(path: Path, min_reader: int | None) -> None:
    newer(path, min_reader=min_reader)
    named = min_reader or SCHEMA_VERSION + 3
    refused(path, f"schema {SCHEMA_VERSION + 3}, for agents that know schema {named}.*newer agent")


def test_after_a_downgrade_a_newer_schema_that_allows_it_is_read_and_written(path: Path) -> None:
    newer(path, min_reader=SCHEMA_VERSION)
    store = open_store(path)
    stored = store.load()
    assert (stored.head.seq, stored.acked_seq, stored.trust) == (20, 2, trust_bytes(1))
    store.store_usage(usage(21, windows=(window(),)))
    store.store_trust(trust(2), floors(2))
    store.store_receipt(21, b"receipt", b"signature")
    store.mark_sent(21, 1)
    store.close()
    store = open_store(path)
    assert (store.load().head.seq, store.load().acked_seq, store.load().trust) == (21, 21, trust_bytes(2))
    store.close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION + 3,)
    assert db.execute("SELECT x FROM later").fetchall() == [(7,)]
    db.close()


def test_damaged_word_on_who_may_read_it_is_a_no(path: Path) -> None:
    newer(path, min_reader=SCHEMA_VERSION)
    db = sqlite3.connect(path)
    db.execute("UPDATE value SET content = ? WHERE name = 'min_reader'", (b"1\n0000000000000000",))
    db.commit()
    db.close()
    refused(path, "newer agent")


def test_the_live_connection_writes_through_to_the_disk(path: Path) -> None:
    store = open_store(path)
    assert store._db is not None
    modes = {
        name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in (
            "journal_mode",
            "synchronous",
            "secure_delete",
            "wal_autocheckpoint",
            "journal_size_limit",
        )
    }
    assert modes == {
        "journal_mode": "wal",
        "synchronous": 2,  # FULL
        "secure_delete": 1,
        "wal_autocheckpoint": CHECKPOINT_PAGES,
        "journal_size_limit": LOG_BYTES,
    }
    store.close()


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE record SET hash = ? WHERE seq = 20", b"x" * 32),
        ("UPDATE record SET content = ? WHERE seq = 20", b"other"),
        ("UPDATE open_window SET content = ?", "{}"),
        ("UPDATE open_window SET content = ?", "[]"),
        ("UPDATE open_window SET content = ?", "not JSON"),
        ("UPDATE open_window SET content = ?", json.dumps({"totals": 5})),
        ("UPDATE value SET content = ? WHERE name = 'floors'", value("floors", [1])),
        ("UPDATE value SET content = ? WHERE name = 'floors'", value("floors", {"director": [1, 2, 3, 4]})),
        ("UPDATE value SET content = ? WHERE name = 'floors'", b"\xff\xfe"),
        ("UPDATE value SET content = ? WHERE name = 'mark_ms'", value("mark_ms", "late")),
        ("UPDATE value SET content = ? WHERE name = 'mark_ms'", value("mark_ms", True)),
        ("UPDATE value SET content = ? WHERE name = 'mark_ms'", value("mark_ms", 2**63)),
        ("UPDATE value SET content = ? WHERE name = 'mark_ms'", value("contact_ms", 1000)),
        (
            "UPDATE value SET content = ? WHERE name = 'mark_ms'",
            value("mark_ms", 1000).replace(b"1", b"3", 1),
        ),
        ("UPDATE value SET content = ? WHERE name = 'as_of_ms'", value("as_of_ms", 1.5)),
        ("UPDATE metadata SET role = ? WHERE role = 'targets'", "unknown"),
    ],
)
def test_damaged_content_is_named_and_never_replaced_by_a_default(
    path: Path, statement: str, value: bytes | str
) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute(statement, (value,))
    db.commit()
    db.close()
    store = open_store(path)
    with pytest.raises(JournalError, match=r"cannot be read.*backup"):
        store.load()
    store.close()


def test_database_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE t (x)")
    db.execute("PRAGMA user_version=1")
    db.commit()
    db.close()
    refused(path, "cannot be opened")


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "state", Path("/proc/openfod")):
        with pytest.raises(JournalError, match=r"agent\.db cannot be opened"):
            open_store(folder / "agent.db")


# --- two at once -------------------------------------------------------------------


def test_second_agent_on_one_store_is_refused_and_the_first_goes_on(path: Path) -> None:
    first = open_store(path)
    with pytest.raises(JournalError, match="another agent runs on it"):
        open_store(path)
    first.store_usage(usage(1))
    first.close()
    open_store(path).close()


def test_looking_changes_nothing_even_while_an_agent_runs(path: Path) -> None:
    agent = open_store(path)
    agent.store_usage(usage(1))
    looker = Store(path, boot_id="other", journal_id=None)
    assert looker.load().head.seq == 1
    with pytest.raises(JournalError, match="readonly"):
        looker.store_usage(usage(2))
    looker.close()
    agent.store_usage(usage(2))
    agent.close()


def test_looking_at_nothing_makes_nothing(path: Path) -> None:
    path.parent.mkdir()
    with pytest.raises(JournalError):
        Store(path, boot_id=BOOT, journal_id=None)
    assert list(path.parent.iterdir()) == []
    path.touch()
    with pytest.raises(JournalError, match="is empty"):
        Store(path, boot_id=BOOT, journal_id=None)
    assert path.read_bytes() == b""


def test_store_of_a_folder_with_odd_letters_opens(tmp_path: Path) -> None:
    folder = tmp_path / "a b?c#d%20ä"
    for _ in range(2):
        open_store(folder / "agent.db").close()
    shutil.rmtree(folder)
