"""The SLO query judges calls in the same way as the gateways' metric, and uses an index."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from cluster.api.outcomes import SHORT_OF_CAPACITY, Outcome
from cluster.gateway.demand import within_slo
from cluster.ledger.rows import UsageQuery
from cluster.ledger.slo import SloObjective, SloObjectives, SloSum
from cluster.ledger.store import Ledger
from cluster.ledger.usage.records import SEGMENTS_PER_RESUME, UsageRecord
from cluster.ledger.usage.usage import IDLE_TENANT
from tests.ledger.samples import record

OBJECTIVES = {
    "tiny": SloObjective(1.0, 0.1, 0.9),
    "first": SloObjective(1.0, 0.0, 0.99),
    "gaps": SloObjective(0.0, 0.1, 0.0),
    "none": SloObjective(0.0, 0.0, 0.0),
}
NUMBERS = itertools.count()


def judge(each: UsageRecord, objectives: SloObjectives) -> str:
    """Return how a usage record counts for the SLO, as the metric `headrace_slo_calls_total` would count it."""
    objective = objectives.get(each.model)
    if each.delivered_unknown:
        return "unknown"
    if objective is None or not (objective.ttft_s or objective.itl_s):
        return "not_judged"
    served = each.outcome == Outcome.OK.value
    late = bool(objective.ttft_s) and each.ttft_s is None and each.duration_s > objective.ttft_s
    if not served:
        if each.outcome in {outcome.value for outcome in SHORT_OF_CAPACITY}:
            return "failed"
        return "late_first_token" if late else "not_judged"
    ttft_s = each.duration_s if each.ttft_s is None else each.ttft_s
    gaps = each.completion_tokens - 1
    gap_s = (each.duration_s - ttft_s) / gaps if gaps > 0 else 0.0
    if within_slo(ttft_s, gap_s, objective.ttft_s, objective.itl_s):
        return "met"
    return "slow_tokens" if within_slo(ttft_s, 0.0, objective.ttft_s, 0.0) else "late_first_token"


records = st.builds(
    lambda **fields: record(f"s{next(NUMBERS)}", **fields),
    tenant=st.sampled_from(["acme", "zoo", IDLE_TENANT]),
    model=st.sampled_from([*OBJECTIVES, "removed"]),
    outcome=st.sampled_from(["ok", "ok", "ok", "cancelled", "worker_lost", "deadline_exceeded", "internal"]),
    segment=st.sampled_from([0, 0, 0, 1, SEGMENTS_PER_RESUME]),
    ttft_s=st.sampled_from([None, 0.25, 1.0, 1.5]),
    duration_s=st.sampled_from([0.5, 1.5, 2.0, 4.0]),
    completion_tokens=st.sampled_from([0, 1, 2, 5, 50]),
    delivered_unknown=st.sampled_from([False, False, False, True]),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(records, max_size=30))
def test_the_query_judges_as_the_metric_does(ledger: Ledger, rows: list[UsageRecord]) -> None:
    """The query gives the same sums as judging each call separately. Each call counts once, by its first output;
    records of idle GPUs do not count."""
    day = next(NUMBERS)
    at_s = day * 86400.0 + 60.0
    rows = [UsageRecord.from_json(row.as_json() | {"opened_at_s": at_s}) for row in rows]
    ledger.usage.insert(rows)
    expected: dict[tuple[str, str], dict[str, int]] = {}
    for row in rows:
        if row.segment == 0 and row.tenant != IDLE_TENANT:
            counts = expected.setdefault((row.tenant, row.model), {})
            result = judge(row, OBJECTIVES)
            counts[result] = counts.get(result, 0) + 1
    name = record(opened_at_s=at_s).day
    sums = ledger.slo.query(UsageQuery((), since_day=name, until_day=name), OBJECTIVES)
    assert sums == [
        SloSum(tenant, model, OBJECTIVES.get(model), **counts) for (tenant, model), counts in sorted(expected.items())
    ]


def test_sums_of_one_tenant_model_and_range_of_days(ledger: Ledger) -> None:
    """The query can be limited to a tenant, a model and a range of days. Without any SLO, all calls count as not
    judged."""
    ledger.usage.insert(
        [record("a"), record("b", tenant="zoo"), record("c", model="first"), record("d", opened_at_s=0.0)]
    )
    day = UsageQuery((), since_day="1970-01-02", until_day="1970-01-02", tenant="acme", model="tiny")
    assert ledger.slo.query(day, OBJECTIVES) == [SloSum("acme", "tiny", OBJECTIVES["tiny"], slow_tokens=1)]
    everything = ledger.slo.query(UsageQuery(()), {})
    assert [(each.tenant, each.model, each.not_judged, each.attainment) for each in everything] == [
        ("acme", "first", 1, None), ("acme", "tiny", 2, None), ("zoo", "tiny", 1, None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("met", "missed", "target", "attainment", "left"),
    [
        (0, 0, 0.9, None, None),
        (10, 0, 0.9, 1.0, 1.0),
        (95, 5, 0.9, 0.95, 0.5),
        (80, 20, 0.9, 0.8, -1.0),
        (1, 1, 0.0, 0.5, None),
    ],
)
def test_the_error_budget(met: int, missed: int, target: float, attainment: float | None, left: float | None) -> None:
    """The part of the error budget that is left is 1 without a missed call, 0 if the target is just met, and negative
    below the target. It is None without a judged call or a target."""
    found = SloSum("t", "m", SloObjective(1.0, 0.1, target), met=met, failed=missed)
    assert found.attainment == (None if attainment is None else pytest.approx(attainment))
    assert found.budget_left == (None if left is None else pytest.approx(left))
    assert found.as_json()["calls"] == met + missed


def test_the_query_uses_the_index_of_days(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A query for a range of days reads the index of days and not the whole table."""
    url = f"sqlite:///{tmp_path_factory.mktemp('slo') / 'ledger.db'}"
    ledger = Ledger(url)
    ledger.upgrade()
    statement = (
        "EXPLAIN QUERY PLAN SELECT tenant, model, sum(segment) FROM usage "
        "WHERE day >= 'a' AND day <= 'b' AND segment = 0 GROUP BY tenant, model"
    )
    with create_engine(url).connect() as connection:
        plan = " ".join(str(row[-1]) for row in connection.execute(text(statement)))
    ledger.close()
    assert "USING INDEX ix_usage_day_tenant_model" in plan
