"""A stream outlives its gateway: with its tokens it goes on at another, exactly, once, and for its own caller only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.api.bundle import Bundle
from cluster.link.dial import read
from cluster.v1 import inference_pb2 as pb
from tests.support.calls import chat, rest_of, text_of
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until


@dataclass
class Pair:
    """Two gateways with one secret, and a worker that has dialled both."""

    first: TestCluster
    second: TestCluster
    worker: Worker


@pytest.fixture
async def pair(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pair]:
    """Without keys: the secret rests in the cache folder, which both share."""
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    async with running_cluster(tmp_path / "a") as first, running_cluster(tmp_path / "b") as second:
        yield Pair(first, second, await both(first, second, checkpoint, bundle))


async def both(first: TestCluster, second: TestCluster, checkpoint: Path, bundle: Bundle, **engine: Any) -> Worker:
    """A worker of both gateways."""
    links = [one.gateway.endpoints["link"] for one in (first, second)]
    engine = {"decode_ms": 3, **engine}
    worker = await first.add_worker(sim_engine(checkpoint, **engine), bundle, gateways=links)
    second.workers.append(worker)
    await until_linked(second, worker)
    return worker


async def until_linked(cluster: TestCluster, worker: Worker) -> None:
    """Wait for the worker's link."""
    await until(lambda: cluster.linked(worker.identity.worker_id), "the worker has dialled the other gateway too")


def resume(request: Any, chunks: Sequence[Any], **changed: Any) -> pb.ResumeRequest:
    """The request that goes on behind these chunks."""
    tokens = [chunk.resume_token for chunk in chunks if chunk.resume_token]
    offset = max((chunk.offset for chunk in chunks), default=0)
    kind = "chat" if isinstance(request, pb.ChatRequest) else "complete"
    return pb.ResumeRequest(**{kind: request, "resume_tokens": tokens, "offset": offset, **changed})


async def cut(cluster: TestCluster, request: Any, after: int) -> list[Any]:
    """So many chunks of a stream, whose client then goes away."""
    method = cluster.stub.StreamChat if isinstance(request, pb.ChatRequest) else cluster.stub.StreamComplete
    call = method(request)
    chunks = [await asyncio.wait_for(read(call), 10) for _ in range(after)]
    call.cancel()
    return chunks


async def rest(cluster: TestCluster, request: pb.ResumeRequest) -> list[Any]:
    """All chunks of a resumed stream, unwrapped."""
    kind = "chat" if request.HasField("chat") else "complete"
    return [getattr(one, kind) for one in await asyncio.wait_for(rest_of(cluster.stub.Resume(request)), 20)]


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
async def test_it_goes_on_at_another_gateway(pair: Pair, fields: Mapping[str, Any]) -> None:
    """Cut twice, at either gateway, the caller has read what it would have read: text, log probabilities and counts."""
    request = chat(max_tokens=80, resumable=True, **{"ignore_eos": True, **fields})
    undisturbed = await rest_of(pair.first.stub.StreamChat(request))
    chunks = await cut(pair.first, request, 12)
    call = pair.second.stub.Resume(resume(request, chunks))
    for _ in range(9):
        chunks.append((await asyncio.wait_for(read(call), 10)).chat)
    call.cancel()
    chunks += await rest(pair.first, resume(request, chunks))
    for index in range(fields.get("n", 1)):
        assert text_of(chunks, index) == text_of(undisturbed, index) != ""
        ends = [
            [c.finish_reason for x in some for c in x.choices if c.index == index] for some in (chunks, undisturbed)
        ]
        assert ends[0][-1] == ends[1][-1] != ""
        told = [
            [(t.token_id, t.token) for x in some for c in x.choices if c.index == index for t in c.logprobs]
            for some in (chunks, undisturbed)
        ]
        assert told[0] == told[1]
    usage, before = chunks[-1].usage, undisturbed[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (before.prompt_tokens, before.completion_tokens)
    assert usage.resumed >= 1
    assert [c.offset for c in chunks] == list(range(1, len(chunks) + 1))
    assert len({c.id for c in chunks}) == 1
    assert sum(c.choices[0].delta.role == "assistant" for c in chunks if c.choices) == 1
    await pair.first.until_idle()
    await pair.second.until_idle()
