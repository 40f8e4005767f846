"""The budget for the memory of answers that clients have not read."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from cluster.api.outcomes import OUTCOME_STATUS, CallError
from cluster.gateway.apis.http.exchange import PIECE_BYTES, Exchange
from cluster.gateway.apis.openai.app import FORM
from cluster.gateway.calls.unread_answers import AnswerBounds, UnreadAnswers

BOUNDS = AnswerBounds(tenant=100, process=150, guaranteed=20, waiting=2, wait_s=3600.0)


async def held(answers: UnreadAnswers, tenant: str, size: int, read: asyncio.Event, log: list[str]) -> None:
    """Wait until the bounds allow an answer of `size` bytes, log the tenant, and hold the bytes until `read` is set."""
    with answers.answer(tenant) as answer:
        await answer.hold(size)
        log.append(tenant)
        await read.wait()


async def settle() -> None:
    """Run the event loop until all tasks wait."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_tenants_answers_are_bounded() -> None:
    """When a tenant's answers reach the bound, its next answer waits until one of them is read or its client
    disconnects. Answers of other tenants do not wait. A single answer may exceed the bound. At the end, no bytes are
    held."""
    answers, log = UnreadAnswers(AnswerBounds(tenant=100, process=1000, guaranteed=0)), list[str]()
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
    assert not answers.held
    assert not answers._held
    assert not answers._waiting


async def test_the_process_is_bounded_and_small_answers_pass() -> None:
    """When the answers of all tenants reach the bound of the process, large ones wait. A tenant that holds little is
    served whatever the others hold."""
    answers, log, read = UnreadAnswers(BOUNDS), list[str](), asyncio.Event()
    sizes = [("a", 90), ("b", 60), ("c", 21), ("quiet", 20), ("a", 1)]
    tasks = [asyncio.create_task(held(answers, tenant, size, read, log)) for tenant, size in sizes]
    await settle()
    assert log == ["a", "b", "quiet"]
    assert answers.held == 170
    read.set()
    await asyncio.gather(*tasks)
    assert sorted(log) == ["a", "a", "b", "c", "quiet"]
    assert not answers.held


async def test_an_answer_grows_or_is_refused() -> None:
    """An answer that grows never waits: beyond the bound it is refused with a status that allows a retry. A single one
    may exceed the bound of its tenant. What is given back, others can hold."""
    answers = UnreadAnswers(BOUNDS)
    with answers.answer("t") as first, answers.answer("t") as second:
        first.grow(60)
        await second.hold(40)
        for answer, size in ((first, 61), (second, 41)):
            with pytest.raises(CallError, match="read answers faster, send fewer calls") as refused:
                answer.grow(size)
        assert OUTCOME_STATUS[refused.value.outcome].http == 429
        assert refused.value.retry_after_s
        second.shrink(10)
        first.grow(90)
        second.shrink(0)
        first.grow(140)
        assert answers.held == 140
    assert not answers.held


async def test_waiting_is_bounded() -> None:
    """A tenant's further answers are refused when enough of them wait, and an answer is refused that has waited for too
    long."""
    answers, log, read = UnreadAnswers(BOUNDS), list[str](), asyncio.Event()
    tasks = [asyncio.create_task(held(answers, "t", 100, read, log)) for _ in range(3)]
    await settle()
    with pytest.raises(CallError, match="fill the gateway's memory"):
        await held(answers, "t", 100, read, log)
    read.set()
    await asyncio.gather(*tasks)
    hasty = UnreadAnswers(AnswerBounds(tenant=100, process=150, guaranteed=0, wait_s=0.0))
    with hasty.answer("t") as first:
        await first.hold(100)
        with pytest.raises(CallError, match="fill the gateway's memory"):
            await held(hasty, "t", 100, read, log)
    assert not hasty._waiting


@pytest.mark.parametrize("size", [PIECE_BYTES, 4 * PIECE_BYTES])
async def test_a_text_counts_while_it_is_read(size: int) -> None:
    """A long answer over HTTP is sent in pieces, and what the client has read is given back. A short one is sent at
    once and does not count."""
    answers, held, sent = UnreadAnswers(), list[int](), list[bytes]()

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            held.append(answers.held)
            sent.append(message["body"])

    async def receive() -> MutableMapping[str, Any]:
        raise AssertionError

    content = bytes(i % 251 for i in range(size))
    exchange = Exchange(FORM, {"headers": [], "http_version": "1.1"}, receive, send)
    await exchange.respond_once_read(content, answers)
    assert b"".join(sent) == content
    assert held == ([0] if size == PIECE_BYTES else [size - i * PIECE_BYTES for i in range(5)])
    assert not answers.held
