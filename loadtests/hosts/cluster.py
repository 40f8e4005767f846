"""The whole cluster: hosts, stores, Ray, gateways and controller, started in the order in which they need each other.

Three hosts: `a` and `b` have a Ray node and a gateway each, `c` has Ray's head, the controller, both stores, the names
and the callers. What the chart renders decides every program, argument, variable and file.
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

from cluster.cli import issuing
from loadtests.children import Children, DidNotStart
from loadtests.hosts import rendered
from loadtests.hosts.fabric import Fabric, fabric
from loadtests.hosts.pods import Kubelet, Pod, own
from loadtests.hosts.rendered import RELEASE, Containers, Mount, Names, Object, Release
from loadtests.hosts.story import Story
from loadtests.serving import ours as serving

A, B, C = "a", "b", "c"
VALUES = Path(__file__).parent / "values.yaml"
MASS, TENANT = "mass", "load"
STEP_MS, PREFILL_TOKENS_PER_S = 40, 40_000
UP_S, RAY_UP_S, FLEET_UP_S = 60.0, 120.0, 240.0
API, DNS = "kube-api", "kube-dns"


@dataclass(frozen=True, slots=True)
class Size:
    """Of the fleet of simulated workers."""

    workers: int = 4
    seats: int = 64
    """Of each worker: `max_num_seqs`, what its engine takes at most."""

    @property
    def capacity(self) -> int:
        """Streams at once that count as all that the fleet can do. An engine takes more than it can do at full speed,
        and a fleet that is to lose half of its nodes without waiting has to have that room."""
        return self.workers * self.seats // 2


@dataclass(eq=False, slots=True)
class Cluster:
    """All of it, running."""

    fabric: Fabric
    kubelet: Kubelet
    size: Size
    home: Path
    secrets: Sequence[Object]
    release: Release
    story: Story
    claims: Mapping[str, Path]
    """Volumes that were there before, by name."""
    models: Sequence[Mapping[str, object]]
    """Entries of the configuration."""
    key: str = ""

    def containers(self) -> Containers:
        """Of the release as it is."""
        return Containers(self.release, self.home / "volumes", self.claims)

    async def upgrade(self, models: Sequence[Mapping[str, object]]) -> None:
        """`helm upgrade` to other models: the controller's pod is replaced. Raises RuntimeError where a gateway's
        would be too, and DidNotStart."""
        release = _release(self.home, models, self.secrets)
        name = f"{RELEASE}-gateway"
        if release.the("StatefulSet", name) != self.release.the("StatefulSet", name):
            raise RuntimeError("another list of models restarts the gateways")
        self.release, self.models = release, models
        old = self.pod("controller-0")
        await self.kubelet.end(old)
        fresh = self.kubelet.add(self.containers().of("Deployment", f"{RELEASE}-controller"), old.place)
        await self.kubelet.started(fresh, UP_S)

    def pod(self, name: str) -> Pod:
        """By its name without the release's."""
        return self.kubelet.pods[f"{RELEASE}-{name}"]

    @property
    def gateways(self) -> list[Pod]:
        """Both."""
        return [self.pod(f"gateway-{i}") for i in range(2)]

    @property
    def nodes(self) -> list[Pod]:
        """Ray's worker nodes, on host a and host b."""
        return [self.pod(f"blue-cpu-{i}") for i in range(2)]

    @property
    def head(self) -> Pod:
        """Ray's head."""
        return self.pod("blue-head-0")

    def whole(self, beside: Collection[str] = ()) -> bool:
        """Whether every gateway has every simulated worker, not counting some that leave."""
        return self.linked(MASS, beside) >= self.size.workers

    def linked(self, model: str, beside: Collection[str] = ()) -> int:
        """So many workers of a model have their links to every gateway."""
        ups = [self.story.up(pod.spec.name) - set(beside) for pod in self.gateways]
        return min(sum(worker.startswith(f"{model}-") for worker in up) for up in ups)

    async def until_whole(self, timeout_s: float, beside: Collection[str] = ()) -> bool:
        """Wait for it; whether it came."""
        deadline = time.monotonic() + timeout_s
        while not self.whole(beside):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    def ray_runs(self) -> bool:
        """Whether Ray's dashboard answers and has every application running. Blocks."""
        url = f"http://{self.head.place.address}:8265/api/serve/applications/"
        token = self.release.files("Secret", f"{RELEASE}-secrets")["auth_token"]
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=3.0) as answer:  # noqa: S310 - http, made above
                applications = json.load(answer)["applications"]
        except (OSError, ValueError, KeyError):
            return False
        return bool(applications) and all(one["status"] == "RUNNING" for one in applications.values())

    async def exec(self, pod: Pod, *command: str, timeout_s: float = 60.0) -> str:
        """As `kubectl exec`: in a pod's namespaces, with its environment. Raises RuntimeError with what it said."""
        first = pod.first
        if first is None:
            raise RuntimeError(f"{pod.spec.name} does not run")
        environment = [part.decode() for part in (pod.home / "environment").read_bytes().split(b"\0") if part]
        arguments = ["nsenter", f"--target={first.pid}", "--all", f"--root=/proc/{first.pid}/root", "--wd=/"]
        try:
            done = await asyncio.to_thread(
                subprocess.run, [*arguments, "env", "-i", *environment, *command],
                capture_output=True, text=True, check=False, timeout=timeout_s, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command)} in {pod.spec.name}: {error}") from None
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} in {pod.spec.name}: {done.stdout[-1000:]} {done.stderr[-1000:]}")
        return done.stdout

    async def usage(self) -> list[tuple[str, int, str, int, str]]:
        """Every row of the ledger: request, segment, record, completion tokens, outcome."""
        query = "COPY (SELECT request_id, segment, record_id, completion_tokens, outcome FROM usage) TO STDOUT"
        out = await self.exec(
            self.pod("postgresql-0"), "psql", "-h", "127.0.0.1", "-U", "headrace", "-At", "-c", query, "headrace"
        )
        rows = [line.split("\t") for line in out.splitlines()]
        return [(row[0], int(row[1]), row[2], int(row[3]), row[4]) for row in rows]


