"""Regular expressions in JSON schemas: each is refused, or every output matches it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.worker.engine.vllm.grammar.schema_patterns import pattern_problem
from tests.support.grammar_samples import compiled, problem, samples

REFUSED = (
    *(("(?=a)b", "look-ahead"), ("(?!a)b", "look-ahead"), ("(?<=a)b", "look-behind"), ("(?<!a)b", "look-behind")),
    *(
        (r"\bword", "word boundaries"),
        (r"(a)\1", "back references"),
        (r"\k<a>", "back references"),
        (r"\pL", "classes"),
    ),
    *(("a^b", "`^` inside"), ("a$b", "`$` inside"), ("(^a|b$)c", "inside"), (r"\Aa", "anchors"), ("(?i)a", "group")),
    *(('a"b', "needs a quote"), (r"\\", "needs a quote"), (r"\n", "control"), (r"\x01", "control"), ("\t", "control")),
    *((r"[\n\t]", "control"), ("é.", "outside ASCII"), ("é[^a]", "outside ASCII"), (r"é\S", "outside ASCII")),
    *((r"\s[é-ü]", "outside ASCII"), (r"[\sé]", "outside ASCII"), (r"\s{200}", "above 128")),
    *((r"\x41aé", "hexadecimal digit"), (r".\x41a", "hexadecimal digit")),
    *(("a*b{130}", "behind `*`"), ("(?:ab){0,}c{1,130}", "behind `*`")),
    *(
        ("[^b]{0,129}", "above 128"),
        (".{200}", "above 128"),
        (r"\e", "escape"),
        (r"\cA", "escape"),
        ("[]a]", "empty class"),
    ),
    *(("a**", "repeated"), ("*a", "repeated"), ("a++", "repeated"), ("a{,2}", "begins no count"), ("{", "count")),
    *(
        ("(a", "not closed"),
        ("a)", "without"),
        ("[a", "not closed"),
        ("a]", "without"),
        ("a\\", "backslash"),
        ("[z-a]", "range"),
    ),
    *(("(.?){64}", "counts a group"), ("((a|b?)c){17}", "counts a group"), ("(ab){129}", "unrolls a counted group")),
    *(("[a-z]?" * 257, "under `?`"), (".{0,100}a{2,3}.{0,99}b.{0,99}", "under `?`")),
    *(("(.{0,100}){0,20}", "counts a group"), (r"\ud83d", "surrogate"), (r"[a-\d]", "range"), ("(?>a)", "group")),
)
ACCEPTED = (
    *(
        "^[a-z]+$",
        "a|b",
        "^a|b$",
        r"^\d{4}-\d{2}$",
        "(?:ab)+?",
        "(?<year>[0-9]{4})",
        r"[\w.-]+@\w+",
        ".*",
        "[^b]{0,128}",
    ),
    *(
        "[a-z]{0,500}",
        "é+",
        "[一-龥]{2}",
        r"\u00e9.",
        r"\/\-\.\_",
        r"[\]\\a]",
        r"[^\"\\]+",
        "a{2}",
        "x*?y??",
        "()",
        "}",
        "(a|)",
    ),
)


@pytest.mark.parametrize(("pattern", "says"), REFUSED)
def test_what_is_not_enforced_is_refused(pattern: str, says: str) -> None:
    """The refusal names the part of the expression that is not enforced."""
    assert says in pattern_problem(pattern)


@pytest.mark.parametrize("pattern", ACCEPTED)
def test_outputs_match(pattern: str) -> None:
    """Outputs of an accepted expression's grammar are JSON strings that match the expression."""
    assert not pattern_problem(pattern)
    _holds(pattern)


def _holds(pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    for output in samples(compiled(schema), seed=3, count=10, longest=600):
        assert not problem(schema, output), (pattern, output)


PIECES = (
    *(
        "a",
        "b",
        "-",
        " ",
        "é",
        "/",
        "}",
        "]",
        '"',
        ".",
        "^",
        "$",
        "|",
        "(",
        "(?:",
        "(?=",
        ")",
        "*",
        "+",
        "?",
        "{2}",
        "{0,3}",
    ),
    *(r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", r"\.", r"\\", r"\"", r"\n", r"\u00e9", r"\x41", r"\b", r"\1"),
    *("[a-c]", "[^a]", "[^é]", r"[\d-]", r"[^\s]", '["]', '["a]', r"[\x00-z]", "[é-ü]", "[.]", "[]", "{,2}", "{130}"),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join))
def test_any_accepted_expression_is_enforced(pattern: str) -> None:
    """If a random regular expression is accepted, it is also valid in other regex dialects, and the outputs that it
    allows match it."""
    if not pattern_problem(pattern):
        re.compile(pattern)
        _holds(pattern)


@given(st.text(max_size=40))
def test_any_text_gets_an_answer(pattern: str) -> None:
    """`pattern_problem` accepts any text, even an invalid regular expression, without raising an error."""
    pattern_problem(pattern)
