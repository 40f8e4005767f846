"""One of a call's n outputs: tokens arrive from the link, become text, and wait for the API or go straight to it.

Tokens become text when they arrive, not when the client reads, so that a stop string ends the engine's work at once
however slow the client is. A slow client gets several tokens in one piece, never late ones.

Where the sequence is in its life is decided by life.py; this class carries out what follows from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import CompatibilityKey, EngineRequest, FinishReason, TokenOutput
from cluster.gateway.calls.life import Event, Life, Next, State
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.logprobs import LogprobSource, TokenLogprob

_FINISH_WORDS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.REPETITION: "stop",
}

CALLER_FIELDS = {"prompt_token_ids": "prompt", "grammar": "response_format", "structured_outputs": "response_format"}
"""Engine fields by the name that callers know them under."""


def refusal_of(reason: str, message: str, field: str) -> CallError:
    """An engine's refusal as the caller's error. Engines begin their message with the field, by their own name."""
    outcome = Outcome.__members__.get(reason, Outcome.INTERNAL)
    if not field:
        return CallError(outcome, message)
    name, message = CALLER_FIELDS.get(field, field), message.removeprefix(f"{field}: ")
    return CallError(outcome, f"{name}: {message}", violations=[Violation(name, message)])


@dataclass(slots=True)
class Piece:
    """What one sequence has for the caller since the last piece."""

    index: int
    text: str
    finish_reason: str = ""
    logprobs: Sequence[TokenLogprob] = ()
    first: bool = False


class SequenceOwner(Protocol):
    """What a sequence needs of its call. Methods are called from the link's reader: short, never awaiting."""

    id: str
    arrived: float

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds."""

    def fail(self, error: CallError) -> None:
        """End the call with this error."""

    def fail_unexpectedly(self, error: BaseException) -> None:
        """End the call INTERNAL for an exception of its own work."""

    def wake(self) -> None:
        """There is news for the client."""

    def progressed(self, sequence: OutputSequence[Any], tokens: int) -> None:
        """Tokens have come, by a step with more news than one token."""

    def began(self, sequence: OutputSequence[Any], output: TokenOutput) -> None:
        """The first output of a worker has come."""

    def resumed(self, sequence: OutputSequence[Any], reason: str) -> None:
        """The first token of a further worker has come."""

    def worker_failed(self, sequence: OutputSequence[Any], link: WorkerLink) -> None:
        """This worker's engine could not continue it."""

    def requeue(self, sequence: OutputSequence[Any]) -> None:
        """It waits again, where its state says."""

    def not_taken(self, sequence: OutputSequence[Any]) -> None:
        """A worker has refused it."""


Owner = TypeVar("Owner", bound=SequenceOwner)


