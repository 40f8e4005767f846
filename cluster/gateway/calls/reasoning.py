"""Number of reasoning tokens of an ended call. Only tokens that this gateway has received are counted.

When an output ends, the worker reports the number of reasoning tokens in the whole output. The reasoning is assumed to
be the beginning of the output, because models reason first and then answer. So each gateway that delivers a part of a
resumed output can count the reasoning in its part, and no reasoning token is counted twice.
"""

from __future__ import annotations

from cluster.gateway.calls.call import Call


def reasoning_in_part(reasoning: int, first: int, end: int) -> int:
    """Return the number of reasoning tokens among the tokens [first, end) of an output. `reasoning`: number of
    reasoning tokens in the whole output."""
    return max(min(reasoning, end) - first, 0)


def new_reasoning_tokens(call: Call) -> int:
    """Return the number of reasoning tokens that this gateway has received for the call. It is never larger than the
    number that `token_times.new_tokens` returns."""
    return sum(
        reasoning_in_part(sequence.reasoning_tokens, sequence.restored, len(sequence.emitted))
        for sequence in call.sequences
        if sequence.reasoning_tokens
    )
