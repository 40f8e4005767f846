"""Number of reasoning tokens of an ended call. Of each output, only the tokens that this gateway has received count.

A worker reports the number of reasoning tokens when an output ends, for the whole output. Reasoning is taken to be the
beginning of an output, because models reason first and then answer. So each gateway that delivers a part of a resumed
output counts the reasoning in this part, and no reasoning token is counted twice.
"""

from __future__ import annotations

from cluster.gateway.calls.call import Call


def reasoning_in_part(reasoning: int, first: int, end: int) -> int:
    """Return the number of reasoning tokens among the tokens [first, end) of an output. `reasoning`: number of
    reasoning tokens in the whole output."""
    return max(min(reasoning, end) - first, 0)


def new_reasoning_tokens(call: Call) -> int:
    """Return the number of reasoning tokens that this gateway has received for the call, at most as many as
    `token_times.new_tokens` returns."""
    return sum(
        reasoning_in_part(sequence.reasoning_tokens, sequence.restored, len(sequence.emitted))
        for sequence in call.sequences
        if sequence.reasoning_tokens
    )
