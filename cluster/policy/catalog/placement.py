"""Placement of a replica's processes on nodes: the Ray placement group to request, and checks before and after Ray
places the group. Pure.

A placement group is a list of bundles; each bundle is a set of resources on one node. A replica with one GPU has one
bundle, because the engine runs in the replica's process tree and must see the GPU. A larger replica has one CPU bundle
for the replica itself and one bundle for each GPU, because vLLM rejects bundles of several GPUs.

All bundles of a group are placed on one node. With pipeline parallelism or `allow_cross_node_tensor_parallel`, several
nodes are allowed. On machines without GPUs, the groups are the same and use Ray's logical GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.api.types import ModelSpec

REPLICA_CPUS = 1.0
"""CPUs reserved for the front end and the engine core of a replica."""
SIMULATED_CPUS = 0.05
"""CPUs reserved for a simulated engine. The number is so low that a laptop holds any number of simulated engines."""
ACCELERATOR_SHARE = 0.001
"""Fraction of the resource `accelerator_type:X` that a GPU bundle requests.

Ray gives each node with GPUs of type X one such resource, so any fraction places the bundle on such a node.
"""

Bundle = dict[str, float]


@dataclass(frozen=True, slots=True)
class Placement:
    """A placement group to request.

    The replica runs in the first bundle and uses `replica_cpus` CPUs and `replica_gpus` GPUs of that bundle.
    """

    bundles: tuple[Bundle, ...]
    strategy: str
    replica_cpus: float
    replica_gpus: float


def is_simulated(spec: ModelSpec) -> bool:
    """Whether the model's catalog entry names a simulated engine, which needs no GPU."""
    return spec.source.startswith("sim://")


def world_size(spec: ModelSpec) -> int:
    """Return the number of GPUs of one replica."""
    return spec.tensor_parallel_size * spec.pipeline_parallel_size


def may_spread(spec: ModelSpec) -> bool:
    """Whether the GPUs of one replica may be on several nodes."""
    return spec.pipeline_parallel_size > 1 or spec.allow_cross_node_tensor_parallel


def placement(spec: ModelSpec) -> Placement:
    """Return the placement group of one replica."""
    strategy = "PACK" if may_spread(spec) else "STRICT_PACK"
    if is_simulated(spec):
        return Placement(({"CPU": SIMULATED_CPUS},), strategy, SIMULATED_CPUS, 0.0)
    gpu: Bundle = {"GPU": 1.0}
    if spec.gpu:
        gpu[f"accelerator_type:{spec.gpu}"] = ACCELERATOR_SHARE
    if world_size(spec) == 1:
        return Placement(({"CPU": REPLICA_CPUS, **gpu},), strategy, REPLICA_CPUS, 1.0)
    bundles = ({"CPU": REPLICA_CPUS}, *(dict(gpu) for _ in range(world_size(spec))))
    return Placement(bundles, strategy, REPLICA_CPUS, 0.0)


def why_unplaceable(spec: ModelSpec, nodes: Sequence[Mapping[str, float]]) -> str:
    """Return the reason why these nodes cannot hold one replica even while all of them are idle; "" if they can.

    `nodes` has the total resources of each node. If the replica's placement group may use several nodes, its
    bundles are placed one after the other, on the node with the most GPUs first. This greedy choice is exact,
    because all GPU bundles of a group are alike.
    """
    if not nodes:
        return "cannot be placed: Ray has no node"
    wanted = placement(spec)
    need = _total(wanted.bundles)
    if wanted.strategy == "STRICT_PACK":
        if any(_fits(need, node) for node in nodes):
            return ""
        return _strict_reason(spec, need, nodes)
    free = [dict(node) for node in nodes]
    free.sort(key=lambda node: -node.get("GPU", 0.0))
    for bundle in wanted.bundles:
        chosen = next((node for node in free if _fits(bundle, node)), None)
        if chosen is None:
            have = _say(_total(nodes), need)
            return f"cannot be placed: needs {_say(need, need)} over all nodes, and they have {have} in all"
        for name, amount in bundle.items():
            chosen[name] -= amount
    return ""


def capacity(
    spec: ModelSpec, nodes: Sequence[Mapping[str, float]], others: Sequence[tuple[ModelSpec, int]] = ()
) -> int:
    """Estimate how many replicas fit on the GPUs of the type in `spec`.

    `others`: other models with their numbers of replicas. The GPUs of a model are subtracted only if its `gpu` equals
    `spec.gpu`. So if `spec` names a type, models that accept any type are assumed to run elsewhere. Fragmentation of
    GPUs over nodes is ignored.
    """
    if is_simulated(spec):
        return 1_000_000
    mark = f"accelerator_type:{spec.gpu}"
    gpus = sum(node.get("GPU", 0.0) for node in nodes if not spec.gpu or mark in node)
    used = sum(world_size(o) * count for o, count in others if o.gpu == spec.gpu and not is_simulated(o))
    return max(int((gpus - used) // world_size(spec)), 0)


def _strict_reason(spec: ModelSpec, need: Bundle, nodes: Sequence[Mapping[str, float]]) -> str:
    most = max(nodes, key=lambda node: (_fits({k: v for k, v in need.items() if ":" in k}, node), node.get("GPU", 0.0)))
    reason = f"cannot be placed: needs {_say(need, need)} on one node, and the largest has {_say(most, need)}"
    if spec.tensor_parallel_size > 1:
        reason += (
            "; add such a node, lower tensor_parallel_size, or set allow_cross_node_tensor_parallel: true "
            "where the nodes' network is fast enough"
        )
    return reason


def why_split(spec: ModelSpec, gpu_nodes: Sequence[str], driver_node: str) -> str:
    """Return the reason why a replica must not start on the nodes that Ray chose; "" if it may start.

    A tensor-parallel group must lie on one node, except with `allow_cross_node_tensor_parallel`. Every
    `tensor_parallel_size` consecutive ranks form such a group. vLLM orders ranks by node: the node of the driver first,
    then by node id. `gpu_nodes`: the nodes of the GPU bundles, in the order of the bundles.
    """
    if spec.allow_cross_node_tensor_parallel or spec.tensor_parallel_size == 1:
        return ""
    ranks = sorted(gpu_nodes, key=lambda node: (node != driver_node, node))
    size = spec.tensor_parallel_size
    for start in range(0, len(ranks), size):
        group = ranks[start : start + size]
        if len(set(group)) > 1:
            return (
                f"ranks {start} to {start + size - 1}, a tensor-parallel group, lie on {len(set(group))} nodes: "
                "set allow_cross_node_tensor_parallel: true if the nodes' network is fast enough, "
                "or lower tensor_parallel_size to what one node holds"
            )
    return ""


def _total(bundles: Sequence[Mapping[str, float]]) -> Bundle:
    total: Bundle = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _fits(need: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in need.items())


def _say(have: Mapping[str, float], need: Mapping[str, float]) -> str:
    """Return the resources `have` as text, for example `2 GPUs of type H100 and 1 CPU`.

    GPUs and their type are named only if `need` contains them.
    """
    types = [name.split(":", 1)[1] for name in need if name.startswith("accelerator_type:")]
    kind = f" of type {types[0]}" if types and f"accelerator_type:{types[0]}" in have else ""
    parts = []
    if "GPU" in need:
        gpus = have.get("GPU", 0.0)
        parts.append(f"{gpus:g} GPU{'' if gpus == 1 else 's'}{kind}")
    cpus = have.get("CPU", 0.0)
    parts.append(f"{cpus:g} CPU{'' if cpus == 1 else 's'}")
    return " and ".join(parts)
