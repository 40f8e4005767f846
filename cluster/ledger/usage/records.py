"""Records of a call: the open record when the call is submitted, and the usage record when the call ends.

Both records have a form in plain JSON. The `record_id` is chosen once, when the call opens, and is sent to the worker
in the sealed open record. Gateways and workers may report the end of a call several times and in any order. Every
report writes the same row of the database, found by `record_id`. An exact row is final. An estimated row is replaced by
an exact report or by a larger estimate. An estimate has `delivered_unknown` set: the call's gateway was lost, so the
tokens that the worker had written to the gateway's link count as delivered.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from operator import attrgetter
from typing import Any, TypeVar

from cluster.api.frozen import frozen_dataclass

R = TypeVar("R", "OpenRecord", "UsageRecord")

SEGMENTS_PER_RESUME = 1000
"""Offset of segment numbers per resume.

The `n` outputs of a call are segments 0, 1, … After the first resume, the outputs are segments SEGMENTS_PER_RESUME,
SEGMENTS_PER_RESUME + 1, … After the second resume, the outputs are segments 2 * SEGMENTS_PER_RESUME, … Only segment 0
counts as a request.
"""
MAX_ID = 128
MAX_NAME = 255
MAX_LABELS_BYTES = 8192
MAX_COUNT = 2**53


class RecordError(ValueError):
    """Error for an invalid record. The message names the field."""


@frozen_dataclass
class OpenRecord:
    """The fields that are known when a call is submitted. The call's worker keeps a sealed copy.

    `opened_at_s` is in seconds since the epoch.
    """

    record_id: str
    tenant: str
    key_id: str
    model: str
    version: str
    request_id: str
    opened_at_s: float
    adapter: str = ""
    segment: int = 0
    prompt_tokens: int = 0
    queue_s: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    gateway: str = ""
    trace_id: str = ""

    def __post_init__(self) -> None:
        _check(self)

    def as_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values. `from_json` is the inverse."""
        return _plain(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> OpenRecord:
        """Build a record from the value of `as_json`. Raises RecordError.

        Unknown fields are dropped, because a later release may have more fields.
        """
        return _build(OpenRecord, value)

    def to_usage_record(self, **counts: Any) -> UsageRecord:
        """Return the usage record of this call. `counts` has the other fields of UsageRecord."""
        return UsageRecord(**(_OPEN.values(self) | counts))


@frozen_dataclass
class UsageRecord:
    """The counts of an admitted call that has ended. Times are in seconds; `opened_at_s` counts from the epoch.

    `cached_tokens` is the number of prompt tokens that the engine found in its prefix cache. `predicted_cached_tokens`
    is the number that the call's gateway expected; None without a prediction and in records of older releases.
    `completion_tokens` were delivered and are billed; `generated_tokens` came from the engine. `reasoning_tokens` is
    the number of completion tokens that are reasoning; 0 in records of older releases, in records of outputs that did
    not end, and in records with `delivered_unknown`. `gpu` is the accelerator's type and determines the price of
    `gpu_seconds`. `outcome` is the value of an Outcome. `worker`, `pod` and `node` are the place where the call ended.
    `gateway` is the gateway that admitted the call. `trace_id` is the id of the call's trace, empty for a call that was
    not sampled and whose caller named no trace. Records of older releases have empty values for `worker`, `pod`, `node`
    and `gateway`.
    """

    record_id: str
    tenant: str
    key_id: str
    model: str
    version: str
    request_id: str
    opened_at_s: float
    outcome: str
    adapter: str = ""
    segment: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_cached_tokens: int | None = None
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    generated_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float | None = None
    duration_s: float = 0.0
    gpu: str = ""
    gpu_seconds: float = 0.0
    delivered_unknown: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    worker: str = ""
    pod: str = ""
    node: str = ""
    gateway: str = ""
    trace_id: str = ""

    def __post_init__(self) -> None:
        _check(self)
        if self.reasoning_tokens > self.completion_tokens:
            raise RecordError(
                f"reasoning_tokens: {self.reasoning_tokens} must not exceed completion_tokens, {self.completion_tokens}"
            )

    @property
    def day(self) -> str:
        """The UTC day on which the call opened, YYYY-MM-DD."""
        return datetime.datetime.fromtimestamp(self.opened_at_s, datetime.UTC).strftime("%Y-%m-%d")

    def as_json(self) -> dict[str, Any]:
        """Return all fields as plain JSON values. `from_json` is the inverse."""
        return _plain(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> UsageRecord:
        """Build a record from the value of `as_json`. Raises RecordError.

        Unknown fields are dropped, because a later release may have more fields.
        """
        return _build(UsageRecord, value)


class _Fields:
    """The fields of a record class, grouped by type.

    The groups are computed once per class, because every call makes two records.
    """

    def __init__(self, kind: type[OpenRecord] | type[UsageRecord]) -> None:
        types = {attribute.name: str(attribute.type) for attribute in dataclasses.fields(kind)}
        self.names = tuple(types)
        self.texts = tuple(name for name in types if types[name] == "str")
        self.counts = tuple(name for name in types if types[name] == "int")
        self.seconds = tuple(name for name in types if types[name] == "float")
        self.optional_counts = tuple(name for name in types if types[name] == "int | None")
        self.optional_seconds = tuple(name for name in types if types[name] == "float | None")
        self.values_of = attrgetter(*self.names)
        self.texts_of, self.counts_of = attrgetter(*self.texts), attrgetter(*self.counts)
        self.seconds_of = attrgetter(*self.seconds)

    def values(self, record: OpenRecord | UsageRecord) -> dict[str, Any]:
        """Return the record's values by field name."""
        return dict(zip(self.names, self.values_of(record), strict=True))


_INT, _FLOAT = {int}, {float}
_OPEN, _USAGE = _Fields(OpenRecord), _Fields(UsageRecord)
_NAMES = {OpenRecord: _OPEN.names, UsageRecord: _USAGE.names}


def _plain(record: OpenRecord | UsageRecord) -> dict[str, Any]:
    out = _fields(record).values(record)
    out["labels"] = dict(record.labels)
    return out


def _fields(record: OpenRecord | UsageRecord) -> _Fields:
    return _OPEN if type(record) is OpenRecord else _USAGE


def _build(kind: type[R], value: Mapping[str, Any]) -> R:
    try:
        return kind(**{name: value[name] for name in _NAMES[kind] if name in value})
    except TypeError as error:
        raise RecordError(f"a {kind.__name__} has a missing or mistyped field: {error}") from None


def _check(record: OpenRecord | UsageRecord) -> None:
    """Raise RecordError for values that a database would reject.

    The constructors call this function, so that the error reaches the caller that makes the record.
    """
    fields = _fields(record)
    texts, counts, seconds = fields.texts_of(record), fields.counts_of(record), fields.seconds_of(record)
    if not _are_plain(texts):
        for name, value in zip(fields.texts, texts, strict=True):
            _check_text(name, value, MAX_ID if name.endswith("_id") else MAX_NAME)
    if not _are_counts(counts):
        for name, value in zip(fields.counts, counts, strict=True):
            _check_count(name, value)
    if not _are_seconds(seconds):
        for name, value in zip(fields.seconds, seconds, strict=True):
            _check_seconds(name, value)
    for name in fields.optional_counts:
        if (value := getattr(record, name)) is not None:
            _check_count(name, value)
    for name in fields.optional_seconds:
        if (value := getattr(record, name)) is not None:
            _check_seconds(name, value)
    if not record.record_id or not record.tenant:
        raise RecordError("record_id and tenant must not be empty")
    if record.opened_at_s >= 253_402_300_800:
        raise RecordError("opened_at_s: must be before the year 10000")
    if record.labels:
        _check_labels(record.labels)


def _are_plain(texts: Sequence[Any]) -> bool:
    """Return whether all texts are short ASCII texts without NUL.

    The result is nearly always True, and then no text has to be checked individually.
    """
    try:
        joined = "".join(texts)
    except TypeError:  # not all are texts
        return False
    return joined.isascii() and "\0" not in joined and max(map(len, texts)) <= MAX_ID


def _are_counts(counts: Sequence[Any]) -> bool:
    """Return whether all counts are integers in the allowed range. If not, the caller checks each count."""
    return set(map(type, counts)) == _INT and min(counts) >= 0 and max(counts) < MAX_COUNT


def _are_seconds(seconds: Sequence[Any]) -> bool:
    """Return whether all values are finite floats of at least 0. If not, the caller checks each value."""
    return set(map(type, seconds)) == _FLOAT and min(seconds) >= 0 and sum(seconds) < math.inf  # NaN makes the sum NaN


def _check_labels(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        _check_text(f"labels[{key!r}]", value, MAX_LABELS_BYTES)
        _check_text("labels", key, MAX_NAME)
    if sum(len(key.encode()) + len(value.encode()) for key, value in labels.items()) > MAX_LABELS_BYTES:
        raise RecordError(f"labels: must not exceed {MAX_LABELS_BYTES} bytes in total")


def _check_count(name: str, count: object) -> None:
    if type(count) is not int or not 0 <= count < MAX_COUNT:
        raise RecordError(f"{name}: {count!r} must be an integer from 0 to 2**53 - 1")


def _check_seconds(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not is_number:
        raise RecordError(f"{name}: {value!r} must be a finite number of seconds, at least 0")


def _check_text(name: str, value: object, longest: int) -> None:
    if not isinstance(value, str):
        raise RecordError(f"{name}: {value!r} must be a text")
    if len(value) > longest:
        raise RecordError(f"{name}: must not exceed {longest} characters")
    if "\0" in value or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value)):
        raise RecordError(f"{name}: must not contain NUL or surrogate characters")
