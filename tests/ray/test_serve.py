"""Tests of applications on a real Ray with simulated engines: which are changed or left alone, and what is
published."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelSpec, ModelState
from cluster.controller.controller import Controller
from cluster.controller.links import ControllerLinks
from cluster.ray.backend import Backend, ChildBackend
from cluster.ray.local_cluster import LocalRay
from cluster.worker.settings import ReplicaSettings
from tests.support.serving import Door, apps_of, eventually, greedy, removed, settled

pytestmark = pytest.mark.ray


def sim(name: str, door: Door, **more: object) -> ReplicaSettings:
    """Return settings of a simulated model whose workers connect to `door`."""
    spec = ModelSpec(name=name, source="sim://?vocab=1000&decode_ms=1&token_hi=900", **more)  # type: ignore[arg-type]
    return ReplicaSettings(spec, "test", gateways=(door.address,))


@asynccontextmanager
async def controlling(backend: Backend, door: Door, *settings: ReplicaSettings) -> AsyncIterator[Controller]:
    """Run a controller that is linked to `door`."""
    links = ControllerLinks(controller_id="test", gateways=[door.address], tls=None, bundles=lambda _: None)
    controller = Controller(backend, links)
    controller.models.want(settings)
    tasks = [asyncio.create_task(links.run()), asyncio.create_task(controller.run())]
    try:
        yield controller
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_state(door: Door, model: str, state: ModelState) -> CatalogEntry:
    """Wait until a model is published in this state, and return the model's entry."""
    return await eventually(
        lambda: (e := door.entries.get(model)) and (e if e.state is state else None), f"{model} is {state.value}", 240.0
    )


async def test_a_models_whole_life(backend: ChildBackend, door: Door) -> None:
    """A model is deployed, serves, is unaffected by a second model and a new controller, and is removed."""
    first, second = sim("first", door, aliases=("one",)), sim("second", door)
    async with controlling(backend, door, first) as controller:
        entry = await in_state(door, "first", ModelState.READY)
        assert (entry.replicas, entry.replicas_desired, entry.aliases) == (1, 1, ("one",))
        link = await door.worker("first")
        assert len(await greedy(link, [1, 2, 3], 5)) == 5
        incarnation = link.identity.incarnation
        controller.models.want([first, second])
        await in_state(door, "second", ModelState.READY)
        assert (await door.worker("first")).identity.incarnation == incarnation
    renamed = dataclasses.replace(first, spec=dataclasses.replace(first.spec, aliases=("uno",)))
    async with controlling(backend, door, renamed, second) as successor:
        await eventually(lambda: "first" in door.entries and door.entries["first"].aliases == ("uno",), "it is renamed")
        await in_state(door, "first", ModelState.READY)
        await successor.step()
        assert (await door.worker("first")).identity.incarnation == incarnation, "an unchanged replica was restarted"
        successor.models.want([renamed])
        await eventually(lambda: "second" not in door.entries, "the removed model is gone from the catalog")
        assert (await door.worker("first")).identity.incarnation == incarnation
        changed = dataclasses.replace(first, spec=dataclasses.replace(first.spec, version="v2"))
        successor.models.want([changed])
        made_anew = await door.worker("first", but=incarnation)
        assert made_anew.identity.version == "v2"
    await removed(backend, "first")


@pytest.mark.thorough
async def test_scaling_touches_no_other_replica(backend: ChildBackend, door: Door) -> None:
    """Scaling up adds a replica and leaves the running replica alone."""
    async with controlling(backend, door, sim("scaled", door)) as controller:
        incarnation = (await door.worker("scaled")).identity.incarnation
        controller.models.want([sim("scaled", door, min_replicas=2, max_replicas=2)])
        await eventually(lambda: len(door.hub.links) == 2, "two workers have dialled in")
        assert incarnation in {link.identity.incarnation for link in door.hub.links}
    await removed(backend, "scaled")


