"""Single faults: detection time, waiting time of callers, and the effect on calls that were not hit.

An episode is a set of streams that begin together on all workers. Throughout the episode further callers make new
calls, one after the other. When all streams have begun, one worker is killed, stopped or cut off. Streams that report a
resume were hit; the other streams are the survivors.

A calm episode shows how long new calls wait if many of them arrive at once and there is no fault. One worker is absent
from the beginning. Each other worker runs as many streams as in an episode with a fault. Then new calls arrive at once:
as many as one worker runs streams. After a fault, resumed calls may wait as long as these new calls do.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.faults.calls import Caller, CallResult, FaultRequest, make_request
from loadtests.faults.mass import KILL, LINK, STOP
from loadtests.serving.fleet import Fleet, SimWorker

WORKERS, STREAMS, FRESH = 4, 32, 4
STEP_MS, PREFILL_TOKENS_PER_S = 40, 40_000
WORDS, TOKENS, FRESH_TOKENS = 100, 60, 10
GROWN_WORDS = 8
"""Number of extra words in the prompts of new calls: as many as an interrupted call has emitted. A resumed call must
compute its emitted tokens again, so both kinds of calls compute equally long prompts.
"""
BEGUN_CHUNKS = 12
CALM = "calm"
EPISODES = (KILL, STOP, CALM, KILL, LINK, CALM, STOP, KILL, CALM, LINK) * 3
NOTICED_S, BACK_S, BEGUN_S = 8.0, 1.5, 30.0
TRIAL_S = 1.2
"""Pause in seconds before an episode. A worker that hung gets a probe after a second; streams that begin before the
probe would go to the other workers.
"""
BEFORE_S = 1.0


def source(model: Path, plain: str, seed: int) -> str:
    """Return the `sim://` source of the workers' simulated engines, for the model folder `model`. `plain`: parameters
    of the source that give each token a different text, so that each step gives a chunk."""
    room = "max_num_seqs=64&max_num_batched_tokens=2048&kv_blocks=16384&max_model_len=4096"
    speed = f"decode_ms={STEP_MS}&prefill_tokens_per_s={PREFILL_TOKENS_PER_S}"
    return f"sim://{model}?{speed}&{room}&seed={seed}&{plain}"


@dataclass(slots=True)
class Episode:
    """Measurements of one episode. Times are in seconds."""

    kind: str
    struck: float = 0.0
    noticed_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    """Longest silence of each stream that was hit."""
    after_s: list[float] = field(default_factory=list)
    """Longest silence of each stream that was hit, less the part before the fault: up to one step, which the fault did
    not cause.
    """
    fresh_s: list[float] = field(default_factory=list)
    """TTFT of new calls before the fault. In a calm episode: TTFT of the crowd of new calls."""
    before_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)
    """Gaps between the chunks of the survivors: `before_s` before the fault, `during_s` from the fault until the last
    hit stream has resumed.
    """
    around: list[tuple[float, float]] = field(default_factory=list)
    """(time after the fault, length) of every gap, for the plot."""
    failed: int = 0


@dataclass(slots=True)
class Findings:
    """Results of all episodes."""

    episodes: list[Episode] = field(default_factory=list)
    calls: list[CallResult] = field(default_factory=list)
    alarms: int = 0
    """Number of links that ended though the worker was not disturbed."""

    def of(self, *kinds: str) -> list[Episode]:
        """Return the episodes whose kind is one of `kinds`."""
        return [episode for episode in self.episodes if episode.kind in kinds]

    def noticed_s(self, *kinds: str) -> list[float]:
        """Return, for each fault, the seconds from the fault to the end of the worker's link; infinite for a link that
        did not end. `kinds`: the kinds of faults to include."""
        return [float("inf") if episode.noticed_s is None else episode.noticed_s for episode in self.of(*kinds)]

    def silence(self, crowd: bool, *, whole: bool = True) -> list[float]:
        """Return one ratio for each stream that was hit: the time without a chunk, divided by the allowed time.

        The allowed time is the fault's detection time plus the p99 TTFT of new calls. `crowd`: whether to take the
        TTFT of new calls that all arrive at once. Otherwise the TTFT of new calls that arrive one by one is taken.
        `whole`: whether the time without a chunk begins at the last chunk before the fault. Otherwise it begins at
        the fault.
        """
        calm = self.of(CALM) if crowd else [episode for episode in self.episodes if episode.kind != CALM]
        fresh = percentile([s for episode in calm for s in episode.fresh_s], 99)
        return [
            gap / (fresh + episode.noticed_s)
            for episode in self.of(KILL, STOP, LINK)
            if episode.noticed_s is not None
            for gap in (episode.gaps_s if whole else episode.after_s)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the values for the report, in milliseconds."""
        fresh = [s for episode in self.episodes if episode.kind != CALM for s in episode.fresh_s]
        crowd = [s for episode in self.of(CALM) for s in episode.fresh_s]
        out: dict[str, Any] = {"fresh TTFT ms": quantiles(fresh), "TTFT ms in a crowd": quantiles(crowd)}
        for kind in (KILL, STOP, LINK):
            episodes = self.of(kind)
            out[kind] = {
                "episodes": len(episodes),
                "noticed ms": quantiles([s for episode in episodes if (s := episode.noticed_s) is not None]),
                "silent gap ms": quantiles([gap for episode in episodes for gap in episode.gaps_s]),
                "survivors' ITL ms before": quantiles([gap for episode in episodes for gap in episode.before_s]),
                "survivors' ITL ms during": quantiles([gap for episode in episodes for gap in episode.during_s]),
            }
        around = {
            kind: [_rounded(gap) for episode in self.of(kind) for gap in episode.around] for kind in (KILL, STOP, LINK)
        }
        return out | {"gaps around faults": around}


