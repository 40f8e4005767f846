"""The gauges that a controller exports."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from cluster.controller.gauges import ray_samples
from cluster.ray.backend import RayAway
from cluster.ray.several_clusters import MultiClusterBackend
from tests.controller.test_controller import FakeGateways, controller, settings
from tests.support.fake_ray import FakeRay
from tests.support.serving import eventually


async def test_each_ray_cluster_has_a_value() -> None:
    """The gauge of a Ray cluster is 1 if this cluster answers and 0 if it does not, whether or not the other Ray
    clusters answer. Before the controller's first pass, the gauge has no value."""
    blue, green = FakeRay(), FakeRay(away="gone")
    backend = MultiClusterBackend({"blue": blue, "green": green})
    loop = controller(backend, FakeGateways(), dataclasses.replace(settings("m"), ray_cluster="blue"))
    assert list(ray_samples(backend, loop)) == []
    await loop.step()
    assert set(ray_samples(backend, loop)) == {("ray_up", ("blue",), 1.0), ("ray_up", ("green",), 0.0)}
    blue.away, green.away = "gone", ""
    with contextlib.suppress(RayAway):
        await loop.step()
    assert set(ray_samples(backend, loop)) == {("ray_up", ("blue",), 0.0), ("ray_up", ("green",), 1.0)}
    green.away = "gone too"
    with contextlib.suppress(RayAway):
        await loop.step()
    assert set(ray_samples(backend, loop)) == {("ray_up", ("blue",), 0.0), ("ray_up", ("green",), 0.0)}


async def test_the_local_ray_has_a_value() -> None:
    """For the Ray that `headrace up` starts, the metric `ray_up` has the label value `local`. It is 1 if Ray answered
    in the controller's last pass, and 0 if it did not. Before the first pass there is no value."""
    ray = FakeRay()
    loop = controller(ray, FakeGateways(), settings("m"))
    assert list(ray_samples(ray, loop)) == []
    running = asyncio.create_task(loop.run())
    try:
        await eventually(lambda: list(ray_samples(ray, loop)) == [("ray_up", ("local",), 1.0)], "Ray answers")
        ray.away = "gone"
        await eventually(lambda: list(ray_samples(ray, loop)) == [("ray_up", ("local",), 0.0)], "Ray does not answer")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
