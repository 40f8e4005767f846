"""Choice of the desired set of adapters among the sets that several gateways send to a worker.

Problem: gateways learn of a new catalog at different times. A gateway that lags behind or ends must not undo what
another gateway has sent.

Rule: when a gateway sends a set, the worker compares the last set of each connected gateway. The set with the highest
revision becomes the desired set. Nothing else changes the desired set, not even the end of a gateway. So if a
controller starts its revisions from the beginning again, its set becomes the desired set once all gateways have sent
it.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class DesiredSet(Generic[T]):
    """The set of adapters that a worker should have: its `revision` and its `value`, which is `initial` before the
    first set is received."""

    def __init__(self, initial: T) -> None:
        self.revision = -1
        self.value = initial
        self._sent: dict[Hashable, tuple[int, T]] = {}

    def receive(self, sender: Hashable, revision: int, value: T) -> bool:
        """Record the set that a gateway has sent; return whether the desired set has changed."""
        self._sent[sender] = (revision, value)
        before = (self.revision, self.value)
        self.revision, self.value = max(self._sent.values(), key=lambda sent: sent[0])
        return before != (self.revision, self.value)

    def forget(self, sender: Hashable) -> None:
        """Forget a gateway that is no longer connected. The desired set stays."""
        self._sent.pop(sender, None)
