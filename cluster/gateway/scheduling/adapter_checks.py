"""A check of all queued sequences that use an adapter. It begins after each change of the adapters and runs in slices.

Problem: while a thousand adapters are loaded on many workers, there are many changes a second, and twenty thousand
sequences may be queued. Invariants: a slice has at most MOST sequences. A change is followed immediately by at most one
slice; the further slices follow one by one, one in each period of the scheduler's upkeep. After the last change, every
sequence is checked once more. A sequence that is not checked yet waits as if nothing had changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from cluster.api.outcomes import CallError
from cluster.gateway.calls.call import CallSequence
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.models.adapters import name_of
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling import queue_errors
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.worker_caches import WorkerCaches

MOST: Final = 1024
"""Maximum number of sequences in one slice. Checking so many takes about 4 ms."""


class AdapterChecks:
    """Runs the function `check` on each queued sequence that uses an adapter, after each change of the adapters. The
    checks run in slices of at most `most` sequences, so that they never block the event loop for long."""

    def __init__(
        self, queued: Callable[[], Sequence[CallSequence]], check: Callable[[CallSequence], None], most: int = MOST
    ) -> None:
        """`queued`: returns the queued sequences. `check`: the function to run on each queued sequence that uses an
        adapter. `most`: maximum number of sequences in a slice, that is, without a pause for other tasks."""
        self._queued = queued
        self._check = check
        self._most = most
        self._left: list[CallSequence] = []
        """The sequences that are still to be checked, in reverse order."""
        self._is_stale = False

    def changed(self) -> None:
        """Check all queued sequences after a change of the adapters: the first slice now, the other slices a little
        later. If checks after an earlier change are still running, they are finished first."""
        self._is_stale = True
        if not self._left:
            self.go_on()

    def go_on(self) -> None:
        """Check the next slice of the queued sequences that use an adapter. Called a few times a second."""
        if self._is_stale and not self._left:
            self._is_stale = False
            self._left = [sequence for sequence in self._queued() if sequence.call.adapter]
            self._left.reverse()
        some = self._left[-self._most :]
        del self._left[-self._most :]
        for sequence in reversed(some):
            if sequence.state is State.QUEUED and sequence.call.error is None:
                self._check(sequence)


class QueuedAdapters:
    """Applies a change of the adapters to queued sequences."""

    def __init__(self, queues: Queues, caches: WorkerCaches, find: Callable[[str], KnownModel | None]) -> None:
        """`find` returns a model by name."""
        self._queues = queues
        self._caches = caches
        self._find = find

    def check(self, sequence: CallSequence) -> None:
        """End the call of a sequence if its adapter was removed, if no worker could load it, or if it was replaced
        after another sequence of the call had begun. Otherwise update the adapter's key in the sequence."""
        call, model = sequence.call, self._find(sequence.call.model)
        if model is None:
            return
        try:
            if (refused := queue_errors.not_servable(model, call.adapter)) is not None:
                call.fail(refused)
            elif (key := current_adapter(sequence, model)) is not None:
                self._queues.set_adapter(sequence, key)
                self._caches.forget_prompt(sequence.key)
        except CallError as error:
            call.fail(error)
        except Exception as error:
            call.fail_unexpectedly(error)


def current_adapter(sequence: CallSequence, model: KnownModel) -> str | None:
    """Return the key that a queued sequence's adapter now has; None if the sequence keeps its old key. A sequence keeps
    its key in four cases: the adapter's key has not changed, the sequence has output, a worker takes calls for the old
    key, or the adapter was removed.

    Raises CallError if another sequence of the call has begun with a key for which no worker takes calls any longer:
    outputs of different weights must not be mixed.
    """
    now, adapters, name = sequence.request.adapter, model.adapters, sequence.call.adapter
    key = adapters.key(name)
    if not now or now == key or sequence.emitted or adapters.is_ready(now) or adapters.find(name) is None:
        return None
    begun = begun_adapter(sequence)
    if begun in ("", key) or name_of(begun):  # the digest of its files was not known
        return key
    if begun != now and adapters.is_ready(begun):
        return begun
    raise queue_errors.adapter_replaced(sequence.call.shown_model)


def begun_adapter(sequence: CallSequence) -> str:
    """Return the key of the adapter with which another sequence of the same call has begun; "" if none has begun."""
    for other in sequence.call.sequences:
        if other is not sequence and (other.emitted or other.link is not None or other.finish_reason):
            return other.request.adapter
    return ""
