"""Install the client libraries' own test suites in .suites: `make suites`. Returns at once if they are up to date.

`.suites/venv` has the pinned packages of requirements/suites.txt. It is separate from the engine's environment, where
pytest would load the suites' plugins into every test run. `.suites/src` has the source packages that contain tests,
each in a folder with the library's name.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".suites"
PINS = ROOT / "requirements" / "suites.txt"
STAMP = FOLDER / PINS.name
"""Copy of the pins of the installed packages."""
SOURCES = ("anthropic", "openai")
"""Libraries whose tests are in the source package. langchain-tests' wheel contains its tests."""


def pin(name: str, pins: str) -> str:
    """Return the pinned requirement of a package, with its hashes. Raises LookupError if `pins` does not contain it."""
    for entry in pins.replace("\\\n", "").splitlines():
        if entry.startswith(f"{name}=="):
            return " ".join(entry.split())
    raise LookupError(f"requirements/suites.txt has no {name}: run `make requirements`")


def unpack(archive: Path, to: Path) -> None:
    """Unpack a source package. Its one top-level folder becomes the folder `to`."""
    scratch = to.with_name(f"{to.name}.new")
    with tarfile.open(archive) as file:
        file.extractall(scratch, filter="data")
    (package,) = scratch.iterdir()
    package.rename(to)
    scratch.rmdir()


def install() -> None:
    """Make the environment and fetch the source packages. Raises CalledProcessError."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    bin_, python = ROOT / ".venv" / "bin", FOLDER / "venv" / "bin" / "python"
    _run(bin_ / "uv", "venv", "--quiet", "--python", bin_ / "python", FOLDER / "venv")
    _run(bin_ / "uv", "pip", "sync", "--quiet", "--require-hashes", "--python", python, PINS)
    wanted = FOLDER / "sources.txt"
    wanted.write_text("".join(f"{pin(name, PINS.read_text())}\n" for name in SOURCES))
    # Without build isolation, pip fetches no unpinned build backend to read a source package's metadata.
    pip = (bin_ / "python", "-m", "pip", "--python", python, "download", "--quiet")
    options = ("--require-hashes", "--no-deps", "--no-build-isolation", "--no-binary", ":all:")
    _run(*pip, *options, "--dest", FOLDER / "archives", "-r", wanted)
    (FOLDER / "src").mkdir()
    for archive in sorted((FOLDER / "archives").iterdir()):
        unpack(archive, FOLDER / "src" / archive.name.partition("-")[0])
    shutil.rmtree(FOLDER / "archives")
    shutil.copy(PINS, STAMP)


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, stdin=subprocess.DEVNULL)


def main() -> int:
    """Install the suites that are missing or out of date. Returns the exit code."""
    if STAMP.exists() and STAMP.read_bytes() == PINS.read_bytes():
        return 0
    try:
        install()
    except subprocess.CalledProcessError as error:
        print(f"suites: `{' '.join(error.cmd)}` failed (exit {error.returncode})", file=sys.stderr)
        print("suites: check that uv and pip reach their package index, then run `make suites` again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
