"""Tokenization of texts by fragments. The ids of fragments are remembered, since new text repeats most fragments of
earlier text.

Theory. The tokenizers of word_encoder.py split a text by regular expressions and character classes, then merge within
each piece separately. No expression in WORD_PATTERNS matches an ASCII letter together with a following ASCII character
that is not a letter, and the only look-ahead in these expressions starts at white space. So the tokenizer always splits
a text between two such characters, and the texts before and after the split can be encoded separately. NFC joins no
character with a following ASCII character. A fragment is the text between two such splits: characters that are not
letters, then letters.

The tokenizer finds added tokens before it splits. A text is therefore cut at the added tokens first, as the tokenizer
does: from left to right. If several added tokens begin at one position, the longest is taken.

All tenants share one memory of fragments, as they share the tokenizers library's own cache of pieces. Long fragments
are not remembered.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer

from cluster.gateway.text.encoding.prompt_memory import PackedIds
from cluster.gateway.text.encoding.token_cuts import longest_of

MAX_FRAGMENTS: Final = 32_768
"""Largest number of fragments in each of two tables, the current one and the one that was full before it. A fragment
takes about 200 bytes."""
MAX_FRAGMENT_CHARS: Final = 32
"""Length in characters of the longest fragment that is remembered."""
FRAGMENT: Final = re.compile(r"[^A-Za-z]*+[A-Za-z]++(?:(?=[^\x00-\x7f])[^A-Za-z]++[A-Za-z]*+)*+|[^A-Za-z]+")
"""Pattern of a fragment. Letters do not end a fragment if a non-ASCII character follows, since that character may be a
letter too."""


class FragmentEncoder:
    """Encoder that tokenizes texts fragment by fragment and remembers the ids of each fragment. It belongs to one
    tokenizer. Create it with `of`. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, added: Sequence[str], max_fragments: int = MAX_FRAGMENTS) -> None:
        """`added`: contents of the added tokens."""
        self._max_fragments = max_fragments
        self._tokenizer = tokenizer
        self._added = re.compile(f"({longest_of(added)})") if added else None
        self._known: dict[str, PackedIds] = {}
        self._older: dict[str, PackedIds] = {}
        """The fragments that `_known` held when it was last full. A fragment that is used again returns to `_known`."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, **options: int) -> FragmentEncoder | None:
        """Return an encoder for a tokenizer; None if the tokenizer treats special tokens as text, or searches the
        normalized text for some added tokens.

        The caller must have checked that the tokenizer passes `cuts_are_safe` (word_encoder.py). `options`:
        keyword arguments of the constructor.
        """
        added = tokenizer.get_added_tokens_decoder().values()
        if tokenizer.encode_special_tokens or any(token.normalized for token in added):
            return None
        return cls(tokenizer, [token.content for token in added if token.content], **options)

    @property
    def remembered(self) -> int:
        """Number of fragments whose ids are remembered."""
        return len(self._known) + len(self._older)

    def encode(self, texts: Sequence[str]) -> list[PackedIds]:
        """Return the ids of each text. No special tokens are added. Raises TypeError for a lone surrogate."""
        fragments = [self._fragments(text) for text in texts]
        known, older = self._known, self._older  # another thread may replace them meanwhile
        others = [fragment for fragment in set().union(*fragments) if fragment not in known]
        missing = [fragment for fragment in others if fragment not in older]
        fresh = {fragment: older[fragment] for fragment in others if fragment in older}
        fresh.update(zip(missing, encode_each(self._tokenizer, missing), strict=True))
        out = [b"".join([fresh[f] if f in fresh else known[f] for f in text]) for text in fragments]
        self._remember(fresh)
        return out

    def _fragments(self, text: str) -> list[str]:
        if self._added is None:
            return FRAGMENT.findall(text)
        fragments: list[str] = []
        for at, part in enumerate(self._added.split(text)):
            fragments += [part] if at % 2 else FRAGMENT.findall(part)
        return fragments

    def _remember(self, fresh: dict[str, PackedIds]) -> None:
        kept = {fragment: ids for fragment, ids in fresh.items() if len(fragment) <= MAX_FRAGMENT_CHARS}
        if len(self._known) + len(kept) <= self._max_fragments:
            self._known.update(kept)
        elif len(kept) <= self._max_fragments:
            self._known, self._older = kept, self._known


def encode_each(tokenizer: Tokenizer, texts: Sequence[str]) -> list[PackedIds]:
    """Return the ids of each text. No special tokens are added."""
    # The batch method computes no offsets, so it is twice as fast. It also releases the GIL.
    encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [array("I", encoding.ids).tobytes() for encoding in encodings]
