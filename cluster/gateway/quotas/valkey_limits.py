"""Limits that several gateways share in Valkey or Redis, with a local fallback while the store is unreachable.

Problem: a tenant's limits hold for the whole cluster, yet a failed store must not fail requests. So a script in the
store makes each reservation, and a mirror of the store in this process makes the same reservation. While the store is
unreachable, each gateway uses its mirror to enforce its share of each limit.

Invariants: a call is settled once in the store and once in the mirror. Tokens that were counted while the store was
unreachable are added to the store afterwards. The running calls of a dead gateway count for at most ALIVE_S. Each
operation raises a tenant's daily and monthly sums in the store to at least the ledger's sums, so a store that lost its
data, or that is new, does not give a tenant its budgets again.

Not guaranteed: tokens that the ledger did not contain when the store lost its data may be missing in the store's sums
until the ledger contains them. If one gateway had used up a limit alone and the store is then lost, the other gateways
may exceed this limit in the first minute. The excess is at most the shares of the other gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from cluster.api.outcomes import Outcome
from cluster.gateway.batcher import Batcher
from cluster.gateway.quotas.valkey_script import SCRIPT, SCRIPT_SHA
from cluster.policy.limits.limits import (
    QUANTUM_TOKENS,
    Granted,
    Limit,
    Limiter,
    LimitRefusal,
    LimitUse,
    ReservationRequest,
    TokenWeights,
)
from cluster.policy.limits.windows import day_ends_in_s, day_of, month_ends_in_s, month_of
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy

log = structlog.get_logger("limits")

PREFIX = "headrace:limits:"
GATEWAYS = PREFIX + "gateways"
BEAT_S = 2.0
ALIVE_S = 10.0
TIMEOUT_S = 0.25
UNREACHABLE = (RedisError, OSError, TimeoutError)
_ORDER = (Limit.MONTHLY, Limit.DAILY, Limit.CONCURRENT, Limit.REQUESTS, Limit.TOKENS)


class ValkeyStore:
    """Client of one store in Valkey or Redis, which also records whether the store is reachable. `start` must be called
    first and `close` last."""

    def __init__(
        self,
        url: str,
        gateway: str,
        on_return: Callable[[], Awaitable[None]],
        *,
        timeout_s: float = TIMEOUT_S,
        beat_s: float = BEAT_S,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Create the client of the store at `url`. `gateway`: instance id of this process. `on_return`: called when the
        store is reachable again, to add to the store what was counted in the meantime; may raise UNREACHABLE.
        `timeout_s`: time limit for connecting and for each answer. `beat_s`: seconds between two heartbeats. `clock`: a
        clock for tests; None for the store's own clock."""
        self._redis: Redis = Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._gateway = gateway
        self._on_return = on_return
        self._beat_s = beat_s
        self._clock = clock
        self._command: Batcher[Sequence[Any], Any] = Batcher(self._commands)
        self._heartbeat: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._resynchronized: set[str] = set()
        self._ledger_day = self._ledger_month = -1
        self._ledger_today: Mapping[str, int] = {}
        self._ledger_this_month: Mapping[str, int] = {}
        self.gateways_alive = 1
        self.degraded = False
        """Whether the store is unreachable."""

    async def start(self) -> None:
        """Register this gateway in the store and start the heartbeat. If the store is unreachable, the method returns
        after one timeout."""
        await self._beat()
        self._heartbeat = asyncio.create_task(self._beat_periodically(), name="limits heartbeat")

    async def close(self) -> None:
        """Stop the heartbeat and remove this gateway from the store's set of gateways."""
        self._closing.set()  # not cancelled: the client may swallow a cancellation that coincides with its timeout
        if self._heartbeat is not None:
            await self._heartbeat
        with contextlib.suppress(*UNREACHABLE):
            await self._redis.zrem(GATEWAYS, self._gateway)
        await self._redis.aclose()

    async def ask(self, tenant: str, operation: str, *arguments: float) -> Sequence[float] | None:
        """Run an operation of the script for a tenant and return the numbers in the reply. Returns None if the store is
        unreachable. If the store is already known to be unreachable, returns None without a request, except for the
        tenants that are in the store again."""
        if self.degraded and tenant not in self._resynchronized:
            return None
        try:
            return await self.run(tenant, operation, *arguments)
        except UNREACHABLE as error:
            self._resynchronized.discard(tenant)
            self._mark_degraded(error)
            return None

    async def mend(self, tenant: str, *arguments: float) -> None:
        """Add to the store what was counted for a tenant while the store was unreachable. From this call on, the
        tenant's operations run in the store. Raises one of the exceptions in UNREACHABLE."""
        self._resynchronized.add(tenant)
        try:
            await self.run(tenant, "mend", *arguments)
        except UNREACHABLE:
            self._resynchronized.discard(tenant)
            raise

    def set_ledger_sums(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """Set the least daily and monthly sums in the store to the ledger's sums by tenant. `epoch_s`: the time of the
        sums."""
        self._ledger_day, self._ledger_month = day_of(epoch_s), month_of(epoch_s)
        self._ledger_today, self._ledger_this_month = today, month

    def _least_use(self, tenant: str) -> tuple[int, int, int, int]:
        """Return the number and the use of the day and of the month, as the ledger knows them."""
        today, month = self._ledger_today.get(tenant, 0), self._ledger_this_month.get(tenant, 0)
        return self._ledger_day, today, self._ledger_month, month

    async def run(self, tenant: str, operation: str, *arguments: float) -> Sequence[float]:
        """Run one operation of the Lua script for a tenant, and return the numbers in the reply. Raises one of the
        exceptions in UNREACHABLE if the store does not answer."""
        epoch_s = time.time()
        now = -1.0 if self._clock is None else self._clock()
        head = (operation, now, self._gateway, day_of(epoch_s), month_of(epoch_s), *self._least_use(tenant))
        keys = (f"{PREFIX}tenant:{tenant}", GATEWAYS)
        call = ("EVALSHA", SCRIPT_SHA, len(keys), *keys, *head, *arguments)
        try:
            reply = await self._command(call)
        except NoScriptError:  # a new or restarted store has no script cached
            await self._command(("SCRIPT LOAD", SCRIPT))
            reply = await self._command(call)
        return [float(x) for x in reply]

    async def first(self, name: str, expires_s: float) -> bool | None:
        """Claim a name for `expires_s` seconds. Returns True if this is the first claim on the name, False if it is
        not, None while the store is unreachable."""
        if self.degraded:
            return None
        try:
            expires_ms = max(int(expires_s * 1000), 1)
            command = ("SET", f"{PREFIX}first:{name}", self._gateway, "NX", "PX", expires_ms)
            return bool(await self._command(command))
        except UNREACHABLE as error:
            self._mark_degraded(error)
            return None

    async def _commands(self, commands: Sequence[Sequence[Any]]) -> Sequence[Any]:
        """Send commands in one pipeline. Each command is atomic by itself, and an error reply affects only its own
        command."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            return await pipeline.execute(raise_on_error=False)

    def _mark_degraded(self, error: Exception) -> None:
        if not self.degraded:
            self.degraded = True
            log.warning("limits.store_lost", error=str(error), share=self.gateways_alive)

    async def _beat_periodically(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._beat_s):
                    await self._closing.wait()
            await self._beat()

    async def _beat(self) -> None:
        try:
            now = self._clock() if self._clock is not None else await self._time()
            await self._redis.zadd(GATEWAYS, {self._gateway: now})
            await self._redis.zremrangebyscore(GATEWAYS, "-inf", now - ALIVE_S)
            self.gateways_alive = max(int(await self._redis.zcard(GATEWAYS)), 1)
            if self.degraded:
                await self._command(("SCRIPT LOAD", SCRIPT))  # a restarted store has no script cached
                await self._on_return()
                self.degraded = False
                self._resynchronized.clear()
                log.info("limits.store_recovered", gateways=self.gateways_alive)
        except UNREACHABLE as error:
            self._resynchronized.clear()
            self._mark_degraded(error)

    async def _time(self) -> float:
        seconds, micros = await self._redis.time()
        return seconds + micros / 1e6


@dataclass(slots=True)
class _HeldReservation:
    """The reservation of one call. `taken`: pairs (second, weighted tokens) that the store has counted for the call.
    `day`, `month`: numbers of the day and month in which the reservation counts. `in_store`: whether the store has the
    reservation; False while it was made only in this process, because the store was unreachable. `lock` is held while a
    top-up or the settlement is on its way to the store."""

    tenant: str
    prompt_tokens: int
    output_tokens: int
    taken: list[tuple[int, int]] = field(default_factory=list)
    day: int = -1
    month: int = -1
    in_store: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Owed:
    """Use of a tenant that this process has counted and the store has not: tokens of the budgets, and reservations that
    were made here."""

    tokens: int = 0
    reservations: list[_HeldReservation] = field(default_factory=list)


class ValkeyLimits:
    """Reservations in a store that gateways share, and their mirror in this process. `store.start` must be called first
    and `store.close` last. The methods also work while the store is unreachable."""

    synchronous = False

    def __init__(
        self,
        url: str,
        gateway: str,
        *,
        weights: TokenWeights | None = None,
        quantum_tokens: int = QUANTUM_TOKENS,
        timeout_s: float = TIMEOUT_S,
        beat_s: float = BEAT_S,
        store_clock: Callable[[], float] | None = None,
    ) -> None:
        """`gateway`: instance id of this process. `store_clock`: a clock for tests, in place of the store's own
        clock."""
        self.store = ValkeyStore(
            url, gateway, self._resynchronize, timeout_s=timeout_s, beat_s=beat_s, clock=store_clock
        )
        self._weights = weights or TokenWeights()
        self._quantum_tokens = quantum_tokens
        self._mirror = Limiter(weights=self._weights, quantum_tokens=quantum_tokens)
        self._held: dict[str, _HeldReservation] = {}
        self._owed: dict[str, _Owed] = {}  # by tenant

    # ---- LimitsPort

    @property
    def degraded(self) -> bool:
        """Implements `LimitsPort.degraded`."""
        return self.store.degraded

    async def reserve(self, policy: TenantPolicy, ask: ReservationRequest) -> Granted | LimitRefusal:
        """Implements `LimitsPort.reserve`. Raises ValueError for a call id that already has a reservation."""
        now, epoch_s = time.monotonic(), time.time()
        if self._mirror.has_reservation(ask.call_id):
            raise ValueError(f"call {ask.call_id!r} already has a reservation")
        weighted = self._weights.sum(ask.prompt_tokens, ask.output_tokens)
        plain = ask.prompt_tokens + ask.output_tokens
        reply = await self.store.ask(policy.name, "reserve", weighted, plain, *_in_order(policy.limits), ask.requests)
        if reply is None:
            return self._reserve_locally(policy, ask, now, epoch_s)
        if not reply[0]:
            return _refusal(policy.limits, reply[1:], plain, weighted, epoch_s)
        second, day, month = (int(x) for x in reply[1:4])
        held = _HeldReservation(
            policy.name, ask.prompt_tokens, ask.output_tokens, [(second, weighted)], day, month, in_store=True
        )
        self._held[ask.call_id] = held
        self._mirror.record_admission(policy, ask, now, epoch_s)
        return Granted(*_uses(policy.limits, reply[4:8]))

    async def charge(self, policy: TenantPolicy, requests: int, tokens: int) -> LimitRefusal | None:
        """Implements `LimitsPort.charge`."""
        now, epoch_s = time.monotonic(), time.time()
        weighted = self._weights.sum(tokens, 0)
        reply = await self.store.ask(policy.name, "charge", weighted, tokens, *_in_order(policy.limits), requests)
        if reply is None:
            refusal = self._mirror.charge(policy, requests, tokens, now, epoch_s, sharers=self.store.gateways_alive)
            if refusal is None and tokens:
                self._owe(policy.name, tokens)
            return refusal
        if not reply[0]:
            return _refusal(policy.limits, reply[1:], tokens, weighted, epoch_s)
        self._mirror.record_charge(policy, requests, tokens, now, epoch_s)
        return None

    async def top_up(self, policy: TenantPolicy, call_id: str, output_tokens: int) -> bool:
        """Implements `LimitsPort.top_up`. The store is called only if the reservation is used up."""
        held = self._held.get(call_id)
        if held is None or output_tokens < held.output_tokens:
            return True
        async with held.lock:
            if call_id not in self._held or output_tokens < held.output_tokens:
                return True  # settled or topped up while this top-up waited
            return await self._top_up(policy, call_id, held, output_tokens)

    async def _top_up(self, policy: TenantPolicy, call_id: str, held: _HeldReservation, output_tokens: int) -> bool:
        now, epoch_s = time.monotonic(), time.time()
        needed = output_tokens - held.output_tokens
        by_mirror = self._mirror.top_up(policy, call_id, output_tokens, now, epoch_s, sharers=self.store.gateways_alive)
        reply = None
        if held.in_store:
            budgets = [-1 if b is None else b for b in (policy.limits.daily_tokens, policy.limits.monthly_tokens)]
            stop = int(policy.on_budget == "stop")
            extra = (self._quantum_tokens, self._weights.output, stop, *budgets, held.day, held.month)
            reply = await self.store.ask(policy.name, "take", needed, *extra)
        if reply is None:
            tokens = needed + self._quantum_tokens
            held.output_tokens += tokens
            self._owe(held.tenant, tokens)
            return by_mirror
        go, tokens, second, weighted = (int(x) for x in reply)
        held.output_tokens += tokens
        held.taken.append((second, weighted))
        return bool(go)

    async def settle(self, call_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """Implements `LimitsPort.settle`. Idempotent. Unknown call ids are ignored."""
        held = self._held.pop(call_id, None)
        if held is None:
            return
        async with held.lock:  # the tokens of a top-up that is on its way are returned too
            await self._settle(call_id, held, prompt_tokens, output_tokens)

    async def _settle(self, call_id: str, held: _HeldReservation, prompt_tokens: int, output_tokens: int) -> None:
        self._mirror.settle(call_id, prompt_tokens, output_tokens, time.monotonic(), time.time())
        plain = prompt_tokens + output_tokens - held.prompt_tokens - held.output_tokens
        corrections: list[int] = []
        change = self._weights.sum(prompt_tokens, output_tokens) - sum(amount for _, amount in held.taken)
        if change > 0 and held.in_store:
            corrections += (-1, change)
        for second, amount in reversed(held.taken):
            back = min(amount, max(-change, 0))
            if back:
                corrections += (second, -back)
                change += back
        if await self.store.ask(held.tenant, "settle", plain, held.day, held.month, *corrections) is None:
            self._owe(held.tenant, plain)

    def spent(self, today: Mapping[str, int], month: Mapping[str, int], epoch_s: float) -> None:
        """Implements `LimitsPort.spent`. The mirror's sums are raised at once, and a tenant's sums in the store by the
        tenant's next operation."""
        self._mirror.spent(today, month, epoch_s)
        self.store.set_ledger_sums(today, month, epoch_s)

    def sweep(self) -> None:
        """Implements `LimitsPort.sweep`."""
        self._mirror.sweep(time.monotonic())

    def __repr__(self) -> str:
        state = "degraded" if self.degraded else "shared"
        return f"ValkeyLimits({state}, {self.store.gateways_alive} gateways, {len(self._held)} reservations)"

    # ---- without the store

    def _reserve_locally(
        self, policy: TenantPolicy, ask: ReservationRequest, now: float, epoch_s: float
    ) -> Granted | LimitRefusal:
        result = self._mirror.reserve(policy, ask, now, epoch_s, sharers=self.store.gateways_alive)
        if isinstance(result, Granted):
            held = _HeldReservation(policy.name, ask.prompt_tokens, ask.output_tokens)
            self._held[ask.call_id] = held
            self._owe(policy.name, ask.prompt_tokens + ask.output_tokens, held)
        return result

    def _owe(self, tenant: str, tokens: int, *reservations: _HeldReservation) -> None:
        owed = self._owed.setdefault(tenant, _Owed())
        owed.tokens += tokens
        owed.reservations += reservations

    async def _resynchronize(self) -> None:
        """Add to the store the tokens and running calls that only this process has counted so far. Returns when nothing
        is left, including what is counted meanwhile. Raises one of the exceptions in UNREACHABLE if the store does not
        answer."""
        tenants = {held.tenant for held in self._held.values()}
        while tenants := tenants | set(self._owed):
            results = await asyncio.gather(*map(self._mend, tenants), return_exceptions=True)
            for error in results:
                if error is not None:
                    raise error
            tenants = set()

    async def _mend(self, tenant: str) -> None:
        """Resynchronize one tenant. Nothing of the tenant is counted locally between the read of the amounts and the
        request, because no other task runs in between."""
        owed = self._owed.pop(tenant, None) or _Owed()
        for held in owed.reservations:
            held.in_store, held.day, held.month = True, day_of(time.time()), month_of(time.time())
        use = self._mirror.use(tenant)
        sums = (use.day.number, use.day.used, use.month.number, use.month.used)
        try:
            await self.store.mend(tenant, owed.tokens, use.running, *sums)
        except UNREACHABLE:
            self._owe(tenant, owed.tokens)
            raise


def _in_order(limits: TenantLimits) -> list[int]:
    """Return a tenant's limits in the order in which the Lua script expects them; -1 means no limit."""
    values = [cast("int | None", getattr(limits, limit.value)) for limit in _ORDER]
    return [-1 if value is None else value for value in values]


def _uses(limits: TenantLimits, sums: Sequence[float]) -> tuple[LimitUse | None, LimitUse | None]:
    """Return how far two limits are used: requests per minute and tokens per minute. `sums`: the used requests and the
    seconds until they are reset, then the used tokens and the seconds until they are reset."""

    def use(limit: int | None, used: float, reset_s: float) -> LimitUse | None:
        return None if limit is None else LimitUse(limit, max(limit - int(used), 0), reset_s)

    return use(limits.requests_per_minute, *sums[:2]), use(limits.tokens_per_minute, *sums[2:4])


def _refusal(limits: TenantLimits, reply: Sequence[float], plain: int, weighted: int, epoch_s: float) -> LimitRefusal:
    """Return the refusal that the Lua script's reply describes.

    `reply`: the index of the limit in `_ORDER`, from 1; how much of the limit is used; seconds until a retry;
    seconds until the reset; then the four values that `_uses` takes. `plain`: the call's number of tokens.
    `weighted`: the number of tokens with the weights of prompt and output tokens applied.
    """
    name = _ORDER[int(reply[0]) - 1]
    limit = cast(int, getattr(limits, name.value))
    used, retry_s, reset_s = int(reply[1]), reply[2], reply[3]
    if name in (Limit.DAILY, Limit.MONTHLY):
        retry_s = reset_s = day_ends_in_s(epoch_s) if name is Limit.DAILY else month_ends_in_s(epoch_s)
    elif name is Limit.CONCURRENT:
        retry_s = reset_s = 1.0
    wanted = {Limit.TOKENS: weighted, Limit.DAILY: plain, Limit.MONTHLY: plain}.get(name, 1)
    return LimitRefusal(
        Outcome.BUDGET_EXHAUSTED if name in (Limit.DAILY, Limit.MONTHLY) else Outcome.RATE_LIMITED,
        name,
        None if wanted > limit else retry_s,
        limit,
        max(limit - used, 0),
        reset_s,
        *_uses(limits, reply[4:8]),
    )
