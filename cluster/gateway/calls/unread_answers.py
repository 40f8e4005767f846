"""The budget for the memory of answers: of those that are gathered, made or sent, until their clients have read them.

Problem: an answer with log probabilities or vectors may have hundreds of MB and costs few tokens. While the client
reads the answer, the call no longer holds a slot of its tenant. So a few calls, or slow clients, could fill the memory.

Method: an answer holds its expected size before its call is queued, and waits for that while it holds nothing else. It
never waits later: an answer that turns out larger than expected grows, or its call is refused. So no answers wait for
each other.

Invariant: the answers of a tenant hold at most `tenant` bytes, or there is only one of them. Those of the process hold
at most `process` bytes, but each tenant may hold `guaranteed` bytes whatever the others hold. A tenant's answers get
room in the order in which they began to wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from typing import Final

from cluster.api.outcomes import CallError, Outcome

LOGPROB_BYTES: Final = 160
"""Approximate memory of one log probability that is not encoded yet."""
JSON_LOGPROB_BYTES: Final = 80
"""Approximate size of one encoded log probability."""


@dataclass(frozen=True, slots=True)
class AnswerBounds:
    """Bounds on the bytes of unread answers (see the module), on the number of a tenant's answers that wait, and on the
    seconds for which one waits."""

    tenant: int = 256 << 20
    process: int = 512 << 20
    guaranteed: int = 32 << 20
    waiting: int = 128
    wait_s: float = 60.0


class UnreadAnswers:
    """The budget of one gateway process, for all APIs together."""

    def __init__(self, bounds: AnswerBounds | None = None) -> None:
        self._bounds = bounds or AnswerBounds()
        self._held: Counter[str] = Counter()
        self.held = 0
        """Number of bytes that all answers hold."""
        self._waiting: dict[str, deque[object]] = {}
        self._freed = asyncio.Event()

    def answer(self, tenant: str, copies: int = 1, *, waits: bool = True) -> UnreadAnswer:
        """Return a context manager that counts one answer of a tenant. `copies`: number of copies that are in memory
        at once. `waits`: whether `hold` waits for room; False if the request has an answer that holds bytes already."""
        return UnreadAnswer(self, tenant, copies, waits)

    def has_room(self, tenant: str, size: int, own: int = 0) -> bool:
        """Return whether an answer of a tenant may hold `size` bytes. `own`: number of bytes that it holds now."""
        bounds = self._bounds
        others = self._held.get(tenant, 0) - own
        if others and others + size > bounds.tenant:
            return False
        rest = self.held - own
        return others + size <= bounds.guaranteed or not rest or rest + size <= bounds.process

    async def wait_for_room(self, tenant: str, size: int) -> None:
        """Wait until a tenant's answer may hold `size` bytes. Raises CallError if too many answers wait, or after
        `wait_s` seconds."""
        if tenant not in self._waiting and self.has_room(tenant, size):
            return
        place, waiting = object(), self._waiting.setdefault(tenant, deque())
        if len(waiting) >= self._bounds.waiting:
            raise _no_room()
        waiting.append(place)
        try:
            async with asyncio.timeout(self._bounds.wait_s):
                while waiting[0] is not place or not self.has_room(tenant, size):
                    await self._freed.wait()
        except TimeoutError:
            raise _no_room() from None
        finally:
            waiting.remove(place)
            if not waiting:
                del self._waiting[tenant]
            self._recheck()  # for the next one that waits

    def count(self, tenant: str, size: int) -> None:
        """Add `size` bytes, which may be negative, to those that a tenant's answers hold."""
        self.held += size
        self._held[tenant] += size
        if not self._held[tenant]:
            del self._held[tenant]
        if size < 0:
            self._recheck()

    def _recheck(self) -> None:
        """Let all answers that wait check again whether there is room."""
        self._freed.set()
        self._freed.clear()


class UnreadAnswer:
    """Context manager that counts one answer of a tenant until the end of the context. `size`: number of bytes that it
    holds."""

    __slots__ = ("_answers", "_copies", "_tenant", "_waits", "size")

    def __init__(self, answers: UnreadAnswers, tenant: str, copies: int, waits: bool) -> None:
        self._answers = answers
        self._tenant = tenant
        self._copies = copies
        self._waits = waits
        self.size = 0

    def __enter__(self) -> UnreadAnswer:
        return self

    def __exit__(self, *_: object) -> None:
        self.shrink(0)

    async def hold(self, size: int) -> None:
        """Wait for room, then hold `size` bytes. Raises CallError if there is none for too long. Must be called before
        the answer holds anything, and before its call holds a slot."""
        size *= self._copies
        if self._waits:
            await self._answers.wait_for_room(self._tenant, size)
        self.grow(size)

    def grow(self, size: int) -> None:
        """Hold at least `size` bytes. Raises CallError if there is no room."""
        if size > self.size:
            if not self._answers.has_room(self._tenant, size, self.size):
                raise _no_room()
            self._set(size)

    def shrink(self, size: int) -> None:
        """Hold at most `size` bytes."""
        if size < self.size:
            self._set(size)

    def _set(self, size: int) -> None:
        change, self.size = size - self.size, size
        self._answers.count(self._tenant, change)


def _no_room() -> CallError:
    return CallError(
        Outcome.RATE_LIMITED,
        "the answers of this tenant that have not been read fill the gateway's memory for them: read answers faster, "
        "send fewer calls at once, or ask for smaller answers (fewer inputs, or lower n, max_tokens or top_logprobs)",
    )
