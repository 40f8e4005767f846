"""Conversion of the rendered chart to pods, with programs, arguments, environment and files as Kubernetes would set
them.

Deployments, StatefulSets and Jobs contain all of these. For a RayCluster the command line and a few variables come from
KubeRay, which does not run here: `_ray_pod` writes what KubeRay's operator writes.
"""

from __future__ import annotations

import base64
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loadtests.children import ROOT
from loadtests.hosts.fabric import Place

CHART = ROOT / "helm"
NAMESPACE = RELEASE = "headrace"
DOMAIN = f"{NAMESPACE}.svc.cluster.local"
HEAD_PORT = 6379
OBJECT_STORE_BYTES = 128 << 20
"""Size of Ray's object store in bytes. By default Ray sizes the store by the container's memory, which here is the
whole machine's memory.
"""
Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Mount:
    """Mount of a volume in a container. `source`: folder on this machine; None for an in-memory volume, which has the
    size `size`."""

    path: str
    source: Path | None
    read_only: bool = False
    size: str = "64Mi"


@dataclass(frozen=True, slots=True)
class Spec:
    """Spec of one container to run."""

    name: str
    component: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    user: int
    group: int
    grace_s: float = 30.0
    pre_stop_s: float = 0.0
    ready_port: int = 0
    ready_service: str = ""
    """Name of the service that the readiness probe checks with grpc.health.v1. If the probe is absent, `ready_port` is
    0.
    """
    ready_period_s: float = 5.0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Release:
    """All Kubernetes objects of a Helm release: the objects that the chart renders, and the Secrets that `headrace pod
    secrets` has made."""

    objects: Sequence[Object]

    def of(self, kind: str) -> Iterator[Object]:
        """Yield the objects of a kind."""
        return (item for item in self.objects if item["kind"] == kind)

    def find(self, kind: str, name: str) -> Object:
        """Return the object of a kind with this name. Raises LookupError."""
        for item in self.of(kind):
            if item["metadata"]["name"] == name:
                return item
        raise LookupError(f"the chart has no {kind} {name}")

    def files(self, kind: str, name: str, items: Sequence[Mapping[str, str]] = ()) -> dict[str, str]:
        """Return the files in a volume of a ConfigMap or Secret: contents by name. `items`: pairs of a key and a file
        name, as in a pod's volume; without items, all keys are files."""
        manifest = self.find(kind, name)
        data = dict(manifest.get("data", {}))
        if kind == "Secret":
            data = {key: base64.b64decode(value).decode() for key, value in data.items()} | manifest.get(
                "stringData", {}
            )
        return {item["path"]: data[item["key"]] for item in items if item["key"] in data} if items else dict(data)


def helm() -> str:
    """Return the path of the program Helm: from HEADRACE_HELM, else `helm` on PATH, else the copy that the chart's
    tests unpack. Raises RuntimeError if there is none."""
    named = os.environ.get("HEADRACE_HELM") or shutil.which("helm")
    if named:
        return named
    try:
        from tests.support import helm as unpacked
    except ImportError:
        raise RuntimeError("helm is not on PATH: install it, or name it in HEADRACE_HELM") from None
    return str(unpacked.tool("helm"))


def render(values: Sequence[Path], secrets: Sequence[Object]) -> Release:
    """Run `helm template` and return the release. Raises RuntimeError with the output of Helm."""
    command = [helm(), "template", RELEASE, str(CHART), "--namespace", NAMESPACE]
    for path in values:
        command += ["--values", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"helm template: {done.stderr.strip()[-2000:]}")
    objects = [item for item in yaml.safe_load_all(done.stdout) if item]
    return Release((*objects, *secrets))


def make_secrets() -> list[Object]:
    """Return the parsed output of `headrace pod secrets`."""
    command = [sys.executable, "-m", "cluster.cli.main", "pod", "secrets", "--namespace", NAMESPACE, "--name", RELEASE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60)
    if done.returncode:
        raise RuntimeError(f"headrace pod secrets: {done.stderr.strip()[-2000:]}")
    return [item for item in yaml.safe_load_all(done.stdout) if item]


VALKEY = "valkey-server"
HOST_OF_THE_POD = "<spec.nodeName>"
"""Placeholder in an environment variable for the host of the pod."""


