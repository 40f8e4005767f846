"""Order within the queue of one tenant: a sequence whose prompt is in a worker's KV cache may be sent before older
sequences.

Problem: while calls wait, the workers evict the KV blocks of prompts that will soon be sent. If sequences are sent in
the order of arrival, each goes to whichever worker has room. That worker seldom holds the blocks of the sequence's
prompt, so the prompt is computed again.

Method: among the tenant's first MAX_CHOICES sequences, the one with the greatest expected loss is sent first. The loss
is the number of cached tokens that would have to be computed again after an eviction, times the probability of the
eviction. The caller passes a function that computes the loss (policy/scheduling/warm_sequences.py).

Invariants: the tenant is chosen first, and then a sequence of its queue. So the order within a queue does not change
how service is shared among tenants, and two bounds hold as with any other order. (1) While two tenants wait, their
service counters differ by at most the largest charge divided by its tenant's weight, plus the corrections of charges
whose predictions were wrong. (2) Let a tenant A wait all the time. Between one turn of A and its next turn, another
tenant B is served at most as much as A was charged in the first of these turns, plus one charge of B.

The first sequence of a queue is overtaken at most MAX_OVERTAKEN times. So a sequence with p sequences ahead is sent in
one of the next (p + 1) * (MAX_OVERTAKEN + 1) turns of its tenant. Only the chosen sequence may be sent: if it fits on
no worker, all others wait.

Source: the bound on the counters comes from VTC (Sheng et al., OSDI 2024), whose proof allows any order within a
tenant. Choosing a sequence by the place of its data is the idea of delay scheduling (Zaharia et al., EuroSys 2010).
Unlike in delay scheduling, no turn is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.service_counters import Flow

MAX_CHOICES: Final = 16
"""Number of sequences at the head of a queue among which one is chosen."""
MAX_OVERTAKEN: Final = 8
"""Number of turns in a row in which the first sequence of a queue may be overtaken."""

LossOf = Callable[[WaitingSequence], float]
"""Function that returns the expected loss if a sequence is not sent now, at least 0. Only the order of the losses
matters."""


def next_of(flow: Flow, loss_of: LossOf) -> WaitingSequence | None:
    """Return the sequence to send when it is the turn of this flow (the queue of one tenant); None if nothing
    waits.

    `loss_of` returns how much is lost if a sequence is not sent now. Among the first MAX_CHOICES sequences,
    the one with the greatest loss is returned; of equal losses, the first one. The first sequence is returned
    without a call of `loss_of` if only one waits, or if it was overtaken MAX_OVERTAKEN times.
    """
    if len(flow) < 2 or flow.overtaken >= MAX_OVERTAKEN:
        return flow.head()
    return max(flow.first(MAX_CHOICES), key=loss_of)