def _rounded(gap: tuple[float, float]) -> tuple[float, float]:
    return round(gap[0], 3), round(gap[1], 4)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile; NaN if there are no values."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the p50, the p99 and the maximum in milliseconds, and the number of values. `values`: in seconds."""
    return {f"p{q}": round(percentile(values, q) * 1000, 1) for q in (50, 99, 100)} | {"count": len(values)}


class Recovery:
    """Runs episodes (streams during which one fault is injected) on a fleet of workers, and collects the findings."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._fleet = fleet
        self._rng = random.Random(seed)
        self._caller = Caller(fleet.grpc, fleet.metadata, "recovery")
        self._made = 0
        self.findings = Findings()

    async def play(self, kinds: Sequence[str]) -> Findings:
        """Play one episode of each kind and return the findings."""
        try:
            await self._caller.call(self._make_request(FRESH_TOKENS))  # the first call waits for the tokenizer
            for kind in kinds:
                await self._all_serve()
                seen = len(self._fleet.link_log.events)
                self.findings.episodes.append(await self._episode(kind))
                downs = [e for e in self._fleet.link_log.events[seen:] if e.name == "worker.disconnected"]
                self.findings.alarms += max(len(downs) - 1, 0)
        finally:
            await self._caller.close()
        return self.findings

    def _make_request(self, tokens: int) -> FaultRequest:
        self._made += 1
        words = WORDS + GROWN_WORDS if tokens == FRESH_TOKENS else WORDS
        return make_request(f"r{self._made}", "greedy", self._fleet.model, tokens, words, self._rng.random())

    async def _all_serve(self) -> None:
        """Wait until every worker is linked and no circuit breaker of a worker is open."""
        await self._fleet.until_all_up()
        await asyncio.sleep(TRIAL_S)
        for _ in range(2):
            await self._crowd(WORKERS)

    async def _crowd(self, count: int) -> Sequence[CallResult]:
        return await asyncio.gather(*(self._caller.call(self._make_request(FRESH_TOKENS)) for _ in range(count)))

    async def _episode(self, kind: str) -> Episode:
        episode = Episode(kind)
        away = self._rng.choice(self._fleet.workers) if kind == CALM else None
        if away is not None:
            since = time.time()
            away.signal(signal.SIGSTOP)
            await self._fleet.link_log.downs(away.id, since, NOTICED_S)
        count = STREAMS if away is None else STREAMS - STREAMS // WORKERS
        begun: set[str] = set()
        all_begun = asyncio.Event()

        def on_chunk(result: CallResult) -> None:
            if len(result.chunks) == BEGUN_CHUNKS:
                begun.add(result.request_id)
                if len(begun) == count:
                    all_begun.set()

        streams = [asyncio.create_task(self._caller.call(self._make_request(TOKENS), on_chunk)) for _ in range(count)]
        over = asyncio.Event()
        fresh: list[CallResult] = []
        beside = [asyncio.create_task(self._make_fresh_calls(fresh, over)) for _ in range(FRESH)]
        try:
            await self._begin(all_begun, streams)
            await asyncio.sleep(BEFORE_S / 2 + self._rng.uniform(0, 0.1))
            crowd = await self._apply_fault(kind, episode)
            results = await asyncio.gather(*streams)
        finally:
            over.set()
            if away is not None:
                away.signal(signal.SIGCONT)
            for task in streams:
                task.cancel()
            await asyncio.gather(*beside, *streams, return_exceptions=True)
        self.findings.calls += [*results, *fresh, *crowd]
        _evaluate(episode, results, crowd or [call for call in fresh if 0 < episode.struck - call.sent < BEFORE_S])
        return episode

    async def _begin(self, all_begun: asyncio.Event, streams: Sequence[asyncio.Task[CallResult]]) -> None:
        """Wait until all streams have begun. Raises RuntimeError if a stream does not begin in time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(all_begun.wait(), BEGUN_S)
            return
        errors = {task.result().error for task in streams if task.done()}
        raise RuntimeError(f"the streams of an episode did not begin within {BEGUN_S:g} s: {errors}")

    async def _make_fresh_calls(self, into: list[CallResult], over: asyncio.Event) -> None:
        while not over.is_set():
            into.append(await self._caller.call(self._make_request(FRESH_TOKENS)))

    async def _apply_fault(self, kind: str, episode: Episode) -> Sequence[CallResult]:
        """Apply the fault `kind` to a random worker. The kind CALM has no fault: instead, make as many new calls at
        once as one worker runs streams, and return the results."""
        episode.struck = time.time()
        if kind == CALM:
            return await self._crowd(STREAMS // WORKERS)
        worker = self._rng.choice(self._fleet.workers)
        _disturb(kind, worker)
        event = await self._fleet.link_log.downs(worker.id, episode.struck, NOTICED_S)
        if event is not None:
            episode.noticed_s = event.at - episode.struck
        if kind == STOP:
            await asyncio.sleep(BACK_S)
            worker.signal(signal.SIGCONT)
        return ()


def _disturb(kind: str, worker: SimWorker) -> None:
    if kind == LINK:
        worker.relay.sever()
    else:
        worker.signal(signal.SIGKILL if kind == KILL else signal.SIGSTOP)


def _evaluate(episode: Episode, streams: Sequence[CallResult], fresh: Sequence[CallResult]) -> None:
    """Record the measurements of an episode from the episode's calls."""
    struck = episode.struck
    episode.failed = sum(bool(result.error) for result in streams)
    episode.fresh_s = [result.chunks[0] - result.sent for result in fresh if result.chunks]
    hit = [result for result in streams if result.resumed]
    silences = [max(((s, at) for at, s in result.gaps() if at >= struck), default=(0.0, struck)) for result in hit]
    episode.gaps_s = [silence for silence, _ in silences]
    episode.after_s = [min(silence, at - struck) for silence, at in silences]
    recovered = max((at for _, at in silences), default=struck)
    survivors = [gap for result in streams if not result.resumed for gap in result.gaps()]
    episode.before_s = [s for at, s in survivors if struck - BEFORE_S <= at < struck]
    episode.during_s = [s for at, s in survivors if struck <= at <= recovered]
    if episode.kind != CALM:
        episode.around = [
            (at - struck, s) for result in streams for at, s in result.gaps() if -0.5 <= at - struck <= 1.5
        ]
