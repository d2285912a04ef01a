"""The tables of the cloud's database. Migrations make them; tests compare the two."""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _vin(*, primary_key: bool = False) -> sa.Column[str]:
    key = sa.ForeignKey("vehicles.vin")
    return sa.Column("vin", sa.String(17), key, nullable=False, primary_key=primary_key)


vehicles = sa.Table(
    "vehicles",
    metadata,
    sa.Column("vin", sa.String(17), primary_key=True),
    sa.Column("source", sa.String(20), nullable=False, unique=True),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("enrolled_ms", sa.BigInteger, nullable=False),
    sa.Column("last_update", sa.LargeBinary, nullable=False),
    sa.Column("blocked_ms", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("owner_epoch", sa.Integer, nullable=False, server_default="1"),
    sa.Column("wrong_claims", sa.Integer, nullable=False, server_default="0"),
)

ecus = sa.Table(
    "ecus",
    metadata,
    _vin(primary_key=True),
    sa.Column("ecu_identifier", sa.String(48), primary_key=True),
    sa.Column("hardware_id", sa.String(48), nullable=False),
    sa.Column("uid", sa.LargeBinary(16), nullable=False, unique=True),
)

claims = sa.Table(
    "claims",
    metadata,
    _vin(primary_key=True),
    sa.Column("token_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("used_ms", sa.BigInteger, nullable=False),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("fingerprint", sa.LargeBinary(32), primary_key=True),
    _vin(),
    sa.Column("certificate", sa.LargeBinary, nullable=False),
    sa.Column("issued_ms", sa.BigInteger, nullable=False),
    sa.Column("ended_ms", sa.BigInteger, nullable=False),
)

# The open code of a sale; a row goes when it is used, replaced or guessed at too often.
transfers = sa.Table(
    "transfers",
    metadata,
    _vin(primary_key=True),
    sa.Column("code_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("wrong_tries", sa.Integer, nullable=False),
)

ecu_swaps = sa.Table(
    "ecu_swaps",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _vin(),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("ecu_identifier", sa.String(48), nullable=False),
    sa.Column("old_uid", sa.LargeBinary(16), nullable=False),
    sa.Column("new_uid", sa.LargeBinary(16), nullable=False),
    sa.Index("ix_ecu_swaps_vin", "vin"),
)

entitlements = sa.Table(
    "entitlements",
    metadata,
    sa.Column("entitlement_id", sa.String(20), primary_key=True),
    _vin(),
    sa.Column("feature_id", sa.String(48), nullable=False),
    sa.Column("account", sa.String(44), nullable=False),
    sa.Column("plan_kind", sa.Integer, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("granted_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_ms", sa.BigInteger, nullable=False),
    sa.Column("revoke_reason", sa.String(256), nullable=False),
    sa.Column("owner_epoch", sa.Integer, nullable=False, server_default="1"),
    sa.Column("anchor_ms", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("due_ms", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("payment_failed_ms", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index("ix_entitlements_vin", "vin"),
    sa.Index("ix_entitlements_account", "account"),
    sa.Index("ix_entitlements_due_ms", "due_ms"),
)

vehicle_sets = sa.Table(
    "vehicle_sets",
    metadata,
    _vin(primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("entitlements", sa.LargeBinary, nullable=False),
    sa.Column("targets", sa.LargeBinary, nullable=False),
    sa.Column("snapshot", sa.LargeBinary, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
    sa.Column("timestamp_version", sa.BigInteger, nullable=False),
)

tokens = sa.Table(
    "tokens",
    metadata,
    _vin(primary_key=True),
    sa.Column("ecu_identifier", sa.String(48), primary_key=True),
    sa.Column("feature_id", sa.String(48), primary_key=True),
    sa.Column("hardware_id", sa.String(48), nullable=False),
    sa.Column("counter", sa.BigInteger, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

# Counters outlive tokens and vehicles: they belong to the physical ECU.
token_counters = sa.Table(
    "token_counters",
    metadata,
    sa.Column("ecu_uid", sa.LargeBinary(16), primary_key=True),
    sa.Column("feature_number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("counter", sa.BigInteger, nullable=False),
)

usage_records = sa.Table(
    "usage_records",
    metadata,
    sa.Column("source", sa.String(20), primary_key=True),
    sa.Column("journal_id", sa.String(16), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
    sa.Column("stored_ms", sa.BigInteger, nullable=False),
    sa.Column("owner_epoch", sa.Integer, nullable=False, server_default="1"),
    sa.Column("feed_position", sa.BigInteger),  # NULL until the feed has numbered it
    sa.Index("ix_usage_records_feed_position", "feed_position", unique=True),
    sa.Index(
        "ix_usage_records_unnumbered",
        "source",
        "journal_id",
        "seq",
        sqlite_where=sa.text("feed_position IS NULL"),
        postgresql_where=sa.text("feed_position IS NULL"),
    ),
)

# One row: the last position of the feed. Whoever numbers records holds it until the end.
feed_head = sa.Table(
    "feed_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("position", sa.BigInteger, nullable=False),
)

feed_consumers = sa.Table(
    "feed_consumers",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("target", sa.Text, nullable=False),
    sa.Column("position", sa.BigInteger, nullable=False),
    sa.Column("file_bytes", sa.BigInteger, nullable=False),
    sa.Column("moved_ms", sa.BigInteger, nullable=False),
)

# Events that a receiver refused for good, and that an operator let it skip.
feed_set_aside = sa.Table(
    "feed_set_aside",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
)

receipts = sa.Table(
    "receipts",
    metadata,
    sa.Column("source", sa.String(20), primary_key=True),
    sa.Column("journal_id", sa.String(16), primary_key=True),
    sa.Column("through_seq", sa.BigInteger, nullable=False),
    sa.Column("head_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

# Belongs to the physical ECU, as its token counters do; an ECU has one key for its life.
reading_keys = sa.Table(
    "reading_keys",
    metadata,
    sa.Column("ecu_uid", sa.LargeBinary(16), primary_key=True),
    sa.Column("public_key", sa.LargeBinary(32), nullable=False),
)

# The latest reading of each feature, and what was metered since.
readings = sa.Table(
    "readings",
    metadata,
    _vin(primary_key=True),
    sa.Column("feature_id", sa.String(48), primary_key=True),
    sa.Column("ecu_uid", sa.LargeBinary(16), nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("stored_ms", sa.BigInteger, nullable=False),
    sa.Column("is_verified", sa.Boolean, nullable=False),
    sa.Column("reading", sa.BigInteger, nullable=False),
    sa.Column("token_counter", sa.BigInteger, nullable=False),
    sa.Column("on_ms", sa.BigInteger, nullable=False),
    sa.Column("executions", sa.BigInteger, nullable=False),
    sa.Column("excess_ms", sa.BigInteger, nullable=False),
    sa.Column("value_ms", sa.BigInteger, nullable=False),
    sa.Column("gap_ms", sa.BigInteger, nullable=False),
    sa.Column("is_unbounded", sa.Boolean, nullable=False),
    sa.Column("window_end_ms", sa.BigInteger, nullable=False),
    sa.Column("window_ms", sa.BigInteger, nullable=False),
    sa.Column("block_on_ms", sa.BigInteger, nullable=False),
    sa.Column("block_value_ms", sa.BigInteger, nullable=False),
    sa.Column("contact_day", sa.BigInteger, nullable=False),
    sa.Column("silent_days", sa.Integer, nullable=False),
)

# Where an operator's word has ended a journal; `successor` is the journal that goes on, empty before.
journal_restarts = sa.Table(
    "journal_restarts",
    metadata,
    sa.Column("source", sa.String(20), primary_key=True),
    sa.Column("journal_id", sa.String(16), primary_key=True),
    sa.Column("head_seq", sa.BigInteger, nullable=False),
    sa.Column("head_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("successor", sa.String(16), nullable=False),
)

# Both sides of a finding about a journal: the record as stored, the signed batch as received.
usage_evidence = sa.Table(
    "usage_evidence",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _vin(),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("journal_id", sa.String(16), nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("stored", sa.LargeBinary, nullable=False),
    sa.Column("received", sa.LargeBinary, nullable=False),
    sa.Column("found_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_usage_evidence_vin", "vin"),
)

feature_status = sa.Table(
    "feature_status",
    metadata,
    _vin(primary_key=True),
    sa.Column("feature_id", sa.String(48), primary_key=True),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("operator", sa.String(64), primary_key=True),
    sa.Column("request_id", sa.String(36), primary_key=True),
    sa.Column("request_hash", sa.LargeBinary(32), nullable=False),
    sa.Column("response", sa.LargeBinary, nullable=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
)

audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("actor", sa.String(80), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("vin", sa.String(17), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("alarm", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("ix_audit_log_vin", "vin"),
)

# What does not fit about a vehicle, in words; each finding once.
findings = sa.Table(
    "findings",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    _vin(),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("found_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_findings_vin", "vin"),
)

restores = sa.Table(
    "restores",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("backup_ms", sa.BigInteger, nullable=False),
    sa.Column("confirmed_ms", sa.BigInteger, nullable=False),
    sa.Column("until_ms", sa.BigInteger, nullable=False),
)

# The restore after which a vehicle's versions were last moved past what it reported.
caught_up = sa.Table(
    "caught_up",
    metadata,
    _vin(primary_key=True),
    sa.Column("restore_id", sa.Integer, nullable=False),
)

# What the signer did in the newest hour in which it did anything, over the whole fleet.
signer_hours = sa.Table(
    "signer_hours",
    metadata,
    sa.Column("kind", sa.String(32), primary_key=True),
    sa.Column("hour", sa.BigInteger, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
)

# What each version of a plan meant when it was first offered: rights refer to it for ever.
plan_versions = sa.Table(
    "plan_versions",
    metadata,
    sa.Column("plan_id", sa.String(48), primary_key=True),
    sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("terms_sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("payment_grace_s", sa.BigInteger, nullable=False, server_default="0"),
)

# Accounts that have had their trial of a feature, whatever became of it since.
trials = sa.Table(
    "trials",
    metadata,
    sa.Column("account", sa.String(44), primary_key=True),
    sa.Column("feature_id", sa.String(48), primary_key=True),
)

# The terms of rights whose plan an operator changed, and since when each counts; content as Entitlement.
right_terms = sa.Table(
    "right_terms",
    metadata,
    sa.Column("entitlement_id", sa.String(20), primary_key=True),
    sa.Column("from_ms", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
)

# Units that were bought for prepaid rights beside their first ones; numbers from 1.
purchases = sa.Table(
    "purchases",
    metadata,
    sa.Column("entitlement_id", sa.String(20), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at_ms", sa.BigInteger, nullable=False),
    sa.Column("units", sa.BigInteger, nullable=False),
    sa.Column("price_minor", sa.BigInteger, nullable=False),
)

# Closed invoices: content never changes.
invoices = sa.Table(
    "invoices",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("account", sa.String(44), nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("period_start_ms", sa.BigInteger, nullable=False),
    sa.Column("period_end_ms", sa.BigInteger, nullable=False),
    sa.Column("content", sa.LargeBinary, nullable=False),
    sa.Column("sha256", sa.LargeBinary(32), nullable=False),
    sa.Column("closed_ms", sa.BigInteger, nullable=False),
    sa.Index("ix_invoices_account", "account"),
)

# Which closed invoice billed a record, and a fixed price: each one once, by its key.
billed_records = sa.Table(
    "billed_records",
    metadata,
    sa.Column("source", sa.String(20), primary_key=True),
    sa.Column("journal_id", sa.String(16), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("invoice_number", sa.BigInteger, nullable=False),
    sa.Index("ix_billed_records_invoice_number", "invoice_number"),
)

billed_fees = sa.Table(
    "billed_fees",
    metadata,
    sa.Column("entitlement_id", sa.String(20), primary_key=True),
    sa.Column("kind", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("invoice_number", sa.BigInteger, nullable=False),
    sa.Index("ix_billed_fees_invoice_number", "invoice_number"),
)

# Credits and debits; billed_in is 0 until an invoice has them.
corrections = sa.Table(
    "corrections",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("invoice_number", sa.BigInteger, nullable=False),
    sa.Column("account", sa.String(44), nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("amount_minor", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(256), nullable=False),
    sa.Column("created_ms", sa.BigInteger, nullable=False),
    sa.Column("billed_in", sa.BigInteger, nullable=False),
    sa.Index("ix_corrections_account", "account"),
)

# One row: what the cloud last signed over the catalogue.
catalogue_state = sa.Table(
    "catalogue_state",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("targets_version", sa.BigInteger, nullable=False),
    sa.Column("snapshot_version", sa.BigInteger, nullable=False),
    sa.Column("snapshot", sa.LargeBinary, nullable=False),
    sa.Column("timestamp_version", sa.BigInteger, nullable=False),
    sa.Column("timestamp", sa.LargeBinary, nullable=False),
    sa.Column("expires_ms", sa.BigInteger, nullable=False),
)
