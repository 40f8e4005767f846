"""What this gateway counts of versions that run beside each other, for the controller's judgement
(policy/catalog/canary.py).

Counts begin with the trial: when a model's versions change, they begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.api.outcomes import Outcome
from cluster.api.types import CatalogEntry, VersionTally
from cluster.gateway.calls.call import Call

FAULTS = (Outcome.INTERNAL, Outcome.WORKER_LOST)
"""Ends of a call that its worker is to blame for; so is one that another worker had to go on with."""


@dataclass(slots=True)
class _Trial:
    """A model with a version on trial. `key`: what it is about; `first_s`: the other's last time to a first token."""

    key: tuple[object, ...]
    stays: str
    on_trial: str
    ttft_ratio: float
    first_s: float | None = None
    tallies: dict[tuple[str, str], VersionTally] = field(default_factory=dict)


class CanaryStatistics:
    """Of one gateway."""

    def __init__(self) -> None:
        self._trials: dict[str, _Trial] = {}

    def catalog(self, entries: Sequence[CatalogEntry]) -> None:
        """A new catalog: trials begin and end."""
        trials = {}
        for entry in entries:
            if len(entry.versions) < 2:
                continue
            stays, trial = entry.versions[0], entry.versions[1]
            key = (stays.version, stays.revision, trial.version, trial.revision, trial.ttft_ratio)
            old = self._trials.get(entry.name)
            fresh = _Trial(key, stays.version, trial.version, trial.ttft_ratio)
            trials[entry.name] = old if old is not None and old.key == key else fresh
        self._trials = trials

    def ended(self, call: Call, outcome: Outcome) -> None:
        """A call is over, however; only what a worker has begun here counts."""
        trial, worker = self._trials.get(call.model), call.began_at
        if trial is None or worker is None or call.is_resumed:
            return
        losses = any(sequence.failures for sequence in call.sequences)
        key = worker.version, worker.generation
        tally = trial.tallies.get(key) or VersionTally(call.model, worker.version, worker.generation)
        tally = replace(tally, calls=tally.calls + 1, errors=tally.errors + int(losses or outcome in FAULTS))
        if call.first_token_at is not None and not losses:
            first_s = call.usage.ttft_s - call.usage.queue_s
            if worker.version == trial.stays:
                trial.first_s = first_s
            elif worker.version == trial.on_trial and trial.first_s is not None and trial.ttft_ratio:
                slower = first_s > trial.ttft_ratio * trial.first_s
                tally = replace(tally, pairs=tally.pairs + 1, slower=tally.slower + int(slower))
                trial.first_s = None
        trial.tallies[key] = tally

    def tallies(self) -> Sequence[VersionTally]:
        """All counts of trials that go on."""
        return [tally for trial in self._trials.values() for tally in trial.tallies.values()]
