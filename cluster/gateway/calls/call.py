"""A running call, from arrival to end: its sequences, its counts, and how its API learns of news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import TokenOutput, WorkerIdentity, weakest_resume_capability
from cluster.gateway.calls.sequence import OutputSequence, Piece
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.observe.metrics import Histogram
from cluster.policy.routing.version_split import Versions
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("calls")


CallSequence: TypeAlias = "OutputSequence[Call]"


@dataclass(slots=True)
class CallUsage:
    """The engine's counts, and where the time went (seconds)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    resumed: int = 0
    """How often one of its sequences went on at another worker."""
    resume: str = ""
    """Word by which those workers resume (RESUME_CAPABILITIES), the one that promises least; empty where nothing went
    on."""


class CallEvents(Protocol):
    """What happens to calls, for the gateway's scheduler, accounts and metrics. Called from a link's reader: short,
    never awaiting."""

    def requeue(self, sequence: CallSequence) -> None:
        """It waits again, in the waiting room or the resume queue, by its state."""

    def began(self, sequence: CallSequence, cached_tokens: int) -> None:
        """Its first output has come; so much of its prompt was cached."""

    def answered(self, link: WorkerLink) -> None:
        """This worker has sent the first output of a sequence."""

    def worker_failed(self, link: WorkerLink) -> None:
        """This worker's engine could not continue a sequence."""

    def resumed(self, model: str, reason: str, gap_s: float) -> None:
        """A sequence was resumed on another worker, after so long without a token."""

    def not_taken(self, sequence: CallSequence) -> None:
        """A worker has refused it."""


