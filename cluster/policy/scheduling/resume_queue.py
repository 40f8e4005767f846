"""Queue of sequences that lost their worker after their first token. These sequences are sent before all new sequences.

Such a sequence can resume only on a compatible worker, so it needs a separate queue. At the head of the waiting room,
it would hold back new sequences that other workers could run. Its tenant was charged when the sequence was first sent,
so the fair queue and the service accounts are not involved again.

Invariant: a sequence in the queue has emitted a token and has no worker. The sequence leaves the queue when it resumes,
when its call ends or when it has waited too long. Order: higher classes first; first come, first served within a class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.policy.scheduling.instructions import ResumingSequence

CACHED_WORKER_WAIT_S = 0.1
"""Seconds that a sequence waits for capacity on the worker that holds its KV blocks. After that time another worker may
compute the sequence again. A short wait suffices: if a gateway was lost, its slots on the worker are free, and the
worker grants them as soon as another gateway claims them."""


@dataclass(frozen=True, slots=True)
class _Place:
    sequence: ResumingSequence
    since: float
    until: float
    deadline: float


class ResumeQueue:
    """Queue of the sequences of one gateway that lost their worker and wait to resume, for all models."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._models: dict[str, str] = {}
        self._places: dict[str, dict[str, _Place]] = {}
        self._tokens: Counter[str] = Counter()
        self._cached_counts: dict[str, Counter[str]] = {}

    def add(self, sequence: ResumingSequence, now: float) -> None:
        """Queue a sequence. A sequence that is queued already is replaced."""
        model, since = sequence.model, now if sequence.silent_since is None else sequence.silent_since
        self.remove(sequence.key)
        self._models[sequence.key] = model
        deadline = math.inf if sequence.entry.deadline is None else sequence.entry.deadline
        place = _Place(sequence, now, since + self._max_wait_s, deadline)
        self._places.setdefault(model, {})[sequence.key] = place
        self._tokens[model] += sequence.tokens
        if sequence.cached_on:
            self._cached_counts.setdefault(model, Counter())[sequence.cached_on] += 1

    def acquit(self, key: str) -> None:
        """Record that a queued sequence did not cause the loss of its workers. It is no longer suspect."""
        places = self._places[self._models[key]]
        place = places[key]
        places[key] = replace(place, sequence=replace(place.sequence, suspect=False, lost_links=()))

    def remove(self, key: str) -> bool:
        """Remove a sequence. Returns False if the sequence was not queued."""
        model = self._models.pop(key, None)
        if model is None:
            return False
        places = self._places[model]
        sequence = places.pop(key).sequence
        self._tokens[model] -= sequence.tokens
        if not places:
            del self._places[model], self._tokens[model]
        if sequence.cached_on:
            counts = self._cached_counts[model]
            counts[sequence.cached_on] -= 1
            if not counts[sequence.cached_on]:
                del counts[sequence.cached_on]
        return True

    def get(self, key: str) -> ResumingSequence | None:
        """Return a queued sequence; None if no sequence with this key is queued."""
        model = self._models.get(key)
        return None if model is None else self._places[model][key].sequence

    def in_order(self, model: str) -> Sequence[ResumingSequence]:
        """Return the sequences of a model, the next sequence first."""
        places = self._places.get(model)
        if not places:
            return ()
        return sorted((place.sequence for place in places.values()), key=lambda sequence: sequence.entry.rank)

    def expired(self, now: float, longer_s: Callable[[str], float] = lambda _: 0.0) -> Sequence[str]:
        """Remove the sequences that have waited too long, and return their keys. A sequence may wait `max_wait_s` and
        the additional `longer_s(model)` seconds of its model. More than `max_wait_s` additional seconds are not
        granted."""
        longest_s = {model: min(longer_s(model), self._max_wait_s) for model in self._places}
        gone = [
            key
            for model, places in self._places.items()
            for key, place in places.items()
            if min(place.until + longest_s[model], place.deadline) <= now
        ]
        for key in gone:
            self.remove(key)
        return gone

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's sequences that wait in this queue, and the number of tokens to compute for
        these sequences."""
        places = self._places.get(model)
        return (len(places), self._tokens[model]) if places else (0, 0)

    def cached_counts(self, model: str) -> Mapping[str, int]:
        """Return how many of a model's queued sequences have their KV blocks on each worker, by the worker's
        incarnation."""
        return self._cached_counts.get(model, {})

    def waits_for(self, key: str, now: float) -> str:
        """Return the incarnation of the worker for which the sequence must still wait; "" if it may be sent to any
        worker."""
        model = self._models.get(key)
        if model is None:
            return ""
        place = self._places[model][key]
        return place.sequence.cached_on if now < place.since + CACHED_WORKER_WAIT_S else ""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models with sequences in the queue."""
        return list(self._places)

    def __len__(self) -> int:
        return sum(map(len, self._places.values()))

    def __contains__(self, key: str) -> bool:
        return key in self._models

    def __repr__(self) -> str:
        return f"ResumeQueue({ {model: len(places) for model, places in self._places.items()} })"
