"""Counts that a worker reports are bounded by what the gateway itself has counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.support.calls import chat
from tests.support.cluster import running_cluster, sim_engine, until
from tests.support.links import played_hello

pytestmark = pytest.mark.slow
MOST = 2**32 - 1


async def test_a_worker_cannot_set_the_size_of_a_prompt(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If a worker reports a huge prompt, cached prompt and reasoning for a call, the caller gets an answer, whose usage
    has the prompt that the gateway has sent, and at most as many cached and reasoning tokens as the call has."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle)
        true = await cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True))
        async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel:
            call: Any = pb_grpc.LinkStub(channel).Turn(timeout=20)
            hello = played_hello(bundle, "1")
            await call.write(pb.WorkerTurn(hello=hello))
            await read(call)
            await until(lambda: any(x.identity.model == "mad" for x in cluster.gateway.hub.links), "it is linked")
            await call.write(pb.WorkerTurn(credit=pb.Credit(grant_id=1, sequences=8, tokens=9999)))
            answer = asyncio.ensure_future(cluster.stub.Chat(chat(model="mad", max_tokens=3), timeout=10))
            while not (turn := await read(call)).submits:
                pass
            (slot,) = (submit.slot for submit in turn.submits)
            step = pb.StepOutputs(
                slots=[slot],
                token_ids=[65],
                firsts=[pb.First(slot=slot, prompt_tokens=MOST, cached_tokens=MOST)],
                finishes=[pb.Finish(slot=slot, reason=pb.Finish.REASON_LENGTH)],
                parts=[pb.SlotParts(slot=slot, reasoning_tokens=MOST)],
            )
            await call.write(pb.WorkerTurn(accepted=[pb.Accepted(slot=slot)], step=step))
            usage = (await answer).usage
            call.cancel()
    assert usage.prompt_tokens == usage.cached_tokens == true.usage.prompt_tokens
    assert usage.completion_tokens == 1
    assert usage.reasoning_tokens <= 1
