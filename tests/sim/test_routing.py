"""Tests of the routing simulation: runs are reproducible, caches and feeds keep their invariants, and KV events never
change an answer, even if they are late or lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.kv_cache.changes import KvChange
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision
from cluster.policy.scheduling.hedging import HedgingPolicy
from loadtests.routing.block_cache import BlockCache, PooledLru
from loadtests.routing.calls import BLOCK_TOKENS, Prompt
from loadtests.routing.cluster import Cluster, ClusterConfig, replay
from loadtests.routing.kv_feed import KvFeed, Lateness
from loadtests.routing.new_gateway import replace_gateway
from loadtests.routing.outcome import measured
from loadtests.routing.policies import POLICIES
from loadtests.routing.sessions import AgentTenant, Sessions, SessionsConfig
from loadtests.routing.traffic import Timed, mooncake
from loadtests.routing.worker import MODEL
from loadtests.sim.events import EventQueue
from loadtests.traces import NoData

ON_TIME, LATE = Lateness(0.0, 0.0, 0.0), Lateness(0.05, 2.0, 0.3)


def traffic(seed: int, calls: int = 60, per_s: float = 4.0) -> Timed:
    """Return calls whose prompts begin alike, as in conversations."""
    rng, at_s, out = Random(seed), 0.0, Timed()
    for number in range(calls):
        at_s += rng.expovariate(per_s)
        stem, own = rng.randrange(6), rng.randrange(4)
        blocks = [*(100 * stem + block for block in range(1, 9)), *(1000 + 10 * number + block for block in range(own))]
        tokens = len(blocks) * BLOCK_TOKENS + rng.randrange(BLOCK_TOKENS)
        out.append((at_s, Prompt("t", tokens, rng.randrange(1, 200), tuple(blocks))))
    return out


def small(policy: str = "cost", *, lateness: Lateness = LATE, seed: int = 1, gateways: int = 2) -> Cluster:
    """Return a cluster of three workers whose caches are smaller than the prompts of `traffic`."""
    return Cluster(ClusterConfig(policy, workers=3, blocks=60, gateways=gateways, seed=seed, lateness=lateness))


def history(cluster: Cluster) -> list[tuple[float, ...]]:
    """Return what happened to each call: gateway, worker, times and cached tokens."""
    return [(c.gateway, c.worker, c.bound, c.first, c.ended, c.predicted, c.cached) for c in cluster.calls]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_equal_seeds_equal_histories(policy: str) -> None:
    """Under every policy, runs with equal seeds are equal, and each call gets all of its tokens once."""
    one, two = (replay(small(policy), traffic(3)) for _ in range(2))
    assert history(one) == history(two)
    assert all(len(call.answered_by) == 1 and call.generated == call.prompt.output_tokens for call in one.calls)


def test_other_seeds_other_histories() -> None:
    """The seed decides how late events are and which gateway gets a call."""
    assert history(replay(small(seed=1), traffic(3))) != history(replay(small(seed=2), traffic(3)))


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 3))
def test_late_and_lost_events_never_change_an_answer(seed: int, lost: float, most_s: float) -> None:
    """However many KV events are late or lost, each call ends once with all of its tokens. An engine reuses only whole
    blocks that end before the last prompt token."""
    cluster = replay(small(lateness=Lateness(0.0, most_s, lost), seed=seed), traffic(seed))
    for call in cluster.calls:
        assert len(call.answered_by) == 1
        assert call.generated == call.prompt.output_tokens
        assert call.cached % BLOCK_TOKENS == 0
        assert 0 <= call.cached < call.prompt.prompt_tokens
        assert call.arrived <= call.bound < call.first <= call.ended
    for worker in cluster.workers:
        assert worker.live == 0
        assert worker.cache.pinned == 0


def test_a_quiet_index_is_exact() -> None:
    """When all events have arrived, including those that were sent again, every gateway knows every block of every
    worker."""
    cluster = replay(small(), traffic(5))
    cluster.run(cluster.events.now + 30.0)
    for _, prompt in traffic(5):
        held = {str(w.number): n for w in cluster.workers if (n := w.cache.match(prompt.names[: prompt.reusable]))}
        assert all(gateway.index.match(prompt.hashes) == held for gateway in cluster.gateways.values())


def test_a_new_gateway_knows_the_blocks() -> None:
    """A gateway that starts under load gets a snapshot of each worker's blocks. No call that waited at a killed gateway
    is lost."""
    cluster = small(lateness=Lateness())
    calls = traffic(7, per_s=20.0)
    for at_s, prompt in calls:
        cluster.events.at(at_s, lambda prompt=prompt: cluster.send(prompt))  # type: ignore[misc]
    cluster.run(calls[30][0])
    orphans = {call.call_id for call in cluster.gateways[0].calls.values() if call.bound >= 0}
    waiting = replace_gateway(cluster, 0)
    cluster.run(calls[-1][0]).finish()
    cluster.run(cluster.events.now + 30.0)
    assert waiting
    assert all((call.ended >= 0) == (call.call_id not in orphans) for call in cluster.calls)
    matches = [[dict(g.index.match(p.hashes)) for _, p in calls] for g in cluster.gateways.values()]
    assert matches[0] == matches[1]
    assert any(matches[0])


class HedgeAll(HedgingPolicy):
    """Hedging policy that sends each call to a second worker half a second after the first worker."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self._planned: dict[str, float] = {}
        self.second: list[str] = []
        self.lost: list[str] = []

    @property
    def next_due(self) -> float:
        """Time at which the next call is late."""
        return min(self._planned.values(), default=float("inf"))

    def sent(self, key: str, model: str, worker_id: str, uncached_tokens: int, now: float) -> None:
        """Plan to send the call `key` to a second worker too, half a second after `now`."""
        self._planned[key] = now + 0.5

    def late(self, now: float) -> Iterator[str]:
        """Return the calls whose hedge is due."""
        late = [key for key, due in self._planned.items() if due <= now]
        for key in late:
            del self._planned[key]
        return iter(late)

    def may_hedge(self, key: str, waiting: int) -> bool:
        """Return True."""
        return True

    def second_worker(self, call: RouteCall, candidates: Iterable[Candidate]) -> RoutingDecision:
        """Pick any other worker with a free slot."""
        free = [c for c in candidates if c.free_sequences and c.incarnation not in call.excluded]
        return RoutingDecision(free[0].worker_id if free else None, "hedge", ())

    def hedged(self, key: str, worker_id: str, uncached_tokens: int, now: float) -> None:
        """Count a hedge: a call was sent to a second worker."""
        self.second.append(key)

    def hedge_ended(self, key: str, won: bool, now: float) -> int:
        """Record that only one of the two workers of a hedged call still has the call."""
        self.lost.append(key)
        return 0

    def answered(self, key: str, uncached_tokens: int, now: float) -> None:
        """Forget a call that has its first token."""
        self._planned.pop(key, None)


