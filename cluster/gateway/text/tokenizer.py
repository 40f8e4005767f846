"""A model's tokenizer and chat templates, from its bundle: prompts become token ids, and token ids become text.

The ids of a plain prompt equal those of transformers' tokenizer with special tokens added, as in vLLM's server for
completions. The ids of messages equal those of apply_chat_template(tokenize=True): no special tokens are added, since
the template contains the BOS. All functions are thread-safe; the Rust tokenizer releases the GIL.
"""

from __future__ import annotations

import asyncio
import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import structlog
from tokenizers import Tokenizer

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.calls.request import PackedPrompt, TextPrompt, too_long
from cluster.gateway.helpers.pool import Job, JobLost, TooMuchCpu
from cluster.gateway.text.control_tokens import ControlTokens
from cluster.gateway.text.encoding_pool import EncodingPool
from cluster.gateway.text.expressions import expressions_of, may_explode
from cluster.gateway.text.output_texts import OutputTexts
from cluster.gateway.text.template import ChatTemplate
from cluster.gateway.text.tokenizer_json import read_tokenizer
from cluster.gateway.text.word_encoder import WordEncoder
from cluster.wire.bundle import ESCAPE_SEPARATOR, ESCAPED_TOKENS, Bundle

if TYPE_CHECKING:
    from cluster.gateway.text.reach import Reach

log = structlog.get_logger("text")

