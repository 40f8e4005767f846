"""Cost of a call in weighted tokens, first predicted, then corrected.

Problem: a call must be charged when it is sent, before its output is known.

Method: a call is charged its predicted cost, and the charge is corrected later. The charge is raised as soon as the
output exceeds the prediction, and lowered at the end.

Invariant: after `ended`, the charge is the cost of the tokens that were really computed. At any time, the predicted
cost plus all returned changes is the charge.

Source: VTC with length prediction (Sheng et al., OSDI 2024, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceWeights:
    """Weights with which tokens count as service: `input` for a prompt token that is not cached, `cached` for a cached
    prompt token, `output` for an output token. VTC, the source of this method, uses 1 for input and 2 for output."""

    input: float = 1.0
    cached: float = 0.1
    output: float = 2.0

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0")
        if not 0 <= self.cached <= self.input:
            raise ValueError("cached must lie between 0 and input")

    def prompt(self, tokens: int, cached_tokens: int) -> float:
        """Return the number of weighted tokens of a prompt."""
        cached = cached_tokens if cached_tokens < tokens else tokens
        return self.input * (tokens - cached) + self.cached * cached


class Charge:
    """Charge of one call. Each method returns the change of the charge in weighted tokens; a negative change is a
    refund."""

    __slots__ = ("_generated", "_paid_output", "_prompt", "_prompt_tokens", "_weights", "amount")

    def __init__(self, weights: ServiceWeights, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """Create a charge of the predicted cost. `cached_tokens` and `output_tokens` are predictions."""
        self._weights = weights
        self._prompt_tokens = prompt_tokens
        self._prompt = prompt = weights.prompt(prompt_tokens, cached_tokens)
        self._paid_output = paid = output_tokens if output_tokens > 0 else 0
        self._generated = 0
        self.amount = prompt + weights.output * paid
        """Current charge in weighted tokens."""

    def cached(self, cached_tokens: int) -> float:
        """Correct the charge for the prompt. `cached_tokens`: number of cached tokens that the engine reported, in
        place of the prediction."""
        before = self._prompt
        self._prompt = self._weights.prompt(self._prompt_tokens, cached_tokens)
        self._update_amount()
        return self._prompt - before

    def generated(self, tokens: int) -> float:
        """Record how many output tokens the call has so far, counted over all workers that have run the call. A lower
        number than before is ignored."""
        if tokens > self._generated:
            self._generated = tokens
        more = self._generated - self._paid_output
        if more <= 0:
            return 0.0
        self._paid_output += more
        self._update_amount()
        return self._weights.output * more

    def ended(self) -> float:
        """Refund the charge for predicted output that was not generated."""
        vain = self._paid_output - self._generated
        self._paid_output = self._generated
        self._update_amount()
        return -self._weights.output * vain

    def revoked(self) -> float:
        """Refund the whole charge, because the call never ran."""
        amount = self.amount
        self._prompt, self._prompt_tokens, self._paid_output, self._generated = 0.0, 0, 0, 0
        self._update_amount()
        return -amount

    def _update_amount(self) -> None:
        self.amount = self._prompt + self._weights.output * self._paid_output

    def __repr__(self) -> str:
        return f"Charge({self.amount:g}: {self._prompt_tokens} prompt, {self._generated} of {self._paid_output} output)"
