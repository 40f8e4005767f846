"""Limits: what a tenant may use, reserved when a call is admitted, topped up while it runs, settled at its end.

Problem: a call's cost is known at its end, and by then many others have been admitted. So what it is likely to cost is
reserved (prompt and the tenant's p95 output), more is taken in quanta as tokens come, and what was taken in vain is
given back. Invariants: nothing is admitted that would bring any window of a minute, or a day's or month's budget, over
its limit; whatever ends a call, `running` goes down by one and its reservation becomes what the engine counted; a call
whose tenant stops on an empty budget outruns it by less than one quantum.
Source: reserve/settle as in two-phase quota (Doorman, Google 2016); the sliding window in buckets (windows.py).

A running call is never ended for a limit of a minute, only for a budget, and only where the policy says stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cluster.api.outcomes import Outcome
from cluster.policy.limits.windows import (
    SlidingSum,
    Steady,
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
    """Which limit; the names are those of `TenantLimits`."""

    REQUESTS = "requests_per_minute"
    TOKENS = "tokens_per_minute"
    CONCURRENT = "concurrent_requests"
    DAILY = "daily_tokens"
    MONTHLY = "monthly_tokens"


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """What a token counts in tokens_per_minute; budgets count tokens plainly."""

    input: float = 1.0
    output: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 < x <= 1000 for x in (self.input, self.output)):
            raise ValueError("weights of tokens must lie above 0 and at most at 1000")

    def sum(self, prompt_tokens: int, output_tokens: int) -> int:
        """Rounded up."""
        return math.ceil(self.input * prompt_tokens + self.output * output_tokens)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a call wants. `output_tokens` is the likely output of all its n sequences together."""

    call_id: str
    prompt_tokens: int
    output_tokens: int
    requests: int = 1
    """0 for a call that has been charged as a request already."""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 0:
            raise ValueError("tokens must not be negative")


@dataclass(frozen=True, slots=True)
class LimitUse:
    """One limit as it stands, for x-ratelimit headers: `reset_s` until all of it is free again."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Granted:
    """The call is in, and its reservation stands. None for a limit that the tenant has not."""

    requests: LimitUse | None
    tokens: LimitUse | None


@dataclass(frozen=True, slots=True)
class LimitRefusal:
    """The call is not in, and nothing was counted. `retry_after_s` None: it will never fit, the call is too large."""

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
        """For the caller: which limit, and the remedy."""
        name = self.limit_name.replace("_", " ")
        if self.retry_after_s is NEVER:
            return f"this call alone exceeds {name} ({self.limit}); ask for fewer tokens or for a higher limit"
        if self.outcome is Outcome.BUDGET_EXHAUSTED:
            return (
                f"{name} are used up ({self.remaining} of {self.limit} left); they begin anew in {self.reset_s:.0f} s"
            )
        return f"{name} reached ({self.remaining} of {self.limit} left); retry in {self.retry_after_s:.1f} s"


@dataclass(slots=True)
class _HeldAmounts:
    """A reservation. `taken`: (bucket, weighted tokens), the first when it was admitted, the others topped up."""

    tenant: str
    prompt_tokens: int
    output_tokens: int
    taken: list[tuple[int, int]]
    day: int
    month: int


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of each limit; nothing is asked of one where it is 0."""

    plain: int
    running: int
    requests: int
    weighted: int


class LimitStore(Protocol):
    """Where reservations are kept: in this process, or shared between gateways (their clock is then the store's)."""

    def reserve(self, policy: TenantPolicy, ask: Ask, now: float, epoch_s: float) -> Granted | LimitRefusal:
        """Admit or refuse. ValueError for a call id that holds a reservation."""

    def charge(
        self, policy: TenantPolicy, requests: int, tokens: int, now: float, epoch_s: float
    ) -> LimitRefusal | None:
        """Count a try, or tokens that no call has; refuse what does not fit, which then is not counted."""

    def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int, now: float, epoch_s: float) -> bool:
        """So many output tokens there are; False: the call must stop. An unknown id may go on."""

    def settle(self, call_id: str, prompt_tokens: int, output_tokens: int, now: float, epoch_s: float) -> None:
        """It ended, and so much the engine counted (zeros where it never ran). Once; unknown ids are ignored."""


