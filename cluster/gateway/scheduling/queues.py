"""The sequences that wait for a worker at one gateway. New sequences are in the waiting room, sequences to be resumed
are in the resume queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.api.outcomes import Outcome
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.demand import DemandTally
from cluster.gateway.scheduling.resume_queue import ResumeQueue
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.policy.fairness.waiting_room import WaitingRoom, WaitingSequence


@dataclass(frozen=True, slots=True)
class QueueAdmission:
    """Result of an admission: the sequences that were shed in favour of the new sequence, and the outcome with which
    the new sequence was refused, None if it was admitted."""

    shed: Sequence[CallSequence]
    refusal: Outcome | None


class Queues:
    """The waiting room and the resume queue of one gateway, with the demand tally."""

    def __init__(
        self, room: WaitingRoom, charges: ServiceCharges, resume_wait_s: float, clock: Callable[[], float]
    ) -> None:
        """`room`: the waiting room, which orders sequences by `charges`. `resume_wait_s`: longest wait in the resume
        queue."""
        self._room = room
        self._charges = charges
        self._clock = clock
        self._queued: dict[str, CallSequence] = {}
        self.resumed = ResumeQueue(resume_wait_s)
        self.tally = DemandTally()
        self.arrived: Counter[str] = Counter()
        """Number of sequences that have arrived, by model."""
        self.arrived_tokens: Counter[str] = Counter()
        """Number of prompt tokens of the sequences that have arrived, by model."""

    def count(self, model: str, sequences: Sequence[CallSequence]) -> None:
        """Count sequences as demand for a model."""
        self.arrived[model] += len(sequences)
        self.arrived_tokens[model] += sum(len(sequence.request.prompt_token_ids) for sequence in sequences)

    def admit(self, sequence: CallSequence, starts_in_s: float) -> QueueAdmission:
        """Queue a new sequence, unless the waiting room refuses the sequence. `starts_in_s`: seconds until the earliest
        possible start, 0 if unknown."""
        waiting = self._charges.waiting(sequence)
        self.tally.arrived(waiting)
        admission = self._room.admit(waiting, self._clock(), starts_in_s)
        shed = [popped for other in admission.shed if (popped := self.pop(other.call_id)) is not None]
        if admission.outcome is None:
            self._queued[sequence.key] = sequence
            self.tally.enqueue(waiting)
        return QueueAdmission(shed, admission.outcome)

    def put_back(self, sequence: CallSequence) -> None:
        """Queue a sequence that starts over. The sequence is put at the head of its tenant's queue."""
        waiting = self._charges.waiting(sequence)
        self._queued[sequence.key] = sequence
        self._room.put_back(waiting, self._clock())
        self.tally.enqueue(waiting)

    def resume(self, sequence: CallSequence) -> None:
        """Queue a sequence to be resumed, and count the sequence as demand from now on."""
        now = self._clock()
        self.resumed.add(sequence, now, sequence.silent_since)
        self.tally.enqueue(replace(self._charges.waiting(sequence), arrived=now))

    def next(
        self, model: str, fits: Callable[[CallSequence, WaitingSequence], bool], now: float
    ) -> WaitingSequence | None:
        """Remove the next sequence from the waiting room if `fits` accepts the sequence, and return its queue entry.
        The caller must also `pop` the sequence."""
        return self._room.pop_next(model, lambda waiting: fits(self._queued[waiting.call_id], waiting), now)

    def pop(self, key: str) -> CallSequence | None:
        """Remove a queued sequence and return it; None if no sequence with this key was queued."""
        self.tally.dequeue(key)
        return self._queued.pop(key, None)

    def stop_resuming(self, sequence: CallSequence) -> bool:
        """Remove a sequence from the resume queue. Returns False if the sequence was not in the queue."""
        waited = self.resumed.remove(sequence)
        if waited:
            self.tally.dequeue(sequence.key)
        return waited

    def remove(self, sequence: CallSequence) -> bool:
        """Remove a sequence from both queues. Returns whether the sequence was in one of the queues."""
        waited = self.resumed.remove(sequence)
        if self.pop(sequence.key) is not None:
            waited |= self._room.cancel(sequence.key)
        return waited

    def expired(self, now: float, extra_s: Callable[[str], float]) -> tuple[list[CallSequence], list[CallSequence]]:
        """Remove the sequences that have waited too long. Returns first the new sequences, then the sequences to be
        resumed, which may wait `extra_s(model)` longer."""
        new = [popped for waiting in self._room.pop_expired(now) if (popped := self.pop(waiting.call_id)) is not None]
        resumed = list(self.resumed.expired(now, extra_s))
        for sequence in resumed:
            self.tally.dequeue(sequence.key)
        return new, resumed

    def queued(self) -> Sequence[CallSequence]:
        """Return all sequences in the waiting room."""
        return list(self._queued.values())

    def position(self, call: Call) -> int:
        """Return the position, from 1, of the call's first queued sequence in the queue of the call's tenant; 0 if no
        sequence of the call is queued."""
        keys = (sequence.key for sequence in call.sequences)
        positions = [self._room.position(key) for key in keys if key in self._queued]
        return min((place + 1 for place in positions if place is not None), default=0)

    def is_resuming(self, call: Call) -> bool:
        """Return whether a sequence of the call waits to be resumed."""
        return any(sequence in self.resumed for sequence in call.sequences)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's waiting sequences, and the number of tokens to compute for these sequences."""
        (new, prompt_tokens), (resumed, tokens) = self._room.waiting(model), self.resumed.waiting(model)
        return new + resumed, prompt_tokens + tokens
