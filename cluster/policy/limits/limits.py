"""Tenant limits. An amount is reserved when a call is admitted, topped up while the call runs, and settled at
the end.

Problem: the cost of a call is known only at the end of the call, when many other calls have been admitted.
So the likely cost is reserved: the prompt and the tenant's 95th percentile of output. If the output
becomes longer, more tokens are reserved, one quantum at a time. At the end the unused rest is returned.

Invariants: a call is refused if it would bring a one-minute window, or a daily or monthly budget, over its
limit. At the end of a call, also of a failed one, the number of running calls decreases by one, and the
tokens that the engine counted replace the call's reservation. If a tenant's policy stops calls on an empty
budget, a call exceeds the budget by less than one quantum.

A limit per minute never ends a running call. A budget ends a running call only if the tenant's policy says
`stop`.

Source: reserve and settle as in two-phase quota (Doorman, Google 2016). The sliding windows are in
windows.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.api.frozen import frozen_dataclass
from cluster.api.outcomes import Outcome
from cluster.policy.limits.windows import (
    MonotonicClock,
    SlidingSum,
    TenantUse,
    day_ends_in_s,
    day_of,
    month_ends_in_s,
    month_of,
)
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

QUANTUM_TOKENS = 256
CONCURRENT_RETRY_S = 1.0
NEVER = None


class Limit(StrEnum):
    """Names of the limits, which are the field names of `TenantLimits`."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENT = "concurrent_requests"
    DAILY = "daily_tokens"
    MONTHLY = "monthly_tokens"


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """Weights with which input and output tokens count towards the limit `tokens_per_minute`. Budgets count tokens
    unweighted."""

    input: float = 1.0
    output: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 < x <= 1000 for x in (self.input, self.output)):
            raise ValueError(
                f"token weights must be above 0 and at most 1000, got input={self.input}, output={self.output}"
            )

    def sum(self, prompt_tokens: int, output_tokens: int) -> int:
        """Number of weighted tokens, rounded up."""
        return math.ceil(self.input * prompt_tokens + self.output * output_tokens)


@frozen_dataclass
class ReservationRequest:
    """Amounts to reserve for a call.

    `output_tokens`: likely output of all sequences of the call together.
    """

    call_id: str
    prompt_tokens: int
    output_tokens: int
    requests: int = 1
    """Number of requests to charge; 0 for a call that was already charged as a request."""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 0:
            raise ValueError("tokens must not be negative")


@frozen_dataclass
class LimitUse:
    """Current state of one limit, for x-ratelimit headers.

    `reset_s` is the time in seconds until the whole limit is free again.
    """

    limit: int
    remaining: int
    reset_s: float


@frozen_dataclass
class Granted:
    """Result of a reservation that was granted: the call is admitted, and its request and tokens are reserved.

    `requests` and `tokens`: the state of the tenant's limits per minute after the reservation; None for a limit
    that the tenant does not have.
    """

    requests: LimitUse | None
    tokens: LimitUse | None


@dataclass(frozen=True, slots=True)
class LimitRefusal:
    """Result for a refused call. Nothing was counted for the call.

    `retry_after_s` None: the call alone exceeds the limit, so a retry cannot succeed.
    """

    outcome: Outcome
    limit_name: Limit
    retry_after_s: float | None
    limit: int
    remaining: int
    reset_s: float
    requests: LimitUse | None = None
    tokens: LimitUse | None = None

    @property
    def message(self) -> str:
        """Text for the caller, with the limit and the remedy."""
        name = self.limit_name.replace("_", " ")
        if self.retry_after_s is NEVER:
            return f"this call alone exceeds {name} ({self.limit}); ask for fewer tokens or for a higher limit"
        if self.outcome is Outcome.BUDGET_EXHAUSTED:
            return f"{name} are used up ({self.remaining} of {self.limit} left); they are reset in {self.reset_s:.0f} s"
        return f"{name} reached ({self.remaining} of {self.limit} left); retry in {self.retry_after_s:.1f} s"


@dataclass(slots=True)
class _HeldAmounts:
    """Amounts that are reserved for one call.

    `taken`: pairs of (bucket of the one-minute window, weighted tokens). The first pair is the admission; each later
    pair is one top-up.
    """

    tenant: str
    prompt_tokens: int
    output_tokens: int
    taken: list[tuple[int, int]]
    day: int
    month: int

    def spend(self, use: TenantUse, tokens: int) -> None:
        """Add tokens to two sums of the tenant's used tokens: the sum of the day and the sum of the month in which this
        call was admitted.

        A sum is not changed if `use` already counts a later day or month.
        """
        if use.day.number == self.day:
            use.day.used += tokens
        if use.month.number == self.month:
            use.month.used += tokens


