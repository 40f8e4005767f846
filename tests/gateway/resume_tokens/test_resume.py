"""Resume after the loss, hang or drain of a worker. The caller gets the same text as from an undisturbed worker."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.api.types import RESUME_EXACT, RESUME_PLAIN, RESUME_STATE
from cluster.gateway.apis.grpc.answers import common_capabilities
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat, complete, refused, rest_of, text_of
from tests.support.cluster import LOOPBACK, TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.cuttable import cuttable
from tests.support.loop_clock import within

pytestmark = pytest.mark.slow

IMPATIENT = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_attempts: 3, max_wait_s: 0.3}")


def with_calls(cluster: TestCluster) -> Worker:
    """Return a worker that is running a sequence."""
    return next(worker for worker in cluster.workers if worker.end.statistics().running)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 0.8, "seed": 5},
        {"stop": ["zz", "qqqq"]},
        {"logprobs": True, "top_logprobs": 2},
    ],
    ids=["plain", "several seeded", "stop strings", "log probabilities"],
)
async def test_a_stream_goes_on_at_another_worker(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, fields: Mapping[str, Any]
) -> None:
    """After the loss of a worker in mid-stream, the caller gets every token once and in order, with its log
    probability. The usage has the number of resumes."""
    for _ in range(3):
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=3), bundle)
    request = chat(max_tokens=120, ignore_eos=True, **fields)
    undisturbed = [c async for c in cluster.stub.StreamChat(request)]
    call = cluster.stub.StreamChat(request)
    chunks: list[pb.ChatChunk] = []
    for doomed in range(2):
        while sum(len(c.choices) for c in chunks) < 20 * (doomed + 1):
            chunks.append(await asyncio.wait_for(read(call), 60))
        await with_calls(cluster).stop()
    chunks += await rest_of(call)
    n = fields.get("n", 1)
    for index in range(n):
        assert text_of(chunks, index) == text_of(undisturbed, index) != ""
    logprob_ids = [[t.token_id for c in some for d in c.choices for t in d.logprobs] for some in (chunks, undisturbed)]
    assert logprob_ids[0] == logprob_ids[1]
    usage, before = chunks[-1].usage, undisturbed[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (before.prompt_tokens, before.completion_tokens)
    assert usage.resumed >= 2
    assert [c.offset for c in chunks] == sorted({c.offset for c in chunks})
    await cluster.until_idle()


async def test_only_a_worker_like_the_first_goes_on(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call does not resume on a worker with other weights or another dtype, even if that worker has capacity. The
    call ends UNAVAILABLE after all received text was delivered. Meanwhile new calls use that worker."""
    async with running_cluster(tmp_path, IMPATIENT) as cluster:
        doomed = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        call = cluster.stub.StreamChat(chat(max_tokens=1000, ignore_eos=True))
        assert (await read(call)).choices
        engine = sim_engine(checkpoint, decode_ms=1)
        info = dataclasses.replace(await engine.start(), engine_class="bfloat16-tp2")
        await cluster.add_worker(engine, bundle, info=info)
        await doomed.stop()
        other = await cluster.stub.Complete(complete(max_tokens=5, ignore_eos=True))
        assert other.usage.completion_tokens == 5
        answer = await refused(rest_of(call))
        assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        assert answer.retry_s is not None
        await cluster.until_idle()


