"""The queued calls for adapters, looked at again after each change of the adapters.

Problem: while a thousand adapters are loaded on many workers, there are many changes a second, and twenty thousand
sequences may be queued. Invariants: at most MOST sequences are looked at for one change and in one turn of the
scheduler's clock; after the last change, every sequence is looked at once more. Sequences that are not looked at yet
wait on, as before the change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from cluster.gateway.calls.call import CallSequence
from cluster.gateway.calls.sequences.life import State

MOST: Final = 1024
"""Maximum number of sequences that are looked at together, which takes about 4 ms."""


class AdapterChecks:
    """The sequences that are still to be looked at since the adapters have changed."""

    def __init__(
        self, queued: Callable[[], Sequence[CallSequence]], check: Callable[[CallSequence], None], most: int = MOST
    ) -> None:
        """`queued` returns the queued sequences; `check` looks at one of them."""
        self._queued = queued
        self._check = check
        self._most = most
        self._left: list[CallSequence] = []
        self._is_stale = False

    def changed(self) -> None:
        """Look at the first sequences, unless a change before is not done with: then all follow after it."""
        self._is_stale = True
        if not self._left:
            self.go_on()

    def go_on(self) -> None:
        """Look at the next sequences. Called a few times a second."""
        if self._is_stale and not self._left:
            self._is_stale = False
            self._left = [sequence for sequence in self._queued() if sequence.call.adapter]
            self._left.reverse()
        some = self._left[-self._most :]
        del self._left[-self._most :]
        for sequence in reversed(some):
            if sequence.state is State.QUEUED and sequence.call.error is None:
                self._check(sequence)
