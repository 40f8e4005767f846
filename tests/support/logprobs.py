"""Calls with log probabilities, without a worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from cluster.api.types import EngineRequest, PositionLogprobs, Sampling
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.text.logprobs import TokenLogprob
from cluster.policy.tenants.policy import TenantPolicy
from tests.gateway.text.test_parsed_text import PlainText


class NoPositions:
    """A LogprobSource without positions: the tests add the log probabilities themselves."""

    def push(self, positions: Iterable[PositionLogprobs]) -> list[TokenLogprob]:
        """Implements `LogprobSource.push`."""
        return []

    def restore(self, token_ids: Sequence[int]) -> None:
        """Implements `LogprobSource.restore`."""


def logprob_call(outputs: int = 1) -> Call:
    """Return a running call with log probabilities."""
    call = Call("c", "m", TenantPolicy("t"), 0, 1.0, None, lambda: 2.0, cast("CallEvents[Any]", None))
    for index in range(outputs):
        request = EngineRequest("", [1], Sampling(max_tokens=99))
        call.sequences.append(OutputSequence(call, index, request, PlainText(), NoPositions()))
    return call


def token(number: int, alternatives: int) -> TokenLogprob:
    """Return the log probability of a token. `number`: its token id."""
    top = tuple(TokenLogprob(number + i, f" é{i}", f" é{i}".encode(), -0.5 - i) for i in range(alternatives))
    return TokenLogprob(number, " é0", b" \xc3\xa90", -0.5, top)


def generate(call: Call, tokens: int, alternatives: int, index: int = 0) -> list[TokenLogprob]:
    """Add tokens with log probabilities to a sequence of the call. Returns the log probabilities."""
    sequence = call.sequences[index]
    start = len(sequence.emitted)
    new = [token(start + i, alternatives) for i in range(tokens)]
    sequence.detokenizer.push([t.token_id for t in new])
    sequence.pieces.logprobs.extend(new)
    call.output.wake()
    return new
