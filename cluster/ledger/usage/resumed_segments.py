"""Which segments of broken streams have been resumed: each by the first who asks."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, delete

from cluster.ledger.database.changes import insert_or
from cluster.ledger.database.connect import writing
from cluster.ledger.database.tables import resumed


class Resumed:
    """The table of names that are taken. It is not backed up: tokens live for minutes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def take(self, names: Sequence[tuple[str, float]], now_s: float) -> Sequence[bool]:
        """Of each (name, expires_at_s) whether nobody has taken it yet, in one transaction. Raises StoreUnavailable."""
        first: dict[str, int] = {}
        for at, (name, _) in enumerate(names):
            first.setdefault(name, at)
        asked = sorted(first)  # in one order everywhere: two who want the same names wait for each other, never both
        with writing(self._engine) as connection:
            connection.execute(delete(resumed).where(resumed.c.name.in_(asked), resumed.c.expires_at_s < now_s))
            rows = [{"name": name, "expires_at_s": names[first[name]][1]} for name in asked]
            statement = insert_or(connection, resumed).values(rows).on_conflict_do_nothing(index_elements=["name"])
            took = set(connection.scalars(statement.returning(resumed.c.name)))
        return [name in took and first[name] == at for at, (name, _) in enumerate(names)]

    def expire(self, now_s: float) -> int:
        """Remove what no token names any longer; how many."""
        with writing(self._engine) as connection:
            return int(connection.execute(delete(resumed).where(resumed.c.expires_at_s < now_s)).rowcount)
