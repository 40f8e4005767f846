"""The public path: vLLM through its public AsyncLLM, for releases that the fast path does not support."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.ports import EngineDead
from cluster.api.types import SLOW_GRAMMAR, FinishReason, PositionLogprobs, TokenOutput
from cluster.worker.engine.vllm.grammar.mask_times import SLOW
from cluster.worker.engine.vllm.paths import LiveRequest, StepStats, core_exit, end
from cluster.worker.engine.vllm.pooling import set_vector
from cluster.worker.engine.vllm.request_times import stats_times

_FINISH = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
    "error": FinishReason.ERROR,
    "repetition": FinishReason.REPETITION,
}


def _stat_logger(stats: StepStats) -> Any:
    """Return a function that makes loggers of statistics for vLLM. The loggers write vLLM's statistics into `stats`."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepStatsLogger(StatLoggerBase):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any = None, *_: Any, **__: Any) -> None:
            stats.stepped(time.monotonic(), scheduler_stats)
            stats.preempted(getattr(iteration_stats, "num_preempted_reqs", 0))

        def log_engine_initialized(self) -> None:
            pass

    return StepStatsLogger


class PublicPath:
    """An EnginePath over vLLM's AsyncLLM, with one task for each request and one queue for all outputs."""

    def __init__(self, vllm_config: Any, stats: StepStats) -> None:
        """Start the engine. Blocks until the model is loaded. `stats` is updated after each step."""
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.exceptions import EngineDeadError
        from vllm.v1.executor import Executor

        self._dead_error: type[Exception] = EngineDeadError
        self.tasks: Sequence[str] = ()
        self._llm: Any = AsyncLLM(
            vllm_config=vllm_config,
            executor_class=Executor.get_class(vllm_config),
            log_stats=False,  # no loggers of vLLM's; the logger below turns the statistics on
            log_requests=False,
            stat_loggers=[_stat_logger(stats)],
        )
        self._queue: asyncio.Queue[tuple[str, Any] | EngineDead] = asyncio.Queue()
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def ready(self) -> None:
        """Fetch the tasks that the core supports, such as `generate` or `embed`."""
        self.tasks = await self._llm.get_supported_tasks()

    def prepare(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: Any,
        priority: int,
        reasoning: Mapping[str, Any],
        adapter: Any = None,
    ) -> Any:
        """Validate a request in the same way as AsyncLLM.

        An invalid request then fails here, not later in the task that `add` starts.
        """
        if _is_pooling(params):
            params.verify(self._llm.vllm_config.model_config)
        else:
            params.verify(
                self._llm.vllm_config.model_config,
                self._llm.vllm_config.speculative_config,
                self._llm.vllm_config.structured_outputs_config,
                self._llm.renderer.tokenizer,
            )
        prompt = {**prompt, "prompt_token_ids": list(prompt["prompt_token_ids"])}
        return request_id, prompt, params, {**reasoning, "priority": priority, "lora_request": adapter}

    async def add(self, prepared: Any) -> None:
        """Start the task that generates the request's outputs."""
        if self.dead():
            raise EngineDead("the engine core is dead")
        self._readers[prepared[0]] = asyncio.create_task(self._read(*prepared))

    async def _read(self, request_id: str, prompt: dict[str, Any], params: Any, arguments: Mapping[str, Any]) -> None:
        run = self._llm.encode if _is_pooling(params) else self._llm.generate
        try:
            async for output in run(prompt, params, request_id, **arguments):
                self._queue.put_nowait((request_id, output))
        except self._dead_error as error:
            self._queue.put_nowait(EngineDead(str(error)))
        except Exception as error:  # a request's failure must be reported as an output
            self._queue.put_nowait((request_id, error))
        finally:
            self._readers.pop(request_id, None)

    async def add_adapter(self, request: Any) -> bool:
        """Load an adapter between two steps. Returns vLLM's result. Raises EngineDead, or vLLM's error."""
        try:
            return bool(await self._llm.add_lora(request))
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    async def remove_adapter(self, number: int) -> None:
        """Remove an adapter between two steps. Raises EngineDead."""
        try:
            await self._llm.remove_lora(number)
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Cancel the requests' tasks; AsyncLLM then aborts the requests."""
        readers = [reader for key in request_ids if (reader := self._readers.get(key)) is not None]
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    async def collect(self, live: Mapping[str, LiveRequest]) -> list[TokenOutput]:
        """Wait for one output, then return all outputs that are queued. Raises EngineDead."""
        items = [await self._queue.get()]
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        outputs = []
        for item in items:
            if isinstance(item, EngineDead):
                raise item
            request_id, given = item
            record = live.get(request_id)
            if record is not None:
                outputs.append(_output(request_id, given, record))
        return outputs

    def eos_token_id(self) -> int | None:
        """Return the tokenizer's EOS id."""
        tokenizer = self._llm.renderer.tokenizer
        return None if tokenizer is None else tokenizer.eos_token_id

    def dead(self) -> bool:
        """Return whether AsyncLLM reports an error of the core."""
        return bool(self._llm.errored)

    def core_exit(self) -> int | None:
        """Return the exit code of the engine core's process; None while it runs."""
        return core_exit(self._llm.engine_core)

    def close(self) -> None:
        """End the engine core and its ranks."""
        end(self._llm.engine_core, self._llm.shutdown)


