"""The vLLM engine.

It uses vLLM's engine core directly (the fast path) if the installed vLLM has the private names that the fast path
needs, otherwise vLLM's public AsyncLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.api.demand import EngineCounts
from cluster.api.kv_events import KvEvent
from cluster.api.ports import EngineCorrupt, EngineDead
from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, ModelSpec, TokenOutput
from cluster.worker.engine.processes import fork_server, watchdog
from cluster.worker.engine.processes.starvation import Starvation, read_tasks
from cluster.worker.engine.vllm.adapters import EngineAdapters
from cluster.worker.engine.vllm.core_processes import CoreProcesses, why_not_fast
from cluster.worker.engine.vllm.engine_info import engine_properties
from cluster.worker.engine.vllm.grammar.probe import GrammarProbe
from cluster.worker.engine.vllm.live_requests import LiveRequests
from cluster.worker.engine.vllm.paths import EnginePath, LiveRequest, StepStats
from cluster.worker.engine.vllm.requests import RequestBounds, check, prepare, refused


class VllmEngine:
    """A vLLM engine. It owns the processes of the engine core and the ranks until `close`."""

    def __init__(
        self,
        spec: ModelSpec,
        model_folder: Path,
        *,
        prefer_fastpath: bool = True,
        executor: str = "ray",
        exact_resume: bool = True,
        reasoning_parser: str = "",
        tokenizer_mode: str = "",
    ) -> None:
        """Create an engine; `start` loads the model.

        `executor`: how several ranks are placed. "ray": on the placement group of this process's Ray actor. "mp": as
        processes on this host. `exact_resume`: whether the emitted tokens of a resumed request are installed as its
        output. If false, they become part of a new prompt, and a request is refused if that would change its output.
        `reasoning_parser`: name of vLLM's parser of the model's reasoning. With it the engine finds the token from
        which a grammar applies, and counts a budget of reasoning tokens. `tokenizer_mode`: vLLM's mode for the
        model's tokenizer, used if `spec` sets none; "" for vLLM's own choice.
        """
        self._spec = spec
        self._prefer_fastpath = prefer_fastpath
        self._exact_resume = exact_resume
        self._core = CoreProcesses(spec, model_folder, executor, reasoning_parser, tokenizer_mode)
        self._path: EnginePath | None = None
        self._limits = RequestBounds(0, 0, 0)
        self._adapters = EngineAdapters()
        self._stats = StepStats()
        self._live = LiveRequests(self._stats)
        self._grammars = GrammarProbe()
        self._trying: set[str] = set()
        """Ids of the requests whose grammar is tried."""
        self._validating = 0
        self._closed = False
        self._starvation: Starvation | None = None

    def __repr__(self) -> str:
        name = type(self._path).__name__ if self._path else "not started"
        return f"VllmEngine({self._spec.name}, {name}, {len(self._live)} live)"

    async def start(self) -> EngineInfo:
        """Load the model. Raises ValueError for an invalid catalog entry, EngineDead if the core does not start."""
        try:
            return await self._start()
        except BaseException:  # a cancelled start must not leave its sockets' folder behind either
            self._grammars.close()
            self._core.release_sockets()
            raise

    async def _start(self) -> EngineInfo:
        watchdog.arm()
        fork_server.start()  # before vLLM is imported here, so that both import at the same time
        why_public = why_not_fast() if self._prefer_fastpath else "switched off"
        try:
            config, path = await asyncio.to_thread(self._start_core, not why_public)
        except asyncio.CancelledError:
            self._closed = True  # the thread continues, and closes the engine that it has started
            raise
        self._path = path
        try:
            await path.ready()
        except EngineDead as dead:
            raise self._core.end_error(dead, self._path) from dead
        processes = await asyncio.to_thread(self._core.forget_names)
        self._starvation = Starvation(lambda: read_tasks(processes))
        self._stats.pace.set_limit(config.scheduler_config.max_num_batched_tokens)
        properties = engine_properties(
            self._spec,
            config,
            self._require_path(),
            why_public=why_public,
            exact_resume=self._exact_resume,
            has_event_socket=self._core.kv_events is not None,
        )
        self._limits, self._adapters = properties.bounds, properties.adapters
        return properties.info

    def _start_core(self, fast: bool) -> tuple[Any, EnginePath]:
        config, path = self._core.start(self._stats, fast=fast, configured=self._grammars.start)
        if self._closed:
            path.close()
            self._grammars.close()
            self._core.release_sockets()  # the cancelled start may have released the sockets before they were acquired
            raise EngineDead("the engine was closed while it started")
        return config, path

    async def submit(self, request: EngineRequest) -> None:
        """Submit a request. Raises EngineRefused or EngineDead."""
        path = self._require_path()
        check(request, self._limits)
        key = request.request_id
        if self._live.was_used(key) or key in self._trying:
            raise refused("request_id", f"{key!r} was used before; every request needs its own")
        if request.sampling.grammar is not None and not await self._try_grammar(request):
            return
        record = LiveRequest.from_request(request)
        self._adapters.began(record.adapter)
        self._live.add(key, record)
        try:
            adapter = self._adapters.request_of(record.adapter)
            self._validating += 1
            try:
                prepared = await prepare(path, request, self._limits, adapter)
            finally:
                self._validating -= 1
            if key in self._live:  # otherwise the request was aborted while a thread validated it
                try:
                    await path.add(prepared)
                except EngineDead as dead:
                    raise self._core.end_error(dead, self._path) from dead
        except BaseException:  # also when cancelled: a failed request must not stay live
            self._remove(key, remember=False)
            raise

    async def _try_grammar(self, request: EngineRequest) -> bool:
        """Return whether a request is still wanted once its grammar was tried. Raises EngineRefused.

        The request is not live meanwhile: an engine that waits for a trial does no step, and does not hang.
        """
        key = request.request_id
        self._trying.add(key)
        try:
            await self._grammars.check(request, lambda: key in self._trying)
            return key in self._trying
        finally:
            self._trying.discard(key)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests; unknown ids are ignored."""
        path = self._require_path()
        self._trying.difference_update(request_ids)
        known = [key for key in request_ids if key in self._live]
        for key in known:
            self._remove(key)
        if known:
            try:
                await path.abort(known)
            except EngineDead as dead:
                raise self._core.end_error(dead, self._path) from dead

    async def step(self) -> Sequence[TokenOutput]:
        """Wait for the next step that has outputs; return its outputs. Raises EngineDead."""
        path = self._require_path()
        while True:
            try:
                outputs = await path.collect(self._live)
            except EngineDead as dead:
                raise self._core.end_error(dead, self._path) from dead
            computed = 0
            for output in outputs:
                if output.prompt_tokens is not None:
                    computed += self._live.finish_prefill(output.request_id) - (output.cached_tokens or 0)
                if output.finish is not None:
                    self._remove(output.request_id)
            if computed:
                self._stats.pace.prefilled(computed)
            if outputs:
                return outputs

    async def load_adapter(self, digest: str, folder: str, *, pinned: bool = False) -> None:
        """Load an adapter's files between two steps. Raises EngineRefused, EngineCorrupt or EngineDead.

        `pinned` has no effect, since this engine never drops an adapter by itself.
        """
        try:
            await self._adapters.load(self._require_path(), digest, folder)
        except EngineCorrupt:
            raise
        except EngineDead as dead:
            raise self._core.end_error(dead, self._path) from dead

    async def unload_adapter(self, digest: str) -> None:
        """Refuse new requests for an adapter, and return once its last request has ended and its memory is free."""
        try:
            await self._adapters.unload(self._require_path(), digest)
        except EngineDead as dead:
            raise self._core.end_error(dead, self._path) from dead

    async def kv_events(self) -> Sequence[KvEvent]:
        """Wait for events of the engine's prefix cache and return them.

        If this engine publishes no such events at all, the call never returns; it can only be cancelled.
        """
        if self._core.kv_events is None:
            await asyncio.Event().wait()
            return ()
        return await self._core.kv_events.kv_events()

    def _remove(self, key: str, *, remember: bool = True) -> None:
        record = self._live.remove(key, remember=remember)
        if record is not None:
            self._adapters.ended(record.adapter)

    def load(self) -> EngineLoad:
        """Return the load of the engine: the scheduler's counts of the last step, and the durations of steps. Any
        thread may call this."""
        if self._path is None:
            return EngineLoad(busy="start")
        return self._stats.load(
            time.monotonic(),
            has_grammars=self._live.awaiting_grammar > 0 or self._validating > 0,
            loads_adapter=self._adapters.loading,
            starvation=self._starvation,
        )

    def counts(self) -> EngineCounts:
        """Return vLLM's counts of preemptions and of the prefix cache. Any thread may call this."""
        return EngineCounts() if self._path is None else self._stats.counts

    async def check(self) -> None:
        """Raise EngineDead if the core is known to be dead."""
        if self._require_path().dead():
            raise self._core.end_error(EngineDead("the engine core is dead"), self._path)

    def _require_path(self) -> EnginePath:
        if self._closed:
            raise EngineDead("the engine is closed")
        if self._path is None:
            raise EngineDead("the engine has not started")
        return self._path

    async def close(self) -> None:
        """End the engine core and its ranks. Idempotent."""
        self._closed = True
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(path.close)
        await asyncio.to_thread(self._grammars.close)
        self._core.release_sockets()
