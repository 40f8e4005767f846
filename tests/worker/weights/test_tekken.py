"""With Mistral's own tokenizer file, tekken.json, the gateway's tokenizer gives the same ids and texts as the library
mistral-common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.text.tokenizer import TextModel
from cluster.wire.bundle import Bundle
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.rendered_models import TEKKEN_TOKENS, build_rendered

pytestmark = pytest.mark.slow

TEXTS = st.lists(
    st.sampled_from(["<s>", "[INST]", "Hello", " world", "\n\n", "  ", "é́", "日本", "🎉", "don't", "123"])
    | st.text(max_size=5)
).map("".join)
Models = tuple[TextModel, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small tekken.json."""
    return build_rendered("mistral", tmp_path_factory.mktemp("tekken"))


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    """The gateway's tokenizer, and the tokenizer of mistral-common."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    bundle = Bundle.unpack(build_bundle(folder).pack())
    return TextModel.from_bundle(bundle), Tekkenizer.from_file(folder / "tekken.json")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_prompts_equal_mistral_commons(models: Models, text: str) -> None:
    """A prompt gets the same token ids as from the library mistral-common, even if the prompt contains the texts of
    special tokens. Decoding the ids gives the prompt."""
    ours, theirs = models
    ids = theirs.encode(text, bos=True, eos=False)
    assert ours.codec.encode_prompt(text) == ids
    assert ours.decode(ids[1:], skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, TEKKEN_TOKENS - 1), max_size=20))
def test_outputs_equal_mistral_commons(models: Models, ids: list[int]) -> None:
    """Any token ids decode to the same text as with mistral-common, both in one call and token by token. Special ids
    are dropped before the decoding, as in transformers, so the bytes before and after a special id may form one
    character."""
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    ours, theirs = models
    expected = theirs.decode([i for i in ids if i >= theirs.num_special_tokens], SpecialTokenPolicy.IGNORE)
    assert ours.decode(ids, skip_special_tokens=True) == expected
    detokenizer = ours.detokenizer([1])
    streamed = "".join(detokenizer.push([token_id]) or "" for token_id in ids) if ids else ""
    assert expected.startswith(streamed.rstrip("\ufffd")) or expected == streamed


def test_the_bundle_names_the_renderer(models: Models) -> None:
    """The bundle of a model with a tekken tokenizer names Mistral's renderer, and has the EOS that ends an answer. It
    has no chat template."""
    ours, theirs = models
    assert (ours.renderer, ours.has_chat_template) == ("mistral", False)
    assert ours.eos_token_ids == (theirs.eos_id,)
    assert ours.vocab_size == TEKKEN_TOKENS


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """A damaged tekken.json is refused with its path and the remedy."""
    for content in ("", "{}", '{"vocab": 1}', '{"config": {}, "vocab": [{"rank": 0, "token_bytes": "!"}]}'):
        (tmp_path / "tekken.json").write_text(content)
        with pytest.raises(ValueError, match=r"tekken\.json cannot be read.*copy it again"):
            build_bundle(tmp_path)
