"""The workers of one model, read at most once while a batch of resumed sequences is assigned.

Problem: a model may have a thousand workers. Reading or checking all of them for each sequence takes milliseconds.

Method: the workers are read once. After a sequence is sent, only the worker that got the sequence is read again. If
there are many workers, only a sample is checked; the best of a few is nearly as good as the best of all (Mitzenmacher
2001).
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.policy.routing.rendezvous import hash64
from cluster.policy.routing.router import Candidate
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.resume_route import suits
from cluster.policy.scheduling.workers import Workers

LOOKED_AT = 64
"""Number of workers that are looked at for a sample."""
MAX_SAMPLE = 8
"""Largest number of suitable workers in a sample."""


class WorkersView:
    """Cache of the state of one model's workers. It must be used for only one batch of sequences, because it does not
    follow later changes."""

    def __init__(self, workers: Workers, model: str, now: float) -> None:
        self._workers = workers
        self._model = model
        self._now = now
        self._read: Sequence[Candidate] | None = None
        self._changed: dict[str, Candidate | None] = {}
        """Workers that were read again, by incarnation; None if the worker has left."""
        self._single: dict[str, Candidate | None] = {}
        self._with_suspect: dict[str, bool] = {}
        """Whether a worker runs a suspect sequence, by incarnation."""

    def _candidates(self) -> Sequence[Candidate]:
        if self._read is None:
            self._read = self._workers.candidates(self._model, self._now, resumed=True)
        return self._read

    def __len__(self) -> int:
        return len(self._candidates())

    def all(self) -> Sequence[Candidate]:
        """All workers of the model."""
        if not self._changed:
            return self._candidates()
        newest = (self._changed.get(worker.incarnation, worker) for worker in self._candidates())
        return [worker for worker in newest if worker is not None]

    def sample(self, sequence: ResumingSequence, now: float) -> Sequence[Candidate]:
        """Return up to MAX_SAMPLE workers that suit a sequence. Only LOOKED_AT consecutive workers are checked, from a
        position that depends on a hash of the sequence's key."""
        workers, found = self._candidates(), list[Candidate]()
        start = hash64(sequence.key)
        for step in range(min(LOOKED_AT, len(workers))):
            read = workers[(start + step) % len(workers)]
            worker = self._changed.get(read.incarnation, read)
            if worker is not None and suits(sequence, worker, now):
                found.append(worker)
                if len(found) == MAX_SAMPLE:
                    break
        return found

    def one(self, incarnation: str) -> Candidate | None:
        """Return the worker with this incarnation, if it is linked and serves the model; otherwise None."""
        if incarnation not in self._single:
            self._single[incarnation] = self._workers.candidate(self._model, incarnation, self._now)
        return self._single[incarnation]

    def runs_suspect(self, worker: Candidate) -> bool:
        """Return whether a worker runs a suspect sequence (one that may have crashed its earlier workers)."""
        if worker.incarnation not in self._with_suspect:
            self._with_suspect[worker.incarnation] = self._workers.runs_suspect(self._model, worker.incarnation)
        return self._with_suspect[worker.incarnation]

    def refresh(self, worker: Candidate, is_suspect: bool) -> None:
        """Update this view of a worker after a sequence was sent to the worker. `is_suspect`: whether this sequence may
        have crashed its earlier workers."""
        self._single.pop(worker.incarnation, None)
        if is_suspect:
            self._with_suspect[worker.incarnation] = True
        if self._read is not None:
            self._changed[worker.incarnation] = self.one(worker.incarnation)
