"""The newest ended calls: their number is bounded, and divided fairly between tenants."""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.console.overview.recent_calls import MAX_AGE_S, MAX_CALLS, MAX_CHARS, EndedCall, FairRing


def ended(number: int, tenant: str, at: float = 0.0, text: str = "") -> EndedCall:
    """Return an ended call."""
    names = f"chatcmpl-{number:032}", text or f"r{number}", tenant, text or "sim", "http", "ok"
    return EndedCall(number, *names, at, at, 0.1, 0.2, 9, 0.1, 10, 5, "sim-w1", "cached_prefix", 0, f"{number:032}")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=80), st.integers(1, 12))
def test_one_tenant_does_not_push_out_others(tenants: list[str], most: int) -> None:
    """FairRing keeps the newest calls of each tenant, at most `most` in all. A tenant loses an old call only while it
    has at least as many calls in the ring as any other tenant."""
    ring = FairRing(most)
    sent: Counter[str] = Counter()
    for number, tenant in enumerate(tenants):
        ring.add(ended(number, tenant))
        sent[tenant] += 1
        kept = Counter(call.tenant for call in ring)
        assert len(ring) == kept.total() == min(number + 1, most)
        for name in sent:
            numbers = [call.number for call in ring.of(name)]
            newest = [at for at, each in enumerate(tenants[: number + 1]) if each == name]
            assert numbers == newest[len(newest) - len(numbers) :]
            if kept[name] < sent[name]:
                assert max(kept.values()) <= kept[name] + 1


def test_old_calls_are_dropped() -> None:
    """Calls that ended long ago are dropped, whatever their tenant."""
    ring = FairRing()
    for at in range(10):
        ring.add(ended(at, f"t{at % 3}", at=float(at)))
    ring.drop_older(5.0)
    assert sorted(call.number for call in ring) == [5, 6, 7, 8, 9]
    ring.drop_older(MAX_AGE_S)
    assert len(ring) == 0
    ring.add(ended(1, "t1"))
    assert len(ring) == 1


def test_calls_with_long_texts_take_little_memory() -> None:
    """A full history takes less than 4 MiB, even if each call has the longest texts."""
    gc.collect()
    tracemalloc.start()
    try:
        ring = FairRing()
        for number in range(2 * MAX_CALLS):
            ring.add(ended(number, f"tenant-{number}", text=f"{number:0{MAX_CHARS}}"))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ring) == MAX_CALLS
    assert used < 4 << 20
