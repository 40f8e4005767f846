"""Requests on their way into a worker's steps: how much of them waits there, and how much a step may hold.

Problem: when a worker dies its calls come to the others in a crowd, and each has all its tokens to compute anew. Sent
all at once they make one step so long that everybody's next token is late, the longer with prompts of calls that begin
beside them; sent one after the other, each when the one before has its token, every other step goes by without any.
Invariants: what is counted has been sent and no step is known to have begun with it; whoever leaves is not counted. A
step is known to have begun with what the engine had taken when the step before ended, as much as a step holds.
The budget is what makes a step STRETCH times as long as one of twenty is anyway. It follows from what prompts cost at
this worker, learned from steps that gave somebody's first token; until something is known it is half a step's tokens.
Prompts of other gateways are not seen and make ours seem dearer than they are, so the budget has a least size.
"""

from __future__ import annotations

import statistics
from collections import deque

STRETCH = 1.5
ORDER, STEPS, LEAST_STEPS = 0.95, 64, 16
"""Which quantile of the steps' lengths is meant, of how many of them, and how many say something."""
UNKNOWN, LEAST = 0.5, 0.25
"""Of the tokens that a step can hold: the budget before anything has been learned, and at least."""
SAMPLE_TOKENS = 16
"""So few prompt tokens in a step at least tell what one costs."""
SMOOTH = 1 / 8


class PrefillPacing:
    """Of one gateway at one worker."""

    __slots__ = ("_most", "_per_token_s", "_steps_s", "_taken", "_waiting", "prompts", "tokens")

    def __init__(self, most_tokens: int) -> None:
        """`most_tokens`: what a step computes at most."""
        self._most = most_tokens
        self._waiting: dict[int, tuple[int, bool]] = {}
        self._taken: list[int] = []
        self._steps_s: deque[float] = deque(maxlen=STEPS)
        self._per_token_s: float | None = None
        self.tokens = 0
        """Of continued calls, that wait for a step."""
        self.prompts = 0
        """Of calls that begin, likewise."""

    def __repr__(self) -> str:
        return f"Replays({self.tokens} tokens and {self.prompts} of prompts wait)"

    def sent(self, slot: int, tokens: int, continued: bool) -> None:
        """A request is on its way."""
        self._waiting[slot] = (tokens, continued)
        self._count(tokens, continued)

    def _count(self, tokens: int, continued: bool) -> None:
        if continued:
            self.tokens += tokens
        else:
            self.prompts += tokens

    def accepted(self, slot: int) -> None:
        """The engine has taken it."""
        if slot in self._waiting:
            self._taken.append(slot)

    def left(self, slot: int) -> None:
        """It has its token, or nobody wants it any longer."""
        tokens, continued = self._waiting.pop(slot, (0, False))
        self._count(-tokens, continued)

    def step_begins(self) -> bool:
        """A step has ended, and the next begins; whether it may have begun with some of these."""
        if not self._taken:
            return False
        room = self._most
        while self._taken and room > 0:
            slot = self._taken[0]
            tokens, continued = self._waiting.pop(slot, (0, False))
            part = min(tokens, room)
            room -= part
            self._count(-part, continued)
            if part < tokens:
                self._waiting[slot] = (tokens - part, continued)
                break
            self._taken.pop(0)
        return True

    def took(self, step_s: float, prompt_tokens: int) -> None:
        """A step between two others took so long, and was the end of prompts of so many tokens, 0 for none."""
        self._steps_s.append(step_s)
        if SAMPLE_TOKENS <= prompt_tokens <= self._most and len(self._steps_s) >= LEAST_STEPS:
            cost_s = max(step_s - statistics.median(self._steps_s), 0.0) / prompt_tokens
            old_s = self._per_token_s
            self._per_token_s = cost_s if old_s is None else old_s + SMOOTH * (cost_s - old_s)

    def budget(self) -> int:
        """So many tokens may wait for a step."""
        per_token_s = self._per_token_s
        if per_token_s is None:
            return int(UNKNOWN * self._most)
        steps_s = sorted(self._steps_s)
        more_s = STRETCH * steps_s[int(ORDER * len(steps_s))] - steps_s[len(steps_s) // 2]
        if more_s >= per_token_s * self._most:
            return self._most
        return int(max(LEAST * self._most, more_s / per_token_s))
