"""Budget notices on their way to a webhook: entered once by whoever finds one first, tried by one gateway at a time.

A try is taken before it is made, by moving the time of the next one: so a gateway that dies in the midst of it delays
a notice and does not lose it. A receiver may then see one twice, with the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, delete, select, update

from cluster.ledger.database.changes import insert_or
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import budget_notices as table
from cluster.policy.limits.budgets import BudgetNotice, BudgetUse

FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 3600.0
KEPT_S = 62 * 86_400.0
"""Longer than any budget's period: until then a crossed threshold must be known to have been told."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A notice that is this gateway's to send now. `attempts`: this one included."""

    notice: BudgetNotice
    noticed_at_s: float
    attempts: int


def pause_s(attempts: int) -> float:
    """Until the next try after so many."""
    return min(FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 20), LONGEST_PAUSE_S)


class BudgetNotices:
    """The table of budget notices."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def enter(self, notices: Sequence[BudgetNotice], now_s: float) -> None:
        """Those that are new. Raises StoreUnavailable."""
        if not notices:
            return
        ids = [one.id for one in notices]
        with reading(self._engine) as connection:
            known = set(connection.scalars(select(table.c.id).where(table.c.id.in_(ids))))
        rows = [_row(one, now_s) for one in notices if one.id not in known]
        if rows:
            with writing(self._engine) as connection:
                connection.execute(insert_or(connection, table).on_conflict_do_nothing(index_elements=["id"]), rows)

    def take(self, now_s: float, limit: int = 20) -> list[Taken]:
        """Those whose try is due; nobody else gets them before the next. Raises StoreUnavailable."""
        due = table.c.delivered_at.is_(None) & (table.c.next_try_at <= now_s)
        with reading(self._engine) as connection:
            rows = connection.execute(select(table).where(due).order_by(table.c.next_try_at).limit(limit)).all()
        taken = []
        for row in rows:
            attempts = row.attempts + 1
            mine = (table.c.id == row.id) & (table.c.attempts == row.attempts) & table.c.delivered_at.is_(None)
            with writing(self._engine) as connection:
                values = {"attempts": attempts, "next_try_at": now_s + pause_s(attempts)}
                won = connection.execute(update(table).where(mine).values(values)).rowcount
            if won:
                use = BudgetUse(row.tenant, row.budget, row.period, row.used_tokens, row.limit_tokens)
                taken.append(Taken(BudgetNotice(use, row.threshold), row.noticed_at, attempts))
        return taken

    def delivered(self, notice_id: str, now_s: float) -> None:
        """It has been received: no more tries."""
        with writing(self._engine) as connection:
            connection.execute(update(table).where(table.c.id == notice_id).values(delivered_at=now_s))

    def expire(self, now_s: float) -> int:
        """Remove those of periods long over, delivered or not; how many."""
        with writing(self._engine) as connection:
            return connection.execute(delete(table).where(table.c.noticed_at < now_s - KEPT_S)).rowcount


def _row(notice: BudgetNotice, now_s: float) -> dict[str, object]:
    use = notice.use
    return {
        "id": notice.id,
        "tenant": use.tenant,
        "budget": use.budget,
        "period": use.period,
        "threshold": notice.threshold,
        "used_tokens": use.used_tokens,
        "limit_tokens": use.limit_tokens,
        "noticed_at": now_s,
        "attempts": 0,
        "next_try_at": now_s,
        "delivered_at": None,
    }