class Containers:
    """Maker of the container specs of a Helm release. Volumes become folders below `home`. The folder of a volume claim
    is kept and used again by later releases."""

    def __init__(self, release: Release, home: Path, claims: Mapping[str, Path]) -> None:
        """Store the release. `claims`: folders of existing volume claims, by name."""
        self._release = release
        self._home = home
        self._claims = dict(claims)

    def of(self, kind: str, name: str, ordinal: int = 0) -> Spec:
        """Return the container of one pod of a Deployment, StatefulSet or Job."""
        manifest = self._release.find(kind, name)
        template = manifest["spec"]["template"]
        pod = f"{name}-{ordinal}"
        claims = [claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", ())]
        container = template["spec"]["containers"][0]
        spec = self._container(pod, template, container, claims)
        if not spec.command:
            spec = _entry_point(spec)
        if spec.command[0] == VALKEY and shutil.which(VALKEY) is None:  # Redis replaces it
            spec = dataclasses.replace(spec, command=("redis-server", *spec.command[1:]))
        return spec

    def ray(self, cluster: str, group: str = "", ordinal: int = 0) -> Spec:
        """Return the container of a RayCluster's head; with `group`, the container of a node in that group."""
        manifest = self._release.find("RayCluster", f"{RELEASE}-{cluster}")
        spec = manifest["spec"]
        part = (
            next(candidate for candidate in spec["workerGroupSpecs"] if candidate["groupName"] == group)
            if group
            else spec["headGroupSpec"]
        )
        pod = f"{manifest['metadata']['name']}-{group or 'head'}-{ordinal}"
        container = part["template"]["spec"]["containers"][0]
        made = self._container(pod, part["template"], container, ())
        return _ray_pod(made, manifest, part, container, self._release, head=not group)

    def _container(self, pod: str, template: Object, container: Object, claims: Sequence[str]) -> Spec:
        security = template["spec"].get("securityContext", {})
        user, group = int(security.get("runAsUser", 0)), int(security.get("runAsGroup", 0))
        volumes = {item["name"]: item for item in template["spec"].get("volumes", ())}
        mounts = []
        for mount in container.get("volumeMounts", ()):
            name = mount["name"]
            if name in claims:
                made = Mount(mount["mountPath"], self._folder(pod, f"claim-{name}", user, group, keep=True))
            else:
                made = self._volume(pod, volumes[name], mount["mountPath"], user, group)
            mounts.append(made)
        probe = container.get("readinessProbe", {})
        asked = probe.get("grpc", {})
        return Spec(
            name=pod,
            component=template["metadata"]["labels"]["app.kubernetes.io/component"],
            command=(*map(str, container.get("command", ())), *map(str, container.get("args", ()))),
            environment={item["name"]: self._value(item, pod) for item in container.get("env", ())},
            mounts=tuple(mounts),
            user=user,
            group=group,
            grace_s=float(template["spec"].get("terminationGracePeriodSeconds", 30)),
            pre_stop_s=float(container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)),
            ready_port=int(asked.get("port", 0)),
            ready_service=str(asked.get("service", "")),
            ready_period_s=float(probe.get("periodSeconds", 10)),
            labels=template["metadata"]["labels"],
        )

    def _value(self, variable: Object, pod: str) -> str:
        if "value" in variable:
            return str(variable["value"])
        if field := variable["valueFrom"].get("fieldRef"):
            return pod if field["fieldPath"] == "metadata.name" else HOST_OF_THE_POD
        wanted = variable["valueFrom"]["secretKeyRef"]
        return self._release.files("Secret", wanted["name"])[wanted["key"]]

    def _volume(self, pod: str, volume: Object, path: str, user: int, group: int) -> Mount:
        name = volume["name"]
        if "emptyDir" in volume:
            empty = volume["emptyDir"] or {}
            if empty.get("medium") == "Memory":
                return Mount(path, None, size=str(empty.get("sizeLimit", "64Mi")))
            return Mount(path, self._folder(pod, name, user, group))
        if "persistentVolumeClaim" in volume:
            return Mount(path, self._claims[volume["persistentVolumeClaim"]["claimName"]])
        if "configMap" in volume:
            files = self._release.files("ConfigMap", volume["configMap"]["name"])
        else:
            secret = volume["secret"]
            files = self._release.files("Secret", secret["secretName"], secret.get("items", ()))
        folder = self._folder(pod, name, user, group)
        for file, text in files.items():
            (folder / file).write_text(text)
            os.chown(folder / file, 0, group)
            (folder / file).chmod(0o440)
        return Mount(path, folder, read_only=True)

    def _folder(self, pod: str, name: str, user: int, group: int, *, keep: bool = False) -> Path:
        folder = self._home / pod / name
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, user, group)
        return folder


