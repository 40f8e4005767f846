"""Plots of more than an hour, from the Prometheus server in `gateway.console.prometheus_url`.

A request names series and a model or a tenant, but never a Prometheus expression. The gateway writes the expression,
and restricts it to the tenant that the viewer may see. The answer has the same form as for the last hour (feed.py). For
a tenant, Prometheus has only tokens, requests and cache hits, and only if the tenant is among the first
`observe.max_tenant_series`. All other values are null.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Final

import orjson
import structlog

from cluster.api.outcomes import CallError, Outcome, invalid, quoted
from cluster.gateway.apis.http.exchange import Exchange
from cluster.gateway.auth.no_redirect import open_no_redirect
from cluster.gateway.console.access.access import Viewer
from cluster.gateway.console.errors import JSON_HEADERS

log = structlog.get_logger("console")

HOUR_S: Final = 3600
MAX_SECONDS: Final = 366 * 86_400
POINTS: Final = 360
"""Approximate number of values in a series."""
LEAST_STEP_S: Final = 15
TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_QUERIES: Final = 4
"""Maximum number of concurrent queries of one gateway process."""
MAX_WAITING: Final = 32
TENANT_QUERIES: Final = 2
"""Maximum number of concurrent queries for the tenants' own viewers, of MAX_QUERIES."""
TENANT_WAITING: Final = 12
TENANTS_WAITING: Final = 20
"""Maximum number of running and waiting queries of one tenant, and of all tenants, of MAX_WAITING."""
MAX_QUERY_BYTES: Final = 4096

Fetch = Callable[[str], Awaitable[Any]]
"""Function that returns the JSON at an address. Raises OSError, ValueError or HTTPException."""


@dataclass(frozen=True, slots=True)
class Plot:
    """The Prometheus expression of a series. `{s}` in it is replaced with the label selector, and `{w}` with the window
    of rates.

    `of_tenants`: whether the metrics in the expression have the label `tenant`."""

    expression: str
    of_tenants: bool = False


def _quantile(share: float) -> Plot:
    rates = "sum by (le) (rate(headrace_time_to_first_token_seconds_bucket{s}[{w}]))"
    return Plot(f"histogram_quantile({share}, {rates})")


PLOTS: Final[Mapping[str, Plot]] = {
    "tokens": Plot("sum(rate(headrace_generation_tokens_total{s}[{w}]))", of_tenants=True),
    "requests": Plot("sum(rate(headrace_requests_total{s}[{w}]))", of_tenants=True),
    "streams": Plot("sum(headrace_requests_in_flight{s})"),
    "queue": Plot("sum(headrace_queue_requests{s})"),
    "cache_hits": Plot(
        "sum(rate(headrace_cached_tokens_total{s}[{w}])) / sum(rate(headrace_prompt_tokens_total{s}[{w}]))",
        of_tenants=True,
    ),
    "ttft_p50": _quantile(0.5),
    "ttft_p99": _quantile(0.99),
    "fairness_gap": Plot("max(headrace_fairness_gap_ratio{s})"),
    "replicas_wanted": Plot("sum(max by (model) (headrace_model_replicas_desired{s}))"),
    "replicas_had": Plot("sum(max by (model) (headrace_model_replicas{s}))"),
}
UNKNOWN: Final = frozenset({"cost"})
"""Series of the last hour that Prometheus does not have, because no metric holds the rate of the cost."""


