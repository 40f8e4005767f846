"""Sequences that have lost their worker after their first token: they go on elsewhere before anybody begins.

Why a line of its own: such a sequence can go on only at a worker like the one that began it. In the waiting room it
would stand at the head and, while no such worker has room, keep back all who could go to any other. It had its turn
and was charged; so it asks nobody's leave, and the tenants' accounts hear nothing of it.

Invariant: whoever is in here has emitted a token, has no worker, and leaves by going on, by ending with its call, or
when it has waited too long. First come, first served within a class, the higher class first. `now` is an argument.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.gateway.calls.call import CallSequence

HOME_S = 0.1
"""So long a sequence waits for room where its KV blocks are before it is computed anew elsewhere: its places are free
there from the moment in which its gateway was lost, and told as soon as somebody asks for them."""


@dataclass(frozen=True, slots=True)
class _Place:
    sequence: CallSequence
    tokens: int
    home: str
    since: float
    until: float
    deadline: float


class ResumeQueue:
    """Of all models of one gateway."""

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._places: dict[str, dict[str, _Place]] = {}
        self._tokens: Counter[str] = Counter()
        self._kept: dict[str, Counter[str]] = {}

    def add(self, sequence: CallSequence, now: float, silent_since: float | None = None) -> None:
        """It waits from now on. `silent_since`: since when it has had neither a worker nor a token, now if None."""
        since = now if silent_since is None else silent_since
        deadline = math.inf if sequence.call.deadline is None else sequence.call.deadline
        self.remove(sequence)
        places = self._places.setdefault(sequence.call.model, {})
        places[sequence.key] = _Place(
            sequence, sequence.tokens, sequence.cached_on, now, since + self._max_wait_s, deadline
        )
        self._tokens[sequence.call.model] += sequence.tokens
        if sequence.cached_on:
            self._kept.setdefault(sequence.call.model, Counter())[sequence.cached_on] += 1

    def remove(self, sequence: CallSequence) -> bool:
        """It no longer waits; False when it did not."""
        model = sequence.call.model
        places = self._places.get(model, {})
        place = places.pop(sequence.key, None)
        if place is None:
            return False
        self._tokens[model] -= place.tokens
        if not places:
            del self._places[model], self._tokens[model]
        if place.home:
            kept = self._kept[model]
            kept[place.home] -= 1
            if not kept[place.home]:
                del kept[place.home]
        return True

    def in_order(self, model: str) -> Sequence[CallSequence]:
        """Those of a model, whose turn it is first."""
        places = self._places.get(model)
        if not places:
            return ()
        return sorted((place.sequence for place in places.values()), key=lambda sequence: sequence.call.rank)

    def expired(self, now: float, longer_s: Callable[[str], float] = lambda _: 0.0) -> Sequence[CallSequence]:
        """Take out those that have waited too long. `longer_s`: by so much longer those of a model may wait, but in all
        not longer than twice as long as others."""
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
        """Sequences of a model, and the tokens to compute for them."""
        places = self._places.get(model)
        return (len(places), self._tokens[model]) if places else (0, 0)

    def cached_counts(self, model: str) -> Mapping[str, int]:
        """How many of a model's sequences each worker has computed, by its incarnation."""
        return self._kept.get(model, {})

    def waits_for(self, sequence: CallSequence, now: float) -> str:
        """The incarnation at which it is to wait for room, "" when it has waited there for long enough."""
        place = self._places.get(sequence.call.model, {}).get(sequence.key)
        return place.home if place is not None and now < place.since + HOME_S else ""

    @property
    def models(self) -> Sequence[str]:
        """Those of which some wait."""
        return list(self._places)

    def __contains__(self, sequence: CallSequence) -> bool:
        return sequence.key in self._places.get(sequence.call.model, ())

    def __repr__(self) -> str:
        return f"Returning({ {model: len(places) for model, places in self._places.items()} })"
