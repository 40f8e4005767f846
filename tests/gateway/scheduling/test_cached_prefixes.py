"""Cache-aware routing with a real gateway and simulated engines: calls go to workers that have cached their prefix."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cluster.api.types import KV_EVENTS, EngineInfo, EngineRequest, Sampling, WorkerIdentity
from cluster.gateway.scheduling.worker_caches import WorkerCaches
from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.kv_cache.prefix_hashes import prefix_hashes, seed_of
from cluster.process.ports import free_port
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.codecs.kv_codec import BLOCKS_PER_MESSAGE, kv_blocks_to_pb
from tests.support.calls import complete
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until

BLOCK, TOKENS, TURNS = 16, 24, 4


def prompt(number: int, tokens: int = 40 * BLOCK) -> list[int]:
    """Return a prompt of `tokens` token ids. Prompts with different values of `number` have no KV block in common."""
    return [100 + (number * 7919 + at * (number + 3)) % 600 for at in range(tokens)]


async def turn(cluster: TestCluster, ids: list[int], tokens: int = TOKENS) -> tuple[list[int], int]:
    """Complete a prompt. Returns a longer prompt that begins with it, and the number of cached tokens."""
    request = complete("", prompt_token_ids=ids, max_tokens=tokens, ignore_eos=True)
    answer = await cluster.stub.Complete(request)
    assert isinstance(answer, pb.CompleteResponse)
    return [*ids, *range(100, 140)], answer.usage.cached_tokens


def matched(cluster: TestCluster, ids: list[int], salt: str = "") -> dict[str, int]:
    """Return how many tokens of a prompt the gateway believes to be cached, for each worker."""
    request = EngineRequest("", ids, Sampling(max_tokens=1), cache_salt=salt)
    return dict(cluster.gateway.scheduler.worker_caches.cached_tokens("sim", f"{ids}{salt}", request) or {})


@pytest.mark.slow
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
    """An engine's reports tell the gateway which blocks the engine holds. A block is found only with the cache salt of
    its call. The gateway forgets a block when it is evicted, and all blocks of a worker when the worker's link ends."""
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


