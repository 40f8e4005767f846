"""Encoding of the inputs of a pooling request: many texts, or pairs of texts, in one call of the tokenizer.

The ids equal those of transformers with special tokens added, even if an input is cut (truncated). A cut keeps the
special tokens, and shortens the longer text of a pair first (`longest_first`).

Some tokenizers always split texts before a space. With such a tokenizer, a single text that is cut need not be
tokenized whole: its beginning, up to a space, has the same ids as in the whole text.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers

from cluster.api.outcomes import invalid
from cluster.gateway.calls.pooling.pooling_request import PackedIds, PairInputs, SingleTexts, TextInputs, too_long
from cluster.gateway.text.encoding.word_encoder import WORD_CUT, cuts_are_safe
from cluster.wire.bundle import INPUT_NAMES, TRUNCATION_SIDE

BATCH: Final = 256
BATCH_CHARS: Final = 1 << 20
"""Limits on one call of the tokenizer: at most BATCH inputs with at most BATCH_CHARS characters in total. The limits
bound the memory of the results. An input with more characters is encoded alone."""
CHARS_PER_TOKEN: Final = 8
"""A text that is cut to n tokens is first tokenized up to about n * CHARS_PER_TOKEN characters. If these give too few
tokens, GROWTH times as many characters are tokenized."""
GROWTH: Final = 4


class EncodedInputs:
    """The token ids of all inputs of a request."""

    __slots__ = ("ids", "second_text_at")

    def __init__(self, ids: PackedIds, second_text_at: Any) -> None:
        """`second_text_at`: unsigned 32-bit numbers: for each input, the index of the first token of its second text,
        or 0 if it has no second text. Empty if no input has a second text."""
        self.ids = ids
        self.second_text_at = memoryview(second_text_at).cast("B").cast("I")

    def __len__(self) -> int:
        return len(self.ids)

    def second_text(self, i: int) -> int:
        """Return the index of the first token of an input's second text; 0 if it has no second text."""
        return self.second_text_at[i] if self.second_text_at.nbytes else 0

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        return EncodedInputs, (self.ids, pickle.PickleBuffer(self.second_text_at))


