"""The record of a sampled call. When the call has ended, its spans are made from the record.

Problem: a trace must show where a call's time went, and a gateway handles a hundred thousand tokens a second.
Invariants: nothing is recorded for a token, or for a call that is not sampled. A record holds at most MAX_ATTEMPTS
attempts. Times are monotonic seconds, as everywhere in the gateway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cluster.api.request_times import RequestTimes
from cluster.api.types import WorkerIdentity
from cluster.observe.trace_context import TraceContext
from cluster.policy.routing.route_history import Route

MAX_ATTEMPTS: Final = 64
"""Maximum number of attempts of a call that are recorded. A call with many outputs or inputs may have more; the later
attempts are omitted."""

FINISHED: Final = "finished"
"""End of an attempt that has finished its sequence. Other ends: `lost`, `moved` (from a draining worker), `error`,
`refused`, `hedged` (the other worker of a hedged sequence has kept it), and `aborted` (the call has ended)."""


@dataclass(eq=False, slots=True)
class Attempt:
    """The record of one attempt: a sequence was sent to one worker in a Submit message, and ran there until it left the
    worker."""

    clock: Callable[[], float]
    context: TraceContext
    """Context of the attempt's span, which the worker gets."""
    sequence: int
    number: int
    """Number of the attempt in its sequence, from 1."""
    route: Route
    worker: WorkerIdentity
    tokens_before: int
    """Number of tokens that earlier attempts had emitted."""
    sent_at: float
    submitted_at: float = 0.0
    """Time at which the request was given to the link; 0 if it was not."""
    is_hedge: bool = False
    times: RequestTimes | None = None
    """Durations that the worker has reported; None from a worker that measures none."""
    ended_at: float | None = None
    last_token_at: float = 0.0
    """Time of the sequence's last token, or of its end."""
    end_reason: str = ""

    def submitted(self) -> None:
        """Record that the request was given to the link."""
        self.submitted_at = self.clock()

    def add_times(self, times: RequestTimes) -> None:
        """Add durations that the worker reports."""
        if self.times is None:
            self.times = times
        else:
            self.times.update(times)

    def end(self, reason: str, last_token_at: float = 0.0) -> None:
        """Record the end of the attempt. `last_token_at`: time of the attempt's last token; 0 means now. Further calls
        change nothing."""
        if self.ended_at is None:
            self.ended_at, self.end_reason = self.clock(), reason
            self.last_token_at = last_token_at or self.ended_at

    def end_time(self, call_ended_at: float) -> float:
        """Return the time at which the attempt ended, or `call_ended_at` if no end of the attempt was recorded."""
        return call_ended_at if self.ended_at is None else self.ended_at


@dataclass(eq=False, slots=True)
class CallTrace:
    """The record of one sampled call."""

    clock: Callable[[], float]
    context: TraceContext
    """Context of the call's span."""
    new_span_id: Callable[[], str]
    arrived: float
    parent_id: str = ""
    """Id of the caller's span; "" without one."""
    trace_state: str = ""
    queued_at: float | None = None
    """Time at which the call was admitted; None for a call that was not admitted."""
    attempts: list[Attempt] = field(default_factory=list)
    omitted_attempts: int = 0
    _numbers: dict[int, int] = field(default_factory=dict)

    @property
    def trace_id(self) -> str:
        """Id of the trace."""
        return self.context.trace_id

    def queued(self) -> None:
        """Record that the call is admitted, and that its sequences enter the queue."""
        self.queued_at = self.clock()

    def begin_attempt(
        self, sequence: int, route: Route, worker: WorkerIdentity, tokens_before: int, *, is_hedge: bool = False
    ) -> Attempt | None:
        """Record that a sequence is sent to a worker. Returns None if MAX_ATTEMPTS attempts of the call are recorded
        already."""
        if len(self.attempts) >= MAX_ATTEMPTS:
            self.omitted_attempts += 1
            return None
        number = self._numbers[sequence] = self._numbers.get(sequence, 0) + 1
        attempt = Attempt(
            self.clock,
            TraceContext(self.trace_id, self.new_span_id(), True),
            sequence,
            number,
            route,
            worker,
            tokens_before,
            route.sent_at,
            is_hedge=is_hedge,
        )
        self.attempts.append(attempt)
        return attempt


@dataclass(frozen=True, slots=True)
class SequenceFacts:
    """Facts that the trace records about one sequence of an ended call. A sequence is one output, or one input of a
    pooling call."""

    tokens: int = 0
    """Number of tokens, on all workers."""
    finish_reason: str = ""
    parser: str = ""
    """Name of the parser of tool calls; "" without one."""


@dataclass(frozen=True, slots=True)
class CallFacts:
    """Facts that the trace records about an ended call. Texts of the call are not recorded."""

    operation: str
    outcome: str
    ended_at: float
    api: str
    tenant: str
    request_id: str
    requested_model: str
    model: str = ""
    """Name of the model or adapter that has served the call; "" if the call was refused before one was chosen."""
    is_known_model: bool = False
    """Whether the requested model exists. The name of an unknown model is not used in the names of spans."""
    is_error: bool = False
    """Whether the outcome is a failure of the cluster or of the request. A cancellation by the caller is not."""
    version: str = ""
    response_id: str = ""
    priority_class: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    ttft_s: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    resumes: int = 0
    is_continued: bool = False
    """Whether the call began at another gateway."""
    sequences: tuple[SequenceFacts, ...] = ()
