"""A model's tokens and text, from its bundle: prompts become token ids, token ids become text.

The ids are those of the model's own tools: transformers' tokenizer for a plain prompt (special tokens added, as vLLM's
server does for completions), apply_chat_template(tokenize=True) for messages (none added: the template has its own
BOS). Everything here may be called from several threads; the Rust tokenizer works outside the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import structlog
from tokenizers import Tokenizer

from cluster.api.outcomes import CallError, Outcome, invalid
from cluster.gateway.calls.request import PackedPrompt, TextPrompt, too_long
from cluster.gateway.helpers.pool import Job, Lost, TooMuchCpu
from cluster.gateway.text.detokenizer import Detokenizer, UnseenTokens, priming_ids, whole_texts
from cluster.gateway.text.encoding_pool import EncodingPool
from cluster.gateway.text.expressions import expressions_of, may_explode
from cluster.gateway.text.template import ChatTemplate
from cluster.gateway.text.tokenizer_json import read_tokenizer
from cluster.gateway.text.word_encoder import WordEncoder
from cluster.wire.bundle import Bundle

if TYPE_CHECKING:
    from cluster.gateway.text.reach import Reach

log = structlog.get_logger("text")

ANY_LENGTH: Final = 2**62
SURELY_FEW: Final = 8
"""Characters a token: shorter texts are tokenized without asking how few tokens they could have."""
ENCODE_OFFLOAD_CHARS: Final = 4096
"""Longer texts are tokenized in a worker thread: about a millisecond of one core at 3-4 million characters a second."""
ENCODE_HELPER_CHARS: Final = 32_768
"""Longer texts are tokenized in a process of their own (encoding_pool.py), as soon as one is there."""
_THREADS = ThreadPoolExecutor(min(os.cpu_count() or 1, 8), thread_name_prefix="encode")
"""No more than there are cores: what these do beside the Rust tokenizer, they do one after the other anyway."""
SPECIAL_TOKEN_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
TAIL_SAFE_DECODERS: Final = frozenset({"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


class _Unknown:
    """In place of what has not been computed yet."""


UNKNOWN: Final = _Unknown()


class TextModel:
    """One model's tokenizer and chat templates. Made by `from_bundle`; holds no state between calls but caches."""

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
        """`pool`: where long texts are tokenized; None: in threads."""
        self.pool = pool
        self._tokenizer = tokenizer
        self._template = template
        self._eos_token_ids = _eos_ids(tokenizer, config, generation_config)
        self._vocab_size = int(model_config.get("vocab_size") or tokenizer.get_vocab_size())
        self._family = str(model_config.get("model_type", ""))
        layout = self._layout = json.loads(_without_model(tokenizer))
        self._reach: Reach | _Unknown | None = UNKNOWN
        self._is_quick = not any(map(may_explode, expressions_of(layout)))
        self._words = WordEncoder.of(tokenizer, layout.get("pre_tokenizer"))
        self._space_mark = _space_mark(layout.get("pre_tokenizer"))
        self._tail_primes = _kinds(layout.get("decoder"), "decoders") <= TAIL_SAFE_DECODERS
        self._unsafe_ids = frozenset(tokenizer.get_added_tokens_decoder()) | _byte_ids(tokenizer)
        self._whole_texts = whole_texts(tokenizer, self._unsafe_ids)
        self._unseen = {skip: UnseenTokens(tokenizer, skip_special_tokens=skip) for skip in (False, True)}
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, now: Callable[[], datetime] = datetime.now, in_helper: bool = False
    ) -> TextModel:
        """Read a bundle. `now` is what strftime_now in a chat template tells. `in_helper`: it has no helpers itself.

        Raises ValueError, naming the file, when one is missing or is not what it should be.
        """
        config = _json(bundle, "tokenizer_config.json")
        try:
            tokenizer = read_tokenizer(bundle.files["tokenizer.json"])
        except KeyError:
            raise ValueError("bundle has no tokenizer.json: build it anew from the model's folder") from None
        except Exception as e:  # the Rust side raises plain Exception
            raise ValueError(f"bundle's tokenizer.json cannot be read: {e}") from e
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        special = {name: str(config[name]) for name in SPECIAL_TOKEN_NAMES if config.get(name) is not None}
        return cls(
            tokenizer,
            ChatTemplate(_template_sources(bundle), special_tokens=special, now=now),
            config=config,
            generation_config=_json(bundle, "generation_config.json"),
            model_config=_json(bundle, "config.json"),
            pool=EncodingPool(bundle) if now == datetime.now and not in_helper else None,  # they know no other time
        )

    @property
    def vocab_size(self) -> int:
        """Token ids are below this: the model's own vocabulary, which may be padded beyond the tokenizer's."""
        return self._vocab_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a generation: the tokenizer's EOS first, then the generation config's others."""
        return self._eos_token_ids

    @property
    def family(self) -> str:
        """The model_type of config.json: llama, mistral, falcon, ..."""
        return self._family

    @property
    def has_chat_template(self) -> bool:
        """Whether Chat can be asked of the model at all."""
        return bool(self._template)

    def __repr__(self) -> str:
        return f"TextModel({self._family or 'unknown'}, {self._vocab_size} tokens, {self._template!r})"

    def encode_prompt(self, text: str) -> list[int]:
        """A plain prompt's ids, with the special tokens that the model wants (BOS)."""
        return self._encode(text, "prompt", add_special_tokens=True)

    def plain_ids(self, text: str) -> array[int]:
        """The ids of a text that holds its special tokens itself: none are added."""
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
        """The ids of messages through the chat template. Raises CallError as ChatTemplate.render does."""
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
        """The text that encode_chat tokenizes."""
        return self._template.render(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def prompt_ids(self, tenant: str, text: str, most: int = ANY_LENGTH) -> array[int]:
        """encode_prompt, the ids packed. What long texts begin with is remembered for the tenant alone.

        Raises CallError for a text that has more than `most` tokens for certain, before it is tokenized.
        """
        self._refuse_long(text, most, chat=False)
        return self._packed(tenant, text, "prompt", add_special_tokens=True)

    def chat_ids(
        self, tenant: str, messages: Sequence[Mapping[str, Any]], most: int = ANY_LENGTH, **options: Any
    ) -> array[int]:
        """encode_chat, the ids packed, likewise."""
        text = self.render_chat(messages, **options)
        self._refuse_long(text, most, chat=True)
        return self._packed(tenant, text, "messages", add_special_tokens=False)

    def packed_ids(self, tenant: str, prompt: PackedPrompt, most: int = ANY_LENGTH) -> array[int]:
        """prompt_ids or chat_ids of a packed prompt."""
        found = prompt.unpacked()
        if isinstance(found, TextPrompt):
            return self.prompt_ids(tenant, found.text, most)
        return self.chat_ids(tenant, found.messages, most, **found.template_options)

    async def prompt_ids_async(self, tenant: str, text: str, most: int = ANY_LENGTH) -> array[int]:
        """prompt_ids; elsewhere than on the loop when the text is long."""
        return await self._ids(tenant, len(text), ("prompt_ids", (tenant, text, most), {}), "prompt")

    async def chat_ids_async(
        self, tenant: str, messages: Sequence[Mapping[str, Any]], most: int = ANY_LENGTH, **options: Any
    ) -> array[int]:
        """chat_ids; elsewhere than on the loop when messages and options together are long."""
        chars = _chars(messages) + _chars(options)
        return await self._ids(tenant, chars, ("chat_ids", (tenant, messages, most), options), "messages")

    async def packed_ids_async(self, tenant: str, prompt: PackedPrompt, most: int = ANY_LENGTH) -> array[int]:
        """packed_ids, elsewhere than on the loop."""
        size = memoryview(prompt.packed).nbytes
        job: Job = ("packed_ids", (tenant, prompt, most), {})
        return await self._ids(
            tenant, max(size, ENCODE_HELPER_CHARS + 1), job, "messages" if prompt.is_chat else "prompt"
        )

    async def decode_async(self, tenant: str, token_ids: Sequence[int], field: str) -> str:
        """The text of token ids with their special tokens; elsewhere than on the loop when there are many."""
        job: Job = ("decode", (token_ids, False), {})
        text: str = await self._elsewhere(tenant, 4 * len(token_ids), job, field)
        return text

    async def _ids(self, tenant: str, chars: int, job: Job, field: str) -> array[int]:
        ids: array[int] = await self._elsewhere(tenant, chars, job, field)
        return ids

    async def _elsewhere(self, tenant: str, chars: int, job: Job, field: str) -> Any:
        """Do a job where it holds nobody up: here, in a thread, or in a helper process."""
        method, positional, named = job

        def work() -> Any:
            return getattr(self, method)(*positional, **named)

        if chars <= ENCODE_OFFLOAD_CHARS and self._is_quick:
            return work()
        if (chars > ENCODE_HELPER_CHARS or not self._is_quick) and self.pool is not None:
            try:
                result = await self.pool.run(job, size=chars, tenant=tenant, here=self._is_quick)
            except TooMuchCpu:
                raise invalid(field, "takes the model's tokenizer too long: send a shorter or simpler text") from None
            except Lost as lost:
                log.warning("text_not_tokenized", job=method, reason=str(lost))
                raise CallError(
                    Outcome.INTERNAL, f"{field}: the model's tokenizer could not process this text"
                ) from None
            if result is not None:
                return result
            if not self._is_quick:
                raise CallError(Outcome.NO_WORKER, "this gateway is too busy to tokenize; retry shortly")
        return await asyncio.get_running_loop().run_in_executor(_THREADS, work)

    def _refuse_long(self, text: str, most: int, *, chat: bool) -> None:
        if len(text) <= SURELY_FEW * most:
            return
        if isinstance(self._reach, _Unknown):
            from cluster.gateway.text.reach import Reach  # not at the start: deferred_imports.py

            self._reach = Reach.of(self._tokenizer, self._layout)
        if self._reach is not None and (fewest := self._reach.fewest(text)) > most:
            raise too_long(fewest, most + 1, chat, surely="at least ")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids by themselves. Ids beyond the tokenizer's have none."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(
        self,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> Detokenizer:
        """A detokenizer for one call whose prompt was `prompt_ids`."""
        if self._tail_primes:
            prompt_ids = priming_ids(
                self._tokenizer, prompt_ids, self._unsafe_ids, skip_special_tokens=skip_special_tokens
            )
        return Detokenizer(
            self._tokenizer,
            prompt_ids,
            stop=stop,
            min_tokens=min_tokens,
            skip_special_tokens=skip_special_tokens,
            whole_texts=self._whole_texts,
            unseen=self._unseen[skip_special_tokens],
        )

    def token_text(self, token_id: int) -> str:
        """One token's text by itself, special or not, with the leading spaces that a decoder strips. Cached."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._text_of(token_id)
        return text

    def _text_of(self, token_id: int) -> str:
        text = self.decode([token_id], skip_special_tokens=False)
        if self._space_mark is None:
            return text
        piece = self._tokenizer.id_to_token(token_id) or ""
        marks = len(piece) - len(piece.lstrip(self._space_mark))
        spaces = len(text) - len(text.lstrip(" "))
        return " " * max(marks - spaces, 0) + text

    def _encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        try:
            # The batch form: without offsets, twice as fast, and outside the interpreter's lock.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError:  # what the Rust side makes of a lone surrogate
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
    """What a panic of the Rust side, which is no Exception, is to the caller; any other error is itself."""
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
    """chat_template.jinja is `default`, chat_template.NAME.jinja is NAME."""
    sources = {}
    for name, content in bundle.files.items():
        if name == "chat_template.jinja":
            sources["default"] = content.decode()
        elif name.startswith("chat_template.") and name.endswith(".jinja"):
            sources[name.removeprefix("chat_template.").removesuffix(".jinja")] = content.decode()
    return sources


def _eos_ids(tokenizer: Tokenizer, config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    own = tokenizer.token_to_id(str(config["eos_token"])) if config.get("eos_token") is not None else None
    listed = generation.get("eos_token_id")
    others = [listed] if isinstance(listed, int) else list(listed or ())
    return tuple(dict.fromkeys(number for number in (own, *others) if number is not None))


def _without_model(tokenizer: Tokenizer) -> str:
    """The tokenizer's parts as JSON, but for the vocabulary: that of a large model takes a tenth of a second."""
    shell = Tokenizer.from_str('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    if tokenizer.normalizer is not None:
        shell.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        shell.pre_tokenizer = tokenizer.pre_tokenizer
    if tokenizer.decoder is not None:
        shell.decoder = tokenizer.decoder
    return str(shell.to_str())


def _space_mark(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """The mark for a space in the pieces of a Metaspace tokenizer, whose decoder strips the first one."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    return next((part.get("replacement", "▁") for part in parts if part.get("type") == "Metaspace"), None)


def _kinds(part: Mapping[str, Any] | None, members: str) -> set[str]:
    if part is None:
        return {"none"}
    return {str(member.get("type")) for member in part.get(members, [part])}


def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(number for number in ids if number is not None)


def _chars(value: object) -> int:
    """About how many characters a value of messages, tools and arguments will take in a prompt."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, (list, tuple)):
        return 4 + sum([_chars(item) for item in value])
    if isinstance(value, (dict, Mapping)):  # the first of the two is quickly asked
        return 4 + sum([_chars(key) + _chars(item) for key, item in value.items()])
    return 4
