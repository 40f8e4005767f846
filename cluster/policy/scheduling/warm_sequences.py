"""Expected loss if a waiting sequence is not sent now, for the order of policy/fairness/warm_order.py.

Suppose that a worker with room for a sequence holds tokens of its prompt in the KV cache. If another sequence is sent
first, the worker may evict these tokens, and they must be computed again. The loss is the number of these tokens times
the probability of the eviction. An engine evicts the least recently used blocks first, so this probability grows with
the wait. It is taken as proportional to 1 + wait / WAIT_S. In the simulation of loadtests/sim/sessions.py, this does
about as well as the true order of eviction, which a gateway does not know.

While all workers are full, the queues are read again and again, and only the free capacity of the workers changes fast.
So the free capacity is read for each decision. The workers that hold a prompt (its holders) are looked up at most once
in FRESH_S seconds. One decision looks up the holders of at most MAX_LOOKUPS prompts; for the other prompts it uses the
remembered holders.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from heapq import nlargest
from typing import Final, Protocol

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.warm_order import LossOf

WAIT_S: Final = 10.0
"""Wait in seconds that doubles the expected loss."""
FRESH_S: Final = 0.25
MAX_LOOKUPS: Final = 8
MAX_HOLDERS: Final = 4
"""Number of workers that are tried for a prompt: those that hold most of it. All workers may hold a common system
prompt, and trying each of them is not worth the time."""
MAX_PROMPTS: Final = 1024
"""Number of waiting sequences whose holders are remembered."""


class HolderView(Protocol):
    """The methods of workers.Workers that this module uses."""

    def held_tokens(self, model: str, key: str) -> Mapping[str, int]:
        """Return how many leading tokens of a waiting sequence's prompt the workers hold, by worker id."""

    def free_tokens(self, model: str, worker_id: str) -> int | None:
        """Return the number of tokens of the largest prompt that a worker can take now. 0: the worker is full. None:
        the worker is not linked, or no longer accepts new sequences."""


class WarmSequences:
    """Record of the workers that hold the prompts of a gateway's waiting sequences. Times are monotonic seconds."""

    def __init__(self, workers: HolderView) -> None:
        self._workers = workers
        self._known: OrderedDict[str, tuple[float, list[tuple[int, str]]]] = OrderedDict()
        """By call id: time of the lookup, and the holders as (held tokens, worker id), the most tokens first."""

    def loss_of(self, model: str, now: float) -> LossOf:
        """Return a function for one decision at the time `now`. It takes a waiting sequence of the model and returns
        the expected loss (prompt tokens to compute again) if this sequence is not sent now."""
        free: dict[str, int] = {}
        lookups = 0

        def loss(entry: WaitingSequence) -> float:
            nonlocal lookups
            known = self._known.get(entry.call_id)
            try:
                if lookups < MAX_LOOKUPS and (known is None or now - known[0] >= FRESH_S):
                    lookups += 1
                    known = self._look_up(entry, now)
                for tokens, worker_id in known[1] if known is not None else ():
                    if worker_id not in free:
                        free[worker_id] = self._workers.free_tokens(model, worker_id) or 0
                    if free[worker_id] >= entry.tokens:
                        return tokens * (1.0 + max(now - entry.arrived, 0.0) / WAIT_S)
            except Exception:  # must not hold up the queue; routing meets the same fault and ends this call alone
                return 0.0
            return 0.0

        return loss

    def _look_up(self, entry: WaitingSequence, now: float) -> tuple[float, list[tuple[int, str]]]:
        held = self._workers.held_tokens(entry.model, entry.call_id)
        holders = nlargest(MAX_HOLDERS, ((tokens, worker_id) for worker_id, tokens in held.items()))
        known = self._known[entry.call_id] = (now, holders)
        self._known.move_to_end(entry.call_id)
        while len(self._known) > MAX_PROMPTS:
            self._known.popitem(last=False)
        return known

    def __repr__(self) -> str:
        return f"WarmSequences({len(self._known)} prompts)"