class OutputSequence(Generic[Owner]):
    """One of a call's n outputs. A Sink of the link.

    `direct`, where an API has set it, takes the text of each further token that has no other news.
    """

    __slots__ = (
        "_finish_taken",
        "_life",
        "_logprob_texts",
        "_logprobs",
        "_taken",
        "admitted",
        "cached_tokens",
        "call",
        "detokenizer",
        "direct",
        "emitted",
        "finish_reason",
        "heard_at",
        "index",
        "key",
        "link",
        "request",
        "restored",
        "slot",
    )

    def __init__(
        self,
        call: Owner,
        index: int,
        request: EngineRequest,
        detokenizer: TextSource,
        logprob_texts: LogprobSource | None = None,
        life: Life | None = None,
    ) -> None:
        self.call = call
        self.index = index
        self.request = request
        self.detokenizer = detokenizer
        self.key = f"{call.id}#{index}"
        """Its name in the queues and accounts of this gateway."""
        self.emitted = detokenizer.token_ids
        """Tokens so far; the detokenizer's own list, so that those after a stop string are not in it."""
        self.restored = 0
        """Tokens that another gateway has emitted before this one."""
        self.admitted = False
        """Whether an engine has accepted it."""
        self.link: WorkerLink | None = None
        self.slot = 0
        self.finish_reason = ""
        self.heard_at = 0.0
        """When its last token came (monotonic)."""
        self.cached_tokens = 0
        """Of its prompt, as its first worker found them, or the worker that resumed it here."""
        self.direct: Callable[[str], None] | None = None
        self._life = life or Life()
        self._taken = False
        self._finish_taken = False
        self._logprob_texts = logprob_texts
        self._logprobs: list[TokenLogprob] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.key} tokens {len(self.emitted)} {self._life.state.value}>"

    # ---- its life, as others see it

    @property
    def state(self) -> State:
        """Where it is."""
        return self._life.state

    @property
    def tokens(self) -> int:
        """Tokens that an engine has to compute before its next one."""
        return len(self.request.prompt_token_ids) + len(self.emitted)

    @property
    def attempt(self) -> int:
        """Number of its next Submit, from 1."""
        return self._life.attempt

    @property
    def failures(self) -> int:
        """Workers that have failed it."""
        return self._life.failures

    @property
    def compatibility(self) -> CompatibilityKey | None:
        """Key of the worker that gave its first token."""
        return self._life.compatibility

    @property
    def last_worker(self) -> str:
        """Incarnation of the worker that it was sent to last."""
        return self._life.last_worker

    @property
    def cached_on(self) -> str:
        """Incarnation of the worker that holds its KV blocks after a gateway was lost, else ""."""
        return self._life.cached_on

    @property
    def excluded(self) -> frozenset[str]:
        """Incarnations of workers that it must not be sent to again."""
        return self._life.excluded

    @property
    def moved(self) -> bool:
        """Whether it resumes because its worker drains."""
        return self._life.reason == "moved"

    @property
    def computed(self) -> bool:
        """Whether a worker has taken it, or has emitted tokens of it."""
        return self._life.computed

    @property
    def lost_links(self) -> tuple[str, ...]:
        """Links that ended under it with no token since before the first of them."""
        return self._life.loss.links

    @property
    def lost_at(self) -> float:
        """When it last lost a worker unexpectedly (monotonic)."""
        return self._life.loss.last_at

    @property
    def lost_node(self) -> str:
        """Node of that worker."""
        return self._life.loss.last_node

    @property
    def silent_since(self) -> float | None:
        """When it lost a worker after which no token has come; None if one has."""
        return self._life.silent_since(len(self.emitted))

    @property
    def suspect(self) -> bool:
        """Whether it lost so many workers in a row that it may be what ends them; see worker_losses.py."""
        return self._life.suspect(len(self.emitted))

    def acquit(self) -> None:
        """It is not what ends its workers."""
        self._life.acquit()

    def carry_losses(self, losses: tuple[str, ...]) -> None:
        """Losses in a row that another gateway has seen."""
        self._life.carry(losses, len(self.emitted))

    # ---- from a resume token

    def restore(
        self, token_ids: Sequence[int], chars: int, finish_reason: str, worker: str, key: CompatibilityKey | None
    ) -> None:
        """Continue where another gateway has left it: after these tokens, of which `chars` characters were delivered.
        Raises ValueError when the tokens have less text."""
        self.detokenizer.restore(token_ids, chars)
        if self._logprob_texts is not None:
            self._logprob_texts.restore(token_ids)
        self.restored, self.heard_at = len(token_ids), self.call.arrived
        self._taken, self._finish_taken = bool(token_ids), bool(finish_reason)
        self._life.restore(worker, key, len(token_ids))
        if finish_reason:
            self._finish(finish_reason)
        elif len(token_ids) >= self.request.sampling.max_tokens:
            self._finish("length")  # its last token was delivered, its end was not

    def adopt(self, older: OutputSequence[Owner]) -> None:
        """Take over the tokens that this gateway has generated for an earlier reader, beyond where this one stands:
        they are delivered without being computed again. With log probabilities, which are not kept, none are."""
        more = older.emitted[len(self.emitted) :]
        if self.finish_reason or older.finish_reason or self._logprob_texts is not None or not more:
            return
        ended = self.detokenizer.push(more) is not None
        self.restored = len(self.emitted)
        self._life.restore(older.last_worker, older.compatibility, len(self.emitted))
        if ended:
            self._stopped()
        elif len(self.emitted) >= self.request.sampling.max_tokens:
            self._finish("length")

    # ---- sending

    def submission(self) -> EngineRequest:
        """The request as the next worker is to have it."""
        if not self.emitted:
            return self.request
        return replace(self.request, emitted_token_ids=tuple(self.emitted))

    def bind(self, link: WorkerLink, slot: int) -> None:
        """A worker has been chosen and the request sent."""
        self.link, self.slot = link, slot
        key = None
        if not self.emitted:
            key = link.compatibility_key if self.request.sampling.is_seeded else link.compatibility_key.unseeded
        self._life.submitted(link.identity.incarnation, key)

    # ---- Sink

    def accepted(self) -> None:
        """An engine has it: from here on it costs."""
        self.admitted = True

    def refused(self, reason: str, message: str, field: str) -> None:
        """The request itself is at fault, or the engine had no room after all."""
        self.link = None
        self._life.not_taken(len(self.emitted))
        self.call.not_taken(self)
        if reason == "NO_ROOM":
            self._life.wait(len(self.emitted))
            self.call.requeue(self)
            return
        self.call.fail(refusal_of(reason, message, field))

    def output(self, output: TokenOutput) -> None:
        """One step's tokens."""
        call = self.call
        if output.prompt_tokens is not None:
            self._begin(output)
        self.direct = None
        if output.finish is not None:
            link = self.link
            self.link = None
            if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
                self._broken(output.finish, link)
                return
            self._finish(_FINISH_WORDS[output.finish])
        before = len(self.emitted)
        stop = self.detokenizer.push(output.token_ids, output.finish is FinishReason.STOP)
        if stop is not None:
            self._stopped()
        came = max(len(self.emitted) - before, 0)  # a guard's refusal takes back tokens of earlier steps too
        if output.logprobs and self._logprob_texts is not None:
            self._logprobs += self._logprob_texts.push(output.logprobs[:came])
        call.progressed(self, came)

    def _begin(self, output: TokenOutput) -> None:
        """Note the first output of a worker."""
        cached = output.cached_tokens or 0
        if not self.emitted:
            self.cached_tokens = cached
        elif self.restored == len(self.emitted):
            self.cached_tokens = min(cached, len(self.request.prompt_token_ids))
        reason = self._life.answered()
        self.call.began(self, output)
        if reason:
            self.call.resumed(self, reason)

    def token(self, token_id: int) -> None:
        """One step's only token, not its first: the common case of `output`. The link keeps `heard_at`."""
        direct = self.direct
        if direct is not None:
            text = self.detokenizer.text_of(token_id)
            if text:
                direct(text)
            return
        if self.detokenizer.push((token_id,)) is not None:
            self._stopped()
        self.call.wake()

    def go_direct(self, direct: Callable[[str], None]) -> None:
        """From now on hand each token's text to `direct`, if all further news is text."""
        if (
            not (self.finish_reason or self._logprob_texts is not None or self.detokenizer.searches_text)
            and self._taken
        ):
            self.direct = direct

    def stop_direct(self) -> None:
        """Keep all further text for `take`."""
        self.direct = None

    def give_back(self, text: str) -> None:
        """Take the text that `direct` was just given back, and keep it and all further text for `take`."""
        self.direct = None
        self.detokenizer.push_back(text)

    def cut(self) -> None:
        """End it with what it has, as if its length were reached."""
        if not self.finish_reason:
            self.direct = None
            self._finish("length")
            self.leave_engine()

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._life.apply(Event.FINISHED)

    def _stopped(self) -> None:
        """A stop string has come, or a guard has refused: the engine's work ends here."""
        self._finish("content_filter" if self.detokenizer.refused else "stop")
        self.leave_engine()

    def _broken(self, finish: FinishReason, link: WorkerLink | None) -> None:
        """The engine has ended it. Under a grammar ERROR says that no token was left; otherwise the engine is at fault,
        and another may continue."""
        if finish is FinishReason.ERROR and self.request.sampling.grammar is not None:
            self.call.fail(
                invalid(
                    "response_format",
                    "no output can go on so that it fits this format together with the call's other fields "
                    "(a format that nothing fits, or stop_token_ids that it needs); change one of them",
                )
            )
            return
        if link is not None:
            self._life.excluded |= {link.identity.incarnation}
            self.call.worker_failed(self, link)
        message = "the engine could not go on with this call; it is safe to retry"
        self._try_elsewhere(Outcome.INTERNAL, "error", message)

    def failed(self, error: BaseException) -> None:
        """End the call: handling its news has raised."""
        self.link = None
        self.call.fail_unexpectedly(error)

    def lost(self, why: str) -> None:
        """The worker is gone; another one continues from here."""
        link, self.link = self.link, None
        if link is not None and not link.draining:
            self._life.lost(link.name, link.identity.node, len(self.emitted), self.call.clock())
        if not self.finish_reason:
            message = f"the worker was lost after {len(self.emitted)} tokens ({why}); retry the call"
            self._try_elsewhere(Outcome.WORKER_LOST, "lost", message)

    def _try_elsewhere(self, outcome: Outcome, reason: str, message: str) -> None:
        if self._life.fail_worker(reason, len(self.emitted)) is Next.FAIL:
            self.call.fail(CallError(outcome, message))
        else:
            self.call.requeue(self)

    def move(self) -> None:
        """Leave its worker, which is about to end; another one continues from here."""
        if self.link is not None and not self.finish_reason:
            self.leave_engine()
            self._life.leave("moved", len(self.emitted))
            self.call.requeue(self)

    # ---- the API

    def pop_piece(self) -> Piece | None:
        """Text, finish and logprobs since the last take; None when there is none."""
        if self._finish_taken:
            return None
        finished = bool(self.finish_reason)
        text = self.detokenizer.pop_text(finished)
        if finished:
            if self.detokenizer.refused:  # by what had been held back to the end
                self.finish_reason = "content_filter"
            if self._logprob_texts is not None:
                self._logprobs += self._logprob_texts.push(())
        if not (text or finished or self._logprobs):
            return None
        self._finish_taken = finished
        piece = Piece(self.index, text, self.finish_reason, self._logprobs, not self._taken)
        self._taken = True
        self._logprobs = []
        return piece

    def pop_text(self) -> str | None:
        """The text since the last take if there is no other news, else None: then call `take`."""
        if self.finish_reason or self._logprobs or not self._taken:
            return None
        return self.detokenizer.pop_text(False)

    @property
    def pending_chars(self) -> int:
        """Characters that wait for a `take`, at most."""
        return self.detokenizer.pending_chars

    @property
    def delivered(self) -> int:
        """Tokens whose text has been taken; one whose text is taken in part counts."""
        return len(self.emitted) if self._finish_taken else len(self.emitted) - self.detokenizer.pending_tokens()

    @property
    def shown(self) -> int:
        """Tokens of which the caller has seen something: text, or a log probability."""
        return self.delivered if self._logprob_texts is None else len(self.emitted)

    @property
    def end_taken(self) -> bool:
        """Whether its end has been taken."""
        return self._finish_taken

    def part(self) -> None:
        """Drop the reference to its call, which has ended, so that neither waits for the garbage collector."""
        del self.call

    def end(self) -> None:
        """Its call is over: drop it in the engine."""
        self._life.apply(Event.FAILED)
        self.leave_engine()

    def leave_engine(self) -> None:
        """Abort it in the engine, if it runs there."""
        if self.link is not None:
            self.link.abort(self.slot)
            self.link = None
