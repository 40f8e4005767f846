"""Choice of the work that explains why an engine's current step takes long. `EngineLoad.busy` reports this work."""

from __future__ import annotations

from cluster.worker.engine.processes.starvation import BUSY, Starvation
from cluster.worker.engine.step_times import StepTimes

GRAMMAR_BESIDE_S, GRAMMAR_ALONE_S = 10.0, 90.0
"""Greatest age of a step, in seconds, that the compilation of a grammar explains.

The first bound applies while other requests run, the second while none runs. A thread of the engine core compiles the
grammar, which slows the steps of other requests. grammar_size.py bounds the size of grammars.
"""

ADAPTER_S = 10.0
"""Greatest age of a step, in seconds, that the load of an adapter explains. All steps of the engine wait for the end of
the load."""


def reported_work(
    pace: StepTimes,
    now: float,
    *,
    running: int,
    prefill_tokens: int,
    has_grammars: bool,
    loads_adapter: bool,
    starvation: Starvation | None,
) -> str:
    """Return the work that explains the age of the current step: "grammar", "adapter", "prefill" or "cpu"; "" if
    nothing explains it.

    `pace`: durations of the engine's steps. `running`: number of requests that run. `prefill_tokens`: prompt tokens of
    requests that have no output yet. `has_grammars`: whether the engine may be compiling a grammar now.
    `loads_adapter`: whether the engine is loading an adapter now. `starvation`: the engine's CPU starvation, if it is
    measured.
    """
    age_s = pace.age_s(now)
    if has_grammars and age_s <= (GRAMMAR_BESIDE_S if running else GRAMMAR_ALONE_S):
        return "grammar"
    if loads_adapter and age_s <= ADAPTER_S:
        return "adapter"
    if pace.explains(now, prefill_tokens):
        return "prefill"
    starved = starvation is not None and starvation.explains(age_s, pace.times.value_s, now)
    return BUSY if starved else ""
