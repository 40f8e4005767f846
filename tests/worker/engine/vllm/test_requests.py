"""The checks of requests, tested without an engine: the refused field, the reason and the bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.worker.engine.vllm.grammar.grammar_size import bounded_strings, regex_positions
from cluster.worker.engine.vllm.grammar.grammars import check_grammar
from cluster.worker.engine.vllm.grammar.pattern_counts import count_problem
from cluster.worker.engine.vllm.grammar.schema_patterns import pattern_problem
from cluster.worker.engine.vllm.requests import RequestBounds, check, is_heavy, prompt_of, refusal

LIMITS = RequestBounds(max_model_len=64, vocab_size=100, max_logprobs=20)
PLAIN = EngineRequest("r", (1, 2, 3), Sampling(max_tokens=4))

NAN = float("nan")
WRONG_SAMPLING: list[tuple[str, object]] = [
    *(("temperature", value) for value in (NAN, -0.1, 2.1, float("inf"))),
    *(("top_p", value) for value in (NAN, 0.0, -1.0, 1.01)),
    *(("min_p", value) for value in (NAN, -0.1, 1.1)),
    *(("frequency_penalty", value) for value in (NAN, -2.1, 2.1)),
    *(("presence_penalty", value) for value in (NAN, -2.1, 2.1)),
    *(("repetition_penalty", value) for value in (NAN, 0.0, -1.0, 1e-46, 1e9)),
    *(("top_k", value) for value in (-2, -(1 << 70))),
    *(("max_tokens", value) for value in (0, -1)),
    *(("min_tokens", value) for value in (-1, 5)),
    *(("seed", value) for value in (1 << 63, -(1 << 63) - 1)),
    *(("logprobs", value) for value in (-1, 21, 1 << 70)),
    *(("stop_token_ids", value) for value in ((-1,), (100,), (1 << 70,), (1,) * 1025)),
    ("logit_bias", dict.fromkeys(range(1025), 1.0)),
    *(("logit_bias", value) for value in ({-1: 1.0}, {100: 1.0}, {5: NAN}, {5: float("-inf")})),
]


@pytest.mark.parametrize(("field", "value"), WRONG_SAMPLING)
def test_a_wrong_parameter_is_refused_by_its_name(field: str, value: object) -> None:
    """A parameter that is out of bounds, NaN or not in the vocabulary is refused. The refusal's field is the
    parameter's name."""
    sampling = dataclasses.replace(PLAIN.sampling, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(EngineRefused, match=field) as error:
        check(dataclasses.replace(PLAIN, sampling=sampling), LIMITS)
    assert (error.value.field, error.value.reason) == (field, "INVALID_FIELD")


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"request_id": ""}, "request_id", "INVALID_FIELD"),
        ({"request_id": "\ud800"}, "request_id", "INVALID_FIELD"),
        ({"cache_salt": "x" * 2000}, "cache_salt", "INVALID_FIELD"),
        ({"priority": 1 << 63}, "priority", "INVALID_FIELD"),
        ({"adapter": "a"}, "adapter", "ADAPTER_INVALID"),
        ({"prompt_token_ids": ()}, "prompt_token_ids", "INVALID_FIELD"),
        ({"prompt_token_ids": (1, -1)}, "prompt_token_ids", "INVALID_FIELD"),
        ({"prompt_token_ids": (1, 100)}, "prompt_token_ids", "INVALID_FIELD"),
        ({"prompt_token_ids": (1,) * 64}, "prompt_token_ids", "CONTEXT_LENGTH_EXCEEDED"),
        ({"prompt_token_ids": (1,) * 60, "emitted_token_ids": (1,) * 4}, "prompt_token_ids", "CONTEXT_LENGTH_EXCEEDED"),
        ({"emitted_token_ids": (100,)}, "emitted_token_ids", "INVALID_FIELD"),
        ({"emitted_token_ids": (1,) * 4}, "emitted_token_ids", "INVALID_FIELD"),
    ],
)
def test_a_wrong_request_is_refused(changes: dict[str, object], field: str, reason: str) -> None:
    """A wrong value outside the sampling parameters is refused. The error has the field and the reason."""
    with pytest.raises(EngineRefused) as error:
        check(dataclasses.replace(PLAIN, **changes), LIMITS)  # type: ignore[arg-type]
    assert (error.value.field, error.value.reason) == (field, reason)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"seed": 1}, "seed"),
        ({"grammar": Grammar("json_object", "")}, "response_format"),
    ],
)
def test_what_would_start_anew_is_not_continued_as_a_prompt(changes: dict[str, object], field: str) -> None:
    """If an engine can only append emitted ids to the prompt, a resumed request is refused if one of its parameters
    depends on earlier output. The error names the parameter."""
    cut = dataclasses.replace(PLAIN, emitted_token_ids=(7,), sampling=Sampling(max_tokens=4, **changes))  # type: ignore[arg-type]
    check(cut, LIMITS)
    with pytest.raises(EngineRefused) as error:
        check(cut, dataclasses.replace(LIMITS, installs=False, resumes_seeds=False))
    assert (error.value.reason, error.value.field) == ("RESUME_UNSUPPORTED", field)


