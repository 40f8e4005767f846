"""Events that happen to the cluster while the cluster serves, and the measurements of the events.

Every event begins on a whole cluster that has been under load for a while, and ends when the cluster is whole again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtests.hosts.cluster import BLUE, GREEN, RAY_UP_S, B, Cluster
from loadtests.hosts.load import Call, Load
from loadtests.hosts.pods import Pod

LONGEST_GAPS = 12
"""Number of the longest gaps that the report lists for an event."""
QUIET_S, AFTER_S = 10.0, 5.0
WHOLE_S = 180.0
AWAY_S = 10.0
"""Time in seconds for which a head, a store or a cable is away."""
GRPC_PORT = 50051
_ESTABLISHED = "01"
DETECTED_S = 15.0
MIN_READY_S = 5.0
DRAIN_S = 20.0


class NotWhole(RuntimeError):
    """Error: the cluster did not become complete in time, or its load did not become steady, before or during an
    event."""


@dataclass(slots=True)
class Episode:
    """An event, and the measurements of the cluster's reaction."""

    name: str
    struck: float
    over: float = 0.0
    whole: bool = True
    """Whether the cluster recovered in time."""
    detected_s: float = 0.0
    """Seconds until the processes that must act have detected the event: gateways by their links, callers by their
    connections.
    """
    capacity_s: float | None = None
    """Seconds from the loss of a node until every gateway has a link to every worker again."""
    engines_s: float | None = None
    """Seconds from the loss of a node until the last engine had started: the time that Ray's restart needs."""
    moved: float | None = None
    """Wall-clock time at which the last worker on the previous Ray cluster was gone."""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EpisodeResults:
    """An episode with the measurements of its callers."""

    episode: Episode
    calls: Sequence[Call]
    failed: Sequence[Call]
    resumed: int
    gaps: Sequence[tuple[float, float, str]]
    """The longest gaps: length, beginning after the event, and stream. Times are in seconds."""
    prefill_s: float
    prefills: int

    @property
    def longest_gap_s(self) -> float:
        """The longest gap of any stream, in seconds."""
        return self.gaps[0][0] if self.gaps else 0.0

    @property
    def ratio(self) -> float:
        """The longest gap in a stream, divided by the sum of two times: the time until all gateways had noticed the
        event, and the time of one prefill."""
        return self.longest_gap_s / (self.episode.detected_s + self.prefill_s)

    @property
    def beyond_s(self) -> float | None:
        """Seconds from the start of the last engine until full capacity, at least 0; None if either moment was not
        measured.

        This is the time that Ray's restart and the start of the engines do not explain.
        """
        episode = self.episode
        return (
            None
            if episode.capacity_s is None or episode.engines_s is None
            else max(episode.capacity_s - episode.engines_s, 0.0)
        )

    @property
    def moved(self) -> int:
        """Number of streams that certainly changed workers because of this event.

        A resumed stream is counted in two cases: it began after the earlier events were over, or it ended after the
        last of the original workers was gone.
        """
        episode = self.episode
        return sum(
            bool(call.resumed)
            and (call.sent >= episode.struck - QUIET_S or (episode.moved is not None and call.ended >= episode.moved))
            for call in self.calls
        )

    def settings(self) -> dict[str, Any]:
        """Return the episode's results by name, for the settings of the report."""
        episode = self.episode
        return {
            "failed": len(self.failed), "errors": sorted({call.error[:200] for call in self.failed})[:5],
            "calls": len(self.calls), "resumed": self.resumed, "longest gap s": round(self.longest_gap_s, 3),
            "longest gaps": [f"{s:.3f} s from {at:.2f} s on, {who}" for s, at, who in self.gaps],
            "prefills": self.prefills,
            "detected s": round(episode.detected_s, 3), "prefill p99 s": round(self.prefill_s, 3),
            "ratio": round(self.ratio, 2), "seconds": round(episode.over - episode.struck, 1), "whole": episode.whole,
            "capacity back s": episode.capacity_s and round(episode.capacity_s, 2),
            "engines started s": episode.engines_s and round(episode.engines_s, 2), **episode.notes,
        }  # fmt: skip


