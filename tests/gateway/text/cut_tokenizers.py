"""Tiny tokenizers whose added tokens make it hard to cut a text: tokens that overlap, strip spaces or depend on word
boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from cluster.gateway.text.encoding.word_encoder import QWEN2
from tests.gateway.text.kinds import TEXTS
from tests.support import tokenizer_kinds


def _token(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=True, **{"normalized": False, **flags})


ODD: tuple[AddedToken, ...] = (
    _token("<|im_start|>"),
    _token("<|im_end|>", rstrip=True),
    _token("<mask>", lstrip=True),
    _token("<both>", lstrip=True, rstrip=True),
    _token("word", single_word=True),
    _token("<w>", single_word=True),
    _token("<a><b>"),
    _token("<a>"),
    _token("<b><c>"),
    _token("[INST]"),
    _token("\n\n"),
    _token("x<a>", single_word=True),
    _token("]<b>", lstrip=True),
    _token("a<q>"),
    _token("<n>", normalized=True),
    _token("<n><a>", normalized=True),
)
PARTS: tuple[str, ...] = (
    *(token.content for token in ODD),
    *("<s>", "</s>", "<|eot_id|>", ">>QUESTION<<", "<|endoftext|>", "[/INST]", "<|", "|>", "<", ">", "<c>", "[", "]"),
    *(
        "<n>",
        "x",
        " ",
        "  ",
        "\n",
        "\t",
        "\u3000",
        "a",
        "_",
        "é",
        "e\u0301",
        "\u0301",
        "世界",
        "🎉",
        "12345",
        "It's",
        "words",
        "▁",
    ),
)
"""Pieces of texts that hold added tokens, parts of such tokens, and what these tokens look at."""
ODD_TEXTS = st.one_of(st.lists(st.sampled_from(PARTS), max_size=40).map("".join), TEXTS)


def _with(made: tuple[Tokenizer, dict[str, Any]], *tokens: AddedToken) -> Tokenizer:
    tokenizer = made[0]
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def qwen2() -> Tokenizer:
    """Return the tiny LLaMA 3 tokenizer with the split and the normalizer of Qwen 2."""
    tokenizer = tokenizer_kinds.llama3(700)[0]
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_tokens([_token("<|im_start|>"), _token("<|im_end|>")])
    return tokenizer


def space_first() -> Tokenizer:
    """Return a byte-level tokenizer that adds a space before each text."""
    tokenizer = _with(tokenizer_kinds.llama3(700), *ODD)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def metaspace(scheme: str, *, split: bool) -> Tokenizer:
    """Return a sentencepiece tokenizer. `scheme` and `split`: the arguments `prepend_scheme` (how it marks the
    beginning of a text) and `split` of the library's Metaspace."""
    tokenizer = _with(tokenizer_kinds.mistral(700), *ODD)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return tokenizer


def stripping() -> Tokenizer:
    """Return a tokenizer that strips white space from both ends of each text between added tokens."""
    tokenizer = _with(tokenizer_kinds.llama3(700), *ODD)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])
    return tokenizer


TOKENIZERS: dict[str, Tokenizer] = {
    "llama3": tokenizer_kinds.llama3(700)[0],
    "llama3, odd tokens": _with(tokenizer_kinds.llama3(700), *ODD),
    "qwen2": qwen2(),
    "falcon": tokenizer_kinds.falcon(700)[0],
    "falcon, odd tokens": _with(tokenizer_kinds.falcon(700), *ODD),
    "llama2": tokenizer_kinds.llama2(700)[0],
    "llama2, odd tokens": _with(tokenizer_kinds.llama2(700), *ODD),
    "mistral": tokenizer_kinds.mistral(700)[0],
    "metaspace first": metaspace("first", split=False),
    "metaspace always": metaspace("always", split=True),
    "metaspace never": metaspace("never", split=True),
    "space first": space_first(),
    "stripping": stripping(),
    "synthetic": tokenizer_kinds.synthetic(1000),
}


def ids_of(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    """Return the ids of a whole text, without special tokens around the text."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