def test_a_hedged_call_ends_once() -> None:
    """A call that was sent to two workers ends once. The slower worker becomes free and returns its credit."""
    hedger = HedgeAll()
    config = ClusterConfig(workers=3, blocks=200, slow=((0, 10.0),), hedger_of=lambda: hedger)
    cluster = replay(Cluster(config), traffic(2))
    assert hedger.second
    assert sorted(hedger.second) == sorted(hedger.lost)
    assert sum(call.was_hedged for call in cluster.calls) == len(hedger.second)
    assert all(len(call.answered_by) == 1 for call in cluster.calls)
    cluster.run(cluster.events.now + 60.0)
    for worker in cluster.workers:
        assert (worker.live, worker.waiting, worker.cache.pinned) == (0, 0, 0)
        assert cluster.gateways[0].candidates("m", 0.0, False)[worker.number].free_sequences > 0


def test_time_to_first_token_of_a_lone_call() -> None:
    """On an idle worker, the time to first token is the duration of the prompt's steps plus the delay of two messages.
    With slowness 2, the steps take twice as long."""
    for slowness in (1.0, 2.0):
        config = ClusterConfig(workers=1, slow=((0, slowness),))
        cluster = replay(Cluster(config), [(1.0, Prompt("t", 4096, 10, tuple(range(8))))])
        step_s = MODEL.step_s + MODEL.chunk_tokens / MODEL.prefill_tokens_per_s
        assert cluster.calls[0].ttft_s == pytest.approx(2 * step_s * slowness + 2 * config.link_s)


