"""Functions that start the callers of the scenario `hosts`, read their results while they run, and evaluate the results
at the end."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtests.faults.recovery import percentile
from loadtests.hosts.cluster import MASS, STEP_MS, Cluster, D
from loadtests.hosts.inside.callers import Plan
from loadtests.hosts.pods import Pod, harness_pod
from loadtests.hosts.rendered import NAMESPACE, RELEASE, Mount

SHORTEST_S, LONGEST_S = 5.0, 120.0
"""Durations of the shortest and of the longest stream at speed 1, in seconds."""
CLIENTS = 8
END_S = 60.0
UNENDED = "it has not come to an end"
"""Error of a call that still waits when all other calls have long ended. The caller of such a call
got no error at all.
"""
BEFORE_S = 20.0


def tokens_of(speed: float) -> tuple[int, int]:
    """Return the numbers of tokens of the shortest and of the longest stream of the simulated workers. A higher `speed`
    gives streams that are shorter by this factor."""
    low, high = (max(round(s / speed * 1000 / STEP_MS), 4) for s in (SHORTEST_S, LONGEST_S))
    return low, high


@dataclass(frozen=True, slots=True)
class Call:
    """Record of one stream that has ended. Times are wall-clock times."""

    id: str
    asked: int
    sent: float
    first: float
    """Time of the first piece; 0 if no piece arrived."""
    ended: float
    gaps: Sequence[tuple[float, float]]
    """(end, length) of each silence that is long enough to be recorded."""
    error: str
    text: str
    completion: int = 0
    resumed: int = 0


@dataclass(eq=False, slots=True)
class Load:
    """Streams that run on the cluster, and the records of ended calls."""

    cluster: Cluster
    pod: Pod
    out: Path
    plan: Plan
    live: list[tuple[float, int, int]] = field(default_factory=list)
    """Samples of (time, number of running streams, number of chunks since the previous sample)."""
    calls: list[Call] = field(default_factory=list)
    broke: list[float] = field(default_factory=list)
    """Wall-clock times at which a client's connection ended."""
    _read: int = 0
    _open: dict[str, Call] = field(default_factory=dict)
    """Calls that have begun and not ended, by id."""

    def read(self) -> None:
        """Read the new output of the callers."""
        if not self.out.exists():
            return
        with self.out.open("rb") as lines:
            lines.seek(self._read)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._handle_record(json.loads(line))

    def _handle_record(self, event: Mapping[str, Any]) -> None:
        if event["t"] == "live":
            self.live.append((event["at"], event["running"], event["chunks"]))
        elif event["t"] == "broke":
            self.broke.append(event["at"])
        elif event["t"] == "begun":
            self._open[event["id"]] = Call(event["id"], event["asked"], event["sent"], 0.0, math.inf, (), UNENDED, "")
        else:
            self._open.pop(event["id"], None)
            self.calls.append(
                Call(
                    event["id"], event["asked"], event["sent"], event["first"], event["ended"],
                    [(at, s) for at, s in event["gaps"]], event["error"], event["text"],
                    event.get("completion", 0), event.get("resumed", 0),
                )
            )  # fmt: skip

    async def until_steady(self, timeout_s: float) -> bool:
        """Wait until the planned number of streams run; return whether that happened in time. Raises RuntimeError if no
        call is answered.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.read()
            if len(self.calls) >= self.plan.streams and all(call.error for call in self.calls):
                raise RuntimeError(f"no call was answered: {self.calls[-1].error}")
            if self.live and self.live[-1][1] >= 0.95 * self.plan.streams and self.live[-1][2]:
                return True
            await asyncio.sleep(0.2)
        return False

    async def end(self) -> None:
        """Start no new streams, wait until the running streams have ended, and read all output."""
        self.pod.leaving = True
        self.pod.signal(signal.SIGTERM)
        longest_s = self.plan.tokens[1] * STEP_MS / 1000
        deadline = time.monotonic() + 1.5 * longest_s + END_S
        while self.pod.alive and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's end is no event
            await asyncio.sleep(0.1)
        await self.cluster.kubelet.kill_for_good(self.pod)
        self.read()
        self.calls += self._open.values()

    def prefill_s(self, before: float) -> tuple[float, int]:
        """Return the p99 of the time to the first text, and the number of streams. The time is in seconds, for the
        streams that began shortly before the time `before`."""
        fresh = [
            call.first - call.sent for call in self.calls if call.first and before - BEFORE_S <= call.sent < before
        ]
        fresh = [wait_s for wait_s in fresh if wait_s < BEFORE_S]
        return percentile(fresh, 99), len(fresh)


async def begin(
    cluster: Cluster, *, streams: int, tokens: tuple[int, int], seed: int, ramp_s: float, model: str = MASS
) -> Load:
    """Start callers that keep `streams` streams running. `tokens`: fewest and most tokens of a stream."""
    folder = cluster.home / f"callers-{seed}"
    folder.mkdir()
    ca = cluster.release.files("Secret", f"{RELEASE}-tls")["ca.crt"]
    (folder / "ca.crt").write_text(ca)
    plan = Plan(
        out="/run-of-callers/out.jsonl",
        endpoint=f"{RELEASE}.{NAMESPACE}.svc:50051",
        ca_file="/run-of-callers/ca.crt",
        api_key=cluster.key,
        model=model,
        streams=streams,
        clients=min(CLIENTS, streams),
        tokens=tokens,
        seed=seed,
        ramp_s=ramp_s,
    )
    (folder / "plan.json").write_text(json.dumps(asdict(plan)))
    spec = harness_pod(
        f"callers-{seed}", "callers", "-m", "loadtests.hosts.inside.callers", "/run-of-callers/plan.json",
        mounts=[Mount("/run-of-callers", folder)],
    )  # fmt: skip
    pod = cluster.kubelet.add(spec, cluster.fabric.place(f"callers{seed}", D))
    cluster.kubelet.start(pod)
    return Load(cluster, pod, folder / "out.jsonl", plan)


__all__ = ["Call", "Load", "begin", "tokens_of"]
