"""A cluster for pictures of the console, with a made-up history of one hour.

It has three models, 12 simulated workers on four nodes, three tenants with calls, and a real controller.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc
from playwright.async_api import Browser
from tokenizers import Tokenizer

from cluster.api.ports import Engine
from cluster.api.types import ModelSpec
from cluster.controller import scaling
from cluster.controller.controller import Controller
from cluster.controller.desired_models import DesiredModels
from cluster.controller.links import ControllerLinks
from cluster.controller.published_catalog import PublishedCatalog
from cluster.controller.scaling_verbs import scaling_verbs
from cluster.gateway.console.history.history import BUCKETS, STEPS
from cluster.gateway.console.overview.parts import STEP_S
from cluster.gateway.server import Gateway
from cluster.ledger.usage.records import UsageRecord
from cluster.policy.catalog.lifecycle import SourceFacts
from cluster.policy.scaling.inputs import ScalingSettings
from cluster.policy.scaling.operator_requests import ScalingRequests
from cluster.policy.scaling.scaler import Scaler
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing
from cluster.worker.engine.simulated.engine import SimEngine
from cluster.worker.settings import ReplicaSettings
from tests.ledger.samples import record
from tests.support.admin import role_key
from tests.support.calls import chat
from tests.support.cluster import Worker, running_cluster, sim_engine, until
from tests.support.console_pages import ConsolePages
from tests.support.echo_engine import EchoEngine
from tests.support.fake_ray import FakeRay
from tests.support.keyed import Keyed, bearer, keyed_text

REPLICAS = {"assistant": 7, "coder": 4, "writer": 1}
GPUS = {"assistant": "H100", "coder": "L40S", "writer": "L40S"}
TENANTS = {
    "acme": {"weight": 4.0, "limits": {"tokens_per_minute": 600_000, "concurrent_requests": 64}},
    "globex": {"weight": 2.0, "limits": {"tokens_per_minute": 200_000, "requests_per_minute": 600}},
    "initech": {"weight": 1.0, "limits": {"daily_tokens": 2_000_000}},
}
CALLS = {"acme": 40, "globex": 22, "initech": 9}
"""Number of calls of each tenant that run at once."""
COST = "cost: {currency: EUR, gpu_hour: {H100: 2.9, L40S: 1.1}}\n"
ANSWER = """A river is a natural stream of water. It begins at a **source** and ends at a *mouth*.

| part | what happens there |
|---|---|
| source | rain, snow or a spring feeds it |
| headwaters | it cuts deep, narrow valleys |
| mouth | it reaches a lake or the sea |

The slope between two points is the drop divided by the distance:

```python
def slope(drop_m: float, distance_km: float) -> float:
    \"\"\"Return the slope in metres a kilometre.\"\"\"
    return drop_m / distance_km
```

More at <https://en.wikipedia.org/wiki/River>.
"""


class Scene(ConsolePages):
    """The console pages of a cluster. `workers`: the cluster's workers by model."""

    workers: dict[str, list[Worker]]

    async def lose_a_worker(self) -> Worker:
        """Kill the engine of a worker that runs several sequences, and return the worker after it has ended."""
        victim = next(w for w in self.workers["assistant"][1:] if not w.task.done() and w.engine.load().running > 2)
        assert isinstance(victim.engine, SimEngine)
        victim.engine.faults.kill("CUDA error: an illegal memory access was encountered")
        await victim.task
        return victim


@asynccontextmanager
async def console_scene(folder: Path, browser: Browser, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Scene]:
    """Run the cluster with running calls of several tenants."""
    text = keyed_text(folder, COST, "  console: {tenants: true}\n").replace("name: test", "name: rivers")
    async with running_cluster(folder / "gateway", text, Timing()) as cluster:
        (folder / "cluster.yaml").write_text(text)
        scene = Scene(Keyed(cluster, folder / "cluster.yaml"), browser)
        ledger = scene.keyed.ledger
        scene.keys["operator"] = await role_key(ledger, "platform", "operator")
        for name, fields in TENANTS.items():
            scene.keys[name] = await scene.keyed.key(name, **fields)
        await asyncio.to_thread(ledger.usage.insert, _usage())
        async with _controller(cluster.gateway, bundle):
            scene.workers = {}
            for model in REPLICAS:
                scene.workers[model] = await _workers(scene, model, checkpoint, bundle)
            await until(lambda: cluster.gateway.live.history is not None, "there is a history")
            _make_up_history(cluster.gateway)
            calls = [asyncio.create_task(_calls(scene, name, n)) for name, count in CALLS.items() for n in range(count)]
            try:
                await until(lambda: cluster.gateway.hub.statistics().running >= len(calls) - 5, "the calls run")
                yield scene
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                ledger.close()


async def _workers(scene: Scene, model: str, checkpoint: Path, bundle: Bundle) -> list[Worker]:
    made = []
    for i in range(REPLICAS[model]):
        version = "v2" if model == "assistant" and i == 0 else "v1"
        worker = await scene.cluster.add_worker(
            _engine(model, i, checkpoint),
            bundle,
            model=model,
            version=version,
            weight_digest="sha256:1",
            node=f"node-{i % 4}",
            host=f"gpu-{'abcd'[i % 4]}",
            pod=f"{model}-{version}-{i}",
            gpu=GPUS[model],
        )
        made.append(worker)
    return made


