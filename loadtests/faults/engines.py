"""Proof of exact resumption on the real engine: two vLLM workers, float32 on CPU, long answers of every kind, faults in
the middle.

Sixteen calls begin together. When each call has received a random number of pieces, the worker that runs most of the
calls is cut off, stopped or killed. In half of the batches a second fault follows, so that calls lose two workers. The
gateway's metrics report how many sequences were resumed after a fault. A fault that hit no sequence, because all calls
had just ended, does not count. A killed engine needs half a minute to return. Meanwhile the other worker serves alone:
faults on that worker are cuts or stops, after which its calls resume on the same worker.

Every answer is compared with the answer to the same call without a fault. The undisturbed calls are made twice, in
different batches: a difference between the two undisturbed answers comes from the engine and not from a fault.
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
from typing import Any

from cluster.cli.local.gateway_metrics import scrape
from cluster.v1 import inference_pb2 as pb
from loadtests import interpreted
from loadtests.children import Child, Children
from loadtests.faults.calls import Caller, CallResult, FaultRequest, difference, make_request
from loadtests.faults.mass import KILL, LINK, STOP
from loadtests.serving.fleet import Fleet, SimWorker, started_gateway
from loadtests.serving.ours import ENGINE_READY_S, MODEL

WORKERS, WORDS = 2, (40, 100)
GREEDY, OTHERS = ("greedy", "logprobs"), ("seeded", "penalties", "n", "stop", "json")
BATCH = ("greedy",) * 6 + ("logprobs",) * 2 + ("seeded", "penalties", "json") * 2 + ("n", "stop")
REQUESTS = 4 * len(BATCH)
_SCHEMA = {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 100}
JSON: Mapping[str, Any] = {
    "temperature": 0.8,
    "seed": 17,
    "ignore_eos": False,
    "response_format": pb.ResponseFormat(type="json_schema", json_schema=json.dumps(_SCHEMA)),
}
"""Fields of a request with a JSON schema. The schema has so many items that the length limit ends the answer."""
STOP_STRING: Mapping[str, Any] = {"temperature": 0.0, "stop": ["!?", "zqx"]}
"""Fields of a request with stop strings. The stop strings are so rare that they end few answers, and late."""
MOST_MISSES = 60
OWN = {"json": JSON, "stop": STOP_STRING}
"""Request kinds that are defined only here, or differently from KINDS in calls.py."""
LOGPROBS = 1e-4
"""Tolerance of log probabilities. A prefill and decode steps round differently."""
BLOCK_TOKENS = 32
KILLS_OF = 8
"""Number of faults of which one is a SIGKILL. A SIGKILL waits until both engines serve. If two SIGKILLs are due, the
next batch waits until both engines serve.
"""
ENGINE: Mapping[str, object] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_seqs": 32,
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


@dataclass(frozen=True, slots=True)
class Runner:
    """One of vLLM's model runners, selected by `environment`, and its load. `tokens`: length of an answer. `pieces`:
    bounds (least, greatest) of the number of pieces that every running call must have received before a fault is
    triggered."""

    environment: Mapping[str, str]
    tokens: int
    pieces: tuple[int, int]


RUNNERS: Mapping[str, Runner] = {
    "v1": Runner({}, 320, (6, 90)),
    "v2": Runner(interpreted.environment(), 96, (4, 30)),
}
"""Model runners by name. The V2 runner's kernels are interpreted here, at 1/20 of the speed, so calls are shorter."""
NOTICED_S, BACK_S, BEAT_S, STARTS_S, ENDS_S = 5.0, 10.0, 0.1, 90.0, 120.0


@dataclass(frozen=True, slots=True)
class Point:
    """A fault of a worker: its kind, the worker's number, the number of pieces that each call had received before the
    fault, and the number of sequences that the fault hit."""

    kind: str
    worker: int
    pieces: int
    alone: bool
    """Whether no other worker was serving."""
    hit: int


