"""vLLM's CPU platform with Ray's logical GPUs as devices. It allows tensor parallelism over Ray on machines without
GPUs.

vLLM's Ray executor refuses the CPU platform only because that platform names no Ray resource. On nodes started with
logical GPUs (`ray start --num-gpus`), placement groups and executor work with this platform as on GPUs.
"""

from __future__ import annotations

import os

LOGICAL_GPUS = "HEADRACE_LOGICAL_GPUS"
"""Environment variable: "1" selects this platform. The replica sets it if Ray has GPUs and the machine has none."""

QUALIFIED_NAME = "cluster.worker.engine.vllm.cpu.platform_class.LogicalGpuCpuPlatform"


def plugin() -> str | None:
    """Return the platform's class name if LOGICAL_GPUS selects the platform and the installed vLLM is a CPU build.

    Otherwise return None, so that vLLM chooses the platform. Entry point of group vllm.platform_plugins.
    """
    if os.environ.get(LOGICAL_GPUS) != "1":
        return None
    from vllm.platforms import cpu_platform_plugin

    return QUALIFIED_NAME if cpu_platform_plugin() else None
