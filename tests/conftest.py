"""Hooks for all tests: skip each test whose requirement this machine lacks, and list the skipped tests at the end."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import settings

from cluster.cli.commands import doctor
from tests.support import alone

if TYPE_CHECKING:
    from tests.support.parallel import Scheduler

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
"""gRPC reads it when it is first used. Tests fork parsers from this process, where its threads must not start again."""

_CONFIGURATION = tempfile.TemporaryDirectory(prefix="headrace-tests-")
os.environ["XDG_CONFIG_HOME"] = _CONFIGURATION.name
"""Commands that tests run do not read the contexts of the user, which may name a real cluster."""

importlib.import_module("authlib.deprecate")  # puts a filter of warnings first, so before pytest puts its own there

# One thread an engine: the threads of several engines on the same processors wait for one another in loops. vLLM's own
# choice of processors would bind the engines of all test processes to the same one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

# structlog's default renders each traceback with the values of all local variables, in tenths of a second.
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

settings.register_profile("patient", deadline=None)  # other work on the machine changes the duration of an example
settings.load_profile("patient")

_SKIPPED: dict[str, str] = {}
SHOWN = 1
"""Number of test names shown per skip reason. pytest's own summary has the other names."""


NAMESPACES = ("ip", "namespaces")
"""Requirements of the tests that are marked `root`."""


_CONFIGS: list[pytest.Config] = []


def pytest_configure(config: pytest.Config) -> None:
    """Keep the configuration, whose plugins pytest_runtest_logreport uses."""
    _CONFIGS.append(config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a test that is marked `alone` in a process of its own."""
    if alone.REPORTS in os.environ or not item.get_closest_marker("alone"):
        return None
    alone.run_alone(item)
    item.session._setupstate.teardown_exact(nextitem)  # the fixtures that only this item and those before it share
    return True


@functools.cache
def _lack(name: str) -> str:
    """Return why a requirement of the tests is missing on this machine, with the remedy; empty if it is met. `name`:
    the requirement's name in the program `doctor`, which checks a machine for all requirements."""
    return doctor.missing_reason(name)


def pytest_collection_finish() -> None:
    """Exempt the loaded tests and their imports from garbage collection. On a busy core, a garbage collection that
    visits them stops a test's event loop for half a second."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that needs a privilege or a tool that this machine lacks (markers `root` and `needs`)."""
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    for name in (*(NAMESPACES if item.get_closest_marker("root") else ()), *names):
        if lack := _lack(name):
            pytest.skip(lack)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a skipped test and its reason. Print the name of a failed test at once, since a run that is killed prints
    no summary."""
    if alone.REPORTS in os.environ:
        alone.write_report(_CONFIGS[-1], report)
    if report.failed and (terminal := _CONFIGS[-1].pluginmanager.get_plugin("terminalreporter")) is not None:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash is not None else str(report.longrepr)
        terminal.write_line(f"\nfailed ({report.when}): {report.nodeid}: {' '.join(why.split())[:400]}")
    if report.skipped and isinstance(report.longrepr, tuple):
        _SKIPPED[report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """After pytest's own closing line, print the number of skipped tests for each reason. The last line names skipped
    tests."""
    try:
        yield
    finally:
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if _SKIPPED and terminal is not None:
            for line in _summary(_SKIPPED):
                terminal.write_line(line)


def _summary(skipped: Mapping[str, str]) -> Iterator[str]:
    """Yield the number of skipped tests for each reason, most frequent first, and then a line with the tests' names."""
    reasons = Counter(skipped.values())
    yield f"{len(skipped)} {'test was' if len(skipped) == 1 else 'tests were'} skipped:"
    yield from (f"{count:5}  {reason}" for reason, count in reasons.most_common())
    named = (f"{some} ({reason})" for reason in reasons if (some := _some(skipped, reason)))
    yield "skipped: " + ", ".join(named)


def _some(skipped: Mapping[str, str], reason: str) -> str:
    names = [name for name, why in skipped.items() if why == reason]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> Scheduler:
    """Return the scheduler that distributes groups of tests over several processes (`make test`)."""
    from tests.support.parallel import Scheduler

    return Scheduler(config, log)
