"""Batching of requests to a store. The requests that arrive while a batch is running form the next batch.

Each call makes one request to a store. When a gateway dies, or when many jobs start together, a hundred calls arrive at
once. If their requests were sent one by one, each would cost its own connection or transaction, and the last would wait
for all others. A request that arrives while no batch is running is sent immediately. Under load a request waits for at
most one batch, as in a database's group commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


class Batcher(Generic[Ask, Answer]):
    """Batcher of requests to one store, which sends one batch at a time. A batcher belongs to the event loop in which
    it is first used."""

    def __init__(
        self, ask: Callable[[Sequence[Ask]], Awaitable[Sequence[Answer | Exception]]], most: int = 1000
    ) -> None:
        """`ask` sends a batch of at most `most` requests and returns their answers. If `ask` raises, all waiting
        requests fail."""
        self._ask = ask
        self._most = most
        self._waiting: list[tuple[Ask, asyncio.Future[Answer]]] = []
        self._asking: asyncio.Task[None] | None = None

    def __call__(self, request: Ask) -> asyncio.Future[Answer]:
        """Queue a request and return the future of its answer. A request is dropped if its future is cancelled before
        the request's batch is sent."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._asking is None:
            self._asking = asyncio.create_task(self._send_batches())
        return future

    async def _send_batches(self) -> None:
        due: list[tuple[Ask, asyncio.Future[Answer]]] = []
        try:
            while self._waiting:
                due, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                due = [(request, future) for request, future in due if not future.cancelled()]
                answers = await self._ask([request for request, _ in due]) if due else ()
                for (_, future), answer in zip(due, answers, strict=True):
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        except Exception as error:  # the waiting requests fail too: most likely they would get the same error
            failed, self._waiting = [*due, *self._waiting], []
            for _, future in failed:
                if not future.done():
                    future.set_exception(error)
        finally:
            self._asking = None
