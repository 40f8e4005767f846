"""Isolation of tenants. A tenant learns nothing about another tenant's name, models, errors, queue positions, usage or
cached prefixes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat, complete, refused
from tests.support.cluster import sim_engine, until
from tests.support.http import chat_body
from tests.support.keyed import Keyed, bearer, keyed_cluster

pytestmark = pytest.mark.slow

PROMPT = [7] * 200
DATED = ("date", "x-request-id")


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """Provide a gateway with keys and two models, `sim` and `secret`."""
    async with keyed_cluster(tmp_path_factory.mktemp("apart"), gateway="  keepalive_s: 0.2\n") as keyed:
        for model in ("sim", "secret"):
            await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1, max_num_seqs=4), bundle, model=model)
        yield keyed
        await keyed.cluster.until_idle()


def whole(error: grpc.aio.AioRpcError) -> tuple[Any, ...]:
    """Return everything that a client learns from an error, except for the request id."""
    trailers = sorted((k, v) for k, v in error.trailing_metadata() or () if k != "x-request-id")
    return error.code(), error.details(), trailers


async def error_of(awaitable: Any) -> tuple[Any, ...]:
    """Return the error of a call, which must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return whole(caught.value)


def alike(told: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """Return the error with `name` replaced by `secret`. Both have six letters."""
    code, details, trailers = told
    plain = [(k, v.replace(name.encode(), b"secret") if isinstance(v, bytes) else v) for k, v in trailers]
    return code, details.replace(name, "secret"), plain


@pytest.mark.parametrize("method", ["Chat", "Complete", "Tokenize", "Detokenize", "GetModel"])
async def test_a_forbidden_model_is_an_unknown_one_over_grpc(keyed: Keyed, method: str) -> None:
    """Over gRPC, a forbidden model and an unknown model give the same code, message and trailers, byte by byte, for
    every method."""
    key = await keyed.key(f"grpc-{method.lower()}", models=["sim"])
    requests: dict[str, Any] = {
        "Chat": lambda name: chat(model=name),
        "Complete": lambda name: complete(model=name),
        "Tokenize": lambda name: pb.TokenizeRequest(model=name, text="x"),
        "Detokenize": lambda name: pb.DetokenizeRequest(model=name, token_ids=[1]),
        "GetModel": lambda name: pb.GetModelRequest(name=name),
    }
    call = getattr(keyed.cluster.stub, method)
    forbidden = await error_of(call(requests[method]("secret"), metadata=bearer(key)))
    unknown = await error_of(call(requests[method]("nosuch"), metadata=bearer(key)))
    assert forbidden[0] is grpc.StatusCode.NOT_FOUND
    assert forbidden == alike(unknown, "nosuch")


async def test_a_forbidden_model_is_an_unknown_one_over_http(keyed: Keyed) -> None:
    """Over HTTP, a forbidden model and an unknown model give the same status, headers and body, byte by byte."""
    key = await keyed.key("http-forbidden", models=["sim"])
    for path, body in (("/v1/chat/completions", True), ("/v1/models/{}", False)):
        replies = [
            await keyed.fetch(path.format(name), chat_body(model=name) if body else None, key=key)
            for name in ("secret", "nosuch")
        ]
        heads = [{k: v for k, v in r.headers.items() if k not in DATED} for r in replies]
        assert replies[0].status == replies[1].status == 404
        assert heads[0] == heads[1]
        assert replies[0].body == replies[1].body.replace(b"nosuch", b"secret")


async def test_a_failed_model_tells_only_its_users(keyed: Keyed) -> None:
    """The reason why a model failed is shown only to callers that may use the model; for other callers the model is
    unknown."""
    key = await keyed.key("not-of-failed", models=["sim"])
    entry = CatalogEntry(name="broken", state=ModelState.FAILED, state_reason="acme's weights are gone")
    keyed.gateway.directory.apply_catalog([*(m.entry for m in keyed.gateway.directory.models), entry])
    try:
        answer = await refused(keyed.cluster.stub.Chat(chat(model="broken"), metadata=bearer(key)))
        assert (answer.reason, "gone" in answer.message) == ("MODEL_NOT_FOUND", False)
    finally:
        keyed.gateway.directory.apply_catalog([m.entry for m in keyed.gateway.directory.models if m.name != "broken"])


async def test_only_ones_own_models_are_listed(keyed: Keyed) -> None:
    """Lists of models show only the models that the tenant may use, over both APIs and on every page. The page tokens
    do not reveal any other model either."""
    key = await keyed.key("lists", models=["sim"])
    stub = keyed.cluster.stub
    found = await stub.ListModels(pb.ListModelsRequest(page_size=1), metadata=bearer(key))
    assert ([m.name for m in found.models], found.next_page_token) == (["sim"], "")
    reply = await keyed.fetch("/v1/models", key=key)
    assert [card["id"] for card in reply.json["data"]] == ["sim"]
    assert b"secret" not in reply.body


async def test_no_answer_names_another_tenant(keyed: Keyed) -> None:
    """No response and no error contains the name of another tenant."""
    await keyed.key("the-neighbour")
    key = await keyed.key("curious", models=["sim"])
    shown = [
        await keyed.fetch("/v1/models", key=key),
        await keyed.fetch("/v1/models/the-neighbour", key=key),
        await keyed.fetch("/v1/chat/completions", chat_body(model="sim"), key=key),
        await keyed.fetch("/v1/chat/completions", chat_body(temperature=9), key=key),
        await keyed.fetch("/v1/models", key="hr_k_the"),
    ]
    texts = [str(reply.headers).encode() + reply.body for reply in shown]
    texts[1] = texts[1].replace(b"model 'the-neighbour' does", b"")  # the tenant's own word
    assert not [text for text in texts if b"the-neighbour" in text]


async def test_another_tenants_prefix_is_never_hit(keyed: Keyed) -> None:
    """Only the tenant that sent a prompt, and the tenants of its cache group, get cache hits for the prompt. A tenant
    that sends another tenant's `cache_salt` gets none."""
    keys = {
        "warm": await keyed.key("warm"),
        "cold": await keyed.key("cold"),
        "warm-too": await keyed.key("warm-too", cache_group="both"),
        "group": await keyed.key("group", cache_group="both"),
    }
    request = pb.CompleteRequest(model="sim", prompt_token_ids=PROMPT, max_tokens=1, temperature=0)

    async def cached(tenant: str) -> int:
        answer = await keyed.cluster.stub.Complete(request, metadata=bearer(keys[tenant]))
        return answer.usage.cached_tokens

    assert await cached("warm") == 0
    assert await cached("warm") > 0
    assert await cached("cold") == 0
    assert await cached("warm-too") == 0
    assert await cached("group") > 0

    async def salted(tenant: str, salt: str) -> int:
        body = {"model": "sim", "prompt": PROMPT, "max_tokens": 1, "cache_salt": salt}
        reply = await keyed.fetch("/v1/completions", body, key=keys[tenant])
        details = reply.json["usage"].get("prompt_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)

    assert await salted("warm", "mine") == 0
    assert await salted("warm", "mine") > 0
    assert await salted("cold", "mine") == 0
    assert await salted("cold", keyed.door.cache_salt((await _principal(keyed, keys["warm"])), "")) == 0


async def _principal(keyed: Keyed, key: str) -> Any:
    from cluster.gateway.auth.authenticator import Credentials

    return await keyed.door.principal(Credentials((f"Bearer {key}",)))


async def test_workers_see_no_tenants_name(keyed: Keyed) -> None:
    """Workers get only a salt and a handle for a tenant, not the tenant's name. Salt and handle are derived from the
    cluster's secret and differ for each tenant."""
    who = [await _principal(keyed, await keyed.key(name)) for name in ("seen-one", "seen-two")]
    handles = {one.tenant.handle for one in who}
    salts = {keyed.door.cache_salt(one, "") for one in who}
    assert len(handles) == len(salts) == 2
    assert all(len(handle) == 32 and int(handle, 16) >= 0 for handle in handles)
    assert not [text for text in handles | salts if "seen" in text]


async def test_the_place_in_line_counts_ones_own(keyed: Keyed, bundle: Bundle) -> None:
    """Fifty queued calls of another tenant do not change a call's queue position. One queued call of the same tenant
    does."""
    busy, key = await keyed.key("busy"), await keyed.key("patient")
    entry = CatalogEntry(name="line", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=2048)
    keyed.gateway.directory.apply_catalog([*(m.entry for m in keyed.gateway.directory.models), entry])
    stub = keyed.cluster.stub
    others = [stub.StreamChat(chat(model="line"), metadata=bearer(busy)) for _ in range(50)]
    await until(lambda: keyed.gateway.scheduler.queues.waiting("line")[0] == 50, "the others wait")
    mine = []
    for number in (1, 2):
        mine.append(stub.StreamChat(chat(model="line"), metadata=bearer(key)))
        await until(lambda n=number: keyed.gateway.scheduler.queues.waiting("line")[0] == 50 + n, "it waits")  # type: ignore[misc]
    places = [(await asyncio.wait_for(read(call), 60)).progress.queue_position for call in mine]
    assert places == [1, 2]
    for call in (*others, *mine):
        call.cancel()
    await keyed.cluster.until_idle()
    keyed.gateway.directory.apply_catalog([m.entry for m in keyed.gateway.directory.models if m.name != "line"])


async def test_anothers_use_moves_none_of_ones_limits(keyed: Keyed) -> None:
    """Over both APIs, a tenant's remaining requests, tokens and budgets depend only on the tenant's own calls. A tenant
    that has used up its limit is refused, and the other tenant is not."""
    limits = {"requests_per_minute": 6, "tokens_per_minute": 5_000, "daily_tokens": 5_000}
    mine, other = await keyed.key("spares", limits=limits), await keyed.key("spends", limits=limits)

    async def left(key: str) -> tuple[int, int, int]:
        reply = await keyed.fetch("/v1/chat/completions", chat_body(model="sim", max_tokens=4), key=key)
        told = reply.headers
        return reply.status, int(told["x-ratelimit-remaining-requests"]), int(told["x-ratelimit-limit-tokens"])

    assert await left(mine) == (200, 5, 5_000)
    assert [(await left(other))[0] for _ in range(7)] == [200] * 6 + [429]
    assert await left(mine) == (200, 4, 5_000)
    answer = await refused(keyed.cluster.stub.Chat(chat(model="sim"), metadata=bearer(other)))
    assert answer.reason == "RATE_LIMITED"
    assert "spares" not in answer.message


async def test_ones_usage_is_ones_own(keyed: Keyed) -> None:
    """The usage in an answer does not depend on concurrent calls of other tenants. No path of the client ports reveals
    usage, tenants or metrics."""
    mine, other = await keyed.key("counts"), await keyed.key("counted")
    request = pb.CompleteRequest(model="sim", prompt_token_ids=[9] * 50, max_tokens=5, temperature=0, ignore_eos=True)
    alone = (await keyed.cluster.stub.Complete(request, metadata=bearer(mine))).usage
    noise = [keyed.cluster.stub.Complete(request, metadata=bearer(other)) for _ in range(20)]
    beside = (await keyed.cluster.stub.Complete(request, metadata=bearer(mine))).usage
    await asyncio.gather(*noise)
    for usage in (alone, beside):
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (50, 5, 55)
    for path in ("/metrics", "/v1/usage", "/v1/organization/usage/completions", "/v1/tenants", "/admin", "/v1/audit"):
        reply = await keyed.fetch(path, key=mine)
        assert reply.status == 404
        assert b"counted" not in reply.body


async def test_the_metrics_port_is_another_one(keyed: Keyed) -> None:
    """Metrics, which name tenants, are served on a separate port, on loopback by default, and not on the client
    ports."""
    where = keyed.gateway.endpoints
    assert len({where[name] for name in ("metrics", "grpc", "http", "link", "admin")}) == 5
    defaults = keyed.gateway.config.gateway.listen.__class__()
    assert defaults.metrics.startswith("127.0.0.1:")
    key = await keyed.key("scrapes")
    assert (await keyed.fetch("/metrics", key=key)).status == 404
    assert (await keyed.fetch("/metrics")).status in (401, 404)


async def test_no_time_tells_of_anothers_prefix(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A prompt takes 0.2 s to compute. A second call with the same prompt is fast for the same tenant. For another
    tenant it is as slow as the first call."""
    async with keyed_cluster(tmp_path) as slow:
        engine = sim_engine(checkpoint, decode_ms=1, prefill_tokens_per_s=5000, max_num_seqs=4)
        await slow.cluster.add_worker(engine, bundle)
        owner, curious = await slow.key("owner"), await slow.key("curious")
        prompt = [11 + number % 90 for number in range(1000)]
        request = pb.CompleteRequest(model="sim", prompt_token_ids=prompt, max_tokens=1, temperature=0)

        async def ttft_ms(key: str) -> int:
            return (await slow.cluster.stub.Complete(request, metadata=bearer(key))).usage.ttft_ms

        first, again, others = await ttft_ms(owner), await ttft_ms(owner), await ttft_ms(curious)
        assert first >= 200
        assert again < 150
        assert others >= 200
