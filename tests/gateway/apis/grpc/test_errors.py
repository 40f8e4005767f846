"""Errors of the gRPC API name the field, the reason and a remedy. A call that fails does not affect other calls."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.outcomes import CallError
from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.apis.grpc.inference import paginate
from cluster.gateway.calls.sequences.engine_errors import refusal_of
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, complete, refused, text_of
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until

INVALID = grpc.StatusCode.INVALID_ARGUMENT

BAD_CHATS: list[tuple[str, pb.ChatRequest, str, str]] = [
    ("unknown role", pb.ChatRequest(model="sim", messages=[pb.Message(role="king")]), "INVALID_FIELD",
     "messages[0].role"),
    ("no messages", pb.ChatRequest(model="sim"), "INVALID_FIELD", "messages"),
    ("negative temperature", chat(temperature=-1), "INVALID_FIELD", "temperature"),
    ("huge temperature", chat(temperature=1e30), "INVALID_FIELD", "temperature"),
    ("NaN temperature", chat(temperature=math.nan), "INVALID_FIELD", "temperature"),
    ("infinite top_p", chat(top_p=math.inf), "INVALID_FIELD", "top_p"),
    ("zero top_p", chat(top_p=0.0), "INVALID_FIELD", "top_p"),
    ("top_k", chat(top_k=-2), "INVALID_FIELD", "top_k"),
    ("min_p", chat(min_p=1.5), "INVALID_FIELD", "min_p"),
    ("zero max_tokens", chat(max_tokens=0), "INVALID_FIELD", "max_tokens"),
    ("negative max_tokens", chat(max_tokens=-(2**31)), "INVALID_FIELD", "max_tokens"),
    ("min above max", chat(max_tokens=3, min_tokens=4), "INVALID_FIELD", "min_tokens"),
    ("n", chat(n=0), "INVALID_FIELD", "n"),
    ("n too large", chat(n=1_000_000), "INVALID_FIELD", "n"),
    ("frequency_penalty", chat(frequency_penalty=3), "INVALID_FIELD", "frequency_penalty"),
    ("presence_penalty", chat(presence_penalty=-math.inf), "INVALID_FIELD", "presence_penalty"),
    ("repetition_penalty", chat(repetition_penalty=0), "INVALID_FIELD", "repetition_penalty"),
    ("top_logprobs alone", chat(top_logprobs=2), "INVALID_FIELD", "top_logprobs"),
    ("too many logprobs", chat(logprobs=True, top_logprobs=21), "INVALID_FIELD", "logprobs"),
    ("empty stop", chat(stop=[""]), "INVALID_FIELD", "stop[0]"),
    ("too many stops", chat(stop=["a"] * 17), "INVALID_FIELD", "stop"),
    ("stop token", chat(stop_token_ids=[-1]), "INVALID_FIELD", "stop_token_ids[0]"),
    ("stop token out of vocabulary", chat(stop_token_ids=[2**31 - 1]), "INVALID_FIELD", f"stop_token_ids[{2**31 - 1}]"),
    ("logit bias id", chat(logit_bias={-5: 1.0}), "INVALID_FIELD", "logit_bias[-5]"),
    ("logit bias value", chat(logit_bias={5: math.nan}), "INVALID_FIELD", "logit_bias[5]"),
    ("format type", chat(response_format=pb.ResponseFormat(type="xml")), "INVALID_FIELD", "response_format.type"),
    ("format schema", chat(response_format=pb.ResponseFormat(type="json_schema", json_schema="{")), "INVALID_FIELD",
     "response_format.json_schema"),
    ("format choice", chat(response_format=pb.ResponseFormat(type="choice")), "INVALID_FIELD",
     "response_format.choice"),
    ("kwargs", chat(chat_template_kwargs_json="[1]"), "INVALID_FIELD", "chat_template_kwargs_json"),
    ("deep kwargs", chat(chat_template_kwargs_json="[" * 100_000), "INVALID_FIELD", "chat_template_kwargs_json"),
    ("image", pb.ChatRequest(model="sim", messages=[pb.Message(role="user", parts=[pb.ContentPart(
        image=pb.Image(url="http://x"))])]), "UNSUPPORTED_FEATURE", "messages[0].parts[0].image"),
    ("tools", chat(tools=[pb.Tool(name="f")]), "UNSUPPORTED_FEATURE", "tools"),
    ("odd name of a tool", chat(tools=[pb.Tool(name="f g")]), "INVALID_FIELD", "tools[0].name"),
    ("a name twice", chat(tools=[pb.Tool(name="f")] * 2), "INVALID_FIELD", "tools[1].name"),
    ("parameters", chat(tools=[pb.Tool(name="f", parameters_json="[]")]), "INVALID_FIELD", "tools[0].parameters_json"),
    ("too many tools", chat(tools=[pb.Tool(name=f"f{i}") for i in range(1025)]), "INVALID_FIELD", "tools"),
    ("choice without tools", chat(tool_choice=pb.ToolChoice(mode="auto")), "INVALID_FIELD", "tool_choice.mode"),
    ("unknown choice", chat(tools=[pb.Tool(name="f")], tool_choice=pb.ToolChoice(mode="any")), "INVALID_FIELD",
     "tool_choice.mode"),
    ("choice of another tool", chat(tools=[pb.Tool(name="f")], tool_choice=pb.ToolChoice(mode="function", name="g")),
     "INVALID_FIELD", "tool_choice.name"),
    ("unknown effort", chat(reasoning_effort="huge"), "INVALID_FIELD", "reasoning_effort"),
    ("negative budget", chat(max_reasoning_tokens=-1), "INVALID_FIELD", "max_reasoning_tokens"),
    ("unknown priority", chat(priority="high"), "INVALID_FIELD", "priority"),
    ("priority of others", chat(priority="interactive"), "INVALID_FIELD", "priority"),
    ("long affinity key", chat(affinity_key="x" * 257), "INVALID_FIELD", "affinity_key"),
]  # fmt: skip


@pytest.fixture
async def busy(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> TestCluster:
    """Start a cluster with a worker."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1, max_model_len=256, kv_blocks=600), bundle)
    return cluster


