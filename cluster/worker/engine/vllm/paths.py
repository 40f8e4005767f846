"""What the two ways to drive vLLM share: the records of live requests and the seam between them and the engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.api.types import TokenOutput
from cluster.worker.engine.processes import fork_server
from cluster.worker.engine.step_times import StepTimes

END_WITHIN_S = 1.0


@dataclass(slots=True)
class LiveRequest:
    """A request that vLLM holds."""

    prompt_tokens: int
    logprobs: int | None
    stop_token_ids: frozenset[int]
    grammar: bool
    emitted_tokens: int = 0
    """By another engine, before this one took the request."""
    first: bool = True
    """Until the path has made an output of it."""
    waits: bool = True
    """Until the engine has seen one: one look at the path may find several."""


@dataclass(slots=True)
class StepStats:
    """The scheduler's statistics of the last step, how many steps there were, and how long they take."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    live: int = 0
    prefill_tokens: int = 0
    """Of live requests without an output; with `live` kept by the engine."""
    pace: StepTimes = field(default_factory=StepTimes)

    def stepped(self, now: float, seen: Any) -> None:
        """A step has ended, with vLLM's SchedulerStats or None."""
        self.steps += 1
        if self.running or seen is None or seen.num_running_reqs:
            self.pace.step(now, goes_on=self.live > 0)
        elif self.live:
            self.pace.began(now)  # an empty turn of the engine core, while a grammar is compiled
        if seen is not None:
            self.running = seen.num_running_reqs
            self.waiting = seen.num_waiting_reqs + seen.num_skipped_waiting_reqs
            self.kv_usage = seen.kv_cache_usage


def end(client: Any, shutdown: Callable[..., None]) -> None:
    """Shut vLLM down, whose core `client` drives, and wait until the core's process is gone.

    On CPUs a core takes seconds to free, object by object, what the kernel frees with its process at once: there it is
    killed when it has not ended after a moment, and not after vLLM's own five seconds. On GPUs there is more to give
    back."""
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    processes = list(getattr(manager, "processes", ()))
    if fork_server.cpu_build() and "timeout" in inspect.signature(shutdown).parameters:
        shutdown(timeout=END_WITHIN_S)
    else:
        shutdown()
    for process in processes:
        process.join(END_WITHIN_S)  # vLLM leaves what it has killed a zombie


def core_exit(client: Any) -> int | None:
    """The exit code of the core's process that `client` drives; None while it runs."""
    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    codes = [process.exitcode for process in getattr(manager, "processes", ())]
    return next((code for code in codes if code is not None), None)


class EnginePath(Protocol):
    """One way to drive the engine core. Only `prepare` raises vLLM's own errors; a dead core is EngineDead."""

    stats: StepStats

    async def ready(self) -> None:
        """Finish what needs the event loop. Called once, before the first `prepare`."""

    def prepare(self, request_id: str, prompt: dict[str, Any], params: Any, priority: int) -> Any:
        """Validate, in any thread, and return what `add` takes. Raises vLLM's validation errors."""

    async def add(self, prepared: Any) -> None:
        """Hand a prepared request to the engine core."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests that are live."""

    async def collect(self, live: Mapping[str, LiveRequest]) -> list[TokenOutput]:
        """Wait for one step and return its outputs for live requests; may be empty."""

    def eos_token_id(self) -> int | None:
        """The tokenizer's EOS, which ends a request beside those of the generation config."""

    def dead(self) -> bool:
        """Whether the engine core is known to be dead."""

    def core_exit(self) -> int | None:
        """The exit code of the core's process; None while it runs."""

    def close(self) -> None:
        """End the engine core and its ranks; blocks until they are gone."""
