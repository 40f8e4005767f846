"""Tests of how a gateway checks queued calls that use an adapter. After each change of a model's adapters, it checks
all these calls again, a bounded number at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.adapters import AdapterSpec, AdapterState, AdapterStatus
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import CatalogEntry, ModelState
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.scheduling.adapter_checks import AdapterChecks, current_adapter
from tests.gateway.models.test_adapters import A, B, directory_with, linked, report


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


def outputs(*keys: str) -> list[Any]:
    """Return the sequences of a call with an output for each key of the adapter `m:a`. The first one has begun."""
    call = SimpleNamespace(adapter="a", shown_model="m:a", sequences=[])
    for key in keys:
        request = SimpleNamespace(adapter=key)
        call.sequences.append(SimpleNamespace(call=call, request=request, emitted=[], link=None, finish_reason=""))
    call.sequences[0].emitted = [1]
    sequences: list[Any] = call.sequences
    return sequences


async def test_outputs_of_a_call_keep_to_the_same_files(tmp_path: Path) -> None:
    """A queued output gets the new files of an adapter only if no other output of its call has begun. Otherwise it
    waits for a worker with the files of the other output, and if there is none, the call ends with an error."""
    directory = directory_with(tmp_path, AdapterSpec("a", "/a", A))
    model = directory.models[0]
    old, new = linked(directory, "old", "new")
    report(old, AdapterStatus("a", A, AdapterState.READY))
    begun, queued = outputs(A, A)
    lone = outputs(A)[0]
    lone.emitted = []
    assert [current_adapter(each, model) for each in (begun, queued, lone)] == [None, None, None]

    directory.apply_catalog([CatalogEntry("m", state=ModelState.READY, adapters=(AdapterSpec("a", "/a", B),))], 8)
    report(new, AdapterStatus("a", B, AdapterState.READY))
    assert model.adapters.key("a") == B
    report(old, AdapterStatus("a", B, AdapterState.READY))
    assert current_adapter(begun, model) is None
    assert current_adapter(lone, model) == B
    with pytest.raises(CallError, match="retry the call") as caught:
        current_adapter(queued, model)
    assert caught.value.outcome is Outcome.WORKER_LOST
