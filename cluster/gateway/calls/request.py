"""What a caller asks for, checked field by field, still without the model's defaults; any face makes one.

Ranges are vLLM's own (sampling_params.py), so that what passes here passes there.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.api.outcomes import MAX_VIOLATIONS, CallError, Outcome, Violation, invalid, quoted
from cluster.api.types import Grammar, Sampling

MAX_N = 64
MAX_NAME_CHARS = 1024
"""Of a model; no model has a longer one."""
MAX_MESSAGES = 10_000
"""Of a chat, and parts and tool calls of one message."""
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_STOP_TOKEN_IDS_AFTER_MIN = 128
"""With `min_tokens` of 1 or more, the model's own EOS ids among them: vLLM keeps so many apart for each request."""
MAX_TOP_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 262_144
MAX_CHOICES = 1024
DEFAULT_COMPLETE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Sampling as asked: None is "unset", so that the model's default applies."""

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
    """How many tokens of a position are told, the sampled one among them; None is `logprobs`."""
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages for the model's chat template, as plain mappings in OpenAI's shape."""

    messages: Sequence[Mapping[str, Any]]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    add_generation_prompt: bool = True

    @property
    def template_options(self) -> Mapping[str, Any]:
        """The arguments of a render beside the messages."""
        return {
            "template_kwargs": self.template_kwargs,
            "continue_final_message": self.continue_final_message,
            "add_generation_prompt": self.add_generation_prompt and not self.continue_final_message,
        }


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A plain prompt."""

    text: str


@dataclass(frozen=True, slots=True)
class IdsPrompt:
    """A prompt in token ids."""

    token_ids: Sequence[int]
    """An array where there are many."""


@dataclass(frozen=True, slots=True)
class PackedPrompt:
    """A long ChatPrompt or TextPrompt as a helper process has read and packed it, for another to tokenize.

    The gateway's own process passes it on as it is: unpacking megabytes would hold up its event loop.
    """

    is_chat: bool
    packed: Any
    """A pickle, as bytes or a buffer."""

    def unpacked(self) -> ChatPrompt | TextPrompt:
        """The prompt. Not on an event loop."""
        prompt: ChatPrompt | TextPrompt = pickle.loads(self.packed)  # noqa: S301 - written by this gateway's helper
        return prompt

    @classmethod
    def of(cls, prompt: ChatPrompt | TextPrompt) -> PackedPrompt:
        """Pack a prompt. Not on an event loop."""
        return cls(isinstance(prompt, ChatPrompt), pickle.dumps(prompt, protocol=5))

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        return PackedPrompt, (self.is_chat, pickle.PickleBuffer(self.packed))  # a buffer is not copied


Prompt = ChatPrompt | TextPrompt | IdsPrompt | PackedPrompt


def is_chat(prompt: Prompt) -> bool:
    """Whether a prompt is messages."""
    return isinstance(prompt, ChatPrompt) or (isinstance(prompt, PackedPrompt) and prompt.is_chat)


@dataclass(frozen=True, slots=True)
class ResumeFrom:
    """Where a stream had come when it broke: all its tokens in order, and the newest one's number."""

    tokens: Sequence[bytes]
    offset: int


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One call as asked."""

    model: str
    prompt: Prompt
    options: RequestOptions
    default_max_tokens: int | None = None
    cache_salt: str = ""
    """The caller's own: its calls share a cached prefix only with those of the same salt."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Labels of the usage record; the tenant's own of the same name win."""
    resumable: str = ""
    """Where its chunks are to carry resume tokens, the digest of the whole request."""
    resume: ResumeFrom | None = None


MAX_METADATA, MAX_METADATA_NAME, MAX_METADATA_BYTES = 16, 64, 256

# field -> (lowest, highest, whether the lowest itself is allowed); None is unbounded.
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
}


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raise CallError for what a usage record does not take."""
    if len(metadata) > MAX_METADATA:
        raise invalid("metadata", f"must not have more than {MAX_METADATA} entries; has {len(metadata)}")
    for name, value in metadata.items():
        if not 1 <= len(name) <= MAX_METADATA_NAME or not name.isprintable():
            must = f"names must have 1 to {MAX_METADATA_NAME} printable characters"
            raise invalid("metadata", f"{quoted(name, 20)}: {must}")
        if not _fits_in(value, MAX_METADATA_BYTES) or not value.isprintable():
            raise invalid(f"metadata.{name}", f"must be printable and not exceed {MAX_METADATA_BYTES} bytes")


