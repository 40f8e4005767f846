"""Shared limits with a real store: the same contract as local limits, races between gateways, and loss of the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from cluster.api.outcomes import Outcome
from cluster.gateway.quotas.local_limits import LimitsPort, LocalLimits
from cluster.gateway.quotas.valkey_limits import PREFIX, TIMEOUT_S, ValkeyLimits
from cluster.policy.limits.limits import Granted, Limit, Limiter, LimitRefusal, ReservationRequest
from cluster.policy.tenants.policy import TenantPolicy
from tests.support.keyed import eventually
from tests.support.valkey import Server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """Provide a running store."""
    one = Server(tmp_path)
    await one.start()
    yield one
    await one.stop()


class Gateways:
    """The limits of several gateways, which are closed at the end of a test."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.all: list[ValkeyLimits] = []
        self.now = 1_790_000_000.0

    async def add(
        self, name: str, *, virtual: bool = True, quantum_tokens: int = 16, timeout_s: float = TIMEOUT_S
    ) -> ValkeyLimits:
        """Add a gateway: start and return its limits, which send a heartbeat every 0.05 s."""
        clock = (lambda: self.now) if virtual else None
        one = ValkeyLimits(
            self._server.url, name, quantum_tokens=quantum_tokens, beat_s=0.05, store_clock=clock, timeout_s=timeout_s
        )
        await one.store.start()
        self.all.append(one)
        return one


@pytest.fixture
async def gateways(server: Server) -> AsyncIterator[Gateways]:
    """Provide an empty set of gateways."""
    them = Gateways(server)
    yield them
    for one in them.all:
        await one.store.close()


def tenant(on_budget: str = "finish", **limits: int) -> TenantPolicy:
    """Return the policy of a tenant with these limits."""
    return TenantPolicy.from_json({"name": "acme", "limits": limits, "on_budget": on_budget})


async def contract(limits: LimitsPort, pass_minute: Callable[[], None]) -> None:
    """Check the behaviour that local and shared limits have in common. `pass_minute` lets a minute pass."""
    policy = tenant("stop", requests_per_minute=4, tokens_per_minute=200, concurrent_requests=2, daily_tokens=150)
    got = await limits.reserve(policy, ReservationRequest("a", 10, 20))
    assert isinstance(got, Granted)
    assert got.requests is not None
    assert got.tokens is not None
    assert (got.requests.limit, got.requests.remaining, got.tokens.remaining) == (4, 3, 170)
    assert isinstance(await limits.reserve(policy, ReservationRequest("b", 10, 20)), Granted)
    third = await limits.reserve(policy, ReservationRequest("c", 1, 1))
    assert isinstance(third, LimitRefusal)
    assert (third.limit_name, third.outcome, third.remaining) == (Limit.CONCURRENT, Outcome.RATE_LIMITED, 0)
    with pytest.raises(ValueError, match="already"):
        await limits.reserve(policy, ReservationRequest("a", 1, 1))
    await limits.settle("b", 0, 0)
    await limits.settle("b", 0, 0)
    tokens = 0
    while await limits.top_up(policy, "a", tokens):
        tokens += 1
    assert 140 <= tokens <= 140 + 16
    await limits.settle("a", 10, tokens)
    over = await limits.reserve(policy, ReservationRequest("d", 1, 1))
    assert isinstance(over, LimitRefusal)
    assert (over.limit_name, over.outcome) == (Limit.DAILY, Outcome.BUDGET_EXHAUSTED)
    free = tenant(requests_per_minute=3)
    assert isinstance(await limits.reserve(free, ReservationRequest("e", 1, 1)), Granted)
    minute = await limits.reserve(free, ReservationRequest("f", 1, 1))
    assert isinstance(minute, LimitRefusal)
    assert minute.limit_name is Limit.REQUESTS
    assert minute.retry_after_s == pytest.approx(61.0, abs=1.0)
    large = await limits.reserve(tenant(tokens_per_minute=5), ReservationRequest("g", 10, 10))
    assert isinstance(large, LimitRefusal)
    assert large.retry_after_s is None
    pass_minute()
    assert isinstance(await limits.reserve(free, ReservationRequest("h", 1, 1)), Granted)
    tries = tenant(requests_per_minute=3)
    assert [await limits.charge(tries, 1, 0) for _ in range(2)] == [None, None]
    refusal = await limits.charge(tries, 1, 0)
    assert refusal is not None
    assert (refusal.limit_name, refusal.outcome) == (Limit.REQUESTS, Outcome.RATE_LIMITED)
    assert isinstance(await limits.reserve(tries, ReservationRequest("i", 1, 1, requests=0)), Granted)
    budget = tenant(tokens_per_minute=100, concurrent_requests=1, requests_per_minute=1)
    assert await limits.charge(budget, 0, 90) is None
    over_tokens = await limits.charge(budget, 0, 11)
    assert over_tokens is not None
    assert over_tokens.limit_name is Limit.TOKENS


