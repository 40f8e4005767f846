"""A model's tokenizer and chat templates, from its bundle: prompts become token ids, and token ids become text.

The ids of a plain prompt equal those of transformers' tokenizer with special tokens added, as in vLLM's server for
completions. The ids of messages equal those of apply_chat_template(tokenize=True): no special tokens are added, since
the template contains the BOS. All functions are thread-safe; the Rust tokenizer releases the GIL.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog
from tokenizers import Tokenizer

from cluster.api.outcomes import CallError, invalid
from cluster.gateway.calls.pooling.pooling_request import PairInputs, TextInputs, text_lengths
from cluster.gateway.calls.pooling.pooling_request import too_long as input_too_long
from cluster.gateway.calls.request import ChatPrompt, PackedPrompt, TextPrompt, too_long
from cluster.gateway.helpers.pool import Job
from cluster.gateway.text.chat.chat_json import chat_json
from cluster.gateway.text.chat.control_tokens import ControlTokens
from cluster.gateway.text.chat.template import ChatTemplate
from cluster.gateway.text.encoding.block_encoder import BlockEncoder
from cluster.gateway.text.encoding.encoding_pool import EncodingPool
from cluster.gateway.text.encoding.input_encoder import EncodedInputs, InputEncoder
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.encoding.text_jobs import ENCODE_HELPER_CHARS, ENCODE_OFFLOAD_CHARS, TextJobs
from cluster.gateway.text.expressions import expressions_of, may_explode
from cluster.gateway.text.output_texts import OutputTexts
from cluster.gateway.text.tokenizer_json import read_tokenizer
from cluster.wire.bundle import ESCAPE_SEPARATOR, ESCAPED_TOKENS, RENDERER, Bundle

if TYPE_CHECKING:
    from cluster.gateway.text.encoding.reach import Reach

log = structlog.get_logger("text")

ANY_LENGTH: Final = 2**62
CHARS_PER_INPUT: Final = 64
"""Characters that take as long to tokenize as each input of a pooling request takes besides its text."""
SURELY_FEW: Final = 8
"""Characters for each allowed token. A text with more characters is checked before it is tokenized: it is refused if a
lower bound on its tokens is too high."""
SPECIAL_TOKEN_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class PromptText(NamedTuple):
    """The text of a prompt, as it is tokenized. `field`: `prompt` or `messages`, the field that the text comes from."""

    text: str
    field: str


class TextModel:
    """The tokenizer and chat templates of one model. Create with `from_bundle`. The only state is caches."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        *,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        model_config: Mapping[str, Any],
        pool: EncodingPool | None = None,
        memory: PromptMemory | None = None,
        salt: bytes = b"",
    ) -> None:
        """`pool`: the helper processes for long texts. If None, long texts are tokenized in threads. `memory`: the
        gateway's memory of encoded prompts. `salt`: distinguishes this model in the memory."""
        self.pool = pool
        self._tokenizer = tokenizer
        self._template = template
        self._control_tokens = _control_tokens(config)
        self._renderer = str(config.get(RENDERER, ""))
        self._eos_token_ids = _eos_ids(tokenizer, config, generation_config)
        self._vocab_size = int(model_config.get("vocab_size") or tokenizer.get_vocab_size())
        self._family = str(model_config.get("model_type", ""))
        layout = self._layout = json.loads(_without_model(tokenizer))
        self._inputs = InputEncoder(tokenizer, config, layout.get("pre_tokenizer"))
        self._jobs = TextJobs(pool, is_quick=not any(map(may_explode, expressions_of(layout))))
        self._blocks = BlockEncoder.of(tokenizer, layout, salt=salt)
        self._memory = memory or PromptMemory()
        output = OutputTexts(tokenizer, layout)  # its methods are this object's, without another call per token
        self.decode = output.decode
        self.detokenizer = output.detokenizer
        self.token_text = output.token_text

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        *,
        now: Callable[[], datetime] = datetime.now,
        in_helper: bool = False,
        memory: PromptMemory | None = None,
    ) -> TextModel:
        """Return the TextModel of a bundle. `now`: the clock of strftime_now in chat templates. `in_helper`: whether
        this is a helper process, which starts no further helper processes. `memory`: the memory of encoded prompts,
        which several models may share.

        Raises ValueError, which names the file, if a file is missing or invalid.
        """
        config = _json(bundle, "tokenizer_config.json")
        try:
            tokenizer = read_tokenizer(bundle.files["tokenizer.json"])
        except KeyError:
            raise ValueError("bundle has no tokenizer.json: build it again from the model's folder") from None
        except Exception as e:  # the Rust side raises plain Exception
            raise ValueError(f"bundle's tokenizer.json cannot be read: {e}") from e
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        tokenizer.no_truncation()  # transformers, too, ignores both settings of the file
        tokenizer.no_padding()
        special = {name: str(config[name]) for name in SPECIAL_TOKEN_NAMES if config.get(name) is not None}
        return cls(
            tokenizer,
            ChatTemplate(
                _template_sources(bundle),
                special_tokens=special,
                control_tokens=_control_tokens(config),
                now=now,
            ),
            config=config,
            generation_config=_json(bundle, "generation_config.json"),
            model_config=_json(bundle, "config.json"),
            pool=EncodingPool(bundle) if now == datetime.now and not in_helper else None,  # helpers use the real clock
            memory=memory,
            salt=hashlib.sha256(bundle.files["tokenizer.json"]).digest() + bytes([tokenizer.encode_special_tokens]),
        )

    @property
    def vocab_size(self) -> int:
        """Size of the model's vocabulary, which may be padded to more than the tokenizer's vocabulary. All token ids
        are smaller than this size."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a generation: first the tokenizer's EOS, then the other ids in the generation config."""
        return self._eos_token_ids

    @property
    def family(self) -> str:
        """The model_type in config.json, for example llama, mistral or falcon."""
        return self._family

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template, with which this gateway can make the prompts of chats."""
        return bool(self._template)

    @property
    def renderer(self) -> str:
        """Name of the renderer with which workers make the prompts of chats; "" if only the chat template does."""
        return self._renderer

    def __repr__(self) -> str:
        return f"TextModel({self._family or 'unknown'}, {self._vocab_size} tokens, {self._template!r})"

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a plain prompt, with the special tokens that the model expects (BOS)."""
        return self._encode(text, "prompt", add_special_tokens=True)

    def encode_raw(self, text: str) -> array[int]:
        """Return the token ids of a text that already contains all special tokens. No special tokens are added."""
        return array("I", self._encode(text, "prompt_token_ids", add_special_tokens=False))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        merges_system: bool = False,
    ) -> list[int]:
        """Render messages with the chat template and tokenize the result. Raises CallError as ChatTemplate.render
        does."""
        text = self.render_chat(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            merges_system=merges_system,
        )
        return self._encode(text, "messages", add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        merges_system: bool = False,
    ) -> str:
        """Render messages with the chat template. Returns the text that encode_chat tokenizes."""
        return self._template.render(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            merges_system=merges_system,
        )

    def chat_json(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> bytes:
        """Return a chat as the JSON that a worker's renderer gets. `options`: as of render_chat. Raises CallError."""
        if self._control_tokens is not None:
            messages = self._control_tokens.in_messages(messages)
            arguments = dict(options.get("template_kwargs") or {})
            if "documents" in arguments:
                arguments["documents"] = self._control_tokens.in_documents(arguments["documents"])
            options = {**options, "template_kwargs": arguments}
        return chat_json(messages, **options)

    def packed_chat_json(self, prompt: PackedPrompt) -> bytes:
        """Return the result of chat_json for a packed chat."""
        unpacked = prompt.unpacked()
        assert isinstance(unpacked, ChatPrompt)
        return self.chat_json(unpacked.messages, **unpacked.template_options)

    async def chat_json_async(self, tenant: str, prompt: ChatPrompt | PackedPrompt) -> bytes:
        """Return the result of chat_json. If the chat is long, the work is done off the event loop."""
        job: Job
        if isinstance(prompt, PackedPrompt):
            chars = max(memoryview(prompt.packed).nbytes, ENCODE_HELPER_CHARS + 1)
            job = ("packed_chat_json", (prompt,), {})
        else:
            options = prompt.template_options
            chars = _chars(prompt.messages) + _chars(options)
            job = ("chat_json", (prompt.messages,), dict(options))
        method, positional, named = job
        work: Callable[[], bytes] = lambda: getattr(self, method)(*positional, **named)  # noqa: E731
        return bytes(await self._jobs.run(tenant, chars, job, "messages", work))

    def prompt_ids(self, tenant: str, text: str, max_tokens: int = ANY_LENGTH, cache_salt: str = "") -> array[int]:
        """Return the token ids of a plain prompt as a packed array. The ids equal those of encode_prompt. Blocks of
        long texts that the tenant has sent before with the same `cache_salt` are not tokenized again.

        Raises CallError, before tokenizing, if the text certainly has more than `max_tokens` tokens.
        """
        return self._ids(self.prompt_text(text, max_tokens), tenant, cache_salt)

    def chat_ids(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = ANY_LENGTH,
        cache_salt: str = "",
        **options: Any,
    ) -> array[int]:
        """Return the token ids of messages, as encode_chat does, but as a packed array. Memory and limit: see
        `prompt_ids`."""
        return self._ids(self.chat_text(messages, max_tokens, **options), tenant, cache_salt)

    def prompt_text(self, text: str, max_tokens: int = ANY_LENGTH) -> PromptText:
        """Return a plain prompt as it is tokenized. Raises CallError as `prompt_ids` does."""
        self._refuse_long(text, max_tokens, chat=False)
        return PromptText(text, "prompt")

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int = ANY_LENGTH, **options: Any
    ) -> PromptText:
        """Return messages as they are tokenized. Raises CallError as `prompt_ids` does."""
        text = self.render_chat(messages, **options)
        self._refuse_long(text, max_tokens, chat=True)
        return PromptText(text, "messages")

    def packed_text(self, prompt: PackedPrompt, max_tokens: int = ANY_LENGTH) -> PromptText:
        """Return a packed prompt as it is tokenized. Raises CallError as `prompt_ids` does."""
        unpacked = prompt.unpacked()
        if isinstance(unpacked, TextPrompt):
            return self.prompt_text(unpacked.text, max_tokens)
        return self.chat_text(unpacked.messages, max_tokens, **unpacked.template_options)

    def begin(self, job: Job) -> bytes | array[int]:
        """Begin to tokenize a prompt in a helper process. `job`: the method that returns the PromptText.

        Returns the digests of the prompt's blocks, after which `finish` encodes those that the caller lacks; or the ids
        of the whole prompt, if it cannot be cut into blocks.
        """
        method, positional, named = job
        prompt: PromptText = getattr(self, method)(*positional, **named)
        with _tokenizing(prompt.field):
            digests = self._blocks.begin(prompt.text) if self._blocks is not None else b""
        return digests or self._whole(prompt)

    def finish(self, missing: array[int], field: str) -> list[bytes]:
        """Return the packed ids of the blocks with the numbers `missing`, of the prompt that `begin` was last called
        with."""
        assert self._blocks is not None
        with _tokenizing(field):
            return self._blocks.finish(missing)

    async def prompt_ids_async(
        self, tenant: str, text: str, max_tokens: int = ANY_LENGTH, cache_salt: str = ""
    ) -> array[int]:
        """Return the result of prompt_ids. A long text is tokenized off the event loop."""
        if self._jobs.is_short(len(text)):
            return self.prompt_ids(tenant, text, max_tokens)
        job: Job = ("prompt_text", (text, max_tokens), {})
        return await self._ids_async(tenant, cache_salt, len(text), job, "prompt")

    async def chat_ids_async(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = ANY_LENGTH,
        cache_salt: str = "",
        **options: Any,
    ) -> array[int]:
        """Return the result of chat_ids. If messages and options together are long, the work is done off the event
        loop.
        """
        chars = _chars(messages) + _chars(options)
        if self._jobs.is_short(chars):
            return self.chat_ids(tenant, messages, max_tokens, cache_salt, **options)
        job: Job = ("chat_text", (messages, max_tokens), options)
        return await self._ids_async(tenant, cache_salt, chars, job, "messages")

    async def packed_ids_async(
        self, tenant: str, prompt: PackedPrompt, max_tokens: int = ANY_LENGTH, cache_salt: str = ""
    ) -> array[int]:
        """Return the token ids of a packed prompt, as prompt_ids or chat_ids does. The work is done off the event
        loop."""
        chars = max(memoryview(prompt.packed).nbytes, ENCODE_HELPER_CHARS + 1)
        job: Job = ("packed_text", (prompt, max_tokens), {})
        return await self._ids_async(tenant, cache_salt, chars, job, "messages" if prompt.is_chat else "prompt")

    def encode_inputs(self, inputs: TextInputs | PairInputs, most: int, keep: int | None = None) -> EncodedInputs:
        """Return the ids of the inputs of a pooling request, see InputEncoder.encode."""
        if most and keep is None and inputs.chars > SURELY_FEW * most:
            self._refuse_long_inputs(inputs, most)
        try:
            return self._inputs.encode(inputs, most, keep)
        except BaseException as error:
            raise _named(error, inputs.path(0) if len(inputs) == 1 else inputs.fields) from None

    async def encode_inputs_async(
        self, tenant: str, inputs: TextInputs | PairInputs, most: int, keep: int | None = None
    ) -> EncodedInputs:
        """Return the result of encode_inputs. The work on long texts, or on many, is done off the event loop."""
        chars = inputs.chars + CHARS_PER_INPUT * len(inputs)
        if self._jobs.is_short(chars):
            return self.encode_inputs(inputs, most, keep)
        job: Job = ("encode_inputs", (inputs, most, keep), {})
        encoded: EncodedInputs = await self._jobs.run(
            tenant, chars, job, inputs.fields, lambda: self.encode_inputs(inputs, most, keep)
        )
        return encoded

    async def decode_async(self, tenant: str, token_ids: Sequence[int], field: str) -> str:
        """Return the text of token ids, special tokens included. Many ids are decoded off the event loop."""
        job: Job = ("decode", (token_ids, False), {})
        text: str = await self._jobs.run(
            tenant, 4 * len(token_ids), job, field, lambda: self.decode(token_ids, skip_special_tokens=False)
        )
        return text

    async def _ids_async(self, tenant: str, cache_salt: str, chars: int, job: Job, field: str) -> array[int]:
        """Return the ids of the PromptText that `job` makes."""
        method, positional, named = job
        recall = None
        if self._blocks is not None:
            recall = self._blocks.recall(self._memory, tenant, cache_salt, add_special_tokens=field == "prompt")

        def missing(answer: bytes | array[int]) -> Job | None:
            """Return the second job for a prompt of which the helper process has sent the digests."""
            return ("finish", (recall.missing(answer), field), {}) if recall and isinstance(answer, bytes) else None

        def here() -> array[int]:
            return self._ids(getattr(self, method)(*positional, **named), tenant, cache_salt)

        answer = await self._jobs.run(tenant, chars, ("begin", (job,), {}), field, here, then=missing)
        if isinstance(answer, array):
            return answer
        assert recall is not None
        return recall.ids(answer)

    @cached_property
    def _reach(self) -> Reach | None:
        from cluster.gateway.text.encoding.reach import Reach  # not at the start: deferred_imports.py

        return Reach.of(self._tokenizer, self._layout)

    def _refuse_long(self, text: str, max_tokens: int, *, chat: bool) -> None:
        if len(text) <= SURELY_FEW * max_tokens:
            return
        if self._reach is not None and (fewest := self._reach.fewest(text)) > max_tokens:
            raise too_long(fewest, max_tokens + 1, chat, surely="at least ")

    def _refuse_long_inputs(self, inputs: TextInputs | PairInputs, most: int) -> None:
        texts = inputs.all_texts
        for i, length in enumerate(text_lengths(texts)):
            if length <= SURELY_FEW * most or self._reach is None:
                continue
            if (fewest := self._reach.fewest(texts[i])) > most:
                raise input_too_long(inputs.path_of_text(i), fewest, most, surely="at least ")

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # The batch method computes no offsets, so it is twice as fast. It also releases the GIL.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise _named(error, field) from None
        return list(encoding.ids)

    def _whole(self, prompt: PromptText) -> array[int]:
        return array("I", self._encode(prompt.text, prompt.field, add_special_tokens=prompt.field == "prompt"))

    def _ids(self, prompt: PromptText, tenant: str, cache_salt: str) -> array[int]:
        if self._blocks is None or len(prompt.text) <= ENCODE_OFFLOAD_CHARS:
            return self._whole(prompt)
        with _tokenizing(prompt.field):
            recall = self._blocks.recall(self._memory, tenant, cache_salt, add_special_tokens=prompt.field == "prompt")
            return self._blocks.encode(prompt.text, recall)


