"""A sample of the client libraries' own tests against a gateway. `make client-suites` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.suites.runs import read_suites, run
from tests.support.cluster import TestCluster

pytestmark = pytest.mark.engine

SUITES = read_suites()


@pytest.mark.parametrize("name", SUITES)
async def test_a_sample_of_a_client_passes(name: str, toy: TestCluster, tmp_path: Path) -> None:
    """The sample of a client library's tests runs, and each of its tests passes."""
    suite = SUITES[name]
    results = await run(suite, toy.gateway.endpoints["http"], tmp_path, suite.sample)
    assert not results.not_passed, results.output
    assert results.counts["passed"] >= len(suite.sample)
