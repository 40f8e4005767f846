"""Tests of placement groups, and of the reasons why a group cannot be placed or must not be used."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.types import ModelSpec
from cluster.policy.catalog.placement import placement, why_split, why_unplaceable

ONE_GPU = {"CPU": 8.0, "GPU": 1.0}
TWO_GPUS = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}


def spec(tensor: int = 1, pipeline: int = 1, *, gpu: str = "", spread: bool = False) -> ModelSpec:
    """Return the spec of a model with these tensor-parallel and pipeline-parallel sizes. `spread`: whether a
    tensor-parallel group may span nodes."""
    return ModelSpec(
        name="m",
        source="/m",
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        gpu=gpu,
        allow_cross_node_tensor_parallel=spread,
    )


def test_one_gpu_shares_its_bundle_with_the_replica() -> None:
    """The placement group of a replica with a single GPU has one bundle, because the engine runs in the replica's
    processes."""
    where = placement(spec())
    assert where.bundles == ({"CPU": 1.0, "GPU": 1.0},)
    assert (where.strategy, where.replica_cpus, where.replica_gpus) == ("STRICT_PACK", 1.0, 1.0)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "spread", "strategy"),
    [(2, 1, False, "STRICT_PACK"), (2, 1, True, "PACK"), (1, 2, False, "PACK"), (4, 2, False, "PACK")],
)
def test_larger_worlds(tensor: int, pipeline: int, spread: bool, strategy: str) -> None:
    """The placement group of a replica with several GPUs has a bundle with a CPU first, then one bundle for each
    GPU.

    The group may spread over several nodes only with pipeline parallelism, or if the catalog entry allows it.
    """
    where = placement(spec(tensor, pipeline, spread=spread))
    assert where.bundles == ({"CPU": 1.0}, *[{"GPU": 1.0}] * (tensor * pipeline))
    assert (where.strategy, where.replica_gpus) == (strategy, 0.0)


def test_gpu_type_is_asked_for_on_every_gpu_bundle() -> None:
    """With the key `gpu: H100`, every GPU bundle requests a fraction of the resource that stands for this GPU type."""
    assert placement(spec(2, gpu="H100")).bundles[1:] == ({"GPU": 1.0, "accelerator_type:H100": 0.001},) * 2


def test_simulated_engine_needs_no_gpu() -> None:
    """A simulated replica needs no GPU. It needs so little CPU that any number of replicas fits on a laptop."""
    assert placement(ModelSpec(name="s", source="sim:///m", tensor_parallel_size=8)).bundles == ({"CPU": 0.05},)


@pytest.mark.parametrize(
    ("model", "nodes", "part"),
    [
        (spec(2), [ONE_GPU, ONE_GPU], "needs 2 GPUs and 1 CPU on one node, and the largest has 1 GPU and 8 CPUs"),
        (spec(2), [ONE_GPU, ONE_GPU], "set allow_cross_node_tensor_parallel: true"),
        (spec(4, spread=True), [ONE_GPU, TWO_GPUS], "needs 4 GPUs and 1 CPU over all nodes, and they have 3 GPUs"),
        (spec(1, gpu="A100"), [TWO_GPUS], "needs 1 GPU of type A100 and 1 CPU on one node, and the largest has 2 GPUs"),
        (spec(1), [], "Ray has no node"),
    ],
)
def test_what_cannot_be_placed_says_what_it_needs(model: ModelSpec, nodes: list[dict[str, float]], part: str) -> None:
    """The reason why a model cannot be placed names the required and the available resources, and a remedy if there is
    one."""
    assert part in why_unplaceable(model, nodes)


@pytest.mark.parametrize(
    ("model", "nodes"),
    [
        (spec(), [ONE_GPU]),
        (spec(2), [ONE_GPU, TWO_GPUS]),
        (spec(2, spread=True), [ONE_GPU, ONE_GPU]),
        (spec(2, gpu="H100"), [TWO_GPUS]),
    ],
)
def test_what_can_be_placed(model: ModelSpec, nodes: list[dict[str, float]]) -> None:
    """`why_unplaceable` returns no reason for a model that can be placed on the nodes."""
    assert why_unplaceable(model, nodes) == ""


def test_split_tensor_parallel_group_is_refused() -> None:
    """A pipeline may run over two nodes as long as each tensor-parallel group stays on one node."""
    assert why_split(spec(2, 2), ["b", "a", "b", "a"], "b") == ""
    assert "ranks 0 to 1, a tensor-parallel group, lie on 2 nodes" in why_split(spec(2, 2), ["b", "a", "a", "a"], "b")
    assert why_split(spec(2, 2, spread=True), ["b", "a", "a", "a"], "b") == ""
    assert why_split(spec(1, 2), ["a", "b"], "a") == ""


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6),
    st.sampled_from("abc"),
    st.integers(1, 3),
)
def test_split_agrees_with_counting(nodes: list[str], driver: str, tensor: int) -> None:
    """A placement is accepted if and only if every node holds whole tensor-parallel groups."""
    nodes = nodes * tensor  # as many ranks as whole groups need
    counts = {node: nodes.count(node) for node in nodes}
    # the counts of consecutive nodes add up to group borders only if each count is a multiple of the group size
    whole = all(count % tensor == 0 for count in counts.values())
    assert (why_split(spec(tensor, len(nodes) // tensor), nodes, driver) == "") == whole
