"""At the start of `make test`, missing tools are listed, and are installed only if that is possible and wanted."""

from __future__ import annotations

import itertools
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli.commands import doctor
from tests.support import machine
from tests.support.machine import Way

ROOT = Path(__file__).resolve().parents[2]


def test_nothing_is_installed_unasked_or_against_a_word() -> None:
    """Tools are installed only by root on Debian: without a question in CI, else after a question on a terminal.

    NO_INSTALL forbids the installation. The test tries all combinations.
    """
    for root, debian, ci, forbidden, terminal in itertools.product((False, True), repeat=5):
        way = machine.way(root=root, debian=debian, ci=ci, forbidden=forbidden, terminal=terminal)
        may = root and debian and not forbidden
        assert (way is Way.INSTALL) == (may and ci)
        assert (way is Way.ASK) == (may and terminal and not ci)


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with only a fake apt-get on PATH. The fake records all calls and fails for valkey-server."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$@" in *install*valkey-server*) exit 100;; esac\n'
    )
    (tools / "apt-get").chmod(0o755)
    return {"PATH": str(tools), "PYTHONPATH": str(ROOT)}


COMMAND = [sys.executable, "-m", "tests.support.machine"]
needs_apt = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/etc/debian_version"), reason="not root on Debian; run the tests as root"
)


def calls(tmp_path: Path) -> list[str]:
    """Return the recorded calls of apt-get."""
    file = tmp_path / "calls"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("words", [{}, {"CI": "1", "NO_INSTALL": "1"}])
def test_what_is_lacking_is_said_and_left(bare: dict[str, str], tmp_path: Path, words: dict[str, str]) -> None:
    """Without a terminal, each missing tool is listed with an install command, and no tool is installed."""
    done = subprocess.run(
        COMMAND,
        env=bare | words,
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    for name, package in (("ping", "iputils-ping"), ("amtool", "prometheus-alertmanager")):
        assert f"{name} (not found)" in done.stdout
        assert f"apt-get install -y {package}" in done.stdout
    assert "not installed" in done.stdout
    assert calls(tmp_path) == []


@needs_apt
def test_ci_installs_and_one_that_cannot_be_had_costs_no_other(bare: dict[str, str], tmp_path: Path) -> None:
    """In CI, packages are installed one by one if installing all packages at once fails.

    Redis is installed if Valkey cannot be installed.
    """
    subprocess.run(COMMAND, env=bare | {"CI": "true"}, capture_output=True, check=True, timeout=300, cwd=ROOT)
    wanted = [line.split("--no-install-recommends ", 1)[1] for line in calls(tmp_path) if "install" in line]
    assert {"iputils-ping", "valkey-server", "prometheus-alertmanager"} <= set(wanted[0].split())
    assert wanted[1:].count("iputils-ping") == 1
    assert wanted[wanted.index("valkey-server") + 1] == "redis-server"


@needs_apt
@pytest.mark.parametrize(("answer", "installs"), [(b"\n", True), (b"y\n", True), (b"n\n", False), (b"\x04", False)])
def test_a_terminal_is_asked(bare: dict[str, str], tmp_path: Path, answer: bytes, installs: bool) -> None:
    """On a terminal, packages are installed only after the user has agreed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(COMMAND, env=bare, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT)
    os.close(theirs)
    output = b""
    while b"[Y/n]" not in output:
        output += os.read(ours, 4096)
    assert calls(tmp_path) == []
    os.write(ours, answer)
    assert process.wait(300) == 0
    os.close(ours)
    assert bool(calls(tmp_path)) is installs


def test_every_lack_has_its_line() -> None:
    """The reason of a skipped test names the missing tool and the remedy. An unknown tool raises KeyError."""
    for check in doctor.CHECKS:
        finding = check()
        reason = doctor.missing_reason(finding.name)
        assert reason == (f"{finding.name}: {finding.missing}; {finding.remedy}" if finding.missing else "")
        assert not finding.missing or finding.remedy
    with pytest.raises(KeyError):
        doctor.missing_reason("hammer")
