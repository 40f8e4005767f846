"""One call from arrival to end, whichever API it came by. Reads in the order in which things happen."""

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
from cluster.gateway.scheduling.worker_losses import MOST_SILENT
from cluster.gateway.text.logprobs import LogprobTexts
from cluster.gateway.text.tokenizer import ANY_LENGTH, TextModel
from cluster.observe.metrics import Metrics
from cluster.policy.routing.version_split import Versions
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
"""Prompts of more are checked as an array."""
HELD_S = 1.0
"""How often a call that waits for a model to start is told how far that is."""
SHORT_OF_ROOM = (
    Outcome.QUEUE_FULL,
    Outcome.SHED,
    Outcome.DEADLINE_EXCEEDED,
    Outcome.DEADLINE_UNREACHABLE,
    Outcome.MODEL_LOADING,
    Outcome.NO_WORKER,
    Outcome.WORKER_LOST,
)
"""Ends of a call that more replicas might have spared it."""
FALLBACK_LABEL = "fallback_for"
"""In a usage record: the model that was asked for, where another has stood in for it."""
DEADLINE_SLACK_S = 0.1
"""A caller's deadline began before it got here, so it may hang up for it sooner than ours has passed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a call without news: queued, prefill, running, resuming (its worker was lost) or the model's state; the place
    in line, 1 the next, or 0. While nobody serves the model: how far its start is, in [0, 1], and how long it takes
    still (seconds), by what is known of its starts; 0 where that is nothing."""

    state: str
    queue_position: int
    fraction: float = 0.0
    eta_s: float = 0.0


@dataclass(slots=True)
class Opening:
    """What is known of a call while it is being opened."""

    request: requests.GenerationRequest
    meta: CallMeta
    arrived: float
    model_name: str = ""
    chain: TokenChain | None = None
    """Its resume tokens, where it was begun at another gateway."""
    asked: KnownModel = field(init=False)
    model: KnownModel = field(init=False)
    """The model that serves it: the one asked for, or its fallback."""
    versions: Versions = field(init=False)
    text: TextModel = field(init=False)
    max_model_len: int = 0
    prompt_ids: array[int] = field(default_factory=lambda: array("I"))
    guards: CallGuards | None = None
    call: Call | None = None


