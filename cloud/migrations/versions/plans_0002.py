"""Plans: what each version meant when it was first offered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Makes the table; the next start fills it from the price list."""
    op.create_table(
        "plan_versions",
        sa.Column("plan_id", sa.String(length=48), nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("terms_sha256", sa.LargeBinary(length=32), nullable=False),
        sa.PrimaryKeyConstraint("plan_id", "version", name=op.f("pk_plan_versions")),
    )
