"""Inputs of pooling requests have the same ids and token types as with transformers, also when they are truncated."""

from __future__ import annotations

import json
import pickle
import string
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.calls.pooling.pooling_request import (
    IdsInputs,
    InputField,
    PackedIds,
    PackedTexts,
    PairInputs,
    TextInputs,
    packed,
)
from cluster.gateway.text.encoding.input_encoder import (
    BATCH_CHARS,
    MAX_READ_CHARS,
    MAX_SHARED_TOKENS,
    EncodedInputs,
    InputEncoder,
    longest_first,
)

WORDS = ["cat", "dog", "sat", "over", "hill"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PROCESSORS = {
    "bert": processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "roberta": processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2)),
    "template": processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    ),
    "none": None,
}
TEXTS = st.lists(st.sampled_from([*WORDS, "x", "unknown-thing", "é"]), min_size=1, max_size=14).map(" ".join)


def tokenizer_of(processor: str) -> Tokenizer:
    """Return a small WordPiece tokenizer with a post-processor."""
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if PROCESSORS[processor] is not None:
        tokenizer.post_processor = PROCESSORS[processor]
    return tokenizer


def encoder_of(tokenizer: Any, config: dict[str, Any] | None = None) -> InputEncoder:
    """Return the encoder of a tokenizer. `config`: the contents of its tokenizer_config.json."""
    return InputEncoder(tokenizer, config or {}, json.loads(tokenizer.to_str()))


@pytest.fixture(scope="module")
def both() -> dict[tuple[str, str], tuple[Any, InputEncoder]]:
    """Provide the tokenizers of transformers and the encoders, by post-processor and truncation side."""
    from transformers import PreTrainedTokenizerFast

    out = {}
    for processor in PROCESSORS:
        for side in ("right", "left"):
            theirs = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer_of(processor),
                model_input_names=["input_ids", "token_type_ids"],
                truncation_side=side,
                pad_token="[PAD]",
            )
            out[processor, side] = theirs, encoder_of(tokenizer_of(processor), {"truncation_side": side})
    return out


def texts(*values: str) -> TextInputs:
    """Return single texts in the field `input`."""
    return TextInputs(values, InputField("input"))


def pairs(first: Sequence[str], second: Sequence[str]) -> PairInputs:
    """Return pairs in the fields `query` and `documents`."""
    return PairInputs(first, second, InputField("query", False), InputField("documents"))


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
@settings(max_examples=150)
@given(first=TEXTS, second=TEXTS, keep=st.none() | st.integers(4, 30), side=st.sampled_from(["right", "left"]))
def test_ids_are_those_of_transformers(
    both: dict[tuple[str, str], tuple[Any, InputEncoder]],
    processor: str,
    first: str,
    second: str,
    keep: int | None,
    side: str,
) -> None:
    """Single texts and pairs have the same ids as with transformers, whole or truncated on either side. In a pair, the
    second text begins at the same token as with transformers."""
    theirs, ours = both[processor, side]
    cut = {} if keep is None else {"truncation": True, "max_length": keep}
    assert list(ours.encode(texts(first, second), 0, keep).ids[1]) == theirs(second, **cut)["input_ids"]
    wanted = theirs(first, second, **cut)
    found = ours.encode(pairs([first], [second]), 0, keep)
    assert list(found.ids[0]) == wanted["input_ids"]
    if processor == "none":  # transformers adds a post-processor with types of its own
        return
    types = wanted["token_type_ids"]
    assert found.second_text(0) == (types.index(1) if 1 in types else 0)


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 60))
def test_the_longer_text_is_cut_first(first: int, second: int, room: int) -> None:
    """Two texts together keep at most `room` tokens. They keep fewer only if they have fewer, or if each of them alone
    is longer than `room`. The shorter text loses tokens only if cutting the longer text is not enough."""
    kept = longest_first(first, second, room)
    assert sum(kept) == min(first + second, room) or (min(first, second) > room and sum(kept) <= room)
    assert kept[0] <= first
    assert kept[1] <= second
    if sum(kept) < first + second:
        assert abs(kept[0] - kept[1]) <= 1 or min(first, second) in kept


def test_an_input_is_named_in_errors() -> None:
    """The error for an input that is too long, or gives no tokens, names the input's place in the caller's body."""
    encoder = encoder_of(tokenizer_of("none"))
    with pytest.raises(CallError, match=r"input\[1\]: has 3 tokens, the model's context holds 2") as error:
        encoder.encode(texts("cat", "cat cat cat"), 2)
    assert error.value.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED
    with pytest.raises(CallError, match=r"input\[0\]: gives no tokens"):
        encoder.encode(texts(""), 2)
    with pytest.raises(CallError, match=r"documents\[1\]: has 4 tokens"):
        encoder.encode(pairs(["cat"], ["dog", "dog dog dog"]), 3)
    assert len(encoder_of(tokenizer_of("bert")).encode(texts(""), 2)) == 1