@dataclass(slots=True)
class Proof:
    """Results of calls under faults, with the differences between their answers and the answers without faults."""

    points: list[Point] = field(default_factory=list)
    """Faults that hit at least one sequence."""
    misses: int = 0
    """Number of faults that hit no sequence."""
    calls: list[CallResult] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)
    """Differences of all calls of all batches, by request id."""
    noise: int = 0
    """Number of undisturbed calls whose answers differ between two batches."""
    seconds: float = 0.0

    def exact(self, *kinds: str) -> tuple[int, int]:
        """Return two numbers about the calls of these kinds that lost a worker or failed: how many of them gave the
        same answer as the call without a fault, and the number of all these calls."""
        hit = [result for result in self.calls if result.request.kind in kinds and (result.resumed or result.error)]
        return sum(result.request_id not in self.differences for result in hit), len(hit)

    def settings(self) -> dict[str, Any]:
        """Return the values for the report."""
        hits = [point.hit for point in self.points]
        return {
            "points": dict(Counter(point.kind for point in self.points)),
            "points that hit nobody and do not count": self.misses,
            "points without another worker": sum(point.alone for point in self.points),
            "sequences hit a point": {"least": min(hits, default=0), "most": max(hits, default=0), "all": sum(hits)},
            "calls": dict(Counter(result.request.kind for result in self.calls)),
            "calls hit": dict(Counter(result.request.kind for result in self.calls if result.resumed)),
            "more than once": sum(result.resumed > max(result.request.message.n, 1) for result in self.calls),
            "different": self.differences,
            "undisturbed calls that differ from themselves": self.noise,
            "seconds": round(self.seconds, 1),
            "engine": dict(ENGINE),
        }


class Engines:
    """A fleet of real workers. A killed worker is restarted."""

    def __init__(self, fleet: Fleet, children: Children, commands: Sequence[Sequence[str]], runner: Runner) -> None:
        self.fleet = fleet
        self.runner = runner
        self._children = children
        self._commands = commands
        self._processes: list[Child | None] = [None] * len(commands)
        self._starting: set[int] = set()

    def start(self, number: int) -> None:
        """Start the process of a worker."""
        name = f"engine-{number}"
        environment = {**ENVIRONMENT, **self.runner.environment}
        self._processes[number] = self._children.start(name, "worker replica", self._commands[number], environment)

    async def linked_workers(self) -> list[int]:
        """Wait until every worker that is not restarting has a link; return the numbers of the linked workers."""
        link_log, ids = self.fleet.link_log, [worker.id for worker in self.fleet.workers]
        self._starting = {number for number in self._starting if ids[number] not in link_log.up}
        wanted = {worker for number, worker in enumerate(ids) if number not in self._starting}
        await link_log.until(lambda: link_log.up >= wanted, BACK_S)
        return [number for number, worker in enumerate(ids) if worker in link_log.up]

    async def until_all_linked(self) -> None:
        """Wait until all workers have links, including restarting workers."""
        await self.fleet.until_all_up(STARTS_S)

    async def running(self) -> dict[int, int]:
        """Return the number of sequences that each linked worker runs, from the worker's last heartbeat."""
        samples = await self._scrape()
        ids = {worker.id: number for number, worker in enumerate(self.fleet.workers)}
        return {
            ids[labels["worker"]]: int(value)
            for name, labels, value in samples
            if name == "headrace_worker_running_requests"
        }

    async def resumes(self) -> int:
        """Return the number of resumes so far: on another worker, or on the same worker after its link broke."""
        return int(sum(value for name, _, value in await self._scrape() if name == "headrace_resumes_total"))

    async def _scrape(self) -> list[tuple[str, dict[str, str], float]]:
        return await asyncio.to_thread(scrape, self.fleet.endpoints["metrics"]) or []

    async def stop(self) -> None:
        """Stop the processes of all workers."""
        await asyncio.gather(*(child.stop() for child in self._processes if child is not None))

    async def apply_fault(self, kind: str, number: int) -> None:
        """Apply one fault to a worker and wait until the gateway has noticed it. Then let the worker continue, or start
        its replacement.
        """
        worker, since = self.fleet.workers[number], time.time()
        if kind == KILL:
            await self._kill(number)
            return
        if kind == LINK:
            worker.relay.sever()
        else:
            self._signal(number, signal.SIGSTOP)
        await self.fleet.link_log.downs(worker.id, since, NOTICED_S)
        self._signal(number, signal.SIGCONT)

    def _signal(self, number: int, what: signal.Signals) -> None:
        child = self._processes[number]
        assert child is not None
        for process in child.commands():
            process.send_signal(what)

    async def _kill(self, number: int) -> None:
        """Send SIGKILL to the worker and the worker's engine; another process replaces them."""
        child = self._processes[number]
        assert child is not None
        since = time.time()
        self._signal(number, signal.SIGKILL)
        await self.fleet.link_log.downs(self.fleet.workers[number].id, since, NOTICED_S)
        self._starting.add(number)
        await child.stop()
        self.start(number)


