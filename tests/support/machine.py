"""Report the test tools that this machine lacks, and install them if the user agrees.

This is the first step of `make test`. Tools are installed only by root on Debian: on a terminal after a question, and
without a question if the variable CI is set. NO_INSTALL=1 forbids the installation. Tests whose tools are missing are
skipped, and each skip names the remedy. This module uses only the standard library, since it runs before the
environment is made.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from cluster.cli.commands import doctor

OTHER_PACKAGES = {"valkey-server": "redis-server"}
"""Replacements for packages that older Debian releases lack."""
APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120")


class Way(enum.Enum):
    """Remedy for missing packages. The value is the message to the user."""

    INSTALL = "installing them"
    ASK = "install them now?"
    FORBIDDEN = "not installed, since NO_INSTALL is set"
    NO_TERMINAL = "not installed, since there is no terminal to ask on; CI=1 installs without asking"
    NOT_ROOT = "not installed: that takes root"
    NOT_DEBIAN = "not installed: this is no Debian"


def way(*, root: bool, debian: bool, ci: bool, forbidden: bool, terminal: bool) -> Way:
    """Return what to do about missing packages."""
    if forbidden:
        return Way.FORBIDDEN
    if not debian:
        return Way.NOT_DEBIAN
    if not root:
        return Way.NOT_ROOT
    if ci:
        return Way.INSTALL
    return Way.ASK if terminal else Way.NO_TERMINAL


def packages(findings: Sequence[doctor.DoctorFinding]) -> list[str]:
    """Return the Debian packages of the missing tools."""
    return sorted({finding.apt for finding in findings if finding.missing and finding.apt})


def install(wanted: Sequence[str]) -> None:
    """Install the packages with apt-get: all at once, or one by one if that fails, so that one failure does not block
    the other packages.
    """
    _apt("update")
    if _apt("install", "-y", "--no-install-recommends", *wanted):
        return
    for name in wanted:
        names = [package for package in (name, OTHER_PACKAGES.get(name)) if package is not None]
        if not any(_apt("install", "-y", "--no-install-recommends", package) for package in names):
            print(f"test: apt-get cannot install {' or '.join(names)}", flush=True)


def _apt(*arguments: str) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        [*APT, *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print("".join(f"test: {line}\n" for line in done.stderr.strip().splitlines()[-5:]), end="", flush=True)
    return done.returncode == 0


def agreed() -> bool:
    """Ask the person at the terminal and return the answer. An empty answer means yes."""
    try:
        return input(f"test: {Way.ASK.value} [Y/n] ").strip().lower() in ("", "y", "yes")
    except EOFError:
        return False


def found_way() -> Way:
    """Return what to do about missing packages on this machine."""
    return way(
        root=os.geteuid() == 0,
        debian=os.path.exists("/etc/debian_version") and shutil.which("apt-get") is not None,
        ci=os.environ.get("CI", "") not in ("", "0", "false"),
        forbidden=os.environ.get("NO_INSTALL", "") not in ("", "0"),
        terminal=sys.stdin.isatty() and sys.stdout.isatty(),
    )


def main() -> int:
    """Report the missing tools, and install them if the user agrees. Returns 0 in any case, so that the tests run.

    `make setup` runs next and installs the rest.
    """
    lacking = [
        finding for finding in doctor.examine() if finding.missing and not finding.remedy.startswith(doctor.SETUP)
    ]
    if not lacking:
        print("test: this machine has all that the tests need")
        return 0
    print("test: this machine lacks, and skips what needs it:")
    for finding in lacking:
        print(f"test:   {finding.name} ({finding.missing}), for {finding.needed_for}: {finding.remedy}")
    wanted = packages(lacking)
    if wanted:
        chosen = found_way()
        line = f"apt-get install -y {' '.join(wanted)}"
        print(f"test: {line}", flush=True)
        if chosen is Way.INSTALL or (chosen is Way.ASK and agreed()):
            print(f"test: {Way.INSTALL.value}", flush=True)
            install(wanted)
        elif chosen is not Way.ASK:
            print(f"test: {chosen.value}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
