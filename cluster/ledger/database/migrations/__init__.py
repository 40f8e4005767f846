"""Alembic's environment and versions; `cluster.ledger.database.migrate` runs them."""
