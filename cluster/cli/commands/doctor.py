"""Check which tools and resources this machine lacks. Each finding has the command that installs what is missing.

This module imports only the standard library, because `make doctor` runs the module before the environment exists.
`.ci/run` installs the Debian packages that the module lists. tests/conftest.py uses the checks to skip tests that
cannot run on this machine.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.cli import terminal

ROOT = Path(__file__).resolve().parents[3]
MIN_MEMORY_BYTES = 8 * 1000**3
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - only its free space is read
MIN_SHM_BYTES = 1 * 1000**3
SETUP = "make setup"


@dataclass(frozen=True, slots=True)
class DoctorFinding:
    """The result of one check.

    `missing` is a message, or empty if nothing is missing. `remedy` is the command that installs what is missing.
    `apt` is the name of the Debian package.
    """

    name: str
    missing: str = ""
    remedy: str = ""
    needed_for: str = ""
    apt: str = ""
    found: str = ""


def find_tool(name: str) -> str | None:
    """Return the path of a program, or None.

    Searches the folder of this Python, the checkout's .venv, PATH, and the sbin folders.
    """
    folders = [Path(sys.executable).parent, ROOT / ".venv" / "bin"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path)


def _tool(name: str, needed_for: str, remedy: str, apt: str = "") -> DoctorFinding:
    path = find_tool(name)
    if path:
        return DoctorFinding(name, needed_for=needed_for, found=path)
    return DoctorFinding(name, "not found", remedy, needed_for, apt)


def check_python() -> DoctorFinding:
    """Check that the version of Python is 3.11 to 3.14."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 14):
        return DoctorFinding("python", needed_for="everything", found=f"{version} ({sys.executable})")
    return DoctorFinding(
        "python",
        f"{version} is not 3.11 to 3.14",
        "apt-get install -y python3 python3-venv",
        "everything",
        "python3-venv",
    )


def check_environment() -> DoctorFinding:
    """Check that `.venv` exists in a checkout. Outside a checkout, check that the package is installed."""
    if not (ROOT / "Makefile").exists():
        return DoctorFinding("environment", needed_for="everything", found="installed package")
    if (ROOT / ".venv" / "bin" / "headrace").exists():
        return DoctorFinding("environment", needed_for="everything", found=".venv")
    return DoctorFinding("environment", "no .venv", SETUP, "everything")


def check_ip() -> DoctorFinding:
    """Check for iproute2's `ip`, which creates network namespaces."""
    return _tool("ip", "tests with two nodes", "apt-get install -y iproute2", "iproute2")


def check_ping() -> DoctorFinding:
    """Check for iputils' `ping`, which tests use to verify that a connection is cut."""
    return _tool("ping", "tests with several hosts", "apt-get install -y iputils-ping", "iputils-ping")


def check_namespaces() -> DoctorFinding:
    """Check that this process may create network namespaces."""
    purpose = "tests with two nodes"
    if not sys.platform.startswith("linux"):
        return DoctorFinding("namespaces", "only Linux has network namespaces", "run on Linux, as root", purpose)
    if os.geteuid() != 0:
        return DoctorFinding("namespaces", "not root", "run the tests as root (sudo make test)", purpose)
    unshare = find_tool("unshare")
    if unshare is None:
        return DoctorFinding("namespaces", "no `unshare`", "apt-get install -y util-linux", purpose, "util-linux")
    done = subprocess.run([unshare, "--net", "true"], capture_output=True, text=True, check=False)
    if done.returncode:
        return DoctorFinding(
            "namespaces",
            done.stderr.strip() or "refused",
            "run in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN",
            purpose,
        )
    return DoctorFinding("namespaces", needed_for=purpose, found="allowed")


def check_memory() -> DoctorFinding:
    """Check that this machine has enough memory for one engine together with Ray."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return DoctorFinding("memory", needed_for="the engine", found="unknown")
    text = f"{total / 1000**3:.1f} GB"
    if total >= MIN_MEMORY_BYTES:
        return DoctorFinding("memory", needed_for="the engine", found=text)
    return DoctorFinding("memory", f"{text}; a small model needs about 8 GB", "use a larger machine", "the engine")


def check_shared_memory() -> DoctorFinding:
    """Check for free space in /dev/shm, which the engine's processes use to communicate."""
    folder = Path(SHARED_MEMORY)
    if not folder.exists():
        return DoctorFinding("shared memory", needed_for="the engine", found="not used on this system")
    free = shutil.disk_usage(folder).free
    text = f"{free / 1000**3:.1f} GB free"
    if free >= MIN_SHM_BYTES:
        return DoctorFinding("shared memory", needed_for="the engine", found=text)
    return DoctorFinding(
        "shared memory", text, "mount -o remount,size=2G /dev/shm (in a container: --shm-size=2g)", "the engine"
    )