def test_a_call_that_had_ended_is_not_continued() -> None:
    """A request with EOS among its emitted tokens is refused, unless it ignores EOS."""
    limits = dataclasses.replace(LIMITS, eos_token_ids=frozenset({9}))
    ended = dataclasses.replace(PLAIN, emitted_token_ids=(9,))
    with pytest.raises(EngineRefused, match="at its end"):
        check(ended, limits)
    check(dataclasses.replace(ended, sampling=Sampling(max_tokens=4, ignore_eos=True)), limits)


def test_seeds_are_refused_where_they_would_kill() -> None:
    """A request with a seed is refused as an unsupported feature if the limits say that the engine cannot take
    seeds."""
    seeded = dataclasses.replace(PLAIN, sampling=Sampling(max_tokens=4, seed=1))
    check(seeded, LIMITS)
    with pytest.raises(EngineRefused) as error:
        check(seeded, dataclasses.replace(LIMITS, seeds=False))
    assert error.value.reason == "UNSUPPORTED_FEATURE"


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("xml", "a"), "not one of"),
        (Grammar("choice", ()), "at least one"),
        (Grammar("choice", "text"), "at least one"),
        (Grammar("choice", ("a", "")), "empty string"),
        (Grammar("choice", ("\udfff",)), "Unicode"),
        (Grammar("choice", ("a",) * 1025), "at most 1024"),
        (Grammar("choice", ("a" * 70_000,)), "bytes in all"),
        (Grammar("json_object", "x"), "no value"),
        (Grammar("json_schema", " "), "not empty"),
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", "[]"), "JSON object"),
        (Grammar("json_schema", "1" * 70_000), "at most"),
        (Grammar("regex", "a" * 5000), "at most 4096 bytes"),
        (Grammar("regex", "\ud800"), "Unicode"),
        (Grammar("regex", "((a|b){0,999}){0,999}"), "positions"),
        (Grammar("json_schema", json.dumps({"items": {"pattern": "((a|b){0,999}){0,999}"}})), "positions"),
        (Grammar("json_schema", json.dumps({"anyOf": [{"maxLength": i} for i in range(65)]})), "65 strings"),
        (Grammar("grammar", ""), "not empty"),
    ],
)
def test_a_wrong_grammar_is_refused(grammar: Grammar, says: str) -> None:
    """The refusal of a wrong grammar says what is wrong, or which bound it exceeds."""
    with pytest.raises(EngineRefused, match=says) as error:
        check_grammar(grammar)
    assert error.value.field.startswith("response_format")


@pytest.mark.parametrize(
    ("pattern", "positions"),
    [
        ("abc", 3),
        ("a{3}", 3),
        ("(ab){2,5}c", 11),
        ("((a|b){10}){10}", 200),
        ("[a-z]{2}x", 3),
        ("[]a]{2}", 2),
        (r"\d{3}-\d{4}", 8),
        (r"\({3}", 3),
        ("a*(b+)?", 2),
        ("", 0),
    ],
)
def test_repetitions_are_unrolled(pattern: str, positions: int) -> None:
    """Counted repetitions multiply the positions of an expression, also in nested groups. An escape or a character
    class is one position."""
    assert regex_positions(pattern) == positions