@contextmanager
def _tokenizing(field: str) -> Iterator[None]:
    """Name `field` in the errors of the tokenizer."""
    try:
        yield
    except BaseException as error:
        raise _named(error, field) from None


def _named(error: BaseException, field: str) -> BaseException:
    """Return the CallError for a lone surrogate, for which the Rust tokenizer raises TypeError, and for a panic of the
    tokenizer, which is not an Exception. Any other error is returned unchanged."""
    if isinstance(error, TypeError):
        return _no_unicode(field)
    if type(error).__name__ != "PanicException":
        return error
    log.warning("tokenizer.panicked", reason=str(error)[:200])
    return invalid(field, "the model's tokenizer cannot process this text: send a shorter or simpler one")


def _no_unicode(field: str) -> CallError:
    return invalid(field, "the text is not valid Unicode (a lone surrogate): send well-formed text")


def _json(bundle: Bundle, name: str) -> dict[str, Any]:
    try:
        content = json.loads(bundle.files.get(name, b"{}"))
    except ValueError as e:
        raise ValueError(f"bundle's {name} is not JSON: {e}") from e
    if not isinstance(content, dict):
        raise ValueError(f"bundle's {name} must hold a JSON object")
    return content


def _template_sources(bundle: Bundle) -> dict[str, str]:
    """Return the sources of the chat templates by name. The file chat_template.jinja has the name `default`, the file
    chat_template.NAME.jinja has the name NAME."""
    sources = {}
    for name, content in bundle.files.items():
        if name == "chat_template.jinja":
            sources["default"] = content.decode()
        elif name.startswith("chat_template.") and name.endswith(".jinja"):
            sources[name.removeprefix("chat_template.").removesuffix(".jinja")] = content.decode()
    return sources


