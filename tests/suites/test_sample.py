"""A sample of the client libraries' own tests against a gateway. `make client-suites` runs all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from tests.suites.runs import Results, read_suites, run
from tests.support.cluster import TestCluster

pytestmark = pytest.mark.engine

SUITES = read_suites()


@pytest.fixture(scope="module")
async def samples(toy: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Results]:
    """Return the results of all samples, by the suite's name. The samples run at the same time, since imports take most
    of a run."""
    address, scratch = toy.gateway.endpoints["http"], tmp_path_factory.mktemp("samples")
    results = await asyncio.gather(*(run(suite, address, scratch, suite.sample) for suite in SUITES.values()))
    return dict(zip(SUITES, results, strict=True))


@pytest.mark.thorough
@pytest.mark.parametrize("name", SUITES)
async def test_a_sample_of_a_client_passes(name: str, samples: Mapping[str, Results]) -> None:
    """The sample of a client library's tests runs, and each of its tests passes."""
    results = samples[name]
    assert not results.not_passed, results.output
    assert results.counts["passed"] >= len(SUITES[name].sample)


def test_each_exclusion_has_its_reason() -> None:
    """Each excluded test belongs to a file that is run, has a reason, and is not in the sample."""
    for suite in SUITES.values():
        assert suite.files
        for entry in suite.excluded:
            assert entry["file"] in suite.files
            assert entry["reason"]
            assert entry["names"]
