"""The change sequence, which numbers the changes of tenants and keys. Also an INSERT statement that supports ON
CONFLICT.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, update

from cluster.ledger.database.tables import change_sequence


def next_change(connection: Connection) -> int:
    """Increment the change sequence and return the new number.

    Call this function first in a transaction, because the increment locks the sequence's row until the commit.
    """
    statement = update(change_sequence).where(change_sequence.c.id == 1).values(value=change_sequence.c.value + 1)
    return int(connection.execute(statement.returning(change_sequence.c.value)).scalar_one())


def require_reload(connection: Connection, number: int) -> None:
    """Make all readers that have seen only changes below `number` read all tenants and keys again. This is needed after
    a deletion."""
    connection.execute(update(change_sequence).where(change_sequence.c.id == 1).values(reload_from=number))


def dialect_insert(connection: Connection, table: Table) -> Any:
    """Return an INSERT statement of the connection's SQL dialect. The statement supports ON CONFLICT."""
    if connection.dialect.name == "postgresql":  # local imports: a process needs only one of the two
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)
