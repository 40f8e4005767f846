"""The sequences that wait for a worker at one gateway, and the demand tally. The scheduling policy orders only the keys
of sequences; this module maps the keys to the sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cluster.api.outcomes import Outcome
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.sequences.linked_sequence import LinkedSequence
from cluster.gateway.demand import DemandTally
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.policy.fairness.order import WaitingSequence
from cluster.policy.scheduling.instructions import ResumingSequence
from cluster.policy.scheduling.scheduling_policy import SchedulingPolicy


@dataclass(frozen=True, slots=True)
class QueueAdmission:
    """Result of an admission. `shed`: the sequences that were shed in favour of the new sequence. `refusal`: why the
    new sequence was refused; None if it was admitted."""

    shed: Sequence[CallSequence]
    refusal: Outcome | None


class Queues:
    """The waiting sequences of one gateway, and the counts of the demand for each model."""

    def __init__(self, policy: SchedulingPolicy, charges: ServiceCharges, clock: Callable[[], float]) -> None:
        """`policy`: decides the order of the waiting sequences. `charges`: the service of each tenant, which the order
        depends on."""
        self._policy = policy
        self._charges = charges
        self._clock = clock
        self._sequences: dict[str, CallSequence] = {}
        self.tally = DemandTally()
        self.arrived: Counter[str] = Counter()
        """Number of sequences that have arrived, by model."""
        self.arrived_tokens: Counter[str] = Counter()
        """Number of prompt tokens of the sequences that have arrived, by model."""

    def count(self, model: str, sequences: Sequence[CallSequence]) -> None:
        """Add sequences to the counts of arrived sequences and of their prompt tokens, which are the demand for a
        model."""
        self.arrived[model] += len(sequences)
        self.arrived_tokens[model] += sum(len(sequence.request.prompt_token_ids) for sequence in sequences)

    def admit(self, sequence: CallSequence, starts_in_s: float) -> QueueAdmission:
        """Offer a new sequence to the waiting room, which queues or refuses it. `starts_in_s`: lower bound on the
        sequence's wait, in seconds; 0 if unknown."""
        entry = self._charges.waiting(sequence)
        self.tally.arrived(entry)
        admission = self._policy.admit(entry, self._clock(), starts_in_s, sequence.call.versions)
        shed = [left for other in admission.shed if (left := self.left(other.call_id)) is not None]
        if admission.outcome is None:
            self._sequences[sequence.key] = sequence
            self.tally.enqueue(entry)
        return QueueAdmission(shed, admission.outcome)

    def put_back(self, sequence: CallSequence) -> None:
        """Queue a sequence that must start over. It is put ahead of all sequences that were never sent."""
        entry = self._entry(sequence)
        self._sequences[sequence.key] = sequence
        self._policy.put_back(entry, self._clock(), sequence.call.versions)
        self.tally.enqueue(entry)

    def _entry(self, sequence: LinkedSequence[Call]) -> WaitingSequence:
        """Return the waiting room's entry of a sequence that was queued before. The entry has the sequence's current
        adapter key."""
        entry, adapter = self._charges.waiting(sequence), sequence.request.adapter
        return entry if entry.adapter == adapter else replace(entry, adapter=adapter)

    def set_adapter(self, sequence: CallSequence, key: str) -> None:
        """Set the adapter of a sequence. `key`: the key under which routing knows the adapter: its digest, or another
        key while the digest is unknown. If the sequence is in the waiting room, it keeps its place."""
        sequence.call.set_adapter(sequence, key)
        self._policy.replace(self._entry(sequence))

    def resume(self, sequence: CallSequence) -> ResumingSequence:
        """Put a sequence into the resume queue, and count it as demand from now on. Returns the queue's entry."""
        now, entry = self._clock(), self.resuming(sequence)
        self._sequences[sequence.key] = sequence
        self._policy.resume(entry, now)
        self.tally.enqueue(replace(entry.entry, arrived=now))
        return entry

    def resuming(self, sequence: LinkedSequence[Call]) -> ResumingSequence:
        """Return the resume queue's entry for a sequence, without queueing the sequence."""
        life, loss = sequence.life, sequence.life.loss
        return ResumingSequence(
            self._entry(sequence),
            sequence.tokens,
            life.compatibility,
            life.excluded,
            life.cached_on,
            sequence.silent_since,
            sequence.suspect,
            loss.links,
            loss.last_at,
            loss.last_node,
        )

    def settle(self, sequence: CallSequence) -> None:
        """Settle a sequence that has ended: replace its predicted service charge by its actual cost, and count its
        output as demand. Idempotent."""
        if (place := self._charges.place(sequence)) is not None:
            self.tally.ended(place, len(sequence.emitted), sequence.life.computed)
        self._charges.settle(sequence)

    def versions_changed(self, call: Call) -> None:
        """Handle a change of the model versions on which the call's queued sequences may begin."""
        for sequence in call.sequences:
            if sequence.key in self._sequences and sequence.key not in self._policy.resuming:
                self._policy.set_versions(sequence.key, call.versions)

    def sequence(self, key: str) -> CallSequence:
        """Return the waiting sequence with this key. Raises KeyError if there is none."""
        return self._sequences[key]

    def left(self, key: str) -> CallSequence | None:
        """Forget a sequence that the policy has removed from its queues, and return it; None if no sequence with this
        key waited."""
        self.tally.dequeue(key)
        return self._sequences.pop(key, None)

    def remove(self, sequence: CallSequence) -> bool:
        """Remove a sequence from its queue. Returns whether the sequence was queued."""
        return self.left(sequence.key) is not None and self._policy.remove(sequence.key)

    def queued(self) -> Sequence[CallSequence]:
        """Return all sequences in the waiting room."""
        return [sequence for key, sequence in self._sequences.items() if key not in self._policy.resuming]

    def position(self, call: Call) -> int:
        """Return the position, from 1, of the call's first queued sequence in the queue of the call's tenant; 0 if no
        sequence of the call is queued."""
        positions = [self._policy.position(sequence.key) for sequence in call.sequences]
        return min((place + 1 for place in positions if place is not None), default=0)

    def is_resuming(self, call: Call) -> bool:
        """Return whether a sequence of the call waits to be resumed."""
        return any(sequence.key in self._policy.resuming for sequence in call.sequences)

    def waiting(self, model: str) -> tuple[int, int]:
        """Return the number of a model's waiting sequences, and the number of tokens to compute for these sequences."""
        return self._policy.waiting(model)
