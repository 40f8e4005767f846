"""Bounds on the validation of requests. However large an invalid request is, checking it is fast, and the error is
short: counts are checked first, and values that the error quotes are cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import MAX_MESSAGE_CHARS, MAX_VIOLATIONS, CallError, Outcome, Violation, invalid
from cluster.api.types import Grammar
from cluster.gateway.apis.grpc import requests as grpc_requests
from cluster.gateway.apis.openai import requests as openai_requests
from cluster.gateway.apis.openai.fields import Fields
from cluster.gateway.apis.openai.requests import with_caller_names
from cluster.gateway.calls.request import (
    MAX_LOGPROBS,
    GenerationRequest,
    RequestOptions,
    TextPrompt,
    check_metadata,
    check_options,
    sampling,
)
from cluster.v1 import inference_pb2 as pb
from tests.support.calls import chat
from tests.support.cpu import cpu_within
from tests.support.http import chat_body

MANY = 300_000
LONG = "x" * 10_000_000


def _error(options: RequestOptions) -> CallError:
    with pytest.raises(CallError) as raised:
        check_options(options)
    return raised.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ("",) * MANY),
        ("stop_token_ids", (-1,) * MANY),
        ("logit_bias", {-1 - i: 1000.0 for i in range(MANY)}),
        ("grammar", Grammar("choice", ("",) * MANY)),
    ],
)
def test_what_is_too_long_is_refused_by_its_count_alone(field: str, value: Any) -> None:
    """A list of 300,000 invalid entries is reported as one violation, in well under a second. Formerly the check took
    hours."""
    with cpu_within(1.0):
        error = with_caller_names(_error(RequestOptions(**{field: value})), {"logprobs": "top_logprobs"})
    (only,) = error.violations
    assert only.field in (field, "response_format.choice")
    assert str(MANY) in only.description


def test_an_answer_names_ten_wrong_fields_at_most() -> None:
    """An error names at most ten invalid fields, because more fields would cost more to render than to find."""
    error = _error(RequestOptions(stop_token_ids=(-1,) * 1000, temperature=-1.0))
    assert len(error.violations) == MAX_VIOLATIONS
    assert error.violations[0].field == "temperature"
    assert error.message.count(";") == MAX_VIOLATIONS - 1


@given(field=st.text(), words=st.text(min_size=1), times=st.integers(0, 100_000), count=st.integers(0, 30))
def test_no_error_is_long(field: str, words: str, times: int, count: int) -> None:
    """The message of an error and every violation in the error are short, whatever a caller sends."""
    long = words * times
    error = CallError(Outcome.INVALID_FIELD, long, violations=[Violation(field + long, long)] * count)
    for one in (error, invalid(field + long, long)):
        assert len(one.message) <= MAX_MESSAGE_CHARS + 3
        assert len(one.violations) <= MAX_VIOLATIONS
        assert all(len(v.field) + len(v.description) <= 1300 for v in one.violations)


BAD_CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": LONG}]},
    {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
    {"response_format": {"type": LONG}},
    {"logit_bias": {LONG: 1}},
    {"metadata": {LONG: 5}},
    {"stop_token_ids": ["x"] * MANY},
    {"stop": [1] * MANY},
    {"logit_bias": {str(i): "x" for i in range(MANY)}},
    {"metadata": {str(i): 1 for i in range(MANY)}},
    {"structured_outputs": {"choice": [1] * MANY}},
]


@pytest.mark.parametrize("fields", BAD_CHATS, ids=lambda fields: next(iter(fields)))
def test_no_field_of_a_body_is_echoed_whole(fields: dict[str, Any]) -> None:
    """An error quotes no field of an HTTP body in full. Formerly a request of 10 MB got an answer of 10 MB, and long
    lists were searched before their length was checked."""
    with pytest.raises(CallError) as raised:
        openai_requests.parse_chat(Fields(chat_body(**fields)))
    assert len(raised.value.message) < 1024


@pytest.mark.parametrize(
    "request_",
    [
        pb.ChatRequest(model="sim", messages=[pb.Message(role=LONG)]),
        chat(response_format=pb.ResponseFormat(type=LONG)),
    ],
    ids=["role", "format"],
)
def test_no_field_of_a_message_is_echoed_whole(request_: pb.ChatRequest) -> None:
    """An error quotes no field of a gRPC message in full, because the status text is sent in a header."""
    with pytest.raises(CallError) as raised:
        grpc_requests.parse_chat(request_)
    assert len(raised.value.message) < 1024


@given(st.dictionaries(st.text(max_size=80), st.text(max_size=300), max_size=20), st.integers(0, 100_000))
def test_metadata_is_refused_in_few_words(metadata: dict[str, str], times: int) -> None:
    """The error for invalid metadata is short, whatever the size of names and values."""
    found = ""
    try:
        check_metadata({name: value * times for name, value in metadata.items()})
    except CallError as error:
        found = error.message
    assert len(found) < 1024


@pytest.mark.parametrize(("ids", "min_tokens", "fits"), [(126, 1, True), (127, 1, False), (1024, 0, True)])
def test_ends_of_a_call_with_min_tokens_fit_into_the_engines_table(ids: int, min_tokens: int, fits: bool) -> None:
    """A call with `min_tokens` may have at most 128 stop token ids, the EOS ids included. One more id crashes the
    engine core of vLLM's V2 runner."""
    options = RequestOptions(stop_token_ids=tuple(range(ids)), min_tokens=min_tokens)
    check_options(options)
    wish = GenerationRequest("m", TextPrompt("x"), options)
    if fits:
        assert sampling(wish, {}, 5, 100, 2000, eos_token_ids=(0, 1)).stop_token_ids
        return
    with pytest.raises(CallError) as raised:
        sampling(wish, {}, 5, 100, 2000, eos_token_ids=(0, 1))
    assert raised.value.violations[0].field == "stop_token_ids"