@dataclass(frozen=True, slots=True)
class Range:
    """The times for which an answer has values. The first is `first_s`, in seconds since the epoch. There are `points`
    times in all, `step_s` seconds apart."""

    first_s: int
    step_s: int
    points: int

    @classmethod
    def of(cls, seconds: int, now_s: float) -> Range:
        """Return the times of the last `seconds` before `now_s`, at whole multiples of the step."""
        step_s = max(LEAST_STEP_S, math.ceil(seconds / POINTS))
        last_s = int(now_s // step_s) * step_s
        points = seconds // step_s
        return cls(last_s - (points - 1) * step_s, step_s, points)

    @property
    def last_s(self) -> int:
        """The time of the last value."""
        return self.first_s + (self.points - 1) * self.step_s

    def values(self, pairs: Sequence[Sequence[Any]]) -> list[float | None]:
        """Return one value for each time of the range; None for a time without a value. `pairs`: times and values from
        Prometheus. The values are texts."""
        out: list[float | None] = [None] * self.points
        for at_s, text in pairs:
            place, value = round((float(at_s) - self.first_s) / self.step_s), float(text)
            if 0 <= place < self.points and math.isfinite(value):
                out[place] = value
        return out


class LongHistory:
    """The history of more than one hour. Answers requests for it with values from Prometheus."""

    def __init__(
        self, url: str, cluster: str, fetch: Fetch | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        """`cluster`: name of the cluster, which is a label of all metrics. `wall`: returns seconds since the epoch."""
        self._url = url
        self._cluster = cluster
        self._fetch = fetch or self._fetch_in_thread
        self._threads = ThreadPoolExecutor(MAX_QUERIES, thread_name_prefix="prometheus")
        """Threads of their own: while Prometheus is slow, queries must not hold those of other work."""
        self._wall = wall
        self._queries = asyncio.Semaphore(MAX_QUERIES)
        self._tenant_queries = asyncio.Semaphore(TENANT_QUERIES)
        self._waiting: Counter[str] = Counter()
        """Number of running and waiting queries by the scope of the viewer: a tenant, "" for operators and viewers."""

    def close(self) -> None:
        """Drop the queries that wait for a thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def covers(exchange: Exchange) -> bool:
        """Return whether a request asks for more than an hour."""
        seconds = _fields(exchange).get("seconds", "")
        return seconds.isascii() and seconds.isdecimal() and len(seconds) <= 9 and int(seconds) > HOUR_S

    async def answer(self, exchange: Exchange, viewer: Viewer) -> None:
        """Answer with the values of series over a time of one hour to one year. Raises CallError."""
        fields = _fields(exchange)
        seconds = int(fields["seconds"])
        if seconds > MAX_SECONDS:
            raise invalid("seconds", f"must be at most {MAX_SECONDS}, a year")
        names = [name for name in fields.get("series", "").split(",") if name] or ["tokens"]
        for name in names:
            if name not in PLOTS and name not in UNKNOWN:
                raise invalid("series", f"has no {quoted(name)}; there are {', '.join(PLOTS)}")
        model, tenant = fields.get("model", ""), fields.get("tenant", "") or viewer.scope
        if viewer.scope and tenant != viewer.scope:
            raise CallError(Outcome.NOT_FOUND, f"tenants/{quoted(tenant)} does not exist")
        times = Range.of(seconds, self._wall())
        names = list(dict.fromkeys(names))
        series = await asyncio.gather(*(self._values(name, model, tenant, times, viewer.scope) for name in names))
        answer = {"step_s": times.step_s, "from_s": times.first_s, "series": dict(zip(names, series, strict=True))}
        await exchange.respond(200, orjson.dumps(answer), JSON_HEADERS)

    async def _values(self, name: str, model: str, tenant: str, times: Range, scope: str) -> list[float | None]:
        plot = PLOTS.get(name)
        if plot is None or (tenant and not plot.of_tenants):
            return [None] * times.points
        expression = expression_of(plot, {"headrace_cluster": self._cluster, "model": model, "tenant": tenant}, times)
        query = {"query": expression, "start": times.first_s, "end": times.last_s, "step": times.step_s}
        url = f"{self._url}/api/v1/query_range?{urllib.parse.urlencode(query)}"
        waiting = self._waiting
        of_tenants = waiting.total() - waiting[""]
        is_full = bool(scope) and (waiting[scope] >= TENANT_WAITING or of_tenants >= TENANTS_WAITING)
        if is_full or waiting.total() >= MAX_WAITING:
            raise CallError(Outcome.QUEUE_FULL, "too many plots are being fetched; wait a moment")
        waiting[scope] += 1
        try:
            share = self._tenant_queries if scope else nullcontext()
            async with share, self._queries, asyncio.timeout(2 * TIMEOUT_S):
                result = (await self._fetch(url))["data"]["result"]
            return times.values(result[0]["values"]) if result else [None] * times.points
        except (OSError, HTTPException, ValueError, TypeError, LookupError, TimeoutError) as error:
            log.warning("console.prometheus_failed", error=str(error)[:200])
            text = "the Prometheus of gateway.console.prometheus_url does not answer; at most 3600 seconds are here"
            raise CallError(Outcome.STORE_UNAVAILABLE, text) from None
        finally:
            waiting[scope] -= 1
            waiting += Counter()  # forgets scopes without queries

    async def _fetch_in_thread(self, url: str) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, _get, url)


def expression_of(plot: Plot, labels: Mapping[str, str], times: Range) -> str:
    """Return the Prometheus expression of a plot, restricted to the labels in `labels`. Labels with an empty value are
    left out."""
    pairs = [f'{name}="{_escaped(value)}"' for name, value in labels.items() if value]
    window = f"{max(2 * times.step_s, 60)}s"
    return plot.expression.replace("{w}", window).replace("{s}", "{" + ",".join(pairs) + "}")


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _fields(exchange: Exchange) -> Mapping[str, str]:
    """Return the parameters of a request. If one occurs twice, its last value counts. Raises CallError."""
    query = exchange.scope.get("query_string", b"")
    if len(query) > MAX_QUERY_BYTES:
        raise invalid("query", f"must not be longer than {MAX_QUERY_BYTES} bytes")
    try:
        return dict(urllib.parse.parse_qsl(query.decode("latin-1"), max_num_fields=16))
    except ValueError:
        raise invalid("query", "has more than 16 parameters") from None


def _get(url: str) -> Any:
    with open_no_redirect(url, TIMEOUT_S) as answer:
        data = answer.read(MAX_ANSWER_BYTES + 1)
    if len(data) > MAX_ANSWER_BYTES:
        raise ValueError(f"Prometheus sends more than {MAX_ANSWER_BYTES} bytes")
    return json.loads(data)
