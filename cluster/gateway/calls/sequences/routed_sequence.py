"""A sequence as the scheduler sees it: the request, the worker that runs it, and the earlier workers.

life.py decides the state of a sequence; the class in this module acts on the state.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from cluster.api.types import EngineRequest, WorkerIdentity
from cluster.gateway.calls.sequences.life import Event, Life, State
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.tracing.call_trace import FINISHED, Attempt
from cluster.policy.routing.route_history import Route


class Identified(Protocol):
    """The part of a call's interface that a routed sequence uses."""

    id: str


Owner = TypeVar("Owner", bound=Identified)


@dataclass(eq=False, repr=False, slots=True)
class RoutedSequence(Generic[Owner]):
    """One sequence: its request, its state, and its slot on the link to its worker. While the sequence waits for a
    worker, it has no link."""

    call: Owner
    index: int
    request: EngineRequest
    life: Life = field(kw_only=True, default_factory=Life)
    emitted: list[int] = field(init=False, default_factory=list)
    """Tokens emitted so far. This is the detokenizer's own list, which leaves out the tokens after a stop string."""
    key: str = field(init=False)
    """Name of the sequence in this gateway's queues and accounts."""
    link: WorkerLink | None = field(init=False, default=None)
    slot: int = field(init=False, default=0)
    worker: WorkerIdentity | None = field(init=False, default=None)
    """The last worker of the sequence. While the sequence is hedged, this is the first worker."""
    restored: int = field(init=False, default=0)
    """Number of emitted tokens that the sequence took over from an earlier stream of the call, at this or another
    gateway."""
    admitted: bool = field(init=False, default=False)
    """Whether an engine has accepted the sequence."""
    finish_reason: str = field(init=False, default="")
    """Reason of the end in the words of the APIs; "" until the sequence has finished."""
    cached_tokens: int = field(init=False, default=0)
    """Number of prompt tokens that were cached on the first worker that sent output of the sequence to this gateway."""
    route: Route | None = field(init=False, default=None)
    """The decision by which the sequence was sent to its worker."""
    last_token_at: float = field(init=False, default=0.0)
    """Monotonic time of the sequence's last token."""
    traced: Attempt | None = field(init=False, default=None)
    """Record of the current attempt, if the call is sampled and the sequence is with a worker."""

    def __post_init__(self) -> None:
        self.key = f"{self.call.id}#{self.index}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key} tokens {len(self.emitted)} {self.life.state.value}>"

    @property
    def state(self) -> State:
        """State of the sequence."""
        return self.life.state

    @property
    def tokens(self) -> int:
        """Number of prompt tokens and emitted tokens together. A new worker must compute all of them before the next
        token."""
        return len(self.request.prompt_token_ids) + len(self.emitted)

    @property
    def silent_since(self) -> float | None:
        """Monotonic time of the first worker loss since the sequence's last token; None if no worker was lost since
        then."""
        return self.life.silent_since(len(self.emitted))

    @property
    def suspect(self) -> bool:
        """Whether the sequence has lost so many workers in a row that it may be the cause of the losses
        (worker_losses.py)."""
        return self.life.suspect(len(self.emitted))

    def set_route(self, route: Route) -> None:
        """Record the routing decision for the next worker."""
        self.route = route

    def restore_losses(self, losses: tuple[str, ...]) -> None:
        """Record worker losses that happened while the sequence ran at other gateways. `losses`: names of the links to
        the lost workers."""
        self.life.restore_losses(losses, len(self.emitted))

    # ---- the worker

    def submission(self) -> EngineRequest:
        """Return the request for the next worker, including the tokens emitted so far."""
        if not self.emitted:
            return self.request
        return replace(self.request, emitted_token_ids=tuple(self.emitted))

    def set_adapter(self, digest: str) -> None:
        """Set the digest of the adapter in the request, before the request is sent."""
        self.request = replace(self.request, adapter=digest)

    def bind(self, link: WorkerLink, slot: int, traced: Attempt | None = None) -> None:
        """Record the worker and the slot to which the request was sent. `traced`: record of the attempt, if the call is
        sampled."""
        self.link, self.slot, self.worker, self.traced = link, slot, link.identity, traced
        key = None
        if not self.emitted:
            key = link.compatibility_key if self.request.sampling.is_seeded else link.unseeded_key
        self.life.submitted(link.identity.incarnation, key)

    def end_attempt(self, reason: str) -> None:
        """Record in the call's trace that the sequence has left its worker. Does nothing if the call is not sampled.
        `reason`: why it has left, such as `lost` or `error` (call_trace.FINISHED)."""
        traced, self.traced = self.traced, None
        if traced is not None:
            traced.end(reason, 0.0 if reason == FINISHED else self.last_token_at)

    def leave_engine(self) -> None:
        """Abort the sequence in the engine, if the sequence runs there."""
        if self.link is not None:
            self.link.abort(self.slot)
            self.link = None

    # ---- the end

    def finish(self, reason: str) -> None:
        """Finish the sequence normally. Its tokens are kept. `reason`: the finish reason."""
        self.finish_reason = reason
        self.life.apply(Event.FINISHED)
        self.end_attempt(FINISHED)

    def end(self) -> None:
        """End the sequence because its call ends, and abort the sequence in the engine."""
        self.life.apply(Event.FAILED)
        self.end_attempt("aborted")
        self.leave_engine()

    def unlink_call(self) -> None:
        """Drop the reference to the ended call, so that the call and the sequence are freed without the garbage
        collector."""
        del self.call
