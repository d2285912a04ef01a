"""Commands for a store, and a store that can be looked at between any two statements."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

from agent.adapters.store import Store, Stored
from agent.events import StoreTrust, StoreUsage
from agent.metering.meter import OpenWindow
from agent.metering.record import Record
from agent.model import MeterKind, RepositoryBytes, Rights, TrustBytes, Verdict, Versions
from agent.trust.verifier import Floors

BOOT, JOURNAL = "boot-1", "00112233445566aa"


def open_store(path: Path, *, boot_id: str = BOOT) -> Store:
    """Opens a store."""
    return Store(path, boot_id=boot_id, journal_id=JOURNAL)


def value(name: str, content: object) -> bytes:
    """A named value as the file holds it, with its checksum."""
    line = json.dumps(content).encode()
    digest = hashlib.sha256(name.encode() + b"\x00" + line).hexdigest()[:16]
    return line + b"\n" + digest.encode()


def record(seq: int) -> Record:
    """A record whose bytes say which one it is."""
    content = f"record {seq}".encode()
    return Record(seq, content, hashlib.sha256(content).digest())


def window(name: str = "seat-heating", **changes: Any) -> OpenWindow:
    """An open window."""
    values: dict[str, Any] = {
        "feature_id": name,
        "meter_id": "heated",
        "entitlement_id": "ent-1",
        "account": "acc",
        "trace_id": "t",
        "kind": MeterKind.DURATION,
        "start_ms": 1,
        "mark_ns": 2,
        "mark_ms": 3,
        "odometer": None,
        "odometer_m": None,
        "totals": (((("when", "day"),), 10, 2, "EDGE"),),
    }
    return OpenWindow(**(values | changes))


def usage(*seqs: int, windows: tuple[OpenWindow, ...] = (), **changes: Any) -> StoreUsage:
    """A command to append records."""
    values: dict[str, Any] = {"used": {("ent-1", "heated"): 10 * max(seqs, default=0)}, "mark_ms": 1000}
    return StoreUsage(1, tuple(record(s) for s in seqs), windows, **(values | changes))


def trust_bytes(version: int) -> TrustBytes:
    """Metadata that says its version, and as many roots."""

    def repository(name: str) -> RepositoryBytes:
        roots = tuple(f"{name} root {i}".encode() for i in range(1, version + 1))
        parts = (f"{name} {role} {version}".encode() for role in ("timestamp", "snapshot", "targets"))
        return RepositoryBytes(roots, *parts)

    return TrustBytes(
        repository("director"),
        repository("catalogue"),
        {"entitlements.pb": f"rights {version}".encode(), f"token-{version}": bytes(version)},
        {f"features/{version}.toml": b"\x00\xff" * version},
    )


def trust(version: int) -> StoreTrust:
    """A command to store that metadata."""
    versions = Versions(version, version, version, version)
    verdict = Verdict(trust_bytes(version), versions, versions, Rights(version), 10 * version)
    return StoreTrust(1, verdict, mark_ms=100 * version, signed_ms=10 * version)


def floors(version: int) -> Floors:
    """Floors that belong to it."""
    versions = Versions(version, version, version, version)
    return Floors(versions, versions, 10 * version, {("ecu", "f"): version}, {"f": version}, "e1", "e2")


def contents(path: Path) -> tuple[Any, ...]:
    """Everything that an agent would start from, and every record."""
    store = open_store(path)
    try:
        stored = store.load()
        return (*(getattr(stored, f.name) for f in fields(Stored)), store.records(0, 10**9))
    finally:
        store.close()


class _Spy:
    """A connection that shows the files after each statement."""

    def __init__(self, inner: sqlite3.Connection, path: Path, copies: Path) -> None:
        self._inner, self._path, self._copies, self._taken = inner, path, copies, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _copy(self) -> None:
        self._taken += 1
        target = self._copies / str(self._taken)
        target.mkdir(parents=True)
        for suffix in ("", "-wal"):
            source = self._path.with_name(self._path.name + suffix)
            if source.exists():
                shutil.copy(source, target / source.name)

    def execute(self, *arguments: Any) -> Any:
        """Runs one statement, then copies."""
        result = self._inner.execute(*arguments)
        self._copy()
        return result

    def executemany(self, statement: str, rows: Any) -> None:
        """Runs the statement for each row, and copies after each."""
        for row in rows:
            self._inner.execute(statement, row)
            self._copy()


@contextmanager
def power_cut_at_each_statement(store: Store, copies: Path) -> Iterator[None]:
    """Leaves in `copies` what a power cut after each statement would leave."""
    inner = store._db
    assert inner is not None
    store._db = _Spy(inner, store.path, copies)  # type: ignore[assignment]
    try:
        yield
    finally:
        store._db = inner


@contextmanager
def power_cut_at_each_creation_step(copies: Path, path: Path) -> Iterator[None]:
    """As above, for the statements that make a new store."""
    connect = sqlite3.connect

    def spying(target: Any, *arguments: Any, **options: Any) -> Any:
        inner = connect(target, *arguments, **options)
        return _Spy(inner, path, copies / str(target).replace("/", "_"))

    with mock.patch.object(sqlite3, "connect", spying):
        yield
