"""Calls through a real gateway and real links to a simulated engine: answers, streams, usage and listings."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.admin.v1 import admin_pb2, admin_pb2_grpc
from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.text.tokenizer import TextModel
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat, complete, refused, rest_of, text_of
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until

pytestmark = pytest.mark.slow


async def test_stream_and_whole_answer_agree(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The pieces of a stream add up to the whole answer. Only the last chunk has finish_reason and usage, and offsets
    grow."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    chunks = [c async for c in cluster.stub.StreamChat(chat(max_tokens=40, ignore_eos=True))]
    whole = await cluster.stub.Chat(chat(max_tokens=40, ignore_eos=True))
    assert text_of(chunks) == whole.choices[0].message.content != ""
    assert [c.choices[0].finish_reason for c in chunks] == [""] * (len(chunks) - 1) + ["length"]
    assert [c.HasField("usage") for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [c.offset for c in chunks] == list(range(1, len(chunks) + 1))
    assert [c.choices[0].delta.role for c in chunks] == ["assistant"] + [""] * (len(chunks) - 1)
    usage = chunks[-1].usage
    assert usage.completion_tokens == 40
    assert usage.total_tokens == usage.prompt_tokens + 40
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (usage.prompt_tokens, 40)
    assert {c.id for c in chunks} == {chunks[0].id}
    assert chunks[0].model == "sim"
    await cluster.until_idle()


async def test_tokens_are_the_engines(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The caller gets the text of exactly the token ids that the engine generates for the same prompt without a
    gateway."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    text = TextModel.from_bundle(bundle)
    answer = await cluster.stub.Complete(complete(max_tokens=30, ignore_eos=True))
    logprobs = await cluster.stub.Complete(complete(max_tokens=30, ignore_eos=True, logprobs=True, top_logprobs=2))
    ids = [t.token_id for t in logprobs.choices[0].logprobs]
    assert len(ids) == 30
    assert all(len(t.top_logprobs) >= 2 and t.logprob <= 0 for t in logprobs.choices[0].logprobs)
    prompt = text.codec.encode_prompt("Once upon a time")
    detokenizer = text.detokenizer(prompt)
    detokenizer.push(ids)
    assert logprobs.choices[0].text == detokenizer.pop_text(True)
    assert answer.usage.completion_tokens == 30
    from_ids = await cluster.stub.Complete(
        pb.CompleteRequest(model="sim", prompt_token_ids=prompt, max_tokens=30, temperature=0.0, ignore_eos=True)
    )
    assert from_ids.choices[0].text == answer.choices[0].text


async def test_several_choices(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A call with n choices runs as n requests, and its prompt counts once. With a seed, each choice is repeatable, and
    the choices differ from each other."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    request = chat(n=3, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    first = [c async for c in cluster.stub.StreamChat(request)]
    again = await cluster.stub.Chat(request)
    texts = [text_of(first, i) for i in range(3)]
    assert texts == [c.message.content for c in again.choices]
    assert len(set(texts)) == 3
    assert again.usage.completion_tokens == 36
    one = await cluster.stub.Chat(chat(temperature=1.0, seed=11, max_tokens=12, ignore_eos=True))
    assert one.usage.prompt_tokens == again.usage.prompt_tokens
    assert one.choices[0].message.content == texts[0]


async def test_stop_strings_end_the_engines_work(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A stop string ends the call, is not delivered, and frees the engine's slot at once."""
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=2), bundle)
    whole = (await cluster.stub.Complete(complete(max_tokens=60, ignore_eos=True))).choices[0].text
    stop = whole[20:24]
    request = complete(max_tokens=2000, ignore_eos=True, stop=[stop])
    chunks = [c async for c in cluster.stub.StreamComplete(request)]
    streamed = "".join(c.choices[0].text for c in chunks)
    assert streamed == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"
    await until(lambda: worker.engine.load().running == 0, "the engine's place is free")


