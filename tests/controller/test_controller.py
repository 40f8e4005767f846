"""Tests of the control loop with a fake Ray and fake gateways: its actions, the published catalog, and outages
of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from cluster.api.demand import ModelDemand
from cluster.api.types import CatalogEntry, ModelSpec, ModelState, VersionTally
from cluster.controller.controller import Controller
from cluster.controller.links import FleetWorker
from cluster.controller.retired_apps import QUIET_S
from cluster.policy.problems import Problem
from cluster.policy.scaling.inputs import OperatorRequest
from cluster.ray.backend import Backend, RayAway
from cluster.ray.several_clusters import MultiClusterBackend
from cluster.wire.lost_engines import LostEngine
from cluster.worker.settings import ReplicaSettings
from tests.support.fake_ray import FakeRay
from tests.support.serving import eventually


@dataclass
class FakeGateways:
    """Fake gateways that record the published catalog and return the reports that a test has set."""

    workers: list[FleetWorker] = field(default_factory=list)
    linked: int = 1
    published: dict[str, CatalogEntry] = field(default_factory=dict)
    waiting: list[ModelDemand] = field(default_factory=list)
    counted: list[VersionTally] = field(default_factory=list)
    ends: list[LostEngine] = field(default_factory=list)
    problems: Sequence[Problem] = ()
    gone: Sequence[tuple[str, str]] = ()

    def set_problems(self, problems: Sequence[Problem]) -> None:
        """Record the problems."""
        self.problems = problems

    def unreachable_gateways(self, now: float) -> Sequence[tuple[str, str]]:
        """Return the gateways that a test has set."""
        return self.gone

    def publish(self, entries: Sequence[CatalogEntry]) -> None:
        """Record the entries."""
        self.published = {entry.name: entry for entry in entries}

    def lost(self) -> Sequence[LostEngine]:
        """Return the ended engines that a test has set."""
        return self.ends

    def fleet(self) -> Sequence[FleetWorker]:
        """Return the workers that a test has set."""
        return self.workers

    def demand(self) -> Sequence[ModelDemand]:
        """Return the demand that a test has set."""
        return self.waiting

    def tallies(self) -> Sequence[VersionTally]:
        """Return the call counts by model version, which a test has set."""
        return self.counted

    def state(self, model: str) -> ModelState:
        """Return a model's state as last published."""
        return self.published[model].state


def settings(name: str, **more: object) -> ReplicaSettings:
    """Return replica settings of a model."""
    return ReplicaSettings(ModelSpec(name=name, source=f"/{name}", **more), "test")  # type: ignore[arg-type]


@dataclass
class Clock:
    """A wall clock whose time is set by a test."""

    now_s: float = 100.0

    def __call__(self) -> float:
        """Return the current time."""
        return self.now_s


def controller(
    ray: Backend, gateways: FakeGateways, *wanted: ReplicaSettings, now_s: float = 100.0, clock: Clock | None = None
) -> Controller:
    """Return a controller that wants the replicas of the settings `wanted`."""
    created = Controller(ray, gateways, wall_s=clock or Clock(now_s))
    created.models.want(wanted)
    return created


async def test_states_follow_what_is_seen() -> None:
    """A model is DECLARED, then PLACING, then LOADING. It becomes READY, with a measured start time, once a gateway has
    a link to a worker."""
    ray, gateways = FakeRay(), FakeGateways()
    loop = controller(ray, gateways, settings("m"), now_s=130.0)

    async def state() -> ModelState:
        await loop.step()
        return gateways.state("m")

    assert await state() is ModelState.DECLARED
    assert await state() is ModelState.PLACING
    ray.change("m", placed=1, deployed_at_s=100.0)
    assert await state() is ModelState.LOADING
    ray.change("m", placed=0, running=1)
    assert await state() is ModelState.LOADING, "no gateway can reach it yet"
    gateways.workers.append(FleetWorker("w", "i", "m", bundle_digest="sha256:b", max_model_len=77))
    assert await state() is ModelState.READY
    entry = gateways.published["m"]
    assert (entry.bundle_digest, entry.max_model_len, entry.cold_start_s) == ("sha256:b", 77, 30.0)
    ray.change("m", running=0)
    gateways.workers.clear()
    assert await state() is ModelState.PLACING
    assert gateways.published["m"].bundle_digest == "sha256:b"
    assert ray.journal == ["deploy m"]


