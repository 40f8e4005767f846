"""Resume of a stream at another gateway with the stream's resume tokens. A resume gives exactly the missing output,
succeeds once, and is allowed only to the stream's own caller."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.controller.links import ControllerLinks
from cluster.ledger.rows import UsageQuery
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import Answer, chat, complete, refused, rest_of, resume, text_of
from tests.support.cluster import LOOPBACK, TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.keyed import bearer, eventually, keyed_cluster
from tests.support.loop_clock import LoopClock

pytestmark = pytest.mark.slow

IMPATIENT = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {max_wait_s: 0.3}")


@dataclass
class Pair:
    """Two gateways with one secret, and a worker that is linked to both gateways."""

    first: TestCluster
    second: TestCluster
    worker: Worker


@pytest.fixture
async def pair(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    """Run two gateways that need no API keys. The secret of the resume tokens is in the cache folder, which both
    gateways share."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    async with running_cluster(tmp_path / "a") as first, running_cluster(tmp_path / "b") as second:
        yield Pair(first, second, await both(first, second, checkpoint, bundle))


async def both(first: TestCluster, second: TestCluster, checkpoint: Path, bundle: Bundle, **engine: Any) -> Worker:
    """Start a worker that is linked to both gateways."""
    links = [cluster.gateway.endpoints["link"] for cluster in (first, second)]
    engine = {"decode_ms": 3, **engine}
    worker = await first.add_worker(sim_engine(checkpoint, **engine), bundle, gateways=links)
    second.workers.append(worker)
    await until_linked(second, worker)
    return worker


async def until_linked(cluster: TestCluster, worker: Worker) -> None:
    """Wait until the worker is linked to this gateway."""
    await until(lambda: cluster.linked(worker.identity.worker_id), "the worker has dialled the other gateway too")


def kept(chunks: Sequence[Any]) -> list[Any]:
    """Return the chunks whose resume tokens a client must keep: the last chunk with `resume_token_whole` set, and all
    chunks after it. The resume token of this chunk replaces all earlier tokens."""
    return list(chunks)[max((at for at, chunk in enumerate(chunks) if chunk.resume_token_whole), default=0) :]


async def cut(cluster: TestCluster, request: Any, after: int) -> list[Any]:
    """Read the first chunks of a stream, then cancel the stream. Returns the chunks."""
    method = cluster.stub.StreamChat if isinstance(request, pb.ChatRequest) else cluster.stub.StreamComplete
    call = method(request)
    chunks = [await asyncio.wait_for(read(call), 60) for _ in range(after)]
    call.cancel()
    return chunks


async def broken(call: Any, chunks: list[Any]) -> Answer:
    """Read a stream to its error and return the error. The chunks before the error are appended to `chunks`."""
    try:
        while (message := await asyncio.wait_for(read(call), 60)) is not None:
            chunks.append(message.chat if isinstance(message, pb.ResumeChunk) else message)
    except grpc.aio.AioRpcError as error:
        return Answer(error)
    raise AssertionError("the stream came to its end")


