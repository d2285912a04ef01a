"""The cloud of a simulated life: rights by version, and usage taken by the real code.

`cloud.ingest.verify` and `take` and `cloud.rating` are the real ones; below them
stand tables in memory, or in some lives the real database (`Tables`).
"""

from __future__ import annotations

import copy
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, cast

import sqlalchemy as sa
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from support.engine_world import catalogue_feature, token

from agent.metering.record import batch as batch_bytes
from agent.model import Entitlement, Rights
from cloud import ingest, rating
from cloud.errors import ForkError, UsageError
from cloud.store import (
    EntitlementRow,
    JournalRestartRow,
    ReceiptRow,
    Store,
    Transaction,
    UsageRow,
    VehicleRow,
)
from openfod.entitlement.v1 import entitlement_pb2
from openfod.usage.v1 import usage_pb2

T = TypeVar("T")

VIN = "WFDSEAT10N0000001"
SOURCE = "veh-0123456789abcdef"
DEVICE_KEY = ec.derive_private_key(0x0F0D, ec.SECP256R1())
RECEIPT_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
_ARCHIVE = (ingest.archive_key(RECEIPT_KEY),)
_SPEC = catalogue_feature()
_UNITS = {
    (_SPEC.feature_id, "active-time"): frozenset({int(usage_pb2.UNIT_MILLISECOND)}),
    (_SPEC.feature_id, "heated-distance"): frozenset({int(usage_pb2.UNIT_METRE)}),
}


class Tables(Protocol):
    """Where the cloud keeps usage."""

    def run(self, work: Callable[[Transaction], T]) -> T:
        """Does `work` in one transaction."""
        ...

    def taken(self) -> list[UsageRow]:
        """All rows, by journal and position."""
        ...

    def copy(self) -> object:
        """A backup."""
        ...

    def put_back(self, backup: object) -> None:
        """Is from now on what a backup holds."""
        ...


class SqlTables:
    """The real store, on a database of SQLite in memory."""

    def __init__(self) -> None:
        self._store = Store(sa.make_url("sqlite://"))
        self.run(lambda tx: tx.add_vehicle(VIN, SOURCE, (), 1))

    def run(self, work: Callable[[Transaction], T]) -> T:
        """Does `work` in one transaction."""
        return self._store.run_here(work)

    def taken(self) -> list[UsageRow]:
        """All rows, by journal and position."""
        return self.run(lambda tx: tx.usage(SOURCE))

    def copy(self) -> object:
        """A backup as SQLite makes it."""
        backup = sqlite3.connect(":memory:")
        with self._connection() as connection:
            connection.backup(backup)
        return backup

    def put_back(self, backup: object) -> None:
        """Is from now on what a backup holds."""
        with self._connection() as connection:
            cast("sqlite3.Connection", backup).backup(connection)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        pooled = self._store._engine.raw_connection()
        try:
            connection = pooled.driver_connection
            assert isinstance(connection, sqlite3.Connection)
            yield connection
        finally:
            pooled.close()

    def close(self) -> None:
        """Closes the database."""
        self._store.close()


