"""The class that cpu_platform.plugin names; apart from it because importing vLLM's platform resolves the platform."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class LogicalGpuCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """CPU kernels on devices that Ray counts as GPUs."""

    ray_device_key: str = "GPU"
