"""Encoding a text by fragments gives the ids of the whole text, however many fragments are remembered."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from cluster.gateway.text.encoding.fragment_encoder import FRAGMENT, MAX_FRAGMENT_CHARS, FragmentEncoder
from tests.gateway.text.encoding.test_word_encoder import LONG, MADE
from tests.gateway.text.kinds import TEXTS
from tests.support import tokenizer_kinds

ADDED = ("<|im_start|>", "<|im_end|>", "<a><b>", "<a>", "<b><c>", "]a.b", "a", "'s", "\n\n", "x.", "x.y", "é.", "2a")
"""Added tokens that overlap, contain ends of fragments, or begin with a letter."""
PARTS = (*ADDED, "a.", "b", "x", "y", ".", "'", "S", "ſ", "<", ">", "]", " ", "\n", "٣", "é", "\u0301", "世", "12")
MIXED = st.one_of(st.lists(st.sampled_from(PARTS), max_size=40).map("".join), LONG, TEXTS)
LAW = settings(max_examples=150, deadline=None)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy of a tokenizer with the tokens in ADDED added. Every second added token is a special token."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    for at, content in enumerate(ADDED):
        token = AddedToken(content, normalized=False, special=at % 2 == 0)
        copy.add_special_tokens([token]) if at % 2 == 0 else copy.add_tokens([token])
    return copy


KINDS = {**MADE, **{f"{name} with tokens": with_added(tokenizer) for name, tokenizer in MADE.items()}}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_ids_equal_those_of_the_whole(name: str) -> None:
    """Encoding a text by fragments gives the ids of the whole text."""
    tokenizer = KINDS[name]
    encoder = FragmentEncoder.of(tokenizer, max_fragments=50)
    assert encoder is not None

    @LAW
    @given(texts=st.lists(MIXED, max_size=3))
    def law(texts: list[str]) -> None:
        whole = [array("I", tokenizer.encode(text, add_special_tokens=False).ids).tobytes() for text in texts]
        assert encoder.encode(texts) == whole
        assert encoder.encode(texts) == whole

    law()


@LAW
@given(text=MIXED)
def test_fragments_make_up_the_text(text: str) -> None:
    """The fragments of a text add up to the text, and none is empty."""
    fragments = FRAGMENT.findall(text)
    assert "".join(fragments) == text
    assert all(fragments)


@pytest.mark.parametrize("size", [10, 1000])
def test_memory_is_bounded(size: int) -> None:
    """The number and the length of remembered fragments are bounded."""
    encoder = FragmentEncoder.of(MADE["llama3"], max_fragments=size)
    assert encoder is not None
    for first in range(0, 2000, 7):
        encoder.encode([" ".join(f"{i}x" for i in range(first, first + 7))])
        assert 0 < encoder.remembered <= 2 * size
    encoder = FragmentEncoder.of(MADE["llama3"])
    assert encoder is not None
    encoder.encode(["x" * (MAX_FRAGMENT_CHARS + 1)])
    assert encoder.remembered == 0


def test_uncertain_tokenizers_get_no_encoder() -> None:
    """A tokenizer gets no encoder if one of its added tokens is matched in normalized text, or if it treats special
    tokens as text."""
    tokenizer = tokenizer_kinds.llama3(700)[0]
    tokenizer.add_tokens([AddedToken("<n>", normalized=True)])
    assert FragmentEncoder.of(tokenizer) is None
    tokenizer = tokenizer_kinds.llama3(700)[0]
    tokenizer.encode_special_tokens = True
    assert FragmentEncoder.of(tokenizer) is None
