"""A whole cluster for the load test `hosts`: stores, Ray, gateways and controller, each started after the parts
that it needs.

There are four hosts. `a` and `b` have a Ray node and a gateway each. `c` has the head of Ray, the controller, both
stores and the DNS server. `d` has the callers. The rendered chart decides every program, argument, variable and
file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.cli import certificates
from loadtests.children import Children, DidNotStart
from loadtests.hosts import rendered
from loadtests.hosts.cgroup import cgroup
from loadtests.hosts.fabric import Fabric, fabric
from loadtests.hosts.pods import Kubelet, Pod, harness_pod
from loadtests.hosts.rendered import RELEASE, Containers, Mount, Names, Object, Release
from loadtests.hosts.story import Timeline
from loadtests.serving import ours as serving

HOSTS = A, B, C, D = "a", "b", "c", "d"
"""Names of the hosts. The callers run on host D."""
VALUES = Path(__file__).parent / "values.yaml"
MASS, TENANT = "mass", "load"
BLUE, GREEN = "blue", "green"
GROUP = "cpu"
"""Name of the only group of Ray nodes in the values: one node on host a and one node on host b."""
STEP_MS, PREFILL_TOKENS_PER_S = 40, 40_000
UP_S, RAY_UP_S, FLEET_UP_S = 60.0, 120.0, 240.0
API, DNS = "kube-api", "kube-dns"


@dataclass(frozen=True, slots=True)
class Size:
    """Size of the fleet of simulated workers."""

    workers: int = 4
    max_num_seqs: int = 64
    """Value of `max_num_seqs` of each worker: the largest number of sequences that the worker's engine takes."""

    @property
    def capacity(self) -> int:
        """Number of concurrent streams that counts as full load: half of what the engines take. The other half is
        headroom, so that a fleet that loses half of its nodes queues no stream."""
        return self.workers * self.max_num_seqs // 2


