"""Tests of cache-aware routing with a real gateway and simulated engines: calls go where their prefix is cached."""

from __future__ import annotations

from pathlib import Path

from cluster.api.types import EngineRequest, Sampling
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import complete
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until

BLOCK, TOKENS, TURNS = 16, 24, 4


def prompt(number: int, tokens: int = 40 * BLOCK) -> list[int]:
    """Return a prompt that shares no block with the prompts of other numbers."""
    return [100 + (number * 7919 + at * (number + 3)) % 600 for at in range(tokens)]


async def turn(cluster: TestCluster, ids: list[int]) -> tuple[list[int], int]:
    """Send a prompt; return a prompt that begins with it, and the number of cached tokens."""
    request = complete("", prompt_token_ids=ids, max_tokens=TOKENS, ignore_eos=True)
    answer = await cluster.stub.Complete(request)
    assert isinstance(answer, pb.CompleteResponse)
    return [*ids, *range(100, 140)], answer.usage.cached_tokens


def matched(cluster: TestCluster, ids: list[int], salt: str = "") -> dict[str, int]:
    """Return the tokens of a prompt that the gateway believes cached, by worker."""
    request = EngineRequest("", ids, Sampling(max_tokens=1), cache_salt=salt)
    return dict(cluster.gateway.scheduler.worker_caches.cached_tokens("sim", f"{ids}{salt}", request) or {})


async def test_turns_of_a_conversation_go_to_the_worker_that_holds_it(
    tmp_path: Path, checkpoint: Path, bundle: Bundle
) -> None:
    async with running_cluster(tmp_path) as cluster:
        engines = [sim_engine(checkpoint, decode_ms=1, block_size=BLOCK) for _ in range(3)]
        for engine in engines:
            await cluster.add_worker(engine, bundle)
        conversations, before = [prompt(number, 600) for number in range(6)], [0] * 6
        for _ in range(TURNS):
            for at, ids in enumerate(conversations):
                conversations[at], cached = await turn(cluster, ids)
                assert cached == before[at] // BLOCK * BLOCK
                before[at] = len(ids)
        assert len([engine for engine in engines if engine.statistics().submitted]) > 1


async def test_the_gateway_knows_what_the_engines_hold(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Reports arrive, name the blocks under the call's salt alone, follow evictions, and end with the link."""
    async with running_cluster(tmp_path) as cluster:
        engine = sim_engine(checkpoint, decode_ms=1, block_size=BLOCK, kv_blocks=128, max_model_len=2048)
        worker = await cluster.add_worker(engine, bundle)
        name, ids = worker.identity.worker_id, prompt(0)
        await turn(cluster, ids)
        assert matched(cluster, ids) == {name: 39 * BLOCK}  # the last token is always computed
        assert matched(cluster, [*ids, 1]) == {name: 40 * BLOCK}
        assert matched(cluster, ids, "another tenant's") == {}
        for number in range(4):
            await turn(cluster, prompt(1 + number))
        await until(lambda: not matched(cluster, ids), "the eviction is known")
        await worker.stop()
        await until(lambda: not cluster.gateway.hub.links, "the link has ended")
        assert matched(cluster, prompt(4)) == {}


async def test_a_new_link_gets_all_blocks(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    async with running_cluster(tmp_path) as cluster:
        worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1, block_size=BLOCK), bundle)
        ids = prompt(0)
        await turn(cluster, ids)
        (link,) = cluster.gateway.hub.links
        link.close("the test wants another")
        await until(lambda: cluster.gateway.hub.links not in ([], [link]), "the worker has connected again")
        await until(lambda: matched(cluster, [*ids, 1]) == {worker.identity.worker_id: 40 * BLOCK}, "it is known")
