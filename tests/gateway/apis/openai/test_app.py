"""OpenAI's API over HTTP through a real gateway with the simulated engine, called by the official client and by raw
requests."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.text.tokenizer import TextModel
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, complete
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.http import Wire, chat_body, client, completion_body, fetch

pytestmark = pytest.mark.slow

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Start a gateway with a worker, for the whole module."""
    async with running_cluster(tmp_path_factory.mktemp("http")) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        yield cluster
        await cluster.until_idle()


async def test_the_official_client_chats(busy: TestCluster) -> None:
    """The official OpenAI client gets the same chat answers as a gRPC client, streamed or not. The last chunk of a
    stream holds the usage if the client requests usage."""
    body = chat_body(max_tokens=40, extra_body={"ignore_eos": True})
    expected = await busy.stub.Chat(chat(max_tokens=40, ignore_eos=True))
    async with client(busy) as ai:
        whole = await ai.chat.completions.create(**body)
        stream = await ai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        plain = [chunk async for chunk in await ai.chat.completions.create(**body, stream=True)]
    text = expected.choices[0].message.content
    assert whole.choices[0].message.content == text != ""
    assert (whole.choices[0].message.role, whole.choices[0].finish_reason) == ("assistant", "length")
    assert whole.id.startswith("chatcmpl-")
    told = chunks[:-1]
    assert "".join(c.choices[0].delta.content or "" for c in told) == text
    assert [c.choices[0].delta.role for c in told] == ["assistant"] + [None] * (len(told) - 1)
    assert [c.choices[0].finish_reason for c in told] == [None] * (len(told) - 1) + ["length"]
    assert {c.usage for c in told} == {None}
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == expected.usage.prompt_tokens
    assert "".join(c.choices[0].delta.content or "" for c in plain) == text
    assert all(c.usage is None for c in plain)
    assert len({c.id for c in chunks}) == 1


async def test_the_official_client_completes(busy: TestCluster, bundle: Bundle) -> None:
    """Complete and streamed completions for a prompt of text or of token ids equal the answer over gRPC."""
    expected = (await busy.stub.Complete(complete(max_tokens=30, ignore_eos=True))).choices[0].text
    ids = TextModel.from_bundle(bundle).codec.encode_prompt("Once upon a time")
    async with client(busy) as ai:
        for prompt in ("Once upon a time", ids):
            body = completion_body(prompt, max_tokens=30, extra_body={"ignore_eos": True})
            whole = await ai.completions.create(**body)
            assert whole.choices[0].text == expected != ""
            assert whole.id.startswith("cmpl-")
            parts = [c.choices[0].text async for c in await ai.completions.create(**body, stream=True)]
            assert "".join(parts) == expected
            assert len(parts) > 10


async def test_the_official_client_without_asyncio(busy: TestCluster) -> None:
    """The official synchronous client can list models, chat and stream."""

    def work() -> tuple[list[str], str, str]:
        url = f"http://{busy.gateway.endpoints['http']}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as ai:
            names = [model.id for model in ai.models.list()]
            whole: Any = ai.chat.completions.create(**chat_body())
            stream: Any = ai.chat.completions.create(**chat_body(), stream=True)
            return names, whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)

    names, whole, streamed = await asyncio.to_thread(work)
    assert names == ["sim"]
    assert whole == streamed != ""


async def test_several_prompts_and_choices(busy: TestCluster) -> None:
    """The choices of a request with several prompts are numbered consecutively, and each choice equals the answer to a
    request with only that prompt. Token counts are summed."""
    options = {"n": 2, "temperature": 1.0, "seed": 3, "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    async with client(busy) as ai:
        alone = [await ai.completions.create(**completion_body(p, **options)) for p in ("one", "two")]
        both = await ai.completions.create(**completion_body(["one", "two"], **options))
        stream = await ai.completions.create(
            **completion_body(["one", "two"], **options), stream=True, stream_options={"include_usage": True}
        )
        texts = [""] * 4
        ends = 0
        async for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                ends += choice.finish_reason == "length"
            usage = chunk.usage
    expected = [c.text for answer in alone for c in answer.choices]
    assert [c.text for c in both.choices] == texts == expected
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert ends == 4
    assert usage == both.usage
    assert both.usage is not None
    assert both.usage.completion_tokens == 32
    assert both.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone if a.usage is not None)


