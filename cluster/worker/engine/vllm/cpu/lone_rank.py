"""Placement of a single CPU rank in the engine core's process, where vLLM also places a single GPU rank.

Problem: vLLM's CPU platform gives even a single rank its own process, because the kernels' threads are bound to CPUs by
environment variables that libgomp reads when a program starts. The extra process costs some hundred megabytes, the time
of its start, and in each step a round trip over shared memory, during which the rank spins. So the core's process is
started with these variables and runs the rank itself. If the variables bind threads, the core must be a new interpreter
and not a fork (fork_server.py).

`HEADRACE_ENGINE_RANK=process` keeps vLLM's behaviour. Source: vLLM's CpuPlatform.check_and_update_config and
MultiprocExecutor.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from cluster.worker.engine.vllm.private_names import missing

RANK = "HEADRACE_ENGINE_RANK"
"""Environment variable: `core` (the default) or `process`."""
SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.utils.ompmultiprocessing.OMPProcessManager": ("config",),
    "vllm.utils.ompmultiprocessing.OMPProcessManager.configure_omp_envs": ("rank", "local_rank"),
    "vllm.v1.executor.uniproc_executor.UniProcExecutor": (),
}


def settle(config: Any) -> bool:
    """Change vLLM's config so that an engine with a single CPU rank runs this rank in the engine core's process.
    Returns False, without a change, if the config does not allow it or HEADRACE_ENGINE_RANK is `process`.

    Raises ValueError for an invalid value of HEADRACE_ENGINE_RANK.
    """
    word = os.environ.get(RANK, "")
    if word not in ("", "core", "process"):
        raise ValueError(f"{RANK}={word!r}: use core or process, or leave it unset")
    parallel, on_cpu = config.parallel_config, config.device_config.device_type == "cpu"
    if word == "process" or not on_cpu or parallel.world_size_across_dp != 1 or missing(SYMBOLS):
        return False
    parallel.distributed_executor_backend = "uni"
    return True


def environment(config: Any) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that sets the environment variables by which libgomp binds the kernels' threads.

    Processes that start while the context is open inherit these variables.
    """
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    bound: contextlib.AbstractContextManager[None] = OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0)
    return bound
