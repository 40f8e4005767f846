"""Tokenization of long texts in blocks. Blocks that a tenant has sent before are not tokenized again.

A text is cut at added tokens (token_cuts.py) and, within long stretches, before spaces (word_encoder.py), if the
tokenizer allows such cuts. The ids of a block depend on the block alone, so the ids of all blocks together equal those
of the whole text. A long message of a chat ends with a cut, since an added token follows each message. So if a template
changes earlier messages, little more than the changed messages is tokenized again.

A helper process cuts a text and returns the digests of the blocks (`begin`). The gateway process looks the digests up
in its memory, and returns the numbers of the unknown blocks (`Recall`). The same helper then encodes these blocks
(`finish`). `encode` does all of this in one process.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from cluster.gateway.text.encoding.fragment_encoder import encode_each
from cluster.gateway.text.encoding.prompt_memory import MAX_IDS, PackedIds, Planes, PromptMemory, pack, unpack
from cluster.gateway.text.encoding.token_cuts import TokenCuts
from cluster.gateway.text.encoding.word_encoder import WORD_CUT, WordEncoder

TOKEN_CUT_CHARS: Final = 1024
"""Least length in characters of a block that ends at an added token."""
WORD_CUT_CHARS: Final = 4096
"""Length in characters from which a block ends before the next space. The next turn of a chat encodes half a block
again, on average."""
MAX_REMEMBERED_BYTES: Final = 1 << 20
"""Maximum size of a text's new ids in bytes. If the new ids are larger, none of them is remembered. Packing ids of this
size takes a millisecond of the event loop."""
DIGEST_BYTES: Final = 16
Digests = bytes
"""The digests of all blocks of a text but the last, DIGEST_BYTES each. The last block may grow, and is not remembered.
"""


class BlockEncoder:
    """Encodes the long texts of one model. Create with `of`. Thread-safe except for `begin` and `finish`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        cuts: TokenCuts | None,
        words: WordEncoder | None,
        around: tuple[PackedIds, PackedIds],
        *,
        salt: bytes = b"",
        token_cut_chars: int = TOKEN_CUT_CHARS,
        word_cut_chars: int = WORD_CUT_CHARS,
    ) -> None:
        """`around`: the special tokens that the tokenizer adds before and after a text. `salt`: distinguishes the
        blocks of this model from the blocks of other models."""
        self._tokenizer = tokenizer
        self._hash = hashlib.sha256(salt)
        self._cuts = cuts
        self._words = words
        self._around = around
        self._token_cut_chars = token_cut_chars
        self._word_cut_chars = word_cut_chars
        self._blocks: list[str] = []
        """The blocks of the text that `begin` was called with."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, layout: Mapping[str, Any], **options: Any) -> BlockEncoder | None:
        """Return an encoder for a tokenizer; None if texts must be encoded whole. `layout`: the contents of
        tokenizer.json without the vocabulary. `options`: keyword arguments of the constructor."""
        cuts, words = TokenCuts.of(tokenizer, layout), WordEncoder.of(tokenizer, layout.get("pre_tokenizer"))
        around = _around(tokenizer)
        ids = max(tokenizer.get_vocab_size(), max(tokenizer.get_added_tokens_decoder(), default=0) + 1)
        if around is None or ids > MAX_IDS or (cuts is None and words is None):
            return None
        return cls(tokenizer, cuts, words, around, **options)

    def encode(self, text: str, recall: Recall) -> array[int]:
        """Return the token ids of a text. `recall`: supplies the ids of blocks that were encoded before. Raises
        TypeError for a lone surrogate, as the tokenizer does."""
        blocks = self.cut(text)
        missing = recall.missing(self._digests(blocks))
        return recall.ids(self._encoded([blocks[i] for i in missing]))

    def begin(self, text: str) -> Digests:
        """Cut a text and keep the blocks for `finish`. Returns the digests of the blocks."""
        self._blocks = self.cut(text)
        return self._digests(self._blocks)

    def finish(self, missing: Sequence[int]) -> list[PackedIds]:
        """Return the token ids of some blocks of the text last passed to `begin`. `missing`: the numbers of these
        blocks."""
        blocks, self._blocks = self._blocks, []
        return self._encoded([blocks[i] for i in missing])

    def recall(self, memory: PromptMemory, tenant: str, cache_salt: str = "", *, add_special_tokens: bool) -> Recall:
        """Return a Recall, which finds the known blocks of one text in the memory. `cache_salt`: only texts with the
        same salt share blocks. `add_special_tokens`: whether special tokens are put around the text."""
        return Recall(memory, tenant, cache_salt, self._around if add_special_tokens else (b"", b""))

    def cut(self, text: str) -> list[str]:
        """Cut a text into blocks. Joined in order, the blocks equal the text."""
        blocks: list[str] = []
        at = 0
        for start in self._cuts.starts(text) if self._cuts is not None else ():
            if start - at >= self._token_cut_chars:
                at = self._cut_words(text, at, start, blocks)
                blocks.append(text[at:start])
                at = start
        at = self._cut_words(text, at, len(text), blocks)
        return [*blocks, text[at:]]

    def _cut_words(self, text: str, at: int, end: int, blocks: list[str]) -> int:
        """Cut text[at:end] before spaces, and append the blocks to `blocks`. Returns the position after the last
        block."""
        if self._words is None:
            return at
        while (cut := WORD_CUT.search(text, at + self._word_cut_chars, end)) is not None:
            blocks.append(text[at : cut.start()])
            at = cut.start()
        return at

    def _digests(self, blocks: Sequence[str]) -> Digests:
        """Return the digests of all blocks except the last. The last block is never remembered, so it needs no
        digest."""
        digests = []
        for block in blocks[:-1]:
            digest = self._hash.copy()
            digest.update(_utf8(block))
            digests.append(digest.digest()[:DIGEST_BYTES])
        return b"".join(digests)

    def _encoded(self, blocks: Sequence[str]) -> list[PackedIds]:
        return encode_each(self._tokenizer, blocks) if self._words is None else self._words.encode(blocks)


class Recall:
    """Makes the ids of one text from the blocks in the memory and from newly encoded blocks."""

    def __init__(self, memory: PromptMemory, tenant: str, cache_salt: str, around: tuple[PackedIds, PackedIds]) -> None:
        """`around`: the ids of the special tokens before and after the text."""
        self._memory = memory
        self._tenant = tenant
        self._salt = (
            hashlib.sha256(cache_salt.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES] if cache_salt else b""
        )
        self._around = around
        self._digests: list[bytes] = []
        self._known: list[Planes | None] = []

    def missing(self, digests: Digests) -> array[int]:
        """Return the numbers of the blocks that must be encoded, in order. The last block is always among them."""
        salt = self._salt
        self._digests = [digests[at : at + DIGEST_BYTES] + salt for at in range(0, len(digests), DIGEST_BYTES)]
        self._known = [*self._memory.get(self._tenant, self._digests), None]
        return array("I", [i for i, planes in enumerate(self._known) if planes is None])

    def ids(self, fresh: Sequence[PackedIds]) -> array[int]:
        """Return the ids of the text. `fresh`: the newly encoded ids of the blocks that the memory did not have; they
        are added to the memory."""
        size = sum(map(len, fresh))
        before, after = self._around
        if len(fresh) == len(self._known) and size > MAX_REMEMBERED_BYTES:
            whole = array("I")
            whole.frombytes(b"".join([before, *fresh, after]))
            return whole
        packed = iter([pack(ids) for ids in fresh])
        blocks = [next(packed) if planes is None else planes for planes in self._known]
        if size <= MAX_REMEMBERED_BYTES:
            items = zip(self._digests, blocks, self._known, strict=False)  # the last block has no digest
            self._memory.put(self._tenant, [(digest, ids) for digest, ids, known in items if known is None])
        return unpack(blocks, before, after)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TypeError(str(error)) from None  # the tokenizer's error for a lone surrogate


def _around(tokenizer: Tokenizer) -> tuple[PackedIds, PackedIds] | None:
    """Return the special tokens that a tokenizer adds before a text, and those that it adds after a text; None if the
    special tokens depend on the text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    places = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    if not bare or len(places) != 1:
        return None
    at = places[0]
    return array("I", whole[:at]).tobytes(), array("I", whole[at + len(bare) :]).tobytes()
