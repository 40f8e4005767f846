"""Resume claims in the database: if several gateways want to resume the same broken stream, only the first one may."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Engine, delete

from cluster.ledger.database.changes import dialect_insert
from cluster.ledger.database.connect import writing
from cluster.ledger.database.tables import resumed


class ResumedSegments:
    """The database table that decides which resume of a call is the first. A resume claims names in this table,
    and each name can be claimed only once.

    cluster/gateway/resume_tokens/claim.py defines the names that a resume claims. Backups do not contain the
    table, because resume tokens are valid for minutes only.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def claim(self, names: Sequence[tuple[str, float]], now_s: float) -> Sequence[bool]:
        """Claim names in one transaction. Each name stands for one resume of a call.

        Each entry of `names` is a pair (name, expires_at_s); times are in seconds since the epoch. Returns one value
        for each entry: True if the name was not claimed yet. Raises StoreUnavailable.
        """
        first: dict[str, int] = {}
        for at, (name, _) in enumerate(names):
            first.setdefault(name, at)
        unique = sorted(first)  # the same lock order everywhere, so that concurrent claims never deadlock
        with writing(self._engine) as connection:
            connection.execute(delete(resumed).where(resumed.c.name.in_(unique), resumed.c.expires_at_s < now_s))
            rows = [{"name": name, "expires_at_s": names[first[name]][1]} for name in unique]
            statement = dialect_insert(connection, resumed).values(rows).on_conflict_do_nothing(index_elements=["name"])
            claimed = set(connection.scalars(statement.returning(resumed.c.name)))
        return [name in claimed and first[name] == at for at, (name, _) in enumerate(names)]

    def expire(self, now_s: float) -> int:
        """Remove the claims of expired resume tokens. Returns the number of claims removed."""
        with writing(self._engine) as connection:
            return int(connection.execute(delete(resumed).where(resumed.c.expires_at_s < now_s)).rowcount)
