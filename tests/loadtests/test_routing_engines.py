"""Tests of the part `engines` of the load test `routing`. They need no real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.children import Children
from loadtests.routing import engines
from loadtests.routing.chats.predictions import BLOCK, PooledLru
from loadtests.routing.chats.turns import CONCURRENCY, TURNS, Chat, Tokens, play
from loadtests.routing.engines import CROWDED, ROOMY, chats_of, compare, our_fleet
from loadtests.serving import ours as serving


def test_a_prompt_begins_with_the_prompt_of_the_turn_before() -> None:
    earlier, later = (Chat(3, 1, "a", turn).body()["messages"] for turn in (2, 3))
    assert isinstance(earlier, list)
    assert isinstance(later, list)
    assert later[: len(earlier)] == earlier
    assert len(later) == len(earlier) + 2


def test_chats_of_one_run_share_only_their_beginning() -> None:
    one, other = (Chat(number, 1, "a", 1).body()["messages"] for number in (0, 1))
    assert isinstance(one, list)
    assert isinstance(other, list)
    assert one[0] == other[0]
    assert one[1] != other[1]


async def test_every_turn_is_played_once_and_in_order() -> None:
    """The turns of a chat are played once and in order, and at most CONCURRENCY calls run at a time."""
    running, most, seen = 0, 0, list[tuple[Any, int]]()

    async def post(body: Mapping[str, object]) -> Mapping[str, Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        messages = body["messages"]
        assert isinstance(messages, list)
        seen.append((body["cache_salt"], len(messages)))
        await asyncio.sleep(0)
        running -= 1
        return {"usage": {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 4}}}

    chats = [Chat(number, 1, f"s{number}") for number in range(7)]
    assert await play(chats, 1, post) == Tokens(10 * 7 * TURNS, 4 * 7 * TURNS)
    assert most == CONCURRENCY
    for chat in chats:
        assert [length for salt, length in seen if salt == chat.salt] == [2 * turn + 2 for turn in range(TURNS)]


PROMPTS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=30)


@given(PROMPTS, st.integers(1, 30))
def test_the_pool_hits_what_the_last_prompts_left(prompts: list[tuple[int, int]], blocks: int) -> None:
    """In a large PooledLru (a simulated prefix cache), a prompt hits every leading block that an earlier prompt has
    stored. In a smaller PooledLru, a prompt hits at most as many blocks as in the large one."""
    small, large, held = PooledLru(blocks), PooledLru(10_000), set[int]()
    for kind, count in prompts:
        hashes = [100 * kind + at for at in range(count)]
        known = next((at for at, value in enumerate(hashes) if value not in held), count)
        assert large.hit(hashes, count) == known
        assert small.hit(hashes, count) <= known
        held.update(hashes)


def test_rows_have_bounds_for_every_figure() -> None:
    assert all(bound is not None for bound in engines.ROWS.values())


@pytest.mark.thorough
@pytest.mark.slow
async def test_simulated_engines_hold_what_the_gateway_predicts(tmp_path: Path) -> None:
    """If all chats fit into the caches, more than nine tenths of the gateway's predictions of cached tokens are
    right. The engines find at least four fifths of the tokens that one LRU cache in place of all their caches
    would find.

    Every wrong prediction is explained by a change of the cache that the worker reported only after the
    prediction. This also holds if the chats do not fit and many blocks are evicted.
    """
    async with Children(tmp_path) as children, httpx.AsyncClient() as client:
        model, bundle = await serving.prepare(children, "tokenizer", tmp_path)
        source = f"sim://{model}?decode_ms=1&block_size={BLOCK}&kv_blocks=1000&max_model_len=4096&max_num_seqs=8"
        async with our_fleet(children, tmp_path, client, source, bundle) as fleet:
            size = (await fleet.post(Chat(0, 1, "first", TURNS - 1).body()))["usage"]["prompt_tokens"]
            tokens, compared, pooled = await compare(fleet, chats_of(fleet.kv_tokens, ROOMY, size, 2, "roomy"), 2)
            assert not compared.evictions
            assert compared.calls == compared.equal + compared.traced
            assert compared.equal > 0.9 * compared.calls
            assert tokens.cached >= 0.8 * pooled  # each worker computes the common beginning
            _, compared, _ = await compare(fleet, chats_of(fleet.kv_tokens, CROWDED, size, 3, "crowded"), 3)
            assert compared.evictions > 0
            assert compared.calls == compared.equal + compared.traced