async def test_the_bytes_of_a_stream(busy: TestCluster) -> None:
    """The bytes of a stream are ASCII events of one line each, with a blank line after each event. All events have one
    id, and one end mark follows the events."""
    wire = await Wire.open(busy)
    wire.ask(CHAT, chat_body(stream=True, max_tokens=30, ignore_eos=True, stream_options={"include_usage": True}))
    reply = await wire.reply()
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    events = reply.events
    head = {"id": events[0]["id"], "object": "chat.completion.chunk"}
    head |= {"created": events[0]["created"], "model": "sim"}

    def line(choices: list[Any], usage: Any = None) -> str:
        return "data: " + json.dumps({**head, "choices": choices, "usage": usage}, separators=(",", ":")) + "\n\n"

    expected = "".join(line(event["choices"], event["usage"]) for event in events) + "data: [DONE]\n\n"
    assert reply.body == expected.encode("ascii")
    assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in reply.chunks)
    assert list(events[1]["choices"][0]) == ["index", "delta", "logprobs", "finish_reason"]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert list(events[1]["choices"][0]["delta"]) == ["content"]
    assert events[-1]["usage"]["completion_tokens"] == 30
    wire.ask("/health")
    assert (await wire.reply()).json == {"status": "ok"}, "the connection stays usable after a stream"
    await wire.close()


async def test_usage_with_every_chunk(busy: TestCluster) -> None:
    """With continuous_usage_stats, each chunk belongs to one choice and reports the number of tokens that this choice
    has so far."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = await fetch(busy, COMPLETIONS, completion_body(n=2, ignore_eos=True, stream=True, stream_options=options))
    for index in (0, 1):
        counts = [
            e["usage"]["completion_tokens"] for e in reply.events if e["choices"] and e["choices"][0]["index"] == index
        ]
        assert counts == sorted(counts)
        assert counts[-1] == 16
    assert reply.events[-1]["usage"]["completion_tokens"] == 32


async def test_logprobs_in_both_shapes(busy: TestCluster) -> None:
    """In complete and in streamed answers, the log probabilities of chats and of completions have OpenAI's two shapes.
    Their values equal those over gRPC."""
    grpc_ = (await busy.stub.Complete(complete(logprobs=True, top_logprobs=3, ignore_eos=True))).choices[0].logprobs
    body = completion_body(logprobs=2, ignore_eos=True)
    whole = (await fetch(busy, COMPLETIONS, body)).json["choices"][0]["logprobs"]
    assert whole["tokens"] == [t.token for t in grpc_]
    assert whole["token_logprobs"] == pytest.approx([t.logprob for t in grpc_])
    assert whole["text_offset"] == [sum(map(len, whole["tokens"][:i])) for i in range(16)]
    for top, t in zip(whole["top_logprobs"], grpc_, strict=True):
        assert 2 <= len(top) <= 3, "the sampled token, and the two most likely ones"
        assert top[t.token] == pytest.approx(t.logprob) or len({o.token for o in t.top_logprobs}) < 3
    merged: dict[str, list[Any]] = {name: [] for name in whole}
    for event in (await fetch(busy, COMPLETIONS, {**body, "stream": True})).events:
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            merged[name] += values
    assert merged == whole
    chat_ = await busy.stub.Chat(chat(logprobs=True, top_logprobs=2, ignore_eos=True))
    content = (await fetch(busy, CHAT, chat_body(logprobs=True, top_logprobs=2, ignore_eos=True))).json
    for entry, t in zip(content["choices"][0]["logprobs"]["content"], chat_.choices[0].logprobs, strict=True):
        assert (entry["token"], bytes(entry["bytes"])) == (t.token, t.token_bytes)
        assert [o["token"] for o in entry["top_logprobs"]] == [o.token for o in t.top_logprobs]


async def test_vllms_extensions_have_their_effect(busy: TestCluster) -> None:
    """A request with options under vLLM's names gets the same answer as a gRPC request with the same options."""
    stop = (await busy.stub.Chat(chat(max_tokens=30, ignore_eos=True, logprobs=True))).choices[0].logprobs[5].token_id
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"stop_token_ids": [stop], "ignore_eos": True}, {}),
        ({"stop_token_ids": [stop], "ignore_eos": True, "min_tokens": 9}, {}),
        ({"seed": 5, "top_k": 3, "temperature": 1.5, "min_p": 0.0625, "repetition_penalty": 1.25}, {}),
        ({"max_completion_tokens": 3, "ignore_eos": True}, {"max_tokens": 3, "max_completion_tokens": None}),
        ({"logit_bias": {str(stop): -100}, "ignore_eos": True}, {"logit_bias": {stop: -100}}),
        ({"chat_template_kwargs": {"x": 1}}, {"chat_template_kwargs": None, "chat_template_kwargs_json": '{"x": 1}'}),
    ]
    for fields, same in cases:
        over: dict[str, Any] = {"max_tokens": 30, **fields, **same}
        expected = await busy.stub.Chat(chat(**{k: v for k, v in over.items() if v is not None}))
        answer = (await fetch(busy, CHAT, chat_body() | {"max_tokens": 30, **fields})).json
        assert answer["choices"][0]["message"]["content"] == expected.choices[0].message.content, fields
        assert answer["choices"][0]["finish_reason"] == expected.choices[0].finish_reason
        assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens


