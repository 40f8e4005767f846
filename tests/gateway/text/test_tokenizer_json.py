"""A tokenizer that is built from the parts of a tokenizer.json equals the tokenizer that the library reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from cluster.gateway.text.tokenizer_json import from_parts, read_tokenizer
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.gateway.text.kinds import Kind

pytestmark = pytest.mark.slow

OPTIONS: list[dict[str, Any]] = [
    {"dropout": 0.1},
    {"unk_token": "<unk>", "fuse_unk": True},
    {"continuing_subword_prefix": "##", "vocab": {"a": 0, "##b": 1, "ab": 2}, "merges": [["a", "##b"]]},
    {"end_of_word_suffix": "</w>"},
    {"byte_fallback": True},
    {"ignore_merges": True},
]
TOKENS = [
    {"content": "<a>", "single_word": True, "lstrip": False, "rstrip": True, "normalized": True, "special": False},
    {"content": "<b>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": True},
]
SMALL: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0},
    "padding": None,
    "added_tokens": [{"id": at, **token} for at, token in enumerate(TOKENS, start=6)],
    "normalizer": {"type": "Lowercase"},
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": {"type": "Fuse"},
    "model": {
        "type": "BPE",
        "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "abc": 5},
        "merges": [["a", "b"], ["ab", "c"]],
    },
}


def packed(**parts: Any) -> bytes:
    """Return the tokenizer.json SMALL with other parts, as bytes."""
    return json.dumps({**SMALL, **parts}).encode()


def model(**options: Any) -> dict[str, Any]:
    """Return the entry `model` of SMALL, with `options` added or replaced."""
    return {**SMALL["model"], **options}


def same(data: bytes) -> bool:
    """Return whether `from_parts`, `read_tokenizer` and the tokenizers library make the same tokenizer from a file.
    Asserts that `from_parts` makes the tokenizer itself and does not leave the file to the library."""
    ours = from_parts(json.loads(data))
    assert ours is not None, "it was left to the library"
    return bool(ours.to_str() == read_tokenizer(data).to_str() == Tokenizer.from_buffer(data).to_str())


def test_what_is_read_is_read_from_its_parts() -> None:
    """Our reader builds the tokenizer from a supported tokenizer.json without the fallback, which is the library's own
    reader."""

    def not_whole(_: bytes) -> Tokenizer:
        raise AssertionError("it was left to the library")

    assert read_tokenizer(packed(), not_whole).to_str() == Tokenizer.from_buffer(packed()).to_str()


def test_every_familys_is_the_librarys(kind: Kind) -> None:
    """For each family of tokenizers, the tokenizer built from the parts of tokenizer.json equals the tokenizer that the
    library reads."""
    assert same(build_bundle(kind.folder).files["tokenizer.json"])


@pytest.mark.parametrize("options", [{}, *OPTIONS, {"dropout": None, "unk_token": None, "end_of_word_suffix": None}])
def test_every_option_is_kept(options: dict[str, Any]) -> None:
    """Each option of a BPE model is kept, also if the option is null. A text gets the same ids as with the library."""
    parts: dict[str, Any] = {"model": model(**options)}
    if "vocab" in options:
        parts["added_tokens"] = []
    data = packed(**parts)
    assert same(data)
    if not options.get("dropout"):
        read, library = read_tokenizer(data), Tokenizer.from_buffer(data)
        assert read.encode("abc <a> ABC <b>c").ids == library.encode("abc <a> ABC <b>c").ids


def test_merges_as_older_releases_wrote_them() -> None:
    """A merge may also be one string that holds both sides, as in files of older releases."""
    assert same(packed(model=model(merges=["a b", "ab c"])))


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.0]], "byte_fallback": False}},
        {"model": model(what_comes_next=True)},
        {"added_tokens": [{"id": 17, **TOKENS[0]}]},
    ],
)
def test_the_unusual_is_left_to_the_library(parts: dict[str, Any]) -> None:
    """`from_parts` returns None for a file with another model type, an unknown option, or an added token whose id is
    not the next id. Then the tokenizers library reads the file."""
    data = packed(**parts)
    assert from_parts(json.loads(data)) is None
    assert read_tokenizer(data).to_str() == Tokenizer.from_buffer(data).to_str()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", packed()[:-3], packed(model=model(merges=[["a", "z"]])), packed(model=model(merges=["a b c"]))],
)
def test_what_is_broken_gets_the_librarys_words(data: bytes) -> None:
    """For a truncated or empty file, and for a file with a merge of an unknown piece, `read_tokenizer` raises the same
    error as the tokenizers library."""
    said = []
    for read in (Tokenizer.from_buffer, read_tokenizer):
        try:
            read(data)
        except Exception as error:  # the library knows no other
            said.append(str(error))
    assert len(said) == 2
    assert said[0] == said[1]
