"""The time that each request's grammar takes in the engine core, and the end of requests whose grammar takes too much.

Problem: the core computes the masks of all requests with a grammar one after another, before each step's sampling, and
every request of the engine waits. A trial before (probe_process.py) cannot see all states of a grammar, and an
ambiguous grammar becomes slower with each token.

The core's thread has the masks computed by a second thread, and waits. CPU time of that thread is measured, so a busy
host counts for nothing. A request whose masks take too long ends with ERROR at its next token, and its stop reason is
SLOW. If one mask takes longer than MAX_MASK_S, the core does not wait for its end: the thread is left to finish it
alone at the lowest priority, and another thread computes the masks of the other requests.

Grammars are compiled at the lowest priority: an accepted grammar may take a second or two of all cores.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SLOW = "headrace:slow-grammar"
"""Stop reason of a request whose grammar takes too long."""
MAX_MASK_S = 0.05
"""CPU seconds of one mask."""
MAX_MEAN_S = 0.004
"""CPU seconds of a mask on average over the last MEAN_OVER masks."""
MEAN_OVER = 16
CHECK_S = 0.005
"""Seconds between two checks whether a mask takes too long."""
_LOWEST = 19

SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.v1.structured_output.StructuredOutputManager": ("vllm_config",),
    "vllm.v1.structured_output.StructuredOutputManager._fill_bitmasks": ("batch",),
    "vllm.v1.structured_output.StructuredOutputManager.grammar_bitmask": ("requests",),
    "vllm.v1.structured_output.StructuredOutputManager.accept_tokens": ("request", "new_token_ids"),
    "vllm.v1.request.Request": (),
}


class MaskTimes:
    """The time that the masks of one grammar have taken."""

    __slots__ = ("_mean_s", "is_slow")

    def __init__(self) -> None:
        self._mean_s = 0.0
        self.is_slow = False

    def add(self, seconds: float) -> None:
        """Count a mask."""
        self._mean_s += (seconds - self._mean_s) / MEAN_OVER
        self.is_slow = self.is_slow or seconds > MAX_MASK_S or self._mean_s > MAX_MEAN_S


class _Abandoned(BaseException):
    """Ends a thread that the core no longer waits for."""


class MaskThread:
    """A thread that computes masks for a thread that waits. `current`: the mask in progress, as the times of its
    grammar and the thread's CPU seconds at its begin; None between two masks."""

    def __init__(self) -> None:
        self.current: tuple[MaskTimes, float] | None = None
        self.is_abandoned = False
        self._work: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grammar-masks", daemon=True)
        self._thread.start()
        self._clock = time.pthread_getcpuclockid(self._thread.ident or 0)

    def run(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, or raise its error. Raises TimeoutError if one of its masks takes too long; the
        thread is then abandoned."""
        self._work.put(work)
        while True:
            try:
                result, error = self._results.get(timeout=CHECK_S)
            except queue.Empty:
                current = self.current
                if current is None or time.clock_gettime(self._clock) - current[1] < MAX_MASK_S:
                    continue
                self.is_abandoned = True
                current[0].is_slow = True
                os.setpriority(os.PRIO_PROCESS, self._thread.native_id or 0, _LOWEST)
                raise TimeoutError from None
            if error is not None:
                raise error
            return result

    def fill(self, times: MaskTimes, began: float, fill: Callable[[], object]) -> None:
        """Compute one mask. Called by `work`. `began`: CPU seconds of this thread."""
        self.current = times, began
        fill()
        self.current = None
        if self.is_abandoned:
            raise _Abandoned

    def join(self) -> None:
        """Wait until an abandoned thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        while not self.is_abandoned:
            work = self._work.get()
            try:
                self._results.put((work(), None))
            except _Abandoned:
                return
            except BaseException as error:
                self._results.put((None, error))


def _times(grammar: Any) -> MaskTimes:
    times: MaskTimes | None = getattr(grammar, "headrace_times", None)
    if times is None:
        times = grammar.headrace_times = MaskTimes()
    return times


def lower_priority() -> None:
    """Give this thread the lowest priority, which the threads that it starts inherit."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)


def install() -> None:
    """Patch vLLM's manager of grammars in this process. Call once."""
    from vllm.v1.structured_output import StructuredOutputManager as Manager

    create, fill, bitmask, accept = (
        Manager.__init__,
        Manager._fill_bitmasks,
        Manager.grammar_bitmask,
        Manager.accept_tokens,
    )
    threads = threading.local()

    def __init__(self: Any, vllm_config: Any) -> None:
        create(self, vllm_config)
        if (executor := getattr(self, "executor", None)) is not None:
            self.executor = ThreadPoolExecutor(executor._max_workers, initializer=lower_priority)
        self.headrace_thread = None

    def _fill_bitmasks(self: Any, batch: Any) -> None:
        masks = self._grammar_bitmask
        for grammar, index, applies in batch:
            times = _times(grammar)
            if not applies or times.is_slow or grammar.is_terminated():
                fill(self, ((grammar, index, False),))
                continue
            began = time.thread_time()
            thread: MaskThread | None = getattr(threads, "current", None)
            if thread is None:  # one of vLLM's own threads, which share many requests
                grammar.fill_bitmask(masks, index)
            else:
                thread.fill(times, began, functools.partial(grammar.fill_bitmask, masks, index))
            times.add(time.thread_time() - began)

    def grammar_bitmask(self: Any, requests: Any, ids: Any, *arguments: Any) -> Any:
        if not ids:
            return None

        def work(thread: MaskThread) -> Any:
            threads.current = thread
            return bitmask(self, requests, ids, *arguments)

        while True:
            if self.headrace_thread is None:
                self.headrace_thread = MaskThread()
            try:
                return self.headrace_thread.run(functools.partial(work, self.headrace_thread))
            except TimeoutError:
                self.headrace_thread = self._grammar_bitmask = None  # the abandoned thread still writes into the masks

    def accept_tokens(self: Any, request: Any, new_token_ids: list[int]) -> bool:
        structured = getattr(request, "structured_output_request", None)
        if structured is not None and getattr(getattr(structured, "grammar", None), "headrace_times", _NONE).is_slow:
            request.stop_reason = SLOW
            return False
        return bool(accept(self, request, new_token_ids))

    Manager.__init__ = __init__
    Manager._fill_bitmasks = _fill_bitmasks
    Manager.grammar_bitmask = grammar_bitmask
    Manager.accept_tokens = accept_tokens


_NONE = MaskTimes()
