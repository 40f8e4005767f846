"""Moves of sequences from draining workers to other workers, without a pause of their streams.

Problem: another worker must compute all tokens of a sequence before it can generate the next one. For a long sequence
that takes many times as long as a token. So the other worker first computes these tokens into its prefix cache, by a
request of its own, while the sequence goes on at the draining worker. Then the sequence moves, and the other worker
computes only the tokens that were generated meanwhile. Such a request is called a preparation. It generates one token,
which nobody gets, and belongs to no account.

A preparation only saves time: if it fails, takes too long or is too old, the sequence moves without. Whether and where
a sequence moves is decided again after its preparation, by the policy, as for sequences that are not prepared.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from cluster.api.output_parts import OutputPart
from cluster.api.types import KV_EVENTS, EngineRequest, Sampling, TokenOutput
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.engine_errors import FAILED
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.links.worker_link import SubmittedRequest, WorkerLink
from cluster.gateway.scheduling.queues import Queues
from cluster.gateway.scheduling.workers import LinkedWorkers
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy
from cluster.process.call_errors import is_call_failure

log = structlog.get_logger("dispatch")

LEAST_TOKENS: Final = 256
"""Number of tokens from which on a sequence is prepared. A shorter one is computed in one step."""
MOST_ATTEMPTS: Final = 2
"""Number of preparations of a sequence at one worker, after which it moves without."""
FRESH_S: Final = 5.0
"""Seconds for which the blocks of a preparation are expected in the other worker's cache."""


class State(enum.Enum):
    """State of a preparation."""

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
    """Number of this preparation among those of the sequence at its draining worker."""
    slot: int = field(init=False, default=0)
    state: State = field(init=False, default=State.COMPUTING)
    tokens: int = field(init=False)
    """Number of tokens that are computed."""
    done_at: float = field(init=False, default=-math.inf)
    """Time at which the other worker had computed the tokens."""
    last_token_at: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self.tokens = self.sequence.tokens

    def abort(self) -> None:
        """End the preparation, if it still runs."""
        if self.state is State.COMPUTING:
            self.state = State.FAILED
            self.link.abort(self.slot)

    # ---- Sink

    def accepted(self) -> None:
        """Do nothing: the sequence runs on the draining worker. Implements Sink."""

    def refused(self, reason: str, message: str, field: str) -> None:
        """End the preparation, which the engine has refused. Implements Sink."""
        self.state = State.FAILED

    def token(self, token_id: int, now: float) -> None:
        """Never called, since the first output ends the preparation."""
        raise AssertionError("a token came after the only one")

    def parsed_token(self, token_id: int, parts: Sequence[OutputPart], now: float) -> None:
        """Never called, since the first output ends the preparation."""
        raise AssertionError("a token came after the only one")

    def output(self, output: TokenOutput) -> None:
        """End the preparation. The sequence moves later, when the whole message is applied: the message may also hold
        the credit that the preparation gives back. Implements Sink."""
        self.state = State.FAILED if output.finish in FAILED else State.DONE
        if output.finish is None:  # not the only output after all
            self.link.abort(self.slot)
        self.done_at = self.sequence.call.clock()

    def lost(self, why: str) -> None:
        """End the preparation, whose worker is lost. The sequence may be the cause, so it is not prepared again.
        Implements Sink."""
        self.state, self.attempts = State.FAILED, MOST_ATTEMPTS
        sequence, link = self.sequence, self.link
        if not link.draining and not sequence.finish_reason:
            sequence.life.lost(link.name, link.identity.node, len(sequence.emitted), sequence.call.clock())

    def failed(self, error: BaseException) -> None:
        """End the preparation, since the handling of a message raised `error`. Implements Sink."""
        self.state = State.FAILED
        log.error("call.move_not_prepared", **self.sequence.call.log_fields, exc_info=error)


