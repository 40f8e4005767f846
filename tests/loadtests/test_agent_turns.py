"""Tests of the agents' conversations: they have the shape of published traces, and the token ids of their turns are
checked.
"""

from __future__ import annotations

import itertools

import pytest

from loadtests.agents import conversations, turns


def test_a_conversation_grows_as_traces_do() -> None:
    """Each turn begins with the messages of the turn before. About 96 % of all sent text repeats the turn before. Equal
    seeds give equal text."""
    talk = conversations.conversation("7")
    assert len(talk) == conversations.TURNS
    assert all(later[: len(turn)] == turn for turn, later in itertools.pairwise(talk))
    sizes = [sum(len(message["content"]) for message in turn) for turn in talk]
    assert sizes[-1] == pytest.approx(conversations.CHARS, rel=0.05)
    assert sum(sizes[:-1]) / sum(sizes) == pytest.approx(0.96, abs=0.015)
    assert conversations.conversation("7", count=3) == talk[:3] != conversations.conversation("8", count=3)


@pytest.mark.slow
@pytest.mark.thorough
async def test_a_short_run_checks_its_ids() -> None:
    """A run of a few turns yields a value for each figure. In each checked turn, the token ids equal those of the whole
    prompt when it is tokenized in one piece."""
    figures = await turns.measure_family("byte-level", 2, turns.LAST_TURNS + 1)
    assert (figures.checked, figures.different) == (2, 0)
    assert figures.p50_ms > figures.gateway_ms > 0
    assert min(figures.scratch_ms, figures.last_ms) > 0  # which is longer depends on what else runs
    assert figures.memory_mib > 0
