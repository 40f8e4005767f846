"""Tests of the inputs of a scaling pass, sorted by model."""

from __future__ import annotations

from cluster.api.types import ModelSpec
from cluster.policy.scaling.inputs import OperatorRequest, RayReplicas, WorkerSeen, inputs_by_model


def test_inputs_are_sorted_by_model_and_type_of_gpu() -> None:
    """Replicas and workers of an unknown GPU type are assigned to their model's first type. Replicas and workers of an
    unknown model are left out."""
    specs = [ModelSpec("m", "/m", gpu="A"), ModelSpec("n", "/n"), ModelSpec("m", "/m", gpu="B")]
    workers = [WorkerSeen(f"{model}{gpu}", "1", model, gpu=gpu) for model, gpu in ("mA", "mB", "mZ", "nZ", "oA")]
    rays = {("m", "A"): RayReplicas(1, 1), ("m", "Z"): RayReplicas(2, 0, 1, 3), ("o", "A"): RayReplicas(9)}
    inputs = inputs_by_model(specs, rays, workers, {("m", "B"): 4, ("o", "A"): 1})
    assert list(inputs) == ["m", "n"]
    assert inputs["m"].types == (specs[0], specs[2])
    assert inputs["m"].rays == {"A": RayReplicas(3, 1, 1, 3)}
    assert {gpu: [w.worker_id for w in of_type] for gpu, of_type in inputs["m"].workers.items()} == {
        "A": ["mA", "mZ"],
        "B": ["mB"],
    }
    assert (inputs["m"].room, inputs["n"].room) == ({"B": 4}, {})
    assert [worker.worker_id for worker in inputs["n"].workers[""]] == ["nZ"]


def test_frozen_models() -> None:
    """An operator can freeze one model by its name, or all models at once."""
    one, everything = OperatorRequest(frozen=frozenset({"m"})), OperatorRequest(all_frozen=True)
    assert [request.is_frozen(name) for request in (one, everything) for name in "mn"] == [True, False, True, True]