@asynccontextmanager
async def running(
    children: Children, folder: Path, model: Path, bundle: Path, runner: Runner
) -> AsyncIterator[Engines]:
    """Start a gateway, relays and two vLLM workers, all linked. Raises DidNotStart."""
    home = folder / "engines"
    async with AsyncExitStack() as stack:
        fleet = await started_gateway(
            stack, children, home, gateway={"resume": {"max_attempts": 16, "max_silent_losses": 16}}
        )
        shared = [sys.executable, "-m", "loadtests.serving.worker", "--name", MODEL, "--bundle", str(bundle)]
        shared += ["--source", str(model), "--engine", json.dumps(dict(ENGINE)), "--redial-max-s", "0.3"]
        commands = []
        for number in range(WORKERS):
            relay, ready = await stack.enter_async_context(fleet.relay()), home / f"{number}.ready"
            fleet.workers.append(SimWorker(f"w{number}", relay, ready))
            commands.append([*shared, "--id", f"w{number}", "--link", relay.address, "--ready", str(ready)])
        engines = Engines(fleet, children, commands, runner)
        stack.push_async_callback(engines.stop)
        for number in range(WORKERS):
            engines.start(number)
        await fleet.gateway.until(fleet.is_up, "both engines have links", ENGINE_READY_S)
        yield engines


def requests_of(model: str, seed: int, tokens: int) -> list[FaultRequest]:
    """Return REQUESTS requests, made of batches. Each batch has all kinds of requests, in the order of BATCH. Each
    request has a different prompt. `tokens`: length of the answers."""
    rng = random.Random(seed)
    out = []
    for number in range(REQUESTS):
        kind = BATCH[number % len(BATCH)]
        fields = OWN.get(kind)
        out.append(make_request(f"e{number}", kind, model, tokens, rng.randint(*WORDS), rng.random(), fields))
    return out


