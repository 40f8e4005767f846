"""Scaling of a model from zero and back to zero, with a real gateway, controller and link, simulated engines and a fake
Ray.

The fake Ray starts the engines in this process. A start ends when the test sets an event, so no test depends on timing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.api.types import ModelSpec, ModelState
from cluster.controller import scaling
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import ControllerLinks
from cluster.controller.published_catalog import PublishedCatalog
from cluster.gateway.apis.openai.answers import KEEP_ALIVE, keep_alive
from cluster.gateway.calls.keepalive import CallProgress
from cluster.policy.catalog.lifecycle import SourceFacts
from cluster.policy.scaling.inputs import ScalingSettings
from cluster.policy.scaling.scaler import DECIDE_S, Scaler
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from cluster.worker.settings import ReplicaSettings
from tests.support.calls import chat, refused, rest_of, text_of
from tests.support.cluster import TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.fake_ray import FakeRay
from tests.support.http import chat_body, client
from tests.support.loop_clock import LoopClock

pytestmark = pytest.mark.slow


class RayHere(FakeRay):
    """A fake Ray that starts and ends simulated workers in this process. Each start waits for `may_start`."""

    def __init__(self, cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
        super().__init__()
        self.cluster, self.checkpoint, self.bundle = cluster, checkpoint, bundle
        self.may_start = asyncio.Event()
        self.workers: list[Worker] = []
        self.tasks: set[asyncio.Task[None]] = set()

    async def deploy(self, settings: ReplicaSettings) -> None:
        """Deploy one replica."""
        await super().deploy(settings)
        self._follow(self.apps[self.app_of("sim")].target)

    async def scale(self, model: str, replicas: int) -> None:
        """Start or stop workers until there are `replicas` workers."""
        await super().scale(model, replicas)
        self._follow(replicas)

    def _follow(self, replicas: int) -> None:
        task = asyncio.create_task(self._reach(replicas))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _reach(self, replicas: int) -> None:
        while len(self.workers) > replicas:
            worker = self.workers.pop()
            self.change("sim", running=len(self.workers))
            await worker.end.drain(5.0)
            await worker.stop()
        while len(self.workers) < replicas:
            self.change("sim", placed=1)
            await self.may_start.wait()
            self.workers.append(await self.cluster.add_worker(sim_engine(self.checkpoint, decode_ms=1), self.bundle))
            self.change("sim", placed=0, running=len(self.workers))


class Scaled:
    """A gateway whose model `sim` scales to zero after half a second."""

    def __init__(self, cluster: TestCluster, ray: RayHere, end: ControllerLinks, controller: Controller) -> None:
        self.cluster, self.ray, self.end, self.controller = cluster, ray, end, controller

    def state(self) -> ModelState | None:
        """Return the state of the model at the gateway."""
        model = self.cluster.gateway.directory.find("sim")
        return None if model is None else model.state

    async def at_zero(self) -> None:
        """Wait until the model has no workers."""
        await until(lambda: self.state() is ModelState.IDLE and not self.cluster.gateway.hub.links, "it is at zero")


@asynccontextmanager
async def scaled(tmp_path: Path, checkpoint: Path, bundle: Bundle, decide_s: float = 0.5) -> AsyncIterator[Scaled]:
    """Provide a gateway whose model was started, got no call, and was scaled to zero."""
    async with running_cluster(tmp_path) as cluster:
        ray = RayHere(cluster, checkpoint, bundle)
        gateways = [cluster.gateway.endpoints["link"]]
        scaler = Scaler(ScalingSettings(cold_start_s=30.0), time.monotonic(), decide_s=decide_s)
        models = DesiredModels()
        demand = scaling.DemandRecorder(scaler, models.changed.set)
        end = ControllerLinks(
            controller_id="c", gateways=gateways, tls=None, bundles=lambda digest: bundle, listener=demand
        )
        spec = ModelSpec("sim", "sim://x", min_replicas=0, max_replicas=2, idle_s=0.5)
        settings = ReplicaSettings(spec, "test")
        known = {settings.app: SourceFacts(bundle_digest=bundle.digest, max_model_len=2048)}
        controller = Controller(ray, end, models, PublishedCatalog(known), scaler=scaler)
        models.want([settings])
        parts = [asyncio.create_task(end.run()), asyncio.create_task(controller.run())]
        made = Scaled(cluster, ray, end, controller)
        ray.may_start.set()
        try:
            await until(lambda: bool(cluster.gateway.hub.links), "it has begun")
            await made.at_zero()
            ray.may_start.clear()
            yield made
        finally:
            for part in (*parts, *ray.tasks):
                part.cancel()
            await asyncio.gather(*parts, *ray.tasks, return_exceptions=True)


async def test_a_call_starts_the_model_and_is_told_how_far_that_is(
    tmp_path: Path, checkpoint: Path, bundle: Bundle
) -> None:
    """A call for a model without workers waits and starts the model at once. The caller gets the state, the progress
    and the estimated duration of the start, and then the complete answer."""
    async with scaled(tmp_path, checkpoint, bundle, DECIDE_S) as at_zero:
        ray, stub = at_zero.ray, at_zero.cluster.stub
        ray.journal.clear()
        async with LoopClock() as clock:
            call = stub.StreamChat(chat(max_tokens=5, ignore_eos=True), timeout=60)
            await until(lambda: ray.journal == ["scale sim 1"], "it is being started")
            assert clock.now_s < 0.5, "at once: no report of the gateway, no pass of the controller is awaited"
        first = await read(call)
        assert first.progress.state in ("placing", "loading", "idle")
        progress = [await read(call) for _ in range(2)][-1].progress
        learnt_s = at_zero.controller.scaler.scaling_of("sim").cold_start_s
        assert progress.state == "loading"
        assert (progress.queue_position, 0 < progress.fraction < 1) == (1, True)
        assert 0 < progress.eta_ms <= 1000 * max(learnt_s, 30.0)
        ray.may_start.set()
        rest = await rest_of(call)
        assert rest[-1].usage.completion_tokens == 5
        assert text_of(rest)
        await at_zero.at_zero()


async def test_many_at_zero_are_all_served(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Many calls for a model without workers succeed, over gRPC and with the openai client, streamed or not."""
    async with scaled(tmp_path, checkpoint, bundle) as at_zero:
        cluster = at_zero.cluster
        async with client(cluster) as ai:
            body = chat_body(max_tokens=4)
            whole = [ai.chat.completions.create(**body) for _ in range(3)]
            streams = [asyncio.create_task(_streamed(ai, body)) for _ in range(3)]
            calls = [cluster.stub.Chat(chat(max_tokens=4)) for _ in range(3)]
            gathered = asyncio.gather(*whole, *streams, *calls)
            await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] == 9, "all are held")
            at_zero.ray.may_start.set()
            answers = await gathered
        assert len(answers) == 9
        assert all(answers)


