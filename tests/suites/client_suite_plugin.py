"""Plugin of pytest for a run of a client library's tests, in the environment of the suites. Imports nothing of ours.

`CLIENT_SUITE` holds JSON: `excluded` (objects with `file` and `names`), `names` (names of the tests to run; empty for
all) and `report` (the file for the results). The results are JSON: the outcome of each test by its id, `excluded` for a
test that is not run, and under "stale" the exclusions that fit no test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

GIVEN = json.loads(os.environ.get("CLIENT_SUITE", "{}"))
OUTCOMES: dict[str, str] = {}
STALE: list[str] = []


def key_of(nodeid: str) -> tuple[str, str]:
    """Return the file and the name of a test, without its class and parameters."""
    path, _, rest = nodeid.partition("::")
    return path, rest.partition("[")[0].rpartition("::")[2]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the excluded tests, and those that are not named."""
    excluded = {(entry["file"], name) for entry in GIVEN["excluded"] for name in entry["names"]}
    keys = [key_of(item.nodeid) for item in items]
    STALE.extend(f"{path}::{name}" for path, name in sorted(excluded - set(keys)))
    kept, dropped = [], []
    for item, key in zip(items, keys, strict=True):
        if key in excluded:
            OUTCOMES[item.nodeid] = "excluded"
            dropped.append(item)
        elif GIVEN["names"] and key[1] not in GIVEN["names"]:
            dropped.append(item)
        else:
            kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record the outcome of a test. A failure of its setup or teardown fails the test."""
    if report.when == "call" or report.outcome != "passed":
        worse = OUTCOMES.get(report.nodeid) in ("failed", "skipped")
        OUTCOMES[report.nodeid] = OUTCOMES[report.nodeid] if worse else report.outcome


def pytest_sessionfinish() -> None:
    """Write the results."""
    Path(GIVEN["report"]).write_text(json.dumps({"outcomes": OUTCOMES, "stale": STALE}))
