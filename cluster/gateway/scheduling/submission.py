"""Submission of one sequence to the worker that routing picked. A sequence is submitted completely or not at all.

Problem: this code runs in the task that reads a link, in loops over all waiting calls or over the calls of a lost
worker. An exception of one call would end that link, and with the link the calls of every tenant on that worker.

Invariant: `submit` raises no error that one call causes. If a sequence could not be sent, everything that was taken for
it is given back (slot, credit, open record, probe), and its call ends with INTERNAL.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from cluster.api.outcomes import invalid
from cluster.api.types import EngineRequest
from cluster.gateway.calls.call import CallSequence
from cluster.gateway.calls.sequences.engine_errors import CALLER_FIELDS
from cluster.gateway.calls.sequences.hedge import Hedge
from cluster.gateway.links.worker_link import SubmittedRequest, WorkerLink
from cluster.gateway.tracing.call_trace import Attempt
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.routing.route_history import Route
from cluster.process.call_errors import is_call_failure
from cluster.wire.codecs.codec import max_submit_bytes, submit_bytes
from cluster.wire.codecs.fairness_codec import WeightedValue

if TYPE_CHECKING:
    from cluster.gateway.usage.open_accounts import OpenAccounts

log = structlog.get_logger("dispatch")

MAX_SUBMIT_BYTES = 100_000
"""Size in bytes of the largest request on a link, without the token ids. A worker decodes such a request in about a
millisecond."""


def check_size(request: EngineRequest) -> None:
    """Check the size of a request before the request is queued. Raises CallError for a request that is too large for a
    worker."""
    if max_submit_bytes(request) <= MAX_SUBMIT_BYTES:
        return
    parts = submit_bytes(request)
    total = sum(parts.values())
    if total > MAX_SUBMIT_BYTES:
        field = max(parts, key=lambda name: parts[name])
        raise invalid(
            CALLER_FIELDS.get(field, field),
            f"the request has {total} bytes beside its prompt, {parts[field]} of them in this field; "
            f"at most {MAX_SUBMIT_BYTES} are allowed: shorten this field",
        )


def submit(
    sequence: CallSequence,
    link: WorkerLink,
    waiting: WaitingSequence,
    accounts: OpenAccounts | None,
    now: float,
    fresh_tokens: int = 0,
    cached_tokens: int = 0,
) -> bool:
    """Send a sequence to a worker. The caller must have removed the sequence from its queue. Returns False if the
    sequence could not be sent; then its call has ended. `fresh_tokens`: number of tokens of a resumed sequence that the
    worker is likely to compute; 0 means all tokens. `cached_tokens`: number of tokens of a new sequence that are
    expected in the worker's cache."""
    call = sequence.call
    if call.error is not None:  # another sequence has ended the call, and the API is about to close it
        return False
    sealed: bytes | None = None
    traced = _traced(sequence, sequence.route, link)
    try:
        sealed = b"" if accounts is None else accounts.open(sequence, link)
        slot = _send(sequence, link, waiting, sealed, fresh_tokens, cached_tokens, traced)
    except BaseException as error:
        if accounts is not None and sealed is not None:
            accounts.refused(sequence)
        if traced is not None:
            traced.end("error")
        call.fail_unexpectedly(error)
        return False
    if traced is not None:
        traced.submitted()
    call.submitted(sequence, link.identity, now)
    sequence.bind(link, slot, traced)
    return True


def submit_hedge(
    sequence: CallSequence,
    link: WorkerLink,
    route: Route,
    waiting: WaitingSequence,
    accounts: OpenAccounts | None,
    cached_tokens: int,
) -> bool:
    """Send a sequence that has no output yet to a second worker too. `route`: the decision for the second worker.
    `cached_tokens`: number of the sequence's tokens that are expected in this worker's cache. Returns False if the
    sequence could not be sent; then it stays on its first worker only. The service charge does not increase, because
    the prompt is already charged for the first worker."""
    call, traced = sequence.call, _traced(sequence, route, link, is_hedge=True)
    hedge = Hedge(sequence, link, route, traced)
    weighted = WeightedValue(replace(waiting, output_tokens=0), call.policy.weight)
    stream = None if call.resume_tokens is None else call.resume_tokens.stream(sequence.index)
    sealed = b"" if accounts is None else accounts.hedged(sequence, link)
    try:
        # Of an attempt with a number above 1, the worker counts only changes of the charge.
        request = _with_context(sequence.submission(), traced)
        submitted = SubmittedRequest(
            request, sequence.life.attempt + 1, sealed, weighted, stream=stream, cached_tokens=cached_tokens
        )
        slot = link.submit(submitted, hedge)
    except BaseException as error:
        if accounts is not None:
            accounts.refused(sequence)
        if traced is not None:
            traced.end("error")
        if not is_call_failure(error):
            raise
        log.warning("call.hedge_failed", **call.log_fields, exc_info=error)
        return False
    if traced is not None:
        traced.submitted()
    hedge.bind(slot)
    return True


def _traced(sequence: CallSequence, route: Route | None, link: WorkerLink, *, is_hedge: bool = False) -> Attempt | None:
    """Return the record of an attempt that begins now; None if the call is not sampled."""
    trace = sequence.call.trace
    if trace is None or route is None:
        return None
    return trace.begin_attempt(sequence.index, route, link.identity, len(sequence.emitted), is_hedge=is_hedge)


def _with_context(request: EngineRequest, traced: Attempt | None) -> EngineRequest:
    """Return a copy of the request with the trace context of an attempt, which shows the worker that the call is
    sampled. Without an attempt, return the request itself."""
    return request if traced is None else replace(request, traceparent=traced.context.traceparent)


def _send(
    sequence: CallSequence,
    link: WorkerLink,
    waiting: WaitingSequence,
    sealed: bytes,
    fresh_tokens: int,
    cached_tokens: int,
    traced: Attempt | None,
) -> int:
    """Send the request of a sequence and return its slot (its number on the link)."""
    call = sequence.call
    if sequence.life.reason == "moved":  # the last worker has given back the charge for tokens that were not generated
        waiting = replace(waiting, output_tokens=len(sequence.emitted))
    weighted = WeightedValue(waiting, call.policy.weight)
    earlier = len(sequence.emitted) - sequence.restored
    stream = None if call.resume_tokens is None else call.resume_tokens.stream(sequence.index)
    submitted = SubmittedRequest(
        _with_context(sequence.submission(), traced),
        sequence.life.attempt,
        sealed,
        weighted,
        earlier,
        fresh_tokens,
        stream,
        cached_tokens,
    )
    return link.submit(submitted, sequence)
