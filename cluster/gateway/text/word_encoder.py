"""Tokenization of long texts in parts, for tokenizers where the ids provably equal those of the whole text.

Theory. A byte-level BPE tokenizer first splits a text by regular expressions, then merges within each piece separately.
No expression in `WORD_PATTERNS` can match a non-space character together with the space after it, and the only
look-ahead in these expressions starts at white space. So the tokenizer always splits a text between a non-space
character and the space after it. The texts before and after such a split can be encoded separately.

Method. Each distinct word of a text is encoded once, since long texts repeat most words. If too few words repeat, the
text is encoded in blocks, whose pieces stay in the CPU caches. Blocks are cut from the beginning of the text. The next
turn of a conversation thus starts with the blocks of the previous turn, and only the new text is encoded.

`of` returns None for other tokenizers, and for tokenizers with an added token that may contain or absorb a space.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, Final

from tokenizers import Encoding, Tokenizer, models, normalizers

BLOCK_CHARS: Final = 16_384
"""Length of a block in characters. Another thread may take the GIL between two blocks; a block takes about half a
millisecond."""
CACHE_BYTES: Final = 32 << 20
"""Size in bytes of the block cache of one process and model. It holds the last turns of some tens of long
conversations."""
DISTINCT_SHARE: Final = 0.3
"""Share of distinct words among all words in a text. Above this share, encoding words costs more than encoding
blocks."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
WORD_PATTERNS: Final = frozenset((_GPT2, _LLAMA3, QWEN2))
_DIGITS = "[0-9][0-9][0-9]"  # Falcon's
_CUT = re.compile(r"(?<=[!-~\w]) ")
"""Pattern of a cut: a space after a character that is not white space in any version of Unicode."""
_ENDS_SURELY = re.compile(r"(?s:.*)[!-~\w]").fullmatch
PackedIds = bytes
"""Token ids as uint32 in native byte order."""


class WordEncoder:
    """Encodes long texts in parts with one tokenizer. Create with `of`. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, prefix: PackedIds, suffix: PackedIds, block_chars: int) -> None:
        """`prefix` and `suffix`: the special tokens that the tokenizer adds around a text."""
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._suffix = suffix
        self._block_chars = block_chars
        self.cache = BlockCache()

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, pre_tokenizer: Mapping[str, Any] | None, *, block_chars: int = BLOCK_CHARS
    ) -> WordEncoder | None:
        """Return an encoder for a tokenizer; None if cutting a text may change the ids. `pre_tokenizer`: the part of
        tokenizer.json with this name."""
        around = _around(tokenizer)
        if around is None or not _cuts_are_safe(tokenizer, pre_tokenizer):
            return None
        return cls(tokenizer, *around, block_chars)

    def encode(self, text: str, *, add_special_tokens: bool, tenant: str = "") -> PackedIds:
        """Return the ids of a whole text. Raises TypeError for a lone surrogate, as the tokenizer does.

        If blocks at the beginning of the text were recently encoded for the same tenant, their ids come from the cache.
        """
        blocks = _blocks(text, self._block_chars)
        known = [self.cache.get(tenant, block) for block in blocks]
        fresh = iter(self._fresh([block for block, ids in zip(blocks, known, strict=True) if ids is None]))
        parts = [next(fresh) if ids is None else ids for ids in known]
        for block, ids, old in zip(blocks[:-1], parts, known, strict=False):  # the last block may grow
            if old is None:
                self.cache.put(tenant, block, ids)
        ids = b"".join(parts)
        return self._prefix + ids + self._suffix if add_special_tokens else ids

    def _fresh(self, blocks: list[str]) -> list[PackedIds]:
        words, distinct = _words(blocks)
        if len(distinct) > DISTINCT_SHARE * sum(map(len, words)):
            return self._encoded(blocks)
        heads = self._encoded([block[0] for block in words])
        packed = dict(zip(distinct, self._encoded([" " + word for word in distinct]), strict=True))
        return [head + b"".join(map(packed.__getitem__, block[1:])) for head, block in zip(heads, words, strict=True)]

    def _encoded(self, texts: list[str]) -> list[PackedIds]:
        return list(map(_packed, self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)))


class BlockCache:
    """LRU cache of encoded blocks. A tenant finds only the blocks of the same tenant, so timing reveals nothing about
    the texts of other tenants."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._ids: OrderedDict[tuple[str, str], PackedIds] = OrderedDict()
        self._lock = Lock()
        self.bytes = 0
        """Current size in bytes of the cached blocks, at most four bytes per character, and of their ids."""

    def get(self, tenant: str, block: str) -> PackedIds | None:
        """Return the ids of a block; None if the block is not cached."""
        with self._lock:
            ids = self._ids.get((tenant, block))
            if ids is not None:
                self._ids.move_to_end((tenant, block))
            return ids

    def put(self, tenant: str, block: str, ids: PackedIds) -> None:
        """Cache the ids of a block for a tenant."""
        with self._lock:
            if (tenant, block) in self._ids:
                return
            self._ids[tenant, block] = ids
            self.bytes += _size(block, ids)
            while self.bytes > self._max_bytes:
                (_, oldest), dropped = self._ids.popitem(last=False)
                self.bytes -= _size(oldest, dropped)


