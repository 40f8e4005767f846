"""Use of tenants' daily and monthly token budgets, and the thresholds that it has crossed.

Invariant: a notice's id depends on its tenant, budget, period and threshold alone, so a notice found by several
processes or several times is the same notice. Days and months are in UTC.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.policy.tenants.policy import TenantPolicy


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """Use of one budget in its current period: `2026-11-25` for daily_tokens, `2026-11` for monthly_tokens."""

    tenant: str
    budget: str
    period: str
    used_tokens: int
    limit_tokens: int

    @property
    def ratio(self) -> float:
        """Used tokens by the limit. Above 1 where running calls were allowed to finish."""
        return self.used_tokens / self.limit_tokens


@dataclass(frozen=True, slots=True)
class BudgetNotice:
    """A budget that has reached a threshold (a fraction of the limit)."""

    use: BudgetUse
    threshold: float

    @property
    def id(self) -> str:
        """32 hex digits, equal in whichever process the notice is found."""
        text = f"{self.use.tenant}\0{self.use.budget}\0{self.use.period}\0{self.threshold:g}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def day_name(epoch_s: float) -> str:
    """UTC day in the form that usage records use: `2026-11-25`."""
    return datetime.fromtimestamp(epoch_s, UTC).strftime("%Y-%m-%d")


def budgets(
    policies: Iterable[TenantPolicy], today: Mapping[str, int], month: Mapping[str, int], epoch_s: float
) -> Iterator[BudgetUse]:
    """Every configured budget with its use. `today` and `month` are tokens by tenant of this day and this month."""
    day = day_name(epoch_s)
    for policy in policies:
        limits = policy.limits
        if limits.daily_tokens is not None:
            yield BudgetUse(policy.name, "daily_tokens", day, today.get(policy.name, 0), limits.daily_tokens)
        if limits.monthly_tokens is not None:
            yield BudgetUse(policy.name, "monthly_tokens", day[:7], month.get(policy.name, 0), limits.monthly_tokens)


def crossed(uses: Iterable[BudgetUse], thresholds: Sequence[float]) -> list[BudgetNotice]:
    """A notice for each threshold that a budget has reached."""
    return [BudgetNotice(use, part) for use in uses for part in thresholds if use.ratio >= part]
