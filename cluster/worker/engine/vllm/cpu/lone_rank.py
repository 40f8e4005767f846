"""A model with one rank on CPUs computes in its engine core's own process, as vLLM has it on GPUs.

Problem: vLLM's CPU platform gives even a single rank a process of its own, because the threads of its kernels are bound
to CPUs by variables that libgomp reads when a program begins. That costs a process of some hundred megabytes, its
start, and at each step a way there and back over shared memory on which the rank spins. Here the core's process begins
with those variables instead. Where threads are bound it is therefore a new interpreter, no fork of a server
(fork_server.py).

`HEADRACE_ENGINE_RANK=process` leaves it as vLLM has it.
Source: vLLM's CpuPlatform.check_and_update_config and MultiprocExecutor.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from cluster.worker.engine.vllm.private_names import missing

RANK = "HEADRACE_ENGINE_RANK"
"""Environment: `core` (where it is not set) or `process`."""
SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.utils.ompmultiprocessing.OMPProcessManager": ("config",),
    "vllm.utils.ompmultiprocessing.OMPProcessManager.configure_omp_envs": ("rank", "local_rank"),
    "vllm.v1.executor.uniproc_executor.UniProcExecutor": (),
}


def settle(config: Any) -> bool:
    """Put the rank into the core's process, where that is right for this engine; whether it is there. Raises ValueError
    for an unknown word."""
    word = os.environ.get(RANK, "")
    if word not in ("", "core", "process"):
        raise ValueError(f"{RANK}={word!r}: use core or process, or leave it out")
    parallel, on_cpu = config.parallel_config, config.device_config.device_type == "cpu"
    if word == "process" or not on_cpu or parallel.world_size_across_dp != 1 or missing(SYMBOLS):
        return False
    parallel.distributed_executor_backend = "uni"
    return True


def environment(config: Any) -> contextlib.AbstractContextManager[None]:
    """While this is entered, processes begin with what binds the threads of the engine's kernels."""
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    bound: contextlib.AbstractContextManager[None] = OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0)
    return bound
