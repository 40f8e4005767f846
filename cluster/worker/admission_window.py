"""How many calls a worker may be sent now: its free places, but no more prompts at once than its engine can begin.

Problem: what leaves a gateway early waits in the engine's own queue, where nobody decides any more whose turn it is;
what leaves late leaves a place empty for a round trip. So room is granted for what is likely to begin in the step after
the running one. Invariants: a free place and an engine that has no prompt left to begin always make room; at most
LOOKAHEAD_SEQUENCES calls more than places are let in, and only where about as many end in each step.
Source: the work ahead is a fluid model of chunked prefill (Sarathi-Serve, Agrawal et al., OSDI 2024).

The engine does not tell how far a prompt has come, so that is reckoned: each step computes as many tokens as it may,
and a request's first output says that all before it are done. Pure: no clock.
"""

from __future__ import annotations

from collections import deque

LOOKAHEAD_SEQUENCES = 2
RECENT_PROMPTS = 64
UNKNOWN_PROMPTS = 8
"""Before any has come, prompts are taken to fill a step each, as if so many had been seen."""


class AdmissionWindow:
    """Of one engine; told of every call and step."""

    def __init__(self, max_num_seqs: int, step_tokens: int) -> None:
        """`step_tokens`: the most that the engine computes in a step."""
        self._max_num_seqs = max_num_seqs
        self._step_tokens = max(step_tokens, 1)
        self._live = 0
        self._pending: dict[str, int] = {}
        self._pending_tokens = 0
        self._work = 0  # tokens of prompts that the running step and those after it compute
        self._late = 0  # of prompts that have come since it began
        self._recent: deque[int] = deque([step_tokens] * UNKNOWN_PROMPTS, RECENT_PROMPTS)
        self._recent_tokens = step_tokens * UNKNOWN_PROMPTS
        self._ends = 0
        self._ends_a_step = 0.0  # of late

    @property
    def places(self) -> int:
        """Calls that it could still hold, those that wait in the engine among them; may be below 0."""
        return self._max_num_seqs + min(round(self._ends_a_step), LOOKAHEAD_SEQUENCES) - self._live

    @property
    def sequences(self) -> int:
        """Calls that may be sent now by all links together. Where no prompt is to begin the first begins at once."""
        budget = max(self._step_tokens - self._live, 1)
        before = max(self._work - budget, 0) + self._late
        mean = max(self._recent_tokens // len(self._recent), 1)
        begins = (budget - before) // mean + 1 if before < budget else 0
        at_least = LOOKAHEAD_SEQUENCES - len(self._pending) if self._pending else 1 + LOOKAHEAD_SEQUENCES
        return min(self.places, max(begins, at_least))

    def submitted(self, request_id: str, tokens: int, begins: bool = True) -> None:
        """A call with so many tokens to compute goes to the engine. One that does not begin but goes on says nothing of
        how long the next prompt will be."""
        if self._live:
            self._late += tokens
        else:
            self._work += tokens
        self._live += 1
        self._pending[request_id] = tokens
        self._pending_tokens += tokens
        if not begins:
            return
        if len(self._recent) == RECENT_PROMPTS:
            self._recent_tokens -= self._recent[0]
        self._recent.append(tokens)
        self._recent_tokens += tokens

    def began(self, request_id: str) -> None:
        """Its first output has come."""
        self._pending_tokens -= self._pending.pop(request_id, 0)

    def ended(self, request_id: str) -> None:
        """It has left the engine, however that was. Once for each call."""
        self.began(request_id)
        self._live -= 1
        self._ends += 1

    def stepped(self) -> None:
        """A step is over, and what it has begun and ended has been told; the next one begins at once."""
        self._ends_a_step += (self._ends - self._ends_a_step) / 64
        self._ends = 0
        computed = max(self._step_tokens - self._live, 1)
        self._work = min(max(self._work - computed, 0) + self._late, self._pending_tokens)
        self._late = 0

    def __repr__(self) -> str:
        return f"Lookahead({self._live} live, {len(self._pending)} to begin, {self._work + self._late} tokens before)"
