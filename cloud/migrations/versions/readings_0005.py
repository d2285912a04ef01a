"""What ECUs sign of their own counts: their public keys, and the latest reading of each feature."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """No ECU has a key so far, and none has said anything."""
    op.create_table(
        "reading_keys",
        sa.Column("ecu_uid", sa.LargeBinary(length=16), nullable=False),
        sa.Column("public_key", sa.LargeBinary(length=32), nullable=False),
        sa.PrimaryKeyConstraint("ecu_uid", name=op.f("pk_reading_keys")),
    )
    op.create_table(
        "readings",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("feature_id", sa.String(length=48), nullable=False),
        sa.Column("ecu_uid", sa.LargeBinary(length=16), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("stored_ms", sa.BigInteger(), nullable=False),
        sa.Column("is_verified", sa.Boolean(), nullable=False),
        sa.Column("reading", sa.BigInteger(), nullable=False),
        sa.Column("token_counter", sa.BigInteger(), nullable=False),
        sa.Column("on_ms", sa.BigInteger(), nullable=False),
        sa.Column("executions", sa.BigInteger(), nullable=False),
        sa.Column("excess_ms", sa.BigInteger(), nullable=False),
        sa.Column("value_ms", sa.BigInteger(), nullable=False),
        sa.Column("gap_ms", sa.BigInteger(), nullable=False),
        sa.Column("is_unbounded", sa.Boolean(), nullable=False),
        sa.Column("window_end_ms", sa.BigInteger(), nullable=False),
        sa.Column("window_ms", sa.BigInteger(), nullable=False),
        sa.Column("block_on_ms", sa.BigInteger(), nullable=False),
        sa.Column("block_value_ms", sa.BigInteger(), nullable=False),
        sa.Column("contact_day", sa.BigInteger(), nullable=False),
        sa.Column("silent_days", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_readings_vin")),
        sa.PrimaryKeyConstraint("vin", "feature_id", name=op.f("pk_readings")),
    )
