"""The fast path: vLLM's engine core without AsyncLLM, with one call per step for all requests.

AsyncLLM costs each request a generator, an output processor and a task switch per token. The fast path instead reads
the message that the engine core sends for each step. At 64 streams, this takes about a fifth of AsyncLLM's CPU time per
token. The disadvantage is the use of private names, which change between releases. All of these names are listed in
SYMBOLS, which is checked at start. If a name is missing, the engine uses the public AsyncLLM instead (public_path.py).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.ports import EngineDead
from cluster.api.types import SLOW_GRAMMAR, FinishReason, PositionLogprobs, TokenOutput
from cluster.worker.engine.vllm.grammar.mask_times import SLOW
from cluster.worker.engine.vllm.packed_ids import packed, takes_packed
from cluster.worker.engine.vllm.paths import LiveRequest, StepStats, core_exit, end
from cluster.worker.engine.vllm.pooling import set_vector
from cluster.worker.engine.vllm.request_times import core_times

NAN_MESSAGE = "NaN in the logits"
NOT_ITS_GRAMMAR = "the emitted tokens do not follow response_format, or it could not be compiled"

SYMBOLS: dict[str, tuple[str, ...]] = {
    "vllm.renderers.renderer_from_config": ("config",),
    "vllm.renderers.BaseRenderer.shutdown": (),
    "vllm.renderers.BaseRenderer.get_eos_token_id": (),
    "vllm.transformers_utils.config.maybe_register_config_serialize_by_value": (),
    "vllm.v1.engine.input_processor.InputProcessor": ("vllm_config", "renderer"),
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs": (
        "request_id",
        "prompt",
        "params",
        "supported_tasks",
        "priority",
        "lora_request",
    ),
    "vllm.v1.engine.core_client.EngineCoreClient.make_async_mp_client": (
        "vllm_config",
        "executor_class",
        "log_stats",
        "renderer",
    ),
    "vllm.v1.engine.core_client.AsyncMPClient.add_request_async": ("request",),
    "vllm.v1.engine.core_client.AsyncMPClient.abort_requests_async": ("request_ids",),
    "vllm.v1.engine.core_client.AsyncMPClient.add_lora_async": ("lora_request",),
    "vllm.v1.engine.core_client.AsyncMPClient.remove_lora_async": ("lora_id",),
    "vllm.v1.engine.core_client.AsyncMPClient.get_output_async": (),
    "vllm.v1.engine.core_client.AsyncMPClient.get_supported_tasks_async": (),
    "vllm.v1.engine.core_client.AsyncMPClient.shutdown": ("timeout",),
    "vllm.v1.engine.core_client.BackgroundResources": ("engine_dead",),
    "vllm.v1.engine.EngineCoreRequest": ("external_req_id", "request_id", "prompt_token_ids"),
    "vllm.lora.request.LoRARequest": ("lora_name", "lora_int_id", "lora_path"),
    "vllm.v1.engine.EngineCoreOutputs": ("outputs", "scheduler_stats"),
    "vllm.v1.engine.EngineCoreOutput": (
        "request_id",
        "new_token_ids",
        "new_logprobs",
        "finish_reason",
        "stop_reason",
        "prefill_stats",
        "num_nans_in_logits",
        "pooling_output",
        "events",
    ),
    "vllm.v1.engine.EngineCoreEventType": ("PREEMPTED",),
    "vllm.v1.engine.FinishReason": ("STOP", "LENGTH", "ABORT", "ERROR", "REPETITION"),
    "vllm.v1.engine.exceptions.EngineDeadError": (),
    "vllm.v1.executor.Executor.get_class": ("vllm_config",),
    "vllm.v1.metrics.stats.PrefillStats": ("num_cached_tokens",),
    "vllm.v1.metrics.stats.SchedulerStats": (
        "num_running_reqs",
        "num_waiting_reqs",
        "num_skipped_waiting_reqs",
        "kv_cache_usage",
    ),
    "vllm.v1.serial_utils.MsgpackDecoder": (),
    "vllm.v1.serial_utils.MsgpackEncoder": (),
    "vllm.v1.outputs.LogprobsLists": ("logprob_token_ids", "logprobs"),
}


class FastPath:
    """The fast way to use vLLM: this class directly calls two parts of vLLM, the client of the engine core and the
    input processor, without AsyncLLM. Both parts are built as in AsyncLLM's constructor."""

    def __init__(self, vllm_config: Any, stats: StepStats) -> None:
        """Start the engine core. Blocks until the model is loaded. `stats` is updated after each step.

        Call the constructor in a thread without an event loop. The client's sockets and tasks then bind to the event
        loop in which they are first used.
        """
        from vllm.renderers import renderer_from_config
        from vllm.transformers_utils.config import maybe_register_config_serialize_by_value
        from vllm.v1.engine import EngineCoreEventType, EngineCoreRequest
        from vllm.v1.engine.core_client import EngineCoreClient
        from vllm.v1.engine.exceptions import EngineDeadError
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.executor import Executor
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        maybe_register_config_serialize_by_value()
        self._stats = stats
        self._dead_error: type[Exception] = EngineDeadError
        self._preempted = EngineCoreEventType.PREEMPTED
        self._renderer = renderer_from_config(vllm_config)
        self._processor = InputProcessor(vllm_config, self._renderer)
        self._takes_packed = takes_packed(EngineCoreRequest, MsgpackEncoder, MsgpackDecoder)
        self.tasks: Sequence[str] = ()
        self._core: Any = EngineCoreClient.make_async_mp_client(
            vllm_config=vllm_config,
            executor_class=Executor.get_class(vllm_config),
            log_stats=True,
            renderer=self._renderer,
        )

    async def ready(self) -> None:
        """Fetch the tasks that the core supports, such as `generate` or `embed`.

        The call also starts the asyncio task that reads the core's outputs.
        """
        try:
            self.tasks = await self._core.get_supported_tasks_async()
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    def prepare(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: Any,
        priority: int,
        reasoning: Mapping[str, Any],
        adapter: Any = None,
    ) -> Any:
        """Validate a request and build the form in which the engine core gets it. Raises vLLM's validation errors.

        vLLM's processor gets only the first token id of the prompt, because its check of a long prompt would take as
        long as the rest of this method. requests.py has already checked all ids and their number.
        """
        ids = prompt["prompt_token_ids"]
        request = self._processor.process_inputs(
            request_id,
            {**prompt, "prompt_token_ids": [ids[0]]},
            params,
            supported_tasks=self.tasks,
            priority=priority,
            lora_request=adapter,
        )
        if isinstance(ids, array):
            ids = packed(ids) if self._takes_packed else ids.tolist()
        request.prompt_token_ids = ids
        request.external_req_id = request_id
        for name, value in reasoning.items():
            if hasattr(request, name):  # otherwise this release's core decides where a grammar begins
                setattr(request, name, value)
        return request

    async def add(self, prepared: Any) -> None:
        """Send a prepared request to the engine core. Raises EngineDead."""
        try:
            await self._core.add_request_async(prepared)
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    async def add_adapter(self, request: Any) -> bool:
        """Load an adapter between two steps. Raises EngineDead, or vLLM's error."""
        try:
            return bool(await self._core.add_lora_async(request))
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    async def remove_adapter(self, number: int) -> None:
        """Remove an adapter between two steps. Raises EngineDead."""
        try:
            await self._core.remove_lora_async(number)
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests in the engine core. Raises EngineDead."""
        try:
            await self._core.abort_requests_async(list(request_ids))
        except self._dead_error as error:
            raise EngineDead(str(error)) from error

    async def collect(self, live: Mapping[str, LiveRequest]) -> list[TokenOutput]:
        """Wait for one message from the engine core and return the outputs in it. Raises EngineDead."""
        try:
            step = await self._core.get_output_async()
        except self._dead_error as error:
            raise EngineDead(str(error)) from error
        self._stats.stepped(time.monotonic(), step.scheduler_stats)
        poisoned = [o.request_id for o in step.outputs if o.num_nans_in_logits and o.request_id in live]
        if poisoned:  # before the loop: other requests may be aborted during the await
            await self.abort(poisoned)
        outputs = []
        for given in step.outputs:
            if given.events is not None:
                self._stats.preempted(sum(event.type == self._preempted for event in given.events))
            record = live.get(given.request_id)
            if record is None:  # aborted during the step
                continue
            if given.num_nans_in_logits:
                outputs.append(TokenOutput(given.request_id, (), FinishReason.ERROR, message=NAN_MESSAGE))
                continue
            output = TokenOutput(given.request_id, given.new_token_ids)
            if record.first or given.finish_reason is not None or given.new_logprobs is not None:
                if record.first and record.is_traced:
                    output.times = core_times(given, step)
                _complete(output, given, record)
            outputs.append(output)
        return outputs

    def eos_token_id(self) -> int | None:
        """Return the tokenizer's EOS id."""
        eos = self._renderer.get_eos_token_id()
        return None if eos is None else int(eos)

    def dead(self) -> bool:
        """Return whether the client's monitor thread has reported the core's end."""
        return bool(self._core.resources.engine_dead)

    def core_exit(self) -> int | None:
        """Return the exit code of the engine core's process; None while it runs."""
        return core_exit(self._core)

    def close(self) -> None:
        """End the engine core and its ranks."""
        self._renderer.shutdown()
        end(self._core, self._core.shutdown)


