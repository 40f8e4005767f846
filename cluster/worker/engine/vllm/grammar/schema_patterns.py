"""Regular expressions in JSON schemas: a check that the grammar compiler enforces all of an expression's syntax.

xgrammar matches a pattern against the text between a JSON string's quotes. It ignores look-ahead, and anchors inside an
expression. It reads some escapes as letters. In some expressions it confuses a `*` with a large count that follows.

A `.` or a class may match quotes, backslashes and control characters. Usually xgrammar excludes these characters from
the compiled grammar. For some expressions it cannot exclude them: the output may then contain them unescaped, and is
not valid JSON.

Expressions with one of these problems are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.worker.engine.vllm.grammar.pattern_counts import MAX_COUNT_IN_STATES, TOKEN, Counts, TooCostly, count_of

MAX_WIDE_COUNT = MAX_COUNT_IN_STATES
"""Greatest count in an expression that has a class with quotes, backslashes or control characters: xgrammar compiles
expressions with greater counts to a grammar that produces these characters unescaped."""

_LONG_HEX = re.compile(r"(?<!\\)(?:\\\\)*(\\x[0-9A-Fa-f]{2})[0-9A-Fa-f]")
"""An escape of two hexadecimal digits, followed by another such digit. In wide expressions (_Reader.is_wide) and in
expressions with characters outside ASCII, xgrammar reads the following digit as a part of the escape."""
_STAR = re.compile(r"\*|\{0*,\}")
_COUNTS = re.compile(r"[{,](\d+)(?=[,}])")
_MEMBER = re.compile(r"\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\.|.", re.DOTALL)
_SETS = frozenset("dDwWsS")
_WIDE_SETS = frozenset("DWSs")
"""Escape letters of the character sets that include quotes, backslashes or control characters, such as `s`."""
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "b": "\b"}
_NAMED = {
    "b": "word boundaries",
    "B": "word boundaries",
    "k": "back references",
    "p": "Unicode classes",
    "P": "Unicode classes",
    **dict.fromkeys("AZzG", "anchors other than ^ and $"),
    **dict.fromkeys("123456789", "back references"),
}
_LOOKS = {"(?=": "look-ahead", "(?!": "look-ahead", "(?<=": "look-behind", "(?<!": "look-behind"}


class _Refused(Exception):
    """An error for an expression that the compiler does not enforce. The message has the reason and the remedy."""


def pattern_problem(pattern: str) -> str:
    """Return why the compiler does not enforce a regular expression, with the remedy; empty if it does.

    The returned text continues a sentence that begins with "the expression". The check takes time linear in the
    expression's length.
    """
    try:
        wide = _Reader(pattern).is_wide()
    except (_Refused, TooCostly) as refusal:
        return str(refusal)
    if (wide or not pattern.isascii()) and (long := _LONG_HEX.search(pattern)):
        return (
            f"has {long[1]} before a hexadecimal digit, which would be read as a part of it; write it as "
            f"\\u00{long[1][2:]}"
        )
    if not wide:
        return ""
    if not pattern.isascii():
        return (
            "has characters outside ASCII beside `.` or a class that includes quotes, backslashes or control "
            "characters, which would be produced unescaped; write these characters as \\uXXXX"
        )
    if any(count_of(count) > MAX_WIDE_COUNT for count in _COUNTS.findall(pattern)):
        return (
            f"has a count above {MAX_WIDE_COUNT} beside `.` or a class that includes quotes, backslashes or control "
            "characters, which would be produced unescaped; name the characters that are allowed, as in [A-Za-z0-9 ,.]"
        )
    return ""


class _Reader:
    """A single pass over the tokens of an expression."""

    def __init__(self, pattern: str) -> None:
        self._tokens = list(TOKEN.finditer(pattern))
        self._wide = self._has_star = False
        self._counts = Counts()

    def is_wide(self) -> bool:
        """Return whether the expression is wide: whether it may match quotes, backslashes or control characters.

        A wide expression has a `.`, a negated class, or a class or set that includes these characters. Raises _Refused
        or TooCostly for an expression that is refused.
        """
        previous = ""
        for number, token in enumerate(self._tokens):
            text, kind = token.group(), token.lastgroup
            if kind == "count":
                previous = self._count(text, previous)
                continue
            if kind == "group":
                self._group(text)
                self._counts.open()
            elif kind == "other":
                self._other(text, number)
            else:
                self._set(text) if kind == "set" else self._escape(text)
                self._counts.atom()
            previous = ""
        if self._counts.depth:
            raise _Refused("has a group that is not closed; close it with `)`")
        return self._wide

    def _count(self, text: str, previous: str) -> str:
        """Return the quantifier `text` after its count was checked.

        There is one exception: a `?` that only makes the quantifier `previous` lazy is no quantifier, so the
        result is "".
        """
        if not self._counts.repeats:
            if text == "?" and previous:
                return ""
            raise _Refused(f"has `{text}` where nothing can be repeated; escape it, or group what it repeats")
        self._counts.repeat(text)
        if self._has_star and any(count_of(count) > MAX_WIDE_COUNT for count in _COUNTS.findall(text)):
            raise _Refused(
                f"has a count above {MAX_WIDE_COUNT} behind `*`, where the compiler mixes both up; use `+` instead of "
                "`*`, or a smaller count"
            )
        self._has_star |= _STAR.fullmatch(text) is not None
        return text

    def _group(self, text: str) -> None:
        if text in _LOOKS:
            raise _Refused(f"uses {_LOOKS[text]}, which is not supported; write the expression without it")
        if text not in ("(", "(?:") and not text.endswith(">"):
            raise _Refused(f"uses a group of the kind `{text}`, which is not supported; write it as (?:...)")
        if text == "(?>":
            raise _Refused("uses an atomic group, which is not supported; write it as (?:...)")

    def _set(self, text: str) -> None:
        negated = text.startswith("[^")
        members = list(_members(text[2 if negated else 1 : -1]))
        if not members:
            raise _Refused("has an empty class; name its characters, and write `]` in a class as \\]")
        includes = any(_has_special(low, high) for low, high in members)
        if not negated and all(_is_special(low, high) for low, high in members):
            raise _Refused(_SPECIAL)
        self._wide |= negated or includes

    def _escape(self, text: str) -> None:
        letter = text[1:2]
        if letter in _NAMED:
            raise _Refused(f"uses {_NAMED[letter]} ({text}), which are not supported; write it without them")
        if letter in _SETS and len(text) == 2:
            self._wide |= letter in _WIDE_SETS
            return
        low, high = _character(text), _character(text)
        if _is_special(low, high):
            raise _Refused(_SPECIAL)

    def _other(self, text: str, number: int) -> None:
        """Check a character of the pattern that belongs to no class, group, quantifier or escape.

        `text`: the character. `number`: its position in the list of the pattern's tokens.
        """
        if text in _MISPLACED:
            raise _Refused(_MISPLACED[text])
        if text in "^$|":
            self._counts.end_atom()
            if text != "|":
                self._anchor(text, number)
        elif text == ")":
            if not self._counts.depth:
                raise _Refused("has a `)` without `(`; escape it as \\)")
            self._counts.close()
        else:
            self._wide |= text == "."
            if _is_special(ord(text), ord(text)):
                raise _Refused(_SPECIAL)
            self._counts.atom()

    def _anchor(self, text: str, number: int) -> None:
        beside = number - 1 if text == "^" else number + 1
        at_edge = not 0 <= beside < len(self._tokens) or self._tokens[beside].group() == "|"
        if self._counts.depth or not at_edge:
            raise _Refused(f"has `{text}` inside, where the compiler ignores it; anchor only its beginning and its end")


_MISPLACED = {
    "{": "has a `{` that begins no count; escape it as \\{",
    "[": "has a class that is not closed; escape `[` as \\[",
    "]": "has a `]` without `[`; escape it as \\]",
    "\\": "ends with a backslash; escape it as \\\\",
}
_SPECIAL = (
    "needs a quote, a backslash or a control character, which cannot be produced under a pattern; "
    "leave these characters out"
)


def _members(text: str) -> Iterator[tuple[int, int]]:
    """Yield the members of a character class as ranges of code points.

    An escape for a set of characters (such as `w` for word characters) yields one range. The range has all
    code points if the set includes quotes, backslashes or control characters. Otherwise it has only the letter
    `a`, which stands for any harmless character.
    """
    tokens = _MEMBER.findall(text)
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token[0] == "\\" and token[1:] in _SETS:
            yield (ord("a"), ord("a")) if token[1] not in _WIDE_SETS else (0, 0x10FFFF)
        elif at + 2 < len(tokens) and tokens[at + 1] == "-":
            ends = token, tokens[at + 2]
            low, high = (0, -1) if ends[1][1:] in _SETS else (_character(ends[0]), _character(ends[1]))
            if low > high:
                raise _Refused(f"has the range {ends[0]}-{ends[1]} in a class, which is empty; name it low-high")
            yield low, high
            at += 2
        else:
            yield _character(token), _character(token)
        at += 1


def _character(text: str) -> int:
    """Return the code point of a plain or escaped character.

    Raises _Refused for an escape that names no single character.
    """
    if text[0] != "\\" or len(text) == 1:
        return ord(text[0])
    letter = text[1]
    if len(text) > 2:
        code = int(text[2:], 16)
        if 0xD800 <= code < 0xE000:
            raise _Refused(f"has half of a surrogate pair ({text}); write the character itself")
        return code
    if letter in _CONTROLS:
        return ord(_CONTROLS[letter])
    if letter.isalnum():
        raise _Refused(f"has the escape {text}, which is not supported; write the character itself or \\uXXXX")
    return ord(letter)


def _has_special(low: int, high: int) -> bool:
    return low < 0x20 or low <= ord('"') <= high or low <= ord("\\") <= high


def _is_special(low: int, high: int) -> bool:
    return high < 0x20 or (low == high and chr(low) in '"\\')
