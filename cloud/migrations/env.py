"""Runs the migrations inside the transaction that the store opened."""

from __future__ import annotations

from alembic import context

from cloud import schema

context.configure(connection=context.config.attributes["connection"], target_metadata=schema.metadata)
with context.begin_transaction():
    context.run_migrations()