@pytest.mark.thorough
async def test_refused_model_says_why(backend: ChildBackend, door: Door) -> None:
    """A model with an invalid source is FAILED with the reason, and a corrected entry starts the model."""
    bad = dataclasses.replace(sim("broken", door), spec=ModelSpec(name="broken", source="sim://?vocab=10&speed=9"))
    async with controlling(backend, door, bad) as controller:
        entry = await in_state(door, "broken", ModelState.FAILED)
        assert "'speed' is no parameter of a simulated engine" in entry.state_reason
        snapshot = await settled(backend, lambda s: apps_of(s, "broken")[0].gave_up, "Serve stops trying")
        assert apps_of(snapshot, "broken")[0].refused
        controller.models.want([sim("broken", door)])
        await in_state(door, "broken", ModelState.READY)
    await removed(backend, "broken")


@pytest.mark.thorough
async def test_unplaceable_model_says_why(backend: ChildBackend, door: Door) -> None:
    """A model whose placement group fits no node is FAILED with the reason."""
    big = ReplicaSettings(ModelSpec(name="big", source="/models/big", tensor_parallel_size=65), "test")
    async with controlling(backend, door, big):
        entry = await in_state(door, "big", ModelState.FAILED)
        assert "cannot be placed: needs 65 GPUs and 1 CPU on one node" in entry.state_reason
    await removed(backend, "big")


async def test_dead_engine_ends_its_replica_and_a_new_one_serves(
    backend: ChildBackend, door: Door, tmp_path: Path
) -> None:
    """A dead engine ends the replica's process, and a new replica serves within seconds.

    HEADRACE_LOG_COPY in the replica's environment names a file. Every line that the replica has logged until its
    end is also in this file, with the pod and the node.
    """
    copied = tmp_path / "container"
    copied.touch()
    dying = ReplicaSettings(
        ModelSpec(name="dying", source="sim://?vocab=1000&decode_ms=1&fault=die@step:24"),
        "test",
        (door.address,),
        environment={"HEADRACE_LOG_COPY": str(copied), "POD_NAME": "gpu-0", "NODE_NAME": "ip-10-0-3-7"},
    )
    async with controlling(backend, door, dying):
        link = await door.worker("dying")
        with pytest.raises(AssertionError, match="lost"):
            await greedy(link, [1, 2, 3], 50)
        successor = await door.worker("dying", but=link.identity.incarnation, timeout_s=240.0)
        assert len(await greedy(successor, [1, 2, 3], 2)) == 2
    await removed(backend, "dying")
    lines = [json.loads(line) for line in copied.read_text().splitlines()]
    assert all((line["pod"], line["node"]) == ("gpu-0", "ip-10-0-3-7") for line in lines)
    events = {line["event"] for line in lines if line["worker"] == link.identity.worker_id}
    assert {"worker.engine_started", "worker.ready", "link.connected", "worker.engine_dead"} <= events


FOREIGN = """
import json, sys
import ray
from ray import serve
ray.init(address=sys.argv[1], log_to_driver=False)
@serve.deployment
class Theirs:
    def pid(self):
        import os
        return os.getpid()
if sys.argv[2] == "run":
    handle = serve.run(Theirs.bind(), name="theirs", route_prefix=None)
else:
    handle = serve.get_app_handle("theirs")
print(json.dumps(handle.pid.remote().result()))
if sys.argv[2] == "end":
    serve.delete("theirs")
"""


@pytest.mark.thorough
async def test_foreign_application_is_left_alone(backend: ChildBackend, door: Door, local_ray: LocalRay) -> None:
    """Another owner's application on the same Ray keeps the same replica while a model of this cluster is deployed and
    removed."""
    await backend.observe()

    async def theirs(what: str) -> int:
        out = await asyncio.to_thread(
            subprocess.check_output,
            [sys.executable, "-c", FOREIGN, local_ray.address, what],
            env={**local_ray.environment(), "PATH": "/usr/bin:/bin"},
            stderr=subprocess.DEVNULL,
        )
        return int(json.loads(out.splitlines()[-1]))

    async with controlling(backend, door, sim("ours", door)) as controller:
        await in_state(door, "ours", ModelState.READY)
        pid = await theirs("run")
        assert [seen.model for seen in (await backend.observe()).apps.values()] == ["ours"]
        controller.models.want([])
        await settled(backend, lambda s: not s.apps, "ours is gone")
        assert await theirs("end") == pid