async def test_contract_in_process() -> None:
    """Limits in this process behave like shared limits: they reserve, top up, settle and refuse in the same way."""
    now = [1000.0]

    def pass_minute() -> None:
        now[0] += 61.0

    await contract(LocalLimits(Limiter(quantum_tokens=16), lambda: now[0]), pass_minute)


async def test_contract_in_the_store(gateways: Gateways) -> None:
    """Limits in the store that gateways share fulfil the contract of LimitsPort: they reserve, top up, settle and
    refuse."""

    def pass_minute() -> None:
        gateways.now += 61.0

    await contract(await gateways.add("g1"), pass_minute)


async def test_two_gateways_admit_one_limit_between_them(gateways: Gateways) -> None:
    """Two gateways together admit as many of a hundred concurrent calls as the tenant's limit allows. Times come from
    the store's own clock."""
    one = await gateways.add(
        "g1", virtual=False, timeout_s=10.0
    )  # a busy machine must not count as an unreachable store
    two = await gateways.add("g2", virtual=False, timeout_s=10.0)
    policy = tenant(requests_per_minute=30)
    asked = [(one, two)[i % 2].reserve(policy, ReservationRequest(str(i), 1, 1)) for i in range(100)]
    got = await asyncio.gather(*asked)
    assert sum(isinstance(x, Granted) for x in got) == 30
    assert not one.degraded


async def test_a_dead_gateways_calls_do_not_run_for_ever(gateways: Gateways, server: Server) -> None:
    """The concurrency slots of a gateway without heartbeats are released after ten seconds."""
    one = await gateways.add("g1")
    policy = tenant(concurrent_requests=1)
    async with Redis.from_url(server.url) as client:
        await client.zadd(PREFIX + "gateways", {"dead": gateways.now})
        await client.hset(f"{PREFIX}tenant:acme", "c:dead", "1")
        assert isinstance(await one.reserve(policy, ReservationRequest("a", 1, 1)), LimitRefusal)
        gateways.now += 11.0
        assert isinstance(await one.reserve(policy, ReservationRequest("b", 1, 1)), Granted)
        await eventually(lambda: _one_alive(client), "one gateway is alive")


async def _one_alive(client: Redis) -> bool:
    return int(await client.zcard(PREFIX + "gateways")) == 1


async def test_store_clock_stepping_back_frees_nothing(gateways: Gateways) -> None:
    """Admitted calls count for a whole minute, even if the store's clock goes back an hour meanwhile."""
    one = await gateways.add("g1")
    policy = tenant(requests_per_minute=1)
    assert isinstance(await one.reserve(policy, ReservationRequest("a", 1, 1)), Granted)
    for step in (-30.0, -3600.0, 50.0):
        gateways.now += step
        assert isinstance(await one.reserve(policy, ReservationRequest(f"x{step}", 1, 1)), LimitRefusal)
    gateways.now += 15.0
    assert isinstance(await one.reserve(policy, ReservationRequest("b", 1, 1)), Granted)


