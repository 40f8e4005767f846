"""A Ray cluster of several nodes on this host: a head without replicas, and nodes that tests can end one by one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.ray.drain_time import TIMEOUT_ENV, ray_timeout_s
from cluster.ray.local_cluster import LocalRay, LocalRaySettings


@dataclass
class RayNodes:
    """Nodes of a Ray cluster that tests can add and end.

    `terminate` sends a node the signal that Kubernetes sends to a pod's main process.
    """

    head: LocalRay
    folder: Path
    drain_timeout_s: float
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def log_of(self, name: str) -> str:
        """Return the output of a node's `ray start`."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def add(self, name: str, *inside: str) -> None:
        """Start a Ray node that can run replicas. Returns before the node has joined the cluster.

        `inside`: a program that wraps the command `ray start`, such as unshare.
        """
        command = [
            *inside,
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            f"--address={self.head.address}",
        ]
        command += ["--num-cpus=4", "--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats"]
        command += [
            "--include-log-monitor=false",
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
        ]
        variables = {TIMEOUT_ENV: str(ray_timeout_s(self.drain_timeout_s)), "PYTHONUNBUFFERED": "1"}
        with (self.folder / f"{name}.log").open("wb") as log:
            self.nodes[name] = subprocess.Popen(
                command,
                env={**os.environ, **self.head.environment(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def terminate(self, name: str) -> subprocess.Popen[bytes]:
        """Send SIGTERM to a node's `ray start --block`, and return the process."""
        self.nodes[name].send_signal(signal.SIGTERM)
        return self.nodes[name]


@contextlib.contextmanager
def ray_nodes(drain_timeout_s: float) -> Iterator[RayNodes]:
    """Run a Ray head without nodes. The head and all added nodes end with the context."""
    folder = Path(tempfile.mkdtemp(prefix="hr-"))
    head = LocalRay(LocalRaySettings(f"nodes-{uuid.uuid4().hex[:8]}", folder, cpus=0, gpus=0))
    made = RayNodes(head, folder, drain_timeout_s)
    try:
        head.start()
        yield made
    finally:
        head.stop()
        for process in made.nodes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(head.folder, ignore_errors=True)
