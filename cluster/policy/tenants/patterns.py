"""Named patterns of a guard: validation of regular expressions, and a search in linear time.

Problem: a guard on a stream must hold back all text that may still become part of a match, and no text may slow the
guard down. So the length of the longest match of a pattern must be known, and the regular-expression engine must not
backtrack.

- The search uses RE2: linear time in the text for any pattern, no backreferences, no lookaround.
- The longest match is the width that Python's own parser computes. RE2 and Python differ in a few spellings. Such a
  spelling is translated, or rejected if its meaning differs (`a{,5}` is literal text to RE2).

Invariants: every match of an accepted pattern has 1 to `longest_match` characters. Whether a match begins at a position
depends only on these characters, the character before and the character after them (`\\b`, `^`, `$`).
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from re import _parser  # type: ignore[attr-defined]  # the standard library's width of a pattern has no public name

import re2

MAX_MATCH_CHARS = 512
MAX_PATTERNS = 100
MAX_SOURCE_CHARS = 2000
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

# RE2 spellings that Python's parser reads differently. Each spelling is replaced by a spelling of the same width (one
# character or none).
_SPELLINGS = re.compile(r"\\x\{[0-9A-Fa-f]+\}|\\[pP](?:\{[^}]*\}|.)|\\z|\\.|\[:\^?[a-z]+:\]", re.DOTALL)
_OPEN_COUNT = re.compile(r"\\.|(\{,\d*\})", re.DOTALL)


class PatternError(ValueError):
    """Raised for an invalid pattern. `name` is the name of the pattern, or "" if all patterns together are invalid."""

    def __init__(self, name: str, remedy: str) -> None:
        super().__init__(f"{name}: {remedy}" if name else remedy)
        self.name = name
        self.remedy = remedy


class Patterns:
    """Patterns that are searched together.

    The leftmost match wins. Of several matches at one position, the match of the pattern that is first by name wins.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        """Compile the patterns. Raises PatternError if a pattern is invalid or the patterns are too large together."""
        check_patterns(sources)
        sources = dict(sorted(sources.items()))  # JSON does not guarantee an order
        self.names: Sequence[str] = tuple(sources)
        self.longest = max(longest_match(source) for source in sources.values())
        self._each = [_compiled(source) for source in sources.values()]
        self._any = self._together(list(sources.values()))

    def _together(self, sources: Sequence[str]) -> re2._Regexp:
        try:
            return _compiled("|".join(f"(?:{source})" for source in sources))
        except re2.error as error:
            raise PatternError("", f"too much together: {_why(error)}; name fewer or shorter patterns") from None

    def find(self, text: str, start: int = 0) -> Iterator[tuple[int, int]]:
        r"""Yield (begin, end) of matches from `start` on. `\b` and `^` take the text before `start` into account."""
        for match in self._any.finditer(text, start):
            yield match.span()

    def name_at(self, text: str, start: int) -> str:
        """Return the name of the pattern that matches at `start`. `start` must be the beginning of a match that `find`
        yielded."""
        before = min(start, 1)
        near = text[start - before : start + self.longest + 1]
        names = (name for name, each in zip(self.names, self._each, strict=True) if each.match(near, before))
        return next(names)

    def __repr__(self) -> str:
        return f"Patterns({', '.join(self.names)}; at most {self.longest} characters)"


@functools.lru_cache(maxsize=1024)
def patterns_of(sources: tuple[tuple[str, str], ...]) -> Patterns:
    """Return patterns from pairs of (name, expression).

    The result is cached, because all policies are rebuilt whenever one policy changes.
    """
    return Patterns(dict(sources))


def check_patterns(sources: Mapping[str, str]) -> None:
    """Raise PatternError for the first invalid pattern."""
    if not sources:
        raise PatternError("", "names no pattern; write name: expression")
    if len(sources) > MAX_PATTERNS:
        raise PatternError("", f"at most {MAX_PATTERNS} patterns in one guard, got {len(sources)}")
    for name, source in sources.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise PatternError(str(name)[:64], "a pattern's name has 1 to 63 of a-z, 0-9, '-' and '_'")
        if not isinstance(source, str):
            raise PatternError(name, f"must be a regular expression in quotes, not {source!r}")
        try:
            longest_match(source)
        except PatternError as error:
            raise PatternError(name, error.remedy) from None


@functools.lru_cache(maxsize=4096)
def longest_match(source: str) -> int:
    """Maximum number of characters of a match. Raises PatternError if the number is above the limit or unknown."""
    if not 1 <= len(source) <= MAX_SOURCE_CHARS:
        raise PatternError("", f"must have 1 to {MAX_SOURCE_CHARS} characters")
    try:
        _compiled(source)
    except re2.error as error:
        raise PatternError("", f"is no pattern that RE2 serves: {_why(error)}") from None
    if any(match[1] for match in _OPEN_COUNT.finditer(source)):
        raise PatternError("", "write {0,n} for {,n}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            least, most = _parser.parse(_SPELLINGS.sub(_as_python, source)).getwidth()
    except (re.error, FutureWarning, DeprecationWarning, RecursionError, OverflowError) as error:
        raise PatternError("", f"its longest match cannot be known: {error}; write it more plainly") from None
    if not least:
        raise PatternError("", "can match the empty text; require a character")
    if most > MAX_MATCH_CHARS:
        many = "without bound" if most > 10**9 else f"{most} characters"
        raise PatternError(
            "", f"its longest match is {many}, {MAX_MATCH_CHARS} are allowed: write {{1,64}} for + and {{0,64}} for *"
        )
    return int(most)


def _as_python(spelling: re.Match[str]) -> str:
    text = spelling[0]
    if text == r"\z":
        return r"\Z"
    return "a" if text.startswith((r"\x{", r"\p", r"\P", "[:")) else text


def _compiled(source: str) -> re2._Regexp:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return re2.compile(source, options)


def _why(error: Exception) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
