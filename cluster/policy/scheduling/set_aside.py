"""New sequences that have left their queue and wait for the worker that holds their prompt in its KV cache.

Problem: the worker that holds a prompt often has no free credit (granted capacity) for a moment, since it admits few
prompts at a time. Another worker would have to compute the prompt again, and would evict other blocks. If the sequence
waited at the head of its queue, it would hold back all sequences behind it.

Method: when its turn comes, such a sequence is set aside, and the next sequence takes its turn. The fair order of
tenants counts a sequence that is set aside as sent. Once the worker has room, the sequences that wait for it are sent
in the order of their turns, before those in the queue.

A sequence waits for the worker with the lowest cost (cost.py) on two conditions. First, the cost of this worker is
lower than that of the best worker with room. Second, the first token from this worker is expected earlier than from the
best worker with room, or within the time in which a usual worker computes CostWeights.patience prompt tokens. For both
conditions, the sequences that are set aside for a worker count as if they were sent to it.

Invariants: a sequence that is set aside holds back no other call. A sequence is set aside at most once, for at most
MAX_WAIT_S, and only while the worker takes new sequences. After that, it is sent to any worker, or returns to the head
of its queue. At most MAX_PER_MODEL sequences of a model are set aside.

Source: delay scheduling (Zaharia et al., EuroSys 2010). Here the wait is bounded in work, not in skipped turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.policy.fairness.order import HolderWait, WaitingSequence
from cluster.policy.routing.router import FullHolder, RouteCall

MAX_WAIT_S: Final = 5.0
MAX_PER_MODEL: Final = 64


@dataclass(frozen=True, slots=True)
class Aside:
    """A sequence that is set aside. `entry`: the sequence as it waited in the queue. `call`: its routing request.
    `worker_id`: the worker for which it waits.

    `uncached`: number of prompt tokens that this worker must compute. `since` and `until`: monotonic times in seconds;
    the wait began at `since` and must end at `until`.
    """

    entry: WaitingSequence
    call: RouteCall
    worker_id: str
    uncached: float
    since: float
    until: float

    def wait(self, now: float) -> HolderWait:
        """Return the worker for which the sequence waits, and how long it has waited at the time `now`."""
        return HolderWait(self.worker_id, now - self.since)


@dataclass(slots=True)
class _Before:
    """Totals of the sequences that wait for one worker: their number, and the prompt tokens that the worker must
    compute for them."""

    count: int = 0
    uncached: float = 0.0


class SetAside:
    """Sequences of one gateway that are set aside: each has left its queue and waits for the worker that holds its
    prompt. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._by_key: dict[str, Aside] = {}
        self._by_model: dict[str, dict[str, Aside]] = {}
        self._before: dict[tuple[str, str], _Before] = {}
        """Totals of the sequences that wait for each worker, keyed by model and worker id."""

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def __len__(self) -> int:
        return len(self._by_key)

    def __repr__(self) -> str:
        return f"SetAside({len(self)} sequences)"

    @property
    def models(self) -> Collection[str]:
        """Names of the models with sequences that are set aside."""
        return tuple(self._by_model)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's sequences that are set aside, and the sum of their prompt tokens."""
        asides = self._by_model.get(model, {}).values()
        return len(asides), sum(aside.entry.tokens for aside in asides)

    def count(self, model: str) -> int:
        """Return the number of a model's sequences that are set aside."""
        return len(self._by_model.get(model, ()))

    def counts(self, model: str) -> Mapping[str, int]:
        """Return the number of a model's sequences that are set aside, by the id of the worker for which they wait."""
        return Counter(aside.worker_id for aside in self._by_model.get(model, {}).values())

    def best(self, entry: WaitingSequence, holders: Iterable[FullHolder]) -> FullHolder | None:
        """Return the worker for which a sequence should wait; None if it should not wait. `holders`: workers that hold
        the sequence's prompt but have no room."""
        if entry.holder_wait is not None or self.count(entry.model) >= MAX_PER_MODEL:
            return None
        most, best = 0.0, None
        for holder in holders:
            gain, wait = holder.gain, holder.wait
            if (before := self._before.get((entry.model, holder.worker_id))) is not None:
                ahead = before.uncached * holder.slowdown
                gain -= before.count * holder.per_sequence + ahead
                wait += ahead
            if gain > most and wait < holder.limit:
                most, best = gain, holder
        return best

    def add(self, entry: WaitingSequence, call: RouteCall, holder: FullHolder, now: float) -> None:
        """Set a sequence aside, for MAX_WAIT_S or until its deadline."""
        until = now + MAX_WAIT_S if entry.deadline is None else min(now + MAX_WAIT_S, entry.deadline)
        aside = Aside(entry, call, holder.worker_id, holder.uncached, now, until)
        self._by_key[entry.call_id] = aside
        self._by_model.setdefault(entry.model, {})[entry.call_id] = aside
        place = (entry.model, holder.worker_id)
        before = self._before.setdefault(place, _Before())
        before.count += 1
        before.uncached += holder.uncached

    def pop(self, key: str) -> Aside | None:
        """Remove a sequence and return it; None if it is not set aside."""
        aside = self._by_key.pop(key, None)
        if aside is None:
            return None
        model, place = aside.entry.model, (aside.entry.model, aside.worker_id)
        del self._by_model[model][key]
        before = self._before[place]
        before.count -= 1
        before.uncached -= aside.uncached
        if not before.count:
            del self._before[place]
        if not self._by_model[model]:
            del self._by_model[model]
        return aside

    def in_order(self, model: str) -> Sequence[Aside]:
        """Return a model's sequences that are set aside, in the order in which they were set aside."""
        asides = self._by_model.get(model)
        return list(asides.values()) if asides else ()