class Limiter:
    """The store in this process. `now` is monotonic, `epoch_s` is UTC's; both may stand or step back."""

    def __init__(self, *, weights: TokenWeights | None = None, quantum_tokens: int = QUANTUM_TOKENS) -> None:
        if quantum_tokens < 1:
            raise ValueError("quantum_tokens must be 1 or more")
        self._weights = weights or TokenWeights()
        self._quantum_tokens = quantum_tokens
        self._tenants: dict[str, TenantUse] = {}
        self._held: dict[str, _HeldAmounts] = {}
        self._clock = Steady()

    def reserve(
        self, policy: TenantPolicy, ask: Ask, now: float, epoch_s: float, *, sharers: int = 1
    ) -> Granted | LimitRefusal:
        """As the port says. `sharers`: this many gateways keep to an equal part of each limit (at least 1)."""
        if ask.call_id in self._held:
            raise ValueError(f"call {ask.call_id!r} holds a reservation already")
        use, now = self._at(policy.name, now, epoch_s)
        limits = shared(policy.limits, sharers)
        refusal = self._check(limits, use, ask, now, epoch_s)
        if refusal is not None:
            return refusal
        self._count(policy, use, ask, now)
        return Granted(*_standings(limits, use, now))

    def charge(
        self, policy: TenantPolicy, requests: int, tokens: int, now: float, epoch_s: float, *, sharers: int = 1
    ) -> LimitRefusal | None:
        """As the port says. `sharers` as in `reserve`."""
        use, now = self._at(policy.name, now, epoch_s)
        limits = shared(policy.limits, sharers)
        refusal = self._refusal(limits, use, _Wanted(tokens, 0, requests, self._weights.sum(tokens, 0)), now, epoch_s)
        if refusal is None:
            self._charge(use, requests, tokens, now)
        return refusal

    def charged(self, policy: TenantPolicy, requests: int, tokens: int, now: float, epoch_s: float) -> None:
        """Count what another has charged, whatever the limits."""
        use, now = self._at(policy.name, now, epoch_s)
        self._charge(use, requests, tokens, now)

    def _charge(self, use: TenantUse, requests: int, tokens: int, now: float) -> None:
        if requests:
            use.requests.add(requests, now)
        if tokens:
            use.tokens.add(self._weights.sum(tokens, 0), now)
            use.day.used += tokens
            use.month.used += tokens

    def record(self, policy: TenantPolicy, ask: Ask, now: float, epoch_s: float) -> None:
        """Count what somebody else has admitted, whatever the limits. ValueError as in `reserve`."""
        if ask.call_id in self._held:
            raise ValueError(f"call {ask.call_id!r} holds a reservation already")
        use, now = self._at(policy.name, now, epoch_s)
        self._count(policy, use, ask, now)

    def top_up(
        self, policy: TenantPolicy, call_id: str, output_tokens: int, now: float, epoch_s: float, *, sharers: int = 1
    ) -> bool:
        """As the port says; takes a quantum when the reservation is used up."""
        held = self._held.get(call_id)
        if held is None or output_tokens < held.output_tokens:
            return True
        use, now = self._at(held.tenant, now, epoch_s)
        wanted = output_tokens - held.output_tokens + self._quantum_tokens
        left = _budget_left(shared(policy.limits, sharers), use)
        if policy.on_budget == "stop" and left < wanted:
            wanted = max(left, output_tokens - held.output_tokens)
            if left <= 0:
                self._take(use, held, wanted, now)
                return False
        self._take(use, held, wanted, now)
        return True

    def settle(self, call_id: str, prompt_tokens: int, output_tokens: int, now: float, epoch_s: float) -> None:
        """As the port says."""
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
            )  # never more than that bucket got: it must not go below what others took
            use.tokens.correct(bucket, -back)
            change += back
        self._spend(use, held, prompt_tokens + output_tokens - held.prompt_tokens - held.output_tokens)

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """So much of this day's and month's budgets is used in any case, by tenant; less changes nothing."""
        for name in {*today, *month}:
            use = self._tenants.setdefault(name, TenantUse())
            use.day.advance(day_of(epoch_s))
            use.month.advance(month_of(epoch_s))
            if use.day.number == day_of(epoch_s):
                use.day.used = max(use.day.used, today.get(name, 0))
            if use.month.number == month_of(epoch_s):
                use.month.used = max(use.month.used, month.get(name, 0))

    def holds(self, call_id: str) -> bool:
        """Whether there is a reservation."""
        return call_id in self._held

    def use(self, tenant: str) -> TenantUse:
        """What a tenant has used; all zero for a stranger."""
        return self._tenants.get(tenant) or TenantUse()

    def sweep(self, now: float) -> None:
        """Forget tenants with nothing in any sum. Once a minute."""
        now = self._clock.read(now)
        for name, use in list(self._tenants.items()):
            use.requests.advance(now)
            use.tokens.advance(now)
            if not (use.running or use.requests.total or use.tokens.total or use.day.used or use.month.used):
                del self._tenants[name]

    def __repr__(self) -> str:
        return f"Limiter({len(self._tenants)} tenants, {len(self._held)} reservations)"

    def _at(self, tenant: str, now: float, epoch_s: float) -> tuple[TenantUse, float]:
        now = self._clock.read(now)
        use = self._tenants.get(tenant)
        if use is None:
            use = self._tenants[tenant] = TenantUse()
        use.requests.advance(now)
        use.tokens.advance(now)
        day = day_of(epoch_s)
        if day > use.day.number:  # else it is in no later month either
            use.day.advance(day)
            use.month.advance(month_of(epoch_s))
        return use, now

    def _count(self, policy: TenantPolicy, use: TenantUse, ask: Ask, now: float) -> None:
        weighted = self._weights.sum(ask.prompt_tokens, ask.output_tokens)
        use.requests.add(ask.requests, now)
        use.running += 1
        taken = [(use.tokens.add(weighted, now), weighted)]
        held = _HeldAmounts(policy.name, ask.prompt_tokens, ask.output_tokens, taken, use.day.number, use.month.number)
        self._held[ask.call_id] = held
        self._spend(use, held, ask.prompt_tokens + ask.output_tokens)

    def _take(self, use: TenantUse, held: _HeldAmounts, tokens: int, now: float) -> None:
        """More output, counted when it is taken."""
        before = self._weights.sum(held.prompt_tokens, held.output_tokens)
        held.output_tokens += tokens
        more = self._weights.sum(held.prompt_tokens, held.output_tokens) - before
        held.taken.append((use.tokens.add(more, now), more))
        self._spend(use, held, tokens)

    @staticmethod
    def _spend(use: TenantUse, held: _HeldAmounts, tokens: int) -> None:
        """Budgets are the days' and months' in which a call was admitted."""
        if use.day.number == held.day:
            use.day.used += tokens
        if use.month.number == held.month:
            use.month.used += tokens

    def _check(self, limits: TenantLimits, use: TenantUse, ask: Ask, now: float, epoch_s: float) -> LimitRefusal | None:
        weighted = self._weights.sum(ask.prompt_tokens, ask.output_tokens)
        wanted = _Wanted(ask.prompt_tokens + ask.output_tokens, 1, ask.requests, weighted)
        return self._refusal(limits, use, wanted, now, epoch_s)

    @staticmethod
    def _refusal(limits: TenantLimits, use: TenantUse, ask: _Wanted, now: float, epoch_s: float) -> LimitRefusal | None:
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


def _ends_in_s(name: Limit, use: TenantUse, over: int, now: float, epoch_s: float) -> tuple[float, float]:
    """Until a limit has room for what is `over` it, and until all of it is free."""
    if name is Limit.MONTHLY or name is Limit.DAILY:
        ends_in_s = month_ends_in_s(epoch_s) if name is Limit.MONTHLY else day_ends_in_s(epoch_s)
        return ends_in_s, ends_in_s
    if name is Limit.CONCURRENT:
        return CONCURRENT_RETRY_S, CONCURRENT_RETRY_S
    window = use.requests if name is Limit.REQUESTS else use.tokens
    return window.frees_in_s(over, now), window.empties_in_s(now)


def shared(limits: TenantLimits, sharers: int) -> TenantLimits:
    """One gateway's part of `sharers` equal ones. At least 1: rather a little over in all than a tenant shut out."""
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
    def one(limit: int | None, window: SlidingSum) -> LimitUse | None:
        if limit is None:
            return None
        return LimitUse(limit, max(limit - window.total, 0), window.empties_in_s(now))

    return one(limits.requests_per_minute, use.requests), one(limits.tokens_per_minute, use.tokens)
