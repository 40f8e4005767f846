"""Plots of more than an hour: the queries, what each viewer gets, and a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.http.exchange import Exchange, Message, Scope
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.console.access.access import Viewer
from cluster.gateway.console.access.sessions import ConsoleSession
from cluster.gateway.console.errors import FORM
from cluster.gateway.console.history.history import SERIES
from cluster.gateway.console.history.long_history import (
    LEAST_STEP_S,
    MAX_QUERIES,
    MAX_SECONDS,
    PLOTS,
    POINTS,
    TENANT_QUERIES,
    TENANT_WAITING,
    TENANTS_WAITING,
    UNKNOWN,
    LongHistory,
    Range,
    expression_of,
)
from cluster.policy.tenants.identity import Principal
from cluster.policy.tenants.policy import TenantPolicy
from cluster.wire.bundle import Bundle
from tests.support.cluster import LOOPBACK, running_cluster, sim_engine, until
from tests.support.console import Browser
from tests.support.keyed import eventually
from tests.support.prometheus import prometheus

NOW = 1_800_000_000.0


def viewer(role: str, tenant: str = "acme") -> Viewer:
    """Return a viewer with a role."""
    session = ConsoleSession.begin("key", "k1", tenant, role, expires_at_s=NOW + 60)
    principal = Principal(TenantPolicy(tenant), role)
    return Viewer(session, principal, principal)


class Server:
    """A Prometheus whose answers the test sets."""

    def __init__(self) -> None:
        self.queries: list[dict[str, str]] = []
        self.result: Any = [{"metric": {}, "values": []}]
        self.error: Exception | None = None
        self.history = LongHistory("http://prometheus", "demo", self.fetch, lambda: NOW)
        self.sent: list[Message] = []

    async def fetch(self, url: str) -> Any:
        """Return the result that the test has set."""
        assert url.startswith("http://prometheus/api/v1/query_range?")
        self.queries.append(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query)))
        if self.error is not None:
            raise self.error
        return {"data": {"result": self.result}}

    async def get(self, query: str, role: str = "viewer") -> Any:
        """Return the answer to a query of a viewer. Raises CallError."""
        self.sent.clear()
        await self.history.answer(self.exchange(query), viewer(role))
        return json.loads(self.sent[-1]["body"])

    def exchange(self, query: str) -> Exchange:
        """Return the HTTP exchange of a request with this query string. The messages of the response are added to
        `sent`."""
        scope: Scope = {"headers": [], "query_string": query.encode("latin-1", "replace"), CONNECTION: None}

        async def send(message: Message) -> None:
            self.sent.append(message)

        return Exchange(FORM, scope, _nothing, send)


async def _nothing() -> Message:
    raise AssertionError("a GET has no body")


@pytest.fixture
def server() -> Server:
    """Provide a Prometheus whose answers the test sets."""
    return Server()


def test_each_series_of_the_last_hour_is_known() -> None:
    """Each series of the last hour either has a query for longer times, in PLOTS, or is listed in UNKNOWN."""
    assert set(PLOTS) | UNKNOWN == set(SERIES)


@given(
    st.sampled_from(list(PLOTS)),
    st.text(max_size=20),
    st.text(max_size=20),
    st.integers(3601, MAX_SECONDS),
)
def test_expressions(name: str, model: str, tenant: str, seconds: int) -> None:
    """A query expression is valid for any names of models and tenants. Each of its selectors has exactly the expected
    labels."""
    labels = {"headrace_cluster": "demo", "model": model, "tenant": tenant}
    parsed = promql_parser.parse(expression_of(PLOTS[name], labels, Range.of(seconds, NOW)))
    wanted = {label: value for label, value in labels.items() if value}
    selectors = list(selectors_in(parsed))
    assert selectors
    for selector in selectors:
        assert {matcher.name: matcher.value for matcher in selector.matchers.matchers} == wanted
        assert {str(matcher.op) for matcher in selector.matchers.matchers} == {"MatchOp.Equal"}


def selectors_in(node: Any) -> Any:
    """Yield the selectors in a parsed query expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from selectors_in(node.lhs)
        yield from selectors_in(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from selectors_in(argument)
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr):
        yield from selectors_in(node.expr)


@given(st.integers(3601, MAX_SECONDS), st.floats(NOW, NOW + 1e8))
def test_times(seconds: int, now_s: float) -> None:
    """An answer covers the requested seconds with a bounded number of values. Their times are whole multiples of the
    step."""
    times = Range.of(seconds, now_s)
    assert times.step_s >= LEAST_STEP_S
    assert times.points <= POINTS
    assert times.first_s % times.step_s == 0
    assert times.last_s <= now_s < times.last_s + times.step_s
    assert seconds - times.step_s <= times.points * times.step_s <= seconds


def test_values() -> None:
    """Values from Prometheus are sorted into the steps of the range by their times, and values outside the range are
    dropped. A step without a value, or with a value that is not finite, is null."""
    times = Range(100, 10, 5)
    pairs = [[100, "1"], [110, "NaN"], [130, "2.5"], [140, "+Inf"], [90, "7"], [150, "7"]]
    assert times.values(pairs) == [1.0, None, None, 2.5, None]


