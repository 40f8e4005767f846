"""Tests of RoutedSequence: the request that it sends to its next worker, and the requests that it aborts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from cluster.api.types import CompatibilityKey, EngineRequest, Sampling
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.calls.sequences.routed_sequence import RoutedSequence
from cluster.gateway.links.worker_link import WorkerLink

KEY = CompatibilityKey("weights", "bundle", "class")


@dataclass
class Owner:
    """Stub of a call that has only an id."""

    id: str = "cmpl-1"


@dataclass
class Identity:
    """Stub of a worker's identity."""

    incarnation: str = "w1"


@dataclass
class Link:
    """A link that collects the aborted slots."""

    identity: Identity = field(default_factory=Identity)
    compatibility_key: CompatibilityKey = KEY
    unseeded_key: CompatibilityKey = KEY.unseeded
    aborted: list[int] = field(default_factory=list)

    def abort(self, slot: int) -> None:
        """Record that the request in this slot was aborted."""
        self.aborted.append(slot)


def sequence(emitted: Sequence[int] = (), seed: int | None = None) -> RoutedSequence[Owner]:
    """Return a sequence with a prompt of three tokens."""
    request = EngineRequest("", [1, 2, 3], Sampling(max_tokens=8, temperature=1.0, seed=seed))
    one = RoutedSequence(Owner(), 2, request)
    one.emitted += emitted
    return one


def bound(one: RoutedSequence[Owner], slot: int = 7) -> Link:
    """Send a sequence on a new link and return the link."""
    link = Link()
    one.bind(cast(WorkerLink, link), slot)
    return link


def test_a_submission_has_the_emitted_tokens() -> None:
    """The request of a sequence without tokens is sent unchanged. Later requests include the tokens emitted so far."""
    fresh, begun = sequence(), sequence([4, 5])
    assert fresh.submission() is fresh.request
    assert begun.submission().emitted_token_ids == (4, 5)
    assert (fresh.key, fresh.tokens, begun.tokens) == ("cmpl-1#2", 3, 5)


@pytest.mark.parametrize(("seed", "expected"), [(11, KEY), (None, KEY.unseeded)])
def test_the_first_worker_decides_the_compatibility_key(seed: int | None, expected: CompatibilityKey) -> None:
    """A sequence keeps the compatibility key of its first worker. The engine class is in the key only if the sequence
    is seeded."""
    one = sequence(seed=seed)
    bound(one)
    assert (one.state, one.life.last_worker, one.life.compatibility) == (State.SENT, "w1", expected)


def test_a_sequence_with_tokens_keeps_its_compatibility_key() -> None:
    """A worker that continues a sequence does not change the sequence's key."""
    one = sequence([4])
    one.life.restore("w0", CompatibilityKey("other", "bundle", "class"), 1)
    bound(one)
    assert one.life.compatibility == CompatibilityKey("other", "bundle", "class")


def test_an_ended_sequence_is_aborted_once() -> None:
    """The end of a sequence aborts its slot at the worker once. A second end does nothing."""
    one = sequence()
    link = bound(one)
    one.end()
    one.end()
    assert (link.aborted, one.link, one.state) == ([7], None, State.FAILED)


def test_a_finished_sequence_keeps_its_state_at_the_end_of_the_call() -> None:
    """A finished sequence keeps its state and finish reason when its call ends."""
    one = sequence([4])
    one.finish("stop")
    one.end()
    assert (one.finish_reason, one.state) == ("stop", State.DONE)
