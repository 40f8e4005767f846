"""Create the environment `.venv`. `make setup` runs this script with the Python that find-python.sh finds (3.11 to
3.14).

The script uses only the standard library and contains no registry's address. For torch's CPU build, pip with its own
configuration is tried first, then `uv --torch-backend=cpu`, which knows the address of that build. Every installed file
must match a hash in the pinned files. There is one exception: if pip is configured to look for torch's CPU build on a
local disk, the hash of the wheel found there is accepted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "headrace-setup.json"
LOG = VENV / "setup.log"
PINS = ROOT / "requirements" / "cpu.txt"
TORCH = ROOT / "requirements" / "torch.txt"
TOOLS = ROOT / "requirements" / "tools.txt"
LOCAL_TORCH = VENV / "torch-local.txt"
NEEDED_BYTES = 8 * 1024**3
LABEL = "environment"


class SetupError(Exception):
    """Error: a step failed. The message has the remedy."""


def pins(path: Path) -> list[str]:
    """Return the requirements in a file of pinned requirements, one per line, without hashes."""
    lines = path.read_text().splitlines()
    return [line.rstrip(" \\") for line in lines if line.strip() and not line.startswith(("#", " "))]


def fingerprint() -> str:
    """Return a digest of the files that define the environment. If it changes, the environment must be installed
    again."""
    digest = hashlib.sha256()
    for path in (PINS, TORCH, TOOLS, ROOT / "pyproject.toml", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Line:
    """A progress line. On a terminal it is redrawn in place; otherwise it is written once at the end of the step."""

    def __init__(self, step: str) -> None:
        self._head = f"{step} {LABEL:<13}".lstrip()
        self._live = sys.stdout.isatty()
        self._started = time.monotonic()

    def show(self, text: str, part: float) -> None:
        """Redraw the line with a progress bar. `part`: the progress from 0 to 1."""
        if self._live:
            bar = ("█" * int(part * 20)).ljust(20, "·")
            print(f"\r\033[K{self._head} {text:<34} {bar} {self._elapsed()}", end="", flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        print(f"{chr(13) + chr(27) + '[K' if self._live else ''}{self._head} {text}", flush=True)

    def done(self, text: str, hint: str = "") -> None:
        """Print the final form of the line."""
        self.note(f"{text:<34} {self._elapsed():>7}   {hint}".rstrip())

    def _elapsed(self) -> str:
        seconds = int(time.monotonic() - self._started)
        return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def run(command: Sequence[str], remedy: str, watch: Callable[[], None] | None = None) -> None:
    """Run a command, and append its output to the file LOG. If the command fails, raises SetupError with the last lines
    of LOG and with `remedy`. `watch`: called repeatedly while the command runs."""
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL) as process:
            while watch is not None and process.poll() is None:
                watch()
                threading.Event().wait(0.3)
            code = process.wait()
    if code:
        tail = "\n".join(f"    {line}" for line in LOG.read_text(errors="replace").splitlines()[-12:])
        raise SetupError(f"`{' '.join(command)}` failed (exit {code}):\n{tail}\n  {remedy}\n  the whole log: {LOG}")


NETWORK = "Check that pip reaches its package index (`pip download --no-deps typer`), then run `make setup` again."


def _python_name(version: str) -> str:
    return f"Python {version}" if version else "a Python that no longer starts"


def make_venv(python: Path, line: Line) -> None:
    """Create .venv if it is missing, then install the pinned pip and uv. Raises SetupError if .venv has another Python
    version."""
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if python.exists():
        answer = subprocess.run(
            [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True,
            text=True,
            check=False,
        )
        if answer.stdout.strip() != wanted:
            raise SetupError(
                f"{VENV} was made with {_python_name(answer.stdout.strip())}, and Python {wanted} was chosen now. "
                "Remove it (`make clean-all`) and run `make setup` again."
            )
    else:
        line.show("making .venv", 0.0)
        VENV.mkdir(exist_ok=True)
        run(
            [sys.executable, "-m", "venv", str(VENV)],
            f"Python's venv module is incomplete: on Debian or Ubuntu `apt-get install python{wanted}-venv`.",
        )
    line.show("pip and uv", 0.02)
    run([str(python), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", str(TOOLS)], NETWORK)


@dataclass(frozen=True)
class Wheel:
    """A wheel that pip, as configured here, would install for a requirement."""

    name: str
    version: str
    url: str
    sha256: str


def torch_for_pip(found: Sequence[Wheel], known: str) -> str | None:
    """Return the pinned requirements with which pip may install torch's CPU build; None if pip must not install it.

    `found`: the wheels that pip found. `known`: the text of torch.txt. If `known` has the hashes of all found wheels,
    it is returned. Otherwise, if all found wheels are on a local disk, requirements with their hashes are returned.
    """
    if not found or not all(wheel.version.endswith("+cpu") for wheel in found):
        return None
    if all(f"--hash=sha256:{wheel.sha256}" in known for wheel in found):
        return known
    if not all(wheel.url.startswith("file:") for wheel in found):
        return None
    lines = [f"{wheel.name}=={wheel.version.removesuffix('+cpu')} --hash=sha256:{wheel.sha256}" for wheel in found]
    return "".join(f"{line}\n" for line in lines)


def found_by_pip(python: Path) -> list[Wheel]:
    """Return the wheels that pip, as configured here, would install for the requirements in torch.txt; empty if pip
    fails."""
    wanted = sorted({line.split(";")[0].strip() for line in pins(TORCH)})
    command = [str(python), "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet"]
    probe = subprocess.run(
        [*command, "--report", "-", *wanted], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if probe.returncode:
        return []
    wheels = []
    for item in json.loads(probe.stdout)["install"]:
        info = item["download_info"]
        sha256 = info.get("archive_info", {}).get("hashes", {}).get("sha256", "")
        wheels.append(Wheel(item["metadata"]["name"], item["metadata"]["version"], info["url"], sha256))
    return wheels


def install_packages(python: Path, line: Line) -> str:
    """Install exactly the pinned packages, without resolving dependencies. Returns the installer that was used: pip or
    uv."""
    line.show("looking for torch's CPU build", 0.04)
    expected = len(pins(PINS))
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    start = LOG.stat().st_size if LOG.exists() else 0

    def watch() -> None:
        with LOG.open(errors="replace") as log:
            log.seek(start)
            collected = log.read().count("Collecting ")
        installed = sum(1 for _ in site.glob("*.dist-info"))
        part = min(1.0, max(0.6 * min(collected, expected) / expected, installed / expected))
        what = "installing" if installed > 10 or collected >= expected else "downloading"
        line.show(f"{what} {max(collected, installed)}/{expected} packages", 0.05 + 0.9 * part)

    remedy = f"{NETWORK} 8 GB of free disk space are needed."
    wheels = found_by_pip(python)
    torch = torch_for_pip(wheels, TORCH.read_text())
    if torch is not None:
        if torch != TORCH.read_text():
            line.note(f"torch from this machine's disk: {', '.join(wheel.url for wheel in wheels)}")
        LOCAL_TORCH.write_text(torch)
        files = ["-r", str(PINS), "-r", str(LOCAL_TORCH)]
        run([str(python), "-m", "pip", "install", "--no-deps", "--require-hashes", *files], remedy, watch)
        return "pip"
    # without --require-hashes, which refuses local versions such as 2.13.0+cpu; uv checks the hashes in a file anyway
    uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python), "--torch-backend=cpu"]
    files = ["-r", str(PINS), "-r", str(TORCH)]
    run([*uv, "--no-deps", *files], f"uv must reach PyTorch's own package index too. {remedy}", watch)
    return "uv"


def setup(step: str) -> None:
    """Install in .venv what the pinned files require. Returns at once if .venv is up to date. `step`: the text before
    the progress line."""
    line = Line(step)
    python = VENV / "bin" / "python"
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    if stamp.get("fingerprint") == fingerprint() and python.exists():
        line.done(f".venv, {len(pins(PINS))} packages")
        return
    if stamp.get("root", str(ROOT)) != str(ROOT):
        raise SetupError(
            f".venv was made in {stamp['root']} and cannot be moved: "
            "remove it (`make clean-all`) and run `make setup` again."
        )
    STAMP.unlink(missing_ok=True)
    free = shutil.disk_usage(ROOT).free
    if not python.exists() and free < NEEDED_BYTES:
        raise SetupError(f"{ROOT} has {free / 1024**3:.1f} GB of free disk space; the environment needs about 8 GB.")
    line.note(f"Python {sys.version.split()[0]} ({sys.executable})")
    make_venv(python, line)
    installer = install_packages(python, line)
    line.show("headrace itself", 0.98)
    run(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
        "Check the project's pyproject.toml.",
    )
    run(
        [str(python), "-c", "import cluster.cli.all_commands, vllm, ray"],
        "The installed packages cannot be imported: remove .venv (`make clean-all`) and run `make setup` again.",
    )
    STAMP.write_text(json.dumps({"fingerprint": fingerprint(), "root": str(ROOT), "installer": installer}) + "\n")
    line.done(f".venv, {len(pins(PINS))} packages (by {installer})", "(next time: 0 s)")


def main() -> int:
    """Run the setup. Returns the exit code: 0 done, 1 failed, 2 unsuitable Python, 130 interrupted."""
    parser = argparse.ArgumentParser(description="Make the environment .venv.")
    parser.add_argument("--step", default="", help="prefix of the progress line, for example [1/4]")
    arguments = parser.parse_args()
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        print(f"setup: Python 3.11 to 3.14 is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 2
    os.environ.pop("PYTHONPATH", None)
    try:
        setup(arguments.step)
    except SetupError as error:
        print(f"\nsetup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup was interrupted; `make setup` continues from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