def _max_tokens(options: RequestOptions, max_model_len: int) -> int:
    """Return the number of tokens that a call with a prompt of five tokens may produce."""
    check_options(options)
    return sampling(GenerationRequest("m", TextPrompt("x"), options), {}, 5, max_model_len, 2000).max_tokens


def test_too_many_log_probabilities_are_refused() -> None:
    """A call that asks for more log probabilities than an answer may have is refused with the field and the highest
    value. A `max_tokens` beyond the context counts only up to the context."""
    most = MAX_LOGPROBS // (64 * 21)
    options = RequestOptions(n=64, logprobs=20, max_tokens=most)
    assert _max_tokens(options, 131_072) == most
    assert _max_tokens(replace(options, max_tokens=10**9), 1005) == 1000
    with pytest.raises(CallError) as raised:
        _max_tokens(replace(options, max_tokens=most + 1), 131_072)
    (violation,) = raised.value.violations
    assert violation.field == "max_tokens"
    assert f"lower it to {most}" in violation.description
    named = with_caller_names(raised.value, {"max_tokens": "max_completion_tokens"})
    assert named.message.startswith("max_completion_tokens: n 64 times")


def test_an_unset_max_tokens_fits_the_log_probabilities() -> None:
    """Without `max_tokens`, a call with many log probabilities gets as many tokens as the limit allows, and is not
    refused. A call without log probabilities has the whole context."""
    assert _max_tokens(RequestOptions(n=64, logprobs=20), 131_077) == MAX_LOGPROBS // (64 * 21)
    assert _max_tokens(RequestOptions(n=64), 131_077) == 131_072


@pytest.mark.parametrize(
    ("n", "max_tokens", "top"), [(1, 131_072, 20), (64, 2048, 20), (64, 32_768, 0), (16, 32_768, 5), (4, 32_768, 20)]
)
def test_common_evaluations_fit(n: int, max_tokens: int, top: int) -> None:
    """Common evaluations with log probabilities are below the limit."""
    assert _max_tokens(RequestOptions(n=n, logprobs=top, max_tokens=max_tokens), 262_144) == max_tokens
