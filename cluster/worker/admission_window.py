"""Admission window: the number of sequences that gateways may send to a worker now.

Problem: a sequence sent too early waits in the engine's own queue, where fair order no longer applies. A sequence sent
too late leaves a slot of the engine empty for a round trip. So the window is the number of prompts that the engine will
probably start in the next step, and at most the number of free slots. The number of sequences that end per step on
average, at most LOOKAHEAD_SEQUENCES, is added to the free slots. Invariant: if a slot is free and no prompt is pending,
capacity is granted. Source: the number of prompt tokens still to compute follows a fluid model of chunked prefill
(Sarathi-Serve, Agrawal et al., OSDI 2024).

The engine does not report the progress of a prompt, so the progress is estimated. Each step is assumed to compute as
many tokens as it can. A request's first output means that all earlier prompts are computed. Pure: no clock.
"""

from __future__ import annotations

from collections import deque

LOOKAHEAD_SEQUENCES = 2
RECENT_PROMPTS = 64
UNKNOWN_PROMPTS = 8
"""Number of imaginary prompts, each as long as a full step, with which the mean prompt length starts."""


class AdmissionWindow:
    """Computes how many sequences gateways may send ahead of one engine. The caller reports every sequence and step."""

    def __init__(self, max_num_seqs: int, step_tokens: int) -> None:
        """Create the window. `step_tokens`: the most tokens that the engine computes in a step."""
        self._max_num_seqs = max_num_seqs
        self._step_tokens = max(step_tokens, 1)
        self._live = 0
        self._pending: dict[str, int] = {}
        self._pending_tokens = 0
        self._work = 0  # prompt tokens that the running step and the following steps compute
        self._late = 0  # tokens of prompts submitted since the running step began
        self._recent: deque[int] = deque([step_tokens] * UNKNOWN_PROMPTS, RECENT_PROMPTS)
        self._recent_tokens = step_tokens * UNKNOWN_PROMPTS
        self._ends = 0
        self._ends_a_step = 0.0  # moving average

    @property
    def free_slots(self) -> int:
        """Number of further sequences that the engine could hold; queued sequences count as held. May be negative."""
        return self._max_num_seqs + min(round(self._ends_a_step), LOOKAHEAD_SEQUENCES) - self._live

    @property
    def admissible_sequences(self) -> int:
        """Number of sequences that all gateways together may send now.

        If no prompt is pending, the number is at least 1 + LOOKAHEAD_SEQUENCES, limited by the free slots.
        """
        budget = max(self._step_tokens - self._live, 1)
        before = max(self._work - budget, 0) + self._late
        mean = max(self._recent_tokens // len(self._recent), 1)
        begins = (budget - before) // mean + 1 if before < budget else 0
        at_least = LOOKAHEAD_SEQUENCES - len(self._pending) if self._pending else 1 + LOOKAHEAD_SEQUENCES
        return min(self.free_slots, max(begins, at_least))

    def record_submit(self, request_id: str, tokens: int, begins: bool = True) -> None:
        """Record that a sequence was sent to the engine.

        `tokens`: number of tokens that the engine must compute before the sequence's first output. `begins`: whether
        the sequence is new. The length of a resumed sequence says nothing about the next prompt's length.
        """
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

    def record_first_output(self, request_id: str) -> None:
        """Record a sequence's first output."""
        self._pending_tokens -= self._pending.pop(request_id, 0)

    def record_end(self, request_id: str) -> None:
        """Record that a sequence has left the engine, for whatever reason. Call once for each sequence."""
        self.record_first_output(request_id)
        self._live -= 1
        self._ends += 1

    def record_step(self) -> None:
        """Record the end of one engine step and the start of the next.

        Call this method only after all first outputs and all ends of sequences of the step were recorded.
        """
        self._ends_a_step += (self._ends - self._ends_a_step) / 64
        self._ends = 0
        computed = max(self._step_tokens - self._live, 1)
        self._work = min(max(self._work - computed, 0) + self._late, self._pending_tokens)
        self._late = 0

    def __repr__(self) -> str:
        pending_tokens = self._work + self._late
        return f"AdmissionWindow({self._live} live, {len(self._pending)} pending, {pending_tokens} tokens to compute)"
