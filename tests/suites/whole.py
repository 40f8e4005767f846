"""All tests of the client libraries that are not excluded: `make client-suites`."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.suites.conftest import name_model
from tests.suites.runs import deprecated_models, read_suites, run
from tests.support.cluster import TestCluster

SUITES = read_suites()


@pytest.mark.parametrize("name", SUITES)
async def test_all_tests_of_a_client_pass(name: str, toy: TestCluster, tmp_path: Path) -> None:
    """All tests of a client library pass, except for the excluded ones."""
    name_model(toy, await asyncio.to_thread(deprecated_models))
    results = await run(SUITES[name], toy.gateway.endpoints["http"], tmp_path)
    for file, counts in results.by_file().items():
        print(f"{name}: {file}: {counts.total()} tests, {dict(counts)}")
    if folder := os.environ.get("SUITES_REPORT"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(results.outcomes, indent=1))
    assert not results.stale, "exclusions that fit no test"
    assert not results.not_passed, results.output
