"""A model's tokenizer and chat templates for the gateway's event loop. Long texts are tokenized in a thread or in a
helper process, so that they do not block the loop.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from cluster.gateway.calls.pooling.pooling_request import PairInputs, TextInputs
from cluster.gateway.calls.request import ChatPrompt, PackedPrompt
from cluster.gateway.helpers.wire import Job
from cluster.gateway.text.bundle_files import BundleFiles
from cluster.gateway.text.encoding.encoding_pool import EncodingPool
from cluster.gateway.text.encoding.input_encoder import EncodedInputs
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.encoding.text_jobs import ENCODE_HELPER_CHARS, TextJobs
from cluster.gateway.text.expressions import expressions_of, may_explode
from cluster.gateway.text.text_codec import ANY_LENGTH, TextCodec
from cluster.wire.bundle import Bundle

CHARS_PER_INPUT: Final = 64
"""Cost of each input of a pooling request in addition to its text, as a number of characters with the same cost."""


class TextModel:
    """The tokenizer and chat templates of one model. Create with `from_bundle`. The methods of the attribute `codec` do
    the work on the calling thread. The coroutines of this class do the same work, but off the event loop if the text is
    long."""

    def __init__(self, files: BundleFiles, codec: TextCodec, pool: EncodingPool | None = None) -> None:
        """`files`: the bundle of `codec`. `pool`: the helper processes for long texts. If None, long texts are
        tokenized in threads."""
        self.codec = codec
        self.pool = pool
        self.vocab_size = files.vocab_size
        """Size of the model's vocabulary, which may be padded to more than the tokenizer's vocabulary. All token ids
        are smaller than this size."""
        self.eos_token_ids = files.eos_token_ids
        """Token ids that end a generation: first the tokenizer's EOS, then the other ids in the generation config."""
        self.cuts_left = files.cuts_left
        """Whether a long input of a pooling request is cut on the left. If not, it is cut on the right."""
        self.family = files.family
        """The model_type in config.json, for example llama, mistral or falcon."""
        self.renderer = files.renderer
        """Name of the renderer with which workers make the prompts of chats; "" if chats are rendered only with the
        chat template."""
        self.has_chat_template = bool(codec.template)
        """Whether the model has a chat template, with which this gateway can make the prompts of chats."""
        self._jobs = TextJobs(pool, is_quick=not any(map(may_explode, expressions_of(files.layout))))
        output = codec.output  # its methods are this object's, without another call per token
        self.decode = output.decode
        self.detokenizer = output.detokenizer
        self.token_text = output.token_text

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, now: Callable[[], datetime] = datetime.now, memory: PromptMemory | None = None
    ) -> TextModel:
        """Return the TextModel of a bundle. `now`: the clock of strftime_now in chat templates. `memory`: the memory of
        encoded prompts, which several models may share.

        Raises ValueError, which names the file, if a file is missing or invalid.
        """
        files = BundleFiles(bundle)
        pool = EncodingPool(bundle) if now == datetime.now else None  # helpers use the real clock
        return cls(files, TextCodec(files, now=now, memory=memory), pool)

    def __repr__(self) -> str:
        return f"TextModel({self.family or 'unknown'}, {self.vocab_size} tokens, {self.codec.template!r})"

    async def chat_json_async(self, tenant: str, prompt: ChatPrompt | PackedPrompt) -> bytes:
        """Return the same JSON of a chat as `chat_json`. If the chat is long, the work is done off the event loop."""
        job: Job
        if isinstance(prompt, PackedPrompt):
            chars = _chars_of_packed(prompt)
            job = ("packed_chat_json", (prompt,), {})
        else:
            options = prompt.template_options
            chars = _chars(prompt.messages) + _chars(options)
            job = ("chat_json", (prompt.messages,), dict(options))
        return bytes(await self._jobs.run(tenant, chars, job, "messages", lambda: self._do(job)))

    async def prompt_ids_async(
        self, tenant: str, text: str, max_tokens: int = ANY_LENGTH, cache_salt: str = ""
    ) -> array[int]:
        """Return the result of prompt_ids. A long text is tokenized off the event loop."""
        if self._jobs.is_short(len(text)):
            return self.codec.prompt_ids(tenant, text, max_tokens)
        job: Job = ("prompt_text", (text, max_tokens), {})
        return await self._ids(tenant, cache_salt, len(text), job, "prompt")

    async def chat_ids_async(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = ANY_LENGTH,
        cache_salt: str = "",
        **options: Any,
    ) -> array[int]:
        """Return the result of chat_ids. If messages and options together are long, the work is done off the event
        loop."""
        chars = _chars(messages) + _chars(options)
        if self._jobs.is_short(chars):
            return self.codec.chat_ids(tenant, messages, max_tokens, cache_salt, **options)
        job: Job = ("chat_text", (messages, max_tokens), options)
        return await self._ids(tenant, cache_salt, chars, job, "messages")

    async def packed_ids_async(
        self, tenant: str, prompt: PackedPrompt, max_tokens: int = ANY_LENGTH, cache_salt: str = ""
    ) -> array[int]:
        """Return the token ids of a packed prompt, as prompt_ids or chat_ids does. The work is done off the event
        loop."""
        job: Job = ("packed_text", (prompt, max_tokens), {})
        field = "messages" if prompt.is_chat else "prompt"
        return await self._ids(tenant, cache_salt, _chars_of_packed(prompt), job, field)

    async def encode_inputs_async(
        self, tenant: str, inputs: TextInputs | PairInputs, most: int, keep: int | None = None
    ) -> EncodedInputs:
        """Return the token ids of the inputs of a pooling request. If there are many texts or long texts, the work is
        done off the event loop. `most`: largest number of tokens of an input; 0 if unknown. `keep`: number of tokens to
        which a longer input is cut; None: not cut."""
        chars = inputs.chars + CHARS_PER_INPUT * len(inputs)
        if self._jobs.is_short(chars):
            return self.codec.encode_inputs(inputs, most, keep)
        job: Job = ("encode_inputs", (inputs, most, keep), {})
        encoded: EncodedInputs = await self._jobs.run(tenant, chars, job, inputs.fields, lambda: self._do(job))
        return encoded

    async def decode_async(self, tenant: str, token_ids: Sequence[int], field: str) -> str:
        """Return the text of token ids, special tokens included. Many ids are decoded off the event loop."""
        job: Job = ("decode", (token_ids, False), {})
        text: str = await self._jobs.run(tenant, 4 * len(token_ids), job, field, lambda: self._do(job))
        return text

    async def _ids(self, tenant: str, cache_salt: str, chars: int, job: Job, field: str) -> array[int]:
        """Return the token ids of a prompt. `job`: the method of TextCodec that returns the PromptText, and its
        arguments. `chars`: length of the text. `field`: the request field that errors name."""
        prompts = self.codec.prompts
        recall = prompts.recall(tenant, cache_salt, field)

        def missing(answer: bytes | array[int]) -> Job | None:
            """Return the job that encodes the missing blocks. `answer`: the digests of all blocks. If `answer` holds
            the ids of the whole prompt instead, return None."""
            return ("finish", (recall.missing(answer), field), {}) if recall and isinstance(answer, bytes) else None

        def here() -> array[int]:
            return prompts.ids(self._do(job), tenant, cache_salt)

        answer = await self._jobs.run(tenant, chars, ("begin", (job,), {}), field, here, then=missing)
        if isinstance(answer, array):
            return answer
        assert recall is not None
        return recall.ids(answer)

    def _do(self, job: Job) -> Any:
        """Do the work of a job in this process."""
        method, positional, named = job
        return getattr(self.codec, method)(*positional, **named)


def _chars_of_packed(prompt: PackedPrompt) -> int:
    """Return a number that stands for the length of a packed prompt in characters. Texts above a limit are tokenized in
    a helper process. The returned number is always above this limit, since only a helper process may unpack a
    prompt."""
    return max(memoryview(prompt.packed).nbytes, ENCODE_HELPER_CHARS + 1)


def _chars(value: object) -> int:
    """Return the approximate number of characters that messages, tools or arguments take in a prompt."""
    if isinstance(value, str):
        return len(value)
    total = 4
    if isinstance(value, (list, tuple)):
        for item in value:
            total += _chars(item)
    elif isinstance(value, (dict, Mapping)):  # dict first, because that check is faster
        for key, item in value.items():
            total += len(key) if isinstance(key, str) else 4
            total += len(item) if isinstance(item, str) else _chars(item)
    return total