@pytest.mark.slow
async def test_every_wrong_field_is_named(busy: TestCluster) -> None:
    """The error of each invalid request holds the reason and the path of the field. A valid call that runs at the same
    time is unaffected."""
    expected = text_of([c async for c in busy.stub.StreamChat(chat(max_tokens=100, ignore_eos=True))])
    good = asyncio.ensure_future(busy.stub.Chat(chat(max_tokens=100, ignore_eos=True)))
    for name, request, reason, field in BAD_CHATS:
        for answer in (await refused(busy.stub.Chat(request)), await refused(busy.stub.StreamChat(request))):
            assert answer.reason == reason, (name, answer)
            assert field in answer.fields, (name, answer)
            assert field in answer.message, (name, answer)
            assert "Traceback" not in answer.message
            assert answer.code is (grpc.StatusCode.UNIMPLEMENTED if reason == "UNSUPPORTED_FEATURE" else INVALID)
    assert (await good).choices[0].message.content == expected
    await busy.until_idle()


async def test_all_wrong_fields_at_once(busy: TestCluster) -> None:
    """The error of a request lists all invalid fields of the request."""
    answer = await refused(busy.stub.Chat(chat(temperature=-1, top_p=2, n=0)))
    assert answer.fields == ["temperature", "top_p", "n"]


