"""Thousands of faults: 64 streams, of all kinds, on four simulated workers. At any time some workers are failing.

Every call is compared with the undisturbed answer, obtained before from the same cluster. In the simulated engine each
token depends on all tokens so far and on every request field that affects the text. So one token that is lost, doubled
or computed with other parameters changes all tokens that follow.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.faults.calls import Caller, CallResult, FaultRequest, difference, mixed
from loadtests.serving.fleet import Fleet, SimWorker

STREAMS, WORKERS, SEQUENCES, STEP_MS = 64, 4, 20, 15
"""Concurrent streams, workers, sequences per worker, and step time in ms. The workers have fewer places than all
streams need, so that some streams always wait.
"""
REQUESTS = 192
TOKENS, WORDS = (24, 120), (8, 160)
KILL, STOP, LINK, ONE_WAY = "SIGKILL", "SIGSTOP", "link cut", "one-way cut"
ODDS: Mapping[str, float] = {KILL: 0.3, STOP: 0.2, LINK: 0.3, ONE_WAY: 0.2}
"""Odds of each kind of fault. A fault that the gateway has to detect by itself takes a worker away for longer."""
PHASES = ("in queue", "prefill", "first step", "mid-character", "last step", "twice", "any step")
INTERVAL_S = (0.02, 0.12)
MOMENT_S = 0.5
BACK_S = (0.2, 1.6)
"""Range of the duration of a stop or a cut, in seconds. Some durations are shorter, some longer than the detection
time.
"""
PREFILL_S = 0.01
LEAST_UP = 1
"""Number of workers besides the victim that must serve before a fault is applied."""
END_S = 60.0
MAX_ATTEMPTS = 16
"""Bound for both max_attempts and max_silent_losses. Faults are so dense that five losses of one call are normal, and
so is another loss before the call's next token.
"""
NOTICED_S = 5.0


def source(model: Path, seed: int) -> str:
    """Return the model source, which is the same for all four workers. Tokens come from the whole vocabulary, so that
    some tokens are parts of characters.
    """
    room = f"max_num_seqs={SEQUENCES}&max_num_batched_tokens=2048&kv_blocks=8192&max_model_len=4096"
    return f"sim://{model}?decode_ms={STEP_MS}&prefill_tokens_per_s=40000&{room}&seed={seed}&token_lo=0&token_hi=760"


class Moments:
    """Lets the fault injector wait until any call is in a given phase."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}

    def record_phase(self, result: CallResult) -> None:
        """Record the phase of a call. Called after each chunk of the call, and once before the first."""
        if not self._waiting:
            return
        for phase in _phases(result):
            event = self._waiting.pop(phase, None)
            if event is not None:
                event.set()

    async def wait(self, phase: str) -> bool:
        """Wait until a call is in this phase; return False if no call enters the phase in time."""
        event = self._waiting[phase] = asyncio.Event()
        try:
            async with asyncio.timeout(MOMENT_S):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            self._waiting.pop(phase, None)
        return True


def _phases(result: CallResult) -> list[str]:
    if not result.begun:
        return ["in queue", "prefill"]
    out = ["any step"]
    if len(result.chunks) == 1:
        out.append("first step")
    if result.mid_character:
        out.append("mid-character")
    if result.last:
        out.append("last step")
    if result.hit:
        out.append("twice")
    return out