async def test_it_waits_for_a_worker_to_come(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A call that has lost its only worker waits, reports the state "resuming", and continues when a compatible worker
    connects."""
    doomed = await cluster.add_worker(sim_engine(checkpoint, decode_ms=3), bundle)
    request = chat(max_tokens=60, ignore_eos=True)
    whole = await cluster.stub.Chat(request)
    call = cluster.stub.StreamChat(request)
    chunks = [await read(call), await read(call)]
    await doomed.stop()
    (running,) = cluster.gateway.service.calls
    await until(lambda: cluster.gateway.scheduler.queues.is_resuming(running), "the call waits to be resumed")
    assert cluster.gateway.scheduler.queues.waiting("sim")[0] == 1
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    chunks += await rest_of(call)
    assert text_of(chunks) == whole.choices[0].message.content
    assert (chunks[-1].usage.resumed, chunks[-1].usage.resume) == (1, "exact")
    assert whole.usage.resume == "", "nothing went on"
    await cluster.until_idle()


@pytest.mark.parametrize(
    ("each", "common"),
    [
        ([], ()),
        ([("chat", RESUME_EXACT)], ["chat", RESUME_EXACT]),
        ([("chat", "logprobs", RESUME_EXACT), (RESUME_STATE, "chat")], ["chat", RESUME_STATE]),
        ([("chat", RESUME_STATE), ("chat", RESUME_PLAIN), ("chat", RESUME_EXACT)], ["chat", RESUME_PLAIN]),
    ],
)
def test_a_model_promises_what_all_its_workers_do(each: list[tuple[str, ...]], common: Sequence[str]) -> None:
    """ListModels reports the capabilities that all workers of a model have, and the weakest resume capability among
    them."""
    assert list(common_capabilities(each)) == list(common)


async def test_those_that_go_on_come_before_those_that_begin(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """Resumed calls are sent before new calls."""
    doomed = await cluster.add_worker(sim_engine(checkpoint, decode_ms=3, max_num_seqs=2), bundle)
    begun = [cluster.stub.StreamChat(chat(str(i), max_tokens=80, ignore_eos=True)) for i in range(2)]
    for call in begun:
        assert (await read(call)).choices
    late = [
        asyncio.ensure_future(cluster.stub.Chat(chat(f"late {i}", max_tokens=80, ignore_eos=True))) for i in range(12)
    ]
    await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] >= 10, "the others wait")
    await doomed.stop()
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=3, max_num_seqs=2), bundle, wait=False)
    rests = await asyncio.gather(*(rest_of(call) for call in begun))
    assert [rest[-1].usage.resumed for rest in rests] == [1, 1]
    assert sum(one.done() for one in late) <= 4, "at the end of the line they would be the last"
    await asyncio.gather(*late)
    await cluster.until_idle()


async def test_continued_calls_follow_one_another(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If prefill pacing allows only one resumed prompt at a time, the next prompt is sent when the prefill of the
    previous one has ended, while the previous call still runs."""
    doomed = await cluster.add_worker(sim_engine(checkpoint, decode_ms=3), bundle)
    calls = [cluster.stub.StreamChat(chat(str(i), max_tokens=1000, ignore_eos=True)) for i in range(3)]
    for call in calls:
        assert (await read(call)).choices
    await doomed.stop()
    survivor = await cluster.add_worker(
        sim_engine(checkpoint, decode_ms=20, max_num_seqs=8, max_num_batched_tokens=8), bundle, wait=False
    )
    await until(lambda: survivor.end.statistics().running == 3, "all three have resumed")
    for call in calls:
        call.cancel()
    await cluster.until_idle()


async def test_a_call_that_fails_everywhere_ends(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A call that fails on every engine ends, and other calls continue."""
    workers = [
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=2, fault="nan@step:0"), bundle) for _ in range(3)
    ]
    answer = await refused(cluster.stub.StreamChat(chat(max_tokens=100, ignore_eos=True)))
    assert answer.reason == "INTERNAL"
    assert sum(worker.engine.load().steps > 0 for worker in workers) == 3, "each of them has tried"
    await cluster.until_idle()


async def test_one_engines_nonsense_is_made_good_by_another(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A call that failed on one engine is not sent to this engine again while another engine is available."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=2, fault="nan@step:9"), bundle)
    call = cluster.stub.StreamChat(chat(max_tokens=60, ignore_eos=True))
    first = await read(call)
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=2), bundle)
    chunks = [first, *await rest_of(call)]
    whole = await cluster.stub.Chat(chat(max_tokens=60, ignore_eos=True))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage.resumed == 1


@pytest.mark.slow
@pytest.mark.thorough
async def test_a_stuck_engine_is_found_and_spared(watchful: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If an engine stops stepping while its process still sends beats, its calls move to another worker in time, and
    the engine gets no new calls. It gets calls again when it steps again."""
    stuck = sim_engine(checkpoint, decode_ms=5)
    await watchful.add_worker(stuck, bundle)
    request = chat(max_tokens=150, ignore_eos=True)
    call = watchful.stub.StreamChat(request)
    chunks = [await read(call) for _ in range(5)]
    other = await watchful.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    stuck.faults.arm("step", "hang")
    chunks += await within(0.5 + 150 * 0.005 + 2.0, rest_of(call))
    assert chunks[-1].usage.resumed == 1
    assert text_of(chunks) == (await watchful.stub.Chat(request)).choices[0].message.content
    before = stuck.load().steps
    for _ in range(4):
        await watchful.stub.Chat(chat(max_tokens=2, ignore_eos=True))
    assert stuck.load().steps == before
    stuck.faults.heal()
    await other.stop()
    answer = await watchful.stub.Chat(request)
    assert answer.usage.completion_tokens == 150
    assert stuck.load().steps > before


@pytest.mark.slow
@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_link_cut_one_way_is_found(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, watchful: TestCluster, way: str
) -> None:
    """If a link's connection carries no data in one direction, the link's calls are resumed on another worker. This
    holds even while heartbeats, which have their own connection, still arrive."""
    async with cuttable(watchful.gateway.endpoints["link"]) as relay:
        await watchful.add_worker(sim_engine(checkpoint, decode_ms=5), bundle, gateways=[relay.address])
        request = chat(max_tokens=300, ignore_eos=True)
        call = watchful.stub.StreamChat(request)
        chunks = [await read(call) for _ in range(5)]
        await watchful.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        turn = relay.ways[0]
        turn[way == "down"].cut()
        short = [chat(str(number), max_tokens=5, ignore_eos=True) for number in range(8)]
        late = [asyncio.ensure_future(watchful.stub.Chat(one)) for one in short]
        chunks += await asyncio.wait_for(rest_of(call), 60)
        assert chunks[-1].usage.completion_tokens == 300
        assert text_of(chunks) == (await watchful.stub.Chat(request)).choices[0].message.content
        assert [answer.usage.completion_tokens for answer in await asyncio.gather(*late)] == [5] * 8


async def test_streams_move_when_their_worker_leaves(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The streams of a draining worker move to other workers, and all are complete. The draining worker is empty long
    before its longest stream would have ended."""
    leaving = await cluster.add_worker(sim_engine(checkpoint, decode_ms=10), bundle)
    request = chat(max_tokens=400, ignore_eos=True)
    calls = [cluster.stub.StreamChat(request) for _ in range(3)]
    chunks = [[await read(call)] for call in calls]
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    assert await leaving.end.drain(3.0)
    for some, call in zip(chunks, calls, strict=True):
        some += await rest_of(call)
        assert some[-1].usage.completion_tokens == 400
        assert some[-1].usage.resumed == 1
    whole = await cluster.stub.Chat(request)
    assert {text_of(some) for some in chunks} == {whole.choices[0].message.content}
    await cluster.until_idle()
