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
from cluster.gateway.calls.sequence import CALLER_FIELDS, CallSequence
from cluster.gateway.links.worker_link import WorkerLink
from cluster.policy.fairness.order import Waiting
from cluster.policy.routing.version_split import Versions
from cluster.wire.codec import most_submit_bytes, submit_bytes
from cluster.wire.fairness_codec import WeightedValue

if TYPE_CHECKING:
    from cluster.gateway.usage.accounting import Accounting


MAX_SUBMIT_BYTES = 100_000
"""Of a request as it goes to a worker, without token ids: what a worker decodes in about a millisecond."""


def check_size(request: EngineRequest) -> None:
    """Raise CallError for a request that no worker should have to read, before it is queued."""
    if most_submit_bytes(request) <= MAX_SUBMIT_BYTES:
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
    output: CallSequence,
    link: WorkerLink,
    waiting: Waiting,
    accounting: Accounting | None,
    now: float,
    fresh_tokens: int = 0,
) -> bool:
    """Send a sequence that waits for nothing any longer to this worker; False when it could not be sent, after which
    its call has ended. Of one that goes on `fresh_tokens` are likely to be computed, 0 for all."""
    call = output.call
    if call.error is not None:  # another of its sequences has ended it; its face is about to leave
        return False
    sealed: bytes | None = None
    try:
        sealed = b"" if accounting is None else accounting.open(output, link)
        slot = _send(output, link, waiting, sealed, fresh_tokens)
    except BaseException as error:
        if accounting is not None and sealed is not None:
            accounting.refused(output)
        call.fail_unexpectedly(error)
        return False
    if output.index == 0 and not output.emitted:
        call.usage.queue_s = now - call.arrived
    call.began_at = call.began_at or link.identity
    if call.versions.all:
        call.versions = Versions(link.identity.version, frozenset((link.identity.version,)))
    output.bound(link, slot)
    return True


def _send(output: CallSequence, link: WorkerLink, waiting: Waiting, sealed: bytes, fresh_tokens: int) -> int:
    """The slot of the sent request."""
    call = output.call
    if output.resuming == "moved":  # its last worker has given back what it was not to generate
        waiting = replace(waiting, output_tokens=len(output.emitted))
    turn = WeightedValue(waiting, call.policy.weight)
    earlier = len(output.emitted) - output.restored
    stream = None if call.tickets is None else call.tickets.stream(output.index)
    return link.submit(output.submission(), output, output.attempt, sealed, turn, earlier, fresh_tokens, stream)
