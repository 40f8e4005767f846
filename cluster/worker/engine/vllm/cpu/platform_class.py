"""The platform class that platform.plugin names.

The class has its own module, since importing vLLM's platform class resolves the platform.
"""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class LogicalGpuCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform with devices that Ray counts as GPUs."""

    ray_device_key: str = "GPU"
