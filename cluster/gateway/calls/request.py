"""The generation request, into which every API parses a caller's body. The request is checked field by field and has no
model defaults.

The allowed ranges are those of vLLM (sampling_params.py), so that vLLM accepts every request that passes these checks.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

from cluster.api.frozen import frozen_dataclass
from cluster.api.outcomes import MAX_VIOLATIONS, CallError, Outcome, Violation, invalid, quoted
from cluster.api.types import Grammar, Sampling
from cluster.wire.bundle import MAX_TOKENS_LIMIT, PLAIN_SAMPLING

MAX_N = 64
MAX_NAME_CHARS = 1024
"""Maximum number of characters in the model name of a request."""
MAX_MESSAGES = 10_000
"""Maximum number of messages in a chat, of parts in a message and of tool calls in a message."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_TOKEN_IDS_AFTER_MIN = 128
"""Maximum number of stop token ids, the model's EOS ids included, if `min_tokens` is 1 or more. This is vLLM's limit
per request."""
MAX_TOP_LOGPROBS = 20
MAX_LOGPROBS = 4_194_304
"""Maximum number of log probabilities that a call may return: n * max_tokens * (top_logprobs + 1). As JSON, these have
about 300 MB."""
MAX_SEED = 2**63 - 1
MAX_AFFINITY_CHARS = 256
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 262_144
MAX_CHOICES = 1024
DEFAULT_COMPLETE_TOKENS = 16


@frozen_dataclass
class RequestOptions:
    """Sampling options of a request. None means that an option is unset and the model's default applies."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    n: int = 1
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    logprobs_returned: int | None = None
    """Number of tokens that are reported per position, the sampled token included; None means the value of
    `logprobs`."""
    ignore_eos: bool = False
    grammar: Grammar | None = None
    max_reasoning_tokens: int | None = None


@frozen_dataclass
class OutputOptions:
    """Options for the parsing of a chat's output into reasoning, content and tool calls."""

    parser_request: str = ""
    """JSON object for OutputParsing.request; "" for a completion, which is not parsed."""
    needs_tools: bool = False
    """Whether the call may answer with tool calls. Only a worker with a parser for tool calls may serve such a call."""
    has_tools: bool = False
    """Whether the prompt has tools. If so, the model may write tool calls even if the caller has forbidden tool
    calls."""
    include_reasoning: bool = True
    """Whether the answer shows the reasoning."""
    is_whole: bool = False
    """Whether the caller gets the answer as a whole and not as a stream."""
    tool_calls_before: int = 0
    """Number of tool calls in the chat's history."""


