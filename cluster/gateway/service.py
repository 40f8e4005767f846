"""One call from arrival to end, whichever face it came by. Reads in the order in which things happen."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.api.types import EngineRequest
from cluster.gateway.apis.bodies import Bodies
from cluster.gateway.apis.json_values import MAX_IDS
from cluster.gateway.apis.request_ids import random_id
from cluster.gateway.auth.authenticator import ANYBODY, Authenticator, NoAuthentication
from cluster.gateway.calls import request as wishes
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequence import CallSequence
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
class CallMeta:
    """What comes with a call beside its body. `deadline` is a point of the service's clock; None: none."""

    request_id: str
    face: str
    deadline: float | None = None
    traceparent: str = ""
    principal: Principal = ANYBODY
    counted: bool = False
    """Whether it is counted as a request of its tenant already (`CallService.count`)."""

    @property
    def tenant(self) -> str:
        """Whose call it is."""
        return self.principal.tenant.name


@dataclass(frozen=True, slots=True)
class Progress:
    """Of a call without news: queued, prefill, running, resuming (its worker was lost) or the model's state; the place
    in line, 1 the next, or 0. While nobody serves the model: how far its start is, in [0, 1], and how long it takes
    still (seconds), by what is known of its starts; 0 where that is nothing."""

    state: str
    queue_position: int
    fraction: float = 0.0
    eta_s: float = 0.0