@dataclass(eq=False, slots=True)  # with this many attributes a dictionary would make each access slower
class Call:
    """One call from arrival to end. `rank` is that of its priority class, `deadline` a point of `clock`."""

    id: str
    model: str
    policy: TenantPolicy
    rank: int
    arrived: float
    deadline: float | None
    clock: Callable[[], float]
    events: CallEvents
    itl: Histogram | None = None
    """Measures the time between tokens."""
    request_id: str = ""
    key_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Copied to its usage records."""
    versions: Versions = field(default_factory=Versions)
    """Where its first sequence may begin; the others go where that has gone."""
    bundle_digest: str = ""
    """Of the tokenizer that has read its prompt."""
    counted: bool = False
    """Whether it is counted as a request of its tenant already."""
    began_at: WorkerIdentity | None = None
    """The worker that its first sequence was sent to first."""
    sequences: list[CallSequence] = field(default_factory=list)
    usage: CallUsage = field(default_factory=CallUsage)
    error: CallError | None = None
    headers: Sequence[tuple[str, str]] = ()
    """How its tenant's limits stood when it was admitted, for its caller."""
    resume_tokens: ResumeTokens | None = None
    """Where its chunks carry resume tokens, the source of those."""
    is_resumed: bool = False
    """It was begun at another gateway, which has counted its prompt and what it has delivered."""
    terms: ResumeTerms = ResumeTerms.FREE
    """Of one that `continues`: who pays when its prompt is read again."""
    blamed: bool = False
    """It may be what ended its workers: it is not to be resumed."""
    first_token_at: float | None = None
    silent_since: float = 0.0
    """When the keep-alive last spoke."""
    silent: bool = False
    """Nothing has come for a while, and the caller's connection needs a sign of life."""
    listener: Callable[[], None] | None = None
    """Called at every news instead of waking `news`: for an API that gathers the news of many calls."""
    _pays_again: bool = False
    _origin_lost: bool | None = None
    _waiter: asyncio.Future[None] | None = None
    _news: bool = False

    @property
    def shown_id(self) -> str:
        """The id that its caller knows it by: of one that goes on, the first gateway's."""
        return self.resume_tokens.head.call_id if self.is_resumed and self.resume_tokens is not None else self.id

    @property
    def tenant(self) -> str:
        """Whose call it is, by name."""
        return self.policy.name

    @property
    def flow(self) -> str:
        """Whose turn it is, by the handle under which workers know the tenant."""
        return self.policy.handle or self.policy.name

    @property
    def prompt_computed(self) -> bool:
        """Whether an engine has worked on its prompt; where a worker was lost before any token, nobody pays for it."""
        return self.first_token_at is not None or (
            self.error is None and any(sequence.computed for sequence in self.sequences)
        )

    @property
    def pays_prompt(self) -> bool:
        """Whether its prompt is counted here. That of a resumed call which its client ended before a token came may
        have been read again."""
        if not self.is_resumed or self._pays_again:
            return True
        unknown = self._origin_lost is None and self.terms is not ResumeTerms.FREE
        return unknown and self.error is None and any(sequence.computed for sequence in self.sequences)

    # ---- what its owners do with it

    def make_resumable(self, tokens: ResumeTokens) -> None:
        """Its chunks carry these tokens from now on."""
        self.resume_tokens = tokens

    def continue_from(self, request_id: str) -> None:
        """It was begun at another gateway, under this request id."""
        self.is_resumed = True
        self.request_id = self.request_id and request_id

    def claim(self, terms: ResumeTerms) -> None:
        """Its resume tokens were claimed, on these terms."""
        self.terms = terms

    def choose(self, versions: Versions) -> None:
        """It may begin at these versions of its model."""
        self.versions = versions

    def submitted(self, sequence: CallSequence, identity: WorkerIdentity, now: float) -> None:
        """A sequence was sent to this worker."""
        if sequence.index == 0 and not sequence.emitted:
            self.usage.queue_s = now - self.arrived
        self.began_at = self.began_at or identity
        if self.versions.all:
            self.versions = Versions(identity.version, frozenset((identity.version,)))

    def blame(self, error: CallError) -> None:
        """End it: it may be what ended its workers."""
        self.blamed = True
        self.fail(error)

    def label(self, name: str, value: str) -> None:
        """A further label of its usage records."""
        self.labels = {**self.labels, name: value}

    def add_headers(self, headers: Sequence[tuple[str, str]]) -> None:
        """Further headers for its caller."""
        self.headers = (*self.headers, *headers)

    def fall_silent(self, now: float) -> None:
        """Ask its API for a sign of life."""
        self.silent_since, self.silent = now, True
        self.wake()

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Call this at every news; None wakes `news` again."""
        self.listener = listener

    # ---- what its sequences report

    def began(self, sequence: CallSequence, output: TokenOutput) -> None:
        """A sequence has got the first output of a worker."""
        cached = output.cached_tokens or 0
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
            self._pays_again = True  # a resumed call's client may have to pay for its prompt once more

    def progressed(self, sequence: CallSequence, tokens: int) -> None:
        """A sequence has got tokens, by a step with more news than one token."""
        if tokens:
            now = self.clock()
            if self.first_token_at is None:
                self.first_token_at = now
                self.usage.ttft_s = now - self.arrived
            elif self.itl is not None and sequence.heard_at:
                self.itl.observe((now - sequence.heard_at) / tokens)
            sequence.heard_at = now
        self.wake()

    def resumed(self, sequence: CallSequence, reason: str) -> None:
        """A sequence's first token at another worker has come."""
        self.usage.resumed += 1
        if sequence.link is not None:
            self.usage.resume = weakest_resume_capability(
                (self.usage.resume, weakest_resume_capability(sequence.link.info.capabilities))
            )
        self.events.resumed(self.model, reason, self.clock() - sequence.heard_at)

    def worker_failed(self, sequence: CallSequence, link: WorkerLink) -> None:
        """This worker's engine could not continue a sequence."""
        self.events.worker_failed(link)

    def requeue(self, sequence: CallSequence) -> None:
        """A sequence waits again."""
        self.events.requeue(sequence)

    def not_taken(self, sequence: CallSequence) -> None:
        """A worker has refused a sequence."""
        self.events.not_taken(sequence)

    @property
    def heard_at(self) -> float:
        """When its last token came, or the keep-alive spoke, or it arrived."""
        return max(self.arrived, self.silent_since, *(sequence.heard_at for sequence in self.sequences))

    def count(self) -> None:
        """Bring `usage` up to the tokens that have come."""
        self.usage.completion_tokens = sum(len(sequence.emitted) for sequence in self.sequences)

    @property
    def mean_gap_s(self) -> float:
        """Between the tokens of its first sequence, as they came here; 0 with fewer than two."""
        first = self.sequences[0]
        tokens = len(first.emitted) - first.restored
        if self.first_token_at is None or tokens < 2:
            return 0.0
        return max(first.heard_at - self.first_token_at, 0.0) / (tokens - 1)

    @property
    def new_tokens(self) -> int:
        """Tokens that have come at this gateway."""
        return sum(len(sequence.emitted) - sequence.restored for sequence in self.sequences)

    def fail(self, error: CallError) -> None:
        """End the call with this error; drop what still runs of it. Raises nothing: the callers serve other calls."""
        if self.error is None:
            self.error = error
        try:
            self.release()
            self.wake()
        except Exception:
            log.exception("call_not_notified", request_id=self.request_id)

    def fail_unexpectedly(self, error: BaseException) -> None:
        """End the call INTERNAL for an exception that its own work has raised. Raises it again if it is not the call's
        failure but a cancellation or an exit."""
        if not is_call_failure(error):
            raise error
        if self.error is None:
            log.error("call_failed", request_id=self.request_id, exc_info=error)
        message = f"unexpected failure; quote request id {self.request_id}"
        self.fail(CallError(Outcome.INTERNAL, message))

    def wake(self) -> None:
        """Tell the API that there is news."""
        self._news = True
        if self.listener is not None:
            self.listener()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def news(self) -> None:
        """Wait for news."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False

    def pop_pieces(self) -> list[Piece]:
        """Pieces since the last take. Raises the call's error once all text before it has been taken."""
        try:
            pieces = [piece for sequence in self.sequences if (piece := sequence.pop_piece()) is not None]
        except Exception:
            if self.error is not None:  # the text may be what has failed
                raise self.error from None
            raise
        self.count()  # now: a guard that refuses at the very end takes tokens back
        if self.error is not None and not any(piece.text for piece in pieces):
            raise self.error
        return pieces

    def pop_text(self) -> str | None:
        """The common case of `take`: the next text of a call's only output, "" while it is held back; None when there
        is more to tell than text."""
        sequences = self.sequences
        if len(sequences) != 1 or self.error is not None or self.silent:
            return None
        return sequences[0].pop_text()

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended by itself."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def end_delivered(self) -> bool:
        """Whether the end of every sequence has been taken: nothing more will come."""
        return all(sequence.end_taken for sequence in self.sequences)

    def release(self) -> None:
        """End every sequence that has not ended, and abort it in its engine."""
        for sequence in self.sequences:
            sequence.end()