class Moves:
    """The moves of one gateway's sequences from draining workers, for all models."""

    def __init__(
        self, policy: SchedulingPolicy, queues: Queues, workers: LinkedWorkers, clock: Callable[[], float]
    ) -> None:
        self._policy = policy
        self._queues = queues
        self._workers = workers
        self._clock = clock
        self._preparations: dict[str, Preparation] = {}
        """The newest preparation of each sequence that has not moved yet, by the sequence's key."""

    def __len__(self) -> int:
        return len(self._preparations)

    def move_all(self, origin: WorkerLink, *, at_once: bool) -> None:
        """Move sequences from a worker to other workers, as many as the others have capacity for now, or prepare their
        moves. Later calls move the remaining sequences. `at_once`: whether the sequences must not go on at the worker
        meanwhile."""
        now = self._clock()
        may_prepare = not at_once and now < origin.prepares_until
        sequences = []
        for sink in origin.slots.sinks:
            if isinstance(sink, LinkedSequence):
                earlier = self._of(sink)
                if earlier is not None and earlier.state is State.COMPUTING:
                    if may_prepare:
                        continue
                    earlier.abort()
                sequences.append(sink)
        self._move(origin, sequences, now, may_prepare=may_prepare)

    def move_prepared(self) -> None:
        """Move the sequences that other workers have computed, as far as these have capacity now. Called after a change
        of a worker's credit, before new sequences are sent, and a few times a second."""
        now = self._clock()
        for preparation in list(self._preparations.values()):
            sequence, origin = preparation.sequence, preparation.origin
            if sequence.link is not origin:  # it was lost there
                self.forget(sequence)
            elif self._cached_on(sequence, now) and now >= origin.move_requests_at:  # else the drain was undone
                self._move(origin, [sequence], now, may_prepare=False, only_to=preparation.link)

    def forget(self, sequence: LinkedSequence[Call]) -> None:
        """End the preparation of a sequence that has left its worker, or whose call has ended."""
        preparation = self._preparations.pop(sequence.key, None)
        if preparation is not None:
            preparation.abort()

    def _of(self, sequence: LinkedSequence[Call]) -> Preparation | None:
        """Return the preparation of a sequence at its worker; None if there is none."""
        preparation = self._preparations.get(sequence.key)
        return preparation if preparation is not None and preparation.origin is sequence.link else None

    def _move(
        self,
        origin: WorkerLink,
        sequences: Iterable[LinkedSequence[Call]],
        now: float,
        *,
        may_prepare: bool,
        only_to: WorkerLink | None = None,
    ) -> None:
        """Move those of the sequences for which the policy finds another worker. `may_prepare`: whether a sequence may
        stay until that worker has computed it. `only_to`: the only worker to which to move; None for any."""
        by_key = {sequence.key: sequence for sequence in sequences}
        running = [self._resuming(sequence, now) for sequence in by_key.values()]
        for key, worker_id in self._policy.movable(running, origin.identity.worker_id, now):
            sequence = by_key[key]
            target = self._workers.link(sequence.call.model, worker_id)
            if only_to is not None and target is not only_to:
                return
            try:
                if not (target is not None and may_prepare and self._prepare(sequence, target, now)):
                    cached_on = self._cached_on(sequence, now)
                    self.forget(sequence)
                    sequence.move(cached_on)
            except Exception as error:
                sequence.call.fail_unexpectedly(error)

    def _resuming(self, sequence: LinkedSequence[Call], now: float) -> ResumingSequence:
        """Return the policy's view of a running sequence."""
        return replace(self._queues.resuming(sequence), cached_on=self._cached_on(sequence, now))

    def _cached_on(self, sequence: LinkedSequence[Call], now: float) -> str:
        """Return the incarnation of the worker that has computed a sequence for its move; "" if there is none, or if
        the sequence has grown since by so much that the worker would compute it almost as long."""
        preparation = self._of(sequence)
        if preparation is None or preparation.state is not State.DONE or now - preparation.done_at > FRESH_S:
            return ""
        is_close = sequence.tokens - preparation.tokens < LEAST_TOKENS
        return preparation.link.identity.incarnation if is_close and not preparation.link.ended else ""

    def _prepare(self, sequence: LinkedSequence[Call], target: WorkerLink, now: float) -> bool:
        """Begin a preparation. Return False if it is not worthwhile, if the worker has computed the sequence already,
        or if the request could not be sent."""
        origin, earlier = sequence.link, self._of(sequence)
        attempts = 0 if earlier is None else earlier.attempts
        if origin is None or attempts >= MOST_ATTEMPTS or not _is_worthwhile(sequence, target):
            return False
        if self._cached_on(sequence, now) == target.identity.incarnation:
            return False
        preparation = Preparation(sequence, origin, target, attempts + 1)
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
    worker only and has lost none since its last token, and the other worker keeps KV blocks of ended requests."""
    if sequence.hedge is not None or not sequence.emitted or sequence.finish_reason:
        return False
    if sequence.silent_since is not None:
        return False
    return sequence.tokens >= LEAST_TOKENS and KV_EVENTS in target.info.capabilities
