"""A bound on the memory of large answers that clients have not read yet.

Problem: an answer with vectors may have 100 MB and costs few tokens. While the client reads the answer, the call no
longer holds a slot of its tenant, so slow clients of one tenant could fill the gateway's memory.

Invariant: the answers of a tenant that are being made or sent have at most `most_bytes` together. Only a single answer
may be larger. A call whose answer must wait keeps its slot. A tenant's answers get room in the order in which they
began to wait. A call that ends with an error waits no longer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from cluster.gateway.calls.call import Call

MOST_BYTES: Final = 256 << 20


class UnreadAnswers:
    """Bound on the bytes of large answers that the clients of one tenant have not read yet. The bound holds for each
    tenant of this gateway, over all APIs together."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._held: dict[str, int] = {}
        self._waiting: dict[str, deque[object]] = {}
        self._freed = asyncio.Event()

    def answer(self, tenant: str) -> UnreadAnswer:
        """Return a context manager that counts one answer of a tenant."""
        return UnreadAnswer(self, tenant)

    async def hold(self, tenant: str, size: int, has_ended: Callable[[], bool]) -> bool:
        """Wait until the tenant's unread answers leave space for an answer of about `size` bytes. Then count the answer
        until `release` is called, and return True. `has_ended`: returns whether the answer's call has ended meanwhile,
        which is checked at each `recheck`; then return False."""
        place, waiting = object(), self._waiting.setdefault(tenant, deque())
        waiting.append(place)
        try:
            while not has_ended():
                held = self._held.get(tenant, 0)
                if waiting[0] is place and (not held or held + size <= self._most_bytes):
                    self._held[tenant] = held + size
                    return True
                await self._freed.wait()
            return False
        finally:
            waiting.remove(place)
            if not waiting:
                del self._waiting[tenant]
            self.recheck()  # for the next one that waits

    def release(self, tenant: str, size: int) -> None:
        """Stop counting an answer of `size` bytes."""
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]
        self.recheck()

    def recheck(self) -> None:
        """Let all answers that wait check again whether there is room, and whether their calls have ended."""
        self._freed.set()
        self._freed.clear()


class UnreadAnswer:
    """Context manager that counts one answer of a tenant from the call of `hold` to the end of the context."""

    __slots__ = ("_answers", "_size", "_tenant")

    def __init__(self, answers: UnreadAnswers, tenant: str) -> None:
        self._answers = answers
        self._tenant = tenant
        self._size = 0

    def __enter__(self) -> UnreadAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._size:
            self._answers.release(self._tenant, self._size)

    async def hold(self, size: int, *calls: Call) -> None:
        """Wait until the tenant's limit on unread answers leaves room for `size` bytes. Then count the answer as `size`
        bytes until the context ends. `calls`: the calls to which the answer belongs. Raises the error with which one
        of them ends meanwhile, for example because its tenant was suspended."""
        outputs = [call.output for call in calls]
        for output in outputs:
            output.listen(self._answers.recheck)
        try:
            if await self._answers.hold(self._tenant, size, lambda: any(output.error for output in outputs)):
                self._size = size
        finally:
            for output in outputs:
                output.listen(None)
        for output in outputs:
            if output.error is not None:
                raise output.error