def evaluate(load: Load, episode: Episode) -> EpisodeResults:
    """Return the results of an episode, once all calls of the episode have ended."""
    hit = [call for call in load.calls if call.sent < episode.over and call.ended >= episode.struck]
    gaps = [
        (s, at - s - episode.struck, call.id)
        for call in hit
        for at, s in call.gaps
        if at >= episode.struck and at - s < episode.over
    ]
    gaps.sort(reverse=True)
    prefill_s, prefills = load.prefill_s(episode.struck)
    return EpisodeResults(
        episode,
        hit,
        [call for call in hit if call.error and episode.struck <= call.ended < episode.over],
        sum(bool(call.resumed) for call in hit),
        gaps[:LONGEST_GAPS],
        prefill_s,
        prefills,
    )


class Play:
    """Runs events one after another on a cluster under load."""

    def __init__(self, cluster: Cluster, load: Load, operator_key: str) -> None:
        self._cluster = cluster
        self._load = load
        self._operator = operator_key
        self.episodes: list[Episode] = []

    async def play(self, name: str) -> Episode:
        """Play the event with this name. Raises NotWhole if the cluster is not complete or the load not steady in time.
        Raises RuntimeError if the event itself cannot be played."""
        if not await self._cluster.until_whole(WHOLE_S):
            raise NotWhole("the cluster was not whole before this event")
        if not await self._load.until_steady(WHOLE_S):
            raise NotWhole(f"not all streams were running before this event: {self._load.live[-3:]}")
        await asyncio.sleep(QUIET_S)
        episode = Episode(name, time.time())
        self.episodes.append(episode)
        try:
            await EVENTS[name](self, episode)
            episode.whole = await self._cluster.until_whole(WHOLE_S) and episode.whole
            await asyncio.sleep(AFTER_S)
        finally:
            self._load.read()
            episode.over = time.time()
        return episode

    async def calm(self, episode: Episode) -> None:
        """Wait without changing anything. This event is the baseline for the other events."""
        await asyncio.sleep(AWAY_S)

    async def gateway(self, episode: Episode) -> None:
        """Kill the process of the gateway with the most callers."""
        pod = max(self._cluster.gateways, key=connections)
        episode.struck = pod.kill()
        await self._until_restarted(pod, episode)
        self._record_ended_connections(episode)

    async def node(self, episode: Episode) -> None:
        """Kill a Ray node with all its processes, and start the node again as KubeRay does."""
        pod = self._cluster.nodes[1]
        episode.struck = pod.kill()
        await self._until_links_lost(episode)
        await self._record_capacity(episode)

    async def head(self, episode: Episode) -> None:
        """Kill the head of Ray, and start the head again after a while."""
        await self._restart_later(self._cluster.head, episode)
        await self._until_ray_serves(episode)

    async def valkey(self, episode: Episode) -> None:
        """Kill Valkey, start it again after a while, and wait until Ray serves. Valkey stores the shared limits and the
        state that Ray needs for its fault tolerance."""
        await self._restart_later(self._cluster.pod("valkey-0"), episode)
        await self._until_ray_serves(episode)

    async def postgresql(self, episode: Episode) -> None:
        """Kill the ledger's database, and start the database again after a while."""
        await self._restart_later(self._cluster.pod("postgresql-0"), episode)

    async def cut(self, episode: Episode) -> None:
        """Cut off a host with a gateway and a Ray node from the other hosts, and connect it again."""
        episode.struck = time.time()
        self._cluster.fabric.cut(B)
        await self._until_links_lost(episode)
        await asyncio.sleep(max(AWAY_S - (time.time() - episode.struck), 0.0))
        self._cluster.fabric.heal(B)
        self._record_ended_connections(episode)
        episode.notes["healed after s"] = round(time.time() - episode.struck, 1)

    async def roll_gateways(self, episode: Episode) -> None:
        """Replace every gateway, one after the other, as a StatefulSet does."""
        for pod in reversed(self._cluster.gateways):
            await self._cluster.kubelet.end(pod)
            await self._cluster.kubelet.started(pod, WHOLE_S)
            await asyncio.sleep(MIN_READY_S)

    async def roll_workers(self, episode: Episode) -> None:
        """Drain and end every worker, one after the other. Ray Serve restarts each worker."""
        rows = json.loads(await self._admin("workers", "--json"))
        ids = sorted(row["worker_id"] for row in rows)
        for worker_id in ids:
            place = engines(self._cluster.nodes, {worker_id}).get(worker_id)
            if place is None:
                raise RuntimeError(f"no node's logs mention the worker {worker_id}")
            await self._admin("drain", worker_id, "--timeout-s", str(DRAIN_S))
            ended = time.time()
            await self._cluster.exec(place.pod, "kill", "-KILL", str(place.pid))
            await self._cluster.until_whole(WHOLE_S, beside={worker_id})
            episode.notes[f"{worker_id} replaced after s"] = round(time.time() - ended, 1)

    async def move(self, episode: Episode) -> None:
        """Start a second Ray cluster, move the model to the second cluster by a change of its catalog entry, and remove
        the first Ray cluster. This is the way to upgrade Ray, Python, CUDA or vLLM.

        The effects of the event are measured from the change of the entry.
        """
        cluster, timeline = self._cluster, self._cluster.timeline
        began = time.time()
        await cluster.upgrade(rays=[BLUE, GREEN])
        await self._nodes_of(GREEN)
        episode.notes["other Ray up after s"] = round(time.time() - began, 1)
        await asyncio.sleep(QUIET_S)
        before = {worker for pod in cluster.gateways for worker in timeline.up(pod.spec.name)}
        episode.struck = time.time()
        await cluster.upgrade(models=[{**entry, "ray": GREEN} for entry in cluster.models])
        if not await cluster.until_whole(WHOLE_S, beside=before):
            raise NotWhole("the model did not come up on the other Ray cluster")
        episode.notes["up on the other after s"] = round(time.time() - episode.struck, 1)
        deadline = time.monotonic() + WHOLE_S
        while any(before & timeline.up(pod.spec.name) for pod in cluster.gateways):
            if time.monotonic() > deadline:
                raise NotWhole("the model's workers on the first Ray cluster did not leave")
            await asyncio.sleep(0.05)
        episode.moved = time.time()
        episode.notes["gone from the first after s"] = round(episode.moved - episode.struck, 1)
        await cluster.upgrade(rays=[GREEN])

    async def _nodes_of(self, ray: str) -> None:
        deadline = time.monotonic() + RAY_UP_S
        while await asyncio.to_thread(self._cluster.ray_nodes, ray) < 1 + len(self._cluster.nodes_of(ray)):
            if time.monotonic() > deadline:
                raise NotWhole(f"the Ray cluster {ray} is not up within {RAY_UP_S:g} s")
            await asyncio.sleep(0.5)

    async def _admin(self, *arguments: str) -> str:
        gateway = self._cluster.gateways[0]
        how = ["--admin", "localhost:50053", "--tls-ca", "/tls/ca.crt"]
        return await self._cluster.exec(
            gateway, "env", f"HEADRACE_API_KEY={self._operator}", "headrace", *arguments, *how, timeout_s=DRAIN_S + 60
        )

    async def _until_ray_serves(self, episode: Episode) -> None:
        """Wait until the head of Ray reports again that the model's application runs."""
        deadline = time.monotonic() + WHOLE_S
        while not await asyncio.to_thread(self._cluster.ray_runs):
            if time.monotonic() > deadline:
                episode.whole = False
                return
            await asyncio.sleep(0.5)
        episode.notes["Ray Serve runs after s"] = round(time.time() - episode.struck, 1)

    async def _restart_later(self, pod: Pod, episode: Episode) -> None:
        pod.pause_s = AWAY_S
        episode.struck = pod.kill()
        await self._until_restarted(pod, episode)

    async def _until_restarted(self, pod: Pod, episode: Episode) -> None:
        count = len(pod.starts)
        deadline = time.monotonic() + WHOLE_S
        while not (len(pod.starts) > count and pod.ready):
            if time.monotonic() > deadline:
                episode.whole = False
                return
            await asyncio.sleep(0.05)
        episode.notes["back after s"] = round(time.time() - episode.struck, 1)

    def _record_ended_connections(self, episode: Episode) -> None:
        """Record when connections of callers ended after the network cut. If a connection ended before the network was
        connected again, its end counts as detection of the cut."""
        self._load.read()
        broke = [at - episode.struck for at in self._load.broke if 0.0 <= at - episode.struck < AWAY_S]
        episode.notes["connections ended after s"] = [round(s, 3) for s in sorted(broke)]
        episode.detected_s = max([episode.detected_s, *broke])

    async def _until_links_lost(self, episode: Episode) -> None:
        """Wait until every gateway has lost a link. The detection time of the episode ends with the last of these
        losses."""
        timeline, gateways = self._cluster.timeline, {pod.spec.name for pod in self._cluster.gateways}
        deadline = time.monotonic() + DETECTED_S
        while time.monotonic() < deadline:
            downs = timeline.since(episode.struck, "worker.disconnected")
            if {event.gateway for event in downs} >= gateways:
                await asyncio.sleep(0.5)  # the loss of the last worker may follow
                break
            await asyncio.sleep(0.05)
        downs = timeline.since(episode.struck, "worker.disconnected")
        episode.detected_s = max((event.at for event in downs), default=episode.struck) - episode.struck
        episode.notes["links lost"] = sorted({event.worker for event in downs})
        episode.notes["reasons"] = sorted({event.reason for event in downs})

    async def _record_capacity(self, episode: Episode) -> None:
        if not await self._cluster.until_whole(WHOLE_S):
            episode.whole = False
            return
        ups = self._cluster.timeline.since(episode.struck, "worker.connected")
        episode.capacity_s = max(event.at for event in ups) - episode.struck
        started = engines(self._cluster.nodes, {event.worker for event in ups})
        if started:
            episode.engines_s = max(start.at for start in started.values()) - episode.struck
        episode.notes["started after s"] = {
            name: round(start.at - episode.struck, 2) for name, start in started.items()
        }


