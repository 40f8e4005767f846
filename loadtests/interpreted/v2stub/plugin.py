"""Changes to vLLM without which its processes cannot run kernels in Triton's interpreter: a replaced kernel, and
asynchronous scheduling on CPUs."""

from __future__ import annotations

import functools
import os
from typing import Any

ASYNC = "HEADRACE_TEST_ASYNC"
"""Name of an environment variable. 1 enables asynchronous scheduling, which vLLM's CPU platform
otherwise switches off.
"""


def apply() -> None:
    """Apply the two changes to vLLM: replace the kernel that the interpreter cannot run, and enable asynchronous
    scheduling. vLLM calls this function as a plugin (vllm.general_plugins). Idempotent."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        _replace_top_k_top_p()
    _schedule_asynchronously()


def _replace_top_k_top_p() -> None:
    """Replace a kernel by its PyTorch form. The interpreter cannot run the kernel, because the kernel calls `to` on a
    Python int. The kernel keeps no state, and both forms compute the same function."""
    from vllm.v1.sample.ops import topk_topp_sampler

    def apply_top_k_top_p_triton(logits: Any, k: Any, p: Any, **_: Any) -> Any:
        return topk_topp_sampler.apply_top_k_top_p_pytorch(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p_triton = apply_top_k_top_p_triton


def _schedule_asynchronously() -> None:
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.__dict__["check_and_update_config"].__func__
    if getattr(check, "asynchronous", False):
        return

    @functools.wraps(check)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        if os.environ.get(ASYNC) == "1":
            vllm_config.scheduler_config.async_scheduling = True

    check_and_update_config.asynchronous = True  # type: ignore[attr-defined]
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
