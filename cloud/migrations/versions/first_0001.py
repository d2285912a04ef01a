"""The first schema: vehicles, enrolment, rights and their signed sets, usage, requests and the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes every table."""
    op.create_table(
        "audit_log",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=80), nullable=False),
        sa.Column("action", sa.String(length=32), nullable=False),
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_table(
        "catalogue_state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("targets_version", sa.BigInteger(), nullable=False),
        sa.Column("snapshot_version", sa.BigInteger(), nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=False),
        sa.Column("timestamp_version", sa.BigInteger(), nullable=False),
        sa.Column("timestamp", sa.LargeBinary(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_catalogue_state")),
    )
    op.create_table(
        "receipts",
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("journal_id", sa.String(length=16), nullable=False),
        sa.Column("through_seq", sa.BigInteger(), nullable=False),
        sa.Column("head_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("source", "journal_id", name=op.f("pk_receipts")),
    )
    op.create_table(
        "requests",
        sa.Column("operator", sa.String(length=64), nullable=False),
        sa.Column("request_id", sa.String(length=36), nullable=False),
        sa.Column("request_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("response", sa.LargeBinary(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("operator", "request_id", name=op.f("pk_requests")),
    )
    op.create_table(
        "token_counters",
        sa.Column("ecu_uid", sa.LargeBinary(length=16), nullable=False),
        sa.Column("feature_number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("ecu_uid", "feature_number", name=op.f("pk_token_counters")),
    )
    op.create_table(
        "usage_records",
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("journal_id", sa.String(length=16), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("stored_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("source", "journal_id", "seq", name=op.f("pk_usage_records")),
    )
    op.create_table(
        "vehicles",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("enrolled_ms", sa.BigInteger(), nullable=False),
        sa.Column("last_update", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("vin", name=op.f("pk_vehicles")),
        sa.UniqueConstraint("source", name=op.f("uq_vehicles_source")),
    )
    op.create_table(
        "claims",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("used_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_claims_vin")),
        sa.PrimaryKeyConstraint("vin", name=op.f("pk_claims")),
    )
    op.create_table(
        "devices",
        sa.Column("fingerprint", sa.LargeBinary(length=32), nullable=False),
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("certificate", sa.LargeBinary(), nullable=False),
        sa.Column("issued_ms", sa.BigInteger(), nullable=False),
        sa.Column("ended_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_devices_vin")),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_devices")),
    )
    op.create_table(
        "ecus",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("ecu_identifier", sa.String(length=48), nullable=False),
        sa.Column("hardware_id", sa.String(length=48), nullable=False),
        sa.Column("uid", sa.LargeBinary(length=16), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_ecus_vin")),
        sa.PrimaryKeyConstraint("vin", "ecu_identifier", name=op.f("pk_ecus")),
        sa.UniqueConstraint("uid", name=op.f("uq_ecus_uid")),
    )
    op.create_table(
        "entitlements",
        sa.Column("entitlement_id", sa.String(length=20), nullable=False),
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("feature_id", sa.String(length=48), nullable=False),
        sa.Column("account", sa.String(length=44), nullable=False),
        sa.Column("plan_kind", sa.Integer(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("granted_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoked_ms", sa.BigInteger(), nullable=False),
        sa.Column("revoke_reason", sa.String(length=256), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_entitlements_vin")),
        sa.PrimaryKeyConstraint("entitlement_id", name=op.f("pk_entitlements")),
    )
    op.create_index("ix_entitlements_vin", "entitlements", ["vin"], unique=False)
    op.create_table(
        "feature_status",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("feature_id", sa.String(length=48), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_feature_status_vin")),
        sa.PrimaryKeyConstraint("vin", "feature_id", name=op.f("pk_feature_status")),
    )
    op.create_table(
        "tokens",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("ecu_identifier", sa.String(length=48), nullable=False),
        sa.Column("feature_id", sa.String(length=48), nullable=False),
        sa.Column("hardware_id", sa.String(length=48), nullable=False),
        sa.Column("counter", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_tokens_vin")),
        sa.PrimaryKeyConstraint("vin", "ecu_identifier", "feature_id", name=op.f("pk_tokens")),
    )
    op.create_table(
        "vehicle_sets",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("entitlements", sa.LargeBinary(), nullable=False),
        sa.Column("targets", sa.LargeBinary(), nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("timestamp_version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_vehicle_sets_vin")),
        sa.PrimaryKeyConstraint("vin", name=op.f("pk_vehicle_sets")),
    )
