"""Log probabilities with texts equal those that vLLM's chat server returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.types import PositionLogprobs
from cluster.gateway.text.logprobs import LEAST_LOGPROB, LogprobTexts
from tests.gateway.text.kinds import Kind, token_ids

pytestmark = pytest.mark.slow


def vllm_content(kind: Kind, positions: list[PositionLogprobs], top_logprobs: int) -> list[Any]:
    """Return the `logprobs.content` that vLLM's server returns for the positions."""
    import numpy as np
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    processor = LogprobsProcessor(
        tokenizer=kind.theirs,
        logprobs=[],
        prompt_logprobs=None,
        cumulative_logprob=0.0,
        num_logprobs=top_logprobs,
        num_prompt_logprobs=None,
    )
    for position in positions:
        rows = (
            np.array([position.token_ids]),
            np.array([position.logprobs], dtype=np.float64),
            np.array([1]),
            None,
        )
        processor._update_sample_logprobs(LogprobsLists(*rows))
    serving = SimpleNamespace(return_tokens_as_token_ids=False)
    for name in ("_get_decoded_token", "_get_top_logprobs"):
        method = getattr(OpenAIServingChat, name)
        setattr(serving, name, method if name == "_get_decoded_token" else method.__get__(serving))
    sampled = [position.token_ids[0] for position in positions]
    return list(
        OpenAIServingChat._create_chat_logprobs(
            serving, sampled, processor.logprobs, kind.theirs, num_output_top_logprobs=top_logprobs
        ).content
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_vllm(kind: Kind, data: st.DataObject) -> None:
    """Log probabilities have the same texts, bytes, numbers and alternatives as in vLLM, in the same order. This holds
    for any tokens, even for tokens that split a character."""
    sampled = data.draw(token_ids(kind), label="sampled")[:24]
    top = data.draw(st.integers(0, 4), label="top_logprobs")
    others = st.lists(
        st.integers(0, len(kind.theirs) - 1) | st.sampled_from(kind.byte_ids), min_size=top, max_size=top, unique=True
    )
    numbers = st.floats(-50, 0) | st.just(float("-inf"))
    positions = []
    for token_id in sampled:
        ids = [token_id, *data.draw(others, label="most likely")]
        if top and data.draw(st.booleans(), label="sampled is among them"):
            ids = [token_id, *[i for i in ids[1:] if i != token_id][:-1], token_id]
        logprob = {i: data.draw(numbers) for i in ids}
        positions.append(PositionLogprobs(ids, [logprob[i] for i in ids]))
    ours = LogprobTexts(kind.ours, top)
    told = [entry for position in positions for entry in ours.push([position])]
    theirs = vllm_content(kind, positions, top)
    assert [(t.token, list(t.token_bytes), t.logprob) for t in told] == [(t.token, t.bytes, t.logprob) for t in theirs]
    assert [[(a.token, list(a.token_bytes), a.logprob) for a in t.top] for t in told] == [
        [(a.token, a.bytes, a.logprob) for a in t.top_logprobs] for t in theirs
    ]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -1e300])
def test_numbers_that_json_cannot_have(kinds: dict[str, Kind], number: float) -> None:
    """If a worker reports a log probability that is not finite, or less than any that is shown, the least one is
    shown."""
    (told,) = LogprobTexts(kinds["mistral"].ours, 1).push([PositionLogprobs([65, 66], [number, number])])
    assert (told.logprob, told.top[0].logprob) == (LEAST_LOGPROB, LEAST_LOGPROB)


def test_the_token_that_completes_a_character_has_it_whole(kinds: dict[str, Kind]) -> None:
    """If an emoji is split over several tokens, only the last token has a text: the whole emoji with all its bytes."""
    kind = kinds["mistral"]
    ids = kind.theirs.encode("x🎉", add_special_tokens=False)[-4:]
    told = LogprobTexts(kind.ours, 1).push(PositionLogprobs([i], [-1.0]) for i in ids)
    assert [t.token for t in told] == ["", "", "", "🎉"]
    assert told[-1].token_bytes == "🎉".encode()
