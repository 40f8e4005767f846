"""The pooling request and its inputs. Every API parses a body for embeddings, scores or a ranking into this form.

The inputs of a large body are packed. One buffer holds the UTF-8 texts or the token ids of all inputs, and an array
holds the position in this buffer at which each input ends. A helper process packs the inputs. The gateway process
passes the buffer on without making an object for each input.
"""

from __future__ import annotations

import pickle
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, overload

from cluster.api.frozen import frozen_dataclass
from cluster.api.outcomes import CallError, Outcome, Violation, invalid

MAX_INPUTS = 2048
"""Maximum number of inputs, documents or pairs in a request; OpenAI's limit for embeddings."""
WHOLE_CONTEXT = -1
"""Value of `truncate_tokens` that keeps as many tokens as the model's context holds."""


class PackedTexts(Sequence[str]):
    """Texts in one buffer of UTF-8. A text is decoded each time it is read."""

    __slots__ = ("_data", "_ends")

    def __init__(self, data: Any, ends: array[int]) -> None:
        """`data`: the bytes of all texts. `ends`: the position in `data` at which each text ends."""
        self._data = memoryview(data)
        self._ends = ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> PackedTexts:
        """Return the packed form of texts, which must be valid Unicode."""
        parts = [text.encode() for text in texts]
        return cls(b"".join(parts), array("L", accumulate(map(len, parts))))

    @property
    def lengths(self) -> Sequence[int]:
        """Number of bytes of each text."""
        return [end - begin for begin, end in pairwise((0, *self._ends))]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all texts."""
        return self._data.nbytes

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        if isinstance(i, slice):
            return [self[at] for at in range(*i.indices(len(self)))]
        at = range(len(self._ends))[i]
        return str(self._data[self._ends[at - 1] if at else 0 : self._ends[at]], "utf-8")

    def __add__(self, other: PackedTexts) -> PackedTexts:
        ends = array("L", self._ends)
        ends.extend(end + self.nbytes for end in other._ends)
        return PackedTexts(b"".join((self._data, other._data)), ends)

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        return PackedTexts, (pickle.PickleBuffer(self._data), self._ends)  # pickle does not copy a buffer


class PackedIds(Sequence[Sequence[int]]):
    """Lists of token ids in one buffer of unsigned 32-bit numbers."""

    __slots__ = ("_data", "_ends")

    def __init__(self, data: Any, ends: array[int]) -> None:
        """`data`: the ids of all lists, as bytes. `ends`: the position at which each list ends, counted in ids."""
        self._data = memoryview(data).cast("B")
        self._ends = ends

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> PackedIds:
        """Return the packed form of lists of ids. Raises OverflowError for an id that does not fit into 32 bits."""
        ids = array("I")
        ends = array("L")
        for numbers in lists:
            ids.extend(array("I", numbers))
            ends.append(len(ids))
        return cls(ids, ends)

    @property
    def ids(self) -> memoryview:
        """The ids of all lists."""
        return self._data.cast("I")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, i: int) -> array[int]: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[array[int]]: ...
    def __getitem__(self, i: int | slice) -> array[int] | Sequence[array[int]]:
        if isinstance(i, slice):
            return [self[at] for at in range(*i.indices(len(self)))]
        at = range(len(self._ends))[i]
        ids = array("I")
        ids.frombytes(self._data[4 * (self._ends[at - 1] if at else 0) : 4 * self._ends[at]])
        return ids

    def place_of(self, at: int) -> tuple[int, int]:
        """Return two indices for the id `ids[at]`: the index of its list, and its index in that list."""
        i = next(i for i, end in enumerate(self._ends) if at < end)
        return i, at - (self._ends[i - 1] if i else 0)

    def __reduce_ex__(self, protocol: Any) -> tuple[object, ...]:
        return PackedIds, (pickle.PickleBuffer(self._data), self._ends)


@dataclass(frozen=True, slots=True)
class InputField:
    """A field of the caller's body that holds inputs. `is_list`: whether the field holds a list of inputs instead of
    one input. `inner`: the path from an input to its token ids, for error messages."""

    name: str
    is_list: bool = True
    inner: str = ""

    def path(self, i: int) -> str:
        """Return the path of an input in the body."""
        return f"{self.name}[{i}]" if self.is_list else self.name


@frozen_dataclass
class TextInputs:
    """Texts, each of which becomes a vector."""

    texts: Sequence[str]
    field: InputField

    def __len__(self) -> int:
        return len(self.texts)

    def path(self, i: int) -> str:
        """Return the path of an input in the caller's body."""
        return self.field.path(i)

    @property
    def fields(self) -> str:
        """Name of the field that holds the inputs."""
        return self.field.name

    @property
    def given(self) -> Sequence[Sequence[str]]:
        """The texts that the caller has written, in lists."""
        return (self.texts,)

    @property
    def chars(self) -> int:
        """Approximate number of characters to encode."""
        return _chars(self.texts)

    @property
    def lengths(self) -> Sequence[int]:
        """Approximate number of characters of each input."""
        return text_lengths(self.texts)

    @property
    def all_texts(self) -> Sequence[str]:
        """All texts that the caller has written."""
        return self.texts

    def path_of_text(self, i: int) -> str:
        """Return the path in the caller's body of the text `all_texts[i]`."""
        return self.path(i)

    def with_texts(self, texts: Sequence[str]) -> TextInputs:
        """Return the inputs with their texts replaced by `texts`, which are in the order of `all_texts`."""
        return TextInputs(texts, self.field)


