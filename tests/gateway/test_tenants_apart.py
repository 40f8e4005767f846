"""A tenant learns nothing of another: names, models, errors, places in line, usage, a shared prefix's cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.bundle import Bundle
from cluster.api.types import CatalogEntry, ModelState
from cluster.link.dial import read
from cluster.v1 import inference_pb2 as pb
from tests.support.calls import chat, complete, refused
from tests.support.cluster import sim_engine, until
from tests.support.http import chat_body
from tests.support.keyed import Keyed, bearer, keyed_cluster

PROMPT = [7] * 200
DATED = ("date", "x-request-id")


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Keyed]:
    """A gateway with keys and two models, `sim` and `secret`."""
    async with keyed_cluster(tmp_path_factory.mktemp("apart"), gateway="  keepalive_s: 0.2\n") as keyed:
        for model in ("sim", "secret"):
            await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1, max_num_seqs=4), bundle, model=model)
        yield keyed
        await keyed.cluster.until_idle()


def whole(error: grpc.aio.AioRpcError) -> tuple[Any, ...]:
    """All that a client is told by an error, but for its request id."""
    trailers = sorted((k, v) for k, v in error.trailing_metadata() or () if k != "x-request-id")
    return error.code(), error.details(), trailers


async def error_of(awaitable: Any) -> tuple[Any, ...]:
    """What a call that must fail tells."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return whole(caught.value)


def alike(told: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """With a name of six letters in place of another."""
    code, details, trailers = told
    plain = [(k, v.replace(name.encode(), b"secret") if isinstance(v, bytes) else v) for k, v in trailers]
    return code, details.replace(name, "secret"), plain


@pytest.mark.parametrize("method", ["Chat", "Complete", "Tokenize", "Detokenize", "GetModel"])
async def test_a_forbidden_model_is_an_unknown_one_over_grpc(keyed: Keyed, method: str) -> None:
    """Code, message and every trailer are the same to the byte, whichever method asks."""
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
    """Status, headers and body are the same to the byte."""
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
    """Why a model does not run is for those who may use it; for others it is unknown, not failed."""
    key = await keyed.key("not-of-failed", models=["sim"])
    entry = CatalogEntry(name="broken", state=ModelState.FAILED, state_reason="acme's weights are gone")
    keyed.gateway.directory.catalog([*(m.entry for m in keyed.gateway.directory.models), entry])
    try:
        answer = await refused(keyed.cluster.stub.Chat(chat(model="broken"), metadata=bearer(key)))
        assert (answer.reason, "gone" in answer.message) == ("MODEL_NOT_FOUND", False)
    finally:
        keyed.gateway.directory.catalog([m.entry for m in keyed.gateway.directory.models if m.name != "broken"])


async def test_only_ones_own_models_are_listed(keyed: Keyed) -> None:
    """Over both faces, by page too: neither a name nor a page's token tells of another model."""
    key = await keyed.key("lists", models=["sim"])
    stub = keyed.cluster.stub
    found = await stub.ListModels(pb.ListModelsRequest(page_size=1), metadata=bearer(key))
    assert ([m.name for m in found.models], found.next_page_token) == (["sim"], "")
    reply = await keyed.fetch("/v1/models", key=key)
    assert [card["id"] for card in reply.json["data"]] == ["sim"]
    assert b"secret" not in reply.body


async def test_no_answer_names_another_tenant(keyed: Keyed) -> None:
    """Of all that a caller is shown, errors too, nothing holds the name of another tenant."""
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
    texts[1] = texts[1].replace(b"model 'the-neighbour' does", b"")  # its own word
    assert not [text for text in texts if b"the-neighbour" in text]


async def test_another_tenants_prefix_is_never_hit(keyed: Keyed) -> None:
    """The same prompt is cached for the tenant that sent it, and for one of its cache group; for nobody else, not
    even where a client sends the other's salt."""
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
    assert await salted("cold", keyed.door.salt((await _principal(keyed, keys["warm"])), "")) == 0


async def _principal(keyed: Keyed, key: str) -> Any:
    from cluster.gateway.door import Shown

    return await keyed.door.principal(Shown((f"Bearer {key}",)))


async def test_workers_see_no_tenants_name(keyed: Keyed) -> None:
    """What goes to them is a salt and a handle of the cluster's secret, different for each tenant."""
    who = [await _principal(keyed, await keyed.key(name)) for name in ("seen-one", "seen-two")]
    handles = {one.tenant.handle for one in who}
    salts = {keyed.door.salt(one, "") for one in who}
    assert len(handles) == len(salts) == 2
    assert all(len(handle) == 32 and int(handle, 16) >= 0 for handle in handles)
    assert not [text for text in handles | salts if "seen" in text]


async def test_the_place_in_line_counts_ones_own(keyed: Keyed, bundle: Bundle) -> None:
    """Fifty of another tenant that wait before it do not move it; one of its own does."""
    busy, key = await keyed.key("busy"), await keyed.key("patient")
    entry = CatalogEntry(name="line", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=2048)
    keyed.gateway.directory.catalog([*(m.entry for m in keyed.gateway.directory.models), entry])
    stub = keyed.cluster.stub
    others = [stub.StreamChat(chat(model="line"), metadata=bearer(busy)) for _ in range(50)]
    await until(lambda: keyed.gateway.dispatcher.waiting("line")[0] == 50, "the others wait")
    mine = []
    for number in (1, 2):
        mine.append(stub.StreamChat(chat(model="line"), metadata=bearer(key)))
        await until(lambda n=number: keyed.gateway.dispatcher.waiting("line")[0] == 50 + n, "it waits")  # type: ignore[misc]
    places = [(await asyncio.wait_for(read(call), 5)).progress.queue_position for call in mine]
    assert places == [1, 2]
    for call in (*others, *mine):
        call.cancel()
    await keyed.cluster.until_idle()
    keyed.gateway.directory.catalog([m.entry for m in keyed.gateway.directory.models if m.name != "line"])
