"""A queue of jobs in which tenants take turns."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class JobQueue(Generic[T]):
    """Jobs that wait, each for a value, such as a free helper process. Tenants take turns."""

    def __init__(self) -> None:
        self._futures: OrderedDict[str, deque[asyncio.Future[T]]] = OrderedDict()

    def add(self, tenant: str) -> asyncio.Future[T]:
        """Add a job of a tenant, and return the future on which the job waits. Its result is set by the caller of
        `pop`."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(tenant, deque()).append(future)
        return future

    def pop(self) -> asyncio.Future[T] | None:
        """Remove the first job of the tenant that was served longest ago, and return the job's future. Returns None if
        no job waits."""
        while self._futures:
            tenant, futures = self._futures.popitem(last=False)
            future = futures.popleft()
            if futures:
                self._futures[tenant] = futures
            if not future.done():
                return future
        return None
