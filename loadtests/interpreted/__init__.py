"""Environment of processes that run vLLM's V2 model runner on CPUs. The runner's Triton kernels are interpreted, with
the stub package `v2stub`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRITON = ROOT / ".triton"
"""Folder in which `make triton` installs Triton. The folder is outside the engine's environment, since vLLM would try
to use a Triton inside it.
"""


def environment(*, v2: bool = True) -> Mapping[str, str]:
    """Return environment variables for a process and its descendants. They enable asynchronous scheduling, and select
    vLLM's V2 model runner, or the V1 model runner if `v2` is false."""
    path = [str(TRITON), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    runner = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"} if v2 else {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, path if v2 else path[1:])), "HEADRACE_TEST_ASYNC": "1", **runner}
