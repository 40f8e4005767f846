"""Pods, and their operation without Kubernetes. A pod is a process tree in its own namespaces.

`Kubelet` starts the pods, probes their readiness, restarts a pod whose process tree has ended, and publishes the
addresses of ready pods in DNS.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2

from loadtests.children import ROOT, Child, Children, DidNotStart
from loadtests.hosts.fabric import Place
from loadtests.hosts.rendered import DOMAIN, HOST_OF_THE_POD, Names, Spec

SANDBOX = Path(__file__).parent / "sandbox.sh"
PATH = f"{Path(sys.prefix) / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
POSTGRESQL = "/usr/lib/postgresql/*/bin"
"""Folder of PostgreSQL's programs on Debian. Images have these programs on PATH."""
JOIN = 'echo 0 > "$1/cgroup.procs"; shift; exec "$@"'
"""Shell command that joins a cgroup and then runs a program. The kernel takes a 0 in cgroup.procs as the writing
process.
"""
LAST = 10
"""Niceness of pods on hosts that serve no stream. Real hosts have processors of their own; here these pods use what the
other pods leave.
"""
LOOK_S = 0.05
PROBE_S = 1.0
CHECK = "/grpc.health.v1.Health/Check"
FIRST_BACK_OFF_S, BACK_OFF_S, MAX_BACK_OFF_S = 0.5, 10.0, 60.0
"""Restart delays in seconds. A kubelet restarts a container at once, then after 10 s, then each time after twice the
last delay.
"""
CALM_S = 600.0


