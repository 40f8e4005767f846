"""vLLM's CPU platform, with Ray's logical GPUs as its devices: tensor parallelism over Ray on machines without GPUs.

vLLM's Ray executor refuses the CPU platform only because that names no Ray resource. With nodes started with
logical GPUs (`ray start --num-gpus`) the same placement groups, executor and code run as on GPUs.
"""

from __future__ import annotations

import os

LOGICAL_GPUS = "HEADRACE_LOGICAL_GPUS"
"""Environment: "1" asks for this platform. The replica sets it when its Ray has GPUs and the machine has none."""

QUALIFIED_NAME = "cluster.worker.engine.vllm.cpu.platform_class.LogicalGpuCpuPlatform"


def plugin() -> str | None:
    """Entry point of group vllm.platform_plugins: None, so that vLLM chooses, unless asked for on a CPU build."""
    if os.environ.get(LOGICAL_GPUS) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin

    return QUALIFIED_NAME if cpu_platform_plugin() else None