@frozen_dataclass
class ChatPrompt:
    """Chat messages for the model's chat template. Each message is a plain mapping in OpenAI's format."""

    messages: Sequence[Mapping[str, Any]]
    """The messages. A message has no `content` if the caller gave none. The arguments of tool calls are objects. The
    assistant's `reasoning` is repeated in `reasoning_content`."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    tools: Sequence[Mapping[str, Any]] = ()
    """Tools as `function_tool` in calls/tools.py makes them."""
    documents: Sequence[Mapping[str, Any]] = ()
    """Documents for the chat template. Each document is an object of texts, such as `title` and `text`."""
    merges_system: bool = False
    """Whether later system messages are merged into the first one if the model's template allows no later system
    messages. If True, the contents of system messages are texts."""
    is_chat: ClassVar = True

    @property
    def template_options(self) -> Mapping[str, Any]:
        """Arguments of the chat template, without the messages."""
        documents = {"documents": list(self.documents)} if self.documents else {}
        merges = {"merges_system": True} if self.merges_system else {}
        return {
            "tools": self.tools,
            "template_kwargs": {**self.template_kwargs, **documents},
            "continue_final_message": self.continue_final_message,
            "add_generation_prompt": self.add_generation_prompt and not self.continue_final_message,
            **merges,
        }


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A prompt as plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class IdsPrompt:
    """A prompt as token ids."""

    token_ids: Sequence[int]
    """The token ids; an array if there are many."""


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """A long ChatPrompt or TextPrompt as a pickle. One helper process parses and pickles the prompt, and another helper
    process tokenizes it.

    The gateway process passes the pickle on without unpacking it, because unpacking megabytes would block the event
    loop.
    """

    is_chat: bool
    packed: Any
    """The pickle of the prompt, as bytes or a buffer."""

    def unpacked(self) -> ChatPrompt | TextPrompt:
        """Return the unpacked prompt. Must not run on an event loop."""
        prompt: ChatPrompt | TextPrompt = pickle.loads(self.packed)  # noqa: S301 - written by this gateway's helper
        return prompt

    @classmethod
    def of(cls, prompt: ChatPrompt | TextPrompt) -> PackedPrompt:
        """Pickle a prompt. Must not run on an event loop."""
        return cls(isinstance(prompt, ChatPrompt), pickle.dumps(prompt, protocol=5))

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        return PackedPrompt, (self.is_chat, pickle.PickleBuffer(self.packed))  # pickle does not copy a buffer


Prompt = ChatPrompt | TextPrompt | IdsPrompt | PackedPrompt


def is_chat(prompt: Prompt) -> bool:
    """Return whether a prompt is a list of chat messages."""
    return isinstance(prompt, ChatPrompt) or (isinstance(prompt, PackedPrompt) and prompt.is_chat)


@dataclass(frozen=True, slots=True)
class ResumeFrom:
    """Position at which a broken stream is resumed: the stream's resume tokens in order, and the number of the newest
    chunk."""

    tokens: Sequence[bytes]
    offset: int


@frozen_dataclass
class GenerationRequest:
    """A parsed request for generation."""

    model: str
    prompt: Prompt
    options: RequestOptions
    default_max_tokens: int | None = None
    cache_salt: str = ""
    """Salt of the prefix cache, which the caller chooses. Only calls with the same salt share a cached prefix."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Labels for the usage record. A label of the tenant with the same name takes precedence."""
    resumable: str = ""
    """Digest of the whole request if the chunks of the answer must carry resume tokens, else ""."""
    resume: ResumeFrom | None = None
    output: OutputOptions = field(default_factory=OutputOptions)
    priority_class: str = ""
    """Name of the priority class of the call; "" for the class of the tenant."""
    affinity_key: str = ""
    """Key of the caller's choice: calls of a tenant with the same key prefer the same worker."""


MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_BYTES = 16, 64, 256

# field -> (lowest value, highest value, whether the lowest value itself is allowed); None means unbounded.
RANGES: Mapping[str, tuple[float | None, float | None, bool]] = {
    "max_tokens": (1, None, True),
    "min_tokens": (0, None, True),
    "temperature": (0.0, 2.0, True),
    "top_p": (0.0, 1.0, False),
    "top_k": (-1, None, True),
    "min_p": (0.0, 1.0, True),
    "n": (1, MAX_N, True),
    "frequency_penalty": (-2.0, 2.0, True),
    "presence_penalty": (-2.0, 2.0, True),
    "repetition_penalty": (0.0, 1e6, False),
    "logprobs": (0, MAX_TOP_LOGPROBS, True),
    "max_reasoning_tokens": (0, None, True),
}

