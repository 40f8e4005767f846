"""Number and pace of the tokens that this gateway has received for a call."""

from __future__ import annotations

from cluster.gateway.calls.call import Call


def new_tokens(call: Call) -> int:
    """Return the number of tokens that this gateway has received for the call."""
    tokens = 0
    for sequence in call.sequences:  # a loop, since it is called for all open calls several times a second
        tokens += len(sequence.emitted) - sequence.restored
    return tokens


def mean_gap_s(call: Call) -> float:
    """Return the mean seconds between the tokens of the call's first sequence, as this gateway received them; 0 with
    fewer than two tokens."""
    first = call.sequences[0]
    tokens = len(first.emitted) - first.restored
    if call.first_token_at is None or tokens < 2:
        return 0.0
    return max(first.last_token_at - call.first_token_at, 0.0) / (tokens - 1)
