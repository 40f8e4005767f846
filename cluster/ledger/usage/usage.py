"""The usage table, and sums over the rows. A record id has one row, even if the record is reported several times."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import structlog
from sqlalchemy import ColumnElement, Engine, and_, case, delete, func, not_, or_, select

from cluster.ledger.database.changes import dialect_insert
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import erased, usage
from cluster.ledger.rows import COUNTS, LABEL, Prices, UsageQuery
from cluster.ledger.tenants.tenants import digest_of_name
from cluster.ledger.usage.records import UsageRecord

log = structlog.get_logger("ledger")

IDLE_TENANT = "_idle"
MAX_LOGGED = 10
_DELETE_ROWS = 20_000


class UsageTable:
    """The table of usage records."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def insert(self, records: Sequence[UsageRecord]) -> int:
        """Insert all of the records, or none. Returns the number of records that were dropped because another tenant's
        row has their id. Raises StoreUnavailable.

        An exact row is final. An estimated row is replaced by an exact record or by a larger estimate. (A retried call
        has one estimate per worker.) A record is dropped if the tenant was erased after the call opened.
        """
        deduplicated = _best_per_id(records)
        if not deduplicated:
            return 0
        with writing(self._engine) as connection:
            erased_at = {row.digest: row.erased_at for row in connection.execute(select(erased))}
            rows = [
                _row(new) for new in deduplicated if new.opened_at_s >= erased_at.get(digest_of_name(new.tenant), -1.0)
            ]
            if not rows:
                return 0
            statement = dialect_insert(connection, usage)
            values = {c.name: statement.excluded[c.name] for c in usage.c if c.name != "record_id"}
            new = statement.excluded
            more_tokens = new.generated_tokens > usage.c.generated_tokens
            better = and_(usage.c.delivered_unknown, or_(not_(new.delivered_unknown), more_tokens))
            done = connection.execute(
                statement.on_conflict_do_update(index_elements=["record_id"], set_=values, where=better), rows
            )
            taken: dict[str, str] = {}
            if done.rowcount != len(rows):  # only then is a row not new, so an ordinary insert costs no query
                ids = [row["record_id"] for row in rows]
                query = select(usage.c.record_id, usage.c.tenant).where(usage.c.record_id.in_(ids))
                taken = {row.record_id: row.tenant for row in connection.execute(query)}
        return _report_conflicts(records, taken | {row["record_id"]: row["tenant"] for row in rows if not taken})

    def query(self, usage_query: UsageQuery, rates: Prices | None = None) -> list[dict[str, Any]]:
        """Return sums by group, ordered by group. A missing label has the value "".

        With `rates`, each group also has a `cost`. The cost is None if an accelerator of the group has no rate.
        """
        dimensions = [_dimension(name).label(f"d{at}") for at, name in enumerate(usage_query.group_by)]
        by_gpu = [usage.c.gpu.label("_gpu")] if rates is not None else []
        sums = [_request_count().label("requests"), *(func.sum(usage.c[name]).label(name) for name in COUNTS[1:])]
        query = select(*dimensions, *by_gpu, *sums).where(*conditions(usage_query)).group_by(*dimensions, *by_gpu)
        with reading(self._engine) as connection:
            rows = [dict(row) for row in connection.execute(query).mappings()]
        return _fold(usage_query, rows, rates)

    def records(
        self, usage_query: UsageQuery, *, after: tuple[float, str] | None = None, limit: int = 1000
    ) -> list[UsageRecord]:
        """Return a page of records in order of time.

        `after` is the (opened_at_s, record_id) of the last record on the previous page.
        """
        query = select(usage).where(*conditions(usage_query))
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
        """Return the sum of prompt and completion tokens by tenant, which is what a budget limits.

        The sums include `since_day` and exclude `before_day` ("" means no end). `tenants` None means all tenants.
        """
        query = select(usage.c.tenant, func.sum(usage.c.prompt_tokens + usage.c.completion_tokens))
        query = query.where(usage.c.day >= since_day).group_by(usage.c.tenant)
        if before_day:
            query = query.where(usage.c.day < before_day)
        if tenants is not None:
            query = query.where(usage.c.tenant.in_(list(tenants)))
        with reading(self._engine) as connection:
            return {tenant: int(total) for tenant, total in connection.execute(query)}

    def expire(self, before_s: float, *, tenant: str = "", except_tenants: Sequence[str] = ()) -> int:
        """Remove records of calls that opened before `before_s` (epoch seconds). Returns the number of records removed.

        `tenant` limits the removal to one tenant. Records of `except_tenants` stay. Records are removed in batches, so
        that inserts never wait long for the database.
        """
        old = select(usage.c.record_id).where(usage.c.opened_at_s < before_s)
        if tenant:
            old = old.where(usage.c.tenant == tenant)
        if except_tenants:
            old = old.where(usage.c.tenant.not_in(list(except_tenants)))
        total = 0
        while True:
            with writing(self._engine) as connection:
                removed = connection.execute(
                    delete(usage).where(usage.c.record_id.in_(old.limit(_DELETE_ROWS)))
                ).rowcount
            total += removed
            if removed < _DELETE_ROWS:
                return total


