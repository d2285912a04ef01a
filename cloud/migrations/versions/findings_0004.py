"""Findings about vehicles, confirmed restores of this database, and what the signer did this hour."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Nothing was found and nothing restored so far."""
    op.create_table(
        "findings",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("found_ms", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_findings_vin")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_findings")),
    )
    op.create_index("ix_findings_vin", "findings", ["vin"], unique=False)
    op.create_table(
        "restores",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("backup_ms", sa.BigInteger(), nullable=False),
        sa.Column("confirmed_ms", sa.BigInteger(), nullable=False),
        sa.Column("until_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_restores")),
    )
    op.create_table(
        "signer_hours",
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("hour", sa.BigInteger(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", name=op.f("pk_signer_hours")),
    )
    op.create_table(
        "caught_up",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("restore_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_caught_up_vin")),
        sa.PrimaryKeyConstraint("vin", name=op.f("pk_caught_up")),
    )
