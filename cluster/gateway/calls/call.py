"""A running call, from arrival to end: its outputs, its counts, and how its face hears of news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import TokenOutput, WorkerIdentity, resume_word
from cluster.gateway.calls.sequence import CallSequence, Piece
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.gateway.scheduling.worker_losses import MOST_SILENT
from cluster.observe.metrics import Histogram
from cluster.policy.routing.version_split import Versions
from cluster.policy.tenants.policy import TenantPolicy
from cluster.process.call_errors import is_call_failure

if TYPE_CHECKING:
    from cluster.gateway.resume_tokens.resumption import ResumeTokens

log = structlog.get_logger("calls")


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
    """Word by which those workers resume (RESUME_WORDS), the one that promises least; empty where nothing went on."""


@dataclass(eq=False, slots=True)  # with more than 30 attributes a dictionary would make each access slower
class Call:
    """One call from arrival to end. `again` puts a sequence back into the queue, `began` is told of a sequence's first
    output and how much of its prompt was cached; `itl` measures time between tokens. `rank`: of its priority class.
    `max_attempts` workers may fail a sequence before the call does; `on_resumed` is told of a sequence that has gone on
    elsewhere, why, and after which silence in seconds; `answered` of a worker's first output for a sequence, and
    (False) of one that has failed it."""

    id: str
    model: str
    policy: TenantPolicy
    rank: int
    arrived: float
    deadline: float | None
    again: Callable[[CallSequence], None]
    began: Callable[[CallSequence, int], None]
    clock: Callable[[], float]
    itl: Histogram | None = None
    request_id: str = ""
    key_id: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    versions: Versions = field(default_factory=Versions)
    """Where its first output may begin; the others go where that has gone."""
    bundle_digest: str = ""
    """Of the tokenizer that has read its prompt."""
    began_at: WorkerIdentity | None = None
    """The worker that its first output was given to first."""
    max_attempts: int = 3
    max_silent_losses: int = MOST_SILENT
    """So many workers may be lost in a row with it and no token between; see worker_losses.py."""
    answered: Callable[[CallSequence, WorkerLink, bool], None] = lambda output, link, well: None
    on_resumed: Callable[[str, str, float], None] = lambda model, reason, gap_s: None
    counted: bool = False
    """Whether it is counted as a request of its tenant already."""
    on_refused: Callable[[CallSequence], None] = lambda output: None
    """Told when a worker has not taken a sequence."""
    sequences: list[CallSequence] = field(default_factory=list)
    usage: CallUsage = field(default_factory=CallUsage)
    error: CallError | None = None
    headers: Sequence[tuple[str, str]] = ()
    """How its tenant's limits stood when it was admitted, for its caller."""
    tickets: ResumeTokens | None = None
    """Where its chunks carry resume tokens, those."""
    continues: bool = False
    """It was begun at another gateway, which has counted its prompt and what it has delivered."""
    terms: ResumeTerms = ResumeTerms.FREE
    """Of one that `continues`: who pays when its prompt is read again."""
    blamed: bool = False
    """It may be what ended its workers: it is not to be resumed."""
    _pays_again: bool = False
    _origin_lost: bool | None = None
    first_token_at: float | None = None
    silent_since: float = 0.0
    """When the keep-alive last spoke."""
    silent: bool = False
    """Set by the keep-alive: nothing has come for a while, and the caller's connection wants a sign of life."""
    listener: Callable[[], None] | None = None
    """Called at every news instead of waking `news`: for a face that gathers the news of many calls."""
    _waiter: asyncio.Future[None] | None = None
    _news: bool = False

    @property
    def shown_id(self) -> str:
        """The id that its caller knows it by: of one that goes on, the first gateway's."""
        return self.tickets.head.call_id if self.continues and self.tickets is not None else self.id

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
        return self.first_token_at is not None or (self.error is None and any(one.ran for one in self.sequences))

    @property
    def pays_prompt(self) -> bool:
        """Whether its prompt is counted here. That of a resumed call which its client ended before a token came may
        have been read again."""
        if not self.continues or self._pays_again:
            return True
        unknown = self._origin_lost is None and self.terms is not ResumeTerms.FREE
        return unknown and self.error is None and any(one.ran for one in self.sequences)

    def read_again(self, output: TokenOutput) -> None:
        """A worker has read the prompt of a sequence; of a resumed call its client may have to pay for that."""
        self._origin_lost = output.origin_lost
        if self.continues and (
            self.terms is ResumeTerms.PAID or (self.terms is ResumeTerms.IF_ALIVE and not output.origin_lost)
        ):
            self._pays_again = True

    def progressed(self, output: CallSequence, tokens: int) -> None:
        """A sequence has got tokens, by a step that had more to tell of it than one token."""
        if tokens:
            now = self.clock()
            if self.first_token_at is None:
                self.first_token_at = now
                self.usage.ttft_s = now - self.arrived
            elif self.itl is not None and output.heard_at:
                self.itl.observe((now - output.heard_at) / tokens)
            output.heard_at = now
        self.wake()

    def resumed(self, output: CallSequence) -> None:
        """A sequence's first token at another worker has come."""
        self.usage.resumed += 1
        if output.link is not None:
            self.usage.resume = resume_word((self.usage.resume, resume_word(output.link.info.capabilities)))
        self.on_resumed(self.model, output.resuming, self.clock() - output.heard_at)

    @property
    def heard_at(self) -> float:
        """When its last token came, or the keep-alive spoke, or it arrived."""
        return max(self.arrived, self.silent_since, *(output.heard_at for output in self.sequences))

    def count(self) -> None:
        """Bring `usage` up to the tokens that have come."""
        self.usage.completion_tokens = sum(len(output.emitted) for output in self.sequences)

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
        return sum(len(output.emitted) - output.restored for output in self.sequences)

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
        """Tell the face that there is something to look at."""
        self._news = True
        if self.listener is not None:
            self.listener()
            return
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def news(self) -> None:
        """Wait until there is something to look at."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._news = False

    def take(self) -> list[Piece]:
        """Pieces since the last take. Raises the call's error once all text before it has been taken."""
        try:
            pieces = [piece for sequence in self.sequences if (piece := sequence.take()) is not None]
        except Exception:
            if self.error is not None:  # the text may be what has failed
                raise self.error from None
            raise
        self.count()  # now: a guard that refuses at the very end takes tokens back
        if self.error is not None and not any(piece.text for piece in pieces):
            raise self.error
        return pieces

    def take_text(self) -> str | None:
        """The common case of `take`: the next text of a call's only output, "" while it is held back; None when there
        is more to tell than text."""
        sequences = self.sequences
        if len(sequences) != 1 or self.error is not None or self.silent:
            return None
        return sequences[0].take_text()

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended by itself."""
        return all(sequence.finish_reason for sequence in self.sequences)

    @property
    def told(self) -> bool:
        """Whether the end of every sequence has been taken: nothing more will come."""
        return all(sequence.told for sequence in self.sequences)

    def release(self) -> None:
        """Drop whatever still runs in an engine."""
        for sequence in self.sequences:
            sequence.leave_engine()