@dataclass(eq=False, slots=True)
class Cluster:
    """The running cluster."""

    fabric: Fabric
    kubelet: Kubelet
    size: Size
    home: Path
    secrets: Sequence[Object]
    release: Release
    timeline: Timeline
    claims: Mapping[str, Path]
    """Folders of existing volumes by name."""
    models: Sequence[Mapping[str, object]]
    """Model entries of the configuration."""
    rays: Sequence[str] = (BLUE,)
    """Ray clusters of the release. A model entry that names no Ray cluster runs on the first."""
    key: str = ""

    @property
    def processors(self) -> str:
        """Description of how hosts and pods share the processors of this machine."""
        whose = f"those of host {C} last"
        return f"by process, {whose}" if self.kubelet.cgroup is not None else "by session: it gives nobody groups"

    def containers(self) -> Containers:
        """Return the containers of the current release."""
        return Containers(self.release, self.home / "volumes", self.claims)

    async def upgrade(
        self, *, models: Sequence[Mapping[str, object]] | None = None, rays: Sequence[str] | None = None
    ) -> None:
        """Run `helm upgrade` with other models or Ray clusters. The upgrade replaces the controller's pod, and adds and
        removes Ray clusters. Raises RuntimeError if the upgrade would also replace a gateway's pod, and DidNotStart if
        a pod does not start."""
        models, rays = self.models if models is None else models, self.rays if rays is None else rays
        release = _release(self.home, models, rays, self.secrets)
        name = f"{RELEASE}-gateway"
        if release.find("StatefulSet", name) != self.release.find("StatefulSet", name):
            raise RuntimeError("a change of models or Ray clusters would restart the gateways")
        before = self.rays
        self.release, self.models, self.rays = release, models, rays
        for ray in rays:
            if ray not in before:
                await self.start_ray(ray)
        old = self.pod("controller-0")
        await self.kubelet.end(old)
        fresh = self.kubelet.add(self.containers().of("Deployment", f"{RELEASE}-controller"), old.place)
        await self.kubelet.started(fresh, UP_S)
        gone = [pod for ray in before if ray not in rays for pod in (*self.nodes_of(ray), self.head_of(ray))]
        await asyncio.gather(*(self.kubelet.end(pod) for pod in gone))

    async def start_ray(self, ray: str) -> None:
        """Start the Ray cluster `ray` of the Helm release as KubeRay does: first the head, then the nodes. Raises
        DidNotStart."""
        containers, net = self.containers(), self.fabric
        head = self.kubelet.add(containers.ray(ray), net.place(f"{ray}-head", C))
        await self.kubelet.started(head, RAY_UP_S)
        await _connects(self, head, rendered.HEAD_PORT)
        for i, host in enumerate((A, B)):
            self.kubelet.start(self.kubelet.add(containers.ray(ray, GROUP, i), net.place(f"{ray}-node{i}", host)))

    def pod(self, name: str) -> Pod:
        """Return the pod with this name, given without the name of the release."""
        return self.kubelet.pods[f"{RELEASE}-{name}"]

    @property
    def gateways(self) -> list[Pod]:
        """Pods of both gateways."""
        return [self.pod(f"gateway-{i}") for i in range(2)]

    @property
    def nodes(self) -> list[Pod]:
        """Pods of the nodes of the first Ray cluster, on host a and host b."""
        return self.nodes_of(self.rays[0])

    def nodes_of(self, ray: str) -> list[Pod]:
        """Return the pods of the nodes of a Ray cluster."""
        return [self.pod(f"{ray}-{GROUP}-{i}") for i in range(2)]

    @property
    def head(self) -> Pod:
        """Pod of the head of the first Ray cluster."""
        return self.head_of(self.rays[0])

    def head_of(self, ray: str) -> Pod:
        """Return the pod of the head of a Ray cluster."""
        return self.pod(f"{ray}-head-0")

    def whole(self, beside: Collection[str] = ()) -> bool:
        """Return whether every gateway has a link to every simulated worker. `beside`: workers that are leaving and do
        not count."""
        return self.linked(MASS, beside) >= self.size.workers

    def linked(self, model: str, beside: Collection[str] = ()) -> int:
        """Return the number of workers of a model that have links to every gateway. Workers in `beside` are not
        counted."""
        ups = [self.timeline.up(pod.spec.name) - set(beside) for pod in self.gateways]
        return min(sum(worker.startswith(f"{model}-") for worker in up) for up in ups)

    async def until_whole(self, timeout_s: float, beside: Collection[str] = ()) -> bool:
        """Wait until every gateway has a link to every simulated worker. Returns False if this takes longer than
        `timeout_s`. `beside`: workers that are leaving and do not count."""
        deadline = time.monotonic() + timeout_s
        while not self.whole(beside):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def ray_runs(self) -> bool:
        """Return whether the dashboard of the first Ray cluster answers and reports every application as running.
        Blocks."""
        applications = self._ask_ray(self.rays[0], "/api/serve/applications/").get("applications", {})
        return bool(applications) and all(application["status"] == "RUNNING" for application in applications.values())

    def ray_nodes(self, ray: str) -> int:
        """Return the number of living nodes of a Ray cluster, including the head, as its dashboard reports it.
        Blocks."""
        nodes = self._ask_ray(ray, "/api/v0/nodes?limit=100&detail=true")
        return sum(row.get("state") == "ALIVE" for row in nodes.get("data", {}).get("result", {}).get("result", []))

    def _ask_ray(self, ray: str, path: str) -> Mapping[str, Any]:
        """Return the JSON answer of a Ray cluster's dashboard; {} if the dashboard does not answer."""
        token = self.release.files("Secret", f"{RELEASE}-secrets")["auth_token"]
        request = urllib.request.Request(
            f"http://{self.head_of(ray).place.address}:8265{path}", headers={"Authorization": f"Bearer {token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=3.0) as answer:  # noqa: S310 - http, made above
                parsed = json.load(answer)
        except (OSError, ValueError):
            return {}
        return parsed if isinstance(parsed, dict) else {}

    async def exec(self, pod: Pod, *command: str, timeout_s: float = 60.0) -> str:
        """Run a command in the namespaces and environment of a pod, like `kubectl exec`, and return the output. Raises
        RuntimeError with the output of a failed command.
        """
        first = pod.first
        if first is None:
            raise RuntimeError(f"{pod.spec.name} does not run")
        environment = [part.decode() for part in (pod.home / "environment").read_bytes().split(b"\0") if part]
        arguments = ["nsenter", f"--target={first.pid}", "--all", f"--root=/proc/{first.pid}/root", "--wd=/"]
        try:
            done = await asyncio.to_thread(
                subprocess.run, [*arguments, "env", "-i", "--chdir=/", *environment, *command],
                capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command)} in {pod.spec.name}: {error}") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} in {pod.spec.name}: {done.stdout[-1000:]} {done.stderr[-1000:]}")
        return done.stdout

    async def usage(self) -> list[tuple[str, int, str, int, str]]:
        """Return every row of the ledger: request, segment, record, completion tokens, outcome."""
        query = "COPY (SELECT request_id, segment, record_id, completion_tokens, outcome FROM usage) TO STDOUT"
        socket = "/var/run/postgresql"  # TCP needs a password; this socket trusts every process in the pod
        out = await self.exec(
            self.pod("postgresql-0"), "psql", "-h", socket, "-U", "headrace", "-At", "-c", query, "headrace"
        )
        rows = [line.split("\t") for line in out.splitlines()]
        return [(row[0], int(row[1]), row[2], int(row[3]), row[4]) for row in rows]


