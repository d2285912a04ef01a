"""A database of an older agent is brought up in one transaction, and one of a newer agent is left alone."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from support.edge_store import BOOT, floors, open_store, power_cut_at_each_creation_step, record, trust

from agent.adapters.store import SCHEMA_VERSION, Store
from agent.errors import JournalError

VERSION_1 = """
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
PRAGMA user_version=1;
"""
"""The tables as the first release of the agent made them."""


def version_1(path: Path) -> None:
    """Makes a file as the first release left it."""
    path.parent.mkdir(exist_ok=True)
    db = sqlite3.connect(path)
    db.executescript(VERSION_1)
    old_floors = {
        "director": [3, 3, 3, 3],
        "catalogue": [3, 3, 3, 3],
        "time_ms": 30,
        "tokens": [["ecu", "f", 3]],
        "releases": {"f": 3},
        "director_epoch": "e1",
        "catalogue_epoch": "e2",
    }
    values = {
        "journal_id": "8899aabbccddeeff",
        "floors": old_floors,
        "as_of_ms": 30,
        "contact_ms": 300,
        "mark_ms": 301,
        "boot_id": BOOT,
    }
    db.executemany(
        "INSERT INTO value VALUES (?, ?)", [(name, json.dumps(v).encode()) for name, v in values.items()]
    )
    state = trust(3).verdict.state
    for name, repository in (("director", state.director), ("catalogue", state.catalogue)):
        db.executemany(
            "INSERT INTO metadata VALUES (?, ?, ?, ?)",
            [(name, "root", i, content) for i, content in enumerate(repository.roots)],
        )
    db.execute("INSERT INTO record VALUES (1, ?, ?)", (record(1).hash, record(1).content))
    db.execute("INSERT INTO receipt VALUES (1, ?, ?)", (b"receipt", b"signature"))
    db.execute("INSERT INTO used VALUES ('ent-1', 'heated', 10)")
    db.commit()
    db.close()


def schema(path: Path) -> tuple[int, frozenset[str]]:
    """Version and tables of a file."""
    db = sqlite3.connect(path)
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = frozenset(name for (name,) in db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))
    db.close()
    return version, tables


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "agent.db"


def test_database_of_the_first_release_keeps_everything(path: Path) -> None:
    version_1(path)
    for _ in range(2):
        store = open_store(path)
        stored = store.load()
        store.close()
        assert stored.trust.director.roots == trust(3).verdict.state.director.roots
        assert stored.floors == replace(floors(3), owner_epoch=0)
        assert (stored.as_of_ms, stored.contact_ms, stored.mark_ms) == (30, 300, 301)
        assert (stored.head.journal_id, stored.head.seq, stored.acked_seq) == ("8899aabbccddeeff", 1, 1)
        assert (stored.used, stored.same_boot) == ({("ent-1", "heated"): 10}, True)
        assert stored.mark_epoch == "e1"  # what its mark belonged to, though it did not say so


def test_database_brought_up_has_the_tables_of_a_new_one(path: Path, tmp_path: Path) -> None:
    version_1(path)
    open_store(path).close()
    fresh = tmp_path / "fresh" / "agent.db"
    open_store(fresh).close()
    assert schema(path) == schema(fresh)
    assert schema(path)[0] == SCHEMA_VERSION


def test_looking_at_an_older_database_leaves_it_as_it_is(path: Path) -> None:
    version_1(path)
    before = path.read_bytes()
    looker = Store(path, boot_id=BOOT, journal_id=None)
    assert looker.load().floors == floors(3)
    with pytest.raises(JournalError, match="readonly"):
        looker.mark_sent(1, 5)
    looker.close()
    assert path.read_bytes() == before
    assert schema(path)[0] == 1


def test_power_cut_while_it_is_brought_up_leaves_a_database_that_opens(path: Path, tmp_path: Path) -> None:
    version_1(path)
    copies = tmp_path / "copies"
    with power_cut_at_each_creation_step(copies, path):
        open_store(path).close()
    cuts = [folder / path.name for made in copies.iterdir() for folder in made.iterdir()]
    assert len(cuts) > 5
    for cut in cuts:
        store = open_store(cut)
        assert store.load().floors == floors(3)
        store.close()


@pytest.mark.parametrize("damage", [b"[1]", b"{}", b"not JSON", b'{"director": [-1, 2, 3, 4]}'])
def test_damaged_older_database_is_named_and_kept_as_it_is(path: Path, damage: bytes) -> None:
    version_1(path)
    db = sqlite3.connect(path)
    db.execute("UPDATE value SET content = ? WHERE name = 'floors'", (damage,))
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"agent\.db cannot be opened.*backup"):
        open_store(path)
    assert path.read_bytes() == before
