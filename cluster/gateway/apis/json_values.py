"""Checks of JSON from callers: valid Unicode, and bounds on the nesting and on the number of values.

Problem: a JSON parser builds an object for every two bytes of `[[],[],...]`. Each object takes 60 times the size of its
two bytes, and building the object holds the interpreter lock for a tenth of a microsecond. The values of a long text
are therefore counted before the text is parsed. The first step searches for single characters, at one or two
nanoseconds a byte. The result is an upper bound on the number of values, which suffices for ordinary texts. In other
texts, values outside of strings are counted exactly.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from cluster.api.outcomes import CallError, invalid

MAX_DEPTH: Final = 128
"""Upper bound on the nesting of objects and arrays, since the code that renders and checks values is recursive."""
COUNTED_BYTES: Final = 16_384
"""Length in bytes above which the values of a text are counted before the text is parsed. A shorter text holds too few
values to matter."""
MAX_SEARCHED_BYTES: Final = 32_768
"""Upper bound in bytes on a text with invalid UTF-8 in which the path of the invalid string is searched. The search
takes a microsecond a byte."""
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")
NO_UNICODE: Final = "the text is not valid Unicode (a lone surrogate): send well-formed text"
_UTF8_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class JsonBounds:
    """Upper bounds on the contents of one JSON text. `containers`: objects and arrays. `strings`: strings, member names
    included. `values`: all values."""

    containers: int
    strings: int
    values: int


PIECE_BYTES: Final = 65_536
"""Number of bytes that are processed together. A piece of this size stays in the processor's cache."""
MAX_IDS: Final = 2_097_152
BODY: Final = JsonBounds(containers=40_000, strings=200_000, values=MAX_IDS)
"""Bounds on the body of a request. They allow ten thousand messages with parts, or two million token ids."""
MESSAGES: Final = JsonBounds(containers=32_000, strings=100_000, values=200_000)
PROMPTS: Final = JsonBounds(containers=1000, strings=1000, values=MAX_IDS)
ARGUMENTS: Final = JsonBounds(containers=10_000, strings=20_000, values=100_000)
"""Bounds on template arguments, tool call arguments, a JSON schema and any other field."""


class NotText(CallError):
    """Raised for a long text with invalid UTF-8. `at`: the offset of the first invalid byte."""

    def __init__(self, path: str, at: int) -> None:
        error = invalid(path, f"is not JSON: invalid UTF-8 at byte {at}; send UTF-8")
        super().__init__(error.outcome, error.message, violations=error.violations)


class NotJson(CallError):
    """Raised for a text that is valid Unicode but not JSON."""

    def __init__(self, path: str, why: object) -> None:
        error = invalid(path or "body", f"is not JSON: {why}")
        super().__init__(error.outcome, error.message, violations=error.violations)


def parse(path: str, text: bytes | str, bounds: JsonBounds | None = ARGUMENTS, levels: int = MAX_DEPTH) -> Any:
    """Parse the JSON text of the field `path`. Raises CallError, which names the invalid value. `levels`: deepest
    allowed nesting."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text.removeprefix(_UTF8_MARK)
    if bounds is not None:  # None: the caller has counted the values already
        check_counts(path, data, bounds)
    if len(data) > COUNTED_BYTES:
        from cluster.gateway.apis.large_json import decode  # not at the start: deferred_imports.py

        if (decoded := decode(data)) is not None:
            if is_deeper(decoded[0], levels):
                raise _too_deep(path)
            return decoded[0]
    try:
        characters, has_surrogates = data.decode(), False
    except UnicodeDecodeError as error:
        if len(data) > MAX_SEARCHED_BYTES:
            raise NotText(path or "body", error.start) from None
        characters, has_surrogates = _with_surrogates(path, data, error.start), True
    try:
        value = json.loads(characters)
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:  # invalid JSON, or a number of thousands of digits
        why = "it is UTF-16 or UTF-32: send UTF-8" if "\0" in characters[:4] else error
        raise NotJson(path, why) from None
    if data.count(b"[") + data.count(b"{") > levels and is_deeper(value, levels):
        raise _too_deep(path)
    if (has_surrogates or _ESCAPED_SURROGATE.search(data)) and (where := surrogate_path(value, path)) is not None:
        raise invalid(where or "body", NO_UNICODE)
    return value


def _with_surrogates(path: str, data: bytes, at: int) -> str:
    """Decode bytes that are UTF-8 except for lone surrogates. Raises CallError if anything else is invalid."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise invalid(path or "body", f"is not JSON: invalid UTF-8 at byte {at}; send UTF-8") from None