def _complete(output: TokenOutput, given: Any, record: LiveRequest) -> None:
    """Fill in the fields that only some outputs have: the fields of a first output, the fields of a last output, and
    log probabilities."""
    first, record.first = record.first, False
    if first:
        output.prompt_tokens = record.prompt_tokens
        if given.prefill_stats is not None:
            output.cached_tokens = min(given.prefill_stats.num_cached_tokens, record.prompt_tokens)
    if given.finish_reason is not None:
        output.finish = FinishReason(int(given.finish_reason) + 1)
        if given.stop_reason in record.stop_token_ids:
            output.stop_token_id = given.stop_reason
        if output.finish is FinishReason.ERROR:
            refused = record.grammar and record.emitted_tokens and first
            output.message = NOT_ITS_GRAMMAR if refused else "the engine failed on this request"
            if given.stop_reason == SLOW:
                output.message = SLOW_GRAMMAR
        elif record.pooling and output.finish is FinishReason.STOP:
            set_vector(output, given.pooling_output)
    if given.new_logprobs is not None and record.logprobs is not None:
        width = record.logprobs + 1
        rows = zip(given.new_logprobs.logprob_token_ids, given.new_logprobs.logprobs, strict=True)
        output.logprobs = [PositionLogprobs(ids[:width].tolist(), values[:width].tolist()) for ids, values in rows]
