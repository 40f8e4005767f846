"""The call service, which carries a call from arrival to end, for all APIs. The file follows the order of a call's
steps."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.api.types import EngineRequest
from cluster.gateway.apis.bodies import Bodies
from cluster.gateway.apis.json_values import MAX_IDS
from cluster.gateway.apis.request_ids import random_id
from cluster.gateway.auth.authenticator import Authenticator, NoAuthentication
from cluster.gateway.calls import request as requests
from cluster.gateway.calls.call import Call, CallUsage
from cluster.gateway.calls.cleanup import Cleanup
from cluster.gateway.calls.life import Life
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.sequence import OutputSequence
from cluster.gateway.demand import within_slo
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.submission import check_size
from cluster.gateway.text.logprobs import LogprobTexts
from cluster.gateway.text.tokenizer import ANY_LENGTH, TextModel
from cluster.observe.metrics import Metrics
from cluster.policy.routing.version_split import Versions
from cluster.policy.scheduling.worker_losses import MOST_SILENT
from cluster.policy.tenants.identity import Principal
from cluster.process import ticks
from cluster.process.call_errors import is_call_failure

if TYPE_CHECKING:
    from cluster.gateway.guards.guards import CallGuards, Guards
    from cluster.gateway.resume_tokens.resumption import ResumeService
    from cluster.gateway.resume_tokens.token_chain import TokenChain
    from cluster.gateway.usage.prompt_log import PromptLog

log = structlog.get_logger("calls")

FEW_IDS = 4096
"""Maximum number of token ids that are checked without numpy. Longer prompts are checked as a numpy array."""
START_PROGRESS_S = 1.0
"""Interval in seconds of the progress reports to a call that waits for its model to start."""
SHORT_OF_CAPACITY = (
    Outcome.QUEUE_FULL,
    Outcome.SHED,
    Outcome.DEADLINE_EXCEEDED,
    Outcome.DEADLINE_UNREACHABLE,
    Outcome.MODEL_LOADING,
    Outcome.NO_WORKER,
    Outcome.WORKER_LOST,
)
"""Outcomes that might have been prevented by more replicas."""
FALLBACK_LABEL = "fallback_for"
"""Name of the label in a usage record that holds the requested model, if a fallback model served the call."""
DEADLINE_SLACK_S = 0.1
"""Tolerance in seconds for callers that cancel at their deadline. The caller's clock for the deadline started before
the request arrived here, so the deadline passes at the caller first."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a silent call. `state` is queued, prefill, running, resuming (the call's worker was lost) or the
    model's state. `queue_position` counts from 1 and is 0 if the call is not queued. While no worker serves the model,
    `fraction` is the progress of the model's start in [0, 1], and `eta_s` is the estimated remaining time of the start
    in seconds. Both are estimated from earlier starts, and 0 if unknown."""

    state: str
    queue_position: int
    fraction: float = 0.0
    eta_s: float = 0.0


@dataclass(slots=True)
class Opening:
    """The facts known so far of a call that is being opened."""

    request: requests.GenerationRequest
    meta: CallMeta
    arrived: float
    model_name: str = ""
    chain: TokenChain | None = None
    """Chain of the presented resume tokens, if the call began at another gateway."""
    requested: KnownModel = field(init=False)
    model: KnownModel = field(init=False)
    """The model that serves the call: the requested model or a fallback model."""
    versions: Versions = field(init=False)
    text: TextModel = field(init=False)
    max_model_len: int = 0
    prompt_ids: array[int] = field(default_factory=lambda: array("I"))
    guards: CallGuards | None = None
    call: Call | None = None


class CallService:
    """Call service of one gateway, which opens calls. When the context of a call is left, the call's slots are freed,
    the call leaves the queue, and its accounts and metrics are settled."""

    def __init__(
        self,
        directory: ModelDirectory,
        scheduler: Scheduler,
        reservations: QuotaReservations,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        authenticator: Authenticator | None = None,
        max_attempts: int = 3,
        guards: Guards | None = None,
        max_silent_losses: int = MOST_SILENT,
        resumes: ResumeService | None = None,
        prompts: PromptLog | None = None,
    ) -> None:
        """`max_attempts`: number of workers that may fail a sequence before its call fails. `max_silent_losses`: number
        of workers that a sequence may lose in a row without a token in between. `guards`: required if policies name
        guards. `resumes`: the resume service, None if streams cannot be resumed. `prompts`: the prompt log for tenants
        whose policy asks for prompt logging."""
        self.max_attempts = max_attempts
        self.max_silent_losses = max_silent_losses
        self._guards = guards
        self._reservations = reservations
        self.authenticator: Authenticator = authenticator if authenticator is not None else NoAuthentication()
        self.authenticator.on_change.add(self._end_suspended)
        self.directory = directory
        self.bodies = Bodies()
        self.scheduler = scheduler
        self.metrics = metrics
        self.clock = clock
        self.wall_s: Callable[[], float] = time.time
        self.resumes = resumes
        self.on_close: set[Callable[[], None]] = set()
        self._open: dict[str, Call] = {}
        self._closing = ""
        self.prompts = prompts

    def statistics(self) -> dict[str, int]:
        """Return the number of open calls by model. The mapping is empty when the gateway is idle."""
        counts: dict[str, int] = {}
        for call in list(self._open.values()):
            counts[call.model] = counts.get(call.model, 0) + 1
        return counts

    @property
    def busy(self) -> bool:
        """Whether at least one call is open."""
        return bool(self._open)

    def _resume_service(self) -> ResumeService:
        if self.resumes is None:
            raise CallError(Outcome.UNSUPPORTED_FEATURE, "this gateway cannot resume streams: send a new call")
        return self.resumes

    async def hand_over(self, by: float) -> None:
        """End the resumable streams one after the other until the time `by`. The streams with the most tokens left end
        first. The ends are spread evenly over time, so that each stream finds capacity and a short prefill queue at
        another gateway."""
        streams = [
            call for call in self._open.values() if call.resume_tokens is not None and call.first_token_at is not None
        ]
        streams.sort(key=_tokens_left)
        while streams and (left_s := by - self.clock()) > 0:
            call = streams.pop()
            if call.id in self._open:
                self._end_for_resume(call, retry_after_s=0.0)
                await asyncio.sleep(left_s / (len(streams) + 1))

    def end_all(self) -> None:
        """End all open calls. Clients can continue resumable calls at another gateway."""
        for call in list(self._open.values()):
            self._end_for_resume(call, retry_after_s=0.1)

    def _end_for_resume(self, call: Call, retry_after_s: float) -> None:
        message = f"this gateway is {self._closing}; resume or repeat the call at another"
        call.fail(CallError(Outcome.NO_WORKER, message, retry_after_s=retry_after_s))

    def close(self, why: str) -> None:
        """Refuse new calls, and notify the sessions, each of which then ends with its last call."""
        self._closing = why
        for notify in list(self.on_close):
            notify()

    @property
    def closing(self) -> bool:
        """Whether new calls are refused."""
        return bool(self._closing)

    def progress(self, call: Call) -> Progress:
        """Return the progress of a silent call."""
        position = self.scheduler.queues.position(call)
        model = self.directory.find(call.model)
        if model is not None and not model.links:
            fraction, eta_s = model.start_progress(self.wall_s())
            return Progress(model.state.lower(), position, fraction, eta_s)
        if self.scheduler.queues.is_resuming(call):
            return Progress("resuming", position)
        return Progress("queued" if position else "running" if call.first_token_at is not None else "prefill", position)

    async def count(self, meta: CallMeta) -> CallMeta:
        """Count a tenant's request before the body is read, whatever the outcome will be. Returns metadata that marks
        the request as counted. Raises CallError RATE_LIMITED."""
        await self._reservations.count_request(meta.principal.tenant)
        return CallMeta(meta.request_id, meta.api, meta.deadline, meta.traceparent, meta.principal, counted=True)

    def longest_context(self, principal: Principal) -> int:
        """Return the longest context, in tokens, of the models that a caller may use; MAX_IDS if the context of one of
        these models is unknown."""
        lengths = [model.max_model_len for model in self.directory.open_to(principal)]
        return max(lengths) if lengths and all(lengths) else MAX_IDS

    async def tokenize(self, name: str, prompt: requests.Prompt, meta: CallMeta) -> tuple[array[int], int]:
        """Encode a prompt and charge its tokens to the tenant. Returns the token ids and the model's context length.
        Raises CallError."""
        model = self.directory.resolve(name, meta.principal)
        text = await self.directory.text_model(model)
        ids = await encode(prompt, text, meta.tenant, model.max_model_len)
        await self._reservations.charge(meta.principal.tenant, len(ids))
        return ids, model.max_model_len

    async def detokenize(self, name: str, token_ids: Sequence[int], meta: CallMeta) -> str:
        """Decode token ids into text and charge the ids to the tenant. Raises CallError."""
        model = self.directory.resolve(name, meta.principal)
        text = await self.directory.text_model(model)
        if model.max_model_len and len(token_ids) > model.max_model_len:
            raise invalid("token_ids", f"at most {model.max_model_len} (the model's context), got {len(token_ids)}")
        ids = _in_vocabulary(token_ids, text.vocab_size, "token_ids") if len(token_ids) else array("I")
        await self._reservations.charge(meta.principal.tenant, len(ids))
        return await text.decode_async(meta.tenant, ids, "token_ids")

    @asynccontextmanager
    async def open(self, request: requests.GenerationRequest, meta: CallMeta) -> AsyncIterator[Call]:
        """Open a call that lasts as long as the context. Raises CallError if the call cannot run. An error that is
        raised in the context ends the call with the outcome of the error."""
        cleanup = Cleanup(meta.request_id)
        opening = Opening(request, meta, self.clock())
        cleanup.add(lambda outcome: self._count_end(opening, outcome))
        try:
            call = await self._begin(opening, cleanup)
            yield call
        except CallError as error:
            cleanup.outcome = error.outcome
            raise
        except asyncio.CancelledError:
            deadline = opening.meta.deadline
            late = deadline is not None and self.clock() >= deadline - DEADLINE_SLACK_S
            cleanup.outcome = Outcome.DEADLINE_EXCEEDED if late else Outcome.CANCELLED
            raise
        except Exception:  # counted as INTERNAL; the API answers
            cleanup.outcome = Outcome.INTERNAL
            log.exception("call_failed", request_id=meta.request_id)
            raise
        except BaseException as error:
            if not is_call_failure(error):
                raise
            cleanup.outcome = Outcome.INTERNAL
            log.exception("call_failed", request_id=meta.request_id)
            message = f"unexpected failure; quote request id {meta.request_id}"
            raise CallError(Outcome.INTERNAL, message) from error
        finally:
            await cleanup.run()

    async def _begin(self, opening: Opening, cleanup: Cleanup) -> Call:
        """Take the steps from a request to a queued call, in order. Each step registers its undo step with
        `cleanup`."""
        if self._closing:
            raise CallError(Outcome.NO_WORKER, f"this gateway is {self._closing}; call another", retry_after_s=0.1)
        if opening.request.resume is not None:
            await self._read_resume_tokens(opening)
        requests.check_options(opening.request.options)
        if opening.request.metadata:
            requests.check_metadata(opening.request.metadata)
        self._choose_model(opening)
        await self._encode(opening, cleanup)
        if (suspended := self.authenticator.tenant_error(opening.meta.tenant)) is not None:  # since the call arrived
            raise suspended
        call = self._create_call(opening)
        self._hold_open(call, opening, cleanup)
        if opening.model is not opening.requested:
            self._record_fallback(call, opening.requested)
        if (resumes := self.resumes) is not None and opening.request.resumable:
            cleanup.add(lambda outcome: resumes.give_up(call, outcome))
            cleanup.add(lambda outcome: resumes.leave(call))
            digest = opening.model.bundle_digest_of(opening.versions.first)
            resumes.begin(call, opening.request, opening.meta, digest, opening.chain)
        cleanup.add(lambda outcome: self._reservations.settle(call))
        await self._reservations.admit(call)
        if opening.model is not opening.requested:
            call.add_headers([("x-headrace-model", opening.model.name)])
        if call.error is not None:  # the tenant was suspended while its limits were checked
            raise call.error
        if opening.chain is not None:
            await self._resume_service().take_over(call, opening.chain)
        if (accounting := self.scheduler.host.accounting) is not None:
            cleanup.add(lambda outcome: accounting.ended(call, outcome))
        cleanup.add(lambda outcome: self.scheduler.canaries.ended(call, outcome))
        cleanup.add(lambda outcome: self.scheduler.leave(call))
        self.scheduler.enter(call, opening.model)
        return call

    async def _read_resume_tokens(self, opening: Opening) -> None:
        chain = await self._resume_service().read(opening.request, opening.meta.principal)
        opening.chain, opening.model_name = chain, chain.call_head.model
        deadline = self._resume_service().deadline(chain, opening.meta.deadline)
        opening.meta = replace(opening.meta, deadline=deadline)

    def _choose_model(self, opening: Opening) -> None:
        """Choose the requested model or one of its fallbacks, and the versions on which the call may begin."""
        chain, principal = opening.chain, opening.meta.principal
        name = opening.request.model if chain is None else chain.call_head.model
        requested = model = self.directory.resolve(name, principal, began=chain is not None)
        if model.entry.fallback and not model.served and chain is None:
            model = self.directory.fallback_of(model, principal) or model
        opening.requested, opening.model, opening.model_name = requested, model, model.name
        request_id = opening.meta.request_id if chain is None else chain.call_head.request_id
        opening.versions = model.choose_version(request_id, "" if chain is None else chain.bundle_digest)

    async def _encode(self, opening: Opening, cleanup: Cleanup) -> None:
        """Encode the prompt. If the tenant's guards change the prompt, encode the changed prompt again."""
        policy, model, request = opening.meta.principal.tenant, opening.model, opening.request
        opening.text = text = await self.directory.text_model(model, opening.versions.first)
        max_model_len = model.max_model_len
        if policy.max_context_tokens:
            max_model_len = min(max_model_len, policy.max_context_tokens)
        opening.max_model_len = max_model_len
        opening.prompt_ids = await encode(request.prompt, text, policy.name, max_model_len)
        if not policy.guards:
            return
        # Guards search the whole prompt, so they run after the first encoding, which bounds the prompt's length.
        guards = opening.guards = self._guards_of(opening.meta, model.name)
        cleanup.add(lambda outcome: guards.close())
        guarded = await guards.prompt(request.prompt, text)
        if guarded is not request.prompt:
            opening.request = replace(request, prompt=guarded)
            opening.prompt_ids = await encode(guarded, text, policy.name, max_model_len)

    def _hold_open(self, call: Call, opening: Opening, cleanup: Cleanup) -> None:
        """Keep the call among the open calls until the call ends."""
        opening.call = call

        def close(outcome: Outcome) -> None:
            self._open.pop(call.id, None)
            for sequence in call.sequences:
                sequence.unlink_call()

        cleanup.add(close)
        if self.prompts is not None:
            prompts, text = self.prompts, opening.text
            cleanup.add(lambda outcome: prompts.ended(call, opening.request.prompt, text, outcome))
        self._open[call.id] = call

    def _create_call(self, opening: Opening) -> Call:
        """Create the call and its sequences, without queueing them."""
        request, meta, model, text = opening.request, opening.meta, opening.model, opening.text
        prompt_ids, max_model_len, versions, guards = (
            opening.prompt_ids, opening.max_model_len, opening.versions, opening.guards
        )  # fmt: skip
        options = request.options
        policy = meta.principal.tenant
        if not max_model_len:
            raise CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared; retry later")
        sampling = requests.sampling(
            request,
            model.default_sampling_of(versions.first),
            len(prompt_ids),
            max_model_len,
            text.vocab_size,
            policy.max_output_tokens,
            text.eos_token_ids,
        )
        rank = self.scheduler.charges.rank_of(policy.priority_class)
        call = Call(
            id=f"{'chatcmpl' if requests.is_chat(request.prompt) else 'cmpl'}-{random_id()}",
            model=model.name,
            policy=policy,
            rank=rank,
            arrived=opening.arrived,
            deadline=meta.deadline,
            clock=self.clock,
            events=self.scheduler,
            itl=self.metrics.histogram("inter_token_latency_seconds", model.name),
            request_id=meta.request_id,
            counted=meta.counted,
            versions=versions,
            bundle_digest=model.bundle_digest_of(versions.first),
            usage=CallUsage(prompt_tokens=len(prompt_ids)),
            labels={**request.metadata, **policy.labels},
            key_id=meta.principal.subject if meta.principal.by == "key" else "",
        )
        salt = self.authenticator.cache_salt(meta.principal, request.cache_salt)
        for index in range(options.n):
            seed = None if sampling.seed is None else sampling.seed + index
            engine_request = EngineRequest(
                request_id="",
                prompt_token_ids=prompt_ids,
                sampling=sampling if index == 0 else replace(sampling, seed=seed),
                traceparent=meta.traceparent,
                cache_salt=salt,
                priority=rank,
            )
            if not index:
                check_size(engine_request)
            plain = text.detokenizer(prompt_ids, stop=options.stop, min_tokens=sampling.min_tokens)
            top = options.logprobs if options.logprobs_returned is None else options.logprobs_returned
            logprob_texts = None if top is None else LogprobTexts(text, top)
            detokenizer, logprobs = (plain, logprob_texts) if guards is None else guards.output(plain, logprob_texts)
            life = Life(self.max_attempts, self.max_silent_losses)
            call.sequences.append(OutputSequence(call, index, engine_request, detokenizer, logprobs, life))
        return call

    def _record_fallback(self, call: Call, requested: KnownModel) -> None:
        """Count a call that is served by a fallback model as demand for the requested model, and label the call's usage
        record."""
        self.scheduler.count_missed(call, requested)
        call.add_label(FALLBACK_LABEL, requested.name)
        self.metrics.count("route_decisions_total", requested.name, "fallback")

    def _guards_of(self, meta: CallMeta, model: str) -> CallGuards:
        """Return the guards of a call. The policy of the call's tenant must name at least one guard."""
        assert self._guards is not None, "a policy names guards, but the service has none"
        return self._guards.for_call(meta.principal.tenant, model, meta.request_id, meta.principal.subject)

    def _count_end(self, opening: Opening, outcome: Outcome) -> None:
        """Update the metrics for a call that has ended or could not begin."""
        call, model, meta = opening.call, opening.model_name, opening.meta
        metrics = self.metrics
        metrics.count("requests_total", model, meta.tenant, meta.api, outcome.value)
        if call is not None:
            self._count_slo(call, outcome)
        if call is None or call.first_token_at is None:
            if outcome not in (Outcome.OK, Outcome.CANCELLED):
                metrics.count("rejected_total", model, outcome.value)
            return
        call.count()
        usage = call.usage
        metrics.histogram("request_duration_seconds", model).observe(self.clock() - opening.arrived)
        metrics.histogram("time_to_first_token_seconds", model).observe(usage.ttft_s)
        metrics.histogram("queue_time_seconds", model).observe(usage.queue_s)
        if call.pays_prompt:
            metrics.count("prompt_tokens_total", model, meta.tenant, by=usage.prompt_tokens)
        metrics.count("cached_tokens_total", model, meta.tenant, by=usage.cached_tokens)
        metrics.count("generation_tokens_total", model, meta.tenant, by=call.new_tokens)

    def _count_slo(self, call: Call, outcome: Outcome) -> None:
        """Count whether a call met the SLO of its model. A cancelled or invalid call does not count, unless the call
        had already missed the objective for the time to first token."""
        known = self.directory.find(call.model)
        if known is None or call.is_resumed:
            return
        entry, served = known.entry, outcome is Outcome.OK
        ttft_s = call.usage.ttft_s if call.first_token_at is not None else None
        late = entry.slo_ttft_s and self.clock() - call.arrived > entry.slo_ttft_s and ttft_s is None
        if not served and not late and outcome not in SHORT_OF_CAPACITY:
            return
        met = served and within_slo(ttft_s, call.mean_gap_s, entry.slo_ttft_s, entry.slo_itl_s)
        self.scheduler.queues.tally.count_slo(call.model, call.policy.priority_class, call.rank, met)

    def _end_suspended(self) -> None:
        """End all open calls of tenants that may no longer make calls."""
        errors = {
            tenant: self.authenticator.tenant_error(tenant) for tenant in {call.tenant for call in self._open.values()}
        }
        for call in list(self._open.values()):
            error = errors[call.tenant]
            if error is not None:
                call.fail(error)

    def abort(self, request_id: str, tenant: str = "") -> list[str]:
        """End the open calls with this request id or call id. If `tenant` is not empty, only calls of that tenant are
        ended. Returns the tenant of each ended call."""
        calls = [c for c in self._open.values() if request_id in (c.request_id, c.id) and tenant in ("", c.tenant)]
        for call in calls:
            call.fail(CallError(Outcome.CANCELLED, "cancelled by the cluster's operators"))
        return [call.tenant for call in calls]

    def _waits_for_start(self, call: Call) -> bool:
        """Return whether the call waits for a model that no worker serves."""
        if call.first_token_at is not None:
            return False
        model = self.directory.find(call.model)
        return model is not None and not model.served

    async def send_keepalives(self, keepalive_s: float) -> None:
        """Send keep-alives for silent calls, end calls that have waited too long, and update service accounts. A call
        gets a keep-alive after `keepalive_s` seconds of silence, or after START_PROGRESS_S if no worker serves its
        model. Runs until cancelled, with a pass every 0.25 s or less."""
        while True:
            await ticks.sleep_to_tick(min(keepalive_s / 4, 0.25))
            try:
                self.scheduler.expire()
            except Exception:  # the next pass and all other calls must still run
                log.exception("expiry_failed")
            now = self.clock()
            for call in list(self._open.values()):
                try:
                    self._update_call(call, now, keepalive_s)
                except Exception as error:
                    call.fail_unexpectedly(error)

    def _update_call(self, call: Call, now: float, keepalive_s: float) -> None:
        self.scheduler.follow(call)
        silent_s = now - call.heard_at
        if silent_s >= keepalive_s or (silent_s >= START_PROGRESS_S and self._waits_for_start(call)):
            call.fall_silent(now)


async def encode(
    prompt: requests.Prompt, text: TextModel, tenant: str = "default", max_model_len: int = 0
) -> array[int]:
    """Encode a prompt. A long prompt is encoded outside the event loop. A `max_model_len` of 0 allows any length.

    Raises CallError. A text that certainly leaves no room for output is refused before it is tokenized.
    """
    if requests.is_chat(prompt) and not text.has_chat_template:
        raise CallError(
            Outcome.UNSUPPORTED_FEATURE, "the model has no chat template: use Complete with a formatted prompt"
        )
    most = max_model_len - 1 if max_model_len else ANY_LENGTH
    if isinstance(prompt, requests.PackedPrompt):
        ids = await text.packed_ids_async(tenant, prompt, most)
    elif isinstance(prompt, requests.ChatPrompt):
        return await text.chat_ids_async(tenant, prompt.messages, most, **prompt.template_options)
    elif isinstance(prompt, requests.TextPrompt):
        ids = await text.prompt_ids_async(tenant, prompt.text, most)
    else:
        if len(prompt.token_ids) > most:
            raise requests.too_long(len(prompt.token_ids), max_model_len, chat=False)
        ids = _in_vocabulary(prompt.token_ids, text.vocab_size)
    if not ids and not requests.is_chat(prompt):
        raise invalid("prompt", "must not be empty")
    return ids


def _tokens_left(call: Call) -> int:
    return max(sequence.request.sampling.max_tokens - len(sequence.emitted) for sequence in call.sequences)


def _in_vocabulary(ids: Sequence[int], vocab_size: int, field: str = "prompt_token_ids") -> array[int]:
    if 0 < len(ids) <= FEW_IDS and min(ids) >= 0 and max(ids) < vocab_size:
        return array("I", ids)
    import numpy as np  # not imported at start: deferred_imports.py

    values = np.asarray(ids)
    if values.dtype.kind not in "iu":  # integers beyond 64 bits become objects
        values = np.asarray(ids, np.int64)
    wrong = np.flatnonzero((values < 0) | (values >= vocab_size))
    if wrong.size:
        i = int(wrong[0])
        raise invalid(f"{field}[{i}]", f"must be in 0 to {vocab_size - 1} (the vocabulary), got {values[i]}")
    return array("I", values.astype(np.uint32).tobytes())