def _too_deep(path: str) -> CallError:
    return invalid(path or "body", f"is nested too deeply; at most {MAX_DEPTH} levels")


def check_counts(path: str, data: bytes, bounds: JsonBounds) -> None:
    """Raise CallError for a text that exceeds the bounds. The text is not parsed and need not be JSON. Takes linear
    time."""
    if len(data) <= COUNTED_BYTES:
        return
    if not _has_more_separators(data, min(bounds.containers, bounds.strings, bounds.values)):
        return
    if _within(bounds, data, data.count(b'"') // 2):
        return
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    strings = unescaped.count(b'"') // 2
    if strings > bounds.strings:
        raise _too_full(path, strings, "strings and names", bounds.strings)
    outside_strings = b"".join(unescaped.split(b'"')[::2])
    if not _within(bounds, outside_strings, strings):
        containers = outside_strings.count(b"[") + outside_strings.count(b"{")
        if containers > bounds.containers:
            raise _too_full(path, containers, "objects and arrays", bounds.containers)
        raise _too_full(path, outside_strings.count(b",") + containers, "values", bounds.values)


def check_utf8(data: bytes | bytearray | memoryview) -> None:
    """Raise UnicodeDecodeError for bytes that are not UTF-8. The bytes are decoded in pieces, since decoding the whole
    text at once would take more memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for at in range(0, len(data), PIECE_BYTES):
            decoder.decode(bytes(data[at : at + PIECE_BYTES]))
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        str(data, "utf-8")  # raises with the position in the whole text
        raise


def _has_more_separators(data: bytes, most: int) -> bool:
    """Return whether a text has more than `most` characters that begin or separate values."""
    count = 0
    for at in range(0, len(data), PIECE_BYTES):
        piece = data[at : at + PIECE_BYTES]
        count += len(piece) - len(piece.translate(None, b'[{,"'))
        if count > most:
            return True
    return False


def _within(bounds: JsonBounds, text: bytes, strings: int) -> bool:
    containers = text.count(b"[") + text.count(b"{")
    commas = text.count(b",")
    return strings <= bounds.strings and containers <= bounds.containers and commas + containers <= bounds.values


def _too_full(path: str, count: int, what: str, most: int) -> CallError:
    return invalid(path or "body", f"holds {count} {what}; at most {most} are allowed: send less")


def is_deeper(value: object, levels: int) -> bool:
    """Return whether objects and arrays are nested more than `levels` deep."""
    level: list[Any] = [value] if type(value) is dict or type(value) is list else []
    for _ in range(levels):
        if not level:
            return False
        inner: list[Any] = []
        for outer in level:
            values = outer.values() if type(outer) is dict else outer
            inner += [item for item in values if type(item) is dict or type(item) is list]
        level = inner
    return bool(level)


def surrogate_path(value: object, at: str) -> str | None:
    """Return the path of the first string with a lone surrogate; None if there is none. `at`: the path of `value`."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return next(_surrogate_paths(value, at), at)
    return None


def _surrogate_paths(value: object, at: str) -> Iterator[str]:
    if isinstance(value, str):
        if _SURROGATE.search(value) is not None:
            yield at
    elif isinstance(value, dict):
        if any(_SURROGATE.search(key) is not None for key in value):
            yield at
        for key, item in value.items():
            if isinstance(item, str | dict | list):
                yield from _surrogate_paths(item, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if isinstance(item, str | dict | list):
                yield from _surrogate_paths(item, f"{at}[{i}]")


def kind(value: object) -> str:
    """Return the JSON type of a value with an article, such as "an array", for error messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"
