"""An executor for vLLM's engine core that emits prepared tokens and computes nothing.

It is used to compare vLLM's server with Headrace. Both servers are started with the engine argument
`distributed_executor_backend`, which selects this executor. Only the executor is replaced: the engine core, its
scheduler and everything in front of them are real. Headrace's worker also gets the environment variables in IN_CORE,
without which a worker on CPUs uses another executor. On both sides the core is a separate process, and each side uses
its own client of the core.

A step takes STEP_MS milliseconds. A script is a prepared answer (scripted.py). Each prompt contains the mark of a
script, and the request gets the tokens of that script. If there are no scripts, each token is PLAIN_TOKEN, until
max_tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import torch
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import ModelRunnerOutput

from loadtests.agents.scripted import ScheduledRequest, Scripts
from loadtests.agents.scripted_settings import PLAIN_TOKEN, SCRIPTS, STEP_MS

BLOCKS: Final = 1 << 14
"""Number of KV blocks that the scheduler manages. No memory is behind them."""


class ScriptedExecutor(Executor):  # type: ignore[misc]
    """A vLLM executor that starts no worker processes, computes nothing and returns scripted tokens."""

    def _init_executor(self) -> None:
        path = os.environ.get(SCRIPTS, "")
        self._scripts = Scripts.read(Path(self.model_config.model), Path(path)) if path else None
        self._step_s = float(os.environ.get(STEP_MS, "0")) / 1000
        self._due_s = 0.0
        self._running: dict[str, ScheduledRequest] = {}

    def collective_rpc(self, method: Any, *_: Any, non_block: bool = False, **__: Any) -> Any:
        """Ignore the requested method and return `[None]`, the result of an executor with one rank. With `non_block`,
        return a completed future of this list."""
        if not non_block:
            return [None]
        done: Future[Any] = Future()
        done.set_result([None])
        return done

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        """vLLM's tasks of this model: only `generate`."""
        return ("generate",)

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """Return one layout. Which one is irrelevant, because no cache is allocated."""
        return [["LBNHC"]]

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """Return the cache specification of one attention layer with the smallest head size."""
        self._spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        return [{"layer": self._spec}]

    def determine_available_memory(self) -> list[int]:
        """Return the size of BLOCKS blocks, in bytes."""
        return [BLOCKS * self._spec.page_size_bytes]

    def compile_or_warm_up_model(self) -> None:
        """Do nothing: there is no model."""

    def take_draft_token_ids(self) -> None:
        """Return no drafts."""

    def check_health(self) -> None:
        """Do nothing: there is no rank."""

    def shutdown(self) -> None:
        """Do nothing: there is no rank."""

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Return the next token of every request whose prompt is computed."""
        for key in scheduler_output.finished_req_ids:
            self._running.pop(key, None)
        for new in scheduler_output.scheduled_new_reqs:
            self._running[new.req_id] = request_of(new, self._scripts)
        scheduled: Mapping[str, int] = scheduler_output.num_scheduled_tokens
        tokens = [self._running[key].tokens(count) for key, count in scheduled.items()]
        output = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={key: i for i, key in enumerate(scheduled)},
            sampled_token_ids=tokens,
        )
        if scheduled:
            self._wait()
        if not non_block:
            return output
        done: Future[Any] = Future()
        done.set_result(output)
        return done

    def _wait(self) -> None:
        """Wait for the end of the step."""
        now = time.monotonic()
        self._due_s = max(self._due_s, now - self._step_s) + self._step_s
        if self._due_s > now:
            time.sleep(self._due_s - now)


def request_of(new: Any, scripts: Scripts | None) -> ScheduledRequest:
    """Convert vLLM's NewRequestData to a ScheduledRequest."""
    prompt = new.prompt_token_ids
    tokens = repeat(PLAIN_TOKEN) if scripts is None else iter(scripts.answers[scripts.key(prompt)])
    return ScheduledRequest(len(prompt) - new.num_computed_tokens, tokens)
