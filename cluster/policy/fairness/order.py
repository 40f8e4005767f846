"""Interface between the waiting room and an ordering rule.

Problem: the waiting room enforces bounds and deadlines; which waiting sequence is next is a separate question with
several answers.

Invariants: a sequence that is pushed or put back is removed once, by `taken` or `remove`; `head` is one of those that
wait.

`fair_queue.py` has the weighted fair order of tenants; the simulator has first come, first served beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class WaitingSequence:
    """A waiting sequence. `tokens` counts its prompt tokens; `deadline` and `arrived` are times, `deadline` None means
    none.

    `rank` is that of its priority class; rank 0 is served first and shed last. `cached_tokens` of the prompt are
    expected in a worker's cache; `output_tokens` is the expected output.
    """

    call_id: str
    model: str
    tenant: str
    tokens: int
    deadline: float | None
    priority_class: str
    arrived: float
    rank: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Order(Protocol):
    """Order of the sequences that wait for one model. Call ids are unique within it."""

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a sequence."""

    def put_back(self, waiting: WaitingSequence) -> None:
        """Insert a sequence that lost its worker before all those that have not had their turn."""

    def head(self) -> WaitingSequence | None:
        """The next sequence; None if nothing waits."""

    def remove(self, call_id: str) -> None:
        """Remove a sequence that has not had its turn. Raises KeyError for an unknown id."""

    def mark_taken(self, call_id: str, now: float) -> None:
        """Remove a sequence that has its turn. Raises KeyError for an unknown id."""

    def position(self, call_id: str) -> int:
        """Number of sequences ahead, as far as its tenant may know. Raises KeyError for an unknown id."""
