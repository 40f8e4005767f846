"""`python -m loadtests.autoscale_live.leaving [--rounds 3] [--json FILE]`: which replica leaves on a scale-down.

Two ways on one Ray, with simulated engines and a real gateway under a steady load of streams: one application of four
replicas, of which Ray Serve chooses the two that leave, and four applications of one replica, of which those two leave
that have the fewest streams. Told for each: streams that ran there, those that moved because the time to drain was
over, the longest pause that a caller of one saw, and the time until Ray has the places back; and what it takes to come
back to four.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from cluster.api.types import ModelSpec
from cluster.rayserve.backend import ChildBackend
from cluster.rayserve.local import LocalRay, LocalRaySettings
from cluster.rayserve.settings import ReplicaSettings
from loadtests import machine
from tests.support.calls import chat
from tests.support.checkpoints import build_checkpoint
from tests.support.cluster import TestCluster, running_cluster, until

T = TypeVar("T")
REPLICAS, LEFT = 4, 2
CALLERS = 24
DECODE_MS = 20.0
TOKENS = (50, 150, 300, 600)
DRAIN_S = 4.0
SETTLE_S = 6.0
WAIT_S = 120.0


@dataclass(slots=True)
class Stream:
    """One call as its caller saw it."""

    began_at: float
    ended_at: float = 0.0
    longest_gap_s: float = 0.0
    resumed: int = 0
    fault: str = ""


@dataclass
class Load:
    """Callers that begin a stream as soon as their last has ended."""

    cluster: TestCluster
    streams: list[Stream] = field(default_factory=list)

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.gather(*(self._caller(number) for number in range(CALLERS)))

    async def _caller(self, number: int) -> None:
        turn = number
        while True:
            turn += 1
            tokens = TOKENS[(number + turn) % len(TOKENS)]
            stream, came = Stream(time.monotonic()), 0
            self.streams.append(stream)
            last_at = 0.0
            try:
                async for chunk in self.cluster.stub.StreamChat(chat(max_tokens=tokens, ignore_eos=True)):
                    now = time.monotonic()
                    stream.longest_gap_s = max(stream.longest_gap_s, now - last_at if last_at else 0.0)
                    last_at = now
                    came = chunk.usage.completion_tokens or came
                    stream.resumed = chunk.usage.resumed or stream.resumed
                stream.fault = "" if came == tokens else f"cut: {came} of {tokens} tokens"
            except grpc.aio.AioRpcError as error:
                stream.fault = str(error.details())
            stream.ended_at = time.monotonic()


class Way(Protocol):
    """How replicas are made and ended."""

    async def grow(self) -> None:
        """Ask for all."""

    async def shrink(self, running: dict[str, int]) -> None:
        """End all but LEFT; `running`: streams by worker."""

    async def held(self) -> int:
        """Replicas that Ray has places for."""


@dataclass
class ByServe:
    """One application."""

    backend: ChildBackend
    settings: ReplicaSettings

    async def grow(self) -> None:
        """See Way."""
        there = (await self.backend.observe()).apps
        if self.settings.app in there:
            await self.backend.scale(self.settings.app, REPLICAS)
        else:
            await self.backend.deploy(dataclasses.replace(self.settings, replicas=REPLICAS))

    async def shrink(self, running: dict[str, int]) -> None:
        """See Way."""
        await self.backend.scale(self.settings.app, LEFT)

    async def held(self) -> int:
        """See Way."""
        return sum(one.running + one.placed + one.leaving for one in (await self.backend.observe()).apps.values())


@dataclass
class ByController:
    """An application a replica, each under a name of its own."""

    backends: Sequence[ChildBackend]
    settings: ReplicaSettings
    workers: Callable[[], dict[str, int]]
    _of: dict[str, ChildBackend] = field(default_factory=dict)

    async def grow(self) -> None:
        """See Way."""
        for backend in self.backends:
            seen = await _comes(backend.observe, lambda seen: not any(one.deleting for one in seen.apps.values()))
            if not seen.apps:
                before = set(self.workers())
                await backend.deploy(dataclasses.replace(self.settings, replicas=1))
                await until(lambda before=before: bool(set(self.workers()) - before), "it is linked", WAIT_S)  # type: ignore[misc]
                (name,) = set(self.workers()) - before
                self._of[name] = backend

    async def shrink(self, running: dict[str, int]) -> None:
        """See Way."""
        for name in sorted(running, key=lambda one: running[one])[: REPLICAS - LEFT]:
            await self._of.pop(name).delete(self.settings.app)

    async def held(self) -> int:
        """See Way."""
        apps = [app for one in self.backends for app in (await one.observe()).apps.values()]
        return sum(one.running + one.placed + one.leaving for one in apps)


async def _comes(look: Callable[[], Awaitable[T]], holds: Callable[[T], bool]) -> T:
    """What is seen as soon as it is so."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if holds(seen := await look()):
            return seen
        await asyncio.sleep(0.1)
    raise TimeoutError("Ray does not come to rest")


