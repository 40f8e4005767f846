"""The tests that every engine must pass, run on vLLM's V2 runner. Run them only in the environment of
loadtests.interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.api.ports import EngineRefused
from cluster.api.types import RESUME_EXACT, RESUME_STATE
from cluster.worker.engine.vllm.arguments import is_batch_invariant
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.engine.vllm.requests import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS_AFTER_MIN
from loadtests.interpreted.v2stub.plugin import ASYNC
from tests.worker.engine.conftest import TOKEN_HI, TOKEN_LO, tiny_spec
from tests.worker.engine.contract import (
    CONTROLS,
    RESUMED,
    Driver,
    EngineContract,
    Subject,
    cut_everywhere,
    plain_rests,
    request,
)

STOPS = tuple(range(300, 299 + MAX_STOP_TOKEN_IDS_AFTER_MIN))
"""Stop ids that exceed the bound by one, together with the model's two EOS ids."""
VOCABULARY = 768
SEEDED = (359, 447, 538, 561, 253, 77, 286, 742, 663, 213, 552, 619)
"""Tokens of seed 7 at temperature 1 after Subject.prompt(50).

The tokens are the same in vLLM 0.31 to 0.33, so that a seeded request may resume on another release.
"""


def test_the_runner_is_v2(fast_subject: Subject) -> None:
    """The engine's class in the compatibility key ends with `-v2`, because the V2 runner draws random numbers
    differently. The engine resumes exactly only if it is batch-invariant."""
    assert fast_subject.info.engine_class.endswith("-v2")
    word = RESUME_EXACT if is_batch_invariant("float32") else RESUME_STATE
    assert word in fast_subject.info.capabilities


class TestV2(EngineContract):
    """The tests of the engine contract, run with vLLM's V2 runner."""

    @pytest.fixture
    def engine(self, fast_subject: Subject) -> Subject:
        """The engine that all tests share."""
        return fast_subject


@pytest.mark.parametrize("name", CONTROLS)
async def test_control(name: str, fast_subject: Subject) -> None:
    """Negative control of the contract. A request is cut and resumed as a new prompt that includes the emitted tokens.
    Some of these requests then get other tokens than the uncut request, so the contract can detect an inexact
    resume."""
    cuts, alike = await plain_rests(fast_subject, fast_subject.prompt(40, tokens=40), name)
    assert cuts > 8
    assert alike < cuts


async def test_noise_is_that_of_other_releases(fast_subject: Subject) -> None:
    """A seeded request gives the tokens in SEEDED. Several releases of vLLM give these tokens, so a seeded request can
    resume on another release."""
    (answer,) = await Driver(fast_subject).run(request(fast_subject.prompt(50), max_tokens=12, temperature=1.0, seed=7))
    assert answer.token_ids == SEEDED


@pytest.mark.parametrize(
    ("field", "good", "wrong"),
    [
        ("stop_token_ids", {"min_tokens": 2, "stop_token_ids": STOPS[1:]}, {"min_tokens": 1, "stop_token_ids": STOPS}),
        (
            "logit_bias",
            {"logit_bias": dict.fromkeys(range(VOCABULARY), 0.5)},
            {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.5)},
        ),
    ],
)
async def test_what_would_end_a_rank_is_refused(
    field: str, good: dict[str, object], wrong: dict[str, object], fast_subject: Subject
) -> None:
    """A request at the bound of the V2 runner's tables is served.

    A request above the bound is refused, and the engine keeps running.
    """
    driver = Driver(fast_subject)
    prompt = fast_subject.prompt(51)
    (answer,) = await driver.run(request(prompt, max_tokens=4, **good))
    assert answer.token_ids
    with pytest.raises(EngineRefused) as refusal:
        await fast_subject.engine.submit(request(prompt, max_tokens=4, **wrong))
    assert refusal.value.field == field
    await driver.empty()


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_pipeline_parallel_calls_are_continued(
    llama_folder: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine with two pipeline stages resumes requests exactly, with and without asynchronous scheduling."""
    monkeypatch.setenv(ASYNC, str(int(asynchronous)))
    engine = VllmEngine(tiny_spec(pipeline_parallel_size=2), llama_folder, executor="mp")
    info = await engine.start()
    try:
        assert info.engine_class.endswith("-tp1-pp2-v2")
        assert RESUME_EXACT in info.capabilities
        subject = Subject(engine, info, TOKEN_LO, TOKEN_HI, deadline_s=240.0)
        for name in ("greedy", "all penalties and a seed", "regex", "everything"):
            await cut_everywhere(subject, subject.prompt(40, tokens=40), 15, RESUMED[name])
        await Driver(subject).empty()
    finally:
        await engine.close()
