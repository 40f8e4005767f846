"""An engine replica: it opens the model, starts the engine, and serves it over the links.

This module does not use Ray; cluster/ray/replica_actor.py does.

A replica ends in one of four ways:
- `stop` is called: the replica drains and closes.
- The node of the replica is about to end: the replica drains within the time left, then Ray Serve replaces it.
- The settings of the replica cannot work: `start` raises ModelRefused, and the start is not retried.
- The engine dies or fails the golden check (worker/engine/golden_check.py): the replica closes its links and ends its
  own process at once, so that the gateways and Ray see the end within milliseconds. Ray and the engine's watchdog then
  end the engine's remaining processes, and Ray Serve starts a new replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from cluster.api.demand import EngineCounts
from cluster.api.ports import AdapterEngine, Engine, EngineCorrupt, EngineDead, KvEventSource
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.observe.log import flush
from cluster.policy.catalog.placement import why_split
from cluster.policy.routing.gateway_subset import GatewaySubset
from cluster.process import memory
from cluster.process.core_dumps import disable_core_dumps
from cluster.process.descriptors import raise_descriptor_limit
from cluster.process.interpreter import shorten_switch_interval
from cluster.wire.bundle import Bundle
from cluster.worker.adapters.port import AdapterFiles
from cluster.worker.engine.golden_check import CheckedEngine
from cluster.worker.engine.vllm import repairs
from cluster.worker.parsing.model_parser import with_parsers
from cluster.worker.parsing.output_parser import OutputParser
from cluster.worker.rendering.prompt_renderer import PromptRenderer
from cluster.worker.session import WorkerSession
from cluster.worker.settings import ModelRefused, ReplicaSettings
from cluster.worker.starting import StartingReports
from cluster.worker.weights.fetch_progress import FetchProgress

log = structlog.get_logger("replica")

CHECK_S = 0.25
"""Seconds between two checks whether the engine is dead. The checks find a death that no step reports."""
_CLOSE_LINKS_S = 0.2
_EXIT_ENGINE_DEAD = 70


@dataclass(frozen=True, slots=True)
class ReplicaPlacement:
    """Placement of the replica by Ray: the replica's node, and the node of each GPU bundle in order.

    `gpus`: number of real GPUs among the bundles. `pod`, `host`: names of the Kubernetes pod and of its node; outside
    Kubernetes `pod` is "" and `host` is the host's name.
    """

    replica_id: str
    node: str
    gpu_nodes: tuple[str, ...] = ()
    gpus: int = 0
    pod: str = ""
    host: str = ""


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model on this node's disk, and the engine that runs it."""

    engine: Engine
    bundle: Bundle
    weight_digest: str
    parser: OutputParser | None = None
    """Parser of the model's outputs; None if the model has no parsers."""
    renderer: PromptRenderer | None = None
    """Renderer of the model's chats; None if gateways render them."""
    kv_events: KvEventSource | None = None
    """Events of the engine's prefix cache; None if the engine has none."""
    adapter_engine: AdapterEngine | None = None
    adapter_files: AdapterFiles | None = None
    """The store of adapters on this node; None if adapters are not enabled."""
    engine_counts: Callable[[], EngineCounts] = EngineCounts
    """Function that returns the engine's own counts of preemptions and of the prefix cache."""


class ModelOpener(Protocol):
    """Function that opens a model: it fetches the model to this node and creates the engine.

    Raises ValueError for an invalid source, OSError if the source cannot be reached.
    """

    def __call__(self, settings: ReplicaSettings) -> OpenedModel: ...


def end_process(code: int) -> None:
    """Write the log, then end this process.

    Threads and exit handlers are not waited for, since a dead engine could block them.
    """
    flush(1.0)
    os._exit(code)


