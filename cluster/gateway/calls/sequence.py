"""One of a call's n outputs: tokens come from the link, become text, and wait for the face or go straight to it.

Tokens become text when they arrive, not when the client reads, so that a stop string ends the engine's work at once
however slow the reader is. A reader that is slow gets several tokens in one piece, never late ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.types import CompatibilityKey, EngineRequest, FinishReason, TokenOutput
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.text.detokenizer import TextSource
from cluster.gateway.text.logprobs import LogprobSource, TokenLogprob
from cluster.policy.fairness.order import Waiting

if TYPE_CHECKING:
    from cluster.gateway.calls.call import Call
    from cluster.gateway.resume_tokens.token_chain import Begun
    from cluster.gateway.usage.accounting import CallAccount

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


class CallSequence:
    """One of a call's n outputs. A Sink of the link.

    `direct`, where a face has set it, takes the text of each further token that has nothing else to tell.
    """

    __slots__ = (
        "_logprob_texts",
        "_logprobs",
        "_told",
        "_told_finish",
        "account",
        "admitted",
        "attempt",
        "cached_tokens",
        "call",
        "charge_due",
        "detokenizer",
        "direct",
        "emitted",
        "finish_reason",
        "heard_at",
        "home",
        "index",
        "likeness",
        "link",
        "losses",
        "lost_at",
        "lost_links",
        "lost_node",
        "lost_since",
        "lost_tokens",
        "over",
        "place",
        "ran",
        "request",
        "restored",
        "resumes",
        "resuming",
        "shuns",
        "slot",
        "waiting_id",
    )

    def __init__(
        self,
        call: Call,
        index: int,
        request: EngineRequest,
        detokenizer: TextSource,
        logprob_texts: LogprobSource | None = None,
    ) -> None:
        self.call = call
        self.index = index
        self.request = request
        self.detokenizer = detokenizer
        self.emitted = detokenizer.token_ids
        """Tokens told so far; the detokenizer's own list, so that those after a stop string are not in it."""
        self.attempt = 1
        """One more for each worker that it was taken from; no two Submits of it have the same."""
        self.losses = 0
        """How often a worker has failed it."""
        self.lost_links: tuple[str, ...] = ()
        """Links that ended under it unexpectedly with no new token since before the first of them."""
        self.lost_tokens = 0
        """Tokens that it had when it last lost a worker."""
        self.lost_at = -math.inf
        self.lost_since: float | None = None
        """When it lost the first of those."""
        self.lost_node = ""
        """The node of the worker that it last lost."""
        self.shuns: frozenset[str] = frozenset()
        """Incarnations of workers whose engine could not go on with it."""
        self.likeness: CompatibilityKey | None = None
        """What the worker was like that gave its first token; only such another can go on with it."""
        self.home = ""
        """Incarnation of the worker that it was given last: its KV blocks are there, if that lives and has had room."""
        self.restored = 0
        """Tokens that another gateway has told before this one."""
        self.resumes = 0
        """How often it was to go on elsewhere after its first token."""
        self.resuming = ""
        """Why it has to, until its next token comes."""
        self.account: CallAccount | None = None
        """Where accounts are kept and it has been submitted."""
        self.admitted = False
        """Whether an engine has accepted it."""
        self.link: WorkerLink | None = None
        self.slot = 0
        self.finish_reason = ""
        self.heard_at = 0.0
        self.direct: Callable[[str], None] | None = None
        self.waiting_id = f"{call.id}#{index}"
        self.place: Waiting | None = None
        """How it stands, or stood, in line."""
        self.ran = False
        """Whether a worker was given it, and has not refused it."""
        self.over = False
        """Whether its tenant's account has been told of its end."""
        self.cached_tokens = 0
        self.charge_due = 0
        """At so many tokens its tenant's account is to hear of it."""
        self._told = False
        self._told_finish = False
        self._logprob_texts = logprob_texts
        self._logprobs: list[TokenLogprob] = []

    def __repr__(self) -> str:
        return f"<Output {self.waiting_id} tokens {len(self.emitted)} {self.finish_reason or 'running'}>"

    @property
    def tokens(self) -> int:
        """What an engine has to compute before its next token."""
        return len(self.request.prompt_token_ids) + len(self.emitted)

    @property
    def kept_at(self) -> str:
        """Incarnation of the worker to which it had best go back: where a gateway was lost, that of its KV blocks. A
        worker that it has left for the worker's own sake is none."""
        return self.home if self.resuming == "gateway" else ""

    def restore(self, begun: Begun) -> None:
        """Stand where another gateway has left it. Raises ValueError when those tokens have not so much text."""
        ids = begun.token_ids
        self.detokenizer.restore(ids, begun.chars)
        if self._logprob_texts is not None:
            self._logprob_texts.restore(ids)
        self.restored, self.likeness, self.heard_at = len(ids), begun.likeness, self.call.arrived
        self.home = begun.home
        self._told, self._told_finish = bool(ids), bool(begun.finish_reason)
        self.finish_reason = begun.finish_reason
        if not self.finish_reason and len(ids) >= self.request.sampling.max_tokens:
            self.finish_reason = "length"  # its last token was told, its end was not
        elif ids and not self.finish_reason:
            self.resumes, self.resuming = 1, "gateway"

    def adopt(self, older: CallSequence) -> None:
        """Take over what this gateway has generated for the reader before, beyond where this one stands: it is told
        without being computed again. With log probabilities, which are not kept, nothing is."""
        more = older.emitted[len(self.emitted) :]
        if self.finish_reason or older.finish_reason or self._logprob_texts is not None or not more:
            return
        ended = self.detokenizer.push(more) is not None
        self.restored, self.likeness, self.home = len(self.emitted), older.likeness, older.home
        self.resumes, self.resuming = 1, "gateway"
        if ended:
            self._stopped()
        elif len(self.emitted) >= self.request.sampling.max_tokens:
            self.finish_reason = "length"

    def submission(self) -> EngineRequest:
        """The request as the next worker is to have it."""
        if not self.emitted:
            return self.request
        return replace(self.request, emitted_token_ids=tuple(self.emitted))

    def bound(self, link: WorkerLink, slot: int) -> None:
        """A worker has been chosen and the request sent."""
        self.link, self.slot, self.ran, self.home = link, slot, True, link.identity.incarnation
        if not self.emitted:
            self.likeness = link.likeness if self.request.sampling.is_seeded else link.likeness.unseeded

    # ---- Sink

    def accepted(self) -> None:
        """From here on the call costs."""
        self.admitted = True

    def refused(self, reason: str, message: str, field: str) -> None:
        """The request itself is at fault, or the engine had no room after all."""
        self.link = None
        self.ran = bool(self.emitted)
        self.call.on_refused(self)
        if reason == "NO_ROOM":
            self.call.again(self)
            return
        self.call.fail(refusal_of(reason, message, field))

    def output(self, output: TokenOutput) -> None:
        """One step's tokens."""
        call = self.call
        ids = output.token_ids
        if output.prompt_tokens is not None:
            self._began(output)
        self.direct = None
        if output.finish is not None:
            link = self.link
            self.link = None
            if output.finish in (FinishReason.ERROR, FinishReason.ABORT):
                self._broken(output.finish, link)
                return
            self.finish_reason = _FINISH_WORDS[output.finish]
        before = len(self.emitted)
        stop = self.detokenizer.push(ids, output.finish is FinishReason.STOP)
        if stop is not None:
            self._stopped()
        came = max(len(self.emitted) - before, 0)  # a guard's refusal takes back tokens of earlier steps too
        if output.logprobs and self._logprob_texts is not None:
            self._logprobs += self._logprob_texts.push(output.logprobs[:came])
        call.progressed(self, came)

    def _began(self, output: TokenOutput) -> None:
        """The first output that a worker gives it."""
        call, cached = self.call, output.cached_tokens or 0
        if not self.emitted:
            if self.index == 0:
                call.usage.prompt_tokens, call.usage.cached_tokens = output.prompt_tokens or 0, cached
            call.began(self, cached)
        if self.link is not None:
            call.answered(self, self.link, True)
        call.read_again(output)
        if self.restored == len(self.emitted) and self.emitted:
            self.cached_tokens = min(cached, len(self.request.prompt_token_ids))
        if self.resuming:
            call.resumed(self)
            self.resuming = ""

    def token(self, token_id: int) -> None:
        """One step's only token, not its first: the common case of `output`. The link accounts for the time."""
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
        """From now on hand each token's text to `direct`, if there is nothing that it could not tell."""
        if not (self.finish_reason or self._logprob_texts is not None or self.detokenizer.watches) and self._told:
            self.direct = direct

    def indirect(self, text: str) -> None:
        """Take the text that `direct` was just given back, and keep it and all further ones for `take`."""
        self.direct = None
        self.detokenizer.give_back(text)

    def cut(self) -> None:
        """End it with what it has, as if its length were reached."""
        if not self.finish_reason:
            self.finish_reason, self.direct = "length", None
            self.leave_engine()

    def _stopped(self) -> None:
        """A stop string has come, or a guard has refused: the engine's work ends here."""
        self.finish_reason = "content_filter" if self.detokenizer.refused else "stop"
        self.leave_engine()

    def _broken(self, finish: FinishReason, link: WorkerLink | None) -> None:
        """The engine has ended it. Under a grammar ERROR says that no token was left; else the engine is at fault, and
        another may know better."""
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
            self.shuns |= {link.identity.incarnation}
            self.call.answered(self, link, False)
        self._failed(Outcome.INTERNAL, "error", "the engine could not go on with this call; it is safe to retry")

    def failed(self, error: BaseException) -> None:
        """End the call: handling its news has raised."""
        self.link = None
        self.call.fail_unexpectedly(error)

    def lost(self, why: str) -> None:
        """The worker is gone; another one goes on from here."""
        link, self.link = self.link, None
        if link is not None and not link.leaving:
            self._note_loss(link)
        if not self.finish_reason:
            told = f"the worker was lost after {len(self.emitted)} tokens ({why}); retry the call"
            self._failed(Outcome.WORKER_LOST, "lost", told)

    def _note_loss(self, link: WorkerLink) -> None:
        if len(self.emitted) > self.lost_tokens:
            self.lost_links = ()
        if not self.lost_links:
            self.lost_since = self.call.clock()
        self.lost_links += (link.name,)
        self.lost_tokens, self.lost_at, self.lost_node = len(self.emitted), self.call.clock(), link.identity.node

    @property
    def silent_since(self) -> float | None:
        """When it lost a worker after which no token has come; None when one has."""
        return self.lost_since if self.lost_links and len(self.emitted) <= self.lost_tokens else None

    @property
    def suspect(self) -> bool:
        """Whether it has lost so many workers in a row that it may be what ends them; see worker_losses.py."""
        return len(self.lost_links) >= self.call.max_silent_losses and len(self.emitted) <= self.lost_tokens

    def _failed(self, outcome: Outcome, reason: str, told: str) -> None:
        self.losses += 1
        if self.losses >= self.call.max_attempts:
            self.call.fail(CallError(outcome, told))
        else:
            self._go_elsewhere(reason)

    def move(self) -> None:
        """Leave its worker, which is to end; another one goes on from here."""
        if self.link is not None and not self.finish_reason:
            self.leave_engine()
            self._go_elsewhere("moved")

    def _go_elsewhere(self, reason: str) -> None:
        self.attempt += 1
        if self.emitted:
            self.resumes += 1
            self.resuming = reason
        self.call.again(self)

    # ---- the face

    def take(self) -> Piece | None:
        """Text, finish and logprobs since the last take; None when there is nothing to tell."""
        if self._told_finish:
            return None
        finished = bool(self.finish_reason)
        text = self.detokenizer.take(finished)
        if finished:
            if self.detokenizer.refused:  # by what had been held back to the end
                self.finish_reason = "content_filter"
            if self._logprob_texts is not None:
                self._logprobs += self._logprob_texts.push(())
        if not (text or finished or self._logprobs):
            return None
        self._told_finish = finished
        piece = Piece(self.index, text, self.finish_reason, self._logprobs, not self._told)
        self._told = True
        self._logprobs = []
        return piece

    def take_text(self) -> str | None:
        """The text since the last take when there is nothing else to tell, else None: then `take` tells it."""
        if self.finish_reason or self._logprobs or not self._told:
            return None
        return self.detokenizer.take(False)

    @property
    def untaken(self) -> int:
        """Characters that wait for a `take`, at most."""
        return self.detokenizer.untaken

    @property
    def delivered(self) -> int:
        """Tokens whose text has been taken; one whose text is taken in part counts."""
        return len(self.emitted) if self._told_finish else len(self.emitted) - self.detokenizer.untaken_tokens()

    @property
    def shown(self) -> int:
        """Tokens of which the caller has seen something: text, or a log probability."""
        return self.delivered if self._logprob_texts is None else len(self.emitted)

    @property
    def told(self) -> bool:
        """Whether its end has been taken."""
        return self._told_finish

    def part(self) -> None:
        """Its call is over, and nobody tells it anything any longer. It lets go of the call, which knows it: neither is
        to wait for the garbage collector."""
        del self.call

    def leave_engine(self) -> None:
        """Drop it in the engine, where it runs there."""
        if self.link is not None:
            self.link.abort(self.slot)
            self.link = None
