"""Pooling calls in queues, routing, links and accounts: lost workers, cancels, fairness, usage, limits and guards."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from cluster.api.pooling import PoolingTask
from cluster.api.types import CatalogEntry, ModelState, TokenOutput, VersionShare
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.pooling.pooling_request import InputField, PoolingRequest, TextInputs
from cluster.gateway.calls.unread_answers import AnswerBounds, UnreadAnswers
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.worker.engine.simulated.engine import SimEngine
from tests.gateway.apis.grpc.test_session import _reason as reason_of
from tests.http2.raw import raw_client
from tests.support.accounts import accounting_cluster, records, start_worker
from tests.support.calls import chat, refused
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.http import Wire, fetch
from tests.support.keyed import Keyed, bearer, keyed_cluster
from tests.support.pooling import EMBEDDER, Tampered, embedded, vectors_of

pytestmark = pytest.mark.slow

BATCH = [f"text {i}" for i in range(400)]
SLOW: dict[str, Any] = {**EMBEDDER, "max_num_seqs": 4, "prefill_tokens_per_s": 5000, "decode_ms": 3}


def embed(texts: list[str], **fields: Any) -> pb.EmbedRequest:
    """Return a request for the model `sim`."""
    return pb.EmbedRequest(model="sim", texts=texts, **fields)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Provide a gateway without workers."""
    async with running_cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """Provide a SQLite ledger with its tables."""
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    made.upgrade()
    yield made
    made.close()


def sample(cluster: TestCluster, name: str, **labels: str) -> float:
    """Return the value of a metric of the model `sim`."""
    registry = cluster.gateway.metrics.registry
    return registry.get_sample_value(f"headrace_{name}", {"headrace_cluster": "test", "model": "sim", **labels}) or 0.0


# ---- lost workers