async def test_messages_are_what_grpcs_are(busy: TestCluster) -> None:
    """Messages with parts, tool calls in the history or a prefilled answer yield the same prompt as over gRPC. A
    request without a generation prompt also yields the same prompt as over gRPC."""
    said = {"role": "user", "content": "Hi"}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    history = [said, {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}]
    cases: list[tuple[dict[str, Any], pb.ChatRequest]] = [
        ({"messages": [parts]}, chat("a\nb")),
        (
            {"messages": [said, {"role": "assistant", "content": "Well"}], "continue_final_message": True},
            pb.ChatRequest(
                messages=[pb.Message(role="user", content="Hi"), pb.Message(role="assistant", content="Well")],
                continue_final_message=True,
            ),
        ),
        (
            {"messages": history},
            pb.ChatRequest(
                messages=[
                    pb.Message(role="user", content="Hi"),
                    pb.Message(role="assistant", tool_calls=[pb.ToolCall(id="1", name="f", arguments='{"x": 1}')]),
                ]
            ),
        ),
    ]
    for fields, request in cases:
        request.model, request.temperature, request.max_tokens = "sim", 0.0, 16
        expected = await busy.stub.Chat(request)
        answer = (await fetch(busy, CHAT, {**chat_body(), **fields})).json
        assert answer["choices"][0]["message"]["content"] == expected.choices[0].message.content
        assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    bare = (await fetch(busy, CHAT, chat_body("Hi", add_generation_prompt=False))).json["usage"]["prompt_tokens"]
    full = (await fetch(busy, CHAT, chat_body("Hi"))).json["usage"]["prompt_tokens"]
    assert bare < full


async def test_hints_and_unknown_fields_are_let_be(busy: TestCluster) -> None:
    """Fields without an effect on the answer are ignored. A field that holds null counts as absent."""
    plain = (await fetch(busy, CHAT, chat_body())).json["choices"]
    body = chat_body(user="me", store=False, metadata={"a": "b"}, service_tier="auto", wholly_unknown={"x": [1]})
    body |= {"tool_choice": "none", "parallel_tool_calls": True, "response_format": {"type": "text"}, "echo": False}
    body |= dict.fromkeys(("top_p", "seed", "stop", "n", "stream", "tools", "logit_bias", "stream_options"))
    assert (await fetch(busy, CHAT, body)).json["choices"] == plain


