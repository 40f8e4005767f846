"""Tests of guard patterns: only patterns with a known maximum length are accepted, and searches take linear time."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cluster.policy.tenants.patterns import MAX_MATCH_CHARS, PatternError, Patterns, longest_match
from tests.support.cpu import cpu_within

ATOMS = st.sampled_from(["a", "b", "é", "1", " ", "[ab]", "[^a]", r"\d", r"\w", r"\b", r"\B", ".", "^", "$", r"[1é]"])
COUNTS = st.sampled_from(["", "", "?", "??", "{2}", "{1,3}", "{1,3}?", "{0,2}"])


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    joined = st.lists(inner, min_size=1, max_size=3).map("".join)
    return joined | st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})")


def _counted(pair: tuple[str, str]) -> str:
    atom, count = pair
    return atom if atom in ("^", "$", r"\b", r"\B") else atom + count


EXPRESSIONS = st.recursive(st.tuples(ATOMS, COUNTS).map(_counted), _grown, max_leaves=8)
"""Strategy for expressions with the same meaning in Python (with re.ASCII, and texts without newlines) and in RE2."""


@st.composite
def accepted(draw: st.DrawFn) -> str:
    """Draw a valid pattern."""
    source = draw(EXPRESSIONS)
    try:
        longest_match(source)
    except PatternError:
        assume(False)
    return source


TEXTS = st.text("ab1é x", max_size=40)


@given(st.dictionaries(st.sampled_from("pqr"), accepted(), min_size=1), TEXTS)
def test_matches_are_those_of_python(sources: dict[str, str], text: str) -> None:
    """The matches equal those of Python's regex engine, and no match is longer than `longest`."""
    patterns = Patterns(sources)
    together = "|".join(f"(?P<{name}>{source})" for name, source in sorted(sources.items()))
    wanted = [(*match.span(), match.lastgroup) for match in re.finditer(together, text, re.ASCII)]
    found = [(start, end, patterns.name_at(text, start)) for start, end in patterns.find(text)]
    assert found == wanted
    assert all(0 < end - start <= patterns.longest for start, end, _ in found)


@pytest.mark.parametrize(
    ("source", "longest"),
    [
        (r"\d{3}-\d{2}-\d{4}", 11),
        ("(?i)secret|hidden", 6),
        (r"\p{L}{1,10}\pN", 11),
        (r"[[:alpha:]_]{2}", 2),
        (r"\x{1F600}", 1),
        (r"a\z", 1),
        (r"\{,5}", 4),
        ("é{1,4}", 4),
        ("(?P<x>a)(?P<y>b)", 2),
    ],
)
def test_the_longest_match_is_known(source: str, longest: int) -> None:
    """For a guard's pattern, the computed length of the longest match is right, even for regex syntax that Python
    lacks.

    If it were wrong, a stream could deliver a part of a match.
    """
    assert longest_match(source) == longest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a+", "without bound"),
        ("(?s).*x", "without bound"),
        ("a{1,}", "without bound"),
        (f"a{{1,{MAX_MATCH_CHARS + 1}}}", f"{MAX_MATCH_CHARS + 1} characters"),
        ("a{0,3}", "empty text"),
        (r"\b", "empty text"),
        ("a{,5}", "{0,n}"),
        ("(a", "RE2"),
        (r"(?=a)b", "RE2"),
        (r"(a)\1", "RE2"),
        ("(a{0,50}){0,50}b", "RE2"),
        ("", "1 to"),
        ("a" * 2001, "1 to"),
        (r"\C", "cannot be known"),
    ],
)
def test_what_cannot_be_a_pattern(source: str, message: str) -> None:
    """A pattern is refused if it could hold back a stream without bound, or if it could be slow. The error names a
    remedy."""
    with pytest.raises(PatternError, match=re.escape(message)):
        longest_match(source)


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        ({}, ""),
        ({"Upper": "a"}, "Upper"),
        ({"": "a"}, ""),
        ({"x": 5}, "x"),
        ({"ok": "a", "bad": "a*b"}, "bad"),
        ({f"p{i}": "a" for i in range(101)}, ""),
        ({f"p{i}": r"\pL{1,50}\d{1,50}[^x]{1,100}" for i in range(100)}, ""),
    ],
)
def test_the_wrong_one_is_named(sources: dict[str, str], name: str) -> None:
    """If one of several patterns is invalid, the error names it."""
    with pytest.raises(PatternError) as caught:
        Patterns(sources)
    assert caught.value.name == name


def test_a_text_made_to_be_slow_is_not() -> None:
    """A text that is very slow for a backtracking matcher is searched in less than a second (usually in about 0.01
    s)."""
    patterns = Patterns({"slow": "(?:a|aa|a?a){1,30}!", "card": r"\b(?:\d[ -]?){13,19}\b"})
    with cpu_within(1.0):
        assert list(patterns.find("a" * 100_000)) == []