def mass_source(model: Path, seed: int, size: Size) -> str:
    """Return the model source of the simulated workers; its path is valid in the pods. Each token has a different text,
    so each step gives a chunk.
    """
    room = f"max_num_seqs={size.max_num_seqs}&max_num_batched_tokens=2048&kv_blocks=16384&max_model_len=8192"
    speed = f"decode_ms={STEP_MS}&prefill_tokens_per_s={PREFILL_TOKENS_PER_S}"
    return f"sim:///models/{model.name}?{speed}&{room}&seed={seed}&{serving.plain_tokens(model)}"


def _release(
    home: Path, models: Sequence[Mapping[str, object]], rays: Sequence[str], made: Sequence[Object]
) -> Release:
    """Render the Helm release. Every Ray cluster in `rays` is a copy of the first Ray cluster in the values, with
    another name. `made`: the Secrets that were made before."""
    clusters = yaml.safe_load(VALUES.read_text())["ray"]["clusters"]
    used = [
        {"name": ray, "dashboard_url": f"http://{RELEASE}-{ray}-head-svc:8265", "token_file": "/secrets/ray-token"}
        for ray in rays
    ]
    values = home / "models.yaml"
    values.write_text(
        yaml.safe_dump(
            {
                "config": {"models": list(models), "ray": used},
                "ray": {"clusters": [{**clusters[0], "name": ray} for ray in rays]},
            }
        )
    )
    return rendered.render([VALUES, values], made)


@asynccontextmanager
async def running(children: Children, folder: Path, *, size: Size, seed: int) -> AsyncIterator[Cluster]:
    """Start the cluster, and wait until its fleet runs and an API key exists. Remove everything afterwards. Raises
    DidNotStart."""
    model, _ = await serving.prepare(children, "tokenizer", folder)
    home = folder / "hosts"
    claims = {"models": home / "claims" / "models"}
    claims["models"].mkdir(parents=True)
    tokenizer = claims["models"] / "tokenizer"
    tokenizer.mkdir()
    for file in model.iterdir():
        (tokenizer / file.name).write_bytes(file.read_bytes())
    entry = {
        "name": MASS,
        "source": mass_source(tokenizer, seed, size),
        "replicas": {"min": size.workers, "max": size.workers},
    }
    made = rendered.make_secrets()
    release = _release(home, [entry], (BLUE,), made)
    async with AsyncExitStack() as stack:
        net = stack.enter_context(fabric(HOSTS))
        dns = net.place("dns", C)
        together = stack.enter_context(cgroup())
        kubelet = Kubelet(children, home, Names(list(release.of("Service"))), dns.address, together, last=(C,))
        timeline = Timeline(children.folder)
        stack.enter_context(contextlib.closing(timeline))
        await stack.enter_async_context(kubelet.running())
        cluster = Cluster(net, kubelet, size, home, made, release, timeline, claims, [entry])
        containers = cluster.containers()
        await _start_site(cluster, dns)
        await _stores(cluster, containers)
        await _serve(cluster, containers)
        yield cluster


