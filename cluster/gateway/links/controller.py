"""The gateway's end of the controller's stream. The gateway receives the catalog, and sends demand and fleet reports
and forwarded admin requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.api.pooling import pooling_tasks
from cluster.api.types import CatalogEntry, VersionTally
from cluster.gateway.links.worker_link import WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.policy.problems import Problem
from cluster.wire.admin_forwarding import ANSWER_S, NO_CONTROLLER_LINK, AdminRequests
from cluster.wire.codecs import codec
from cluster.wire.codecs.demand_codec import problems_from_pb, work_to_pb
from cluster.wire.dial import read

log = structlog.get_logger("hub")

REPORT_S = 0.5
"""Interval in seconds of the demand and fleet reports to the controller."""


class _Stream:
    """A stream that a controller has opened."""

    def __init__(self, hello: pb.ControllerHello) -> None:
        self.controller_id = hello.controller_id
        self.frames: asyncio.Queue[pb.GatewayControlFrame] = asyncio.Queue()
        """Frames to send to the controller in addition to the periodic reports."""
        self.requests = AdminRequests(self.frames.put_nowait, frozenset(hello.verbs))


class CurrentController:
    """The connected controller, and the last catalog that any controller has sent. If several controllers are
    connected, requests go to the one that connected last."""

    def __init__(
        self,
        apply_catalog: Callable[[Sequence[CatalogEntry], int], None],
        report: Callable[[], pb.GatewayControlFrame],
        keep_operator_state: Callable[[pb.OperatorState], None],
    ) -> None:
        """`report`: returns the current demand and fleet report. `apply_catalog`: called with the entries and the
        revision of each new catalog. `keep_operator_state`: called with each operator state that a controller sends."""
        self._apply_catalog = apply_catalog
        self._report = report
        self._keep_operator_state = keep_operator_state
        self._stream: _Stream | None = None
        self.heard_at: float | None = None
        """Monotonic time of a controller's last frame; None before the first catalog."""
        self.problems: Sequence[Problem] = ()
        """The faults that the controller sees; none while no controller is connected."""
        self.clock_skew_s = 0.0
        """How far the controller's clock was ahead of this host's at its last frame. A frame that waited makes it
        smaller."""
        self.gateways = 0
        """Number of gateways to which the controller has links, this gateway included; 0 until the controller reports
        the number."""

    @property
    def connected(self) -> bool:
        """Whether a controller is connected."""
        return self._stream is not None

    async def serve(self, hello: pb.ControllerHello, context: Any) -> None:
        """Serve a controller's stream, after the Welcome message, until the stream ends."""
        stream = self._stream = _Stream(hello)
        log.info("controller.connected", controller=stream.controller_id)
        writer = asyncio.create_task(self._write(stream, context))
        try:
            while (frame := await read(context)) is not None:
                if self.heard_at is not None or frame.HasField("catalog"):
                    self.heard_at = time.monotonic()
                if frame.sent_at_s:
                    self.clock_skew_s = frame.sent_at_s - time.time()
                if frame.HasField("catalog"):
                    self.gateways = frame.catalog.gateways
                    self.problems = problems_from_pb(frame.catalog.problems)
                    if frame.catalog.HasField("operator_state"):
                        self._keep_operator_state(frame.catalog.operator_state)
                    self._apply_catalog(_entries(frame.catalog), frame.catalog.revision)
                if frame.HasField("admin_reply"):
                    stream.requests.handle_reply(frame.admin_reply)
        finally:
            writer.cancel()
            stream.requests.fail_all()
            if self._stream is stream:
                self._stream = None
                self.problems = ()
                log.info("controller.disconnected", controller=stream.controller_id)

    async def _write(self, stream: _Stream, context: Any) -> None:
        while True:
            await context.write(self._report())
            due = time.monotonic() + REPORT_S
            while (rest_s := due - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(rest_s):
                        frame = await stream.frames.get()
                except TimeoutError:
                    break
                await context.write(frame)

    def report_now(self) -> None:
        """Send the demand and fleet report now, before the next periodic report is due."""
        if self._stream is not None:
            self._stream.frames.put_nowait(self._report())

    def request_bundle(self, digest: str) -> bool:
        """Request a tokenizer bundle. Returns False if no controller is connected."""
        if self._stream is None:
            return False
        self._stream.frames.put_nowait(pb.GatewayControlFrame(fetch_bundle=pb.FetchBundle(digest=digest)))
        return True

    async def ask(self, verb: str, body: bytes, actor: str, timeout_s: float = ANSWER_S) -> bytes:
        """Forward an admin request to the controller and return the answer. `verb`: name of the request. `actor`: who
        made the request, for the audit log. Raises CallError."""
        if self._stream is None:
            raise CallError(Outcome.NO_WORKER, NO_CONTROLLER_LINK, retry_after_s=2.0)
        return await self._stream.requests.ask(verb, body, actor, timeout_s)


def _entries(catalog: pb.Catalog) -> list[CatalogEntry]:
    entries = []
    for model in catalog.models:
        try:
            entries.append(codec.entry_from_pb(model))
        except ValueError as error:
            log.warning("catalog.entry_refused", model=model.name, reason=str(error))
    return entries


def tallies_to_pb(tallies: Sequence[VersionTally]) -> pb.VersionTallies:
    """Encode canary statistics."""
    return pb.VersionTallies(
        tallies=[
            pb.VersionTally(
                model=tally.model,
                version=tally.version,
                generation=tally.generation,
                calls=tally.calls,
                errors=tally.errors,
                pairs=tally.pairs,
                slower=tally.slower,
            )
            for tally in tallies
        ]
    )


def worker_to_pb(link: WorkerLink) -> pb.FleetWorker:
    """Encode the state of one worker."""
    return pb.FleetWorker(
        worker_id=link.identity.worker_id,
        incarnation=link.identity.incarnation,
        model=link.identity.model,
        ray_cluster=link.identity.ray_cluster,
        load=codec.load_to_pb(link.load),
        weight_digest=link.identity.weight_digest,
        bundle_digest=link.identity.bundle_digest,
        max_model_len=link.info.max_model_len,
        engine_class=link.info.engine_class,
        default_sampling_json=json.dumps(dict(link.info.default_sampling)),
        version=link.identity.version,
        generation=link.identity.generation,
        standing=codec.drain_state_to_pb(link.drain_state),
        work=work_to_pb(link.work),
        max_num_seqs=link.info.max_num_seqs,
        max_num_batched_tokens=link.info.max_num_batched_tokens,
        kv_tokens=link.info.kv_tokens,
        tasks=pooling_tasks(link.info.capabilities),
        adapters_ready=link.adapters.ready_count,
    )