class Counting:
    """A tokenizer that counts the characters that it encodes. `chars` is the total, `most` the number in the largest
    single call."""

    def __init__(self) -> None:
        self._tokenizer = tokenizer_of("bert")
        self.chars = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode_batch_fast(self, batch: list[Any], add_special_tokens: bool = True) -> Any:
        if not add_special_tokens:  # otherwise a probe of the places of special tokens
            sizes = list(map(len, batch))
            self.chars, self.most = self.chars + sum(sizes), max(self.most, sum(sizes))
        return self._tokenizer.encode_batch_fast(batch, add_special_tokens=add_special_tokens)


def test_a_long_query_is_not_read_with_each_document() -> None:
    """A query that is too long for the context is encoded once and refused, whatever the number of documents."""
    counting = Counting()
    query = "cat " * 20_000
    with pytest.raises(CallError, match="query: has 20000 tokens, the model's context holds 512") as refused:
        encoder_of(counting).encode(pairs([query], ["dog"] * 2048), 512)
    assert refused.value.outcome is Outcome.CONTEXT_LENGTH_EXCEEDED
    assert counting.chars == len(query)


@pytest.mark.parametrize("keep", [None, 8, 9, 512])
def test_a_query_is_read_once(keep: int | None) -> None:
    """A query is tokenized once or twice, whatever the number of documents. The ids are those of single pairs."""
    counting = Counting()
    query, documents = "cat sat " * 2_000, ["dog", "hill " * 3, "dog sat " * 40] * 200
    encoded = encoder_of(counting).encode(pairs([query], documents), 0, keep)
    assert counting.chars <= 2 * (len(query) + sum(map(len, documents)))
    for i in range(3):
        theirs = tokenizer_of("bert")
        if keep is not None:
            theirs.enable_truncation(keep)
        whole = theirs.encode(query, documents[i])
        assert list(encoded.ids[597 + i]) == whole.ids
        assert encoded.second_text(597 + i) == whole.type_ids.index(1)


