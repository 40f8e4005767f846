"""Moves of sequences from draining workers to other workers, without a pause of their streams.

Problem: another worker must compute all tokens of a sequence before it can generate the next one. For a long sequence
that takes many times as long as a token. So the other worker first computes these tokens into its prefix cache, by a
request of its own, while the sequence goes on at the draining worker. Then the sequence moves, and the other worker
computes only the tokens that were generated meanwhile. Such a request is called a preparation. It generates one token,
which nobody sees; it belongs to no account, since the moved sequence is charged for its tokens.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from cluster.api.output_parts import OutputPart
from cluster.api.types import KV_EVENTS, EngineRequest, Sampling, TokenOutput
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.engine_errors import FAILED
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.links.worker_link import SubmittedRequest, WorkerLink
from cluster.gateway.scheduling.workers import LinkedWorkers
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("dispatch")

LEAST_TOKENS: Final = 256
"""Number of tokens from which on a sequence is prepared. A shorter one is computed in one step."""
MOST_ATTEMPTS: Final = 2
"""Number of preparations of a sequence, after which it moves without."""


class _State(enum.Enum):
    COMPUTING = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


@dataclass(eq=False, slots=True)
class Preparation:
    """The preparation of one sequence on the worker to which the sequence will move. Receives that worker's messages
    (implements slots.Sink)."""

    sequence: LinkedSequence[Any]
    origin: WorkerLink
    """The link to the draining worker."""
    link: WorkerLink
    """The link to the other worker."""
    attempts: int
    slot: int = field(init=False, default=0)
    state: _State = field(init=False, default=_State.COMPUTING)
    last_token_at: float = field(init=False, default=0.0)

    @property
    def has_room(self) -> bool:
        """Whether the other worker takes the sequence now."""
        free = self.link.free
        return self.link.takes_new_requests and free.sequences > 0 and free.tokens >= self.sequence.tokens

    # ---- Sink

    def accepted(self) -> None:
        """Do nothing: the sequence runs on the draining worker. Implements Sink."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """End the preparation, which the engine has refused. Implements Sink."""
        self.state = _State.FAILED

    def token(self, token_id: int, now: float) -> None:
        """Never called, since the first output ends the preparation."""
        raise AssertionError("a token came after the only one")

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Never called, since the first output ends the preparation."""
        raise AssertionError("a token came after the only one")

    def output(self, output: TokenOutput) -> None:
        """Move the sequence, whose tokens are computed now, if the other worker has room. Otherwise the next look at
        the draining worker moves it. Implements Sink."""
        self.state = _State.FAILED if output.finish in FAILED else _State.DONE
        if output.finish is None:  # not the only output after all
            self.link.abort(self.slot)
        if self.state is _State.DONE and self.sequence.link is self.origin and self.has_room:
            try:
                self.sequence.move(self.link.identity.incarnation)
            except Exception as error:
                self.sequence.call.fail_unexpectedly(error)

    def lost(self, why: str) -> None:
        """End the preparation, whose worker is lost. Implements Sink."""
        self.state = _State.FAILED

    def failed(self, error: BaseException) -> None:
        """End the preparation, since the handling of a message raised `error`. Implements Sink."""
        self.state = _State.FAILED
        log.error("call.move_not_prepared", **self.sequence.call.log_fields, exc_info=error)


class Moves:
    """The moves of one gateway's sequences, for all models."""

    def __init__(self, workers: LinkedWorkers) -> None:
        self._workers = workers
        self._preparations: dict[str, Preparation] = {}

    def __len__(self) -> int:
        return len(self._preparations)

    def is_computing(self, sequence: LinkedSequence[Call]) -> bool:
        """Return whether a preparation of the sequence runs, so that the sequence stays where it is for now."""
        preparation = self._preparations.get(sequence.key)
        return preparation is not None and preparation.state is _State.COMPUTING

    def move(self, sequence: LinkedSequence[Call], worker_id: str, *, at_once: bool) -> None:
        """Move a sequence to another worker, which is expected to be `worker_id`, or begin to prepare that.

        `at_once`: whether the sequence must leave its worker now.
        """
        target, earlier = self._workers.link(sequence.call.model, worker_id), self._preparations.get(sequence.key)
        if earlier is not None and earlier.origin is not sequence.link:  # it has moved since
            earlier = None
        if earlier is not None and earlier.state is _State.DONE and earlier.link is target:
            sequence.move(earlier.link.identity.incarnation)
            return
        attempts = 0 if earlier is None else earlier.attempts
        may_prepare = not at_once and attempts < MOST_ATTEMPTS
        if not (target is not None and may_prepare and self._prepare(sequence, target, attempts + 1)):
            sequence.move()

    def forget(self, sequence: LinkedSequence[Call]) -> None:
        """End the preparation of a sequence whose call has ended."""
        preparation = self._preparations.pop(sequence.key, None)
        if preparation is not None and preparation.state is _State.COMPUTING:
            preparation.link.abort(preparation.slot)

    def _prepare(self, sequence: LinkedSequence[Call], target: WorkerLink, attempts: int) -> bool:
        """Begin a preparation; return False if it is not worthwhile or could not be sent."""
        origin = sequence.link
        if origin is None or not _is_worthwhile(sequence, target):
            return False
        preparation = Preparation(sequence, origin, target, attempts)
        try:
            preparation.slot = target.submit(SubmittedRequest(preparing_request(sequence)), preparation)
        except BaseException as error:
            if not is_call_failure(error):
                raise
            log.warning("call.move_not_prepared", **sequence.call.log_fields, exc_info=error)
            return False
        self._preparations[sequence.key] = preparation
        return True


def preparing_request(sequence: LinkedSequence[Call]) -> EngineRequest:
    """Return the request that computes a sequence's tokens. Its KV blocks are those of the sequence: they depend on
    tokens, salt and adapter. What determines the output is left out, since one token is generated for nobody."""
    request = sequence.submission()
    sampling = Sampling(max_tokens=len(request.emitted_token_ids) + 1, temperature=0.0, ignore_eos=True)
    return replace(request, sampling=sampling, parsing=None)


def _is_worthwhile(sequence: LinkedSequence[Call], target: WorkerLink) -> bool:
    """Return whether a preparation would shorten the pause: the sequence has output and many tokens, it is on one
    worker only, and the other worker keeps KV blocks of ended requests."""
    if sequence.hedge is not None or not sequence.emitted or sequence.finish_reason:
        return False
    return sequence.tokens >= LEAST_TOKENS and KV_EVENTS in target.info.capabilities
