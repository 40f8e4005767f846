"""The state machine of a sequence: the states, the events, and the actions after the loss of a worker. The module is
pure: `now` is an argument.

Problem: a sequence may lose its worker at any moment, more than once, before or after the first token, and must end
exactly once. Invariant: `MOVES` holds every legal pair of state and event, and any other pair is a programming error.
`DONE` and `FAILED` are final: later events change nothing.

docs/architecture.md shows `MOVES` as a diagram; a test compares the diagram with `MOVES`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from cluster.api.types import CompatibilityKey


class State(enum.StrEnum):
    """State of a sequence."""

    QUEUED = "queued"
    """The sequence is in the waiting room, and no worker has begun the sequence."""
    SENT = "sent"
    """The sequence has been sent to its first worker, which has not answered."""
    HEDGED = "hedged"
    """The sequence has been sent to its first worker and to a second worker, and neither has answered."""
    RUNNING = "running"
    """The sequence runs on a worker that has sent output for the sequence."""
    RESUMING = "resuming"
    """The sequence is in the resume queue and waits for a compatible worker."""
    RESENT = "resent"
    """The sequence has been sent to another worker, which has not answered."""
    DONE = "done"
    """The sequence has finished: the model ended it, a stop string or a guard stopped it, or it was cut at the
    budget."""
    FAILED = "failed"
    """The sequence has failed with its call."""


class Event(enum.StrEnum):
    """An event in the life of a sequence."""

    SUBMITTED = "submitted"
    """The sequence is sent to a worker."""
    HEDGE = "hedge"
    """The sequence is sent to a second worker, because the first is late."""
    HEDGE_ENDED = "hedge_ended"
    """A worker of the hedged sequence drops out, and the other worker keeps the sequence."""
    ANSWERED = "answered"
    """The first output of the worker arrives."""
    RETRY = "retry"
    """The sequence leaves its worker and starts over in the waiting room."""
    RESUME = "resume"
    """The sequence leaves its worker or its gateway, and continues after its emitted tokens on another worker."""
    FINISHED = "finished"
    FAILED = "failed"


S, E = State, Event
MOVES: dict[tuple[State, Event], State] = {
    (S.QUEUED, E.SUBMITTED): S.SENT,
    (S.QUEUED, E.RESUME): S.RESUMING,
    (S.SENT, E.HEDGE): S.HEDGED,
    (S.HEDGED, E.HEDGE_ENDED): S.SENT,
    (S.SENT, E.ANSWERED): S.RUNNING,
    (S.SENT, E.RETRY): S.QUEUED,
    (S.SENT, E.RESUME): S.RESUMING,
    (S.RUNNING, E.RETRY): S.QUEUED,
    (S.RUNNING, E.RESUME): S.RESUMING,
    (S.RESUMING, E.SUBMITTED): S.RESENT,
    (S.RESUMING, E.RESUME): S.RESUMING,
    (S.RESENT, E.ANSWERED): S.RUNNING,
    (S.RESENT, E.RETRY): S.QUEUED,
    (S.RESENT, E.RESUME): S.RESUMING,
    **{(state, E.FINISHED): S.DONE for state in (S.QUEUED, S.SENT, S.HEDGED, S.RUNNING, S.RESUMING, S.RESENT)},
    **{(state, E.FAILED): S.FAILED for state in (S.QUEUED, S.SENT, S.HEDGED, S.RUNNING, S.RESUMING, S.RESENT)},
    **{(state, event): state for state in (S.DONE, S.FAILED) for event in E},
}
WAITING = (State.QUEUED, State.RESUMING)
ENDED = (State.DONE, State.FAILED)


class IllegalSequenceMove(RuntimeError):
    """The error for an event that `MOVES` does not allow in the current state."""


@dataclass(slots=True)
class Loss:
    """The workers that a sequence has lost unexpectedly, one after another without a new token in between.
    worker_losses.py decides by these losses whether the sequence is resumed."""

    links: tuple[str, ...] = ()
    """Names of the links to the lost workers."""
    tokens: int = 0
    """Number of tokens that the sequence had at the last loss."""
    first_at: float | None = None
    """Monotonic time of the first loss."""
    last_at: float = -math.inf
    last_node: str = ""
    """Node on which the last lost worker ran."""


@dataclass(slots=True)
class Life:
    """The state of one sequence, and the history of its workers."""

    max_attempts: int = 3
    """Maximum number of workers that may fail the sequence. When this number is reached, the call fails."""
    max_silent_losses: int = 2
    """Number of workers lost in a row, without a token in between, at which the sequence becomes suspect."""
    state: State = State.QUEUED
    attempt: int = 1
    """Number of the next Submit. The number is unique per sequence and increases with each worker that the sequence
    leaves."""
    failures: int = 0
    """Number of workers that have failed the sequence."""
    loss: Loss = field(default_factory=Loss)
    excluded: frozenset[str] = frozenset()
    """Incarnations of the workers whose engine could not continue the sequence."""
    compatibility: CompatibilityKey | None = None
    """Compatibility key of the worker that computed the sequence's first token. The sequence resumes only on workers
    with a compatible key."""
    last_worker: str = ""
    """Incarnation of the worker that got the last Submit of the sequence. While the sequence is hedged, that is the
    first worker."""
    reason: str = ""
    """Reason of the current resume: lost, error, moved or gateway. "" once the next worker has sent output."""
    moves_to: str = ""
    """Incarnation of the worker that has computed the sequence's KV blocks, because the sequence moves there."""
    computed: bool = False
    """Whether the sequence has emitted tokens, or was sent to a worker that has not refused the sequence."""

    def apply(self, event: Event) -> State:
        """Apply an event: move to the next state and return that state. Raises IllegalSequenceMove."""
        try:
            self.state = MOVES[self.state, event]
        except KeyError:
            raise IllegalSequenceMove(f"a sequence that is {self.state.value} cannot be {event.value}") from None
        return self.state

    @property
    def cached_on(self) -> str:
        """Incarnation of the worker that holds the sequence's KV blocks. It is known only if the sequence left its
        worker because a gateway was lost, or if another worker has computed the blocks for its move; otherwise ""."""
        return self.last_worker if self.reason == "gateway" else self.moves_to

    def exclude(self, incarnation: str) -> None:
        """Exclude a worker: the sequence is never sent to this worker again."""
        self.excluded |= {incarnation}

    def suspect(self, tokens: int) -> bool:
        """Return whether the sequence is suspect: it has lost so many workers in a row that it may be the cause of the
        losses. `tokens`: number of tokens emitted so far."""
        return len(self.loss.links) >= self.max_silent_losses and tokens <= self.loss.tokens

    def silent_since(self, tokens: int) -> float | None:
        """Return the time of the first worker loss since the sequence's last token; None if no worker was lost since
        then. `tokens`: number of tokens emitted so far."""
        return self.loss.first_at if self.loss.links and tokens <= self.loss.tokens else None

    def submitted(self, incarnation: str, key: CompatibilityKey | None) -> None:
        """Record that the sequence was sent to a worker. `key` replaces the compatibility key; None keeps the old
        key."""
        self.apply(Event.SUBMITTED)
        self.last_worker, self.computed = incarnation, True
        if key is not None:
            self.compatibility = key

    def hedged(self) -> None:
        """Record that the sequence was also sent to a second worker."""
        self.apply(Event.HEDGE)
        self.attempt += 1

    def hedge_ended(self, last_worker: str, has_failed: bool) -> None:
        """Record that only one of two workers still has the sequence. `last_worker`: incarnation of the remaining
        worker. `has_failed`: whether the other worker has failed the sequence."""
        self.apply(Event.HEDGE_ENDED)
        self.last_worker, self.computed = last_worker, True
        self.failures += has_failed

    def answered(self) -> str:
        """Record the first output of the current worker. Returns why the sequence was resumed on this worker; "" if it
        was not resumed."""
        self.apply(Event.ANSWERED)
        reason, self.reason, self.moves_to = self.reason, "", ""
        return reason

    def submission_refused(self, tokens: int) -> None:
        """Record that the worker has refused the sequence. `tokens`: number of tokens emitted so far."""
        self.computed = bool(tokens)

    def lost(self, link: str, node: str, tokens: int, now: float) -> None:
        """Record the unexpected loss of the sequence's worker. `link`: name of the link. `node`: node of the worker.
        `tokens`: number of tokens that the sequence has. If there are new tokens since the last loss, the earlier
        losses are forgotten."""
        loss = self.loss
        if tokens > loss.tokens:
            loss.links = ()
        if not loss.links:
            loss.first_at = now
        loss.links += (link,)
        loss.tokens, loss.last_at, loss.last_node = tokens, now, node

    def acquit(self) -> None:
        """Forget the losses of the sequence, because the sequence is not their cause: other workers were lost too."""
        self.loss.links = ()

    def restore_losses(self, losses: tuple[str, ...], tokens: int) -> None:
        """Record worker losses that happened while the sequence ran at other gateways. `losses`: names of the links to
        the lost workers. `tokens`: number of tokens emitted so far."""
        self.loss.links, self.loss.tokens = losses, tokens

    def fail_worker(self, reason: str, tokens: int) -> bool:
        """Record that a worker has failed the sequence. Returns True if the sequence now waits for another worker.
        Returns False if `max_attempts` workers have failed the sequence, so that its call must fail."""
        self.failures += 1
        if self.failures < self.max_attempts:
            self.leave(reason, tokens)
        return self.failures < self.max_attempts

    def leave(self, reason: str, tokens: int, moves_to: str = "") -> None:
        """Record that the sequence has left its worker, and let it wait for another worker. `reason`: the reason of the
        resume. `tokens`: number of tokens emitted so far. `moves_to`: incarnation of the worker that has computed the
        sequence's KV blocks; "" for none."""
        self.attempt += 1
        self.moves_to = moves_to
        if tokens:
            self.reason = reason
        self.wait(tokens)

    def wait(self, tokens: int) -> None:
        """Change the state: the sequence waits for a worker again. It waits in the resume queue if it has emitted
        tokens, has excluded workers or is suspect, and else in the waiting room."""
        resumes = tokens or self.excluded or self.suspect(tokens)
        self.apply(Event.RESUME if resumes else Event.RETRY)

    def restore(self, worker: str, key: CompatibilityKey | None, tokens: int) -> None:
        """Continue a sequence that already ran on `worker`. It was part of a call at another gateway, or of an earlier
        stream of this call. `tokens`: number of tokens emitted so far."""
        self.last_worker, self.compatibility = worker, key
        if tokens:
            self.reason = "gateway"
            self.apply(Event.RESUME)


def diagram() -> str:
    """Return the table `MOVES` as a Mermaid state diagram. Moves that stay in a state are left out."""
    lines = ["stateDiagram-v2", "    [*] --> queued"]
    lines += [
        f"    {state.value} --> {target.value}: {event.value}"
        for (state, event), target in MOVES.items()
        if state is not target and event not in (Event.FINISHED, Event.FAILED)
    ]
    live = ", ".join(state.value for state in State if state not in ENDED)
    lines += [f"    note right of running: {live} → done when finished, → failed when failed"]
    lines += ["    done --> [*]", "    failed --> [*]"]
    return "\n".join(lines)
