"""Refusal of texts that certainly have too many tokens. A text is refused before it is tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from tokenizers import Tokenizer

from cluster.gateway.calls.pooling.pooling_request import PairInputs, TextInputs, text_lengths
from cluster.gateway.calls.pooling.pooling_request import too_long as input_too_long
from cluster.gateway.calls.request import too_long

if TYPE_CHECKING:
    from cluster.gateway.text.encoding.reach import Reach

SURELY_FEW: Final = 8
"""A text is not checked if it has at most this number of characters for each allowed token."""


class LengthCheck:
    """Refuses a text if a lower bound on its number of tokens (reach.py) exceeds the allowed number of tokens. Only
    long texts are checked."""

    def __init__(self, tokenizer: Tokenizer, layout: Mapping[str, Any]) -> None:
        """`layout`: the contents of tokenizer.json without the vocabulary."""
        self._tokenizer = tokenizer
        self._layout = layout

    @cached_property
    def _reach(self) -> Reach | None:
        from cluster.gateway.text.encoding.reach import Reach  # not at the start: deferred_imports.py

        return Reach.of(self._tokenizer, self._layout)

    def refuse_long(self, text: str, max_tokens: int, *, chat: bool) -> None:
        """Raise CallError if a prompt certainly has more than `max_tokens` tokens."""
        if len(text) <= SURELY_FEW * max_tokens:
            return
        if self._reach is not None and (fewest := self._reach.fewest(text)) > max_tokens:
            raise too_long(fewest, max_tokens + 1, chat, surely="at least ")

    def refuse_long_inputs(self, inputs: TextInputs | PairInputs, most: int) -> None:
        """Raise CallError if an input of a pooling request certainly has more than `most` tokens."""
        if inputs.chars <= SURELY_FEW * most:
            return
        texts = inputs.all_texts
        for i, length in enumerate(text_lengths(texts)):
            if length <= SURELY_FEW * most or self._reach is None:
                continue
            if (fewest := self._reach.fewest(texts[i])) > most:
                raise input_too_long(inputs.path_of_text(i), fewest, most, surely="at least ")