def test_a_slow_worker_gets_fewer_calls_by_rate() -> None:
    """A worker that is ten times slower than the others gets fewer calls if the gateways route by measured rates than
    if they do not."""
    shares = []
    for policy in ("cost", "cost without rates"):
        cluster = replay(Cluster(ClusterConfig(policy, workers=3, blocks=200, slow=((0, 10.0),))), traffic(4, 200, 1.5))
        shares.append(cluster.workers[0].submitted)
    assert shares[0] < 0.7 * shares[1]


@given(
    st.integers(4, 12),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 2), st.booleans()), max_size=40),
)
def test_block_cache_laws(capacity: int, steps: list[tuple[int, int, int, bool]]) -> None:
    """A cache never uses more blocks than it has. Its reported changes add up to the blocks that it holds."""
    cache, held, running = BlockCache(capacity), set[int](), list[tuple[list[int], int]]()
    for stem, length, extra, ends in steps:
        names = [10 * stem + block for block in range(length)]
        matched = cache.acquire(names, max(length - 1, 0), length + extra)
        if matched is not None:
            cache.commit(names[matched:])
            running.append((names, extra))
        if ends and running:
            names, unnamed = running.pop(0)
            cache.release(names, unnamed)
        change = cache.pop_change()
        stored, removed = set(change.stored.tolist()), set(change.removed.tolist())
        assert not stored & held
        assert removed <= held
        held = held - removed | stored
        assert held == set(cache.snapshot().stored.tolist())
        assert len(held) <= capacity
        assert cache.pinned <= capacity


@given(st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=30))
def test_a_pool_without_evictions_finds_all(prompts: list[list[int]]) -> None:
    """In a pooled LRU cache with enough space for all prompts, the cached part of a prompt is the longest prefix that
    the prompt shares with any earlier prompt."""
    pool, seen = PooledLru(10_000), set[int]()
    for prompt in prompts:
        names = [hash(tuple(prompt[: at + 1])) for at in range(len(prompt))]
        expected = next((at for at, name in enumerate(names) if name not in seen), len(names))
        assert pool.use(names, len(names)) == expected
        seen.update(names)


@given(st.integers(0, 10_000), st.floats(0, 1), st.lists(st.floats(0, 2), min_size=1, max_size=40))
def test_a_feed_applies_each_batch_once_in_order(seed: int, lost: float, gaps: list[float]) -> None:
    """Every batch of events is applied exactly once, in the order of sending. This holds even if batches are lost and
    sent again, or arrive late."""
    events, applied = EventQueue(), list[int]()
    feed = KvFeed(events, Random(seed), Lateness(0.05, 0.5, lost), lambda change: applied.append(int(change.stored[0])))
    at_s = 0.0
    for number, gap in enumerate(gaps):
        at_s += gap
        change = KvChange(stored=np.array([number], np.uint64))
        events.at(at_s, lambda change=change: feed.send(change))  # type: ignore[misc]
    events.run_until(at_s + 10.0)
    assert applied == list(range(len(gaps)))


def test_sessions_share_and_extend() -> None:
    """Sessions play all of their turns. More than 85 % of the prompt tokens that one cache shared by all workers would
    hold are cached, because each turn extends the turn before and the tenant's sessions share tokens."""
    config = SessionsConfig(
        (AgentTenant("a", 1.0, 4, 1.0), AgentTenant("b", 2.0, 2, 1.0)), turns=5, start_s=20.0, spawns=0.3
    )
    cluster = Cluster(ClusterConfig(workers=2, blocks=2000))
    sessions = Sessions(config, cluster, 1)
    sessions.run()
    outcome = measured("sessions", cluster)
    assert sessions.open == 0
    assert outcome.calls >= 30
    assert outcome.hits > 0.85
    assert outcome.in_pool >= outcome.cached


def test_a_missing_trace_is_named(tmp_path: object) -> None:
    """Without the traces, the message says which folder is absent."""
    from pathlib import Path

    with pytest.raises(NoData, match="absent"):
        mooncake(folder=Path(str(tmp_path)) / "none")
