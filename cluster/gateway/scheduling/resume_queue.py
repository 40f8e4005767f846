"""Queue of sequences that lost their worker after their first token. These sequences are sent before all new sequences.

A separate queue is needed because such a sequence can resume only on a compatible worker. At the head of the waiting
room the sequence would block other sequences, which could be sent to any other worker. A sequence to be resumed was
charged when it was first sent, so neither the fair queue nor the service accounts are involved again.

Invariant: a sequence in the queue has emitted a token and has no worker. The sequence leaves the queue when it resumes,
when its call ends or when it has waited too long. Order: the higher class first, first come first served within a
class. `now` is an argument."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.gateway.calls.call import CallSequence

HOME_S = 0.1
"""Seconds that a sequence waits for capacity on the worker that holds its KV blocks. After that time another worker may
compute the sequence again. The slot on the first worker has been free since the sequence's gateway was lost, and is
granted as soon as a gateway claims the slot."""


@dataclass(frozen=True, slots=True)
class _Place:
    sequence: CallSequence
    tokens: int
    cached_on: str
    since: float
    until: float
    deadline: float


class ResumeQueue:
    """The resume queue of one gateway, for all models."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._places: dict[str, dict[str, _Place]] = {}
        self._tokens: Counter[str] = Counter()
        self._cached_counts: dict[str, Counter[str]] = {}

    def add(self, sequence: CallSequence, now: float, silent_since: float | None = None) -> None:
        """Queue a sequence. `silent_since`: time since when the sequence has had neither a worker nor a token; None
        means `now`."""
        since = now if silent_since is None else silent_since
        deadline = math.inf if sequence.call.deadline is None else sequence.call.deadline
        self.remove(sequence)
        places = self._places.setdefault(sequence.call.model, {})
        places[sequence.key] = _Place(
            sequence, sequence.tokens, sequence.cached_on, now, since + self._max_wait_s, deadline
        )
        self._tokens[sequence.call.model] += sequence.tokens
        if sequence.cached_on:
            self._cached_counts.setdefault(sequence.call.model, Counter())[sequence.cached_on] += 1

    def remove(self, sequence: CallSequence) -> bool:
        """Remove a sequence. Returns False if the sequence was not queued."""
        model = sequence.call.model
        places = self._places.get(model, {})
        place = places.pop(sequence.key, None)
        if place is None:
            return False
        self._tokens[model] -= place.tokens
        if not places:
            del self._places[model], self._tokens[model]
        if place.cached_on:
            counts = self._cached_counts[model]
            counts[place.cached_on] -= 1
            if not counts[place.cached_on]:
                del counts[place.cached_on]
        return True

    def in_order(self, model: str) -> Sequence[CallSequence]:
        """Return the sequences of a model, the next sequence first."""
        places = self._places.get(model)
        if not places:
            return ()
        return sorted((place.sequence for place in places.values()), key=lambda sequence: sequence.call.rank)

    def expired(self, now: float, longer_s: Callable[[str], float] = lambda _: 0.0) -> Sequence[CallSequence]:
        """Remove and return the sequences that have waited too long. `longer_s(model)` extends the longest wait for a
        model's sequences, at most to twice the usual longest wait."""
        longest_s = {model: min(longer_s(model), self._max_wait_s) for model in self._places}
        gone = [
            place.sequence
            for model, places in self._places.items()
            for place in places.values()
            if min(place.until + longest_s[model], place.deadline) <= now
        ]
        for sequence in gone:
            self.remove(sequence)
        return gone

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's sequences, and the number of tokens to compute for these sequences."""
        places = self._places.get(model)
        return (len(places), self._tokens[model]) if places else (0, 0)

    def cached_counts(self, model: str) -> Mapping[str, int]:
        """Return, by worker incarnation, the number of a model's queued sequences whose KV blocks that worker holds."""
        return self._cached_counts.get(model, {})

    def waits_for(self, sequence: CallSequence, now: float) -> str:
        """Return the incarnation of the worker for which the sequence must wait; "" if the sequence may now be sent to
        any worker."""
        place = self._places.get(sequence.call.model, {}).get(sequence.key)
        return place.cached_on if place is not None and now < place.since + HOME_S else ""

    @property
    def models(self) -> Sequence[str]:
        """Names of the models with sequences in the queue."""
        return list(self._places)

    def __contains__(self, sequence: CallSequence) -> bool:
        return sequence.key in self._places.get(sequence.call.model, ())

    def __repr__(self) -> str:
        return f"ResumeQueue({ {model: len(places) for model, places in self._places.items()} })"
