"""Statistics of a model's stable version and its canary (the new version on trial). The controller judges the canary by
them (policy/catalog/canary.py).

The counts of a model restart at zero when the model's versions change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.api.outcomes import Outcome
from cluster.api.types import CatalogEntry, VersionTally
from cluster.gateway.calls.call import Call
from cluster.observe.metrics import Metrics

FAULTS = (Outcome.INTERNAL, Outcome.WORKER_LOST)
"""Outcomes that count as an error of the worker. A call that another worker had to continue also counts as an error."""


@dataclass(slots=True)
class _Trial:
    """The trial of a model's canary, with its counts. `key` identifies the trial. `first_s`: seconds from submission to
    first token in the stable version's last call; None once a call of the canary was compared with this time."""

    key: tuple[object, ...]
    stable: str
    canary: str
    ttft_ratio: float
    first_s: float | None = None
    tallies: dict[tuple[str, str], VersionTally] = field(default_factory=dict)


class CanaryStatistics:
    """The canary statistics of one gateway."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._trials: dict[str, _Trial] = {}

    def catalog(self, entries: Sequence[CatalogEntry]) -> None:
        """Apply a new catalog: keep canary statistics for each model with two versions, and drop those of other models.
        If one of the versions has changed, the model's statistics start from zero."""
        trials = {}
        for entry in entries:
            if len(entry.versions) < 2:
                continue
            stable, canary = entry.versions[0], entry.versions[1]
            key = (stable.version, stable.revision, canary.version, canary.revision, canary.ttft_ratio)
            old = self._trials.get(entry.name)
            fresh = _Trial(key, stable.version, canary.version, canary.ttft_ratio)
            trials[entry.name] = old if old is not None and old.key == key else fresh
        self._trials = trials

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Count an ended call, if the call began at this gateway and was sent to a worker."""
        trial, worker = self._trials.get(call.model), call.began_at
        if trial is None or worker is None or call.is_resumed:
            return
        losses = any(sequence.life.failures for sequence in call.sequences)
        key = worker.version, worker.generation
        tally = trial.tallies.get(key) or VersionTally(call.model, worker.version, worker.generation)
        failed = losses or outcome in FAULTS
        tally = replace(tally, calls=tally.calls + 1, errors=tally.errors + int(failed))
        self._metrics.count("canary_calls_total", call.model, worker.version, "failed" if failed else "ok")
        if call.first_token_at is not None and not losses:
            first_s = call.usage.ttft_s - call.usage.queue_s
            if worker.version == trial.stable:
                trial.first_s = first_s
            elif worker.version == trial.canary and trial.first_s is not None and trial.ttft_ratio:
                slower = first_s > trial.ttft_ratio * trial.first_s
                tally = replace(tally, pairs=tally.pairs + 1, slower=tally.slower + int(slower))
                result = "slower" if slower else "as_fast"
                self._metrics.count("canary_compared_total", call.model, worker.version, result)
                trial.first_s = None
        trial.tallies[key] = tally

    def tallies(self) -> Sequence[VersionTally]:
        """Return the current counts of all models that have a canary: one VersionTally for each pair (version,
        generation) with calls."""
        return [tally for trial in self._trials.values() for tally in trial.tallies.values()]
