"""All tests of the client libraries, run by `make client-suites`. An excluded test must fail: if it passes, its
exclusion is out of date."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.suites.conftest import name_model
from tests.suites.runs import deprecated_models, read_suites, run
from tests.support.cluster import TestCluster
from tests.support.fuzz import nothing_unexpected

SUITES = read_suites()


@pytest.mark.parametrize("name", SUITES)
async def test_all_tests_of_a_client_pass(name: str, toy: TestCluster, tmp_path: Path) -> None:
    """All tests of a client library pass, except the excluded ones. Each excluded test fails, so no exclusion is
    superfluous. No test makes the gateway fail."""
    name_model(toy, await asyncio.to_thread(deprecated_models))
    async with nothing_unexpected():
        results = await run(SUITES[name], toy.gateway.endpoints["http"], tmp_path)
    for file, counts in results.by_file().items():
        print(f"{name}: {file}: {counts.total()} tests, {dict(counts)}")
    assert not results.stale, "exclusions that fit no test"
    assert not results.not_passed, results.output
