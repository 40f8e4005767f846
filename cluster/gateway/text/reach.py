"""How little a tokenizer can make of a text: the fewest tokens that it has for certain, without tokenizing it.

Theory. A token of n bytes that stands for a part of a text covers n bytes of it. Give each byte the weight 1/m, where
m is the length of the longest token that holds a byte of its value: the weights under one token sum to at most 1, so
a text has at least as many tokens as its bytes have weight. A histogram of the bytes is all that this needs, a
nanosecond a byte. It holds where each byte of the text is under some token: for byte-level BPE and for BPE that falls
back to bytes, whose normalizers shorten nothing. NFC leaves ASCII as it is, and makes at least 1/NFC_SHORTENS of other
text's bytes, of any values: there each byte has the weight that the longest token of all gives. For any other
tokenizer `of` gives None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

NFC_SHORTENS: Final = 9
"""Canonical composition makes at most a third of a sequence's bytes out of it, singletons another third."""
_NORMALIZERS: Final = frozenset({"NFC", "Prepend", "Replace", "none"})
_PRE_TOKENIZERS: Final = frozenset({"ByteLevel", "Split", "Digits", "Punctuation", "Metaspace", "none"})
MARK: Final = "▁"
"""By which pieces of other tokenizers write a space."""
BLOCK_BYTES: Final = 1 << 20


class Reach:
    """The fewest tokens of texts. Made by `of`."""

    def __init__(self, weights: np.ndarray[Any, np.dtype[np.float64]], composes: bool) -> None:
        """`weights` of the 256 bytes. `composes`: whether text is brought to NFC."""
        self._weights = weights
        self._least = float(weights.min())
        self._composes = composes

    @classmethod
    def of(cls, tokenizer: Tokenizer, layout: Mapping[str, Any]) -> Reach | None:
        """None where no bound is certain. `layout`: the parts of tokenizer.json but for the vocabulary."""
        normalizers = list(_members(layout.get("normalizer"), "normalizers"))
        steps = list(_members(layout.get("pre_tokenizer"), "pretokenizers"))
        pieces = _pieces(tokenizer, steps) if _keeps_all(tokenizer, normalizers, steps) else None
        if pieces is None:
            return None
        added = [token.content.encode() for token in tokenizer.get_added_tokens_decoder().values()]
        return cls(1.0 / _longest(sorted({*pieces, *added}, key=len, reverse=True)), _has(normalizers, "NFC"))

    def fewest(self, text: str) -> int:
        """Tokens that the text has at least, special tokens around it not counted."""
        weight = 0.0
        for at in range(0, len(text), BLOCK_BYTES):
            block = text[at : at + BLOCK_BYTES]
            data = np.frombuffer(block.encode("utf-8", "replace"), np.uint8)
            if not self._composes:
                weight += self._weigh(data)
            elif block.isascii():
                weight += self._weigh(data) - 1  # its last character may belong to a mark in the next block
            else:
                weight += data.size * self._least / NFC_SHORTENS
        return max(int(weight * (1 - 1e-9)), 0)

    def _weigh(self, data: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
        return float(np.bincount(data, minlength=256) @ self._weights)


def _longest(pieces: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """For each byte, the length of the longest piece that holds it; 1 at least. `pieces`: the longest first."""
    longest = np.ones(256)
    left = set(range(256))
    for piece in pieces:
        if not left.isdisjoint(piece):
            found = left.intersection(piece)
            longest[list(found)] = len(piece)
            left -= found
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
    """Whether all of a text comes under tokens: nothing is dropped, shortened or swallowed."""
    return (
        {str(one.get("type")) for one in normalizers} <= _NORMALIZERS
        and all(
            one.get("pattern") == {"String": " "} and one.get("content") == MARK
            for one in normalizers
            if one.get("type") == "Replace"
        )
        and all(one.get("replacement") == MARK for one in steps if one.get("type") == "Metaspace")
        and {str(one.get("type")) for one in steps} <= _PRE_TOKENIZERS
        and not any(one.get("behavior") == "Removed" for one in steps)
        and tokenizer.truncation is None
        and not any(token.lstrip or token.rstrip for token in tokenizer.get_added_tokens_decoder().values())
    )


def _pieces(tokenizer: Tokenizer, steps: Sequence[Mapping[str, Any]]) -> list[bytes] | None:
    """The vocabulary as bytes of text, or more where a space is a mark; None where a byte may be without a token."""
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
    """The characters by which byte-level tokenizers write bytes (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    alphabet = {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}
    assert alphabet.keys() == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet
