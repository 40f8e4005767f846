"""Quota reservations of calls. A reservation is made before the call waits, topped up as the call's output grows, and
settled when the call ends.

Every reservation is settled, even if the call is cancelled while the reservation is being made. With a remote store,
reserving and settling run in separate tasks, which a cancellation of the call does not stop. Nothing is counted per
token. Instead, a pass over the running calls, a few times a second, tops up the reservations of calls that have grown.
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
from cluster.gateway.calls.records.token_times import new_tokens
from cluster.gateway.quotas.local_limits import LimitsPort
from cluster.observe.metrics import Metrics
from cluster.policy.fairness.output_lengths import LearntOutputs
from cluster.policy.limits.limits import QUANTUM_TOKENS, Granted, LimitRefusal, LimitUse, ReservationRequest
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

T = TypeVar("T")

LOOK_S = 0.25
MAX_CONCURRENT = 64
"""Maximum number of reservations that are topped up concurrently."""
SWEEP_S = 60.0
UTILIZATION_S = 60.0
NO_LIMITS = TenantLimits()
NEVER = 2**62
"""Number of output tokens that no call reaches."""


@dataclass(slots=True)
class _Reservation:
    """The reservation of one call. `due`: number of output tokens at which more tokens must be reserved. `seen`: number
    of output tokens when the running calls were last checked."""

    call: Call
    due: int
    seen: int = 0


class QuotaReservations:
    """The reservations of all calls at one gateway. Calls of tenants without limits have no reservation."""

    def __init__(
        self,
        limits: LimitsPort,
        learnt: LearntOutputs,
        metrics: Metrics,
        cut: Callable[[Call], None],
        clock: Callable[[], float] = time.monotonic,
        max_tenants: int = 500,
    ) -> None:
        """`learnt`: the lengths of earlier outputs, from which the size of a reservation is estimated. `cut`: ends a
        call whose tenant has spent its budget; the call keeps its output so far. `max_tenants`: maximum number of
        tenants in the metrics."""
        self._limits = limits
        self._learnt = learnt
        self._metrics = metrics
        self._cut = cut
        self._clock = clock
        self._max_tenants = max_tenants
        self._held: dict[str, _Reservation] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._used: dict[tuple[str, str], tuple[float, float]] = {}  # (tenant, limit) -> (when, ratio)

    @property
    def open_count(self) -> int:
        """Number of open reservations."""
        return len(self._held)

    async def admit(self, call: Call) -> None:
        """Reserve the tokens that the call is likely to use, and add rate-limit headers to the call. Raises
        CallError."""
        policy = call.policy
        if policy.limits == NO_LIMITS:
            return
        output_tokens = 0
        if not call.is_pooling:
            per_output = self._learnt.p95(call.policy.flow, call.model, call.sequences[0].request.sampling.max_tokens)
            output_tokens = len(call.sequences) * per_output
        prompt_tokens = max(call.usage.prompt_tokens - call.prepaid_tokens, 0)
        ask = ReservationRequest(call.id, prompt_tokens, output_tokens, requests=int(not call.counted))
        result = await self._reserve(policy, ask)
        self._note(policy.name, result)
        if isinstance(result, LimitRefusal):
            raise refusal(result)
        self._held[call.id] = _Reservation(call, NEVER if call.is_pooling else ask.output_tokens)
        call.add_headers(headers(result))

    async def count_request(self, policy: TenantPolicy) -> None:
        """Count a request of the tenant, whatever the request's outcome will be. Raises CallError if the tenant has
        used up its requests per minute."""
        if policy.limits.requests_per_minute is not None:
            await self._charge(policy, 1, 0)

    async def charge(self, policy: TenantPolicy, tokens: int) -> None:
        """Charge the tenant for tokens that were processed outside of any call. Raises CallError."""
        if policy.limits != NO_LIMITS and tokens:
            await self._charge(policy, 0, tokens)

    async def _charge(self, policy: TenantPolicy, requests: int, tokens: int) -> None:
        refused = await self._limits.charge(policy, requests, tokens)
        if refused is not None:
            self._note(policy.name, refused)
            raise refusal(refused)

    async def settle(self, call: Call) -> None:
        """Settle the reservation of an ended call: charge the tokens that the engine counted, and release the other
        reserved tokens. Idempotent."""
        if self._held.pop(call.id, None) is None:
            return
        prompt_tokens = max(call.charged_prompt_tokens - call.prepaid_tokens, 0)
        settling = self._limits.settle(call.id, prompt_tokens, new_tokens(call))
        await (settling if self._limits.synchronous else asyncio.shield(self._spawn(settling)))

    async def watch(self) -> None:
        """Periodically raise the reservations of calls whose output has grown. Runs until cancelled."""
        swept = self._clock()
        while True:
            await asyncio.sleep(LOOK_S)
            due = [held for held in self._held.values() if self._is_due(held)]
            for at in range(0, len(due), MAX_CONCURRENT):
                await asyncio.gather(*(self._top_up(held) for held in due[at : at + MAX_CONCURRENT]))
            if self._clock() - swept >= SWEEP_S:
                swept = self._clock()
                self._limits.sweep()

    async def close(self) -> None:
        """Wait until all pending operations on the store have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def utilization(self) -> Iterator[tuple[str, str, float]]:
        """Yield a tuple (tenant, limit, used fraction in [0, 1]) for each limit of each tenant that has made a call
        within UTILIZATION_S."""
        oldest = self._clock() - UTILIZATION_S
        for (tenant, limit), (when, ratio) in list(self._used.items()):
            if when >= oldest:
                yield tenant, limit, ratio

    # ---- internals

    async def _reserve(self, policy: TenantPolicy, ask: ReservationRequest) -> Granted | LimitRefusal:
        if self._limits.synchronous:
            return await self._limits.reserve(policy, ask)
        asking = self._spawn(self._limits.reserve(policy, ask))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._spawn(self._undo(asking, ask.call_id))
            raise

    def _is_due(self, held: _Reservation) -> bool:
        """Return whether a reservation must be topped up now. It is topped up early if the call has received more than
        half of QUANTUM_TOKENS since the last pass."""
        tokens = new_tokens(held.call)
        early = tokens - held.seen - QUANTUM_TOKENS // 2
        held.seen = tokens
        return (tokens + early if early > 0 else tokens) >= held.due

    async def _top_up(self, held: _Reservation) -> None:
        call, policy = held.call, held.call.policy
        wanted = max(held.seen, held.due)
        may_continue = await self._limits.top_up(policy, call.id, wanted)
        # With on_budget "stop" the call may have got less than a quantum, so it is due again as soon as it grows.
        held.due = wanted + (1 if policy.on_budget == "stop" else QUANTUM_TOKENS)
        if not may_continue and call.id in self._held:
            self._cut(call)

    async def _undo(self, asking: asyncio.Task[Granted | LimitRefusal], call_id: str) -> None:
        """Settle the reservation of a call that was cancelled while the reservation was being made."""
        await asyncio.wait([asking])
        await self._limits.settle(call_id, 0, 0)

    def _note(self, tenant: str, result: Granted | LimitRefusal) -> None:
        now = self._clock()
        uses = {"requests_per_minute": result.requests, "tokens_per_minute": result.tokens}
        ratios = {name: 1 - use.remaining / use.limit for name, use in uses.items() if use is not None}
        if isinstance(result, LimitRefusal):
            ratios[result.limit_name.value] = 1 - result.remaining / result.limit
        for name, ratio in ratios.items():
            if (tenant, name) in self._used or len(self._used) < 5 * self._max_tenants:
                self._used[tenant, name] = (now, ratio)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def __repr__(self) -> str:
        return f"QuotaReservations({len(self._held)} reservations, {self._limits})"