def mass_source(model: Path, seed: int, size: Size) -> str:
    """The simulated workers' source, as a path in the pods; tokens with text of their own, so each step is a chunk."""
    room = f"max_num_seqs={size.seats}&max_num_batched_tokens=2048&kv_blocks=16384&max_model_len=8192"
    speed = f"decode_ms={STEP_MS}&prefill_tokens_per_s={PREFILL_TOKENS_PER_S}"
    return f"sim:///models/{model.name}?{speed}&{room}&seed={seed}&{serving.plain_tokens(model)}"


def _release(home: Path, models: Sequence[Mapping[str, object]], made: Sequence[Object]) -> Release:
    values = home / "models.yaml"
    values.write_text(yaml.safe_dump({"config": {"models": list(models)}}))
    return rendered.render([VALUES, values], made)


@asynccontextmanager
async def running(children: Children, folder: Path, *, size: Size, seed: int) -> AsyncIterator[Cluster]:
    """The cluster with its fleet up and a key to call with; nothing of it is left afterwards. Raises DidNotStart."""
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
    release = _release(home, [entry], made)
    async with AsyncExitStack() as stack:
        net = stack.enter_context(fabric((A, B, C)))
        dns = net.place("dns", C)
        kubelet = Kubelet(children, home, Names(list(release.of("Service"))), dns.address)
        story = Story(children.folder)
        stack.enter_context(contextlib.closing(story))
        await stack.enter_async_context(kubelet.running())
        cluster = Cluster(net, kubelet, size, home, made, release, story, claims, [entry])
        containers = cluster.containers()
        await _site(cluster, dns)
        await _stores(cluster, containers)
        await _serve(cluster, containers)
        yield cluster


async def _site(cluster: Cluster, dns: Any) -> None:
    """What every Kubernetes cluster has: names, and an API."""
    kubelet, net = cluster.kubelet, cluster.fabric
    zone = Mount("/zone", cluster.kubelet.zone.parent, read_only=True)
    names = kubelet.add(
        own(DNS, "dns", "-m", "loadtests.hosts.inside.dns_server", "/zone/zone.json", mounts=[zone]), dns
    )
    place = net.place("api", C)
    folder = cluster.home / "api"
    folder.mkdir()
    issuing.make_authority(folder / "ca.crt", folder / "ca.key", 30)
    cert, key = issuing.issue_server(folder, "tls", [place.address], 30)
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
        own(
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
    await kubelet.drop(job)
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
    kubelet, net, story = cluster.kubelet, cluster.fabric, cluster.story
    gateways = [
        kubelet.add(containers.of("StatefulSet", f"{RELEASE}-gateway", i), net.place(f"gateway{i}", host))
        for i, host in enumerate((A, B))
    ]
    story.follow([pod.spec.name for pod in gateways])
    await asyncio.gather(*(kubelet.started(pod, UP_S) for pod in gateways))
    head = kubelet.add(containers.ray("blue"), net.place("head", C))
    await kubelet.started(head, RAY_UP_S)
    await _connects(cluster, head, rendered.HEAD_PORT)
    for i, host in enumerate((A, B)):
        node = kubelet.add(containers.ray("blue", "cpu", i), net.place(f"node{i}", host))
        kubelet.start(node)
    controller = kubelet.add(containers.of("Deployment", f"{RELEASE}-controller"), net.place("controller", C))
    kubelet.start(controller)
    await cluster.exec(gateways[0], "headrace", "tenants", "create", TENANT)
    made = json.loads(await cluster.exec(gateways[0], "headrace", "keys", "create", TENANT, "--json"))
    cluster.key = made["key"]
    if not await cluster.until_whole(FLEET_UP_S):
        up = {pod.spec.name: sorted(story.up(pod.spec.name)) for pod in gateways}
        tail = controller.child.tail() if controller.child is not None else ""
        raise DidNotStart(f"not every worker has its links within {FLEET_UP_S:g} s: {up}\n{tail}")


__all__ = ["Cluster", "Size", "running"]
