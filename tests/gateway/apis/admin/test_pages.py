"""Page tokens and filters of the admin API: valid tokens and filters are parsed, all others are refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError
from cluster.gateway.apis.admin.pages import MAX_PAGE, next_token, page_size, parse_filter, position_of

KNOWN = {"class": "class", "labels": "labels.x"}
words = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters='"\\\0'), max_size=30)


@given(st.floats(allow_nan=False, allow_infinity=False), words, words)
def test_a_token_leads_back(at_s: float, last: str, of: str) -> None:
    """A page token yields the position of the last row. It is accepted only for the list that it was made for."""
    token = next_token([at_s, last], "audit", of)
    assert position_of(token, (float, str), "audit", of) == (at_s, last)
    with pytest.raises(CallError, match="another list"):
        position_of(token, (float, str), "audit", of + "x")


@given(st.text(max_size=200))
def test_a_token_that_nobody_made(token: str) -> None:
    """A text that is not a page token raises CallError with the name of the field, and no other exception."""
    if token:
        with pytest.raises(CallError) as caught:
            position_of(token, (str,), "tenants", "")
        assert caught.value.violations[0].field == "page_token"


@pytest.mark.parametrize("after", [[1.0], ["a", "b"], [float("nan")], [None], "a", {"a": 1}, ["a\0"]])
def test_a_token_of_another_shape(after: Any) -> None:
    """A page token with a valid digest but values of wrong types is refused before the values reach the database."""
    with pytest.raises(CallError, match="page_token"):
        position_of(next_token(after, "tenants"), (str,), "tenants")


@given(words)
def test_a_filter_reads_what_is_quoted(value: str) -> None:
    """A quoted value of a filter is returned unchanged, spaces and special characters included."""
    if " AND " not in f" {value} " and not any(c.isspace() and c != " " for c in value):
        assert parse_filter(f'class = "{value}" AND labels.team="x y"', KNOWN) == {"class": value, "labels.team": "x y"}


@given(st.text(max_size=100))
def test_a_filter_that_is_none(text: str) -> None:
    """A text is either parsed as a filter or raises CallError."""
    with contextlib.suppress(CallError):
        assert all(name == "class" or name.startswith("labels.") for name in parse_filter(text, KNOWN))


def test_a_page_has_a_size() -> None:
    """A page size of zero means the maximum. A larger size is reduced to the maximum, and a negative size is
    refused."""
    assert (page_size(0), page_size(5), page_size(10**9)) == (MAX_PAGE, 5, MAX_PAGE)
    with pytest.raises(CallError, match="page_size"):
        page_size(-1)
