"""The life of a sequence as one table: its states, the events that move it, and what to do after a loss. Pure.

Problem: a sequence may lose its worker at any moment, more than once, before or after its first token, and must end
exactly once. Invariant: `MOVES` has every legal pair of state and event; a pair that is missing is an error of the
program. `DONE` and `FAILED` are final: news that arrives later changes nothing. `now` is an argument.

docs/architecture.md shows the table as a diagram, which a test compares with it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from cluster.api.types import CompatibilityKey


class State(enum.Enum):
    """Where a sequence is."""

    QUEUED = "queued"
    """In the waiting room; no worker has begun it."""
    SENT = "sent"
    """At its first worker, without a token."""
    RUNNING = "running"
    """At a worker that has sent tokens for it."""
    RESUMING = "resuming"
    """In the resume queue: it waits for a compatible worker."""
    RESENT = "resent"
    """At a further worker, which has not sent a token for it."""
    DONE = "done"
    """Finished: by itself, by a stop string or a guard, or cut at its budget."""
    FAILED = "failed"
    """Its call has failed."""


class Event(enum.Enum):
    """What happens to a sequence."""

    SUBMITTED = "submitted"
    """It was sent to a worker."""
    ANSWERED = "answered"
    """The first output of that worker has come."""
    RETRY = "retry"
    """It left its worker and starts over in the waiting room."""
    RESUME = "resume"
    """It left its worker, or its gateway, and continues after its tokens elsewhere."""
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


class IllegalMove(RuntimeError):
    """An event that cannot happen in this state."""


class Next(enum.Enum):
    """What the owner of a sequence has to do after a loss."""

    REQUEUE = "requeue"
    """Put it into the waiting room or the resume queue, by its state."""
    FAIL = "fail"
    """Fail its call: as many workers have failed it as may."""


@dataclass(slots=True)
class Loss:
    """Workers that a sequence lost unexpectedly, with no token since before the first; see worker_losses.py."""

    links: tuple[str, ...] = ()
    """Names of their links."""
    tokens: int = 0
    """Tokens that the sequence had at the last of them."""
    first_at: float | None = None
    """When it lost the first of them (monotonic)."""
    last_at: float = -math.inf
    last_node: str = ""
    """Node of the last of them."""


@dataclass(slots=True)
class Life:
    """State of one sequence, and what it remembers of its workers."""

    max_attempts: int = 3
    """As many workers may fail it before its call fails."""
    max_silent_losses: int = 2
    """As many may be lost in a row with no token between before it is held back."""
    state: State = State.QUEUED
    attempt: int = 1
    """Increases with each worker that it left; no two Submits of it have the same."""
    failures: int = 0
    """Workers that have failed it."""
    loss: Loss = field(default_factory=Loss)
    excluded: frozenset[str] = frozenset()
    """Incarnations of workers whose engine could not continue it."""
    compatibility: CompatibilityKey | None = None
    """Key of the worker that gave its first token; it resumes only where the key is compatible."""
    last_worker: str = ""
    """Incarnation of the worker that it was sent to last."""
    reason: str = ""
    """Why it resumes, until the next token: lost, error, moved or gateway."""
    computed: bool = False
    """Whether a worker has taken it, or has emitted tokens of it."""

    def apply(self, event: Event) -> State:
        """Move to the next state. Raises IllegalMove."""
        try:
            self.state = MOVES[self.state, event]
        except KeyError:
            raise IllegalMove(f"a sequence that is {self.state.value} cannot be {event.value}") from None
        return self.state

    @property
    def cached_on(self) -> str:
        """Incarnation of the worker that holds its KV blocks, after its gateway was lost; a worker that failed it or
        drains is none."""
        return self.last_worker if self.reason == "gateway" else ""

    def suspect(self, tokens: int) -> bool:
        """Whether it lost so many workers in a row that it may be what ends them. `tokens`: emitted so far."""
        return len(self.loss.links) >= self.max_silent_losses and tokens <= self.loss.tokens

    def silent_since(self, tokens: int) -> float | None:
        """When it lost the first worker after which no token has come; None if one has."""
        return self.loss.first_at if self.loss.links and tokens <= self.loss.tokens else None

    def submitted(self, incarnation: str, key: CompatibilityKey | None) -> None:
        """A worker was chosen and the request sent. `key` replaces the compatibility key; None keeps it."""
        self.apply(Event.SUBMITTED)
        self.last_worker, self.computed = incarnation, True
        if key is not None:
            self.compatibility = key

    def answered(self) -> str:
        """The first output of its worker has come; returns why it was resumed, "" if it was not."""
        self.apply(Event.ANSWERED)
        reason, self.reason = self.reason, ""
        return reason

    def not_taken(self, tokens: int) -> None:
        """Its worker refused it; `tokens` were emitted before."""
        self.computed = bool(tokens)

    def lost(self, link: str, node: str, tokens: int, now: float) -> None:
        """Its worker is lost unexpectedly: remember on which link and node."""
        loss = self.loss
        if tokens > loss.tokens:
            loss.links = ()
        if not loss.links:
            loss.first_at = now
        loss.links += (link,)
        loss.tokens, loss.last_at, loss.last_node = tokens, now, node

    def acquit(self) -> None:
        """The losses were general: it is not what ends its workers."""
        self.loss.links = ()

    def carry(self, losses: tuple[str, ...], tokens: int) -> None:
        """Losses that another gateway has seen."""
        self.loss.links, self.loss.tokens = losses, tokens

    def fail_worker(self, reason: str, tokens: int) -> Next:
        """Its worker has failed it."""
        self.failures += 1
        if self.failures >= self.max_attempts:
            return Next.FAIL
        self.leave(reason, tokens)
        return Next.REQUEUE

    def leave(self, reason: str, tokens: int) -> None:
        """Wait for another worker, after this number of emitted tokens."""
        self.attempt += 1
        if tokens:
            self.reason = reason
        self.wait(tokens)

    def wait(self, tokens: int) -> None:
        """Wait again, in the resume queue where tokens have been emitted or workers are to be avoided."""
        resumes = tokens or self.excluded or self.suspect(tokens)
        self.apply(Event.RESUME if resumes else Event.RETRY)

    def restore(self, worker: str, key: CompatibilityKey | None, tokens: int) -> None:
        """Continue what another gateway, or another reader's call, has begun on this worker."""
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
