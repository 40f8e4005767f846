"""The class of the CPU platform. platform.py returns the name of this class to vLLM.

The class has its own module, because importing vLLM's platform class makes vLLM choose a platform.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class LogicalGpuCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, changed so that its devices are Ray's GPUs."""

    ray_device_key: str = "GPU"
