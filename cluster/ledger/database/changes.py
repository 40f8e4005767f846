"""The change sequence, and the dialects' INSERT with ON CONFLICT."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, update

from cluster.ledger.database.tables import change_sequence


def next_change(connection: Connection) -> int:
    """Increment the change sequence and return the new number. Call it first in a transaction: it locks the row."""
    statement = update(change_sequence).where(change_sequence.c.id == 1).values(value=change_sequence.c.value + 1)
    return int(connection.execute(statement.returning(change_sequence.c.value)).scalar_one())


def require_reload(connection: Connection, number: int) -> None:
    """Make readers reload everything, because rows were deleted."""
    connection.execute(update(change_sequence).where(change_sequence.c.id == 1).values(reload_from=number))


def dialect_insert(connection: Connection, table: Table) -> Any:
    """The INSERT of the connection's dialect, which supports ON CONFLICT."""
    if connection.dialect.name == "postgresql":  # local imports: a process needs only one of the two
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)
