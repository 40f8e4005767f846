"""Reasoning tokens of an ended call, by sequence and by the part of a sequence that one gateway has delivered.

A worker reports the number of reasoning tokens when an output ends, for the whole output. Reasoning is taken to be the
beginning of an output, because models reason first and then answer. So each gateway that delivers a part of a resumed
output counts the reasoning in its own part, and no reasoning token is counted in two parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cluster.gateway.calls.call import Call


def reasoning_in_part(reasoning: int, first: int, end: int) -> int:
    """Return the number of reasoning tokens among an output's tokens from position `first` up to `end`. `reasoning`:
    number of reasoning tokens in the whole output."""
    return max(min(reasoning, end) - first, 0)


def divide(total: int, tokens: Sequence[int]) -> list[int]:
    """Divide `total` reasoning tokens among outputs with these numbers of tokens, in proportion to the numbers. No
    output gets more than it has tokens. What exceeds the sum of the tokens is dropped."""
    whole = sum(tokens)
    total = min(total, whole)
    bounds = [total * before // max(whole, 1) for before in itertools.accumulate(tokens, initial=0)]
    return [end - start for start, end in itertools.pairwise(bounds)]


def reasoning_by_sequence(call: Call) -> list[int]:
    """Return the number of reasoning tokens in the whole output of each sequence, 0 for an output that has not ended.

    A call knows the sum over its sequences only. The sum is divided in proportion to the tokens, so for a call with
    several outputs the numbers are estimates with the exact sum."""
    ended = [
        len(sequence.emitted) if sequence.finish_reason and len(sequence.emitted) > sequence.restored else 0
        for sequence in call.sequences
    ]
    return divide(call.usage.reasoning_tokens, ended)


def new_reasoning_tokens(call: Call) -> int:
    """Return the number of reasoning tokens that this gateway has received for the call, at most `new_tokens`."""
    return sum(
        reasoning_in_part(reasoning, sequence.restored, len(sequence.emitted))
        for sequence, reasoning in zip(call.sequences, reasoning_by_sequence(call), strict=True)
    )