def _entry_point(spec: Spec) -> Spec:
    """Return the pod spec of PostgreSQL with a command that replaces the image's entry point. Like the entry point in a
    real pod, the command creates the database if there is none, and then runs the server."""
    data = spec.environment["PGDATA"]
    script = (
        'set -e; if [ ! -s "$PGDATA/PG_VERSION" ]; then umask 077; printf %s "$POSTGRES_PASSWORD" > /tmp/password; '
        'initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth=scram-sha-256 --auth-local=trust '
        '--encoding=UTF8 --locale=C --pgdata="$PGDATA"; '
        'echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"; '
        'echo "CREATE DATABASE \\"$POSTGRES_DB\\"" | postgres --single -D "$PGDATA" postgres; fi; '
        f"exec postgres -D {data} -c listen_addresses='*'"
    )
    return dataclasses.replace(spec, command=("bash", "-c", script))


def _ray_pod(spec: Spec, cluster: Object, part: Object, container: Object, release: Release, *, head: bool) -> Spec:
    """Return the spec completed as KubeRay does: with KubeRay's command line and variables."""
    service = f"{cluster['metadata']['name']}-head-svc.{DOMAIN}"
    parameters = {
        **part["rayStartParams"],
        "block": "true",
        "dashboard-agent-listen-port": "52365",
        "metrics-export-port": "8080",
        "memory": str(_bytes(container["resources"]["limits"]["memory"])),
        "object-store-memory": str(OBJECT_STORE_BYTES),
    }
    if not head:
        parameters["address"] = f"{service}:{HEAD_PORT}"
    options = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in sorted(parameters.items())]
    start = " ".join(["ray start", *(["--head"] if head else []), *options])
    auth = cluster["spec"]["authOptions"]
    variables = {
        "RAY_CLUSTER_NAME": cluster["metadata"]["name"],
        "RAY_PORT": str(HEAD_PORT),
        "RAY_ADDRESS": f"127.0.0.1:{HEAD_PORT}" if head else f"{service}:{HEAD_PORT}",
        "RAY_AUTH_MODE": auth["mode"],
        "RAY_AUTH_TOKEN": release.files("Secret", auth["secretName"])["auth_token"],
    }
    tolerance = cluster["spec"].get("gcsFaultToleranceOptions")
    if head and tolerance:
        variables["RAY_REDIS_ADDRESS"] = tolerance["redisAddress"]
        variables["RAY_external_storage_namespace"] = tolerance["externalStorageNamespace"]
    if not head:
        variables |= {"FQ_RAY_IP": service, "RAY_IP": service.split(".")[0]}
        if tolerance:
            variables["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
    command = ("bash", "-c", f"ulimit -n 65536; {start}")
    return dataclasses.replace(spec, command=command, environment={**variables, **spec.environment})


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([KMGT]i)?", text).groups()  # type: ignore[union-attr]
    return int(number) << {None: 0, "Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}[unit]


@dataclass(frozen=True, slots=True)
class Names:
    """The DNS names of the cluster, derived from the rendered Services: addresses by name, and SRV records by port
    name."""

    services: Sequence[Object]

    def zone(self, pods: Sequence[tuple[Spec, Place, bool]]) -> dict[str, Any]:
        """Return the DNS zone. `pods`: each pod's spec and place, and whether the pod is ready."""
        hosts: dict[str, list[str]] = {}
        served: dict[str, list[tuple[str, int]]] = {}
        for service in self.services:
            name, spec = f"{service['metadata']['name']}.{DOMAIN}", service["spec"]
            everyone = spec.get("publishNotReadyAddresses", False)
            members = [
                (pod, place)
                for pod, place, ready in pods
                if (ready or everyone) and spec["selector"].items() <= pod.labels.items()
            ]
            hosts[name] = [place.address for _, place in members]
            if spec.get("clusterIP") != "None":
                continue
            hosts |= {f"{pod.name}.{name}": [place.address] for pod, place in members}
            for port in spec["ports"]:
                key = f"_{port['name']}._{port['protocol'].lower()}.{name}"
                served[key] = [(f"{pod.name}.{name}", int(port["port"])) for pod, _ in members]
        for pod, place, _ in pods:
            if pod.name.endswith("-head-0"):  # the Service that KubeRay itself creates
                hosts[f"{pod.name.removesuffix('-0')}-svc.{DOMAIN}"] = [place.address]
        return {"hosts": hosts, "srv": served}