async def test_request_id_and_unknown_metadata(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A valid request id of the caller is returned at the beginning and at the end of a call. An invalid request id is
    replaced, and other metadata is ignored."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    call = cluster.stub.StreamChat(
        chat(), metadata=(("x-request-id", "abc-1"), ("x-whatever", "7"), ("x-b-bin", b"\xff"))
    )
    assert dict(await call.initial_metadata())["x-request-id"] == "abc-1"
    assert [c async for c in call]
    assert dict(await call.trailing_metadata())["x-request-id"] == "abc-1"
    call = cluster.stub.StreamChat(chat(), metadata=(("x-request-id", "has space"),))
    made = dict(await call.initial_metadata())["x-request-id"]
    assert len(made) == 32
    answer = await refused(cluster.stub.Chat(chat(model="no"), metadata=(("x-request-id", "abc-2"),)))
    assert answer.trailers["x-request-id"] == "abc-2"


async def test_tokenize_and_detokenize(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Tokenize returns the token ids of a text or of messages, and the context length. Detokenize returns the text of
    ids."""
    await cluster.add_worker(sim_engine(checkpoint, max_model_len=512), bundle)
    text = TextModel.from_bundle(bundle)
    plain = await cluster.stub.Tokenize(pb.TokenizeRequest(model="sim", text="Grüße, 世界"))
    assert list(plain.token_ids) == text.codec.encode_prompt("Grüße, 世界")
    assert plain.max_model_len == 512
    messages = await cluster.stub.Tokenize(
        pb.TokenizeRequest(model="sim", messages=[pb.Message(role="user", content="Hi")])
    )
    assert list(messages.token_ids) == text.codec.encode_chat([{"role": "user", "content": "Hi"}])
    back = await cluster.stub.Detokenize(pb.DetokenizeRequest(model="sim", token_ids=plain.token_ids))
    assert back.text.endswith("Grüße, 世界")


async def test_models_health_and_workers_are_told(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A model without workers is listed with its state from the catalog, and its health is NOT_SERVING. Once it has a
    worker, its state is READY and its health is SERVING."""
    cluster.gateway.worker_events.apply_catalog(
        [
            CatalogEntry("sim", aliases=("default",), state=ModelState.LOADING, max_model_len=256),
            CatalogEntry("other", state=ModelState.FAILED, state_reason="no such folder"),
        ]
    )
    health: Any = health_pb2_grpc.HealthStub(cluster.channel)
    states = {m.name: m.state for m in (await cluster.stub.ListModels(pb.ListModelsRequest())).models}
    assert states == {"sim": pb.Model.STATE_LOADING, "other": pb.Model.STATE_FAILED}
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    await until(lambda: "sim" in cluster.gateway.health.statuses, "health is reported")
    loading = await health.Check(health_pb2.HealthCheckRequest(service="sim"))
    assert loading.status == health_pb2.HealthCheckResponse.NOT_SERVING
    worker = await cluster.add_worker(sim_engine(checkpoint), bundle)
    ready = await health.Check(health_pb2.HealthCheckRequest(service="default"))
    assert ready.status == health_pb2.HealthCheckResponse.SERVING
    model = await cluster.stub.GetModel(pb.GetModelRequest(name="default"))
    assert (model.name, model.state) == ("sim", pb.Model.STATE_READY)
    assert (await cluster.stub.Chat(chat(model="default"))).model == "sim"
    page = await cluster.stub.ListModels(pb.ListModelsRequest(page_size=1))
    rest = await cluster.stub.ListModels(pb.ListModelsRequest(page_size=1, page_token=page.next_page_token))
    assert [m.name for m in (*page.models, *rest.models)] == ["other", "sim"]
    assert rest.next_page_token == ""
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["admin"]) as channel:
        workers = await admin_pb2_grpc.FleetStub(channel).ListWorkers(admin_pb2.ListWorkersRequest())
        assert [w.worker_id for w in workers.workers] == [worker.identity.worker_id]
        assert workers.workers[0].engine_path == "sim"
        entry = await admin_pb2_grpc.CatalogStub(channel).Get(admin_pb2.GetRequest(name="other"))
        assert (entry.state, entry.state_reason) == ("FAILED", "no such folder")