@frozen_dataclass
class _Wanted:
    """Amounts to check against the limits. An amount of 0 is not checked.

    `plain`: unweighted tokens, for the budgets. `weighted`: weighted tokens, for the limit per minute.
    """

    plain: int
    running: int
    requests: int
    weighted: int


class LimitStore(Protocol):
    """Store of reservations, in this process or shared between gateways.

    Gateways that share a store use the clock of the store.
    """

    def reserve(
        self, policy: TenantPolicy, ask: ReservationRequest, now: float, epoch_s: float
    ) -> Granted | LimitRefusal:
        """Admit or refuse a call. Raises ValueError if the id of the call already has a reservation."""

    def charge(
        self, policy: TenantPolicy, requests: int, tokens: int, now: float, epoch_s: float
    ) -> LimitRefusal | None:
        """Count requests and tokens that belong to no reservation. `tokens` count as input tokens.

        If a limit would be exceeded, nothing is counted and the refusal is returned.
        """

    def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int, now: float, epoch_s: float) -> bool:
        """Record the number of output tokens of a call so far, and reserve more if needed.

        Returns False if the call must stop. A call with an unknown id may continue.
        """

    def settle(self, call_id: str, prompt_tokens: int, output_tokens: int, now: float, epoch_s: float) -> None:
        """Replace the reservation of an ended call by the engine's token counts; both counts are 0 if the call never
        ran.

        A call without a reservation, such as a settled call, is ignored.
        """