class InputEncoder:
    """The encoder of one model's pooling inputs. Thread-safe."""

    def __init__(
        self, tokenizer: Tokenizer, config: Mapping[str, Any], pre_tokenizer: Mapping[str, Any] | None = None
    ) -> None:
        """`config`: the contents of the bundle's tokenizer_config.json. `pre_tokenizer`: the entry `pre_tokenizer` of
        tokenizer.json."""
        self._tokenizer = tokenizer
        self._cuts_left = config.get(TRUNCATION_SIDE) == "left"
        splits = _splits_before_spaces(tokenizer) or cuts_are_safe(tokenizer, pre_tokenizer)
        self._begins = splits and not self._cuts_left
        """Whether a text that is cut need not be tokenized whole: a beginning of the text suffices."""
        self._has_types = "token_type_ids" in config.get(INPUT_NAMES, ("token_type_ids",))

    def encode(self, inputs: TextInputs | PairInputs, most: int, keep: int | None = None) -> EncodedInputs:
        """Return the ids of all inputs. `most`: the number of tokens that the model's context holds, 0 if unknown.
        `keep`: the number of tokens to which a longer input is cut; None: not cut.

        Raises CallError, which names the input, for an input with no tokens or with more than `most`. Must not run on
        an event loop if the texts are long.
        """
        ids, ends, marks = array("I"), array("L"), array("I")
        is_pair = isinstance(inputs, PairInputs) and not isinstance(inputs, SingleTexts)
        if isinstance(inputs, PairInputs) and is_pair and most and keep is None:
            self._check_shared(inputs, most)
        for numbers in _batches(inputs.lengths):
            for i, encoding in zip(numbers, self._batch(inputs, numbers, is_pair, keep), strict=True):
                kept = None if keep is None or len(encoding) <= keep else self._kept(encoding, keep)
                tokens = encoding.ids if kept is None else _picked(encoding.ids, kept)
                if most and len(tokens) > most:
                    raise too_long(inputs.path(i), len(tokens), most)
                if not tokens:
                    raise invalid(inputs.path(i), "gives no tokens: send a text that is not empty")
                ids.extend(array("I", tokens))
                ends.append(len(ids))
                if is_pair:
                    marks.append(self._mark(encoding.type_ids if kept is None else _picked(encoding.type_ids, kept)))
        return EncodedInputs(PackedIds(ids, ends), marks)

    def _check_shared(self, inputs: PairInputs, most: int) -> None:
        """Check the length of the text that all pairs share, before the pairs are encoded. Raises CallError if the text
        has more than `most` tokens."""
        if len(inputs.first) > 1 or len(inputs.second) == 1:
            return
        (encoding,) = self._tokenizer.encode_batch_fast([inputs.first[0]], add_special_tokens=False)
        if len(encoding) > most:
            raise too_long(inputs.first_field.path(0), len(encoding), most)

    def _batch(
        self, inputs: TextInputs | PairInputs, numbers: range, is_pair: bool, keep: int | None
    ) -> Sequence[Encoding]:
        """Return the encodings of the inputs whose indices are in `numbers`. `keep`: number of tokens to which a text
        will be cut; of a longer text, only a beginning with more than `keep` tokens may be encoded. Errors of the
        tokenizer are raised unchanged."""
        if is_pair:
            assert isinstance(inputs, PairInputs)
            shared = inputs.first[0] if len(inputs.first) == 1 else None
            return self._encoded([(inputs.first[i] if shared is None else shared, inputs.second[i]) for i in numbers])
        texts = [_text(inputs, i) for i in numbers]
        if keep is None or not self._begins:
            return self._encoded(texts)
        return self._beginnings(texts, keep, CHARS_PER_TOKEN * keep)

    def _encoded(self, batch: Sequence[Any]) -> list[Encoding]:
        encoded: list[Encoding] = self._tokenizer.encode_batch_fast(batch, add_special_tokens=True)
        return encoded

    def _beginnings(self, texts: Sequence[str], keep: int, chars: int) -> list[Encoding]:
        """Return an encoding of each text, for a caller that needs only the first `keep` tokens. Of a long text, only a
        beginning with more than `keep` tokens is encoded. `chars`: length in characters of the first beginning that is
        tried. If this beginning has too few tokens, a longer one is tried."""
        begun = [_beginning(text, chars) for text in texts]
        encoded = self._encoded(begun)
        for i, text in enumerate(texts):
            if len(encoded[i]) <= keep and len(begun[i]) < len(text):
                (encoded[i],) = self._beginnings([text], keep, GROWTH * chars)
        return encoded

    def _mark(self, types: Sequence[int]) -> int:
        """Return the index of the first token of a pair's second text, found by the token types; 0 if there is no
        second text."""
        return types.index(1) if self._has_types and 1 in types else 0

    def _kept(self, encoding: Encoding, keep: int) -> list[int]:
        """Return the indices of the tokens that remain when an input is cut to `keep` tokens."""
        places: tuple[list[int], list[int]] = ([], [])
        kept: list[int] = []
        for at, number in enumerate(encoding.sequence_ids):
            (kept if number is None else places[number]).append(at)
        room = max(keep - len(kept), 0)
        counts = longest_first(len(places[0]), len(places[1]), room)
        for part, count in zip(places, counts, strict=True):
            kept += part[len(part) - count :] if self._cuts_left else part[:count]
        return sorted(kept)[:keep]


def _splits_before_spaces(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer splits every text before each space, as BERT's tokenizers do: it normalizes single
    characters, then splits at white space and punctuation, then splits the words."""
    return (
        isinstance(tokenizer.model, models.WordPiece)
        and isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and not any(" " in token.content for token in tokenizer.get_added_tokens_decoder().values())
    )


def _beginning(text: str, chars: int) -> str:
    """Return the beginning of a text up to the first space after `chars` characters; the whole text if there is no such
    space."""
    cut = WORD_CUT.search(text, chars) if len(text) > chars else None
    return text if cut is None else text[: cut.start()]


def _batches(lengths: Sequence[int]) -> Iterator[range]:
    """Yield each batch of inputs that are encoded together, as a range of the inputs' numbers. `lengths`: characters of
    each input."""
    begin = chars = 0
    for i, length in enumerate(lengths):
        if i > begin and (i - begin == BATCH or chars + length > BATCH_CHARS):
            yield range(begin, i)
            begin, chars = i, 0
        chars += length
    yield range(begin, len(lengths))


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens to keep of each of two texts. The texts have `first` and `second` tokens, and `room`
    tokens fit. As in the tokenizers library, the longer text is cut first, until both have the same length. After that,
    both are cut."""
    short, long = sorted((first, second))
    if first + second <= room:
        return first, second
    if not second:
        return min(first, room), 0
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)


def _picked(values: Sequence[int], places: Sequence[int]) -> list[int]:
    return [values[at] for at in places]


def _text(inputs: TextInputs | PairInputs, i: int) -> str:
    if isinstance(inputs, TextInputs):
        return inputs.texts[i]
    at = len(inputs.first)
    return inputs.first[i] if i < at else inputs.second[i - at]
