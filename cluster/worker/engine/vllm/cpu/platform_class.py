"""The class of the CPU platform. platform.py returns the name of this class to vLLM.

The class has its own module, since the import of vLLM's platform class makes vLLM choose a platform.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class LogicalGpuCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform with devices that Ray counts as GPUs."""

    ray_device_key: str = "GPU"
