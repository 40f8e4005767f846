"""The interface to tenants' limits, and the implementation that keeps the limits in this process. The implementation
with shared limits is in valkey_limits.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.policy.limits.limits import Granted, Limiter, LimitRefusal, ReservationRequest
from cluster.policy.tenants.policy import TenantPolicy


class LimitsPort(Protocol):
    """Interface for reservations against tenants' limits. The limits are kept in this process or in a shared store."""

    @property
    def degraded(self) -> bool:
        """Whether the store of shared limits is unreachable. The gauge `limits_degraded` reports this flag."""

    synchronous: bool
    """Whether the methods complete without suspending, so that no other task runs during a method."""

    async def reserve(self, policy: TenantPolicy, ask: ReservationRequest) -> Granted | LimitRefusal:
        """Reserve the tokens and the concurrency slot of a call, or refuse the call."""

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """Count requests, and tokens that are processed outside of any call. Returns None if both were counted. If a
        limit does not allow both, counts nothing and returns the refusal."""

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """Extend a call's reservation to at least `output_tokens`. Returns False if the call must stop."""

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """Settle an ended call: replace the call's reservation with the tokens that the engine counted. Never fails."""

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """Raise each tenant's budget sums to the tokens that the ledger has recorded for this day and this month, if
        the ledger's sums are higher. `epoch_s`: the time of the sums, in seconds since the Unix epoch."""

    def sweep(self) -> None:
        """Forget tenants for which nothing is counted any more. Must be called once a minute."""


class LocalLimits:
    """Limits that are kept in this process alone, for a cluster with one gateway."""

    degraded = False
    synchronous = True

    def __init__(self, limiter: Limiter, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock

    async def reserve(self, policy: TenantPolicy, ask: ReservationRequest) -> Granted | LimitRefusal:
        """Implements `LimitsPort.reserve`."""
        return self._limiter.reserve(policy, ask, self._clock(), time.time())

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """Implements `LimitsPort.charge`."""
        return self._limiter.charge(policy, requests, tokens, self._clock(), time.time())

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """Implements `LimitsPort.top_up`."""
        return self._limiter.top_up(policy, call_id, output_tokens, self._clock(), time.time())

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """Implements `LimitsPort.settle`."""
        self._limiter.settle(call_id, prompt_tokens, output_tokens, self._clock(), time.time())

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """Implements `LimitsPort.spent`. A restarted gateway continues from the sums in the ledger."""
        self._limiter.spent(today, month, epoch_s)

    def sweep(self) -> None:
        """Implements `LimitsPort.sweep`."""
        self._limiter.sweep(self._clock())

    def __repr__(self) -> str:
        return f"LocalLimits({self._limiter})"
