"""The open calls of a gateway: they are counted, and ended by aborts, by suspensions and by the stop of the gateway."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import EngineRequest, Sampling
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.open_calls import OpenCalls
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.gateway.text.detokenizer import TextSource
from cluster.policy.tenants.policy import TenantPolicy


class Text:
    """A text source that only stores token ids."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []


def open_call(
    number: int, model: str = "sim", tenant: str = "alpha", max_tokens: int = 8, streams: bool = False
) -> Call:
    """Return a call with one sequence. `streams`: whether the call is resumable and has sent its first token."""
    call = Call(
        id=f"cmpl-{number}",
        model=model,
        policy=TenantPolicy(tenant),
        rank=0,
        arrived=0.0,
        deadline=None,
        clock=time.monotonic,
        events=cast("CallEvents[Any]", None),
        request_id=f"request-{number}",
    )
    request = EngineRequest("", [1, 2, 3], Sampling(max_tokens=max_tokens))
    call.sequences.append(OutputSequence(call, 0, request, cast(TextSource, Text())))
    if streams:
        call.make_resumable(cast(ResumeTokens, object()))
        call.first_token_at = 1.0
    return call


def opened(calls: Sequence[Call], suspended: Sequence[str] = ()) -> OpenCalls:
    """Return the open calls of a gateway whose clock is `time.monotonic`. `suspended`: names of suspended tenants."""

    def tenant_error(tenant: str) -> CallError | None:
        return CallError(Outcome.PERMISSION_DENIED, "suspended") if tenant in suspended else None

    open_calls = OpenCalls(tenant_error, time.monotonic)
    for call in calls:
        open_calls.add(call)
    return open_calls


def outcomes(calls: Sequence[Call]) -> list[Outcome | None]:
    """Return the outcome of each call; None for a call without an error."""
    return [None if call.error is None else call.error.outcome for call in calls]


def test_counts_by_model() -> None:
    """The statistics count open calls by model, and are empty when the last call is removed."""
    calls = [open_call(1), open_call(2), open_call(3, "other")]
    open_calls = opened(calls)
    assert (open_calls.statistics(), open_calls.busy) == ({"sim": 2, "other": 1}, True)
    for call in calls:
        open_calls.remove(call)
    assert (open_calls.statistics(), open_calls.busy) == ({}, False)


def test_aborts_by_request_id_or_call_id_within_a_tenant() -> None:
    """A call is aborted by its request id or its call id. A tenant can abort only its own calls."""
    calls = [open_call(1), open_call(2, tenant="beta"), open_call(3)]
    open_calls = opened(calls)
    assert open_calls.abort("request-1", "beta") == []
    assert open_calls.abort("request-1") == ["alpha"]
    assert open_calls.abort("cmpl-2", "beta") == ["beta"]
    assert outcomes(calls) == [Outcome.CANCELLED, Outcome.CANCELLED, None]


def test_ends_the_calls_of_suspended_tenants_only() -> None:
    """Only calls of suspended tenants end. Their error says that the tenant is suspended."""
    calls = [open_call(1), open_call(2, tenant="beta")]
    opened(calls, suspended=["beta"]).end_suspended()
    assert outcomes(calls) == [None, Outcome.PERMISSION_DENIED]


def test_a_closed_gateway_refuses_calls_and_notifies_sessions() -> None:
    """`close` notifies each listener once. Afterwards, new calls are refused with the given reason."""
    open_calls, notified = opened([]), []
    open_calls.on_close.add(lambda: notified.append(True))
    open_calls.check_not_closing()
    open_calls.close("stopping")
    assert (open_calls.closing, notified) == (True, [True])
    with pytest.raises(CallError, match="this gateway is stopping; call another"):
        open_calls.check_not_closing()


async def test_hands_over_only_streams_that_can_be_resumed() -> None:
    """`hand_over` ends every resumable stream by the time `by`. Other calls continue until `end_all`."""
    long, short, plain = open_call(1, max_tokens=90, streams=True), open_call(2, streams=True), open_call(3)
    open_calls = OpenCalls(lambda tenant: None, lambda: 0.0)  # a busy machine would leave no time for the second stream
    for call in (short, long, plain):
        open_calls.add(call)
    await open_calls.hand_over(by=0.05)
    assert outcomes([long, short, plain]) == [Outcome.NO_WORKER, Outcome.NO_WORKER, None]
    open_calls.end_all()
    assert outcomes([plain]) == [Outcome.NO_WORKER]


async def test_streams_with_the_most_tokens_left_are_handed_over_first() -> None:
    """If there is not enough time to hand over all streams, the streams with the most tokens left are ended, so that
    their clients resume them at another gateway. The streams with the fewest tokens left continue on this gateway."""
    long, short = open_call(1, max_tokens=90, streams=True), open_call(2, streams=True)
    times = iter([0.0, 2.0])
    open_calls = OpenCalls(lambda tenant: None, lambda: next(times))
    for call in (short, long):
        open_calls.add(call)
    await open_calls.hand_over(by=0.02)
    assert outcomes([long, short]) == [Outcome.NO_WORKER, None]
