"""KV blocks that workers are expected to hold soon, because prompts with these blocks were sent to them.

All times are monotonic seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from cluster.policy.kv_cache.prefix_hashes import Hashes

COMPARED = 16
"""Largest number of expectations with which an expired one is compared. If many prompts share their first blocks, the
newest of them suffice: a block that only older ones include is no longer expected, a little too early."""


@dataclass(frozen=True, slots=True)
class _Expectation:
    until: float
    worker: int
    hashes: Hashes

    @property
    def key(self) -> tuple[int, int]:
        """Number of the worker, and hash of the first expected block."""
        return self.worker, int(self.hashes[0])


class ExpectedBlocks:
    """Expected blocks (KV blocks that a worker will soon have computed) of one model's workers, ordered by expiry. A
    worker is named by its number in the cache index."""

    def __init__(self) -> None:
        self._expectations: deque[_Expectation] = deque()
        self._alike: dict[tuple[int, int], deque[_Expectation]] = {}
        """The expectations of `_expectations`, keyed by worker number and hash of the first block."""

    @property
    def workers(self) -> Iterable[int]:
        """Numbers of the workers with expected blocks. A number may occur more than once."""
        return (worker for worker, _ in self._alike)

    def add(self, worker: int, hashes: Hashes, until: float) -> None:
        """Add the first blocks of a prompt, at least one. They are expected until the time `until`, which must not
        decrease from call to call."""
        expectation = _Expectation(until, worker, hashes)
        self._expectations.append(expectation)
        self._alike.setdefault(expectation.key, deque()).append(expectation)

    def is_due(self, now: float) -> bool:
        """Return whether any expected block has expired."""
        return bool(self._expectations) and self._expectations[0].until <= now

    def pop_due(self, now: float, at_most: int) -> Mapping[int, list[Hashes]]:
        """Forget the expected blocks of up to `at_most` expired prompts. Returns the blocks that are no longer
        expected, by worker number. A block may be in the answer more than once."""
        ended: dict[int, list[Hashes]] = {}
        while at_most and self.is_due(now):
            at_most -= 1
            expectation = self._expectations.popleft()
            ended.setdefault(expectation.worker, []).append(self._forget(expectation))
        return ended

    def _forget(self, expectation: _Expectation) -> Hashes:
        """Forget the expectation that a worker will hold the blocks of a prompt. Return the blocks of this prompt that
        none of the newest COMPARED other expectations for the worker includes.

        `expectation`: the oldest of all expectations for its worker with the same first block. It is compared with
        these expectations only, because prompts that share any block also share the first block.
        """
        others = self._alike[expectation.key]
        others.popleft()
        if not others:
            del self._alike[expectation.key]
        hashes, shared = expectation.hashes, 0
        for other in islice(reversed(others), COMPARED):
            if shared == len(hashes):
                break
            alike = hashes[: len(other.hashes)] == other.hashes[: len(hashes)]
            shared = max(shared, len(alike) if alike.all() else int(alike.argmin()))
        return hashes[shared:]
