"""Daily and monthly token budgets of tenants: the tokens used, and notices when a threshold is crossed.

Invariant: the id of a notice depends only on the tenant, the budget, the period and the threshold. So every process
creates the same id for the same crossing, every time. Days and months are in UTC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.policy.tenants.policy import TenantPolicy


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """Tokens of one budget that a tenant has used in the current period.

    `period` is a day (`2026-11-25`) for daily_tokens, and a month (`2026-11`) for monthly_tokens.
    """

    tenant: str
    budget: str
    period: str
    used_tokens: int
    limit_tokens: int

    @property
    def ratio(self) -> float:
        """Used tokens divided by the limit. It can exceed 1, because running calls may finish beyond the limit."""
        return self.used_tokens / self.limit_tokens


@dataclass(frozen=True, slots=True)
class BudgetNotice:
    """Notice that a budget has reached a threshold. The threshold is a fraction of the limit."""

    use: BudgetUse
    threshold: float

    @property
    def id(self) -> str:
        """Id of the notice, 32 hex digits. All processes compute the same id for the same notice."""
        text = f"{self.use.tenant}\0{self.use.budget}\0{self.use.period}\0{self.threshold:g}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def day_name(epoch_s: float) -> str:
    """UTC day in the format of usage records, for example `2026-11-25`."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d")


def budgets(
    policies: Iterable[TenantPolicy], today: Mapping[str, int], month: Mapping[str, int], epoch_s: float
) -> Iterator[BudgetUse]:
    """Yield every configured budget with its use.

    `today` and `month` have the tokens that each tenant has used on this day and in this month.
    """
    day = day_name(epoch_s)
    for policy in policies:
        limits = policy.limits
        if limits.daily_tokens is not None:
            yield BudgetUse(policy.name, "daily_tokens", day, today.get(policy.name, 0), limits.daily_tokens)
        if limits.monthly_tokens is not None:
            yield BudgetUse(policy.name, "monthly_tokens", day[:7], month.get(policy.name, 0), limits.monthly_tokens)


def crossed(uses: Iterable[BudgetUse], thresholds: Sequence[float]) -> list[BudgetNotice]:
    """Return a notice for each threshold that a budget has reached."""
    return [BudgetNotice(use, part) for use in uses for part in thresholds if use.ratio >= part]
