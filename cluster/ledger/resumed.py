"""Which segments of broken streams have been resumed: each by the first who asks."""

from __future__ import annotations

from sqlalchemy import Engine, delete

from cluster.ledger.changes import insert_or
from cluster.ledger.connect import writing
from cluster.ledger.tables import resumed


class Resumed:
    """The table of names that are taken. It is not backed up: tokens live for minutes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def take(self, name: str, now_s: float, expires_at_s: float) -> bool:
        """Whether nobody has taken it yet. Raises StoreUnavailable."""
        with writing(self._engine) as connection:
            connection.execute(delete(resumed).where(resumed.c.name == name, resumed.c.expires_at_s < now_s))
            row = {"name": name, "expires_at_s": expires_at_s}
            statement = insert_or(connection, resumed).values(row).on_conflict_do_nothing(index_elements=["name"])
            return connection.execute(statement.returning(resumed.c.name)).first() is not None

    def expire(self, now_s: float) -> int:
        """Remove what no token names any longer; how many."""
        with writing(self._engine) as connection:
            return int(connection.execute(delete(resumed).where(resumed.c.expires_at_s < now_s)).rowcount)