async def rest(cluster: TestCluster, request: pb.ResumeRequest) -> list[Any]:
    """Return the chat or completion chunks of a resumed stream."""
    kind = "chat" if request.HasField("chat") else "complete"
    return [getattr(one, kind) for one in await asyncio.wait_for(rest_of(cluster.stub.Resume(request)), 60)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 0.8, "seed": 5},
        {"stop": ["zz", "qqqqqqqqq"]},
        {"logprobs": True, "top_logprobs": 2},
        {"stop": ["qqqqqqqqq"], "logprobs": True, "n": 2},
        {"response_format": pb.ResponseFormat(type="regex", regex="[a-z ]{90,200}")},
    ],
    ids=["plain", "several seeded", "stop strings", "log probabilities", "all of it", "grammar"],
)
@pytest.mark.parametrize("frugal", [True, False])
async def test_it_goes_on_at_another_gateway(pair: Pair, fields: Mapping[str, Any], frugal: bool) -> None:
    """A stream that is cut twice, and resumed at the other gateway each time, delivers the same text, log probabilities
    and counts as an uncut stream. The client keeps all resume tokens, or (`frugal`) only those since the last chunk
    with `resume_token_whole`."""
    request = chat(max_tokens=100, resumable=True, **{"ignore_eos": True, **fields})
    undisturbed = await rest_of(pair.first.stub.StreamChat(request))
    chunks = await cut(pair.first, request, 70)
    call = pair.second.stub.Resume(resume(request, kept(chunks) if frugal else chunks))
    for _ in range(9):
        chunks.append((await asyncio.wait_for(read(call), 60)).chat)
    call.cancel()
    if frugal:
        assert len(kept(chunks)) == 9
    chunks += await rest(pair.first, resume(request, kept(chunks) if frugal else chunks))
    for index in range(fields.get("n", 1)):
        assert text_of(chunks, index) == text_of(undisturbed, index) != ""
        ends = [
            [c.finish_reason for x in some for c in x.choices if c.index == index] for some in (chunks, undisturbed)
        ]
        assert ends[0][-1] == ends[1][-1] != ""
        logprobs = [
            [(t.token_id, t.token) for x in some for c in x.choices if c.index == index for t in c.logprobs]
            for some in (chunks, undisturbed)
        ]
        assert logprobs[0] == logprobs[1]
    usage, before = chunks[-1].usage, undisturbed[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (before.prompt_tokens, before.completion_tokens)
    assert usage.resumed >= 1
    assert [c.offset for c in chunks] == list(range(1, len(chunks) + 1))
    assert len({c.id for c in chunks}) == 1
    begun = [choice.index for c in chunks for choice in c.choices if choice.delta.role == "assistant"]
    assert sorted(begun) == list(range(fields.get("n", 1))), "each output names the role once"
    await pair.first.until_idle()
    await pair.second.until_idle()


async def test_it_goes_back_to_the_worker_that_has_its_blocks(pair: Pair, checkpoint: Path, bundle: Bundle) -> None:
    """A resumed call is sent to the worker that ran it before, even if other workers have more free capacity. That
    worker recomputes at most one KV block. If the call has moved to another worker, it is resumed on that worker."""
    workers = [pair.worker, *[await both(pair.first, pair.second, checkpoint, bundle) for _ in range(2)]]

    def counts(kind: str) -> list[int]:
        return [getattr(worker.engine.statistics(), kind) for worker in workers]  # type: ignore[attr-defined]

    request = chat(max_tokens=400, resumable=True, ignore_eos=True)
    chunks = await cut(pair.first, request, 60)
    (home,) = [at for at, submitted in enumerate(counts("submitted")) if submitted]
    for there in (pair.second, pair.first):
        busy = [there.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True)) for _ in range(3)]
        await asyncio.gather(*map(read, busy))  # so routing by free capacity would choose another worker
        submitted, computed = counts("submitted"), counts("prefill_tokens")
        call = there.stub.Resume(resume(request, chunks))
        chunks += [(await asyncio.wait_for(read(call), 60)).chat for _ in range(30)]
        submitted[home] += 1
        assert counts("submitted") == submitted
        assert counts("prefill_tokens")[home] - computed[home] <= workers[home].info.block_size
        for one in busy:
            one.cancel()
        await until(lambda: sum(counts("running")) == 1, "it runs alone")
        if there is pair.second:
            await workers[home].stop()
            chunks += [(await asyncio.wait_for(read(call), 60)).chat for _ in range(30)]
            (home,) = [at for at, number in enumerate(counts("submitted")) if number > submitted[at]]
        call.cancel()


