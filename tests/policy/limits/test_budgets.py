"""Tests of token budgets: how much of a budget is used according to the ledger, and which thresholds are crossed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.limits.budgets import BudgetUse, budgets, crossed
from cluster.policy.limits.limits import Granted, Limiter, LimitRefusal, ReservationRequest
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

NOON = 1_795_608_000.0  # 2026-11-25


def tenant(name: str, daily: int | None = None, monthly: int | None = None) -> TenantPolicy:
    """Return a tenant policy with these budgets."""
    return TenantPolicy(name, limits=TenantLimits(daily_tokens=daily, monthly_tokens=monthly))


def test_each_budget_in_its_period() -> None:
    """Daily and monthly budgets are counted separately. Tenants without budgets are not listed. An unused budget has a
    ratio of 0."""
    some = [tenant("a", 100, 1000), tenant("b", monthly=50), tenant("none")]
    found = {(use.tenant, use.budget): use for use in budgets(some, {"a": 80}, {"a": 900, "none": 5}, NOON)}
    assert {key: (use.period, use.ratio) for key, use in found.items()} == {
        ("a", "daily_tokens"): ("2026-11-25", 0.8),
        ("a", "monthly_tokens"): ("2026-11", 0.9),
        ("b", "monthly_tokens"): ("2026-11", 0.0),
    }


@given(st.integers(0, 300), st.integers(1, 200), st.lists(st.floats(0.1, 2.0), min_size=1, max_size=4, unique=True))
def test_a_notice_is_one_however_often_it_is_found(used: int, limit: int, thresholds: list[float]) -> None:
    """Every reached threshold has one notice. The id of the notice stays the same when more is used, and differs on
    another day."""
    first = crossed([BudgetUse("a", "daily_tokens", "2026-11-25", used, limit)], thresholds)
    later = crossed([BudgetUse("a", "daily_tokens", "2026-11-25", used + 50, limit)], thresholds)
    next_day = crossed([BudgetUse("a", "daily_tokens", "2026-11-26", used, limit)], thresholds)
    assert [one.threshold for one in first] == [part for part in thresholds if used / limit >= part]
    assert {one.id for one in first} <= {one.id for one in later}
    assert not {one.id for one in first} & {one.id for one in next_day}


def test_a_new_gateway_goes_on_where_the_last_was() -> None:
    """A gateway counts the tokens that a tenant has used of its budget. The ledger's number can raise this count, but
    never lowers it."""
    limiter, policy = Limiter(), tenant("a", daily=1000)
    limiter.spent({"a": 950}, {"a": 950}, NOON)
    refused = limiter.reserve(policy, ReservationRequest("1", 60, 0), 0.0, NOON)
    assert isinstance(refused, LimitRefusal)
    assert refused.remaining == 50
    limiter.spent({"a": 10}, {"a": 10}, NOON)
    assert isinstance(limiter.reserve(policy, ReservationRequest("2", 60, 0), 0.0, NOON), LimitRefusal)
    assert isinstance(limiter.reserve(policy, ReservationRequest("3", 60, 0), 0.0, NOON + 86_400), Granted)
