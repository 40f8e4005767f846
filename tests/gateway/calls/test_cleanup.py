"""Cleanup at the end of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import Outcome
from cluster.gateway.calls.cleanup import Cleanup

KINDS = st.sampled_from(["works", "raises", "waits", "waits and raises"])


@given(st.lists(st.lists(KINDS, max_size=4), max_size=4))
def test_every_step_is_taken_whichever_fails(groups: list[list[str]]) -> None:
    """All steps run once with the call's outcome, even if some fail. The step that was added last runs first. Steps
    that wait for a store run after all others."""
    taken: list[int] = []

    async def wait(number: int, kind: str) -> None:
        await asyncio.sleep(0)
        taken.append(number)
        if kind.endswith("raises"):
            raise RuntimeError(kind)

    def step(number: int, kind: str, subject: str, outcome: Outcome) -> Awaitable[None] | None:
        assert (subject, outcome) == ("call", Outcome.SHED)
        if kind.startswith("waits"):
            return wait(number, kind)
        taken.append(number)
        if kind == "raises":
            raise RuntimeError(kind)
        return None

    cleanup = Cleanup({"request_id": "r1"})
    cleanup.outcome = Outcome.SHED
    kinds: list[str] = []
    for group in groups:
        cleanup.add("call", [partial(step, number, kind) for number, kind in enumerate(group, len(kinds))])
        kinds += group
    asyncio.run(cleanup.run())
    at_once = [number for number, kind in enumerate(kinds) if not kind.startswith("waits")]
    late = [number for number, kind in enumerate(kinds) if kind.startswith("waits")]
    assert taken == at_once[::-1] + late[::-1]


async def test_a_cancellation_ends_it_after_the_last_step() -> None:
    """If the cleanup is cancelled while a step waits for a store, the remaining steps still run."""
    taken: list[str] = []
    entered = asyncio.Event()

    async def store() -> None:
        entered.set()
        await asyncio.Event().wait()

    async def quota() -> None:
        taken.append("quota")

    cleanup = Cleanup({"request_id": "r1"})
    cleanup.add(None, [lambda subject, outcome: quota()])
    cleanup.add(None, [lambda subject, outcome: store()])
    ending = asyncio.create_task(cleanup.run())
    await entered.wait()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert taken == ["quota"]
