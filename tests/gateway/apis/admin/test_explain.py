"""Explanations of calls by a real gateway with simulated engines: the chosen worker, the reason, and the outcome."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.admin.v1 import admin_pb2, usage_pb2
from cluster.admin.v1 import routing_pb2 as pb
from cluster.api.types import PREFIX_EXACT
from cluster.gateway.apis.admin.routes import RememberedRoutes, _hide_places, why
from cluster.policy.routing.route_history import Route, RoutedCall, RouteHistory
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.admin import AdminClient, role_key, until_known
from tests.support.calls import chat, complete, rest_of
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.keyed import bearer, eventually, keyed_cluster

BLOCK = 16
PREDICTED, MISPREDICTED = "prefix_predicted_tokens_total", "prefix_mispredicted_tokens_total"


def prompt(number: int, tokens: int = 40 * BLOCK) -> list[int]:
    """Return a prompt of `tokens` token ids. Prompts of different numbers have no KV block in common."""
    return [100 + (number * 7919 + at * (number + 3)) % 600 for at in range(tokens)]


async def send(cluster: TestCluster, ids: list[int], request_id: str, key: str = "") -> Any:
    """Send a completion request with the token ids of a prompt, a request id and an API key."""
    request = complete("", prompt_token_ids=ids, max_tokens=4, ignore_eos=True)
    metadata = (("x-request-id", request_id), *(bearer(key) if key else ()))
    return await cluster.stub.Complete(request, metadata=metadata)


async def explained(admin: AdminClient, request_id: str, parent: str = "") -> Any:
    """Return the only call with a request id."""
    request = pb.ExplainRequestRequest(request_id=request_id, parent=parent)
    (call,) = (await admin.ask("Fleet.ExplainRequest", request)).calls
    return call


async def add_workers(cluster: TestCluster, checkpoint: Path, bundle: Bundle, count: int, **more: Any) -> list[Worker]:
    """Start `count` workers. `more`: parameters of the simulated engine, and `without`, a capability that is
    removed."""
    without, workers = more.pop("without", ""), []
    for _ in range(count):
        engine = sim_engine(checkpoint, block_size=BLOCK, **{"decode_ms": 1, **more})
        info = await engine.start()
        capabilities = tuple(word for word in info.capabilities if word != without)
        info = replace(info, capabilities=capabilities)
        workers.append(await cluster.add_worker(engine, bundle, info=info, pod="gpu-0", host="ip-10-0-3-7"))
    return workers


def counted(cluster: TestCluster, name: str) -> dict[tuple[str, ...], float]:
    """Return the values of a counter by their label values."""
    return dict(cluster.gateway.metrics._counters.get(name, {}))


@pytest.mark.parametrize("without", ["", PREFIX_EXACT])
async def test_a_cached_prefix_is_predicted_and_found(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, without: str
) -> None:
    """The explanation names each worker with its scores and cached tokens, the reason of the choice, and the cached
    tokens that the engine found. The prediction of cached tokens is marked as approximate if the model has layers
    without full attention."""
    state = "approximate" if without else "exact"
    async with running_cluster(tmp_path) as cluster:
        await add_workers(cluster, checkpoint, bundle, 3, without=without)
        async with AdminClient(cluster.gateway.endpoints["admin"]) as admin:
            ids, known = prompt(0), cluster.gateway.scheduler.worker_caches
            await until(lambda: len(known._indexes) == 1, "the workers have reported")
            answer = await send(cluster, ids, "first")
            first = await explained(admin, "first")
            (route,) = first.routes
            assert (first.id, first.tenant, first.model, first.outcome) == (answer.id, "default", "sim", "ok")
            assert (route.pod, route.node) == ("gpu-0", "ip-10-0-3-7")
            assert (route.reason, route.predicted_cached_tokens, route.cached_tokens) == ("least_loaded", 0, 0)
            assert 0 <= route.after_s <= route.after_s + route.first_output_s <= first.duration_s
            assert (await explained(admin, answer.id)).request_id == "first"

            await send(cluster, [*ids, *range(100, 140)], "second")
            (again,) = (await explained(admin, "second")).routes
            assert (again.worker, again.reason, again.prediction) == (route.worker, "cached_prefix", state)
            assert again.predicted_cached_tokens == again.cached_tokens == 40 * BLOCK
            assert again.candidates[0].worker == again.worker
            assert {each.worker: each.cached_tokens for each in again.candidates} == {
                worker.identity.worker_id: 40 * BLOCK if worker.identity.worker_id == again.worker else 0
                for worker in cluster.workers
            }
            assert all(len(each.parts) > 1 for each in again.candidates)
            assert f"{again.worker} held {'about ' if without else ''}640 of the 680 prompt tokens" in again.why
        assert counted(cluster, PREDICTED) == {("sim", state): 40 * BLOCK}
        assert counted(cluster, MISPREDICTED) == {("sim", state): 0}


async def test_what_was_not_predicted(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call with a short prompt, or with only one worker, has no prediction and is not counted as predicted. If two
    calls have the same request id, the explanation lists both in order. An unknown id is refused, and the error says
    how long calls are kept."""
    async with running_cluster(tmp_path) as cluster, AdminClient(cluster.gateway.endpoints["admin"]) as admin:
        (alone,) = await add_workers(cluster, checkpoint, bundle, 1)
        await send(cluster, prompt(0), "alone")
        (route,) = (await explained(admin, "alone")).routes
        assert (route.prediction, route.HasField("predicted_cached_tokens"), route.reason) == ("", False, "only_choice")
        assert route.why == f"{alone.identity.worker_id} was the only worker that could take the call."
        await add_workers(cluster, checkpoint, bundle, 1)
        await send(cluster, prompt(1, 40), "twice")
        await send(cluster, prompt(1, 40), "twice")
        calls = (await admin.ask("Fleet.ExplainRequest", pb.ExplainRequestRequest(request_id="twice"))).calls
        assert [call.routes[0].prediction for call in calls] == ["", ""]
        assert calls[0].arrived_at_s <= calls[1].arrived_at_s
        assert calls[1].routes[0].cached_tokens in (0, 2 * BLOCK)
        assert counted(cluster, PREDICTED) == {}
        refusal = await admin.refused("Fleet.ExplainRequest", pb.ExplainRequestRequest(request_id="unknown"))
        assert (refusal.code.name, "now those of the last" in refusal.message) == ("NOT_FOUND", True)
        empty = await admin.refused("Fleet.ExplainRequest", pb.ExplainRequestRequest())
        assert empty.reason == "INVALID_FIELD"


