"""Bounds on counted repetitions in regular expressions: in patterns of JSON schemas, and in grammars of kind `regex`.

The grammar compiler unrolls `?` and {m,n} into states. Each state may follow all earlier states, and nested counts
multiply. An expression with many such states takes minutes to compile, or slows down the first steps in which the
engine uses it. Both delay all requests of the engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_COUNT_IN_STATES = 128
"""Greatest count that is compiled to states; greater counts are compiled to a counter."""
MAX_COUNTED_POSITIONS = 256
"""Greatest number of positions (characters and classes) of a counted group after its repetitions are unrolled."""
MAX_VARIABLE_POSITIONS = 256
"""Greatest number of positions under `?` and {m,n} in all. 256 of them compile in 4 s with a vocabulary of 49,000."""
MAX_COUNTED_VARIABLE_POSITIONS = 32
"""Greatest number of positions of a counted group with `?` or {m,n} in it: (.?){32} compiles in 2 s, (.?){64} in
minutes."""
MAX_LOOPS = 128
"""Greatest number of `*` and `+`. (\\w+\\s*) 64 times in a row compiles in 7 s, 128 times in minutes."""

MAX_READ_COUNT = 10**9
"""Greatest count that is read from an expression. Every greater count is read as this count."""

TOKEN = re.compile(
    r"(?P<set>\[\^?(?:\\.|[^\]\\])*\])|(?P<count>\{\d+(?:,\d*)?\}|[*+?])|(?P<group>\((?:\?(?:[:=!>(#]|<[=!]|P?<\w+>|.))?)"
    r"|(?P<escape>\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|.))|(?P<other>.)",
    re.DOTALL,
)
"""The tokens of an expression: classes, quantifiers, beginnings of groups, escapes and other characters."""


def count_of(digits: str) -> int:
    """Return the number in `digits`, limited to MAX_READ_COUNT.

    Python's int refuses a number of thousands of digits.
    """
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) < 10 else MAX_READ_COUNT


class TooCostly(Exception):
    """An error for an expression that costs too much to compile. The message has the reason and the remedy."""


def count_problem(pattern: str) -> str:
    """Return why a regular expression costs too much to compile, with the remedy; empty if it does not.

    The returned text continues a sentence that begins with "the expression". Syntax is not checked. The check takes
    time linear in the expression's length.
    """
    counts = Counts()
    try:
        for token in TOKEN.finditer(pattern):
            text, kind = token.group(), token.lastgroup
            if kind == "count":
                if counts.repeats:  # otherwise the token makes the quantifier before it lazy
                    counts.repeat(text)
            elif kind == "group":
                counts.open()
            elif text in ("^", "$", "|"):
                counts.end_atom()
            elif text == ")":
                if counts.depth:
                    counts.close()
            else:
                counts.atom()
    except TooCostly as reason:
        return str(reason)
    return ""


@dataclass(slots=True)
class _Part:
    """A group or an atom of an expression: its number of positions, and whether it contains `?` or {m,n}."""

    positions: int = 0
    varies: bool = False

    def add(self, part: _Part) -> None:
        self.positions += part.positions
        self.varies |= part.varies


class Counts:
    """Counter of the positions in a regular expression. For each token of the expression, the caller calls the
    method for that kind of token.

    Each method raises TooCostly if the expression is too costly to compile.
    """

    def __init__(self) -> None:
        self._open = [_Part()]
        self._last: _Part | None = None  # what a quantifier would repeat
        self._variable = 0
        self._loops = 0

    @property
    def depth(self) -> int:
        """Number of groups that are open."""
        return len(self._open) - 1

    @property
    def repeats(self) -> bool:
        """Whether a quantifier may come next: the preceding token is an atom or a group."""
        return self._last is not None

    def atom(self) -> None:
        """Add a character, an escape or a class."""
        self._last = _Part(1)
        self._open[-1].add(self._last)

    def end_atom(self) -> None:
        """Record a token that no quantifier can repeat, such as the anchor `^`."""
        self._last = None

    def open(self) -> None:
        """Record the beginning of a group of the expression."""
        self._open.append(_Part())
        self._last = None

    def close(self) -> None:
        """End the innermost group."""
        self._last = self._open.pop()
        self._open[-1].add(self._last)

    def repeat(self, text: str) -> None:
        """Apply the quantifier `text` to the preceding atom or group."""
        part, self._last = self._last, None
        if part is None:
            return
        if text in "*+":
            self._loops += 1
            if self._loops > MAX_LOOPS:
                raise TooCostly(
                    f"has more than {MAX_LOOPS} `*` and `+`, which compiles for minutes; "
                    "group what is alike, as in (?:[a-z]+ )*"
                )
            return
        low, most = _bounds(text)
        positions = part.positions * most
        if most > 1 and (part.varies or part.positions > 1):
            self._counted_group(part, positions)
        if low != most and most <= MAX_COUNT_IN_STATES:
            self._variable += positions
            self._open[-1].varies = True
        self._open[-1].positions += positions - part.positions
        if self._variable > MAX_VARIABLE_POSITIONS:
            raise TooCostly(
                f"has more than {MAX_VARIABLE_POSITIONS} positions under `?` and {{m,n}}, which compiles for minutes; "
                "use `*` or `+`, or smaller counts"
            )

    def _counted_group(self, part: _Part, positions: int) -> None:
        if part.varies and positions > MAX_COUNTED_VARIABLE_POSITIONS:
            raise TooCostly(
                f"counts a group that has `?` or {{m,n}} in it to more than {MAX_COUNTED_VARIABLE_POSITIONS} "
                "positions, which compiles for minutes; use `*` or `+` for one of the two"
            )
        if positions > MAX_COUNTED_POSITIONS:
            raise TooCostly(
                f"unrolls a counted group to more than {MAX_COUNTED_POSITIONS} positions; repeat it fewer times"
            )


def _bounds(text: str) -> tuple[int, int]:
    """Return the least and the greatest number of repetitions that a quantifier allows.

    The quantifier is `?`, {m}, {m,n} or {m,}. For {m,}, which sets no greatest number, both numbers are max(1, m), the
    number of copies that the grammar compiler makes.
    """
    if text == "?":
        return 0, 1
    low, comma, high = text[1:-1].partition(",")
    least = count_of(low)
    return (least, count_of(high)) if high else (max(1, least), max(1, least)) if comma else (least, least)