def _best_per_id(records: Sequence[UsageRecord]) -> list[UsageRecord]:
    """Return the best record of each id, ordered by id: an exact record if there is one, else the largest estimate.

    An SQL statement may change a row only once, so there is one record per id. Gateways that report the same calls lock
    the rows in the same order, because the records are ordered.
    """
    best: dict[str, UsageRecord] = {}
    for record in records:
        previous = best.get(record.record_id)
        if previous is None or (previous.delivered_unknown and _is_better(record, previous)):
            best[record.record_id] = record
    return [best[record_id] for record_id in sorted(best)]


def _report_conflicts(records: Sequence[UsageRecord], tenants: Mapping[str, str]) -> int:
    """Log each record whose id belongs to a row of another tenant, and return their number. Ids cannot be guessed, so
    such a record is a sign of a defect or of an attack. `tenants`: the tenants of the rows, by record id."""
    conflicts = [record for record in records if tenants.get(record.record_id, record.tenant) != record.tenant]
    for record in conflicts[:MAX_LOGGED]:
        log.error(
            "usage.record_conflict",
            record=record.record_id,
            tenant=record.tenant,
            row_tenant=tenants[record.record_id],
            conflicts=len(conflicts),
        )
    return len(conflicts)


def _is_better(record: UsageRecord, estimate: UsageRecord) -> bool:
    return not record.delivered_unknown or record.generated_tokens > estimate.generated_tokens


def _row(record: UsageRecord) -> dict[str, Any]:
    return {**record.as_json(), "day": record.day}


def _request_count() -> ColumnElement[Any]:
    """Return the SQL expression for the number of requests.

    A request is counted once, by its record with segment 0. Further outputs of the request, its resumed parts, and
    records of idle GPUs do not count.
    """
    return func.sum(case((and_(usage.c.segment == 0, usage.c.tenant != IDLE_TENANT), 1), else_=0))


def _dimension(name: str) -> ColumnElement[Any]:
    label = LABEL.match(name)
    if label:
        return func.coalesce(usage.c.labels[label.group(1)].as_string(), "")
    return func.substr(usage.c.day, 1, 7) if name == "month" else usage.c[name]


def conditions(usage_query: UsageQuery) -> list[ColumnElement[bool]]:
    """Return the SQL conditions for the records of a query."""
    wanted: list[ColumnElement[bool]] = []
    if usage_query.since_day:
        wanted.append(usage.c.day >= usage_query.since_day)
    if usage_query.until_day:
        wanted.append(usage.c.day <= usage_query.until_day)
    if usage_query.tenant:
        wanted.append(usage.c.tenant == usage_query.tenant)
    if usage_query.model:
        wanted.append(usage.c.model == usage_query.model)
    return wanted


def _fold(usage_query: UsageQuery, rows: Sequence[Mapping[str, Any]], rates: Prices | None) -> list[dict[str, Any]]:
    """Sum rows by group. If `rates` are given, the sums have costs. `rows` must then have separate rows for each
    accelerator of a group."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(str(row[f"d{at}"]) for at in range(len(usage_query.group_by)))
        group = groups.setdefault(key, dict(zip(usage_query.group_by, key, strict=True)) | dict.fromkeys(COUNTS, 0))
        for name in COUNTS:
            group[name] += float(row[name] or 0) if name == "gpu_seconds" else int(row[name] or 0)
        if rates is not None:
            cost = _cost(row["_gpu"], float(row["gpu_seconds"] or 0), rates)
            sum_so_far = group.get("cost", 0.0)
            group["cost"] = None if cost is None or sum_so_far is None else sum_so_far + cost
            group["currency"] = rates.currency
    return [groups[key] for key in sorted(groups)]


def _cost(gpu: str, gpu_seconds: float, rates: Prices) -> float | None:
    rate = rates.gpu_hour.get(gpu)
    if rate is None:
        return 0.0 if gpu_seconds == 0 else None
    return rate * gpu_seconds / 3600