_INSIDE = tuple(
    (name, -math.inf if low is None else low, sys.float_info.max if high is None else high)
    for name, (low, high, _) in RANGES.items()
)
_ranged = attrgetter(*RANGES)


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Check the metadata of a request. Raises CallError for metadata that a usage record cannot hold."""
    if len(metadata) > MAX_METADATA:
        raise invalid("metadata", f"must not have more than {MAX_METADATA} entries; has {len(metadata)}")
    for name, value in metadata.items():
        if not 1 <= len(name) <= MAX_METADATA_NAME or not name.isprintable():
            must = f"names must have 1 to {MAX_METADATA_NAME} printable characters"
            raise invalid("metadata", f"{quoted(name, 20)}: {must}")
        if not _fits_in(value, MAX_METADATA_BYTES) or not value.isprintable():
            raise invalid(f"metadata.{name}", f"must be printable and not exceed {MAX_METADATA_BYTES} bytes")


def check_options(options: RequestOptions) -> None:
    """Check the options of a request. Raises a single CallError that names every wrong field, up to MAX_VIOLATIONS."""
    wrong = [
        violation
        for (name, low, high), value in zip(_INSIDE, _ranged(options), strict=True)
        if value is not None
        and not low < value <= high  # the range without its lowest value
        and (violation := _range_violation(name, value)) is not None
    ]
    if options.min_tokens is not None and options.max_tokens is not None and options.min_tokens > options.max_tokens:
        wrong.append(Violation("min_tokens", f"must not be above max_tokens ({options.max_tokens})"))
    if options.seed is not None and options.seed + options.n - 1 > MAX_SEED:  # each further sequence has the next seed
        wrong.append(Violation("seed", f"must be at most {MAX_SEED} - (n - 1), got {options.seed} with n {options.n}"))
    wrong += _stop_violations(options)
    wrong += _bias_violations(options.logit_bias)
    wrong += _grammar_violations(options.grammar)
    if wrong:
        wrong = wrong[:MAX_VIOLATIONS]
        raise CallError(
            Outcome.INVALID_FIELD, "; ".join(f"{v.field}: {v.description}" for v in wrong), violations=wrong
        )


def _fits_in(text: str, most_bytes: int) -> bool:
    """Return whether a text has at most `most_bytes` bytes in UTF-8. A text with more than `most_bytes` characters is
    not encoded."""
    return len(text) <= most_bytes and len(text.encode("utf-8", "replace")) <= most_bytes


def _stop_violations(options: RequestOptions) -> list[Violation]:
    """Return the violations of the stop fields. Counts are checked before contents, so that a list that is too long is
    not read."""
    wrong: list[Violation] = []
    if len(options.stop) > MAX_STOP_STRINGS:
        wrong.append(too_many("stop", "strings", MAX_STOP_STRINGS, len(options.stop)))
    else:
        wrong += [
            Violation(f"stop[{i}]", f"must have 1 to {MAX_STOP_CHARS} characters, has {len(text)}")
            for i, text in enumerate(options.stop)
            if not 1 <= len(text) <= MAX_STOP_CHARS
        ]
    if len(options.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        wrong.append(too_many("stop_token_ids", "token ids", MAX_STOP_TOKEN_IDS, len(options.stop_token_ids)))
    else:
        wrong += [
            Violation(f"stop_token_ids[{i}]", f"must not be negative, got {token_id}")
            for i, token_id in enumerate(options.stop_token_ids)
            if token_id < 0
        ]
    return wrong


def _bias_violations(biases: Mapping[int, float]) -> list[Violation]:
    if len(biases) > MAX_LOGIT_BIAS:
        return [too_many("logit_bias", "entries", MAX_LOGIT_BIAS, len(biases))]
    return [
        Violation(f"logit_bias[{token_id}]", "token id must not be negative, bias in [-100, 100]")
        for token_id, bias in sorted(biases.items())
        if token_id < 0 or not math.isfinite(bias) or abs(bias) > 100
    ]


def too_many(field: str, what: str, most: int, got: int) -> Violation:
    """Return the violation for a list with too many entries."""
    return Violation(field, f"at most {most} {what}, got {got}")


def _range_violation(name: str, value: float) -> Violation | None:
    low, high, closed = RANGES[name]
    if not math.isfinite(value):
        return Violation(name, f"must be a finite number, got {value}")
    if low is not None and (value < low or (value == low and not closed)):
        return Violation(name, f"must be {'at least' if closed else 'above'} {low:g}, got {value:g}")
    if high is not None and value > high:
        return Violation(name, f"must be at most {high:g}, got {value:g}")
    return None


def _grammar_violations(grammar: Grammar | None) -> list[Violation]:
    if grammar is None:
        return []
    if grammar.kind == "choice":
        if len(grammar.value) > MAX_CHOICES:
            return [too_many("response_format.choice", "strings", MAX_CHOICES, len(grammar.value))]
        if not grammar.value or not all(grammar.value):
            return [Violation("response_format.choice", "needs at least one string, none of them empty")]
        size = sum(map(len, grammar.value))
    else:
        size = len(grammar.value)
        if not size and grammar.kind != "json_object":
            return [Violation(f"response_format.{grammar.kind}", "must not be empty")]
    if size > MAX_GRAMMAR_CHARS:
        return [Violation("response_format", f"at most {MAX_GRAMMAR_CHARS} characters, got {size}")]
    return []


def too_long(prompt_tokens: int, max_model_len: int, chat: bool, *, surely: str = "") -> CallError:
    """Return the error for a prompt that leaves no room for output. `surely`: text before the number in the error: "at
    least " if `prompt_tokens` is a lower bound, else ""."""
    return CallError(
        Outcome.CONTEXT_LENGTH_EXCEEDED,
        f"the prompt has {surely}{prompt_tokens} tokens, the model's context holds {max_model_len} with at least one "
        "token of output: shorten the prompt",
        violations=[Violation("messages" if chat else "prompt", "too long")],
    )


