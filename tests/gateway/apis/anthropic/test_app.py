"""Anthropic's Messages API through a real gateway with the simulated engine, called by the official client and by raw
requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.wire.bundle import Bundle
from tests.gateway.apis.anthropic.test_stream import events_of, joined
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.http import Wire, chat_body, fetch, message_body

pytestmark = pytest.mark.slow

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
CHAT = "/v1/chat/completions"
USE = {"type": "tool_use", "id": "toolu_abc123XYZ", "name": "f", "input": {"x": 1}}
TOOL = {"name": "f", "input_schema": {"type": "object"}}


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Start a gateway with a worker, for the whole module."""
    async with running_cluster(tmp_path_factory.mktemp("messages")) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        yield cluster
        await cluster.until_idle()


def client(cluster: TestCluster) -> anthropic.AsyncAnthropic:
    """Return the official anthropic client, without retries."""
    base_url = f"http://{cluster.gateway.endpoints['http']}"
    return anthropic.AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0)


def official(body: dict[str, Any]) -> Any:
    """Return a body as arguments of the official client. The temperature is sent as an extra field, since the client
    has no argument for it."""
    named = {name: body[name] for name in body if name != "temperature"}
    return {**named, "extra_body": {"temperature": body["temperature"]}}


async def test_the_official_client_gets_the_text_of_openais_api(busy: TestCluster) -> None:
    """Whole and streamed answers to the official client have the same text and usage as over OpenAI's API."""
    expected = (await fetch(busy, CHAT, chat_body(max_tokens=40))).json
    body = official(message_body(max_tokens=40))
    async with client(busy) as ai:
        whole = await ai.messages.create(**body)
        async with ai.messages.stream(**body) as stream:
            text = "".join([text async for text in stream.text_stream])
            final = await stream.get_final_message()
    block = whole.content[0]
    assert block.type == "text"
    assert block.text == text == expected["choices"][0]["message"]["content"] != ""
    assert (whole.role, whole.model, whole.type, whole.id[:4]) == ("assistant", "sim", "message", "msg_")
    reason = {"length": "max_tokens", "stop": "end_turn"}[expected["choices"][0]["finish_reason"]]
    assert (whole.stop_reason, final.stop_reason) == (reason, reason)
    assert final.content[0].to_dict() == block.to_dict()
    assert whole.usage.output_tokens == final.usage.output_tokens == expected["usage"]["completion_tokens"]


async def test_the_count_is_that_of_the_call(busy: TestCluster) -> None:
    """count_tokens returns as many tokens as a call with the same prompt reports for its prompt, cached tokens
    included. The first event of a stream reports the same prompt counts as the last event."""
    fields: dict[str, Any] = {"system": "Be brief.", "tools": [TOOL], "tool_choice": {"type": "none"}, "max_tokens": 2}
    fields["messages"] = [
        {"role": "user", "content": "How much is it? " * 20},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, USE]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": USE["id"], "content": "42"}]},
    ]
    counted = (await fetch(busy, COUNT, {"model": "sim", **fields})).json
    async with client(busy) as ai:
        named = {name: fields[name] for name in fields if name != "max_tokens"}
        assert (await ai.messages.count_tokens(model="sim", **named)).to_dict() == counted
    shown: list[dict[str, int]] = []
    for stream in (False, True, True):
        reply = await fetch(busy, MESSAGES, {"model": "sim", **fields, "stream": stream})
        if stream:
            events = events_of(reply.body)
            start, end = events[0]["message"]["usage"], events[-2]["usage"]
            assert {**end, "output_tokens": start["output_tokens"]}.items() >= start.items()
            shown.append(end)
        else:
            shown.append(reply.json["usage"])
    for usage in shown:
        assert usage["cache_creation_input_tokens"] == 0
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == counted["input_tokens"]
    assert shown[-1]["cache_read_input_tokens"] > 0


