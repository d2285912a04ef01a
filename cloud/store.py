"""Keeps the cloud's state in a SQL database: one transaction for each piece of work.

Works on SQLite (WAL, synchronous=FULL) by default; outside `_open` nothing is
particular to it. All work runs on one thread of its own, so that the event
loop never waits for a disk and writers never meet; on a database that several
processes share, the vehicle's row is locked first.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from cloud import schema
from cloud.catalogue import Fresh
from cloud.errors import StartError
from cloud.model import Ecu
from cloud.readings import ReadingRow
from common import log

T = TypeVar("T")

_MAX_VALUES = 500
"""Most values in one IN of a query."""
_SINGLE = 1
"""Primary key of the only row of catalogue_state."""

_log = log.get(__name__)


@dataclass(frozen=True, slots=True)
class VehicleRow:
    """A registered vehicle.

    Args:
        last_update: serialised UpdateResult, empty before the first.
        blocked_ms: when it was blocked, 0 if it is not.
        owner_epoch: counts its owners, from 1.
        wrong_claims: enrolments refused since its newest claim was made.
    """

    vin: str
    source: str
    enrolled_ms: int
    last_update: bytes
    blocked_ms: int = 0
    owner_epoch: int = 1
    wrong_claims: int = 0


@dataclass(frozen=True, slots=True)
class ClaimRow:
    """A one-time enrolment claim; `used_ms` is 0 until it is used."""

    token_hash: bytes
    expires_ms: int
    used_ms: int


@dataclass(frozen=True, slots=True)
class TransferRow:
    """The open code of a sale."""

    code_hash: bytes
    expires_ms: int
    wrong_tries: int


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One entry of the audit log; `detail` is JSON."""

    id: int
    at_ms: int
    actor: str
    action: str
    vin: str
    detail: str
    alarm: bool


@dataclass(frozen=True, slots=True)
class EntitlementRow:
    """A right with its history.

    Args:
        content: serialised Entitlement.
        granted_ms: since when this account has it.
        revoked_ms: 0 while it lives.
        owner_epoch: of the owner who has or had it.
        anchor_ms: when its first period began; before `granted_ms` if it came with a bought vehicle.
        due_ms: when it has to be looked at again: renewed, changed or ended; 0: at once.
        payment_failed_ms: when a payment failed that is still missing, 0: none.
    """

    entitlement_id: str
    vin: str
    feature_id: str
    account: str
    plan_kind: int
    content: bytes
    granted_ms: int
    revoked_ms: int
    revoke_reason: str
    owner_epoch: int
    anchor_ms: int
    due_ms: int = 0
    payment_failed_ms: int = 0


@dataclass(frozen=True, slots=True)
class TermsRow:
    """Terms of a right whose plan was changed, as a serialised Entitlement, and since when they count."""

    entitlement_id: str
    from_ms: int
    content: bytes


@dataclass(frozen=True, slots=True)
class PurchaseRow:
    """Units bought for a prepaid right; numbers from 1."""

    entitlement_id: str
    number: int
    at_ms: int
    units: int
    price_minor: int


@dataclass(frozen=True, slots=True)
class InvoiceRow:
    """A closed invoice; `content` is a serialised Invoice."""

    number: int
    account: str
    currency: str
    period_start_ms: int
    period_end_ms: int
    content: bytes
    sha256: bytes
    closed_ms: int


@dataclass(frozen=True, slots=True)
class CorrectionRow:
    """A credit or a debit for an account's next invoice.

    Args:
        invoice_number: what it corrects.
        billed_in: number of the invoice that has it, 0 before.
    """

    id: int
    invoice_number: int
    account: str
    currency: str
    amount_minor: int
    reason: str
    created_ms: int
    billed_in: int


@dataclass(frozen=True, slots=True)
class OpenUsageRow:
    """One stored usage record with its key, for rating."""

    source: str
    journal_id: str
    seq: int
    content: bytes
    stored_ms: int


@dataclass(frozen=True, slots=True)
class SetRow:
    """The newest signed set of a vehicle."""

    version: int
    entitlements: bytes
    targets: bytes
    snapshot: bytes
    expires_ms: int
    timestamp_version: int


@dataclass(frozen=True, slots=True)
class TokenRow:
    """The newest token of one feature in one ECU."""

    ecu_identifier: str
    feature_id: str
    hardware_id: str
    counter: int
    content: bytes


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One stored usage record, as received.

    Args:
        stored_ms: when it was stored, Unix milliseconds; 0 before.
    """

    journal_id: str
    seq: int
    content: bytes
    hash: bytes
    stored_ms: int = 0


@dataclass(frozen=True, slots=True)
class ReceiptRow:
    """The newest receipt of a journal; `content` is a serialised SignedUsageReceipt."""

    through_seq: int
    head_hash: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class JournalRestartRow:
    """Where an operator's word has ended a journal.

    Args:
        content: serialised SignedJournalRestart.
        successor: the journal that goes on; empty before.
    """

    journal_id: str
    head_seq: int
    head_hash: bytes
    content: bytes
    successor: str


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """Both sides of a finding about a journal.

    Args:
        kind, text: of the finding.
        seq: first position at which the two differ.
        stored: the record as stored; empty if the cloud holds none.
        received: serialised SignedUsageBatch; empty once the vehicle's limit was reached.
    """

    id: int
    kind: str
    journal_id: str
    seq: int
    text: str
    stored: bytes
    received: bytes
    found_ms: int


@dataclass(frozen=True, slots=True)
class FeedRow:
    """One usage record in the order of the feed; positions from 1 without holes."""

    position: int
    source: str
    content: bytes


@dataclass(frozen=True, slots=True)
class ConsumerRow:
    """How far a consumer of the feed has come.

    Args:
        target: where it exports to, a URL or "file:" and an absolute path.
        position: of the last event that is exported, 0 before the first.
        file_bytes: length of its file with exactly these events; 0 if it has none.
        moved_ms: when it last moved, Unix milliseconds.
    """

    name: str
    target: str
    position: int
    file_bytes: int
    moved_ms: int


@dataclass(frozen=True, slots=True)
class SetAsideRow:
    """An event that a consumer was let skip, and why."""

    name: str
    position: int
    reason: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class FindingRow:
    """What does not fit about a vehicle, in words."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class RestoreRow:
    """A restore of this database that an operator confirmed."""

    id: int
    backup_ms: int
    confirmed_ms: int
    until_ms: int