class Limiter:
    """LimitStore in the memory of this process.

    `now` is monotonic time and `epoch_s` is UTC time, both in seconds. Either clock may stand still or step back.
    """

    def __init__(self, *, weights: TokenWeights | None = None, quantum_tokens: int = QUANTUM_TOKENS) -> None:
        if quantum_tokens < 1:
            raise ValueError("quantum_tokens must be 1 or more")
        self._weights = weights or TokenWeights()
        self._quantum_tokens = quantum_tokens
        self._tenants: dict[str, TenantUse] = {}
        self._held: dict[str, _HeldAmounts] = {}
        self._clock = MonotonicClock()

    def reserve(
        self, policy: TenantPolicy, ask: ReservationRequest, now: float, epoch_s: float, *, sharers: int = 1
    ) -> Granted | LimitRefusal:
        """Implements `LimitStore.reserve`. `sharers`: number of gateways, at least 1. Each gateway applies an equal
        share of every limit."""
        if ask.call_id in self._held:
            raise ValueError(f"call {ask.call_id!r} holds a reservation already")
        use, now = self._at(policy.name, now, epoch_s)
        limits = gateway_share(policy.limits, sharers)
        weighted = self._weights.sum(ask.prompt_tokens, ask.output_tokens)
        wanted = _Wanted(ask.prompt_tokens + ask.output_tokens, 1, ask.requests, weighted)
        refusal = _refusal(limits, use, wanted, now, epoch_s)
        if refusal is not None:
            return refusal
        self._count(policy, use, ask, now)
        return Granted(*_standings(limits, use, now))

    def charge(
        self, policy: TenantPolicy, requests: int, tokens: int, now: float, epoch_s: float, *, sharers: int = 1
    ) -> LimitRefusal | None:
        """Implements `LimitStore.charge`. `sharers` as in `reserve`."""
        use, now = self._at(policy.name, now, epoch_s)
        limits = gateway_share(policy.limits, sharers)
        refusal = _refusal(limits, use, _Wanted(tokens, 0, requests, self._weights.sum(tokens, 0)), now, epoch_s)
        if refusal is None:
            self._charge(use, requests, tokens, now)
        return refusal

    def record_charge(self, policy: TenantPolicy, requests: int, tokens: int, now: float, epoch_s: float) -> None:
        """Count requests and tokens that another gateway has charged, regardless of the limits."""
        use, now = self._at(policy.name, now, epoch_s)
        self._charge(use, requests, tokens, now)

    def _charge(self, use: TenantUse, requests: int, tokens: int, now: float) -> None:
        if requests:
            use.requests.add(requests, now)
        if tokens:
            use.tokens.add(self._weights.sum(tokens, 0), now)
            use.day.used += tokens
            use.month.used += tokens

    def record_admission(self, policy: TenantPolicy, ask: ReservationRequest, now: float, epoch_s: float) -> None:
        """Count a call that another gateway has admitted, regardless of the limits.

        Raises ValueError if the id of the call already has a reservation.
        """
        if ask.call_id in self._held:
            raise ValueError(f"call {ask.call_id!r} holds a reservation already")
        use, now = self._at(policy.name, now, epoch_s)
        self._count(policy, use, ask, now)

    def top_up(
        self, policy: TenantPolicy, call_id: str, output_tokens: int, now: float, epoch_s: float, *, sharers: int = 1
    ) -> bool:
        """Implements `LimitStore.top_up`. Reserves one quantum when the reservation is used up."""
        held = self._held.get(call_id)
        if held is None or output_tokens < held.output_tokens:
            return True
        use, now = self._at(held.tenant, now, epoch_s)
        wanted = output_tokens - held.output_tokens + self._quantum_tokens
        left = _budget_left(gateway_share(policy.limits, sharers), use)
        if policy.on_budget == "stop" and left < wanted:
            wanted = max(left, output_tokens - held.output_tokens)
            if left <= 0:
                self._take(use, held, wanted, now)
                return False
        self._take(use, held, wanted, now)
        return True

    def settle(self, call_id: str, prompt_tokens: int, output_tokens: int, now: float, epoch_s: float) -> None:
        """Implements `LimitStore.settle`."""
        held = self._held.pop(call_id, None)
        if held is None:
            return
        use, now = self._at(held.tenant, now, epoch_s)
        use.running -= 1
        change = self._weights.sum(prompt_tokens, output_tokens) - sum(amount for _, amount in held.taken)
        if change > 0:
            use.tokens.add(change, now)
        for bucket, amount in reversed(held.taken):
            back = min(
                amount, max(-change, 0)
            )  # at most the amount of this call, so that the amounts of other calls stay in the bucket
            use.tokens.correct(bucket, -back)
            change += back
        held.spend(use, prompt_tokens + output_tokens - held.prompt_tokens - held.output_tokens)

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """Set the used tokens of the current day and of the current month to at least the given numbers; higher
        numbers stay.

        `today` and `month`: used tokens by tenant.
        """
        for name in {*today, *month}:
            use = self._tenants.setdefault(name, TenantUse())
            use.day.advance(day_of(epoch_s))
            use.month.advance(month_of(epoch_s))
            if use.day.number == day_of(epoch_s):
                use.day.used = max(use.day.used, today.get(name, 0))
            if use.month.number == month_of(epoch_s):
                use.month.used = max(use.month.used, month.get(name, 0))

    def has_reservation(self, call_id: str) -> bool:
        """Return whether the call has a reservation."""
        return call_id in self._held

    def use(self, tenant: str) -> TenantUse:
        """Current use of a tenant. All values are zero for an unknown tenant."""
        return self._tenants.get(tenant) or TenantUse()

    def sweep(self, now: float) -> None:
        """Forget tenants whose sums are all zero. The caller runs this method once a minute."""
        now = self._clock.read(now)
        for name, use in list(self._tenants.items()):
            use.advance(now)
            if not (use.running or use.requests.total or use.tokens.total or use.day.used or use.month.used):
                del self._tenants[name]

    def __repr__(self) -> str:
        return f"Limiter({len(self._tenants)} tenants, {len(self._held)} reservations)"

    def _at(self, tenant: str, now: float, epoch_s: float) -> tuple[TenantUse, float]:
        now = self._clock.read(now)
        use = self._tenants.get(tenant)
        if use is None:
            use = self._tenants[tenant] = TenantUse()
        use.advance(now)
        day = day_of(epoch_s)
        if day > use.day.number:  # the month can only change when the day does
            use.day.advance(day)
            use.month.advance(month_of(epoch_s))
        return use, now

    def _count(self, policy: TenantPolicy, use: TenantUse, ask: ReservationRequest, now: float) -> None:
        weighted = self._weights.sum(ask.prompt_tokens, ask.output_tokens)
        use.requests.add(ask.requests, now)
        use.running += 1
        taken = [(use.tokens.add(weighted, now), weighted)]
        held = _HeldAmounts(policy.name, ask.prompt_tokens, ask.output_tokens, taken, use.day.number, use.month.number)
        self._held[ask.call_id] = held
        held.spend(use, ask.prompt_tokens + ask.output_tokens)

    def _take(self, use: TenantUse, held: _HeldAmounts, tokens: int, now: float) -> None:
        """Reserve more output tokens for a call. They are counted in the current bucket of the one-minute window."""
        before = self._weights.sum(held.prompt_tokens, held.output_tokens)
        held.output_tokens += tokens
        more = self._weights.sum(held.prompt_tokens, held.output_tokens) - before
        held.taken.append((use.tokens.add(more, now), more))
        held.spend(use, tokens)


