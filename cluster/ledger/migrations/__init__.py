"""The history of the tables, read by alembic; `cluster.ledger.migrate` runs it."""
