"""The queue of jobs that wait for a free helper of a HelperPool."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque

from cluster.gateway.helpers.helper_process import HelperProcess


class HelperQueue:
    """The jobs that wait for a free helper. Tenants take turns."""

    def __init__(self) -> None:
        self._futures: OrderedDict[str, deque[asyncio.Future[HelperProcess | None]]] = OrderedDict()

    def add(self, tenant: str) -> asyncio.Future[HelperProcess | None]:
        """Add a job of a tenant, and return the future on which the job waits. The pool sets the result: a helper, or
        None if the caller must do the work itself."""
        future: asyncio.Future[HelperProcess | None] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(tenant, deque()).append(future)
        return future

    def pop(self) -> asyncio.Future[HelperProcess | None] | None:
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
