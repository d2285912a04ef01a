"""An order over stored usage, and how far each consumer of the feed has come."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """What is stored already gets its positions when a consumer first reads."""
    op.add_column("usage_records", sa.Column("feed_position", sa.BigInteger(), nullable=True))
    op.create_index("ix_usage_records_feed_position", "usage_records", ["feed_position"], unique=True)
    op.create_index(
        "ix_usage_records_unnumbered",
        "usage_records",
        ["source", "journal_id", "seq"],
        unique=False,
        sqlite_where=sa.text("feed_position IS NULL"),
        postgresql_where=sa.text("feed_position IS NULL"),
    )
    head = op.create_table(
        "feed_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feed_head")),
    )
    op.bulk_insert(head, [{"id": 1, "position": 0}])
    op.create_table(
        "feed_consumers",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("file_bytes", sa.BigInteger(), nullable=False),
        sa.Column("moved_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_feed_consumers")),
    )
    op.create_table(
        "feed_set_aside",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", "position", name=op.f("pk_feed_set_aside")),
    )
