"""The new sequences of one gateway, from their admission until they are sent.

A new sequence waits in the waiting room. When its turn comes, the fair order of tenants counts it as sent and
charges its tenant. But the sequence may not be sent at once: it may be set aside (set_aside.py) or wait for a worker
that can serve it (worker_waits.py). If it ends before it is sent, it is first put back into the waiting room, so that
the charge is refunded.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.fairness.waiting_room import RoomAdmission, WaitingRoom
from cluster.policy.routing.version_split import ANY_VERSION, Versions
from cluster.policy.scheduling.set_aside import SetAside
from cluster.policy.scheduling.worker_waits import WorkerWaits


class NewSequences:
    """Queues of the new sequences, and the model versions on which each sequence may begin. `now` is monotonic, in
    seconds."""

    def __init__(self, room: WaitingRoom) -> None:
        self.room = room
        self.aside = SetAside()
        self.worker_waits = WorkerWaits()
        self._versions: dict[str, Versions] = {}

    @property
    def versions(self) -> Mapping[str, Versions]:
        """Model versions on which the queued sequences may begin, by the key of the sequence. A sequence without an
        entry may begin on any version. The mapping is a live view."""
        return self._versions

    def admit(
        self, entry: WaitingSequence, now: float, starts_in_s: float = 0.0, versions: Versions = ANY_VERSION
    ) -> RoomAdmission:
        """Queue a new sequence if the waiting room admits it. The result has the reason of a refusal, and the sequences
        that the room has shed for the new one. `starts_in_s`: seconds until the earliest possible start. `versions`:
        versions of the model on which the sequence may begin."""
        admission = self.room.admit(entry, now, starts_in_s)
        for other in admission.shed:
            self._versions.pop(other.call_id, None)
        if admission.outcome is None:
            self.set_versions(entry.call_id, versions)
        return admission

    def put_back(self, entry: WaitingSequence, now: float, versions: Versions = ANY_VERSION) -> None:
        """Queue a sequence that was sent before and must start over. It waits ahead of all sequences of the model that
        were never sent."""
        self.room.put_back(entry, now)
        self.set_versions(entry.call_id, versions)

    def replace(self, entry: WaitingSequence) -> bool:
        """Replace the entry of a queued sequence, which keeps its place in the waiting room. Returns False if the
        sequence is not queued. `entry`: an entry that differs from the old one only in its adapter."""
        self._return_to_room(entry.call_id)
        return self.room.replace(entry)

    def set_versions(self, key: str, versions: Versions) -> None:
        """Set the versions on which a queued sequence may begin. Once one sequence of a call has begun, the other
        sequences of the call may begin only on the same version."""
        self._return_to_room(key)
        if versions == ANY_VERSION:
            self._versions.pop(key, None)
        else:
            self._versions[key] = versions

    def forget_versions(self, key: str) -> None:
        """Forget the versions of a sequence that leaves the queues."""
        self._versions.pop(key, None)

    def remove(self, key: str) -> bool:
        """Remove a sequence from its queue. Returns False if the sequence was not queued."""
        self._versions.pop(key, None)
        self._return_to_room(key)
        return self.room.cancel(key)

    def _return_to_room(self, key: str) -> None:
        """Return a sequence to the waiting room if it is set aside or waits for a worker that can serve it."""
        if (turn := self.aside.pop(key) or self.worker_waits.pop(key)) is not None:
            self.room.put_back(turn.entry, turn.since)

    def position(self, key: str) -> int | None:
        """Return how many new sequences of the same tenant are ahead of a queued new sequence; None if it is not
        queued."""
        return 0 if key in self.aside or key in self.worker_waits else self.room.position(key)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's new sequences, and the sum of their prompt tokens."""
        sequences, tokens = self.room.waiting(model)
        for queue in (self.aside, self.worker_waits):
            if queue:
                more_sequences, more_tokens = queue.waiting(model)
                sequences, tokens = sequences + more_sequences, tokens + more_tokens
        return sequences, tokens

    def pop_expired(self, now: float) -> list[str]:
        """Remove the sequences that have waited too long, and return their keys."""
        late = [entry.call_id for entry in self.room.pop_expired(now)]
        for wait in self.worker_waits.expired(now):
            self.remove(wait.entry.call_id)
            late.append(wait.entry.call_id)
        for key in late:
            self._versions.pop(key, None)
        return late

    def __repr__(self) -> str:
        return f"NewSequences({self.room}, {self.aside}, {self.worker_waits})"
