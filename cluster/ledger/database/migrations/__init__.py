"""Alembic's environment and the migrations. `cluster.ledger.database.migrate` runs the migrations."""