async def test_each_resume_adds_a_decision(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call that loses its worker is resumed, and its explanation then has a second route with the reason `lost`."""
    async with running_cluster(tmp_path) as cluster, AdminClient(cluster.gateway.endpoints["admin"]) as admin:
        workers = await add_workers(cluster, checkpoint, bundle, 2, decode_ms=5)
        stream = cluster.stub.StreamChat(chat(max_tokens=100, ignore_eos=True), metadata=(("x-request-id", "r"),))
        assert await read(stream) is not None
        call = await explained(admin, "r")
        assert (call.outcome, len(call.routes), call.routes[0].again) == ("", 1, "")
        (lost,) = [worker for worker in workers if worker.identity.worker_id == call.routes[0].worker]
        next(link for link in cluster.gateway.hub.links if link.identity == lost.identity).close("the test ends it")
        await rest_of(stream)
        call = await explained(admin, "r")
        first, second = call.routes
        assert (first.sequence, second.sequence, second.again, call.outcome) == (0, 0, "lost", "ok")
        assert second.tokens > first.tokens
        assert second.HasField("cached_tokens")
        assert second.why.startswith("The worker before was lost. ")


async def test_a_tenant_sees_its_own_calls_without_workers(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A tenant administrator gets explanations of the calls of its own tenant, without scores and without names of
    workers and gateways. For another tenant's call it gets the same error as for an unknown call. The usage record of a
    call has the same numbers as the explanation."""
    async with keyed_cluster(tmp_path) as keyed:
        await add_workers(keyed.cluster, checkpoint, bundle, 2)
        keys = {tenant: await keyed.key(tenant) for tenant in ("acme", "rival")}
        roles = {role: await role_key(keyed.ledger, "acme", role) for role in ("tenant_admin", "viewer", "operator")}
        address = keyed.gateway.endpoints["admin"]
        caches = keyed.gateway.scheduler.worker_caches
        await until(lambda: len(caches._indexes) == 1, "the workers have reported")
        for number, tenant in enumerate(("acme", "rival")):
            await send(keyed.cluster, prompt(number), "shared", keys[tenant])
            await send(keyed.cluster, prompt(number), f"of-{tenant}", keys[tenant])
        async with (
            AdminClient(address, roles["tenant_admin"]) as owner,
            AdminClient(address, roles["viewer"]) as viewer,
            AdminClient(address, roles["operator"]) as operator,
        ):
            await until_known(owner, "Usage.Query", usage_pb2.QueryUsageRequest())
            for client in (viewer, operator):
                await until_known(client, "Catalog.List", admin_pb2.ListRequest())
                both = (await client.ask("Fleet.ExplainRequest", pb.ExplainRequestRequest(request_id="shared"))).calls
                assert [call.tenant for call in both] == ["acme", "rival"]
                assert (await explained(client, "shared", "tenants/rival")).routes[0].worker
            hidden, shown = await explained(owner, "of-acme"), await explained(operator, "of-acme")
            assert (await explained(owner, "shared")).tenant == "acme"
            (route,), (whole,) = hidden.routes, shown.routes
            assert (hidden.gateway, route.worker, len(route.candidates)) == ("", "", 0)
            assert (route.compared, route.reason, route.predicted_cached_tokens) == (2, "cached_prefix", 39 * BLOCK)
            text = str(hidden)
            names = [worker.identity.worker_id for worker in keyed.cluster.workers]
            assert not [name for name in (*names, keyed.gateway.hub.gateway_id) if name in text]
            foreign, absent = [
                await owner.refused("Fleet.ExplainRequest", pb.ExplainRequestRequest(request_id=name))
                for name in ("of-rival", "of-ghost")
            ]
            assert (foreign.code.name, foreign.message.replace("rival", "ghost")) == ("NOT_FOUND", absent.message)
            by_name = pb.ExplainRequestRequest(request_id="shared", parent="tenants/rival")
            assert (await owner.refused("Fleet.ExplainRequest", by_name)).code.name == "NOT_FOUND"

            async def recorded() -> Any:
                pages = await operator.ask("Usage.Export", usage_pb2.ExportUsageRequest(parent="tenants/acme"))
                return {row.request_id: row for page in pages for row in page.records}.get("of-acme")

            await eventually(recorded, "the usage record is in the database")
            row = await recorded()
            assert (row.worker, row.gateway) == (whole.worker, shown.gateway)
            assert (row.predicted_cached_tokens, row.cached_tokens) == (39 * BLOCK, 39 * BLOCK)


@pytest.mark.parametrize(
    ("reason", "again", "words"),
    [
        ("cached_prefix", "", "w1 held 640 of the 700 prompt tokens in its KV cache, and was the best"),
        (
            "least_loaded",
            "moved",
            "The worker before was draining. w1 had the least load of the workers",
        ),
        ("only_choice", "", "w1 was the only worker that could take the call."),
        ("round_robin", "", "w1 was chosen by the rule round robin."),
    ],
)
def test_the_reason_in_words(reason: str, again: str, words: str) -> None:
    """The explanation of a route names the reason for the choice of the worker, another worker that held more of the
    prompt, and the filters that excluded workers."""
    route = pb.ExplainedRoute(
        worker="w1", reason=reason, again=again, tokens=700, prediction="exact", predicted_cached_tokens=640
    )
    route.candidates.add(worker="w1", cached_tokens=640)
    route.candidates.add(worker="w2", cached_tokens=320)
    route.candidates.add(worker="w3", cached_tokens=656, dropped="draining")
    route.compared, route.dropped["draining"] = 3, 1
    text = why(route)
    assert text.startswith(words)
    assert text.endswith("w3 held 656, but was dropped (draining). Dropped: 1 draining.")


def test_a_wait_for_the_holder_in_words() -> None:
    """The explanation says how long a call waited for the worker that held its prompt, and whether another worker got
    the call. A caller of one tenant sees the wait without the worker's name."""
    history = RouteHistory()
    remembered = RememberedRoutes(history, "g", clock=lambda: 2.0)
    call = RoutedCall("c", "c", "r", "t", "m", 0.0)
    for sequence, worker in enumerate(("w1", "w2")):
        history.add(call, Route(sequence, 1.5, worker, "least_loaded", 700, awaited="w1", wait_s=1.25), 2)
    found = remembered.find(pb.ExplainRequestRequest(request_id="r")).calls[0]
    held = "The call waited 1.25 s for w1, which held its prompt but had no room"
    assert [why(route).partition(". ")[0] for route in found.routes] == [held, f"{held}, in vain"]
    _hide_places(found)
    assert [why(route).partition(". ")[0] for route in found.routes] == [
        "The call waited 1.25 s for a worker with its prompt"
    ] * 2
    assert "w1" not in str(found)


async def test_concurrent_calls_are_kept_apart(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """ExplainRequest returns one route (the choice of a worker) for each output of a call. Routes of concurrent calls
    are not mixed up."""
    async with running_cluster(tmp_path) as cluster, AdminClient(cluster.gateway.endpoints["admin"]) as admin:
        await add_workers(cluster, checkpoint, bundle, 2)
        requests = [chat(max_tokens=3, n=1 + number % 3, ignore_eos=True) for number in range(12)]
        await asyncio.gather(
            *(
                cluster.stub.Chat(request, metadata=(("x-request-id", f"r{number}"),))
                for number, request in enumerate(requests)
            )
        )
        for number, request in enumerate(requests):
            call = await explained(admin, f"r{number}")
            assert sorted(route.sequence for route in call.routes) == list(range(request.n))
            assert all(route.HasField("first_output_s") for route in call.routes)
