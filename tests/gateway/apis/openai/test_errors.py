"""Errors of the HTTP API have OpenAI's shape and name the field, the reason and a remedy. A call that fails does not
affect other calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.gateway.apis.json_values import MAX_DEPTH
from cluster.gateway.apis.openai.fields import Fields
from cluster.gateway.apis.openai.requests import parse_chat, parse_completion
from cluster.wire.bundle import Bundle
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.http import Wire, chat_body, client, completion_body, fetch

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

NAN, INF = float("nan"), float("inf")

# For each case: its name, the fields that are added to a valid chat request, and the expected parameter of the error.
BAD_CHATS: list[tuple[str, dict[str, Any], str]] = [
    ("no messages", {"messages": []}, "messages"),
    ("messages of a wrong type", {"messages": "hi"}, "messages"),
    ("a message of a wrong type", {"messages": ["hi"]}, "messages[0]"),
    ("unknown role", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ("no role", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("content of a wrong type", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("part without a type", {"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
    ("part without text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text"),
    ("deep tool arguments", {"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": "[" * 200 + "]" * 200}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
    ("model of a wrong type", {"model": 5}, "model"),
    ("temperature of a wrong type", {"temperature": "hot"}, "temperature"),
    ("boolean temperature", {"temperature": True}, "temperature"),
    ("negative temperature", {"temperature": -1}, "temperature"),
    ("NaN temperature", {"temperature": NAN}, "temperature"),
    ("huge temperature", {"temperature": 10**400}, "temperature"),
    ("infinite top_p", {"top_p": INF}, "top_p"),
    ("zero top_p", {"top_p": 0}, "top_p"),
    ("top_k", {"top_k": -2}, "top_k"),
    ("huge top_k", {"top_k": 2**31}, "top_k"),
    ("top_k with a fraction", {"top_k": 1.5}, "top_k"),
    ("NaN top_k", {"top_k": NAN}, "top_k"),
    ("min_p", {"min_p": 2}, "min_p"),
    ("zero max_tokens", {"max_tokens": 0}, "max_tokens"),
    ("zero max_completion_tokens", {"max_completion_tokens": 0}, "max_completion_tokens"),
    ("min above max", {"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
    ("n", {"n": 0}, "n"),
    ("too large n", {"n": 1000}, "n"),
    ("seed beyond 64 bits", {"seed": 2**63}, "seed"),
    ("frequency_penalty", {"frequency_penalty": 3}, "frequency_penalty"),
    ("presence_penalty", {"presence_penalty": -INF}, "presence_penalty"),
    ("repetition_penalty", {"repetition_penalty": 0}, "repetition_penalty"),
    ("top_logprobs alone", {"top_logprobs": 2}, "top_logprobs"),
    ("too many top_logprobs", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("logprobs of a wrong type", {"logprobs": 3}, "logprobs"),
    ("empty stop", {"stop": ""}, "stop[0]"),
    ("stop of a wrong type", {"stop": ["a", 1]}, "stop[1]"),
    ("too many stops", {"stop": ["a"] * 17}, "stop"),
    ("stop token", {"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ("stop token of a wrong type", {"stop_token_ids": [1, "a"]}, "stop_token_ids[1]"),
    ("stop token out of vocabulary", {"stop_token_ids": [2**31 - 1]}, f"stop_token_ids[{2**31 - 1}]"),
    ("logit bias id", {"logit_bias": {"x": 1}}, "logit_bias[x]"),
    ("logit bias value", {"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ("logit bias of a wrong type", {"logit_bias": {"5": "a"}}, "logit_bias[5]"),
    ("ignore_eos of a wrong type", {"ignore_eos": 1}, "ignore_eos"),
    ("stream of a wrong type", {"stream": "yes"}, "stream"),
    ("stream options without a stream", {"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ("usage of a wrong type", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ("format type", {"response_format": {"type": "xml"}}, "response_format.type"),
    ("no schema", {"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ("schema with NaN", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": NAN}}}},
     "response_format.json_schema.schema"),
    ("two constraints", {"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ("no constraint", {"structured_outputs": {}}, "structured_outputs"),
    ("choice of a wrong type", {"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]"),
    ("constraint that is not JSON", {"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ("constraints twice", {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
     "structured_outputs"),
    ("template arguments", {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ("two endings", {"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ("empty salt", {"cache_salt": ""}, "cache_salt"),
    ("long salt", {"cache_salt": "x" * 513}, "cache_salt"),
    ("salt of a wrong type", {"cache_salt": 1}, "cache_salt"),
    ("lone surrogate in a message", {"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ("no tools", {"tools": []}, "tools"),
    ("tools of a wrong type", {"tools": {}}, "tools"),
    ("a tool of a wrong type", {"tools": ["f"]}, "tools[0]"),
    ("a tool without a function", {"tools": [{"type": "function"}]}, "tools[0].function"),
    ("a tool without a name", {"tools": [{"function": {}}]}, "tools[0].function.name"),
    ("an odd name of a tool", {"tools": [{"function": {"name": "f g"}}]}, "tools[0].function.name"),
    ("a name twice", {"tools": [{"function": {"name": "f"}}] * 2}, "tools[1].function.name"),
    ("parameters of a wrong type", {"tools": [{"function": {"name": "f", "parameters": []}}]},
     "tools[0].function.parameters"),
    ("tools by the thousand", {"tools": [{"function": {"name": f"f{i}"}} for i in range(1025)]}, "tools"),
    ("choice without tools", {"tool_choice": "required"}, "tool_choice"),
    ("automatic choice without tools", {"tool_choice": "auto"}, "tool_choice"),
    ("choice of a wrong type", {"tool_choice": 1}, "tool_choice"),
    ("unknown choice", {"tools": [{"function": {"name": "f"}}], "tool_choice": "any"}, "tool_choice"),
    ("choice of another tool", {"tools": [{"function": {"name": "f"}}],
     "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ("choice without a name", {"tools": [{"function": {"name": "f"}}], "tool_choice": {"function": {}}},
     "tool_choice.function.name"),
    ("named choice with a constraint", {"tools": [{"function": {"name": "f"}}], "structured_outputs": {"regex": "a"},
     "tool_choice": {"function": {"name": "f"}}}, "structured_outputs"),
    ("parallel calls of a wrong type", {"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ("unknown effort", {"reasoning_effort": "huge"}, "reasoning_effort"),
    ("unknown priority", {"priority": "high"}, "priority"),
    ("priority of a wrong type", {"priority": []}, "priority"),
    ("negative budget", {"thinking_token_budget": -2}, "thinking_token_budget"),
    ("budget of a wrong type", {"thinking_token_budget": "x"}, "thinking_token_budget"),
    ("reserved template argument", {"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
    ("documents of a wrong type", {"documents": ["x"]}, "documents[0]"),
    ("a document of a wrong type", {"documents": [{"title": 1}]}, "documents[0].title"),
    ("arguments of a wrong type", {"messages": [{"role": "assistant", "tool_calls": [
        {"id": "1", "function": {"name": "f", "arguments": {}}}]}]}, "messages[0].tool_calls[0].function.arguments"),
    ("a call without a name", {"messages": [{"role": "assistant", "tool_calls": [{"id": "1", "function": {}}]}]},
     "messages[0].tool_calls[0].function.name"),
    ("a part of a wrong type", {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
    ("reasoning of a wrong type", {"messages": [{"role": "assistant", "reasoning": []}]}, "messages[0].reasoning"),
    ("lone surrogate in a stop", {"stop": ["a", "\udc00"]}, "stop[1]"),
]  # fmt: skip

TOOL = {"type": "function", "function": {"name": "f"}}
UNSERVED_CHATS: list[tuple[str, dict[str, Any], str]] = [
    ("tools", {"tools": [TOOL]}, "tools"),
    ("tools of another type", {"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    ("allowed tools", {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
     "tool_choice.type"),
    ("calls of another type", {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
     "messages[0].tool_calls[0].type"),
    ("tools of a message", {"messages": [{"role": "developer", "content": "x", "tools": [TOOL]}]}, "messages[0].tools"),
    ("old calls", {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages[0].function_call"),
    ("function_call", {"function_call": "auto"}, "function_call"),
    ("audio", {"modalities": ["text", "audio"]}, "modalities"),
    ("image", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
     "messages[0].content[0].type"),
    ("functions", {"functions": [{"name": "f"}]}, "functions"),
    ("beam search", {"use_beam_search": True}, "use_beam_search"),
    ("priority", {"priority": 1}, "priority"),
    ("a template of one's own", {"chat_template": "{{ x }}"}, "chat_template"),
    ("special tokens", {"skip_special_tokens": False}, "skip_special_tokens"),
    ("old guided decoding", {"guided_json": {}}, "guided_json"),
    ("moderation", {"moderation": {"model": "m"}}, "moderation"),
    ("structural tag", {"response_format": {"type": "structural_tag"}}, "response_format.type"),
]  # fmt: skip

BAD_COMPLETIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("no prompt", {"prompt": None}, "prompt", "invalid_field"),
    ("empty prompt", {"prompt": ""}, "prompt", "invalid_field"),
    ("no prompts", {"prompt": []}, "prompt", "invalid_field"),
    ("prompt of a wrong type", {"prompt": {"a": 1}}, "prompt", "invalid_field"),
    ("empty among prompts", {"prompt": ["a", ""]}, "prompt[1]", "invalid_field"),
    ("no prompt among prompts", {"prompt": ["a", 5]}, "prompt[1]", "invalid_field"),
    ("no token id", {"prompt": [1, "a"]}, "prompt[1]", "invalid_field"),
    ("token out of vocabulary", {"prompt": [1, -1]}, "prompt[1]", "invalid_field"),
    ("token out of vocabulary among prompts", {"prompt": [[1], [1, 2**30]]}, "prompt[1][1]", "invalid_field"),
    ("too many prompts", {"prompt": ["a"] * 129}, "prompt", "invalid_field"),
    ("boolean logprobs", {"logprobs": True}, "logprobs", "invalid_field"),
    ("too many logprobs", {"logprobs": 21}, "logprobs", "invalid_field"),
    ("too long", {"prompt": [9] * 256}, "prompt", "context_length_exceeded"),
    ("one too long among prompts", {"prompt": [[9], [9] * 256]}, "prompt[1]", "context_length_exceeded"),
    ("echo", {"echo": True}, "echo", "unsupported_feature"),
    ("suffix", {"suffix": "x"}, "suffix", "unsupported_feature"),
    ("best_of", {"best_of": 2}, "best_of", "unsupported_feature"),
]  # fmt: skip


@pytest.fixture(scope="module")
async def busy(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle
) -> AsyncIterator[TestCluster]:
    """Start a gateway with a worker, for the whole module."""
    async with running_cluster(tmp_path_factory.mktemp("http")) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1, max_model_len=256, kv_blocks=600), bundle)
        yield cluster
        await cluster.until_idle()


async def assert_refused(
    cluster: TestCluster, path: str, body: dict[str, Any], param: str, code: str = "invalid_field"
) -> None:
    """Assert that a request gets status 400, with an error that holds `param` and `code` and names the field. The
    request is sent twice, once for a whole and once for a streamed answer."""
    wanted = [body] if "stream" in body else [body, {**body, "stream": True}]
    for wanted_body in wanted:
        reply = await fetch(cluster, path, wanted_body)
        error = reply.error
        assert (reply.status, error["code"], error["param"]) == (400, code, param), error
        assert error["type"] == "invalid_request_error"
        assert code == "context_length_exceeded" or param in error["message"]
        assert "Traceback" not in error["message"]


@pytest.mark.parametrize(("fields", "param"), [case[1:] for case in BAD_CHATS], ids=[c[0] for c in BAD_CHATS])
async def test_a_wrong_field_is_named(busy: TestCluster, fields: dict[str, Any], param: str) -> None:
    """The error of an invalid chat request names the path of the invalid field."""
    await assert_refused(busy, CHAT, chat_body() | fields, param)


@pytest.mark.parametrize(("fields", "param"), [case[1:] for case in UNSERVED_CHATS], ids=[c[0] for c in UNSERVED_CHATS])
async def test_what_is_not_served_is_refused_by_name(busy: TestCluster, fields: dict[str, Any], param: str) -> None:
    """A known field that would change the answer and is not supported is refused, never ignored."""
    await assert_refused(busy, CHAT, chat_body() | fields, param, "unsupported_feature")


@pytest.mark.parametrize(
    ("fields", "param", "code"), [case[1:] for case in BAD_COMPLETIONS], ids=[c[0] for c in BAD_COMPLETIONS]
)
async def test_a_wrong_completion_is_named(busy: TestCluster, fields: dict[str, Any], param: str, code: str) -> None:
    """The error of an invalid completion request names the path of the invalid field in the caller's body."""
    await assert_refused(busy, COMPLETIONS, completion_body() | fields, param, code)