def test_a_query_has_a_bound_over_all_pairs() -> None:
    """The tokens that a query has in all pairs together are bounded, since they are kept for each pair."""
    query = "cat " * (MAX_SHARED_TOKENS // 2048)
    encoder = encoder_of(tokenizer_of("none"))
    assert len(encoder.encode(pairs([query], ["d"] * 2048), 0)) == 2048
    with pytest.raises(CallError, match=r"query: 2049 tokens of it count in each of 2048 pairs.*: shorten it"):
        encoder.encode(pairs([query + "cat"], ["d"] * 2048), 0)
    assert len(encoder.encode(pairs([query + "cat"], ["d"] * 2048), 0, 64)) == 2048


@pytest.mark.slow
@pytest.mark.parametrize("is_packed", [False, True])
def test_long_inputs_are_encoded_few_at_a_time(is_packed: bool) -> None:
    """The tokenizer gets a bounded number of characters at once. The ids do not depend on this."""
    counting = Counting()
    inputs = pairs(["cat " * 20_000], [f"dog {'sat ' * i * 4_000}" for i in range(20)])
    some = packed(inputs) if is_packed else inputs
    assert isinstance(some, PairInputs)
    encoded = encoder_of(counting).encode(some, 0)
    assert counting.most <= BATCH_CHARS + len(inputs.first[0])
    assert counting.chars == some.chars
    alone = encoder_of(tokenizer_of("bert"))
    for i in (0, 5, 11):
        one = alone.encode(pairs(inputs.first, [inputs.second[i]]), 0)
        assert (encoded.ids[i], encoded.second_text(i)) == (one.ids[0], one.second_text(0))


def byte_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer with a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "c"), ("Ġc", "a"), ("o", "g"), ("Ġ", "Ġ"), ("Ġca", "t")]
    words = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def unigram_tokenizer() -> Tokenizer:
    """Return a Unigram tokenizer with the normalizer and pre-tokenizers of XLM-RoBERTa, without its character map."""
    words = ["cat", "▁cat", "at", "▁d", "og", "▁", *string.printable.strip(), "中", "é", "ca", "t▁"]
    pieces = [("<unk>", 0.0), *((word, -2.0 - i % 7) for i, word in enumerate(dict.fromkeys(words)))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    return tokenizer


TOKENIZERS = {"bert": tokenizer_of("none"), "bytes": byte_tokenizer(), "unigram": unigram_tokenizer()}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    text=st.text(
        st.sampled_from("cat dog .,-'\n\t\u0301\u00e9\u4e2d\u2003\u03a3\x00")
        | st.characters(exclude_categories=["Cs"]),
        min_size=1,
    ),
    without_spaces=st.booleans(),
    times=st.integers(1, 80),
    keep=st.integers(1, 40),
)
def test_a_beginning_has_the_first_ids(kind: str, text: str, without_spaces: bool, times: int, keep: int) -> None:
    """The ids of a truncated text are the first ids of the whole text, for any text, also without a space."""
    tokenizer = TOKENIZERS[kind]
    text = (text.replace(" ", "") if without_spaces else text) * times
    whole = tokenizer.encode(text).ids
    if whole:
        encoder = encoder_of(tokenizer)
        assert encoder._begins
        assert list(encoder.encode(texts(text), 0, keep).ids[0]) == whole[:keep]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer"),
    [
        (normalizers.NFC(), pre_tokenizers.ByteLevel()),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.WhitespaceSplit()),
        (normalizers.NFC(), pre_tokenizers.Metaspace(split=False)),
        (normalizers.NFC(), pre_tokenizers.Punctuation()),
        (normalizers.NFC(), None),
    ],
)
def test_other_texts_are_read_whole(normalizer: Any, pre_tokenizer: Any) -> None:
    """If a tokenizer may merge a space with the character before it, a text that is cut is read whole. A text with more
    characters than are read is then refused, with its place in the body."""
    tokenizer = unigram_tokenizer()
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    encoder = encoder_of(tokenizer)
    assert not encoder._begins
    assert len(encoder.encode(texts("cat " * 1000), 0, 9).ids[0]) == 9
    with pytest.raises(CallError, match=r"input\[1\]: has 1048580 characters, and the first 1048576 do not show"):
        encoder.encode(texts("cat", "cat " * (MAX_READ_CHARS // 4 + 1)), 0, 9)


@pytest.mark.parametrize("word", ["unknown-thing ", "unknown-thing", "\u4e2d", "."])
@pytest.mark.parametrize("is_pair", [False, True])
def test_a_long_text_that_is_cut_is_not_read_whole(word: str, is_pair: bool) -> None:
    """If a long text is truncated to few tokens, the tokenizer reads only a small part of the text, alone and in pairs,
    whether or not the text has spaces."""
    counting = Counting()
    long = word * 300_000
    inputs = pairs([long], ["dog"] * 2048) if is_pair else texts(long)
    assert len(encoder_of(counting).encode(inputs, 512, 64).ids[0]) == 64
    assert counting.chars < 10_000 + 3 * 2048


def test_a_long_text_with_few_tokens_is_refused() -> None:
    """A text whose first million characters have fewer tokens than are kept is refused. A shorter one is read whole."""
    counting = Counting()
    encoder = encoder_of(counting)
    assert len(encoder.encode(texts("x" * 100_000), 512, 64).ids[0]) == 3
    for long in ("x" * 15_000_000, " " * 15_000_000):
        counting.chars = 0
        with pytest.raises(CallError, match=r"input\[0\]: has 15000000 characters"):
            encoder.encode(texts(long), 512, 64)
        assert counting.chars < 2 * MAX_READ_CHARS


@given(st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_a_shared_text_counts_once(first: int, second: int, is_packed: bool) -> None:
    """If all pairs share their first text, its length counts once. `apart` returns the texts one by one."""
    inputs = pairs(["ab" * first], ["c" * second] * 3)
    some = packed(inputs) if is_packed else inputs
    assert isinstance(some, PairInputs)
    assert list(some.lengths) == [second] * 3
    assert list(some.apart().lengths) == [2 * first, *[second] * 3]
    assert some.chars == some.apart().chars == 2 * first + 3 * second


def test_tokenizers_without_token_types_give_no_mark() -> None:
    """If a tokenizer returns no token types, the beginning of the second text is not reported."""
    config = {"model_input_names": ["input_ids"]}
    assert encoder_of(tokenizer_of("bert"), config).encode(pairs(["cat"], ["dog"]), 0).second_text(0) == 0
    assert encoder_of(tokenizer_of("bert")).encode(pairs(["cat"], ["dog"]), 0).second_text(0) == 3


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8), st.integers(0, 8))
def test_packed_texts_are_the_texts(values: list[str], at: int) -> None:
    """Packed texts equal the original texts, also after pickling with separate buffers, in slices, and joined."""
    whole = PackedTexts.of(values)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(whole, protocol=5, buffer_callback=buffers.append)
    again = pickle.loads(data, buffers=[bytearray(buffer.raw()) for buffer in buffers])  # noqa: S301
    for one in (whole, again, PackedTexts.of(values[:at]) + PackedTexts.of(values[at:])):
        assert list(one) == values
        assert one[at:] == values[at:]
    if values:
        assert whole[-1] == values[-1]


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=6))
def test_packed_ids_are_the_ids(values: list[list[int]]) -> None:
    """PackedIds hold the same lists of ids as were packed. For each id, `place_of` returns the index of its list and
    its index in that list."""
    whole = PackedIds.of(values)
    encoded = EncodedInputs(whole, b"")
    again = pickle.loads(pickle.dumps(encoded, protocol=5)).ids  # noqa: S301
    assert [list(one) for one in whole] == [list(one) for one in again] == values
    places = [(i, at) for i, one in enumerate(values) for at in range(len(one))]
    assert [whole.place_of(at) for at in range(len(whole.ids))] == places


def test_a_number_that_is_no_id_is_named() -> None:
    """If a number is no valid token id, packing raises an error that names its place."""
    with pytest.raises(CallError, match=r"input\[1\]\[2\]: must be a token id of the vocabulary, got -7"):
        packed(IdsInputs([[1], [1, 2, -7]], InputField("input")))
