"""Which divisions of a model among GPUs leave room for its KV cache, and for how many calls.

vLLM measures at each start what is left of `gpu_memory_utilization` after weights and one step of the greatest size.
Before a start, the memory of that step is estimated: the allowance ACTIVATIONS of numbers a token, the logits in 32
bits, and CONTEXT_BYTES for the driver, NCCL and CUDA graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cluster.policy.capacity.cache_size import CacheSize
from cluster.policy.capacity.gpus import GIB, Gpu

UTILIZATION: Final = 0.92
"""Default of vLLM's `gpu_memory_utilization`."""
CONTEXT_BYTES: Final = int(1.2 * GIB)
ACTIVATIONS: Final = 8
"""Numbers of 16 bits for each token and unit of the hidden size in a step, over all ranks."""
MLP_ACTIVATIONS: Final = 3
"""Numbers of 16 bits for each token and unit of the MLP's width in a step, divided among ranks."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes. `weights`: bytes of all weights. `layers`: number of layers. `heads`: number of query heads.
    `mlp`: width of the MLP, of all experts that a token uses."""

    weights: int
    cache: CacheSize
    layers: int
    heads: int
    hidden: int
    mlp: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Engine:
    """The settings of an engine that matter for its memory."""

    tp: int = 1
    pp: int = 1
    utilization: float = UTILIZATION
    step_tokens: int = 0
    """`max_num_batched_tokens`; 0 for vLLM's default on the GPU."""
    sequences: int = 0
    """`max_num_seqs`; 0 for vLLM's default on the GPU."""
    cache_bytes: int | None = None
    """`kv_cache_memory_bytes` of a rank; None to take what is left."""
    block_size: int = 16
    """Tokens of a block of the KV cache."""
    offloaded: int = 0
    """Bytes of weights of a rank that the host's memory holds (`cpu_offload_gb`)."""


@dataclass(frozen=True, slots=True)
class Fit:
    """The fit of a model on the GPUs of one replica. Bytes are those of one GPU.

    `room`: bytes for the KV cache; negative if weights and reserve alone take too much. `call`: bytes of one call of
    `context` tokens. `calls`: calls of this length at once.
    """

    gpu: Gpu
    engine: Engine
    context: int
    weights: int
    reserve: int
    room: int
    call: int

    @property
    def calls(self) -> float:
        """Return how many calls of `context` tokens fit at once."""
        return max(0.0, self.room / self.call)

    @property
    def tokens(self) -> int:
        """Return how many tokens fit, in calls of `context` tokens."""
        return int(self.calls * self.context)

    @property
    def lacking(self) -> int:
        """Return the bytes that one call of `context` tokens lacks; 0 if it fits."""
        return max(0, self.call - self.room)

    @property
    def surely_lacking(self) -> int:
        """Return the bytes that weights and one call of `context` tokens lack even without the estimated reserve."""
        cache = self.call if self.engine.cache_bytes is None else self.engine.cache_bytes
        return max(
            self.weights + cache - int(self.gpu.memory * self.engine.utilization),
            0 if self.engine.cache_bytes is None else self.call - self.engine.cache_bytes,
            0,
        )

    @property
    def gpus(self) -> int:
        """Return the number of GPUs of a replica."""
        return self.engine.tp * self.engine.pp


def defaults(gpu: Gpu) -> tuple[int, int]:
    """Return vLLM's default `max_num_batched_tokens` and `max_num_seqs` on a GPU (vllm/engine/arg_utils.py)."""
    if gpu.memory >= 160 * GIB:
        return 16384, 1024
    if gpu.memory >= 70 * GIB and not gpu.name.startswith("A100"):
        return 8192, 1024
    return 2048, 256


def fit(shape: Shape, gpu: Gpu, engine: Engine, context: int) -> Fit:
    """Return how a model fits on the GPUs of one replica."""
    default_tokens, default_sequences = defaults(gpu)
    step_tokens, sequences = engine.step_tokens or default_tokens, engine.sequences or default_sequences
    ranks = engine.tp * engine.pp
    reserve = (
        CONTEXT_BYTES
        + step_tokens * 2 * (ACTIVATIONS * shape.hidden + MLP_ACTIVATIONS * shape.mlp // engine.tp)
        + min(sequences, step_tokens) * 4 * 2 * shape.vocabulary
    )
    weights = max(0, math.ceil(shape.weights / ranks) - engine.offloaded)
    left = int(gpu.memory * engine.utilization) - weights - reserve
    part = math.ceil(shape.layers / engine.pp) / shape.layers / min(engine.tp, shape.cache.heads)
    call = max(1, math.ceil(shape.cache.sequence_bytes(context, step_tokens, engine.block_size) * part))
    return Fit(gpu, engine, context, weights, reserve, left if engine.cache_bytes is None else engine.cache_bytes, call)


def divisions(shape: Shape, most_gpus: int, per_node: int = 8) -> Iterator[tuple[int, int]]:
    """Yield the tensor- and pipeline-parallel sizes that vLLM accepts for a model, with few GPUs first.

    Tensor parallelism stays within a node of `per_node` GPUs, and divides the query heads.
    """
    sizes = [tp for tp in range(1, per_node + 1) if not shape.heads % tp and _divides(tp, shape.cache.heads)]
    pairs = [(tp, pp) for tp in sizes for pp in range(1, most_gpus // tp + 1) if pp == 1 or tp == max(sizes)]
    yield from sorted(
        ((tp, pp) for tp, pp in pairs if pp <= shape.layers), key=lambda pair: (pair[0] * pair[1], -pair[0])
    )


def _divides(tp: int, heads: int) -> bool:
    return not heads % tp or not tp % heads


def replicas(fitting: Fit, concurrency: int) -> int:
    """Return how many replicas hold `concurrency` calls at once. Raises ValueError if not one call fits."""
    at_once = min(int(fitting.calls), fitting.engine.sequences or defaults(fitting.gpu)[1])
    if at_once < 1:
        raise ValueError("no call fits")
    return math.ceil(concurrency / at_once)


def best(fits: Sequence[Fit], concurrency: int) -> Fit | None:
    """Return the fit that holds `concurrency` calls on the fewest GPUs; of several, the one with the smallest replicas,
    whose loss costs least. None if nothing fits."""
    able = [one for one in fits if one.calls >= 1]

    return min(able, key=lambda one: (replicas(one, concurrency) * one.gpus, one.gpus), default=None)
