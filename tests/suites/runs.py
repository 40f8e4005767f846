"""Runs of the client libraries' own tests against a gateway, in the environment of the suites (`make suites`).

The suites come with pytest plugins, so each runs in its own process.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".suites"
PYTHON = FOLDER / "venv" / "bin" / "python"
PINS = ROOT / "requirements" / "suites.txt"
MISSING = "the client libraries' own tests are not installed: make suites"
PLUGIN = "client_suite_plugin"
RUN_S = 240.0
"""Greatest number of seconds that a run may take."""
TAIL_LINES = 120
_CLIENT_SETTINGS = ("PYTEST_", "OPENAI_", "ANTHROPIC_", "LANGCHAIN_", "LANGSMITH_")
"""Beginnings of environment variables that would change a run."""


def is_installed() -> bool:
    """Return whether the suites are installed in the pinned versions."""
    stamp = FOLDER / PINS.name
    return stamp.exists() and stamp.read_bytes() == PINS.read_bytes()


def deprecated_models() -> list[str]:
    """Return the models that anthropic's client reports as deprecated. A test of the client calls each of them."""
    command = [
        str(PYTHON),
        "-c",
        "from anthropic.resources.messages import DEPRECATED_MODELS; print(*DEPRECATED_MODELS)",
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@dataclass(frozen=True, slots=True)
class Suite:
    """The tests of one client library, as in suites.yaml."""

    name: str
    files: Sequence[str]
    excluded: Sequence[Mapping[str, Any]]
    sample: Sequence[str]

    @property
    def folder(self) -> Path:
        """The folder to which the paths of the test files are relative."""
        source = FOLDER / "src" / self.name
        return source if source.is_dir() else HERE


def read_suites() -> Mapping[str, Suite]:
    """Return the suites by the name of their library."""
    entries = yaml.safe_load((HERE / "suites.yaml").read_text())
    return {name: Suite(name, e["files"], e["excluded"], e["sample"]) for name, e in entries.items()}


@dataclass(frozen=True, slots=True)
class Results:
    """The results of a run. `outcomes`: by test id, `passed`, `failed`, `skipped`, `excluded`, or `needless` for an
    excluded test that passes."""

    outcomes: Mapping[str, str]
    stale: Sequence[str]
    """Exclusions that fit no test."""
    output: str
    """End of the output of pytest."""

    @property
    def counts(self) -> Counter[str]:
        """Number of tests by outcome."""
        return Counter(self.outcomes.values())

    @property
    def not_passed(self) -> list[str]:
        """Ids of the tests that should have passed and did not."""
        return sorted(test for test, outcome in self.outcomes.items() if outcome not in ("passed", "excluded"))

    def by_file(self) -> Mapping[str, Counter[str]]:
        """Number of tests by file and outcome."""
        counts: dict[str, Counter[str]] = {}
        for test, outcome in self.outcomes.items():
            counts.setdefault(test.partition("::")[0], Counter())[outcome] += 1
        return counts


def _environment(suite: Suite, address: str, names: Sequence[str], report: Path) -> dict[str, str]:
    given = {"excluded": suite.excluded, "names": names, "report": str(report)}
    passed_on = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENT_SETTINGS)}
    return passed_on | {
        "CLIENT_SUITE": json.dumps(given),
        "PYTHONPATH": str(HERE),
        "TEST_API_BASE_URL": f"http://{address}/v1" if suite.name == "openai" else f"http://{address}",
        "PYTHONDONTWRITEBYTECODE": "",  # most of a run is imports
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def _command(suite: Suite) -> list[str]:
    """Return the command that runs the tests of a suite. Options of the suite's own pytest configuration, such as the
    number of processes, are left out."""
    command = [str(PYTHON), "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", PLUGIN]
    if suite.folder == HERE:  # a file of ours: without the conftest.py of our own tests, which imports Headrace
        command += ["--noconftest", "--import-mode=importlib", "-c", str(HERE / "langchain.ini"), f"--rootdir={HERE}"]
    else:
        command += ["-o", "addopts="]
    return command + list(suite.files)


async def run(suite: Suite, address: str, scratch: Path, names: Sequence[str] = ()) -> Results:
    """Run the tests of a suite against the gateway at an HTTP address (host:port). Raises TimeoutError.

    `names`: names of the tests; if empty, all tests run, including the excluded ones. `scratch`: a folder for the
    results.
    """
    report = scratch / f"{suite.name}.json"
    report.unlink(missing_ok=True)
    process = await asyncio.create_subprocess_exec(
        *_command(suite),
        cwd=suite.folder,
        env=_environment(suite, address, names, report),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(RUN_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    tail = "\n".join(output.decode(errors="replace").splitlines()[-TAIL_LINES:])
    if not report.exists():
        return Results({"the run itself": "failed"}, (), tail)
    written = json.loads(report.read_text())
    return Results(written["outcomes"], written["stale"], tail)
