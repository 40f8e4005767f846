"""vLLM's engine core on a thread of this process instead of in a process of its own.

Problem: between a worker and the core's process lie two sockets, two encodings and four wakes of threads for each
request and for each step, a good part of what a short call takes. Here a request is handed over as it is, and a step's
outputs come back by one wake of the event loop. The price: a step's Python runs under the same interpreter lock as the
links and beats, so it is for engines whose ranks have processes of their own, and it is asked for, not the rule
(HEADRACE_ENGINE_CORE=thread).
Invariants: only the thread touches the core. What it raises ends it, and everybody who waits or asks later is told so;
a request that the core refuses fails alone, as with a core of its own.
Source: the loop of vLLM's EngineCoreProc.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger("engine")

CORE = "HEADRACE_ENGINE_CORE"
"""Environment: `process` (where it is not set) or `thread`."""
SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.v1.engine.core.EngineCore": (
        "vllm_config",
        "executor_class",
        "log_stats",
        "executor_fail_callback",
    ),
    "vllm.v1.engine.core.EngineCore.preprocess_add_request": ("request",),
    "vllm.v1.engine.core.EngineCore.add_request": ("request", "request_wave"),
    "vllm.v1.engine.core.EngineCore.abort_requests": ("request_ids",),
    "vllm.v1.engine.core.EngineCore.post_step": ("model_executed",),
    "vllm.v1.engine.core.EngineCore.get_supported_tasks": (),
    "vllm.v1.engine.core.EngineCore.shutdown": (),
}
THREAD = "engine-core"
IDLE_S = 0.001
"""Where the scheduler has requests and none can be computed yet."""
STOP_S = 10.0

_Work = Callable[[], None]


def wanted(world_size: int) -> bool:
    """Whether the core is to be a thread: it was asked for, and all is on this host. Raises ValueError for an unknown
    word."""
    word = os.environ.get(CORE, "")
    if word not in ("", "process", "thread"):
        raise ValueError(f"{CORE}={word!r}: use process or thread, or leave it out")
    return word == "thread" and world_size == 1


def name_thread() -> None:
    """For `top -H`, and for whoever counts what the core spends apart from the rest of its process."""
    with contextlib.suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(THREAD)


class CoreThread:
    """What the fast path asks of vLLM's own client. Made in any thread; awaited on one event loop."""

    def __init__(self, vllm_config: Any, executor_class: Any) -> None:
        """Load the model; blocks until that is done. Raises whatever the core raises."""
        self._inbox: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._outputs: deque[Any] = deque()
        self._came = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        self._tasks: Any = ()
        self._core: Any = None
        made = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(vllm_config, executor_class, made), name=THREAD, daemon=True
        )
        self._thread.start()
        made.wait()
        if self._error is not None:
            raise self._error

    # ---- the event loop's side

    @property
    def engine_dead(self) -> bool:
        """Whether the thread has ended."""
        return self._error is not None

    @property
    def resources(self) -> CoreThread:
        """Where vLLM's client keeps `engine_dead`."""
        return self

    async def get_supported_tasks_async(self) -> Any:
        """Once before anything else: outputs go to this loop."""
        self._loop = asyncio.get_running_loop()
        return self._tasks

    async def add_request_async(self, request: Any) -> None:
        """Hand it over. Raises EngineDeadError."""
        self._check()
        self._inbox.put(lambda: self._add(request))

    async def abort_requests_async(self, request_ids: Sequence[str]) -> None:
        """Drop them, in the step that is under way too. Raises EngineDeadError."""
        self._check()
        ids = list(request_ids)
        self._core.aborts_queue.put_nowait(ids)
        self._inbox.put(lambda: self._core.abort_requests(ids))

    async def get_output_async(self) -> Any:
        """The next step's. Raises EngineDeadError."""
        while not self._outputs:
            self._check()
            self._came.clear()
            await self._came.wait()
        return self._outputs.popleft()

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread, the core and its ranks."""
        self._inbox.put(None)
        self._thread.join(STOP_S if timeout is None else timeout)

    def _check(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._error is not None:
            raise EngineDeadError from self._error

    def _put(self, outputs: Any) -> None:
        if outputs is not None:
            self._outputs.append(outputs)
        self._came.set()

    # ---- the thread's side

    def _run(self, vllm_config: Any, executor_class: Any, made: threading.Event) -> None:
        from vllm.v1.engine.core import EngineCore

        core = None
        name_thread()
        try:
            core = EngineCore(vllm_config, executor_class, True, executor_fail_callback=self._failed)
            self._core, self._tasks = core, core.get_supported_tasks()
            made.set()
            self._serve(core)
            self._error = RuntimeError("the engine core was stopped")
        except BaseException as error:  # whatever it is, the core is at its end, and those who wait are told
            self._error = error
            if core is not None:
                log.error("engine_core_ended", error=f"{type(error).__name__}: {error}")
        finally:
            made.set()
            self._tell(None)
            if core is not None:
                core.shutdown()

    def _serve(self, core: Any) -> None:
        """Until it is stopped."""
        while True:
            idle = not (core.scheduler.has_requests() or core.batch_queue)
            while idle or not self._inbox.empty():
                work = self._inbox.get()
                if work is None:
                    return
                work()
                idle = False
            with core.aborts_queue.mutex:
                if not core.scheduler.has_requests():
                    core.aborts_queue.queue.clear()
            outputs, ran = core.step_fn()
            for one in (outputs or {}).values():
                self._tell(one)
            core.post_step(model_executed=ran)
            if not ran and core.scheduler.has_requests():
                time.sleep(IDLE_S)

    def _add(self, request: Any) -> None:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

        try:
            prepared, wave = self._core.preprocess_add_request(request)
        except Exception as error:  # this request's fault
            log.error("request_refused", request_id=request.request_id, error=f"{type(error).__name__}: {error}")
            refused = EngineCoreOutput(
                request_id=request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR
            )
            self._tell(EngineCoreOutputs(outputs=[refused], finished_requests={request.request_id}))
            return
        self._core.add_request(prepared, wave)

    def _failed(self) -> None:
        """Told by the executor, from a thread of its own, when a rank has died."""

        def fail() -> None:
            raise RuntimeError("a rank of the engine has died")

        self._inbox.put(fail)

    def _tell(self, outputs: Any) -> None:
        loop = self._loop
        if loop is None:
            return
        try:
            loop.call_soon_threadsafe(self._put, outputs)
        except RuntimeError:  # the loop is closed, and nobody waits any longer
            return
