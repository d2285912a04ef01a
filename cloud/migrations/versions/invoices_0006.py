"""Closed invoices; due times, payments, changed terms and purchases of rights; trials for ever."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_TRIAL = 3
"""PLAN_KIND_TRIAL of entitlement.proto."""


def upgrade() -> None:
    """Nothing was closed so far; every right is due, so that the first run finds out when it really is."""
    with op.batch_alter_table("entitlements") as table:
        table.add_column(sa.Column("due_ms", sa.BigInteger(), server_default="0", nullable=False))
        table.add_column(sa.Column("payment_failed_ms", sa.BigInteger(), server_default="0", nullable=False))
    op.create_index("ix_entitlements_account", "entitlements", ["account"], unique=False)
    op.create_index("ix_entitlements_due_ms", "entitlements", ["due_ms"], unique=False)
    with op.batch_alter_table("plan_versions") as table:
        table.add_column(sa.Column("payment_grace_s", sa.BigInteger(), server_default="0", nullable=False))
    op.create_table(
        "trials",
        sa.Column("account", sa.String(length=44), nullable=False),
        sa.Column("feature_id", sa.String(length=48), nullable=False),
        sa.PrimaryKeyConstraint("account", "feature_id", name=op.f("pk_trials")),
    )
    op.execute(
        "INSERT INTO trials (account, feature_id) "  # noqa: S608 (a number of ours)
        f"SELECT DISTINCT account, feature_id FROM entitlements WHERE plan_kind = {_TRIAL}"
    )
    op.create_table(
        "right_terms",
        sa.Column("entitlement_id", sa.String(length=20), nullable=False),
        sa.Column("from_ms", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("entitlement_id", "from_ms", name=op.f("pk_right_terms")),
    )
    op.create_table(
        "purchases",
        sa.Column("entitlement_id", sa.String(length=20), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("price_minor", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("entitlement_id", "number", name=op.f("pk_purchases")),
    )
    op.create_table(
        "invoices",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("account", sa.String(length=44), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("period_start_ms", sa.BigInteger(), nullable=False),
        sa.Column("period_end_ms", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(length=32), nullable=False),
        sa.Column("closed_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_invoices")),
    )
    op.create_index("ix_invoices_account", "invoices", ["account"], unique=False)
    op.create_table(
        "billed_records",
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("journal_id", sa.String(length=16), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("invoice_number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("source", "journal_id", "seq", name=op.f("pk_billed_records")),
    )
    op.create_index("ix_billed_records_invoice_number", "billed_records", ["invoice_number"], unique=False)
    op.create_table(
        "billed_fees",
        sa.Column("entitlement_id", sa.String(length=20), nullable=False),
        sa.Column("kind", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("invoice_number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("entitlement_id", "kind", "number", name=op.f("pk_billed_fees")),
    )
    op.create_index("ix_billed_fees_invoice_number", "billed_fees", ["invoice_number"], unique=False)
    op.create_table(
        "corrections",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("invoice_number", sa.BigInteger(), nullable=False),
        sa.Column("account", sa.String(length=44), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("amount_minor", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(length=256), nullable=False),
        sa.Column("created_ms", sa.BigInteger(), nullable=False),
        sa.Column("billed_in", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_corrections")),
    )
    op.create_index("ix_corrections_account", "corrections", ["account"], unique=False)