class CallService:
    """Opens calls. Every open call is closed by leaving its context: places freed, queue left, metrics settled."""

    def __init__(
        self,
        directory: ModelDirectory,
        dispatcher: Scheduler,
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
        self.door: Authenticator = door if door is not None else NoAuthentication()
        self.door.on_change.add(self._end_fallen)
        self.directory = directory
        self.bodies = Bodies()
        self.dispatcher = dispatcher
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

    async def hand_on(self, by: float) -> None:
        """Streams that can be resumed leave one after the other until `by`, those with the most left to make first:
        each finds room and a short prefill at the next gateway, as it would not in a crowd of all."""
        streams = [call for call in self._open.values() if call.tickets is not None and call.first_token_at is not None]
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
        position = self.dispatcher.position(call)
        model = self.directory.find(call.model)
        if model is not None and not model.links:
            fraction, eta_s = model.start(self.wall_s())
            return Progress(model.state.lower(), position, fraction, eta_s)
        if self.dispatcher.returning(call):
            return Progress("resuming", position)
        return Progress("queued" if position else "running" if call.first_token_at is not None else "prefill", position)

    async def count(self, meta: CallMeta) -> CallMeta:
        """Count a try before anything of it is read, whatever becomes of it. Raises CallError, RATE_LIMITED."""
        await self._allowances.count(meta.principal.tenant)
        return CallMeta(meta.request_id, meta.face, meta.deadline, meta.traceparent, meta.principal, counted=True)

    def longest_context(self, principal: Principal) -> int:
        """Tokens of the longest context among the models open to a caller; MAX_IDS where one's is not known."""
        lengths = [model.max_model_len for model in self.directory.open_to(principal)]
        return max(lengths) if lengths and all(lengths) else MAX_IDS

    async def tokenize(self, name: str, prompt: wishes.Prompt, meta: CallMeta) -> tuple[array[int], int]:
        """The token ids of a prompt, which count as tokens of its tenant, and the model's context. Raises CallError."""
        model = self.directory.resolve(name, meta.principal)
        text = await self.directory.text(model)
        ids = await encode(prompt, text, meta.tenant, model.max_model_len)
        await self._allowances.charge(meta.principal.tenant, len(ids))
        return ids, model.max_model_len

    async def detokenize(self, name: str, token_ids: Sequence[int], meta: CallMeta) -> str:
        """The text of token ids, likewise. Raises CallError."""
        model = self.directory.resolve(name, meta.principal)
        text = await self.directory.text(model)
        if model.max_model_len and len(token_ids) > model.max_model_len:
            raise invalid("token_ids", f"at most {model.max_model_len}, the model's context; got {len(token_ids)}")
        ids = _in_vocabulary(token_ids, text.vocab_size, "token_ids") if len(token_ids) else array("I")
        await self._allowances.charge(meta.principal.tenant, len(ids))
        return await text.decode_async(meta.tenant, ids, "token_ids")

    @asynccontextmanager
    async def open(self, wish: wishes.GenerationRequest, meta: CallMeta) -> AsyncIterator[Call]:
        """A running call. Raises CallError when it cannot run; errors raised inside end it with their outcome."""
        arrived = self.clock()
        outcome, model_name, call, guards, text = Outcome.OK, "", None, None, None
        try:
            if self._closing:
                raise CallError(Outcome.NO_WORKER, f"this gateway is {self._closing}; call another", retry_after_s=0.1)
            chain = None
            if wish.resume is not None:
                chain = await self._resuming().read(wish, meta.principal)
                model_name = chain.whole.model
                meta = replace(meta, deadline=self._resuming().deadline(chain, meta.deadline))
            wishes.check_options(wish.options)
            if wish.metadata:
                wishes.check_metadata(wish.metadata)
            name = wish.model if chain is None else chain.whole.model
            model = self.directory.resolve(name, meta.principal, began=chain is not None)
            asked = model
            if model.entry.fallback and not model.served and chain is None:
                model = self.directory.stand_in(model, meta.principal) or model
            model_name = model.name
            began = meta.request_id if chain is None else chain.whole.request_id
            versions = model.choose(began, "" if chain is None else chain.bundle_digest)
            text = await self.directory.text(model, versions.first)
            max_model_len = model.max_model_len
            if most := meta.principal.tenant.max_context_tokens:
                max_model_len = min(max_model_len, most)
            prompt_ids = await encode(wish.prompt, text, meta.tenant, max_model_len)
            if meta.principal.tenant.guards:  # behind the bound of its length: guards search the whole of it
                guards = self._guards_of(meta, model.name)
                kept = await guards.prompt(wish.prompt, text)
                if kept is not wish.prompt:
                    wish = replace(wish, prompt=kept)
                    prompt_ids = await encode(kept, text, meta.tenant, max_model_len)
            if (fallen := self.door.standing(meta.tenant)) is not None:  # since it has come
                raise fallen
            call = self._call(wish, meta, model, text, prompt_ids, max_model_len, arrived, guards, versions)
            if model is not asked:
                self._stands_in(call, asked)
            if wish.resumable and self.resumes is not None:
                self.resumes.begin(call, wish, meta, model.bundle_digest_of(versions.first), chain)
            self._open[call.id] = call
            await self._allowances.admit(call)
            if model is not asked:
                call.headers = (*call.headers, ("x-headrace-model", model.name))
            if call.error is not None:  # its tenant has fallen while its limits were asked
                raise call.error
            if chain is not None:
                await self._resuming().take_over(call, chain)
            self.dispatcher.enter(call, model)
            yield call
        except CallError as error:
            outcome = error.outcome
            raise
        except asyncio.CancelledError:
            late = meta.deadline is not None and self.clock() >= meta.deadline - DEADLINE_SLACK_S
            outcome = Outcome.DEADLINE_EXCEEDED if late else Outcome.CANCELLED
            raise
        except Exception:  # counted as what it is, then the face's to tell
            outcome = Outcome.INTERNAL
            log.exception("call_failed", request_id=meta.request_id)
            raise
        except BaseException as error:
            if not is_call_failure(error):
                raise
            outcome = Outcome.INTERNAL
            log.exception("call_failed", request_id=meta.request_id)
            raise CallError(outcome, f"unexpected failure; quote request id {meta.request_id}") from error
        finally:
            for end, arguments in self._ends(call, outcome, wish.prompt, text, guards):
                _attempt(meta.request_id, end, *arguments)
            _attempt(meta.request_id, self._settle, model_name, meta, outcome, call, arrived)
            if call is not None:
                for output in call.sequences:
                    output.part()
                if self.resumes is not None:
                    await self.resumes.give_up(call, outcome)
                await self._allowances.settle(call)

    def _ends(
        self,
        call: Call | None,
        outcome: Outcome,
        prompt: wishes.Prompt,
        text: TextModel | None,
        guards: CallGuards | None,
    ) -> Sequence[tuple[Callable[..., None], tuple[Any, ...]]]:
        """The steps that give back all that a call holds, each with its arguments."""
        steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        if call is not None:
            self._open.pop(call.id, None)
            if call.tickets is not None and call.tickets.timer is not None:
                steps.append((call.tickets.timer.cancel, ()))
            if self.resumes is not None:
                steps.append((self.resumes.leave, (call,)))
            steps.append((self.dispatcher.leave, (call,)))
            steps.append((self.dispatcher.trials.ended, (call, outcome)))
            if self.dispatcher.accounting is not None:
                steps.append((self.dispatcher.accounting.ended, (call, outcome)))
            if self.prompts is not None and text is not None:
                steps.append((self.prompts.ended, (call, prompt, text, outcome)))
        if guards is not None:
            steps.append((guards.close, ()))
        return steps

    def _call(
        self,
        wish: wishes.GenerationRequest,
        meta: CallMeta,
        model: KnownModel,
        text: TextModel,
        prompt_ids: array[int],
        max_model_len: int,
        arrived: float,
        guards: CallGuards | None,
        versions: Versions,
    ) -> Call:
        options = wish.options
        policy = meta.principal.tenant
        if not max_model_len:
            raise CallError(Outcome.MODEL_LOADING, f"model {model.name} is still being prepared")
        sampling = wishes.sampling(
            wish,
            model.default_sampling_of(versions.first),
            len(prompt_ids),
            max_model_len,
            text.vocab_size,
            policy.max_output_tokens,
            text.eos_token_ids,
        )
        rank = self.dispatcher.turns.rank_of(policy.priority_class)
        call = Call(
            id=f"{'chatcmpl' if wishes.is_chat(wish.prompt) else 'cmpl'}-{random_id()}",
            model=model.name,
            policy=policy,
            rank=rank,
            arrived=arrived,
            deadline=meta.deadline,
            again=self.dispatcher.again,
            max_attempts=self.max_attempts,
            max_silent_losses=self.max_silent_losses,
            on_resumed=self.dispatcher.resumed,
            answered=self.dispatcher.answered,
            began=self.dispatcher.turns.began,
            clock=self.clock,
            itl=self.metrics.histogram("inter_token_latency_seconds", model.name),
            request_id=meta.request_id,
            counted=meta.counted,
        )
        call.versions, call.bundle_digest = versions, model.bundle_digest_of(versions.first)
        call.usage.prompt_tokens = len(prompt_ids)
        if self.dispatcher.accounting is not None:
            principal = meta.principal
            call.labels = {**wish.metadata, **policy.labels}
            call.key_id = principal.subject if principal.by == "key" else ""
            call.on_refused = self.dispatcher.accounting.refused
        salt = self.door.salt(meta.principal, wish.cache_salt)
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
            told = options.logprobs if options.logprobs_told is None else options.logprobs_told
            numbers = None if told is None else LogprobTexts(text, told)
            detokenizer, logprobs = (plain, numbers) if guards is None else guards.output(plain, numbers)
            call.sequences.append(CallSequence(call, index, request, detokenizer, logprobs))
        return call

    def _stands_in(self, call: Call, asked: KnownModel) -> None:
        """The call is another model's, which has no worker: that is demand for it, and told in the ledger."""
        self.dispatcher.missed(call, asked)
        if self.dispatcher.accounting is not None:
            call.labels = {**call.labels, FALLBACK_LABEL: asked.name}
        self.metrics.count("route_decisions_total", asked.name, "fallback")

    def _guards_of(self, meta: CallMeta, model: str) -> CallGuards:
        """Those of a tenant that has some."""
        assert self._guards is not None, "policies with guards come from a door that has them"
        return self._guards.of(meta.principal.tenant, model, meta.request_id, meta.principal.subject)

    def _settle(self, model: str, meta: CallMeta, outcome: Outcome, call: Call | None, arrived: float) -> None:
        metrics = self.metrics
        metrics.count("requests_total", model, meta.tenant, meta.face, outcome.value)
        if call is not None:
            self._judge(call, outcome)
        if call is None or call.first_token_at is None:
            if outcome not in (Outcome.OK, Outcome.CANCELLED):
                metrics.count("rejected_total", model, outcome.value)
            return
        call.count()
        usage = call.usage
        metrics.histogram("request_duration_seconds", model).observe(self.clock() - arrived)
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
        if known is None or call.continues:
            return
        entry, served = known.entry, outcome is Outcome.OK
        ttft_s = call.usage.ttft_s if call.first_token_at is not None else None
        late = entry.slo_ttft_s and self.clock() - call.arrived > entry.slo_ttft_s and ttft_s is None
        if not served and not late and outcome not in SHORT_OF_ROOM:
            return
        within = served and within_slo(ttft_s, call.mean_gap_s, entry.slo_ttft_s, entry.slo_itl_s)
        self.dispatcher.tally.judged(call.model, call.policy.priority_class, call.rank, within)

    def _end_fallen(self) -> None:
        """Calls of tenants that may no longer call end now, wherever they are."""
        fallen = {tenant: self.door.standing(tenant) for tenant in {call.tenant for call in self._open.values()}}
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

    async def nudge(self, keepalive_s: float) -> None:
        """A few times a second: end what waited too long, bring the tenants' accounts up to date, and wake calls that
        have been silent for keepalive_s, or for HELD_S where nobody serves their model."""
        while True:
            await ticks.rest(min(keepalive_s / 4, 0.25))
            try:
                self.dispatcher.expire()
            except Exception:  # the next look, and all other calls, are to have their turn
                log.exception("expiry_failed")
            now = self.clock()
            for call in list(self._open.values()):
                try:
                    self._nudge(call, now, keepalive_s)
                except Exception as error:
                    call.fail_unexpectedly(error)

    def _nudge(self, call: Call, now: float, keepalive_s: float) -> None:
        self.dispatcher.grew(call)
        silent_s = now - call.heard_at
        if silent_s >= keepalive_s or (silent_s >= HELD_S and self._held(call)):
            call.silent_since = now
            call.silent = True
            call.wake()


def _attempt(request_id: str, step: Callable[..., None], *arguments: Any) -> None:
    """Take a step of a call's end. What it raises is logged: the steps after it are taken all the same."""
    try:
        step(*arguments)
    except Exception:
        log.exception("call_end_failed", request_id=request_id)


async def encode(prompt: wishes.Prompt, text: TextModel, tenant: str = "default", max_model_len: int = 0) -> array[int]:
    """Token ids of a prompt, off the event loop when long. `max_model_len` 0: of any length.

    Raises CallError, before tokenizing for a text that surely leaves no room for output.
    """
    if wishes.is_chat(prompt) and not text.has_chat_template:
        raise CallError(
            Outcome.UNSUPPORTED_FEATURE, "the model has no chat template: use Complete with a prompt of your own"
        )
    most = max_model_len - 1 if max_model_len else ANY_LENGTH
    if isinstance(prompt, wishes.PackedPrompt):
        ids = await text.packed_ids_async(tenant, prompt, most)
    elif isinstance(prompt, wishes.ChatPrompt):
        return await text.chat_ids_async(tenant, prompt.messages, most, **prompt.template_options)
    elif isinstance(prompt, wishes.TextPrompt):
        ids = await text.prompt_ids_async(tenant, prompt.text, most)
    else:
        if len(prompt.token_ids) > most:
            raise wishes.too_long(len(prompt.token_ids), max_model_len, chat=False)
        ids = _in_vocabulary(prompt.token_ids, text.vocab_size)
    if not ids and not wishes.is_chat(prompt):
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
