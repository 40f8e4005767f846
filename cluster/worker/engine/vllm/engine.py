"""The vLLM engine, driven over the fast path if this vLLM has the private names for it, otherwise over AsyncLLM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.api.adapters import ADAPTERS
from cluster.api.demand import EngineCounts
from cluster.api.kv_events import KvEvent
from cluster.api.pooling import pooling_capabilities
from cluster.api.ports import EngineCorrupt, EngineDead
from cluster.api.types import (
    RESUME_EXACT,
    RESUME_PLAIN,
    RESUME_STATE,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    ModelSpec,
    TokenOutput,
)
from cluster.observe.trace_context import is_sampled
from cluster.worker.engine.processes import end_causes, exit_status, fork_server, sockets, watchdog
from cluster.worker.engine.processes.starvation import BUSY, Starvation, read_tasks
from cluster.worker.engine.vllm import arguments, fast_path, kv_events, pooling, repairs, resume
from cluster.worker.engine.vllm.adapters import EngineAdapters
from cluster.worker.engine.vllm.cpu import lone_rank
from cluster.worker.engine.vllm.fast_path import FastPath
from cluster.worker.engine.vllm.paths import EnginePath, LiveRequest, StepStats
from cluster.worker.engine.vllm.private_names import missing
from cluster.worker.engine.vllm.public_path import PublicPath
from cluster.worker.engine.vllm.requests import (
    RequestBounds,
    check,
    engine_params,
    is_heavy,
    prompt_of,
    reasoning_arguments,
    refusal,
    refused,
)

REMEMBERED_IDS = 65_536
"""Number of ended request ids that are still refused as duplicates. The ids of live requests are always refused."""

GRAMMAR_BESIDE_S, GRAMMAR_ALONE_S = 10.0, 90.0
"""Greatest age of a step, in seconds, that the compilation of a grammar explains.

The first bound applies while other requests run, the second while none runs. A thread of the engine core compiles the
grammar, which slows the steps of other requests. grammar_size.py bounds the size of grammars.
"""

ADAPTER_S = 10.0
"""Greatest age of a step, in seconds, that the load of an adapter explains. All of the engine's steps wait for it."""


