"""Journals: both sides of what does not fit, and where an operator's word has ended one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No evidence was kept and no journal ended so far."""
    op.create_table(
        "journal_restarts",
        sa.Column("source", sa.String(length=20), nullable=False),
        sa.Column("journal_id", sa.String(length=16), nullable=False),
        sa.Column("head_seq", sa.BigInteger(), nullable=False),
        sa.Column("head_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("successor", sa.String(length=16), nullable=False),
        sa.PrimaryKeyConstraint("source", "journal_id", name=op.f("pk_journal_restarts")),
    )
    op.create_table(
        "usage_evidence",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("journal_id", sa.String(length=16), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("stored", sa.LargeBinary(), nullable=False),
        sa.Column("received", sa.LargeBinary(), nullable=False),
        sa.Column("found_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_usage_evidence_vin")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_evidence")),
    )
    op.create_index("ix_usage_evidence_vin", "usage_evidence", ["vin"], unique=False)
