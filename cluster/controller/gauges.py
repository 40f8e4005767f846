"""The gauges of a controller, computed at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.controller.controller import LOCAL_RAY, Controller
from cluster.observe.metrics import Sample
from cluster.ray.backend import Backend
from cluster.ray.several_clusters import MultiClusterBackend


def ray_samples(backend: Backend, controller: Controller) -> Iterator[Sample]:
    """Yield one sample for each Ray cluster: 1 if the cluster answers, else 0. A cluster that has not been observed yet
    has no sample."""
    if isinstance(backend, MultiClusterBackend):
        for name, answers in backend.answers().items():
            yield "ray_up", (name,), float(answers)
    elif controller.ray_answers is not None:
        yield "ray_up", (LOCAL_RAY,), float(controller.ray_answers)