async def test_errors_disturb_nobody(busy: TestCluster) -> None:
    """An invalid call does not change the answer of a valid call that runs at the same time.

    If several fields of a call are invalid, one error names all of them.
    """
    good = chat_body(max_tokens=100, ignore_eos=True)
    expected = (await fetch(busy, CHAT, good)).json["choices"]
    beside = asyncio.ensure_future(fetch(busy, CHAT, good))
    message = (await fetch(busy, CHAT, chat_body(top_p=2, n=0))).error["message"]
    assert "top_p:" in message
    assert "n:" in message
    assert (await beside).json["choices"] == expected


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object, got an array"),
        (b'"x"', "must be a JSON object, got a string"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"model": "\xc3\x28"}', "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 30_000, "nested too deeply"),
        (b"[" * 100_000, "must be a JSON object, got an array"),
        (b'{"chat_template_kwargs": ' + b'{"a": ' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH + b"}", "nested too deeply"),
    ],
    ids=["empty", "open", "array", "string", "bytes", "utf8", "digits", "very deep", "large and deep", "deep"],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_body_that_is_no_request(busy: TestCluster, path: str, body: bytes, says: str) -> None:
    """A body that is not a JSON request gets status 400, with an error in OpenAI's shape."""
    reply = await fetch(busy, path, body, method="POST", content_length=str(len(body)))
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, "body", "invalid_field")
    assert says in reply.error["message"]


