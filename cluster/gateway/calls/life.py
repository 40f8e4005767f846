"""The state machine of a sequence: its states, its events, and what to do after a loss. Pure; `now` is an argument.

Problem: a sequence may lose its worker at any moment, more than once, before or after its first token, and must end
exactly once. Invariant: `MOVES` has every legal pair of state and event; any other pair is a programming error. `DONE`
and `FAILED` are final: later events change nothing.

docs/architecture.md shows the table as a diagram; a test compares the two.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from cluster.api.types import CompatibilityKey


class State(enum.Enum):
    """State of a sequence."""

    QUEUED = "queued"
    """In the waiting room; no worker has begun it."""
    SENT = "sent"
    """Sent to its first worker, which has not answered."""
    RUNNING = "running"
    """On a worker that has sent tokens for it."""
    RESUMING = "resuming"
    """In the resume queue: it waits for a compatible worker."""
    RESENT = "resent"
    """Sent to another worker, which has not answered."""
    DONE = "done"
    """Finished: by the model, by a stop string or a guard, or cut at its budget."""
    FAILED = "failed"
    """Failed with its call."""


class Event(enum.Enum):
    """Event of a sequence."""

    SUBMITTED = "submitted"
    """Sent to a worker."""
    ANSWERED = "answered"
    """The first output of that worker has arrived."""
    RETRY = "retry"
    """Left its worker; starts over in the waiting room."""
    RESUME = "resume"
    """Left its worker or its gateway; continues after its emitted tokens on another worker."""
    FINISHED = "finished"
    FAILED = "failed"


S, E = State, Event
MOVES: dict[tuple[State, Event], State] = {
    (S.QUEUED, E.SUBMITTED): S.SENT,
    (S.QUEUED, E.RESUME): S.RESUMING,
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
    **{(state, E.FINISHED): S.DONE for state in (S.QUEUED, S.SENT, S.RUNNING, S.RESUMING, S.RESENT)},
    **{(state, E.FAILED): S.FAILED for state in (S.QUEUED, S.SENT, S.RUNNING, S.RESUMING, S.RESENT)},
    **{(state, event): state for state in (S.DONE, S.FAILED) for event in E},
}
WAITING = (State.QUEUED, State.RESUMING)
ENDED = (State.DONE, State.FAILED)


class IllegalSequenceMove(RuntimeError):
    """An event that `MOVES` does not allow in this state."""


class Next(enum.Enum):
    """Action for the owner of a sequence after a loss."""

    REQUEUE = "requeue"
    """Put the sequence into the waiting room or the resume queue, by its state."""
    FAIL = "fail"
    """Fail the call: `max_attempts` workers have failed the sequence."""


@dataclass(slots=True)
class Loss:
    """Workers that a sequence lost unexpectedly in a row, without a new token between; see worker_losses.py."""

    links: tuple[str, ...] = ()
    """Names of their links."""
    tokens: int = 0
    """Tokens that the sequence had at the last loss."""
    first_at: float | None = None
    """Time of the first loss (monotonic)."""
    last_at: float = -math.inf
    last_node: str = ""
    """Node of the worker that was lost last."""


@dataclass(slots=True)
class Life:
    """State of one sequence, and the history of its workers."""

    max_attempts: int = 3
    """Number of workers that may fail the sequence; the call fails with the last of them."""
    max_silent_losses: int = 2
    """Number of workers that may be lost in a row, with no token between, before the sequence is a suspect."""
    state: State = State.QUEUED
    attempt: int = 1
    """Number of the next Submit, unique per sequence: increases with each worker that the sequence leaves."""
    failures: int = 0
    """Number of workers that have failed the sequence."""
    loss: Loss = field(default_factory=Loss)
    excluded: frozenset[str] = frozenset()
    """Incarnations of workers whose engine could not continue the sequence."""
    compatibility: CompatibilityKey | None = None
    """Key of the worker that computed its first token; the sequence resumes only on workers with a compatible key."""
    last_worker: str = ""
    """Incarnation of the worker that got its last Submit."""
    reason: str = ""
    """Reason of the resume, until the next token: lost, error, moved or gateway."""
    computed: bool = False
    """Whether a worker has accepted the sequence or emitted tokens for it."""

    def apply(self, event: Event) -> State:
        """Move to the next state. Raises IllegalSequenceMove."""
        try:
            self.state = MOVES[self.state, event]
        except KeyError:
            raise IllegalSequenceMove(f"a sequence that is {self.state.value} cannot be {event.value}") from None
        return self.state

    @property
    def cached_on(self) -> str:
        """Incarnation of the worker that still holds its KV blocks, after its gateway was lost; "" after its worker
        failed or drained."""
        return self.last_worker if self.reason == "gateway" else ""

    def suspect(self, tokens: int) -> bool:
        """Whether it lost so many workers in a row that it may crash them. `tokens`: emitted so far."""
        return len(self.loss.links) >= self.max_silent_losses and tokens <= self.loss.tokens

    def silent_since(self, tokens: int) -> float | None:
        """Time of the first loss since its last token; None if a token has come since the losses."""
        return self.loss.first_at if self.loss.links and tokens <= self.loss.tokens else None

    def submitted(self, incarnation: str, key: CompatibilityKey | None) -> None:
        """Record a Submit to a worker. `key` replaces the compatibility key; None keeps it."""
        self.apply(Event.SUBMITTED)
        self.last_worker, self.computed = incarnation, True
        if key is not None:
            self.compatibility = key

    def answered(self) -> str:
        """Record the first output of its worker; returns the reason of its resume, "" if it was not resumed."""
        self.apply(Event.ANSWERED)
        reason, self.reason = self.reason, ""
        return reason

    def submission_refused(self, tokens: int) -> None:
        """Record its worker's refusal; `tokens` were emitted before."""
        self.computed = bool(tokens)

    def lost(self, link: str, node: str, tokens: int, now: float) -> None:
        """Record the unexpected loss of its worker, with link and node."""
        loss = self.loss
        if tokens > loss.tokens:
            loss.links = ()
        if not loss.links:
            loss.first_at = now
        loss.links += (link,)
        loss.tokens, loss.last_at, loss.last_node = tokens, now, node

    def acquit(self) -> None:
        """Forget its losses: other workers were lost too, so the sequence is not the cause."""
        self.loss.links = ()

    def restore_losses(self, losses: tuple[str, ...], tokens: int) -> None:
        """Set the losses that another gateway has recorded."""
        self.loss.links, self.loss.tokens = losses, tokens

    def fail_worker(self, reason: str, tokens: int) -> Next:
        """Record that its worker has failed it; returns what the owner has to do."""
        self.failures += 1
        if self.failures >= self.max_attempts:
            return Next.FAIL
        self.leave(reason, tokens)
        return Next.REQUEUE

    def leave(self, reason: str, tokens: int) -> None:
        """Leave the worker and wait for another one; `tokens` were emitted so far."""
        self.attempt += 1
        if tokens:
            self.reason = reason
        self.wait(tokens)

    def wait(self, tokens: int) -> None:
        """Wait again: in the resume queue if tokens were emitted or workers are avoided, else in the waiting room."""
        resumes = tokens or self.excluded or self.suspect(tokens)
        self.apply(Event.RESUME if resumes else Event.RETRY)

    def restore(self, worker: str, key: CompatibilityKey | None, tokens: int) -> None:
        """Continue a sequence that another gateway or an earlier call began on this worker."""
        self.last_worker, self.compatibility = worker, key
        if tokens:
            self.reason = "gateway"
            self.apply(Event.RESUME)


def diagram() -> str:
    """The table as a Mermaid state diagram; moves that stay in a state are left out."""
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
