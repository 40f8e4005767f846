"""Count the calls that met and missed the SLOs of their models, in one query over an indexed range of days.

Calls are judged as for the metric `headrace_slo_calls_total` (cluster/gateway/calls/records/end_metrics.py). A usage
record lacks the time of the last token, so the end of the call is used instead.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Double, Engine, and_, case, cast, func, literal, not_, null, or_, select

from cluster.api.outcomes import SHORT_OF_CAPACITY, Outcome
from cluster.ledger.database.connect import reading
from cluster.ledger.database.tables import usage
from cluster.ledger.rows import UsageQuery
from cluster.ledger.slo import COUNTED, NOT_COUNTED, SloObjectives, SloSum
from cluster.ledger.usage.usage import IDLE_TENANT, conditions


class SloTable:
    """The SLO counts of one database. For each model, the usage table is searched for the calls that met and the calls
    that missed the model's SLO."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def query(self, usage_query: UsageQuery, objectives: SloObjectives) -> list[SloSum]:
        """Return how many of the query's calls met or missed the SLO, sorted by tenant and model.

        A call has a usage record for each output and each resume. Only one record of each call is judged: the record of
        the first output before any resume. `usage_query.group_by` is ignored. Raises StoreUnavailable.
        """
        result = _result(objectives)
        counts = [func.sum(case((result == name, 1), else_=0)).label(name) for name in (*COUNTED, *NOT_COUNTED)]
        is_first = and_(usage.c.segment == 0, usage.c.tenant != IDLE_TENANT)
        groups = (usage.c.tenant, usage.c.model)
        query = select(*groups, *counts).where(*conditions(usage_query), is_first).group_by(*groups)
        with reading(self._engine) as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        sums = [_sum(row, objectives) for row in rows]
        return sorted(sums, key=lambda each: (each.tenant, each.model))


def _sum(row: dict[str, Any], objectives: SloObjectives) -> SloSum:
    counts = {name: int(row[name] or 0) for name in (*COUNTED, *NOT_COUNTED)}
    return SloSum(row["tenant"], row["model"], objectives.get(row["model"]), **counts)


def _result(objectives: SloObjectives) -> ColumnElement[str]:
    """Return the SQL expression for the result of a usage record: whether the call met the SLO of its model. The value
    is a name in COUNTED or NOT_COUNTED. `objectives`: the SLO of each model."""
    judged = {model: objective for model, objective in objectives.items() if objective.ttft_s or objective.itl_s}
    if not judged:
        return case((usage.c.delivered_unknown, literal("unknown")), else_=literal("not_judged"))
    ttft_bound_s = _by_model({model: objective.ttft_s for model, objective in judged.items()})
    itl_bound_s = _by_model({model: objective.itl_s for model, objective in judged.items()})
    is_served = usage.c.outcome == Outcome.OK.value
    # an answer without tokens, such as a pooling model's, arrives when the call ends
    first_s = func.coalesce(usage.c.ttft_s, case((is_served, usage.c.duration_s), else_=null()))
    is_late = and_(ttft_bound_s > 0, first_s > ttft_bound_s)
    is_overdue = and_(ttft_bound_s > 0, usage.c.ttft_s.is_(None), usage.c.duration_s > ttft_bound_s)
    gaps = usage.c.completion_tokens - 1
    is_slow = and_(itl_bound_s > 0, gaps > 0, usage.c.duration_s - usage.c.ttft_s > itl_bound_s * gaps)
    is_short = usage.c.outcome.in_([outcome.value for outcome in SHORT_OF_CAPACITY])
    return case(
        (usage.c.delivered_unknown, literal("unknown")),
        (usage.c.model.not_in(list(judged)), literal("not_judged")),
        (and_(not_(is_served), is_short), literal("failed")),
        (or_(and_(is_served, is_late), and_(not_(is_served), is_overdue)), literal("late_first_token")),
        (not_(is_served), literal("not_judged")),
        (is_slow, literal("slow_tokens")),
        else_=literal("met"),
    )


def _by_model(bounds_s: dict[str, float]) -> ColumnElement[float]:
    """Return the SQL expression that selects the time limit of a record's model. `bounds_s`: time limits in seconds, by
    model."""
    return case({model: cast(literal(bound_s), Double) for model, bound_s in bounds_s.items()}, value=usage.c.model)