def _size(block: str, ids: PackedIds) -> int:
    return sys.getsizeof(block) + len(ids)


def _packed(encoding: Encoding) -> PackedIds:
    return array("I", encoding.ids).tobytes()


def _blocks(text: str, chars: int) -> list[str]:
    """Cut a text before spaces into blocks of about `chars` characters. All blocks but the first begin with a space."""
    blocks, at = [], 0
    while (cut := _CUT.search(text, at + chars)) is not None:
        blocks.append(text[at : cut.start()])
        at = cut.start()
    blocks.append(text[at:])
    return blocks


def _words(blocks: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the words of each block, without the spaces between words, and the distinct words of all blocks."""
    words = [block[1:].split(" ") for block in blocks]  # four times as fast as _CUT, and nearly always equal
    unsure = {word for word in set().union(*words) if not _ENDS_SURELY(word)}
    for at, block in enumerate(blocks):
        if unsure.isdisjoint(words[at]):
            words[at][0] = block[:1] + words[at][0]
        else:
            words[at] = _CUT.split(block)
    return words, list(set().union(*words))


def _cuts_are_safe(tokenizer: Tokenizer, pre_tokenizer: Mapping[str, Any] | None) -> bool:
    model = tokenizer.model
    return (
        isinstance(model, models.BPE)
        and not (model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix)
        and (tokenizer.normalizer is None or isinstance(tokenizer.normalizer, normalizers.NFC))
        and tokenizer.truncation is None
        and tokenizer.padding is None
        and _splits_safely((pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]))
        and not any(
            " " in token.content or token.lstrip or token.rstrip or token.single_word
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )


def _splits_safely(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all steps are known to be safe, and at least one step splits the text into words before or in the
    byte-level step."""
    to_bytes = next((at for at, step in enumerate(steps) if step.get("type") == "ByteLevel"), -1)
    if to_bytes < 0 or not all(map(_is_safe, steps)):
        return False
    return bool(steps[to_bytes].get("use_regex", True)) or any(
        _regex(step) in WORD_PATTERNS for step in steps[:to_bytes]
    )


def _is_safe(step: Mapping[str, Any]) -> bool:
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step.get("add_prefix_space", True)
    if kind == "Split":
        known = _regex(step) in WORD_PATTERNS or _regex(step) == _DIGITS
        return known and step.get("behavior") == "Isolated" and not step.get("invert")
    return kind in ("Digits", "Punctuation")


def _regex(step: Mapping[str, Any]) -> str | None:
    return (step.get("pattern") or {}).get("Regex")


def _around(tokenizer: Tokenizer) -> tuple[PackedIds, PackedIds] | None:
    """Return the special tokens that a tokenizer adds before a text, and those that it adds after a text; None if the
    special tokens depend on the text."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    if len(bare) != 1 or whole.count(bare[0]) != 1:
        return None
    at = whole.index(bare[0])
    return array("I", whole[:at]).tobytes(), array("I", whole[at + 1 :]).tobytes()