async def test_the_end_of_an_engine_is_in_the_catalog() -> None:
    """If an engine of a model's current version ends, the catalog entry says when and why, during the restart and after
    it."""
    ray, gateways = FakeRay(), FakeGateways()
    wanted = settings("m")
    loop = controller(ray, gateways, wanted)
    await loop.step()

    def end(at_s: float, reason: str, model: str = "m", generation: str = wanted.digest) -> LostEngine:
        return LostEngine("m-r1", str(at_s), model, "v1", generation, "n", reason, at_s)

    gateways.ends = [end(60.0, "first"), end(120.0, "rank 1 was killed"), end(180.0, "x", "other")]
    gateways.ends.append(end(180.0, "x", "m", "an older entry"))
    ray.change("m", placed=1)
    await loop.step()
    assert gateways.state("m") is ModelState.LOADING
    reason = "2 replicas' engines ended lately, the last ended at 00:02:00 UTC: rank 1 was killed"
    assert gateways.published["m"].state_reason == reason
    ray.change("m", placed=0, running=1)
    gateways.workers.append(FleetWorker("m-r1", "i", "m"))
    await loop.step()
    assert (gateways.state("m"), gateways.published["m"].state_reason) == (ModelState.READY, reason)
    gateways.ends = []
    await loop.step()
    assert gateways.published["m"].state_reason == ""


async def test_a_new_controller_leaves_all_as_it_is() -> None:
    """A new controller recognises existing applications by digest and changes nothing."""
    ray, gateways = FakeRay(), FakeGateways(linked=0)
    await controller(ray, gateways, settings("a"), settings("b")).step()
    ray.change("a", running=1)
    ray.journal.clear()
    renamed = settings("a", aliases=("x",))
    await controller(ray, gateways, renamed, settings("b")).step()
    assert ray.journal == []
    assert gateways.state("a") is ModelState.READY
    assert gateways.published["a"].aliases == ("x",)


async def test_removed_model_drains_and_leaves_the_catalog() -> None:
    """A removed model is DRAINING while calls run or wait, and then leaves the catalog.

    A model that is added again starts anew.
    """
    ray, gateways, clock = FakeRay(), FakeGateways(), Clock()
    loop = controller(ray, gateways, settings("m"), clock=clock)
    await loop.step()
    gateways.workers.append(FleetWorker("w", "i", "m", running=1, generation=settings("m").digest))
    loop.models.want([])
    await loop.step()
    clock.now_s += QUIET_S
    await loop.step()
    assert gateways.state("m") is ModelState.DRAINING
    assert ray.journal == ["deploy m"], "a call still runs there"
    gateways.workers.clear()
    gateways.waiting.append(ModelDemand("m", 1, 9, 0, 1, 9))
    await loop.step()
    assert ray.journal == ["deploy m"], "a call that has come still waits"
    gateways.waiting.clear()
    await loop.step()
    assert ray.journal == ["deploy m", "delete m"]
    await loop.step()
    assert gateways.published == {}
    loop.models.want([settings("m")])
    await loop.step()
    assert gateways.state("m") is ModelState.DECLARED


async def test_a_model_that_is_removed_during_a_pass_is_not_deployed() -> None:
    """A model that is removed from the desired models while Ray takes a step is not deployed."""

    class SlowRay(FakeRay):
        async def deploy(self, settings: ReplicaSettings) -> None:
            await super().deploy(settings)
            loop.models.want([settings])

    ray = SlowRay()
    loop = controller(ray, FakeGateways(), settings("m"), settings("n"))
    await loop.step()
    assert ray.journal == ["deploy m"]