ANY_LENGTH: Final = 2**62
SURELY_FEW: Final = 8
"""Characters for each allowed token. A text with more characters is checked before it is tokenized: it is refused if a
lower bound on its tokens is too high."""
ENCODE_OFFLOAD_CHARS: Final = 4096
"""Length in characters above which a text is tokenized in a thread. A text of this length takes about a millisecond of
one core, at 3-4 million characters a second."""
ENCODE_HELPER_CHARS: Final = 32_768
"""Length in characters above which a text is tokenized in a helper process (encoding_pool.py), if one is available."""
_THREADS = ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="encode")
"""Threads for tokenization, no more than cores. Everything but the Rust tokenizer runs under the GIL anyway."""
SPECIAL_TOKEN_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class _TextJobs:
    """Runs the text jobs of one model: on the event loop, in a thread, or in a helper process.

    `is_quick`: whether the tokenizer takes linear time for every text.
    """

    def __init__(self, pool: EncodingPool | None, *, is_quick: bool) -> None:
        self._pool = pool
        self.is_quick = is_quick

    async def run(self, tenant: str, chars: int, job: Job, field: str, work: Callable[[], Any]) -> Any:
        """Run a job without blocking the event loop. `work` does the job in this process.

        Raises CallError, which names `field`, if a helper process fails or is too busy.
        """
        if chars <= ENCODE_OFFLOAD_CHARS and self.is_quick:
            return work()
        if (chars > ENCODE_HELPER_CHARS or not self.is_quick) and self._pool is not None:
            try:
                result = await self._pool.run(job, size=chars, tenant=tenant, local_fallback=self.is_quick)
            except TooMuchCpu:
                raise invalid(field, "takes the model's tokenizer too long: send a shorter or simpler text") from None
            except JobLost as lost:
                log.warning("text_not_tokenized", job=job[0], reason=str(lost))
                raise CallError(
                    Outcome.INTERNAL, f"{field}: the model's tokenizer could not process this text"
                ) from None
            if result is not None:
                return result
            if not self.is_quick:
                raise CallError(Outcome.NO_WORKER, "this gateway is too busy to tokenize; retry shortly")
        return await asyncio.get_running_loop().run_in_executor(_THREADS, work)


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
    ) -> None:
        """`pool`: the helper processes for long texts. If None, long texts are tokenized in threads."""
        self.pool = pool
        self._tokenizer = tokenizer
        self._template = template
        self._eos_token_ids = _eos_ids(tokenizer, config, generation_config)
        self._vocab_size = int(model_config.get("vocab_size") or tokenizer.get_vocab_size())
        self._family = str(model_config.get("model_type", ""))
        layout = self._layout = json.loads(_without_model(tokenizer))
        self._jobs = _TextJobs(pool, is_quick=not any(map(may_explode, expressions_of(layout))))
        self._words = WordEncoder.of(tokenizer, layout.get("pre_tokenizer"))
        output = OutputTexts(tokenizer, layout)  # its methods are this object's, without another call per token
        self.decode = output.decode
        self.detokenizer = output.detokenizer
        self.token_text = output.token_text

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, now: Callable[[], datetime] = datetime.now, in_helper: bool = False
    ) -> TextModel:
        """Return the TextModel of a bundle. `now`: the clock of strftime_now in chat templates. `in_helper`: whether
        this is a helper process, which starts no further helper processes.

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
        """Whether the model has a chat template, so that it can serve chat requests."""
        return bool(self._template)

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
    ) -> list[int]:
        """Render messages with the chat template and tokenize the result. Raises CallError as ChatTemplate.render
        does."""
        text = self.render_chat(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
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
    ) -> str:
        """Render messages with the chat template. Returns the text that encode_chat tokenizes."""
        return self._template.render(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def prompt_ids(self, tenant: str, text: str, max_tokens: int = ANY_LENGTH) -> array[int]:
        """Return the token ids of a plain prompt as a packed array. The ids equal those of encode_prompt. For each
        tenant, the ids of the beginnings of long texts are cached.

        Raises CallError, before tokenizing, if the text certainly has more than `max_tokens` tokens.
        """
        self._refuse_long(text, max_tokens, chat=False)
        return self._packed(tenant, text, "prompt", add_special_tokens=True)

    def chat_ids(
        self, tenant: str, messages: Sequence[Mapping[str, Any]], max_tokens: int = ANY_LENGTH, **options: Any
    ) -> array[int]:
        """Return the token ids of messages, as encode_chat does, but as a packed array. Cache and limit: see
        `prompt_ids`."""
        text = self.render_chat(messages, **options)
        self._refuse_long(text, max_tokens, chat=True)
        return self._packed(tenant, text, "messages", add_special_tokens=False)

    def packed_ids(self, tenant: str, prompt: PackedPrompt, max_tokens: int = ANY_LENGTH) -> array[int]:
        """Return the token ids of a packed prompt, as prompt_ids or chat_ids does."""
        unpacked = prompt.unpacked()
        if isinstance(unpacked, TextPrompt):
            return self.prompt_ids(tenant, unpacked.text, max_tokens)
        return self.chat_ids(tenant, unpacked.messages, max_tokens, **unpacked.template_options)

    async def prompt_ids_async(self, tenant: str, text: str, max_tokens: int = ANY_LENGTH) -> array[int]:
        """Return the result of prompt_ids. A long text is tokenized off the event loop."""
        job: Job = ("prompt_ids", (tenant, text, max_tokens), {})
        ids: array[int] = await self._run(tenant, len(text), job, "prompt")
        return ids

    async def chat_ids_async(
        self, tenant: str, messages: Sequence[Mapping[str, Any]], max_tokens: int = ANY_LENGTH, **options: Any
    ) -> array[int]:
        """Return the result of chat_ids. If messages and options together are long, the work is done off the event
        loop.
        """
        chars = _chars(messages) + _chars(options)
        job: Job = ("chat_ids", (tenant, messages, max_tokens), options)
        ids: array[int] = await self._run(tenant, chars, job, "messages")
        return ids

    async def packed_ids_async(self, tenant: str, prompt: PackedPrompt, max_tokens: int = ANY_LENGTH) -> array[int]:
        """Return the result of packed_ids. The work is done off the event loop."""
        chars = max(memoryview(prompt.packed).nbytes, ENCODE_HELPER_CHARS + 1)
        job: Job = ("packed_ids", (tenant, prompt, max_tokens), {})
        ids: array[int] = await self._run(tenant, chars, job, "messages" if prompt.is_chat else "prompt")
        return ids

    async def decode_async(self, tenant: str, token_ids: Sequence[int], field: str) -> str:
        """Return the text of token ids, special tokens included. Many ids are decoded off the event loop."""
        job: Job = ("decode", (token_ids, False), {})
        text: str = await self._run(tenant, 4 * len(token_ids), job, field)
        return text

    async def _run(self, tenant: str, chars: int, job: Job, field: str) -> Any:
        method, positional, named = job
        return await self._jobs.run(tenant, chars, job, field, lambda: getattr(self, method)(*positional, **named))

    @cached_property
    def _reach(self) -> Reach | None:
        from cluster.gateway.text.reach import Reach  # not at the start: deferred_imports.py

        return Reach.of(self._tokenizer, self._layout)

    def _refuse_long(self, text: str, max_tokens: int, *, chat: bool) -> None:
        if len(text) <= SURELY_FEW * max_tokens:
            return
        if self._reach is not None and (fewest := self._reach.fewest(text)) > max_tokens:
            raise too_long(fewest, max_tokens + 1, chat, surely="at least ")

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # The batch method computes no offsets, so it is twice as fast. It also releases the GIL.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # raised by the Rust side for a lone surrogate
            raise _no_unicode(field) from None
        except BaseException as error:
            raise _panicked(error, field) from None
        return list(encoding.ids)

    def _packed(self, tenant: str, text: str, field: str, *, add_special_tokens: bool) -> array[int]:
        if self._words is None or len(text) <= ENCODE_OFFLOAD_CHARS:
            return array("I", self._encode(text, field, add_special_tokens=add_special_tokens))
        ids = array("I")
        try:
            ids.frombytes(self._words.encode(text, add_special_tokens=add_special_tokens, tenant=tenant))
        except TypeError:
            raise _no_unicode(field) from None
        except BaseException as error:
            raise _panicked(error, field) from None
        return ids


def _panicked(error: BaseException, field: str) -> BaseException:
    """Return the CallError for a panic of the Rust tokenizer, which is not an Exception. Any other error is returned
    unchanged."""
    if type(error).__name__ != "PanicException":
        return error
    log.warning("tokenizer_panicked", reason=str(error)[:200])
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
