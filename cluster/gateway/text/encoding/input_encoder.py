"""Encoding of the inputs of a pooling request: many texts, or pairs of texts. Each text is tokenized once, also a text
that many pairs share; then the special tokens are added.

The ids equal those of transformers with special tokens added, even if an input is cut (truncated). A cut keeps the
special tokens, and shortens the longer text of a pair first (`longest_first`).

A text that is cut need not be tokenized whole. Most tokenizers split texts before a space, so a beginning of the text
up to a space has the same ids as in the whole text. If there is no space, the beginning may end anywhere; then a longer
beginning must give the same ids. At most MAX_READ_CHARS characters of a text are read.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Final

from tokenizers import Encoding, Tokenizer

from cluster.api.outcomes import CallError, invalid
from cluster.gateway.calls.pooling.pooling_request import PackedIds, PairInputs, SingleTexts, TextInputs, too_long
from cluster.gateway.text.encoding.word_encoder import WORD_CUT, cuts_are_safe
from cluster.wire.bundle import INPUT_NAMES, TRUNCATION_SIDE

BATCH: Final = 256
BATCH_CHARS: Final = 1 << 20
"""Limits on one call of the tokenizer: at most BATCH texts with at most BATCH_CHARS characters in total. The limits
bound the memory of the results. A text with more characters is encoded alone."""
CHARS_PER_TOKEN: Final = 8
"""A text that is cut to n tokens is first tokenized up to about n * CHARS_PER_TOKEN characters. If these do not
suffice, GROWTH times as many characters are tokenized."""
GROWTH: Final = 4
MAX_READ_CHARS: Final = 1 << 20
"""Maximum number of characters that are read of a text that is cut. A text that needs more is refused."""
MARGIN_TOKENS: Final = 32
"""Number of tokens at the end of a beginning that may differ from those of the whole text, if the beginning does not
end before a space."""
MAX_SHARED_TOKENS: Final = 4 << 20
"""Maximum number of tokens that the text which all pairs share may have in all pairs together."""
PROBES: Final = 64
_SPLITS: Final = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_LOCAL: Final = frozenset(
    ("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Strip", "StripAccents")
)


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


class Text:
    """The token ids of one text, without special tokens. `number`: index of the text in `all_texts`. `source`: the
    whole text if `ids` are those of a beginning, which has more tokens than are kept; else ""."""

    __slots__ = ("ids", "number", "source")

    def __init__(self, number: int, ids: Sequence[int], source: str = "") -> None:
        self.number = number
        self.ids = ids
        self.source = source


class Layout:
    """The places of the texts and of the special tokens in an input of one or two texts. `specials`: number of special
    tokens."""

    def __init__(self, probe: Encoding) -> None:
        """`probe`: the encoding of such an input, in which each text has tokens."""
        parts: list[tuple[int | None, int, int]] = []  # index of the text, or None for a special token; id; token type
        for part in zip(probe.sequence_ids, probe.ids, probe.type_ids, strict=True):
            if part[0] is None or not parts or parts[-1][0] != part[0]:
                parts.append(part)
        self._parts = parts
        self.specials = sum(number is None for number, _, _ in parts)

    def join(self, texts: Sequence[Sequence[int]]) -> tuple[array[int], int]:
        """Return the ids of an input, and the index of its first token of type 1; 0 if there is none."""
        ids, mark = array("I"), 0
        for number, token_id, kind in self._parts:
            before = len(ids)
            ids.extend((token_id,) if number is None else texts[number])
            if kind == 1 and not mark and len(ids) > before:
                mark = before
        return ids, mark


class InputEncoder:
    """The encoder of one model's pooling inputs. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], layout: Mapping[str, Any]) -> None:
        """`config`: the contents of the bundle's tokenizer_config.json. `layout`: those of tokenizer.json without the
        vocabulary."""
        self._tokenizer = tokenizer
        self._cuts_left = config.get(TRUNCATION_SIDE) == "left"
        splits = splits_before_spaces(tokenizer, layout) or cuts_are_safe(tokenizer, layout.get("pre_tokenizer"))
        self._begins = splits and not self._cuts_left
        """Whether a text that is cut need not be tokenized whole: a beginning of the text suffices."""
        self._has_types = "token_type_ids" in config.get(INPUT_NAMES, ("token_type_ids",))

    def encode(self, inputs: TextInputs | PairInputs, most: int, keep: int | None = None) -> EncodedInputs:
        """Return the ids of all inputs. `most`: the number of tokens that the model's context holds, 0 if unknown.
        `keep`: the number of tokens to which a longer input is cut; None: not cut.

        Raises CallError, which names the input, for an input with no tokens, with more than `most`, or of which too
        much would have to be read. Must not run on an event loop if the texts are long.
        """
        ids, ends, marks = array("I"), array("L"), array("I")
        second_at = len(inputs.first) if isinstance(inputs, PairInputs) and not isinstance(inputs, SingleTexts) else 0
        layout = self._of_pairs if second_at else self._of_singles
        shared: list[Text] = []
        if isinstance(inputs, PairInputs) and second_at == 1:
            shared = self._read(inputs, range(1), keep)
            _check_shared(inputs, len(shared[0].ids), most, keep)
        for numbers in _batches(inputs.lengths):
            columns = [shared * len(numbers) if shared else self._read(inputs, numbers, keep)]
            if second_at:
                columns.append(self._read(inputs, range(numbers.start + second_at, numbers.stop + second_at), keep))
            for i, *texts in zip(numbers, *columns, strict=True):
                tokens, mark = layout.join(
                    [text.ids for text in texts] if keep is None else self._cut(inputs, texts, keep - layout.specials)
                )
                del tokens[len(tokens) if keep is None else keep :]
                if most and len(tokens) > most:
                    raise too_long(inputs.path(i), len(tokens), most)
                if not tokens:
                    raise invalid(inputs.path(i), "gives no tokens: send a text that is not empty")
                ids.extend(tokens)
                ends.append(len(ids))
                if second_at:
                    marks.append(mark if self._has_types and mark < len(tokens) else 0)
        return EncodedInputs(PackedIds(ids, ends), marks)

    @cached_property
    def _of_singles(self) -> Layout:
        return self._layout(texts=1)

    @cached_property
    def _of_pairs(self) -> Layout:
        return self._layout(texts=2)

    def _layout(self, texts: int) -> Layout:
        """Return the layout of inputs with so many texts: that of a probe, a text that gives tokens."""
        for probe in ("a", "0", *map(self._tokenizer.id_to_token, range(PROBES))):
            with suppress(Exception):  # the vocabulary may lack the probe, and a token for unknown words
                (encoding,) = self._tokenizer.encode_batch_fast([probe if texts == 1 else (probe, probe)])
                if set(range(texts)) <= set(encoding.sequence_ids):
                    return Layout(encoding)
        raise ValueError("the tokenizer gives no tokens")

    def _cut(self, inputs: TextInputs | PairInputs, texts: Sequence[Text], room: int) -> list[Sequence[int]]:
        """Return the tokens that remain of the texts of an input when they are cut to `room` tokens in all."""
        room = max(room, 0)
        if len(texts) == 2 and room % 2 and min(len(text.ids) for text in texts) > room:
            for text in texts:  # the longer one keeps a token more
                self._read_whole(inputs, text)
        sizes = [len(text.ids) for text in texts]
        counts = longest_first(sizes[0], sizes[1], room) if len(sizes) == 2 else (min(sizes[0], room),)
        return [
            text.ids[size - count :] if self._cuts_left else text.ids[:count]
            for text, size, count in zip(texts, sizes, counts, strict=True)
        ]

    def _read(self, inputs: TextInputs | PairInputs, numbers: range, keep: int | None) -> list[Text]:
        """Encode the texts with these indices in `all_texts`. `keep`: number of tokens to which an input will be cut;
        of a longer text, only a beginning with more than `keep` tokens may be encoded. Errors of the tokenizer are
        raised unchanged."""
        texts = [_text(inputs, i) for i in numbers]
        if keep is None:
            return list(map(Text, numbers, self._encoded(texts)))
        if not self._begins:
            for i, text in zip(numbers, texts, strict=True):
                if len(text) > MAX_READ_CHARS:
                    raise _too_much(inputs, i, text)
            return list(map(Text, numbers, self._encoded(texts)))
        sizes = [_beginning(text, CHARS_PER_TOKEN * keep) for text in texts]
        begun = self._encoded([text[:size] for text, size in zip(texts, sizes, strict=True)])
        read = list(map(Text, numbers, begun, texts))
        for one, size in zip(read, sizes, strict=True):
            self._read_enough(inputs, one, size, keep)
        return read

    def _read_enough(self, inputs: TextInputs | PairInputs, text: Text, size: int, keep: int) -> None:
        """Read on until more than `keep` tokens of a text are certain, or the text ends. `size`: number of characters
        that were read."""
        source = text.source
        while size < len(source):
            before = text.ids
            ends_before_space = WORD_CUT.match(source, size) is not None
            if ends_before_space and len(before) > keep:
                return
            if size >= MAX_READ_CHARS:
                raise _too_much(inputs, text.number, source)
            size = _beginning(source, GROWTH * size)
            (text.ids,) = self._encoded([source[:size]])
            if len(before) > keep + MARGIN_TOKENS and text.ids[: keep + 1] == before[: keep + 1]:
                return
        text.source = ""

    def _read_whole(self, inputs: TextInputs | PairInputs, text: Text) -> None:
        """Read all of a text, if only its beginning was read."""
        if not text.source:
            return
        if len(text.source) > MAX_READ_CHARS:
            raise _too_much(inputs, text.number, text.source)
        (text.ids,) = self._encoded([text.source])
        text.source = ""

    def _encoded(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _check_shared(inputs: PairInputs, tokens: int, most: int, keep: int | None) -> None:
    """Check the number of tokens of the text that all pairs share. Raises CallError if no pair fits into `most` tokens,
    or if the pairs together hold too many."""
    pairs, path = len(inputs.second), inputs.first_field.path(0)
    if pairs == 1:
        return
    if keep is None and most and tokens > most:
        raise too_long(path, tokens, most)
    kept = tokens if keep is None else min(tokens, keep)
    if kept * pairs > MAX_SHARED_TOKENS:
        raise invalid(
            path,
            f"{kept} tokens of it count in each of {pairs} pairs, at most {MAX_SHARED_TOKENS} are allowed in all: "
            "shorten it, or send several requests",
        )


def _too_much(inputs: TextInputs | PairInputs, number: int, text: str) -> CallError:
    return invalid(
        inputs.path_of_text(number),
        f"has {len(text)} characters, and the first {MAX_READ_CHARS} do not show to which tokens it is cut: shorten it",
    )


def splits_before_spaces(tokenizer: Tokenizer, layout: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer splits every text before each space, as those of BERT and of XLM-RoBERTa do: it
    normalizes characters without regard to others behind a space, splits at white space, then tokenizes each word.
    `layout`: the contents of tokenizer.json without the vocabulary."""
    steps = list(_steps(layout.get("pre_tokenizer")))
    return (
        not getattr(tokenizer.model, "dropout", None)
        and all(map(_is_local, _steps(layout.get("normalizer"))))
        and all(step["type"] in _SPLITS or step["type"] in ("Metaspace", "Punctuation", "Digits") for step in steps)
        and any(step["type"] in _SPLITS or (step["type"] == "Metaspace" and step.get("split", True)) for step in steps)
        and not any(" " in token.content for token in tokenizer.get_added_tokens_decoder().values())
    )


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, which may be nested."""
    if step is not None:
        inner = step.get("normalizers", step.get("pretokenizers"))
        if inner is None:
            yield step
        for one in inner or ():
            yield from _steps(one)


def _is_local(step: Mapping[str, Any]) -> bool:
    """Return whether a step of a normalizer leaves spaces, and changes no character because of one behind a space."""
    if step["type"] == "Replace":
        pattern = step.get("pattern", {})
        return (pattern.get("Regex") == " {2,}" and step.get("content") == " ") or " " not in pattern.get("String", " ")
    return step["type"] in _LOCAL


def _beginning(text: str, chars: int) -> int:
    """Return the length of the beginning of a text to read: up to a space behind `chars` characters if there is one
    soon, else `chars`."""
    chars = min(chars, MAX_READ_CHARS)
    if len(text) <= chars:
        return len(text)
    cut = WORD_CUT.search(text, chars, 2 * chars)
    return chars if cut is None else cut.start()


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


def _text(inputs: TextInputs | PairInputs, i: int) -> str:
    if isinstance(inputs, TextInputs):
        return inputs.texts[i]
    at = len(inputs.first)
    return inputs.first[i] if i < at else inputs.second[i - at]