async def test_the_bytes_of_a_stream(busy: TestCluster) -> None:
    """A stream has one event for each token, in Anthropic's order. The events add up to the message of the whole
    answer."""
    body = message_body(max_tokens=30, stream=True)
    wire = await Wire.open(busy)
    wire.ask(MESSAGES, body)
    reply = await wire.reply()
    assert (reply.status, reply.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert all(chunk.startswith(b"event: ") and chunk.endswith(b"\n\n") for chunk in reply.chunks)
    events = events_of(reply.body)
    assert sum(event["type"] == "content_block_delta" for event in events) > 10
    streamed, whole = joined(events), (await fetch(busy, MESSAGES, {**body, "stream": False})).json
    for message in (streamed, whole):
        del message["id"], message["usage"]["input_tokens"], message["usage"]["cache_read_input_tokens"]
    assert streamed == whole
    wire.ask("/health")
    assert (await wire.reply()).json == {"status": "ok"}, "the connection stays usable after a stream"
    await wire.close()


async def test_tokens_take_the_short_way(busy: TestCluster) -> None:
    """Tokens of a streamed text are written directly from the worker's link to the client's connection."""
    wire = await Wire.open(busy)
    wire.ask(MESSAGES, message_body(max_tokens=400, stream=True))
    service = busy.gateway.service
    await until(lambda: any(s.direct is not None for call in service.calls for s in call.sequences), "tokens go direct")
    await wire.close()
    await busy.until_idle(2)


async def test_the_messages_are_those_of_openais_api(busy: TestCluster) -> None:
    """A conversation with tool calls and results gives the same prompt as over OpenAI's API. If its last message is an
    unfinished answer, that answer is continued."""
    call = {"id": "abc123XYZ", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = {"role": "user", "content": "Hi"}
    asked = {"role": "assistant", "content": [USE]}
    told = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": USE["id"], "content": "42"}]}
    begun = [said, {"role": "assistant", "content": "Well"}]
    same_asked = {"role": "assistant", "content": None, "tool_calls": [call]}
    same_told = {"role": "tool", "tool_call_id": "abc123XYZ", "content": "42"}
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    cases: list[tuple[list[Any], dict[str, Any]]] = [
        (parts, {"messages": parts}),
        ([said, asked, told], {"messages": [said, same_asked, same_told]}),
        (begun, {"messages": begun, "continue_final_message": True}),
    ]
    for messages, same in cases:
        expected = (await fetch(busy, CHAT, {**chat_body(), **same})).json
        answer = (await fetch(busy, MESSAGES, message_body(messages=messages))).json
        usage = answer["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected["usage"]["prompt_tokens"]
        assert answer["content"] == [{"type": "text", "text": expected["choices"][0]["message"]["content"]}]


async def test_a_large_body_is_read_by_a_helper(busy: TestCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body with thousands of values is parsed in a helper process, with the same result as a small body."""
    small = message_body(tools=[TOOL], tool_choice={"type": "none"}, thinking={"type": "disabled"})
    small["system"] = [{"type": "text", "text": "Be brief."}]
    large = {**small, "ignored": [[]] * 20_000}
    pool = busy.gateway.service.bodies.pool
    monkeypatch.setattr(pool, "patience_s", 60)  # the helper's start may wait for a core that long
    for path in (COUNT, MESSAGES):
        replies = [await fetch(busy, path, body) for body in (small, large)]
        shown = [reply.json if path == COUNT else reply.json["content"] for reply in replies]
        assert shown[0] == shown[1]
    assert pool.pids


async def test_silence_is_broken_by_pings(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A stream gets a ping after every keepalive_s seconds of silence, and the official client ignores pings."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  keepalive_s: 0.05")
    async with running_cluster(tmp_path, config) as cluster:
        entry = CatalogEntry("sim", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=256)
        cluster.gateway.worker_events.apply_catalog([entry])
        await asyncio.to_thread(bundle.save, tmp_path / "bundles" / bundle.digest.replace(":", "-"))
        wire = await Wire.open(cluster)
        wire.ask(MESSAGES, message_body(max_tokens=3, stream=True))
        assert (await wire.head())[0] == 200
        assert (await wire.chunk()).endswith(b'event: ping\ndata: {"type":"ping"}\n\n')
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=150), bundle)
        chunks = []
        while chunk := await wire.chunk():
            chunks.append(chunk)
        first = next(i for i, chunk in enumerate(chunks) if b"message_start" in chunk)
        assert any(b"event: ping" in chunk for chunk in chunks[first:])
        assert chunks[-1].endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
        await wire.close()
        async with client(cluster) as ai, ai.messages.stream(**_short()) as stream:
            assert (await stream.get_final_message()).usage.output_tokens == 2


def _short() -> Any:
    return {"model": "sim", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi"}]}


async def test_a_client_gone_frees_its_place(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The call of a client that disconnects leaves the engine at once, whether the answer is streamed or whole."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    for stream in (True, False):
        wire = await Wire.open(cluster)
        wire.ask(MESSAGES, message_body(max_tokens=3000, stream=stream))
        await until(lambda: any(c.first_token_at is not None for c in cluster.gateway.service.calls), "tokens come")
        await wire.close()
        await cluster.until_idle(2)


async def test_models(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A request with the header anthropic-version gets the list of models in Anthropic's form, with pages. Any other
    request gets the list in OpenAI's form."""
    entries = [CatalogEntry(f"m{i}", state=ModelState.LOADING, max_model_len=256) for i in range(3)]
    cluster.gateway.worker_events.apply_catalog([*entries, CatalogEntry("Org/Sim", aliases=("default",))])
    async with client(cluster) as ai:
        models = [model async for model in ai.models.list(limit=2)]
        assert (await ai.models.retrieve("default")).id == "Org/Sim"
        assert (await ai.models.retrieve("Org/Sim")).display_name == "Org/Sim"
        with pytest.raises(anthropic.NotFoundError):
            await ai.models.retrieve("nope")
    assert sorted(model.id for model in models) == ["Org/Sim", "m0", "m1", "m2"]
    assert models[0].type == "model"
    assert (await fetch(cluster, "/v1/models")).json["object"] == "list"
    wrong = await fetch(cluster, "/v1/models?limit=0", anthropic_version="2023-06-01")
    assert (wrong.status, wrong.json["error"]["type"]) == (400, "invalid_request_error")
    assert json.loads(wrong.body)["error"]["message"].startswith("limit: ")


async def test_models_by_lifecycle(cluster: TestCluster) -> None:
    """All models are active, so the list of any other lifecycle stage is empty. An unknown stage is refused by name."""
    cluster.gateway.worker_events.apply_catalog([CatalogEntry("m0", state=ModelState.LOADING)])
    async with client(cluster) as ai:
        assert [model.id async for model in ai.models.list(lifecycle=["retired", "active"])] == ["m0"]
        assert [model.id async for model in ai.models.list(lifecycle=["deprecated"])] == []
    wrong = await fetch(cluster, "/v1/models?lifecycle=old", anthropic_version="2023-06-01")
    assert wrong.status == 400
    assert wrong.json["error"]["message"].startswith("lifecycle: must be one of active, deprecated, retired; got ")
