"""The platform plugin is active only if it is selected."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cluster.worker.engine.vllm.cpu import platform


def test_says_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the environment variable LOGICAL_GPUS, the plugin returns None, and vLLM chooses its platform itself."""
    monkeypatch.delenv(platform.LOGICAL_GPUS, raising=False)
    assert platform.plugin() is None


@pytest.mark.engine
@pytest.mark.parametrize(("asked", "expected"), [("1", "LogicalGpuCpuPlatform GPU"), ("", "CpuPlatform ")])
def test_vllm_takes_the_platform(asked: str, expected: str) -> None:
    """If Headrace's CPU platform is selected, vLLM uses it in a new process. Its Ray device key is `GPU`.

    Otherwise vLLM uses its own CPU platform.
    """
    code = "from vllm.platforms import current_platform as p; print(type(p).__name__, p.ray_device_key, p.is_cpu())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, platform.LOGICAL_GPUS: asked},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == f"{expected} True"
