"""Which set of adapters counts, of those that several gateways send.

Problem: gateways learn of a new catalog at different times, and one that lags behind, or ends, must not take back what
another has sent. Invariant: of the sets that connected gateways have sent last, the one with the highest revision
counts, and it stays in effect until a gateway sends another set. So a controller that counts anew is followed once all
gateways have its catalog.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class DesiredSet(Generic[T]):
    """The set that counts: its `revision` and its `value`, which is `initial` before the first one."""

    def __init__(self, initial: T) -> None:
        self.revision = -1
        self.value = initial
        self._sent: dict[Hashable, tuple[int, T]] = {}

    def receive(self, sender: Hashable, revision: int, value: T) -> bool:
        """Record what a gateway has sent; return whether the set that counts has changed."""
        self._sent[sender] = (revision, value)
        before = (self.revision, self.value)
        self.revision, self.value = max(self._sent.values(), key=lambda sent: sent[0])
        return before != (self.revision, self.value)

    def forget(self, sender: Hashable) -> None:
        """Forget a gateway that is no longer connected. The set that counts stays."""
        self._sent.pop(sender, None)
