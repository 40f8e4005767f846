"""Costly grammars on a real engine: refused after a trial, or ended while they run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.api.ports import EngineRefused
from cluster.api.types import SLOW_GRAMMAR, FinishReason, Grammar
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.engine.vllm.grammar import probe
from cluster.worker.engine.vllm.grammar.probe import GrammarProbe
from tests.support.checkpoints import big_vocabulary_checkpoint
from tests.support.hostile_grammars import hostile_grammars
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, tiny_spec
from tests.worker.engine.contract import Driver, Subject, request

pytestmark = pytest.mark.engine

NESTED = "(" * 120 + "[a-y ]" + "*)" * 120
TAG = json.dumps(
    {
        "type": "structural_tag",
        "format": {"type": "tag", "begin": "<f>", "content": {"type": "regex", "pattern": NESTED}, "end": "</f>"},
    }
)
COSTLY = (
    Grammar("regex", NESTED),
    Grammar("grammar", "root ::= " + "[a-z]? " * 400),
    Grammar("grammar", "start: " + "W? " * 300 + "\nW: /[a-z ]+/"),
    Grammar("structural_tag", TAG, field="tools"),
)


async def test_a_costly_grammar_is_refused_before_the_engine_has_it(fast_subject: Subject) -> None:
    """Each form is refused by the name of its field, at once when it is sent again, and a cheap one is not."""
    driver = Driver(fast_subject)
    for grammar in COSTLY:
        for _ in range(2):
            with pytest.raises(EngineRefused) as refused:
                await driver.submit(request(fast_subject.prompt(5), grammar=grammar))
            assert (refused.value.field, refused.value.reason) == (grammar.field, "INVALID_FIELD")
    steps = fast_subject.engine.load().steps
    (answer,) = await driver.run(request(fast_subject.prompt(5), grammar=Grammar("regex", "[a-f]{40}")))
    assert len(answer.token_ids) == 6
    assert fast_subject.engine.load().steps > steps


async def test_a_trial_that_gets_no_idle_core_is_begun_again(
    fast_subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that is not costly is not refused because no core is idle."""
    monkeypatch.setattr(probe, "IDLE_S", 0.0)
    fields = {f"field {i}": {"type": "string", "maxLength": 300 + i} for i in range(12)}
    schema = Grammar("json_schema", json.dumps({"type": "object", "properties": fields}))
    (answer,) = await Driver(fast_subject).run(request(fast_subject.prompt(5), grammar=schema))
    assert len(answer.token_ids) == 6


async def _ends_alone(subject: Subject) -> None:
    engine: Any = subject.engine
    driver, trials = Driver(subject), engine._grammars
    engine._grammars = GrammarProbe()  # not started: it finds no grammar costly
    try:
        costly, other = await driver.run(
            request(subject.prompt(6), max_tokens=900, min_tokens=900, grammar=Grammar("regex", NESTED)),
            request(subject.prompt(7), max_tokens=200),
        )
    finally:
        engine._grammars = trials
    assert (costly.finish, costly.outputs[-1].message) == (FinishReason.ERROR, SLOW_GRAMMAR)
    assert (other.finish, len(other.token_ids)) == (FinishReason.LENGTH, 200)


async def test_a_grammar_that_slows_the_steps_ends_its_request_alone(fast_subject: Subject) -> None:
    """A costly grammar that no trial has found ends its request with the message of slow grammars, and a request beside
    it runs to its end."""
    await _ends_alone(fast_subject)


async def test_the_public_path_reports_a_slow_grammar_too(public_subject: Subject) -> None:
    """On the public path, a request that ends because of its grammar has the same message."""
    await _ends_alone(public_subject)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [49_000, 128_000])
async def test_200_hostile_grammars_slow_no_step(tmp_path: Path, vocabulary: int) -> None:
    """While 200 hostile grammars of all forms are sent, each is refused by its field's name or runs, and no step of the
    engine takes a second.

    Printed are a quiet tenant's gaps alone, beside the same requests without grammars, and beside those with them."""
    engine = VllmEngine(tiny_spec(), big_vocabulary_checkpoint(tmp_path, vocabulary))
    subject = Subject(engine, await engine.start(), TOKEN_LO, TOKEN_HI, 600.0)
    driver, outcomes, waiting = Driver(subject), [], asyncio.Semaphore(4)
    longest = 0.0

    async def send(grammar: Grammar | None, at: int) -> None:
        async with waiting:
            hostile = request(
                subject.prompt(at), max_tokens=60, min_tokens=60, grammar=grammar, tenant="hostile", temperature=1.0
            )
            try:
                await driver.submit(hostile)
                outcomes.append("runs")
            except EngineRefused as refused:
                named = grammar is not None and refused.field.startswith(grammar.field)
                outcomes.append("refused" if named else refused.message)

    async def quiet_gaps() -> list[float]:
        nonlocal longest
        quiet, last, gaps = await driver.submit(request(subject.prompt(1), max_tokens=500)), time.monotonic(), []
        while driver.answers[quiet].finish is None:
            await driver.step()
            now = time.monotonic()
            gaps.append(now - last)
            last, longest = now, max(longest, engine.load().step_s)
        return gaps

    async def gaps_beside(grammars: Sequence[Grammar | None]) -> list[float]:
        gaps: list[float] = []
        sending = [asyncio.create_task(send(grammar, at)) for at, grammar in enumerate(grammars)]
        while not all(task.done() for task in sending):
            gaps += await quiet_gaps()
        await asyncio.gather(*sending)
        await driver.until(lambda: all(answer.finish is not None for answer in driver.answers.values()))
        return gaps

    try:
        alone = [gap for _ in range(10) for gap in await quiet_gaps()]
        beside_others = await gaps_beside([None] * 200)
        longest, outcomes = 0.0, []
        beside = await gaps_beside([grammar for _, grammar in hostile_grammars(41, 200)])
    finally:
        await engine.close()
    slow = sum(a.outputs[-1].message == SLOW_GRAMMAR for a in driver.answers.values())
    print(f"{outcomes.count('refused')} refused, {outcomes.count('runs')} ran, of these {slow} ended as slow")
    for name, gaps in (
        ("alone", sorted(alone)),
        ("beside others", sorted(beside_others)),
        ("beside grammars", sorted(beside)),
    ):
        print(f"quiet {name}: median {gaps[len(gaps) // 2]:.4f} s, p99 {gaps[len(gaps) * 99 // 100]:.4f} s")
    print(f"longest step {longest:.3f} s")
    assert len(outcomes) == 200
    assert set(outcomes) <= {"refused", "runs"}
    assert longest < 1.0