@dataclass(frozen=True, slots=True)
class IdsInputs:
    """Inputs as lists of token ids. Each list becomes one vector."""

    token_ids: Sequence[Sequence[int]]
    field: InputField

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def fields(self) -> str:
        """Name of the field that holds the inputs."""
        return self.field.name

    def path(self, i: int) -> str:
        """Return the path of an input in the caller's body."""
        return self.field.path(i)


@dataclass(frozen=True, slots=True)
class PairInputs:
    """Pairs of texts. Each pair gets a score. `first` has as many texts as `second`, or a single text, which is paired
    with each text of `second`."""

    first: Sequence[str]
    second: Sequence[str]
    first_field: InputField
    second_field: InputField

    def __len__(self) -> int:
        return len(self.second)

    def path(self, i: int) -> str:
        """Return the path of a pair's second text in the caller's body."""
        return self.second_field.path(i)

    @property
    def fields(self) -> str:
        """Name of the field that holds the second texts."""
        return self.second_field.name

    @property
    def given(self) -> Sequence[Sequence[str]]:
        """The texts that the caller has written, in lists."""
        return self.first, self.second

    @property
    def chars(self) -> int:
        """Approximate number of characters to encode. A text that all pairs share is encoded once."""
        return _chars(self.first) + _chars(self.second)

    @property
    def lengths(self) -> Sequence[int]:
        """Approximate number of characters of each input, without a text that all pairs share."""
        second = text_lengths(self.second)
        if len(self.first) == 1:
            return second
        return [sum(pair) for pair in zip(text_lengths(self.first), second, strict=True)]

    @property
    def all_texts(self) -> Sequence[str]:
        """All texts that the caller has written: first the texts of `first`, then those of `second`."""
        return joined(self.first, self.second)

    def path_of_text(self, i: int) -> str:
        """Return the field path of the text `all_texts[i]` in the caller's request body, for error messages."""
        at = len(self.first)
        return self.first_field.path(i) if i < at else self.second_field.path(i - at)

    def with_texts(self, texts: Sequence[str]) -> PairInputs:
        """Return the inputs with their texts replaced by `texts`, which are in the order of `all_texts`."""
        at = len(self.first)
        return PairInputs(texts[:at], texts[at:], self.first_field, self.second_field)

    def apart(self) -> SingleTexts:
        """Return each text of the pairs as an input of its own, for a model that makes a vector of each text."""
        return SingleTexts(self.first, self.second, self.first_field, self.second_field)


@dataclass(frozen=True, slots=True)
class SingleTexts(PairInputs):
    """The texts of pairs as single inputs, each of which becomes a vector. The order: the first texts of all pairs,
    then the second texts of all pairs."""

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @property
    def lengths(self) -> Sequence[int]:
        """Approximate number of characters of each input."""
        return [*text_lengths(self.first), *text_lengths(self.second)]

    def path(self, i: int) -> str:
        """Return the path of an input in the caller's body."""
        return self.path_of_text(i)

    def with_texts(self, texts: Sequence[str]) -> SingleTexts:
        """Return the inputs with their texts replaced by `texts`, which are in the order of `all_texts`."""
        at = len(self.first)
        return SingleTexts(texts[:at], texts[at:], self.first_field, self.second_field)


PoolingInputs = TextInputs | IdsInputs | PairInputs


