"""Resume on vLLM's V2 model runner with asynchronous scheduling, as on GPUs, with interpreted kernels.

The tests run in a separate process, since Triton reads its settings only once.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from loadtests.interpreted import ROOT, TRITON, environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900), pytest.mark.thorough]

SAMPLE = ("seed", "everything")
KINDS = ("greedy", *SAMPLE, "all penalties and a seed", "regex", "json grammar, seed")
"""Keys of contract.RESUMED that run here. `make contract-v2` runs all keys and the rest of the contract."""


@pytest.mark.skipif(not TRITON.is_dir(), reason="needs Triton beside the environment: make triton")
@pytest.mark.parametrize("kinds", [SAMPLE, pytest.param(KINDS, marks=pytest.mark.long)], ids=["sample", "all"])
def test_calls_are_continued_on_the_v2_runner(kinds: tuple[str, ...]) -> None:
    """Requests of several kinds can be interrupted after any token and resumed exactly, on vLLM's V2 runner with
    asynchronous scheduling."""
    file = "tests/worker/engine/v2_contract.py"
    tests = [f"{file}::TestV2::test_cut_anywhere_equals_uncut[{kind}]" for kind in kinds]
    first = [f"{file}::test_the_runner_is_v2", "tests/worker/engine/async_contract.py"]
    command = [sys.executable, "-m", "pytest", "-q", *first, *tests]
    variables = {**os.environ, **environment(), "PYTEST_ADDOPTS": ""}
    ran = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=840)
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert f"{len(first) + len(kinds)} passed" in ran.stdout