async def _streamed(ai: object, body: dict[str, object]) -> str:
    stream = await ai.chat.completions.create(**body, stream=True)  # type: ignore[attr-defined]
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def test_a_deadline_ends_a_held_call(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A call that waits for a model's start ends at its deadline."""
    async with scaled(tmp_path, checkpoint, bundle) as at_zero:
        late = await refused(at_zero.cluster.stub.Chat(chat(), timeout=0.6))
        assert late.code.name == "DEADLINE_EXCEEDED"
        # the caller's clock ends the call, and the cancel takes a moment to arrive
        await until(
            lambda: at_zero.cluster.gateway.scheduler.queues.waiting("sim") == (0, 0), "it is held no longer", 5
        )


async def test_a_start_that_fails_tells_why(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If a model's start fails, the caller gets Ray's reason at once, not at the call's deadline."""
    async with scaled(tmp_path, checkpoint, bundle) as at_zero:
        call = asyncio.ensure_future(refused(at_zero.cluster.stub.Chat(chat(), timeout=60)))
        await until(lambda: at_zero.ray.apps[at_zero.ray.app_of("sim")].placed == 1, "it is being started")
        at_zero.ray.change("sim", placed=0, gave_up=True, trouble="no space left on device")
        answer = await call
        assert answer.reason == "NO_WORKER"
        assert "no space left on device" in answer.message


async def test_a_gateway_restarted_meanwhile_knows_it(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A gateway restarts while a model has no workers. From the state in its folder it still knows the model, so it
    tokenizes calls for the model and holds them until a worker connects."""
    async with scaled(tmp_path / "first", checkpoint, bundle):
        pass
    async with running_cluster(tmp_path / "first") as later:
        held = asyncio.ensure_future(later.stub.Chat(chat(max_tokens=3, ignore_eos=True), timeout=60))
        await until(lambda: later.gateway.scheduler.queues.waiting("sim")[0] == 1, "it is held")
        await later.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        assert (await held).usage.completion_tokens == 3


def test_comments_of_event_streams() -> None:
    """A comment in an event stream is one line. It is a keep-alive, or reports the progress of a model that is
    starting. Every client skips comments."""
    assert keep_alive(CallProgress("queued", 3)) == KEEP_ALIVE
    comment = keep_alive(CallProgress("loading", 1, 0.4, 18.0))
    assert comment == b": loading 40%, about 18 s to go\n\n"


@pytest.mark.thorough
async def test_a_stream_that_comes_back_starts_the_model(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A stream that is resumed while its model has no workers counts as demand, like a new call, and starts the
    model."""
    request = chat(max_tokens=60, ignore_eos=True, resumable=True)
    async with scaled(tmp_path, checkpoint, bundle) as its:
        its.ray.may_start.set()
        whole = text_of([chunk async for chunk in its.cluster.stub.StreamChat(request)])
        call = its.cluster.stub.StreamChat(request)
        chunks: list[pb.ChatChunk] = []
        while len(text_of(chunks)) < len(whole) // 3:
            chunk: pb.ChatChunk = await read(call)
            chunks.append(chunk)
        call.cancel()
        await its.at_zero()
        tokens = [chunk.resume_token for chunk in chunks if chunk.resume_token]
        offset = max(chunk.offset for chunk in chunks if chunk.resume_token)
        onward = its.cluster.stub.Resume(
            pb.ResumeRequest(chat=request, resume_tokens=tokens, offset=offset), timeout=60
        )
        rest = [chunk.chat async for chunk in onward]
        assert text_of(chunks) + text_of(rest) == whole