def _engine(model: str, number: int, checkpoint: Path) -> Engine:
    if model != "writer":
        return sim_engine(checkpoint, decode_ms=14 + number, prefill_tokens_per_s=3000, max_num_seqs=16, kv_blocks=400)
    engine = EchoEngine(768, step_s=0.012, tokens_a_step=1)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    engine.answer = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    return engine


@asynccontextmanager
async def _controller(gateway: Gateway, bundle: Bundle) -> AsyncIterator[None]:
    """Run a controller with a fake Ray that reports all replicas as running."""
    ray, now = FakeRay(), time.monotonic()
    scaler = Scaler(ScalingSettings(cold_start_s=30.0), now)
    models = DesiredModels()
    demand = scaling.DemandRecorder(scaler, models.changed.set)
    wanted = [
        ReplicaSettings(
            ModelSpec(name, f"/models/{name}", gpu=GPUS[name], version=version, weight=weight, min_replicas=count,
                      max_replicas=12, aliases=("default",) if name == "assistant" else ()),
            "rivers",
        )
        for name, version, weight, count in (
            ("assistant", "v1", 0.9, 6), ("assistant", "v2", 0.1, 1), ("coder", "v1", 1.0, 4), ("writer", "v1", 1.0, 1)
        )
    ]  # fmt: skip
    known = {s.app: SourceFacts(bundle_digest=bundle.digest, max_model_len=2048) for s in wanted}
    links = ControllerLinks(
        controller_id="c",
        gateways=[gateway.endpoints["link"]],
        tls=None,
        bundles=lambda digest: bundle,
        listener=demand,
        verbs=scaling_verbs(ScalingRequests(scaler, models.changed.set)),
    )
    controller = Controller(ray, links, models, PublishedCatalog(known), scaler=scaler)
    models.want(wanted)
    parts = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
    try:
        await until(lambda: len(ray.apps) == len(wanted), "all applications are deployed")
        for settings in wanted:
            ray.change(settings.app, running=settings.spec.min_replicas, target=settings.spec.min_replicas)
        yield
    finally:
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)


async def _calls(scene: Scene, tenant: str, number: int) -> None:
    """Make calls of a tenant, one after the other, until cancelled."""
    seeded = random.Random(f"{tenant} {number}")
    metadata = bearer(scene.keys[tenant])
    while True:
        text = "You are the assistant of a shop. " * 12 + f"Question {seeded.randrange(40)}" * seeded.randrange(1, 6)
        model = "coder" if seeded.random() < 0.35 else "assistant"
        request = chat(text, model=model, max_tokens=seeded.randrange(60, 400), ignore_eos=True)
        with suppress(grpc.aio.AioRpcError):
            async for _ in scene.cluster.stub.StreamChat(request, metadata=metadata):
                pass
        await asyncio.sleep(seeded.random() * 0.2)


def _usage() -> Sequence[UsageRecord]:
    """Return made-up usage records of the last weeks."""
    day_s = 86_400.0
    return [
        record(
            f"{tenant}-{day}", tenant=tenant, model="assistant", opened_at_s=time.time() - day * day_s,
            prompt_tokens=int(share * 900_000 * (1 + 0.4 * math.sin(day))), cached_tokens=int(share * 400_000),
            completion_tokens=int(share * 300_000 * (1 + 0.4 * math.sin(day))), reasoning_tokens=0,
            gpu_seconds=share * 9000,
        )
        for day in range(1, 28)
        for tenant, share in (("acme", 1.0), ("globex", 0.45), ("initech", 0.2))
    ]  # fmt: skip


def _make_up_history(gateway: Gateway) -> None:
    """Fill the last hour of the history with made-up values of the same size as the present values."""
    history = gateway.live.history
    assert history is not None
    seeded, last = random.Random(7), int(time.time() // STEP_S)
    for step in range(last - STEPS + 1, last):
        wave = 1 + 0.25 * math.sin((step - last) / 70) + 0.06 * seeded.random()
        for model, part in (("assistant", 1.0), ("coder", 0.55), ("writer", 0.02)):
            counts = [0.0] * BUCKETS
            for bucket, number in ((6, 30), (7, 12), (8, 4), (9, 0.6 * wave * wave)):
                counts[bucket] = number * part
            had = REPLICAS[model] - (1 if model == "assistant" and step < last - 300 else 0)
            running, waiting = 46 * part * wave, max(0.0, 60 * part * (wave - 1.2))
            values = (2600 * part * wave, running, waiting, 9.0 * part, 900.0, 520 * wave * 0.9, 60 * wave, had, had)
            history.models.put(model, step, (*values, *counts))
        for tenant, share in (("acme", 1.0), ("globex", 0.55), ("initech", 0.22)):
            used = (2200 * share * wave, 4 * share, 39 * share * wave, max(0.0, 6 * share * (wave - 1.1)), 8 * share)
            history.tenants.put(tenant, step, (*used, 900.0 * share, 500.0 * share))