@dataclass(frozen=True, slots=True)
class RequestRow:
    """The answer that an operator's request got before."""

    request_hash: bytes
    response: bytes


class Transaction:
    """What one piece of work may read and write; all of it is stored, or nothing."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection

    # --- vehicles ---------------------------------------------------------

    def lock_vehicle(self, vin: str) -> VehicleRow | None:
        """Reads a vehicle and keeps other writers from it until the end."""
        table = schema.vehicles
        query = sa.select(*(table.c[name] for name in VehicleRow.__slots__))
        row = self._connection.execute(query.where(table.c.vin == vin).with_for_update()).one_or_none()
        return VehicleRow(*row) if row else None

    def vehicles(self) -> list[VehicleRow]:
        """All vehicles, by VIN."""
        table = schema.vehicles
        query = sa.select(*(table.c[name] for name in VehicleRow.__slots__))
        return [VehicleRow(*row) for row in self._connection.execute(query.order_by(table.c.vin))]

    def add_vehicle(self, vin: str, source: str, ecus: Iterable[Ecu], now_ms: int) -> None:
        """Registers a vehicle with its ECUs."""
        values = {"vin": vin, "source": source, "created_ms": now_ms, "enrolled_ms": 0, "last_update": b""}
        self._insert(schema.vehicles, values)
        for ecu in ecus:
            self._insert(
                schema.ecus,
                {
                    "vin": vin,
                    "ecu_identifier": ecu.identifier,
                    "hardware_id": ecu.hardware_id,
                    "uid": ecu.uid,
                },
            )
            if ecu.reading_key:
                self.put_reading_key(ecu.uid, ecu.reading_key)

    def ecus(self, vin: str) -> list[Ecu]:
        """A vehicle's ECUs, by identifier."""
        table, keys = schema.ecus, schema.reading_keys
        query = sa.select(
            table.c.ecu_identifier, table.c.hardware_id, table.c.uid, sa.func.coalesce(keys.c.public_key, b"")
        ).join_from(table, keys, keys.c.ecu_uid == table.c.uid, isouter=True)
        rows = self._connection.execute(query.where(table.c.vin == vin).order_by(table.c.ecu_identifier))
        return [Ecu(*row) for row in rows]

    def ecu_owner(self, uid: bytes) -> str | None:
        """VIN of the vehicle that an ECU is built into."""
        table = schema.ecus
        return self._connection.scalar(sa.select(table.c.vin).where(table.c.uid == uid))

    def replace_ecu(self, vin: str, ecu_identifier: str, new_uid: bytes, now_ms: int) -> None:
        """Puts another ECU in the place of one, and remembers the swap."""
        table = schema.ecus
        mine = (table.c.vin == vin) & (table.c.ecu_identifier == ecu_identifier)
        old_uid = self._connection.execute(sa.select(table.c.uid).where(mine)).scalar_one()
        self._connection.execute(table.update().where(mine).values(uid=new_uid))
        self._insert(
            schema.ecu_swaps,
            {
                "vin": vin,
                "at_ms": now_ms,
                "ecu_identifier": ecu_identifier,
                "old_uid": old_uid,
                "new_uid": new_uid,
            },
        )

    def former_ecus(self, vin: str, ecu_identifier: str) -> frozenset[bytes]:
        """Uids of the ECUs that were taken out of one place of a vehicle."""
        table = schema.ecu_swaps
        mine = (table.c.vin == vin) & (table.c.ecu_identifier == ecu_identifier)
        return frozenset(self._connection.scalars(sa.select(table.c.old_uid).where(mine)))

    def ecu_swaps(self, vin: str, since_ms: int) -> list[int]:
        """When ECUs of a vehicle were swapped after `since_ms`, oldest first."""
        table = schema.ecu_swaps
        query = sa.select(table.c.at_ms).where((table.c.vin == vin) & (table.c.at_ms > since_ms))
        return list(self._connection.scalars(query.order_by(table.c.at_ms)))

    def set_owner_epoch(self, vin: str, owner_epoch: int) -> None:
        """Begins another owner's time."""
        self._put(schema.vehicles, {"vin": vin}, {"owner_epoch": owner_epoch})

    def set_last_update(self, vin: str, content: bytes) -> None:
        """Keeps how the vehicle's last trust update ended."""
        self._put(schema.vehicles, {"vin": vin}, {"last_update": content})

    # --- enrolment --------------------------------------------------------

    def put_claim(self, vin: str, token_hash: bytes, expires_ms: int) -> None:
        """Makes the vehicle's only claim; an older one ends."""
        values = {"token_hash": token_hash, "expires_ms": expires_ms, "used_ms": 0}
        self._put(schema.claims, {"vin": vin}, values)
        self.set_wrong_claims(vin, 0)

    def end_claim(self, vin: str) -> None:
        """Ends the vehicle's claim, if there is one."""
        table = schema.claims
        self._connection.execute(table.delete().where(table.c.vin == vin))

    def set_wrong_claims(self, vin: str, count: int) -> None:
        """Keeps how many enrolments of a registered vehicle were refused."""
        table = schema.vehicles
        self._connection.execute(table.update().where(table.c.vin == vin).values(wrong_claims=count))

    def claim(self, vin: str) -> ClaimRow | None:
        """The vehicle's claim."""
        table = schema.claims
        query = sa.select(table.c.token_hash, table.c.expires_ms, table.c.used_ms)
        row = self._connection.execute(query.where(table.c.vin == vin)).one_or_none()
        return ClaimRow(*row) if row else None

    def enrol(self, vin: str, fingerprint: bytes, certificate: bytes, now_ms: int) -> list[bytes]:
        """Uses up the claim and makes this certificate the vehicle's only valid one; ends a block.

        Returns:
            the fingerprints of the certificates that it replaces.
        """
        claims, vehicles = schema.claims, schema.vehicles
        ended = self.end_devices(vin, now_ms)
        self._insert(
            schema.devices,
            {
                "fingerprint": fingerprint,
                "vin": vin,
                "certificate": certificate,
                "issued_ms": now_ms,
                "ended_ms": 0,
            },
        )
        self._connection.execute(claims.update().where(claims.c.vin == vin).values(used_ms=now_ms))
        values = {"enrolled_ms": now_ms, "blocked_ms": 0}
        self._connection.execute(vehicles.update().where(vehicles.c.vin == vin).values(**values))
        return ended

    def end_devices(self, vin: str, now_ms: int) -> list[bytes]:
        """Ends the vehicle's certificates; returns the fingerprints of those that were valid."""
        table = schema.devices
        still_valid = (table.c.vin == vin) & (table.c.ended_ms == 0)
        ended = list(self._connection.scalars(sa.select(table.c.fingerprint).where(still_valid)))
        self._connection.execute(table.update().where(still_valid).values(ended_ms=now_ms))
        return ended

    def block(self, vin: str, now_ms: int) -> None:
        """Marks a vehicle as blocked; its next enrolment ends that."""
        self._put(schema.vehicles, {"vin": vin}, {"blocked_ms": now_ms})

    def device_vin(self, fingerprint: bytes) -> str | None:
        """VIN for which a certificate is valid now; None if it never was or has ended."""
        table = schema.devices
        valid = (table.c.fingerprint == fingerprint) & (table.c.ended_ms == 0)
        return self._connection.scalar(sa.select(table.c.vin).where(valid))

    # --- sale -------------------------------------------------------------

    def put_transfer(self, vin: str, code_hash: bytes, expires_ms: int) -> None:
        """Makes the vehicle's only open code; an older one ends."""
        values = {"code_hash": code_hash, "expires_ms": expires_ms, "wrong_tries": 0}
        self._put(schema.transfers, {"vin": vin}, values)

    def transfer(self, vin: str) -> TransferRow | None:
        """The vehicle's open code."""
        table = schema.transfers
        columns = [table.c[name] for name in TransferRow.__slots__]
        row = self._connection.execute(sa.select(*columns).where(table.c.vin == vin)).one_or_none()
        return TransferRow(*row) if row else None

    def set_wrong_tries(self, vin: str, count: int) -> None:
        """Keeps how often a wrong code was tried."""
        table = schema.transfers
        self._connection.execute(table.update().where(table.c.vin == vin).values(wrong_tries=count))

    def end_transfer(self, vin: str) -> None:
        """Ends the vehicle's open code, if there is one."""
        table = schema.transfers
        self._connection.execute(table.delete().where(table.c.vin == vin))

    # --- rights -----------------------------------------------------------

    def add_entitlement(self, row: EntitlementRow) -> None:
        """Stores a new right."""
        self._insert(schema.entitlements, {name: getattr(row, name) for name in row.__slots__})

    def entitlements(self, vin: str) -> list[EntitlementRow]:
        """A vehicle's rights, ended ones included, oldest first."""
        return self._entitlements(schema.entitlements.c.vin == vin)

    def live_entitlements(self) -> list[EntitlementRow]:
        """All vehicles' rights that have not ended, oldest first."""
        return self._entitlements(schema.entitlements.c.revoked_ms == 0)

    def account_entitlements(self, account: str) -> list[EntitlementRow]:
        """An account's rights over all vehicles, ended ones included, oldest first."""
        return self._entitlements(schema.entitlements.c.account == account)

    def due_vehicles(self, now_ms: int) -> list[str]:
        """Vehicles with a live right that has to be looked at, by VIN."""
        table = schema.entitlements
        due = (table.c.revoked_ms == 0) & (table.c.due_ms <= now_ms)
        return list(
            self._connection.scalars(sa.select(table.c.vin).where(due).distinct().order_by(table.c.vin))
        )

    def had_trial(self, account: str, feature_id: str) -> bool:
        """Whether an account has had its trial of a feature."""
        table = schema.trials
        mine = (table.c.account == account) & (table.c.feature_id == feature_id)
        return self._connection.execute(sa.select(table).where(mine)).first() is not None

    def add_trial(self, account: str, feature_id: str) -> None:
        """Keeps for ever that an account has had its trial; a second one breaks the key."""
        self._insert(schema.trials, {"account": account, "feature_id": feature_id})

    def terms(self, entitlement_ids: Collection[str]) -> dict[str, list[TermsRow]]:
        """Terms of rights whose plan was changed, by right, oldest first."""
        table = schema.right_terms
        found: dict[str, list[TermsRow]] = {}
        query = sa.select(*(table.c[name] for name in TermsRow.__slots__))
        for some in _pieces(entitlement_ids):
            mine = query.where(table.c.entitlement_id.in_(some)).order_by(table.c.from_ms)
            for row in self._connection.execute(mine):
                found.setdefault(row[0], []).append(TermsRow(*row))
        return found

    def put_terms(self, row: TermsRow) -> None:
        """Stores terms; those that were to begin at the same time are replaced."""
        key = {"entitlement_id": row.entitlement_id, "from_ms": row.from_ms}
        self._put(schema.right_terms, key, {"content": row.content})

    def purchases(self, entitlement_ids: Collection[str]) -> dict[str, list[PurchaseRow]]:
        """What was bought for rights beside their first units, by right, oldest first."""
        table = schema.purchases
        found: dict[str, list[PurchaseRow]] = {}
        query = sa.select(*(table.c[name] for name in PurchaseRow.__slots__))
        for some in _pieces(entitlement_ids):
            mine = query.where(table.c.entitlement_id.in_(some)).order_by(table.c.number)
            for row in self._connection.execute(mine):
                found.setdefault(row[0], []).append(PurchaseRow(*row))
        return found

    def add_purchase(self, row: PurchaseRow) -> None:
        """Stores bought units."""
        self._insert(schema.purchases, {name: getattr(row, name) for name in row.__slots__})

    def _entitlements(self, where: sa.ColumnElement[bool]) -> list[EntitlementRow]:
        table = schema.entitlements
        columns = [table.c[name] for name in EntitlementRow.__slots__]
        query = sa.select(*columns).where(where).order_by(table.c.granted_ms, table.c.entitlement_id)
        return [EntitlementRow(*row) for row in self._connection.execute(query)]

    def end_entitlement(self, entitlement_id: str, now_ms: int, reason: str) -> None:
        """Ends a right."""
        values = {"revoked_ms": now_ms, "revoke_reason": reason}
        self._put(schema.entitlements, {"entitlement_id": entitlement_id}, values)

    def set_entitlement(self, row: EntitlementRow) -> None:
        """Replaces a right's content, when it is due and whether a payment is missing."""
        values = {
            "content": row.content,
            "due_ms": row.due_ms,
            "payment_failed_ms": row.payment_failed_ms,
        }
        self._put(schema.entitlements, {"entitlement_id": row.entitlement_id}, values)

    def vehicle_set(self, vin: str) -> SetRow | None:
        """The newest signed set."""
        table = schema.vehicle_sets
        columns = [table.c[name] for name in SetRow.__slots__]
        row = self._connection.execute(sa.select(*columns).where(table.c.vin == vin)).one_or_none()
        return SetRow(*row) if row else None

    def put_vehicle_set(self, vin: str, row: SetRow) -> None:
        """Stores a newly signed set."""
        self._put(schema.vehicle_sets, {"vin": vin}, {name: getattr(row, name) for name in row.__slots__})

    def next_timestamp_version(self, vin: str) -> int:
        """Takes the next timestamp version of a vehicle that has a set."""
        table = schema.vehicle_sets
        mine = table.c.vin == vin
        self._connection.execute(
            table.update().where(mine).values(timestamp_version=table.c.timestamp_version + 1)
        )
        return int(self._connection.execute(sa.select(table.c.timestamp_version).where(mine)).scalar_one())

    def next_token_counter(self, ecu_uid: bytes, feature_number: int) -> int:
        """Takes the next counter of one feature in one physical ECU, from 1."""
        counter = self.token_counter(ecu_uid, feature_number) + 1
        self.raise_token_counter(ecu_uid, feature_number, counter)
        return counter

    def token_counter(self, ecu_uid: bytes, feature_number: int) -> int:
        """The last counter of one feature in one physical ECU, 0 before the first."""
        table = schema.token_counters
        mine = (table.c.ecu_uid == ecu_uid) & (table.c.feature_number == feature_number)
        return self._connection.scalar(sa.select(table.c.counter).where(mine)) or 0

    def raise_token_counter(self, ecu_uid: bytes, feature_number: int, at_least: int) -> None:
        """Makes the next counter of one feature in one physical ECU higher than `at_least`."""
        if self.token_counter(ecu_uid, feature_number) < at_least:
            key = {"ecu_uid": ecu_uid, "feature_number": feature_number}
            self._put(schema.token_counters, key, {"counter": at_least})

    def copy_token_counters(self, old_uid: bytes, new_uid: bytes) -> None:
        """Makes the counters of an ECU at least those of the one whose place it takes."""
        table = schema.token_counters
        query = sa.select(table.c.feature_number, table.c.counter).where(table.c.ecu_uid == old_uid)
        for feature_number, counter in self._connection.execute(query).all():
            self.raise_token_counter(new_uid, feature_number, counter)

    def put_token(self, vin: str, row: TokenRow) -> None:
        """Replaces the token of one feature in one ECU."""
        key = {"vin": vin, "ecu_identifier": row.ecu_identifier, "feature_id": row.feature_id}
        values = {"hardware_id": row.hardware_id, "counter": row.counter, "content": row.content}
        self._put(schema.tokens, key, values)

    def tokens(self, vin: str) -> list[TokenRow]:
        """A vehicle's tokens, by ECU and feature."""
        table = schema.tokens
        columns = [table.c[name] for name in TokenRow.__slots__]
        query = sa.select(*columns).where(table.c.vin == vin)
        rows = self._connection.execute(query.order_by(table.c.ecu_identifier, table.c.feature_id))
        return [TokenRow(*row) for row in rows]

    # --- status -----------------------------------------------------------

    def replace_status(self, vin: str, features: Mapping[str, bytes]) -> None:
        """Keeps what a vehicle's features report now, by feature id."""
        table = schema.feature_status
        self._connection.execute(table.delete().where(table.c.vin == vin))
        for feature_id, content in features.items():
            self._insert(table, {"vin": vin, "feature_id": feature_id, "content": content})

    def status(self, vin: str) -> dict[str, bytes]:
        """What a vehicle's features last reported, by feature id."""
        table = schema.feature_status
        query = sa.select(table.c.feature_id, table.c.content).where(table.c.vin == vin)
        rows = self._connection.execute(query.order_by(table.c.feature_id))
        return {feature_id: content for feature_id, content in rows}  # noqa: C416 (rows are not pairs to mypy)

    # --- usage ------------------------------------------------------------

    def receipt(self, source: str, journal_id: str) -> ReceiptRow | None:
        """The newest receipt of a journal."""
        table = schema.receipts
        columns = [table.c[name] for name in ReceiptRow.__slots__]
        mine = (table.c.source == source) & (table.c.journal_id == journal_id)
        row = self._connection.execute(sa.select(*columns).where(mine)).one_or_none()
        return ReceiptRow(*row) if row else None

    def journals(self, source: str) -> int:
        """How many journals a vehicle has begun."""
        table = schema.receipts
        query = sa.select(sa.func.count()).select_from(table).where(table.c.source == source)
        return int(self._connection.scalar(query) or 0)

    def put_receipt(self, source: str, journal_id: str, row: ReceiptRow) -> None:
        """Stores the newest receipt of a journal."""
        key = {"source": source, "journal_id": journal_id}
        self._put(schema.receipts, key, {name: getattr(row, name) for name in row.__slots__})

    def journal_restarts(self, source: str) -> list[JournalRestartRow]:
        """Where operators have ended journals of a vehicle."""
        table = schema.journal_restarts
        columns = [table.c[name] for name in JournalRestartRow.__slots__]
        query = sa.select(*columns).where(table.c.source == source).order_by(table.c.journal_id)
        return [JournalRestartRow(*row) for row in self._connection.execute(query)]

    def put_journal_restart(self, source: str, row: JournalRestartRow) -> None:
        """Keeps where a journal has ended, or what succeeded it."""
        values = {name: getattr(row, name) for name in row.__slots__ if name != "journal_id"}
        self._put(schema.journal_restarts, {"source": source, "journal_id": row.journal_id}, values)

    def journal_with_head(self, source: str, head_hash: bytes) -> str:
        """The journal of a vehicle whose last record has this hash; empty if there is none."""
        table = schema.receipts
        query = sa.select(table.c.journal_id).where(
            (table.c.source == source) & (table.c.head_hash == head_hash)
        )
        return self._connection.scalar(query.order_by(table.c.journal_id).limit(1)) or ""

    def usage_at(self, source: str, journal_id: str, seq: int) -> UsageRow | None:
        """The record at a position, or the first behind it: that one stands for what a merge removed."""
        table = schema.usage_records
        columns = [table.c[name] for name in UsageRow.__slots__]
        mine = (table.c.source == source) & (table.c.journal_id == journal_id) & (table.c.seq >= seq)
        query = sa.select(*columns).where(mine).order_by(table.c.seq).limit(1)
        row = self._connection.execute(query).one_or_none()
        return UsageRow(*row) if row else None

    def usage_contents(self, source: str, journal_id: str, first: int, last: int) -> list[bytes]:
        """Stored records from `first` to `last`, by seq."""
        table = schema.usage_records
        mine = (table.c.source == source) & (table.c.journal_id == journal_id)
        query = sa.select(table.c.content).where(mine & table.c.seq.between(first, last))
        return list(self._connection.scalars(query.order_by(table.c.seq)))

    def usage_hashes(self, source: str, journal_id: str, seqs: Sequence[int]) -> dict[int, bytes]:
        """Hashes of those of these positions that are stored, by seq."""
        table = schema.usage_records
        mine = (table.c.source == source) & (table.c.journal_id == journal_id)
        query = sa.select(table.c.seq, table.c.hash).where(mine & table.c.seq.in_(seqs))
        return {seq: digest for seq, digest in self._connection.execute(query)}  # noqa: C416 (as in status)

    def add_usage(
        self, source: str, rows: Sequence[UsageRow], owner_epochs: Sequence[int], now_ms: int
    ) -> None:
        """Stores new records for ever, each with the epoch of the owner that it belongs to."""
        self._connection.execute(
            schema.usage_records.insert(),
            [
                {
                    "source": source,
                    "journal_id": row.journal_id,
                    "seq": row.seq,
                    "content": row.content,
                    "hash": row.hash,
                    "stored_ms": now_ms,
                    "owner_epoch": owner_epoch,
                }
                for row, owner_epoch in zip(rows, owner_epochs, strict=True)
            ],
        )

    def usage(
        self,
        source: str,
        after: tuple[str, int] = ("", 0),
        limit: int | None = None,
        *,
        owner_epoch: int | None = None,
    ) -> list[UsageRow]:
        """Records of a vehicle behind a position, of one owner or of all, by (journal, seq)."""
        table = schema.usage_records
        columns = [table.c[name] for name in UsageRow.__slots__]
        journal, seq = after
        behind = (table.c.journal_id > journal) | ((table.c.journal_id == journal) & (table.c.seq > seq))
        query = sa.select(*columns).where((table.c.source == source) & behind)
        if owner_epoch is not None:
            query = query.where(table.c.owner_epoch == owner_epoch)
        query = query.order_by(table.c.journal_id, table.c.seq).limit(limit)
        return [UsageRow(*row) for row in self._connection.execute(query)]

    # --- invoices ---------------------------------------------------------

    def open_usage(self, sources: Collection[str]) -> list[OpenUsageRow]:
        """Records of vehicles that no closed invoice has billed, in order."""
        table, billed = schema.usage_records, schema.billed_records
        same = [table.c[name] == billed.c[name] for name in ("source", "journal_id", "seq")]
        query = (
            sa.select(*(table.c[name] for name in OpenUsageRow.__slots__))
            .select_from(table.outerjoin(billed, sa.and_(*same)))
            .where(billed.c.seq.is_(None))
            .order_by(table.c.source, table.c.journal_id, table.c.seq)
        )
        return self._usage_rows(query, table.c.source, sources)

    def stored_usage(self, source: str) -> list[OpenUsageRow]:
        """All records of a vehicle with the time at which each was stored, in order."""
        table = schema.usage_records
        query = sa.select(*(table.c[name] for name in OpenUsageRow.__slots__)).where(table.c.source == source)
        rows = self._connection.execute(query.order_by(table.c.journal_id, table.c.seq))
        return [OpenUsageRow(*row) for row in rows]

    def billed_usage(self, invoice_number: int) -> list[OpenUsageRow]:
        """Records that a closed invoice has billed, in order."""
        table, billed = schema.usage_records, schema.billed_records
        same = [table.c[name] == billed.c[name] for name in ("source", "journal_id", "seq")]
        query = (
            sa.select(*(table.c[name] for name in OpenUsageRow.__slots__))
            .select_from(table.join(billed, sa.and_(*same)))
            .where(billed.c.invoice_number == invoice_number)
            .order_by(table.c.source, table.c.journal_id, table.c.seq)
        )
        return [OpenUsageRow(*row) for row in self._connection.execute(query)]

    def _usage_rows(
        self, query: sa.Select[Any], column: sa.ColumnElement[str], values: Collection[str]
    ) -> list[OpenUsageRow]:
        rows: list[OpenUsageRow] = []
        for some in _pieces(values):
            rows += [OpenUsageRow(*row) for row in self._connection.execute(query.where(column.in_(some)))]
        return rows

    def billed_fees(self, entitlement_ids: Collection[str]) -> list[tuple[str, int, int, int]]:
        """Fixed prices that were billed: right, kind, number, and the invoice that has them."""
        table = schema.billed_fees
        columns = [table.c[name] for name in ("entitlement_id", "kind", "number", "invoice_number")]
        found: list[tuple[str, int, int, int]] = []
        for some in _pieces(entitlement_ids):
            query = sa.select(*columns).where(table.c.entitlement_id.in_(some))
            found += [
                (right, kind, number, invoice)
                for right, kind, number, invoice in self._connection.execute(query)
            ]
        return found

    def invoices(self, account: str, *, after: int = 0, limit: int | None = None) -> list[InvoiceRow]:
        """Closed invoices of an account, or (empty) of all, behind a number."""
        table = schema.invoices
        query = sa.select(*(table.c[name] for name in InvoiceRow.__slots__)).where(table.c.number > after)
        if account:
            query = query.where(table.c.account == account)
        return [
            InvoiceRow(*row) for row in self._connection.execute(query.order_by(table.c.number).limit(limit))
        ]

    def invoice(self, number: int) -> InvoiceRow | None:
        """A closed invoice."""
        table = schema.invoices
        query = sa.select(*(table.c[name] for name in InvoiceRow.__slots__)).where(table.c.number == number)
        row = self._connection.execute(query).one_or_none()
        return InvoiceRow(*row) if row else None

    def next_invoice_number(self) -> int:
        """The number of the next invoice, from 1 without holes."""
        return int(self._connection.scalar(sa.select(sa.func.max(schema.invoices.c.number))) or 0) + 1

    def add_invoice(
        self,
        row: InvoiceRow,
        records: Iterable[OpenUsageRow],
        fees: Iterable[tuple[str, int, int]],
        corrections: Iterable[int],
    ) -> None:
        """Stores a closed invoice and marks what it bills.

        Args:
            fees: right, kind and number of each fixed price.
            corrections: ids.
        """
        self._insert(schema.invoices, {name: getattr(row, name) for name in row.__slots__})
        marks = [
            {"source": r.source, "journal_id": r.journal_id, "seq": r.seq, "invoice_number": row.number}
            for r in records
        ]
        if marks:
            self._connection.execute(schema.billed_records.insert(), marks)
        for right, kind, number in fees:
            values = {"entitlement_id": right, "kind": kind, "number": number, "invoice_number": row.number}
            self._insert(schema.billed_fees, values)
        for correction in corrections:
            self._put(schema.corrections, {"id": correction}, {"billed_in": row.number})

    def add_correction(self, invoice: InvoiceRow, amount_minor: int, reason: str, now_ms: int) -> None:
        """Keeps a credit or a debit for the account's next invoice."""
        values = {
            "invoice_number": invoice.number,
            "account": invoice.account,
            "currency": invoice.currency,
            "amount_minor": amount_minor,
            "reason": reason,
            "created_ms": now_ms,
            "billed_in": 0,
        }
        self._insert(schema.corrections, values)

    def corrections(self, account: str, *, billed_in: int = 0) -> list[CorrectionRow]:
        """Corrections of an account that an invoice has, or (0) that wait for the next, oldest first."""
        table = schema.corrections
        query = sa.select(*(table.c[name] for name in CorrectionRow.__slots__))
        mine = (table.c.account == account) & (table.c.billed_in == billed_in)
        return [
            CorrectionRow(*row) for row in self._connection.execute(query.where(mine).order_by(table.c.id))
        ]

    # --- readings ---------------------------------------------------------

    def put_reading_key(self, ecu_uid: bytes, public_key: bytes) -> None:
        """Registers the key with which an ECU signs what it counts."""
        self._put(schema.reading_keys, {"ecu_uid": ecu_uid}, {"public_key": public_key})

    def reading_key(self, ecu_uid: bytes) -> bytes | None:
        """The key with which an ECU signs what it counts."""
        table = schema.reading_keys
        return self._connection.scalar(sa.select(table.c.public_key).where(table.c.ecu_uid == ecu_uid))

    def readings(self, vin: str) -> list[ReadingRow]:
        """The latest readings of a vehicle's ECUs, by feature."""
        table = schema.readings
        columns = [table.c[name] for name in ReadingRow.__slots__]
        query = sa.select(*columns).where(table.c.vin == vin).order_by(table.c.feature_id)
        return [ReadingRow(*row) for row in self._connection.execute(query)]

    def put_reading(self, vin: str, row: ReadingRow) -> None:
        """Stores the latest reading of a feature, and what was metered since."""
        values = {name: getattr(row, name) for name in row.__slots__ if name != "feature_id"}
        self._put(schema.readings, {"vin": vin, "feature_id": row.feature_id}, values)

    def journal(self, source: str, journal_id: str) -> list[UsageRow]:
        """All records of one journal, of whatever owner, by seq."""
        table = schema.usage_records
        columns = [table.c[name] for name in UsageRow.__slots__]
        mine = (table.c.source == source) & (table.c.journal_id == journal_id)
        rows = self._connection.execute(sa.select(*columns).where(mine).order_by(table.c.seq))
        return [UsageRow(*row) for row in rows]

    # --- feed -------------------------------------------------------------

    def number_usage(self, limit: int) -> int:
        """Gives at most `limit` records that have none their place in the feed; returns how many.

        Only committed records are seen, and the row of the last position is
        held until the end, so that no place becomes visible after a later one.
        Within one journal places follow seq.
        """
        head, table = schema.feed_head, schema.usage_records
        only = head.c.id == _SINGLE
        last = self._connection.execute(sa.select(head.c.position).where(only).with_for_update()).scalar_one()
        key = [table.c.source, table.c.journal_id, table.c.seq]
        query = sa.select(*key).where(table.c.feed_position.is_(None)).order_by(*key).limit(limit)
        found = self._connection.execute(query).all()
        if not found:
            return 0
        names = ("key_source", "key_journal", "key_seq")
        mine = sa.and_(*(column == sa.bindparam(name) for column, name in zip(key, names, strict=True)))
        values = [
            {**dict(zip(names, row, strict=True)), "place": place}
            for place, row in enumerate(found, start=last + 1)
        ]
        self._connection.execute(
            table.update().where(mine).values(feed_position=sa.bindparam("place")), values
        )
        self._connection.execute(head.update().where(only).values(position=last + len(found)))
        return len(found)

    def feed_head(self) -> int:
        """The last position of the feed, 0 before the first."""
        return int(self._connection.execute(sa.select(schema.feed_head.c.position)).scalar_one())

    def unnumbered_usage(self) -> int:
        """How many stored records have no place in the feed yet."""
        table = schema.usage_records
        query = sa.select(sa.func.count()).select_from(table).where(table.c.feed_position.is_(None))
        return int(self._connection.scalar(query) or 0)

    def feed(self, after: int, limit: int) -> list[FeedRow]:
        """The records behind a position of the feed, at most `limit`."""
        table = schema.usage_records
        query = sa.select(table.c.feed_position, table.c.source, table.c.content)
        query = query.where(table.c.feed_position > after).order_by(table.c.feed_position).limit(limit)
        return [FeedRow(*row) for row in self._connection.execute(query)]

    def accounts(self, entitlement_ids: Sequence[str]) -> dict[tuple[str, str], str]:
        """The accounts of rights, by the pseudonym of their vehicle and their id; at most 1,000 ids."""
        rights, vehicles = schema.entitlements, schema.vehicles
        query = (
            sa.select(vehicles.c.source, rights.c.entitlement_id, rights.c.account)
            .join_from(rights, vehicles, rights.c.vin == vehicles.c.vin)
            .where(rights.c.entitlement_id.in_(entitlement_ids))
        )
        return {(source, right): account for source, right, account in self._connection.execute(query)}

    def consumers(self) -> list[ConsumerRow]:
        """All consumers of the feed, by name."""
        table = schema.feed_consumers
        query = sa.select(*(table.c[name] for name in ConsumerRow.__slots__)).order_by(table.c.name)
        return [ConsumerRow(*row) for row in self._connection.execute(query)]

    def consumer(self, name: str) -> ConsumerRow | None:
        """One consumer of the feed."""
        return next((row for row in self.consumers() if row.name == name), None)

    def add_consumer(self, row: ConsumerRow) -> None:
        """Begins a consumer."""
        self._insert(schema.feed_consumers, {name: getattr(row, name) for name in row.__slots__})

    def move_consumer(self, old: ConsumerRow, new: ConsumerRow) -> bool:
        """Moves a consumer on from where it was read; false if another process has moved it since."""
        table = schema.feed_consumers
        mine = (table.c.name == old.name) & (table.c.position == old.position)
        mine &= (table.c.file_bytes == old.file_bytes) & (table.c.target == old.target)
        values = {"position": new.position, "file_bytes": new.file_bytes, "moved_ms": new.moved_ms}
        return self._connection.execute(table.update().where(mine).values(**values)).rowcount == 1

    def set_aside(self, row: SetAsideRow) -> None:
        """Keeps that a consumer skips an event."""
        key = {"name": row.name, "position": row.position}
        self._put(schema.feed_set_aside, key, {"reason": row.reason, "at_ms": row.at_ms})

    def events_set_aside(self) -> list[SetAsideRow]:
        """What consumers have skipped, by name and position."""
        table = schema.feed_set_aside
        columns = [table.c[name] for name in SetAsideRow.__slots__]
        query = sa.select(*columns).order_by(table.c.name, table.c.position)
        return [SetAsideRow(*row) for row in self._connection.execute(query)]

    # --- requests, audit, catalogue ----------------------------------------

    def request(self, operator: str, request_id: str) -> RequestRow | None:
        """What a request with this id was answered before."""
        table = schema.requests
        mine = (table.c.operator == operator) & (table.c.request_id == request_id)
        query = sa.select(table.c.request_hash, table.c.response).where(mine)
        row = self._connection.execute(query).one_or_none()
        return RequestRow(*row) if row else None

    def add_request(self, operator: str, request_id: str, row: RequestRow, now_ms: int) -> None:
        """Keeps the answer of a request."""
        self._insert(
            schema.requests,
            {
                "operator": operator,
                "request_id": request_id,
                "request_hash": row.request_hash,
                "response": row.response,
                "at_ms": now_ms,
            },
        )

    def audit(
        self, actor: str, action: str, vin: str, now_ms: int, *, alarm: bool = False, **detail: object
    ) -> None:
        """Writes who did what to the audit log; never pass a secret.

        Args:
            actor: "operator:NAME", "vehicle" or "cloud".
            vin: empty if it is about no vehicle.
            alarm: a person should look at it; it is logged at error level too.
        """
        text = json.dumps(detail, sort_keys=True)
        values = {
            "at_ms": now_ms,
            "actor": actor,
            "action": action,
            "vin": vin,
            "detail": text,
            "alarm": alarm,
        }
        self._insert(schema.audit_log, values)
        if alarm:
            _log.error("alarm", action=action, vin=vin, actor=actor, detail=text)

    def audit_page(self, vin: str, *, alarms_only: bool, after: int, limit: int) -> list[AuditRow]:
        """Entries behind an id, of one vehicle or (empty VIN) of all, oldest first."""
        table = schema.audit_log
        query = sa.select(*(table.c[name] for name in AuditRow.__slots__)).where(table.c.id > after)
        if vin:
            query = query.where(table.c.vin == vin)
        if alarms_only:
            query = query.where(table.c.alarm)
        rows = self._connection.execute(query.order_by(table.c.id).limit(limit))
        return [AuditRow(*row) for row in rows]

    def audit_entries(self, vin: str) -> list[tuple[str, str, dict[str, Any]]]:
        """Actor, action and detail of a vehicle's entries, oldest first."""
        table = schema.audit_log
        query = sa.select(table.c.actor, table.c.action, table.c.detail).where(table.c.vin == vin)
        rows = self._connection.execute(query.order_by(table.c.id))
        return [(actor, action, json.loads(detail)) for actor, action, detail in rows]

    def add_finding(self, vin: str, kind: str, text: str, now_ms: int) -> None:
        """Keeps what does not fit about a vehicle."""
        self._insert(schema.findings, {"vin": vin, "kind": kind, "text": text, "found_ms": now_ms})

    def findings(self, vin: str) -> list[FindingRow]:
        """What does not fit about a vehicle, oldest first."""
        table = schema.findings
        query = sa.select(table.c.kind, table.c.text).where(table.c.vin == vin).order_by(table.c.id)
        return [FindingRow(*row) for row in self._connection.execute(query)]

    def end_findings(self, vin: str, kind: str) -> None:
        """Forgets the findings of one kind; the audit log keeps them."""
        table = schema.findings
        self._connection.execute(table.delete().where(table.c.vin == vin, table.c.kind == kind))

    def add_evidence(self, vin: str, row: EvidenceRow) -> None:
        """Keeps both sides of a finding; the database numbers it."""
        values = {name: getattr(row, name) for name in row.__slots__ if name != "id"}
        self._insert(schema.usage_evidence, {"vin": vin, **values})

    def evidence(self, vin: str) -> list[EvidenceRow]:
        """Both sides of a vehicle's findings about its journals, oldest first."""
        table = schema.usage_evidence
        query = sa.select(*(table.c[name] for name in EvidenceRow.__slots__)).where(table.c.vin == vin)
        return [EvidenceRow(*row) for row in self._connection.execute(query.order_by(table.c.id))]

    def evidence_bytes(self, vin: str) -> int:
        """How many bytes of batches are kept as evidence about a vehicle."""
        table = schema.usage_evidence
        query = sa.select(sa.func.sum(sa.func.length(table.c.received))).where(table.c.vin == vin)
        return int(self._connection.scalar(query) or 0)

    def add_restore(self, backup_ms: int, until_ms: int, now_ms: int) -> None:
        """Keeps that an operator confirmed a restore of this database."""
        values = {"backup_ms": backup_ms, "confirmed_ms": now_ms, "until_ms": until_ms}
        self._insert(schema.restores, values)

    def open_restore(self, now_ms: int) -> RestoreRow | None:
        """The newest confirmed restore, if its window is open."""
        table = schema.restores
        columns = [table.c[name] for name in RestoreRow.__slots__]
        query = sa.select(*columns).where(table.c.until_ms > now_ms).order_by(table.c.id.desc()).limit(1)
        row = self._connection.execute(query).one_or_none()
        return RestoreRow(*row) if row else None

    def caught_up(self, vin: str) -> int:
        """The restore after which the vehicle's versions were last moved on; 0 for none."""
        table = schema.caught_up
        return self._connection.scalar(sa.select(table.c.restore_id).where(table.c.vin == vin)) or 0

    def set_caught_up(self, vin: str, restore_id: int) -> None:
        """Keeps that the vehicle's versions were moved on after this restore."""
        self._put(schema.caught_up, {"vin": vin}, {"restore_id": restore_id})

    def raise_timestamp_version(self, vin: str, at_least: int) -> None:
        """Makes the next timestamp version of a vehicle that has a set higher than `at_least`."""
        table = schema.vehicle_sets
        behind = (table.c.vin == vin) & (table.c.timestamp_version < at_least)
        self._connection.execute(table.update().where(behind).values(timestamp_version=at_least))

    def count_signing(self, kind: str, hour: int) -> int:
        """Counts one more of a kind; returns the count of this hour.

        A clock that goes back begins no new hour.
        """
        table = schema.signer_hours
        query = sa.select(table.c.hour, table.c.count).where(table.c.kind == kind)
        row = self._connection.execute(query).one_or_none()
        if row is not None and row[0] >= hour:
            hour, count = row[0], row[1] + 1
        else:
            count = 1
        self._put(schema.signer_hours, {"kind": kind}, {"hour": hour, "count": count})
        return int(count)

    def plan_terms(self) -> dict[tuple[str, int], bytes]:
        """SHA-256 of the terms of every plan that was ever offered, by id and version."""
        table = schema.plan_versions
        query = sa.select(table.c.plan_id, table.c.version, table.c.terms_sha256)
        return {(plan, version): digest for plan, version, digest in self._connection.execute(query)}

    def add_plan_terms(self, plan_id: str, version: int, terms_sha256: bytes, payment_grace_s: int) -> None:
        """Keeps what a version of a plan means for ever."""
        values = {
            "plan_id": plan_id,
            "version": version,
            "terms_sha256": terms_sha256,
            "payment_grace_s": payment_grace_s,
        }
        self._insert(schema.plan_versions, values)

    def payment_grace_s(self, plan_id: str, version: int) -> int:
        """How long rights of a version of a plan go on after a payment failed."""
        table = schema.plan_versions
        mine = (table.c.plan_id == plan_id) & (table.c.version == version)
        return self._connection.scalar(sa.select(table.c.payment_grace_s).where(mine)) or 0

    def fresh(self) -> Fresh | None:
        """What was last signed over the catalogue."""
        table = schema.catalogue_state
        columns = [table.c[name] for name in Fresh.__dataclass_fields__]
        row = self._connection.execute(sa.select(*columns)).one_or_none()
        return Fresh(*row) if row else None

    def put_fresh(self, fresh: Fresh) -> None:
        """Keeps what was signed over the catalogue."""
        values = {name: getattr(fresh, name) for name in Fresh.__dataclass_fields__}
        self._put(schema.catalogue_state, {"id": _SINGLE}, values)

    # ----------------------------------------------------------------------

    def _insert(self, table: sa.Table, values: Mapping[str, object]) -> None:
        self._connection.execute(table.insert().values(**values))

    def _put(self, table: sa.Table, key: Mapping[str, object], values: Mapping[str, object]) -> None:
        """Updates the row with this key, or inserts it."""
        mine = sa.and_(*(table.c[name] == value for name, value in key.items()))
        if self._connection.execute(table.update().where(mine).values(**values)).rowcount == 0:
            self._insert(table, {**key, **values})


