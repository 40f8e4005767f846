"""With the bundle of a pooling model, a gateway encodes texts and pairs of texts as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cluster.gateway.calls.pooling.pooling_request import InputField, PairInputs, TextInputs
from cluster.gateway.text.bundle_files import BundleFiles
from cluster.gateway.text.text_codec import TextCodec
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


def settings_in_bundle(folder: Path) -> dict[str, Any]:
    """Return the contents of the tokenizer_config.json in the folder's bundle."""
    content: dict[str, Any] = json.loads(build_bundle(folder).files["tokenizer_config.json"])
    return content


def changed(folder: Path, to: Path, file: str = "tokenizer_config.json", **values: Any) -> Path:
    """Copy `folder` to `to`, change values of a JSON file in the copy, and return the copy's path."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    (to / file).write_text(json.dumps(json.loads((to / file).read_text()) | values))
    return to


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"truncation_side": "left"},
        {"model_input_names": ["input_ids", "attention_mask"]},
        {"truncation_side": "left", "model_input_names": ["input_ids", "attention_mask"]},
    ],
    ids=["default", "left", "no types", "left, no types"],
)
def both(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The encoder that a gateway makes from the bundle, and the tokenizer of transformers. A test that uses this
    fixture runs once for each of some tokenizer settings."""
    from transformers import AutoTokenizer

    at = changed(folder, tmp_path_factory.mktemp("changed"), **request.param)
    return TextCodec(BundleFiles(build_bundle(at))), AutoTokenizer.from_pretrained(at)


@given(texts(0), st.none() | texts(1), st.none() | st.integers(3, 16))
@example("red green blue river", None, 4)
@example("red green blue river", "cat dog sleeps", 6)
def test_inputs_have_their_special_tokens_and_types(
    both: tuple[Any, Any], first: str, second: str | None, keep: int | None
) -> None:
    """A text or a pair has the ids of transformers, special tokens included, whole or cut on the tokenizer's side. A
    pair has token types only if transformers returns them. They change once from 0 to 1, so one position describes
    them."""
    codec, tokenizer = both
    query, documents = InputField("query", False), InputField("documents")
    inputs = TextInputs([first], query) if second is None else PairInputs([first], [second], query, documents)
    got = codec.encode_inputs(inputs, 0, keep)
    expected = tokenizer(first, second, **({} if keep is None else {"truncation": True, "max_length": keep}))
    assert list(got.ids[0]) == expected["input_ids"]
    types = expected.get("token_type_ids") or [0]
    assert got.second_text(0) == (types.index(1) if 1 in types else 0)
    assert types == sorted(types)


def test_default_settings_are_not_in_the_bundle(folder: Path, tmp_path: Path) -> None:
    """A bundle says on which side inputs are cut, and which outputs its tokenizer has, only if gateways would encode
    inputs otherwise without it. So the digests of most bundles are those of earlier releases, and their workers
    continue each other's calls."""
    plain = settings_in_bundle(folder)
    assert sorted(plain) == [
        "add_bos_token",
        "add_eos_token",
        "cls_token",
        "extra_special_tokens",
        "mask_token",
        "pad_token",
        "sep_token",
        "split_special_tokens",
        "unk_token",
    ]
    left = changed(folder, tmp_path / "left", truncation_side="left")
    assert settings_in_bundle(left) == plain | {"truncation_side": "left"}
    names = ["input_ids", "attention_mask"]
    no_types = changed(folder, tmp_path / "no-types", model_input_names=names)
    assert settings_in_bundle(no_types) == plain | {"model_input_names": names}
    assert settings_in_bundle(changed(no_types, tmp_path / "one", "config.json", type_vocab_size=1)) == plain
    right = changed(folder, tmp_path / "right", truncation_side="right")
    assert build_bundle(right).digest == build_bundle(folder).digest


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
