"""The usage of a call, for the answer to the caller, for logs and for metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.gateway.calls.sequences.routed_sequence import RoutedSequence


@dataclass(slots=True)
class CallUsage:
    """Usage of a call: the token counts as the engine reports them, and the queue time and the time to first token in
    seconds."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Number of completion tokens that are reasoning. Known at the end of the call."""
    queue_s: float = 0.0
    ttft_s: float = 0.0
    resumed: int = 0
    """Number of resumes on another worker, over all sequences of the call."""
    resume: str = ""
    """The weakest resume capability (RESUME_CAPABILITIES) of all workers that resumed a sequence of the call; "" if no
    sequence was resumed."""

    def count_tokens(self, sequences: Sequence[RoutedSequence[Any]]) -> None:
        """Set the number of completion tokens to the number of tokens that the sequences of the call have received so
        far."""
        self.completion_tokens = sum(len(sequence.emitted) for sequence in sequences)