async def test_unplaceable_model_fails_and_recovers() -> None:
    """A model that cannot be placed is FAILED with the reason until a node that is large enough joins."""
    ray, gateways = FakeRay(nodes=({"CPU": 8.0, "GPU": 1.0},)), FakeGateways()
    loop = controller(ray, gateways, settings("m", tensor_parallel_size=2))
    await loop.step()
    await loop.step()
    assert gateways.state("m") is ModelState.FAILED
    assert "needs 2 GPUs" in gateways.published["m"].state_reason
    ray.nodes = ({"CPU": 8.0, "GPU": 2.0},)
    await loop.step()
    assert gateways.state("m") is ModelState.PLACING


@pytest.mark.slow
async def test_ray_away_keeps_the_catalog_and_is_taken_up_again() -> None:
    """The catalog stays published while Ray is unreachable. Everything is deployed again if Ray comes back empty."""
    ray, gateways = FakeRay(away="gone fishing"), FakeGateways(linked=0)
    loop = controller(ray, gateways, settings("m", slo_ttft_s=0.5))
    with pytest.raises(RayAway):
        await loop.step()
    running = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: gateways.published.get("m"), "the model is published although Ray is away")
        assert gateways.state("m") is ModelState.DECLARED
        assert gateways.published["m"].state_reason == "gone fishing"
        assert gateways.published["m"].slo_ttft_s == 0.5, "without it no call is late, and no alert fires"
        ray.away = ""
        await eventually(lambda: ray.apps, "it is deployed")
        ray.change("m", running=1)
        await eventually(lambda: gateways.state("m") is ModelState.READY, "it is ready")
        ray.away = "gone again"
        loop.models.want([settings("m"), settings("n")])
        await eventually(lambda: "gone again" in repr(loop), "the loss is noticed")
        assert gateways.state("m") is ModelState.READY
        ray.apps.clear()
        ray.away = ""
        await eventually(lambda: len(ray.apps) == 2, "both are deployed")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert ray.journal == ["deploy m", "deploy m", "deploy n"]


# ---- versions


def two_versions(weight: float = 0.25, **canary: object) -> tuple[ReplicaSettings, ReplicaSettings]:
    """Return the settings of a model's stable version and of the canary."""
    plain: dict[str, object] = {"version": "v2", "weight": weight, "error_ratio": 1.5, "ttft_ratio": 1.2}
    return settings("m", weight=1 - weight), settings("m", **(plain | canary))


def worker(of: ReplicaSettings, running: int = 0, weight_digest: str = "") -> FleetWorker:
    """Return a worker that is linked to a gateway."""
    return FleetWorker(
        f"w-{of.digest}",
        "i",
        of.spec.name,
        running=running,
        version=of.spec.version,
        generation=of.digest,
        weight_digest=weight_digest,
    )


async def test_a_trial_comes_beside_and_the_other_is_not_touched() -> None:
    """A canary version gets its own replicas, its own state and a share of the calls. Meanwhile the model stays
    READY."""
    ray, gateways = FakeRay(), FakeGateways()
    stable, canary = two_versions()
    loop = controller(ray, gateways, stable)
    await loop.step()
    ray.change("m", running=1)
    gateways.workers.append(worker(stable))
    loop.models.want([stable, canary])
    await loop.step()
    await loop.step()
    assert ray.journal == ["deploy m", "deploy m@v2"]
    entry = gateways.published["m"]
    assert (entry.state, [(v.version, v.weight, v.state) for v in entry.versions]) == (
        ModelState.READY,
        [("v1", 0.75, ModelState.READY), ("v2", 0.25, ModelState.PLACING)],
    )
    assert entry.replicas_desired == 2
    assert entry.state_reason == "v2: waiting for Ray to place it"


