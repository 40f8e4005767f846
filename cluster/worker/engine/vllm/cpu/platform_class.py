"""The platform class named by platform.plugin; in its own module, since importing vLLM's resolves the platform."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class LogicalGpuCpuPlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, whose devices Ray counts as GPUs."""

    ray_device_key: str = "GPU"