async def _start_site(cluster: Cluster, dns: Any) -> None:
    """Start the services that every Kubernetes cluster has: DNS and an API server."""
    kubelet, net = cluster.kubelet, cluster.fabric
    zone = Mount("/zone", cluster.kubelet.zone.parent, read_only=True)
    names = kubelet.add(
        harness_pod(DNS, "dns", "-m", "loadtests.hosts.inside.dns_server", "/zone/zone.json", mounts=[zone]), dns
    )
    place = net.place("api", C)
    folder = cluster.home / "api"
    folder.mkdir()
    certificates.make_authority(folder / "ca.crt", folder / "ca.key", 30)
    cert, key = certificates.issue_server(folder, "tls", [place.address], 30)
    assert (cert.name, key.name) == ("tls.crt", "tls.key")
    account = cluster.home / "account"
    account.mkdir()
    token = secrets.token_hex(16)
    (folder / "token").write_text(token)
    for name, text in {"token": token, "namespace": RELEASE, "ca.crt": (folder / "ca.crt").read_text()}.items():
        (account / name).write_text(text)
        (account / name).chmod(0o644)
    account.chmod(0o755)
    api = kubelet.add(
        harness_pod(
            API, "api", "-m", "loadtests.hosts.inside.kube_api", "/api", mounts=[Mount("/api", folder, read_only=True)]
        ),
        place,
    )
    kubelet.account = account
    for pod in (names, api):
        await kubelet.started(pod, UP_S)
    kubelet.environment = {"KUBERNETES_SERVICE_HOST": place.address, "KUBERNETES_SERVICE_PORT": "6443"}


async def _stores(cluster: Cluster, containers: Containers) -> None:
    kubelet, net = cluster.kubelet, cluster.fabric
    pods = []
    for name in ("postgresql", "valkey"):
        pods.append(kubelet.add(containers.of("StatefulSet", f"{RELEASE}-{name}"), net.place(name, C)))
        await kubelet.started(pods[-1], UP_S)
    await asyncio.gather(*(_connects(cluster, pod, port) for pod, port in zip(pods, (5432, 6379), strict=True)))
    spec = containers.of("Job", f"{RELEASE}-database")
    job = kubelet.add(spec, net.place("job", C))
    kubelet.start(job)
    await kubelet.until(lambda: bool(job.ends), "the ledger's tables are made", UP_S, job)
    code = job.child.process.poll() if job.child is not None else None
    await kubelet.kill_for_good(job)
    if code and len(job.ends) == 1:
        raise DidNotStart(
            f"the Job that makes the ledger's tables ended with {code}:\n{job.child.tail() if job.child else ''}"
        )


async def _connects(cluster: Cluster, pod: Pod, port: int) -> None:
    deadline = time.monotonic() + UP_S
    while True:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(pod.place.address, port), 1.0)
            writer.close()
            return
        except (OSError, TimeoutError):
            if time.monotonic() > deadline:
                tail = pod.child.tail() if pod.child is not None else ""
                raise DidNotStart(f"{pod.spec.name} does not listen on {port}:\n{tail}") from None
            await asyncio.sleep(0.1)


async def _serve(cluster: Cluster, containers: Containers) -> None:
    kubelet, net, timeline = cluster.kubelet, cluster.fabric, cluster.timeline
    gateways = [
        kubelet.add(containers.of("StatefulSet", f"{RELEASE}-gateway", i), net.place(f"gateway{i}", host))
        for i, host in enumerate((A, B))
    ]
    timeline.follow([pod.spec.name for pod in gateways])
    await asyncio.gather(*(kubelet.started(pod, UP_S) for pod in gateways))
    await cluster.start_ray(BLUE)
    controller = kubelet.add(containers.of("Deployment", f"{RELEASE}-controller"), net.place("controller", C))
    kubelet.start(controller)
    await cluster.exec(gateways[0], "headrace", "tenants", "create", TENANT)
    made = json.loads(await cluster.exec(gateways[0], "headrace", "keys", "create", TENANT, "--json"))
    cluster.key = made["key"]
    if not await cluster.until_whole(FLEET_UP_S):
        up = {pod.spec.name: sorted(timeline.up(pod.spec.name)) for pod in gateways}
        tail = controller.child.tail() if controller.child is not None else ""
        raise DidNotStart(f"not every worker has its links within {FLEET_UP_S:g} s: {up}\n{tail}")


__all__ = ["Cluster", "Size", "running"]
