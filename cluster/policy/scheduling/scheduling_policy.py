"""The scheduling policy of one gateway: which waiting sequence goes to which worker, and when a wait ends.

Problem: the service of a tenant depends on the order of the sequences, the choice of workers, the resume of sequences
that lost a worker, and the bounds of all waits. These decisions must be testable without a network, and the simulator
must make the same decisions as a gateway.

Method: the policy keeps the queues and returns instructions. The caller carries out each instruction before it takes
the next one, because a sequence that is sent uses credit (granted capacity) of its worker. Resumed sequences are sent
before new sequences, each to a compatible worker. The inputs are `now`, in monotonic seconds, and the state of
`Workers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.waiting_room import RoomAdmission, WaitingRoom
from cluster.policy.routing.version_split import ANY_VERSION, Versions
from cluster.policy.scheduling.instructions import End, Ending, Instruction, Move, ResumingSequence
from cluster.policy.scheduling.new_assignment import NewAssignment
from cluster.policy.scheduling.new_sequences import NewSequences
from cluster.policy.scheduling.resume_queue import ResumeQueue
from cluster.policy.scheduling.resumed_assignment import ResumedAssignment
from cluster.policy.scheduling.worker_losses import WorkerLosses
from cluster.policy.scheduling.workers import Workers


class SchedulingPolicy:
    """The scheduling policy of one gateway, for all models."""

    def __init__(self, room: WaitingRoom, workers: Workers, resume_wait_s: float, losses: WorkerLosses) -> None:
        """`room`: queue of new sequences. `workers`: the workers of all models. `resume_wait_s`: longest time that a
        sequence to be resumed waits for a compatible worker. `losses`: the recent losses of workers."""
        self.room = room
        self.resuming = ResumeQueue(resume_wait_s)
        self.losses = losses
        self._new = NewSequences(room)
        self.aside = self._new.aside
        self.worker_waits = self._new.worker_waits
        self._new_assignment = NewAssignment(self._new, workers)
        self._resumed_assignment = ResumedAssignment(self.resuming, losses, workers)

    # ---- queues

    def admit(
        self, entry: WaitingSequence, now: float, starts_in_s: float = 0.0, versions: Versions = ANY_VERSION
    ) -> RoomAdmission:
        """Queue a new sequence if the waiting room admits it. The result has the other sequences that the room has shed
        to admit this sequence or, if the sequence is refused, the reason. `starts_in_s`: seconds until the earliest
        possible start. `versions`: versions of the model on which the sequence may begin."""
        return self._new.admit(entry, now, starts_in_s, versions)

    def put_back(self, entry: WaitingSequence, now: float, versions: Versions = ANY_VERSION) -> None:
        """Queue a sequence that was sent before and must start over. It waits ahead of all sequences of the model that
        were never sent. `versions`: versions of the model on which it may begin."""
        self._new.put_back(entry, now, versions)

    def replace(self, entry: WaitingSequence) -> bool:
        """Replace the entry of a queued new sequence, which keeps its turn. Returns False if no such sequence is
        queued. `entry`: an entry that differs from the old one only in its adapter."""
        return self._new.replace(entry)

    def set_versions(self, key: str, versions: Versions) -> None:
        """Set on which versions of its model a queued sequence may begin. Once one sequence of a call has begun, the
        other sequences of the call may begin only on the same version. `key`: id of the sequence."""
        self._new.set_versions(key, versions)

    def resume(self, sequence: ResumingSequence, now: float) -> None:
        """Queue a sequence to be resumed."""
        if sequence.suspect:
            self.losses.suspect(sequence.key, sequence.lost_links, now)
        self.resuming.add(sequence, now)

    def remove(self, key: str) -> bool:
        """Remove a sequence from its queue. Returns False if the sequence was not queued."""
        was_new = self._new.remove(key)
        return self.resuming.remove(key) or was_new

    def position(self, key: str) -> int | None:
        """Return how many new sequences of the same tenant are ahead of a queued new sequence; None if it is not
        queued."""
        return self._new.position(key)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's waiting sequences, and the number of tokens to compute for these sequences."""
        sequences, tokens = self._new.waiting(model)
        if self.resuming:
            resumed, resumed_tokens = self.resuming.waiting(model)
            return sequences + resumed, tokens + resumed_tokens
        return sequences, tokens

    def expire(self, now: float, longer_s: Callable[[str], float]) -> list[End]:
        """Remove the sequences that have waited too long, and return the instructions to end their calls.
        `longer_s(model)`: seconds by which a model's sequences may exceed the usual limit of the wait for a resume. The
        limit is at most doubled."""
        ends = [End(key, Ending.TOO_LATE) for key in self._new.pop_expired(now)]
        return ends + [End(key, Ending.NOT_RESUMED) for key in self.resuming.expired(now, longer_s)]

    # ---- instructions

    def assign(self, model: str, now: float) -> Iterator[Instruction]:
        """Yield the instructions for a model's queued sequences, as far as workers have capacity. Resumed sequences
        come before new ones."""
        yield from self.assign_resumed(model, self.resuming.in_order(model), now)
        yield from self._new_assignment.assign(model, now)

    def assign_resumed(self, model: str, sequences: Iterable[ResumingSequence], now: float) -> Iterator[Instruction]:
        """Return instructions that assign resumed sequences of a model to workers. `sequences`: the resumed
        sequences."""
        return self._resumed_assignment.assign(model, sequences, now)

    def movable(self, sequences: Iterable[ResumingSequence], worker_id: str, now: float) -> Iterator[Move]:
        """Yield the sequences that may leave the draining worker `worker_id`, because another worker has capacity.
        `sequences`: sequences on the draining worker. The caller must send each sequence to its new worker before it
        takes the next one."""
        return self._resumed_assignment.movable(sequences, worker_id, now)

    def __repr__(self) -> str:
        return f"SchedulingPolicy({self.room}, {self.resuming})"
