"""Tests of hedging (a second Submit of a sequence whose first token is late): its budget, no hedging under overload,
and the learnt times to first token.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.routing.cost import RoutingSettings
from cluster.policy.routing.fleet import choose
from cluster.policy.routing.router import Candidate, RouteCall
from cluster.policy.routing.version_split import Build
from cluster.policy.scheduling.first_token_times import (
    GROUPS,
    MIN_COUNT,
    QUANTILE,
    RELEARNT_S,
    SIZES,
    FirstTokenTimes,
    size_class,
)
from cluster.policy.scheduling.hedging import BURST, GROWTH, MIN_FREE, SHORTEST_S, HedgingPolicy
from cluster.policy.scheduling.latency_sketch import ACCURACY, LONGEST_S, LatencySketch
from cluster.policy.scheduling.latency_sketch import SHORTEST_S as SKETCH_SHORTEST_S

NOW = 1000.0
TOKENS = 500
LEARNT = int(2.2 * MIN_COUNT)
"""Number of sequences on two workers after which their times count."""
durations = st.floats(2 * SKETCH_SHORTEST_S, LONGEST_S / 2)


def worker(name: str, free: int = 8, running: int = 0, waiting: int = 0, healthy: bool = True) -> Candidate:
    """Return a worker as a candidate. Its incarnation is its name."""
    return Candidate(name, "m", Build("v1"), free, 10**6, running, waiting, 0.0, healthy, False, incarnation=name)


# ---- the sketch


@given(st.lists(durations, min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_near_a_duration_of_its_rank(values: list[float], part: float) -> None:
    """A quantile of the sketch is close to a measured duration: the relative error is at most ACCURACY.

    In sorted order, this duration is at the exact rank of the quantile or next to it.
    """
    sketch = LatencySketch(60.0)
    for value in values:
        sketch.add(value, NOW)
    ordered, rank = sorted(values), part * len(values)
    near = ordered[max(math.floor(rank) - 1, 0) : math.ceil(rank) + 1]
    quantile = sketch.quantile(part)
    assert any(abs(quantile - value) <= (ACCURACY + 1e-9) * value for value in near), (quantile, near)
    assert sketch.count(NOW) == pytest.approx(len(values))


@given(durations, durations, st.integers(1, 100), st.integers(8, 2_000))
def test_old_durations_fade(old_s: float, new_s: float, count: int, half_lives: int) -> None:
    """Old durations lose weight over time. If as many new durations arrive eight half-lives later or more, the median
    equals the median of the new durations alone."""
    sketch = LatencySketch(60.0)
    for _ in range(count):
        sketch.add(old_s, NOW)
    later = NOW + 60.0 * half_lives
    for _ in range(count):
        sketch.add(new_s, later)
    assert sketch.quantile(0.5) == pytest.approx(new_s, rel=ACCURACY + 1e-9)
    assert count - 1e-6 <= sketch.count(later) <= count * 1.01


# ---- learnt times to first token


@given(st.integers(0, 3), st.integers(3, 12), durations, st.data())
def test_slow_workers_in_a_minority_do_not_change_what_is_late(
    slow: int, workers: int, fast_s: float, data: st.DataObject
) -> None:
    """Workers are divided into groups. If less than half of the groups contain a slow worker, slow workers do not
    change the time after which a first token counts as late, however slow they are."""
    times, chosen = FirstTokenTimes(), data.draw(st.permutations(range(workers)))[:slow]
    groups = min(workers, GROUPS)
    if 2 * len({number % GROUPS for number in chosen}) >= groups:
        return
    for number in range(workers):
        for _ in range(int(MIN_COUNT)):
            times.observe("m", f"w{number}", TOKENS, 10 * fast_s if number in chosen else fast_s, NOW)
    assert times.high("m", TOKENS, NOW) == pytest.approx(fast_s, rel=ACCURACY + 1e-9)


@given(st.integers(0, 1 << 26), st.integers(0, 1 << 26))
def test_an_unknown_size_uses_the_next_larger_known_one(asked: int, known: int) -> None:
    """If a size class of prompts has no observations, the time of the next larger class with observations is used,
    never that of a smaller class."""
    times = FirstTokenTimes()
    for _ in range(int(MIN_COUNT)):
        times.observe("m", "w", known, 3.0, NOW)
    expected = pytest.approx(3.0, rel=ACCURACY + 1e-9) if size_class(asked) <= size_class(known) else None
    assert times.high("m", asked, NOW) == expected
    assert times.high("other", asked, NOW) is None
    assert 1 <= size_class(asked) <= SIZES


def test_the_high_time_is_the_quantile_of_one_percent() -> None:
    """A first token counts as late once it has taken longer than 99 % of the observed times to first token."""
    times = FirstTokenTimes()
    for number in range(1, 1001):
        times.observe("m", "w", TOKENS, number / 100, NOW)
    assert times.high("m", TOKENS, NOW) == pytest.approx(10 * QUANTILE, rel=ACCURACY + 1e-9)
    for _ in range(100_000):
        times.observe("m", "w", TOKENS, 1.0, NOW)
    assert times.high("m", TOKENS, NOW + RELEARNT_S) == pytest.approx(1.0, rel=ACCURACY + 1e-9)


# ---- the policy


@dataclass
class World:
    """A gateway that follows a hedging policy, and counts the hedges."""

    policy: HedgingPolicy
    now: float = NOW
    sent: int = 0
    hedges: dict[str, int] = field(default_factory=dict)

    def learn(self, count: int, ttft_s: float = 0.1) -> None:
        """Send and answer this number of sequences on two workers."""
        for number in range(count):
            self.send(f"learn{self.sent}", f"w{number % 2}")
            self.answer(f"learn{self.sent - 1}", ttft_s)
        self.now += RELEARNT_S

    def send(self, key: str, name: str = "w0") -> None:
        """Send a sequence to a worker."""
        self.sent += 1
        self.policy.sent(key, "m", name, TOKENS, self.now)

    def answer(self, key: str, after_s: float = 0.0) -> None:
        """Let the worker answer a sequence."""
        self.policy.answered(key, TOKENS, self.now + after_s)

    def look(self, waiting: int, workers: list[Candidate]) -> list[str]:
        """Hedge the late sequences that may be hedged. Return the keys of the hedged sequences."""
        call, done = RouteCall("m", TOKENS, excluded=frozenset(("w0",))), []
        for key in self.policy.late(self.now):
            if self.policy.may_hedge(key, waiting):
                decision = self.policy.second_worker(call, workers)
                if decision.worker_id is not None:
                    self.policy.hedged(key, decision.worker_id, TOKENS, self.now)
                    self.hedges[key] = self.hedges.get(key, 0) + 1
                    done.append(key)
        return done


steps = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "answer", "win", "lose", "forget", "resend", "look", "look"]),
        st.integers(0, 9),
        st.sampled_from([0.0, 0.02, 0.3]),
    ),
    max_size=80,
)


@given(st.sampled_from([0.0, 0.01, 0.3, 1.0]), steps)
def test_the_budget_holds_and_no_sequence_is_hedged_twice(share: float, history: list[tuple[str, int, float]]) -> None:
    """At any time, the number of hedges is at most `share` of the number of sent sequences, and no sequence is hedged
    twice."""
    world, numbers, live = World(HedgingPolicy(share)), itertools.count(), list[str]()
    world.learn(LEARNT)
    for what, number, seconds in history:
        world.now += seconds
        key = live[number % len(live)] if live else ""
        if what == "send":
            live.append(f"s{next(numbers)}")
            world.send(live[-1])
        elif what == "look":
            world.look(0, [worker("w0"), worker("w1")])
        elif not key:
            continue
        elif what == "resend":
            world.policy.sent(key, "m", "w2", TOKENS, world.now)
        elif what in ("win", "lose"):
            world.policy.hedge_ended(key, what == "win", world.now)
        else:
            live.remove(key)
            if what == "answer":
                world.answer(key)
            else:
                world.policy.forget(key)
        assert sum(world.hedges.values()) <= share * world.sent + 1e-6
        assert set(world.hedges.values()) <= {1}
        assert len(world.policy) == (len(live) if share else 0)


@pytest.mark.slow
@given(st.integers(0, 5000))
def test_a_quiet_time_saves_up_a_bounded_number_of_hedges(count: int) -> None:
    """The number of sent sequences determines how many hedges (second submissions) are allowed. Even after very many
    sequences, at most BURST hedges are allowed at once. Sequences that have just become late may use only half of
    them."""
    world = World(HedgingPolicy(0.01))
    world.learn(LEARNT + count)
    for number in range(20):
        world.send(f"s{number}")
    saved = min(BURST, 0.01 * world.sent)
    world.now = world.policy.next_due
    assert len(world.look(0, [worker("w1", free=100)])) <= max(saved - BURST / 2 + 1 + 1e-6, 0)
    world.now += 1.0
    world.look(0, [worker("w1", free=100)])
    assert saved - 1 - 1e-6 <= sum(world.hedges.values()) <= saved + 1e-6


@given(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 1)), max_size=5))
def test_nothing_is_hedged_under_overload(waiting: int, loads: list[tuple[int, int, int]]) -> None:
    """A late sequence is hedged only if three conditions hold: no sequence waits at the gateway, enough of the other
    workers' capacity is free, and one of these workers has a free slot and no queue in its engine."""
    world = World(HedgingPolicy(1.0))
    world.learn(LEARNT)
    world.send("s")
    world.now += 10.0
    others = [worker(f"x{number}", *load) for number, load in enumerate(loads)]
    free, running = sum(one.free_sequences for one in others), sum(one.running for one in others)
    takes = any(one.free_sequences and not one.waiting for one in others)
    hedged = world.look(waiting, [worker("w0", free=100), worker("y", healthy=False), *others])
    assert bool(hedged) == (not waiting and free > 0 and free >= MIN_FREE * (free + running) and takes)


