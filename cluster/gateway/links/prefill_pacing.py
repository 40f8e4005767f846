"""Prefill pacing: a count of the prompt tokens that wait for a worker's steps, and an upper bound on this
count.

Problem: when a worker dies, its calls move to the other workers all at once, and all tokens of each call
must be recomputed. If these calls are sent together, one step becomes so long that every sequence's next
token is late. The prompts of new calls in the same step make the step even longer. If each call is sent
only after the first token of the previous call, only every second step computes a prompt.

Invariants: a request is counted from its submission until a step that computes it has begun. Requests that
have ended are not counted. A step begins when the previous step ends, and computes the requests that the
engine has accepted by then, up to the step's token capacity.

The upper bound is called the budget. It is the number of tokens that makes a step STRETCH times as long as
the 95th percentile of the step lengths. The budget follows from the cost of a prompt token at this worker,
which is learned from steps that produced a first token. Before the cost is known, the budget is half a
step's token capacity. Prompts of other gateways make the same steps longer. This gateway does not see
those prompts, so it estimates too high a cost for its own. Therefore the budget has a minimum.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.5
ORDER, STEPS, LEAST_STEPS = 0.95, 64, 16
"""Quantile of the step lengths, number of steps over which the quantile is taken, and number of steps that are needed
before a cost is learned."""
UNKNOWN, LEAST = 0.5, 0.25
"""Two fractions of a step's token capacity: the budget before a cost is known, and the minimum budget."""
SAMPLE_TOKENS = 16
"""Minimum number of prompt tokens in a step from which the cost of a token is learned."""
SMOOTH = 1 / 8


class PrefillPacing:
    """The number of prompt tokens that this gateway has sent to one worker and that no step has computed yet, and the
    budget, which is the largest number of such tokens that may wait."""

    __slots__ = (
        "_accepted",
        "_budget",
        "_max_tokens",
        "_per_token_s",
        "_steps_s",
        "_waiting",
        "new_tokens",
        "resumed_tokens",
    )

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: maximum number of tokens that the engine computes in one step."""
        self._max_tokens = max_tokens
        self._waiting: dict[int, tuple[int, bool]] = {}
        self._accepted: list[int] = []
        self._steps_s: deque[float] = deque(maxlen=STEPS)
        self._per_token_s: float | None = None
        self._budget: int | None = None
        """Result of `budget`. None after each step, until `budget` is called."""
        self.resumed_tokens = 0
        """Number of tokens that wait for a step and belong to resumed requests."""
        self.new_tokens = 0
        """Number of tokens that wait for a step and belong to new requests."""

    def __repr__(self) -> str:
        return f"PrefillPacing({self.resumed_tokens} resumed and {self.new_tokens} new tokens wait)"

    def add(self, slot: int, tokens: int, resumed: bool) -> None:
        """Count the tokens of a request that has been sent to the worker. `slot`: number of the request on the link.
        `resumed`: whether the request is resumed."""
        self._waiting[slot] = (tokens, resumed)
        self._count(tokens, resumed)

    def _count(self, tokens: int, resumed: bool) -> None:
        if resumed:
            self.resumed_tokens += tokens
        else:
            self.new_tokens += tokens

    def mark_accepted(self, slot: int) -> None:
        """Record that the engine has accepted the request in this slot."""
        if slot in self._waiting:
            self._accepted.append(slot)

    def remove(self, slot: int) -> None:
        """Stop counting a request, because its first token has arrived or the request was refused or aborted."""
        tokens, resumed = self._waiting.pop(slot, (0, False))
        self._count(-tokens, resumed)

    def begin_step(self) -> bool:
        """Record that the engine begins a step. Up to the capacity of the step, the tokens of the requests that the
        engine has accepted no longer count as waiting. Returns False if the engine has accepted no request."""
        if not self._accepted:
            return False
        capacity = self._max_tokens
        while self._accepted and capacity > 0:
            slot = self._accepted[0]
            tokens, resumed = self._waiting.pop(slot, (0, False))
            part = min(tokens, capacity)
            capacity -= part
            self._count(-part, resumed)
            if part < tokens:
                self._waiting[slot] = (tokens - part, resumed)
                break
            self._accepted.pop(0)
        return True

    def record_step(self, step_s: float, prompt_tokens: int) -> None:
        """Record the duration of a step. `prompt_tokens`: number of uncached tokens in the prompts whose first output
        the step produced; 0 if there were no such prompts."""
        self._steps_s.append(step_s)
        self._budget = None
        if SAMPLE_TOKENS <= prompt_tokens <= self._max_tokens and len(self._steps_s) >= LEAST_STEPS:
            cost_s = max(step_s - statistics.median(self._steps_s), 0.0) / prompt_tokens
            old_s = self._per_token_s
            self._per_token_s = cost_s if old_s is None else old_s + SMOOTH * (cost_s - old_s)

    def budget(self) -> int:
        """Return the largest number of prompt tokens that may wait for a step."""
        if self._budget is None:
            self._budget = self._new_budget()
        return self._budget

    def _new_budget(self) -> int:
        per_token_s = self._per_token_s
        if per_token_s is None:
            return int(UNKNOWN * self._max_tokens)
        steps_s = sorted(self._steps_s)
        more_s = STRETCH * steps_s[int(ORDER * len(steps_s))] - steps_s[len(steps_s) // 2]
        if more_s >= per_token_s * self._max_tokens:
            return self._max_tokens
        return int(max(LEAST * self._max_tokens, more_s / per_token_s))
