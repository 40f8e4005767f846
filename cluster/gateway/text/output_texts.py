"""The texts of a model's tokens: of whole outputs, of outputs token by token, and of single tokens for log
probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tokenizers import Tokenizer

from cluster.gateway.text.detokenizer import Detokenizer, whole_texts
from cluster.gateway.text.token_stream import UnseenTokens, priming_ids

TAIL_SAFE_DECODERS: Final = frozenset({"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})


class OutputTexts:
    """Converts output tokens of one model to text. It has no state except caches."""

    def __init__(self, tokenizer: Tokenizer, layout: Mapping[str, Any]) -> None:
        """`layout`: the contents of tokenizer.json; the vocabulary may be missing."""
        self._tokenizer = tokenizer
        self._space_mark = _space_mark(layout.get("pre_tokenizer"))
        self._tail_primes = _kinds(layout.get("decoder"), "decoders") <= TAIL_SAFE_DECODERS
        self._unsafe_ids = frozenset(tokenizer.get_added_tokens_decoder()) | _byte_ids(tokenizer)
        self._whole_texts = whole_texts(tokenizer, self._unsafe_ids)
        self._unseen = {skip: UnseenTokens(tokenizer, skip_special_tokens=skip) for skip in (False, True)}
        self._token_texts: dict[int, str] = {}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids that follow no prompt. Ids beyond the tokenizer's vocabulary have no text."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(
        self,
        prompt_ids: Sequence[int],
        *,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> Detokenizer:
        """Return a detokenizer for one sequence. `prompt_ids`: the prompt of the sequence."""
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
        """Return the text of one token, special or not. Leading spaces, which a decoder would strip, are kept. The
        texts are cached."""
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


def _space_mark(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """Return the character that stands for a space in a Metaspace tokenizer; None for any other tokenizer. The decoder
    of a Metaspace tokenizer strips the first space."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    return next((part.get("replacement", "▁") for part in parts if part.get("type") == "Metaspace"), None)


def _kinds(part: Mapping[str, Any] | None, members: str) -> set[str]:
    if part is None:
        return {"none"}
    return {str(member.get("type")) for member in part.get(members, [part])}


def _byte_ids(tokenizer: Tokenizer) -> frozenset[int]:
    ids = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(number for number in ids if number is not None)