async def test_a_lost_worker_is_not_seen_by_the_caller(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If the worker of a batch is lost half-way, the caller gets the same vectors as without the loss. Another worker
    computes the missing vectors from scratch."""
    doomed = await cluster.add_worker(sim_engine(checkpoint, **SLOW), bundle)
    call = asyncio.ensure_future(cluster.stub.Embed(embed(BATCH)))
    await until(lambda: doomed.engine.load().steps > 5, "the worker has computed some inputs")
    second = await cluster.add_worker(sim_engine(checkpoint, **SLOW), bundle)
    assert isinstance(doomed.engine, SimEngine)
    doomed.engine.faults.kill()
    answer = await asyncio.wait_for(call, 60)
    await until(doomed.task.done, "the lost worker has left")
    await second.stop()
    calm = await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    assert np.array_equal(vectors_of([one.values for one in answer.embeddings]), await embedded(cluster, BATCH, "sim"))
    assert calm.engine.load().steps > 0
    await cluster.until_idle()


async def test_the_batch_of_a_draining_worker_goes_on_elsewhere(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If a worker begins to drain in the middle of a batch, the rest of the batch goes to another worker."""
    leaving = await cluster.add_worker(sim_engine(checkpoint, **SLOW), bundle)
    call = asyncio.ensure_future(cluster.stub.Embed(embed(BATCH[:200])))
    await until(lambda: leaving.engine.load().steps > 2, "the worker has computed some inputs")
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    await leaving.end.drain(0.1)
    assert len((await asyncio.wait_for(call, 60)).embeddings) == 200
    await cluster.until_idle()


@pytest.mark.parametrize("broken", [math.nan, math.inf, None, "short", "error"])
async def test_an_unsound_vector_is_computed_elsewhere(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, broken: Any
) -> None:
    """A vector that is missing, of wrong length or not finite is never returned. Another worker computes it; without
    another worker the call fails."""

    def change(output: TokenOutput) -> None:
        if isinstance(broken, float):
            values = np.frombuffer(output.vector or b"", "<f4").copy()
            values[1] = broken
            output.vector = values.tobytes()
        elif broken == "short":
            output.vector = (output.vector or b"")[:-4]
        elif broken is None:
            output.vector = None

    engine = sim_engine(checkpoint, **EMBEDDER)
    await cluster.add_worker(Tampered(engine, change), bundle)
    if broken == "error":
        engine.faults.arm("step", "nan", 0)
    request = embed(["a", "b"], dimensions=4)
    assert (await refused(cluster.stub.Embed(request, timeout=5))).reason in ("INTERNAL", "DEADLINE_EXCEEDED")
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    for _ in range(4):
        answer = await cluster.stub.Embed(request)
        assert np.isfinite(vectors_of([one.values for one in answer.embeddings])).all()
    await cluster.until_idle()


async def test_a_batch_ends_on_the_version_on_which_it_began(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If the workers of a batch's version are replaced half-way, they compute the rest of the batch. The next call is
    served by the new version."""

    def publish(*retired: str) -> None:
        entry = CatalogEntry("sim", state=ModelState.READY, retired=retired)
        cluster.gateway.worker_events.apply_catalog([entry])

    publish()
    old = await cluster.add_worker(sim_engine(checkpoint, **SLOW), bundle, version="v1", generation="g1")
    batch = asyncio.ensure_future(cluster.stub.Embed(embed(BATCH)))
    await until(lambda: old.engine.load().steps > 2, "the old version has computed some inputs")
    new = await cluster.add_worker(sim_engine(checkpoint, **SLOW), bundle, version="v2", generation="g2")
    publish("g1")
    assert len((await asyncio.wait_for(batch, 60)).embeddings) == len(BATCH)
    assert new.engine.load().steps == 0
    ended = old.engine.load().steps
    await cluster.stub.Embed(embed(["a"]))
    assert (old.engine.load().steps, new.engine.load().steps > 0) == (ended, True)
    await cluster.until_idle()


async def test_an_input_without_a_finite_vector_costs_nobody_a_worker(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """An input whose vector is NaN on every worker fails its call, with an error that names the input. However many
    such calls there are, no worker is avoided because of them."""

    def change(output: TokenOutput) -> None:
        if output.prompt_tokens == 7:
            output.vector = np.full(len(output.vector or b"") // 4, math.nan, "<f4").tobytes()

    for _ in range(3):
        await cluster.add_worker(Tampered(sim_engine(checkpoint, **EMBEDDER), change), bundle)
    poison = pb.TokenIds(ids=[5] * 7)
    request = pb.EmbedRequest(model="sim", token_ids=[pb.TokenIds(ids=[5]), *[poison] * 40])
    for answer in await asyncio.gather(*(refused(cluster.stub.Embed(request)) for _ in range(8))):
        assert answer.reason == "INTERNAL"
        assert "token_ids[" in answer.message
        assert "change this input" in answer.message
    assert cluster.gateway.scheduler.breakers.open == 0
    await cluster.until_idle()


async def test_a_worker_that_generates_is_told_apart(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A worker of an older release does not know pooling and generates a token. The call then fails with an error that
    names a remedy, and the token is not returned."""
    pooling = await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)

    def change(output: TokenOutput) -> None:
        output.vector, output.token_ids = None, (5,)

    await pooling.stop()
    await cluster.add_worker(Tampered(sim_engine(checkpoint, **EMBEDDER), change), bundle)
    answer = await refused(cluster.stub.Embed(embed(["a"])))
    assert (answer.reason, "choose a model" in answer.message) == ("UNSUPPORTED_FEATURE", True)
    await cluster.until_idle()


# ---- ends


async def test_a_cancelled_batch_leaves_nothing(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A batch leaves the queues, the links and the engine if it is cancelled, its client disconnects or its deadline
    passes."""
    worker = await cluster.add_worker(sim_engine(checkpoint, **SLOW), bundle)
    for kind in ("grpc", "http", "deadline", "session"):
        wanted = worker.engine.load().steps + 3
        wire = await Wire.open(cluster)
        session = cluster.stub.Session()
        call: Any = None
        if kind == "http":
            wire.ask("/v1/embeddings", {"model": "sim", "input": BATCH})
        elif kind == "session":
            await session.write(pb.SessionRequest(start=pb.SessionStart(call_id=1, embed=embed(BATCH))))
        else:
            call = cluster.stub.Embed(embed(BATCH), timeout=None if kind == "grpc" else 0.4)
        await until(partial(_has_steps, worker, wanted), f"{kind}: some inputs are computed")
        if kind == "grpc":
            call.cancel()
        elif kind == "session":
            await session.write(pb.SessionRequest(cancel=pb.SessionCancel(call_id=1)))
        elif kind == "deadline":
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await wire.close()
        await cluster.until_idle()
        assert cluster.gateway.service.statistics() == {}
        session.cancel()


def _has_steps(worker: Worker, steps: int) -> bool:
    return worker.engine.load().steps >= steps


async def test_a_session_answers_with_one_event(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """In a session, a pooling call ends with one event that holds its answer and usage, or a status. Other calls of the
    session are unaffected."""
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    session = cluster.stub.Session()
    rerank = pb.RerankRequest(model="sim", query="q", documents=["a", "b"], return_documents=True)
    starts = [
        pb.SessionStart(call_id=1, embed=embed(BATCH[:3])),
        pb.SessionStart(call_id=2, rerank=rerank),
        pb.SessionStart(call_id=3, embed=embed([])),
        pb.SessionStart(call_id=4, chat=chat()),
        pb.SessionStart(call_id=5, embed=embed([]), deadline_ms=1000),
    ]
    first, *more = (pb.SessionRequest(start=start) for start in starts)
    first.more.extend(more)
    await session.write(first)
    events: dict[int, pb.SessionEvent] = {}
    while len(events) < len(starts):
        for event in (await asyncio.wait_for(read(session), 10)).events:
            assert event.call_id not in events
            events[event.call_id] = event
    assert np.array_equal(
        vectors_of([one.values for one in events[1].embed.embeddings]), await embedded(cluster, BATCH[:3], "sim")
    )
    assert events[1].embed.usage.prompt_tokens > 0
    assert {result.document for result in events[2].rerank.results} == {"a", "b"}
    assert reason_of(events[3].status) == reason_of(events[5].status) == "INVALID_FIELD"
    assert reason_of(events[4].status) == "UNSUPPORTED_FEATURE"
    await session.done_writing()
    assert await asyncio.wait_for(read(session), 10) is None
    await cluster.until_idle()


@pytest.mark.parametrize("in_session", [False, True])
async def test_answers_that_nobody_reads_are_bounded(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, in_session: bool
) -> None:
    """Unread answers are bounded: while a client does not read its answer, the tenant's next call waits, and no worker
    computes it. It is answered after the first answer was read."""
    worker = await cluster.add_worker(sim_engine(checkpoint, embed_dimensions=65_536), bundle)
    service = cluster.gateway.service
    unread = service.unread_answers = UnreadAnswers(AnswerBounds(tenant=1, guaranteed=1))
    async with raw_client(int(cluster.gateway.endpoints["grpc"].rpartition(":")[2]), window=1000) as raw:
        name, message = "Embed", embed(["a", "b", "c", "d"]).SerializeToString()
        if in_session:
            start = pb.SessionStart(call_id=1, embed=embed(["a", "b", "c", "d"]))
            name, message = "Session", pb.SessionRequest(start=start).SerializeToString()
        stream = await raw.call(name, message, service="cluster.v1.Inference")
        await until(lambda: worker.engine.load().steps > 0, "the first call runs")
        await until(lambda: not service.statistics(), "the first call has released its slots")
        assert unread.held >= 4 * 65_536 * 4
        steps = worker.engine.load().steps
        other = asyncio.create_task(embedded(cluster, ["e"], "sim"))
        await until(lambda: bool(unread._waiting), "the other call waits")
        assert worker.engine.load().steps == steps
        await raw.until_ended(stream)
        assert raw.trailers(stream)["grpc-status"] == "0"
        assert len(raw.data[stream]) > 4 * 65_536 * 4
        assert (await other).shape == (1, 65_536)
    assert not unread.held
    await cluster.until_idle()


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_large_answers_are_sent_while_they_are_encoded(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, version: str
) -> None:
    """A large answer over HTTP is encoded while the client reads, without a content-length. A client of HTTP/1.0, which
    has no chunks, gets one. The vectors are the same."""
    await cluster.add_worker(sim_engine(checkpoint, embed_dimensions=20_000), bundle)
    wire = await Wire.open(cluster)
    body = json.dumps({"model": "sim", "input": ["a", "b", "c"]}).encode()
    head = f"POST /v1/embeddings HTTP/{version}\r\nhost: t\r\ncontent-type: application/json\r\nconnection: close\r\n"
    wire.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    status, headers = await wire.head()
    content = await wire.reader.read()
    assert (status, "content-length" in headers) == (200, version == "1.0")
    if version == "1.1":
        content = b"".join(content.split(b"\r\n")[1::2])
    found = vectors_of([item["embedding"] for item in json.loads(content)["data"]])
    assert np.array_equal(found, await embedded(cluster, ["a", "b", "c"], "sim"))
    assert not cluster.gateway.service.unread_answers.held
    await wire.close()


@pytest.mark.parametrize(("chars", "keep", "is_released"), [(1000, 1, True), (1 << 18, 1, False), (1000, None, True)])
async def test_a_long_text_that_is_cut_counts_until_its_call_ends(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, chars: int, keep: int | None, is_released: bool
) -> None:
    """A call keeps its texts until its end. If little is left of a long text, which the bounds of the queue do not
    count then, its bytes stay in the budget of request bytes."""
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    released: list[None] = []
    meta = CallMeta("id", "http", release_body=lambda: released.append(None))
    inputs = TextInputs(["a" * chars], InputField("input"))
    async with cluster.gateway.service.open_pooling(PoolingRequest("sim", inputs, truncate_tokens=keep), meta) as call:
        assert bool(released) is is_released
        assert len(await call.vectors()) == 1


# ---- tenants


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[Keyed]:
    """Provide a gateway with keys and without workers."""
    async with keyed_cluster(tmp_path) as keyed:
        yield keyed


async def test_a_batch_does_not_starve_another_tenant(keyed: Keyed, checkpoint: Path, bundle: Bundle) -> None:
    """While a batch of 2,048 inputs waits and runs, another tenant's calls are served in turn: ten of them are answered
    while most of the batch still waits."""
    engine = sim_engine(checkpoint, **{**SLOW, "max_num_seqs": 8, "decode_ms": 40})
    worker = await keyed.cluster.add_worker(engine, bundle)
    crowd, small = await keyed.key("crowd"), await keyed.key("small")
    ids = [[1 + i % 50, 2] for i in range(2048)]
    batch = asyncio.ensure_future(keyed.fetch("/v1/embeddings", {"model": "sim", "input": ids}, key=crowd))
    await until(lambda: batch.done() or worker.engine.load().steps > 3, "the batch runs")
    calls = (keyed.cluster.stub.Embed(embed(["a", "b"]), metadata=bearer(small)) for _ in range(10))
    await asyncio.gather(*calls)
    assert keyed.gateway.scheduler.queues.waiting("sim")[0] > 1024
    assert not batch.done()
    batch.cancel()
    await asyncio.gather(batch, return_exceptions=True)
    await keyed.cluster.until_idle()


async def test_limits_count_the_tokens_of_all_inputs(keyed: Keyed, checkpoint: Path, bundle: Bundle) -> None:
    """A call takes the tokens of all its inputs from the limit per minute. A call with more tokens than the limit is
    refused before it runs."""
    await keyed.cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    key = await keyed.key("some", limits={"tokens_per_minute": 200})
    body = {"model": "sim", "input": [[1] * 20] * 4}
    reply = await keyed.fetch("/v1/embeddings", body, key=key)
    assert (reply.status, reply.headers["x-ratelimit-remaining-tokens"]) == (200, "120")
    reply = await keyed.fetch("/v1/embeddings", {**body, "input": [[1] * 20] * 7}, key=key)
    assert (reply.status, reply.error["code"]) == (429, "rate_limited")
    reply = await keyed.fetch("/v1/embeddings", {**body, "input": [[1] * 20]}, key=key)
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) in range(95, 110)
    await keyed.cluster.until_idle()


async def test_long_texts_are_charged_before_they_are_read(keyed: Keyed, checkpoint: Path, bundle: Bundle) -> None:
    """A call with long texts counts at least a token for each 64 characters, however few tokens are left of them. If
    the limit does not allow that, the call is refused."""
    await keyed.cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    key = await keyed.key("some", limits={"tokens_per_minute": 2000})
    body = {"model": "sim", "input": "a b " * 16_000, "truncate_prompt_tokens": 2}
    reply = await keyed.fetch("/v1/embeddings", body, key=key)
    assert (reply.status, reply.json["usage"]["prompt_tokens"]) == (200, 2)
    await keyed.cluster.until_idle()
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) in range(1000, 1020)
    reply = await keyed.fetch("/v1/embeddings", {**body, "input": "a b " * 48_000}, key=key)
    assert (reply.status, reply.error["code"]) == (429, "rate_limited")
    reply = await keyed.fetch("/v1/embeddings", {**body, "input": "a b " * 5_000}, key=key)
    assert int(reply.headers["x-ratelimit-remaining-tokens"]) in range(990, 1100)
    await keyed.cluster.until_idle()


async def test_guards_read_every_input(keyed: Keyed, checkpoint: Path, bundle: Bundle) -> None:
    """For every form of input, a guard either redacts a text before it is embedded, or refuses the call. The prompt log
    holds the inputs."""
    cluster = keyed.cluster
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    rule = {"builtin": "patterns", "on": "input", "action": "redact", "patterns": {"name": "Adalbert"}}
    key = await keyed.key("guarded", guards=[rule], log_prompts=True)
    free = await keyed.key("free")
    texts = ["who is Adalbert", "nobody"]
    wanted = ["who is [redacted: name]", "nobody"]

    async def vectors(inputs: Any, key: str) -> Any:
        reply = await keyed.fetch("/v1/embeddings", {"model": "sim", "input": inputs}, key=key)
        assert reply.status == 200, reply.body
        return vectors_of([item["embedding"] for item in reply.json["data"]])

    assert np.array_equal(await vectors(texts, key), await vectors(wanted, free))
    ids = (await cluster.stub.Tokenize(pb.TokenizeRequest(model="sim", text=texts[0]), metadata=bearer(key))).token_ids
    assert not np.array_equal(await vectors([list(ids)], key), await vectors([list(ids)], free))
    many = [f"{i} Adalbert" for i in range(300)]
    redacted = [text.replace("Adalbert", "[redacted: name]") for text in many]
    assert np.array_equal(await vectors(many, key), await vectors(redacted, free))
    pairs = {"model": "sim", "query": "Adalbert", "documents": ["x", "an Adalbert"]}
    ours = (await keyed.fetch("/rerank", pairs, key=key)).json["results"]
    theirs = {"model": "sim", "query": "[redacted: name]", "documents": ["x", "an [redacted: name]"]}
    other = (await keyed.fetch("/rerank", theirs, key=free)).json["results"]
    assert [(r["index"], r["relevance_score"]) for r in ours] == [(r["index"], r["relevance_score"]) for r in other]
    await asyncio.to_thread(
        keyed.ledger.tenants.update, "guarded", {"guards": [{**rule, "action": "refuse"}], "log_prompts": True}
    )
    await keyed.until_known("guarded", key)
    reply = await keyed.fetch("/v1/embeddings", {"model": "sim", "input": texts}, key=key)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (403, "guard_refused", "input")
    folder = keyed.file.parent / "gateway" / "prompts" / "guarded"
    await until(lambda: any("[redacted: name]" in f.read_text() for f in folder.glob("*.jsonl")), "prompts are logged")
    await cluster.until_idle()


# ---- accounts and metrics


async def test_usage_has_the_tokens_of_every_input(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, ledger: Ledger
) -> None:
    """A pooling call has one usage record for each input, with the input's tokens and no output. The call counts as one
    request, even with more inputs than a generation call may have outputs."""
    async with accounting_cluster(tmp_path / "g", ledger.usage.insert) as cluster:
        worker = await start_worker(
            sim_engine(checkpoint, **EMBEDDER), bundle, [cluster.gateway.endpoints["link"]], gpus=1.0
        )
        await until(lambda: any(link.free.sequences for link in cluster.gateway.hub.links), "a worker is linked")
        count = 1100
        ids = [pb.TokenIds(ids=[7] * (1 + i % 3)) for i in range(count)]
        answer = await cluster.stub.Embed(pb.EmbedRequest(model="sim", token_ids=ids, metadata={"team": "x"}))
        accounting = cluster.gateway.dispatch.accounting
        assert accounting is not None
        await until(lambda: len(accounting.accounts) == 0, "every account is closed")
        await until(lambda: accounting.statistics().pending == 0, "every record is in the database")
        found = records(ledger)
        assert sorted((one.segment, one.prompt_tokens) for one in found) == [(i, 1 + i % 3) for i in range(count)]
        assert sum(one.prompt_tokens for one in found) == answer.usage.prompt_tokens
        assert {(one.outcome, one.completion_tokens, one.generated_tokens, one.ttft_s) for one in found} == {
            ("ok", 0, 0, None)
        }
        assert sum(one.gpu_seconds for one in found) > 0
        assert {one.labels["team"] for one in found} == {"x"}
        (row,) = ledger.usage.query(UsageQuery(tenant="default"))
        assert row["requests"] == 1
        await worker.stop()


async def test_times_between_tokens_are_not_distorted(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Pooling calls count in the metrics of requests, prompt tokens and times. The histograms of times to first token
    and between tokens do not change, and neither does the tenant's expected output length."""
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle)
    answer = await cluster.stub.Embed(embed(BATCH[:50]))
    await cluster.until_idle()
    await until(lambda: sample(cluster, "request_duration_seconds_count") == 1, "the call is counted")
    assert sample(cluster, "queue_time_seconds_count") == 1
    assert sample(cluster, "time_to_first_token_seconds_count") == 0
    assert sample(cluster, "inter_token_latency_seconds_count") == 0
    assert sample(cluster, "prompt_tokens_total", tenant="default") == answer.usage.prompt_tokens
    assert sample(cluster, "generation_tokens_total", tenant="default") == 0
    assert sample(cluster, "requests_total", tenant="default", api="grpc", outcome="ok") == 1
    charges = cluster.gateway.scheduler.charges
    assert charges.learnt.expected("default", "sim", 1000) == charges.learnt.expected("nobody", "sim", 1000)


async def test_routing_is_explained(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A batch is spread over the workers. Calls with the same affinity key prefer one worker. The call and its routes
    can be looked up in the history of routes."""
    workers = [await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle) for _ in range(3)]
    meta = (("x-request-id", "mine"),)
    await cluster.stub.Embed(embed(BATCH), metadata=meta)
    assert all(worker.engine.load().steps for worker in workers)
    (call,) = cluster.gateway.scheduler.routes.history.find("mine")
    assert (call.outcome, len(call.routes) + call.omitted_routes) == ("ok", len(BATCH))
    before = [worker.engine.load().steps for worker in workers]
    for _ in range(5):
        await cluster.stub.Embed(embed(["a"], affinity_key="k"))
    moved = [worker.engine.load().steps - was for worker, was in zip(workers, before, strict=True)]
    assert sorted(map(bool, moved)) == [False, False, True]


# ---- models


async def test_a_batch_keeps_its_version(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """All vectors of a call come from one version, since vectors of two versions cannot be compared. If the version's
    only worker is lost, the call waits for another worker of that version."""
    shares = (VersionShare("v1", 0.5), VersionShare("v2", 0.5))
    entry = CatalogEntry("sim", state=ModelState.READY, versions=shares)
    cluster.gateway.worker_events.apply_catalog([entry])
    engines = {"v1": {**SLOW, "seed": 1}, "v2": {**SLOW, "seed": 2}}
    for version, engine in engines.items():
        await cluster.add_worker(sim_engine(checkpoint, **engine), bundle, version=version)
    call = asyncio.ensure_future(cluster.stub.Embed(embed(BATCH)))
    await until(lambda: any(w.engine.load().steps > 3 for w in cluster.workers), "the call runs")
    (used,) = [w for w in cluster.workers if w.engine.load().steps]
    await used.stop()
    version = used.identity.version
    await cluster.add_worker(sim_engine(checkpoint, **engines[version]), bundle, version=version)
    found = vectors_of([one.values for one in (await asyncio.wait_for(call, 60)).embeddings])
    assert sum(bool(w.engine.load().steps) for w in cluster.workers if not w.task.done()) == 1
    for worker in cluster.workers:
        if worker.identity.version != version:
            await worker.stop()
    assert np.array_equal(found, await embedded(cluster, BATCH, "sim"))


async def test_a_batch_keeps_its_weights(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """While replicas with other weights replace those of a version that keeps its name, all vectors of a call come from
    the weights of its first."""
    for number, digest in enumerate(("old", "new")):
        engine = sim_engine(checkpoint, **SLOW, seed=number)
        await cluster.add_worker(engine, bundle, version="v1", weight_digest=digest)
    answer = await asyncio.wait_for(cluster.stub.Embed(embed(BATCH)), 60)
    assert len(answer.embeddings) == len(BATCH)
    assert sum(bool(worker.engine.load().steps) for worker in cluster.workers) == 1
    await cluster.until_idle()


async def test_a_fallback_has_the_same_task(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """While a model has no worker, its calls go to the first fallback model with the same task. Fallback models without
    the task are skipped."""
    lost = CatalogEntry(
        "lost", state=ModelState.READY, fallback=("sim", "spare"), engine_class="e", tasks=(PoolingTask.EMBED,)
    )
    cluster.gateway.worker_events.apply_catalog([lost, CatalogEntry("sim"), CatalogEntry("spare")])
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    await cluster.add_worker(sim_engine(checkpoint, **EMBEDDER), bundle, model="spare")
    reply = await fetch(cluster, "/v1/embeddings", {"model": "lost", "input": "a"})
    assert (reply.status, reply.headers["x-headrace-model"]) == (200, "spare")
    unknown = CatalogEntry("fresh", state=ModelState.READY, fallback=("new", "spare"))  # their tasks are not known yet
    entries = [unknown, CatalogEntry("new", state=ModelState.LOADING), CatalogEntry("sim"), CatalogEntry("spare")]
    cluster.gateway.worker_events.apply_catalog(entries)
    reply = await fetch(cluster, "/rerank", {"model": "fresh", "query": "q", "documents": ["a"]})
    assert (reply.status, reply.headers["x-headrace-model"]) == (200, "spare")


async def test_the_catalog_knows_the_tasks_before_a_worker(cluster: TestCluster, bundle: Bundle) -> None:
    """Before a model's first worker connects, its tasks come from the catalog. Calls for other tasks are refused at
    once, and lists show the tasks. If the catalog has no tasks, a call is refused because the model is loading."""
    entry = CatalogEntry("sim", state=ModelState.LOADING, engine_class="e", tasks=(PoolingTask.SCORE,))
    cluster.gateway.worker_events.apply_catalog([entry, CatalogEntry("new", state=ModelState.LOADING)])
    assert (await refused(cluster.stub.Chat(chat()))).reason == "UNSUPPORTED_FEATURE"
    assert "no task embed" in (await refused(cluster.stub.Embed(embed(["a"])))).message
    model = await cluster.stub.GetModel(pb.GetModelRequest(name="sim"))
    assert list(model.capabilities) == ["pools:score"]
    assert (await fetch(cluster, "/v1/models/sim")).json["tasks"] == ["score"]
    assert (await fetch(cluster, "/v1/models/new")).json["tasks"] == []
    rerank = pb.RerankRequest(model="new", query="q", documents=["a"])
    assert (await refused(cluster.stub.Rerank(rerank))).reason == "MODEL_LOADING"
