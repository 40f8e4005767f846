"""A text is cut at an added token only if the joined ids of the two parts equal the ids of the whole text."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from tokenizers import AddedToken, Tokenizer, models, normalizers

from cluster.gateway.text.encoding.token_cuts import TokenCuts
from tests.gateway.text.cut_tokenizers import ODD_TEXTS, TOKENIZERS, ids_of

LAW = settings(max_examples=150, deadline=None)


def cuts_of(tokenizer: Tokenizer) -> TokenCuts | None:
    """Return the TokenCuts of a tokenizer, or None."""
    return TokenCuts.of(tokenizer, json.loads(tokenizer.to_str()))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_both_sides_make_the_whole(name: str) -> None:
    """If a text is cut at a place that `starts` returns, the ids of the two parts, one after the other, are the ids of
    the whole text. This holds for tokenizers with any added tokens."""
    tokenizer = TOKENIZERS[name]
    cuts = cuts_of(tokenizer)
    assert cuts is not None

    @LAW
    @given(text=ODD_TEXTS)
    def law(text: str) -> None:
        whole = ids_of(tokenizer, text)
        starts = list(cuts.starts(text))
        assert starts == sorted(set(starts))
        for at in starts:
            assert [*ids_of(tokenizer, text[:at]), *ids_of(tokenizer, text[at:])] == whole

    law()


def test_every_message_is_a_cut() -> None:
    """Texts of two common kinds of chat templates are cut before each of their control tokens."""
    llama3, mistral = cuts_of(TOKENIZERS["llama3"]), cuts_of(TOKENIZERS["mistral"])
    assert llama3 is not None
    assert mistral is not None
    text = "<|start_header_id|>user<|end_header_id|>\n\n<b>Hi<|eot_id|>"
    assert [text[at : at + 7] for at in llama3.starts(text)] == ["<|start", "<|end_h", "<|eot_i"]
    assert list(mistral.starts("<s>[INST] Hi[/INST] <s")) == [0, 3, 12]


def test_many_tokens_take_linear_time() -> None:
    """Six thousand tokens with a common prefix are found in linear time, in a text that repeats parts of that prefix.
    Of several matches the longest counts."""
    tokens = [AddedToken(f"<unused{i}>", normalized=False) for i in range(6000)]
    cuts = TokenCuts([*tokens, AddedToken("<unused", normalized=False)])
    text = "<unu <unused5999> <unused " * 1000
    assert len(list(cuts.starts(text))) == 2000


def truncating(tokenizer: Tokenizer) -> None:
    """Make the tokenizer truncate texts."""
    tokenizer.enable_truncation(8)


def padding(tokenizer: Tokenizer) -> None:
    """Make the tokenizer pad texts."""
    tokenizer.enable_padding()


def dropping_out(tokenizer: Tokenizer) -> None:
    """Replace the tokenizer's model by one whose merges are random (dropout)."""
    tokenizer.model = models.BPE(vocab={"a": 0}, merges=[], dropout=0.5)


def of_another_model(tokenizer: Tokenizer) -> None:
    """Replace the tokenizer's model by one of another kind."""
    tokenizer.model = models.WordLevel({"a": 0}, unk_token="a")


def splitting_specials(tokenizer: Tokenizer) -> None:
    """Make the tokenizer treat special tokens as text."""
    tokenizer.encode_special_tokens = True


@pytest.mark.parametrize("spoil", [truncating, padding, dropping_out, of_another_model, splitting_specials])
def test_uncertain_tokenizers_have_no_cuts(spoil: Callable[[Tokenizer], None]) -> None:
    """Texts are not cut at added tokens if the tokenizer violates any one condition under which a cut leaves the token
    ids unchanged."""
    tokenizer = Tokenizer.from_str(TOKENIZERS["llama3"].to_str())
    assert cuts_of(tokenizer) is not None
    spoil(tokenizer)
    assert cuts_of(tokenizer) is None


def test_an_unknown_step_has_no_cuts() -> None:
    """If a tokenizer has a normalizer or pre-tokenizer of an unknown type, its texts are never cut at added tokens."""
    tokenizer = Tokenizer.from_str(TOKENIZERS["llama3"].to_str())
    layout = json.loads(tokenizer.to_str())
    unknown = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "FromTheFuture"}]}
    assert TokenCuts.of(tokenizer, {**layout, "normalizer": unknown}) is None
    tokenizer.normalizer = normalizers.NFC()
    assert cuts_of(tokenizer) is not None