async def test_an_answer(server: Server) -> None:
    """The answer for two hours has the same form as an answer for the last hour: one value for each step of each
    series, None where there is no value."""
    server.result = [{"metric": {}, "values": [[NOW // 20 * 20, "3"]]}]
    answer = await server.get("series=tokens,cost&seconds=7200&model=sim")
    assert answer["step_s"] == 20
    assert answer["series"]["tokens"] == [None] * 359 + [3.0]
    assert answer["series"]["cost"] == [None] * 360
    (query,) = server.queries
    assert 'model="sim"' in query["query"]
    assert "tenant=" not in query["query"]


@pytest.mark.parametrize("role", ["caller", "tenant_admin"])
async def test_a_tenant_gets_its_own_values(server: Server, role: str) -> None:
    """A person of a tenant gets only that tenant's values, whatever the query names. Series that are not recorded for
    tenants are null."""
    await server.get("series=tokens,requests,cache_hits&seconds=7200", role)
    assert all(query["query"].count('tenant="acme"') >= 1 for query in server.queries)
    server.queries.clear()
    answer = await server.get("series=queue,streams,ttft_p99,fairness_gap,replicas_had&seconds=7200&model=sim", role)
    assert not server.queries
    assert all(set(values) == {None} for values in answer["series"].values())
    with pytest.raises(CallError) as caught:
        await server.get("series=tokens&seconds=7200&tenant=rival", role)
    assert caught.value.outcome is Outcome.NOT_FOUND


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("series=nothing&seconds=7200", "series"),
        (f"seconds={MAX_SECONDS + 1}", "seconds"),
        ("&".join(f"a{n}=1" for n in range(40)) + "&seconds=7200", "query"),
        ("seconds=7200&model=" + "x" * 5000, "query"),
    ],
)
async def test_wrong_queries(server: Server, query: str, field: str) -> None:
    """A wrong query is refused with the name of the field."""
    with pytest.raises(CallError) as caught:
        await server.get(query)
    assert caught.value.violations[0].field == field
    assert not server.queries


@pytest.mark.parametrize(
    ("query", "covers"),
    [("", False), ("seconds=3600", False), ("seconds=3601", True), ("seconds=x", False), ("seconds=²", False)],
)
def test_what_is_covered(server: Server, query: str, covers: bool) -> None:
    """Only queries for more than an hour are answered from Prometheus."""
    assert server.history.covers(server.exchange(query)) == covers


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("no JSON"), TimeoutError(), KeyError("data")])
async def test_a_prometheus_that_fails(server: Server, error: Exception) -> None:
    """If Prometheus does not answer, the error says so and holds no details of Prometheus."""
    server.error = error
    with pytest.raises(CallError) as caught:
        await server.get("series=tokens&seconds=7200")
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE
    assert "no route" not in caught.value.message


@pytest.mark.parametrize("result", [None, {}, [{}], [{"values": 1}], [{"values": [[1]]}], [{"values": [["x", "y"]]}]])
async def test_a_prometheus_that_answers_oddly(server: Server, result: Any) -> None:
    """If Prometheus answers in an unexpected form, the history gives an error or no values."""
    server.result = result
    try:
        answer = await server.get("series=tokens&seconds=7200")
    except CallError:
        return
    assert set(answer["series"]["tokens"]) == {None}


@pytest.mark.slow
@pytest.mark.needs("promtool")
@pytest.mark.thorough
async def test_with_a_real_prometheus(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway answers a query for two hours from what a real Prometheus has scraped, and a query for an hour from
    memory."""
    async with running_cluster(tmp_path / "scraped") as scraped:
        await scraped.add_worker(sim_engine(checkpoint), bundle)
        targets = {"gateway": [scraped.gateway.endpoints["metrics"]]}
        async with prometheus(tmp_path / "prometheus", targets, "groups: []\n") as server:
            text = LOOPBACK.replace(
                "gateway:\n", f"gateway:\n  console: {{prometheus_url: 'http://{server.address}'}}\n"
            )
            async with running_cluster(tmp_path / "asked", text) as cluster:
                browser = Browser(cluster)
                assert (await browser.session())["prometheus"]

                async def has_value() -> bool:
                    path = "/console/history?series=replicas_had,streams,tokens,ttft_p50,cost&seconds=7200"
                    reply = await browser.fetch(path)
                    assert reply.status == 200, reply.body
                    return set(reply.json["series"]["replicas_had"]) == {None, 1.0}

                assert (await browser.fetch("/console/history?series=tokens&seconds=600")).json["step_s"] == 5
                await eventually(has_value, "Prometheus has scraped the gateway")


async def test_a_tenants_queries_leave_room_for_operators() -> None:
    """While Prometheus is slow, the viewers of tenants hold a part of the queries and of the places to wait only, and
    an operator's query is sent at once."""
    release, urls = asyncio.Event(), list[str]()

    async def fetch(url: str) -> Any:
        urls.append(url)
        await release.wait()
        return {"data": {"result": []}}

    server = Server()
    history = LongHistory("http://prometheus", "demo", fetch, lambda: NOW)

    def ask(role: str, tenant: str) -> asyncio.Task[None]:
        query = "seconds=7200&series=tokens,requests,cache_hits"
        return asyncio.create_task(history.answer(server.exchange(query), viewer(role, tenant)))

    asked = [ask("caller", tenant) for tenant in ("acme", "beta", "gamma") for _ in range(20)]
    await until(lambda: sum(task.done() for task in asked) >= 60 - TENANTS_WAITING, "the others are refused")
    assert len(urls) == TENANT_QUERIES
    assert history._waiting["acme"] == TENANT_WAITING
    operator = ask("operator", "ops")
    await until(lambda: len(urls) == MAX_QUERIES, "the operator's queries are sent")
    release.set()
    await operator
    ended = await asyncio.gather(*asked, return_exceptions=True)
    assert {error.outcome for error in ended if isinstance(error, CallError)} == {Outcome.QUEUE_FULL}
    await until(lambda: not history._waiting, "nothing is left")
    await ask("caller", "acme")