def test_sequences_of_other_gateways_count_as_load() -> None:
    """Nothing is hedged to workers whose engines are busy with the sequences of other gateways."""
    world = World(HedgingPolicy(1.0))
    world.learn(LEARNT)
    world.send("s")
    world.now += 10.0
    busy = [replace(worker(name, free=4, running=1), slots=64, engine_running=60) for name in ("w1", "w2")]
    assert world.look(0, busy) == []
    world.now += 10.0
    assert world.look(0, [replace(one, engine_running=30) for one in busy]) == ["s"]


def test_the_second_worker_is_chosen_by_the_configured_policy() -> None:
    """The second worker is chosen by the policy that chooses the first worker."""
    workers = [worker("w1", running=3), worker("w2", running=1), worker("w3", running=2)]
    call, settings = RouteCall("m", TOKENS), RoutingSettings(policy="least_load")
    decision = HedgingPolicy(1.0, settings).second_worker(call, workers)
    assert decision == choose(call, workers, settings)
    assert decision != HedgingPolicy(1.0).second_worker(call, workers) == choose(call, workers)


@given(st.floats(0.001, 5.0), st.floats(0.0, 40.0))
def test_a_sequence_is_late_after_the_learnt_time(ttft_s: float, waited_s: float) -> None:
    """A sequence is late once it has waited as long as earlier sequences suggest. It is reported as late again only
    when its wait has grown by a factor."""
    world = World(HedgingPolicy(1.0))
    world.learn(LEARNT, ttft_s)
    world.send("s")
    sent_at = world.now
    late_after_s = world.policy.next_due - sent_at
    assert late_after_s == pytest.approx(max(ttft_s, SHORTEST_S), rel=ACCURACY + 1e-9)
    world.now += waited_s
    assert list(world.policy.late(world.now)) == (["s"] if world.now - sent_at >= late_after_s else [])
    assert list(world.policy.late(world.now)) == []
    if waited_s >= late_after_s:
        assert waited_s < world.policy.next_due - sent_at <= GROWTH * max(waited_s, late_after_s) + 1e-6
    world.answer("s")
    assert list(world.policy.late(math.inf)) == []


def test_a_hedge_that_wins_does_not_hide_the_slow_worker() -> None:
    """If the second worker answers before the slow one, the policy still learns that the slow worker is slow: its time
    to the first token is at least the wait until then."""
    world = World(HedgingPolicy(1.0))
    world.learn(LEARNT)
    for number in range(3 * int(MIN_COUNT)):
        for name in ("w0", "w1"):
            key = f"{name}-{number}"
            world.policy.sent(key, "m", name, TOKENS, world.now)
            world.policy.hedged(key, "w2", TOKENS, world.now + 5.0)
            assert world.policy.hedge_ended(key, True, world.now + 5.0) == TOKENS
            world.policy.answered(key, TOKENS, world.now + 5.1)
    world.now += RELEARNT_S
    assert list(world.policy.late(world.now)) == []
    world.send("s")
    assert world.policy.next_due - world.now == pytest.approx(5.0, rel=2 * ACCURACY)
