"""Tests of the list of a call's resume tokens, which records what was delivered to the client.

The list begins with the call's first token, and may lack the last ones. It is refused if a token in between is missing,
if a token is from another call, or if the tokens are reordered. A token that is marked as whole stands for all tokens
before it, so the list may also begin with it.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.api.types import CompatibilityKey
from cluster.gateway.resume_tokens.token_chain import (
    CallHead,
    Choice,
    InvalidToken,
    TokenChain,
    compatibility_json,
    encode,
    encode_one,
    head_json,
)
from cluster.ledger.usage.sealed_records import Envelopes, SealError

SECRET = b"s" * 32
HEAD = CallHead("chatcmpl-1", "r1", "acme", "key:k1", "sim", "d1", "p1", seed=7, deadline_s=5.5)
LIKE = CompatibilityKey("w", "b", "float32")
STEPS = st.lists(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2**32 - 1), max_size=4)), max_size=3))


def sealed(
    steps: list[list[tuple[int, list[int]]]],
    envelopes: Envelopes,
    call_id: str = "chatcmpl-1",
    wholes: Set[int] = frozenset(),
) -> list[bytes]:
    """Return the sealed resume tokens for these steps. `wholes`: the numbers of the resume tokens that hold the whole
    state and so make earlier ones unnecessary."""
    out: list[bytes] = []
    before = TokenChain().last
    chars = [0, 0, 0]
    token_ids: list[list[int]] = [[], [], []]
    for number, step in enumerate([[], *steps], start=1):
        choices = []
        for index, ids in step:
            chars[index] += len(ids)
            token_ids[index] += ids
            choices.append(Choice(index, ids, chars[index]))
        more: dict[str, Any] = {"likeness": {"0": compatibility_json(LIKE)}}
        if number == 1 or number in wholes:
            more["call"] = {**head_json(HEAD), "call_id": call_id}
        if number in wholes:
            more["whole"] = True
            choices = [Choice(index, list(token_ids[index]), chars[index]) for index in range(3)]
        out.append(envelopes.seal(encode(number, 100 + number, before, choices, more)))
        chain = TokenChain()
        chain.head, chain.number = HEAD, number - 1
        chain.last = before
        chain.add(out[-1], envelopes.open(out[-1]))
        before = chain.last
    return out


def opened(tokens: list[bytes], envelopes: Envelopes) -> TokenChain:
    """Return the chain of all these tokens."""
    chain = TokenChain()
    for token in tokens:
        chain.add(token, envelopes.open(token))
    return chain


@settings(deadline=None)
@given(STEPS)
def test_a_chain_says_what_was_delivered(steps: list[list[tuple[int, list[int]]]]) -> None:
    """All resume tokens of a call together contain the ids of all delivered tokens, in order, for each choice. They
    also contain the data about the call that its first resume token holds (`head`)."""
    envelopes = Envelopes([SECRET], "resume-token", "resume token")
    tokens = sealed(steps, Envelopes([SECRET], "resume-token", "resume token"))
    chain = opened(tokens, envelopes)
    assert (chain.head, chain.number, chain.expires_s) == (HEAD, len(tokens), 100 + len(tokens))
    for index in range(3):
        ids = [one for step in steps for i, some in step if i == index for one in some]
        begun = chain.choices.get(index)
        assert (begun.token_ids if begun else []) == ids
        assert (begun.chars if begun else 0) == len(ids)
    assert chain.choices[0].compatibility == LIKE


@settings(deadline=None)
@given(STEPS, st.sets(st.integers(2, 12), min_size=1))
def test_a_list_may_begin_with_a_whole_one(steps: list[list[tuple[int, list[int]]]], wholes: set[int]) -> None:
    """Some resume tokens are whole: they contain everything that the earlier resume tokens of the call contain. A list
    that begins with a whole one gives the same state as the complete list. A list that lacks its first resume tokens
    and begins with any other one is refused."""
    envelopes = Envelopes([SECRET], "resume-token", "resume token")
    tokens = sealed(steps, envelopes, wholes=wholes)
    chain = opened(tokens, envelopes)
    for number in range(2, len(tokens) + 1):
        if number not in wholes:
            with pytest.raises(InvalidToken):
                opened(tokens[number - 1 :], envelopes)
            continue
        shorter = opened(tokens[number - 1 :], envelopes)
        assert (shorter.head, shorter.number, shorter.last) == (chain.head, chain.number, chain.last)
        begun = [{i: (b.token_ids, b.chars) for i, b in one.choices.items() if b.token_ids} for one in (chain, shorter)]
        assert begun[0] == begun[1]
        with pytest.raises(InvalidToken):  # the first tokens of another call do not match
            opened([*sealed(steps, envelopes, "chatcmpl-2")[: number - 1], *tokens[number - 1 :]], envelopes)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_else_is_accepted(data: st.DataObject) -> None:
    """A list of resume tokens is refused if a token is missing, repeated, moved, changed, cut, from another call or
    sealed with another secret. A prefix of the complete list is accepted."""
    envelopes = Envelopes([SECRET], "resume-token", "resume token")
    tokens = sealed([[(0, [1])]] * data.draw(st.integers(2, 6), label="length"), envelopes)
    foreign = sealed([[(0, [1])]] * 8, envelopes, "chatcmpl-2")
    others = sealed([[(0, [1])]] * 8, Envelopes([b"x" * 32], "resume-token", "resume token"))
    at = data.draw(st.integers(0, len(tokens) - 1), label="at")
    way = data.draw(st.sampled_from(["out", "twice", "moved", "changed", "cut", "foreign", "forged"]), label="way")
    bad = list(tokens)
    if way == "out":
        at = min(at, len(tokens) - 2)
        del bad[at]
    elif way == "twice":
        bad.insert(at, bad[at])
    elif way == "moved":
        to = data.draw(st.integers(0, len(tokens) - 1).filter(lambda i: i != at), label="to")
        bad[at], bad[to] = bad[to], bad[at]
    elif way == "changed":
        spoilt = bytearray(bad[at])
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
        bad[at] = bytes(spoilt)
    elif way == "cut":
        bad[at] = bad[at][: data.draw(st.integers(0, len(bad[at]) - 1))]
    else:
        at = max(at, 1) if way == "foreign" else at
        bad[at] = (foreign if way == "foreign" else others)[at]
    with pytest.raises((SealError, InvalidToken)):
        opened(bad, envelopes)
    assert opened(tokens[: at + 1], envelopes).number == at + 1


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_sealed_bytes_are_refused(body: bytes) -> None:
    """Sealed bytes that were made for another purpose or by another release are refused, whatever their content."""
    with pytest.raises(InvalidToken):
        TokenChain().add(b"token", body)


@given(st.integers(1, 2**40), st.integers(0, 2**31), st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_the_short_way_is_the_same(number: int, expires_s: int, chars: int, token_id: int) -> None:
    """The fast path `encode_one` gives the same bytes as `encode`."""
    before = b"b" * 16
    assert encode_one(number, expires_s, before, chars, token_id) == encode(
        number, expires_s, before, [Choice(0, [token_id], chars)]
    )


def test_one_purpose_does_not_open_anothers() -> None:
    """A worker's sealed record is refused as a resume token."""
    record = Envelopes([SECRET], "sealed-record", "sealed record").seal(b"x")
    with pytest.raises(SealError):
        Envelopes([SECRET], "resume-token", "resume token").open(record)