class CallService:
    """Opens calls. Every open call is closed by leaving its context: places freed, queue left, metrics settled."""

    def __init__(
        self,
        directory: ModelDirectory,
        scheduler: Scheduler,
        allowances: QuotaReservations,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        door: Authenticator | None = None,
        max_attempts: int = 3,
        guards: Guards | None = None,
        max_silent_losses: int = MOST_SILENT,
    ) -> None:
        """`max_attempts` workers may fail a sequence before its call fails, `max_silent_losses` be lost in a row with
        no token between. `guards`: where there are tenants whose policies name some."""
        self.max_attempts = max_attempts
        self.max_silent_losses = max_silent_losses
        self._guards = guards
        self._allowances = allowances
        self.authenticator: Authenticator = door if door is not None else NoAuthentication()
        self.authenticator.on_change.add(self._end_fallen)
        self.directory = directory
        self.bodies = Bodies()
        self.scheduler = scheduler
        self.metrics = metrics
        self.clock = clock
        self.wall_s: Callable[[], float] = time.time
        self.resumes: ResumeService | None = None
        """Set before the first call, where streams can be resumed."""
        self.on_close: set[Callable[[], None]] = set()
        self._open: dict[str, Call] = {}
        self._closing = ""
        self.prompts: PromptLog | None = None
        """Where prompts are written of tenants whose policy says so."""

    def statistics(self) -> dict[str, int]:
        """Open calls by model; empty when idle."""
        counts: dict[str, int] = {}
        for call in list(self._open.values()):
            counts[call.model] = counts.get(call.model, 0) + 1
        return counts

    @property
    def busy(self) -> bool:
        """Whether a call is open."""
        return bool(self._open)

    def _resuming(self) -> ResumeService:
        if self.resumes is None:
            raise CallError(Outcome.UNSUPPORTED_FEATURE, "this gateway resumes no streams: begin anew")
        return self.resumes

    async def hand_over(self, by: float) -> None:
        """Streams that can be resumed leave one after the other until `by`, those with the most left to make first:
        each finds room and a short prefill at the next gateway, as it would not in a crowd of all."""
        streams = [
            call for call in self._open.values() if call.resume_tokens is not None and call.first_token_at is not None
        ]
        streams.sort(key=_tokens_left)
        while streams and (left_s := by - self.clock()) > 0:
            call = streams.pop()
            if call.id in self._open:
                self._send_on(call, retry_after_s=0.0)
                await asyncio.sleep(left_s / (len(streams) + 1))

    def end_all(self) -> None:
        """What still runs ends here; where it is resumable it goes on elsewhere."""
        for call in list(self._open.values()):
            self._send_on(call, retry_after_s=0.1)

    def _send_on(self, call: Call, retry_after_s: float) -> None:
        told = f"this gateway is {self._closing}; resume or repeat the call at another"
        call.fail(CallError(Outcome.NO_WORKER, told, retry_after_s=retry_after_s))

    def close(self, why: str) -> None:
        """Take no new call; sessions are told, so that they end with their last call."""
        self._closing = why
        for told in list(self.on_close):
            told()

    @property
    def closing(self) -> bool:
        """Whether new calls are refused."""
        return bool(self._closing)

    def progress(self, call: Call) -> Progress:
        """Where a silent call is."""
        position = self.scheduler.queues.position(call)
        model = self.directory.find(call.model)
        if model is not None and not model.links:
            fraction, eta_s = model.start_progress(self.wall_s())
            return Progress(model.state.lower(), position, fraction, eta_s)
        if self.scheduler.queues.is_resuming(call):
            return Progress("resuming", position)
        return Progress("queued" if position else "running" if call.first_token_at is not None else "prefill", position)

    async def count(self, meta: CallMeta) -> CallMeta:
        """Count a try before anything of it is read, whatever becomes of it. Raises CallError, RATE_LIMITED."""
        await self._allowances.count_request(meta.principal.tenant)
        return CallMeta(meta.request_id, meta.api, meta.deadline, meta.traceparent, meta.principal, counted=True)

    def longest_context(self, principal: Principal) -> int:
        """Tokens of the longest context among the models open to a caller; MAX_IDS where one's is not known."""
        lengths = [model.max_model_len for model in self.directory.open_to(principal)]
        return max(lengths) if lengths and all(lengths) else MAX_IDS

    async def tokenize(self, name: str, prompt: requests.Prompt, meta: CallMeta) -> tuple[array[int], int]:
        """The token ids of a prompt, which count as tokens of its tenant, and the model's context. Raises CallError."""
        model = self.directory.resolve(name, meta.principal)
        text = await self.directory.text_model(model)
        ids = await encode(prompt, text, meta.tenant, model.max_model_len)
        await self._allowances.charge(meta.principal.tenant, len(ids))
        return ids, model.max_model_len

    async def detokenize(self, name: str, token_ids: Sequence[int], meta: CallMeta) -> str:
        """The text of token ids, likewise. Raises CallError."""
        model = self.directory.resolve(name, meta.principal)
        text = await self.directory.text_model(model)
        if model.max_model_len and len(token_ids) > model.max_model_len:
            raise invalid("token_ids", f"at most {model.max_model_len}, the model's context; got {len(token_ids)}")
        ids = _in_vocabulary(token_ids, text.vocab_size, "token_ids") if len(token_ids) else array("I")
        await self._allowances.charge(meta.principal.tenant, len(ids))
        return await text.decode_async(meta.tenant, ids, "token_ids")

    @asynccontextmanager
    async def open(self, request: requests.GenerationRequest, meta: CallMeta) -> AsyncIterator[Call]:
        """A running call. Raises CallError when it cannot run; errors raised inside end it with their outcome."""
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
        except Exception:  # counted as what it is; the API answers
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
        """The steps from a request to a queued call, in the order in which they happen. Each registers its undo."""
        if self._closing:
            raise CallError(Outcome.NO_WORKER, f"this gateway is {self._closing}; call another", retry_after_s=0.1)
        if opening.request.resume is not None:
            await self._read_resume_tokens(opening)
        requests.check_options(opening.request.options)
        if opening.request.metadata:
            requests.check_metadata(opening.request.metadata)
        self._choose_model(opening)
        await self._encode(opening, cleanup)
        if (suspended := self.authenticator.tenant_error(opening.meta.tenant)) is not None:  # since the call has come
            raise suspended
        call = self._call(opening)
        self._hold_open(call, opening, cleanup)
        if opening.model is not opening.asked:
            self._stands_in(call, opening.asked)
        if (resumes := self.resumes) is not None and opening.request.resumable:
            cleanup.add(lambda outcome: resumes.give_up(call, outcome))
            cleanup.add(lambda outcome: resumes.leave(call))
            digest = opening.model.bundle_digest_of(opening.versions.first)
            resumes.begin(call, opening.request, opening.meta, digest, opening.chain)
        cleanup.add(lambda outcome: self._allowances.settle(call))
        await self._allowances.admit(call)
        if opening.model is not opening.asked:
            call.add_headers([("x-headrace-model", opening.model.name)])
        if call.error is not None:  # its tenant was suspended while its limits were checked
            raise call.error
        if opening.chain is not None:
            await self._resuming().take_over(call, opening.chain)
        if (accounting := self.scheduler.host.accounting) is not None:
            cleanup.add(lambda outcome: accounting.ended(call, outcome))
        cleanup.add(lambda outcome: self.scheduler.canaries.ended(call, outcome))
        cleanup.add(lambda outcome: self.scheduler.leave(call))
        self.scheduler.enter(call, opening.model)
        return call

    async def _read_resume_tokens(self, opening: Opening) -> None:
        chain = await self._resuming().read(opening.request, opening.meta.principal)
        opening.chain, opening.model_name = chain, chain.whole.model
        deadline = self._resuming().deadline(chain, opening.meta.deadline)
        opening.meta = replace(opening.meta, deadline=deadline)

    def _choose_model(self, opening: Opening) -> None:
        """The model, or the one that stands in for it, and the versions at which the call may begin."""
        chain, principal = opening.chain, opening.meta.principal
        name = opening.request.model if chain is None else chain.whole.model
        asked = model = self.directory.resolve(name, principal, began=chain is not None)
        if model.entry.fallback and not model.served and chain is None:
            model = self.directory.fallback_of(model, principal) or model
        opening.asked, opening.model, opening.model_name = asked, model, model.name
        request_id = opening.meta.request_id if chain is None else chain.whole.request_id
        opening.versions = model.choose_version(request_id, "" if chain is None else chain.bundle_digest)

    async def _encode(self, opening: Opening, cleanup: Cleanup) -> None:
        """The prompt's token ids, after the tenant's guards have seen it."""
        policy, model, request = opening.meta.principal.tenant, opening.model, opening.request
        opening.text = text = await self.directory.text_model(model, opening.versions.first)
        max_model_len = model.max_model_len
        if policy.max_context_tokens:
            max_model_len = min(max_model_len, policy.max_context_tokens)
        opening.max_model_len = max_model_len
        opening.prompt_ids = await encode(request.prompt, text, policy.name, max_model_len)
        if not policy.guards:
            return
        # Guards search the whole prompt, so only one of bounded length.
        guards = opening.guards = self._guards_of(opening.meta, model.name)
        cleanup.add(lambda outcome: guards.close())
        kept = await guards.prompt(request.prompt, text)
        if kept is not request.prompt:
            opening.request = replace(request, prompt=kept)
            opening.prompt_ids = await encode(kept, text, policy.name, max_model_len)

    def _hold_open(self, call: Call, opening: Opening, cleanup: Cleanup) -> None:
        """Count the call among the open ones until its end."""
        opening.call = call

        def close(outcome: Outcome) -> None:
            self._open.pop(call.id, None)
            for sequence in call.sequences:
                sequence.part()

        cleanup.add(close)
        if self.prompts is not None:
            prompts, text = self.prompts, opening.text
            cleanup.add(lambda outcome: prompts.ended(call, opening.request.prompt, text, outcome))
        self._open[call.id] = call

    def _call(self, opening: Opening) -> Call:
        """The call with its sequences, not yet queued."""
        wish, meta, model, text = opening.request, opening.meta, opening.model, opening.text
        prompt_ids, max_model_len, versions, guards = (
            opening.prompt_ids, opening.max_model_len, opening.versions, opening.guards
        )  # fmt: skip
        options = wish.options
        policy = meta.principal.tenant
        if not max_model_len:
            raise CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared")
        sampling = requests.sampling(
            wish,
            model.default_sampling_of(versions.first),
            len(prompt_ids),
            max_model_len,
            text.vocab_size,
            policy.max_output_tokens,
            text.eos_token_ids,
        )
        rank = self.scheduler.charges.rank_of(policy.priority_class)
        call = Call(
            id=f"{'chatcmpl' if requests.is_chat(wish.prompt) else 'cmpl'}-{random_id()}",
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
            labels={**wish.metadata, **policy.labels},
            key_id=meta.principal.subject if meta.principal.by == "key" else "",
        )
        salt = self.authenticator.cache_salt(meta.principal, wish.cache_salt)
        for index in range(options.n):
            seed = None if sampling.seed is None else sampling.seed + index
            request = EngineRequest(
                request_id="",
                prompt_token_ids=prompt_ids,
                sampling=sampling if index == 0 else replace(sampling, seed=seed),
                traceparent=meta.traceparent,
                cache_salt=salt,
                priority=rank,
            )
            if not index:
                check_size(request)
            plain = text.detokenizer(prompt_ids, stop=options.stop, min_tokens=sampling.min_tokens)
            told = options.logprobs if options.logprobs_returned is None else options.logprobs_returned
            numbers = None if told is None else LogprobTexts(text, told)
            detokenizer, logprobs = (plain, numbers) if guards is None else guards.output(plain, numbers)
            life = Life(self.max_attempts, self.max_silent_losses)
            call.sequences.append(OutputSequence(call, index, request, detokenizer, logprobs, life))
        return call

    def _stands_in(self, call: Call, asked: KnownModel) -> None:
        """The call is another model's, which has no worker: that is demand for it, and told in the ledger."""
        self.scheduler.count_missed(call, asked)
        call.label(FALLBACK_LABEL, asked.name)
        self.metrics.count("route_decisions_total", asked.name, "fallback")

    def _guards_of(self, meta: CallMeta, model: str) -> CallGuards:
        """Those of a tenant that has some."""
        assert self._guards is not None, "policies with guards come from a door that has them"
        return self._guards.for_call(meta.principal.tenant, model, meta.request_id, meta.principal.subject)

    def _count_end(self, opening: Opening, outcome: Outcome) -> None:
        """The metrics of a call that has ended, or could not begin."""
        call, model, meta = opening.call, opening.model_name, opening.meta
        metrics = self.metrics
        metrics.count("requests_total", model, meta.tenant, meta.api, outcome.value)
        if call is not None:
            self._judge(call, outcome)
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

    def _judge(self, call: Call, outcome: Outcome) -> None:
        """Whether the call was served as its model's objectives ask; one that its caller ended or spoilt tells nothing,
        unless its first token was late by then."""
        known = self.directory.find(call.model)
        if known is None or call.is_resumed:
            return
        entry, served = known.entry, outcome is Outcome.OK
        ttft_s = call.usage.ttft_s if call.first_token_at is not None else None
        late = entry.slo_ttft_s and self.clock() - call.arrived > entry.slo_ttft_s and ttft_s is None
        if not served and not late and outcome not in SHORT_OF_ROOM:
            return
        within = served and within_slo(ttft_s, call.mean_gap_s, entry.slo_ttft_s, entry.slo_itl_s)
        self.scheduler.queues.tally.count_slo(call.model, call.policy.priority_class, call.rank, within)

    def _end_fallen(self) -> None:
        """Calls of tenants that may no longer call end now, wherever they are."""
        fallen = {
            tenant: self.authenticator.tenant_error(tenant) for tenant in {call.tenant for call in self._open.values()}
        }
        for call in list(self._open.values()):
            error = fallen[call.tenant]
            if error is not None:
                call.fail(error)

    def abort(self, request_id: str, tenant: str = "") -> list[str]:
        """End the open calls of a request id or call id, only one tenant's if it is named; the tenant of each."""
        found = [c for c in self._open.values() if request_id in (c.request_id, c.id) and tenant in ("", c.tenant)]
        for call in found:
            call.fail(CallError(Outcome.CANCELLED, "ended by the cluster's operators"))
        return [call.tenant for call in found]

    def _held(self, call: Call) -> bool:
        """Whether it waits for a model that nobody serves."""
        if call.first_token_at is not None:
            return False
        model = self.directory.find(call.model)
        return model is not None and not model.served

    async def send_keepalives(self, keepalive_s: float) -> None:
        """A few times a second: end what waited too long, bring the tenants' accounts up to date, and wake calls that
        have been silent for keepalive_s, or for HELD_S where nobody serves their model."""
        while True:
            await ticks.sleep_to_tick(min(keepalive_s / 4, 0.25))
            try:
                self.scheduler.expire()
            except Exception:  # the next look, and all other calls, are to have their turn
                log.exception("expiry_failed")
            now = self.clock()
            for call in list(self._open.values()):
                try:
                    self._nudge(call, now, keepalive_s)
                except Exception as error:
                    call.fail_unexpectedly(error)

    def _nudge(self, call: Call, now: float, keepalive_s: float) -> None:
        self.scheduler.follow(call)
        silent_s = now - call.heard_at
        if silent_s >= keepalive_s or (silent_s >= HELD_S and self._held(call)):
            call.fall_silent(now)


