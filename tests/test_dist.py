"""The files of a release: their version, their contents, and their use after installation.

Everything is built from a copy of the working tree, without the network, by the script that `make dist` runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from loadtests.children import ROOT
from scripts.dist import chart_version, commit_time

pytestmark = pytest.mark.slow
TAG = "v3.1.4"
EMPTY_HOME = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}


def _run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, **EMPTY_HOME, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _git(cwd: Path, *arguments: str) -> str:
    return _run("git", "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments, cwd=cwd)


def _version(tree: Path) -> str:
    return _run(sys.executable, "-m", "setuptools_scm", cwd=tree).split()[-1]


@dataclass(frozen=True)
class Release:
    """The source tree of a tagged release, and the files built from it."""

    tree: Path
    out: Path

    @property
    def wheel(self) -> Path:
        """Path of the wheel."""
        return self.out / f"headrace-{TAG[1:]}-py3-none-any.whl"

    @property
    def sdist(self) -> Path:
        """Path of the source distribution."""
        return self.out / f"headrace-{TAG[1:]}.tar.gz"

    def tracked(self, folder: str) -> set[str]:
        """Return the files below a folder that belong to the repository."""
        return set(_git(self.tree, "ls-files", folder).splitlines())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Build a release with the script that `make dist` runs. The script runs in a copy of the working tree; the copy is
    a repository with one commit and a tag. Skips if the working tree itself is not in a repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository, so its files are not known")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in _git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        source = ROOT / name
        if source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
            (tree / name).chmod(source.stat().st_mode & 0o777)
    _git(tree, "init", "--quiet")
    _git(tree, "add", "--all")
    _git(tree, "commit", "--quiet", "--message", "release")
    _git(tree, "tag", TAG)
    _run(sys.executable, tree / "scripts" / "dist.py", "--offline", "--out", out, cwd=tree, PATH=_without_helm())
    return Release(tree, out)


def _without_helm() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "helm").exists())


def test_the_wheel_has_the_package_and_nothing_else(release: Release) -> None:
    """The wheel has every file of cluster/: generated code, types, data and migrations. It has no tests, load tests,
    scripts or documents."""
    names = {name for name in zipfile.ZipFile(release.wheel).namelist() if not name.endswith("/")}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == release.tracked("cluster")
    for name in ("v1/inference_pb2.py", "v1/inference_pb2.pyi", "py.typed", "config/vllm_arguments.json"):
        assert f"cluster/{name}" in package
    assert any(name.startswith("cluster/ledger/") and "migration" in name for name in package)
    information = zipfile.ZipFile(release.wheel).read(f"headrace-{TAG[1:]}.dist-info/METADATA").decode()
    assert f"\nVersion: {TAG[1:]}\n" in information
    assert "License-Expression: Apache-2.0" in information


def test_the_sdist_has_the_whole_repository(release: Release) -> None:
    """The sdist has all files of the repository, including the pinned requirements and the tests."""
    with tarfile.open(release.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert release.tracked(".") <= names


def test_an_installed_wheel_works(release: Release, tmp_path: Path) -> None:
    """An installed wheel works without the source. `headrace --version`, `headrace version` and the package report the
    version of the tag."""
    with zipfile.ZipFile(release.wheel) as wheel:  # what pip does, without its start
        wheel.extractall(tmp_path)  # noqa: S202
        entry_points = wheel.read(f"headrace-{TAG[1:]}.dist-info/entry_points.txt").decode()
    assert "headrace = cluster.cli.main:main" in entry_points.splitlines()
    ask = [sys.executable, "-m", "cluster.cli.main"]
    installed = {"PYTHONPATH": str(tmp_path)}
    assert _run(*ask, "--version", cwd=tmp_path, **installed) == f"headrace {TAG[1:]}\n"
    assert json.loads(_run(*ask, "version", "--json", cwd=tmp_path, **installed))["headrace"] == TAG[1:]
    program = "import cluster, cluster.v1.inference_pb2; print(cluster.__version__, cluster.__file__)"
    version, file = _run(sys.executable, "-c", program, cwd=tmp_path, **installed).split()
    assert version == TAG[1:]
    assert Path(file).is_relative_to(tmp_path)


def test_the_checksums_are_right_and_the_wheel_is_reproducible(release: Release, tmp_path: Path) -> None:
    """`sha256sum --check` accepts the files. The wheel was built from the sdist, and is identical to one built from the
    repository at another time."""
    _run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=release.out)
    build = [sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--no-build-isolation", "--offline"]
    where = ["--python", sys.executable, "--out-dir", tmp_path, release.tree]
    _run(*build, *where, cwd=release.tree, SOURCE_DATE_EPOCH=commit_time(release.tree))
    assert (tmp_path / release.wheel.name).read_bytes() == release.wheel.read_bytes()


def test_every_kind_of_source_has_a_version(release: Release, tmp_path: Path) -> None:
    """The sdist and `git archive` of a tag have the tag's version. A commit after the tag, a clone without tags, and a
    copy without git have development versions, which cannot be mistaken for a release."""
    with tarfile.open(release.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert _version(unpacked) == TAG[1:]
    archived = tmp_path / "archived"
    archived.mkdir()
    _run("sh", "-c", f"git -C '{release.tree}' archive {TAG} | tar -x -C '{archived}'", cwd=tmp_path)
    assert _version(archived) == TAG[1:]
    for name, prepare in (
        ("later", ("commit", "--quiet", "--allow-empty", "--message", "x")),
        ("bare", ("tag", "-d", TAG)),
    ):
        clone = tmp_path / name
        _git(tmp_path, "clone", "--quiet", str(release.tree), str(clone))
        _git(clone, *prepare)
        assert Version(_version(clone)).is_devrelease, name
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "pyproject.toml").write_bytes((release.tree / "pyproject.toml").read_bytes())
    assert _version(copy) == "0.1.0.dev0"


@given(
    st.tuples(*[st.integers(0, 99)] * 3),
    st.sampled_from(["", "a1", "b2", "rc3", ".dev4"]),
    st.sampled_from(["", "+g1a2b", "+g1.d2026"]),
)
def test_the_charts_version_orders_as_the_packages(numbers: tuple[int, ...], before: str, local: str) -> None:
    """The chart's version has the same numbers and local part as the package's version. The chart's version is a SemVer
    pre-release if and only if the package's version is a pre-release."""
    version = ".".join(map(str, numbers)) + before + local
    chart = chart_version(version)
    assert chart.partition("+")[0].partition("-")[0] == ".".join(map(str, numbers))
    assert ("-" in chart) == Version(version).is_prerelease
    assert chart.endswith(local)


def test_a_version_that_no_release_has_is_refused() -> None:
    """A post-release version is refused, since SemVer has no counterpart."""
    with pytest.raises(ValueError, match=r"1\.0\.post1"):
        chart_version("1.0.post1")
