"""A text that certainly has too many tokens is refused before it is tokenized, and no other text is refused. Slow
regular expressions of tokenizers are recognized."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.calls.pooling.pooling_request import InputField, PairInputs, TextInputs
from cluster.gateway.text.encoding.length_check import SURELY_FEW
from cluster.gateway.text.encoding.reach import Reach
from cluster.gateway.text.encoding.word_encoder import QWEN2, WORD_PATTERNS
from cluster.gateway.text.expressions import expressions_of, may_explode
from cluster.gateway.text.tokenizer import TextModel
from tests.gateway.text.kinds import TEXTS, Kind
from tests.support.checkpoints import FAMILIES
from tests.support.cpu import cpu_within

LONG = TEXTS | st.lists(TEXTS, max_size=8).map("".join) | st.builds(
    lambda text, times: text * times, st.text(max_size=4) | st.sampled_from([" ", "a", "▁", "e\u0301", "K\u0327"]),
    st.integers(1, 300),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data(), family=st.sampled_from(FAMILIES))
def test_the_bound_is_never_above_the_tokens(kinds: dict[str, Kind], data: st.DataObject, family: str) -> None:
    """The lower bound on the tokens of a text is at most their actual number, for any text and each family of
    tokenizers."""
    model = kinds[family].ours
    reach = model.codec._lengths._reach
    if reach is None:
        return
    text = data.draw(LONG)
    assert reach.fewest(text) <= len(model.codec.encode_raw(text))


def test_some_families_have_a_bound(kinds: dict[str, Kind]) -> None:
    """For at least two tokenizer families, Reach computes a lower bound on the number of tokens of a text. Otherwise
    test_the_bound_is_never_above_the_tokens would check nothing."""
    bounded = [f for f, kind in kinds.items() if kind.ours.codec._lengths._reach is not None]
    assert {"llama", "qwen2"} <= set(bounded) or len(bounded) >= 2, bounded


def _byte_level(normalizer: normalizers.Normalizer | None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    merges = [("a", "a"), ("aa", "aa"), ("Ã", "©")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("aae é\u0301\u0327\u1fefK\u212aáΩ\u2126ᾂ\u0313\u0345\u1100\u1161\u11a8가")),
    st.booleans(),
)
def test_composition_is_allowed_for(text: str, composes: bool) -> None:
    """`Reach.fewest` is never more than the number of tokens in a text. This also holds if the normalizer NFC shortens
    the text by joining marks with the characters before them."""
    tokenizer = _byte_level(normalizers.NFC() if composes else None)
    reach = Reach.of(tokenizer, {"normalizer": {"type": "NFC"} if composes else None,
                                 "pre_tokenizer": {"type": "ByteLevel"}})  # fmt: skip
    assert reach is not None
    assert reach.fewest(text) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize(
    "layout",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Strip"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "▁"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "behavior": "Removed"}, {"type": "ByteLevel"}]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)  # fmt: skip
def test_what_may_drop_text_has_no_bound(layout: dict[str, object]) -> None:
    """Reach, the lower bound on the number of tokens of a text, does not exist for a tokenizer that may shorten a text
    before it splits the text."""
    assert Reach.of(_byte_level(None), {"pre_tokenizer": {"type": "ByteLevel"}, **layout}) is None


def test_a_text_beyond_the_context_is_refused_at_once(kinds: dict[str, Kind]) -> None:
    """A huge text is refused at once, because a lower bound on its number of tokens exceeds the context. Without this
    bound, 15 MB without a space took 1.2 GiB of memory and over 40 s."""
    model = kinds["llama"].ours
    text = "a" * 15_000_000
    with cpu_within(6.0):
        with pytest.raises(CallError, match="at least") as raised:
            model.codec.prompt_ids("t", text, 1000)
        assert raised.value.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED
        with pytest.raises(CallError, match="at least") as raised:
            model.codec.chat_ids("t", [{"role": "user", "content": text}], 1000)
        assert raised.value.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED
    assert len(model.codec.prompt_ids("t", "a " * 200, 1000)) < 1000 * SURELY_FEW


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(?:a|b)*c", "(a*)*", r"(\s+\S+)+", "(x{2,})+", r"(.)\1", "a*" * 9 + "$"]
)
def test_expressions_that_may_explode_are_told(pattern: str) -> None:
    """A regular expression is classified as slow if its backtracking time may double with each further character of a
    text."""
    assert may_explode(pattern)
    assert list(expressions_of({"pre_tokenizer": {"pretokenizers": [{"pattern": {"Regex": pattern}}]}})) == [pattern]


O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [*sorted(WORD_PATTERNS), QWEN2, O200K, DEEPSEEK, "[0-9][0-9][0-9]", r"\p{N}{1,3}"])
def test_expressions_of_known_tokenizers_are_quick(pattern: str) -> None:
    """No expression of a known tokenizer is classified as slow."""
    assert not may_explode(pattern)


def test_models_of_all_families_are_quick(kind: Kind) -> None:
    """The tokenizer of each family is classified as quick, so a short prompt needs no helper."""
    assert isinstance(kind.ours, TextModel)
    assert kind.ours._jobs.is_quick


def test_inputs_that_are_surely_too_long_are_not_tokenized(kinds: dict[str, Kind]) -> None:
    """If an input of a pooling request certainly has too many tokens, the request is refused before any input is
    tokenized. The error names the input."""
    model = next(kind.ours for kind in kinds.values() if kind.ours.codec._lengths._reach is not None)
    long = "e" * (1 << 20) + " e" * (1 << 20)
    assert model.codec._lengths._reach is not None
    assert model.codec._lengths._reach.fewest(long) > 512
    where = (InputField("query", False), InputField("documents"))
    with cpu_within(0.05):
        for inputs, name in (
            (TextInputs(["a", long], InputField("input")), r"input\[1\]"),
            (PairInputs([long], ["a"] * 2048, *where), "query"),
            (PairInputs(["a"], ["b", long], *where), r"documents\[1\]"),
            (PairInputs(["a"], ["b", long], *where).apart(), r"documents\[1\]"),
        ):
            with pytest.raises(CallError, match=f"^{name}: has at least [0-9]+ tokens") as refused:
                model.codec.encode_inputs(inputs, 512)
            assert refused.value.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED
    assert len(model.codec.encode_inputs(TextInputs([long], InputField("input")), 512, 512).ids[0]) == 512