def check_processor() -> DoctorFinding:
    """Check for AVX2, which vLLM's CPU kernels need on x86-64."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return DoctorFinding("processor", needed_for="the engine on CPU", found="unknown")
    if "flags" not in info or " avx2" in info:
        return DoctorFinding("processor", needed_for="the engine on CPU", found="suitable")
    return DoctorFinding(
        "processor", "no AVX2", "use an x86-64 machine of 2013 or later, or an arm64 one", "the engine on CPU"
    )


def foreign_cluster_package() -> str | None:
    """Return the name and version of PyPI's `cluster` distribution, or None if it is not installed.

    The distribution has the import name `cluster`, like Headrace.
    """
    try:
        distribution = importlib.metadata.distribution("cluster")
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"{distribution.metadata['Name']} {distribution.version}"


def check_name_clash() -> DoctorFinding:
    """Check that PyPI's `cluster` package is not installed. The package has the same import name as Headrace."""
    other = foreign_cluster_package()
    if other is None:
        return DoctorFinding("import name", needed_for="everything", found="`cluster` is Headrace's")
    return DoctorFinding(
        "import name",
        f"the package {other} imports as `cluster` too",
        "pip uninstall cluster, then pip install --force-reinstall --no-deps headrace",
        "everything",
    )


def check_valkey() -> DoctorFinding:
    """Check for Valkey, which stores the limits that gateways share. Redis works too."""
    needed_for = "tests of limits that gateways share"
    if (redis := find_tool("redis-server")) and not find_tool("valkey-server"):
        return DoctorFinding("valkey-server", needed_for=needed_for, found=redis)
    return _tool("valkey-server", needed_for, "apt-get install -y valkey-server", "valkey-server")


def check_postgresql() -> DoctorFinding:
    """Check for PostgreSQL's programs, which Debian does not put on PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if debian or (initdb := find_tool("initdb")):
        return DoctorFinding(
            "postgresql", needed_for="tests of the ledger", found=str(debian[-1] if debian else initdb)
        )
    return DoctorFinding(
        "postgresql", "not found", "apt-get install -y postgresql", "tests of the ledger", "postgresql"
    )


def check_promtool() -> DoctorFinding:
    """Check for promtool, the program of Prometheus that validates rules and queries."""
    return _tool("promtool", "tests of alert rules", "apt-get install -y prometheus", "prometheus")


def check_amtool() -> DoctorFinding:
    """Check for amtool, the program of Alertmanager that validates routes."""
    return _tool(
        "amtool", "tests of alert routes", "apt-get install -y prometheus-alertmanager", "prometheus-alertmanager"
    )


def check_chromium() -> DoctorFinding:
    """Check for Chromium, in which the tests open the console's pages. Playwright brings no browser of its own."""
    needed_for = "tests of the console"
    if not find_tool("chromium") and (other := find_tool("chromium-browser") or find_tool("google-chrome")):
        return DoctorFinding("chromium", needed_for=needed_for, found=other)
    return _tool("chromium", needed_for, "apt-get install -y chromium", "chromium")


CHECKS: Sequence[Callable[[], DoctorFinding]] = (
    check_python,
    check_environment,
    check_name_clash,
    check_memory,
    check_shared_memory,
    check_processor,
    lambda: _tool("git", "a clone", "apt-get install -y git", "git"),
    lambda: _tool("curl", "tests of the HTTP port", "apt-get install -y curl", "curl"),
    lambda: _tool("make", "make demo, make test", "apt-get install -y make", "make"),
    lambda: _tool("buf", "make check", f"{SETUP} (it brings buf)"),
    check_ip,
    check_ping,
    check_namespaces,
    check_valkey,
    check_postgresql,
    check_promtool,
    check_amtool,
    check_chromium,
)


def missing_reason(name: str) -> str:
    """Run the check `name`. Returns what is missing and the remedy in one line, or "" if nothing is missing.

    Raises KeyError for an unknown name.
    """
    for check in CHECKS:
        finding = check()
        if finding.name == name:
            return f"{name}: {finding.missing}; {finding.remedy}" if finding.missing else ""
    raise KeyError(name)


def examine() -> list[DoctorFinding]:
    """Run all checks and return the findings."""
    return [check() for check in CHECKS]


def report(findings: Sequence[DoctorFinding]) -> str:
    """Format findings as text, with one line per finding.

    If Debian packages are missing, the last line has the command that installs all of them.
    """
    lines = []
    for finding in findings:
        mark = "lacks" if finding.missing else "ok"
        what = f"{finding.missing} (for {finding.needed_for}): {finding.remedy}" if finding.missing else finding.found
        lines.append(f"{mark:<6}{finding.name:<14}{what}")
    apt = sorted({finding.apt for finding in findings if finding.missing and finding.apt})
    if apt:
        lines.append(f"install with: apt-get install -y {' '.join(apt)}")
    elif not any(finding.missing for finding in findings):
        lines.append("nothing is missing")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the report. Returns the exit code: 0 if nothing is missing, else 1.

    With `--apt`, print only the names of the missing Debian packages and return 0.
    """
    findings = examine()
    if "--apt" in arguments:
        terminal.say(" ".join(sorted({finding.apt for finding in findings if finding.missing and finding.apt})))
        return 0
    terminal.say(report(findings))
    return 1 if any(finding.missing for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
