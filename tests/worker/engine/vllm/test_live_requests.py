"""The live requests of an engine: their counts, and the refusal of duplicate ids. Tested without an engine."""

from __future__ import annotations

import pytest

from cluster.api.pooling import PoolingOptions, PoolingTask
from cluster.api.types import EngineRequest, Grammar, Sampling
from cluster.worker.engine.vllm import live_requests
from cluster.worker.engine.vllm.live_requests import LiveRequests
from cluster.worker.engine.vllm.paths import LiveRequest, StepStats

GRAMMAR = Sampling(max_tokens=4, grammar=Grammar("json_object", ""))


def live_request(prompt: int = 3, emitted: int = 0, sampling: Sampling | None = None) -> LiveRequest:
    """Return the record of a request with `prompt` prompt tokens and `emitted` emitted tokens."""
    sampling = sampling or Sampling(max_tokens=4)
    return LiveRequest.from_request(
        EngineRequest("r", range(1, prompt + 1), sampling, emitted_token_ids=range(1, emitted + 1))
    )


def test_counts_follow_the_requests() -> None:
    """A request counts as live until it ends. Until its first output or its end, its tokens count as prefill tokens:
    its prompt, and the tokens that it emitted before it was resumed."""
    stats = StepStats()
    live = LiveRequests(stats)
    live.add("a", live_request(3, 2))
    live.add("b", live_request(10))
    assert (stats.live, stats.prefill_tokens, len(live)) == (2, 15, 2)
    assert live.finish_prefill("a") == 5
    assert stats.prefill_tokens == 10
    assert live.finish_prefill("a") == 5, "a second call counts nothing"
    assert stats.prefill_tokens == 10
    live.remove("b")
    assert (stats.live, stats.prefill_tokens) == (1, 0)
    assert live.remove("b") is None
    assert stats.pace.age_s(float("inf")) > 0, "the engine is busy"
    ended = live.remove("a")
    assert ended is not None
    assert ended.prompt_tokens == 3
    assert (stats.live, stats.prefill_tokens, len(live)) == (0, 0, 0)
    assert stats.pace.age_s(float("inf")) == 0, "the engine is idle"


def test_grammars_count_until_the_first_output() -> None:
    """`awaiting_grammar` counts the requests with a grammar. A request is counted until its first output or its end. A
    pooling request is never counted."""
    live = LiveRequests(StepStats())
    live.add("a", live_request(sampling=GRAMMAR))
    live.add("b", live_request(sampling=GRAMMAR))
    live.add("c", live_request())
    live.add(
        "d", LiveRequest.from_request(EngineRequest("r", (1,), GRAMMAR, pooling=PoolingOptions(PoolingTask.EMBED)))
    )
    assert live.awaiting_grammar == 2
    live.finish_prefill("a")
    live.finish_prefill("c")
    assert live.awaiting_grammar == 1
    for name in "abcd":
        live.remove(name)
    assert live.awaiting_grammar == 0


def test_ids_are_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of live requests and of the last ended requests count as used. The id of a refused request does not."""
    monkeypatch.setattr(live_requests, "REMEMBERED_IDS", 2)
    live = LiveRequests(StepStats())
    for name in ("a", "b", "c", "refused", "live"):
        assert not live.was_used(name)
        live.add(name, live_request())
        assert live.was_used(name)
    for name in ("a", "b", "c"):
        live.remove(name)
    live.remove("refused", remember=False)
    assert [name for name in ("a", "b", "c", "refused", "live") if live.was_used(name)] == ["b", "c", "live"]


def test_the_load_follows_the_requests() -> None:
    """A request that the scheduler has not counted yet is reported as waiting, with its prompt tokens. The load also
    has the age of the current step, and the work that may explain a long step, such as `grammar`."""
    stats = StepStats()
    stats.record_submit(5, 100.0)
    stats.record_submit(7, 100.0)
    stats.running = 1
    load = stats.load(101.0, has_grammars=True, loads_adapter=False, starvation=None)
    assert (load.running, load.waiting, load.prefill_tokens) == (1, 1, 12)
    assert (load.step_age_s, load.busy) == (1.0, "grammar")
    assert stats.load(101.0, has_grammars=False, loads_adapter=True, starvation=None).busy == "adapter"
