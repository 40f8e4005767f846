"""The sequences of one gateway that wait for a worker: new ones in the waiting room, others in the resume queue."""

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
class Admitted:
    """Result of an admission: sequences that had to make room, and why the new one was refused, if it was."""

    shed: Sequence[CallSequence]
    refusal: Outcome | None


class Queues:
    """Both queues, and the demand that they are."""

    def __init__(
        self, room: WaitingRoom, charges: ServiceCharges, resume_wait_s: float, clock: Callable[[], float]
    ) -> None:
        """`room` takes its orders from `charges`. `resume_wait_s`: longest wait in the resume queue."""
        self._room = room
        self._charges = charges
        self._clock = clock
        self._queued: dict[str, CallSequence] = {}
        self.resumed = ResumeQueue(resume_wait_s)
        self.tally = DemandTally()
        self.arrived: Counter[str] = Counter()
        """Sequences that have arrived, by model."""
        self.arrived_tokens: Counter[str] = Counter()
        """Their prompt tokens."""

    def count(self, model: str, sequences: Sequence[CallSequence]) -> None:
        """Count sequences as demand for a model."""
        self.arrived[model] += len(sequences)
        self.arrived_tokens[model] += sum(len(sequence.request.prompt_token_ids) for sequence in sequences)

    def admit(self, sequence: CallSequence, starts_in_s: float) -> Admitted:
        """Queue a new sequence, unless the room refuses it. `starts_in_s`: earliest start, 0 if unknown."""
        waiting = self._charges.waiting(sequence)
        self.tally.arrived(waiting)
        admission = self._room.admit(waiting, self._clock(), starts_in_s)
        shed = [one for waits in admission.shed if (one := self.pop(waits.call_id)) is not None]
        if admission.outcome is None:
            self._queued[sequence.key] = sequence
            self.tally.enqueue(waiting)
        return Admitted(shed, admission.outcome)

    def put_back(self, sequence: CallSequence) -> None:
        """Queue a sequence that starts over, at the head of its tenant's queue."""
        waiting = self._charges.waiting(sequence)
        self._queued[sequence.key] = sequence
        self._room.put_back(waiting, self._clock())
        self.tally.enqueue(waiting)

    def resume(self, sequence: CallSequence) -> None:
        """Queue a sequence to be resumed: it is demand from now on, like all that waits."""
        now = self._clock()
        self.resumed.add(sequence, now, sequence.silent_since)
        self.tally.enqueue(replace(self._charges.waiting(sequence), arrived=now))

    def next(
        self, model: str, fits: Callable[[CallSequence, WaitingSequence], bool], now: float
    ) -> WaitingSequence | None:
        """Take the sequence whose turn it is out of the room, if it fits. It stays queued until it is popped."""
        return self._room.pop_next(model, lambda waiting: fits(self._queued[waiting.call_id], waiting), now)

    def pop(self, key: str) -> CallSequence | None:
        """Forget a queued sequence; None if it was not queued."""
        self.tally.dequeue(key)
        return self._queued.pop(key, None)

    def stop_resuming(self, sequence: CallSequence) -> bool:
        """Take a sequence out of the resume queue; False if it was not there."""
        waited = self.resumed.remove(sequence)
        if waited:
            self.tally.dequeue(sequence.key)
        return waited

    def remove(self, sequence: CallSequence) -> bool:
        """Take a sequence out of both queues; whether it waited."""
        waited = self.resumed.remove(sequence)
        if self.pop(sequence.key) is not None:
            waited |= self._room.cancel(sequence.key)
        return waited

    def expired(self, now: float, extra_s: Callable[[str], float]) -> tuple[list[CallSequence], list[CallSequence]]:
        """Take out the sequences that have waited too long: new ones, and those to be resumed, which may wait
        `extra_s` longer by model."""
        new = [one for waiting in self._room.pop_expired(now) if (one := self.pop(waiting.call_id)) is not None]
        resumed = list(self.resumed.expired(now, extra_s))
        for sequence in resumed:
            self.tally.dequeue(sequence.key)
        return new, resumed

    def queued(self) -> Sequence[CallSequence]:
        """All sequences in the waiting room."""
        return list(self._queued.values())

    def position(self, call: Call) -> int:
        """Place of the call's first queued sequence in its tenant's queue, 1 the next; 0 if none is queued."""
        keys = (sequence.key for sequence in call.sequences)
        positions = [self._room.position(key) for key in keys if key in self._queued]
        return min((place + 1 for place in positions if place is not None), default=0)

    def is_resuming(self, call: Call) -> bool:
        """Whether a sequence of the call waits to be resumed."""
        return any(sequence in self.resumed for sequence in call.sequences)

    def waiting(self, model: str) -> tuple[int, int]:
        """Sequences of a model that wait here, and tokens to compute for them."""
        (new, prompt_tokens), (resumed, tokens) = self._room.waiting(model), self.resumed.waiting(model)
        return new + resumed, prompt_tokens + tokens