@dataclass(eq=False, slots=True)
class Pod:
    """A pod, across restarts of the pod's process."""

    spec: Spec
    place: Place
    home: Path
    child: Child | None = None
    ready: bool = False
    leaving: bool = False
    """Whether the pod is being deleted: removed from DNS, and not restarted."""
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    pause_s: float | None = None
    """Delay of the pod's next restart in seconds, in place of the kubelet's back-off."""
    keeping: asyncio.Task[None] | None = None

    @property
    def log(self) -> Path:
        """Log of the current process, or of the last process that has ended. Raises RuntimeError before the first
        start.
        """
        if self.child is None:
            raise RuntimeError(f"{self.spec.name} was never started")
        return self.child.log

    @property
    def first(self) -> psutil.Process | None:
        """The first process in the pod. Killing the first process kills all processes of the pod."""
        if self.child is None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess):
            for outer in self.child.commands():
                for inner in outer.children():
                    return inner
        return None

    @property
    def alive(self) -> bool:
        """Whether the process of the pod runs."""
        return self.child is not None and self.child.alive

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the first process of the pod."""
        first = self.first
        if first is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                first.send_signal(number)

    def kill(self) -> float:
        """Kill all processes of the pod at once; return the wall-clock time of the kill."""
        now = time.time()
        self.signal(signal.SIGKILL)
        return now


def in_cgroup(command: Sequence[str], cgroup: Path, *, last: bool) -> list[str]:
    """Return the command line that runs `command` in a cgroup. `last`: whether `command` gets a lower priority (`nice`)
    than processes without it."""
    return ["bash", "-c", JOIN, "join", str(cgroup), *(("nice", "-n", str(LAST)) if last else ()), *command]


class Kubelet:
    """Manager of pods: starts pods, keeps pods running, and publishes the addresses of ready pods in DNS."""

    def __init__(
        self,
        children: Children,
        home: Path,
        names: Names,
        nameserver: str,
        cgroup: Path | None = None,
        last: Collection[str] = (),
    ) -> None:
        """Prepare a kubelet without pods. `cgroup`: cgroup of the cpu controller for all pods. `last`: hosts whose pods
        get low CPU priority.
        """
        self._children = children
        self.cgroup = cgroup
        self._last = last
        self._home = home
        self._names = names
        self._nameserver = nameserver
        self._zone = home / "zone.json"
        self._told: Mapping[str, Any] | None = None
        self.pods: dict[str, Pod] = {}
        self.environment: dict[str, str] = {}
        """Environment variables of every pod: the address of the API."""
        self.account: Path | None = None
        """Folder with the files of the service account, for pods that may use the account."""
        self.publish_names()

    @property
    def zone(self) -> Path:
        """Zone file of the DNS server."""
        return self._zone

    def publish_names(self) -> None:
        """Rewrite the zone file if a pod was added, was removed or changed its readiness."""
        zone = self._names.zone([(pod.spec, pod.place, pod.ready) for pod in self.pods.values() if not pod.leaving])
        if zone == self._told:
            return
        fresh = self._zone.with_suffix(".new")
        fresh.write_text(json.dumps(zone))
        fresh.chmod(0o644)
        fresh.replace(self._zone)
        self._told = zone

    def add(self, spec: Spec, place: Place) -> Pod:
        """Add a pod and return it; `start` runs the pod."""
        pod = self.pods[spec.name] = Pod(spec, place, self._home / "pods" / spec.name)
        return pod

    def start(self, pod: Pod) -> None:
        """Run a pod and keep it running."""
        pod.leaving = False
        pod.keeping = asyncio.create_task(self._keep_running(pod))

    async def started(self, pod: Pod, timeout_s: float) -> None:
        """Run a pod and wait until it is ready. Raises DidNotStart."""
        self.start(pod)
        await self.until(lambda: pod.ready, f"{pod.spec.name} is ready", timeout_s, pod)

    async def until(self, holds: Callable[[], bool], what: str, timeout_s: float, pod: Pod | None = None) -> None:
        """Wait until `holds` is true. Raises DidNotStart with the end of the log of `pod` if time runs out."""
        deadline = time.monotonic() + timeout_s
        while not holds():
            if time.monotonic() > deadline:
                tail = pod.child.tail() if pod is not None and pod.child is not None else ""
                raise DidNotStart(f"not within {timeout_s:g} s: {what}\n{tail}")
            await asyncio.sleep(LOOK_S)

    async def end(self, pod: Pod) -> None:
        """Delete a pod: remove it from DNS, run the preStop hook, send SIGTERM, wait the grace period, send SIGKILL."""
        pod.leaving, pod.ready = True, False
        self.publish_names()
        await asyncio.sleep(pod.spec.pre_stop_s)
        pod.signal(signal.SIGTERM)
        deadline = time.monotonic() + pod.spec.grace_s
        while pod.alive and time.monotonic() < deadline:  # noqa: ASYNC110 - another process's end is no event
            await asyncio.sleep(LOOK_S)
        await self.kill_for_good(pod)

    async def kill_for_good(self, pod: Pod) -> None:
        """Kill a pod at once, without a restart."""
        pod.leaving, pod.ready = True, False
        pod.kill()
        if pod.keeping is not None:
            pod.keeping.cancel()
            await asyncio.gather(pod.keeping, return_exceptions=True)
        if pod.child is not None:
            await pod.child.stop()
        self.publish_names()

    async def _keep_running(self, pod: Pod) -> None:
        back_off_s = FIRST_BACK_OFF_S
        while True:
            pod.starts.append(time.time())
            pod.child = self._run(pod)
            await self._watch(pod)
            pod.ends.append(time.time())
            pod.ready = False
            self.publish_names()
            await pod.child.stop()
            if pod.leaving:
                return
            if time.time() - pod.starts[-1] > CALM_S:
                back_off_s = FIRST_BACK_OFF_S
            pause_s, pod.pause_s = pod.pause_s, None
            await asyncio.sleep(back_off_s if pause_s is None else pause_s)
            back_off_s = BACK_OFF_S if back_off_s == FIRST_BACK_OFF_S else min(2 * back_off_s, MAX_BACK_OFF_S)

    async def _watch(self, pod: Pod) -> None:
        assert pod.child is not None
        asked = 0.0
        async with contextlib.AsyncExitStack() as stack:
            channel = None
            if pod.spec.ready_port:
                channel = grpc.aio.insecure_channel(f"{pod.place.address}:{pod.spec.ready_port}")
                stack.push_async_callback(channel.close)
            missed = 0
            while pod.child.alive:
                period_s = pod.spec.ready_period_s if pod.ready else 0.2  # like a startup probe
                if time.monotonic() - asked >= period_s:
                    asked = time.monotonic()
                    healthy = (
                        pod.first is not None if channel is None else await _serves(channel, pod.spec.ready_service)
                    )
                    missed = 0 if healthy else missed + 1
                    pod.ready = not pod.leaving and (healthy or (pod.ready and missed < 2))
                    self.publish_names()
                await asyncio.sleep(LOOK_S)

    def _run(self, pod: Pod) -> Child:
        spec, home = pod.spec, pod.home
        (home / "root").mkdir(parents=True, exist_ok=True)
        mounts = [f"{m.path}|{m.source or ''}|{'ro' if m.read_only else 'rw'}|{_size(m.size)}" for m in spec.mounts]
        harness_pod = {k: pod.place.host if v == HOST_OF_THE_POD else v for k, v in spec.environment.items()}
        environment = {"PATH": search_path(), "LANG": "C.UTF-8", **self.environment, **harness_pod}
        if self.account is not None and spec.component == "controller":
            mounts.append(f"/var/run/secrets/kubernetes.io/serviceaccount|{self.account}|ro|")
        nested = sorted(mounts, key=lambda line: line.split("|")[0].count("/"))
        (home / "mounts").write_text("".join(f"{line}\n" for line in nested))
        (home / "environment").write_bytes(b"".join(f"{k}={v}\0".encode() for k, v in environment.items()))
        (home / "user").write_text(f"{spec.user} {spec.group}\n")
        (home / "hostname").write_text(spec.name)
        (home / "hosts").write_text(f"127.0.0.1 localhost\n{pod.place.address} {spec.name}\n")
        search = " ".join([DOMAIN, *(DOMAIN.split(".", i)[i] for i in (1, 2))])
        (home / "resolv.conf").write_text(
            f"nameserver {self._nameserver}\nsearch {search}\noptions ndots:5 timeout:2\n"
        )
        (home / "programs").write_text("".join(f"{folder}\n" for folder in programs()))
        command = pod.place.command(
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--uts", "--ipc", "--",
            "bash", str(SANDBOX), str(home), *spec.command,
        )  # fmt: skip
        if self.cgroup is not None:
            command = in_cgroup(command, self.cgroup, last=pod.place.host in self._last)
        return self._children.start(spec.name, spec.component, command)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the kubelet while the context is open. All pods end when the context closes."""
        try:
            yield
        finally:
            await asyncio.gather(*(self.kill_for_good(pod) for pod in self.pods.values()), return_exceptions=True)