def sampling(
    request: GenerationRequest,
    defaults: Mapping[str, object],
    prompt_tokens: int,
    max_model_len: int,
    vocab_size: int,
    max_output_tokens: int | None = None,
    eos_token_ids: Collection[int] = (),
) -> Sampling:
    """Return the sampling parameters for the engine. Each value comes from the request, else from the model's
    generation config, else from vLLM's defaults.

    `max_model_len` and `max_output_tokens` are the caller's limits for context and output, in tokens. Raises CallError
    if the prompt leaves no room for output, if a token id lies outside the vocabulary, if a request with `min_tokens`
    has too many stop token ids, or if `min_tokens` exceeds the number of tokens that the call may produce.
    """
    o = request.options
    room = max_model_len - prompt_tokens
    if room < 1:
        raise too_long(prompt_tokens, max_model_len, is_chat(request.prompt))
    limit = defaults.get(MAX_TOKENS_LIMIT)
    room = min(room, max_output_tokens or room, int(limit) if isinstance(limit, int | float) and limit >= 1 else room)
    for name, ids in (("stop_token_ids", o.stop_token_ids), ("logit_bias", tuple(o.logit_bias))):
        for token_id in ids:
            if token_id >= vocab_size:
                raise invalid(
                    f"{name}[{token_id}]", f"the vocabulary has {vocab_size} tokens, ids 0 to {vocab_size - 1}"
                )

    def pick(name: str) -> float:
        for value in (getattr(o, name), defaults.get(name)):
            if isinstance(value, int | float):
                return float(value)
        return PLAIN_SAMPLING[name]

    requested_tokens = o.max_tokens
    if requested_tokens is None:
        default = defaults.get("max_tokens")
        requested_tokens = int(default) if isinstance(default, int | float) else request.default_max_tokens
    max_tokens = room if requested_tokens is None else min(requested_tokens, room)
    if o.logprobs is not None:
        max_tokens = _within_max_logprobs(o, o.logprobs, max_tokens)
    min_tokens = o.min_tokens or 0
    most_stop_ids = MAX_STOP_TOKEN_IDS_AFTER_MIN - len(eos_token_ids)
    if min_tokens and len(o.stop_token_ids) > most_stop_ids:
        raise invalid(
            "stop_token_ids",
            f"at most {most_stop_ids} token ids if min_tokens is 1 or more, got {len(o.stop_token_ids)}; "
            "give fewer, or leave min_tokens out",
        )
    if min_tokens > max_tokens:
        raise invalid("min_tokens", f"must not be above the {max_tokens} tokens that this call may produce")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=pick("temperature"),
        top_p=pick("top_p"),
        top_k=max(int(pick("top_k")), 0),
        min_p=pick("min_p"),
        seed=o.seed,
        stop_token_ids=o.stop_token_ids,
        frequency_penalty=pick("frequency_penalty"),
        presence_penalty=pick("presence_penalty"),
        repetition_penalty=pick("repetition_penalty"),
        logit_bias=dict(o.logit_bias),
        logprobs=o.logprobs,
        ignore_eos=o.ignore_eos,
        grammar=o.grammar,
        max_reasoning_tokens=o.max_reasoning_tokens,
    )


def _within_max_logprobs(options: RequestOptions, top_logprobs: int, max_tokens: int) -> int:
    """Return the number of tokens that a call with log probabilities may produce: `max_tokens`, or less if the caller
    has set no `max_tokens`. Raises CallError if the caller's options ask for too many log probabilities."""
    per_token = options.n * (top_logprobs + 1)
    most_tokens = MAX_LOGPROBS // per_token
    if max_tokens <= most_tokens or options.max_tokens is None:
        return min(max_tokens, most_tokens)
    raise invalid(
        "max_tokens",
        f"n {options.n} times {max_tokens} tokens times {top_logprobs + 1} log probabilities a token is "
        f"{per_token * max_tokens}, at most {MAX_LOGPROBS} are allowed: lower it to {most_tokens}, lower n, or ask for "
        "fewer alternatives",
    )
