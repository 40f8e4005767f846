"""With the bundle of a pooling model, a gateway encodes texts and pairs of texts as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.pooling_models import WORDS, build_cross_encoder, minilm

pytestmark = pytest.mark.engine

WORDS_AND_MORE = [*WORDS, "The", "RIVER", "unknown", "?"]


def texts(least: int) -> st.SearchStrategy[str]:
    """Return a strategy for texts of at least `least` words."""
    return st.lists(st.sampled_from(WORDS_AND_MORE), min_size=least, max_size=12).map(" ".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny cross-encoder."""
    return build_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


def in_bundle(folder: Path) -> Any:
    """Return the tokenizer that a gateway reads from the folder's bundle."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(build_bundle(folder).files["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    """The bundle's tokenizer, and the tokenizer of transformers."""
    from transformers import AutoTokenizer

    return in_bundle(folder), AutoTokenizer.from_pretrained(folder)


@given(texts(0), st.none() | texts(1))
def test_pairs_have_their_special_tokens_and_types(both: tuple[Any, Any], first: str, second: str | None) -> None:
    """A text or a pair has the ids and token types of transformers, special tokens included. In a pair the types change
    once from 0 to 1, so one position describes them."""
    bundled, tokenizer = both
    got = bundled.encode(*((first,) if second is None else (first, second)))
    expected = tokenizer(first, second, return_token_type_ids=True)
    assert (got.ids, got.type_ids) == (expected["input_ids"], expected["token_type_ids"])
    assert got.type_ids == sorted(got.type_ids)
    assert (1 in got.type_ids) == (second is not None)


def test_a_long_text_is_not_cut(tmp_path: Path) -> None:
    """The embedding model's own tokenizer cuts and pads texts to 128 tokens. In the bundle it does neither, since the
    model accepts 256 tokens."""
    tokenizer = in_bundle(minilm(tmp_path))
    assert len(tokenizer.encode("river " * 200).ids) == 202
    assert len(tokenizer.encode("river").ids) == 3


def test_texts_are_made_lower_case_where_the_model_says_so(folder: Path, tmp_path: Path) -> None:
    """If the model sets sentence-transformers' do_lower_case, the bundle's tokenizer gives a text the ids of its
    lower-case form."""
    cased = Path(shutil.copytree(folder, tmp_path / "cased"))
    content = json.loads((cased / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (cased / "tokenizer.json").write_text(json.dumps(content))
    upper, lower = "The RIVER runs", "the river runs"
    assert in_bundle(cased).encode(upper).ids != in_bundle(cased).encode(lower).ids
    (cased / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": True}))
    assert in_bundle(cased).encode(upper).ids == in_bundle(cased).encode(lower).ids
    assert in_bundle(cased).encode(lower).ids == in_bundle(folder).encode(lower).ids