async def test_more_calls_than_room_all_end(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Calls beyond the capacity of the engines wait in the gateway, not in the engines. All calls are answered."""
    workers = [await cluster.add_worker(sim_engine(checkpoint, decode_ms=2, max_num_seqs=4), bundle) for _ in range(2)]
    deepest = 0

    async def watch() -> None:
        nonlocal deepest
        while True:
            deepest = max(deepest, *(w.engine.load().waiting for w in workers))
            await asyncio.sleep(0.001)

    watcher = asyncio.create_task(watch())
    answers = await asyncio.gather(
        *(cluster.stub.Complete(complete(f"call {i}", max_tokens=8, ignore_eos=True)) for i in range(64))
    )
    watcher.cancel()
    assert all(a.usage.completion_tokens == 8 for a in answers)
    assert max(a.usage.queue_ms for a in answers) > 0
    assert deepest <= 6, "an engine's own queue holds a lookahead, and what has not begun its first step"
    await cluster.until_idle()


@pytest.mark.slow
async def test_long_prompts_travel_in_bulk(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A long prompt is sent in chunks on a separate connection and arrives complete."""
    await cluster.add_worker(
        sim_engine(checkpoint, max_model_len=400_000, kv_blocks=40_000, prefill_tokens_per_s=1e7), bundle
    )
    ids = [(i * 7) % 300 + 10 for i in range(300_000)]
    answer = await cluster.stub.Complete(
        pb.CompleteRequest(model="sim", prompt_token_ids=ids, max_tokens=4, temperature=0.0, ignore_eos=True)
    )
    assert answer.usage.prompt_tokens == 300_000
    assert answer.usage.completion_tokens == 4


async def test_silence_is_broken_by_progress(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """While a call is queued or running without tokens, a chunk with only progress is sent every keepalive_s
    seconds."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  keepalive_s: 0.05")
    async with running_cluster(tmp_path, config) as cluster:
        cluster.gateway.worker_events.apply_catalog(
            [CatalogEntry("sim", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=256)]
        )
        await asyncio.to_thread(bundle.save, tmp_path / "bundles" / bundle.digest.replace(":", "-"))
        call = cluster.stub.StreamChat(chat(max_tokens=3, ignore_eos=True))
        first = await read(call)
        assert first.progress.state == "loading"
        assert (first.progress.queue_position, len(first.choices)) == (1, 0)
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=150), bundle)
        rest = await rest_of(call)
        assert [c.progress.state for c in rest if c.HasField("progress")].count("running") >= 1
        assert rest[-1].usage.completion_tokens == 3


async def test_text_before_an_error_is_delivered(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """With resume off, the loss of a worker in mid-stream ends the call with the status UNAVAILABLE and a reason. All
    received text is delivered before the error."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_attempts: 1}")
    async with running_cluster(tmp_path, config) as cluster:
        worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        call = cluster.stub.StreamChat(chat(max_tokens=1000, ignore_eos=True))
        assert (await read(call)).choices
        await worker.stop()
        answer = await refused(rest_of(call))
        assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert answer.retry_s is not None
        assert "grpc-retry-pushback-ms" in answer.trailers


async def test_a_call_without_tokens_moves_to_another_worker(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A call whose worker is lost before the first token starts over on another worker."""
    doomed = await cluster.add_worker(sim_engine(checkpoint, fault="hang@step:1"), bundle)
    call = asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=5, ignore_eos=True)))
    await until(lambda: doomed.end.statistics().running == 1, "the call is at the first worker")
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    await doomed.stop()
    assert (await call).usage.completion_tokens == 5


@pytest.mark.parametrize("kind", ["die@step:3", "nan@step:0"])
async def test_engine_trouble_reaches_the_caller_as_a_clear_error(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, kind: str
) -> None:
    """If the only engine crashes or computes NaN, the calls end with an error, never with wrong or missing tokens."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_wait_s: 0.2}")
    async with running_cluster(tmp_path, config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=2, fault=kind), bundle)
        answer = await refused(cluster.stub.StreamChat(chat(max_tokens=100, ignore_eos=True)))
        assert answer.reason in ("WORKER_LOST", "INTERNAL")
        await until(lambda: not cluster.gateway.service.statistics(), "the call is gone")


async def test_a_grammar_without_a_way_on_is_the_callers(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If the engine fails because a call's grammar allows no further token, the call ends with INVALID_FIELD for
    `response_format`. The cause is the request: its grammar contradicts its other parameters."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=2, fault="nan@step:3"), bundle)
    form = pb.ResponseFormat(type="regex", regex="a+")
    answer = await refused(cluster.stub.StreamChat(chat(max_tokens=100, ignore_eos=True, response_format=form)))
    assert (answer.reason, answer.fields) == ("INVALID_FIELD", ["response_format"])
