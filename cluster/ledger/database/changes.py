"""The number of a change, and what statements both databases share."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, update

from cluster.ledger.database.tables import change_sequence


def next_change(connection: Connection) -> int:
    """Take the next number of the change sequence, holding it until this transaction ends. Call it first."""
    statement = update(change_sequence).where(change_sequence.c.id == 1).values(value=change_sequence.c.value + 1)
    return int(connection.execute(statement.returning(change_sequence.c.value)).scalar_one())


def rows_vanished(connection: Connection, number: int) -> None:
    """Tell readers that rows are gone and that they must read everything anew."""
    connection.execute(update(change_sequence).where(change_sequence.c.id == 1).values(reload_from=number))


def insert_or(connection: Connection, table: Table) -> Any:
    """The dialect's INSERT, which knows ON CONFLICT."""
    if connection.dialect.name == "postgresql":  # imported where it is used: a process needs one of the two
        from sqlalchemy.dialects import postgresql

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)