def _is_pooling(params: Any) -> bool:
    from vllm import PoolingParams

    return isinstance(params, PoolingParams)


def _pooled(request_id: str, given: Any, record: LiveRequest) -> TokenOutput:
    """Convert vLLM's output of a pooling request, which is the only output of the request."""
    record.first = False
    cached = min(given.num_cached_tokens or 0, record.prompt_tokens)
    output = TokenOutput(request_id, [], FinishReason.STOP, prompt_tokens=record.prompt_tokens, cached_tokens=cached)
    set_vector(output, given.outputs.data)
    return output


def _output(request_id: str, given: Any, record: LiveRequest) -> TokenOutput:
    if isinstance(given, Exception):
        return TokenOutput(request_id, [], FinishReason.ERROR, message=f"{type(given).__name__}: {given}")
    if record.pooling:
        return _pooled(request_id, given, record)
    completion = given.outputs[0]
    output = TokenOutput(request_id, list(completion.token_ids))
    if record.first:
        record.first = False
        if record.is_traced:
            output.times = stats_times(given)
        output.prompt_tokens = record.prompt_tokens
        if given.num_cached_tokens is not None:
            output.cached_tokens = min(given.num_cached_tokens, record.prompt_tokens)
    if completion.finish_reason is not None:
        output.finish = _FINISH[completion.finish_reason]
        if completion.stop_reason in record.stop_token_ids:
            output.stop_token_id = completion.stop_reason
        elif completion.stop_reason == SLOW:
            output.message = SLOW_GRAMMAR
    if completion.logprobs is not None and record.logprobs is not None:
        output.logprobs = _flat(completion.logprobs, record.logprobs + 1)
    return output


def _flat(given: Any, width: int) -> list[PositionLogprobs]:
    """Cut vLLM's FlatLogprobs into positions of `width` entries: the sampled token, then the most likely tokens."""
    return [
        _position(given.token_ids[start:end], given.logprobs[start:end], given.ranks[start], width)
        for start, end in zip(given.start_indices, given.end_indices, strict=True)
    ]


def _position(token_ids: list[int], logprobs: list[float], rank: int, width: int) -> PositionLogprobs:
    """Return the log probabilities of one position, and restore an entry that AsyncLLM loses.

    The sampled token comes first and may occur again among the most likely tokens. When AsyncLLM merges unread outputs,
    it drops the second occurrence. `rank`: the place of the sampled token among the most likely tokens, from 1.
    """
    if len(token_ids) == width - 1:
        token_ids = [*token_ids[:rank], token_ids[0], *token_ids[rank:]]
        logprobs = [*logprobs[:rank], logprobs[0], *logprobs[rank:]]
    return PositionLogprobs(token_ids[:width], logprobs[:width])
