"""Interface between the waiting room and an ordering rule.

Problem: the waiting room enforces bounds and deadlines. The order of the waiting sequences is a separate rule, and
there are several such rules.

Invariants: a sequence that is pushed or put back is removed once, by `mark_taken` or `remove`. `head` is one of the
waiting sequences.

`fair_queue.py` has the weighted fair order of tenants. The simulator also has an order that serves first come, first
served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cluster.api.frozen import frozen_dataclass


@dataclass(frozen=True, slots=True)
class HolderWait:
    """The wait of a sequence for the worker that holds its prompt; see policy/scheduling/set_aside.py."""

    worker_id: str
    wait_s: float


@frozen_dataclass
class WaitingSequence:
    """Sequence that waits for a worker.

    `tokens` is the number of prompt tokens. `cached_tokens` is the number of prompt tokens that are expected in the
    cache of a worker. `output_tokens` is the expected number of output tokens. `deadline` and `arrived` are times;
    `deadline` is None without a deadline. `rank` is the rank of the priority class; rank 0 is served first and shed
    last. `needs_tools`: whether the worker must have a parser for tool calls. `affinity`: hash of the tenant and the
    affinity key, in [1, 2**64), or 0 for none. `holder_wait`: how long the sequence has waited in vain for the worker
    that holds its prompt; None if it has not. `adapter`: see RouteCall.
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
    """Order of the sequences that wait for one model. A call id is unique within one order."""

    def push(self, waiting: WaitingSequence, now: float = 0.0) -> None:
        """Append a sequence."""

    def put_back(self, waiting: WaitingSequence) -> None:
        """Put back a sequence that was taken and lost its worker.

        The sequence is placed before all sequences that were never taken.
        """

    def head(self, loss_of: Callable[[WaitingSequence], float] | None = None) -> WaitingSequence | None:
        """The next sequence, or None if nothing waits. `loss_of(sequence)`: expected loss if the sequence is not sent
        now (warm_order.py); an order may prefer sequences by their loss."""

    def remove(self, call_id: str) -> None:
        """Remove a waiting sequence that will not be sent, such as a cancelled one. Raises KeyError for an unknown
        id."""

    def mark_taken(self, call_id: str, now: float) -> None:
        """Remove a waiting sequence because it is sent to a worker. Raises KeyError for an unknown id."""

    def position(self, call_id: str) -> int:
        """Number of sequences ahead. An order may leave out other tenants' sequences. Raises KeyError for an unknown
        id."""

    def slots_to_keep_free(self, waiting: WaitingSequence) -> int:
        """Number of slots that must stay free for other tenants when this waiting sequence takes its turn."""
