"""Tests of the reason that an engine reports for a long step, such as a grammar, an adapter or a prompt."""

from __future__ import annotations

import pytest

from cluster.worker.engine.processes.starvation import BUSY, Starvation, Task
from cluster.worker.engine.reported_work import ADAPTER_S, GRAMMAR_ALONE_S, GRAMMAR_BESIDE_S, reported_work
from cluster.worker.engine.step_times import StepTimes


def work(
    age_s: float,
    *,
    running: int = 1,
    prefill_tokens: int = 0,
    has_grammars: bool = False,
    loads_adapter: bool = False,
    starvation: Starvation | None = None,
) -> str:
    """Call `reported_work` for a step that has run for `age_s` seconds. Returns what the engine reports as its current
    work."""
    pace = StepTimes()
    pace.began(100.0)
    return reported_work(
        pace,
        100.0 + age_s,
        running=running,
        prefill_tokens=prefill_tokens,
        has_grammars=has_grammars,
        loads_adapter=loads_adapter,
        starvation=starvation,
    )


@pytest.mark.parametrize(("running", "bound_s"), [(1, GRAMMAR_BESIDE_S), (0, GRAMMAR_ALONE_S)])
def test_a_grammar_explains_a_step_for_a_while(running: int, bound_s: float) -> None:
    """While a grammar is compiled, a long step is reported as "grammar" up to a time limit. The limit is higher if no
    other request runs."""
    assert work(bound_s - 0.1, running=running, has_grammars=True) == "grammar"
    assert work(bound_s + 0.1, running=running, has_grammars=True) == ""
    assert work(0.1, running=running) == ""


def test_an_adapter_explains_a_step_for_a_while() -> None:
    assert work(ADAPTER_S - 0.1, loads_adapter=True) == "adapter"
    assert work(ADAPTER_S + 0.1, loads_adapter=True) == ""


def test_prompts_explain_a_step() -> None:
    """While prompt tokens wait to be computed, a long step is reported as "prefill". This holds even if the step also
    compiles a grammar and loads an adapter."""
    assert work(0.4, prefill_tokens=1) == "prefill"
    assert work(GRAMMAR_ALONE_S * 2, prefill_tokens=1 << 20, has_grammars=True, loads_adapter=True) == "prefill"


def test_a_starved_engine_is_busy() -> None:
    """An engine whose thread waits for a core is reported as busy."""
    tasks = iter([{(1, 1): Task(0.0, 0.0, True)}, {(1, 1): Task(0.0, 0.3, True)}])
    starvation = Starvation(lambda: next(tasks))
    assert work(0.2, starvation=starvation) == ""
    assert work(0.5, starvation=starvation) == BUSY
