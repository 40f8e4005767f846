"""What a call costs its tenant, in weighted tokens, before and while it is known.

Problem: who is next must be decided when a call is sent, but its output is known only at its end. So a call is charged
what is predicted, and the charge follows the truth: up as soon as the output outgrows the prediction, down at the end.
Invariant: after `ended` the charge is that of the tokens really computed; the sum of all deltas is the charge.
Source: VTC with length prediction (Sheng et al., OSDI 2024, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServiceWeights:
    """Weighted tokens for each token: of the prompt, of it in the prefix cache, of the output. VTC's are 1 and 2."""

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
        """The service that a prompt is."""
        cached = min(cached_tokens, tokens)
        return self.input * (tokens - cached) + self.cached * cached


class Charge:
    """One call's. Each method returns by how much the charge has changed."""

    __slots__ = ("_generated", "_paid_output", "_prompt", "_prompt_tokens", "_weights")

    def __init__(self, weights: ServiceWeights, prompt_tokens: int, cached_tokens: int, output_tokens: int) -> None:
        """`cached_tokens` and `output_tokens` are predictions."""
        self._weights = weights
        self._prompt_tokens = prompt_tokens
        self._prompt = weights.prompt(prompt_tokens, cached_tokens)
        self._paid_output = max(output_tokens, 0)
        self._generated = 0

    @property
    def amount(self) -> float:
        """What has been charged so far."""
        return self._prompt + self._weights.output * self._paid_output

    def cached(self, cached_tokens: int) -> float:
        """The engine says how much of the prompt it had."""
        before = self._prompt
        self._prompt = self._weights.prompt(self._prompt_tokens, cached_tokens)
        return self._prompt - before

    def generated(self, tokens: int) -> float:
        """So many output tokens there are by now, over all attempts; never fewer than before."""
        self._generated = max(self._generated, tokens)
        more = max(self._generated - self._paid_output, 0)
        self._paid_output += more
        return self._weights.output * more

    def ended(self) -> float:
        """No more output comes; what was charged for it in vain is given back."""
        vain = self._paid_output - self._generated
        self._paid_output = self._generated
        return -self._weights.output * vain

    def revoked(self) -> float:
        """It never ran: all is given back."""
        amount = self.amount
        self._prompt, self._prompt_tokens, self._paid_output, self._generated = 0.0, 0, 0, 0
        return -amount

    def __repr__(self) -> str:
        return f"Charge({self.amount:g}: {self._prompt_tokens} prompt, {self._generated} of {self._paid_output} output)"
