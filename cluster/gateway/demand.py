"""What a gateway tells the controller of the demand: counted where calls come and end, never for a token.

A sequence counts as arrived once, also where it is put back into its line; what waits is kept by model and class, so
that a report costs no walk through the queue. Its output counts as what is foreseen when it comes, and is put right as
it outgrows that and at its end, so that the sum is what was generated, however wrong a guess was; counters never count
backwards, so what was foreseen too much is taken off what comes next. Pure: `now` is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cluster.api.demand import ClassCounts
from cluster.policy.fairness.order import Waiting

GROWTH_TOKENS = 64
"""What outgrows what was foreseen is counted in steps of as many."""
LOOKED_AT = 256
"""Of a line's longest waiting: among them the nearest deadline is looked for."""


@dataclass(slots=True)
class _Class:
    rank: int
    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    output_tokens: int = 0
    """Foreseen, as far as is known by now."""
    expected_output_tokens: int = 0
    """The most that was."""
    within_slo: int = 0
    outside_slo: int = 0
    tokens: int = 0
    line: dict[str, Waiting] = field(default_factory=dict)


class DemandTally:
    """Of all models and classes of one gateway."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, _Class]] = {}
        self._where: dict[str, _Class] = {}
        self._foreseen: dict[str, int] = {}
        """Of each that has come and has not ended: how many tokens of output are counted."""

    def _class(self, model: str, priority_class: str, rank: int) -> _Class:
        classes = self._models.get(model)
        if classes is None:
            classes = self._models[model] = {}
        one = classes.get(priority_class)
        if one is None:
            one = classes[priority_class] = _Class(rank)
        return one

    def arrived(self, waiting: Waiting) -> None:
        """A sequence has come, whether or not there is room for it to wait."""
        one = self._class(waiting.model, waiting.priority_class, waiting.rank)
        one.arrived_requests += 1
        one.arrived_prompt_tokens += max(waiting.tokens - waiting.cached_tokens, 0)
        self._foreseen[waiting.call_id] = 0
        self._foresee(waiting, waiting.output_tokens)

    def grew(self, waiting: Waiting, tokens: int) -> None:
        """It runs, and its output has come to so many tokens; harmless for one that came to another gateway."""
        if tokens >= self._foreseen.get(waiting.call_id, tokens) + GROWTH_TOKENS:
            self._foresee(waiting, tokens)

    def ended(self, waiting: Waiting, tokens: int, ran: bool) -> None:
        """It is over, with so many; once. What never ran would have been as long as was foreseen."""
        if ran and waiting.call_id in self._foreseen:
            self._foresee(waiting, tokens)
        self._foreseen.pop(waiting.call_id, None)

    def _foresee(self, waiting: Waiting, tokens: int) -> None:
        one = self._class(waiting.model, waiting.priority_class, waiting.rank)
        one.output_tokens += tokens - self._foreseen[waiting.call_id]
        one.expected_output_tokens = max(one.expected_output_tokens, one.output_tokens)
        self._foreseen[waiting.call_id] = tokens

    def waits(self, waiting: Waiting) -> None:
        """It stands in line from now on."""
        self.waits_no_more(waiting.call_id)
        one = self._where[waiting.call_id] = self._class(waiting.model, waiting.priority_class, waiting.rank)
        one.line[waiting.call_id] = waiting
        one.tokens += waiting.tokens

    def waits_no_more(self, call_id: str) -> None:
        """It has left the line, however that was; harmless for one that does not stand there."""
        one = self._where.pop(call_id, None)
        if one is not None:
            one.tokens -= one.line.pop(call_id).tokens

    def judged(self, model: str, priority_class: str, rank: int, within: bool) -> None:
        """A call has ended within its model's objectives, or outside."""
        one = self._class(model, priority_class, rank)
        if within:
            one.within_slo += 1
        else:
            one.outside_slo += 1

    def classes(self, model: str, now: float, served: bool) -> tuple[ClassCounts, ...]:
        """A model's, by class. `served`: whether some worker takes its calls."""
        return tuple(_counts(name, one, now, served) for name, one in sorted(self._models.get(model, {}).items()))

    def keep(self, models: Iterable[str]) -> None:
        """Forget models that are no more and for which nobody waits."""
        there = set(models)
        for model in [m for m, classes in self._models.items() if m not in there]:
            if not any(one.line for one in self._models[model].values()):
                del self._models[model]

    def __repr__(self) -> str:
        return f"Tally({len(self._models)} models, {len(self._where)} wait)"


def _counts(name: str, one: _Class, now: float, served: bool) -> ClassCounts:
    oldest = next(iter(one.line.values()), None)
    deadlines = [w.deadline for w in _first(one.line) if w.deadline is not None]
    return ClassCounts(
        priority_class=name,
        rank=one.rank,
        arrived_requests=one.arrived_requests,
        arrived_prompt_tokens=one.arrived_prompt_tokens,
        expected_output_tokens=one.expected_output_tokens,
        within_slo=one.within_slo,
        outside_slo=one.outside_slo,
        queued_requests=len(one.line),
        queued_tokens=one.tokens,
        oldest_wait_s=0.0 if oldest is None else max(now - oldest.arrived, 0.0),
        nearest_deadline_s=max(min(deadlines) - now, 0.0) if deadlines else None,
        held_requests=0 if served else len(one.line),
    )


def _first(line: dict[str, Waiting]) -> Iterator[Waiting]:
    for _, waiting in zip(range(LOOKED_AT), line.values(), strict=False):
        yield waiting


def within_slo(ttft_s: float | None, itl_s: float, asked_ttft_s: float, asked_itl_s: float) -> bool:
    """Whether a call's first token came in time, and the mean gap between its tokens was small enough. 0 asks nothing;
    a `ttft_s` of None never came."""
    if ttft_s is None:
        return False
    return (not asked_ttft_s or ttft_s <= asked_ttft_s) and (not asked_itl_s or itl_s <= asked_itl_s)