def joined(first: Sequence[str], second: Sequence[str]) -> Sequence[str]:
    """Return one sequence with all texts of `first`, then all texts of `second`. The result is a PackedTexts if `first`
    or `second` is one."""
    if isinstance(first, PackedTexts) or isinstance(second, PackedTexts):
        return _packed(first) + _packed(second)
    return [*first, *second]


def _chars(texts: Sequence[str]) -> int:
    return texts.nbytes if isinstance(texts, PackedTexts) else sum(map(len, texts))


def text_lengths(texts: Sequence[str]) -> list[int]:
    """Return the approximate number of characters of each text."""
    return list(texts.lengths) if isinstance(texts, PackedTexts) else list(map(len, texts))


def _packed(texts: Sequence[str]) -> PackedTexts:
    return texts if isinstance(texts, PackedTexts) else PackedTexts.of(texts)


def packed(inputs: PoolingInputs) -> PoolingInputs:
    """Return inputs whose texts and token ids are packed into few large objects. Raises CallError for a token id that
    does not fit into 32 bits. Must not run on an event loop."""
    match inputs:
        case TextInputs(texts, where):
            return TextInputs(_packed(texts), where)
        case PairInputs(first, second, first_field, second_field):
            return type(inputs)(_packed(first), _packed(second), first_field, second_field)
        case IdsInputs(lists, where):
            try:
                return IdsInputs(PackedIds.of(lists), where)
            except OverflowError:
                raise _no_id(lists, where) from None


def _no_id(lists: Sequence[Sequence[int]], where: InputField) -> CallError:
    """Return the error for the first number in `lists` that cannot be a token id."""
    for i, numbers in enumerate(lists):
        for at, number in enumerate(numbers):
            if not 0 <= number < 2**32:
                path = f"{where.path(i)}{where.inner}[{at}]"
                return invalid(path, f"must be a token id of the vocabulary, got {number}")
    return invalid(where.name, "must hold token ids")


@frozen_dataclass
class PoolingRequest:
    """A parsed request for scores if `inputs` are pairs, else for embeddings."""

    model: str
    inputs: PoolingInputs
    dimensions: int | None = None
    dimensions_field: str = "dimensions"
    truncate_tokens: int | None = None
    """Number of tokens to which a longer input is cut; WHOLE_CONTEXT for the maximum context length. None: an input
    that exceeds the context is refused."""
    cache_salt: str = ""
    """This and the next three fields: see GenerationRequest."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    priority_class: str = ""
    affinity_key: str = ""


@frozen_dataclass
class ParsedPooling:
    """A parsed body: the request, and the options of the answer. `is_base64`: whether vectors are sent as base64 of
    their bytes. `top_n`: number of documents that are returned, 0 for all. `returns_documents`: whether the answer
    holds the documents' texts."""

    request: PoolingRequest
    is_base64: bool = False
    top_n: int = 0
    returns_documents: bool = True


def check_count(path: str, count: int) -> None:
    """Raise CallError if a list has no inputs or too many inputs. `path`: the path of the list in the body."""
    if not count:
        raise invalid(path, "must not be empty")
    if count > MAX_INPUTS:
        raise invalid(path, f"at most {MAX_INPUTS} inputs in one request, got {count}: send several requests")


def check_pairs(inputs: PairInputs) -> None:
    """Check the numbers of texts: there must be as many first texts as second texts, or one first text for all second
    texts. Raises CallError for other numbers, for a list without texts and for a list of too many texts."""
    check_count(inputs.first_field.name, len(inputs.first))
    check_count(inputs.second_field.name, len(inputs.second))
    if len(inputs.first) not in (1, len(inputs.second)):
        raise invalid(
            inputs.first_field.name,
            f"must hold one text or as many as {inputs.second_field.name} ({len(inputs.second)}); "
            f"holds {len(inputs.first)}",
        )


def too_long(path: str, tokens: int, most: int, surely: str = "") -> CallError:
    """Return the error for an input with more tokens than the model's context holds. `surely`: text before the number
    in the error: "at least " if `tokens` is a lower bound, else ""."""
    message = (
        f"{path}: has {surely}{tokens} tokens, the model's context holds {most}: shorten it, or have it cut "
        "(gRPC: truncate, HTTP: truncate_prompt_tokens, headrace: --truncate)"
    )
    return CallError(Outcome.CONTEXT_LENGTH_EXCEEDED, message, violations=[Violation(path, "too long")])
