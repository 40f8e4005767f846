"""What each tenant may use: reserved before a call waits, topped up as it grows, settled at its end.

A reservation outlives whatever ends its call, a cancellation in the midst of asking included: where a store is waited
for, asking and settling run in tasks of their own, which no caller's going away can stop. Of growth the token path
tells nothing; a pass over the running calls, a few times a second, does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.api.outcomes import CallError, Violation
from cluster.gateway.calls.call import Call
from cluster.gateway.quotas.local_limits import LimitsPort
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.output_lengths import LearntOutputs
from cluster.policy.limits.limits import QUANTUM_TOKENS, Ask, Granted, LimitRefusal, LimitUse
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy
from cluster.process import ticks

T = TypeVar("T")

LOOK_S = 0.25
AT_ONCE = 64
"""Reservations that are topped up at the same time, where a store is asked."""
SWEEP_S = 60.0
UTILIZATION_S = 60.0
NO_LIMITS = TenantLimits()


@dataclass(slots=True)
class _Held:
    """A call with a reservation. `due`: at so many output tokens it is asked for more."""

    call: Call
    due: int
    seen: int = 0


class QuotaReservations:
    """Every limited call's reservation. Tenants without limits cost nothing here."""

    def __init__(
        self,
        limits: LimitsPort,
        learnt: LearntOutputs,
        metrics: Metrics,
        cut: Callable[[Call], None],
        clock: Callable[[], float] = time.monotonic,
        max_tenants: int = 500,
    ) -> None:
        """`cut` ends a call whose budget is spent, with what it has. `max_tenants`: as many are told in metrics."""
        self._limits = limits
        self._learnt = learnt
        self._metrics = metrics
        self._cut = cut
        self._clock = clock
        self._max_tenants = max_tenants
        self._held: dict[str, _Held] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._used: dict[tuple[str, str], tuple[float, float]] = {}  # (tenant, limit) -> (when, ratio)

    @property
    def held(self) -> int:
        """Reservations that stand."""
        return len(self._held)

    async def admit(self, call: Call) -> None:
        """Reserve what the call is likely to use, and note for its caller how its limits stand. Raises CallError."""
        policy = call.policy
        if policy.limits == NO_LIMITS:
            return
        per_output = self._learnt.p95(call.flow, call.model, call.sequences[0].request.sampling.max_tokens)
        ask = Ask(call.id, call.usage.prompt_tokens, len(call.sequences) * per_output, requests=int(not call.counted))
        got = await self._reserve(policy, ask)
        self._note(policy.name, got)
        if isinstance(got, LimitRefusal):
            raise refusal(got)
        self._held[call.id] = _Held(call, ask.output_tokens)
        call.headers = headers(got)

    async def count(self, policy: TenantPolicy) -> None:
        """Count a try as a request, whatever becomes of it. Raises CallError where the tenant's minute is full."""
        if policy.limits.requests_per_minute is not None:
            await self._charge(policy, 1, 0)

    async def charge(self, policy: TenantPolicy, tokens: int) -> None:
        """Charge tokens that were worked on without a call. Raises CallError."""
        if policy.limits != NO_LIMITS and tokens:
            await self._charge(policy, 0, tokens)

    async def _charge(self, policy: TenantPolicy, requests: int, tokens: int) -> None:
        got = await self._limits.charge(policy, requests, tokens)
        if got is not None:
            self._note(policy.name, got)
            raise refusal(got)

    async def settle(self, call: Call) -> None:
        """It ended: what the engine has counted of it stays counted, the rest is given back. Once."""
        if self._held.pop(call.id, None) is None:
            return
        prompt = call.usage.prompt_tokens if call.prompt_computed and call.pays_prompt else 0
        settling = self._limits.settle(call.id, prompt, call.new_tokens)
        await (settling if self._limits.at_once else asyncio.shield(self._spawn(settling)))

    async def watch(self) -> None:
        """Top up what has grown, until cancelled."""
        swept = self._clock()
        while True:
            await ticks.rest(LOOK_S)
            due = [held for held in self._held.values() if self._is_due(held)]
            for at in range(0, len(due), AT_ONCE):
                await asyncio.gather(*(self._top_up(held) for held in due[at : at + AT_ONCE]))
            if self._clock() - swept >= SWEEP_S:
                swept = self._clock()
                self._limits.sweep()

    async def close(self) -> None:
        """Let what is being told to a store arrive there."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def utilization(self) -> Iterator[tuple[str, str, float]]:
        """Tenant, limit and the used part of it in [0, 1], of those that have called within a minute."""
        oldest = self._clock() - UTILIZATION_S
        for (tenant, limit), (when, ratio) in list(self._used.items()):
            if when >= oldest:
                yield tenant, limit, ratio

    # ---- inside

    async def _reserve(self, policy: TenantPolicy, ask: Ask) -> Granted | LimitRefusal:
        if self._limits.at_once:
            return await self._limits.reserve(policy, ask)
        asking = self._spawn(self._limits.reserve(policy, ask))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._spawn(self._undo(asking, ask.call_id))
            raise

    def _is_due(self, held: _Held) -> bool:
        """Whether it needs more now; one that gains over half a quantum in a look must have it a look ahead."""
        tokens = held.call.new_tokens
        gained, held.seen = tokens - held.seen, tokens
        return tokens + max(gained - QUANTUM_TOKENS // 2, 0) >= held.due

    async def _top_up(self, held: _Held) -> None:
        call, policy = held.call, held.call.policy
        wanted = max(held.seen, held.due)
        going = await self._limits.top_up(policy, call.id, wanted)
        # One that stops with its budget may have got less than a quantum: it is asked again as soon as it has grown.
        held.due = wanted + (1 if policy.on_budget == "stop" else QUANTUM_TOKENS)
        if not going and call.id in self._held:
            self._cut(call)

    async def _undo(self, asking: asyncio.Task[Granted | LimitRefusal], call_id: str) -> None:
        """The caller went away while the reservation was asked for."""
        await asyncio.wait([asking])
        await self._limits.settle(call_id, 0, 0)

    def _note(self, tenant: str, got: Granted | LimitRefusal) -> None:
        now = self._clock()
        ratios = {"requests_per_minute": got.requests, "tokens_per_minute": got.tokens}
        told = {name: 1 - one.remaining / one.limit for name, one in ratios.items() if one is not None}
        if isinstance(got, LimitRefusal):
            told[got.limit_name.value] = 1 - got.remaining / got.limit
        for name, ratio in told.items():
            if (tenant, name) in self._used or len(self._used) < 5 * self._max_tenants:
                self._used[tenant, name] = (now, ratio)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def __repr__(self) -> str:
        return f"Allowances({len(self._held)} reservations, {self._limits})"


def headers(got: Granted | LimitRefusal) -> tuple[tuple[str, str], ...]:
    """How the tenant's limits stand, under the names that OpenAI's clients know."""
    out: list[tuple[str, str]] = []
    for name, one in (("requests", got.requests), ("tokens", got.tokens)):
        if one is not None:
            out += _standing(name, one)
    return tuple(out)


def _standing(name: str, one: LimitUse) -> Sequence[tuple[str, str]]:
    return (
        (f"x-ratelimit-limit-{name}", str(one.limit)),
        (f"x-ratelimit-remaining-{name}", str(one.remaining)),
        (f"x-ratelimit-reset-{name}", f"{math.ceil(one.reset_s)}s"),
    )


def refusal(got: LimitRefusal) -> CallError:
    """What the caller is told: which limit, how it stands, and when to come again, if ever."""
    told = headers(got)
    if got.retry_after_s is None:
        told = (*told, ("x-should-retry", "false"))  # OpenAI's clients retry any 429 otherwise
    error = CallError(
        got.outcome,
        got.message,
        retry_after_s=got.retry_after_s,
        quota=(Violation(got.limit_name.value, got.message),),
        headers=told,
    )
    if got.retry_after_s is None:
        error.retry_after_s = None
    return error