class Store:
    """The database, and the thread that works on it."""

    def __init__(self, url: sa.URL, *, serving: bool = True) -> None:
        """Opens the database and brings its schema up to date.

        Args:
            serving: false for a program that works beside the server: the
                database must exist, with the schema of this version.

        Raises:
            StartError: it cannot be opened, or a newer version of this program
                made it.
        """
        if not serving and url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
            raise StartError(f"{url.render_as_string()}: no such database; fod-cloud serve makes it")
        try:
            self._engine = _open(url)
            try:
                if serving:
                    _migrate(self._engine)
                else:
                    _check_schema(self._engine)
            except BaseException:
                self._engine.dispose()
                raise
        except (SQLAlchemyError, ImportError, OSError) as error:  # no such dialect, driver or folder
            raise StartError(f"{url.render_as_string()}: database cannot be used: {error}") from error
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def run(self, work: Callable[[Transaction], T]) -> T:
        """Does `work` in one transaction on the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.run_here, work)

    def run_here(self, work: Callable[[Transaction], T]) -> T:
        """Does `work` in one transaction on this thread; an exception undoes all of it."""
        with self._engine.begin() as connection:
            return work(Transaction(connection))

    def close(self) -> None:
        """Waits for the work under way and closes the database."""
        self._worker.shutdown()
        self._engine.dispose()


def _pieces(values: Collection[str]) -> Iterator[list[str]]:
    """The values in pieces that one query takes."""
    ordered = sorted(values)
    for start in range(0, len(ordered), _MAX_VALUES):
        yield ordered[start : start + _MAX_VALUES]


def _open(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url)
    if url.database not in (None, "", ":memory:"):
        path = Path(str(url.database))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Usage and accounts are nobody else's business; SQLite's side files take the same mode.
        path.touch(mode=0o600)
    engine = sa.create_engine(url, connect_args={"timeout": 30})

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: DBAPIConnection, _record: ConnectionPoolEntry) -> None:
        assert isinstance(connection, sqlite3.Connection)
        # The driver's own transactions begin too late: SELECT would run outside.
        connection.isolation_level = None
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
        except sqlite3.Error:
            connection.close()
            raise

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _check_schema(engine: sa.Engine) -> None:
    settings = Config()
    settings.set_main_option("script_location", "cloud:migrations")
    expected = ScriptDirectory.from_config(settings).get_current_head()
    with engine.begin() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found != expected:
        raise StartError(
            f"database schema is {found}, this program works with {expected}; nothing was changed; "
            "run the same version as the server, and start the server first"
        )


def _migrate(engine: sa.Engine) -> None:
    settings = Config()
    settings.set_main_option("script_location", "cloud:migrations")
    known = {script.revision for script in ScriptDirectory.from_config(settings).walk_revisions()}
    with engine.begin() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in known:
            raise StartError(
                f"database schema {found} is newer than this program knows ({max(known)}); "
                "nothing was changed; run a newer fod-cloud"
            )
        settings.attributes["connection"] = connection
        command.upgrade(settings, "head")