def headers(result: Granted | LimitRefusal) -> tuple[tuple[str, str], ...]:
    """Return the rate-limit headers of a response. The names are those that OpenAI's clients read."""
    out: list[tuple[str, str]] = []
    for name, use in (("requests", result.requests), ("tokens", result.tokens)):
        if use is not None:
            out += _use_headers(name, use)
    return tuple(out)


def _use_headers(name: str, use: LimitUse) -> Sequence[tuple[str, str]]:
    return (
        (f"x-ratelimit-limit-{name}", str(use.limit)),
        (f"x-ratelimit-remaining-{name}", str(use.remaining)),
        (f"x-ratelimit-reset-{name}", f"{math.ceil(use.reset_s)}s"),
    )


def refusal(refused: LimitRefusal) -> CallError:
    """Return the error for a refused call. The error names the limit, and a delay if a retry can succeed."""
    fields = headers(refused)
    if refused.retry_after_s is None:
        fields = (*fields, ("x-should-retry", "false"))  # OpenAI's clients retry any 429 otherwise
    error = CallError(
        refused.outcome,
        refused.message,
        retry_after_s=refused.retry_after_s,
        quota=(Violation(refused.limit_name.value, refused.message),),
        headers=fields,
    )
    if refused.retry_after_s is None:
        error.retry_after_s = None
    return error