async def test_unknown_model(busy: TestCluster) -> None:
    """Every method that takes a model name returns NOT_FOUND for an unknown model."""
    calls: list[Any] = [
        busy.stub.Chat(chat(model="nope")),
        busy.stub.StreamComplete(complete(model="nope")),
        busy.stub.GetModel(pb.GetModelRequest(name="nope")),
        busy.stub.Tokenize(pb.TokenizeRequest(model="nope", text="x")),
        busy.stub.Detokenize(pb.DetokenizeRequest(model="nope", token_ids=[1])),
    ]
    for call in calls:
        answer = await refused(call)
        assert (answer.code, answer.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert "nope" in answer.message


async def test_prompt_longer_than_the_context(busy: TestCluster) -> None:
    """A prompt that is longer than the context is refused, and the error states the length of the prompt."""
    answer = await refused(busy.stub.Complete(pb.CompleteRequest(model="sim", prompt_token_ids=[9] * 256)))
    assert answer.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert "256 tokens" in answer.message
    assert answer.fields == ["prompt"]
    fits = await busy.stub.Complete(pb.CompleteRequest(model="sim", prompt_token_ids=[9] * 255, max_tokens=50))
    assert fits.usage.completion_tokens == 1, "output is limited to the rest of the context, as vLLM's server does"


async def test_prompt_ids_out_of_vocabulary(busy: TestCluster) -> None:
    """The error of a prompt with a token id outside the vocabulary names the index of that token id."""
    answer = await refused(busy.stub.Complete(pb.CompleteRequest(model="sim", prompt_token_ids=[1, -1])))
    assert answer.fields == ["prompt_token_ids[1]"]
    both = await refused(busy.stub.Complete(pb.CompleteRequest(model="sim", prompt="x", prompt_token_ids=[1])))
    assert both.fields == ["prompt_token_ids"]
    assert (await refused(busy.stub.Complete(pb.CompleteRequest(model="sim")))).fields == ["prompt"]


@pytest.mark.parametrize(
    "body",
    [b"\xff\xff\xff\xff", b"\x0a\x02\xc3\x28", b"\x12\xff\xff\xff\xff\x0f", b"\x00" * 50],
    ids=["garbage", "bad-utf8", "bad-length", "zeros"],
)
@pytest.mark.parametrize("method", ["Chat", "StreamChat", "Complete"])
async def test_malformed_bytes(busy: TestCluster, body: bytes, method: str) -> None:
    """A malformed message gets INVALID_ARGUMENT with details. Invalid UTF-8 in a string counts as malformed."""
    path = f"/cluster.v1.Inference/{method}"
    make = busy.channel.unary_stream if method == "StreamChat" else busy.channel.unary_unary
    call = make(path, request_serializer=lambda b: b, response_deserializer=lambda b: b)
    answer = await refused(call(body))
    assert answer.code is INVALID
    assert answer.fields == ["request"]


async def test_message_over_the_limit(busy: TestCluster) -> None:
    """A message of more than max_message_bytes is refused, and other calls on the same connection continue."""
    async with grpc.aio.insecure_channel(
        busy.gateway.endpoints["grpc"], options=[("grpc.max_send_message_length", -1)]
    ) as channel:
        stub = type(busy.stub)(channel)
        answer = await refused(stub.Chat(chat("x" * (17 * 1024 * 1024))))
        assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the limit is" in answer.message
        assert (await stub.Chat(chat())).choices


async def test_unknown_method(busy: TestCluster) -> None:
    """A call of an unknown method gets UNIMPLEMENTED."""
    call: Any = busy.channel.unary_unary("/cluster.v1.Inference/Nope", request_serializer=lambda b: b)
    assert (await refused(call(b""))).code is grpc.StatusCode.UNIMPLEMENTED


async def test_bad_page_tokens(busy: TestCluster) -> None:
    """Forged page tokens and negative page sizes are refused, and the error names the field."""
    for request, field in (
        (pb.ListModelsRequest(page_token="zz"), "page_token"),
        (pb.ListModelsRequest(page_size=-1), "page_size"),
    ):
        assert (await refused(busy.stub.ListModels(request))).fields == [field]


async def test_failed_model_is_told_at_once(cluster: TestCluster, bundle: Bundle, tmp_path: Path) -> None:
    """A call for a failed model does not wait. The call ends with an error that holds the reason of the failure."""
    await asyncio.to_thread(bundle.save, tmp_path / "bundles" / bundle.digest.replace(":", "-"))
    entry = CatalogEntry("sim", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=256)
    cluster.gateway.worker_events.apply_catalog([entry])
    waiting = asyncio.ensure_future(refused(cluster.stub.Chat(chat())))
    await until(lambda: bool(cluster.gateway.service.statistics()), "the call waits")
    failed = CatalogEntry(
        "sim", state=ModelState.FAILED, state_reason="no such folder", bundle_digest=bundle.digest, max_model_len=256
    )
    cluster.gateway.worker_events.apply_catalog([failed])
    for answer in (await waiting, await refused(cluster.stub.Chat(chat()))):
        assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
        assert "no such folder" in answer.message


async def test_gateway_that_knows_nothing_says_so(cluster: TestCluster) -> None:
    """Before any controller or worker has connected, a call for a model gets MODEL_LOADING with a retry delay. The
    model is not reported as missing."""
    answer = await refused(cluster.stub.Chat(chat()))
    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
    assert answer.retry_s is not None


@pytest.mark.slow
async def test_queue_bounds(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call that finds a full queue is refused with QUEUE_FULL and a retry delay. A call that waits longer than
    max_wait_s is shed."""
    config = LOOPBACK.replace(
        "drain_timeout_s: 0", "drain_timeout_s: 0\n  queue: {max_requests: 3, max_tokens: 100000, max_wait_s: 0.4}"
    )
    async with running_cluster(tmp_path, config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=30, max_num_seqs=1), bundle)
        calls = [
            asyncio.ensure_future(refused(cluster.stub.Chat(chat(max_tokens=200, ignore_eos=True)))) for _ in range(12)
        ]
        done, running = await asyncio.wait(calls, timeout=2.0)
        answers = [task.result() for task in done]
        assert {a.reason for a in answers} == {"QUEUE_FULL", "SHED"}
        assert all(a.code is grpc.StatusCode.RESOURCE_EXHAUSTED and a.retry_s for a in answers)
        assert [a.reason for a in answers].count("SHED") == 3
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await cluster.until_idle()


@pytest.mark.parametrize("token", ['{"after": 5}', '{"after": null}', "[" * 5000, '{"after": ["a"]}', "5", '"after"'])
def test_a_page_token_of_ones_own_is_a_wrong_field(token: str) -> None:
    """A forged page token that holds any JSON value is reported as an invalid field, never as an unexpected failure."""
    for page_token in (token.encode().hex(), token):
        with pytest.raises(CallError) as raised:
            paginate(["a", "b"], 1, page_token)
        assert raised.value.violations[0].field == "page_token"


@pytest.mark.parametrize("field", ["response_format.regex", "grammar", "prompt_token_ids", ""])
def test_a_refusal_of_an_engine_names_its_field_once(field: str) -> None:
    """The message of an engine's refusal names the field once, not twice as in `response_format: response_format:`."""
    words = "unrolls to 20000 positions"
    error = refusal_of("INVALID_FIELD", f"{field}: {words}" if field else words, field)
    caller = {"grammar": "response_format", "prompt_token_ids": "prompt"}.get(field, field)
    assert error.message == (f"{caller}: {words}" if field else words)
    assert [v.description for v in error.violations] == ([words] if field else [])
