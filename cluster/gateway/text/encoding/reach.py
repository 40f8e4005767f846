"""Lower bound on the number of tokens in a text, computed without tokenizing the text.

Theory. A token of n bytes covers n bytes of the text. Give each byte value the weight 1/m, where m is the length of the
longest token that contains the byte value. The weights of the bytes that one token covers sum to at most 1. So the sum
of the weights of all bytes in a text is a lower bound on the number of tokens. Computing the sum takes only a histogram
of the bytes, about a nanosecond per byte.

The bound holds if every byte of the text is covered by a token. That is the case for byte-level BPE, and for BPE with
byte fallback, if no normalizer shortens the text. The normalizer NFC leaves ASCII unchanged. It shortens other text to
no less than 1/NFC_SHORTENS of the bytes and may change their values. A byte of such text therefore gets the least
weight of all byte values, divided by NFC_SHORTENS. For any other tokenizer `of` returns None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

NFC_SHORTENS: Final = 9
"""Factor by which NFC may shorten a text: canonical composition of sequences shortens the bytes to a third, and the
replacement of singletons shortens the result to a third again."""
_NORMALIZERS: Final = frozenset({"NFC", "Prepend", "Replace", "none"})
_PRE_TOKENIZERS: Final = frozenset({"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace", "none"})
MARK: Final = "▁"
"""The character that stands for a space in the vocabulary of sentencepiece tokenizers."""
BLOCK_BYTES: Final = 1 << 20


class Reach:
    """Computation of a lower bound on the number of tokens of a text, for one tokenizer. Create it with `of`."""

    def __init__(self, weights: np.ndarray[Any, np.dtype[np.float64]], composes: bool) -> None:
        """`weights`: for each of the 256 byte values, 1 divided by the length of the longest token that contains the
        value. `composes`: whether the tokenizer normalizes texts to NFC."""
        self._weights = weights
        self._least = float(weights.min())
        self._composes = composes

    @classmethod
    def of(cls, tokenizer: Tokenizer, layout: Mapping[str, Any]) -> Reach | None:
        """Return the Reach of a tokenizer, or None if no lower bound on the number of tokens is certain. `layout`: the
        contents of tokenizer.json without the vocabulary."""
        normalizers = list(_members(layout.get("normalizer"), "normalizers"))
        steps = list(_members(layout.get("pre_tokenizer"), "pretokenizers"))
        pieces = _pieces(tokenizer, steps) if _keeps_all(tokenizer, normalizers, steps) else None
        if pieces is None:
            return None
        added = [token.content.encode() for token in tokenizer.get_added_tokens_decoder().values()]
        return cls(1.0 / _longest(sorted({*pieces, *added}, key=len, reverse=True)), _has(normalizers, "NFC"))

    def fewest(self, text: str) -> int:
        """Return a lower bound on the number of tokens in the text. Special tokens that are added to the text are not
        counted."""
        weight = 0.0
        for at in range(0, len(text), BLOCK_BYTES):
            block = text[at : at + BLOCK_BYTES]
            data = np.frombuffer(block.encode("utf-8", "replace"), np.uint8)
            if not self._composes:
                weight += self._weigh(data)
            elif block.isascii():
                weight += self._weigh(data) - 1  # the last character may combine with a mark in the next block
            else:
                weight += data.size * self._least / NFC_SHORTENS
        return max(int(weight * (1 - 1e-9)), 0)

    def _weigh(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
        return float(np.bincount(data, minlength=256) @ self._weights)


def _longest(pieces: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return an array with 256 entries: for each byte value, the length of the longest piece that contains the byte
    value, at least 1. `pieces`: the pieces, longest first."""
    longest = np.ones(256)
    left = set(range(256))
    for piece in pieces:
        if not left.isdisjoint(piece):
            values = left.intersection(piece)
            longest[list(values)] = len(piece)
            left -= values
            if not left:
                break
    return longest


def _members(part: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    for member in part.get(name, [part]):
        yield from [member] if name not in member else _members(member, name)


def _has(parts: Iterable[Mapping[str, Any]], kind: str) -> bool:
    return any(part.get("type") == kind for part in parts)


def _keeps_all(
    tokenizer: Tokenizer, normalizers: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]
) -> bool:
    """Return whether the tokenizer certainly neither drops nor shortens any part of a text. `normalizers`, `steps`: the
    normalizers and the pre-tokenizers in tokenizer.json."""
    return (
        {str(normalizer.get("type")) for normalizer in normalizers} <= _NORMALIZERS
        and all(
            normalizer.get("pattern") == {"String": " "} and normalizer.get("content") == MARK
            for normalizer in normalizers
            if normalizer.get("type") == "Replace"
        )
        and all(step.get("replacement") == MARK for step in steps if step.get("type") == "Metaspace")
        and {str(step.get("type")) for step in steps} <= _PRE_TOKENIZERS
        and not any(step.get("behavior") == "Removed" for step in steps)
        and tokenizer.truncation is None
        and not any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    )


def _pieces(tokenizer: Tokenizer, steps: Sequence[Mapping[str, Any]]) -> list[bytes] | None:
    """Return the bytes of each piece in the vocabulary. Returns None unless every byte of every text certainly becomes
    part of a token.

    In sentencepiece vocabularies, the mark ▁ stands for a space. For a piece with the mark, a space is appended to the
    piece's own bytes, so that the bytes contain the mark as well as the space.
    """
    model = tokenizer.model
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if _has(steps, "ByteLevel"):
        byte_of = _byte_alphabet()
        if not byte_of.keys() <= vocabulary.keys():
            return None
        return [bytes(byte_of[char] for char in piece) for piece in vocabulary if byte_of.keys() >= set(piece)]
    if not model.byte_fallback or not all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return None
    return [piece.encode() + (b" " if MARK in piece else b"") for piece in vocabulary]


def _byte_alphabet() -> dict[str, int]:
    """Return the alphabet of byte-level tokenizers (since GPT-2). It maps each character to the byte that it stands
    for."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    alphabet = {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
    assert alphabet.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
