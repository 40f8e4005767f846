"""The interface to limits, and the implementation that keeps them in this process. valkey_limits.py shares them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.policy.limits.limits import Granted, Limiter, LimitRefusal, ReservationRequest
from cluster.policy.tenants.policy import TenantPolicy


class LimitsPort(Protocol):
    """Reservations against tenants' limits, independent of where the limits are kept."""

    degraded: bool
    """Whether the store of shared limits is unreachable: the gauge `limits_degraded`."""
    synchronous: bool
    """Whether methods complete without suspending, so that no other task runs in between."""

    async def reserve(self, policy: TenantPolicy, ask: ReservationRequest) -> Granted | LimitRefusal:
        """Reserve the tokens and the place of a call, or refuse it."""

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """Count requests, or tokens computed outside of any call, or refuse them. Returns None when counted."""

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """Extend a reservation to at least this many output tokens. False: the call must stop."""

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """Replace a call's reservation, at its end, with the tokens that the engine counted. Never fails."""

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """Raise budget sums to at least what the ledger has recorded for this day and month, by tenant.

        Not needed by a store that outlives the gateway."""

    def sweep(self) -> None:
        """Forget tenants whose sums are all zero. Call once a minute."""


class LocalLimits:
    """Limits of this process alone, for a cluster with one gateway."""

    degraded = False
    synchronous = True

    def __init__(self, limiter: Limiter, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock

    async def reserve(self, policy: TenantPolicy, ask: ReservationRequest) -> Granted | LimitRefusal:
        """See LimitsPort."""
        return self._limiter.reserve(policy, ask, self._clock(), time.time())

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """See LimitsPort."""
        return self._limiter.charge(policy, requests, tokens, self._clock(), time.time())

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """See LimitsPort."""
        return self._limiter.top_up(policy, call_id, output_tokens, self._clock(), time.time())

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """See LimitsPort."""
        self._limiter.settle(call_id, prompt_tokens, output_tokens, self._clock(), time.time())

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """See LimitsPort. A restarted gateway continues from the ledger's sums."""
        self._limiter.spent(today, month, epoch_s)

    def sweep(self) -> None:
        """See LimitsPort."""
        self._limiter.sweep(self._clock())

    def __repr__(self) -> str:
        return f"LocalLimits({self._limiter})"
