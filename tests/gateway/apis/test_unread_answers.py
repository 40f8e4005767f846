"""The bound on the memory of answers that clients do not read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.unread_answers import UnreadAnswers
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_output import CallOutput


def call_with(output: CallOutput) -> Call:
    """Return the part of a call that is needed."""
    return cast(Call, SimpleNamespace(output=output))


async def held(
    answers: UnreadAnswers,
    tenant: str,
    size: int,
    read: asyncio.Event,
    log: list[str],
    output: CallOutput | None = None,
) -> None:
    """Wait until the bound allows an answer of `size` bytes, log the tenant, and hold the answer until `read` is set.
    `output`: output of the answer's call."""
    with answers.answer(tenant) as answer:
        await answer.hold(size, call_with(output or CallOutput([], cast(Any, None), 0.0)))
        log.append(tenant)
        await read.wait()


async def settle() -> None:
    """Run the event loop until all tasks wait."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_tenants_unread_answers_are_bounded() -> None:
    """When a tenant's unread answers reach the bound, its next answer waits until one of the answers is read or a
    client disconnects. Answers of other tenants do not wait. A single answer may exceed the bound. At the end, no bytes
    are held."""
    answers, log = UnreadAnswers(100), list[str]()
    reads = [asyncio.Event() for _ in range(5)]
    sizes = [("slow", 60), ("slow", 40), ("slow", 1), ("other", 500), ("slow", 30)]
    tasks = [
        asyncio.create_task(held(answers, tenant, size, read, log))
        for (tenant, size), read in zip(sizes, reads, strict=True)
    ]
    await settle()
    assert log == ["slow", "slow", "other"]
    tasks[2].cancel()
    reads[1].set()
    await settle()
    assert log == ["slow", "slow", "other", "slow"], "the answer of 30 is made, and the one that left is not"
    tasks[0].cancel()
    for read in reads:
        read.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not answers._held


async def test_an_answer_whose_call_ends_waits_no_longer() -> None:
    """If a call ends with an error while its answer waits for room, the wait raises this error, and the answer behind
    it gets its turn."""
    answers, log, read = UnreadAnswers(100), list[str](), asyncio.Event()
    output = CallOutput([], cast(Any, None), 0.0)
    first = asyncio.create_task(held(answers, "t", 60, read, log))
    await settle()
    ended = asyncio.create_task(held(answers, "t", 50, read, log, output))
    small = asyncio.create_task(held(answers, "t", 40, read, log))
    await settle()
    assert len(log) == 1, "the small answer does not overtake the one before it"
    output.fail(CallError(Outcome.CANCELLED, "suspended"))
    output.wake()
    with pytest.raises(CallError, match="suspended"):
        await ended
    await settle()
    assert len(log) == 2
    read.set()
    await asyncio.gather(first, small)
    assert not answers._held
    assert not answers._waiting
