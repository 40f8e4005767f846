"""Build the files of a release in dist/: wheel, sdist, the chart's package and SHA256SUMS. `make dist` runs this.

The version is taken from the git tag (pyproject.toml, setuptools-scm). The build tools are installed with the hashes of
requirements/build.txt; with --offline, the build tools of this environment are used. All files in the archives have the
time of the commit, so that two builds of one commit have the same checksums.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMS = "SHA256SUMS"


def commit_time(root: Path) -> str:
    """Return the time of the commit in Unix seconds, or "" outside a repository."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def build(root: Path, out: Path, *, offline: bool) -> str:
    """Build the wheel and the sdist. Returns the version. Raises subprocess.CalledProcessError."""
    pins = root / "requirements" / "build.txt"
    isolation = ["--no-build-isolation", "--offline"] if offline else ["--build-constraints", pins, "--require-hashes"]
    environment = dict(os.environ)
    if when := commit_time(root):
        environment.setdefault("SOURCE_DATE_EPOCH", when)
    command = [sys.executable, "-m", "uv", "build", "--quiet", "--python", sys.executable, "--out-dir", out, *isolation]
    subprocess.run([*command, root], check=True, env=environment)
    (out / ".gitignore").unlink(missing_ok=True)
    (wheel,) = out.glob("*.whl")
    return wheel.name.split("-")[1]


def chart_version(version: str) -> str:
    """Convert the version of a Python package to SemVer: `0.2.dev3+gabc` becomes `0.2.0-dev.3+gabc`.

    Raises ValueError for a kind of version that releases never have, such as a post-release.
    """
    parts = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:(a|b|rc|\.dev)(\d+))?(?:\+(.+))?", version)
    if parts is None:
        raise ValueError(f"version {version}: expected 1.2.3, 1.2.3rc1 or 1.2.3.dev4+local")
    major, minor, patch, kind, number, local = parts.groups()
    before = f"-{kind.strip('.')}.{number}" if kind else ""
    return f"{major}.{minor}.{patch or 0}{before}" + (f"+{local}" if local else "")


def package_chart(root: Path, out: Path, version: str) -> bool:
    """Package the chart with this version. Returns False if Helm is not installed. Raises CalledProcessError.

    appVersion selects the tag of the images. If the version is a release, images with its tag exist, and appVersion is
    set to it. Otherwise the chart keeps the appVersion in Chart.yaml.
    """
    helm = shutil.which("helm")
    if helm is None:
        return False
    number = chart_version(version)
    images = ["--app-version", number] if "-" not in number else []
    command = [helm, "package", str(root / "helm"), "--version", number, *images, "--destination", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return True


def write_sums(out: Path) -> None:
    """Write the SHA-256 of each file into SHA256SUMS, in the form of `sha256sum --check`."""
    files = sorted(file for file in out.iterdir() if file.name != SUMS)
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files]
    (out / SUMS).write_text("".join(lines))


def main(arguments: Sequence[str]) -> int:
    """Build the files of a release. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the files of a release.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder, which is emptied first")
    parser.add_argument("--offline", action="store_true", help="build with the packages of this environment")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    try:
        version = build(ROOT, given.out, offline=given.offline)
        if not package_chart(ROOT, given.out, version):
            print("dist: Helm is not installed, so the chart is not packaged", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"dist: {error.cmd[0]} failed, see above", file=sys.stderr)
        return 1
    write_sums(given.out)
    print(f"headrace {version} in {given.out}:")
    for file in sorted(given.out.iterdir()):
        print(f"  {file.name}  {file.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