@given(st.text(alphabet="ab()[]{}|*+?\\,019^", max_size=40))
def test_any_text_has_positions(pattern: str) -> None:
    """`regex_positions` accepts any text, even an invalid regular expression. It raises no error, and its result is
    never negative."""
    assert regex_positions(pattern) >= 0


@given(st.text(alphabet="ab|", min_size=1, max_size=10), st.integers(1, 50), st.integers(1, 50))
def test_nested_repetitions_multiply(atom: str, inner: int, outer: int) -> None:
    """The expression ((x){m}){n} has m * n times as many positions as x."""
    assert regex_positions(f"(({atom}){{{inner}}}){{{outer}}}") == regex_positions(atom) * inner * outer


def test_bounded_strings_are_found_at_any_depth() -> None:
    """The strings of a JSON schema that have a length bound or a pattern are found at any depth, also in `items` and
    `anyOf`. Other strings are not returned."""
    schema = {
        "properties": {"a": {"type": "string", "maxLength": 3}, "b": {"type": "string"}},
        "anyOf": [{"items": {"pattern": "x+"}}, {"minLength": 1, "pattern": "y"}],
    }
    assert sorted(bounded_strings(schema)) == ["", "x+", "y"]


def test_emitted_tokens_are_output_or_else_prompt() -> None:
    """Emitted ids are in the prompt only if the engine cannot take them as output. The prompt has a salt only if the
    request has one."""
    continued = dataclasses.replace(PLAIN, emitted_token_ids=(7, 8), cache_salt="s")
    plainly = dataclasses.replace(LIMITS, installs=False, resumes_seeds=False)
    assert prompt_of(continued, LIMITS) == {"type": "token", "prompt_token_ids": [1, 2, 3], "cache_salt": "s"}
    assert prompt_of(continued, plainly)["prompt_token_ids"] == [1, 2, 3, 7, 8]
    assert "cache_salt" not in prompt_of(PLAIN, LIMITS)


def test_long_prompts_and_grammars_leave_the_event_loop() -> None:
    """Requests that take long to validate are marked for validation in a thread."""
    assert not is_heavy(PLAIN)
    assert is_heavy(dataclasses.replace(PLAIN, prompt_token_ids=range(5000)))
    assert is_heavy(dataclasses.replace(PLAIN, sampling=Sampling(max_tokens=1, grammar=Grammar("json_object", ""))))


def test_vllms_own_words_are_cut() -> None:
    """A refusal by vLLM names the parameter and has vLLM's message, shortened."""

    class Theirs(ValueError):
        parameter = "top_p"

    refused = refusal(Theirs("x" * 9000))
    assert (refused.field, refused.reason) == ("top_p", "INVALID_FIELD")
    assert len(refused.message) < 600


@pytest.mark.parametrize(("ids", "min_tokens", "fits"), [(126, 1, True), (127, 1, False), (1024, 0, True)])
def test_ends_of_a_call_with_min_tokens_fit_into_the_runners_table(ids: int, min_tokens: int, fits: bool) -> None:
    """With min_tokens, at most 128 stop ids are allowed, EOS ids included. One more would end a rank on the V2
    runner."""
    limits = dataclasses.replace(LIMITS, vocab_size=2000, eos_token_ids=frozenset((1998, 1999)))
    ends = dataclasses.replace(PLAIN.sampling, stop_token_ids=tuple(range(ids)), min_tokens=min_tokens)
    request = dataclasses.replace(PLAIN, sampling=ends)
    if fits:
        check(request, limits)
        return
    with pytest.raises(EngineRefused, match="EOS") as error:
        check(request, limits)
    assert error.value.field == "stop_token_ids"