def _control_tokens(config: Mapping[str, Any]) -> ControlTokens | None:
    tokens = config.get(ESCAPED_TOKENS)
    return ControlTokens(tokens, config[ESCAPE_SEPARATOR]) if tokens else None


def _eos_ids(tokenizer: Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    own = tokenizer.token_to_id(str(config["eos_token"])) if config.get("eos_token") is not None else None
    listed = generation.get("eos_token_id")
    others = [listed] if isinstance(listed, int) else list(listed or ())
    return tuple(dict.fromkeys(number for number in (own, *others) if number is not None))


def _without_model(tokenizer: Tokenizer) -> str:
    """Return the tokenizer as JSON without the vocabulary, since serializing a large vocabulary takes a tenth of a
    second."""
    shell = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    if tokenizer.normalizer is not None:
        shell.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        shell.pre_tokenizer = tokenizer.pre_tokenizer
    if tokenizer.decoder is not None:
        shell.decoder = tokenizer.decoder
    return str(shell.to_str())


def _chars(value: object) -> int:
    """Return the approximate number of characters that messages, tools or arguments take in a prompt."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple)):
        return 4 + sum([_chars(item) for item in value])
    if isinstance(value, (dict, Mapping)):  # dict first, because that check is faster
        return 4 + sum([_chars(key) + _chars(item) for key, item in value.items()])
    return 4
