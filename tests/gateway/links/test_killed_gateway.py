"""Streams of a killed gateway. Their requests keep running on the workers for a short time, and a resume at another
gateway takes them over."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.worker.detached_requests import DETACHED_S
from tests.support.calls import chat, rest_of, resume, text_of
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.gateway_process import gateway_process

pytestmark = pytest.mark.slow

PLACES = 6


@dataclass
class Doomed:
    """A gateway in a separate process, a gateway in the test's process, and a worker that is linked to both
    gateways."""

    pid: int
    stub: Any
    survivor: TestCluster
    worker: Worker

    def kill(self) -> None:
        """Kill the separate gateway at once, which breaks all its connections."""
        os.kill(self.pid, signal.SIGKILL)

    def count(self, kind: str) -> int:
        """Return the value of the engine's counter `kind`."""
        found: int = getattr(self.worker.engine.statistics(), kind)  # type: ignore[attr-defined]
        return found


@pytest.fixture
async def doomed(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Doomed]:
    """Provide a gateway process that a test can kill, another gateway, and a worker that is linked to both. The
    gateways have the same secret, from one cache folder."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    async with running_cluster(tmp_path / "survivor") as survivor, gateway_process(tmp_path / "doomed") as other:
        links = [survivor.gateway.endpoints["link"], other.link]
        engine = sim_engine(checkpoint, decode_ms=4, max_num_seqs=PLACES, kv_blocks=4096)
        worker = await survivor.add_worker(engine, bundle, gateways=links)
        await until(lambda: worker.end.statistics().links == 2, "the worker has dialled both")
        yield Doomed(other.pid, other.stub, survivor, worker)


async def begun(doomed: Doomed, requests: Sequence[Any]) -> list[list[Any]]:
    """Read some chunks of each stream, then kill the gateway, which runs in a separate process. Returns all chunks that
    arrived."""
    calls = [doomed.stub.StreamChat(request, wait_for_ready=True) for request in requests]
    chunks = [[await asyncio.wait_for(read(call), 60) for _ in range(4)] for call in calls]
    doomed.kill()
    await asyncio.gather(*map(_to_its_break, calls, chunks))
    return chunks


async def _to_its_break(call: Any, chunks: list[Any]) -> None:
    try:
        while (chunk := await asyncio.wait_for(read(call), 60)) is not None:
            chunks.append(chunk)
    except grpc.aio.AioRpcError:
        return
    raise AssertionError("the stream came to its end")


async def go_on(doomed: Doomed, requests: Sequence[Any], chunks: Sequence[list[Any]]) -> list[list[Any]]:
    """Resume all streams at the surviving gateway. Returns all chunks of each stream, including the chunks that were
    read before."""
    calls = [doomed.survivor.stub.Resume(resume(*one)) for one in zip(requests, chunks, strict=True)]
    rests = await asyncio.gather(*(asyncio.wait_for(rest_of(call), 60) for call in calls))
    return [[*first, *(one.chat for one in rest)] for first, rest in zip(chunks, rests, strict=True)]


def of_any_kind(tokens: int) -> list[Any]:
    """Return requests of different kinds: with and without a seed, a stop string and several outputs."""
    return [
        chat("One", max_tokens=tokens, ignore_eos=True, resumable=True),
        chat("Two", max_tokens=tokens, ignore_eos=True, resumable=True, temperature=0.8, seed=5),
        chat("Three", max_tokens=tokens, ignore_eos=True, resumable=True, stop=["qqqqqqqqq"]),
        chat("Four", max_tokens=tokens, ignore_eos=True, resumable=True, n=2, temperature=0.5, seed=7),
    ]


@pytest.mark.parametrize("tokens", [60, 500], ids=["end-meanwhile", "go-on"])
async def test_they_are_found_running(doomed: Doomed, tokens: int) -> None:
    """After a gateway was killed, its streams are resumed at another gateway. The workers still run the requests, or
    have finished them meanwhile, so no request is submitted or computed again. Callers get the same output as without
    the kill."""
    requests = of_any_kind(tokens)
    whole = await asyncio.gather(*(rest_of(doomed.survivor.stub.StreamChat(request)) for request in requests))
    submitted = doomed.count("submitted")
    chunks = await begun(doomed, requests)
    first, computed = doomed.count("submitted"), doomed.count("prefill_tokens")
    assert first == submitted + 5
    if tokens == 60:
        await until(lambda: not doomed.count("running"), "they have ended, and nobody was told")
    ended = await go_on(doomed, requests, chunks)
    for mine, undisturbed in zip(ended, whole, strict=True):
        for index in {choice.index for chunk in undisturbed for choice in chunk.choices}:
            assert text_of(mine, index) == text_of(undisturbed, index) != ""
        assert mine[-1].usage.completion_tokens == undisturbed[-1].usage.completion_tokens
        assert mine[-1].usage.prompt_tokens == undisturbed[-1].usage.prompt_tokens
        assert mine[-1].usage.resumed >= 1
        assert [chunk.offset for chunk in mine] == list(range(1, len(mine) + 1))
    assert doomed.count("submitted") == first
    assert doomed.count("prefill_tokens") == computed
    await doomed.survivor.until_idle()
    assert doomed.worker.end.statistics().tokens == doomed.worker.end.statistics().detached == 0


async def test_an_end_that_was_lost_is_found(doomed: Doomed) -> None:
    """If the last chunks of a stream were in flight when its gateway died, a resume delivers them without another
    submission to the engine."""
    request = chat(max_tokens=40, ignore_eos=True, resumable=True)
    chunks = await rest_of(doomed.stub.StreamChat(request, wait_for_ready=True))
    submitted = doomed.count("submitted")
    doomed.kill()
    (ended,) = await go_on(doomed, [request], [chunks[:30]])
    assert text_of(ended) == text_of(chunks)
    assert ended[-1].usage.completion_tokens == 40
    assert doomed.count("submitted") == submitted


async def test_one_that_has_come_back_before_is_not_kept_twice(doomed: Doomed) -> None:
    """The client of a stopped gateway resumes its stream at another gateway before the stopped gateway's links break.
    The worker then ends the stopped gateway's request at once, and does not keep it as detached when the links
    break."""
    request = chat(max_tokens=2000, ignore_eos=True, resumable=True)
    call = doomed.stub.StreamChat(request, wait_for_ready=True)
    chunks = [await asyncio.wait_for(read(call), 60) for _ in range(4)]
    os.kill(doomed.pid, signal.SIGSTOP)
    onward = doomed.survivor.stub.Resume(resume(request, chunks))
    await asyncio.wait_for(read(onward), 60)
    await until(lambda: doomed.count("running") == 1, "the one that was taken over has ended", 0.8 * DETACHED_S)
    doomed.kill()
    await until(lambda: doomed.worker.end.statistics().links == 1, "the worker has seen it")
    assert doomed.count("running") == 1
    assert doomed.worker.end.statistics().detached == 0
    onward.cancel()
    await until(lambda: doomed.count("running") == 0, "and the other with its caller")


async def test_they_end_when_nobody_comes(doomed: Doomed) -> None:
    """A detached request is one whose gateway is gone. It frees its slot after a moment if it is not resumed, and at
    once if it cannot be resumed."""
    lasting = [chat(max_tokens=3000, ignore_eos=True, resumable=resumable) for resumable in (True, False)]
    kinds = [*lasting, chat(max_tokens=3000, ignore_eos=True, resumable=True, logprobs=True)]
    await begun(doomed, kinds)
    await until(lambda: doomed.worker.end.statistics().links == 1, "the worker has seen it")
    await until(lambda: doomed.count("running") == 1, "only one can come back")
    assert doomed.worker.end.statistics().detached == 1
    await until(lambda: not doomed.count("running"), "nobody came", DETACHED_S + 2)
    assert doomed.worker.end.statistics().detached == 0
    answer = await doomed.survivor.stub.Chat(chat(max_tokens=5, ignore_eos=True))
    assert answer.usage.completion_tokens == 5


async def test_they_keep_their_places(doomed: Doomed) -> None:
    """Requests whose gateway was killed (detached requests) keep their slots, so they can be resumed at once while new
    calls wait. A new call starts only after a resumed call has ended."""
    requests = [chat(str(number), max_tokens=700, ignore_eos=True, resumable=True) for number in range(PLACES)]
    chunks = await begun(doomed, requests)
    await until(lambda: doomed.worker.end.statistics().detached == PLACES, "all are without a gateway")
    submitted = doomed.count("submitted")
    later = [asyncio.create_task(_one(doomed.survivor)) for _ in range(3)]
    await until(lambda: doomed.survivor.gateway.scheduler.queues.waiting("sim")[0] == 3, "the others wait")
    calls = [doomed.survivor.stub.Resume(resume(*one)) for one in zip(requests, chunks, strict=True)]
    await asyncio.gather(*(asyncio.wait_for(read(call), 60) for call in calls))
    assert doomed.count("submitted") == submitted
    for call in calls:
        call.cancel()
    assert await asyncio.gather(*later) == [5] * 3
    await doomed.survivor.until_idle()


async def _one(cluster: TestCluster) -> int:
    answer = await cluster.stub.Chat(chat(max_tokens=5, ignore_eos=True))
    tokens: int = answer.usage.completion_tokens
    return tokens