def _refusal(limits: TenantLimits, use: TenantUse, ask: _Wanted, now: float, epoch_s: float) -> LimitRefusal | None:
    """Return a refusal that names the first exceeded limit, budgets first; None if the amounts fit all limits."""
    if _fits(limits, use, ask):
        return None
    rows = (
        (Limit.MONTHLY, limits.monthly_tokens, use.month.used, ask.plain),
        (Limit.DAILY, limits.daily_tokens, use.day.used, ask.plain),
        (Limit.CONCURRENT, limits.concurrent_requests, use.running, ask.running),
        (Limit.REQUESTS, limits.requests_per_minute, use.requests.total, ask.requests),
        (Limit.TOKENS, limits.tokens_per_minute, use.tokens.total, ask.weighted),
    )
    for name, limit, used, wanted in rows:
        if limit is None or not wanted or used + wanted <= limit:
            continue
        retry_s, reset_s = _ends_in_s(name, use, used + wanted - limit, now, epoch_s)
        budget = name in (Limit.DAILY, Limit.MONTHLY)
        return LimitRefusal(
            Outcome.BUDGET_EXHAUSTED if budget else Outcome.RATE_LIMITED,
            name,
            NEVER if wanted > limit else retry_s,
            limit,
            max(limit - used, 0),
            reset_s,
            *_standings(limits, use, now),
        )
    return None


def _fits(limits: TenantLimits, use: TenantUse, ask: _Wanted) -> bool:
    """Quick check: True if the amounts certainly fit all limits, as the amounts of nearly every admitted call do.

    If the result is False, they may still fit; `_refusal` then checks the limits one by one.
    """
    monthly, daily, running = limits.monthly_tokens, limits.daily_tokens, limits.concurrent_requests
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    return (
        (monthly is None or use.month.used + ask.plain <= monthly)
        and (daily is None or use.day.used + ask.plain <= daily)
        and (running is None or use.running + ask.running <= running)
        and (requests is None or use.requests.total + ask.requests <= requests)
        and (tokens is None or use.tokens.total + ask.weighted <= tokens)
    )


def _ends_in_s(name: Limit, use: TenantUse, over: int, now: float, epoch_s: float) -> tuple[float, float]:
    """Return two durations in seconds for the limit `name`, which was exceeded. After the first, the tenant's counted
    use has fallen by at least `over` tokens or requests. After the second, none of the present use is counted any
    more."""
    if name is Limit.MONTHLY or name is Limit.DAILY:
        ends_in_s = month_ends_in_s(epoch_s) if name is Limit.MONTHLY else day_ends_in_s(epoch_s)
        return ends_in_s, ends_in_s
    if name is Limit.CONCURRENT:
        return CONCURRENT_RETRY_S, CONCURRENT_RETRY_S
    window = use.requests if name is Limit.REQUESTS else use.tokens
    return window.frees_in_s(over, now), window.empties_in_s(now)


def gateway_share(limits: TenantLimits, sharers: int) -> TenantLimits:
    """Share of one gateway in the limits: an equal part for each of `sharers` gateways, but at least 1.

    With the minimum of 1, all gateways together may exceed a small limit. A part of 0 would lock the tenant out.
    """
    if sharers <= 1:
        return limits

    def part(limit: int | None) -> int | None:
        return None if limit is None else max(limit // sharers, 1)

    return TenantLimits(
        requests_per_minute=part(limits.requests_per_minute),
        tokens_per_minute=part(limits.tokens_per_minute),
        concurrent_requests=part(limits.concurrent_requests),
        daily_tokens=part(limits.daily_tokens),
        monthly_tokens=part(limits.monthly_tokens),
    )


def _budget_left(limits: TenantLimits, use: TenantUse) -> int:
    pairs = ((limits.daily_tokens, use.day.used), (limits.monthly_tokens, use.month.used))
    return min((limit - used for limit, used in pairs if limit is not None), default=2**62)


def _standings(limits: TenantLimits, use: TenantUse, now: float) -> tuple[LimitUse | None, LimitUse | None]:
    def limit_use(limit: int | None, window: SlidingSum) -> LimitUse | None:
        if limit is None:
            return None
        return LimitUse(limit, max(limit - window.total, 0), window.empties_in_s(now))

    return limit_use(limits.requests_per_minute, use.requests), limit_use(limits.tokens_per_minute, use.tokens)