@pytest.mark.slow
async def test_a_new_gateway_knows_all_blocks_of_its_workers(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A second gateway starts beside another gateway of the same workers. It learns which workers hold the blocks of
    the first gateway's conversations, and sends these conversations to the workers that hold the blocks."""
    port = free_port()
    text = LOOPBACK.replace('link: "127.0.0.1:0"', f'link: "127.0.0.1:{port}"')
    async with running_cluster(tmp_path) as first:
        both = [first.gateway.endpoints["link"], f"127.0.0.1:{port}"]
        for _ in range(3):
            await first.add_worker(sim_engine(checkpoint, decode_ms=1, block_size=BLOCK), bundle, gateways=both)
        prompts = [prompt(number) for number in range(9)]
        for ids in prompts:
            await turn(first, ids)
        holders = [matched(first, [*ids, 1]) for ids in prompts]
        async with running_cluster(tmp_path / "second", text) as second:
            await until(lambda: len(second.gateway.hub.links) == 3, "all workers are linked")
            await until(lambda: [matched(second, [*ids, 1]) for ids in prompts] == holders, "all is known")
            assert [(await turn(second, [*ids, 1]))[1] for ids in prompts] == [len(ids) for ids in prompts]


class _Link:
    """Stand-in for a link, with the attributes that WorkerCaches reads."""

    def __init__(self, number: int) -> None:
        self.name = f"w{number}#1"
        self.identity = WorkerIdentity(f"w{number}", "i", "sim")
        self.info = EngineInfo("", "sim", "", BLOCK, 1 << 20, 1, 1, 1 << 20, 1000, capabilities=(KV_EVENTS,))


async def test_workers_with_many_blocks_do_not_stop_the_event_loop() -> None:
    """When many workers connect at once, each pass of the event loop applies one batch of their reports. Calls see the
    batches applied so far."""
    caches, workers, pieces = WorkerCaches(), 20, 4
    ids = prompt(0, pieces * BLOCKS_PER_MESSAGE * BLOCK)
    change = KvChange(True, prefix_hashes(ids, BLOCK, seed_of("")))
    links = [_Link(number) for number in range(workers)]
    for link in links:
        for message in kv_blocks_to_pb(change):
            caches.report(link, message)  # type: ignore[arg-type]
    request, passes = EngineRequest("", [*ids, 1], Sampling(max_tokens=1)), 0
    found: list[int] = []
    while len(found) < workers or min(found) < len(ids):
        known = list((caches.cached_tokens("sim", str(passes), request) or {}).values())
        assert len(known) - len(found) in (0, 1)
        found = known
        await asyncio.sleep(0)
        passes += 1
        assert passes <= 2 * workers * pieces
    assert passes >= workers * pieces


@pytest.mark.parametrize("after", [0, 1, BLOCK - 1])
async def test_all_whole_blocks_of_a_sent_prompt_are_expected(after: int) -> None:
    """A prompt that was sent to a worker counts as cached on the worker at once, before the worker reports it.

    For a longer prompt that begins with this prompt, all whole blocks of this prompt count as cached. For an equal
    prompt they count too, except a block that ends with the prompt's last token.
    """
    caches, link, ids = WorkerCaches(), _Link(0), prompt(0, 40 * BLOCK + after)
    (message,) = kv_blocks_to_pb(KvChange(True))
    caches.report(link, message)  # type: ignore[arg-type]

    def found(key: str, token_ids: list[int]) -> dict[str, int]:
        request = EngineRequest("", token_ids, Sampling(max_tokens=1))
        return dict(caches.cached_tokens("sim", key, request) or {})

    assert found("a", ids) == {}
    caches.expect(link, "a", EngineRequest("", ids, Sampling(max_tokens=1)), 0.0)  # type: ignore[arg-type]
    assert found("b", [*ids, *range(100)]) == {"w0": 40 * BLOCK}
    assert found("c", ids) == {"w0": (40 if after else 39) * BLOCK}


async def test_a_warm_call_goes_before_an_older_cold_one(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """When a slot becomes free, a tenant's call whose prompt is cached on the worker is sent before the tenant's older
    calls."""
    async with running_cluster(tmp_path) as cluster:
        engine = sim_engine(checkpoint, decode_ms=5, block_size=BLOCK, max_num_seqs=1)
        await cluster.add_worker(engine, bundle)
        warm, cold = prompt(0), prompt(1)
        await turn(cluster, warm)
        await until(lambda: bool(matched(cluster, warm)), "the blocks are known")
        ended: list[str] = []

        async def send(name: str, ids: list[int], tokens: int) -> None:
            request = complete("", prompt_token_ids=ids, max_tokens=tokens, ignore_eos=True)
            await cluster.stub.Complete(request)
            ended.append(name)

        def waiting(count: int) -> bool:
            return cluster.gateway.scheduler.queues.waiting("sim")[0] == count

        calls = [asyncio.create_task(send("runs", prompt(2), 100))]
        await until(lambda: engine.statistics().running == 1, "a call holds the slot")
        for name, ids in (("cold", cold), ("warm", warm)):
            calls.append(asyncio.create_task(send(name, ids, 1)))
            await until(lambda: waiting(len(calls) - 1), "the call waits")
        await asyncio.gather(*calls)
        assert ended == ["runs", "warm", "cold"]


@pytest.mark.slow
@pytest.mark.parametrize("patience", [0, 24_000])
async def test_a_call_waits_for_its_holder(tmp_path: Path, checkpoint: Path, bundle: Bundle, patience: int) -> None:
    """A call whose prompt is cached on a worker without a free slot waits for this worker. Later calls without a cached
    prompt go ahead. If `patience_tokens` is 0 in the configuration, the call goes to another worker at once."""
    text = LOOPBACK + f"routing: {{weights: {{full_worker_tokens: 0, patience_tokens: {patience}}}}}\n"
    async with running_cluster(tmp_path, text) as cluster:
        engines = [sim_engine(checkpoint, decode_ms=5, block_size=BLOCK, max_num_seqs=1) for _ in range(2)]
        for engine in engines:
            await cluster.add_worker(engine, bundle)
        ids = prompt(0, 150 * BLOCK)
        await turn(cluster, ids)
        (holder,) = matched(cluster, [*ids, 1])
        await turn(cluster, prompt(1))
        assert set(matched(cluster, [*prompt(1), 1])) != {holder}
        occupying = asyncio.create_task(turn(cluster, [*ids, 1], 200))
        await until(lambda: any(engine.statistics().running for engine in engines), "the holder is full")
        warm = asyncio.create_task(turn(cluster, [*ids, 2]))
        aside = cluster.gateway.scheduler.policy.aside
        await until(lambda: len(aside) == 1 if patience else warm.done(), "it waits, or has been elsewhere")
        await turn(cluster, prompt(2))
        assert not occupying.done()
        assert warm.done() == (patience == 0)
        assert (await warm)[1] == (len(ids) if patience else 0)
        await occupying
        assert not len(aside)