class Batch:
    """Batch of calls that begin together."""

    def __init__(self, caller: Caller, requests: Sequence[FaultRequest]) -> None:
        self._results: dict[str, CallResult] = {}
        self._more = asyncio.Event()
        self._tasks = [asyncio.create_task(caller.call(request, self._record)) for request in requests]
        for task in self._tasks:
            task.add_done_callback(lambda _: self._more.set())

    def _record(self, result: CallResult) -> None:
        self._results[result.request_id] = result
        self._more.set()

    async def until(self, pieces: int) -> int:
        """Wait until every running call has received `pieces` pieces; return how many calls still run."""
        async with asyncio.timeout(ENDS_S):
            while True:
                self._more.clear()
                running = [result for result in self._results.values() if not result.ended]
                if len(self._results) == len(self._tasks) and all(len(result.chunks) >= pieces for result in running):
                    return len(running)
                await self._more.wait()

    async def wait_for_results(self) -> list[CallResult]:
        """Wait for the end of all calls and return the results."""
        async with asyncio.timeout(ENDS_S):
            return list(await asyncio.gather(*self._tasks))

    async def cancel(self) -> None:
        """Cancel the calls that still run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Prover:
    """Runs batches of requests on two engines, and causes faults while a batch runs."""

    def __init__(self, engines: Engines, seed: int) -> None:
        fleet = engines.fleet
        self._engines = engines
        self._rng = random.Random(seed)
        self._caller = Caller(fleet.grpc, fleet.metadata, "engines")
        self._requests = requests_of(fleet.model, seed, engines.runner.tokens)
        self._kills_due = 0.0
        self.proof = Proof()

    async def prove(self, points: int) -> Proof:
        """Run batches until `points` faults have hit a sequence, or MOST_MISSES faults have hit none. Compare each
        answer with the answer to the same request without faults. Raises RuntimeError if a call without faults fails,
        TimeoutError if a batch hangs."""
        proof, began = self.proof, time.monotonic()
        try:
            undisturbed = await self._undisturbed()
            at = 0
            while len(proof.points) < points and proof.misses < MOST_MISSES:
                requests = [self._requests[(at + number) % len(self._requests)] for number in range(len(BATCH))]
                at += len(BATCH) + 5  # a different batch each time
                faults = min(1 + at % 2, points - len(proof.points))
                await self._batch(requests, faults)
        finally:
            await self._caller.close()
        for result in proof.calls:
            mismatch = difference(result, undisturbed[result.request.key], LOGPROBS)
            if mismatch:
                proof.differences[result.request_id] = f"{result.request.kind}: {mismatch}"
        proof.seconds = time.monotonic() - began
        return proof

    async def _undisturbed(self) -> dict[str, CallResult]:
        rounds: list[dict[str, CallResult]] = []
        for shift in (0, 7):
            order = self._requests[shift:] + self._requests[:shift]
            results: list[CallResult] = []
            for at in range(0, REQUESTS, len(BATCH)):
                results += await Batch(self._caller, order[at : at + len(BATCH)]).wait_for_results()
            failed = [result.error for result in results if result.error]
            if failed:
                raise RuntimeError(f"{len(failed)} calls failed undisturbed: {failed[0]}")
            rounds.append({result.request.key: result for result in results})
        first, second = rounds
        self.proof.noise = sum(difference(second[key], first[key], LOGPROBS) != "" for key in first)
        return first

    async def _batch(self, requests: Sequence[FaultRequest], faults: int) -> None:
        engines, proof = self._engines, self.proof
        if self._kills_due >= 2:
            await engines.until_all_linked()
        await engines.linked_workers()
        batch = Batch(self._caller, requests)
        moments = sorted(self._rng.randint(*engines.runner.pieces) for _ in range(faults))
        struck: list[tuple[str, int, int, bool, int]] = []
        try:
            for pieces in moments:
                standing = await engines.linked_workers()
                number = await self._victim(batch, pieces)
                if number is None:
                    break
                kind = self._kind(len(standing))
                struck.append((kind, number, pieces, len(standing) == 1, await engines.resumes()))
                await engines.apply_fault(kind, number)
            proof.calls += await batch.wait_for_results()
        finally:
            await batch.cancel()
        counts = [before for *_, before in struck] + [await engines.resumes()]
        for (kind, number, pieces, alone, before), after in zip(struck, counts[1:], strict=True):
            if after > before:
                proof.points.append(Point(kind, number, pieces, alone, after - before))
            else:
                proof.misses += 1

    async def _victim(self, batch: Batch, pieces: int) -> int | None:
        """Wait until all calls have received `pieces` pieces; return the worker that then runs most sequences. None if
        all calls have ended before."""
        while await batch.until(pieces):
            loads = await self._engines.running()
            number = max(loads, key=loads.__getitem__, default=None)
            if number is not None and loads[number]:
                return number
            await asyncio.sleep(BEAT_S)  # beats report the running sequences
        return None

    def _kind(self, standing: int) -> str:
        self._kills_due += 1 / KILLS_OF
        if self._kills_due >= 1 and standing == WORKERS:
            self._kills_due -= 1
            return KILL
        return self._rng.choice((LINK, STOP))


async def prove(engines: Engines, points: int, seed: int) -> Proof:
    """Run a Prover until `points` faults have hit a sequence, and return its proof."""
    return await Prover(engines, seed).prove(points)