class MemoryTables:
    """The queries that `cloud.ingest.take` makes, answered from memory; compared with the real store."""

    def __init__(self) -> None:
        self.journals_held: dict[str, list[UsageRow]] = {}
        self.receipts: dict[str, ReceiptRow] = {}
        self.owner_epoch = 1

    def run(self, work: Callable[[Transaction], T]) -> T:
        """Does `work`; it raises before its first write or not at all."""
        return work(cast("Transaction", self))

    def taken(self) -> list[UsageRow]:
        """All rows, by journal and position."""
        return [row for _, rows in sorted(self.journals_held.items()) for row in rows]

    def copy(self) -> object:
        """A backup: rows are never changed, so their number is enough."""
        return {journal: len(rows) for journal, rows in self.journals_held.items()}, dict(self.receipts)

    def put_back(self, backup: object) -> None:
        """Is from now on what a backup holds."""
        kept, receipts = cast("tuple[dict[str, int], dict[str, ReceiptRow]]", backup)
        self.receipts = dict(receipts)
        self.journals_held = {journal: self.journals_held[journal][:count] for journal, count in kept.items()}

    # --- what ingest asks ------------------------------------------------------

    def lock_vehicle(self, vin: str) -> VehicleRow | None:
        """The vehicle's row."""
        return VehicleRow(vin, SOURCE, 1, b"", owner_epoch=1)

    def receipt(self, _source: str, journal_id: str) -> ReceiptRow | None:
        """The newest receipt of a journal."""
        return self.receipts.get(journal_id)

    def journals(self, _source: str) -> int:
        """How many journals the vehicle has begun."""
        return len(self.receipts)

    def usage_hashes(self, _source: str, journal_id: str, seqs: Sequence[int]) -> dict[int, bytes]:
        """Hashes of stored records by position."""
        wanted = set(seqs)
        return {row.seq: row.hash for row in self.journals_held.get(journal_id, []) if row.seq in wanted}

    def usage_at(self, _source: str, journal_id: str, seq: int) -> UsageRow | None:
        """The record at a position, or the first behind it."""
        return next((row for row in self.journals_held.get(journal_id, []) if row.seq >= seq), None)

    def journal_restarts(self, _source: str) -> list[JournalRestartRow]:
        """Nobody has ended a journal."""
        return []

    def add_usage(self, _source: str, rows: Sequence[UsageRow], _epochs: Sequence[int], _now_ms: int) -> None:
        """Stores new records."""
        held = self.journals_held.setdefault(rows[0].journal_id, [])
        assert rows[0].seq == len(held) + 1, "two records with one position"
        held.extend(rows)

    def put_receipt(self, _source: str, journal_id: str, row: ReceiptRow) -> None:
        """Replaces a journal's receipt."""
        self.receipts[journal_id] = row

    def entitlements(self, _vin: str) -> list[EntitlementRow]:
        """Not asked while there is one owner epoch in the row above."""
        return []


@dataclass
class _Rights:
    """What a backup of the cloud holds of rights."""

    version: int = 1
    counter: int = 0
    owner_epoch: int = 1
    current: Entitlement | None = None
    published: dict[int, Rights] = field(default_factory=lambda: {1: Rights(version=1)})


@dataclass(frozen=True)
class Refusal:
    """What a vehicle is told of a batch that was not stored (UsageRefusal of vehicle_service.proto)."""

    kind: str
    reason: str
    stored_through: int


@dataclass(frozen=True)
class Backup:
    """A copy of the cloud's database."""

    rights: _Rights
    kept: Mapping[str, int]
    tables: object


