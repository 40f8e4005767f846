"""Positions where a text can be cut at an added token, so that both sides are tokenized separately.

Theory. A tokenizer first finds the added tokens to which its normalizer does not apply. It searches from left to right.
If several added tokens begin at one position, it takes the longest. Then it normalizes, splits and merges each text
between two of the found tokens separately. So a text can be cut where a found token starts: the ids before this
position do not depend on the text after it, and the ids after this position do not depend on the text before it. (Some
tokenizers, such as Metaspace with the scheme `first`, treat the beginning of their input in a special way. But a text
after an added token is never at the beginning of the input.)

Three kinds of added tokens are found but are not cuts: a token that takes the white space before it (`lstrip`), a token
that is found only at the borders of words (`single_word`), and a token that begins with white space or a word
character. Reason for the third kind: the first character of such a token may decide whether an added token directly
before it is found.

`TokenCuts.of` returns None for a tokenizer for which this theory is not known to hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models

PIECEWISE: Final = frozenset(
    {
        *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Replace", "Prepend"),
        *("Precompiled", "Nmt", "BertNormalizer", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation"),
        *("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"),
    }
)
"""Types of normalizers and pre-tokenizers that process each text between added tokens separately."""
MAX_PATTERNS: Final = 8
MAX_TOKEN_CHARS: Final = 256
_PLAIN_START = re.compile(r"[^\w\s]")


class TokenCuts:
    """Finds the positions at which a text can be cut and tokenized in pieces, for one tokenizer. The pieces have the
    token ids of the whole text. Use `of` to create an object. Thread-safe."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        """`tokens`: the added tokens that the tokenizer finds in a text before it normalizes the text."""
        tokens = list(tokens)
        self._cuts = frozenset(token.content for token in tokens if _is_cut(token))
        by_first: dict[str, list[str]] = {}
        for token in tokens:
            by_first.setdefault(token.content[0], []).append(token.content)
        groups = list(by_first.values()) if len(by_first) <= MAX_PATTERNS else [[token.content for token in tokens]]
        # One pattern for each first character: a search for one character is ten times as fast as for one of several.
        self._patterns = [re.compile(longest_of(group)) for group in groups]

    @classmethod
    def of(cls, tokenizer: Tokenizer, layout: Mapping[str, Any]) -> TokenCuts | None:
        """Return the TokenCuts of a tokenizer; None if a cut may change the ids, or if the tokenizer has no token to
        cut at. `layout`: the contents of tokenizer.json without the vocabulary."""
        model = tokenizer.model
        if not isinstance(model, models.BPE) or model.dropout or tokenizer.encode_special_tokens:
            return None
        if tokenizer.truncation is not None or tokenizer.padding is not None:
            return None
        if not all(map(_is_piecewise, (layout.get("normalizer"), layout.get("pre_tokenizer")))):
            return None
        added = tokenizer.get_added_tokens_decoder().values()
        if any(len(token.content) > MAX_TOKEN_CHARS for token in added):
            return None
        cuts = cls(token for token in added if token.content and not token.normalized)
        return cuts if cuts._cuts else None

    def starts(self, text: str) -> Iterator[int]:
        """Yield the positions of all cuts of a text in order. Takes linear time."""
        cuts, patterns = self._cuts, self._patterns
        found = [pattern.search(text) for pattern in patterns]
        while True:
            first = min((match for match in found if match is not None), key=re.Match.start, default=None)
            if first is None:
                return
            start, end = first.span()
            if first[0] in cuts:
                yield start
            for i, match in enumerate(found):
                if match is not None and match.start() < end:
                    found[i] = patterns[i].search(text, end)


def _is_cut(token: AddedToken) -> bool:
    plain = not (token.lstrip or token.single_word or token.normalized)
    return plain and _PLAIN_START.match(token.content) is not None


def _is_piecewise(step: Mapping[str, Any] | None) -> bool:
    if step is None:
        return True
    inner = step.get("normalizers", step.get("pretokenizers", ()))
    return step.get("type") in PIECEWISE and all(map(_is_piecewise, inner))


def longest_of(texts: Iterable[str]) -> str:
    """Return a regular expression that matches the longest of the texts at a position. Common beginnings are shared,
    since a tokenizer may have thousands of tokens with the same beginning."""
    by_first: dict[str, list[str]] = {}
    ends = False
    for text in texts:
        if text:
            by_first.setdefault(text[0], []).append(text[1:])
        else:
            ends = True
    branches = [re.escape(first) + longest_of(rest) for first, rest in by_first.items()]
    if not branches:
        return ""
    if len(branches) == 1 and not ends:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if ends else "")
