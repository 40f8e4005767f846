"""The history of the tables, read by alembic; `cluster.ledger.database.migrate` runs it."""