class Office:
    """One vehicle's account at the cloud."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.rights = _Rights()
        self.prices: dict[str, tuple[Entitlement, int]] = {}
        """By entitlement: the right as granted, and its price for an hour in minor units."""
        self.price_minor = 60
        self.nonce: bytes | None = None
        self.forks: list[tuple[str, int]] = []
        self.refusals: list[str] = []
        self._kept: dict[str, int] = {}

    # --- rights ----------------------------------------------------------------

    @property
    def current(self) -> Entitlement | None:
        """The right in force."""
        return self.rights.current

    def grant(self, right: Entitlement) -> None:
        """Grants at today's price, or renews under the price it was granted at."""
        self.prices.setdefault(right.entitlement_id, (right, self.price_minor))
        self._publish(right)

    def revoke(self) -> None:
        """Ends the right; the token burns the older ones."""
        self._publish(None)

    def sell(self, right: Entitlement | None) -> None:
        """The vehicle has a new owner."""
        self.rights.owner_epoch += 1
        self._publish(right)
        if right is not None:
            self.prices.setdefault(right.entitlement_id, (right, self.price_minor))

    def publish_again(self, at_least: int, counter: int) -> None:
        """Names the present rights anew, above what the vehicle reports: after a swap or a restore."""
        self.rights.version = max(self.rights.version, at_least)
        self.rights.counter = max(self.rights.counter, counter)
        self._publish(self.rights.current)

    def _publish(self, right: Entitlement | None) -> None:
        held = self.rights
        held.version, held.counter, held.current = held.version + 1, held.counter + 1, right
        held.published[held.version] = Rights(
            held.version,
            {_SPEC.feature_id: right} if right else {},
            {_SPEC.feature_id: _SPEC},
            {_SPEC.feature_id: token(held.counter, allows=right is not None)},
            owner_epoch=held.owner_epoch,
        )

    # --- usage -----------------------------------------------------------------

    def take(self, signed: usage_pb2.SignedUsageBatch, now_ms: int) -> bytes | Refusal:
        """Takes a batch as the server does; returns the receipt or the refusal."""
        journal_id = ingest.claimed_journal(signed)
        try:
            batch = ingest.verify(signed, DEVICE_KEY.public_key(), SOURCE, _UNITS, _ARCHIVE)
            taken = self.tables.run(lambda tx: ingest.take(tx, VIN, SOURCE, batch, RECEIPT_KEY, now_ms))
        except UsageError as error:
            if isinstance(error, ForkError):
                self.forks.append((error.journal_id, error.seq))
            self.refusals.append(f"{type(error).__name__}: {error}")
            return Refusal(error.kind, str(error), self._kept.get(journal_id, 0))
        self._kept[batch.journal_id] = taken.through_seq
        return taken.receipt

    def latest_receipt(self, journal_id: str) -> bytes | None:
        """What a stream is told when it opens."""
        return self.tables.run(lambda tx: ingest.latest_receipt(tx, SOURCE, journal_id, RECEIPT_KEY))

    def holds(self, journal_id: str) -> int:
        """How many records of a journal it has."""
        return self._kept.get(journal_id, 0)

    # --- backups and bills -------------------------------------------------------

    def backup(self) -> Backup:
        """Copies the database."""
        rights = copy.copy(self.rights)
        rights.published = dict(rights.published)
        return Backup(rights, dict(self._kept), self.tables.copy())

    def put_back(self, backup: Backup) -> None:
        """Replaces the database by an old copy; open streams are gone."""
        self.rights = copy.copy(backup.rights)
        self.rights.published = dict(self.rights.published)
        self.tables.put_back(backup.tables)
        self._kept = dict(backup.kept)
        self.nonce = None

    def invoice(self, now_ms: int) -> list[rating.Line]:
        """The lines of everything that was ever used."""
        records = [usage_pb2.UsageRecord.FromString(row.content) for row in self.tables.taken()]
        rights = [
            rating.Right("Heated seat", 1, 0, 1, (rating.Terms(0, _contract(right, price)),))
            for right, price in self.prices.values()
        ]
        used = [rating.Used(record, min(record.window_start_ms, now_ms)) for record in records]
        return rating.rate(rights, frozenset(), used, {})


def _contract(right: Entitlement, price_minor: int) -> entitlement_pb2.Entitlement:
    made = entitlement_pb2.Entitlement(
        entitlement_id=right.entitlement_id, feature_id=right.feature_id, account=right.account
    )
    made.display_terms.currency = "EUR"
    price = made.display_terms.use_prices.add()
    price.meter_id, price.price_minor, price.per_units = "active-time", price_minor, 3_600_000
    return made


def signed_batch(journal_id: str, records: tuple[bytes, ...]) -> usage_pb2.SignedUsageBatch:
    """A batch as the agent sends it."""
    content = batch_bytes(SOURCE, journal_id, records)
    signature = DEVICE_KEY.sign(ingest.BATCH_CONTEXT + content, ec.ECDSA(hashes.SHA256()))
    return usage_pb2.SignedUsageBatch(batch=content, signature=signature)