async def _serves(channel: grpc.aio.Channel, service: str) -> bool:
    check = channel.unary_unary(
        CHECK,
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=PROBE_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def search_path() -> str:
    """Return the value of PATH in pods."""
    return ":".join([PATH, *sorted(glob.glob(POSTGRESQL), reverse=True)[:1]])


def programs() -> Sequence[str]:
    """Return the folders that the images would contain: this project, the Python environment, and the Python
    installation below the environment.
    """
    folders: list[Path] = []
    for folder in sorted(
        {ROOT, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}, key=lambda path: len(path.parts)
    ):
        if not any(folder.is_relative_to(other) for other in (*folders, Path("/usr"))):
            folders.append(folder)
    return [os.fspath(folder) for folder in folders]


def _size(text: str) -> str:
    return text.removesuffix("i").lower()


def harness_pod(name: str, component: str, *command: str, mounts: Sequence[Any] = ()) -> Spec:
    """Return the spec of a pod of the harness itself, which runs a program of this project."""
    return Spec(
        name=name, component=component, command=(sys.executable, *command),
        environment={"PYTHONPATH": str(ROOT), "HOME": "/tmp", "PYTHONUNBUFFERED": "1"},  # noqa: S108 - its own
        mounts=tuple(mounts), user=0, group=0, labels={},
    )  # fmt: skip