@dataclass(slots=True)
class Outcome:
    """Results of the run with many faults."""

    points: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of faults by (kind, phase)."""
    calls: list[CallResult] = field(default_factory=list)
    differences: dict[str, str] = field(default_factory=dict)
    """Differences from the undisturbed answers by request id, for calls that differ."""
    stuck: int = 0
    """Number of calls that had not ended a minute after the last fault."""
    seconds: float = 0.0

    def settings(self) -> dict[str, Any]:
        """Return the values for the report."""
        kinds, phases = Counter[str](), Counter[str]()
        for (kind, phase), count in self.points.items():
            kinds[kind] += count
            phases[phase] += count
        resumed = [result.resumed for result in self.calls]
        return {
            "points": sum(kinds.values()),
            "by kind": dict(kinds),
            "by phase": dict(phases),
            "calls": len(self.calls),
            "calls that went on elsewhere after their first token": sum(count > 0 for count in resumed),
            "more than once": sum(count > 1 for count in resumed),
            "resumes": sum(resumed),
            "seconds": round(self.seconds, 1),
            "calls by kind": dict(Counter(result.request.kind for result in self.calls)),
            "stuck": self.stuck,
            "different": dict(Counter(self.differences.values())),
        }


class Mass:
    """A load test of a running fleet: many callers send requests to the fleet while faults are injected into it."""

    def __init__(self, fleet: Fleet, seed: int, requests: Sequence[FaultRequest], run: str = "mass") -> None:
        self._fleet = fleet
        self._rng = random.Random(seed)
        self._requests = requests
        self._caller = Caller(fleet.grpc, fleet.metadata, run)
        self._moments = Moments()
        self._busy: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False
        self.outcome = Outcome()

    async def reference(self) -> dict[str, CallResult]:
        """Make every request once, undisturbed; return the results by key."""
        gate = asyncio.Semaphore(STREAMS)

        async def call_undisturbed(request: FaultRequest) -> CallResult:
            async with gate:
                return await self._caller.call(request)

        results = await asyncio.gather(*(call_undisturbed(request) for request in self._requests))
        return {result.request.key: result for result in results}

    async def play(self, points: int, streams: int) -> Outcome:
        """Run `streams` callers at once until `points` faults have happened and every call has ended."""
        undisturbed = await self.reference()
        failed = [result.error for result in undisturbed.values() if result.error]
        if failed:
            raise RuntimeError(f"{len(failed)} calls failed undisturbed: {failed[0]}")
        began = time.monotonic()
        whole = {key: sum(map(len, result.texts.values())) for key, result in undisturbed.items()}
        callers = [asyncio.create_task(self._callers(number, streams, whole)) for number in range(streams)]
        try:
            await self._inject(points)
        finally:
            self._over = True
            _, stuck = await asyncio.wait(callers, timeout=END_S)
            self.outcome.stuck = len(stuck)
            for task in (*callers, *self._tasks):
                task.cancel()
            await asyncio.gather(*callers, *self._tasks, return_exceptions=True)
            for worker in self._fleet.workers:
                _bring_back(worker)
            await self._caller.close()
        self.outcome.seconds = time.monotonic() - began
        for result in self.outcome.calls:
            mismatch = difference(result, undisturbed[result.request.key])
            if mismatch:
                self.outcome.differences[result.request_id] = mismatch
        return self.outcome

    async def _callers(self, number: int, streams: int, whole: Mapping[str, int]) -> None:
        at = number
        while not self._over:
            request = self._requests[at % len(self._requests)]
            at += streams + 1  # every request in a different batch each time
            self.outcome.calls.append(await self._caller.call(request, self._moments.record_phase, whole[request.key]))

    # ---- faults

    async def _inject(self, points: int) -> None:
        for _ in range(points):
            kind = self._rng.choices(list(ODDS), list(ODDS.values()))[0]
            phase = self._rng.choice(PHASES)
            worker = await self._victim()
            if phase != "any step" and not await self._moments.wait(phase):
                phase = "any step"
            if phase == "prefill":
                await asyncio.sleep(PREFILL_S)
            self.outcome.points[kind, phase] += 1
            task = asyncio.create_task(self._apply_fault(kind, worker))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(self._rng.uniform(*INTERVAL_S))

    async def _victim(self) -> SimWorker:
        """Wait until more than LEAST_UP workers serve and have no other fault; return one of them at random."""
        fleet, link_log = self._fleet, self._fleet.link_log

        def serving() -> list[SimWorker]:
            return [worker for worker in fleet.workers if worker.id in link_log.up and worker.id not in self._busy]

        while not await link_log.until(lambda: len(serving()) > LEAST_UP, END_S):
            pass
        victim = self._rng.choice(serving())
        self._busy.add(victim.id)
        return victim

    async def _apply_fault(self, kind: str, worker: SimWorker) -> None:
        try:
            since = time.time()
            if kind in (KILL, LINK):
                if kind == KILL:
                    worker.signal(signal.SIGKILL)
                else:
                    worker.relay.sever()
                await self._fleet.link_log.downs(worker.id, since, NOTICED_S)
            else:
                if kind == STOP:
                    worker.signal(signal.SIGSTOP)
                else:
                    worker.cut_direction(self._rng.random() < 0.5, beats=self._rng.random() < 0.5)
                await asyncio.sleep(self._rng.uniform(*BACK_S))
                _bring_back(worker)
        finally:
            self._busy.discard(worker.id)
            self._fleet.link_log.wake_waiters()


def _bring_back(worker: SimWorker) -> None:
    worker.heal()
    worker.signal(signal.SIGCONT)


def requests_of(model: str, seed: int) -> list[FaultRequest]:
    """Return the calls that are made while workers fail: a mixture of all kinds."""
    return mixed(REQUESTS, model, seed, tokens=TOKENS, words=WORDS)
