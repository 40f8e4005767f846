"""Measurement of the time until a new adapter can be used on all replicas, with four simulated replicas.

It runs as the part `loading`. Clients call the base model and a loaded adapter all the time. The time until every
connected replica accepts calls for all adapters is measured three times: after a second adapter is declared, after a
restarted replica connects, and after an added replica connects. A simulated engine takes 50 ms to load an adapter.
The part `real_loading` does the same with two vLLM replicas.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cluster.admin.v1 import adapters_pb2, admin_pb2_grpc
from cluster.api.adapters import AdapterSpec, full_name
from cluster.api.types import CatalogEntry
from cluster.controller.links import ControllerLinks
from cluster.ledger.files import read_secrets
from cluster.policy.tenants.identity import admin_token
from loadtests.adapters import rig
from loadtests.children import Child
from loadtests.faces.base import CallFailed, Request
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.figures import Bound, Figure
from loadtests.scenarios.common import Stage
from loadtests.scenarios.parts import exact
from loadtests.serving import ours as serving

LOAD_MS, TOKENS, WAIT_S = 50, 8, 60.0
BOUND, NONE = Bound("<=", 2.0), Bound("<=", 0.0)


@dataclass(frozen=True, slots=True)
class ReplicaKind:
    """The replicas with which one part of the scenario runs.

    `kind`: word for these replicas in the report's rows. `source_of`: takes the folder of the base model and
    returns the model source of the replicas. `starts_s`: longest time to wait until a replica has started, in seconds.
    """

    kind: str
    count: int
    source_of: Callable[[Path], str]
    engine: Mapping[str, object]
    environment: Mapping[str, str] = field(default_factory=dict)
    starts_s: float = WAIT_S
    callers: int = 8

    @property
    def titles(self) -> tuple[str, str, str, str]:
        """Names of the report's rows: an adapter is declared, a replica restarts, a replica is added, failed calls."""
        return (
            f"an adapter declared while {self.count} {self.kind}replicas serve: until all serve it",
            f"a {self.kind}replica restarts: until it serves all adapters",
            f"a {self.kind}replica is added: until it serves all adapters",
            f"calls to {self.kind}replicas that failed meanwhile",
        )

    @property
    def rows(self) -> Mapping[str, Bound | None]:
        """The bounds of the report's rows, by name."""
        return dict(zip(self.titles, (BOUND, BOUND, BOUND, NONE), strict=True))


SIMULATED = ReplicaKind(
    "", 4,
    lambda model: f"sim://{model}?decode_ms=2&seed=1&max_loras=4&max_cpu_loras=8&adapter_load_ms={LOAD_MS}",
    {"enable_lora": True, "max_lora_rank": 8},
)  # fmt: skip
ROWS: Mapping[str, Bound | None] = SIMULATED.rows


class Fleet:
    """A gateway with replicas. This process publishes the catalog to the gateway."""

    def __init__(self, stage: Stage, folder: Path, ours: serving.Ours, replicas: ReplicaKind, token: str) -> None:
        self._stage, self._folder, self._ours, self._replicas = stage, folder, ours, replicas
        self._metadata = serving.authorization(token)
        self._channel = grpc.aio.insecure_channel(ours.endpoints["admin"])
        self._stub = admin_pb2_grpc.CatalogStub(self._channel)
        gateways = [ours.endpoints["link"]]
        self.links = ControllerLinks(controller_id="loadtest", gateways=gateways, tls=None, bundles=lambda _: None)

    def declare(self, *names: str) -> None:
        """Publish a catalog in which the model has these adapters."""
        specs = tuple(AdapterSpec(name, str(self._folder / "adapters" / name)) for name in names)
        self.links.publish([CatalogEntry(serving.MODEL, adapters=specs)])

    def start(self, name: str) -> Child:
        """Start a replica."""
        ready = self._stage.folder / f"loading-{name}.ready"
        command = [sys.executable, "-m", "loadtests.serving.worker", "--name", serving.MODEL, "--id", name]
        command += ["--link", self._ours.endpoints["link"], "--bundle", str(self._folder / "bundle")]
        replicas, source = self._replicas, self._replicas.source_of(self._folder / "model")
        command += ["--source", source, "--ready", str(ready), "--engine", json.dumps(dict(replicas.engine))]
        return self._stage.children.start(f"loading-{name}", serving.WORKER, command, replicas.environment)

    async def serves(self, workers: int, *names: str) -> None:
        """Wait until `workers` replicas take calls for all these adapters. Raises TimeoutError."""
        async with asyncio.timeout(self._replicas.starts_s):
            while not await self._ready(workers, names):  # noqa: ASYNC110 - another process's state is no event
                await asyncio.sleep(0.02)

    async def linked(self, workers: int) -> float:
        """Wait until `workers` replicas are linked; return the monotonic time. Raises TimeoutError."""
        async with asyncio.timeout(self._replicas.starts_s):
            while {each.workers for each in await self._adapters()} != {workers}:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.02)
        return time.monotonic()

    async def _ready(self, workers: int, names: tuple[str, ...]) -> bool:
        adapters = await self._adapters()
        return {each.name for each in adapters} == set(names) and all(
            each.workers == each.ready_workers == workers for each in adapters
        )

    async def _adapters(self) -> list[adapters_pb2.Adapter]:
        answer = await self._stub.ListAdapters(adapters_pb2.ListAdaptersRequest(), metadata=self._metadata)
        return list(answer.adapters)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


