"""The demand that a gateway reports to the controller. Demand is counted when sequences arrive, grow and end.

A sequence counts as arrived once, even if it is queued again. Waiting sequences are kept by model and priority class,
so that a report needs no scan of the queue. A new sequence is counted with its expected output length. The count is
corrected when the output exceeds this length and when the sequence ends. The reported counter never decreases: after an
estimate that was too high, the counter stays constant until later output has used up the excess. The module is pure:
`now` is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cluster.api.demand import ClassCounts
from cluster.policy.fairness.order import WaitingSequence

GROWTH_TOKENS = 64
"""Step, in tokens, in which output beyond the expected length is counted."""
SCANNED = 256
"""Number of longest-waiting sequences that are searched for the nearest deadline."""


@dataclass(slots=True)
class _Class:
    rank: int
    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    output_tokens: int = 0
    """Current estimate of all output, in tokens. The estimate may decrease."""
    expected_output_tokens: int = 0
    """Maximum of `output_tokens` so far. This counter is reported."""
    within_slo: int = 0
    outside_slo: int = 0
    queued_tokens: int = 0
    queued: dict[str, WaitingSequence] = field(default_factory=dict)


class DemandTally:
    """Tally of the demand for all models and priority classes at one gateway."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, _Class]] = {}
        self._queued_in: dict[str, _Class] = {}
        self._counted_output: dict[str, int] = {}
        """Number of counted output tokens of each sequence that has arrived and has not ended."""

    def _class(self, model: str, priority_class: str, rank: int) -> _Class:
        classes = self._models.get(model)
        if classes is None:
            classes = self._models[model] = {}
        counters = classes.get(priority_class)
        if counters is None:
            counters = classes[priority_class] = _Class(rank)
        return counters

    def arrived(self, waiting: WaitingSequence) -> None:
        """Count the arrival of a sequence, whether or not the queue accepts the sequence."""
        counters = self._class(waiting.model, waiting.priority_class, waiting.rank)
        counters.arrived_requests += 1
        counters.arrived_prompt_tokens += max(waiting.tokens - waiting.cached_tokens, 0)
        self._add_output(counters, waiting.call_id, waiting.output_tokens)

    def record_output(self, waiting: WaitingSequence, tokens: int) -> None:
        """Record the number of output tokens that a running sequence has so far. Sequences that arrived at another
        gateway are ignored."""
        if tokens >= self._counted_output.get(waiting.call_id, tokens) + GROWTH_TOKENS:
            self._count_output(waiting, tokens)

    def ended(self, waiting: WaitingSequence, tokens: int, ran: bool) -> None:
        """Record the end of a sequence. `tokens`: its final number of output tokens. `ran`: whether the sequence ever
        ran; if it did not, its expected length stays counted."""
        if ran and waiting.call_id in self._counted_output:
            self._count_output(waiting, tokens)
        self._counted_output.pop(waiting.call_id, None)

    def _count_output(self, waiting: WaitingSequence, tokens: int) -> None:
        counted = self._counted_output[waiting.call_id]
        if tokens != counted:
            counters = self._class(waiting.model, waiting.priority_class, waiting.rank)
            self._add_output(counters, waiting.call_id, tokens, counted)

    def _add_output(self, counters: _Class, call_id: str, tokens: int, counted: int = 0) -> None:
        """Count the output of a sequence. `tokens`: number of output tokens so far. `counted`: number of these tokens
        that were counted before."""
        counters.output_tokens += tokens - counted
        if counters.output_tokens > counters.expected_output_tokens:
            counters.expected_output_tokens = counters.output_tokens
        self._counted_output[call_id] = tokens

    def enqueue(self, waiting: WaitingSequence) -> None:
        """Count a sequence as queued."""
        self.dequeue(waiting.call_id)
        counters = self._queued_in[waiting.call_id] = self._class(waiting.model, waiting.priority_class, waiting.rank)
        counters.queued[waiting.call_id] = waiting
        counters.queued_tokens += waiting.tokens

    def dequeue(self, call_id: str) -> None:
        """Stop counting a sequence as queued. Does nothing if the sequence is not queued."""
        counters = self._queued_in.pop(call_id, None)
        if counters is not None:
            counters.queued_tokens -= counters.queued.pop(call_id).tokens

    def count_slo(self, model: str, priority_class: str, rank: int, within: bool) -> None:
        """Count an ended call as within or outside the SLO of its model."""
        counters = self._class(model, priority_class, rank)
        if within:
            counters.within_slo += 1
        else:
            counters.outside_slo += 1

    def classes(self, model: str, now: float, served: bool) -> tuple[ClassCounts, ...]:
        """Return the demand for a model at this gateway, one entry for each priority class. `served`: whether a worker
        takes the model's calls."""
        classes = self._models.get(model, {})
        return tuple(_counts(name, counters, now, served) for name, counters in sorted(classes.items()))

    def retain_models(self, models: Iterable[str]) -> None:
        """Forget all models except `models` and the models with queued sequences."""
        kept = set(models)
        for model in [m for m, classes in self._models.items() if m not in kept]:
            if not any(counters.queued for counters in self._models[model].values()):
                del self._models[model]

    def __repr__(self) -> str:
        return f"DemandTally({len(self._models)} models, {len(self._queued_in)} sequences queued)"


def _counts(name: str, counters: _Class, now: float, served: bool) -> ClassCounts:
    oldest = next(iter(counters.queued.values()), None)
    deadlines = [w.deadline for w in _longest_waiting(counters.queued) if w.deadline is not None]
    return ClassCounts(
        priority_class=name,
        rank=counters.rank,
        arrived_requests=counters.arrived_requests,
        arrived_prompt_tokens=counters.arrived_prompt_tokens,
        expected_output_tokens=counters.expected_output_tokens,
        within_slo=counters.within_slo,
        outside_slo=counters.outside_slo,
        queued_requests=len(counters.queued),
        queued_tokens=counters.queued_tokens,
        oldest_wait_s=0.0 if oldest is None else max(now - oldest.arrived, 0.0),
        nearest_deadline_s=max(min(deadlines) - now, 0.0) if deadlines else None,
        held_requests=0 if served else len(counters.queued),
    )


def _longest_waiting(queued: dict[str, WaitingSequence]) -> Iterator[WaitingSequence]:
    for _, waiting in zip(range(SCANNED), queued.values(), strict=False):
        yield waiting


def within_slo(ttft_s: float | None, itl_s: float, asked_ttft_s: float, asked_itl_s: float) -> bool:
    """Return whether a call met its SLO.

    `asked_ttft_s`, `asked_itl_s`: upper bounds, in seconds, on the time to first token and on the mean gap between
    tokens; 0 for no bound. `ttft_s` is None if the call had no first token; the SLO is missed then."""
    if ttft_s is None:
        return False
    return (not asked_ttft_s or ttft_s <= asked_ttft_s) and (not asked_itl_s or itl_s <= asked_itl_s)
