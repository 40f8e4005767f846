"""The steps from a generation request to a call with its sequences. call_service.py calls the steps in order."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.api.output_parts import OutputParsing
from cluster.api.pooling import PoolingTask
from cluster.api.types import REASONING_PARSER, TOOL_PARSER, EngineRequest, Sampling
from cluster.gateway.auth.authenticator import Authenticator
from cluster.gateway.calls import request as requests
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_opening import CallOpening, not_prepared
from cluster.gateway.calls.call_usage import CallUsage
from cluster.gateway.calls.sequences.life import Life
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.gateway.calls.tokenization import RendererOf, encode
from cluster.gateway.calls.tools import with_tools
from cluster.gateway.calls.unread_answers import JSON_LOGPROB_BYTES, UnreadAnswer
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.submission import check_size
from cluster.gateway.text.logprobs import LogprobTexts
from cluster.gateway.text.parsed_text import ParsedText
from cluster.observe.metrics import Metrics
from cluster.observe.trace_context import unsampled

MAX_PARSING_CHARS = 4 << 20
"""Upper bound on the characters of a call's parser requests, summed over the call's outputs. All these requests may be
sent on one link at once."""

if TYPE_CHECKING:
    from cluster.gateway.guards.guards import CallGuards, Guards
    from cluster.gateway.resume_tokens.resumption import ResumeService
    from cluster.gateway.resume_tokens.token_chain import TokenChain


@dataclass(slots=True)
class Opening(CallOpening):
    """A generation call that is being opened (see CallOpening)."""

    request: requests.GenerationRequest
    unread: UnreadAnswer | None = None
    """Counts the answer, if it is gathered and may be large."""
    chain: TokenChain | None = field(init=False, default=None)
    """Chain of the presented resume tokens, if the call began at another gateway."""
    renderer_of: RendererOf = field(init=False)
    adapter: str = field(init=False, default="")
    """Name of the adapter of `model` that serves the call; "" for the model itself."""
    prompt_ids: array[int] = field(init=False, default_factory=lambda: array("I"))
    guards: CallGuards | None = field(init=False, default=None)

    async def read_resume_tokens(self, resumes: ResumeService) -> None:
        """Read the resume tokens of the request, and set the deadline of the resumed call."""
        self.chain = await resumes.read(self.request, self.meta.principal)
        self.model_name = self.chain.call_head.model
        self.meta = replace(self.meta, deadline=resumes.deadline(self.chain, self.meta.deadline))

    def choose_model(self, directory: ModelDirectory) -> None:
        """Choose the requested model or one of its fallbacks, and the versions on which the call may begin."""
        chain, principal = self.chain, self.meta.principal
        name = self.request.model if chain is None else chain.call_head.model
        target = directory.lookup.target(name, principal, began=chain is not None)
        requested = model = target.model
        adapter = self.adapter = target.adapter
        if model.capabilities.tasks:
            raise _only_pools(model)
        if model.entry.fallback and chain is None and not model.serves(adapter):
            model = (
                directory.lookup.fallback_of(model, principal, adapter, lambda other: not other.capabilities.tasks)
                or model
            )
        if adapter and chain is None and (refused := model.adapters.refusal_of(model.name, adapter)) is not None:
            raise refused
        if (
            self.request.output.needs_tools
            and chain is None
            and model.links
            and TOOL_PARSER not in model.capabilities.parsers
        ):
            raise _no_tool_parser(model.name)
        self.requested, self.model, self.model_name = requested, model, model.name
        request_id = self.meta.request_id if chain is None else chain.call_head.request_id
        spec = model.adapters.find(adapter) if adapter else None
        self.versions = model.versions.choose(
            request_id,
            "" if chain is None else chain.bundle_digest,
            "" if spec is None else spec.version,
            model.adapters.readiness(adapter) if adapter else None,
        )

    @property
    def adapter_key(self) -> str:
        """Digest of the call's adapter; a placeholder key while the digest is unknown; "" without an adapter.

        Raises CallError for a resumed call whose adapter has been replaced meanwhile, if no worker has the old
        version of the adapter any more.
        """
        if not self.adapter:
            return ""
        begun = "" if self.chain is None else self.chain.call_head.adapter_digest
        key = self.model.adapters.key(self.adapter)
        if begun and begun != key and not self.model.adapters.is_ready(begun):
            raise CallError(
                Outcome.RESUME_UNSUPPORTED,
                f"the call cannot be resumed: adapter {self.adapter} has been replaced since; send a new call",
            )
        return begun or key

    @property
    def prompt(self) -> requests.Prompt:
        """The prompt, for the prompt log."""
        return self.request.prompt

    async def encode(self, directory: ModelDirectory, renderer_of: RendererOf) -> None:
        """Encode the prompt. `renderer_of`: chooses where chats are rendered (see RendererOf)."""
        self.text = await directory.text_model(self.model, self.bundle_digest)
        self.renderer_of = renderer_of
        self.max_model_len = self.longest_context
        await self._encode()

    def create_guards(self, guards: Guards) -> CallGuards:
        """Create the guards of the call."""
        principal = self.meta.principal
        self.guards = guards.for_call(
            principal.tenant, self.model.name, self.meta.request_id, principal.subject, self.log_fields
        )
        return self.guards

    async def guard_prompt(self, guards: CallGuards) -> None:
        """Apply the guards to the prompt. If the guards change the prompt, encode the changed prompt."""
        guarded = await guards.prompt(self.request.prompt, self.text)
        if guarded is not self.request.prompt:
            output = self.request.output
            if isinstance(guarded, requests.ChatPrompt) and guarded.tools:
                output = with_tools(output, guarded.tools)
            self.request = replace(self.request, prompt=guarded, output=output)
            await self._encode()

    async def _encode(self) -> None:
        request, tenant = self.request, self.meta.tenant
        render = self.renderer_of(self.model, self.text, self.meta, self.bundle_digest, request.priority_class)
        length = self.max_model_len
        self.prompt_ids = await encode(request.prompt, self.text, tenant, length, request.cache_salt, render)
        if not length:  # unknown before the first worker, for which the prompt may have waited
            self.max_model_len = self.longest_context

    def create_call(
        self,
        scheduler: Scheduler,
        authenticator: Authenticator,
        metrics: Metrics,
        clock: Callable[[], float],
        life: Callable[[], Life],
    ) -> Call:
        """Create the call and its sequences, without queueing them. `life`: returns the initial state of a sequence."""
        sampling = self._sampling()
        request, meta = self.request, self.meta
        kind = "chatcmpl" if requests.is_chat(request.prompt) else "cmpl"
        call = Call(
            **self.call_fields(kind, request.priority_class, request.metadata, scheduler, clock),
            itl=metrics.histogram("inter_token_latency_seconds", self.model.name),
            usage=CallUsage(prompt_tokens=len(self.prompt_ids)),
            tool_calls_before=request.output.tool_calls_before,
            adapter=self.adapter,
        )
        call.affinity = self.affinity(request.affinity_key, call.policy.flow)
        salt = authenticator.cache_salt(meta.principal, request.cache_salt)
        first = EngineRequest(
            "",
            self.prompt_ids,
            sampling,
            cache_salt=salt,
            priority=call.rank,
            adapter=self.adapter_key,
            traceparent=unsampled(meta.traceparent),
            parsing=output_parsing(request, self.model),
        )
        check_size(first)
        for index in range(request.options.n):
            call.sequences.append(self._sequence(call, index, first, life()))
        self.call = call
        return call

    def answer_bytes(self, tokens: int) -> int:
        """Return the approximate size of an answer with log probabilities and with `tokens` tokens in each output."""
        options = self.request.options
        return options.n * tokens * (1 + (options.logprobs or 0)) * JSON_LOGPROB_BYTES

    def _sampling(self) -> Sampling:
        """Return the sampling parameters of the call."""
        if not self.max_model_len:
            raise not_prepared(self.model)
        return requests.sampling(
            self.request,
            self.model.versions.default_sampling(self.versions.first),
            len(self.prompt_ids),
            self.max_model_len,
            self.text.vocab_size,
            self.meta.principal.tenant.max_output_tokens,
            self.text.eos_token_ids,
        )

    def _sequence(self, call: Call, index: int, first: EngineRequest, life: Life) -> OutputSequence[Call]:
        """Return a sequence of the call. `first`: the engine request of the first sequence, on which the request of
        this sequence is based. The seed increases by 1 from sequence to sequence."""
        options, sampling, engine_request = self.request.options, first.sampling, first
        if index and sampling.seed is not None:
            engine_request = replace(first, sampling=replace(sampling, seed=sampling.seed + index))
        plain = self.text.detokenizer(self.prompt_ids, stop=options.stop, min_tokens=sampling.min_tokens)
        top = options.logprobs if options.logprobs_returned is None else options.logprobs_returned
        logprob_texts = None if top is None else LogprobTexts(self.text, top)
        guards = self.guards
        source, logprobs = (plain, logprob_texts) if guards is None else guards.output(plain, logprob_texts)
        if engine_request.parsing is None:
            return OutputSequence(call, index, engine_request, source, logprobs, life=life)
        guarded_parts = None if guards is None else guards.parts()
        parsed = ParsedText(source, guarded_parts, include_reasoning=self.request.output.include_reasoning)
        return OutputSequence(call, index, engine_request, parsed, logprobs, parsed_text=parsed, life=life)


def output_parsing(request: requests.GenerationRequest, model: KnownModel) -> OutputParsing | None:
    """Return the options with which the worker parses the output of a call; None if there is nothing to parse.

    The output of a chat is parsed if the chat may call tools, or if the model has a parser of reasoning. If a chat has
    tools but must not call them, the model's tool parser parses the output, too, so that tool calls are not shown as
    content. While a model has no worker, its parsers are unknown. Every chat then gets these options, and a worker
    without a parser ignores them. Raises CallError if the tools are too long, since they are sent once for each output
    of the call.
    """
    output = request.output
    if not output.parser_request:
        return None
    parses = REASONING_PARSER in model.capabilities.parsers or (
        output.has_tools and TOOL_PARSER in model.capabilities.parsers
    )
    if not output.needs_tools and model.links and not parses:
        return None
    if (size := request.options.n * len(output.parser_request)) > MAX_PARSING_CHARS:
        raise invalid(
            "n",
            f"the tools are sent for each of n outputs, {size} characters in all; at most {MAX_PARSING_CHARS} are "
            "allowed: lower n or shorten the tools",
        )
    return OutputParsing(output.parser_request, request.options.stop, output.is_whole, output.needs_tools)


def _only_pools(model: KnownModel) -> CallError:
    tasks = sorted(model.capabilities.tasks or ())
    uses = {
        PoolingTask.EMBED: "send texts to /v1/embeddings (gRPC: Embed; `headrace embed`)",
        PoolingTask.SCORE: "send pairs of texts to /v1/score or /v1/rerank (gRPC: Rerank; `headrace rerank`)",
    }
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"model: {model.name} generates no text, its tasks are {', '.join(tasks)}: "
        f"{' or '.join(uses[task] for task in tasks)}, or choose another model",
        violations=[Violation("model", "generates no text")],
    )


def _no_tool_parser(model: str) -> CallError:
    return CallError(
        Outcome.UNSUPPORTED_FEATURE,
        f"tools: no worker of model {model} has a parser for tool calls; leave tools out, choose another model, or ask "
        "the operator to set the model's tool_call_parser",
        violations=[Violation("tools", "not supported by this model")],
    )