async def encode(
    prompt: requests.Prompt, text: TextModel, tenant: str = "default", max_model_len: int = 0
) -> array[int]:
    """Token ids of a prompt, off the event loop when long. `max_model_len` 0: of any length.

    Raises CallError, before tokenizing for a text that surely leaves no room for sequence.
    """
    if requests.is_chat(prompt) and not text.has_chat_template:
        raise CallError(
            Outcome.UNSUPPORTED_FEATURE, "the model has no chat template: use Complete with a prompt of your own"
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
    return max(one.request.sampling.max_tokens - len(one.emitted) for one in call.sequences)


def _in_vocabulary(ids: Sequence[int], vocab_size: int, field: str = "prompt_token_ids") -> array[int]:
    if 0 < len(ids) <= FEW_IDS and min(ids) >= 0 and max(ids) < vocab_size:
        return array("I", ids)
    import numpy as np  # not at the start: deferred_imports.py

    found = np.asarray(ids)
    if found.dtype.kind not in "iu":  # numbers beyond 64 bits are objects
        found = np.asarray(ids, np.int64)
    wrong = np.flatnonzero((found < 0) | (found >= vocab_size))
    if wrong.size:
        i = int(wrong[0])
        raise invalid(f"{field}[{i}]", f"must be in 0 to {vocab_size - 1}, the vocabulary; got {found[i]}")
    return array("I", found.astype(np.uint32).tobytes())
