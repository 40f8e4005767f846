"""Tests of the load test that makes wrong configuration files. Each file (a mutant) has one mistake. The oracle, which
finds out what a restarted process would refuse, refuses the mutants. Equal seeds give equal mutants."""

from __future__ import annotations

import random

import pytest

from loadtests.hostile.config_mutations import mutant
from loadtests.hostile.config_oracle import Oracle
from loadtests.hostile.configs import CLUSTER_FILES, refused

EXAMPLE = next(file for file in CLUSTER_FILES if file.name == "example.yaml")
HEAD = "api_version: headrace/v1\nname: c\n"


def test_a_seed_repeats_its_mutants() -> None:
    """Equal seeds give equal mutants (configuration files with one mistake), so that a result can be reproduced. More
    than half of the mutants are refused."""
    text = EXAMPLE.read_text()
    first, second = ([mutant(text, random.Random(seed)).text for seed in range(20)] for _ in range(2))
    assert first == second
    assert sum(refused(text, EXAMPLE) for text in first) > 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [{name: a, source: 'nope://x'}]", "every process"),
        ("models: [{name: a, source: org/name}]", "replica"),
        ("gateway: {listen: {grpc: '127.0.0.1:70000'}}\nmodels: []", "every process"),
        ("models: [{name: a, source: 'sim:///?decode=1'}]", "replica"),
        ("auth: {api_keys: {pepper_file: /nowhere}}\nmodels: []", "gateway"),
    ],
)
def test_the_oracle_refuses_what_processes_refuse(text: str, words: str) -> None:
    """The load test's `Oracle`, which tells whether a process would refuse a configuration, refuses each of these wrong
    configurations and accepts the example. If it accepted everything, the load test would find no gap in the checks."""
    oracle = Oracle()
    try:
        assert oracle.refusals(EXAMPLE.read_text(), None, pod=False) == []
        (reason, *_) = oracle.refusals(HEAD + text, None, pod=False)
        assert reason.startswith(words)
    finally:
        oracle.close()


@pytest.mark.engine
@pytest.mark.thorough
def test_the_engine_is_asked_itself() -> None:
    """vLLM accepts three valid sets of engine arguments for this model, and refuses three invalid ones."""
    oracle = Oracle()
    try:
        engines = ("gpu_memory_utilization: 0.5", "kv_cache_dtype: auto", "enforce_eager: true, max_num_seqs: 8")
        models = ", ".join(
            f"{{name: m{at}, source: hf://o/m, engine: {{{arguments}}}}}" for at, arguments in enumerate(engines)
        )
        cases = oracle.engine_cases(f"{HEAD}models: [{models}]")
        wrong = [dict(case) for case in cases]
        for case, engine in zip(
            wrong, ({"gpu_memory_utilization": 92}, {"kv_cache_dtype": "fp7"}, {"sed": 1}), strict=True
        ):
            case["spec"] = {**case["spec"], "engine": engine}
        answers = oracle.engine_refusals([*cases, *wrong])
        assert answers[:3] == ["", "", ""]
        assert all(answers[3:])
    finally:
        oracle.close()
