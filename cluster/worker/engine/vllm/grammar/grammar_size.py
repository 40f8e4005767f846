"""Estimate of a compiled grammar's size. A grammar that is too large is refused before an engine spends minutes on it.

vLLM compiles grammars on a thread of its engine core, the process that also schedules all requests. The following was
measured with a vocabulary of 49,000 tokens. In a JSON schema, each string with a length bound or a pattern costs 0.5 to
1 s of CPU time, whatever the bound; everything else is cheap. In a regular expression, counted repetitions are unrolled
to positions, one for each character or class, and nested repetitions multiply: `(a{1,1000}){1,1000}` has 20 characters
and a million positions. 45,000 positions took 12 s and 400 MB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cluster.worker.engine.vllm.grammar.pattern_counts import MAX_READ_COUNT, count_of

MAX_REGEX_POSITIONS = 10_000
MAX_BOUNDED_STRINGS = 64

_COUNTED = re.compile(r"\{(\d+)(,)?(\d*)\}")
_NO_ATOM = frozenset("*+?|")


def regex_positions(pattern: str) -> int:
    """Return the number of characters and character classes in a regular expression after its counted repetitions
    are unrolled.

    A repetition adds at most MAX_READ_COUNT to the number. No error is raised for bad syntax, since the grammar
    compiler reports it.
    """
    sums = [0]  # one running sum for each open group
    last = 0  # positions of the previous atom, which a quantifier would repeat
    at = 0
    while at < len(pattern):
        character = pattern[at]
        if character == "(":
            sums.append(0)
            last = 0
        elif character == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
        elif character == "{" and (counted := _COUNTED.match(pattern, at)):
            times = max(count_of(counted[1]), count_of(counted[3] or "0"), 1)
            repeated = min(last * times, MAX_READ_COUNT)
            sums[-1] += max(repeated - last, 0)
            last = repeated
            at = counted.end() - 1
        elif character not in _NO_ATOM:
            at = _end_of_atom(pattern, at)
            last = 1
            sums[-1] += 1
        at += 1
    return sum(sums)


def _end_of_atom(pattern: str, at: int) -> int:
    """Return the index of the last character of the atom that begins at index `at` of a regular expression.

    An atom is an escape, a character class in brackets, or a single character.
    """
    if pattern[at] == "\\":
        return min(at + 1, len(pattern) - 1)
    if pattern[at] != "[":
        return at
    at += 2 if pattern[at + 1 : at + 2] == "^" else 1
    at += pattern[at : at + 1] == "]"  # a `]` that is the first character of a class is a member
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return min(at, len(pattern) - 1)


def bounded_strings(schema: Any) -> list[str]:
    """Return one entry for each string in a JSON schema that has a pattern or a length bound.

    The entry is the string's pattern; "" if the string has only a length bound.
    """
    if isinstance(schema, list):
        return [pattern for part in schema for pattern in bounded_strings(part)]
    if not isinstance(schema, Mapping):
        return []
    patterns = [inner for part in schema.values() for inner in bounded_strings(part)]
    pattern = schema.get("pattern")
    if isinstance(pattern, str) or any(isinstance(schema.get(key), int) for key in ("minLength", "maxLength")):
        patterns.append(pattern if isinstance(pattern, str) else "")
    return patterns
