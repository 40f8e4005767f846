"""Tests of how a gateway checks queued calls that use an adapter. After each change of a model's adapters, it checks
all these calls again, a bounded number at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.calls.sequences.life import State
from cluster.gateway.scheduling.adapter_checks import AdapterChecks


def sequences(count: int) -> list[Any]:
    """Return queued sequences of calls, every second one for an adapter."""
    return [
        SimpleNamespace(state=State.QUEUED, call=SimpleNamespace(adapter="a" if i % 2 else "", error=None), seen=-1)
        for i in range(count)
    ]


@given(st.integers(0, 40), st.lists(st.booleans(), max_size=30))
def test_all_are_looked_at_after_the_last_change(count: int, steps: list[bool]) -> None:
    """In any order of changes and clock ticks, at most four sequences are checked at a time, in the order of the queue.
    After the last change, each queued sequence that needs an adapter is checked."""
    queue, together, time = sequences(count), list[int](), 0

    def look(sequence: Any) -> None:
        together[-1] += 1
        assert sequence.call.adapter, "calls of the model itself do not matter"
        sequence.seen = time

    checks, changed_at = AdapterChecks(lambda: queue, look, most=4), 0
    for is_change in (True, *steps):
        time += 1
        together.append(0)
        if is_change:
            checks.changed()
            changed_at = time
        else:
            checks.go_on()
    while checks._left or checks._is_stale:
        time += 1
        together.append(0)
        checks.go_on()
    assert max(together) <= 4
    of_adapters = [sequence.seen for sequence in queue if sequence.call.adapter]
    assert all(seen >= changed_at for seen in of_adapters)
    assert of_adapters == sorted(of_adapters)
    assert len(together) <= 1 + len(steps) + 2 * (count // 8 + 1)


def test_what_is_no_longer_queued_is_left_alone() -> None:
    queue, seen = sequences(20), list[Any]()
    checks = AdapterChecks(lambda: queue, seen.append, most=2)
    checks.changed()
    queue[5].state = State.SENT
    queue[7].call.error = ValueError("it has ended")
    for _ in range(10):
        checks.go_on()
    assert seen == [queue[i] for i in (1, 3, 9, 11, 13, 15, 17, 19)]
