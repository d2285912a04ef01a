"""Owners and blocked vehicles: owner epochs, sales, swapped ECUs, and alarms in the audit log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Everything so far belongs to the first owner; operators are named as such in the audit log."""
    op.add_column("vehicles", sa.Column("blocked_ms", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("vehicles", sa.Column("owner_epoch", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("vehicles", sa.Column("wrong_claims", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("entitlements", sa.Column("owner_epoch", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("entitlements", sa.Column("anchor_ms", sa.BigInteger(), nullable=False, server_default="0"))
    op.execute("UPDATE entitlements SET anchor_ms = granted_ms")
    op.add_column("usage_records", sa.Column("owner_epoch", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("audit_log", sa.Column("alarm", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE audit_log SET actor = 'operator:' || actor WHERE actor NOT IN ('vehicle', 'cloud')")
    op.create_index("ix_audit_log_vin", "audit_log", ["vin"], unique=False)
    op.create_table(
        "transfers",
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("code_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("expires_ms", sa.BigInteger(), nullable=False),
        sa.Column("wrong_tries", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_transfers_vin")),
        sa.PrimaryKeyConstraint("vin", name=op.f("pk_transfers")),
    )
    op.create_table(
        "ecu_swaps",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("vin", sa.String(length=17), nullable=False),
        sa.Column("at_ms", sa.BigInteger(), nullable=False),
        sa.Column("ecu_identifier", sa.String(length=48), nullable=False),
        sa.Column("old_uid", sa.LargeBinary(length=16), nullable=False),
        sa.Column("new_uid", sa.LargeBinary(length=16), nullable=False),
        sa.ForeignKeyConstraint(["vin"], ["vehicles.vin"], name=op.f("fk_ecu_swaps_vin")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ecu_swaps")),
    )
    op.create_index("ix_ecu_swaps_vin", "ecu_swaps", ["vin"], unique=False)
