"""Load test of routing with real engines (the part `engines`): multi-turn chats on two vLLM workers. The cache hits are
compared with the hits of one pooled LRU cache, and with the hits of vllm-router in front of the same engines.

`python -m loadtests.routing.engines` runs this part alone. All chats begin with the same text, but half of them have
another cache_salt.

The gateway predicts how many tokens of a call's prompt a worker has cached. The gateway runs in this process, so that
the prediction can be read at the moment when the call is sent.

A prediction differs from the number that the engine reports if blocks were evicted or stored between the worker's last
report and the call's start. A difference counts as explained (`traced`) if a report of the worker after the decision
shows that it removed or stored the first block for which the prediction was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from cluster.config.document import parse
from cluster.gateway.scheduling.worker_caches import MIN_TOKENS
from cluster.gateway.server import Gateway
from loadtests import peers
from loadtests.children import Child, Children, DidNotStart
from loadtests.figures import Bound, Figure, missing
from loadtests.processes import own_processor
from loadtests.routing.chats.predictions import BLOCK, Compared, Journal, PooledLru
from loadtests.routing.chats.turns import TOKENS, TURNS, Chat, Tokens, play
from loadtests.scenarios.common import PEERS, Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

MODEL = serving.MODEL
CONFIGURATION = """
api_version: headrace/v1
name: engines
gateway:
  listen:
    {grpc: "127.0.0.1:0", http: "127.0.0.1:0", link: "127.0.0.1:0", admin: "127.0.0.1:0", metrics: "127.0.0.1:0"}
  drain_timeout_s: 0
models:
  - {name: bench, source: "sim:///worker-of-the-load-test"}
routing: {hedging: {share: 0}}  # a hedge would be a second decision for a call
"""
ENGINE: Mapping[str, object] = {
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 4096,
    "block_size": BLOCK,
    "kv_cache_memory_bytes": 32 << 20,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
WORKERS = 2
READY_S, CALL_S, LATER_S = 180.0, 120.0, 2.0
ROOMY, FULL, CROWDED = 0.4, 0.75, 1.5
"""KV tokens of all chats as a share of the KV tokens of all engines, for three runs: one without evictions, the one
that the report compares, and one with many evictions."""

POOLED = "two vLLM workers: hit tokens against one pooled LRU of the summed size"
ROUND_ROBIN = "two vLLM workers: hit tokens against round robin"
CACHE_AWARE = "two vLLM workers: hit tokens against vllm-router cache_aware"
HIT_RATE = "two vLLM workers: hit tokens of the prompts' tokens"
EXACT = "predicted cached tokens equal to the engine's, without evictions"
EXACT_EVICTED = "predicted cached tokens equal to the engine's, or traced to a later event, with evictions"
UNTRACED = "differences with evictions that no later event explains"
ROWS: Mapping[str, Bound | None] = {
    POOLED: Bound(">=", 0.95),
    ROUND_ROBIN: Bound(">=", 1.5),
    CACHE_AWARE: Bound(">=", 1.0),
    HIT_RATE: Bound(">=", 0.3),
    EXACT: Bound(">=", 0.999),
    EXACT_EVICTED: Bound(">=", 0.99),
    UNTRACED: Bound("<=", 0.0),
}


class OurFleet:
    """A gateway in this process and two workers."""

    def __init__(self, gateway: Gateway, journal: Journal, client: httpx.AsyncClient) -> None:
        self.gateway = gateway
        self.journal = journal
        self._client = client

    @property
    def kv_tokens(self) -> int:
        """KV tokens of all engines."""
        return sum(link.info.kv_tokens for link in self.gateway.hub.links)

    async def post(self, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Send a chat and return the answer."""
        return await post_chat(self._client, f"http://{self.gateway.endpoints['http']}", body)


async def post_chat(client: httpx.AsyncClient, url: str, body: Mapping[str, object]) -> Mapping[str, Any]:
    """Send a chat to an OpenAI-compatible server and return the answer. Raises RuntimeError."""
    answer = await client.post(f"{url}/v1/chat/completions", json=body, timeout=CALL_S)
    if answer.status_code != 200:
        raise RuntimeError(f"{url}: {answer.status_code} {answer.text[:300]}")
    out: Mapping[str, Any] = answer.json()
    return out