@pytest.mark.parametrize("how", ["killed", pytest.param("frozen", marks=pytest.mark.slow)])
@pytest.mark.thorough
async def test_without_its_store_each_keeps_to_its_share(gateways: Gateways, server: Server, how: str) -> None:
    """While the store is killed or silent, no request fails. Each of two gateways then admits half of the limit, and
    `degraded` is set until the store is back."""
    one = await gateways.add(
        "g1", virtual=False, timeout_s=10.0
    )  # a busy machine must not count as an unreachable store
    two = await gateways.add("g2", virtual=False, timeout_s=10.0)

    async def both_seen() -> bool:
        return one.store.gateways_alive == two.store.gateways_alive == 2

    await eventually(both_seen, "both are seen")
    if how == "killed":
        await server.stop()
    else:
        server.freeze(True)
    policy = tenant(requests_per_minute=10, daily_tokens=1000)

    async def asked(gateway: ValkeyLimits) -> int:
        got = [await gateway.reserve(policy, ReservationRequest(f"{i}", 1, 1)) for i in range(8)]
        assert gateway.degraded
        return sum(isinstance(x, Granted) for x in got)

    assert list(await asyncio.gather(asked(one), asked(two))) == [5, 5]
    await one.settle("0", 1, 101)
    if how == "killed":
        await server.start()
    else:
        server.freeze(False)

    async def back() -> bool:
        return not one.degraded and not two.degraded

    await eventually(back, "the store is back")
    async with Redis.from_url(server.url) as client:
        fields = await client.hgetall(f"{PREFIX}tenant:acme")
        assert float(fields[b"du"]) == 102 + 9 * 2
        assert (float(fields[b"c:g1"]), float(fields[b"c:g2"])) == (4, 5)
    for gateway, first in ((one, 1), (two, 0)):
        for i in range(first, 5):
            await gateway.settle(str(i), 1, 0)
    async with Redis.from_url(server.url) as client:
        fields = await client.hgetall(f"{PREFIX}tenant:acme")
        assert float(fields[b"du"]) == 102 + 9
        assert (float(fields[b"c:g1"]), float(fields[b"c:g2"])) == (0, 0)


async def sums(server: Server) -> tuple[float, float, float]:
    """Return the tenant's use of the day, of the month and of the minute in the store."""
    async with Redis.from_url(server.url) as client:
        fields = await client.hgetall(f"{PREFIX}tenant:acme")
    minute = sum(float(value) for name, value in fields.items() if name[:1] == b"t")
    return float(fields[b"du"]), float(fields[b"mu"]), minute


async def use(limits: ValkeyLimits, policy: TenantPolicy, call_id: str, tokens: int) -> bool:
    """Run a call with this number of tokens. Returns whether the call was admitted."""
    admitted = isinstance(await limits.reserve(policy, ReservationRequest(call_id, tokens, 0)), Granted)
    await limits.settle(call_id, tokens, 0)
    return admitted


async def test_a_store_that_lost_its_data_keeps_the_budgets(gateways: Gateways, server: Server) -> None:
    """A tenant's next call raises the sums of an empty store to those of the ledger. Sums of another day or month do
    not count, and lower sums change nothing."""
    one, two = await gateways.add("g1", timeout_s=10.0), await gateways.add("g2", timeout_s=10.0)
    policy, now = tenant(daily_tokens=900, monthly_tokens=1000), time.time()
    assert await use(one, policy, "a", 600)
    async with Redis.from_url(server.url) as client:
        await client.flushall()
    for limits in (one, two):
        limits.spent({"acme": 600}, {"acme": 800}, now)
    assert not await use(two, policy, "b", 201)
    assert await use(two, policy, "c", 150)
    assert (await sums(server))[:2] == (750, 950)
    one.spent({"acme": 10}, {"acme": 20}, now)
    two.spent({"acme": 900}, {"acme": 1000}, now - 62 * 86400)
    assert await use(one, policy, "d", 20)
    assert await use(two, policy, "e", 20)
    assert (await sums(server))[:2] == (790, 990)