class VllmEngine:
    """A vLLM engine: its engine core and rank processes, owned by this object until `close`."""

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

        `executor` places the ranks if there are several: "ray" on the placement group of this process's Ray actor, "mp"
        as processes on this host. If `exact_resume` is False, emitted tokens are resumed as part of a new prompt, and
        requests for which that would change the output are refused. `reasoning_parser`: name of vLLM's parser of the
        model's reasoning, with which the engine finds where a grammar begins and counts a budget of reasoning tokens.
        `tokenizer_mode`: vLLM's mode for the model's tokenizer, unless the entry sets one; "" for vLLM's own choice.
        """
        self._spec = spec
        self._folder = model_folder
        self._prefer_fastpath = prefer_fastpath
        self._executor = executor
        self._exact_resume = exact_resume
        self._reasoning_parser = reasoning_parser
        self._tokenizer_mode = tokenizer_mode
        self._path: EnginePath | None = None
        self._limits = RequestBounds(0, 0, 0)
        self._adapters = EngineAdapters()
        self._live: dict[str, LiveRequest] = {}
        self._ended: dict[str, None] = {}
        self._awaiting_grammar = 0
        self._validating = 0
        self._closed = False
        self._has_sockets = False
        self._starvation: Starvation | None = None
        self._notes_name = ""
        self._death_reason = ""
        self._kv_events: kv_events.KvEventSocket | None = None

    def __repr__(self) -> str:
        name = type(self._path).__name__ if self._path else "not started"
        return f"VllmEngine({self._spec.name}, {name}, {len(self._live)} live)"

    async def start(self) -> EngineInfo:
        """Load the model. Raises ValueError for an invalid entry, EngineDead if the core does not start."""
        try:
            return await self._start()
        except BaseException:  # a cancelled start must not leave its sockets' folder behind either
            self._release_sockets()
            raise

    async def _start(self) -> EngineInfo:
        watchdog.arm()
        reason = self._why_not_fast()
        others = await asyncio.to_thread(watchdog.children) - fork_server.server_pids()
        try:
            config, path = await asyncio.to_thread(self._build, not reason)
        except asyncio.CancelledError:
            self._closed = True  # the thread continues, and closes the engine that it has started
            raise
        self._path = path
        try:
            await path.ready()
        except EngineDead as dead:
            raise self._with_reason(dead) from dead
        await asyncio.to_thread(watchdog.forget_names, others)
        processes = await asyncio.to_thread(watchdog.own_processes, others)
        self._starvation = Starvation(lambda: read_tasks(processes))
        return self._engine_info(config, reason)

    def _why_not_fast(self) -> str:
        if not self._prefer_fastpath:
            return "switched off"
        lacking = missing(fast_path.SYMBOLS)
        return f"this vLLM lacks {', '.join(lacking)}" if lacking else ""

    def _build(self, fast: bool) -> tuple[Any, EnginePath]:
        arguments.prepare_environment(self._spec, self._executor)
        self._has_sockets = sockets.OURS.acquire()
        if self._has_sockets and kv_events.has_events(self._spec):
            self._kv_events = kv_events.KvEventSocket(Path(os.environ[sockets.ENV]))
        args = arguments.engine_arguments(
            self._spec,
            self._folder,
            self._executor,
            self._reasoning_parser,
            self._tokenizer_mode,
            None if self._kv_events is None else self._kv_events.config(),
        )
        try:
            config = args.create_engine_config()
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            raise ValueError(f"models[{self._spec.name}]: vLLM refuses this entry: {error}") from error
        repairs.apply()
        if config.lora_config is not None and (why := repairs.why_no_adapters()):
            raise ValueError(f"models[{self._spec.name}].engine.enable_lora: {why}")
        in_core = lone_rank.settle(config)
        fork_server.install(rank_in_core=in_core)
        try:
            with (
                end_causes.name_engine() as self._notes_name,
                lone_rank.environment(config) if in_core else contextlib.nullcontext(),
            ):
                path: EnginePath = FastPath(config) if fast else PublicPath(config)
        except Exception as error:
            why = end_causes.find_cause(self._notes_name) or end_causes.with_log(
                _start_error(str(error)), end_causes.log_of("stdout")
            )
            raise EngineDead(f"models[{self._spec.name}]: the engine did not come up: {why}") from error
        if self._closed:
            path.close()
            self._release_sockets()  # the cancelled start may have released the sockets before they were acquired
            raise EngineDead("the engine was closed while it started")
        return config, path

    def _engine_info(self, config: Any, reason: str) -> EngineInfo:
        from vllm import __version__ as version

        model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
        path = self._require_path()
        path.stats.pace.set_limit(scheduler.max_num_batched_tokens)
        dtype = str(model.dtype).removeprefix("torch.")
        bounds = pooling.pooling_bounds(config, path.tasks, self._spec.name)
        if bounds is not None:
            return self._pooling_info(config, reason, bounds, dtype)
        installs = self._exact_resume and not repairs.why_resume_is_plain(config)
        if (lora := config.lora_config) is not None:
            self._adapters = EngineAdapters(lora.max_loras, lora.max_cpu_loras, config.parallel_config.world_size)
        self._limits = RequestBounds(
            max_model_len=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            max_logprobs=model.max_logprobs if model.max_logprobs >= 0 else model.get_vocab_size(),
            seeds=not arguments.on_cpu() or repairs.seeds_are_safe(),
            eos_token_ids=_eos_token_ids(config, path),
            installs=installs,
            resumes_seeds=resume.resumes_seeds(config, installs),
            budgets=bool(getattr(getattr(config, "reasoning_config", None), "enabled", False)),
            resumes_budgets=installs and resume.resumes_budgets(config),
            adapters=self._adapters,
        )
        has_events = self._kv_events is not None and cache.enable_prefix_caching
        kv_capabilities = kv_events.capabilities(config) if has_events else ()
        return EngineInfo(
            engine_class=arguments.engine_class(dtype, model.quantization, self._spec, resume.noise(config)),
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
            capabilities=(
                *("chat", "complete", "logprobs", "response_format"),
                _resume_capability(installs, arguments.is_batch_invariant(dtype)),
                *kv_capabilities,
                *((ADAPTERS,) if self._adapters.slots else ()),
            ),
            adapter_slots=self._adapters.slots,
            adapter_capacity=self._adapters.capacity,
        )

    def _pooling_info(self, config: Any, reason: str, bounds: pooling.PoolingBounds, dtype: str) -> EngineInfo:
        """Return the properties of a pooling model's engine. Such an engine resumes nothing and has no defaults."""
        from vllm import __version__ as version

        model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
        self._limits = RequestBounds(model.max_model_len, model.get_vocab_size(), max_logprobs=0, pooling=bounds)
        has_events = self._kv_events is not None and cache.enable_prefix_caching
        blocks = pooling.kv_blocks(
            cache.num_gpu_blocks or 0, cache.block_size, scheduler.max_num_batched_tokens, model.max_model_len
        )
        return EngineInfo(
            engine_class=arguments.engine_class(dtype, model.quantization, self._spec),
            engine_path="public" if reason else "fastpath",
            engine_path_reason=reason,
            engine_version=f"vllm {version}",
            block_size=cache.block_size,
            kv_blocks=blocks,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._limits.vocab_size,
            capabilities=(
                *pooling_capabilities(bounds.info.tasks),
                *(kv_events.capabilities(config) if has_events else ()),
            ),
            pooling=bounds.info,
        )

    async def submit(self, request: EngineRequest) -> None:
        """Submit a request. Raises EngineRefused or EngineDead."""
        path = self._require_path()
        check(request, self._limits)
        key = request.request_id
        if key in self._live or key in self._ended:
            raise refused("request_id", f"{key!r} was used before; every request needs its own")
        self._add_live(key, request)
        try:
            prepared = await self._prepare(path, request)
            if key in self._live:  # otherwise the request was aborted while a thread validated it
                try:
                    await path.add(prepared)
                except EngineDead as dead:
                    raise self._with_reason(dead) from dead
        except BaseException:  # also when cancelled: a failed request must not stay live
            self._remove(key, remember=False)
            raise

    def _add_live(self, key: str, request: EngineRequest) -> None:
        sampling, is_pooling = request.sampling, request.pooling is not None
        record = LiveRequest(
            prompt_tokens=len(request.prompt_token_ids),
            logprobs=sampling.logprobs,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            grammar=sampling.grammar is not None and not is_pooling,
            pooling=is_pooling,
            emitted_tokens=len(request.emitted_token_ids),
            adapter=request.adapter,
            is_traced=bool(request.traceparent) and is_sampled(request.traceparent),
        )
        self._adapters.began(request.adapter)
        stats = self._require_path().stats
        if not self._live:
            stats.pace.began(time.monotonic())
        self._live[key] = record
        stats.live += 1
        stats.prefill_tokens += record.prompt_tokens + record.emitted_tokens
        self._awaiting_grammar += record.grammar

    async def _prepare(self, path: EnginePath, request: EngineRequest) -> Any:
        from vllm.exceptions import VLLMError

        adapter = self._adapters.request_of(request.adapter)

        def prepare() -> Any:
            params = engine_params(request, self._limits)
            prompt = prompt_of(request, self._limits)
            arguments = reasoning_arguments(request)
            return path.prepare(request.request_id, prompt, params, request.priority, arguments, adapter)

        self._validating += 1
        try:
            return await asyncio.to_thread(prepare) if is_heavy(request) else prepare()
        except (VLLMError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise refusal(error, request.sampling.grammar.field if request.sampling.grammar else "") from error
        finally:
            self._validating -= 1

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests; unknown ids are ignored."""
        path = self._require_path()
        known = [key for key in request_ids if key in self._live]
        for key in known:
            self._remove(key)
        if known:
            try:
                await path.abort(known)
            except EngineDead as dead:
                raise self._with_reason(dead) from dead

    async def step(self) -> Sequence[TokenOutput]:
        """Wait for the next step that has outputs and return them. Raises EngineDead."""
        path = self._require_path()
        while True:
            try:
                outputs = await path.collect(self._live)
            except EngineDead as dead:
                raise self._with_reason(dead) from dead
            computed = 0
            for output in outputs:
                if output.prompt_tokens is not None:
                    record = self._live[output.request_id]
                    self._finish_prefill(record)
                    computed += record.prompt_tokens + record.emitted_tokens - (output.cached_tokens or 0)
                if output.finish is not None:
                    self._remove(output.request_id)
            if computed:
                path.stats.pace.prefilled(computed)
            if outputs:
                return outputs

    async def load_adapter(self, digest: str, folder: str, *, pinned: bool = False) -> None:
        """Load an adapter's files between two steps. Raises EngineRefused, EngineCorrupt or EngineDead.

        `pinned` changes nothing: this engine drops no adapter by itself.
        """
        try:
            await self._adapters.load(self._require_path(), digest, folder)
        except EngineCorrupt:
            raise
        except EngineDead as dead:
            raise self._with_reason(dead) from dead

    async def unload_adapter(self, digest: str) -> None:
        """Refuse new requests for an adapter, and return once its last request has ended and its memory is free."""
        try:
            await self._adapters.unload(self._require_path(), digest)
        except EngineDead as dead:
            raise self._with_reason(dead) from dead

    async def kv_events(self) -> Sequence[KvEvent]:
        """Wait for events of the engine's prefix cache and return them. Without events, wait until cancelled."""
        if self._kv_events is None:
            await asyncio.Event().wait()
            return ()
        return await self._kv_events.kv_events()

    def _finish_prefill(self, record: LiveRequest) -> None:
        if not record.waits:
            return
        record.waits = False
        self._awaiting_grammar -= record.grammar
        if self._path is not None:
            self._path.stats.prefill_tokens -= record.prompt_tokens + record.emitted_tokens

    def _remove(self, key: str, *, remember: bool = True) -> None:
        record = self._live.pop(key, None)
        if record is None:
            return
        self._finish_prefill(record)
        self._adapters.ended(record.adapter)
        if self._path is not None:
            self._path.stats.live -= 1
            if not self._live:
                self._path.stats.pace.mark_idle()
        if not remember:
            return
        self._ended[key] = None
        if len(self._ended) > REMEMBERED_IDS:
            del self._ended[next(iter(self._ended))]

    def load(self) -> EngineLoad:
        """Return the scheduler's counts of the last step; any thread may call this.

        Requests that the scheduler has not counted yet count as waiting.
        """
        path = self._path
        if path is None:
            return EngineLoad(busy="start")
        stats, now = path.stats, time.monotonic()
        return EngineLoad(
            running=stats.running,
            waiting=max(stats.waiting, stats.live - stats.running, 0),
            kv_usage=stats.kv_usage,
            steps=stats.steps,
            step_s=stats.pace.last_s,
            busy=self._reported_work(stats, now),
            step_age_s=stats.pace.age_s(now),
            step_p99_s=stats.pace.times.value_s,
            prefill_tokens=stats.prefill_tokens,
        )

    def counts(self) -> EngineCounts:
        """Return vLLM's counts of preemptions and of the prefix cache; any thread may call this."""
        return EngineCounts() if self._path is None else self._path.stats.counts

    def _reported_work(self, stats: StepStats, now: float) -> str:
        if self._awaiting_grammar or self._validating:
            bound_s = GRAMMAR_BESIDE_S if stats.running else GRAMMAR_ALONE_S
            if stats.pace.age_s(now) <= bound_s:
                return "grammar"
        if self._adapters.loading and stats.pace.age_s(now) <= ADAPTER_S:
            return "adapter"
        if stats.pace.explains(now, stats.prefill_tokens):
            return "prefill"
        age_s, p99_s = stats.pace.age_s(now), stats.pace.times.value_s
        starved = self._starvation is not None and self._starvation.explains(age_s, p99_s, now)
        return BUSY if starved else ""

    async def check(self) -> None:
        """Raise EngineDead if the core is known to be dead."""
        if self._require_path().dead():
            raise self._with_reason(EngineDead("the engine core is dead"))

    def _with_reason(self, dead: EngineDead) -> EngineDead:
        """Return an EngineDead with the reason why the engine ended. The first reason found is used for all errors."""
        self._death_reason = self._death_reason or self._end_reason(dead)
        return EngineDead(self._death_reason)

    def _end_reason(self, dead: EngineDead) -> str:
        if why := end_causes.find_cause(self._notes_name, recent=True):
            return why
        code = None if self._path is None else self._path.core_exit()
        cause = (
            f"{end_causes.CORE} {exit_status.describe(code)}"
            if code is not None
            else str(dead).partition(". See stack trace")[0]
        )
        return end_causes.with_log(cause, end_causes.log_of("stdout"))

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
        self._release_sockets()

    def _release_sockets(self) -> None:
        if self._kv_events is not None:
            self._kv_events.close()
        has_sockets, self._has_sockets = self._has_sockets, False
        if has_sockets:
            sockets.OURS.release()


def _start_error(error: str) -> str:
    """Return how vLLM's processes ended, in words, if vLLM's start error has their exit codes; otherwise the error."""
    failed = re.findall(r"'(\w+)': (-?\d+)", error.partition("Failed core proc(s):")[2])
    return " and ".join(f"{end_causes.CORE} {exit_status.describe(int(code))}" for _, code in failed) or error


def _eos_token_ids(config: Any, path: EnginePath) -> frozenset[int]:
    """Return the EOS ids as vLLM collects them: those of the generation config and the tokenizer's own."""
    configured = (config.model_config.try_get_generation_config() or {}).get("eos_token_id")
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    own = path.eos_token_id()
    return frozenset(ids if own is None else ids | {own})


def _resume_capability(installs: bool, batch_invariant: bool) -> str:
    if not installs:
        return RESUME_PLAIN
    return RESUME_EXACT if batch_invariant else RESUME_STATE
