"""Detection of slow regular expressions in tokenizers. Tokenizers come with models and are not trusted.

Problem: the regex engine of the tokenizers library backtracks, so for `(a+)+$` the time doubles with each character.

An expression counts as possibly slow if it has one of three forms: a back reference; many repetitions in sequence; a
repeated group that contains a repetition or a choice. The test may also reject a fast expression. A tokenizer with a
rejected expression runs only in helper processes, which have a CPU limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

MAX_REPETITIONS: Final = 6
"""Upper bound on the repetitions in one alternative of a group. Each repetition multiplies the ways in which a text can
match."""
_UNBOUNDED = re.compile(r"[*+](?!\+)|\{\d*,\d*\}(?!\+)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]", re.DOTALL)


def expressions_of(layout: object) -> Iterator[str]:
    """Yield all regular expressions in the parsed contents of a tokenizer.json."""
    if isinstance(layout, dict):
        pattern = layout.get("Regex")
        if isinstance(pattern, str):
            yield pattern
        for part in layout.values():
            yield from expressions_of(part)
    elif isinstance(layout, list):
        for part in layout:
            yield from expressions_of(part)


def may_explode(pattern: str) -> bool:
    """Return whether an expression may keep a backtracking engine busy for a long time on a short text."""
    if re.search(r"\\[1-9]|\\k<|\(\?P=", pattern):
        return True
    groups: list[list[int]] = [[0, 0, 0]]  # repetitions in this alternative, most in one, alternatives - 1
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[" and (char_class := _CLASS.match(pattern, at)):
            at = char_class.end() - 1
        elif char == "(":
            groups.append([0, 0, 0])
        elif char == "|":
            groups[-1][0], groups[-1][2] = 0, groups[-1][2] + 1
        elif char == ")" and len(groups) > 1:
            _, most, choices = groups.pop()
            if _UNBOUNDED.match(pattern, at + 1) and (most or choices):
                return True
            groups[-1][0] += most
        elif _UNBOUNDED.match(pattern, at):
            groups[-1][0] += 1
        groups[-1][1] = max(groups[-1][1], groups[-1][0])
        if groups[-1][1] > MAX_REPETITIONS:
            return True
        at += 1
    return False
