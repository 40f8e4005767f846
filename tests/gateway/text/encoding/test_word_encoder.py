"""Encoding a long text by words gives the ids of the whole text. A tokenizer for which this is not certain gets no word
encoder."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from cluster.gateway.text.encoding.word_encoder import QWEN2, WORD_CUT, WordEncoder
from tests.gateway.text.kinds import TEXTS
from tests.support import tokenizer_kinds

pytestmark = pytest.mark.slow

PIECES = ["a", "It's", "x,", "1234", "é", "e\u0301", "\u0301", "世界", "🎉", "_", "'s", "ſ", "'", "!", "-", "५"]
PIECES += ["\u00a0", "\u2003", "\u0085", "\x1c", "\n", "\r\n", "\t", "\u200b", "  ", "   "]
PIECES += ["<|eot_id|>", "<|endoftext|>"]
LONG = st.one_of(
    st.lists(TEXTS, max_size=5).map(" ".join),
    st.lists(st.sampled_from([*PIECES, " ", " ", " "]), max_size=40).map("".join),
)
LAW = settings(max_examples=300, deadline=None)


def qwen2(vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tiny LLaMA 3 tokenizer with the split and the normalizer of Qwen 2, and the tokenizer's
    configuration."""
    tokenizer, config = tokenizer_kinds.llama3(vocab_size)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer, config


def encoder_of(tokenizer: Tokenizer, long_chars: int = 64) -> WordEncoder | None:
    """Return the word encoder of a tokenizer, or None if the tokenizer can have none. `long_chars`: minimum length in
    characters of a text whose distinct words are counted."""
    return WordEncoder.of(tokenizer, json.loads(tokenizer.to_str())["pre_tokenizer"], long_chars=long_chars)


def blocks_of(text: str, chars: int) -> list[str]:
    """Cut a text before spaces into blocks of about `chars` characters."""
    blocks, at = [], 0
    while (cut := WORD_CUT.search(text, at + chars)) is not None:
        blocks.append(text[at : cut.start()])
        at = cut.start()
    return [*blocks, text[at:]]


MADE = {
    "llama3": tokenizer_kinds.llama3(700)[0],
    "falcon": tokenizer_kinds.falcon(700)[0],
    "qwen2": qwen2(700)[0],
    "synthetic": tokenizer_kinds.synthetic(1000),
}
"""Tokenizers that get a word encoder, by name. In `synthetic` the byte-level step itself does GPT-2's split."""


@pytest.mark.parametrize("name", MADE)
def test_ids_equal_those_of_the_whole(name: str) -> None:
    """Encoding a text in blocks, word by word, gives the same token ids as encoding the whole text at once."""
    tokenizer = MADE[name]
    encoder = encoder_of(tokenizer)
    assert encoder is not None

    @LAW
    @given(text=LONG, times=st.sampled_from([1, 1, 8]), chars=st.sampled_from([1, 16, 1000]))
    def law(text: str, times: int, chars: int) -> None:
        text = " ".join([text] * times)
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(encoder.encode(blocks_of(text, chars))) == array("I", whole).tobytes()

    law()


@pytest.mark.parametrize("kind", [tokenizer_kinds.llama2, tokenizer_kinds.mistral])
def test_sentencepiece_is_encoded_whole(kind: Callable[[int], tuple[Tokenizer, dict[str, Any]]]) -> None:
    """A sentencepiece tokenizer, whose pieces may span a space, gets no word encoder."""
    assert encoder_of(kind(700)[0]) is None


def no_split(tokenizer: Tokenizer) -> None:
    """Remove the split into words, so that merges may span spaces."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def space_first(tokenizer: Tokenizer) -> None:
    """Make the tokenizer add a space before every text."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def own_split(tokenizer: Tokenizer) -> None:
    """Make the tokenizer split by an expression that keeps each word together with the following space."""
    split = pre_tokenizers.Split(Regex(r"\S+\s?"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def bytes_first(tokenizer: Tokenizer) -> None:
    """Make the tokenizer convert a text to bytes before it splits the text. The conversion replaces spaces by another
    character, so the split finds no spaces."""
    late = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([mapped, late])


def greedy_token(tokenizer: Tokenizer) -> None:
    """Add a special token that absorbs the space before it."""
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])


def spaced_token(tokenizer: Tokenizer) -> None:
    """Add a token that contains a space."""
    tokenizer.add_tokens(["the end"])


def stripping(tokenizer: Tokenizer) -> None:
    """Add a normalizer that strips the ends of a text."""
    tokenizer.normalizer = normalizers.Strip()


def dropping_out(tokenizer: Tokenizer) -> None:
    """Replace the tokenizer's model by one whose merges are random (dropout)."""
    tokenizer.model = models.BPE(vocab={"a": 0}, merges=[], dropout=0.5)


def truncating(tokenizer: Tokenizer) -> None:
    """Make the tokenizer truncate texts."""
    tokenizer.enable_truncation(8)


SPOILED = (
    no_split,
    space_first,
    own_split,
    bytes_first,
    greedy_token,
    spaced_token,
    stripping,
    dropping_out,
    truncating,
)


@pytest.mark.parametrize("spoil", SPOILED)
def test_uncertain_tokenizers_are_encoded_whole(spoil: Callable[[Tokenizer], None]) -> None:
    """A tokenizer gets no word encoder if it violates any one condition under which encoding by words gives the ids of
    the whole text."""
    tokenizer = Tokenizer.from_str(MADE["llama3"].to_str())
    assert encoder_of(tokenizer) is not None
    spoil(tokenizer)
    assert encoder_of(tokenizer) is None


def test_a_lone_surrogate_is_the_tokenizers_error() -> None:
    """A text with a lone surrogate raises TypeError, whether the text is encoded by words or by blocks."""
    encoder = encoder_of(MADE["llama3"])
    assert encoder is not None
    for text in ("a \ud800", "a " * 50 + "\ud800"):
        with pytest.raises(TypeError):
            encoder.encode([text])
