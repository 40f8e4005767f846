"""The steps from a pooling request to a pooling call with its sequences. call_service.py calls the steps in order."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.pooling import POOLS, PoolingInfo, PoolingOptions, PoolingTask
from cluster.api.types import POOLING_SAMPLING, EngineRequest
from cluster.gateway.auth.authenticator import Authenticator
from cluster.gateway.calls.call_opening import CallOpening, not_prepared
from cluster.gateway.calls.pooling.pooled_sequence import FLOAT_BYTES, PooledSequence
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import (
    WHOLE_CONTEXT,
    IdsInputs,
    PackedIds,
    PairInputs,
    PoolingInputs,
    PoolingRequest,
    text_lengths,
)
from cluster.gateway.calls.sequences.life import Life
from cluster.gateway.calls.tokenization import ids_of_inputs, tokens_to_read
from cluster.gateway.calls.unread_answers import UnreadAnswer
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.models.target import Target
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.submission import check_size
from cluster.observe.trace_context import unsampled

if TYPE_CHECKING:
    from cluster.gateway.guards.guards import CallGuards, Guards

SLICE: Final = 128
"""Number of sequences that are created at once, which takes about 2 ms."""
MAX_UNCOUNTED_CHARS: Final = 64 << 10
"""Number of characters, or of token ids, in texts that may be cut without counting in the budget of request bytes."""
CHARS_PER_TOKEN: Final = 16
"""Largest ratio of characters to tokens at which the queue's bound on tokens also bounds the memory of the texts."""
UNKNOWN_LENGTH: Final = 4096
"""Length of a vector that is assumed for a model whose worker does not report it."""
SHOWN_LENGTHS: Final = 32
"""Maximum number of vector lengths that an error message lists."""


@dataclass(slots=True)
class PoolingOpening(CallOpening):
    """A pooling call that is being opened (see CallOpening)."""

    request: PoolingRequest
    unread: UnreadAnswer | None = None
    """Counts the vectors until the answer was read."""
    task: PoolingTask = field(init=False)
    inputs: PoolingInputs = field(init=False)
    ids: PackedIds | Sequence[array[int]] = field(init=False, default=())
    second_text: Callable[[int], int] = field(init=False)

    @property
    def prepaid_tokens(self) -> int:
        """Number of tokens that are charged before the inputs are read."""
        return 0 if isinstance(self.inputs, IdsInputs) else tokens_to_read(self.inputs.chars)

    @property
    def answer_bytes(self) -> int:
        """Approximate memory of the answer in bytes: the vectors, and the documents, which it may repeat."""
        info = self.model.capabilities.pooling
        length = self.request.dimensions or (UNKNOWN_LENGTH if info is None else info.dimensions)
        documents = sum(text_lengths(self.inputs.second)) if isinstance(self.inputs, PairInputs) else 0
        return len(self.inputs) * FLOAT_BYTES * (1 if self.task is PoolingTask.SCORE else length) + documents

    @property
    def prompt(self) -> PoolingInputs:
        """The inputs, for the prompt log."""
        return self.inputs

    def choose_model(self, directory: ModelDirectory) -> None:
        """Choose the requested model or one of its fallbacks, the task, and the versions on which the call may
        begin."""
        target = directory.lookup.target(self.request.model, self.meta.principal)
        requested = model = target.model
        self.model_name = model.name
        task = self._task_of(model)
        if task is None and model.capabilities.tasks is not None:
            raise self._no_task(model)
        if target.adapter:
            raise _no_adapter(target)
        if model.entry.fallback and not model.served:
            model = directory.lookup.fallback_of(model, self.meta.principal, suits=self._suits) or model
            task = self._task_of(model) or task
        if task is None:
            raise not_prepared(model)
        self.requested, self.model, self.model_name, self.task = requested, model, model.name, task
        self.versions = model.versions.choose(self.meta.request_id)
        inputs = self.request.inputs
        self.inputs = inputs.apart() if isinstance(inputs, PairInputs) and task is PoolingTask.EMBED else inputs
        if self.request.dimensions is not None:
            self._check_dimensions(self.request.dimensions, model.capabilities.pooling)

    def _suits(self, model: KnownModel) -> bool:
        return self._task_of(model) is not None

    def _task_of(self, model: KnownModel) -> PoolingTask | None:
        """Return the task with which a model answers the request: `embed` or `score`. Returns None if the model has no
        suitable task. While the tasks of the model are unknown, texts get the task EMBED. Pairs then get None, because
        their encoding depends on the task."""
        tasks, is_pairs = model.capabilities.tasks, isinstance(self.request.inputs, PairInputs)
        if tasks is None:
            return None if is_pairs else PoolingTask.EMBED
        if is_pairs and PoolingTask.SCORE in tasks:
            return PoolingTask.SCORE
        return PoolingTask.EMBED if PoolingTask.EMBED in tasks else None

    def _no_task(self, model: KnownModel) -> CallError:
        tasks = ["score", "embed"] if isinstance(self.request.inputs, PairInputs) else ["embed"]
        wanted, capability = " or ".join(tasks), " or ".join(POOLS + task for task in tasks)
        has = (
            f"its tasks are {', '.join(sorted(model.capabilities.tasks))}"
            if model.capabilities.tasks
            else "it generates text"
        )
        return CallError(
            Outcome.UNSUPPORTED_FEATURE,
            f"model: {model.name} has no task {wanted}, {has}: choose a model that has one (`tasks` in GET /v1/models, "
            f"capability {capability} in ListModels)",
            violations=[Violation("model", f"has no task {wanted}")],
        )

    def _check_dimensions(self, wanted: int, info: PoolingInfo | None) -> None:
        name = self.request.dimensions_field
        if wanted < 1:
            raise invalid(name, f"must be at least 1, got {wanted}")
        if info is None or wanted == info.dimensions or wanted in info.shorter_dimensions:
            return
        if info.any_shorter:
            if wanted > info.dimensions:
                raise invalid(name, f"must be 1 to {info.dimensions}, got {wanted}")
            return
        allowed = sorted({*info.shorter_dimensions, info.dimensions})
        if len(allowed) == 1:
            raise invalid(
                name, f"must be {info.dimensions} or left out, got {wanted}: the model has no shorter vectors"
            )
        shown = ", ".join(map(str, allowed[-SHOWN_LENGTHS:]))
        raise invalid(name, f"must be one of {shown}; got {wanted}")

    async def encode(self, directory: ModelDirectory) -> None:
        """Encode the inputs."""
        self.text = await directory.text_model(self.model, self.bundle_digest)
        await self._encode()

    async def _encode(self) -> None:
        most = self.max_model_len = self.longest_context
        if not most:
            raise not_prepared(self.model)
        keep = self.request.truncate_tokens
        if keep is not None:
            if keep > most:
                raise invalid("truncate_prompt_tokens", f"must be at most {most} (the model's context), got {keep}")
            keep = most if keep == WHOLE_CONTEXT else keep
        inputs = self.inputs
        if isinstance(inputs, IdsInputs):
            self.ids = ids_of_inputs(inputs, most, keep, self.text.vocab_size, cuts_left=self.text.cuts_left)
            self.second_text = lambda i: 0
            return
        encoded = await self.text.encode_inputs_async(self.meta.tenant, inputs, most, keep)
        self.ids, self.second_text = encoded.ids, encoded.second_text

    @property
    def keeps_cut_texts(self) -> bool:
        """Whether the call keeps much text that was cut. The queue's bounds count only the tokens that are left."""
        if self.request.truncate_tokens is None:
            return False
        inputs = self.request.inputs
        if isinstance(inputs, IdsInputs):
            size = sum(map(len, inputs.token_ids))
        else:
            size = sum(sum(text_lengths(texts)) for texts in inputs.given)
        return size > MAX_UNCOUNTED_CHARS and size > CHARS_PER_TOKEN * sum(map(len, self.ids))

    def create_guards(self, guards: Guards) -> CallGuards:
        """Create the guards of the call."""
        principal = self.meta.principal
        return guards.for_call(
            principal.tenant, self.model.name, self.meta.request_id, principal.subject, self.log_fields
        )

    async def guard_prompt(self, guards: CallGuards) -> None:
        """Apply the guards to the inputs. If the guards change an input, encode the changed inputs."""
        guarded = await guards.inputs(self.inputs, self.text)
        if guarded is not self.inputs:
            self.inputs = guarded
            await self._encode()

    def create_call(self, scheduler: Scheduler, clock: Callable[[], float]) -> PoolingCall:
        """Create the call without its sequences."""
        request = self.request
        kind = "embd" if not isinstance(request.inputs, PairInputs) else "score"
        call = PoolingCall(
            **self.call_fields(kind, request.priority_class, request.metadata, scheduler, clock),
            inputs=self.inputs,
            task=self.task,
            prepaid_tokens=self.prepaid_tokens,
        )
        call.affinity = self.affinity(request.affinity_key, call.policy.flow)
        self.call = call
        return call

    async def create_sequences(self, authenticator: Authenticator, life: Callable[[], Life]) -> None:
        """Create the sequences of the call, one for each input. The sequences are created in slices, and other tasks
        run between the slices. `life`: returns the initial state of a sequence."""
        call, request = self.call, self.request
        assert isinstance(call, PoolingCall)
        first = EngineRequest(
            "",
            self.ids[0],
            POOLING_SAMPLING,
            cache_salt=authenticator.cache_salt(self.meta.principal, request.cache_salt),
            priority=call.rank,
            traceparent=unsampled(self.meta.traceparent),
            pooling=PoolingOptions(self.task, self._shorter_dimensions()),
        )
        check_size(first)
        for at in range(0, len(self.ids), SLICE):
            if at:
                await asyncio.sleep(0)
            call.add_inputs(
                PooledSequence(call, i, self._engine_request(first, i), life=life())
                for i in range(at, min(at + SLICE, len(self.ids)))
            )

    def _shorter_dimensions(self) -> int | None:
        """Return the vector length to request from the engine. Returns None for scores, for a request without a length,
        and for the model's own length. Reason for the last case: if a model has no shorter vectors, its engine refuses
        every explicit length, even the model's own."""
        wanted = self.request.dimensions
        if wanted is None or self.task is PoolingTask.SCORE:
            return None
        info = self.model.capabilities.pooling
        return None if info is not None and wanted == info.dimensions else wanted

    def _engine_request(self, first: EngineRequest, i: int) -> EngineRequest:
        """Return the engine request of input `i`. `first`: the engine request of input 0, from which the fields that
        are equal for all inputs are copied. `first` does not set `second_text_at` (where the second text of a pair
        begins), which differs by input."""
        pooling, second = first.pooling, self.second_text(i)
        assert pooling is not None
        if not i and not second:
            return first
        return EngineRequest(
            "",
            self.ids[i],
            POOLING_SAMPLING,
            cache_salt=first.cache_salt,
            priority=first.priority,
            traceparent=first.traceparent,
            pooling=replace(pooling, second_text_at=second) if second else pooling,
        )


def _no_adapter(target: Target) -> CallError:
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"model: {target.name} is an adapter, and adapters of models that compute vectors are not served: use "
        f"{target.model.name}",
        violations=[Violation("model", "is an adapter")],
    )
