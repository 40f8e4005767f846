"""The priority class of a call: a call may name one of the classes that its tenant may use."""

from __future__ import annotations

import asyncio
from pathlib import Path

from cluster.gateway.apis.openai.fields import Fields
from cluster.gateway.apis.openai.requests import parse_chat, parse_completion
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, complete, refused
from tests.support.cluster import TestCluster, sim_engine, until
from tests.support.http import chat_body, completion_body


async def test_a_call_of_a_later_class_waits_for_the_tenants_other_calls(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A call may request a lower priority class than its tenant's. It then waits for the tenant's calls of the usual
    class, even if they came later."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=2, max_num_seqs=1), bundle)
    first = cluster.stub.StreamChat(chat(max_tokens=60, ignore_eos=True))
    await first.read()
    ended: list[str] = []

    async def call(name: str, **fields: str) -> None:
        await cluster.stub.Complete(complete(max_tokens=5, **fields))
        ended.append(name)

    waiting = [asyncio.ensure_future(call("late", priority="batch"))]
    await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] == 1, "the batch call waits")
    waiting.append(asyncio.ensure_future(call("own")))
    await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] == 2, "both wait")
    await asyncio.gather(*waiting)
    assert ended == ["own", "late"]
    await cluster.until_idle()


async def test_the_error_lists_the_classes_of_the_tenant(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A class that is unknown, or is served before the tenant's own class, is refused. The error lists the allowed
    classes."""
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    for name in ("interactive", "x" * 1000):
        answer = await refused(cluster.stub.Chat(chat(priority=name)))
        assert answer.fields == ["priority"]
        assert "one of standard, batch;" in answer.message
        assert len(answer.message) < 300


def test_http_reads_the_class() -> None:
    """A request for a chat or a completion over HTTP may name a priority class. Null, and vLLM's default of 0, stand
    for the tenant's own class."""
    for value, name in (("batch", "batch"), (None, ""), (0, ""), ("", "")):
        assert parse_chat(Fields(chat_body(priority=value))).requests[0].priority_class == name
        assert parse_completion(Fields(completion_body(priority=value))).requests[0].priority_class == name
