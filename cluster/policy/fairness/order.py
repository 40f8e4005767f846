"""Interface between the waiting room and the order in which its sequences are sent.

Problem: the waiting room enforces bounds and deadlines. The order of the waiting sequences is a separate rule, and
there are several such rules.

Invariants: a sequence that is pushed or put back is removed once, by `mark_taken` or `remove`. `head` is one of the
waiting sequences.

`fair_queue.py` has the weighted fair order of tenants. The simulator also has an order that serves first come, first
served.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from cluster.api.frozen import frozen_dataclass


@dataclass(frozen=True, slots=True)
class HolderWait:
    """A sequence's wait for the worker that holds its prompt: that worker, and the wait so far in seconds."""

    worker_id: str
    wait_s: float


@frozen_dataclass
class WaitingSequence:
    """A sequence that waits for a worker.

    `tokens`: number of prompt tokens. `cached_tokens`: number of prompt tokens that are expected in the cache of a
    worker. `output_tokens`: expected number of output tokens. `arrived`: time of arrival. `deadline`: latest time for
    the start, or None. `rank`: rank of the priority class; rank 0 is served first and shed last. `needs_tools`: whether
    the worker must have a parser for tool calls. `affinity`: hash of the tenant and the affinity key, in [1, 2**64), or
    0 for none. `holder_wait`: how long the sequence has waited in vain for the worker that holds its prompt; None if it
    has not. `adapter`: digest of the adapter, or another name while the digest is unknown; "" for the base model.
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
    needs_tools: bool = False
    affinity: int = 0
    holder_wait: HolderWait | None = None
    adapter: str = ""


class Order(Protocol):
    """Order in which the waiting sequences of one model are sent. A call id is unique within one order."""

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a new sequence."""

    def put_back(self, waiting: WaitingSequence) -> None:
        """Put back a sequence that was sent and lost its worker.

        It is placed before all sequences that were never sent.
        """

    def replace(self, waiting: WaitingSequence) -> None:
        """Replace the entry of a waiting sequence by another with the same call id, class, tenant and tokens. It keeps
        its place. Raises KeyError for an unknown id."""

    def head(
        self, loss_of: Callable[[WaitingSequence], float] | None = None, passed: Collection[tuple[int, str]] = ()
    ) -> WaitingSequence | None:
        """Return the next sequence, or None if nothing waits. `loss_of(sequence)`: expected number of cached prompt
        tokens that must be computed again if the sequence is not sent now (warm_order.py). An order may prefer
        sequences with a greater loss. `passed`: ranks and tenants whose sequences are passed over."""

    def remove(self, call_id: str) -> None:
        """Remove a waiting sequence that will not be sent, such as a cancelled one. Raises KeyError for an unknown
        id."""

    def mark_taken(self, call_id: str, now: float) -> None:
        """Remove a waiting sequence because it is being sent to a worker. Raises KeyError for an unknown id."""

    def position(self, call_id: str) -> int:
        """Return the number of sequences that wait ahead of the sequence `call_id`. Sequences of other tenants may be
        left out of this number. Raises KeyError for an unknown id."""

    def slots_to_keep_free(self, waiting: WaitingSequence, beside: int = 0) -> int:
        """Return how many slots must stay free for other tenants if this waiting sequence is sent next. `beside`:
        number of the model's sequences that were taken and still wait for a certain worker."""