async def test_a_mirror_restores_an_empty_store(gateways: Gateways, server: Server) -> None:
    """When a store comes back empty, the tenants with calls in progress or with calls meanwhile have at least the sums
    that their gateway knows, even if the ledger has none yet."""
    one = await gateways.add("g1", timeout_s=10.0)
    policy = tenant(monthly_tokens=1000)
    assert await use(one, policy, "a", 600)
    await server.stop()
    assert await use(one, policy, "b", 50)
    assert one.degraded
    await server.start()
    await eventually(lambda: _recovered(one), "the store is back")
    assert (await sums(server))[:2] == (650, 650)


async def _recovered(limits: ValkeyLimits) -> bool:
    return not limits.degraded


async def test_calls_during_the_return_of_the_store_count_once(
    gateways: Gateways, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls that begin and end before, during and after the resynchronization of their tenant are in the store's sums
    once, whichever of their parts the store has counted."""
    one = await gateways.add("g1", timeout_s=10.0)
    policies = [
        replace(tenant(monthly_tokens=10**9, concurrent_requests=100), name=name) for name in ("acme", "b", "c")
    ]
    await server.stop()
    for number, policy in enumerate(policies):
        assert isinstance(await one.reserve(policy, ReservationRequest(f"early{number}", 50, 50)), Granted)
    assert one.degraded
    mend, late = one.store.mend, list[str]()

    async def mend_among_calls(name: str, *arguments: float) -> None:
        for mended in (False, True):
            if len(late) < 12:
                late.append(f"late{len(late)}")
                call, ends_at_once = late[-1], len(late) % 2
                assert isinstance(await one.reserve(policies[0], ReservationRequest(call, 500, 500)), Granted)
                await one.top_up(policies[0], call, 510)
                if ends_at_once:
                    await one.settle(call, 500, 100)
            if not mended:
                await mend(name, *arguments)

    monkeypatch.setattr(one.store, "mend", mend_among_calls)
    await server.start()
    await eventually(lambda: _recovered(one), "the store is back")
    assert len(late) >= 6
    for call in late:
        await one.settle(call, 500, 100)
    await one.settle("early0", 50, 0)
    assert (await sums(server))[:2] == (600 * len(late) + 50,) * 2
    async with Redis.from_url(server.url) as client:
        assert float((await client.hgetall(f"{PREFIX}tenant:acme"))[b"c:g1"]) == 0


@given(calls=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_a_call_that_ends_during_its_top_up_pays_its_tokens(
    gateways: Gateways, server: Server, calls: list[tuple[int, int, int]]
) -> None:
    """After all calls have ended, the store's sums are the calls' tokens, however many top-ups were on their way when
    the calls ended."""
    async with Redis.from_url(server.url) as client:
        await client.flushall()
    one = await gateways.add("g1", timeout_s=10.0) if not gateways.all else gateways.all[0]
    policy = tenant(monthly_tokens=10**9, tokens_per_minute=10**9)
    for number in range(len(calls)):
        assert isinstance(await one.reserve(policy, ReservationRequest(f"{number}", 10, 10)), Granted)
    ends: list[Awaitable[object]] = []
    for number, (seen, output, top_ups) in enumerate(calls):
        ends += [one.top_up(policy, f"{number}", seen + i) for i in range(top_ups)]
        ends.append(one.settle(f"{number}", 10, output))
    await asyncio.gather(*ends)
    used = sum(10 + output for _, output, _ in calls)
    assert await sums(server) == (used, used, used)


async def test_a_store_that_never_was(tmp_path: Path) -> None:
    """A gateway starts even if its store is unreachable, and is then degraded."""
    limits = ValkeyLimits(Server(tmp_path).url, "g1", beat_s=0.05)
    await limits.store.start()
    assert limits.degraded
    assert isinstance(await limits.reserve(tenant(requests_per_minute=1), ReservationRequest("a", 1, 1)), Granted)
    assert isinstance(await limits.reserve(tenant(requests_per_minute=1), ReservationRequest("b", 1, 1)), LimitRefusal)
    await limits.store.close()