async def test_a_trial_that_does_badly_goes_and_stays_away() -> None:
    """A bad canary gets no more calls, and each of its replicas ends when it has no call left. Only a changed canary is
    deployed again."""
    ray, gateways, clock = FakeRay(), FakeGateways(), Clock()
    stable, canary = two_versions()
    marked: list[str] = []
    loop = Controller(ray, gateways, keep_overrides=lambda: marked.append("changed"), wall_s=clock)
    loop.models.want([stable, canary])
    await loop.step()
    for variant in (stable, canary):
        ray.change(variant.app, running=1)
        gateways.workers.append(worker(variant))
    gateways.counted = [
        VersionTally("m", "v1", stable.digest, calls=300, errors=1),
        VersionTally("m", "v2", canary.digest, calls=100, errors=12),
    ]
    await loop.step()
    assert marked == ["changed"]
    entry = gateways.published["m"]
    assert [(v.version, v.weight) for v in entry.versions] == [("v1", 1.0), ("v2", 0.0)]
    assert entry.versions[1].state_reason.startswith("rolled back by itself: 12 of its 100 calls failed, 1 of 300")
    assert entry.retired == (canary.digest,)
    clock.now_s += QUIET_S
    await loop.step()
    assert ray.journal[-1] == "delete m@v2"
    loop.models.want([stable, canary])
    await loop.step()
    assert len(ray.apps) == 1
    changed = dataclasses.replace(canary, spec=dataclasses.replace(canary.spec, revision="changed"))
    loop.models.want([stable, changed])
    await loop.step()
    assert ray.journal[-1] == "deploy m@v2"


async def test_promoted_version_grows_in_place_and_the_other_leaves() -> None:
    """A promoted canary keeps its running replicas. The former version is retired once the canary has all wanted
    replicas."""
    ray, gateways, clock = FakeRay(), FakeGateways(), Clock()
    two = {"min_replicas": 2, "max_replicas": 2}
    stable, canary = settings("m", weight=0.75, **two), settings("m", version="v2", weight=0.25, **two)
    loop = controller(ray, gateways, stable, canary, clock=clock)
    await loop.step()
    ray.change(stable.app, running=2)
    ray.change(canary.app, running=1)
    gateways.workers += [worker(stable, running=3), worker(canary)]
    promoted = dataclasses.replace(canary, spec=dataclasses.replace(canary.spec, weight=1.0))
    assert promoted.app == canary.app
    loop.models.want([promoted])
    await loop.step()
    assert ray.journal[2:] == ["scale m@v2 2"]
    assert not gateways.published["m"].retired
    ray.change(canary.app, running=2)
    await loop.step()
    assert gateways.published["m"].retired == (stable.digest,)
    clock.now_s += loop.retired.drain_timeout_s - 1
    await loop.step()
    assert len(ray.apps) == 2, "calls run there, and the drain timeout is not over"
    clock.now_s += 1
    await loop.step()
    assert ray.journal[3:] == ["delete m"]


async def test_a_changed_entry_is_told_while_it_is_replaced_and_when_that_fails() -> None:
    """The old replicas serve during a replacement, and stay if the new replicas are refused. The catalog entry gives
    the reason."""
    ray, gateways = FakeRay(now_s=100.0), FakeGateways()
    old, new = settings("m", revision="a"), settings("m", revision="b")
    loop = controller(ray, gateways, old)
    await loop.step()
    ray.change("m", running=1)
    gateways.workers.append(worker(old))
    loop.models.want([new])
    await loop.step()
    await loop.step()
    assert (gateways.state("m"), gateways.published["m"].state_reason) == (ModelState.READY, "being replaced")
    ray.change(new.app, gave_up=True, refused=True, trouble="no such revision")
    await loop.step()
    assert gateways.published["m"].state_reason == "being replaced, which fails: no such revision"
    assert ray.journal == ["deploy m", "deploy m"]
    assert gateways.published["m"].retired == ()


@pytest.mark.parametrize(
    ("change", "others", "kept"),
    [
        ({"tensor_parallel_size": 4}, [], 2),  # no node has four GPUs
        ({"gpu": "H100"}, [], 2),  # no node has this type
        ({"tensor_parallel_size": 2}, ["other"], 1),  # one of the two GPUs stays with another model
        ({"tensor_parallel_size": 2}, [], 0),  # both GPUs, once they are free
    ],
)
async def test_replicas_are_given_up_only_for_what_the_nodes_can_hold(
    change: dict[str, object], others: list[str], kept: int
) -> None:
    """A changed entry whose replica would not fit even without the old replicas takes none of them."""
    clock, gateways, ray = Clock(), FakeGateways(), FakeRay(nodes=({"CPU": 8.0, "GPU": 2.0},))
    count = 2 - len(others)
    size: dict[str, object] = {"min_replicas": count, "max_replicas": count}
    old, more = settings("m", **size), [settings(name) for name in others]
    loop = controller(ray, gateways, old, *more, clock=clock)
    await loop.step()
    ray.change("m", running=count)
    for name in others:
        ray.change(name, running=1)
    loop.models.want([settings("m", **size, **change), *more])
    for _ in range(60):
        await loop.step()
        clock.now_s += 1
        if (app := ray.apps[old.app]).running > app.target:
            ray.change(old.app, running=app.target)
    assert ray.apps[old.app].target == kept


