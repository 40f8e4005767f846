"""The overview: one document about the whole cluster, merged from the parts of gateway processes, and what each viewer
may see of it.

Invariants of `merge`: the order of the parts does not matter. If there are several parts of one gateway, only the
newest counts. A worker has one row, however many gateways report it. Rows from gateways that are linked to the worker
are preferred to rows from gateways that have lost it; of the preferred rows, the newest is used. A call has one row,
from the gateway where it arrived last, since a call may resume at another gateway under the same id.

Invariant of `view_of`: a viewer of one tenant gets no name of another tenant, of a worker or of a gateway, and no
number that counts other tenants' calls. Only the fields that this module lists are shown, so a new field is hidden
until it is listed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from cluster.gateway.apis.slices import in_slices
from cluster.gateway.console.overview.parts import FORMAT, MAX_CALLS, Part
from cluster.gateway.console.overview.rows import LOST, Row
from cluster.observe.definitions import TTFT_BUCKETS
from cluster.policy.problems import Problem, ordered

Document = dict[str, Any]

LISTS: Final = ("problems", "gateways", "models", "workers", "calls", "tenants", "scaling")
"""The lists of a document, whose rows have an `id`."""
_OWN_CALL: Final = (
    "id", "request_id", "tenant", "model", "api", "state", "outcome", "arrived_s", "queue_s", "ttft_s", "tokens",
    "tokens_per_s", "prompt_tokens", "cached_tokens", "reason", "resumes", "trace_id", "duration_s",
)  # fmt: skip
_OWN_TENANT: Final = (
    "id", "weight", "running", "waiting", "tokens_per_s", "ttft_p50_s", "ttft_p99_s", "requests", "cost_per_h",
    "limits", "budget",
)  # fmt: skip
_OPEN_MODEL: Final = ("id", "state", "progress", "frozen")


def newest(parts: Iterable[Part]) -> Sequence[Part]:
    """Return the newest part of each gateway, in the order of the gateways' ids. Parts in another format are
    ignored."""
    by_gateway: dict[str, Part] = {}
    for part in parts:
        if part.get("format") == FORMAT:
            gateway = part["gateway"]["id"]
            known = by_gateway.get(gateway)
            if known is None or (part["at"], len(part["calls"])) > (known["at"], len(known["calls"])):
                by_gateway[gateway] = part
    return [by_gateway[gateway] for gateway in sorted(by_gateway)]


async def merge(parts: Iterable[Part], at: float, has_cost: bool = True) -> Document:
    """Merge the parts into one document. Its fields `scaling`, `cluster` and `version` are added later. `at`: seconds
    since the epoch. `has_cost`: whether GPU-seconds have prices."""
    chosen = newest(parts)
    ages = [age + max(at - part["at"], 0.0) for part in chosen if (age := part["controller_age_s"]) is not None]
    return {
        "at": round(at, 3),
        "step_s": 1.0,
        "controller": {
            "age_s": round(min(ages), 1) if ages else None,
            "gateways": max((n for part in chosen if (n := part["controller_gateways"])), default=None),
        },
        "problems": [
            problem.row for problem in ordered(Problem(*one) for part in chosen for one in part.get("problems", ()))
        ],
        "gateways": [part["gateway"] | {"age_s": round(max(at - part["at"], 0.0), 1)} for part in chosen],
        "models": await in_slices(_models(chosen)),
        "workers": await in_slices(_workers(chosen)),
        "calls": await _calls(chosen),
        "tenants": await _tenants(chosen, has_cost),
    }


# ---- models


def _models(parts: Sequence[Part]) -> Iterator[Row]:
    """Yield one row per model. The fields from the catalog and the links come from the newest part that has the
    model."""
    rows: dict[str, list[tuple[Part, Row]]] = {}
    for part in parts:
        for row in part["models"]:
            rows.setdefault(row["id"], []).append((part, row))
    for name in sorted(rows):
        yield _model([row for _, row in sorted(rows[name], key=lambda pair: (pair[0]["at"], pair[0]["gateway"]["id"]))])


def _model(rows: Sequence[Row]) -> Row:
    counts = _sum_counts([row["ttft_counts"] for row in rows])
    prompt, cached = (sum(row[name] for row in rows) for name in ("prompt_tokens", "cached_tokens"))
    hidden = ("ttft_counts", "prompt_tokens", "cached_tokens")
    return {name: value for name, value in rows[-1].items() if name not in hidden} | {
        "running": sum(row["running"] for row in rows),
        "waiting": sum(row["waiting"] for row in rows),
        "tokens_per_s": round(math.fsum(row["tokens_per_s"] for row in rows), 1),
        "ttft_p50_s": quantile(counts, 0.5),
        "ttft_p99_s": quantile(counts, 0.99),
        "cache_hit": round(cached / prompt, 4) if prompt else None,
        "gap": max(row["gap"] for row in rows),
    }


def _sum_counts(counts: Sequence[Sequence[int]]) -> list[int]:
    most = max(map(len, counts), default=0)
    return [sum(each[at] for each in counts if len(each) > at) for at in range(most)]


def quantile(counts: Sequence[float], part: float, bounds: Sequence[float] = TTFT_BUCKETS) -> float | None:
    """Return a quantile of a histogram, interpolated within its bucket; None without values. `part`: which quantile,
    for example 0.99. Values above the last bound are shown as that bound."""
    total = sum(counts)
    if not total:
        return None
    rank, below = part * total, 0.0
    for at, count in enumerate(counts):
        if count and below + count >= rank:
            if at >= len(bounds):
                break
            low = bounds[at - 1] if at else 0.0
            return round(low + (bounds[at] - low) * max(rank - below, 0.0) / count, 4)
        below += count
    return bounds[-1]


# ---- workers and calls


def _workers(parts: Sequence[Part]) -> Iterator[Row]:
    """Yield one row per worker, with the gateways that are linked to the worker."""
    rows: dict[str, list[tuple[float, str, Row]]] = {}
    for part in parts:
        for row in part["workers"]:
            rows.setdefault(row["id"], []).append((part["at"], part["gateway"]["id"], row))
    for name in sorted(rows):
        yield _worker(sorted(rows[name], key=lambda each: each[:2]))


def _worker(rows: Sequence[tuple[float, str, Row]]) -> Row:
    linked = [each for each in rows if each[2]["state"] != LOST]
    if len(rows) == 1:
        return rows[0][2]
    row = (linked or rows)[-1][2]
    same = [each for _, _, each in rows if each["incarnation"] == row["incarnation"]]
    return row | {
        "links": sorted({link for each in same for link in each["links"]}) if linked else [],
        "resumed": sum(each["resumed"] for each in same),
    }


async def _calls(parts: Sequence[Part]) -> list[Row]:
    """Return one row per call, at most MAX_CALLS. If there are more calls, each tenant gets an equal share of the rows,
    first for its open calls, then for its latest ended calls. If a tenant needs fewer rows than its share, the other
    tenants get the rest."""
    rows: dict[str, Row] = {}

    def put() -> Iterator[None]:
        for part in parts:
            for row in part["calls"]:
                known = rows.get(row["id"])
                if known is None or _rank(row) > _rank(known):
                    rows[row["id"]] = row
                yield None

    await in_slices(put())
    if len(rows) <= MAX_CALLS:
        return list(rows.values())
    by_tenant: dict[str, list[Row]] = {}
    for row in rows.values():
        by_tenant.setdefault(row["tenant"], []).append(row)
    chosen: list[Row] = []
    queues = sorted(by_tenant.items(), key=lambda pair: (len(pair[1]), pair[0]))
    for number, (_, queue) in enumerate(queues):
        await in_slices(())
        share = (MAX_CALLS - len(chosen)) // (len(queues) - number)
        queue.sort(key=lambda row: (row["state"] != "ended", row["arrived_s"], row["id"]), reverse=True)
        chosen += queue[:share]
    return chosen


def _rank(row: Row) -> tuple[Any, ...]:
    return row["arrived_s"], row["gateway"], row["state"] == "ended"


# ---- tenants


async def _tenants(parts: Sequence[Part], has_cost: bool) -> list[Row]:
    """Return one row per tenant. A row has the tenant's share of the tokens, and its fair share among the tenants with
    calls. `has_cost`: whether the rows have costs."""
    rows: dict[str, list[Row]] = {}
    for part in parts:
        for row in part["tenants"]:
            rows.setdefault(row["id"], []).append(row)
        await asyncio.sleep(0)
    merged = await in_slices(_tenant(rows[name], has_cost) for name in sorted(rows))
    await asyncio.sleep(0)
    total = math.fsum(row["tokens_per_s"] for row in merged)
    weights = math.fsum(row["weight"] for row in merged if row["running"] or row["waiting"])
    return await in_slices(_with_shares(row, total, weights) for row in merged)


def _with_shares(row: Row, total: float, weights: float) -> Row:
    """Return a tenant's row with three more values: the tenant's share of the tokens a second, its fair share by
    weight, and the first share minus the second. `total`: tokens a second of all tenants. `weights`: sum of the weights
    of the tenants with calls."""
    is_active = row["running"] or row["waiting"]
    share = round(row["tokens_per_s"] / total, 4) if total else None
    fair_share = round(row["weight"] / weights, 4) if is_active and weights else None
    gap = None if share is None or fair_share is None else round(share - fair_share, 4)
    return row | {"share": share, "fair_share": fair_share, "gap": gap}


def _tenant(rows: Sequence[Row], has_cost: bool) -> Row:
    times = sorted(time for row in rows for time in row["ttft_s"])
    limits: dict[str, Row] = {}
    for row in rows:
        for name, limit in row["limits"].items():
            if name not in limits or _use(limit) > _use(limits[name]):
                limits[name] = limit
    budgets = [row["budget"] for row in rows if row["budget"] is not None]
    return {
        "id": rows[0]["id"],
        "weight": max(row["weight"] for row in rows),
        "running": sum(row["running"] for row in rows),
        "waiting": sum(row["waiting"] for row in rows),
        "tokens_per_s": round(math.fsum(row["tokens_per_s"] for row in rows), 1),
        "ttft_p50_s": _of_sorted(times, 0.5),
        "ttft_p99_s": _of_sorted(times, 0.99),
        "requests": sum(row["requests"] for row in rows),
        "cost_per_h": round(math.fsum(row["cost_per_h"] for row in rows), 4) if has_cost else None,
        "limits": limits,
        "budget": max(budgets, key=_use) if budgets else None,
    }


def _use(limit: Row) -> tuple[float, float, str]:
    return -1 if limit["used"] is None else limit["used"], limit["limit"], limit.get("name", "")


def _of_sorted(values: Sequence[float], part: float) -> float | None:
    return round(values[min(int(part * len(values)), len(values) - 1)], 4) if values else None


# ---- viewers


async def view_of(document: Document, tenant: str, models: Callable[[], Mapping[str, Sequence[str]]]) -> Document:
    """Return the part of a document that a viewer may see. `tenant`: the only tenant that the viewer may see, "" for
    all tenants. `models`: returns the models that the tenant may use, each with its aliases."""
    if not tenant:
        return document
    open_models = models()
    nothing: list[Row] = []
    return {
        "at": document["at"],
        "cluster": document["cluster"],
        "version": document["version"],
        "step_s": document["step_s"],
        "controller": {"age_s": None, "gateways": None},
        "problems": nothing,
        "gateways": nothing,
        "models": [_open_model(row, open_models[row["id"]]) for row in document["models"] if row["id"] in open_models],
        "workers": nothing,
        "calls": await in_slices(_only(row, _OWN_CALL) for row in document["calls"] if row["tenant"] == tenant),
        "tenants": [_only(row, _OWN_TENANT) for row in document["tenants"] if row["id"] == tenant],
        "scaling": nothing,
    }


def _open_model(row: Row, aliases: Sequence[str]) -> Row:
    return _only(row, _OPEN_MODEL) | {"aliases": list(aliases), "versions": []}


def _only(row: Row, names: Sequence[str]) -> Row:
    return {name: value if name in names else None for name, value in row.items()}