@asynccontextmanager
async def our_fleet(
    children: Children, folder: Path, client: httpx.AsyncClient, source: str, bundle: Path
) -> AsyncIterator[OurFleet]:
    """Run a gateway and its workers. `source`: the folder of the engines' model, or a `sim://` source for simulated
    engines. Raises DidNotStart."""
    gateway = Gateway(parse(CONFIGURATION), folder / "gateway")
    journal = Journal(gateway.scheduler.worker_caches)
    journal.install()
    await gateway.start()
    workers = list[Child]()
    try:
        for number in range(WORKERS):
            ready = folder / f"worker-{number}.ready"
            command = [sys.executable, "-m", "loadtests.serving.worker", "--name", MODEL, "--id", f"w{number}"]
            command += ["--link", gateway.endpoints["link"], "--bundle", str(bundle), "--source", source]
            command += ["--ready", str(ready), "--engine", json.dumps(dict(ENGINE))]
            environment = {**ENVIRONMENT, **own_processor(number)}
            workers.append(children.start(f"worker-{number}", serving.WORKER, command, environment))

        async def linked() -> bool:
            return len(gateway.hub.links) == WORKERS and all(link.free.sequences > 0 for link in gateway.hub.links)

        await workers[-1].until(linked, "both workers are linked", READY_S)
        yield OurFleet(gateway, journal, client)
    finally:
        for worker in workers:
            await worker.stop()
        await gateway.stop(0)


def chats_of(kv_tokens: int, share: float, tokens_a_chat: int, seed: int, name: str) -> list[Chat]:
    """Return chats that together take the fraction `share` of `kv_tokens`. Each chat takes `tokens_a_chat` tokens."""
    count = max(round(share * kv_tokens / tokens_a_chat), 2)
    return [Chat(number, seed, f"{name}-{number % 2}") for number in range(count)]


