"""Alembic's environment: runs a migration on the connection that `migrate` passes, in the connection's transaction."""

from __future__ import annotations

from alembic import context

from cluster.ledger.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table="schema_revision",
    transactional_ddl=True,
)
context.run_migrations()
