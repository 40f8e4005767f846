"""States of the replicas of one model, and the time that a start takes.

Of the replicas that serve, at most the decided number count as ready. If fewer serve, the missing replicas are
starting. All other connected replicas, and replicas that Ray stops, are draining.

The cold-start time is the time from a decision to add a replica until a replica serves. When a replica serves
for the first time, it is matched with the oldest such decision that has no replica yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.api.types import ModelSpec
from cluster.policy.scaling.inputs import ModelInputs, RayReplicas, WorkerSeen
from cluster.policy.scaling.portfolio import ReplicaSeen
from cluster.policy.scaling.portfolio.types import ReplicaState

NEWEST = 0.3
"""Weight of a new cold-start time in the learnt mean; the earlier mean has the weight 1 - NEWEST."""


class ReplicaStates:
    """States of the replicas of one model. `now` is monotonic, in seconds."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[ReplicaState, float]] = {}
        """State of each replica and the time at which it began, by the name of the replica."""
        self._ordered_at: list[float] = []
        """Times of the decisions for replicas that have not served yet, the oldest first; one for each replica."""
        self._starting_since_s = 0.0
        self._cold_start_s = 0.0

    def __repr__(self) -> str:
        return f"ReplicaStates({len(self._since)} replicas, {len(self._ordered_at)} ordered)"

    @property
    def cold_start_s(self) -> float:
        """Learnt time from a decision to add a replica until a replica serves, in seconds; 0 if not known yet."""
        return self._cold_start_s

    @property
    def starting_since_s(self) -> float:
        """Time since which the model has been starting, in seconds since the epoch. 0 if a replica serves or none
        starts."""
        return self._starting_since_s

    def observe(self, inputs: ModelInputs, desired: Mapping[str, int], now: float, wall_s: float) -> list[ReplicaSeen]:
        """Return the states of all replicas.

        `desired`: decided number of replicas by type of GPU. `wall_s`: `now` in seconds since the epoch.
        """
        states: dict[str, ReplicaState] = {}
        gpus: dict[str, str] = {}
        for spec in inputs.types:
            ray = inputs.rays.get(spec.gpu, RayReplicas())
            mine = self._states(spec, desired.get(spec.gpu, 0), ray.leaving, inputs.workers[spec.gpu], now)
            states |= mine
            gpus |= dict.fromkeys(mine, spec.gpu)
        self._learn_cold_start(sum(state == "ready" and name not in self._since for name, state in states.items()), now)
        self._since = {
            name: before if (before := self._since.get(name)) is not None and before[0] == state else (state, now)
            for name, state in states.items()
        }
        linked = {worker.worker_id: worker for of_type in inputs.workers.values() for worker in of_type}
        serving = any(worker.serves for of_type in inputs.workers.values() for worker in of_type)
        if serving or "starting" not in states.values():
            self._starting_since_s = 0.0
        elif not self._starting_since_s:
            self._starting_since_s = wall_s - (now - min(self._ordered_at, default=now))
        return [
            ReplicaSeen(
                replica_id=name,
                state=state,
                since_s=self._since[name][1],
                gpu=gpus[name],
                running=linked[name].running if name in linked else 0,
                kv_use=linked[name].kv_use if name in linked else 0.0,
            )
            for name, state in states.items()
        ]

    def record_change(self, changes: Sequence[int], now: float) -> None:
        """Record a decision. `changes`: change of the number of replicas on each type of GPU.

        Replicas that have not served yet are removed first. So a decision to remove replicas cancels the latest
        decisions to add replicas.
        """
        fewer = -sum(min(change, 0) for change in changes)
        del self._ordered_at[max(len(self._ordered_at) - fewer, 0) :]
        self._ordered_at += [now] * sum(max(change, 0) for change in changes)

    def _states(
        self, spec: ModelSpec, desired: int, leaving: int, workers: Sequence[WorkerSeen], now: float
    ) -> dict[str, ReplicaState]:
        """Return the states of the replicas on one type of GPU, by the name of the replica. `leaving`: number of
        replicas that Ray is stopping."""
        serving = sorted((w for w in workers if w.serves), key=lambda w: self._since.get(w.worker_id, ("", now))[1])
        states: dict[str, ReplicaState] = {w.worker_id: "ready" for w in serving[:desired]}
        states |= {w.worker_id: "draining" for w in workers if w.worker_id not in states}
        kind = f"{spec.name}-{spec.gpu}" if spec.gpu else spec.name
        states |= {f"{kind}-starting-{number}": "starting" for number in range(desired - len(serving[:desired]))}
        unlinked = max(leaving - sum(state == "draining" for state in states.values()), 0)
        return states | {f"{kind}-leaving-{number}": "draining" for number in range(unlinked)}

    def _learn_cold_start(self, started: int, now: float) -> None:
        """Learn the cold-start time from `started` replicas, which serve for the first time. Replicas that no decision
        of this process has added, such as those from before a restart, are not counted."""
        for ordered_at in self._ordered_at[:started]:
            took_s = now - ordered_at
            self._cold_start_s += (took_s - self._cold_start_s) * (NEWEST if self._cold_start_s else 1.0)
        del self._ordered_at[:started]
