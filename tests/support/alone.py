"""Tests in a process of their own (marker `alone`): they count objects, files, threads or memory of their process, and
a test that ran there before, or a server that it left open for others, would be counted too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from _pytest.runner import CallInfo

REPORTS = "HEADRACE_TEST_REPORTS"
"""Variable with the file into which a child writes its reports, one JSON document a line."""
_RUNNERS = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_CURRENT_TEST")
"""Variables of the runner's own process, which a child must not read: it would write the runner's report file."""


def write_report(config: pytest.Config, report: pytest.TestReport) -> None:
    """Append a child's report to the file that its parent reads."""
    with open(os.environ[REPORTS], "a") as file:
        file.write(json.dumps(config.hook.pytest_report_to_serializable(config=config, report=report)) + "\n")


def run_alone(item: pytest.Item) -> None:
    """Run a test in a child process, and pass the child's reports on as this process's own."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    with tempfile.TemporaryDirectory(prefix="hr-alone-") as folder:
        path = Path(folder, "reports")
        call = CallInfo.from_call(
            lambda: _run_child(item, path), "call", reraise=(KeyboardInterrupt, pytest.exit.Exception)
        )
        lines = path.read_text().splitlines() if path.exists() else []
    for line in lines:
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=json.loads(line))
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # a skip's place and reason, which JSON has as a list
        item.ihook.pytest_runtest_logreport(report=report)
    if call.excinfo:
        item.ihook.pytest_runtest_logreport(report=item.ihook.pytest_runtest_makereport(item=item, call=call))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _run_child(item: pytest.Item, path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _RUNNERS} | {REPORTS: str(path)}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", item.nodeid],
            cwd=item.config.rootpath,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = child.wait()
        finally:
            child.kill()
            child.wait()
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not path.exists():
            output.seek(0)
            pytest.fail(
                f"exit code {code} of the test's own process:\n{output.read().decode(errors='replace')[-4000:]}"
            )