@pytest.mark.parametrize(
    "pattern",
    ["(?=a)b", "(?!a)b", "(?<=a)b", "(?<!a)b", r"\bfoo\b", r"a\Bb", r"(a)\1", r"(?P<x>a)(?P=x)", r"\k<x>", r"\Aabc\Z",
     "(?>a)", "(a)?(?(1)b|c)"],
)  # fmt: skip
def test_expressions_that_are_not_supported_are_called_so(pattern: str) -> None:
    """Unsupported regex syntax is refused as not supported.

    Otherwise the request would fail later, or an escape would be misread.
    """
    schema = json.dumps({"type": "string", "pattern": pattern})
    for grammar in (Grammar("regex", pattern), Grammar("json_schema", schema)):
        with pytest.raises(EngineRefused, match="not supported"):
            check_grammar(grammar)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(.?){64}", "counts a group"),
        ("(a{0,9}b){40}", "counts a group"),
        (r"(\w+\s?){64}", "counts a group"),
        ("(ab){129}", "unrolls a counted group"),
        ("[a-z]?" * 257, "under `[?]`"),
        ("((?:a|b)?){0,128}", "counts a group"),
        (r"(\w+\s*)" * 65, "more than 128 `[*]`"),
        ("a{" + "9" * 4000 + "}", "positions, at most"),
        ("(" * 300 + "a" + "{999999999})" * 300, "positions, at most"),
    ],
)
def test_an_expression_that_compiles_for_minutes_is_refused(pattern: str, says: str) -> None:
    """A regular expression is refused if its repeat counts would make too many states, both alone and in a JSON schema.
    The error names the remedy."""
    schema = json.dumps({"type": "string", "pattern": pattern})
    for grammar in (Grammar("regex", pattern), Grammar("json_schema", schema)):
        with pytest.raises(EngineRefused, match=says) as error:
            check_grammar(grammar)
        assert len(error.value.message) < 500


def test_long_numbers_in_patterns_are_refused() -> None:
    """A repetition count in a pattern is refused like any other large count if it has more digits than Python
    parses."""
    for pattern in ("a{" + "9" * 5000 + "}", ".{" + "9" * 5000 + "}", "(" * 5000 + "a" + "{999999999})" * 5000):
        with pytest.raises(EngineRefused, match="positions"):
            check_grammar(Grammar("json_schema", json.dumps({"type": "string", "pattern": pattern})))


@given(st.text(alphabet="ab()[]{}|*+?\\,019^", max_size=40))
def test_counts_of_any_text(pattern: str) -> None:
    """The check of repetition counts never fails with an exception, whatever text it checks. A text that it refuses is
    also refused as a pattern in a JSON schema."""
    if problem := count_problem(pattern):
        assert pattern_problem(pattern)
        assert "the expression" not in problem


@pytest.mark.parametrize(
    "pattern",
    [
        r"[\b]",
        r"\\b",
        r"\d+\.\d{2}",
        "^a|b$",
        r"[(?=]x",
        "(?:ab)+",
        r"[^\]\\]",
        "[]]",
        "",
        r"(?:\d{1,3}\.){3}\d{1,3}",
        r".{0,500}",
        "(a{1,8}?){4}",
        "a++",
        "[a-z]+" * 128,
        "a{0000000000012}",
        r"[\[(]{9,}\)?",
    ],
)
def test_expressions_that_are_supported_pass(pattern: str) -> None:
    """Supported syntax is accepted, even if a class member or an escaped backslash looks like unsupported syntax."""
    check_grammar(Grammar("regex", pattern))


@given(st.lists(st.integers(0, 200), min_size=1, max_size=60), st.booleans())
def test_ids_outside_the_vocabulary_are_refused_in_any_form(ids: list[int], packed: bool) -> None:
    """Token ids in a list or an array are refused exactly if one of them is not in the vocabulary."""
    request = EngineRequest("r", array("I", ids) if packed else ids, Sampling(max_tokens=1))
    refusals: Any = (
        contextlib.nullcontext() if max(ids) < LIMITS.vocab_size else pytest.raises(EngineRefused, match="token ids")
    )
    with refusals:
        check(request, LIMITS)
    assert prompt_of(request, LIMITS)["prompt_token_ids"] == ids