async def test_request_ids_and_headers(busy: TestCluster) -> None:
    """A valid x-request-id is returned with the answer, also with an error. An invalid x-request-id is replaced and
    never returned."""
    reply = await fetch(busy, CHAT, chat_body(), x_request_id="abc-1")
    assert reply.headers["x-request-id"] == "abc-1"
    assert "server" not in reply.headers
    assert "date" in reply.headers
    assert (await fetch(busy, CHAT, chat_body(model="no"), x_request_id="abc-2")).headers["x-request-id"] == "abc-2"
    for bad in ("has space", "x" * 200, "\xe9"):
        made = (await fetch(busy, CHAT, chat_body(), x_request_id=bad)).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)


async def test_models_health_and_readiness(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Models are listed with their state. A gateway without workers is ready, and a stopping gateway is not."""
    entry = CatalogEntry("sim", aliases=("default", "Org/Sim"), state=ModelState.LOADING, max_model_len=256)
    cluster.gateway.worker_events.apply_catalog([entry])
    assert (await fetch(cluster, "/ready")).json == {"status": "ready"}
    card = (await fetch(cluster, "/v1/models")).json["data"][0]
    assert (card["id"], card["object"], card["state"]) == ("sim", "model", "LOADING")
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    async with client(cluster) as ai:
        assert (await ai.models.retrieve("default")).id == "sim"
        assert (await fetch(cluster, "/v1/models/Org/Sim")).json["id"] == "sim"
        assert (await ai.chat.completions.create(**chat_body(model="default"))).model == "sim"
    head = await Wire.open(cluster)
    head.ask("/health", method="HEAD")
    assert (await head.head())[0] == 200
    head.ask("/health")
    assert (await head.reply()).status == 200, "a HEAD's answer has no body"
    cluster.gateway.service.close("stopping")
    for reply in (await fetch(cluster, "/ready"), await fetch(cluster, CHAT, chat_body())):
        assert (reply.status, reply.error["code"]) == (503, "no_worker")
    assert (await fetch(cluster, "/health")).status == 200
    await head.close()


async def test_silence_is_broken_by_comments(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A stream gets a comment after every keepalive_s seconds of silence, before the first token and between tokens."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  keepalive_s: 0.05")
    async with running_cluster(tmp_path, config) as cluster:
        entry = CatalogEntry("sim", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=256)
        cluster.gateway.worker_events.apply_catalog([entry])
        await asyncio.to_thread(bundle.save, tmp_path / "bundles" / bundle.digest.replace(":", "-"))
        wire = await Wire.open(cluster)
        wire.ask(CHAT, chat_body(max_tokens=3, ignore_eos=True, stream=True))
        assert (await wire.head())[0] == 200
        assert await wire.chunk() == b": keep-alive\n\n"
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=150), bundle)
        chunks = []
        while chunk := await wire.chunk():
            chunks.append(chunk)
        first = next(i for i, chunk in enumerate(chunks) if chunk.startswith(b"data: "))
        assert b": keep-alive\n\n" in chunks[first:]
        assert chunks[-1] == b"data: [DONE]\n\n"
        await wire.close()
        async with client(cluster) as ai:
            stream = await ai.chat.completions.create(**chat_body(max_tokens=2), stream=True)
            assert [chunk async for chunk in stream], "comments do not disturb the client"


async def test_calls_are_counted_by_their_face(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """An answered stream adds 1 to the metric `requests_total`, with the API "http" and the outcome "ok"."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    assert (await fetch(cluster, CHAT, chat_body(stream=True))).events
    await until(lambda: not cluster.gateway.service.statistics(), "the call is over")
    counted = cluster.gateway.metrics._counters["requests_total"]
    assert counted == {("sim", "default", "http", "ok"): 1}
