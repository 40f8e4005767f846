"""A bound on the memory of large answers that clients have not read yet.

Problem: an answer with vectors may have 100 MB and costs few tokens. While the client reads the answer, the call no
longer holds a slot of its tenant, so slow clients of one tenant could fill the gateway's memory.

Invariant: the answers of a tenant that are being made or sent have at most `most_bytes` together. Only a single answer
may be larger. A call whose answer must wait keeps its slot.
"""

from __future__ import annotations

import asyncio
from typing import Final

MOST_BYTES: Final = 256 << 20


class UnreadAnswers:
    """Bound on the bytes of large answers that the clients of one tenant have not read yet. The bound holds for each
    tenant of this gateway, over all APIs together."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._held: dict[str, int] = {}
        self._freed = asyncio.Event()

    def answer(self, tenant: str) -> UnreadAnswer:
        """Return a context manager that counts one answer of a tenant."""
        return UnreadAnswer(self, tenant)

    async def hold(self, tenant: str, size: int) -> None:
        """Wait until the tenant's unread answers leave space for an answer of about `size` bytes. Then count the answer
        until `release` is called."""
        while (held := self._held.get(tenant, 0)) and held + size > self._most_bytes:
            await self._freed.wait()
        self._held[tenant] = held + size

    def release(self, tenant: str, size: int) -> None:
        """Stop counting an answer of `size` bytes."""
        self._held[tenant] -= size
        if not self._held[tenant]:
            del self._held[tenant]
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

    async def hold(self, size: int) -> None:
        """Wait until the tenant's limit on unread answers leaves room for `size` bytes. Then count the answer as `size`
        bytes until the context ends."""
        await self._answers.hold(self._tenant, size)
        self._size = size
