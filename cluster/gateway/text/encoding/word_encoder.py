"""Tokenization of long texts word by word, for tokenizers for which the ids of the words, one after another, provably
equal the ids of the whole text.

Theory. A byte-level BPE tokenizer first splits a text by regular expressions, then merges within each piece separately.
No expression in `WORD_PATTERNS` can match a non-space character together with the space after it, and the only
look-ahead in these expressions starts at white space. So the tokenizer always splits a text between a non-space
character and the space after it. The texts before and after such a split can be encoded separately.

Method. Each distinct word of a long text is encoded once, since long texts repeat most words. If too few words repeat,
or the text is not long, the text is encoded fragment by fragment, and the ids of the fragments are remembered
(fragment_encoder.py).

`WordEncoder.of` returns None for other tokenizers, and for tokenizers with an added token that may contain or absorb a
space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer, models, normalizers

from cluster.gateway.text.encoding.fragment_encoder import FragmentEncoder, encode_each
from cluster.gateway.text.encoding.prompt_memory import PackedIds

DISTINCT_SHARE: Final = 0.3
"""Share of distinct words among all words in a text. Above this share, encoding words costs more than encoding
fragments."""
LONG_CHARS: Final = 32_768
"""Minimum length in characters of texts whose distinct words are counted. In shorter texts, too few words repeat."""
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
WORD_PATTERNS: Final = frozenset((_GPT2, _LLAMA3, QWEN2))
_DIGITS = "[0-9][0-9][0-9]"  # Falcon's
WORD_CUT: Final = re.compile(r"(?<=[!-~\w]) ")
"""Pattern of a cut: a space after a character that is not white space in any version of Unicode."""
_ENDS_SURELY = re.compile(r"(?s:.*)[!-~\w]").fullmatch


class WordEncoder:
    """Encodes long texts by words with one tokenizer. Create with `of`. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, long_chars: int = LONG_CHARS) -> None:
        self._tokenizer = tokenizer
        self._long_chars = long_chars
        self._fragments = FragmentEncoder.of(tokenizer)

    @classmethod
    def of(cls, tokenizer: Tokenizer, pre_tokenizer: Mapping[str, Any] | None, **options: Any) -> WordEncoder | None:
        """Return an encoder for a tokenizer; None if cutting a text may change the ids. `pre_tokenizer`: the entry
        `pre_tokenizer` of tokenizer.json. `options`: keyword arguments of the constructor."""
        return cls(tokenizer, **options) if cuts_are_safe(tokenizer, pre_tokenizer) else None

    def encode(self, blocks: Sequence[str]) -> list[PackedIds]:
        """Return the ids of each block. Raises TypeError for a lone surrogate, as the tokenizer does."""
        if sum(map(len, blocks)) < self._long_chars:
            return self._by_fragments(blocks)
        words, distinct = _words(blocks)
        if len(distinct) > DISTINCT_SHARE * sum(map(len, words)):
            return self._by_fragments(blocks)
        heads = encode_each(self._tokenizer, [block[0] for block in words])
        ids = encode_each(self._tokenizer, [" " + word for word in distinct])
        packed = dict(zip(distinct, ids, strict=True))
        return [head + b"".join(map(packed.__getitem__, block[1:])) for head, block in zip(heads, words, strict=True)]

    def _by_fragments(self, blocks: Sequence[str]) -> list[PackedIds]:
        if self._fragments is None:
            return encode_each(self._tokenizer, blocks)
        return self._fragments.encode(blocks)


def _words(blocks: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the words of each block, without the spaces between words, and the distinct words of all blocks."""
    words = [block[1:].split(" ") for block in blocks]  # four times as fast as WORD_CUT, and nearly always equal
    unsure = {word for word in set().union(*words) if not _ENDS_SURELY(word)}
    for at, block in enumerate(blocks):
        if unsure.isdisjoint(words[at]):
            words[at][0] = block[:1] + words[at][0]
        else:
            words[at] = WORD_CUT.split(block)
    return words, list(set().union(*words))


def cuts_are_safe(tokenizer: Tokenizer, pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Return whether a text can be cut at WORD_CUT: the ids of the parts, one after another, equal the ids of the whole
    text. `pre_tokenizer`: the entry `pre_tokenizer` of tokenizer.json."""
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
    """Return whether these pre-tokenizer steps allow a text to be cut between words. Every step must be known to be
    safe. The byte-level step or an earlier step must split the text into words."""
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
