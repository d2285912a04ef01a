"""Alembic migrations of the cloud's database; run when the cloud starts."""
