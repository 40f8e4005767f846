"""Budget notices to send to a webhook. The first gateway that sees a budget cross a threshold stores the notice.

Only one gateway at a time sends a notice: before each attempt, the gateway claims the notice by moving `next_try_at`.
If a gateway dies while sending, another gateway sends the notice later. The receiver may then get the notice twice,
with the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, delete, select, update

from cluster.ledger.database.changes import dialect_insert
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import budget_notices as table
from cluster.policy.limits.budgets import BudgetNotice, BudgetUse

FIRST_PAUSE_S, LONGEST_PAUSE_S = 15.0, 3600.0
KEPT_S = 62 * 86_400.0
"""Time for which notices are kept, in seconds.

This time is longer than any budget's period, because a threshold must not be reported twice in the same period.
"""


@dataclass(frozen=True, slots=True)
class ClaimedNotice:
    """A notice that this gateway has claimed and must send now. `attempts` counts this attempt too."""

    notice: BudgetNotice
    noticed_at_s: float
    attempts: int


def retry_delay_s(attempts: int) -> float:
    """Return the pause in seconds before a notice is sent again, after `attempts` failed attempts."""
    return min(FIRST_PAUSE_S * 2.0 ** min(attempts - 1, 20), LONGEST_PAUSE_S)


class BudgetNotices:
    """The table of budget notices."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def insert_new(self, notices: Sequence[BudgetNotice], now_s: float) -> None:
        """Store the notices that are not stored yet. Raises StoreUnavailable."""
        if not notices:
            return
        ids = [notice.id for notice in notices]
        with reading(self._engine) as connection:
            known = set(connection.scalars(select(table.c.id).where(table.c.id.in_(ids))))
        rows = [_row(notice, now_s) for notice in notices if notice.id not in known]
        if rows:
            with writing(self._engine) as connection:
                connection.execute(
                    dialect_insert(connection, table).on_conflict_do_nothing(index_elements=["id"]), rows
                )

    def claim_due(self, now_s: float, limit: int = 20) -> list[ClaimedNotice]:
        """Claim at most `limit` due notices for this gateway alone. Raises StoreUnavailable."""
        due = table.c.delivered_at.is_(None) & (table.c.next_try_at <= now_s)
        with reading(self._engine) as connection:
            rows = connection.execute(select(table).where(due).order_by(table.c.next_try_at).limit(limit)).all()
        claims = []
        for row in rows:
            attempts = row.attempts + 1
            unclaimed = (table.c.id == row.id) & (table.c.attempts == row.attempts) & table.c.delivered_at.is_(None)
            with writing(self._engine) as connection:
                values = {"attempts": attempts, "next_try_at": now_s + retry_delay_s(attempts)}
                claimed = connection.execute(update(table).where(unclaimed).values(values)).rowcount
            if claimed:
                use = BudgetUse(row.tenant, row.budget, row.period, row.used_tokens, row.limit_tokens)
                claims.append(ClaimedNotice(BudgetNotice(use, row.threshold), row.noticed_at, attempts))
        return claims

    def mark_delivered(self, notice_id: str, now_s: float) -> None:
        """Mark a notice as delivered, so that no further attempt is made."""
        with writing(self._engine) as connection:
            connection.execute(update(table).where(table.c.id == notice_id).values(delivered_at=now_s))

    def expire(self, now_s: float) -> int:
        """Remove notices older than KEPT_S, delivered or not. Returns the number of notices removed."""
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