async def measure(stage: Stage) -> list[Figure]:
    """Return the report's rows for this part. Raises DidNotStart, TimeoutError."""
    return await play(stage, SIMULATED)


async def play(stage: Stage, kind: ReplicaKind) -> list[Figure]:
    """Start replicas of the given kind, declare adapters, restart a replica and add one; return the report's rows.

    Raises DidNotStart, TimeoutError.
    """
    folder, name = await rig.prepare(stage, 2), f"loading-{kind.count}"
    ours = await serving.start(
        stage.children, stage.folder, bundle=folder / "bundle", source=kind.source_of(folder / "model"),
        engine=kind.engine, name=name, environment=kind.environment,
    )  # fmt: skip
    secret = read_secrets(stage.folder / f"{name}-tenants" / "cluster-secret", "cluster-secret")[0]
    fleet = Fleet(stage, folder, ours, kind, admin_token(secret))
    declared, restarted, added, failed_calls = kind.titles
    task, stop = asyncio.create_task(fleet.links.run()), asyncio.Event()
    figures: list[Figure] = []
    try:
        fleet.declare("a0")
        replicas = [fleet.start(f"w{number}") for number in range(2, kind.count + 1)]
        await fleet.serves(kind.count, "a0")
        stage.screen.say(f"{kind.count} {kind.kind}replicas serve")
        calls = [asyncio.create_task(_call(ours, number, stop)) for number in range(kind.callers)]
        begun = time.monotonic()
        fleet.declare("a0", "a1")
        await fleet.serves(kind.count, "a0", "a1")
        figures.append(exact(declared, time.monotonic() - begun, BOUND, "s"))
        for title, replica, before in ((restarted, "again", kind.count - 1), (added, "added", kind.count)):
            if title == restarted:
                await replicas[0].stop()
                await fleet.linked(before)
            fleet.start(replica)
            begun = await fleet.linked(before + 1)
            await fleet.serves(before + 1, "a0", "a1")
            figures.append(exact(title, time.monotonic() - begun, BOUND, "s"))
            stage.screen.say(f"replica {replica} serves")
        stop.set()
        counts = await asyncio.gather(*calls)
        failed, made = sum(failed for failed, _ in counts), sum(made for _, made in counts)
        figures.append(exact(failed_calls, failed, NONE, note=f"of {made}"))
    finally:
        stop.set()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await fleet.close()
    return figures


async def _call(ours: serving.Ours, number: int, stop: asyncio.Event) -> tuple[int, int]:
    """Make calls until `stop` is set; return the number of failed calls and the number of all calls."""
    face = OpenAiSse(ours.http, serving.MODEL, api_key=ours.key)
    model = full_name(serving.MODEL, "a0") if number % 2 else serving.MODEL
    failed = made = 0
    try:
        while not stop.is_set():
            made += 1
            try:
                await face.run(Request("loading", "hello", TOKENS, model=model), lambda text: None)
            except CallFailed:
                failed += 1
    finally:
        await face.close()
    return failed, made