@dataclass(eq=False, slots=True)
class Replica:
    """A replica. Call `start` once, then `check` regularly until `stop`.

    The replica connects to the gateways once its engine has started.
    """

    settings: ReplicaSettings
    place: ReplicaPlacement
    opener: ModelOpener
    on_engine_death: Callable[[int], None] = end_process
    fetching: FetchProgress = field(default_factory=FetchProgress)
    """Progress of fetching the weights, as reported by `opener`."""
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    engine: Engine | None = None
    info: EngineInfo | None = None
    end: WorkerSession | None = None
    _serving: asyncio.Task[None] | None = None
    _drain_deadline: float = math.inf
    _drained: bool = False

    def __repr__(self) -> str:
        return f"Replica({self.worker_id}, {self.info.engine_class if self.info else 'not started'})"

    @property
    def worker_id(self) -> str:
        """The worker's id, which does not change during the life of the replica."""
        return f"{self.settings.spec.name}-{self.place.replica_id}"

    async def start(self) -> None:
        """Open the model, start the engine, and serve it.

        Raises ModelRefused if a retry would fail in the same way, and any other exception if a retry may succeed.
        """
        spec = self.settings.spec
        if reason := why_split(spec, self.place.gpu_nodes, self.place.node):
            raise ModelRefused(f"models[{spec.name}]: {reason}")
        disable_core_dumps()
        raise_descriptor_limit()
        shorten_switch_interval()
        began = time.time()
        gpu = spec.gpu if self.place.gpus else ""
        reports = StartingReports(
            self.worker_id, self.place.pod, self.place.host or self.place.node, gpu, self.settings, self.fetching
        )
        reporting = asyncio.create_task(reports.run())
        try:
            opened = await asyncio.to_thread(self.opener, self.settings)
            if spec.digest not in ("", opened.weight_digest):
                raise ValueError(
                    f"models[{spec.name}].digest: the weights on this node have {opened.weight_digest}, "
                    f"the entry requires {spec.digest}: replace the files, or set digest to what they have"
                )
            opened_at = time.time()
            self.engine = engine = CheckedEngine(opened.engine, node=self.place.node)
            info = await engine.start()
            if info.pooling is not None:
                opened = replace(opened, parser=None, renderer=None)
            self.info = with_parsers(info, opened.parser, opened.renderer)
        except ValueError as error:
            await self.stop()
            raise ModelRefused(str(error)) from error
        except EngineCorrupt as error:
            log.error("worker.engine_corrupt", reason=str(error))
            await self.stop()
            raise
        except BaseException:  # a cancelled start must not leave an engine behind either
            await self.stop()
            raise
        finally:
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
        log.info(
            "worker.engine_started",
            began=round(began, 3),
            opened_s=round(opened_at - began, 3),
            engine_s=round(time.time() - opened_at, 3),
        )
        if engine.downgrade_reason:
            log.warning("worker.resume_downgraded", reason=engine.downgrade_reason)
        for name, reason in repairs.not_applied.items():
            log.warning("worker.repair_not_applied", repair=name, reason=reason)
        self._serve(opened, engine, self.info)

    def _serve(self, opened: OpenedModel, engine: Engine, info: EngineInfo) -> None:
        identity = WorkerIdentity(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            model=self.settings.spec.name,
            version=self.settings.spec.version,
            weight_digest=opened.weight_digest,
            bundle_digest=opened.bundle.digest,
            ray_cluster=self.settings.ray_cluster,
            node=self.place.node,
            generation=self.settings.digest,
            pod=self.place.pod,
            host=self.place.host,
            gpu=self.settings.spec.gpu if self.place.gpus else "",
        )
        self.end = WorkerSession(
            identity=identity,
            engine=engine,
            info=info,
            bundle=opened.bundle,
            gateways=self.settings.gateways,
            tls=self.settings.tls,
            gpus=self.place.gpus,
            gpu=identity.gpu,
            parser=opened.parser,
            kv_events=opened.kv_events,
            renderer=opened.renderer,
            adapter_engine=opened.adapter_engine,
            adapter_files=opened.adapter_files,
            engine_counts=opened.engine_counts,
            subset=GatewaySubset(self.worker_id, self.settings.max_gateways, self.settings.spec.min_replicas),
        )
        self._serving = asyncio.create_task(self._serve_until_dead(self.end, engine))
        memory.freeze_objects()
        log.info(
            "worker.ready",
            engine=info.engine_class,
            path=info.engine_path,
            capabilities=" ".join(info.capabilities),
        )

    async def _serve_until_dead(self, end: WorkerSession, engine: Engine) -> None:
        parts = [asyncio.create_task(end.run()), asyncio.create_task(_check_engine(engine))]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            failure = _first_failure(parts)
            if failure is not None:
                log.error(
                    "worker.engine_corrupt" if isinstance(failure, EngineCorrupt) else "worker.engine_dead",
                    reason=str(failure),
                )
                await end.close(str(failure))
                await asyncio.wait(parts[:1], timeout=_CLOSE_LINKS_S)
        finally:
            for part in parts:
                part.cancel()
        if failure is None:
            return
        await asyncio.wait(parts, timeout=_CLOSE_LINKS_S)
        self.on_engine_death(_EXIT_ENGINE_DEAD)
        raise failure

    async def check(self) -> None:
        """Raise EngineDead if this replica has not started, has ended or has drained, or if its engine is dead."""
        if self.engine is None or self._serving is None:
            raise EngineDead("the replica has not started")
        if self._serving.done():
            failure = None if self._serving.cancelled() else self._serving.exception()
            raise EngineDead(f"the worker has ended: {failure or 'it was closed'}")
        if self._drained:
            raise EngineDead("the worker has drained, since its node is about to end")
        await self.engine.check()

    async def leave(self, timeout_s: float) -> None:
        """Drain within `timeout_s` seconds because the node is about to end.

        `check` then raises EngineDead, so that Ray Serve starts another replica on another node.
        """
        self._drain_deadline = min(self._drain_deadline, time.monotonic() + timeout_s)
        if self.end is not None:
            log.info("worker.drain_began", within_s=round(timeout_s, 1))
            drained = await self.end.drain(timeout_s)
            log.info("worker.drain_ended", drained=drained)
        self._drained = True

    async def stop(self, within_s: float = math.inf) -> None:
        """Drain, close the links and end the engine. Idempotent.

        The drain takes at most the shortest of these times: `within_s`, the settings' drain time, and what is left of
        the time that was given to `leave`.
        """
        end, self.end = self.end, None
        serving, self._serving = self._serving, None
        engine, self.engine = self.engine, None
        if end is not None and serving is not None and not serving.done():
            left_s = max(self._drain_deadline - time.monotonic(), 0.0)
            await end.drain(min(self.settings.drain_timeout_s, left_s, within_s))
            await end.close()
            with contextlib.suppress(Exception):
                await serving
        if engine is not None:
            await engine.close()


async def _check_engine(engine: Engine) -> None:
    while True:
        await engine.check()
        await asyncio.sleep(CHECK_S)


def _first_failure(parts: Sequence[asyncio.Task[None]]) -> BaseException | None:
    return next((e for p in parts if p.done() and not p.cancelled() and (e := p.exception())), None)