async def test_pinning_the_right_weights_restarts_nothing() -> None:
    """A newly pinned digest restarts replicas only if the workers of the model have other weights."""
    ray, gateways, clock = FakeRay(), FakeGateways(), Clock()
    loop = controller(ray, gateways, settings("m"), clock=clock)
    await loop.step()
    ray.change("m", running=1, deployed_at_s=100.0)
    gateways.workers.append(worker(settings("m"), weight_digest="sha256:right"))
    clock.now_s += 100.0
    loop.models.want([settings("m", digest="sha256:right")])
    await loop.step()
    assert ray.journal == ["deploy m"]
    assert gateways.published["m"].weights_pinned
    loop.models.want([settings("m", digest="sha256:other")])
    await loop.step()
    assert ray.journal == ["deploy m", "deploy m"]


async def test_frozen_models_stay_as_they_are() -> None:
    """A change of a frozen model is rolled out only after the model is unfrozen."""
    ray, gateways = FakeRay(), FakeGateways()
    loop = controller(ray, gateways, settings("m"))
    await loop.step()
    loop.scaler.set_operator_requests(OperatorRequest(frozen=frozenset({"m"})))
    loop.models.want([settings("m", revision="b")])
    await loop.step()
    assert ray.journal == ["deploy m"]
    loop.scaler.set_operator_requests(OperatorRequest())
    await loop.step()
    assert ray.journal == ["deploy m", "deploy m"]


async def test_types_of_gpu_are_filled_in_their_order() -> None:
    """Replicas that do not fit on the preferred GPU type beside other models run on the next GPU type."""
    nodes = (
        {"CPU": 64.0, "GPU": 3.0, "accelerator_type:H100": 1.0},
        {"CPU": 64.0, "GPU": 8.0, "accelerator_type:L4": 1.0},
    )
    ray, gateways = FakeRay(nodes=nodes), FakeGateways(linked=0)
    other = settings("other", gpu="H100")
    fast = settings("m", gpu="H100", min_replicas=3, max_replicas=3)
    slow = settings("m", gpu="L4", tensor_parallel_size=2, min_replicas=3, max_replicas=3)
    loop = controller(ray, gateways, other)
    await loop.step()
    ray.change("other", running=1)
    loop.models.want([other, fast, slow])
    await loop.step()
    assert {app: seen.target for app, seen in ray.apps.items()} == {other.app: 1, fast.app: 2, slow.app: 1}
    ray.change(fast.app, running=2)
    ray.change(slow.app, running=1)
    await loop.step()
    assert gateways.published["m"].replicas == 3
    assert ray.journal == ["deploy other", "deploy m", "deploy m"]


