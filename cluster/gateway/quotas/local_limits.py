"""Limits as the gateway asks for them, and the plainest answer: kept in this process. Shared ones: valkey_limits.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.policy.limits.limits import Ask, Granted, Limiter, LimitRefusal
from cluster.policy.tenants.policy import TenantPolicy


class LimitsPort(Protocol):
    """What the gateway asks, whatever keeps the limits."""

    degraded: bool
    """Shared limits whose store is away: the gauge `limits_degraded`."""
    at_once: bool
    """Whether it answers without waiting for anything, so that nothing can come in between."""

    async def reserve(self, policy: TenantPolicy, ask: Ask) -> Granted | LimitRefusal:
        """Admit or refuse."""

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """Count a try, or tokens that no call has; or refuse."""

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """So many output tokens there are; False: the call must stop."""

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """It ended, and so much the engine counted. Never fails."""

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """What the ledger has of this day and month, by tenant: no budget stands lower. A store that outlives the
        gateway knows by itself."""

    def sweep(self) -> None:
        """Once a minute: forget tenants with nothing in any sum."""


class LocalLimits:
    """One gateway alone: the limits are this process's."""

    degraded = False
    at_once = True

    def __init__(self, limiter: Limiter, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = limiter
        self._clock = clock

    async def reserve(self, policy: TenantPolicy, ask: Ask) -> Granted | LimitRefusal:
        """As the port says."""
        return self._limiter.reserve(policy, ask, self._clock(), time.time())

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """As the port says."""
        return self._limiter.charge(policy, requests, tokens, self._clock(), time.time())

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """As the port says."""
        return self._limiter.top_up(policy, call_id, output_tokens, self._clock(), time.time())

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """As the port says."""
        self._limiter.settle(call_id, prompt_tokens, output_tokens, self._clock(), time.time())

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """As the port says: a gateway that starts anew goes on where the last one was."""
        self._limiter.spent(today, month, epoch_s)

    def sweep(self) -> None:
        """As the port says."""
        self._limiter.sweep(self._clock())

    def __repr__(self) -> str:
        return f"LocalLimits({self._limiter})"
