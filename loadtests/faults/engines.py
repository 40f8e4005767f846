"""The proof on the real engine: two vLLM workers, float32 on CPU, long greedy answers, faults in the middle.

A process that was killed needs half a minute to be back, so most of the points are cut links and stopped processes,
which lose a worker's calls just the same; the mixture is in the report. Beside the greedy calls some are seeded,
penalized or under a grammar: the engine continues those, too (docs/failures.md).
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loadtests.children import Child, Children
from loadtests.faults.calls import Ask, Caller, Told, ask, difference
from loadtests.faults.mass import KILL, LINK, STOP
from loadtests.serving.fleet import Fleet, SimWorker, begun_gateway
from loadtests.serving.ours import ENGINE_READY_S, MODEL

WORKERS, STREAMS, TOKENS, WORDS = 2, 10, 240, 60
GREEDY, OTHERS = 12, ("seeded", "penalties", "logprobs", "stop")
BLOCK_TOKENS = 32
KILLS_OF = 20
"""One point of so many is a SIGKILL."""
ENGINE: Mapping[str, object] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 2048,
    "block_size": BLOCK_TOKENS,
    "kv_cache_memory_bytes": 128 << 20,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
BETWEEN_S, NOTICED_S, BACK_S = (0.3, 1.0), 5.0, 180.0


@dataclass(slots=True)
class Proof:
    """Calls under faults, and how they differ."""

    points: Counter[str] = field(default_factory=Counter)
    calls: list[Told] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)
    refused: int = 0
    """Calls that came while no worker had a link; there is no controller here that would tell of the model."""

    def exact(self, *kinds: str) -> tuple[int, int]:
        """(exact, all) of the calls of these kinds that lost a worker."""
        hit = [told for told in self.calls if told.ask.kind in kinds and (told.resumed or told.error)]
        return sum(told.request_id not in self.differences for told in hit), len(hit)


class Engines:
    """A fleet of real workers, each started again by `kill`."""

    def __init__(self, fleet: Fleet, children: Children, commands: Sequence[Sequence[str]]) -> None:
        self.fleet = fleet
        self._children = children
        self._commands = commands
        self._processes: list[Child | None] = [None] * len(commands)

    def start(self, number: int) -> None:
        """Start a worker's process."""
        name = f"engine-{number}"
        self._processes[number] = self._children.start(name, "worker replica", self._commands[number], ENVIRONMENT)

    async def standing(self) -> list[int]:
        """Those that have links, once somebody has."""
        news, ids = self.fleet.news, [worker.id for worker in self.fleet.workers]
        await news.until(lambda: bool(news.up), ENGINE_READY_S)
        return [number for number, worker in enumerate(ids) if worker in news.up]

    async def stop(self) -> None:
        """End all."""
        await asyncio.gather(*(child.stop() for child in self._processes if child is not None))

    async def strike(self, kind: str, number: int) -> None:
        """One fault, until the gateway has noticed it and the worker may be back."""
        worker, since = self.fleet.workers[number], time.time()
        if kind == KILL:
            await self.kill(number)
            return
        if kind == LINK:
            worker.relay.sever()
        else:
            self._signal(number, signal.SIGSTOP)
        await self.fleet.news.downs(worker.id, since, NOTICED_S)
        self._signal(number, signal.SIGCONT)

    def _signal(self, number: int, what: signal.Signals) -> None:
        child = self._processes[number]
        assert child is not None
        for process in child.commands():
            process.send_signal(what)

    async def kill(self, number: int) -> None:
        """SIGKILL to the worker, its engine with it; another takes its place."""
        child = self._processes[number]
        assert child is not None
        since = time.time()
        self._signal(number, signal.SIGKILL)
        await self.fleet.news.downs(self.fleet.workers[number].id, since, NOTICED_S)
        await child.stop()
        self.start(number)


@asynccontextmanager
async def running(children: Children, folder: Path, model: Path, bundle: Path) -> AsyncIterator[Engines]:
    """Gateway, relays and two vLLM workers, all linked. Raises DidNotStart."""
    home = folder / "engines"
    async with AsyncExitStack() as stack:
        fleet = await begun_gateway(stack, children, home, gateway={"resume": {"max_attempts": 16}})
        shared = [sys.executable, "-m", "loadtests.serving.worker", "--name", MODEL, "--bundle", str(bundle)]
        shared += ["--source", str(model), "--engine", json.dumps(dict(ENGINE)), "--redial-max-s", "0.3"]
        commands = []
        for number in range(WORKERS):
            relay, ready = await stack.enter_async_context(fleet.relay()), home / f"{number}.ready"
            fleet.workers.append(SimWorker(f"w{number}", relay, ready))
            commands.append([*shared, "--id", f"w{number}", "--link", relay.address, "--ready", str(ready)])
        engines = Engines(fleet, children, commands)
        stack.push_async_callback(engines.stop)
        for number in range(WORKERS):
            engines.start(number)
        await fleet.gateway.until(fleet.is_up, "both engines have links", ENGINE_READY_S)
        yield engines


def asks_of(model: str, seed: int) -> list[Ask]:
    """Greedy calls, and some of other kinds."""
    rng = random.Random(seed)
    kinds = ["greedy"] * GREEDY + list(OTHERS) * 2
    return [ask(f"e{i}", kind, model, TOKENS, WORDS, rng.random()) for i, kind in enumerate(kinds)]


async def prove(engines: Engines, points: int, seed: int) -> Proof:
    """Callers at work until so many faults have fallen; each answer against its undisturbed self."""
    fleet, rng, proof = engines.fleet, random.Random(seed), Proof()
    caller, asks, over = Caller(fleet.grpc, fleet.metadata, "engines"), asks_of(fleet.model, seed), False
    undisturbed = {told.ask.key: told for told in await asyncio.gather(*(caller.call(one) for one in asks))}

    async def callers(number: int) -> None:
        while not over:
            told = await caller.call(asks[number % len(asks)])
            if told.error and not told.begun:
                proof.refused += 1
                await engines.standing()
                continue
            proof.calls.append(told)
            number += STREAMS + 1

    streams = [asyncio.create_task(callers(number)) for number in range(STREAMS)]
    try:
        for point in range(points):
            await asyncio.sleep(rng.uniform(*BETWEEN_S))
            standing = await engines.standing()
            kind = KILL if point % KILLS_OF == KILLS_OF - 1 else rng.choice((LINK, LINK, STOP))
            if kind == KILL and len(standing) < WORKERS:
                kind = LINK  # never the last one: another takes minutes on a busy machine
            proof.points[kind] += 1
            await engines.strike(kind, rng.choice(standing))
        over = True
        await asyncio.wait(streams, timeout=BACK_S)
    finally:
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await caller.close()
    for told in proof.calls:
        found = difference(told, undisturbed[told.ask.key])
        if found:
            proof.differences[told.request_id] = found
    return proof
