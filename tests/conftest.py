"""What every test shares: what this machine cannot run is skipped by name, and the names are the run's last line."""

from __future__ import annotations

import functools
from collections.abc import Generator

import pytest
from hypothesis import settings

from cluster.cli import doctor

settings.register_profile("patient", deadline=None)  # how long an example takes tells of the machine's other work
settings.load_profile("patient")

_SKIPPED: dict[str, str] = {}


@functools.cache
def _namespaces_missing() -> str:
    """Why tests marked `root` cannot run here, with the remedy; empty when they can."""
    for finding in (doctor.check_ip(), doctor.check_namespaces()):
        if finding.missing:
            return f"{finding.name}: {finding.missing}; {finding.remedy}"
    return ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a right or a tool that this machine lacks."""
    if item.get_closest_marker("root") and (lack := _namespaces_missing()):
        pytest.skip(lack)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember what was skipped and why."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _SKIPPED[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Name the skipped tests after pytest's own closing line."""
    try:
        yield
    finally:
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if _SKIPPED and terminal is not None:
            terminal.write_line("skipped: " + ", ".join(f"{name} ({reason})" for name, reason in _SKIPPED.items()))