async def test_all_of_a_lost_gateway_go_back_at_once(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the loss of a gateway, all calls resume at once, each on the worker that has its KV blocks. This holds
    although a worker could prefill only a few such prompts in a step. No prompt is computed again."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    engine = {"decode_ms": 30, "max_num_batched_tokens": 128, "max_num_seqs": 32, "kv_blocks": 4096}
    async with running_cluster(tmp_path / "a") as first, running_cluster(tmp_path / "b") as second:
        workers = [await both(first, second, checkpoint, bundle, **engine) for _ in range(2)]

        def counts(kind: str) -> list[int]:
            return [getattr(worker.engine.statistics(), kind) for worker in workers]  # type: ignore[attr-defined]

        long = [f"{number}: {'so it goes ' * 20}" for number in range(24)]
        requests = [chat(text, max_tokens=1500, resumable=True, ignore_eos=True) for text in long]
        calls = [first.stub.StreamChat(request) for request in requests]
        begun = [[await read(call) for _ in range(3)] for call in calls]
        at, computed = counts("running"), counts("prefill_tokens")
        assert min(at) > 8
        ends = asyncio.gather(*map(broken, calls, begun))
        await first.gateway.stop(0)
        await ends
        before = counts("submitted")
        goes_on = [second.stub.Resume(resume(*one)) for one in zip(requests, begun, strict=True)]
        await asyncio.gather(*(asyncio.wait_for(read(call), 60) for call in goes_on))
        await until(lambda: sum(counts("running")) == 24, "all have resumed")
        assert [now - then for now, then in zip(counts("submitted"), before, strict=True)] == at
        again = [now - then for now, then in zip(counts("prefill_tokens"), computed, strict=True)]
        assert sum(again) <= 24 * workers[0].info.block_size
        for call in goes_on:
            call.cancel()


@pytest.mark.parametrize("kind", ["chat", "complete"])
async def test_in_a_session(pair: Pair, kind: str) -> None:
    """In a session, the chunks of a call carry resume tokens, as in a stream. The call can be resumed in a session of
    another gateway."""
    request: Any = chat(max_tokens=60, ignore_eos=True, resumable=True)
    if kind == "complete":
        request = complete(max_tokens=60, ignore_eos=True, resumable=True)
    chunks: list[Any] = []
    for cluster, last in ((pair.first, False), (pair.second, True)):
        session = cluster.stub.Session()
        start = pb.SessionStart(call_id=7, **({"resume": resume(request, chunks)} if chunks else {kind: request}))
        await session.write(pb.SessionRequest(start=start))
        before = len(chunks)
        while not (chunks and chunks[-1].HasField("usage")) and (last or len(chunks) < before + 10):
            message = await asyncio.wait_for(read(session), 60)
            chunks += [getattr(event, kind) for event in message.events]
        session.cancel()
    whole: Any = await (pair.first.stub.Chat(request) if kind == "chat" else pair.first.stub.Complete(request))
    text = "".join(c.delta.content if kind == "chat" else c.text for x in chunks for c in x.choices)
    assert text == (whole.choices[0].message.content if kind == "chat" else whole.choices[0].text)
    assert [c.offset for c in chunks] == list(range(1, len(chunks) + 1))
    assert all(c.resume_token for c in chunks[:-1])
    assert not chunks[-1].resume_token


async def test_without_being_asked_nothing_is_sealed(pair: Pair) -> None:
    """The chunks of a call that is not resumable carry no resume tokens, and no secret is made."""
    chunks = await rest_of(pair.first.stub.StreamChat(chat()))
    assert not any(c.resume_token for c in chunks)
    assert pair.first.gateway.service.resumes is not None
    assert pair.first.gateway.service.resumes._envelopes is None


async def test_each_segment_is_resumed_once(pair: Pair) -> None:
    """Of several resumes that present the same resume tokens, only one succeeds. This holds for concurrent and for
    later resumes, whichever of the two gateways gets them."""
    request = chat(max_tokens=60, ignore_eos=True, resumable=True)
    chunks = await cut(pair.first, request, 8)
    asked = resume(request, chunks)
    stubs = [one.stub for one in (pair.first, pair.second, pair.first, pair.second)]
    ends = await asyncio.gather(*(rest_of(stub.Resume(asked)) for stub in stubs), return_exceptions=True)
    assert sum(isinstance(end, list) for end in ends) == 1
    errors = [Answer(end) for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert [(one.code, one.reason) for one in errors] == [(grpc.StatusCode.FAILED_PRECONDITION, "RESUME_EXPIRED")] * 3
    late = await refused(pair.second.stub.Resume(asked))
    assert "already" in late.message
    await rest(pair.second, resume(request, chunks[:-1]))  # another prefix may be resumed
    await pair.first.until_idle()


async def test_what_is_no_token_of_the_call_is_refused(pair: Pair) -> None:
    """A resume must present all tokens in order and the same request. Otherwise it is refused with the name of the
    wrong field, and starts nothing."""
    request = chat(max_tokens=60, ignore_eos=True, resumable=True)
    chunks = await cut(pair.first, request, 6)
    others = await cut(pair.first, request, 6)
    good = resume(request, chunks)
    tokens = list(good.resume_tokens)
    spoilt = bytes([*tokens[3][:-1], tokens[3][-1] ^ 1])
    wrong: dict[str, dict[str, Any]] = {
        "forged": {"resume_tokens": [*tokens[:3], b"x" * 120, *tokens[4:]]},
        "changed": {"resume_tokens": [*tokens[:3], spoilt, *tokens[4:]]},
        "out of order": {"resume_tokens": [*tokens[:3], tokens[4], tokens[3], tokens[5]]},
        "one missing": {"resume_tokens": tokens[:3] + tokens[4:]},
        "without a beginning": {"resume_tokens": tokens[1:]},
        "another call's": {"resume_tokens": [*tokens[:3], others[3].resume_token]},
        "none": {"resume_tokens": []},
        "another request": {"chat": chat("Something else", max_tokens=60, ignore_eos=True, resumable=True)},
        "other parameters": {"chat": chat(max_tokens=61, ignore_eos=True, resumable=True)},
        "not resumable": {"chat": chat(max_tokens=60, ignore_eos=True)},
        "another kind": {"chat": None, "complete": complete(resumable=True)},
        "no call": {"chat": None},
        "offset before": {"offset": good.offset - 1},
        "offset beyond": {"offset": good.offset + 1},
    }
    for name, changed in wrong.items():
        bad = resume(request, chunks)
        for field, value in changed.items():
            plain: Any = bad
            plain.ClearField(field)
            if value is not None:
                bad.MergeFrom(pb.ResumeRequest(**{field: value}))
        answer = await refused(pair.second.stub.Resume(bad))
        assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), name
        assert answer.fields, name
    assert await rest(pair.second, good)


@pytest.mark.parametrize("drain_s", [0.05, 1.0])
async def test_a_stopping_gateway_hands_its_streams_on(pair: Pair, drain_s: float) -> None:
    """When a gateway stops, its streams end with the status UNAVAILABLE and a retry delay. A client can resume a stream
    at another gateway with the resume tokens that it has received. This holds for a short and for a long drain time."""
    assert pair.first.gateway.config.gateway.drain_timeout_s <= 1.0
    request = chat(max_tokens=800, ignore_eos=True, resumable=True)
    whole = await pair.second.stub.Chat(request)
    calls = [pair.first.stub.StreamChat(request) for _ in range(4)]
    begun = [[await read(call)] for call in calls]
    stopping = asyncio.create_task(pair.first.gateway.stop(drain_s))
    for call, chunks in zip(calls, begun, strict=True):
        answer = await broken(call, chunks)
        assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
        assert answer.retry_s is not None
        assert all(c.resume_token for c in chunks)
    (chunks, *_) = begun
    chunks += await rest(pair.second, resume(request, chunks))
    assert text_of(chunks) == whole.choices[0].message.content
    await stopping


async def test_streams_are_handed_on_one_by_one(pair: Pair) -> None:
    """If a gateway drains while the controller knows another gateway, the resumable streams end one by one over the
    second half of the drain time, first those with the most tokens still to generate. Streams that are not resumable
    run to the end of the drain time."""
    drain_s = 2.0
    gateways = [one.gateway.endpoints["link"] for one in (pair.first, pair.second)]
    end = ControllerLinks(controller_id="c", gateways=gateways, tls=None, bundles=lambda _: None)
    end.publish([])
    controller = asyncio.create_task(end.run())
    try:
        await until(lambda: pair.first.gateway.hub.controller.gateways == 2, "the controller knows both")
        await _handed_on_one_by_one(pair, drain_s)
    finally:
        controller.cancel()
        await asyncio.gather(controller, return_exceptions=True)


async def _handed_on_one_by_one(pair: Pair, drain_s: float) -> None:
    lengths = [1400, 1800, 1600, 2000]
    requests = [chat(max_tokens=length, ignore_eos=True, resumable=True) for length in lengths]
    calls = [pair.first.stub.StreamChat(request) for request in requests]
    stays = pair.first.stub.StreamChat(chat(max_tokens=2000, ignore_eos=True))
    begun = [[await read(call)] for call in calls]
    last = [await read(stays)]
    begin = time.monotonic()
    stopping = asyncio.create_task(pair.first.gateway.stop(drain_s))

    async def time_of_end(call: Any, chunks: list[Any]) -> float:
        answer = await broken(call, chunks)
        assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
        return time.monotonic() - begin

    async with LoopClock() as clock:
        *ends, at_last = await asyncio.gather(*map(time_of_end, [*calls, stays], [*begun, last]))
    in_order = [end for _, end in sorted(zip(lengths, ends, strict=True), reverse=True)]
    least_s = drain_s / 2 / 4 / 2 - clock.stalled_s  # a stall delays a stream's end, but not the one after it
    assert drain_s / 2 <= in_order[0]
    assert all(later - sooner > least_s for sooner, later in itertools.pairwise(in_order))
    assert drain_s <= at_last
    assert at_last - in_order[-1] > least_s
    await stopping


async def test_it_waits_for_a_worker_and_can_be_asked_again(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume ends UNAVAILABLE if no compatible worker connects in time. Another resume with the same
    resume tokens succeeds once there is a compatible worker. A worker with other weights or another dtype is never
    used."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    text = IMPATIENT
    async with running_cluster(tmp_path / "a", text) as first, running_cluster(tmp_path / "b", text) as second:
        worker = await both(first, second, checkpoint, bundle)
        request = chat(max_tokens=60, ignore_eos=True, resumable=True)
        whole = await first.stub.Chat(request)
        chunks = await cut(first, request, 8)
        await worker.stop()
        engine = sim_engine(checkpoint, decode_ms=1)
        info = dataclasses.replace(await engine.start(), engine_class="bfloat16-tp2")
        await second.add_worker(engine, bundle, info=info)
        call = second.stub.Resume(resume(request, chunks))
        answer = await broken(call, chunks)
        assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        await second.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        chunks += await rest(second, resume(request, chunks))
        assert text_of(chunks) == whole.choices[0].message.content


async def test_tokens_expire_and_deadlines_stay(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expired tokens are refused with RESUME_EXPIRED. A resumed call ends at the deadline of its first request."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    short = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  resume: {token_expires_s: 2}")
    async with running_cluster(tmp_path / "a", short) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        request = chat(max_tokens=2000, ignore_eos=True, resumable=True)
        call = cluster.stub.StreamChat(request, timeout=1.2)
        chunks = [await read(call) for _ in range(5)]
        call.cancel()
        answer = await refused(cluster.stub.Resume(resume(request, chunks)))
        assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
        chunks = await cut(cluster, request, 3)

        async def expired() -> bool:
            again = chat(max_tokens=2, ignore_eos=True, resumable=True)
            assert (await cluster.stub.Chat(again)).usage.completion_tokens == 2
            return time.time() > began + 3.0

        began = time.time()
        await eventually(expired, "the tokens are old")
        answer = await refused(cluster.stub.Resume(resume(request, chunks)))
        assert (answer.reason, answer.code) == ("RESUME_EXPIRED", grpc.StatusCode.FAILED_PRECONDITION)
        await cluster.until_idle()


async def test_only_its_own_caller_goes_on_and_pays(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Only the API key that made a call can resume it. Another key, of the same or another tenant, gets the error of a
    forged resume token. If the tenant is suspended, the resume is refused.

    The ledger has two records: one of the cancelled stream and one of the resumed stream. Both records count the
    prompt; each output token is counted in only one record.
    """
    async with keyed_cluster(tmp_path) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=3), bundle)
        own, foreign = await keyed.key("acme", models=["*"]), await keyed.key("other", models=["*"])
        second = await keyed.another_key("acme")
        await keyed.until_known("acme", second)
        request = chat(max_tokens=60, ignore_eos=True, resumable=True)
        stub = keyed.cluster.stub
        named = (*bearer(own), ("x-request-id", "the-call"))
        call = stub.StreamChat(request, metadata=named)
        chunks = [await read(call) for _ in range(10)]
        call.cancel()
        asked = resume(request, chunks)
        for key in (foreign, second):
            answer = await refused(stub.Resume(asked, metadata=bearer(key)))
            assert (answer.reason, answer.fields) == ("INVALID_FIELD", ["resume_tokens[0]"])
        assert (await refused(stub.Resume(asked))).code is grpc.StatusCode.UNAUTHENTICATED
        await keyed.suspend("acme")
        await eventually(lambda: _refuses(stub, own), "the tenant is suspended")
        answer = await refused(stub.Resume(asked, metadata=bearer(own)))
        assert answer.reason == "TENANT_SUSPENDED"
        await keyed.suspend("acme", False)
        await keyed.until_known("acme", own)
        chunks += [one.chat for one in await rest_of(stub.Resume(asked, metadata=bearer(own)))]
        usage = chunks[-1].usage
        await keyed.cluster.until_idle()
        query = UsageQuery(tenant="acme")

        async def written() -> bool:
            return len([r for r in keyed.ledger.usage.records(query) if r.request_id == "the-call"]) == 2

        await eventually(written, "both records are there", 30)
        records = [r for r in keyed.ledger.usage.records(query) if r.request_id == "the-call"]
        assert [r.prompt_tokens for r in records] == [usage.prompt_tokens] * 2
        # the gateway counts tokens as delivered that were on their way when the client disconnected
        assert 60 <= sum(r.completion_tokens for r in records) <= 62
        assert records[1].completion_tokens <= 60 - 10


async def _refuses(stub: Any, key: str) -> bool:
    try:
        await stub.ListModels(pb.ListModelsRequest(), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.PERMISSION_DENIED
    return False


async def test_a_full_queue_refuses_no_part_of_a_resumed_call(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call is resumed although the queue of the other gateway is full and one of its outputs has not begun: the call
    passed a queue before, and a refusal would use up its resume tokens."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    small = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 0\n  queue: {max_requests: 1}")
    async with running_cluster(tmp_path / "a") as first, running_cluster(tmp_path / "b", small) as second:
        await both(first, second, checkpoint, bundle, max_num_seqs=2)
        request = chat(max_tokens=40, ignore_eos=True, n=4, resumable=True)
        chunks = await cut(first, request, 5)
        assert {choice.index for chunk in chunks for choice in chunk.choices} < {0, 1, 2, 3}
        await first.until_idle()
        queues, others = second.gateway.scheduler.queues, list[Any]()
        while queues.waiting("sim")[0] == 0:
            others.append(second.stub.StreamChat(chat("other", max_tokens=3000, ignore_eos=True)))
            await until(lambda: len(list(second.gateway.service.calls)) == len(others), "the call has come")
        again = second.stub.Resume(resume(request, chunks))
        await until(lambda: queues.waiting("sim")[0] > 1, "the call waits beside it")
        for other in others:
            other.cancel()
        rest = await rest_of(again)
        assert {choice.index for part in rest for choice in part.chat.choices if choice.finish_reason} == {0, 1, 2, 3}
