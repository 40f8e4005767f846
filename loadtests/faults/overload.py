"""Overload: a sweep over rates of calls finds the best goodput. Then calls are offered at two and at five times this
rate.

Goodput is the number of calls a second that met the SLO. The SLO is fixed here, before anything is measured. The
gateway's queue holds only as many calls as can be served within the SLO's time to first token. A call beyond that
number is refused at once; a waiting call may be shed for a call of a higher class.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.arrivals import gamma
from loadtests.faults.calls import Caller, CallResult, FaultRequest, make_request
from loadtests.faults.recovery import percentile
from loadtests.records import Slo
from loadtests.serving.fleet import Fleet

WORKERS, SEQUENCES, STEP_MS, TOKENS, WORDS = 4, 8, 20, 32, 8
QUEUE = {"max_requests": 16, "max_wait_s": 5.0}
SLO = Slo(ttft_s=0.6, tpot_s=2 * STEP_MS / 1000)
SHARES: Mapping[str, float] = {"interactive": 0.2, "standard": 0.4, "batch": 0.4}
"""Share of the calls by priority class. The first class is the top class."""
TOP = "interactive"
SWEEP_PER_S = (24.0, 32.0, 40.0, 48.0, 56.0)
SWEEP_S, OVER_S, WARM_S = 6.0, 12.0, 1.5
OVERS = (2.0, 5.0)
SHED = "short of room"
"""Part of the error message of a shed call."""


def source(model: Path, plain: str, seed: int) -> str:
    """Return the workers' model source. `max_num_seqs` in it is chosen so that the workers can serve a known rate of
    calls."""
    room = f"max_num_seqs={SEQUENCES}&max_num_batched_tokens=2048&kv_blocks=4096&max_model_len=2048"
    return f"sim://{model}?decode_ms={STEP_MS}&prefill_tokens_per_s=200000&{room}&seed={seed}&{plain}"


@dataclass(frozen=True, slots=True)
class Load:
    """Results at one rate of calls, without the warm-up. `calls`: the priority class and the result of each call."""

    rate_per_s: float
    seconds: float
    calls: Sequence[tuple[str, CallResult]]

    @property
    def goodput_per_s(self) -> float:
        """Number of calls per second that met the SLO."""
        return sum(met(result) for _, result in self.calls) / self.seconds

    def refused_s(self, shed: bool) -> list[float]:
        """Return the seconds until refusal for each call that was shed while it waited (`shed` true) or refused at
        admission (`shed` false).
        """
        return [
            result.ended - result.sent
            for _, result in self.calls
            if result.error and ("short of room" in result.error) == shed
        ]

    def lost(self, cls: str) -> int:
        """Return how many calls of the class `cls` got no answer."""
        return sum(1 for its, result in self.calls if its == cls and result.error)

    def settings(self) -> dict[str, Any]:
        """Return the rate, the goodput and the counts of calls and errors by name. The report shows them as the
        `settings` of the row for this rate."""
        return {
            "rate_per_s": round(self.rate_per_s, 1),
            "goodput_per_s": round(self.goodput_per_s, 2),
            "calls": len(self.calls),
            "answered": dict(Counter(cls for cls, result in self.calls if not result.error)),
            "not answered": dict(Counter(cls for cls, result in self.calls if result.error)),
            "errors": dict(Counter(result.error for _, result in self.calls if result.error)),
        }


def met(result: CallResult) -> bool:
    """Return whether an answer met the SLO."""
    if result.error or result.usage is None or SLO.ttft_s is None or SLO.tpot_s is None:
        return False
    tokens = max(result.usage.completion_tokens - 1, 1)
    ttft, tpot = result.chunks[0] - result.sent, (result.chunks[-1] - result.chunks[0]) / tokens
    return ttft <= SLO.ttft_s and tpot <= SLO.tpot_s


@dataclass(slots=True)
class OverloadResults:
    """Results of an overload test. `sweep`: one result for each rate of calls. `overs`: one result for each overload;
    the key is the overload's rate as a multiple of the best goodput in the sweep. `calls`: all calls."""

    sweep: list[Load] = field(default_factory=list)
    overs: dict[float, Load] = field(default_factory=dict)
    calls: list[CallResult] = field(default_factory=list)

    @property
    def capacity_per_s(self) -> float:
        """The best goodput of the sweep, in calls per second."""
        return max(load.goodput_per_s for load in self.sweep)

    def refused_s(self, shed: bool) -> list[float]:
        """Return, for each refused call, the seconds until its refusal. The calls at all rates of the sweep and of the
        overload are included.

        `shed`: true for the calls that were dropped while they waited, false for the calls that were refused at
        admission.
        """
        return [s for load in (*self.sweep, *self.overs.values()) for s in load.refused_s(shed)]

    def refusals_p99_ms(self, shed: bool) -> float:
        """Return the 99th percentile of the times to refusal in milliseconds; NaN if no call was refused. `shed`:
        whether to count calls that were shed while they waited, or calls that were refused at admission."""
        return percentile(self.refused_s(shed), 99) * 1000


class Overload:
    """Callers of all classes, and the results of their calls."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self._rng = random.Random(seed)
        self._seed = seed
        self._model = fleet.model
        self._callers = {cls: Caller(fleet.grpc, fleet.metadata_of(cls), f"over-{cls}") for cls in SHARES}
        self._made = 0
        self.results = OverloadResults()

    async def play(self, share: float) -> OverloadResults:
        """Run the sweep and the overload; each rate takes `share` of the usual time."""
        try:
            await self._load(SWEEP_PER_S[0], WARM_S)
            for rate in SWEEP_PER_S:
                self.results.sweep.append(await self._load(rate, SWEEP_S * share))
            for times in OVERS:
                self.results.overs[times] = await self._load(self.results.capacity_per_s * times, OVER_S * share)
        finally:
            for caller in self._callers.values():
                await caller.close()
        return self.results

    async def _load(self, rate_per_s: float, seconds: float) -> Load:
        count = int(rate_per_s * (seconds + WARM_S))
        began = time.time()
        calls: list[tuple[str, float, asyncio.Task[CallResult]]] = []
        for due_s in gamma(count, rate_per_s, 1.0, self._seed + self._made):
            await asyncio.sleep(max(began + due_s - time.time(), 0.0))
            cls = self._rng.choices(list(SHARES), list(SHARES.values()))[0]
            calls.append((cls, due_s, asyncio.create_task(self._callers[cls].call(self._make_request()))))
        results = await asyncio.gather(*(task for _, _, task in calls))
        self.results.calls += results
        counted = [(cls, result) for (cls, due_s, _), result in zip(calls, results, strict=True) if due_s >= WARM_S]
        return Load(rate_per_s, max(calls[-1][1] - WARM_S, 0.1), counted)

    def _make_request(self) -> FaultRequest:
        self._made += 1
        return make_request(f"o{self._made}", "greedy", self._model, TOKENS, WORDS, self._rng.random())