async def test_versions_have_their_parts_on_every_type_in_use() -> None:
    """A canary gets replicas on every GPU type that the stable version uses. Replicas on a less preferred GPU type stay
    there, even when the preferred type has room again."""
    few, many = ({"CPU": 64.0, "GPU": gpus, "accelerator_type:H100": 1.0} for gpus in (2.0, 6.0))
    slow_node = {"CPU": 64.0, "GPU": 8.0, "accelerator_type:L4": 1.0}
    ray, gateways = FakeRay(nodes=(few, slow_node)), FakeGateways()
    more = {"min_replicas": 3, "max_replicas": 3}
    fast, slow = settings("m", gpu="H100", weight=0.75, **more), settings("m", gpu="L4", weight=0.75, **more)
    loop = controller(ray, gateways, fast, slow)
    await loop.step()
    assert {app: seen.target for app, seen in ray.apps.items()} == {fast.app: 2, slow.app: 1}
    gateways.workers += [worker(fast), worker(slow)]
    ray.change(fast.app, running=2)
    ray.change(slow.app, running=1)
    ray.nodes = (many, slow_node)
    await loop.step()
    assert {app: seen.target for app, seen in ray.apps.items()} == {fast.app: 2, slow.app: 1}
    canaries = [
        dataclasses.replace(stable, spec=dataclasses.replace(stable.spec, version="v2", weight=0.25))
        for stable in (fast, slow)
    ]
    loop.models.want([fast, slow, *canaries])
    await loop.step()
    targets = {app: seen.target for app, seen in ray.apps.items()}
    assert targets == {fast.app: 2, slow.app: 1, canaries[0].app: 1, canaries[1].app: 1}
    for _ in range(3):
        await loop.step()
    assert {app: seen.target for app, seen in ray.apps.items()} == targets, "a canary's extra replicas are counted once"


async def test_two_ray_clusters_are_driven_side_by_side() -> None:
    """A model that moves to another Ray cluster starts on that cluster before its old replicas end. An unreachable Ray
    cluster does not stop changes on the other cluster."""
    blue, green, gateways, clock = FakeRay(), FakeRay(), FakeGateways(), Clock()
    on_blue, on_green = settings("m"), settings("m")
    on_blue, on_green = (dataclasses.replace(on_blue, ray_cluster=name) for name in ("blue", "green"))
    loop = controller(MultiClusterBackend({"blue": blue, "green": green}), gateways, on_blue, clock=clock)
    await loop.step()
    blue.change("m", running=1)
    loop.models.want([on_green])
    await loop.step()
    assert (blue.journal, green.journal) == (["deploy m"], ["deploy m"])
    green.change("m", running=1)
    await loop.step()
    assert gateways.published["m"].retired == (on_blue.digest,)
    blue.away = "gone fishing"
    clock.now_s += QUIET_S
    with pytest.raises(RayAway, match="gone fishing"):
        await loop.step()
    green.apps.clear()
    await loop.step()
    assert green.journal == ["deploy m", "deploy m"], "the other cluster is still managed"
    green.change("m", running=1)
    blue.away = ""
    await loop.step()
    clock.now_s += QUIET_S
    await loop.step()
    assert blue.journal == ["deploy m", "delete m"]
    green.away = blue.away = "both"
    with pytest.raises(RayAway, match="blue: both; green: both"):
        await loop.step()


async def test_problems_are_reported_while_they_last() -> None:
    """A Ray cluster that does not answer, a gateway that is gone, and replicas without room are reported to the
    gateways after some seconds, and no longer once they are over."""
    ray, gateways, clock = FakeRay(), FakeGateways(), Clock()
    loop = controller(ray, gateways, settings("m", min_replicas=9, max_replicas=9), clock=clock)

    async def reported() -> list[tuple[str, str]]:
        for _ in range(2):
            with contextlib.suppress(RayAway):
                await loop.step()
            loop.report_problems()
            clock.now_s += 10
        return [(problem.kind, problem.object) for problem in gateways.problems]

    assert await reported() == []
    ray.change("m", running=8)
    assert await reported() == [("no_capacity", "m")]
    ray.nodes = ({"CPU": 16.0, "GPU": 16.0},)
    gateways.gone = [("10.0.0.1:50052", "it is frozen")]
    assert await reported() == [("gateway_gone", "10.0.0.1:50052")]
    gateways.gone = []
    ray.change("m", running=9)
    assert await reported() == []


@pytest.mark.parametrize("turns", range(5))
async def test_it_ends_when_it_is_cancelled_with_news(turns: int) -> None:
    """The control loop ends when its task is cancelled, however soon after a wake-up."""
    loop = controller(FakeRay(), FakeGateways(), settings("m"))
    running = asyncio.create_task(loop.run())
    await eventually(lambda: bool(loop.catalog.entries()), "the first pass has run")
    await asyncio.sleep(0)
    loop.models.changed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    running.cancel()
    done, _ = await asyncio.wait([running], timeout=2.0)
    assert done, "the loop still runs"
