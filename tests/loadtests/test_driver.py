"""The driver follows its plan, counts the results, and never hangs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from loadtests.datasets import fixed
from loadtests.driver import Limits, drive
from loadtests.faces import Answer, CallFailed, OnText, Request
from loadtests.records import same_texts
from tests.loadtests.conftest import Scripted

pytestmark = pytest.mark.slow

REQUESTS = fixed(40, 4, 5, seed=1)


async def _answers(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
    for i in range(3):
        await asyncio.sleep(0)
        on_text(f"{request.key}/{i} ")
    yield Answer(5, 7, 0, "length")


async def test_a_closed_loop_makes_every_call_and_keeps_to_its_concurrency() -> None:
    """In a closed loop with six callers, each of forty calls is made once, and at most six calls run at a time."""
    face = Scripted(_answers)
    run = await drive(face, REQUESTS, concurrency=6)
    assert sorted(face.sent) == sorted(request.key for request in REQUESTS)
    assert face.most == 6
    assert not run.problem
    assert len(run.good) == 40


async def test_an_open_loop_sends_at_the_due_times_whatever_is_under_way() -> None:
    """In an open loop a call that does not end delays no later call, and no call is sent before it is due."""
    release = asyncio.Event()

    async def waits(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
        if face.running == len(due_s):
            release.set()
        await release.wait()
        on_text("x")
        yield Answer(1)

    due_s = [0.0, 0.01, 0.02, 0.02, 0.03]
    face = Scripted(waits)
    run = await drive(face, REQUESTS[: len(due_s)], due_s=due_s, limits=Limits(call_s=10))
    assert face.most == len(due_s)
    assert all(record.sent_s >= record.due_s for record in run.records)


async def test_time_a_token_is_counted_by_the_servers_count_not_by_pieces() -> None:
    """If five tokens arrive in three pieces, the time per token is the time from the first piece to the last, divided
    by four. The number of tokens counts, not the number of pieces."""
    run = await drive(Scripted(_answers), REQUESTS[:1], concurrency=1)
    (record,) = run.records
    assert (record.tokens, record.pieces, len(record.gaps_s)) == (5, 3, 2)
    assert record.tpot_s == pytest.approx(sum(record.gaps_s) / 4)
    assert run.one_token_share == pytest.approx(1 / 3)


async def test_a_call_without_end_is_a_timeout_and_the_others_go_on() -> None:
    """A call that hangs is counted as a timeout, and all other calls have complete answers."""

    async def one_hangs(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
        if number == 3:
            await asyncio.Event().wait()
        async for answer in _answers(request, on_text, number):
            yield answer

    run = await drive(Scripted(one_hangs), REQUESTS, concurrency=4, limits=Limits(call_s=0.2))
    assert run.errors() == {CallFailed.TIMEOUT: 1}
    assert len(run.good) == 39
    assert not run.problem


async def test_a_run_without_end_ends_at_its_limit_and_says_so() -> None:
    """When a run reaches its time limit, the running calls are recorded as not ended."""

    async def hangs(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
        on_text("begun")
        await asyncio.Event().wait()
        yield Answer(1)

    run = await drive(Scripted(hangs), REQUESTS[:4], concurrency=4, limits=Limits(call_s=60, run_s=0.2))
    assert "did not end within 0.2 s" in run.problem
    assert run.errors() == {"not ended": 4}
    assert all(record.pieces == 1 for record in run.records)


async def test_a_server_that_dies_ends_the_run_with_what_came_before() -> None:
    """If the server dies, the run stops early, and keeps the answers that arrived before."""

    async def dies(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
        if number >= 10:
            raise CallFailed(CallFailed.UNREACHABLE, "connection refused")
        async for answer in _answers(request, on_text, number):
            yield answer

    face = Scripted(dies)
    run = await drive(face, fixed(500, 4, 5, seed=2), concurrency=2)
    assert run.problem.startswith("the server died")
    assert "connection refused" in run.problem
    assert "(0 of them after the first token)" in run.problem
    assert len(run.good) == 10
    assert face.calls < 30


async def test_refusals_do_not_look_like_a_death() -> None:
    """A server that refuses every call is alive: all calls are made, and are counted by status."""

    async def refuses(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
        if number >= 0:
            raise CallFailed("status 429", "slow down")
        yield Answer(0)

    run = await drive(Scripted(refuses), REQUESTS, concurrency=4)
    assert run.errors() == {"status 429": 40}
    assert not run.problem


async def test_equal_texts_are_told_from_different_ones() -> None:
    """Two runs of the same requests are compared request by request, in whatever order the requests were made."""

    async def differs(request: Request, on_text: OnText, number: int) -> AsyncIterator[Answer]:
        on_text("other" if request.key == REQUESTS[2].key else f"{request.key}/0 {request.key}/1 {request.key}/2 ")
        yield Answer(5)

    one = await drive(Scripted(_answers), REQUESTS[:6], concurrency=3)
    other = await drive(Scripted(differs), list(reversed(REQUESTS[:6])), concurrency=1)
    assert same_texts(one, other) == (5, 6)