def check_options(options: RequestOptions) -> None:
    """Raise one CallError that names every wrong field."""
    wrong = [v for name in RANGES if (v := _range(name, getattr(options, name))) is not None]
    if options.min_tokens is not None and options.max_tokens is not None and options.min_tokens > options.max_tokens:
        wrong.append(Violation("min_tokens", f"must not be above max_tokens ({options.max_tokens})"))
    if options.seed is not None and options.seed + options.n - 1 > MAX_SEED:  # each output has the next seed
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
    """Whether a text's UTF-8 is no longer; one that cannot be is not encoded."""
    return len(text) <= most_bytes and len(text.encode("utf-8", "replace")) <= most_bytes


def _stop_violations(options: RequestOptions) -> list[Violation]:
    """Counts before contents: what is too long is not looked through."""
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
    """A list that is longer than it may be."""
    return Violation(field, f"at most {most} {what}, got {got}")


def _range(name: str, value: float | None) -> Violation | None:
    if value is None:
        return None
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
    """The error of a prompt that leaves no room. `surely`: "at least " where its tokens were not counted."""
    return CallError(
        Outcome.CONTEXT_LENGTH_EXCEEDED,
        f"the prompt has {surely}{prompt_tokens} tokens, the model's context holds {max_model_len} with at least one "
        "token of output: shorten the prompt",
        violations=[Violation("messages" if chat else "prompt", "too long")],
    )


def sampling(
    wish: GenerationRequest,
    defaults: Mapping[str, object],
    prompt_tokens: int,
    max_model_len: int,
    vocab_size: int,
    max_output_tokens: int | None = None,
    eos_token_ids: Collection[int] = (),
) -> Sampling:
    """The engine's parameters: as asked, else the model's generation config, else vLLM's defaults.

    `max_model_len` is what the caller may use of the model's context, `max_output_tokens` of its output. Raises
    CallError when the prompt leaves no room, an id lies outside the vocabulary, or too many ids end a call that must
    have `min_tokens`.
    """
    o = wish.options
    room = max_model_len - prompt_tokens
    if room < 1:
        raise too_long(prompt_tokens, max_model_len, is_chat(wish.prompt))
    room = min(room, max_output_tokens or room)
    for name, ids in (("stop_token_ids", o.stop_token_ids), ("logit_bias", tuple(o.logit_bias))):
        for token_id in ids:
            if token_id >= vocab_size:
                raise invalid(
                    f"{name}[{token_id}]", f"the vocabulary has {vocab_size} tokens, ids 0 to {vocab_size - 1}"
                )

    def pick(name: str, otherwise: float) -> float:
        asked = getattr(o, name)
        if asked is not None:
            return float(asked)
        default = defaults.get(name)
        return float(default) if isinstance(default, int | float) else otherwise

    asked_tokens = o.max_tokens
    if asked_tokens is None:
        default = defaults.get("max_tokens")
        asked_tokens = int(default) if isinstance(default, int | float) else wish.default_max_tokens
    max_tokens = room if asked_tokens is None else min(asked_tokens, room)
    min_tokens = o.min_tokens or 0
    most_ends = MAX_STOP_TOKEN_IDS_AFTER_MIN - len(eos_token_ids)
    if min_tokens and len(o.stop_token_ids) > most_ends:
        raise invalid(
            "stop_token_ids",
            f"at most {most_ends} token ids where min_tokens is 1 or more, got {len(o.stop_token_ids)}; "
            "give fewer, or no min_tokens",
        )
    if min_tokens > max_tokens:
        raise invalid("min_tokens", f"must not be above the {max_tokens} tokens that this call may produce")
    return Sampling(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=pick("temperature", 1.0),
        top_p=pick("top_p", 1.0),
        top_k=max(int(pick("top_k", 0)), 0),
        min_p=pick("min_p", 0.0),
        seed=o.seed,
        stop_token_ids=o.stop_token_ids,
        frequency_penalty=o.frequency_penalty or 0.0,
        presence_penalty=o.presence_penalty or 0.0,
        repetition_penalty=pick("repetition_penalty", 1.0),
        logit_bias=dict(o.logit_bias),
        logprobs=o.logprobs,
        ignore_eos=o.ignore_eos,
        grammar=o.grammar,
    )
