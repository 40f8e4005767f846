"""Prefill pacing: how many prompt tokens wait for a worker's steps, and how many may.

Problem: when a worker dies, its calls move to the other workers all at once, and each must recompute all its tokens.
Sent together, they make one step so long that every sequence's next token is late, more so with the prompts of new
calls in the same step. Sent one by one, each after the previous one's first token, every other step has no prefill.
Invariants: the counts cover requests that have been sent and that no step is known to have begun with; requests that
have ended are not counted. A step is known to have begun with the requests that the engine had accepted when the
previous step ended, up to the step's token capacity.
The budget is the number of tokens that makes a step STRETCH times as long as its 95th percentile. It follows from the
cost of a prompt token at this worker, learned from steps that produced a first token; before that it is half a step's
capacity. Prompts of other gateways are invisible here and make ours look more expensive, so the budget has a minimum.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.5
ORDER, STEPS, LEAST_STEPS = 0.95, 64, 16
"""Quantile of the step lengths, number of steps in its window, and steps needed before the cost is learned."""
UNKNOWN, LEAST = 0.5, 0.25
"""Fractions of a step's token capacity: the budget before a cost is known, and the minimum budget."""
SAMPLE_TOKENS = 16
"""Minimum number of prompt tokens in a step from which the cost of one is learned."""
SMOOTH = 1 / 8


class PrefillPacing:
    """The pacing of one gateway's requests at one worker."""

    __slots__ = ("_accepted", "_max_tokens", "_per_token_s", "_steps_s", "_waiting", "new_tokens", "resumed_tokens")

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: the maximum that one step computes."""
        self._max_tokens = max_tokens
        self._waiting: dict[int, tuple[int, bool]] = {}
        self._accepted: list[int] = []
        self._steps_s: deque[float] = deque(maxlen=STEPS)
        self._per_token_s: float | None = None
        self.resumed_tokens = 0
        """Tokens of resumed requests that wait for a step."""
        self.new_tokens = 0
        """Tokens of new requests that wait for a step."""

    def __repr__(self) -> str:
        return f"PrefillPacing({self.resumed_tokens} resumed and {self.new_tokens} new tokens wait)"

    def add(self, slot: int, tokens: int, resumed: bool) -> None:
        """Count a request that has been sent."""
        self._waiting[slot] = (tokens, resumed)
        self._count(tokens, resumed)

    def _count(self, tokens: int, resumed: bool) -> None:
        if resumed:
            self.resumed_tokens += tokens
        else:
            self.new_tokens += tokens

    def mark_accepted(self, slot: int) -> None:
        """Record that the engine has accepted the request."""
        if slot in self._waiting:
            self._accepted.append(slot)

    def remove(self, slot: int) -> None:
        """Stop counting a request that has its first token or has been aborted."""
        tokens, resumed = self._waiting.pop(slot, (0, False))
        self._count(-tokens, resumed)

    def begin_step(self) -> bool:
        """Count off what the next step can begin with. Returns whether that may be any of these requests."""
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
        """Record the duration of a step, and the tokens of the prompts that it completed, 0 for none."""
        self._steps_s.append(step_s)
        if SAMPLE_TOKENS <= prompt_tokens <= self._max_tokens and len(self._steps_s) >= LEAST_STEPS:
            cost_s = max(step_s - statistics.median(self._steps_s), 0.0) / prompt_tokens
            old_s = self._per_token_s
            self._per_token_s = cost_s if old_s is None else old_s + SMOOTH * (cost_s - old_s)

    def budget(self) -> int:
        """How many tokens may wait for a step."""
        per_token_s = self._per_token_s
        if per_token_s is None:
            return int(UNKNOWN * self._max_tokens)
        steps_s = sorted(self._steps_s)
        more_s = STRETCH * steps_s[int(ORDER * len(steps_s))] - steps_s[len(steps_s) // 2]
        if more_s >= per_token_s * self._max_tokens:
            return self._max_tokens
        return int(max(LEAST * self._max_tokens, more_s / per_token_s))
