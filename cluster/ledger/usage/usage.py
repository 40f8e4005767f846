"""The usage table: each call once, whoever reports it and how often; and the sums over it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, case, delete, func, not_, or_, select

from cluster.ledger.database.changes import insert_or
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import erased, usage
from cluster.ledger.rows import COUNTS, LABEL, Prices, UsageQuery
from cluster.ledger.tenants.tenants import digest_of_name
from cluster.ledger.usage.records import UsageRecord

IDLE_TENANT = "_idle"
_DELETE_ROWS = 20_000


class UsageTable:
    """The table of usage records."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def insert(self, records: Sequence[UsageRecord]) -> None:
        """Write ended calls, all or none. One that is there stays, unless it was an estimate and this one is exact, or
        estimates more tokens (a call that was retried has one of each worker).

        Records of a tenant that was erased after the call opened are dropped. Raises StoreUnavailable.
        """
        latest = _latest(records)
        if not latest:
            return
        with writing(self._engine) as connection:
            gone = {row.digest: row.erased_at for row in connection.execute(select(erased))}
            rows = [_row(one) for one in latest if one.opened_at_s >= gone.get(digest_of_name(one.tenant), -1.0)]
            if not rows:
                return
            statement = insert_or(connection, usage)
            new = {c.name: statement.excluded[c.name] for c in usage.c if c.name != "record_id"}
            newer = statement.excluded
            more = newer.generated_tokens > usage.c.generated_tokens
            better = and_(usage.c.delivered_unknown, or_(not_(newer.delivered_unknown), more))
            connection.execute(
                statement.on_conflict_do_update(index_elements=["record_id"], set_=new, where=better), rows
            )

    def query(self, wanted: UsageQuery, rates: Prices | None = None) -> list[dict[str, Any]]:
        """Sums by group, ordered by group; a label that a call lacks reads "". With `rates` also `cost`, which is
        None where an accelerator has no rate."""
        dimensions = [_dimension(name).label(f"d{at}") for at, name in enumerate(wanted.group_by)]
        by_gpu = [usage.c.gpu.label("_gpu")] if rates is not None else []
        sums = [_requests().label("requests"), *(func.sum(usage.c[name]).label(name) for name in COUNTS[1:])]
        query = select(*dimensions, *by_gpu, *sums).where(*_conditions(wanted)).group_by(*dimensions, *by_gpu)
        with reading(self._engine) as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        return _fold(wanted, rows, rates)

    def records(
        self, wanted: UsageQuery, *, after: tuple[float, str] | None = None, limit: int = 1000
    ) -> list[UsageRecord]:
        """Single records in order of time; `after` is (opened_at_s, record_id) of the last one had."""
        query = select(usage).where(*_conditions(wanted))
        if after is not None:
            at_s, record_id = after
            query = query.where(
                or_(usage.c.opened_at_s > at_s, and_(usage.c.opened_at_s == at_s, usage.c.record_id > record_id))
            )
        query = query.order_by(usage.c.opened_at_s, usage.c.record_id).limit(limit)
        with reading(self._engine) as connection:
            return [UsageRecord.from_json(dict(row)) for row in connection.execute(query).mappings()]

    def tokens_since(
        self, since_day: str, tenants: Iterable[str] | None = None, *, before_day: str = ""
    ) -> dict[str, int]:
        """Prompt and completion tokens by tenant from a day on (to another, without that); what budgets count."""
        query = select(usage.c.tenant, func.sum(usage.c.prompt_tokens + usage.c.completion_tokens))
        query = query.where(usage.c.day >= since_day).group_by(usage.c.tenant)
        if before_day:
            query = query.where(usage.c.day < before_day)
        if tenants is not None:
            query = query.where(usage.c.tenant.in_(list(tenants)))
        with reading(self._engine) as connection:
            return {tenant: int(total) for tenant, total in connection.execute(query)}

    def expire(self, before_s: float, *, tenant: str = "", except_tenants: Sequence[str] = ()) -> int:
        """Remove records of calls that opened before, of one tenant or of all but some; how many.

        In parts, so that no report waits long behind it.
        """
        old = select(usage.c.record_id).where(usage.c.opened_at_s < before_s)
        if tenant:
            old = old.where(usage.c.tenant == tenant)
        if except_tenants:
            old = old.where(usage.c.tenant.not_in(list(except_tenants)))
        total = 0
        while True:
            with writing(self._engine) as connection:
                gone = connection.execute(delete(usage).where(usage.c.record_id.in_(old.limit(_DELETE_ROWS)))).rowcount
            total += gone
            if gone < _DELETE_ROWS:
                return total


def _latest(records: Sequence[UsageRecord]) -> list[UsageRecord]:
    """One record an id, the exact before estimates, of those the largest: a statement may not touch a row twice. In
    order of id, so that two gateways that report the same calls lock rows in one order."""
    best: dict[str, UsageRecord] = {}
    for one in records:
        have = best.get(one.record_id)
        if have is None or (have.delivered_unknown and _better(one, have)):
            best[one.record_id] = one
    return [best[record_id] for record_id in sorted(best)]


def _better(one: UsageRecord, estimate: UsageRecord) -> bool:
    return not one.delivered_unknown or one.generated_tokens > estimate.generated_tokens


def _row(record: UsageRecord) -> dict[str, Any]:
    return {**record.as_json(), "day": record.day}


def _requests() -> ColumnElement[Any]:
    """A request has a record for each of its outputs and for each part after a resumption; idle GPUs have some, too."""
    return func.sum(case((and_(usage.c.segment == 0, usage.c.tenant != IDLE_TENANT), 1), else_=0))


def _dimension(name: str) -> ColumnElement[Any]:
    label = LABEL.match(name)
    if label:
        return func.coalesce(usage.c.labels[label.group(1)].as_string(), "")
    return func.substr(usage.c.day, 1, 7) if name == "month" else usage.c[name]


def _conditions(wanted: UsageQuery) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.since_day:
        conditions.append(usage.c.day >= wanted.since_day)
    if wanted.until_day:
        conditions.append(usage.c.day <= wanted.until_day)
    if wanted.tenant:
        conditions.append(usage.c.tenant == wanted.tenant)
    if wanted.model:
        conditions.append(usage.c.model == wanted.model)
    return conditions


def _fold(wanted: UsageQuery, rows: Sequence[Mapping[str, Any]], rates: Prices | None) -> list[dict[str, Any]]:
    """Rows by group; with rates there is one row a group and accelerator, joined here."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(str(row[f"d{at}"]) for at in range(len(wanted.group_by)))
        group = groups.setdefault(key, dict(zip(wanted.group_by, key, strict=True)) | dict.fromkeys(COUNTS, 0))
        for name in COUNTS:
            group[name] += float(row[name] or 0) if name == "gpu_seconds" else int(row[name] or 0)
        if rates is not None:
            cost = _cost(row["_gpu"], float(row["gpu_seconds"] or 0), rates)
            had = group.get("cost", 0.0)
            group["cost"] = None if cost is None or had is None else had + cost
            group["currency"] = rates.currency
    return [groups[key] for key in sorted(groups)]


def _cost(gpu: str, gpu_seconds: float, rates: Prices) -> float | None:
    rate = rates.gpu_hour.get(gpu)
    if rate is None:
        return 0.0 if gpu_seconds == 0 else None
    return rate * gpu_seconds / 3600
