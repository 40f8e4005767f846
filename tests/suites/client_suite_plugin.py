"""A pytest plugin for the run of a client library's tests, in the environment of the suites. It imports nothing of
Headrace.

The variable `CLIENT_SUITE` is a JSON object with these keys. `excluded`: objects with `file`, `names` and `reason`.
`names`: names of the tests to run; if empty, all tests run, with the excluded ones. `report`: the file for the results.

The results are a JSON object: the outcome of each test by its id, and under `stale` the exclusions that fit no test.
The outcome of an excluded test is `excluded` if it fails, and `needless` if it passes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

GIVEN = json.loads(os.environ.get("CLIENT_SUITE", "{}"))
OUTCOMES: dict[str, str] = {}
EXCLUDED: set[str] = set()
STALE: list[str] = []


def key_of(nodeid: str) -> tuple[str, str]:
    """Return the file and the name of a test, without its class and parameters."""
    path, _, rest = nodeid.partition("::")
    return path, rest.partition("[")[0].rpartition("::")[2]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that are not listed in `names` of CLIENT_SUITE. If `names` is empty, run all tests, and expect
    the excluded tests to fail."""
    excluded = {(entry["file"], name): entry["reason"] for entry in GIVEN["excluded"] for name in entry["names"]}
    keys = [key_of(item.nodeid) for item in items]
    STALE.extend(f"{path}::{name}" for path, name in sorted(excluded.keys() - set(keys)))
    kept, dropped = [], []
    for item, key in zip(items, keys, strict=True):
        reason = excluded.get(key)
        if GIVEN["names"] and (reason or key[1] not in GIVEN["names"]):
            dropped.append(item)
            continue
        kept.append(item)
        if reason:
            EXCLUDED.add(item.nodeid)
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome of a test. If setup or teardown fails, the test has failed."""
    outcome: str = report.outcome
    if report.nodeid in EXCLUDED:  # a strict xfail: failed if it passes
        outcome = "needless" if report.when == "call" and outcome == "failed" else "excluded"
        OUTCOMES[report.nodeid] = outcome if OUTCOMES.get(report.nodeid) != "needless" else "needless"
    elif report.when == "call" or outcome != "passed":
        worse = OUTCOMES.get(report.nodeid) in ("failed", "skipped")
        OUTCOMES[report.nodeid] = OUTCOMES[report.nodeid] if worse else outcome


def pytest_sessionfinish() -> None:
    """Write the results."""
    Path(GIVEN["report"]).write_text(json.dumps({"outcomes": OUTCOMES, "stale": STALE}))