def connections(gateway: Pod) -> int:
    """Return the number of open client connections of a gateway."""
    if gateway.first is None:
        return 0
    tables = [Path(f"/proc/{gateway.first.pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return sum(words[1].endswith(f":{GRPC_PORT:04X}") and words[3] == _ESTABLISHED for words in rows)


@dataclass(frozen=True, slots=True)
class Started:
    """Start of a worker's engine. `at`: time in the worker's own log; `pod`: the pod of the worker."""

    at: float
    pod: Pod
    pid: int
    """Id of the worker's process in the pod."""


def engines(nodes: Sequence[Pod], workers: set[str]) -> Mapping[str, Started]:
    """Return the engine starts of these workers, from the output that Ray keeps on each node."""
    starts: dict[str, Started] = {}
    for pod in nodes:
        for path in (pod.home.parent.parent / "volumes" / pod.spec.name / "tmp").glob(
            "ray/session_2*/logs/worker-*.out"
        ):
            for worker, at in worker_starts(path.read_bytes()):
                if worker in workers:
                    starts[worker] = Started(at, pod, int(path.stem.rsplit("-", 1)[1]))
    return starts


def worker_starts(output: bytes) -> list[tuple[str, float]]:
    """Return (worker, time) of every worker start in the output of a replica."""
    lines = (json.loads(line) for line in output.splitlines() if line.startswith(b"{") and b'"worker.ready"' in line)
    return [(line["worker"], datetime.fromisoformat(line["timestamp"]).timestamp()) for line in lines]


EVENTS: Mapping[str, Callable[[Play, Episode], Awaitable[None]]] = {
    "calm": Play.calm,
    "cut": Play.cut,
    "node": Play.node,  # before the events that leave workers unevenly spread
    "gateway": Play.gateway,
    "head": Play.head,
    "valkey": Play.valkey,
    "postgresql": Play.postgresql,
    "roll-gateways": Play.roll_gateways,
    "roll-workers": Play.roll_workers,
    "move": Play.move,
}