async def test_a_body_over_the_limit(tmp_path: Path) -> None:
    """A body over the limit is refused with 413. A content-length over the limit is refused before the body is read,
    and a chunked body is refused once its size exceeds the limit."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  max_message_bytes: 65536")
    async with running_cluster(tmp_path, config) as cluster:
        wire = await Wire.open(cluster)
        wire.ask(CHAT, b"{", content_length=str(1 << 40))
        reply = await wire.reply()
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        await wire.close()
        chunked = b"".join(b"4000\r\n" + b" " * 0x4000 + b"\r\n" for _ in range(5)) + b"0\r\n\r\n"
        wire = await Wire.open(cluster)
        wire.ask(CHAT, chunked, transfer_encoding="chunked")
        assert (await wire.reply()).status == 413
        wire.ask("/health")
        assert (await wire.reply()).status == 200, "the connection stays usable"
        fits = b"ffff\r\n" + b" " * 0xFFFF + b"\r\n0\r\n\r\n"
        wire.ask(CHAT, fits, transfer_encoding="chunked")
        assert (await wire.reply()).status == 400
        await wire.close()


async def test_wrong_paths_methods_and_media(busy: TestCluster) -> None:
    """Unknown paths, wrong methods and wrong media types get the statuses 404, 405 and 415, as errors in OpenAI's form.

    Only JSON is accepted as media type. So a form on another web site cannot send a request.
    """
    nowhere = await fetch(busy, "/v1/nope", {})
    assert (nowhere.status, nowhere.error["code"]) == (404, "not_found")
    get = await fetch(busy, CHAT)
    assert (get.status, get.error["code"], get.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert (await fetch(busy, "/v1/models", {})).headers["allow"] == "GET, HEAD"
    for media in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert (await fetch(busy, CHAT, chat_body(), content_type=media)).status == 415
    assert (await fetch(busy, CHAT, chat_body(), content_type="Application/JSON; charset=utf-8")).status == 200


async def test_garbage_and_endless_heads(busy: TestCluster) -> None:
    """A client that sends invalid HTTP or an endless request head gets status 400, and the connection is closed."""
    endless = b"GET /health HTTP/1.1\r\n" + b"x-a: " + b"a" * 70_000
    for data in (b"\x16\x03\x01garbage\r\n\r\n", endless, b"GET /" + b"a" * 70_000):
        wire = await Wire.open(busy)
        wire.writer.write(data)
        answer = await wire.reader.read()
        assert answer.startswith(b"HTTP/1.1 400 ")
        await wire.close()
    assert (await fetch(busy, "/health")).status == 200


async def test_the_official_clients_exceptions(busy: TestCluster, cluster: TestCluster) -> None:
    """The official client raises the exception that matches each error, with code and parameter. Two headers hold the
    retry delay."""
    async with client(busy) as ai:
        with pytest.raises(openai.NotFoundError) as missing:
            await ai.chat.completions.create(**chat_body(model="nope"))
        assert (missing.value.code, missing.value.status_code) == ("model_not_found", 404)
        with pytest.raises(openai.NotFoundError):
            await ai.models.retrieve("nope")
        with pytest.raises(openai.BadRequestError) as bad:
            await ai.chat.completions.create(**chat_body(temperature=9))
        assert (bad.value.code, bad.value.param) == ("invalid_field", "temperature")
    async with client(cluster) as ai:
        with pytest.raises(openai.InternalServerError) as loading:
            await ai.chat.completions.create(**chat_body(), stream=True)
        assert (loading.value.status_code, loading.value.code) == (503, "model_loading")
        assert loading.value.type == "server_error"
        assert loading.value.response.headers["retry-after"] == "2"
        assert loading.value.response.headers["retry-after-ms"] == "2000"


async def test_a_worker_lost_in_mid_stream(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If a worker is lost and the call is not resumed, the stream ends with an error event and without [DONE], and the
    official client raises an exception."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_attempts: 1}")
    async with running_cluster(tmp_path, config) as cluster:
        worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        body = chat_body(max_tokens=1000, extra_body={"ignore_eos": True})
        wire = await Wire.open(cluster)
        wire.ask(CHAT, chat_body(max_tokens=1000, ignore_eos=True, stream=True))
        assert (await wire.head())[0] == 200
        assert await wire.chunk()
        async with client(cluster) as ai:
            stream = await ai.chat.completions.create(**body, stream=True)
            assert await anext(aiter(stream))
            await worker.stop()
            with pytest.raises(openai.APIError, match="the worker was lost"):
                async for _ in stream:
                    pass
        chunks = []
        while chunk := await wire.chunk():
            chunks.append(chunk)
        assert json.loads(chunks[-1].removeprefix(b"data: "))["error"]["code"] == "worker_lost"
        await wire.close()
        await cluster.until_idle()


async def test_a_full_queue(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call that arrives while the queue is full, or that has waited too long, is refused with status 503, a reason
    and a retry delay."""
    config = LOOPBACK.replace(
        "drain_timeout_s: 0", "drain_timeout_s: 0\n  queue: {max_requests: 2, max_tokens: 100000, max_wait_s: 0.3}"
    )
    async with running_cluster(tmp_path, config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=30, max_num_seqs=1), bundle)
        body = chat_body(max_tokens=200, ignore_eos=True)
        calls = [asyncio.ensure_future(fetch(cluster, CHAT, body)) for _ in range(10)]
        await until(lambda: sum(call.done() for call in calls) >= 9, "calls are refused and shed")
        replies = [call.result() for call in calls if call.done()]
        assert {(r.status, r.error["code"]) for r in replies} == {(503, "queue_full"), (503, "shed")}
        assert all(int(r.headers["retry-after"]) >= 1 for r in replies)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await cluster.until_idle()


def test_every_reader_takes_its_defaults() -> None:
    """The smallest requests are valid and set no option, so the defaults of the model apply."""
    for asked in (
        parse_chat(Fields({"model": "m", "messages": [{"role": "user", "content": "x"}]})),
        parse_completion(Fields({"model": "m", "prompt": "x"})),
    ):
        options = asked.requests[0].options
        assert (options.max_tokens, options.temperature, options.n, options.logprobs) == (None, None, 1, None)
        assert not asked.stream
