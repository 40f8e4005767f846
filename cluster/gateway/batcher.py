"""Asks that come while others are under way go together, as soon as those are answered.

A store is asked once a call. When a gateway dies, or a batch of jobs begins, a hundred calls come in one moment; asked
one by one, each would cost a connection or a transaction of its own, and all of them the time of a hundred. Alone an
ask goes at once; under load it waits for at most one other, as in a database's group commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


class Batcher(Generic[Ask, Answer]):
    """One set of asks at a time. Belongs to the event loop that it is first used in."""

    def __init__(
        self, ask: Callable[[Sequence[Ask]], Awaitable[Sequence[Answer | Exception]]], most: int = 1000
    ) -> None:
        """`ask` answers each, or raises what is the error of everyone who waits; it gets at most `most` at once."""
        self._ask = ask
        self._most = most
        self._waiting: list[tuple[Ask, asyncio.Future[Answer]]] = []
        self._asking: asyncio.Task[None] | None = None

    def __call__(self, one: Ask) -> asyncio.Future[Answer]:
        """Its answer. It is asked though nobody waits for it any longer, unless the future is cancelled before."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((one, future))
        if self._asking is None:
            self._asking = asyncio.create_task(self._go_on())
        return future

    async def _go_on(self) -> None:
        due: list[tuple[Ask, asyncio.Future[Answer]]] = []
        try:
            while self._waiting:
                due, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                due = [(one, future) for one, future in due if not future.cancelled()]
                answers = await self._ask([one for one, _ in due]) if due else ()
                for (_, future), answer in zip(due, answers, strict=True):
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        except Exception as error:  # those who wait would wait for the same once more
            failed, self._waiting = [*due, *self._waiting], []
            for _, future in failed:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._asking = None