async def compare(fleet: OurFleet, chats: Sequence[Chat], seed: int) -> tuple[Tokens, Compared, float]:
    """Send all turns of the chats to the Headrace gateway of `fleet`.

    Returns three values: the counts of prompt tokens; the comparison of the gateway's predicted cache hits with
    the engines' real ones; and, for reference, the number of tokens that would be found in one LRU cache that
    is as large as both workers' caches together.
    """
    journal, out, found = fleet.journal, Compared(), dict[int, int]()
    journal.decisions.clear()
    journal.reports.clear()
    numbers = itertools.count(1)

    async def post(body: Mapping[str, object]) -> Mapping[str, Any]:
        number = next(numbers)
        answer = await fleet.post({**body, "seed": number})
        found[number] = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer

    tokens = await play(chats, seed, post)
    await asyncio.sleep(LATER_S)  # the last reports
    out.evictions = sum(len(removed) for _, _, _, removed in journal.reports)
    for number, cached in found.items():
        decision = journal.decisions[number]
        if decision.tokens >= MIN_TOKENS and (decision.predicted or cached):
            out.calls += 1
            out.equal += decision.predicted == cached
            out.traced += decision.predicted != cached and journal.is_traced(decision, cached)
    pool = PooledLru(fleet.kv_tokens // BLOCK)
    pooled = sum(pool.hit(d.hashes, (d.tokens - 1) // BLOCK) * BLOCK for d in journal.decisions.values())
    return tokens, out, float(pooled)


async def router(
    children: Children,
    client: httpx.AsyncClient,
    environment: Path,
    ports: Sequence[int],
    policy: str,
    chats: list[Chat],
) -> Tokens:
    """Play chats through vllm-router in front of vLLM's own servers. Raises DidNotStart or NoPeers."""
    peer = await peers.vllm_router(children, environment, *ports, policy=policy)
    try:
        return await play(chats, chats[0].seed, lambda body: post_chat(client, peer.url, body))
    finally:
        await peer.child.stop()


async def run(children: Children, folder: Path, environment: Path, seed: int = 1) -> list[Figure]:
    """Measure a fleet of Headrace workers, and then the peers. `environment`: folder of the Python environment in which
    the peers are installed. Raises DidNotStart or RuntimeError."""
    model, bundle = await serving.prepare(children, "llama", folder)
    async with httpx.AsyncClient() as client:
        async with our_fleet(children, folder, client, str(model), bundle) as fleet:
            kv_tokens = fleet.kv_tokens
            last = Chat(0, seed, "first", TURNS - 1)
            size = (await fleet.post(last.body()))["usage"]["prompt_tokens"] + TOKENS
            _, roomy, _ = await compare(fleet, chats_of(kv_tokens, ROOMY, size, seed + 1, "roomy"), seed)
            tokens, full, pooled = await compare(fleet, chats_of(kv_tokens, FULL, size, seed, "full"), seed)
            _, crowded, _ = await compare(fleet, chats_of(kv_tokens, CROWDED, size, seed + 2, "crowded"), seed)
        rows = _own_rows(tokens, pooled, roomy, full, crowded)
        options = {**ENGINE, "enable_prompt_tokens_details": True}
        arms = {ROUND_ROBIN: "round_robin", CACHE_AWARE: "cache_aware"}
        servers = list[Child]()
        try:
            ports = []
            for _ in range(WORKERS):
                own = {**ENVIRONMENT, **own_processor(len(servers))}
                peer, port = await peers.vllm_server(children, MODEL, model, options, own)
                servers.append(peer.child)
                ports.append(port)
            for row, policy in arms.items():
                theirs = await router(
                    children, client, environment, ports, policy, chats_of(kv_tokens, FULL, size, seed, policy)
                )
                note = f"ours {tokens.rate:.3f} of the prompts' tokens, theirs {theirs.rate:.3f}"
                rows[row] = exact(row, tokens.cached / max(theirs.cached, 1), ROWS[row], "ratio", note)
        except (DidNotStart, peers.NoPeers) as error:
            for row in arms.keys() - rows.keys():
                rows[row] = missing(row, ROWS[row], str(error))
        finally:
            for server in servers:
                await server.stop()
    return [rows[row] for row in ROWS]


def _own_rows(tokens: Tokens, pooled: float, roomy: Compared, full: Compared, crowded: Compared) -> dict[str, Figure]:
    evictions = f"{crowded.evictions} blocks evicted, {crowded.equal} of {crowded.calls} equal"
    equal = (roomy.equal + (full.equal if not full.evictions else 0)) / max(
        roomy.calls + (full.calls if not full.evictions else 0), 1
    )
    untraced = crowded.calls - crowded.equal - crowded.traced
    figures = (
        exact(POOLED, tokens.cached / max(pooled, 1), ROWS[POOLED], "ratio", f"{tokens.cached} of {pooled:.0f} tokens"),
        exact(HIT_RATE, tokens.rate, ROWS[HIT_RATE], "ratio", f"{full.evictions} blocks evicted"),
        exact(EXACT, equal, ROWS[EXACT], "ratio", f"{roomy.calls} calls, {roomy.evictions} blocks evicted"),
        exact(
            EXACT_EVICTED, (crowded.equal + crowded.traced) / max(crowded.calls, 1), ROWS[EXACT_EVICTED], "ratio",
            evictions,
        ),
        exact(UNTRACED, untraced, ROWS[UNTRACED], "calls", evictions),
    )  # fmt: skip
    return {figure.name: figure for figure in figures}


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part."""
    return await run(stage.children, stage.folder, stage.options.peers, stage.options.seed)


async def _main(environment: Path, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with Children(Path(folder)) as children:
            for figure in await run(children, Path(folder), environment, seed):
                met = "" if figure.met is None else " met" if figure.met else " NOT met"
                value = figure.reason if figure.value is None else f"{figure.value:.4g} {figure.unit}"
                print(f"{figure.name}: {value} {figure.bound or ''}{met} ({figure.note})")


def main() -> None:
    """Print the report's rows."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.routing.engines", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers", type=Path, default=PEERS, help="the peers' environment")
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_main(options.peers, options.seed))


if __name__ == "__main__":
    main()
