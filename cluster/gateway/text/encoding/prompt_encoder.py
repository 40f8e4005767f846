"""Tokenization of whole prompts. Blocks of a long prompt that the tenant has sent before are not tokenized again."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from tokenizers import Tokenizer

from cluster.gateway.text.encoding.block_encoder import BlockEncoder, Recall
from cluster.gateway.text.encoding.prompt_memory import PromptMemory
from cluster.gateway.text.encoding.text_jobs import ENCODE_OFFLOAD_CHARS
from cluster.gateway.text.encoding.tokenizer_errors import caller_error, field_in_errors


class PromptText(NamedTuple):
    """The text of a prompt, as it is tokenized. `field`: the field that the text comes from, `prompt` or `messages`.
    Special tokens are added only to the text of `prompt`, because a chat template adds them itself."""

    text: str
    field: str


class PromptEncoder:
    """Tokenizes the prompts of one model. Thread-safe except for `begin` and `finish`.

    The errors of the tokenizer are raised as CallErrors.
    """

    def __init__(self, tokenizer: Tokenizer, blocks: BlockEncoder | None, memory: PromptMemory) -> None:
        """`blocks`: None if long prompts cannot be cut into blocks. `memory`: the gateway's memory of encoded
        prompts."""
        self._tokenizer = tokenizer
        self._blocks = blocks
        self._memory = memory

    def encode(self, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""
        try:
            # The batch method computes no offsets, so it is twice as fast. It also releases the GIL.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except BaseException as error:
            raise caller_error(error, field) from None
        return list(encoding.ids)

    def ids(self, prompt: PromptText, tenant: str, cache_salt: str) -> array[int]:
        """Return the token ids of a prompt. For a long prompt, the ids of blocks that were tokenized before are read
        from the prompt memory. Only prompts with the same `tenant` and the same `cache_salt` share these blocks of
        text."""
        if (
            len(prompt.text) <= ENCODE_OFFLOAD_CHARS
            or (recall := self.recall(tenant, cache_salt, prompt.field)) is None
        ):
            return self._whole(prompt)
        assert self._blocks is not None
        with field_in_errors(prompt.field):
            return self._blocks.encode(prompt.text, recall)

    def recall(self, tenant: str, cache_salt: str, field: str) -> Recall | None:
        """Return an object that finds which blocks of one prompt are in the prompt memory. Returns None if prompts are
        not cut into blocks."""
        if self._blocks is None:
            return None
        return self._blocks.recall(self._memory, tenant, cache_salt, add_special_tokens=field == "prompt")

    def begin(self, prompt: PromptText) -> bytes | array[int]:
        """Begin to encode a prompt, and return the digests of its blocks. The caller then calls `finish` with the
        numbers of the blocks whose ids it does not know. If the prompt cannot be cut into blocks, return the ids of the
        whole prompt instead."""
        with field_in_errors(prompt.field):
            digests = self._blocks.begin(prompt.text) if self._blocks is not None else b""
        return digests or self._whole(prompt)

    def finish(self, missing: array[int], field: str) -> list[bytes]:
        """Return the packed ids of some blocks of the prompt that was last passed to `begin`. `missing`: the numbers of
        these blocks."""
        assert self._blocks is not None
        with field_in_errors(field):
            return self._blocks.finish(missing)

    def _whole(self, prompt: PromptText) -> array[int]:
        return array("I", self.encode(prompt.text, prompt.field, add_special_tokens=prompt.field == "prompt"))
