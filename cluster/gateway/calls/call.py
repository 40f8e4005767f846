"""The state of a call from arrival to end: the sequences, the counts, and the notification of the call's API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import structlog

from cluster.api.adapters import full_name
from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import TokenOutput, WorkerIdentity, weakest_resume_capability
from cluster.gateway.adapters import name_of
from cluster.gateway.calls.sequence import OutputSequence
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.tool_call_ids import NUMBERED, numbered_id, tool_call_id
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.gateway.tracing.call_trace import CallTrace
from cluster.observe.log import ids_of_call
from cluster.observe.metrics import Histogram
from cluster.policy.routing.version_split import Versions
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")

CallSequence: TypeAlias = "OutputSequence[Call]"


@dataclass(slots=True)
class CallUsage:
    """Usage of a call: the token counts as the engine reports them, and the queue time and the time to first token in
    seconds."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion tokens, those of reasoning. Known at the end of the call."""
    queue_s: float = 0.0
    ttft_s: float = 0.0
    resumed: int = 0
    """Number of resumes on another worker, over all sequences of the call."""
    resume: str = ""
    """The weakest resume capability (RESUME_CAPABILITIES) of all workers that resumed a sequence of the call; "" if no
    sequence was resumed."""


@dataclass(eq=False, slots=True)  # slots: with this many attributes, each access through a dictionary would be slower
class Call:
    """A call from arrival to end. `rank` is the rank of the call's priority class. `arrived` and `deadline` are times
    of `clock`."""

    is_pooling: ClassVar[bool] = False
    """Whether the sequences become vectors and no tokens: pooling_call.py."""
    id: str
    model: str
    policy: TenantPolicy
    rank: int
    arrived: float
    deadline: float | None
    clock: Callable[[], float]
    events: CallEvents[CallSequence]
    itl: Histogram | None = None
    """Histogram of the time between tokens."""
    request_id: str = ""
    api: str = ""
    """Name of the API that received the call."""
    key_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels for the usage records of the call."""
    versions: Versions = field(default_factory=Versions)
    """Model versions on which the first sequence may begin. The other sequences use the version on which the first
    sequence has begun."""
    bundle_digest: str = ""
    """Digest of the tokenizer bundle with which the prompt was encoded."""
    counted: bool = False
    """Whether the call is already counted as a request of the call's tenant."""
    tool_calls_before: int = 0
    """Number of tool calls in the chat's history."""
    adapter: str = ""
    """Name of the model's adapter that serves the call; "" for the model itself."""
    trace_id: str = ""
    """Id of the trace that the caller has named or that this gateway has begun for a sampled call; "" without one."""
    trace: CallTrace | None = None
    """Record for the spans of the call; None if the call is not sampled."""
    affinity: int = 0
    """Hash of the tenant and the call's affinity key, in [1, 2**64); 0 without a key."""
    began_at: WorkerIdentity | None = None
    """The worker that got the call's first Submit."""
    sequences: list[CallSequence] = field(default_factory=list)
    usage: CallUsage = field(default_factory=CallUsage)
    error: CallError | None = None
    headers: Sequence[tuple[str, str]] = ()
    """Response headers, including the state of the tenant's limits at admission."""
    resume_tokens: ResumeTokens | None = None
    """Generator of the resume tokens in the call's chunks; None if the call is not resumable."""
    is_resumed: bool = False
    """Whether the call began at another gateway. That gateway has counted the prompt and the tokens that it
    delivered."""
    terms: ResumeTerms = ResumeTerms.FREE
    """Terms of the call's resume, which decide who pays if the prompt is computed again."""
    blamed: bool = False
    """Whether the call may have crashed its workers. A blamed call must not be resumed."""
    first_token_at: float | None = None
    _silent_since: float = 0.0
    """Time of the last keep-alive."""
    _silent: bool = False
    """Whether a keep-alive is due on the caller's connection."""
    _listener: Callable[[], None] | None = None
    _pays_again: bool = False
    _origin_lost: bool | None = None
    _waiter: asyncio.Future[None] | None = None
    _news: bool = False

    @property
    def shown_model(self) -> str:
        """Name of the model or adapter that serves the call, as callers know it."""
        return full_name(self.model, self.adapter)

    @property
    def shown_id(self) -> str:
        """Call id that the caller knows. For a resumed call this is the id from the first gateway."""
        return self.resume_tokens.head.call_id if self.is_resumed and self.resume_tokens is not None else self.id

    def tool_call_id(self, index: int, call: int, name: str) -> str:
        """Return the id of a tool call in the answer. `index`: the choice. `call`: the tool call in the choice, from 0.
        `name`: the called function. The id depends only on these, on the request and on the call's id, so it is the
        same after a resume at another gateway."""
        if self.sequences[index].tool_parser in NUMBERED:
            return numbered_id(name, self.tool_calls_before + call)
        return tool_call_id(self.shown_id, index, call)

    @property
    def tenant(self) -> str:
        """Name of the call's tenant."""
        return self.policy.name

    @property
    def log_fields(self) -> Mapping[str, str]:
        """Fields of log lines about the call."""
        return ids_of_call(self.request_id, self.trace_id)

    @property
    def flow(self) -> str:
        """Key of the call's tenant in the fair queue. The key is the handle under which workers know the tenant."""
        return self.policy.handle or self.policy.name

    @property
    def prompt_computed(self) -> bool:
        """Whether an engine has computed the call's prompt. If the worker was lost before any token, the prompt is not
        charged."""
        return self.first_token_at is not None or (
            self.error is None and any(sequence.computed for sequence in self.sequences)
        )

    @property
    def charged_prompt_tokens(self) -> int:
        """Number of prompt tokens that are charged to the tenant's limits."""
        return self.usage.prompt_tokens if self.prompt_computed and self.pays_prompt else 0

    @property
    def pays_prompt(self) -> bool:
        """Whether this gateway charges the prompt. If a client ended a resumed call before any token arrived, the
        prompt may have been computed again."""
        if not self.is_resumed or self._pays_again:
            return True
        unknown = self._origin_lost is None and self.terms is not ResumeTerms.FREE
        return unknown and self.error is None and any(sequence.computed for sequence in self.sequences)

    # ---- operations of the service, the scheduler and the APIs

    def make_resumable(self, tokens: ResumeTokens) -> None:
        """Make the call resumable: from now on its chunks carry tokens from this generator."""
        self.resume_tokens = tokens

    def continue_from(self, request_id: str) -> None:
        """Mark the call as one that began at another gateway under this request id."""
        self.is_resumed = True
        self.request_id = self.request_id and request_id

    def claim(self, terms: ResumeTerms) -> None:
        """Set the terms on which the call's resume tokens were claimed."""
        self.terms = terms

    def set_versions(self, versions: Versions) -> None:
        """Set the model versions on which the call may begin."""
        self.versions = versions

    def submitted(self, sequence: CallSequence, identity: WorkerIdentity, now: float) -> None:
        """Record the submission of a sequence to this worker."""
        if sequence.index == 0 and not sequence.emitted:
            self.usage.queue_s = now - self.arrived
        self.began_at = self.began_at or identity
        if self.versions.all:
            self.versions = Versions(identity.version, frozenset((identity.version,)))

    def set_adapter(self, sequence: CallSequence, digest: str) -> None:
        """Set the digest of the adapter in the request of a sequence without output, which was made before the digest
        was known or before it has changed."""
        sequence.set_adapter(digest)
        if (tokens := self.resume_tokens) is not None and not self.is_resumed:
            tokens.head = replace(tokens.head, adapter_digest="" if name_of(digest) else digest)

    def blame(self, error: CallError) -> None:
        """End the call with `error`, because the call may have crashed its workers."""
        self.blamed = True
        self.fail(error)

    def add_label(self, name: str, value: str) -> None:
        """Add a label to the call's usage records."""
        self.labels = {**self.labels, name: value}

    def add_headers(self, headers: Sequence[tuple[str, str]]) -> None:
        """Add headers to the response of the call."""
        self.headers = (*self.headers, *headers)

    def fall_silent(self, now: float) -> None:
        """Make the call's API send a keep-alive."""
        self._silent_since, self._silent = now, True
        self.wake()

    def pop_keepalive(self) -> bool:
        """Return whether a keep-alive is due, which the API then sends."""
        due, self._silent = self._silent, False
        return due

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Set the function that is called at every update, for an API that batches the updates of many calls. With
        None, updates wake `news` again."""
        self._listener = listener

    # ---- reports of its sequences

    def began(self, sequence: CallSequence, output: TokenOutput) -> None:
        """Handle the first output that a worker sends for a sequence."""
        cached = output.cached_tokens or 0
        if sequence.route is not None:
            sequence.route.begin(cached, self.clock())
        if not sequence.emitted:
            if sequence.index == 0:
                self.usage.prompt_tokens, self.usage.cached_tokens = output.prompt_tokens or 0, cached
            self.events.began(sequence, cached)
        if sequence.link is not None:
            self.events.answered(sequence.link)
        self._origin_lost = output.origin_lost
        if self.is_resumed and (
            self.terms is ResumeTerms.PAID or (self.terms is ResumeTerms.IF_ALIVE and not output.origin_lost)
        ):
            self._pays_again = True  # the client pays for the second computation of the prompt

    def progressed(self, sequence: CallSequence, tokens: int, now: float) -> None:
        """Handle the tokens of a step, if the output is more than one plain token."""
        if self.first_token_at is None:
            self.first_token_at = now
            self.usage.ttft_s = now - self.arrived
        elif self.itl is not None and sequence.last_token_at:
            self.itl.observe((now - sequence.last_token_at) / tokens)
        self.wake()

    def resumed(self, sequence: CallSequence, reason: str) -> None:
        """Handle the first token of a sequence after its resume on another worker."""
        self.usage.resumed += 1
        if sequence.link is not None:
            self.usage.resume = weakest_resume_capability(
                (self.usage.resume, weakest_resume_capability(sequence.link.info.capabilities))
            )
        self.events.resumed(self.model, reason, self.clock() - sequence.last_token_at)

    def reasoned(self, tokens: int) -> None:
        """Count reasoning tokens of a sequence that has ended."""
        self.usage.reasoning_tokens += tokens

    def silent_s(self, now: float) -> float:
        """Return the seconds since the call's last token, last keep-alive or arrival, whichever is latest."""
        return now - max(self.arrived, self._silent_since, *(sequence.last_token_at for sequence in self.sequences))

    def count(self) -> None:
        """Update `usage` with the number of tokens received so far."""
        self.usage.completion_tokens = sum(len(sequence.emitted) for sequence in self.sequences)

    @property
    def mean_gap_s(self) -> float:
        """Mean seconds between the tokens of the call's first sequence, as this gateway received them; 0 with fewer
        than two tokens."""
        first = self.sequences[0]
        tokens = len(first.emitted) - first.restored
        if self.first_token_at is None or tokens < 2:
            return 0.0
        return max(first.last_token_at - self.first_token_at, 0.0) / (tokens - 1)

    @property
    def new_tokens(self) -> int:
        """Number of tokens that this gateway has received for the call."""
        return sum(len(sequence.emitted) - sequence.restored for sequence in self.sequences)

    def fail(self, error: CallError) -> None:
        """End the call with this error and abort the running sequences. The method never raises, because the code that
        calls it serves other calls too."""
        if self.error is None:
            self.error = error
        try:
            self.release()
            self.wake()
        except Exception:
            log.exception("call.not_notified", **self.log_fields)

    def fail_unexpectedly(self, error: BaseException) -> None:
        """End the call with INTERNAL, because work for this call raised `error`. Raises `error` again if `error` is a
        cancellation or an exit."""
        if not is_call_failure(error):
            raise error
        if self.error is None:
            log.error("call.failed", **self.log_fields, exc_info=error)
        message = f"unexpected failure; quote request id {self.request_id}"
        self.fail(CallError(Outcome.INTERNAL, message))

    def wake(self) -> None:
        """Notify the call's API of an update."""
        self._news = True
        if self._listener is not None:
            self._listener()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def news(self) -> None:
        """Wait for an update."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False

    def pop_pieces(self) -> list[Piece]:
        """Return the new pieces of all sequences. Once all text before the call's error has been returned, raises that
        error."""
        try:
            pieces = []
            for sequence in self.sequences:
                if (piece := sequence.pieces.pop()) is not None:
                    pieces.append(piece)
                    if piece.finish_reason and piece.finish_reason != sequence.finish_reason:
                        sequence.finish(piece.finish_reason)  # a guard has refused text that was held back to the end
        except Exception:
            if self.error is not None:  # reading the text may be what failed
                raise self.error from None
            raise
        self.count()  # not earlier: a guard that refuses at the very end removes tokens
        if self.error is not None and not any(piece.text or piece.parts for piece in pieces):
            raise self.error
        return pieces

    async def all_pieces(self) -> list[Piece]:
        """Wait for the end of the call and return all pieces. Raises the call's error, even if the call had produced
        text before the error."""
        while not self.finished and self.error is None:
            await self.news()
        pieces = self.pop_pieces()
        if self.error is not None:
            raise self.error
        return pieces

    def pop_text(self) -> str | None:
        """Return the new text of a call with one sequence, as a fast path of `pop_pieces`. The text is "" while text is
        held back. None if there is more to deliver than text."""
        sequences = self.sequences
        if len(sequences) != 1 or self.error is not None or self._silent:
            return None
        return sequences[0].pieces.pop_text()

    @property
    def finished(self) -> bool:
        """Whether every sequence has finished without an error."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def end_delivered(self) -> bool:
        """Whether the last piece of every sequence has been returned, so that nothing more follows."""
        return all(sequence.pieces.end_popped for sequence in self.sequences)

    def release(self) -> None:
        """End all sequences that have not ended, and abort them in their engines."""
        for sequence in self.sequences:
            sequence.end()