async def _round(way: Way, load: Load, workers: Callable[[], dict[str, int]]) -> dict[str, Any]:
    began_at = time.monotonic()
    await way.grow()
    await until(lambda: len(workers()) == REPLICAS, "all are linked", WAIT_S)
    grown_s = time.monotonic() - began_at
    await asyncio.sleep(SETTLE_S)  # let the callers spread over all of them
    before = workers()
    at = time.monotonic()
    await way.shrink(before)
    await _comes(way.held, lambda held: held <= LEFT)
    free_s = time.monotonic() - at
    await until(lambda: len(workers()) == LEFT, "the others have gone", WAIT_S)
    left = workers()
    ran = [one for one in load.streams if one.began_at < at and not 0 < one.ended_at < at]
    await until(lambda: all(one.ended_at for one in ran), "what ran has ended", WAIT_S)
    moved = [one for one in ran if one.resumed]
    stayed = [one for one in ran if not one.resumed]
    return {
        "all_linked_s": grown_s,
        "streams": sum(before.values()),
        "by_worker": sorted(before.values()),
        "on_those_that_left": sum(count for name, count in before.items() if name not in left),
        "moved": len(moved),
        "gap_moved_s": sorted(round(one.longest_gap_s, 3) for one in moved),
        "gap_others_s": max((one.longest_gap_s for one in stayed), default=0.0),
        "places_back_s": free_s,
        "faults": [one.fault for one in load.streams if one.fault],
    }


def _workers_of(cluster: TestCluster) -> Callable[[], dict[str, int]]:
    """Streams by worker that is linked."""
    return lambda: {one.identity.worker_id: one.running for one in cluster.gateway.hub.links}


async def _rounds(
    way: Way, cluster: TestCluster, workers: Callable[[], dict[str, int]], rounds: int
) -> list[dict[str, Any]]:
    load, found = Load(cluster), []
    await way.grow()
    await until(lambda: len(workers()) == REPLICAS, "all are linked", WAIT_S)
    await until(lambda: all(one.free.sequences for one in cluster.gateway.hub.links), "all have room", WAIT_S)
    calling = asyncio.create_task(load.run())
    try:
        for _ in range(rounds):
            found.append(await _round(way, load, workers))
            print(type(way).__name__, json.dumps(found[-1]), flush=True)
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    return found


async def run(rounds: int, folder: Path) -> dict[str, Any]:
    """Both ways, one after the other."""
    checkpoint = build_checkpoint("llama", folder / "llama")
    ray = LocalRay(LocalRaySettings(f"leave-{uuid.uuid4().hex[:8]}", Path(tempfile.mkdtemp(prefix="hr-"))))
    found: dict[str, Any] = {"machine": machine.hardware()}
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, ray.log_file.parent, ignore_errors=True)
        stack.callback(ray.stop)
        await asyncio.to_thread(ray.start)
        spec = ModelSpec("sim", f"sim://{checkpoint}?decode_ms={DECODE_MS:g}", max_replicas=REPLICAS)

        def driver(name: str) -> ChildBackend:
            made = ChildBackend(name, ray.address, ray.environment(), ray.log_file.parent / "driver.log")
            stack.push_async_callback(made.close)
            return made

        for number, name in enumerate(("serve_chooses", "controller_chooses")):
            async with running_cluster(folder / name) as cluster:
                links = (cluster.gateway.endpoints["link"],)
                settings = ReplicaSettings(spec, "leave", gateways=links, drain_timeout_s=DRAIN_S)
                drivers = [driver(f"{name}{n}") for n in range(REPLICAS if number else 1)]
                workers = _workers_of(cluster)
                way: Way = ByController(drivers, settings, workers) if number else ByServe(drivers[0], settings)
                found[name] = await _rounds(way, cluster, workers, rounds)
                for backend in drivers:
                    for app in (await backend.observe()).apps:
                        await backend.delete(app)
                await _comes(way.held, lambda held: not held)
    return found


def main() -> int:
    """Run and tell."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.autoscale_live.leaving")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(given.rounds, Path(folder)))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))
    for name in ("serve_chooses", "controller_chooses"):
        rounds = found[name]
        gaps = [gap for one in rounds for gap in one["gap_moved_s"]]
        print(
            f"{name}: {sum(one['moved'] for one in rounds)} of {sum(one['on_those_that_left'] for one in rounds)} "
            f"streams moved, median pause {statistics.median(gaps) if gaps else 0:.3f} s, longest "
            f"{max(gaps, default=0):.3f} s; places back after "
            f"{statistics.median(one['places_back_s'] for one in rounds):.1f} s"
        )
    return int(any(one["faults"] for name in ("serve_chooses", "controller_chooses") for one in found[name]))


if __name__ == "__main__":
    sys.exit(main())
