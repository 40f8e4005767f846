"""The real engine behind the port: vLLM, by the fast path where this vLLM has its names, else by public AsyncLLM."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.api.ports import EngineDead
from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, ModelSpec, TokenOutput
from cluster.engine import arguments, fastpath, repairs, sockets, watchdog
from cluster.engine.fastpath import FastPath
from cluster.engine.paths import EnginePath, Live
from cluster.engine.public import PublicPath
from cluster.engine.requests import Limits, check, is_heavy, prompt_of, refusal, refused, sampling_params

REMEMBERED_IDS = 65_536
"""Ended request ids that are still refused as duplicates; live ones always are."""


class VllmEngine:
    """One vLLM engine: its engine core and rank processes, owned by this object until `close`."""

    def __init__(
        self, spec: ModelSpec, model_folder: Path, *, prefer_fastpath: bool = True, executor: str = "ray"
    ) -> None:
        """`executor` places the ranks of a world larger than one: "ray" on the placement group of the Ray actor that
        this runs in, "mp" as processes of this host."""
        self._spec = spec
        self._folder = model_folder
        self._prefer_fastpath = prefer_fastpath
        self._executor = executor
        self._path: EnginePath | None = None
        self._limits = Limits(0, 0, 0)
        self._live: dict[str, Live] = {}
        self._ended: dict[str, None] = {}
        self._awaiting_first = 0
        self._awaiting_grammar = 0
        self._validating = 0
        self._last_step_at = 0.0
        self._step_s = 0.0
        self._closed = False
        self._has_sockets = False

    def __repr__(self) -> str:
        name = type(self._path).__name__ if self._path else "not started"
        return f"VllmEngine({self._spec.name}, {name}, {len(self._live)} live)"

    async def start(self) -> EngineInfo:
        """Load the model. Raises ValueError for what cannot work, EngineDead when the core does not come up."""
        watchdog.arm()
        reason = self._why_not_fast()
        try:
            config, path = await asyncio.to_thread(self._build, not reason)
        except asyncio.CancelledError:
            self._closed = True  # the thread goes on, and ends what it has started
            raise
        self._path = path
        await path.ready()
        return self._describe(config, reason)

    def _why_not_fast(self) -> str:
        if not self._prefer_fastpath:
            return "switched off"
        lacking = fastpath.missing()
        return f"this vLLM lacks {', '.join(lacking)}" if lacking else ""

    def _build(self, fast: bool) -> tuple[Any, EnginePath]:
        arguments.prepare_environment(self._spec, self._executor)
        if arguments.world_size(self._spec) == 1 or self._executor != "ray":
            self._has_sockets = sockets.OURS.acquire()
        args = arguments.engine_arguments(self._spec, self._folder, self._executor)
        try:
            config = args.create_engine_config()
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"models[{self._spec.name}]: vLLM does not take this entry: {error}") from error
        repairs.apply()
        try:
            path: EnginePath = FastPath(config) if fast else PublicPath(config)
        except Exception as error:
            raise EngineDead(f"models[{self._spec.name}]: the engine did not come up: {error}") from error
        if self._closed:
            path.close()
            raise EngineDead("the engine was closed while it started")
        return config, path

    def _describe(self, config: Any, reason: str) -> EngineInfo:
        from vllm import __version__ as version

        model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
        self._limits = Limits(
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            max_logprobs=model.max_logprobs if model.max_logprobs >= 0 else model.get_vocab_size(),
            seeds=not arguments.on_cpu() or repairs.seeds_are_safe(),
        )
        dtype = str(model.dtype).removeprefix("torch.")
        return EngineInfo(
            engine_class=arguments.engine_class(dtype, model.quantization, self._spec),
            engine_path="public" if reason else "fastpath",
            engine_path_reason=reason,
            engine_version=f"vllm {version}",
            block_size=cache.block_size,
            kv_blocks=cache.num_gpu_blocks or 0,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._limits.vocab_size,
            default_sampling=arguments.plain_defaults(model.get_diff_sampling_param()),
            capabilities=("chat", "complete", "logprobs", "response_format"),
        )

    async def submit(self, request: EngineRequest) -> None:
        """Take a request. Raises EngineRefused or EngineDead."""
        path = self._started()
        check(request, self._limits)
        key = request.request_id
        if key in self._live or key in self._ended:
            raise refused("request_id", f"{key!r} was used before; every request needs its own")
        self._begin(key, request)
        try:
            prepared = await self._prepare(path, request)
            if key in self._live:  # else aborted while it was validated in a thread
                await path.add(prepared)
        except BaseException:  # a cancel too: the place goes with the one who took it
            self._end(key, remember=False)
            raise

    def _begin(self, key: str, request: EngineRequest) -> None:
        sampling = request.sampling
        if not self._live:
            self._last_step_at = time.monotonic()
        self._live[key] = Live(
            prompt_tokens=len(request.prompt_token_ids),
            logprobs=sampling.logprobs,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            grammar=sampling.grammar is not None,
        )
        self._awaiting_first += 1
        self._awaiting_grammar += sampling.grammar is not None

    async def _prepare(self, path: EnginePath, request: EngineRequest) -> Any:
        from vllm.exceptions import VLLMError

        def prepare() -> Any:
            params = sampling_params(request, self._limits)
            return path.prepare(request.request_id, prompt_of(request), params, request.priority)

        self._validating += 1
        try:
            return await asyncio.to_thread(prepare) if is_heavy(request) else prepare()
        except (VLLMError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise refusal(error, "response_format" if request.sampling.grammar else "") from error
        finally:
            self._validating -= 1

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are ignored."""
        path = self._started()
        known = [key for key in request_ids if key in self._live]
        for key in known:
            self._end(key)
        if known:
            await path.abort(known)

    async def step(self) -> Sequence[TokenOutput]:
        """The next step that has outputs. Raises EngineDead."""
        path = self._started()
        while True:
            outputs = await path.collect(self._live)
            now = time.monotonic()
            if self._last_step_at:
                self._step_s = now - self._last_step_at
            for output in outputs:
                if output.prompt_tokens is not None:
                    self._first(self._live[output.request_id])
                if output.finish is not None:
                    self._end(output.request_id)
            self._last_step_at = now if self._live else 0.0
            if outputs:
                return outputs

    def _first(self, record: Live) -> None:
        record.first = False
        self._awaiting_first -= 1
        self._awaiting_grammar -= record.grammar

    def _end(self, key: str, *, remember: bool = True) -> None:
        record = self._live.pop(key, None)
        if record is None:
            return
        if record.first:
            self._first(record)
        if not remember:
            return
        self._ended[key] = None
        if len(self._ended) > REMEMBERED_IDS:
            del self._ended[next(iter(self._ended))]

    def load(self) -> EngineLoad:
        """The scheduler's counts of the last step; what it does not know of yet counts as waiting."""
        if self._path is None:
            return EngineLoad(busy="start")
        stats = self._path.stats
        busy = "grammar" if self._awaiting_grammar or self._validating else "prefill" if self._awaiting_first else ""
        return EngineLoad(
            running=stats.running,
            waiting=max(stats.waiting, len(self._live) - stats.running, 0),
            kv_usage=stats.kv_usage,
            steps=stats.steps,
            step_s=self._step_s,
            busy=busy,
        )

    async def check(self) -> None:
        """Raise EngineDead if the core is known to be dead."""
        if self._started().dead():
            raise EngineDead("the engine core is dead")

    def _started(self) -> EnginePath:
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
        has_sockets, self._has_sockets = self._has_sockets, False
        if has_sockets:
            sockets.OURS.release()
