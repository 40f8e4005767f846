"""Sending one sequence to the worker that routing chose: as a whole, or not at all.

Problem: this runs in the reader of a link, in the pass that serves all waiting calls, or while a lost worker's calls
move. An exception of one call here would end that link, and with it the calls of every tenant on it.
Invariant: `submit` raises nothing of one call's; a sequence that could not be sent holds no slot, credit, account or
trial, and its call ends INTERNAL.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.api.outcomes import invalid
from cluster.api.types import EngineRequest
from cluster.gateway.calls.call import CallSequence
from cluster.gateway.calls.sequence import CALLER_FIELDS
from cluster.gateway.links.worker_link import WorkerLink
from cluster.policy.fairness.order import WaitingSequence
from cluster.wire.codec import max_submit_bytes, submit_bytes
from cluster.wire.fairness_codec import WeightedValue

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting


MAX_SUBMIT_BYTES = 100_000
"""Of a request as it goes to a worker, without token ids: what a worker decodes in about a millisecond."""


def check_size(request: EngineRequest) -> None:
    """Raise CallError for a request that no worker should have to read, before it is queued."""
    if max_submit_bytes(request) <= MAX_SUBMIT_BYTES:
        return
    parts = submit_bytes(request)
    total = sum(parts.values())
    if total > MAX_SUBMIT_BYTES:
        field = max(parts, key=lambda name: parts[name])
        raise invalid(
            CALLER_FIELDS.get(field, field),
            f"the request has {total} bytes beside its prompt, {parts[field]} of them in this field; "
            f"at most {MAX_SUBMIT_BYTES} are sent to a worker: shorten it",
        )


def submit(
    sequence: CallSequence,
    link: WorkerLink,
    waiting: WaitingSequence,
    accounting: Accounting | None,
    now: float,
    fresh_tokens: int = 0,
) -> bool:
    """Send a sequence that waits for nothing any longer to this worker; False when it could not be sent, after which
    its call has ended. Of one that goes on `fresh_tokens` are likely to be computed, 0 for all."""
    call = sequence.call
    if call.error is not None:  # another of its sequences has ended it; its API is about to leave it
        return False
    sealed: bytes | None = None
    try:
        sealed = b"" if accounting is None else accounting.open(sequence, link)
        slot = _send(sequence, link, waiting, sealed, fresh_tokens)
    except BaseException as error:
        if accounting is not None and sealed is not None:
            accounting.refused(sequence)
        call.fail_unexpectedly(error)
        return False
    call.submitted(sequence, link.identity, now)
    sequence.bind(link, slot)
    return True


def _send(sequence: CallSequence, link: WorkerLink, waiting: WaitingSequence, sealed: bytes, fresh_tokens: int) -> int:
    """The slot of the sent request."""
    call = sequence.call
    if sequence.moved:  # its last worker has given back what it was not to generate
        waiting = replace(waiting, output_tokens=len(sequence.emitted))
    turn = WeightedValue(waiting, call.policy.weight)
    earlier = len(sequence.emitted) - sequence.restored
    stream = None if call.resume_tokens is None else call.resume_tokens.stream(sequence.index)
    return link.submit(sequence.submission(), sequence, sequence.attempt, sealed, turn, earlier, fresh_tokens, stream)
