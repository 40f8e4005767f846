"""Tests of the memory of routing decisions: it is bounded, forgets the oldest calls first, and reads the scores of a
decision only on request.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.routing.route_history import (
    MAX_CANDIDATES,
    MAX_ROUTES,
    SCORES_PER_S,
    Route,
    RoutedCall,
    RouteHistory,
)
from cluster.policy.routing.router import Candidate, RouteCall, RoutingDecision, Score, pick
from cluster.policy.routing.version_split import Build

PARTS = ("free_places", "free_memory", "short_queue", "short_prefill", "cached_prefix")


def decision(workers: int, dropped: int = 0) -> RoutingDecision:
    """Return a decision over `workers` workers. A filter has dropped the last `dropped` of them."""
    passed = [Score(f"w{at}", 1.0 - at / 10_000, tuple((part, 0.1 * at) for part in PARTS)) for at in range(workers)]
    for at in range(workers - dropped, workers):
        passed[at] = Score(f"w{at}", dropped="draining")
    return RoutingDecision("w0", "least_loaded", tuple(passed))


def route(workers: int = 2, sequence: int = 0, dropped: int = 0, at: float = 0.0) -> Route:
    """Return a route to the worker w0, which was chosen among `workers` workers that hold one block each."""
    made = Route(sequence, at, "w0", "least_loaded", 900, decision(workers, dropped))
    made.cached = {f"w{at}": 16 for at in range(workers)}
    return made


def call(number: int, tenant: str = "t") -> RoutedCall:
    """Return a call without routes, which arrived at second `number`."""
    return RoutedCall(f"c{number}", f"a{number}", f"r{number % 5}", tenant, "m", float(number))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40)), max_size=80), st.integers(1_000, 200_000))
def test_the_memory_is_bounded_and_the_oldest_go_first(added: Sequence[tuple[int, int]], max_bytes: int) -> None:
    """The history of routes stays within its bound in bytes. If it would exceed the bound, it forgets calls, first
    those whose first route is the oldest. It also forgets a call that alone exceeds the bound."""
    history = RouteHistory(max_bytes)
    order: list[str] = []
    for number, workers in added:
        known = history.call(f"c{number}")
        if known is None:
            order.append(f"c{number}")
        history.add(known or call(number), route(workers), workers)
        kept = [name for name in dict.fromkeys(order) if history.call(name) is not None]
        order = [name for name in order if name in kept]
        sizes = [each.size for name in kept if (each := history.call(name)) is not None]
        assert (history.size, len(history)) == (sum(sizes), len(kept))
        assert history.size <= max_bytes
        assert history.span_s(100.0) == (100.0 - int(kept[0][1:]) if kept else 0.0)


@given(st.integers(1, 3 * MAX_ROUTES))
def test_a_call_keeps_its_newest_routes(count: int) -> None:
    """A call that is sent many times keeps its newest routes; its older routes are only counted."""
    history, one = RouteHistory(), call(0)
    for at in range(count):
        history.add(one, route(at=float(at)), 2)
    kept = min(count, MAX_ROUTES)
    assert [each.sent_at for each in one.routes] == [float(at) for at in range(count - kept, count)]
    assert (one.omitted_routes, history.size) == (count - kept, one.size)
    assert one.size == call(0).size + sum(each.size for each in one.routes)


@given(st.integers(1, 60), st.data())
def test_a_large_fleet_keeps_the_best_and_counts_the_others(workers: int, data: st.DataObject) -> None:
    """At most MAX_CANDIDATES workers of a decision are remembered, with their cached tokens. All workers are counted.

    In a fleet of more than MAX_CANDIDATES workers, a decision that follows shortly after another one is remembered only
    with the chosen worker.
    """
    dropped = data.draw(st.integers(0, workers - 1))
    history, made, next_one = (
        RouteHistory(),
        route(workers, dropped=dropped),
        route(workers, at=workers / SCORES_PER_S / 2),
    )
    history.add(call(0), made, workers)
    history.add(call(1), next_one, workers)
    seen = made.candidates
    assert [score.worker_id for score in seen.best] == [f"w{at}" for at in range(min(workers, MAX_CANDIDATES))]
    assert (seen.total, seen.dropped) == (workers, {"draining": dropped} if dropped else {})
    assert made.predicted_cached_tokens == 16
    assert made.cached is not None
    assert set(made.cached) >= {score.worker_id for score in seen.best}
    assert len(made.cached) <= MAX_CANDIDATES
    is_large = workers > MAX_CANDIDATES
    assert (len(next_one.candidates.best), next_one.candidates.total) == (0 if is_large else workers, workers)
    assert (next_one.worker_id, next_one.predicted_cached_tokens) == ("w0", 16)
    later = route(workers, at=1.01 * workers / SCORES_PER_S)
    history.add(call(2), later, workers)
    assert len(later.candidates.best) == min(workers, MAX_CANDIDATES)


def test_a_small_fleet_reads_scores_when_asked() -> None:
    """The scores of a remembered decision are computed only when they are read, because computing them would cost time
    at every call."""

    class Lazy(RoutingDecision):
        reads = 0

        def __getattribute__(self, name: str) -> object:
            if name == "scores":
                Lazy.reads += 1
            return super().__getattribute__(name)

    known = pick(RouteCall("m", 10), [Candidate("w", "m", Build(), 1, 99, 0, 0, 0.0, healthy=True, draining=False)])
    made = Route(0, 0.0, "w", known.reason, 10, Lazy(known.worker_id, known.reason, known.scores))
    history = RouteHistory()
    history.add(call(0), made, 1)
    assert Lazy.reads == 0
    assert [score.worker_id for score in made.candidates.best] == ["w"]
    assert Lazy.reads == 1


def test_calls_are_found_by_both_ids() -> None:
    """A call is found by its request id and by the id of its answer, among the calls of one tenant or of all
    tenants."""
    history = RouteHistory()
    for number in range(10):
        history.add(call(number, f"t{number % 2}"), route(), 2)
    assert [each.call_id for each in history.find("r3")] == ["c3", "c8"]
    assert [each.call_id for each in history.find("r3", "t0")] == ["c8"]
    assert [each.call_id for each in history.find("a4")] == ["c4"]
    assert not history.find("a4", "t1")
    assert not history.find("c4")  # a gateway's own id, which callers never see
    history.end("c4", "ok", 9.0)
    history.end("unknown", "ok", 9.0)
    assert [(each.outcome, each.ended_at) for each in history.find("a4")] == [("ok", 9.0)]


def test_the_estimated_size_is_not_below_the_real_size() -> None:
    """The measured memory of remembered calls is at most their estimated size, with one worker, with a few and with
    many."""
    for workers in (1, 8, 16, 200):
        history = RouteHistory()
        tracemalloc.start()
        for number in range(100):
            history.add(call(number), route(workers, at=float(number)), workers)
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert used <= history.size, workers
        assert history.size <= 8 * used, workers
