"""A model's tokenizer and chat templates as functions of their arguments: prompts become token ids, and token ids
become text. The gateway process has a TextCodec, and so has each of its helper processes.

The ids of a plain prompt equal those of transformers' tokenizer with special tokens added, as in vLLM's server for
completions. The ids of messages equal those of apply_chat_template(tokenize=True): no special tokens are added, since
the template contains the BOS.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from cluster.gateway.calls.pooling.pooling_request import PairInputs, TextInputs
from cluster.gateway.calls.request import ChatPrompt, PackedPrompt, TextPrompt
from cluster.gateway.helpers.wire import Job
from cluster.gateway.text.bundle_files import BundleFiles
from cluster.gateway.text.chat.chat_json import chat_json
from cluster.gateway.text.chat.template import ChatTemplate
from cluster.gateway.text.encoding.block_encoder import BlockEncoder
from cluster.gateway.text.encoding.input_encoder import EncodedInputs, InputEncoder
from cluster.gateway.text.encoding.length_check import LengthCheck
from cluster.gateway.text.encoding.prompt_encoder import PromptEncoder, PromptText
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.encoding.tokenizer_errors import caller_error
from cluster.gateway.text.output_texts import OutputTexts

ANY_LENGTH: Final = 2**62


class TextCodec:
    """Renders, tokenizes and decodes the texts of one model. The only state is caches. Thread-safe except for `begin`
    and `finish`; the Rust tokenizer releases the GIL."""

    def __init__(
        self,
        files: BundleFiles,
        *,
        now: Callable[[], datetime] = datetime.now,
        memory: PromptMemory | None = None,
    ) -> None:
        """`now`: the clock of strftime_now in chat templates. `memory`: the memory of encoded prompts, which several
        models may share. Raises ValueError for an invalid chat template."""
        tokenizer, layout = files.tokenizer, files.layout
        self._control_tokens = files.control_tokens
        self.template = ChatTemplate(
            files.template_sources,
            special_tokens=files.special_tokens,
            control_tokens=self._control_tokens,
            now=now,
        )
        self._inputs = InputEncoder(tokenizer, files.config, layout)
        self._lengths = LengthCheck(tokenizer, layout)
        blocks = BlockEncoder.of(tokenizer, layout, salt=files.salt)
        self.prompts = PromptEncoder(tokenizer, blocks, memory or PromptMemory())
        self.output = OutputTexts(tokenizer, layout)
        self.decode = self.output.decode

    def encode_prompt(self, text: str) -> list[int]:
        """Return the token ids of a plain prompt, with the special tokens that the model expects (BOS)."""
        return self.prompts.encode(text, "prompt", add_special_tokens=True)

    def encode_raw(self, text: str) -> array[int]:
        """Return the token ids of a text that already contains all special tokens. No special tokens are added."""
        return array("I", self.prompts.encode(text, "prompt_token_ids", add_special_tokens=False))

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Render messages with the chat template and tokenize the result. `options`: further arguments of
        `render_chat`. Raises CallError if the template cannot render the messages."""
        return self.prompts.encode(self.render_chat(messages, **options), "messages", add_special_tokens=False)

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
        return self.template.render(
            messages,
            tools=tools,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            merges_system=merges_system,
        )

    def chat_json(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> bytes:
        """Return a chat as JSON, in the form that a worker's renderer reads. `options`: the arguments of `render_chat`
        other than the messages. Raises CallError for an invalid chat."""
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

    def prompt_ids(self, tenant: str, text: str, max_tokens: int = ANY_LENGTH, cache_salt: str = "") -> array[int]:
        """Return the token ids of a plain prompt as a packed array. The ids equal those of encode_prompt. A long text
        is cut into blocks, and blocks that the tenant has sent before with the same `cache_salt` are not tokenized
        again.

        Raises CallError, before tokenizing, if the text certainly has more than `max_tokens` tokens.
        """
        return self.prompts.ids(self.prompt_text(text, max_tokens), tenant, cache_salt)

    def chat_ids(
        self,
        tenant: str,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = ANY_LENGTH,
        cache_salt: str = "",
        **options: Any,
    ) -> array[int]:
        """Return the token ids of messages as a packed array. The ids equal those of encode_chat. Blocks of text that
        the tenant has sent before with the same `cache_salt` are not tokenized again.

        Raises CallError, before tokenizing, if the text certainly has more than `max_tokens` tokens.
        """
        return self.prompts.ids(self.chat_text(messages, max_tokens, **options), tenant, cache_salt)

    def prompt_text(self, text: str, max_tokens: int = ANY_LENGTH) -> PromptText:
        """Return the text to be tokenized for a plain prompt. Raises CallError if the text certainly has more than
        `max_tokens` tokens."""
        self._lengths.refuse_long(text, max_tokens, chat=False)
        return PromptText(text, "prompt")

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], max_tokens: int = ANY_LENGTH, **options: Any
    ) -> PromptText:
        """Return the text to be tokenized for the messages of a chat. `options`: passed to `render_chat`. Raises
        CallError if the text certainly has more than `max_tokens` tokens."""
        text = self.render_chat(messages, **options)
        self._lengths.refuse_long(text, max_tokens, chat=True)
        return PromptText(text, "messages")

    def packed_text(self, prompt: PackedPrompt, max_tokens: int = ANY_LENGTH) -> PromptText:
        """Unpack a prompt, and return the text that must be tokenized for it. Raises CallError if the text certainly
        has more than `max_tokens` tokens."""
        unpacked = prompt.unpacked()
        if isinstance(unpacked, TextPrompt):
            return self.prompt_text(unpacked.text, max_tokens)
        return self.chat_text(unpacked.messages, max_tokens, **unpacked.template_options)

    def begin(self, job: Job) -> bytes | array[int]:
        """Begin to tokenize a prompt in a helper process. Returns the digests of the prompt's text blocks, or the ids
        of the whole prompt if it cannot be cut into blocks.

        `job`: the name of the method that makes the prompt's text, and the arguments of this method.
        """
        method, positional, named = job
        return self.prompts.begin(getattr(self, method)(*positional, **named))

    def finish(self, missing: array[int], field: str) -> list[bytes]:
        """Return the packed ids of some blocks of the prompt that was last passed to `begin`. `missing`: the numbers of
        these blocks. `field`: the request field that errors name."""
        return self.prompts.finish(missing, field)

    def encode_inputs(self, inputs: TextInputs | PairInputs, most: int, keep: int | None = None) -> EncodedInputs:
        """Return the ids of the inputs of a pooling request. `most`: the number of tokens that the model's context
        holds, 0 if unknown. `keep`: the number of tokens to which a longer input is cut; None: not cut. Raises
        CallError, which names the input, for an input with no tokens or with more than `most`."""
        if most and keep is None:
            self._lengths.refuse_long_inputs(inputs, most)
        try:
            return self._inputs.encode(inputs, most, keep)
        except BaseException as error:
            raise caller_error(error, inputs.path(0) if len(inputs) == 1 else inputs.fields) from None
